"""Folders on disk -> checked pairs -> samples."""

from __future__ import annotations

import os
import signal
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.codecs import (
    THINGS_STUFF,
    TRANS10K_V2,
    Codec,
    LabelReader,
    Palette,
    build_codec,
    read_class_ids,
    read_coloured_classes,
    read_nonzero_label,
    read_trans10k_classes,
    read_trans10k_label,
)
from dataset.pictures import open_picture
from dataset.transforms import augment, read_image, read_label
from utils.errors import InputError, first_line
from utils.seeding import Stream, numpy_generator

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_SUFFIXES = (".png",)
EXIF_ORIENTATION = 0x0112
MAX_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class Layout:
    """One kind of data set: its folders, how its mask files are read, and its classes, if it tells more than glass or not."""

    difficulties: tuple[str, ...]
    read_label: LabelReader
    palette: Palette | None = None
    masks_folder: str = "masks"
    may_be_flat: bool = False
    """Whether a split may lack its difficulty folders."""

    @property
    def codec(self) -> str:
        """The name of its labels' codec."""
        return "palette" if self.palette else "binary"

    def build_codec(self) -> Codec:
        """Returns its labels' codec."""
        return build_codec(self.codec, self.palette)

    def folders(self, root: Path, split: str, difficulty: str) -> list[tuple[str, Path]]:
        """Returns (difficulty, folder) for each folder that a split is read from."""
        if split == "train" or not self.difficulties:
            if difficulty != "mix":
                raise InputError(f"difficulty {difficulty}: this data set has no difficulty folders; use mix")
            return [("", root / split)]
        if difficulty == "mix" and self.may_be_flat and (root / split / "images").is_dir():
            return [("", root / split)]
        chosen = self.difficulties if difficulty == "mix" else (difficulty,)
        return [(name, root / split / name) for name in chosen]


LAYOUTS = {
    "trans10k": Layout(("easy", "hard"), read_trans10k_label),
    "trans10k_classes": Layout(("easy", "hard"), read_trans10k_classes, THINGS_STUFF),
    "trans10k_v2": Layout(
        ("easy", "hard"),
        partial(read_class_ids, num_classes=len(TRANS10K_V2.names)),
        TRANS10K_V2,
        "masks_12",
        may_be_flat=True,
    ),
    "folder": Layout((), read_nonzero_label),
}


def layout_of(dataset_name: str, palette: str | Path | None = None) -> Layout:
    """Returns a data set's layout.

    Args:
        dataset_name: a key of `LAYOUTS`.
        palette: file of the classes' colours in the masks of a `folder`, see `Palette.from_file`.

    Raises:
        InputError: if the palette cannot be read or belongs to another layout.
    """
    layout = LAYOUTS[dataset_name]
    if palette is None:
        return layout
    if dataset_name != "folder":
        raise InputError(f"palette: is for dataset_name: folder; {dataset_name} has its own classes; leave it out")
    classes = Palette.from_file(Path(palette))
    return replace(layout, read_label=partial(read_coloured_classes, palette=classes), palette=classes)


@dataclass(frozen=True)
class Pair:
    """A picture and its mask. `name` is unique within its split."""

    name: str
    difficulty: str
    image_path: Path
    mask_path: Path

    @property
    def number(self) -> int:
        """A number of its own for seeding, whatever else was selected."""
        return zlib.crc32(f"{self.difficulty}/{self.image_path.stem}".encode())


@dataclass(frozen=True)
class Scan:
    """What was found on disk for one split."""

    split: str
    pairs: list[Pair]
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(pair.difficulty for pair in self.pairs if pair.difficulty)
        details = [f"{count} {difficulty}" for difficulty, count in sorted(counts.items())]
        if self.skipped:
            details.append(
                f"{len(self.skipped)} skipped because picture and mask differ in size: " + "; ".join(self.skipped)
            )
        return f"{self.split}: {len(self.pairs)} pairs" + (f" ({', '.join(details)})" if details else "")


def scan(
    dataset_name: str,
    dataset_path: str | Path,
    split: str,
    difficulty: str = "mix",
    mismatched_pairs: str = "error",
    limit: int | None = None,
) -> Scan:
    """Lists and checks the pairs of one split from directory listings and file headers.

    Args:
        dataset_name: a key of `LAYOUTS`.
        dataset_path: the data set's root.
        split: train, validation or test; no other split is looked at.
        difficulty: easy, hard or mix.
        mismatched_pairs: error or skip, for pairs whose sizes differ.
        limit: at most this many pairs, spread evenly over the split, so that a mix stays one.

    Returns:
        The pairs sorted by difficulty and name.

    Raises:
        InputError: if a folder is missing or empty, a picture or mask has no partner, a header cannot be read, or
            sizes differ and `mismatched_pairs` is error.
    """
    layout, root = LAYOUTS[dataset_name], Path(dataset_path)
    if not root.is_dir():
        raise InputError(f"{root}: no such data set folder; set dataset_path to the data set's root")
    pairs = [
        pair
        for name, folder in layout.folders(root, split, difficulty)
        for pair in _pairs_in(folder, name, dataset_name, layout.masks_folder)
    ]
    if not pairs:
        raise InputError(
            f"{root}: the {split} split ({difficulty}) holds no pictures; check dataset_path and dataset_name"
        )
    pairs, mismatches = _check_sizes(pairs)
    if mismatches and mismatched_pairs == "error":
        raise InputError(
            f"{root}: {len(mismatches)} pairs differ in size: {'; '.join(mismatches)}. Repair them, or leave them out "
            "with mismatched_pairs: skip"
        )
    if not pairs:
        raise InputError(f"{root}: every pair of the {split} split differs in size; check the masks")
    pairs = _with_unique_names(pairs)
    if limit is not None and limit < len(pairs):
        pairs = [pairs[position * len(pairs) // limit] for position in range(limit)]
    return Scan(split, pairs, mismatches)


class PairDataset(Dataset[dict[str, Any]]):
    """Reads pairs as samples; indexed by (epoch, index) so that a sample's draws depend on nothing else.

    Args:
        pairs: from `scan`.
        reader: the layout's mask reader.
        resolution: side in pixels.
        augmentation_seed: seeds the augmentation; None: no augmentation.
    """

    def __init__(
        self, pairs: Sequence[Pair], reader: LabelReader, resolution: int, augmentation_seed: int | None = None
    ) -> None:
        self.pairs = pairs
        self.reader = reader
        self.resolution = resolution
        self.augmentation_seed = augmentation_seed

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Returns a sample.

        Args:
            key: (epoch, index).

        Returns:
            `image` float32 (3, H, W) in [0, 1]; `label` uint8 (H, W); `name`; `file`, the picture's path;
            `epoch`; `index`.

        Raises:
            InputError: naming the file that cannot be read.
        """
        epoch, index = key
        pair = self.pairs[index]
        image = read_image(pair.image_path, self.resolution)
        label = read_label(pair.mask_path, self.reader, self.resolution)
        if self.augmentation_seed is not None:
            rng = numpy_generator(Stream.AUGMENTATION, self.augmentation_seed, epoch, index)
            image, label = augment(image, label, rng)
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255
        return {
            "image": pixels,
            "label": torch.from_numpy(label),
            "name": pair.name,
            "file": str(pair.image_path),
            "epoch": epoch,
            "index": index,
        }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples into a batch: tensors along a new first axis, lists of the rest."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}


def prepare_worker(worker: int) -> None:
    """Sets up a loader process: one thread, and out of reach of the signals that ask the trainer to save and leave.

    A session of its own keeps Ctrl-C and a SIGTERM to the trainer's group away; a SIGTERM to the process alone, with which
    the trainer ends its loaders, still ends it.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)


def mask_stems(stem: str, stems: Collection[str]) -> tuple[str, str]:
    """Returns what a picture's mask may be called, the likelier first: NAME_mask, unless another picture is called that.

    Args:
        stem: of the picture's file name.
        stems: of all pictures there.
    """
    longer = f"{stem}_mask"
    return (stem, longer) if longer in stems else (longer, stem)


def _pairs_in(folder: Path, difficulty: str, dataset_name: str, masks_folder: str) -> Iterator[Pair]:
    images = _files_by_stem(folder / "images", IMAGE_SUFFIXES, dataset_name)
    masks = _files_by_stem(folder / masks_folder, MASK_SUFFIXES, dataset_name)
    lonely_images = []
    for stem in sorted(images):
        mask_path = next((masks.pop(name) for name in mask_stems(stem, images.keys()) if name in masks), None)
        if mask_path is None:
            lonely_images.append(images[stem].name)
        else:
            yield Pair(stem, difficulty, images[stem], mask_path)
    for what, where, names in (
        (f"pictures have no mask in {masks_folder}", "images", lonely_images),
        ("masks have no picture in images", masks_folder, sorted(path.name for path in masks.values())),
    ):
        if names:
            more = f" and {len(names) - MAX_NAMES_IN_MESSAGE} more" if len(names) > MAX_NAMES_IN_MESSAGE else ""
            raise InputError(
                f"{folder / where}: {len(names)} {what}/: {', '.join(names[:MAX_NAMES_IN_MESSAGE])}{more}. A mask is "
                "named like its picture, as NAME.png or NAME_mask.png; add or remove the files"
            )


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], dataset_name: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122  pathlib is several times slower here
                if suffix.lower() not in suffixes or entry.name.startswith(".") or not entry.is_file():
                    continue
                if stem in files:
                    raise InputError(f"{folder}: {files[stem].name} and {entry.name} have the same stem; rename one")
                files[stem] = Path(entry.path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder}: no such folder; the {dataset_name} layout needs it (see the README)") from error
    except PermissionError as error:
        raise InputError(f"{folder}: cannot be listed (permission denied)") from error
    return files


def _check_sizes(pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    equal, mismatches = [], []
    for pair in pairs:
        image_size, mask_size = _size(pair.image_path, upright=True), _size(pair.mask_path, upright=False)
        if image_size == mask_size:
            equal.append(pair)
        else:
            turned = ", rotated by 90 degrees against each other" if image_size == mask_size[::-1] else ""
            sizes = f"{image_size[0]}x{image_size[1]} and {mask_size[0]}x{mask_size[1]}{turned}"
            mismatches.append(f"{pair.image_path} with {pair.mask_path.name} ({sizes})")
    return equal, mismatches


def _size(path: Path, upright: bool) -> tuple[int, int]:
    try:
        with open_picture(path) as image:
            turned = upright and "exif" in image.info and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else (image.width, image.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({first_line(error)}); repair or remove it") from error


def _with_unique_names(pairs: Sequence[Pair]) -> list[Pair]:
    counts = Counter(pair.name for pair in pairs)
    prefixed = [replace(pair, name=f"{pair.difficulty}_{pair.name}") for pair in pairs]
    named = [longer if counts[pair.name] > 1 else pair for pair, longer in zip(pairs, prefixed, strict=True)]
    # A stem may itself look like another's prefixed name; prefixing all of them is always unique.
    return named if len({pair.name for pair in named}) == len(named) else prefixed
