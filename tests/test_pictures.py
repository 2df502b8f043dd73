"""Pictures of any kind: every form of one picture gives the same array, and the same masks in its own size and order."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dataset.pictures import as_pictures, as_rgb, squash
from tests.conftest import RESOLUTION
from tests.test_pipeline import make_pipeline
from utils.errors import InputError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (20, 30, 1), dtype=np.uint8)
TENSOR = torch.from_numpy(RGB).permute(2, 0, 1)

SAME_AS_RGB: dict[str, Callable[[], Any]] = {
    "PIL": lambda: Image.fromarray(RGB),
    "PIL with alpha": lambda: Image.fromarray(np.concatenate([RGB, ALPHA], axis=2)),
    "array": lambda: RGB,
    "array with alpha": lambda: np.concatenate([RGB, ALPHA], axis=2),
    "array of floats": lambda: RGB / 255,
    "array of half floats": lambda: (RGB / 255).astype(np.float32),
    "array of 16 bits": lambda: RGB.astype(np.uint16) * 257,
    "view that runs backwards": lambda: RGB[::-1][::-1],
    "tensor": lambda: TENSOR,
    "tensor of floats": lambda: TENSOR / 255,
    "tensor that needs a gradient": lambda: (TENSOR / 255).requires_grad_(),
    "tensor with alpha": lambda: torch.cat([TENSOR, torch.from_numpy(ALPHA).permute(2, 0, 1)]),
}
SAME_AS_GREY: dict[str, Callable[[], Any]] = {
    "PIL": lambda: Image.fromarray(GREY),
    "PIL of 16 bits": lambda: Image.fromarray(GREY.astype(np.uint16) * 257),
    "PIL with alpha": lambda: Image.fromarray(np.stack([GREY, ALPHA[..., 0]], axis=2)),
    "palette": lambda: Image.fromarray(GREY).convert("P"),
    "array": lambda: GREY,
    "array of one channel": lambda: GREY[..., None],
    "tensor": lambda: torch.from_numpy(GREY),
    "tensor of one channel": lambda: torch.from_numpy(GREY)[None],
}


@pytest.mark.parametrize("form", SAME_AS_RGB)
def test_every_form_of_a_colour_picture_is_the_same_array(form: str) -> None:
    assert np.array_equal(as_rgb(SAME_AS_RGB[form]()), RGB)


@pytest.mark.parametrize("form", SAME_AS_GREY)
def test_every_form_of_a_grey_picture_is_the_same_array(form: str) -> None:
    assert np.array_equal(as_rgb(SAME_AS_GREY[form]()), np.repeat(GREY[..., None], 3, axis=2))


def test_a_16_bit_file_is_not_cut_to_white(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = as_rgb(tmp_path / "deep.png")
    np.testing.assert_allclose(found[..., 0], values / 257, atol=0.5)
    assert len(np.unique(found)) > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    turned = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
    }  # fmt: skip
    assert np.array_equal(as_rgb(str(tmp_path / "turned.png")), turned[orientation])


def broken_files(folder: Path) -> dict[str, Path]:
    png = io.BytesIO()
    Image.fromarray(RGB).save(png, "png")
    contents = {"empty.png": b"", "text.png": b"not a picture\n", "cut.png": png.getvalue()[:200]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents} | {"gone.png": folder / "gone.png", "folder": folder}


@pytest.mark.parametrize("name", ["empty.png", "text.png", "cut.png", "gone.png", "folder"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    path = broken_files(tmp_path)[name]
    with pytest.raises(InputError) as caught:
        as_rgb(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as a picture")


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (RGB.astype(np.int64), "dtype int64"),
        (RGB > 9, "dtype bool"),
        (RGB * 1.0, r"floats must lie in \[0, 1\], these in \[0, 255\]"),
        (np.full((4, 4), np.nan), r"floats must lie in \[0, 1\]"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (Image.fromarray(GREY.astype(np.float32)), "mode F"),
        (Image.fromarray(GREY.astype(np.int32)), "mode I"),
        (7, "a int is no picture"),
        (None, "a NoneType is no picture"),
    ],
)
def test_what_is_no_picture_is_told_by_its_place(picture: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^picture 3: .*{said}"):
        as_rgb(picture, "picture 3")


def test_one_picture_a_list_and_a_batch_are_lists() -> None:
    assert len(as_pictures("a.png")) == 1
    assert len(as_pictures(["a.png", Path("b.png")])) == 2
    assert len(as_pictures((RGB, TENSOR))) == 2
    assert [each.shape for each in as_pictures(np.stack([RGB, RGB]))] == [RGB.shape] * 2
    assert [each.shape for each in as_pictures(torch.stack([TENSOR, TENSOR]))] == [TENSOR.shape] * 2
    assert as_pictures([]) == []


def sizes(values: list[NDArray[Any]]) -> list[tuple[int, ...]]:
    return [each.shape for each in values]


@pytest.mark.parametrize("objective", ["end_to_end", "diffusion"])
def test_masks_come_in_each_pictures_own_size_and_order_whatever_the_batches(objective: str, tmp_path: Path) -> None:
    pipeline = make_pipeline(objective, tta="flip")
    Image.fromarray(RGB).save(tmp_path / "a.png")
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    mixed: list[Any] = [tmp_path / "a.png", Image.new("L", (7, 50), 90), noise, RGB[:1, :1], GREY]
    expected = [(20, 30), (50, 7), (64, 64), (1, 1), (20, 30)]
    one, many = (pipeline(mixed, batch_size=batch_size) for batch_size in (1, 4))
    for values in (one.masks, one.soft, one.classes, one.uncertainty):
        assert values is not None
        assert sizes(values) == expected
    assert {each.dtype for each in one.masks} == {np.dtype(np.uint8)}
    for left, right in zip(one.soft, many.soft, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)  # other batches are added in another order
    for soft, mask in zip(one.soft, one.masks, strict=True):
        assert np.array_equal(mask, soft > 0.5)
    if objective == "end_to_end":  # a diffusion model's noise is its place's
        np.testing.assert_allclose(pipeline(mixed[4]).soft[0], one.soft[4], atol=1e-4)


def test_the_call_is_the_tensors_prediction_at_the_models_size() -> None:
    pipeline = make_pipeline("end_to_end")
    picture = np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    expected = pipeline.predict(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, threshold=0.45)
    found = pipeline(picture, threshold=0.45)
    assert np.array_equal(found.soft[0], expected.soft[0])
    assert np.array_equal(found.masks[0], expected.masks[0])
    assert found.uncertainty is None
    small = pipeline(picture[::2, ::2])
    assert np.array_equal(
        pipeline(squash(picture[::2, ::2], RESOLUTION, RESOLUTION)).soft[0].mean().round(2),
        small.soft[0].mean().round(2),
    )


def test_own_sizes_are_predicted_in_tiles_of_the_models_size() -> None:
    pipeline = make_pipeline("end_to_end")
    picture = np.random.default_rng(0).integers(0, 256, (3 * RESOLUTION + 5, 2 * RESOLUTION, 3), dtype=np.uint8)
    seen: list[tuple[int, ...]] = []
    predict = pipeline._predict
    pipeline._predict = lambda tiles, *rest: seen.append(tuple(tiles.shape)) or predict(tiles, *rest)
    found = pipeline([picture, picture[:9, :9]], resolution="own")
    assert sizes(found.masks) == [picture.shape[:2], (9, 9)]
    assert {shape[2:] for shape in seen[:-1]} == {(RESOLUTION, RESOLUTION)}
    assert len(seen) > 6
    assert seen[-1][2:] == (16, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 24}, "resolution 24 must be a multiple"),
        ({"resolution": 0}, "resolution 0"),
        ({"resolution": 160_000}, "a side of 160000 pixels"),
        ({"resolution": "own", "tile_size": 4096}, "a side of 4096 pixels"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"tta": "turn"}, "unknown tta"),
        ({"tile_size": 24}, "24"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, InputError), match=said):
        make_pipeline("end_to_end")(RGB, **settings)


def test_no_pictures_give_empty_lists() -> None:
    found = make_pipeline("end_to_end")([])
    assert found.masks == found.soft == found.classes == []
