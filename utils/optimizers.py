"""The optimisers by name, and their learning rates."""

from __future__ import annotations

from typing import Any

import torch

from models.folding import parameter_groups
from utils.config import Config
from utils.errors import InputError


def build_optimizer(transformer: Any, config: Config, learning_rate: float) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable parameters.

    Weights in bf16 are rounded stochastically after the update, because most updates are smaller than what bf16 resolves
    (arXiv 2010.06192); torchao does that, and keeps the moments in 8 bit (arXiv 2110.02861).

    Args:
        transformer: whose parameters are trained.
        config: of the run.
        learning_rate: of the first update.

    Raises:
        InputError: if torchao is needed and missing.
    """
    groups = parameter_groups(transformer, learning_rate)
    settings: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "adamw" and config.weights == "fp32":
        return torch.optim.AdamW(groups, fused=True, **settings)  # one pass over each tensor
    try:
        from torchao.optim import AdamW8bit, _AdamW
    except ImportError as error:
        raise InputError(
            f"optimizer: {config.optimizer} with weights: {config.weights} needs torchao; pip install -r requirements-memory.txt"
        ) from error
    chosen = AdamW8bit if config.optimizer == "adamw_8bit" else _AdamW
    return chosen(groups, bf16_stochastic_round=config.weights == "bf16", **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate; a group with a `rate_scale` gets its multiple."""
    for group in optimizer.param_groups:
        value = rate * group.get("rate_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # compiled optimisers read it as a tensor
            group["lr"].fill_(value)
        else:
            group["lr"] = value
