"""Leaving in order: signals, a launcher that died, and an answer that all processes share."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch

from utils.errors import EXIT_SIGINT, EXIT_SIGTERM

# Environment variables that `accelerate launch` and torchrun give their children.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
PATIENCE_SECONDS = 3.0


class StopRequests:
    """Notices SIGTERM, Ctrl-C and the death of the launcher; make it early, before heavy imports matter.

    The first signal only sets a flag; one that comes seconds later ends the process at once. (A launcher passes on the
    Ctrl-C that the terminal has already given to all.)
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None
        self._asked_at = 0.0
        if self._launcher == 1 and not _is_launcher(1):
            self.exit_code = EXIT_SIGTERM  # it died before we could look
        self._group: torch.distributed.ProcessGroup | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def share(self) -> None:
        """Lets all processes of the group agree from now on; called by all of them, once the group exists."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # On the CPU over gloo, so that asking at every update does not wait for the GPU.
            self._group = torch.distributed.new_group(backend="gloo")

    def noticed(self) -> int:
        """Returns the exit code that this process was asked to leave with, 0 for none, without asking the others."""
        if not self.exit_code and self._launcher is not None and os.getppid() != self._launcher:
            self.exit_code = EXIT_SIGTERM
        return self.exit_code

    def poll(self) -> int:
        """Returns the exit code that some process was asked to leave with, 0 for none; called by all of them."""
        if self._group is None:
            return self.noticed()
        answer = torch.tensor(self.noticed())
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, group=self._group)
        self.exit_code = int(answer)
        return self.exit_code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at and now - self._asked_at > PATIENCE_SECONDS:
            os._exit(self.exit_code)
        self._asked_at = self._asked_at or now
        self.exit_code = self.exit_code or (EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM)


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return any(word in command for word in ("accelerate", "torchrun", "torch.distributed"))
