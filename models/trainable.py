"""What is trained: the whole transformer, folded or not, or adapters, and a mask decoder; and how they are loaded again.

The mask decoder is trained as a submodule of the transformer, because engines prepare one module; checkpoints keep the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from dataset.trans10k import layout_of
from models.base import MASK_DECODER, check_prompt, check_resolution, load_transformer, widen_patch_projection
from models.folding import fold, is_folded
from models.lora import add_lora, load_lora, merge_lora
from models.mask_decoder import LightMaskDecoder, load_mask_decoder
from models.objectives import OBJECTIVES
from models.prompt import EmptyPrompt
from utils.config import Config
from utils.errors import InputError

ADAPTER_FOLDER_NAME = "adapter"
MIN_8BIT_EPSILON = 1e-6


def build_trainable(
    config: Config, base: Path, checkpoint: Path | None, prompt: EmptyPrompt, vae: AutoencoderKL
) -> SD3Transformer2DModel:
    """Loads the transformer that a run trains, from its base or, to go on, from a checkpoint.

    Args:
        config: of the run, see `check_settings`.
        base: the base model's folder.
        checkpoint: to go on from.
        prompt: the empty prompt.
        vae: of the base.

    Raises:
        InputError: if base, prompt, objective and configuration do not fit each other.
    """
    if checkpoint is None or (checkpoint / ADAPTER_FOLDER_NAME).is_dir():
        transformer = load_transformer(base)
    else:
        transformer = load_transformer(checkpoint)
    check_prompt(prompt, transformer)
    check_resolution(config.resolution, transformer)
    widen_patch_projection(transformer, input_channels(config, transformer))
    timestep = OBJECTIVES[config.objective].constant_timestep
    if config.fold_conditioning and timestep is not None and not is_folded(transformer):
        transformer = fold(transformer, prompt, timestep)
    if config.weights == "bf16":
        lower_precision(transformer, torch.bfloat16)
    if config.trainable == "lora":
        add_lora(transformer, config.lora_rank, config.lora_targets)
        if checkpoint is not None:
            load_lora(transformer, checkpoint / ADAPTER_FOLDER_NAME)
    if config.mask_decoder == "light":
        decoder = load_mask_decoder(find_mask_decoder(config, base, checkpoint), vae)
        transformer.add_module(MASK_DECODER, decoder)  # small, so in fp32 whatever the weights are
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(transformer)
    return transformer.train()


def check_settings(config: Config) -> None:
    """Looks for settings that contradict each other.

    Raises:
        InputError: naming both.
    """
    for message in contradictions(config):
        raise InputError(message)


def contradictions(config: Config) -> Iterator[str]:
    """Yields a message for every two settings that contradict each other."""
    if config.fold_conditioning and OBJECTIVES[config.objective].constant_timestep is None:
        yield (
            f"fold_conditioning: objective: {config.objective} has a timestep that changes; leave one of the two out"
        )
    if config.weights == "bf16" and config.data_type == "fp16":
        yield "weights: bf16 does not go with data_type: fp16, whose gradients are scaled; use data_type: bf16"
    if config.optimizer == "adamw_8bit" and config.adam_epsilon < MIN_8BIT_EPSILON:
        yield (
            f"optimizer: adamw_8bit rounds small second moments to 0, and divides by adam_epsilon alone there: {config.adam_epsilon:g} "
            f"would make updates of thousands of times the rate; set adam_epsilon to {MIN_8BIT_EPSILON:g} or more"
        )
    if config.mask_decoder_path is not None and config.mask_decoder == "vae":
        yield "mask_decoder_path is given, but mask_decoder is vae; set mask_decoder: light, or leave it out"
    if not config.latent_loss_weight and not config.pixel_loss_weight:
        yield "latent_loss_weight and pixel_loss_weight are both 0; there would be nothing to train"
    if config.cutmix and config.train_batch_size == 1:
        yield "cutmix takes parts of other samples of the batch, train_batch_size is 1; raise it, or leave cutmix out"
    if config.edge_weight and not config.pixel_loss_weight:
        yield "edge_weight is a part of the loss on pixels; set pixel_loss_weight above 0, or leave it out"
    if config.mask_decoder == "light" and not config.pixel_loss_weight:
        yield (
            "mask_decoder: light is trained by the loss on pixels; set pixel_loss_weight above 0, or mask_decoder: vae"
        )
    if config.mask_decoder == "light" and layout_of(config.dataset_name, config.palette).palette:
        yield (
            f"mask_decoder: light tells glass or not, the masks of dataset_name: {config.dataset_name} tell classes; use mask_decoder: vae"
        )
    if config.fold_conditioning and config.trainable == "lora":
        yield (
            "fold_conditioning: trainable: lora keeps the base's layers, folding replaces them; leave one of the two out"
        )


def load_trained(config: Config, base: Path, checkpoint: Path, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Loads a checkpoint's transformer for inference; adapters are merged into their base.

    Args:
        config: that the checkpoint was trained with.
        base: folder of its base model.
        checkpoint: folder.
        dtype: of the weights.

    Raises:
        InputError: if a part is missing or broken.
    """
    adapter = checkpoint / ADAPTER_FOLDER_NAME
    if not adapter.is_dir():
        return load_transformer(checkpoint, dtype).eval()
    transformer = load_transformer(base)
    widen_patch_projection(transformer, input_channels(config, transformer))
    add_lora(transformer, config.lora_rank, config.lora_targets)
    load_lora(transformer, adapter)
    merge_lora(transformer)
    lower_precision(transformer, dtype)
    return transformer.eval()


def split_mask_decoder(
    state_dict: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns a trained module's weights as the transformer's own and the mask decoder's, empty where there is none."""
    prefix = f"{MASK_DECODER}."
    own = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
    decoder = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    return own, decoder


def mask_decoder_of(transformer: torch.nn.Module) -> LightMaskDecoder | None:
    """Returns the mask decoder that is trained with a transformer, None if there is none."""
    return getattr(transformer, MASK_DECODER, None)


def lower_precision(transformer: SD3Transformer2DModel, dtype: torch.dtype) -> None:
    """Casts the weights, but for those that the class keeps in fp32."""
    kept = tuple(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """Compiles each block in place: they are alike, so the compiler works once for all of them."""
    for block in transformer.transformer_blocks:
        block.compile()


def find_mask_decoder(config: Config, base: Path, checkpoint: Path | None = None) -> Path:
    """Returns the folder of the light mask decoder that a run starts from.

    Raises:
        InputError: if the base has none and the configuration names none.
    """
    if checkpoint is not None:
        return checkpoint / MASK_DECODER
    if config.mask_decoder_path is not None:
        return Path(config.mask_decoder_path)
    if not (base / MASK_DECODER).is_dir():
        raise InputError(
            f"mask_decoder: {base} has no light one; train one with `python -m models.mask_decoder OUT --base_model_path "
            f"{config.base_model_path} --dataset_name {config.dataset_name} --dataset_path {config.dataset_path} "
            f"--mismatched_pairs {config.mismatched_pairs} --resolution {config.resolution} --batch_size {config.train_batch_size}` and set mask_decoder_path to OUT"
        )
    return base / MASK_DECODER


def input_channels(config: Config, transformer: SD3Transformer2DModel) -> int:
    """Returns the channels that the objective hands to the transformer; what it predicts is one set of latents."""
    return OBJECTIVES[config.objective].in_channels_factor * int(transformer.out_channels)
