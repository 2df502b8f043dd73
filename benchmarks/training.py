"""Training speed of the published recipe and the project's variants, in turn in one process.

Random weights of the true size: speed and memory do not depend on what was learnt. Pictures come through the project's own
loader from the sample pairs, resized to the resolution, augmented as in training.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.subjects import PUBLISHED, RECIPES, SIZES, Recipe, Training, build_vae, matrix_rate, synchronise
from dataset.codecs import build_codec
from dataset.latent_cache import CachedLatents, LatentCache, fill
from dataset.sampling import BatchStream
from dataset.trans10k import LAYOUTS, PairDataset, collate, prepare_worker, scan
from models.base import DTYPES, largest_side
from models.latents import LatentBatches, LatentCodec
from utils.engine import keep_freed_memory
from utils.errors import InputError, run_command
from utils.provenance import machine

READER = LAYOUTS["trans10k"].read_label
NUM_PAIRS = 64


class Named(Protocol):
    """What a row of a benchmark measures."""

    @property
    def name(self) -> str:
        """In the table and for --only."""


Row = TypeVar("Row", bound=Named)
COLUMNS = ("recipe", "samples/s", "ratio", "data", "VAE", "transformer", "optimiser", "TFLOP", "of peak", "peak GB")


def batches(arguments: argparse.Namespace, cached: CachedLatents, training: Training) -> Iterator[dict[str, Any]]:
    """Yields batches of the cached pairs as the recipe trains on them: `image` and `label`, or their latents."""
    pairs, recipe = cached.cache.pairs, training.recipe
    loader = DataLoader(
        cached if recipe.latent_cache else PairDataset(pairs, READER, arguments.resolution, augmentation_seed=0),
        batch_sampler=BatchStream(len(pairs), arguments.batch_size, 0, stop=10**9),
        num_workers=arguments.workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        pin_memory=arguments.device.type == "cuda",
    )
    if recipe.encodes_ahead:
        return iter(LatentBatches(loader, training.encode_images, training.encode_labels, arguments.device))
    return iter(loader)


def cache_latents(arguments: argparse.Namespace, folder: Path) -> CachedLatents:
    """Writes the latents of the pairs into `folder` and returns them."""
    vae = LatentCodec(build_vae(arguments.size, arguments.device, DTYPES[arguments.data_type]))
    codec = build_codec("binary")
    pairs = scan("trans10k", arguments.data, "train").pairs[:NUM_PAIRS]
    cache = LatentCache(folder, pairs, arguments.resolution, 0, 1, {})
    cache.claim()
    fill(
        cache,
        READER,
        lambda images: vae.encode(images.to(arguments.device) * 2 - 1),
        lambda labels: vae.encode(codec.encode(labels.to(arguments.device))),
        batch_size=arguments.batch_size,
    )
    return CachedLatents(cache, 0)


def measure(recipe: Recipe, arguments: argparse.Namespace, cached: CachedLatents, rate: float) -> dict[str, Any]:
    """Times one recipe: first without waiting for its parts, then part by part.

    Args:
        recipe: to train by.
        arguments: of the command.
        cached: the latents of recipes that cache them.
        rate: the device's matrix rate in FLOP/s.

    Returns:
        A row of the table.
    """
    device = arguments.device
    training = Training(recipe, arguments.size, device, DTYPES[arguments.data_type])
    release(device)  # what building took is not what training takes
    start = time.perf_counter()
    stream = batches(arguments, cached, training)
    for batch in itertools.islice(stream, arguments.warmup):
        training.step(batch)
    synchronise(device)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for batch in itertools.islice(stream, arguments.steps):
        training.step(batch)
    synchronise(device)
    seconds = (time.perf_counter() - start) / arguments.steps
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    training.timed = True
    for _ in range(arguments.steps):
        with training.part("data"):
            batch = next(stream)
        training.step(batch)
    training.timed = False
    total = sum(training.seconds.values())
    flops = None
    if not recipe.compile:
        with FlopCounterMode(display=False) as counter:  # without the optimiser, which torchao compiles
            training.backward(next(stream))
        flops = counter.get_total_flops()
    return {
        "recipe": recipe.name,
        "samples_per_second": arguments.batch_size / seconds,
        "first_updates_seconds": first_seconds,
        "shares": {name: value / total for name, value in training.seconds.items()},
        "flops_per_update": flops,
        "share_of_matrix_rate": flops / seconds / rate if flops else None,
        "peak_memory_bytes": peak,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, speeds as a ratio to the published recipe's, where that was run."""
    published = next((row["samples_per_second"] for row in rows if row["recipe"] == PUBLISHED.name), None)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shares = [f"{row['shares'].get(name, 0):.0%}" for name in ("data", "VAE", "transformer", "optimiser")]
        ratio = f"{row['samples_per_second'] / published:.2f}" if published else "-"
        cells = [row["recipe"], f"{row['samples_per_second']:.2f}", ratio, *shares]
        cells.append(f"{row['flops_per_update'] / 1e12:.2f}" if row["flops_per_update"] else "-")
        cells.append(f"{row['share_of_matrix_rate']:.0%}" if row["share_of_matrix_rate"] else "-")
        cells.append(f"{row['peak_memory_bytes'] / 1e9:.1f}" if row["peak_memory_bytes"] else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None, description: str, default_batch_size: int) -> argparse.Namespace:
    """Reads the flags that the benchmarks share."""
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="sd35-medium" if has_cuda else "tiny")
    parser.add_argument("--resolution", type=int, help="side in pixels [1024, tiny: 128]")
    parser.add_argument("--batch_size", type=int, default=default_batch_size, help=f"[{default_batch_size}]")
    parser.add_argument("--steps", type=int, default=10, help="timed updates or batches of each row [10]")
    parser.add_argument("--warmup", type=int, default=3, help="updates or batches before them [3]")
    parser.add_argument("--workers", type=int, default=4 if has_cuda else 0, help="loader processes")
    parser.add_argument("--data_type", choices=sorted(DTYPES), default="bf16", help="of the computation [bf16]")
    parser.add_argument("--data", type=Path, default=Path("assets/glass_sample"), help="pairs in the Trans10k layout")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="rows to measure beside the published one"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    arguments.resolution = arguments.resolution or (128 if arguments.size == "tiny" else 1024)
    arguments.device = torch.device("cuda" if has_cuda else "cpu")
    if min(arguments.batch_size, arguments.steps, arguments.warmup) < 1 or arguments.resolution % 16:
        raise InputError("batch_size, steps and warmup must be at least 1, resolution a multiple of 16")
    largest = largest_side(SIZES[arguments.size][1])
    if arguments.resolution > largest:
        raise InputError(f"--resolution {arguments.resolution}: the {arguments.size} model takes sides up to {largest}")
    return arguments


def chosen(names: list[str], rows: Sequence[Row], kind: str) -> Sequence[Row]:
    """Returns the rows of these names after the first, which is the published one; all where there are no names.

    Args:
        names: given with --only.
        rows: to choose from.
        kind: what a row is called in the error.

    Raises:
        InputError: for an unknown name.
    """
    known = {row.name: row for row in rows}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only: no {kind} {unknown[0]!r}; there are: {'; '.join(known)}")
    return [rows[0], *(known[name] for name in names if name != rows[0].name)] if names else rows


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the JSON of the rows so far, so that one that fails badly does not take the others along."""
    if arguments.out:
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
        record = {"settings": settings, "machine": machine(), **more, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_name(f".{arguments.out.name}.part")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(arguments.out)


def release(device: torch.device) -> None:
    """Frees what the last row held, and counts memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv, __doc__ or "", 4)
    if arguments.device.type == "cpu":
        keep_freed_memory()  # as in the trainer, for every row
    recipes, device = chosen(arguments.only, RECIPES, "recipe"), arguments.device
    rate = matrix_rate(device, DTYPES[arguments.data_type])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cached = cache_latents(arguments, Path(folder) / "cache")
        for recipe in recipes:
            try:
                rows.append(measure(recipe, arguments, cached, rate))
            except InputError as error:
                print(f"{recipe.name}: left out, {error}")
            except torch.OutOfMemoryError:
                print(f"{recipe.name}: left out, it does not fit this device")
            save(arguments, rows, matrix_flops_per_second=rate)
            release(device)
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
