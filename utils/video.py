"""Videos: frames in, an overlay and a mask video out, through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import InputError, first_line

ENDINGS = frozenset((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"))
DEFAULT_RATE = Fraction(25)
SHARE_OF_A_WHOLE, SLACK_SECONDS = 0.9, 1.0  # of the duration that a file names
FULL = (errno.ENOSPC, errno.EDQUOT)
OVERLAY_QUALITY, MASK_QUALITY = "18", "8"  # constant rate factors: hardly visible; sharp enough to be cut at one half
Frames = list[NDArray[np.uint8]]


def segment_video(
    path: Path,
    outputs: dict[str, Path],
    segment: Callable[[Frames], dict[str, Frames]],
    batch_size: int,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Segments a video frame by frame; sound is left out, times and rate are kept.

    Args:
        path: of the video.
        outputs: an MP4 to write for each kind that `segment` returns; each appears when it is whole.
        segment: turns up to `batch_size` frames, RGB (H, W, 3), uint8, into frames by kind, RGB.
        batch_size: frames at a time.
        stopped: asked before each batch.

    Returns:
        The number of frames; 0 if `stopped` said so, and then nothing is written.

    Raises:
        InputError: if PyAV is missing, or the file holds no video or breaks off.
    """
    av = _library()
    partial = {kind: target.with_name(f".part-{target.name}") for kind, target in outputs.items()}
    count, last = 0, 0.0
    try:
        with av.open(os.path.abspath(path)) as source:  # noqa: PTH100  a colon in a bare name would be a protocol
            if not source.streams.video:
                raise InputError(f"{path}: holds no video")
            seconds = (source.duration or 0) / av.time_base if len(source.streams) == 1 else 0.0
            stream = source.streams.video[0]
            stream.thread_type = "AUTO"
            writers = {kind: _Writer(av, target, stream, kind) for kind, target in partial.items()}
            try:
                for batch in _batches(source.decode(stream), batch_size):
                    if stopped():
                        return 0
                    frames = [_upright(frame) for frame in batch]
                    for kind, painted in segment(frames).items():
                        for frame, picture in zip(batch, painted, strict=True):
                            writers[kind].add(picture, frame.pts)
                    count, last = count + len(batch), batch[-1].time or 0.0
            finally:
                for writer in writers.values():
                    writer.close()
        if count == 0:
            raise InputError(f"{path}: holds no frames")
        if last < SHARE_OF_A_WHOLE * seconds - SLACK_SECONDS:
            raise InputError(f"{path}: breaks off after {last:.1f} of {seconds:.1f} seconds")
        for kind, target in outputs.items():
            partial[kind].replace(target)
    except av.error.FFmpegError as error:
        if error.errno in FULL:
            raise OSError(error.errno, error.strerror) from error
        raise InputError(f"{path}: cannot be read as a video ({first_line(error)})") from error
    finally:
        for part in partial.values():
            part.unlink(missing_ok=True)
    return count


class _Writer:
    """Writes one H.264 video; the size is that of its first picture, made even by repeating the last row or column."""

    def __init__(self, av: Any, path: Path, like: Any, kind: str) -> None:
        self._av, self._like = av, like
        self._container = av.open(str(path), "w", format="mp4")
        self._quality = MASK_QUALITY if kind == "mask" else OVERLAY_QUALITY
        self._stream: Any = None

    def add(self, picture: NDArray[np.uint8], time: int | None) -> None:
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            rate = self._like.average_rate or DEFAULT_RATE
            self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": self._quality})
            self._stream.pix_fmt = "yuv420p"  # what every player takes
            self._stream.height, self._stream.width = picture.shape[:2]
            if self._like.time_base is not None:
                self._stream.codec_context.time_base = self._like.time_base
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = time, self._like.time_base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def _batches(frames: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _upright(frame: Any) -> NDArray[np.uint8]:
    """Returns a frame as RGB (H, W, 3), turned as the phone that took it says."""
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV; pip install -r requirements-video.txt") from error
    return av
