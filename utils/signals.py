"""Leaving in order: signals, a launcher that died, and an answer that all processes share."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch

from utils.errors import EXIT_SIGINT, EXIT_SIGTERM

# Environment variables that `accelerate launch` and torchrun give their children.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class StopRequests:
    """Notices SIGTERM, Ctrl-C and the death of the launcher; make it early, before heavy imports matter.

    The first signal only sets a flag; a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None
        self._group: torch.distributed.ProcessGroup | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def share(self) -> None:
        """Lets all processes of the group agree from now on; called by all of them, once the group exists."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # On the CPU over gloo, so that asking at every update does not wait for the GPU.
            self._group = torch.distributed.new_group(backend="gloo")

    def poll(self) -> int:
        """Returns the exit code that some process was asked to leave with, 0 for none; called by all of them."""
        if not self.exit_code and self._launcher is not None and os.getppid() != self._launcher:
            self.exit_code = EXIT_SIGTERM
        if self._group is None:
            return self.exit_code
        answer = torch.tensor(self.exit_code)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, group=self._group)
        self.exit_code = int(answer)
        return self.exit_code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
        signal.signal(number, signal.SIG_DFL)
