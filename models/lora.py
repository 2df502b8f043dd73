"""Low-rank adapters (LoRA, arXiv 2106.09685) of the transformer, through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.errors import InputError, first_line

WEIGHTS_FILE_NAME = "adapter_model.safetensors"
CONFIG_FILE_NAME = "adapter_config.json"
ALWAYS_TRAINED = "pos_embed.proj"


def add_lora(transformer: SD3Transformer2DModel, rank: int, targets: str) -> None:
    """Freezes the transformer and gives its target layers trainable adapters of scale 1, in fp32.

    A patch projection that an objective has widened is trained whole: its halves start equal and must grow apart.

    Args:
        transformer: changed in place.
        rank: of the adapters.
        targets: ends of the names of linear layers, with commas between them.

    Raises:
        InputError: if peft is missing or no layer has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("trainable: lora needs peft; pip install -r requirements-memory.txt") from error
    names = [name.strip() for name in targets.split(",") if name.strip()]
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [target for target in names if not any(name == target or name.endswith(f".{target}") for name in linear)]
    if unknown or not names:
        raise InputError(f"lora_targets: no linear layer of this base ends in {', '.join(unknown) or 'an empty name'}")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0))
    if is_widened(transformer):
        transformer.pos_embed.proj.requires_grad_(True)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_widened(transformer: SD3Transformer2DModel) -> bool:
    """Returns whether the transformer takes more channels than it gives."""
    return bool(transformer.pos_embed.proj.in_channels != transformer.out_channels)


def has_lora(transformer: torch.nn.Module) -> bool:
    """Returns whether adapters have been added."""
    return bool(getattr(transformer, "peft_config", None))


def save_lora(transformer: SD3Transformer2DModel, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes adapters in peft's form, `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        transformer: with adapters; gives names and configuration.
        state_dict: its whole weights.
        folder: created.
    """
    from peft import get_peft_model_state_dict

    adapters = get_peft_model_state_dict(transformer, state_dict=state_dict)
    if is_widened(transformer):
        adapters |= {name: value for name, value in state_dict.items() if name.startswith(f"{ALWAYS_TRAINED}.")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in adapters.items()}, folder / WEIGHTS_FILE_NAME)
    settings: dict[str, Any] = transformer.peft_config["default"].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / CONFIG_FILE_NAME).write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


def load_lora(transformer: SD3Transformer2DModel, folder: Path) -> None:
    """Reads weights that `save_lora` wrote into a transformer whose adapters `add_lora` has added.

    Raises:
        InputError: naming the file.
    """
    from peft import set_peft_model_state_dict

    path = folder / WEIGHTS_FILE_NAME
    try:
        tensors = load_file(path)
        whole = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{ALWAYS_TRAINED}.")}
        answer: Any = set_peft_model_state_dict(transformer, tensors)
        own = transformer.state_dict()
        if answer.unexpected_keys or any("lora_" in name for name in answer.missing_keys):
            raise ValueError("its layers are not those of lora_rank and lora_targets")
        for name, value in whole.items():
            own[name].copy_(value)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: cannot be loaded as adapters of this base ({first_line(error)})") from error


def merge_lora(transformer: SD3Transformer2DModel) -> None:
    """Adds the adapters to the weights and removes them; the output stays the same to float precision."""
    transformer.fuse_lora()
    transformer.unload_lora()
