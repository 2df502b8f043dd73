"""The memory that a training takes per card: its lasting state counted parameter by parameter, its passes on tensors without data.

GB are 10^9 bytes that torch's allocator holds at once. On top come the driver's part, about half a GB, what engines need to
talk to each other, and what allocators lose between blocks.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from models.attention import use_plain_attention
from models.base import DTYPES, check_resolution, widen_patch_projection
from models.folding import FoldedSD3Transformer2DModel
from models.latents import DOWNSCALE, PIXELS_PER_CALL, LatentCodec, feature_channels
from models.lora import add_lora
from models.losses import segmentation_loss
from models.mask_decoder import LightMaskDecoder
from models.objectives import OBJECTIVES, call_transformer
from models.prompt import EmptyPrompt
from models.trainable import input_channels, lower_precision
from utils.config import Config
from utils.errors import InputError, first_line

CACHE_LINE = 256  # values per scale of the 8-bit moments
SMALLEST_QUANTISED = 4096


@dataclass(frozen=True)
class Launch:
    """How many processes an engine shares a training out to.

    Args:
        num_processes: over all machines, a card each.
        engine: one process, DDP, ZeRO or FSDP2.
        stage: of ZeRO.
        offload: whether ZeRO keeps the optimiser in the host's memory.
    """

    num_processes: int = 1
    engine: str = "one process"
    stage: int = 0
    offload: bool = False

    @property
    def shares(self) -> tuple[int, int, int]:
        """Into how many shares weights, gradients and optimiser are cut."""
        stage = 3 if self.engine == "FSDP2" else self.stage
        return tuple(self.num_processes if stage >= least else 1 for least in (3, 2, 1))  # type: ignore[return-value]

    def __str__(self) -> str:
        """Names the engine and its processes."""
        stage = f"-{self.stage}{', optimiser in host memory' if self.offload else ''}" if self.stage else ""
        return (
            self.engine
            if self.num_processes == 1 and not stage
            else f"{self.engine}{stage}, {self.num_processes} processes"
        )


def launch_of_environment(environ: Mapping[str, str] = os.environ) -> Launch:
    """Returns the launch that `accelerate launch` or torchrun has told its processes by environment variables."""
    processes = int(environ.get("WORLD_SIZE", "1"))
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        try:
            path = Path(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
            zero |= json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        except (OSError, ValueError, KeyError):
            pass  # settings without a file are in the environment
        device = zero.get("offload_optimizer", {}).get(
            "device", environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
        )
        return Launch(processes, "ZeRO", int(zero["stage"]), device in ("cpu", "nvme"))
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return Launch(processes, "FSDP2")
    return Launch(processes, "DDP" if processes > 1 else "one process")


def empty_transformer(settings: Mapping[str, Any], config: Config, num_prompt_rows: int) -> SD3Transformer2DModel:
    """Returns the transformer that a run trains, without data.

    Args:
        settings: the base's configuration.
        config: of the run.
        num_prompt_rows: tokens of the prompt.

    Raises:
        InputError: if base and configuration do not fit each other.
    """
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    timestep = OBJECTIVES[config.objective].constant_timestep
    with torch.device("meta"):
        if "num_prompt_rows" in own:
            transformer = FoldedSD3Transformer2DModel(**own)
        elif config.fold_conditioning and timestep is not None:
            transformer = FoldedSD3Transformer2DModel(**own, num_prompt_rows=num_prompt_rows)
        else:
            transformer = SD3Transformer2DModel(**own)
        check_resolution(config.resolution, transformer)
        widen_patch_projection(transformer, input_channels(config, transformer))
        if config.weights == "bf16":
            lower_precision(transformer, torch.bfloat16)
        if config.trainable == "lora":
            add_lora(transformer, config.lora_rank, config.lora_targets)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def empty_decoder(settings: Mapping[str, Any]) -> LightMaskDecoder:
    """Returns a light mask decoder of that configuration, without data."""
    with torch.device("meta"):
        return LightMaskDecoder(**{name: value for name, value in settings.items() if not name.startswith("_")})


def state_bytes(model: torch.nn.Module, config: Config, launch: Launch) -> dict[str, float]:
    """Returns the bytes per card of what lasts from update to update, by part.

    DeepSpeed computes with weights in `data_type` and keeps fp32 ones beside the moments.

    Args:
        model: what is trained, with or without data.
        config: of the run.
        launch: of the run.
    """
    weights = gradients = moments = average = 0.0
    compute = torch.empty((), dtype=DTYPES[config.data_type]).element_size()
    for parameter in model.parameters():
        count, size = parameter.numel(), parameter.element_size()
        if launch.engine == "ZeRO":
            size = compute
        weights += size * count
        if parameter.requires_grad:
            gradients += size * count
            average += 4 * count
            moments += (
                (12 if compute < 4 else 8) * count if launch.engine == "ZeRO" else _moment_bytes(count, size, config)
            )
    cut = launch.shares
    return {
        "weights": weights / cut[0],
        "gradients": gradients / cut[1],
        "optimiser": 0.0 if launch.offload else moments / cut[2],
        "table of positions": float(sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())),
        "moving average": average if config.ema_decay is not None else 0.0,
    }


def _moment_bytes(count: int, size: int, config: Config) -> float:
    if config.optimizer == "adamw_8bit" and count >= SMALLEST_QUANTISED and count % CACHE_LINE == 0:
        return 2 * (count + 4 * count / CACHE_LINE + 4 * CACHE_LINE)
    return 2 * size * count


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def pass_bytes(
    model: SD3Transformer2DModel,
    config: Config,
    launch: Launch,
    num_prompt_rows: int,
    device_type: str,
    vae_settings: Mapping[str, Any],
    mask_decoder: LightMaskDecoder | None = None,
) -> float:
    """Returns the bytes that forward and backward pass of one batch hold beside the lasting state, at most.

    Autocast is among them, which keeps a copy of all fp32 weights in half precision as long as the forward pass takes.

    Args:
        model: of `empty_transformer`; taken apart.
        config: of the run.
        launch: of the run.
        num_prompt_rows: tokens of the prompt.
        device_type: cuda or cpu, which differ in attention.
        vae_settings: of the base, for a loss on the pixels that it decodes.
        mask_decoder: of the run, without data.
    """
    dtype = DTYPES[config.data_type]
    if launch.engine != "one process" and launch.engine != "DDP":
        lower_precision(model, dtype)  # these engines cast the weights themselves
    if device_type == "cpu" and not config.compile:
        use_plain_attention(model)
    vae = None if mask_decoder is not None or not config.pixel_loss_weight else _empty_vae(vae_settings, dtype)
    batch, side = config.train_batch_size, config.resolution // DOWNSCALE
    accumulates = config.gradient_accumulation_steps > 1
    # Fakes are on the CPU, whose autocast and kernels torch can reason about on any machine.
    with FakeTensorMode(allow_non_fake_inputs=True), PeakCounter() as counter:
        model.to_empty(device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = model.config
        prompt = EmptyPrompt(num_prompt_rows, settings.joint_attention_dim, settings.pooled_projection_dim)
        latents = torch.empty(batch, settings.in_channels, side, side)
        target = torch.empty(batch, model.out_channels, side, side)
        read = _mask_reader(config, mask_decoder, vae)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        before = counter.peak = counter.now
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            estimate = call_transformer(model, latents, torch.full((batch,), 1000.0), prompt)
        loss = (estimate - target).square().mean()
        if config.pixel_loss_weight:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = read(estimate)
                loss = loss + segmentation_loss(logits, torch.empty_like(logits), config.edge_weight).mean()
        loss.backward()
        peak = counter.peak - before
    gathered = 0
    if launch.shares[0] > 1:  # two blocks at a time are whole: the one at work and the next
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer_blocks]
        gathered = 2 * max(blocks) * dtype.itemsize
    return float(max(0, peak - (0 if accumulates else gradients)) + gathered)


def _mask_reader(config: Config, mask_decoder: LightMaskDecoder | None, vae: AutoencoderKL | None) -> Any:
    """Returns what turns predicted latents into logits of the mask, None where no loss asks for them."""
    if mask_decoder is not None:
        mask_decoder.to_empty(device="cpu")
        features = [
            torch.empty(config.train_batch_size, channels, config.resolution >> level, config.resolution >> level)
            for level, channels in enumerate(mask_decoder.config.lateral_channels)
        ]
        return lambda latents: mask_decoder(latents, mask_decoder.project(features))
    if vae is None:
        return None
    vae.to_empty(device="cpu").requires_grad_(False)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return lambda latents: LatentCodec(vae).decode(latents).mean(dim=1)


def vae_bytes(settings: Mapping[str, Any], config: Config, with_features: bool) -> float:
    """Returns the bytes of the VAE's weights, and of the activations that encoding pictures takes beside the step.

    Args:
        settings: of the base's VAE.
        config: of the run.
        with_features: whether the features of two batches are kept for a mask decoder.
    """
    dtype = DTYPES[config.data_type]
    side = min(config.resolution, int(PIXELS_PER_CALL**0.5))
    count = min(config.train_batch_size, max(1, PIXELS_PER_CALL // side**2))
    vae = _empty_vae(settings, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakCounter() as counter, torch.no_grad():
        vae.to_empty(device="cpu")
        weights = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
        before = counter.peak = counter.now
        LatentCodec(vae).encode(torch.empty(count, 3, side, side))
        peak = counter.peak - before
    features = sum(
        channels * (config.resolution >> level) ** 2 * dtype.itemsize
        for level, channels in enumerate(feature_channels(vae))
    )
    return float(weights + peak + (2 * config.train_batch_size * features if with_features else 0))


def _empty_vae(settings: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    with torch.device("meta"):
        vae = AutoencoderKL(**{name: value for name, value in settings.items() if not name.startswith("_")})
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae.eval()


def memory_parts(
    transformer_settings: Mapping[str, Any],
    vae_settings: Mapping[str, Any],
    config: Config,
    launch: Launch,
    num_prompt_rows: int = 154,
    device_type: str = "cuda",
    decoder_settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Returns the bytes per card of a training, by part.

    Args:
        transformer_settings: of the base.
        vae_settings: of the base.
        config: of the run.
        launch: of the run.
        num_prompt_rows: tokens of the prompt.
        device_type: cuda or cpu.
        decoder_settings: of the light mask decoder, if the run trains one.

    Raises:
        InputError: if base and configuration do not fit each other, or cannot be counted.
    """
    model = empty_transformer(transformer_settings, config, num_prompt_rows)
    parts = state_bytes(model, config, launch)
    decoder = None if decoder_settings is None else empty_decoder(decoder_settings)
    if decoder is not None:
        for name, value in state_bytes(decoder, config, launch).items():
            parts[name] += value
    with_features = decoder is not None and decoder.takes_features
    try:
        parts["passes"] = pass_bytes(model, config, launch, num_prompt_rows, device_type, vae_settings, decoder)
        decodes = config.mask_decoder == "vae" and config.pixel_loss_weight
        parts["VAE"] = (
            vae_bytes(vae_settings, config, with_features) if config.latent_cache == "off" or decodes else 0.0
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(f"the memory of this base cannot be counted ({first_line(error)})") from error
    return parts
