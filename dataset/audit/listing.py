"""Folders on disk -> pairs and what is wrong with their names, without stopping at the first fault as `scan` does."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from dataset.audit.findings import Finding
from dataset.render_glass import SPLITS
from dataset.trans10k import IMAGE_SUFFIXES, LAYOUTS, MASK_SUFFIXES, Layout, mask_stems
from utils.errors import InputError

IMAGES_FOLDER = "images"
FOREIGN_FOLDERS = ("image", "mask")  # as GDD and GSD name them
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2")


@dataclass(frozen=True)
class ListedPair:
    """A picture and its mask, and the names that a corrected copy gives them.

    Args:
        split: train, validation or test.
        difficulty: easy, hard or nothing.
        image: path of the picture.
        mask: path of its mask.
        target_image: path in a corrected copy, relative to its root.
        target_mask: the mask's, likewise.
        left_out: why it cannot go into a corrected copy; empty if it can.
    """

    split: str
    difficulty: str
    image: Path
    mask: Path
    target_image: PurePosixPath
    target_mask: PurePosixPath
    left_out: str = ""


@dataclass
class Listing:
    """What was found on disk: pairs, single files by folder, and findings about names."""

    root: Path
    pairs: list[ListedPair] = field(default_factory=list)
    single: dict[str, str] = field(default_factory=dict)
    """File, relative to the root, to why a corrected copy leaves it out."""
    files: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """(split, difficulty) to the number of pictures and masks."""
    findings: list[Finding] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """Returns a path relative to the root, with slashes."""
        return path.relative_to(self.root).as_posix()


def list_pairs(root: Path, dataset_name: str, layout: Layout) -> Listing:
    """Lists the pairs of all splits that a data set has, as training would pair them, and goes on after faults.

    Raises:
        InputError: if the folder is missing, or does not look like the layout; the message names the one it looks like.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the root of a data set")
    listing = Listing(root)
    for split in SPLITS:
        if os.path.lexists(root / split) and not (root / split).is_dir():
            listing.findings.append(
                Finding("folder", split, "is no folder, training needs it", "put the split's folder here")
            )
    folders = {split: layout.folders(root, split, "mix") for split in SPLITS if (root / split).is_dir()}
    if not folders:
        raise InputError(f"{root}: holds none of {', '.join(SPLITS)}, as {dataset_name} has{_looks_like(root)}")
    for split, parts in folders.items():
        if not any((folder / IMAGES_FOLDER).is_dir() for _, folder in parts):
            expected = " or ".join(f"{folder.relative_to(root).as_posix()}/{IMAGES_FOLDER}" for _, folder in parts)
            raise InputError(f"{root}: {dataset_name} has {expected}, this folder has not{_looks_like(root, split)}")
    everywhere = [folder for parts in folders.values() for _, folder in parts]
    if not any((folder / layout.masks_folder).is_dir() for folder in everywhere):
        raise InputError(
            f"{root}: {dataset_name} has its masks in {layout.masks_folder}/, this folder has not{_looks_like(root)}"
        )
    for split, parts in folders.items():
        for difficulty, folder in parts:
            _list_folder(listing, folder, split, difficulty, layout.masks_folder)
    if not any(pictures for pictures, _ in listing.files.values()):
        raise InputError(f"{root}: holds no pictures{_looks_like(root)}")
    return listing


def _looks_like(root: Path, split: str = "") -> str:
    """Returns how a message goes on that begins with what was expected."""
    for folder in (split,) if split else SPLITS:
        inside = root / folder
        for name, layout in LAYOUTS.items():
            if layout.masks_folder != "masks" and any(inside.glob(f"**/{layout.masks_folder}/")):
                return f"; it looks like dataset_name: {name}; add --dataset_name {name}"
        if (inside / "easy").is_dir() or (inside / "hard").is_dir():
            return "; it looks like dataset_name: trans10k; add --dataset_name trans10k"
        if (inside / IMAGES_FOLDER).is_dir() and (inside / "masks").is_dir():
            return "; it looks like dataset_name: folder; add --dataset_name folder"
        if any((inside / name).is_dir() for name in FOREIGN_FOLDERS):
            return "; it looks like GDD or GSD as downloaded: run python -m dataset.prepare on it first"
    children = sorted(root.iterdir())
    for child in children:
        if child.is_dir() and any((child / name).is_dir() for name in SPLITS):
            return f"; {child} looks like the root of a data set"
    if any(child.suffix.lower() in ARCHIVE_SUFFIXES for child in children):
        return "; it holds archives: run python -m dataset.prepare on them first"
    if (root / IMAGES_FOLDER).is_dir():
        return f"; {root / IMAGES_FOLDER} has to lie in a split: {root}/train/{IMAGES_FOLDER}"
    return "; docs/data.md shows the layouts"


def _list_folder(listing: Listing, folder: Path, split: str, difficulty: str, masks_folder: str) -> None:
    """Adds the pairs of one folder of images and masks."""
    images_folder, masks_path = folder / IMAGES_FOLDER, folder / masks_folder
    images = _Files(listing, images_folder, IMAGE_SUFFIXES)
    masks = _Files(listing, masks_path, MASK_SUFFIXES)
    listing.files[split, difficulty] = len(images.accepted), len(masks.accepted)
    stems = {path.stem for path in images.accepted}
    candidates = [*images.accepted, *(path for path in images.convertible if path.stem not in stems)]
    partners = masks.partners(candidates)
    names = {path.stem.casefold() for path in candidates}
    taken: set[str] = set()  # stems of the corrected copy, in lower case
    for image in sorted([*images.accepted, *images.convertible], key=lambda path: path.name):
        stem, where = image.stem, listing.relative(image)
        twins = [other for other in candidates if other.stem == stem] if stem in images.twice else [image]
        mask, trouble = partners.get(image, (None, ""))
        if mask is None:
            if image in images.accepted:
                listing.findings.append(
                    Finding(
                        "missing", where, f"has no mask in {masks_folder}/", "add the mask or remove it", image=where
                    )
                )
                listing.single[where] = "it has no mask"
            else:
                listing.findings.append(_ignored(listing, image, IMAGE_SUFFIXES))
            continue
        shown = {"image": where, "mask": listing.relative(mask)}
        pair = ListedPair(split, difficulty, image, mask, PurePosixPath(where), PurePosixPath(shown["mask"]))
        if trouble:
            remedy = "--fix writes it under the right name"
            listing.findings.append(Finding("name", shown["mask"], trouble, remedy, where, **shown))
            target = f"{stem}_mask.png"
            pair = replace(pair, target_mask=pair.target_mask.with_name(target))
        if image not in images.accepted:
            what = f"is a {image.suffix}: training reads pictures from {', '.join(IMAGE_SUFFIXES)} only"
            remedy = "convert it; --fix writes a PNG"
            listing.findings.append(Finding("name", where, what, remedy, **shown))
            pair = replace(pair, target_image=pair.target_image.with_suffix(".png"))
        if len(twins) > 1:
            other = listing.relative(next(twin for twin in twins if twin != image))
            what = "has the stem of another picture, and there is one mask for both"
            listing.findings.append(Finding("name", where, what, "remove or rename one", other, **shown))
            pair = replace(pair, left_out="another picture has its stem, and there is one mask for both")
        elif stem.casefold() in taken:
            what = "differs from another name only in upper and lower case, which some disks take for one file"
            listing.findings.append(Finding("name", where, what, "rename it, as --fix does", **shown))
            number = 2
            while f"{stem}_{number}".casefold() in taken | names:
                number += 1
            stem = f"{stem}_{number}"
            pair = replace(
                pair,
                target_image=pair.target_image.with_name(stem + pair.target_image.suffix),
                target_mask=pair.target_mask.with_name(f"{stem}_mask.png"),
            )
        taken.add(stem.casefold())
        listing.pairs.append(pair)
    for path in masks.left():
        where = listing.relative(path)
        if path in masks.accepted:
            remedy = "add the picture or remove it"
            listing.findings.append(Finding("missing", where, f"has no picture in {IMAGES_FOLDER}/", remedy))
            listing.single[where] = "it has no picture"
        else:
            listing.findings.append(_ignored(listing, path, MASK_SUFFIXES))


def _ignored(listing: Listing, path: Path, suffixes: tuple[str, ...]) -> Finding:
    what = f"is not read: training looks at {', '.join(suffixes)} here"
    return Finding("ignored", listing.relative(path), what, "remove it, or convert it if it belongs to a pair")


class _Files:
    """The files of one folder, by how training takes them."""

    def __init__(self, listing: Listing, folder: Path, suffixes: tuple[str, ...]) -> None:
        self.accepted: list[Path] = []
        self.convertible: list[Path] = []
        self._used: dict[Path, str] = {}
        by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self._entries(listing, folder):
            if path.suffix.lower() in suffixes:
                self.accepted.append(path)
                by_stem[path.stem].append(path)
            elif path.suffix.lower() in Image.registered_extensions():
                self.convertible.append(path)
                by_stem[path.stem].append(path)
            else:
                listing.findings.append(_ignored(listing, path, suffixes))
        self.twice = {stem for stem, paths in by_stem.items() if len(paths) > 1}
        self._exact = {path.stem: path for path in reversed(self.accepted)}
        self._other = {path.stem: path for path in reversed(self.convertible)}
        self._folded = {path.stem.casefold(): path for path in reversed(self.accepted)}

    def partners(self, images: list[Path]) -> dict[Path, tuple[Path, str]]:
        """Returns each picture's mask and what is wrong with its name: first as `scan` takes them, then more freely."""
        found: dict[Path, tuple[Path, str]] = {}
        stems = {image.stem for image in images}
        ways = (
            (self._exact, str, ""),
            (self._other, str, f"is not a PNG: training reads masks from {', '.join(MASK_SUFFIXES)} only"),
            (self._folded, str.casefold, "differs from its picture's name in upper and lower case"),
        )
        for masks, key, trouble in ways:
            for image in images:
                mask = next((masks[key(name)] for name in mask_stems(image.stem, stems) if key(name) in masks), None)
                # Two pictures of one stem have one mask.
                if image not in found and mask is not None and self._used.get(mask, image.stem) == image.stem:
                    found[image] = mask, trouble
                    self._used[mask] = image.stem
        return found

    def left(self) -> list[Path]:
        """Returns the files that were nobody's partner."""
        return [path for path in [*self.accepted, *self.convertible] if path not in self._used]

    @staticmethod
    def _entries(listing: Listing, folder: Path) -> Iterator[Path]:
        """Yields the files of a folder by name, and reports links and a folder that is not there."""
        where = listing.relative(folder)
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            listing.findings.append(Finding("folder", where, "no such folder, training needs it", "add it"))
            return
        except PermissionError as error:
            raise InputError(f"{folder}: cannot be listed (permission denied)") from error
        inside = listing.root.resolve()
        if not folder.resolve().is_relative_to(inside):
            remedy = "--fix writes a folder of its own"
            listing.findings.append(Finding("link", where, f"leads to {folder.resolve()}", remedy))
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            name = listing.relative(path)
            if entry.is_symlink() and not path.exists():
                listing.findings.append(Finding("unreadable", name, "is a link to nothing", "remove it"))
                continue
            if entry.is_symlink() and not path.resolve().is_relative_to(inside):
                remedy = "put the file itself here, as --fix does"
                listing.findings.append(Finding("link", name, f"leads to {path.resolve()}", remedy))
            if entry.is_file():
                yield path
            else:
                listing.findings.append(Finding("ignored", name, "is no file", "remove it"))
