"""Reading, resizing and augmenting a pair."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dataset import transforms
from dataset.codecs import read_nonzero_label
from dataset.trans10k import Pair, PairDataset
from dataset.transforms import augment, read_image, read_label

Array = NDArray[np.uint8]
PROBABILITIES = ("FLIP_PROBABILITY", "JITTER_PROBABILITY", "BLUR_PROBABILITY", "NOISE_PROBABILITY")


def picture(height: int = 48, width: int = 48, seed: int = 0) -> Array:
    """A smooth random picture with room above and below its values."""
    coarse = np.random.default_rng(seed).integers(60, 190, (6, 6, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def label_like(image: Array, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2, image.shape[:2], dtype=np.uint8)


def only(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one step of the augmentation certain and the others impossible."""
    for probability in PROBABILITIES:
        monkeypatch.setattr(transforms, probability, 1.0 if name is not None and probability.startswith(name) else 0.0)


# Reading and resizing


@pytest.mark.parametrize("size", [(100, 70), (16, 20), (64, 64), (33, 200)])
def test_pictures_are_resized_bilinear_with_antialiasing_like_pillow(size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", 32)
    assert read.dtype == np.uint8
    assert np.array_equal(read, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


def test_antialiasing_averages_fine_stripes(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png", 16)[:, 2:-2].astype(int) - 127).max() < 12


def test_a_picture_keeps_its_size_without_a_resolution(tmp_path: Path) -> None:
    image = picture(30, 20)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_kind_of_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    Image.fromarray(picture()).convert(mode).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert read_image(next(tmp_path.iterdir()), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(100, 70), (10, 12), (33, 200)])
def test_masks_are_resized_by_nearest_neighbour_and_stay_binary(size: tuple[int, int], tmp_path: Path) -> None:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 2, (size[1], size[0]), dtype=np.uint8))
    mask.save(tmp_path / "a.png")
    label = read_label(tmp_path / "a.png", read_nonzero_label, 32)
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1}
    assert np.array_equal(label, np.asarray(mask.resize((32, 32), Image.Resampling.NEAREST)))


def test_a_mask_keeps_its_size_without_a_resolution(tmp_path: Path) -> None:
    Image.fromarray(np.eye(5, 7, dtype=np.uint8)).save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png", read_nonzero_label), np.eye(5, 7))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_read_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 255  # the stored picture's top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    upright = read_image(tmp_path / f"a.{suffix}")
    assert upright.shape == ((16, 32, 3) if orientation <= 4 else (32, 16, 3))
    bottom = orientation in (3, 4, 7, 8)
    right = orientation in (2, 3, 6, 7)
    height, width = upright.shape[0] // 2, upright.shape[1] // 2
    for row in (0, 1):
        for column in (0, 1):
            quarter = upright[row * height : (row + 1) * height, column * width : (column + 1) * width].mean()
            assert (quarter > 200) == ((row, column) == (bottom, right)), (row, column)


# Augmentation


def test_an_augmented_pair_keeps_shapes_types_and_label_values() -> None:
    for resolution in (16, 64, 128):
        image = picture(resolution, resolution)
        label = label_like(image)
        kept_image, kept_label = image.copy(), label.copy()
        for seed in range(40):
            new_image, new_label = augment(image, label, np.random.default_rng(seed))
            assert (new_image.shape, new_image.dtype) == (image.shape, np.uint8)
            assert (new_label.shape, new_label.dtype) == (label.shape, np.uint8)
            assert set(np.unique(new_label)) <= {0, 1}
            assert new_image.flags.c_contiguous
            assert new_label.flags.c_contiguous
        assert np.array_equal(image, kept_image)
        assert np.array_equal(label, kept_label)


def test_equal_generators_give_equal_pairs_and_different_ones_differ() -> None:
    image = picture()
    label = label_like(image)
    results = [augment(image, label, np.random.default_rng(seed))[0].tobytes() for seed in range(40)]
    assert results == [augment(image, label, np.random.default_rng(seed))[0].tobytes() for seed in range(40)]
    assert len(set(results)) > 30


def test_picture_and_mask_are_flipped_together() -> None:
    label = label_like(picture())
    image = np.repeat(label[..., None] * 255, 3, axis=2).astype(np.uint8)  # the picture shows its mask
    flips = 0
    for seed in range(60):
        new_image, new_label = augment(image, label, np.random.default_rng(seed))
        inside, outside = new_image[new_label == 1].mean(), new_image[new_label == 0].mean()
        assert inside > outside + 50, seed
        flipped = np.array_equal(new_label, label[:, ::-1])
        assert flipped or np.array_equal(new_label, label)
        flips += flipped
    assert 15 < flips < 45


@pytest.mark.parametrize("step", ["JITTER", "BLUR", "NOISE"])
def test_photometry_changes_the_picture_and_leaves_the_mask_alone(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(step, monkeypatch)
    image = np.random.default_rng(0).integers(40, 216, (256, 256, 3), dtype=np.uint8)
    label = label_like(image)
    for seed in range(8):
        new_image, new_label = augment(image, label, np.random.default_rng(seed))
        assert not np.array_equal(new_image, image)
        assert np.array_equal(new_label, label)


def test_without_any_step_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    only(None, monkeypatch)
    image = picture()
    label = label_like(image)
    new_image, new_label = augment(image, label, np.random.default_rng(0))
    assert np.array_equal(new_image, image)
    assert np.array_equal(new_label, label)


def test_the_steps_come_as_often_as_published() -> None:
    values = [getattr(transforms, name) for name in PROBABILITIES]
    assert values == [0.5, 0.5, 0.3, 0.3]
    assert (transforms.BRIGHTNESS, transforms.CONTRAST, transforms.SATURATION, transforms.HUE) == (0.2, 0.2, 0.2, 0.1)


def jitter(
    image: Array, monkeypatch: pytest.MonkeyPatch, brightness: float = 0, contrast: float = 0, saturation: float = 0,
    hue: float = 0, seed: int = 0,
) -> Array:  # fmt: skip
    only("JITTER", monkeypatch)
    for name, value in zip(("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"), (brightness, contrast, saturation, hue), strict=True):  # fmt: skip
        monkeypatch.setattr(transforms, name, value)
    return augment(image, image[..., 0], np.random.default_rng(seed))[0]


def test_a_jitter_of_nothing_changes_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture()
    assert np.abs(jitter(image, monkeypatch).astype(int) - image).max() <= 4  # the byte of hue is coarse


def test_brightness_scales_and_stays_within_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    means = [jitter(grey, monkeypatch, brightness=0.2, seed=seed).mean() for seed in range(60)]
    assert 79 <= min(means) < 86
    assert 114 < max(means) <= 121
    white = np.full((8, 8, 3), 250, np.uint8)
    assert all(jitter(white, monkeypatch, brightness=0.2, seed=seed).min() >= 199 for seed in range(20))  # no wrapping


def test_contrast_keeps_the_mean_and_scales_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.repeat(np.random.default_rng(0).integers(80, 160, (32, 32, 1), dtype=np.uint8), 3, axis=2)
    ratios = []
    for seed in range(60):
        new = jitter(grey, monkeypatch, contrast=0.2, seed=seed)
        assert abs(new.mean() - grey.mean()) < 1
        ratios.append(new.std() / grey.std())
    assert 0.79 < min(ratios) < 0.86
    assert 1.14 < max(ratios) < 1.21


def test_saturation_leaves_grey_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    colour = np.full((8, 8, 3), (160, 100, 100), np.uint8)
    spreads = []
    for seed in range(60):
        assert np.ptp(jitter(grey, monkeypatch, saturation=0.2, hue=0.1, seed=seed)) <= 1
        spreads.append(np.ptp(jitter(colour, monkeypatch, saturation=0.2, seed=seed)))
    assert 46 <= min(spreads) < 53
    assert 67 < max(spreads) <= 74


def hue_of(image: Array) -> NDArray[np.float64]:
    """Hue in shares of the colour circle."""
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[..., 0], np.float64) / 360


@pytest.mark.parametrize("colour", [(200, 60, 60), (200, 60, 70), (200, 70, 60), (60, 200, 60), (70, 60, 200)])
def test_hue_turns_on_the_colour_circle_and_wraps_around_red(
    colour: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.full((4, 4, 3), colour, np.uint8)
    turns = []
    for seed in range(60):
        new = jitter(image, monkeypatch, hue=0.1, seed=seed)
        turns.append((hue_of(new)[0, 0] - hue_of(image)[0, 0] + 0.5) % 1 - 0.5)
        assert abs(int(new.max()) - 200) <= 2  # a turn keeps value and saturation
        assert abs(int(new.min()) - 60) <= 3
    assert -0.11 < min(turns) < -0.06
    assert 0.06 < max(turns) < 0.11


def test_noise_shrinks_with_the_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    only("NOISE", monkeypatch)

    def std(resolution: int, seed: int) -> float:
        grey = np.full((resolution, resolution, 3), 128, np.uint8)
        return float((augment(grey, grey[..., 0], np.random.default_rng(seed))[0].astype(float) - 128).std() / 255)

    at_512 = [std(512, seed) for seed in range(6)]
    assert all(0.1 * 0.49 < value < 0.3 * 0.51 for value in at_512)
    for seed in range(6):
        assert std(256, seed) == pytest.approx(at_512[seed] / 2, rel=0.02)
        assert std(128, seed) == pytest.approx(at_512[seed] / 4, rel=0.03)


def spread_of_blur(resolution: int, seed: int) -> tuple[float, float]:
    """Blurs a dot; returns the standard deviations along the long and the short axis, in pixels."""
    dot = np.zeros((resolution, resolution, 3), np.uint8)
    middle = resolution // 2
    dot[middle - 1 : middle + 2, middle - 1 : middle + 2] = 255
    blurred = augment(dot, dot[..., 0], np.random.default_rng(seed))[0][..., 0].astype(float)
    assert blurred.sum() == pytest.approx(9 * 255, rel=0.35)  # rounding to bytes loses the faint tails
    positions = np.argwhere(blurred > 0)
    covariance = np.cov(positions.T, aweights=blurred[blurred > 0], ddof=0) - np.eye(2) * 8 / 12
    short, long = np.sqrt(np.clip(np.linalg.eigvalsh(covariance), 0, None))
    return float(long), float(short)


def test_blur_is_either_motion_or_gaussian_and_shrinks_with_the_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    only("BLUR", monkeypatch)
    kinds = set()
    for seed in range(16):
        full, half = spread_of_blur(1024, seed), spread_of_blur(512, seed)
        is_motion = full[0] > 2 * full[1]
        kinds.add(is_motion)
        if is_motion:  # a line of n pixels spreads by n / sqrt(12)
            assert 11 * 0.75 < full[0] * 12**0.5 < 31 * 1.15
        assert 0.35 < half[0] / full[0] < 0.68, seed
    assert kinds == {True, False}


def test_a_gaussian_blurs_sigma_is_proportional_to_the_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    only("BLUR", monkeypatch)
    sigmas: list[float] = []
    blur = cv2.GaussianBlur

    def watched(image: Array, size: tuple[int, int], sigma: float, **options: object) -> Array:
        assert size == (0, 0)  # the kernel follows sigma
        sigmas.append(sigma)
        return np.asarray(blur(image, size, sigma, **options), np.uint8)

    monkeypatch.setattr(transforms.cv2, "GaussianBlur", watched)
    at = {}
    for resolution in (1024, 512, 64, 16):
        sigmas.clear()
        image = picture(resolution, resolution)
        for seed in range(40):
            augment(image, image[..., 0], np.random.default_rng(seed))
        at[resolution] = np.array(sigmas)
    assert 10 < len(at[1024]) < 30
    # Kernels of 11 to 31 pixels at 1024, by OpenCV's relation 0.3 * ((pixels - 1) / 2 - 1) + 0.8.
    assert 2 <= at[1024].min() < 2.6
    assert 4.4 < at[1024].max() <= 5
    for resolution in (512, 64, 16):
        assert at[resolution] == pytest.approx(at[1024] * resolution / 1024)


def test_blur_and_noise_all_but_vanish_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(32, 32)
    for step, limit in (("BLUR", 3), ("NOISE", 15)):
        only(step, monkeypatch)
        for seed in range(10):
            new = augment(image, image[..., 0], np.random.default_rng(seed))[0]
            assert np.abs(new.astype(int) - image).mean() < limit


def test_blur_keeps_a_flat_picture_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    only("BLUR", monkeypatch)
    for resolution in (32, 128, 512):
        flat = np.full((resolution, resolution, 3), 200, np.uint8)
        for seed in range(6):
            assert np.abs(augment(flat, flat[..., 0], np.random.default_rng(seed))[0].astype(int) - 200).max() <= 1


# Samples


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Six pairs of 40x40 pixels."""
    found = []
    for number in range(6):
        image = picture(40, 40, number)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        Image.fromarray(label_like(image, number) * 255).save(tmp_path / f"{number}_mask.png")
        found.append(Pair(str(number), "", tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"))
    return found


def samples(pairs: list[Pair], seed: int | None, keys: list[tuple[int, int]]) -> list[bytes]:
    data = PairDataset(pairs, read_nonzero_label, 32, augmentation_seed=seed)
    drawn = (data[key] for key in keys)
    return [sample["image"].numpy().tobytes() + sample["label"].numpy().tobytes() for sample in drawn]


KEYS = [(epoch, index) for epoch in range(3) for index in range(6)]


def test_a_sample_depends_on_seed_epoch_and_index_alone(pairs: list[Pair]) -> None:
    forwards = samples(pairs, 0, KEYS)
    assert samples(pairs, 0, KEYS[::-1])[::-1] == forwards
    assert [samples(pairs, 0, [key])[0] for key in KEYS] == forwards
    other = samples(pairs, 1, KEYS)
    assert sum(a != b for a, b in zip(forwards, other, strict=True)) > len(KEYS) // 2
    assert any(forwards[index] != forwards[index + 6] for index in range(6))  # another epoch


def test_no_seed_means_no_augmentation(pairs: list[Pair]) -> None:
    plain = samples(pairs, None, KEYS)
    assert plain[:6] == plain[6:12] == plain[12:]
    sample = PairDataset(pairs, read_nonzero_label, 32)[0, 2]
    expected = torch.from_numpy(read_image(pairs[2].image_path, 32)).permute(2, 0, 1).float() / 255
    assert torch.equal(sample["image"], expected)
    assert torch.equal(sample["label"], torch.from_numpy(read_label(pairs[2].mask_path, read_nonzero_label, 32)))


def test_a_sample_holds_pixels_between_0_and_1(pairs: list[Pair]) -> None:
    sample = PairDataset(pairs, read_nonzero_label, 32, augmentation_seed=0)[4, 1]
    assert (sample["image"].shape, sample["image"].dtype) == ((3, 32, 32), torch.float32)
    assert (sample["label"].shape, sample["label"].dtype) == ((32, 32), torch.uint8)
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    assert sample["image"].max() > 0.5
    assert (sample["name"], sample["epoch"], sample["index"]) == ("1", 4, 1)
    assert sample["file"] == str(pairs[1].image_path)
