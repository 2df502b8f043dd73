"""Videos through PyAV: every frame at its time, odd sizes, broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from utils import video
from utils.errors import InputError

av = pytest.importorskip("av")


def write_video(path: Path, count: int = 7, size: tuple[int, int] = (32, 48), rate: int = 10) -> list[int]:
    """Writes frames of one brightness each and returns these."""
    levels = [20 + 30 * number for number in range(count)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return levels


def read_video(path: Path) -> tuple[list[NDArray[np.uint8]], list[float]]:
    with av.open(str(path)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return [frame for frame, _ in frames], [time for _, time in frames]


def inverted(frames: list[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
    return {"overlay": [255 - frame for frame in frames], "mask": [np.uint8(255) * (frame > 100) for frame in frames]}


def targets(folder: Path) -> dict[str, Path]:
    return {kind: folder / f"{kind}.mp4" for kind in ("overlay", "mask")}


def test_every_frame_comes_out_at_its_time(tmp_path: Path) -> None:
    levels = write_video(tmp_path / "in.mp4")
    sizes: list[int] = []

    def segment(frames: list[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
        sizes.append(len(frames))
        return inverted(frames)

    assert video.segment_video(tmp_path / "in.mp4", targets(tmp_path), segment, batch_size=3) == 7
    assert sizes == [3, 3, 1]
    frames, times = read_video(tmp_path / "overlay.mp4")
    np.testing.assert_allclose([frame.mean() for frame in frames], [255 - level for level in levels], atol=4)
    np.testing.assert_allclose(times, [number / 10 for number in range(7)], atol=1e-6)
    masks, _ = read_video(tmp_path / "mask.mp4")
    assert [bool((mask > 127).all()) for mask in masks] == [level > 100 for level in levels]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "mask.mp4", "overlay.mp4"]


def test_an_odd_size_gains_a_row_and_a_column(tmp_path: Path) -> None:
    write_video(tmp_path / "in.mp4", count=2)

    def cut(frames: list[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
        return inverted([frame[:31, :47] for frame in frames])

    video.segment_video(tmp_path / "in.mp4", targets(tmp_path), cut, batch_size=8)
    assert read_video(tmp_path / "mask.mp4")[0][0].shape == (32, 48, 3)


def test_a_stopped_video_leaves_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "in.mp4")
    answers = iter([False, True])
    stopped = lambda: next(answers)  # noqa: E731
    assert video.segment_video(tmp_path / "in.mp4", targets(tmp_path), inverted, 2, stopped) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_what_is_no_video_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    whole = tmp_path / "whole.mp4"
    write_video(whole)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:600])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    before = {path.name for path in tmp_path.iterdir()}
    for name, said in (("text.mp4", "cannot be read"), ("cut.mp4", "cannot be read"), ("sound.mp4", "holds no video")):
        with pytest.raises(InputError, match=f"{name}: {said}"):
            video.segment_video(tmp_path / name, targets(tmp_path), inverted, 2)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_turned_frame_is_set_upright() -> None:
    class Turned:
        rotation = -90

        @staticmethod
        def to_ndarray(format: str) -> NDArray[np.uint8]:
            picture = np.zeros((2, 4, 3), np.uint8)
            picture[0, 0] = 255
            return picture

    found = video._upright(Turned())
    assert found.shape == (4, 2, 3)
    assert found[0, 1].all()  # the corner goes clockwise
