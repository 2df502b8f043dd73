"""Visitors of the demo page: which pictures it takes from them, and what it holds until they leave."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.pictures import read_picture
from utils.demo.results import Result
from utils.errors import InputError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MEGABYTE = 2**20
MIN_SIDE, MAX_SIDE = 16, 10_000
MAX_VISITORS = 200
KEPT_SECONDS = 900  # for those who neither leave nor go on; longer than anybody waits in the queue
MAX_HELD_BYTES = 2**31  # of results, in memory
PREVIEW_SIDE = 1280
FILES_KEPT = {"view": 8, "download": 8, "batch": 64}


@dataclass(frozen=True)
class Limits:
    """What the page takes.

    Args:
        upload_mb: of a file, in 2^20 bytes.
        pixels: of a picture, width times height.
        queue: requests that may wait.
    """

    upload_mb: int = 20
    pixels: int = 25_000_000
    queue: int = 20


@dataclass
class Visitor:
    """One open page.

    Args:
        folder: of the files made for it.
        uploads: what it sent.
        result: of its last picture, without the uncertainty.
        preview: the same with it, as large as it is shown.
        refused: whether its last picture was.
        last_seen: on the monotonic clock, in seconds.
    """

    folder: Path
    uploads: set[Path] = field(default_factory=set)
    result: Result | None = None
    preview: Result | None = None
    refused: bool = False
    last_seen: float = field(default_factory=time.monotonic)
    _written: Counter[str] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        """Memory that the result takes."""
        kept = () if self.result is None else (self.result.picture, self.result.soft, self.result.classes)
        return sum(values.nbytes for values in kept if values is not None)

    def keep(self, result: Result | None) -> None:
        """Puts a result, or none, in the place of the last."""
        self.preview = None if result is None else result.reduced(PREVIEW_SIDE)
        self.result = None if result is None else replace(result, uncertainty=None)

    def add_upload(self, path: Path) -> None:
        """Notes a file to remove, and that it is in use; the page's own examples lie elsewhere and stay."""
        if path.is_relative_to(self.folder.parent):
            self.uploads.add(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # Gradio removes what was not touched for a while

    def write(self, kind: str, name: str, data: bytes) -> str:
        """Writes a file and returns its path, which is new: a browser may still be reading the one before.

        Args:
            kind: key of `FILES_KEPT`; of each kind the last files stay.
            name: of the file.
            data: its content.
        """
        self._written[kind] += 1
        number = self._written[kind]
        path = self.folder / kind / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        shutil.rmtree(self.folder / kind / str(number - FILES_KEPT[kind]), ignore_errors=True)
        return str(path)


class Visitors:
    """Everybody whose page is open, by the key of its session.

    Args:
        folder: for the files made for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns how many are known."""
        return len(self._known)

    def __getitem__(self, key: str) -> Visitor:
        """Returns a visitor, a new one for a new key; who was away too long, or longest where too much is held, is forgotten."""
        now = time.monotonic()
        with self._lock:
            if key not in self._known:
                self._known[key] = Visitor(Path(tempfile.mkdtemp(dir=self._folder)))
            self._known.move_to_end(key)
            self._known[key].last_seen = now
            while len(self._known) > 1 and self._too_much(now):
                self._forget(next(iter(self._known)))
            return self._known[key]

    def forget_idle(self) -> None:
        """Forgets who was away too long; for a timer, since nobody may ask again."""
        with self._lock:
            while self._known and time.monotonic() - next(iter(self._known.values())).last_seen > KEPT_SECONDS:
                self._forget(next(iter(self._known)))

    def leave(self, key: str) -> None:
        """Forgets a visitor: result, files made and uploads, save an upload that another visitor sent too."""
        with self._lock:
            if key in self._known:
                self._forget(key)

    def _too_much(self, now: float) -> bool:
        oldest = next(iter(self._known.values()))
        num_bytes = sum(visitor.num_bytes for visitor in self._known.values())
        return len(self._known) > MAX_VISITORS or num_bytes > MAX_HELD_BYTES or now - oldest.last_seen > KEPT_SECONDS

    def _forget(self, key: str) -> None:
        gone = self._known.pop(key)
        shutil.rmtree(gone.folder, ignore_errors=True)
        for path in gone.uploads - {path for other in self._known.values() for path in other.uploads}:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # Gradio gives each upload a folder


def read_upload(path: str, name: str, limits: Limits) -> NDArray[np.uint8]:
    """Reads an uploaded picture; what is too large, too small or no picture is refused before a pixel is decoded.

    Args:
        path: of the file.
        name: to call it by.
        limits: of the page.

    Returns:
        RGB (H, W, 3), uint8, upright.

    Raises:
        InputError: in one sentence for the visitor.
    """
    too_many_pixels = f"{name} has more than the {limits.pixels / 1e6:g} million pixels that this page takes"
    try:
        num_bytes = Path(path).stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the page's own limit follows
            with Image.open(path, formats=FORMATS) as image:
                (width, height), frames = image.size, getattr(image, "n_frames", 1)
                frames = 1 if image.format == "MPO" else frames  # a phone's photo with a second one for depth
    except FileNotFoundError as error:
        raise InputError(f"{name} is no longer here, since no upload is kept; send it again.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{too_many_pixels}.") from error
    except Exception as error:  # whatever a header may hold
        raise InputError(
            f"{name} is no picture that can be read here; JPEG, PNG, WebP, BMP, TIFF and GIF are."
        ) from error
    if num_bytes > limits.upload_mb * MEGABYTE:
        raise InputError(f"{name} is larger than the {limits.upload_mb} MB that this page takes.")
    if width * height > limits.pixels:
        raise InputError(f"{too_many_pixels}: {width:,} x {height:,}.")
    if max(width, height) > MAX_SIDE or min(width, height) < MIN_SIDE:
        raise InputError(
            f"{name} has {width:,} x {height:,} pixels; this page takes sides of {MIN_SIDE} to {MAX_SIDE:,} pixels."
        )
    if frames > 1:
        raise InputError(f"{name} is an animation of {frames} pictures; send a single one.")
    try:
        return np.array(read_picture(path))
    except InputError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = first_line(cause).replace(path, name)
        raise InputError(f"{name} cannot be read: {reason}.") from error
