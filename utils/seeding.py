"""Stateless randomness: every draw is seeded by what it is for, never by rank or history."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a draw is for; different purposes never share random numbers."""

    ORDER = 0
    AUGMENTATION = 1
    TRAINING_NOISE = 2
    INFERENCE_NOISE = 3
    ROUNDING = 4
    CUTMIX = 5


def numpy_generator(stream: Stream, seed: int, *position: int) -> np.random.Generator:
    """Returns a NumPy generator for (stream, seed, position), for instance position = (epoch, index)."""
    return np.random.default_rng(np.random.SeedSequence((int(stream), seed, *position)))


def torch_generator(stream: Stream, seed: int, *position: int) -> torch.Generator:
    """Returns a CPU torch generator for (stream, seed, position), for instance position = (epoch, index)."""
    return torch.Generator().manual_seed(_seed(stream, seed, *position))


def reseed(stream: Stream, seed: int, *position: int) -> None:
    """Seeds torch's own generators, for a library that draws from them (stochastic rounding does)."""
    torch.manual_seed(_seed(stream, seed, *position))


def _seed(stream: Stream, seed: int, *position: int) -> int:
    state = np.random.SeedSequence((int(stream), seed, *position)).generate_state(1, np.uint64)
    return int(state[0] >> 1)
