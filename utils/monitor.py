"""Watches a training: progress bar, history, tracker, pictures, and the check that the loss is finite."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from utils.errors import TrainingDivergedError, first_line
from utils.history import History, read_history
from utils.panel import Panel
from utils.trackers import Tracking

MAX_NAMES_IN_MESSAGE = 32


class TrainingMonitor:
    """Records updates without making the device wait between logging steps.

    Args:
        accelerator: of the run.
        output_dir: of the run; None: nothing is written.
        start: updates done before.
        total: updates in all.
        samples_per_update: over all processes.
        log_steps: updates between two rows.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | None,
        start: int,
        total: int,
        samples_per_update: int,
        log_steps: int,
    ) -> None:
        self.accelerator = accelerator
        self.samples_per_update = samples_per_update
        self.log_steps = log_steps
        self.output_dir = Path(output_dir) if output_dir is not None and accelerator.is_main_process else None
        self.history = History(self.output_dir / "history.csv", start) if self.output_dir else None
        self.tracking = Tracking(accelerator, self.say)
        self.row: dict[str, float] = {}  # the last one of an update
        self.bar = tqdm(
            initial=start, total=total, desc="training", unit="update", disable=not accelerator.is_main_process
        )
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=accelerator.device)
        self._recent_files: list[tuple[int, str]] = []
        self._losses: dict[str, torch.Tensor] = {}
        self._waited_seconds = 0.0
        self._timed_step, self._timed_at = start, time.monotonic()

    def timed(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the batches, and counts the time that the training waits for them."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self._waited_seconds += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def record_batch(self, step: int, losses: Mapping[str, torch.Tensor], files: Sequence[str]) -> None:
        """Adds one batch's named losses, each (B,), to the update `step` that it belongs to."""
        for name, values in losses.items():
            mean = values.detach().mean()
            self._losses[name] = self._losses[name] + mean if name in self._losses else mean
            self._flag(step, mean)
        self._recent_files += [(step, file) for file in files]

    def record_norm(self, step: int, grad_norm: torch.Tensor | None) -> None:
        """Adds the gradient norm of update `step`: a finite loss may have a gradient that is not."""
        # A loss scaler (fp16) meets such gradients as a matter of course and skips their update.
        if grad_norm is not None and self.accelerator.mixed_precision != "fp16":
            self._flag(step, grad_norm.to(self._first_bad_step.device))

    def finish_update(
        self, step: int, epoch: float, rate: float, grad_norm: torch.Tensor | None, num_batches: int
    ) -> None:
        """Ends update `step`; on a logging step writes its losses, averaged over batches and processes."""
        self.bar.update(1)
        losses, self._losses = self._losses, {}
        if step % self.log_steps and step != self.bar.total:
            return
        self.check_finite(step)
        stacked = torch.stack([losses[name] for name in sorted(losses)]) / num_batches
        averaged = self.accelerator.reduce(stacked, "mean").tolist()
        values = dict(zip(sorted(losses), averaged, strict=True))
        memory = self._peak_memory_gb()
        now = time.monotonic()
        seconds = max(now - self._timed_at, 1e-9)
        speed, data_wait = (step - self._timed_step) * self.samples_per_update / seconds, self._waited_seconds / seconds
        self._timed_step, self._timed_at, self._waited_seconds = step, now, 0.0
        norm = float("nan") if grad_norm is None else float(grad_norm)
        costs = {"samples_per_second": round(speed, 2), "data_wait": round(data_wait, 3), "memory_gb": memory}
        self.row = {"epoch": epoch, "lr": rate, "grad_norm": norm, **costs, **values}
        self._write(step, self.row)
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, rate {rate:.2e}, grad norm {norm:.3f}, {speed:.1f} samples/s", refresh=False
        )

    def record_validation(
        self, step: int, epoch: float, summary: Mapping[str, float], panel: Panel | None = None
    ) -> None:
        """Writes a validation's scores, and a panel of pictures as `panels/step-NNNNNN.png`; called by all processes.

        The time and the memory that it took do not count towards the training's.
        """
        scores = {f"val_{name}": summary[name] for name in ("iou", "recall", "mse")}
        self._write(step, {"epoch": epoch, "memory_gb": self._peak_memory_gb(), **scores})
        if panel is not None and self.output_dir:
            picture = panel.draw(f"update {step}, validation IoU {scores['val_iou']:.3f}")
            try:
                panel.save(picture, self.output_dir / "panels" / f"step-{step:06d}.png")
            except OSError as error:  # no reason to end a training
                self.say(f"warning: the panel of update {step} could not be written ({first_line(error)})")
            self.tracking.log_panel(picture, step)
        line = f"step {step}: validation IoU {scores['val_iou']:.4f}, recall {scores['val_recall']:.4f}"
        self.say(f"{line}, MSE {scores['val_mse']:.4f} on {summary['num_images']} pictures")
        self._timed_step, self._timed_at, self._waited_seconds = step, time.monotonic(), 0.0

    def has_validated(self, step: int) -> bool:
        """Returns whether the history holds a validation of that update; the main process's answer counts."""
        found = self.history is not None and any(
            row["step"] == str(step) and row["val_iou"] for row in read_history(self.history.path)
        )
        return bool(broadcast_object_list([found])[0])

    def check_finite(self, step: int) -> None:
        """Reads the on-device flag; called by all processes, when logging and before every save.

        Raises:
            TrainingDivergedError: naming the first bad update, the files since the last check and what to do.
        """
        first = int(self._first_bad_step)
        found = gather_object([(first, self._recent_files if first >= 0 else [])])
        self._recent_files = []
        bad_steps = [bad_step for bad_step, _ in found if bad_step >= 0]
        if not bad_steps:
            return
        recent = [entry for _, group in found for entry in group]
        recent.sort(key=lambda entry: entry[0] != min(bad_steps))  # those of the first bad update come first
        names = list(dict.fromkeys(file for _, file in recent))
        more = f" and {len(names) - MAX_NAMES_IN_MESSAGE} more" if len(names) > MAX_NAMES_IN_MESSAGE else ""
        raise TrainingDivergedError(
            f"the loss or its gradient was not finite at update {min(bad_steps)} (noticed at {step}); nothing was saved since. "
            f"Pictures since the last check, that update's first: {', '.join(names[:MAX_NAMES_IN_MESSAGE])}{more}. Look at these, lower lr, "
            "or train in bf16 instead of fp16; then resume with resume_from_checkpoint: latest"
        )

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(line)

    def close(self) -> None:
        """Closes the bar and the tracker."""
        self.bar.close()
        self.tracking.close()

    def _flag(self, step: int, value: torch.Tensor) -> None:
        bad = (self._first_bad_step < 0) & ~torch.isfinite(value)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def _peak_memory_gb(self) -> float:
        """Returns the most that a process's GPU held since the last call, or that a process on the CPU has ever held, in 10^9 bytes."""
        device = self.accelerator.device
        if device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        peaks = self.accelerator.gather(torch.tensor([peak / 1e9], device=device))
        return round(float(peaks.max()), 3)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.history is not None:
            self.history.append(step=step, **values)
        self.tracking.log(values, step)
