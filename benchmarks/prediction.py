"""predict.py beside the bare pipeline: files a second and memory over a folder of mixed files, broken ones among them.

`python -m benchmarks.prediction --model runs/quickstart` makes the folder from the sample's pictures, enlarged to what cameras
give and saved in many formats, and predicts it by both ways in turn.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.pipeline import TransparencySegmentationPipeline
from predict import Predictor
from utils.errors import run_command
from utils.prediction_inputs import Source, find_files, name_files
from utils.prediction_record import PredictionRecord
from utils.provenance import machine
from utils.publishing import load_model_on

SIZES = ((640, 480), (480, 640), (1024, 768), (1600, 1200), (300, 300))
ENDINGS = ("jpg", "png", "webp", "bmp", "tif")
ROUNDS = 3


def write_folder(folder: Path, count: int, broken: int) -> None:
    """Writes `count` pictures of several sizes, modes and formats, of which `broken`, evenly spread, are cut off or no pictures."""
    sample = sorted(Path("assets/glass_sample/test").glob("*/images/*.jpg"))
    for number in range(count):
        path = folder / f"{number:04d}.{ENDINGS[number % len(ENDINGS)]}"
        with Image.open(sample[number % len(sample)]) as image:
            picture = image.convert("RGB").resize(SIZES[number % len(SIZES)])
        if number % 7 == 3 and path.suffix in (".png", ".tif"):
            picture = picture.convert("RGBA")
        if number % 11 == 5:
            picture = picture.convert("L")
        picture.save(path)
        if number % (count // broken) == 0 and number // (count // broken) < broken:
            path.write_bytes(path.read_bytes()[:100] if number % 2 else b"not a picture")


def resident_mb() -> float:
    """Returns the memory that the process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def time_bare(pipeline: TransparencySegmentationPipeline, sources: list[Source], batch_size: int) -> float:
    """Returns the seconds that the pipeline takes for the readable files, a batch of paths at a time, writing nothing."""
    start = time.perf_counter()
    for first in range(0, len(sources), batch_size):
        pipeline([source.path for source in sources[first : first + batch_size]], batch_size=batch_size)
    return time.perf_counter() - start


def time_predictor(
    pipeline: TransparencySegmentationPipeline,
    sources: list[Source],
    batch_size: int,
    kinds: tuple[str, ...],
    out: Path,
) -> tuple[float, list[float], set[Source]]:
    """Returns the seconds that predict.py takes for all files, the memory in MB at quarters of the way, and what failed."""
    memory: list[float] = []
    asked = iter(range(sys.maxsize))
    quarter = max(1, len(sources) // batch_size // 4)

    def noticed() -> int:
        if next(asked) % quarter == 0:
            memory.append(resident_mb())
        return 0

    stop: Any = SimpleNamespace(noticed=noticed)
    predictor = Predictor(pipeline, PredictionRecord(out, {}, False), kinds, {}, batch_size, stop)
    start = time.perf_counter()
    predictor.predict(sources)
    return time.perf_counter() - start, [*memory, resident_mb()], set(predictor.failures)


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart", help="as predict.py takes it [runs/quickstart]")
    parser.add_argument("--count", type=int, default=500, help="files [500]")
    parser.add_argument("--broken", type=int, default=20, help="broken ones among them [20]")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at a time [16]")
    parser.add_argument("--save", default="mask", help="as predict.py takes it [mask]")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    pipeline = load_model_on(arguments.model, torch.device("cpu"))
    seconds: dict[str, list[float]] = {"bare": [], "predict": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_folder(folder / "in", arguments.count, arguments.broken)
        sources = name_files(find_files([str(folder / "in")], (), False, folder / "out"), {})
        kinds = tuple(arguments.save.split(","))
        _, _, failed = time_predictor(pipeline, sources, arguments.batch_size, kinds, folder / "warm-up")
        readable = [source for source in sources if source not in failed]
        for number in range(ROUNDS):
            seconds["bare"].append(time_bare(pipeline, readable, arguments.batch_size))
            found, memory, _ = time_predictor(pipeline, sources, arguments.batch_size, kinds, folder / f"out-{number}")
            seconds["predict"].append(found)
    speed = {name: len(readable) / float(np.median(values)) for name, values in seconds.items()}
    share = float(np.median([bare / full for bare, full in zip(seconds["bare"], seconds["predict"], strict=True)]))
    growth = max(later - earlier for earlier, later in pairwise(memory))
    print(f"{len(sources)} files, {len(failed)} failed; {arguments.save}; batches of {arguments.batch_size}")
    print(
        f"bare pipeline {speed['bare']:.1f} pictures/s, predict.py {speed['predict']:.1f} pictures/s: {share:.2f} of it"
    )
    print(
        f"memory in MB, from quarter to quarter: {', '.join(f'{value:.0f}' for value in memory)} (at most {growth:+.0f})"
    )
    if arguments.out:
        record = {"command": shlex.join(sys.argv), "machine": machine(), "threads": torch.get_num_threads()}
        record |= {
            "files": len(sources),
            "failed": len(failed),
            "seconds": seconds,
            "share": share,
            "memory_mb": memory,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
