"""The learning rate as a pure function of the update; there is no scheduler state to save."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, scheduler: str, cycles: float = 3.5, min_ratio: float = 0.0
) -> float:
    """Returns the rate of an update as a share of the peak rate.

    Linear warm-up, then constant, linear or cosine with periods and a floor: `floor + (1 - floor) * shape(progress)`.

    Args:
        step: the update, from 0 to total_steps - 1.
        total_steps: length of the training in updates.
        warmup_steps: updates of the warm-up; the last of them is at the peak.
        scheduler: constant, linear or cosine.
        cycles: cosine periods after the warm-up; k + 0.5 ends at the floor.
        min_ratio: the floor of linear and cosine, in [0, 1].

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: for an unknown scheduler.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    # The first update after the warm-up is at progress 0 and the last of all at progress 1.
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if scheduler == "constant":
        return 1.0
    if scheduler == "linear":
        shape = 1 - progress
    elif scheduler == "cosine":
        shape = (1 + math.cos(2 * math.pi * cycles * progress)) / 2
    else:
        raise ValueError(f"unknown scheduler {scheduler!r}; valid: constant, linear, cosine")
    return min_ratio + (1 - min_ratio) * shape
