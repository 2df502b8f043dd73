"""Pictures as people have them: paths, PIL pictures, arrays and tensors of any mode, read as upright RGB."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from utils.errors import InputError, first_line

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any] | torch.Tensor
SIXTEEN_BIT = 65535
ROUNDING = 1e-3  # by which resizing may leave [0, 1]
CHANNELS = (1, 2, 3, 4)  # grey, grey with alpha, RGB, RGB with alpha
Image.init()
# These start another program, or need one that is not here.
_STUBS = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
FORMATS = tuple(name for name in Image.ID if name not in _STUBS)
ENDINGS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)
SCALED_TO_16_BITS = (
    "PNG",
    "PPM",
    "JPEG2000",
)  # formats whose pictures of more than 8 bits Pillow gives as 32-bit integers


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Opens a picture of any format that Pillow reads by itself, for `with`; a foreign file starts no other program."""
    return Image.open(path, formats=FORMATS)


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a file as `upright_rgb` does; of an animation the first frame.

    Raises:
        InputError: naming the file, if it cannot be read.
    """
    try:
        with open_picture(path) as image:
            return upright_rgb(image)
    except Exception as error:  # broken files raise all that a decoder may stumble over
        raise InputError(f"{path}: cannot be read as a picture ({first_line(error)}); repair or remove it") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Returns a PIL picture in RGB, turned as its EXIF orientation says; alpha is ignored, 16 bits are scaled to 8.

    Raises:
        ValueError: for a picture of floats or of 32 bits, whose range nothing tells.
    """
    image.load()
    if 0 in image.size:
        raise ValueError(f"a side of {min(image.size)} pixels")
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data tell no orientation
        upright = image
    if upright.mode.startswith("I") or upright.mode == "F":
        # Pillow's own conversion cuts at 255, which turns a 16-bit picture white.
        if upright.mode == "F" or (upright.mode == "I" and image.format not in SCALED_TO_16_BITS):
            raise ValueError(f"mode {upright.mode} has no known range; save it with 8 or 16 bits")
        upright = Image.fromarray(_to_8_bits(np.asarray(upright).clip(0, SIXTEEN_BIT).astype(np.uint16)))
    return upright.convert("RGB")


def as_rgb(picture: Picture, name: str = "picture") -> NDArray[np.uint8]:
    """Returns any picture as an array.

    Args:
        picture: a path; a PIL picture; an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), with C of 1 to 4 (grey,
            RGB, each with or without alpha, which is ignored), uint8, uint16, or float in [0, 1].
        name: in messages, where there is no path.

    Returns:
        RGB (H, W, 3), uint8, upright.

    Raises:
        InputError: naming the picture, if it cannot be read or is nothing of these.
    """
    if isinstance(picture, str | os.PathLike):
        return np.array(read_picture(picture))
    try:
        if isinstance(picture, Image.Image):
            return np.array(upright_rgb(picture))
        if isinstance(picture, torch.Tensor):
            tensor = picture.detach().cpu()
            values: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            return _array_as_rgb(np.moveaxis(values, 0, -1) if values.ndim == 3 else values)
        if isinstance(picture, np.ndarray):
            return _array_as_rgb(picture)
    except Exception as error:
        raise InputError(f"{name}: not usable as a picture ({first_line(error)})") from error
    raise InputError(
        f"{name}: a {type(picture).__name__} is no picture; give a path, PIL picture, array or tensor, or a list of these"
    )


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """Returns what stands for one picture or several as a list: a batch (N, H, W, C) or (N, C, H, W) is cut into its pictures."""
    if isinstance(pictures, np.ndarray | torch.Tensor) and pictures.ndim == 4:
        return list(pictures)
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]  # type: ignore[list-item]


def squash(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resizes RGB (H, W, 3), uint8, to (height, width, 3), bilinear with antialiasing, as training does."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def _array_as_rgb(values: NDArray[Any]) -> NDArray[np.uint8]:
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in CHANNELS or 0 in values.shape:
        raise ValueError(f"shape {values.shape} is not one of a picture, with 1 to 4 channels")
    if values.dtype == np.uint16:
        values = _to_8_bits(values)
    elif np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
            raise ValueError(f"floats must lie in [0, 1], these in [{values.min():g}, {values.max():g}]")
        values = (values * 255).round().clip(0, 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ValueError(f"dtype {values.dtype} is not one of uint8, uint16 and floats in [0, 1]")
    grey = values.shape[2] < 3
    return np.ascontiguousarray(np.repeat(values[..., :1], 3, axis=2) if grey else values[..., :3])


def _to_8_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return ((values.astype(np.uint32) * 255 + SIXTEEN_BIT // 2) // SIXTEEN_BIT).astype(np.uint8)
