"""COCO annotations -> masks: polygons and run lengths, drawn by category."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from dataset.codecs import TRANS10K_V2, Palette
from utils.errors import InputError, first_line

BACKGROUND = "background"
GRID = (0, 128, 255)  # levels that further colours are made of
MAX_PIXELS = 200_000_000  # of one picture


@dataclass(frozen=True)
class CocoImage:
    """A picture and its annotations.

    Args:
        file_name: as the file says.
        size: width and height.
        shapes: (category, segmentation), larger ones first, so that they do not hide the smaller.
    """

    file_name: PurePosixPath
    size: tuple[int, int]
    shapes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class CocoFile:
    """One file of annotations.

    Args:
        path: where it lies in its source.
        images: its pictures.
        categories: names of those that occur, in the file's order.
        skipped: number of annotations without a shape.
    """

    path: PurePosixPath
    images: list[CocoImage]
    categories: list[str]
    skipped: int


def is_coco(content: object) -> TypeGuard[dict[str, Any]]:
    """Returns whether parsed JSON has a COCO file's lists."""
    return isinstance(content, dict) and all(
        isinstance(content.get(name), list) for name in ("images", "annotations", "categories")
    )


def parse_coco(path: PurePosixPath, content: Mapping[str, Any]) -> CocoFile:
    """Reads a COCO file's pictures, shapes and categories. Crowds are drawn like all others.

    Raises:
        InputError: naming the file and what is missing or malformed in it.
    """
    try:
        for kind, key in (("categories", "id"), ("images", "id"), ("images", "file_name")):
            counts = Counter(str(entry[key]) for entry in content[kind])
            if twice := [value for value, count in counts.items() if count > 1]:
                raise InputError(
                    f"{path}: {kind}: {key} {twice[0]} occurs {counts[twice[0]]} times; join or remove the others"
                )
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        shapes: dict[Any, list[tuple[float, str, Any]]] = {image["id"]: [] for image in content["images"]}
        used: Counter[str] = Counter()
        skipped = 0
        for annotation in content["annotations"]:
            if not annotation.get("segmentation"):
                skipped += 1
                continue
            if annotation["image_id"] not in shapes or annotation["category_id"] not in names:
                raise InputError(
                    f"{path}: annotation {annotation.get('id')}: its picture or category is not in the file"
                )
            name = names[annotation["category_id"]]
            used[name] += 1
            area = float(annotation.get("area") or 0)
            shapes[annotation["image_id"]].append((area, name, annotation["segmentation"]))
        images = []
        for image in content["images"]:
            size = int(image["width"]), int(image["height"])
            if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise InputError(
                    f"{path}: picture {image['file_name']} is said to be {size[0]}x{size[1]}; sides of at least 1 and up to "
                    f"{MAX_PIXELS:,} pixels are drawn"
                )
            ordered = sorted(shapes[image["id"]], key=lambda shape: -shape[0])
            file_name = PurePosixPath(str(image["file_name"]).replace("\\", "/"))
            images.append(CocoImage(file_name, size, tuple((name, shape) for _, name, shape in ordered)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is not a COCO file ({type(error).__name__}: {first_line(error)})") from error
    return CocoFile(path, images, [name for name in dict.fromkeys(names.values()) if used[name]], skipped)


def draw(image: CocoImage, labels: Mapping[str, int]) -> NDArray[np.uint8]:
    """Returns the label (H, W), uint8, of a picture; categories without a label are not drawn.

    Raises:
        InputError: naming the picture, for a malformed shape.
    """
    width, height = image.size
    label = np.zeros((height, width), np.uint8)
    try:
        for name, shape in image.shapes:
            if name in labels:
                inside = _from_runs(shape, image.size) if isinstance(shape, dict) else _from_polygons(shape, image.size)
                label[inside] = labels[name]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{image.file_name}: a malformed shape in the annotations ({first_line(error)})") from error
    return label


def colours_for(names: Sequence[str]) -> Palette:
    """Returns a palette of the background and these classes.

    Raises:
        InputError: if there are more than there are colours that stay apart.
    """
    grid = [(red, green, blue) for red in GRID for green in GRID for blue in GRID]
    chosen: list[tuple[int, int, int]] = [(0, 0, 0)]
    for colour in [*TRANS10K_V2.colours[1:], *grid]:
        if len(chosen) == len(names) + 1:
            break
        try:
            Palette(tuple(str(number) for number in range(len(chosen) + 1)), (*chosen, colour))
        except InputError:
            continue
        chosen.append(colour)
    if len(chosen) <= len(names):
        raise InputError(
            f"{len(names)} categories, and only {len(chosen) - 1} colours stay apart in the model's latents: name fewer with "
            "--categories, or make one class of them with --binary"
        )
    return Palette((BACKGROUND, *names), tuple(chosen))


def _from_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns the pixels (H, W) whose centre lies in one of the polygons [x0, y0, x1, y1, ...], by the even-odd rule."""
    width, height = size
    inside = np.zeros((height, width), np.bool_)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon has a corner that is no number")
        crossings = np.zeros((height, width + 1), np.bool_)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            top, bottom = sorted((float(y0), float(y1)))
            rows = np.arange(max(0, int(np.ceil(top - 0.5))), min(height, int(np.ceil(bottom - 0.5))))
            if len(rows):
                at = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                columns = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)
                crossings[rows, columns] ^= True
        rows = np.flatnonzero(crossings.any(axis=1))
        if len(rows):
            part = slice(rows[0], rows[-1] + 1)
            inside[part] |= np.logical_xor.accumulate(crossings[part, :width], axis=1)
    return inside


def _from_runs(runs: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns the pixels (H, W) of run lengths, plain or packed into text, which go down the columns."""
    height, width = (int(value) for value in runs["size"])
    if (width, height) != size:
        raise ValueError(f"run lengths of {width}x{height} on a picture of {size[0]}x{size[1]}")
    counts = _unpack(runs["counts"]) if isinstance(runs["counts"], str) else [int(count) for count in runs["counts"]]
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        raise ValueError("run lengths that do not fill the picture")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _unpack(text: str) -> list[int]:
    """Returns the run lengths of COCO's packed form: five bits a character, from the third run on as differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def load_json(data: bytes) -> object:
    """Returns what a JSON file holds; None if it is not valid."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
