"""A moving average of the trained weights, in the place of the weights while it is scored or saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class MovingAverage:
    """Exponential moving average of a model's trainable parameters, in fp32.

    Its decay grows to `decay` as (1 + step) / (10 + step), so that the start is forgotten (as in Polyak averaging, whose
    mean over all steps the first steps follow closely).

    Args:
        model: whose parameters are whole on this process, and stay where they are.
        decay: in (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.decay = decay
        self.average = {name: value.detach().float().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after update `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = [value.detach().float() for value in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, torch.Tensor]]:
        """Puts the average into the model; yields the raw weights on the CPU, and puts them back at the end."""
        raw = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()}
        try:
            self._put(self.average)
            yield raw
        finally:
            self._put(raw)

    def load(self, average: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a saved average of the same parameters.

        Raises:
            KeyError: if one is missing.
        """
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
