"""A few updates of a run with its own models, data and optimiser that leave nothing behind, for measuring."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed

from dataset.trans10k import Scan
from utils.config import Config
from utils.engine import build_accelerator
from utils.errors import keep_until_exit
from utils.plan import TrainingPlan
from utils.signals import StopRequests

WARMUP_UPDATES = 2  # slower than the others: caches, kernels and memory are set up
TIMED_UPDATES = 5
PATIENCE_SECONDS = 60.0  # after which what has been timed is enough
MIN_PAIRS = 8


@dataclass(frozen=True)
class Measured:
    """What a few updates took.

    Args:
        seconds: of an update, the median.
        updates: that were timed.
        memory_gb: the most that a process held, see `utils.monitor`.
    """

    seconds: float
    updates: int
    memory_gb: float


class MeasuringPlan(TrainingPlan):
    """The plan of a few updates."""

    def __str__(self) -> str:
        """Describes the plan in one line."""
        return f"measuring {TIMED_UPDATES} updates of {self.effective_batch_size} pictures after {WARMUP_UPDATES} that do not count, a minute at most"


def rehearsal_config(config: Config, folder: str, updates: int) -> Config:
    """Returns the configuration of a few updates that write nothing outside of `folder`."""
    return replace(
        config,
        output_dir=folder,
        resume_from_checkpoint=None,
        tracker="none",
        epochs=None,
        max_train_steps=updates,
        log_steps=1,
        val_steps=None,
    )


def measure(config: Config, train: Scan, make_trainer: Callable[..., Any]) -> Measured:
    """Times a few updates on the first pairs; called by all processes of one machine.

    Args:
        config: of the run.
        train: pairs of the run.
        make_trainer: `trainer.Trainer`.

    Raises:
        InputError: if something is wrong that only building the models shows.
    """
    stop = StopRequests()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(rehearsal_config(config, folder, 1))
        stop.share()
        # Latents of a few pairs are cached where the first process says, which removes them.
        (shared,) = broadcast_object_list([folder])
        rehearsal = replace(
            rehearsal_config(config, shared, WARMUP_UPDATES + TIMED_UPDATES),
            latent_cache_path=None,
            latent_cache_variants=1,
        )
        count = max(MIN_PAIRS, config.train_batch_size * accelerator.num_processes)
        set_seed(config.seed)
        few = replace(train, pairs=train.pairs[:count])
        trainer = keep_until_exit(make_trainer(rehearsal, accelerator, few, None, stop, MeasuringPlan))
        seconds: list[float] = []
        memory, start = 0.0, time.perf_counter()
        with closing(trainer.rehearse()) as rows:
            for row in rows:
                now = time.perf_counter()
                seconds.append(now - start)
                memory, start = max(memory, row["memory_gb"]), now
                if broadcast_object_list([sum(seconds) > PATIENCE_SECONDS])[0]:
                    break
        accelerator.wait_for_everyone()
    trainer.monitor.close()
    timed = seconds[WARMUP_UPDATES:] or seconds[-1:]
    return Measured(statistics.median(timed), len(timed), memory)
