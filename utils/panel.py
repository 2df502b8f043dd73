"""The same few validation pictures at every validation, side by side: picture, truth, prediction, raw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dataset.trans10k import Pair
from utils.metrics import PictureScore

NUM_PICTURES = 4
SIDE = 192  # of a picture in the panel, in pixels
GAP = 6
LINE = 20  # of text
KINDS = {"img": "picture", "maskgt": "truth", "maskq": "prediction", "pred": "raw"}


class Panel:
    """Collects the pictures that an evaluation passes to `write`; they may lie on any process.

    Args:
        pairs: of the evaluation; the chosen ones are spread evenly over them, so that a mix of difficulties stays one.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        count = min(NUM_PICTURES, len(pairs))
        self.names = [pairs[position * len(pairs) // count].name for position in range(count)]
        self._rows: dict[str, NDArray[np.uint8]] = {}
        self._captions: dict[str, str] = {}

    def write(self, name: str, pictures: dict[str, NDArray[np.uint8]]) -> None:
        """Keeps a chosen picture's row; see `utils.evaluation.evaluate`."""
        if name in self.names:
            self._rows[name] = np.concatenate([_tile(pictures[kind]) for kind in KINDS], axis=1)

    def gather(self, accelerator: Accelerator, scores: Sequence[PictureScore]) -> None:
        """Brings all rows to the main process, and takes the captions from all scores; called by all processes."""
        rows = gather_object(list(self._rows.items()))
        self._rows = dict(rows) if accelerator.is_main_process else {}
        self._captions = {score.name: f"{score.name}   IoU {score.iou:.3f}" for score in scores}

    def draw(self, title: str) -> NDArray[np.uint8]:
        """Returns the panel (H, W, 3), a row for each picture with its name and score."""
        font = ImageFont.load_default(13)
        rows = [(self._captions[name], self._rows[name]) for name in self.names]
        width = len(KINDS) * (SIDE + GAP) + GAP
        canvas = Image.new("RGB", (width, 2 * LINE + len(rows) * (SIDE + LINE) + GAP), "white")
        pen = ImageDraw.Draw(canvas)
        pen.text((GAP, 2), title, "black", font)
        for column, label in enumerate(KINDS.values()):
            pen.text((GAP + column * (SIDE + GAP), LINE + 2), label, "black", font)
        top = 2 * LINE
        for caption, row in rows:
            for column, tile in enumerate(np.split(row, len(KINDS), axis=1)):
                canvas.paste(Image.fromarray(tile), (GAP + column * (SIDE + GAP), top))
            pen.text((GAP, top + SIDE + 2), caption, (90, 90, 90), font)
            top += SIDE + LINE
        return np.array(canvas)

    def save(self, panel: NDArray[np.uint8], path: Path) -> None:
        """Writes a drawn panel as a PNG, whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        Image.fromarray(panel).save(partial, "PNG")
        partial.replace(path)


def _tile(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns (H, W, 3) or (H, W) as (SIDE, SIDE, 3)."""
    picture = Image.fromarray(values).convert("RGB")
    # A mask that is enlarged keeps its edge.
    enlarged = picture.width < SIDE
    return np.array(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX))
