"""Optimiser states as safetensors: named tensors and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def gather_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, keep: bool = True
) -> dict[str, torch.Tensor]:
    """Returns the optimiser's per-parameter state as whole tensors on the CPU, `<parameter>/<entry>`.

    Called by all processes together where an engine shards the parameters.

    Args:
        optimizer: whose state it is.
        named_parameters: of the model.
        keep: whether this process is one that needs it; others take part and return nothing, to spare the host's memory.
    """
    tensors = {}
    for name, parameter in named_parameters:
        for entry, value in optimizer.state.get(parameter, {}).items():
            for part, tensor in _parts(value):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if keep:
                    tensors[f"{name}/{entry}{part}"] = whole.detach().cpu().contiguous()
    return tensors


def save_optimizer(optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, path: Path) -> None:
    """Writes what `gather_optimizer` returns."""
    save_file(gather_optimizer(optimizer, named_parameters), path)


def load_optimizer(optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, path: Path) -> None:
    """Reads what `save_optimizer` wrote into a fresh optimiser over the same parameters.

    Raises:
        ValueError: if a tensor belongs to no parameter, or has another shape, or if the state is another optimiser's.
    """
    parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    # torch keeps the step count on the CPU, but for optimisers that update all tensors of a group on the device at once.
    on_device = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    tensors = load_file(path)
    if tensors and (missing := parameters.keys() - {key.rsplit("/", 1)[0] for key in tensors}):
        raise ValueError(f"no optimiser state for {len(missing)} parameters, {min(missing)} among them")
    packed = any("." in key.rsplit("/", 1)[1] for key in tensors)
    if packed:
        _start(optimizer)
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"optimiser state for {name}, which the model does not have")
        parameter = parameters[name]
        entry, _, part = entry.partition(".")
        state = optimizer.state[parameter]
        if part:
            place = getattr(state.get(entry), part, None)
            if place is None or place.shape != value.shape:
                raise ValueError(f"optimiser state of {name} is not in this optimiser's form")
            place.copy_(value)
        elif value.ndim and value.shape != parameter.shape:
            raise ValueError(f"optimiser state of {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        elif value.ndim and isinstance(parameter, DTensor):
            state[entry] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        else:
            state[entry] = value.to(parameter.device) if value.ndim or id(parameter) in on_device else value


def _parts(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a value's tensors: itself, or what a quantised tensor is made of."""
    if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
        for name in value.__tensor_flatten__()[0]:
            yield f".{name}", getattr(value, name)
    else:
        yield "", torch.as_tensor(value)


def _start(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimiser allocate its state; a gradient of zero without weight decay moves nothing."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
