"""Runs the pipeline over a split, on any number of processes, and scores every picture exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.trans10k import PairDataset, collate, prepare_worker
from models.pipeline import SegmentationOutput, TransparencySegmentationPipeline
from utils.errors import InterruptedRunError
from utils.metrics import PictureScore, score_picture
from utils.protocols import histogram
from utils.scoring import Record, Scorer
from utils.seeding import Stream, torch_generator

MAX_PENDING_PICTURES = 64
PictureWriter = Callable[[str, dict[str, NDArray[np.uint8]]], None]


@dataclass(frozen=True)
class Evaluation:
    """What a split scored, in the data set's order.

    Args:
        scores: of every picture at the training's size.
        histograms: of the soft masks at that size, (N, 2, 256), see `utils.protocols.histogram`.
        records: of the scorer, none without one.
    """

    scores: list[PictureScore]
    histograms: NDArray[np.int64]
    records: list[dict[str, Record]]


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
    scorer: Scorer | None = None,
    poll_stop: Callable[[], int] = lambda: 0,
    description: str = "scoring",
) -> Evaluation:
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
            `uncertainty`, all uint8, (H, W, 3) or (H, W); where masks tell classes, `maskq` and `maskgt` are in their colours,
            `classes` holds the predicted ones, `colours` the decode and `pred` how sure each pixel is glass.
        scorer: scores each picture by more protocols and at more sizes, in the background.
        poll_stop: called by all processes before each batch; a non-zero exit code ends the evaluation.
        description: of the progress bar.

    Returns:
        The scores of all pictures, the same on every process.

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
    scored: list[tuple[int, PictureScore, NDArray[np.int64]]] = []
    hidden = not accelerator.is_main_process
    with _Background() as background:
        for number, batch in zip(
            mine, tqdm(loader, desc=description, disable=hidden, leave=False, unit="batch"), strict=True
        ):
            if code := poll_stop():
                raise InterruptedRunError("stopped while scoring", code)
            generators = [
                torch_generator(Stream.INFERENCE_NOISE, seed, dataset.pairs[index].number) for index in batch["index"]
            ]
            output = pipeline.predict(batch["image"], generator=generators, batch_size=batch_size, **(settings or {}))
            if number >= len(batches):
                continue
            pictures = _pictures(pipeline, batch, output)
            soft, classes, labels = _to_uint8(output.soft), output.classes.numpy(), batch["label"].numpy()
            raw = pictures["pred"]
            for position, (index, name) in enumerate(zip(batch["index"], batch["name"], strict=True)):
                pair, truth = dataset.pairs[index], labels[position] > 0
                score = score_picture(raw[position], classes[position] > 0, truth, name, pair.difficulty)
                scored.append((index, score, histogram(soft[position], truth)))
                if scorer is not None:
                    arrays = (raw[position], soft[position], classes[position], labels[position])
                    background.submit(index, scorer.score, pair, *arrays)
                if write is not None:
                    write(name, {kind: values[position] for kind, values in pictures.items()})
        mine_recorded = background.results()
    everything = sorted(gather_object(scored), key=lambda entry: entry[0])
    records = sorted(gather_object(mine_recorded), key=lambda entry: entry[0]) if scorer is not None else []
    return Evaluation(
        scores=[score for _, score, _ in everything],
        histograms=np.stack([levels for _, _, levels in everything]),
        records=[record for _, record in records],
    )


def _pictures(
    pipeline: TransparencySegmentationPipeline, batch: dict[str, Any], output: SegmentationOutput
) -> dict[str, NDArray[np.uint8]]:
    """Returns the pictures that are written of a batch, (B, H, W, 3) or (B, H, W), by kind."""
    pictures = {
        "img": _to_uint8(batch["image"].permute(0, 2, 3, 1)),
        "pred": _to_uint8(output.predictions.permute(0, 2, 3, 1)),
    }
    if pipeline.palette is None:
        pictures["maskq"] = output.masks.numpy() * np.uint8(255)
        pictures["maskgt"] = batch["label"].numpy() * np.uint8(255)
    else:
        # Colours stand for classes; how far they are from the truth's white says nothing, so the raw prediction is that of glass.
        pictures["colours"] = pictures["pred"]
        pictures["pred"] = np.repeat(_to_uint8(output.soft)[..., None], 3, axis=3)
        pictures["classes"] = output.classes.numpy()
        pictures["maskq"], pictures["maskgt"] = (
            pipeline.palette.paint(values) for values in (pictures["classes"], batch["label"].numpy())
        )
    if output.uncertainty is not None:
        # A standard deviation of values in [0, 1] is at most one half: white is that.
        pictures["uncertainty"] = _to_uint8(output.uncertainty * 2)
    return pictures


class _Background:
    """Scores beside the predictions, in two threads; a context manager that drops what waits after an error."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._pending: deque[tuple[int, Future[dict[str, Record]]]] = deque()
        self._done: list[tuple[int, dict[str, Record]]] = []

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, index: int, score: Callable[..., dict[str, Record]], *arguments: object) -> None:
        """Queues a picture; waits for the oldest where scoring falls far behind."""
        self._pending.append((index, self._pool.submit(score, *arguments)))
        while len(self._pending) > MAX_PENDING_PICTURES or (self._pending and self._pending[0][1].done()):
            self._take()

    def results(self) -> list[tuple[int, dict[str, Record]]]:
        """Waits for all and returns them."""
        while self._pending:
            self._take()
        return self._done

    def _take(self) -> None:
        index, future = self._pending.popleft()
        self._done.append((index, future.result()))


def _to_uint8(values: torch.Tensor) -> NDArray[np.uint8]:
    return (values.float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
