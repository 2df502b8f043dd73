"""Optimiser states as safetensors: named tensors and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], path: Path
) -> None:
    """Writes the optimiser's per-parameter state as tensors `<parameter>/<entry>`."""
    tensors = {}
    for name, parameter in named_parameters:
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, path)


def load_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], path: Path
) -> None:
    """Reads what `save_optimizer` wrote into a fresh optimiser over the same parameters.

    Raises:
        ValueError: if a tensor belongs to no parameter or has another shape.
    """
    parameters = dict(named_parameters)
    tensors = load_file(path)
    if tensors and (missing := parameters.keys() - {key.rsplit("/", 1)[0] for key in tensors}):
        raise ValueError(f"no optimiser state for {len(missing)} parameters, {min(missing)} among them")
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"optimiser state for {name}, which the model does not have")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"optimiser state of {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        # A scalar (the step count) stays on the CPU, where torch keeps it.
        optimizer.state[parameter][entry] = value.to(parameter.device) if value.ndim else value
