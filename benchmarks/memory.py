"""The smallest card that each recipe fits: peak memory of a training update at batch 1, in turn in one process.

Counted is what the allocator held at once, without the driver's own part (about half a gigabyte).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.subjects import RECIPES, Recipe, Training
from benchmarks.training import chosen, parse, release, save
from models.base import DTYPES
from models.latents import DOWNSCALE
from utils.errors import InputError, run_command

CARDS_GB = (8, 10, 12, 16, 24, 32, 40, 48, 80, 141)


def peak_memory(recipe: Recipe, arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> int:
    """Returns the most bytes that a recipe allocated at once; its models are gone with the call, even if it fails."""
    training = Training(recipe, arguments.size, arguments.device, DTYPES[arguments.data_type])
    release(arguments.device)  # the trainer builds on the CPU
    for _ in range(arguments.warmup):
        training.step(batch)
    return torch.cuda.max_memory_allocated(arguments.device)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv, __doc__ or "", 1)
    device = arguments.device
    if device.type != "cuda":
        raise InputError(
            "memory is counted by the GPU's allocator, and this machine has no GPU; run it where there is one"
        )
    rows: list[dict[str, Any]] = []
    side = arguments.resolution
    shape = (arguments.batch_size, 3, side, side)
    latents = (arguments.batch_size, 16, side // DOWNSCALE, side // DOWNSCALE)
    pictures = {"image": torch.rand(shape), "label": torch.randint(2, (shape[0], side, side))}
    encoded = {"image_latents": torch.randn(latents), "mask_latents": torch.randn(latents)}
    for recipe in chosen(arguments.only, RECIPES, "recipe"):
        release(device)
        try:
            peak = peak_memory(recipe, arguments, encoded if recipe.latent_cache else pictures)
            rows.append({"recipe": recipe.name, "peak_memory_bytes": peak})
        except InputError as error:
            print(f"{recipe.name}: left out, {error}")
        except torch.OutOfMemoryError:
            print(f"{recipe.name}: left out, it does not fit this device")
        save(arguments, rows)
    lines = ["| recipe | peak GB | smallest card |", "|---|---|---|"]
    for row in rows:
        needed = row["peak_memory_bytes"] / 1e9
        card = next((f"{size} GB" for size in CARDS_GB if needed + 0.5 < size), "none")
        lines.append(f"| {row['recipe']} | {needed:.1f} | {card} |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
