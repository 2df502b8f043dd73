"""Inference speed: pictures to decoded masks by the published way and the project's variants, in turn in one process."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.subjects import SIZES, build_prompt, build_vae, matrix_rate, synchronise
from benchmarks.training import chosen, parse, release, save
from models.attention import use_plain_attention
from models.base import DTYPES, compile_vae
from models.folding import fold
from models.latents import LatentCodec, feature_channels
from models.mask_decoder import LightMaskDecoder
from models.objectives import EndToEnd
from models.trainable import compile_blocks
from utils.engine import keep_freed_memory
from utils.errors import run_command


@dataclass(frozen=True)
class Way:
    """A way of predicting; the defaults are the published one, a picture at a time.

    Args:
        name: in the table.
        batched: pictures go through together.
        channels_last: layout of the VAE.
        folded: constant conditioning folded.
        without_zero_rows: of the prompt.
        compiled: transformer and VAE through torch.compile.
        light: masks are read by the light decoder instead of the VAE's.
        lateral: which takes the VAE encoder's features.
        plain_attention: `models.attention`, on a CPU.
    """

    name: str
    batched: bool = False
    channels_last: bool = False
    folded: bool = False
    without_zero_rows: bool = False
    compiled: bool = False
    light: bool = False
    lateral: bool = False
    plain_attention: bool = False


_ALL = Way("all", batched=True, channels_last=True, folded=True, without_zero_rows=True, plain_attention=True)
WAYS = (
    Way("published"),
    Way("batched", batched=True),
    Way("batched, channels last", batched=True, channels_last=True),
    replace(_ALL, name="batched, channels last, folded, without zero rows"),
    replace(_ALL, name="all of these, light mask decoder", light=True),
    replace(_ALL, name="all of these, light mask decoder with features", light=True, lateral=True),
    replace(_ALL, name="all of these, compiled", compiled=True),
    replace(_ALL, name="all of these, compiled, light mask decoder", compiled=True, light=True),
)


class Inference:
    """One way's prediction.

    Args:
        way: how.
        size: a key of `SIZES`.
        device: where.
        dtype: of weights and computation.
    """

    def __init__(self, way: Way, size: str, device: torch.device, dtype: torch.dtype) -> None:
        self.way, self.device, self.objective = way, device, EndToEnd({}, 3.0)
        prompt = build_prompt(size)
        self.prompt = (prompt.without_zero_rows() if way.without_zero_rows else prompt).to(device)
        self.vae: AutoencoderKL = build_vae(size, device, dtype)
        if not way.channels_last:
            self.vae.to(memory_format=torch.contiguous_format)
        with device:
            transformer = SD3Transformer2DModel(**SIZES[size][1])
        if way.folded:
            transformer = fold(transformer, self.prompt, 1000.0)
        self.transformer = transformer.to(dtype).requires_grad_(False).eval()
        laterals = feature_channels(self.vae) if way.lateral else []
        self.decoder = LightMaskDecoder(lateral_channels=laterals).to(device, dtype).eval() if way.light else None
        if device.type == "cpu" and way.plain_attention:
            use_plain_attention(self.transformer)
        if way.compiled:
            compile_blocks(self.transformer)
            compile_vae(self.vae)
            if self.decoder is not None:
                self.decoder.compile()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns decoded pixels (B, 3, H, W) or, from the light decoder, logits (B, H, W) of pictures in [-1, 1]."""
        codec = LatentCodec(self.vae, torch.channels_last if self.way.channels_last else torch.contiguous_format)
        groups = [images] if self.way.batched else list(images.split(1))
        decoded = []
        for group in groups:
            condition, features = codec.encode_with_features(group) if self.way.lateral else (codec.encode(group), [])
            latents = self.objective.predict(self.transformer, condition, self.prompt)
            if self.decoder is None:
                decoded.append(codec.decode(latents).cpu())
            else:
                decoded.append(self.decoder(latents, self.decoder.project(features)).cpu())
        return torch.cat(decoded)


def measure(way: Way, arguments: argparse.Namespace, images: torch.Tensor, rate: float) -> dict[str, Any]:
    """Times one way.

    Args:
        way: to predict.
        arguments: of the command.
        images: in [-1, 1].
        rate: the device's matrix rate in FLOP/s.

    Returns:
        A row of the table.
    """
    device = arguments.device
    inference = Inference(way, arguments.size, device, DTYPES[arguments.data_type])
    release(device)  # what building took is not what predicting takes
    start = time.perf_counter()
    for _ in range(arguments.warmup):
        inference.predict(images)
    synchronise(device)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(arguments.steps):
        inference.predict(images)
    synchronise(device)
    seconds = (time.perf_counter() - start) / arguments.steps
    flops = None
    if not way.compiled:
        with FlopCounterMode(display=False) as counter:
            inference.predict(images)
        flops = counter.get_total_flops()
    return {
        "way": way.name,
        "images_per_second": arguments.batch_size / seconds,
        "first_batches_seconds": first_seconds,
        "flops_per_image": flops / arguments.batch_size if flops else None,
        "share_of_matrix_rate": flops / seconds / rate if flops else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv, __doc__ or "", 4)
    device, dtype = arguments.device, DTYPES[arguments.data_type]
    if device.type == "cpu":
        keep_freed_memory()  # as in val_inference.py, for every row
    ways = chosen(arguments.only, WAYS, "way")
    rate = matrix_rate(device, dtype)
    side = arguments.resolution
    images = (
        torch.rand(arguments.batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    )
    rows: list[dict[str, Any]] = []
    for way in ways:
        release(device)
        try:
            rows.append(measure(way, arguments, images, rate))
        except torch.OutOfMemoryError:
            print(f"{way.name}: left out, it does not fit this device")
        save(arguments, rows, matrix_flops_per_second=rate)
    lines = ["| way | images/s | ratio | TFLOP an image | of peak | peak GB |", "|---|---|---|---|---|---|"]
    published = next((row["images_per_second"] for row in rows if row["way"] == WAYS[0].name), None)
    for row in rows:
        ratio = f"{row['images_per_second'] / published:.2f}" if published else "-"
        cells = [row["way"], f"{row['images_per_second']:.2f}", ratio]
        cells.append(f"{row['flops_per_image'] / 1e12:.2f}" if row["flops_per_image"] else "-")
        cells.append(f"{row['share_of_matrix_rate']:.0%}" if row["share_of_matrix_rate"] else "-")
        cells.append(f"{row['peak_memory_bytes'] / 1e9:.1f}" if row["peak_memory_bytes"] else "-")
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
