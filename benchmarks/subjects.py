"""What the benchmarks run: models of the true sizes with random weights, the published recipe and the project's variants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from dataset.codecs import BinaryCodec
from models.attention import use_plain_attention
from models.folding import fold
from models.latents import LatentCodec
from models.lora import add_lora
from models.objectives import EndToEnd
from models.prompt import EmptyPrompt
from models.tiny_base import NUM_PROMPT_TOKENS, TRANSFORMER_CONFIG, VAE_CONFIG
from models.trainable import compile_blocks, lower_precision
from utils.config import Config
from utils.errors import InputError
from utils.optimizers import build_optimizer

SD35_VAE: dict[str, Any] = {
    **VAE_CONFIG,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
SD35_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
# VAE, transformer, text tokens, of which the second half is zero
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "tiny": (VAE_CONFIG, TRANSFORMER_CONFIG, 2 * NUM_PROMPT_TOKENS),
    "sd35-medium": (SD35_VAE, SD35_TRANSFORMER, 154),
}


@dataclass(frozen=True)
class Recipe:
    """A way of training; the defaults are the published one.

    Args:
        name: in the table.
        latent_cache: latents come from memory, the VAE does not run.
        fold_conditioning: as the configuration's key.
        drop_zero_prompt_rows: as the configuration's key.
        gradient_checkpointing: as the configuration's key.
        compile: as the configuration's key.
        weights: as the configuration's key.
        optimizer: as the configuration's key.
        trainable: as the configuration's key.
        plain_attention: `models.attention`, which the trainer uses on a CPU.
        encodes_ahead: on a GPU the next batch is encoded beside the step, as the trainer does.
    """

    name: str
    latent_cache: bool = False
    fold_conditioning: bool = False
    drop_zero_prompt_rows: bool = False
    gradient_checkpointing: bool = True
    compile: bool = False
    weights: str = "fp32"
    optimizer: str = "adamw"
    trainable: str = "full"
    plain_attention: bool = False
    encodes_ahead: bool = False


PUBLISHED = Recipe("published")
_FOLDED = replace(PUBLISHED, fold_conditioning=True, encodes_ahead=True)
_CACHED = replace(PUBLISHED, fold_conditioning=True, latent_cache=True)
_SMALL = replace(_CACHED, weights="bf16", optimizer="adamw_8bit")
RECIPES = (
    PUBLISHED,
    replace(PUBLISHED, name="encoding beside the step", encodes_ahead=True),
    replace(PUBLISHED, name="without zero rows", drop_zero_prompt_rows=True),
    replace(_FOLDED, name="folded"),
    replace(_CACHED, name="latent cache", fold_conditioning=False),
    replace(_CACHED, name="folded, latent cache"),
    replace(_CACHED, name="folded, latent cache, no checkpointing", gradient_checkpointing=False),
    replace(
        _CACHED,
        name="folded, latent cache, no checkpointing, plain attention",
        gradient_checkpointing=False,
        plain_attention=True,
    ),
    replace(_CACHED, name="folded, latent cache, compiled", compile=True),
    replace(
        _CACHED, name="folded, latent cache, compiled, no checkpointing", compile=True, gradient_checkpointing=False
    ),
    replace(_SMALL, name="folded, latent cache, bf16 weights, 8-bit AdamW"),
    replace(
        _SMALL, name="LoRA, latent cache, bf16 weights", fold_conditioning=False, optimizer="adamw", trainable="lora"
    ),
)


def build_vae(size: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Returns a frozen VAE of that size with random weights, channels last."""
    with device:
        vae = AutoencoderKL(**SIZES[size][0])
    return vae.to(dtype).requires_grad_(False).eval().to(memory_format=torch.channels_last)


def build_prompt(size: str) -> EmptyPrompt:
    """Returns a random prompt whose second half is zero, as in the published run."""
    _, transformer, tokens = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, tokens, transformer["joint_attention_dim"], generator=generator)
    rows[:, tokens // 2 :] = 0
    return EmptyPrompt.from_tensors(rows, torch.randn(1, transformer["pooled_projection_dim"], generator=generator))


class Training:
    """One recipe's training step, its parts timed.

    Args:
        recipe: what to train and how.
        size: a key of `SIZES`.
        device: where.
        dtype: of the computation.
    """

    def __init__(self, recipe: Recipe, size: str, device: torch.device, dtype: torch.dtype) -> None:
        if recipe.plain_attention and device.type != "cpu":
            raise InputError("plain attention is for the CPU")
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.codec = None if recipe.latent_cache else LatentCodec(build_vae(size, device, dtype))
        prompt = build_prompt(size)
        self.prompt = (prompt.without_zero_rows() if recipe.drop_zero_prompt_rows else prompt).to(device)
        with device:
            transformer = SD3Transformer2DModel(**SIZES[size][1])
        if recipe.fold_conditioning:
            transformer = fold(transformer, self.prompt, 1000.0)
        if recipe.weights == "bf16":
            lower_precision(transformer, torch.bfloat16)
        if recipe.trainable == "lora":
            add_lora(transformer, 16, Config().lora_targets)
        if recipe.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if recipe.plain_attention:
            use_plain_attention(transformer)
        if recipe.compile:
            compile_blocks(transformer)
        self.transformer = transformer.train()
        config = replace(Config(), optimizer=recipe.optimizer, weights=recipe.weights)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.transformer, config, 1e-6)
        self.objective = EndToEnd({}, 3.0)
        self.seconds: dict[str, float] = {}
        self.timed = False

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Runs one update on `image` (B, 3, H, W) in [0, 1] and `label` (B, H, W), or their latents where these are there."""
        self.backward(batch)
        with self.part("optimiser"):
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        """Runs an update's forward and backward passes."""
        with self.part("VAE"):
            if "image_latents" in batch:
                image, mask = (batch[f"{name}_latents"].to(self.device).float() for name in ("image", "mask"))
            else:
                image, mask = self.encode_images(batch["image"])[0], self.encode_labels(batch["label"])
        with self.part("transformer"):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.objective.loss(self.transformer, image, mask, self.prompt).latent_loss.mean()
            loss.backward()

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns latents of pictures (B, 3, H, W) in [0, 1], and no features."""
        assert self.codec is not None
        return self.codec.encode(images.to(self.device, non_blocking=True) * 2 - 1), []

    def encode_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns latents of labels (B, H, W)."""
        assert self.codec is not None
        return self.codec.encode(BinaryCodec().encode(labels.to(self.device, non_blocking=True)))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time inside to a part's, if timed: that makes the device wait."""
        if not self.timed:
            yield
            return
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large matrix product, the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        left @ right
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
