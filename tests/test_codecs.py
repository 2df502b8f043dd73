"""Mask files to labels, labels to pixels and back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dataset.codecs import (
    CODECS,
    THINGS_STUFF,
    TRANS10K_V2,
    BinaryCodec,
    Palette,
    PaletteCodec,
    build_codec,
    read_class_ids,
    read_nonzero_label,
    read_trans10k_classes,
    read_trans10k_label,
)
from utils.errors import InputError


def through_png(image: Image.Image) -> Image.Image:
    """Saves as PNG and opens it again, as a mask comes from disk."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(buffer)


def mask_of(*colours: tuple[int, ...] | int) -> Image.Image:
    """A mask of one row, a pixel a colour."""
    return through_png(Image.fromarray(np.array([colours], np.uint8)))


# Labels <-> pixels


def test_decode_inverts_encode() -> None:
    codec = BinaryCodec()
    label = torch.randint(0, 2, (3, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = codec.encode(label)
    assert pixels.shape == (3, 3, 8, 6)
    assert pixels.dtype == torch.float32
    assert torch.equal(codec.decode(pixels), label.float())
    assert torch.equal(codec.quantise(codec.decode(pixels), 0.5), label)


def test_transparent_is_white_and_the_rest_is_black() -> None:
    pixels = BinaryCodec().encode(torch.tensor([[[0, 1]]], dtype=torch.uint8))
    assert torch.equal(pixels, torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))


def test_decode_clamps_each_channel_and_takes_the_mean() -> None:
    pixels = torch.tensor([-1.0, 0.0, 7.0]).view(1, 3, 1, 1)
    assert BinaryCodec().decode(pixels).item() == 0.5
    assert BinaryCodec().decode(torch.full((1, 3, 1, 1), -9.0)).item() == 0.0


def test_decode_returns_float32_for_half_precision() -> None:
    assert BinaryCodec().decode(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_white_and_black_are_sure_logits_whose_gradient_reaches_every_channel() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).repeat(1, 3, 1, 1).requires_grad_()
    logits = BinaryCodec().logits(pixels)
    assert logits.sigmoid().flatten().tolist() == pytest.approx([0.018, 0.5, 0.982], abs=1e-3)
    logits.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad > 0).all()


def test_quantise_takes_what_exceeds_the_threshold() -> None:
    label = BinaryCodec().quantise(torch.tensor([[[0.0, 0.5, 0.51, 1.0]]]), 0.5)
    assert label.dtype == torch.uint8
    assert label.tolist() == [[[0, 0, 1, 1]]]
    assert BinaryCodec().quantise(torch.tensor([[[0.2, 0.4]]]), 0.3).tolist() == [[[0, 1]]]


def test_a_codec_is_built_by_its_name() -> None:
    assert {name: type(build_codec(name, THINGS_STUFF)) for name in CODECS} == {
        "binary": BinaryCodec,
        "palette": PaletteCodec,
    }
    with pytest.raises(ValueError, match="the palette codec needs a palette"):
        build_codec("palette")


PALETTES = [THINGS_STUFF, TRANS10K_V2]


@pytest.mark.parametrize("palette", PALETTES)
def test_classes_survive_the_way_to_pixels_and_back_with_noise(palette: Palette) -> None:
    codec = PaletteCodec(palette)
    count = len(palette.names)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(count, (2, 16, 16), generator=generator, dtype=torch.uint8)
    pixels = codec.encode(label)
    assert pixels.shape == (2, 3, 16, 16)
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), palette.paint(label.numpy()))
    # Less than the 45 of 255 from orange to half the way to yellow's shades, in any direction.
    noise = torch.randn(pixels.shape, generator=generator)
    noise = noise / noise.norm(dim=1, keepdim=True) * (44 / 127.5)
    masks = codec.quantise(codec.decode(pixels + noise), 0.5)
    inside = ((pixels + noise).abs() <= 1).all(dim=1)  # decoding clamps, which may only help
    assert masks[inside].equal((label > 0).to(torch.uint8)[inside])
    for each, truth in zip(pixels + noise, label, strict=True):
        assert codec.classes(each[None], (truth > 0).to(torch.uint8)).equal(truth)


@pytest.mark.parametrize("palette", PALETTES)
def test_an_edge_that_is_blurred_shows_no_third_class(palette: Palette) -> None:
    codec = PaletteCodec(palette)
    shares = torch.linspace(0, 1, 41)
    for number in range(1, len(palette.names)):
        ends = codec.encode(torch.tensor([[[0, number]]], dtype=torch.uint8))  # (1, 3, 1, 2)
        edge = ends[..., :1] + shares * (ends[..., 1:] - ends[..., :1])
        masks = codec.quantise(codec.decode(edge), 0.5)[0]
        assert set(codec.classes(edge, masks)[0, shares >= 0.55].tolist()) == {number}
        assert not masks[0, shares <= 0.3].any()


def test_voters_are_counted_by_class_and_not_by_the_mean_of_their_colours() -> None:
    codec = PaletteCodec(TRANS10K_V2)
    red, yellow = (
        TRANS10K_V2.names.index(name) for name in ("shelf", "window")
    )  # whose mean is another class's orange
    voters = codec.encode(torch.tensor([[[red]]] * 3 + [[[yellow]]] * 2, dtype=torch.uint8))
    assert codec.classes(voters, torch.ones(1, 1, dtype=torch.uint8)).item() == red


@pytest.mark.parametrize("palette", PALETTES)
def test_each_class_is_as_sure_in_its_own_colour(palette: Palette) -> None:
    codec = PaletteCodec(palette)
    label = torch.arange(len(palette.names), dtype=torch.uint8)[None, None]
    logits = codec.logits(codec.encode(label))[0, 0]
    torch.testing.assert_close(logits[1:], torch.full_like(logits[1:], 4.0))
    assert logits[0] == pytest.approx(-4.0)


def test_a_palette_of_black_and_white_says_on_greys_what_the_binary_codec_says() -> None:
    codec = PaletteCodec(Palette(("background", "glass"), ((0, 0, 0), (255, 255, 255))))
    grey = torch.linspace(-1, 1, 21).expand(1, 3, 1, -1)
    torch.testing.assert_close(codec.decode(grey), BinaryCodec().decode(grey))
    torch.testing.assert_close(codec.logits(grey * 1.5), BinaryCodec().logits(grey * 1.5))


def test_a_palette_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "palette.json"
    path.write_text(json.dumps(dict(zip(TRANS10K_V2.names, TRANS10K_V2.colours, strict=True))))
    assert Palette.from_file(path) == TRANS10K_V2
    assert Palette.from_dict(json.loads(json.dumps(TRANS10K_V2.to_dict()))) == TRANS10K_V2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"background": [0, 0, 0], "a": [255, 0, 0], "b": [255, 60, 0]}', "a .* and b .* collide"),
        ('{"background": [0, 0, 0], "a": [50, 50, 50]}', "background .* and a .* collide"),
        ('{"background": [0, 0, 0], "a": [255, 0, 0], "a": [0, 255, 0]}', "two classes are called a"),
        ('{"background": [0, 0, 0], "a": [255, 255, 0], "b": [128, 128, 0]}', "b .* lies between the background and a"),
        ('{"background": [9, 0, 0], "a": [255, 0, 0]}', "must be black"),
        ('{"background": [0, 0, 0]}', "expected 2 to 64 classes"),
        ('{"background": [0, 0, 0], "a": [255, 0]}', "'a' needs a name and a colour"),
        ('{"background": [0, 0, 0], "a": [256, 0, 0]}', "'a' needs a name and a colour"),
        ('{"background": [0, 0, 0], "a": 7}', "cannot be read as a palette"),
        ("[", "cannot be read as a palette"),
    ],
)
def test_a_bad_palette_is_refused_with_its_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "palette.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"palette\.json: .*{message}"):
        Palette.from_file(path)
    with pytest.raises(InputError, match=r"gone\.json: cannot be read"):
        Palette.from_file(tmp_path / "gone.json")


def test_class_ids_are_read_from_one_channel_or_three_equal_ones() -> None:
    ids = np.array([[0, 3], [11, 1]], np.uint8)
    assert np.array_equal(read_class_ids(Image.fromarray(ids), 12), ids)
    assert np.array_equal(read_class_ids(Image.fromarray(np.stack([ids] * 3, axis=2)), 12), ids)
    with pytest.raises(ValueError, match="is coloured"):
        read_class_ids(Image.fromarray(np.stack([ids, ids, ids * 0], axis=2)), 12)


def test_things_and_stuff_are_told_apart() -> None:
    mask = Image.fromarray(np.array([[[0, 0, 0], [85, 85, 85], [255, 255, 255], [0, 0, 255]]], np.uint8))
    assert read_trans10k_classes(mask).tolist() == [[0, 1, 2, 1]]


@pytest.mark.parametrize("name", ["", "Binary", "classes"])
def test_an_unknown_codec_is_refused_with_the_valid_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown codec '{name}'; valid: binary"):
        build_codec(name)


# trans10k masks


def test_things_and_stuff_are_both_transparent() -> None:
    label = read_trans10k_label(mask_of((0, 0, 0), (85, 85, 85), (255, 255, 255)))
    assert label.dtype == np.uint8
    assert label.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (100, 100, 55)])
def test_the_mean_over_channels_tells_the_class(colour: tuple[int, int, int]) -> None:
    assert read_trans10k_label(mask_of(colour, (0, 0, 0))).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "colour", [(1, 0, 0), (84, 85, 85), (86, 85, 85), (255, 255, 254), (128, 128, 128), (85, 85, 84), (255, 255, 0)]
)
def test_any_other_mean_is_an_error_that_shows_the_colour(colour: tuple[int, int, int]) -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[2, 3] = pixels[3, 0] = colour
    with pytest.raises(ValueError, match=r"has 2 pixels .* row 2, column 3") as caught:
        read_trans10k_label(through_png(Image.fromarray(pixels)))
    assert str(colour) in str(caught.value)
    assert "dataset_name: folder" in str(caught.value)


def test_trans10k_masks_may_be_grey_or_have_a_palette_or_alpha() -> None:
    assert read_trans10k_label(mask_of(0, 85, 255)).tolist() == [[0, 1, 1]]
    assert read_trans10k_label(mask_of((0, 0, 0, 255), (255, 255, 255, 0), (85, 85, 85, 9))).tolist() == [[0, 1, 1]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    palette.putpalette([0, 0, 0, 85, 85, 85, 255, 0, 0])
    assert read_trans10k_label(through_png(palette)).tolist() == [[0, 1, 1]]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert read_trans10k_label(through_png(bits)).tolist() == [[0, 1]]


def test_a_trans10k_mask_of_16_bits_is_read_without_clipping() -> None:
    good = through_png(Image.fromarray(np.array([[0, 85, 255]], np.uint16)))
    assert read_trans10k_label(good).tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match=r"has 1 pixels .* column 1, is RGB \(1000, 1000, 1000\)"):
        read_trans10k_label(through_png(Image.fromarray(np.array([[0, 1000]], np.uint16))))


# folder masks


def check_folder_mask(image: Image.Image, mode: str, expected: list[int]) -> None:
    mask = through_png(image)
    assert mask.mode == mode
    label = read_nonzero_label(mask)
    assert label.dtype == np.uint8
    assert label.tolist() == [expected]


@pytest.mark.parametrize("value", [1, 2, 85, 255])
def test_any_non_zero_grey_is_transparent(value: int) -> None:
    check_folder_mask(Image.fromarray(np.array([[0, value]], np.uint8)), "L", [0, 1])


@pytest.mark.parametrize("colour", [(1, 0, 0), (0, 0, 1), (255, 255, 255)])
def test_any_non_zero_colour_is_transparent(colour: tuple[int, int, int]) -> None:
    check_folder_mask(Image.fromarray(np.array([[(0, 0, 0), colour]], np.uint8)), "RGB", [0, 1])


def test_a_palette_index_stands_for_its_colour() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 0, 0, 0, 1])
    check_folder_mask(palette, "P", [1, 0, 1])


def test_a_transparent_palette_colour_counts_by_its_colour() -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    check_folder_mask(palette, "P", [0, 1])


@pytest.mark.parametrize("alpha", [0, 255])
def test_alpha_is_ignored(alpha: int) -> None:
    check_folder_mask(Image.fromarray(np.array([[(0, 0, 0, alpha), (5, 0, 0, alpha)]], np.uint8)), "RGBA", [0, 1])
    check_folder_mask(Image.fromarray(np.array([[(0, alpha), (5, alpha)]], np.uint8)), "LA", [0, 1])


def test_one_bit_masks_are_read() -> None:
    check_folder_mask(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "1", [0, 1])


@pytest.mark.parametrize("value", [1, 255, 256, 65535])
def test_sixteen_bit_masks_are_read(value: int) -> None:
    check_folder_mask(Image.fromarray(np.array([[0, value]], np.uint16)), "I;16", [0, 1])


def test_labels_keep_the_masks_rows_and_columns() -> None:
    pixels: NDArray[np.uint8] = np.zeros((3, 5, 3), np.uint8)
    pixels[2, 4] = 255
    for reader in (read_trans10k_label, read_nonzero_label):
        label = reader(through_png(Image.fromarray(pixels)))
        assert label.shape == (3, 5)
        assert np.argwhere(label).tolist() == [[2, 4]]
