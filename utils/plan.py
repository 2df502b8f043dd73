"""The arithmetic of a training: epochs turned into updates, and the learning rate of each update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config import Config
from utils.schedules import learning_rate_factor


@dataclass(frozen=True)
class TrainingPlan:
    """What a configuration means for a data set and a number of processes; every duration in updates.

    Args:
        config: of the run.
        global_batch_size: pictures per batch over all processes.
        batches_per_epoch: whole global batches.
    """

    config: Config
    global_batch_size: int
    batches_per_epoch: int

    @property
    def effective_batch_size(self) -> int:
        """Pictures per update."""
        return self.global_batch_size * self.config.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        """Length of the training."""
        return self.config.max_train_steps or self.updates(self.config.epochs or 0)

    @property
    def save_steps(self) -> int | None:
        """Updates between checkpoints; None: only at the end."""
        return self.config.save_checkpoint_steps or self.updates(self.config.save_checkpoint_epochs or 0) or None

    def num_saves(self, done: int) -> int:
        """Returns the checkpoints that are still written after `done` updates."""
        every = self.save_steps or self.total_steps
        return max(0, -(-self.total_steps // every) - done // every)

    @property
    def warmup_steps(self) -> int:
        """Updates of the warm-up."""
        return self.config.lr_warmup_steps or self.updates(self.config.lr_warmup_epochs or 0)

    @property
    def peak_rate(self) -> float:
        """Learning rate after the warm-up."""
        return self.config.lr * (self.effective_batch_size if self.config.scale_lr else 1)

    def rate(self, step: int) -> float:
        """Returns the learning rate of an update, counted from 0."""
        config = self.config
        return self.peak_rate * learning_rate_factor(
            step, self.total_steps, self.warmup_steps, config.lr_scheduler, config.lr_cycles, config.min_lr_ratio
        )

    def describe_batch(self) -> str:
        """Returns the effective batch with its arithmetic."""
        config = self.config
        processes = self.global_batch_size // config.train_batch_size
        return (
            f"effective batch {self.effective_batch_size} = {config.train_batch_size} per process x "
            f"{config.gradient_accumulation_steps} accumulated x {processes} process{'es' if processes > 1 else ''}"
        )

    def describe_rate(self) -> str:
        """Returns the learning rate's course in words."""
        config, peak = self.config, f"{self.peak_rate:.3g}"
        floor = f"{self.peak_rate * config.min_lr_ratio:.3g}"
        warmup = f"linear warm-up over {self.warmup_steps} updates to {peak}, then " if self.warmup_steps else ""
        shape = {
            "constant": f"constant at {peak}",
            "linear": f"linear from {peak} down to {floor}",
            "cosine": f"{config.lr_cycles:g} cosine periods between {peak} and {floor}",
        }[config.lr_scheduler]
        return f"{warmup}{shape}, {self.rate(self.total_steps - 1):.3g} at the last update"

    def updates(self, epochs: float) -> int:
        """Returns the updates that `epochs` take."""
        return math.ceil(epochs * self.batches_per_epoch / self.config.gradient_accumulation_steps)

    def __str__(self) -> str:
        """Describes the plan in one line."""
        return (
            f"{self.batches_per_epoch} batches an epoch, effective batch {self.effective_batch_size}, {self.total_steps} "
            f"updates ({self.warmup_steps} warm-up), peak rate {self.peak_rate:.3g}"
        )
