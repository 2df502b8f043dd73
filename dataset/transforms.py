"""Reading, resizing and augmenting one picture/mask pair."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.codecs import LabelReader
from dataset.pictures import open_picture, read_picture, squash
from utils.errors import InputError, first_line

FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.5
BLUR_PROBABILITY = 0.3
NOISE_PROBABILITY = 0.3
BRIGHTNESS = CONTRAST = SATURATION = 0.2
HUE = 0.1  # share of the colour circle
BLUR_KERNEL_PIXELS = (11.0, 31.0)  # at the reference resolution
NOISE_STD = (0.1, 0.3)  # of pixels in [0, 1], at the reference resolution
REFERENCE_RESOLUTION = 1024


def read_image(path: Path, resolution: int | None = None) -> NDArray[np.uint8]:
    """Reads a picture upright (EXIF orientation applied) and resizes it, bilinear with antialiasing.

    Args:
        path: any format that Pillow reads.
        resolution: side in pixels of the square that the picture is squashed to; None keeps its size.

    Returns:
        RGB (H, W, 3), uint8.

    Raises:
        InputError: naming the file, if it cannot be read.
    """
    image = np.array(read_picture(path))
    return image if resolution is None else squash(image, resolution, resolution)


def read_label(path: Path, reader: LabelReader, resolution: int | None = None) -> NDArray[np.uint8]:
    """Reads a mask file as a label and resizes it by nearest neighbour.

    Returns:
        Label (H, W), uint8.

    Raises:
        InputError: naming the file, if it cannot be read or holds colours that `reader` refuses.
    """
    try:
        with open_picture(path) as mask:
            label = reader(mask)
    except ValueError as error:
        raise InputError(f"{path}: {first_line(error, 400)}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a mask ({first_line(error)}); repair or remove it") from error
    if resolution is not None and label.shape != (resolution, resolution):
        resized = Image.fromarray(label).resize((resolution, resolution), Image.Resampling.NEAREST)
        return np.array(resized)
    return label


def augment(
    image: NDArray[np.uint8], label: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Augments a pair in the sense of the published recipe: the same flip for both, photometry for the picture alone.

    Args:
        image: RGB (H, W, 3), uint8, at the training resolution.
        label: (H, W), uint8.
        rng: the sample's own generator.

    Returns:
        The augmented picture and label, same shapes and dtypes.
    """
    if rng.random() < FLIP_PROBABILITY:
        image, label = flip(image), flip(label)
    return augment_photometry(image, rng), label


def flip(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a picture or label (H, W, ...) with left and right exchanged."""
    return np.ascontiguousarray(picture[:, ::-1])


def augment_photometry(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws colour jitter, blur and noise, each with its probability.

    The recipe's blur and noise are stated at 1024 px. Here they work at the training size: a blur kernel shrinks with the
    resolution, and so does the noise's standard deviation, as it does when independent noise is averaged down.

    Args:
        image: RGB (H, W, 3), uint8, at the training resolution.
        rng: the sample's own generator.
    """
    scale = image.shape[0] / REFERENCE_RESOLUTION
    if rng.random() < JITTER_PROBABILITY:
        image = _jitter_colours(image, rng)
    if rng.random() < BLUR_PROBABILITY:
        image = _blur(image, scale, rng)
    if rng.random() < NOISE_PROBABILITY:
        std = rng.uniform(*NOISE_STD) * scale * 255
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(std)
        image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return image


def _jitter_colours(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * (BRIGHTNESS, CONTRAST, SATURATION)
    hue_shift = rng.uniform(-HUE, HUE)
    image = np.asarray(cv2.convertScaleAbs(image, alpha=brightness), np.uint8)
    mean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()
    image = np.asarray(cv2.addWeighted(image, contrast, image, 0, (1 - contrast) * mean), np.uint8)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    hsv = cv2.cvtColor(cv2.addWeighted(image, saturation, grey, 1 - saturation, 0), cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(hue_shift * 256) % 256)  # hue fills the byte, so wrapping is the colour circle
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def _blur(image: NDArray[np.uint8], scale: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    kernel_pixels = rng.uniform(*BLUR_KERNEL_PIXELS) * scale
    motion, angle = rng.random() < 0.5, rng.uniform(0, 180)
    if motion:
        side = 2 * int(np.ceil(kernel_pixels / 2)) + 1
        line = np.zeros((side, side), np.float32)
        # A line of fractional length: the two outermost pixels carry what is left over.
        inner = (side - 2) if side > 1 else 1
        line[side // 2, :] = max(0.0, (kernel_pixels - inner) / 2)
        line[side // 2, 1 : side - 1] = 1
        turn = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), angle, 1)
        kernel = cv2.warpAffine(line, turn, (side, side))
        return np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101))
    # OpenCV's own relation between kernel size and standard deviation, taken where the sizes are stated, then scaled.
    sigma = (0.3 * ((kernel_pixels / scale - 1) * 0.5 - 1) + 0.8) * scale
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101))
