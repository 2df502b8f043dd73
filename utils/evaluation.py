"""Runs the pipeline over a split, on any number of processes, and scores every picture exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.trans10k import PairDataset, collate, prepare_worker
from models.pipeline import TransparencySegmentationPipeline
from utils.errors import InterruptedRunError
from utils.metrics import PictureScore, iou_curve, score_picture
from utils.seeding import Stream, torch_generator

Scored = tuple[int, PictureScore, NDArray[np.float64]]
PictureWriter = Callable[[str, dict[str, NDArray[np.uint8]]], None]


def evaluate(
    pipeline: TransparencySegmentationPipeline,
    dataset: PairDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    settings: dict[str, Any] | None = None,
    write: PictureWriter | None = None,
    poll_stop: Callable[[], int] = lambda: 0,
    description: str = "scoring",
) -> tuple[list[PictureScore], NDArray[np.float64]]:
    """Predicts and scores every picture of a data set.

    Batches are cut the same way for any number of processes and dealt out in turn, and each picture's noise is seeded
    by its name, so that the scores depend neither on the number of processes nor on which other pictures are scored.

    Args:
        pipeline: on the process's device.
        dataset: without augmentation.
        accelerator: of the run.
        batch_size: pictures per batch and members per forward pass.
        seed: of the starting noise.
        num_workers: loader processes.
        settings: `threshold`, `denoise_steps`, `ensemble_size`, `tta` for the pipeline's call.
        write: receives each picture's name and its `img`, `pred`, `maskq`, `maskgt` and, where predictions vote,
            `uncertainty`, all uint8, (H, W, 3) or (H, W).
        poll_stop: called by all processes before each batch; a non-zero exit code ends the evaluation.
        description: of the progress bar.

    Returns:
        On every process, the scores of all pictures in the data set's order, and their IoU at every threshold, (N, 256), see
        `utils.metrics.iou_curve`.

    Raises:
        InterruptedRunError: if `poll_stop` asked for it.
    """
    batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    rounds = -(-len(batches) // accelerator.num_processes)
    mine = [turn * accelerator.num_processes + accelerator.process_index for turn in range(rounds)]
    # Some engines gather weights in every forward pass, so a process without a batch repeats the first and drops it.
    keys = [[(0, index) for index in batches[number if number < len(batches) else 0]] for number in mine]
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        pin_memory=accelerator.device.type == "cuda",
    )
    scored: list[Scored] = []
    hidden = not accelerator.is_main_process
    for number, batch in zip(
        mine, tqdm(loader, desc=description, disable=hidden, leave=False, unit="batch"), strict=True
    ):
        if code := poll_stop():
            raise InterruptedRunError("stopped while scoring", code)
        generators = [
            torch_generator(Stream.INFERENCE_NOISE, seed, dataset.pairs[index].number) for index in batch["index"]
        ]
        output = pipeline(batch["image"], generator=generators, batch_size=batch_size, **(settings or {}))
        if number >= len(batches):
            continue
        pictures = {
            "img": _to_uint8(batch["image"].permute(0, 2, 3, 1)),
            "pred": _to_uint8(output.predictions.permute(0, 2, 3, 1)),
            "maskq": output.masks.numpy() * np.uint8(255),
            "maskgt": batch["label"].numpy() * np.uint8(255),
        }
        if output.uncertainty is not None:
            # A standard deviation of values in [0, 1] is at most one half: white is that.
            pictures["uncertainty"] = _to_uint8(output.uncertainty * 2)
        soft = _to_uint8(output.soft)
        for position, (index, name) in enumerate(zip(batch["index"], batch["name"], strict=True)):
            picture = {kind: values[position] for kind, values in pictures.items()}
            difficulty = dataset.pairs[index].difficulty
            score = score_picture(picture["pred"], picture["maskq"] > 0, picture["maskgt"] > 0, name, difficulty)
            scored.append((index, score, iou_curve(soft[position], picture["maskgt"] > 0)))
            if write is not None:
                write(name, picture)
    everything: list[Scored] = sorted(gather_object(scored), key=lambda entry: entry[0])
    return [score for _, score, _ in everything], np.stack([curve for _, _, curve in everything])


def _to_uint8(values: torch.Tensor) -> NDArray[np.uint8]:
    return (values.float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
