"""What a download holds: pictures and masks by the names of their folders, and their places in the layout that training reads."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from dataset.audit.listing import IMAGES_FOLDER
from dataset.prepare.archives import Entry, Sources, reading
from dataset.prepare.coco import CocoFile, CocoImage, is_coco, load_json, parse_coco
from dataset.render_glass import SPLITS
from dataset.trans10k import IMAGE_SUFFIXES, LAYOUTS
from utils.errors import InputError

MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # the audit says which of them training does not read
MAX_JSON_BYTES = 1_000_000_000  # read into memory
ROLES = {
    **dict.fromkeys(("image", "images", "img", "imgs"), "image"),
    **dict.fromkeys(("mask", "masks"), "mask"),
    **dict.fromkeys(("masks_12", "mask_12"), "mask_12"),
}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Kind:
    """A data set as it is downloaded: its layout when prepared, where its masks lie, and how many pairs were published."""

    dataset_name: str
    mask_role: str = "mask"
    expected: Mapping[str, int] = field(default_factory=dict)


# Counts: arXiv 2003.13948 and 2101.08461, CVPR 2020 (GDD), CVPR 2021 (GSD: 4,012).
KINDS = {
    "trans10k": Kind("trans10k", expected={"train": 5000, "validation": 1000, "test": 4428}),
    "trans10k_v2": Kind("trans10k_v2", "mask_12", {"train": 5000, "validation": 1000, "test": 4428}),
    "gdd": Kind("folder", expected={"train": 2980, "test": 936}),
    "gsd": Kind("folder", expected={"train": 3202, "test": 810}),
    "folder": Kind("folder"),
    "coco": Kind("folder"),
}


@dataclass(frozen=True)
class Item:
    """A picture or mask of a source and where it goes.

    Args:
        role: image, mask or mask_12.
        split: as its source says; empty if it says nothing.
        difficulty: easy, hard or nothing.
        name: of the pair.
        file_name: in the prepared folder.
        size: in bytes; None for a mask that is drawn.
        source: path in the source.
        coco: what its mask is drawn from.
    """

    role: str
    split: str
    difficulty: str
    name: str
    file_name: str
    size: int | None
    source: PurePosixPath
    coco: CocoImage | None = None


@dataclass
class Found:
    """What the sources hold."""

    items: list[Item] = field(default_factory=list)
    coco: list[CocoFile] = field(default_factory=list)
    sizes: dict[PurePosixPath, int] = field(default_factory=dict)
    """Of every file."""
    foreign: dict[PurePosixPath, str] = field(default_factory=dict)
    """JSON that is no COCO file, and why."""

    def left(self, used: Iterable[PurePosixPath] = ()) -> Counter[str]:
        """Returns where files lie, and how many, that are not used: by folder, JSON by name."""
        unused = set(self.sizes) - set(used) - {file.path for file in self.coco}
        counts: Counter[str] = Counter()
        for path in sorted(unused):
            counts[f"{path} ({self.foreign[path]})" if path in self.foreign else path.parent.as_posix()] += 1
        return counts

    def others(self) -> str:
        """Returns where most files lie, in words."""
        return ", ".join(f"{count} files in {where}" for where, count in self.left().most_common(4)) or "nothing"


def split_of(parts: Sequence[str]) -> str:
    """Returns the split that the innermost telling folder, archive or file of annotations names; empty if none does."""
    for part in reversed(parts):
        words = [re.sub(r"\d+$", "", part.lower()), *re.split(r"[^a-z]+", part.lower())]
        found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if len(found) == 1:
            return found.pop()
    return ""


def classify(entry: Entry) -> Item | None:
    """Returns what a file is by the folders that lead to it; None if it is neither picture nor mask."""
    parents = [part.lower() for part in entry.path.parts[:-1]]
    role = next((ROLES[part] for part in reversed(parents) if part in ROLES), None)
    suffix = entry.path.suffix.lower()
    if role is None or suffix not in (IMAGE_SUFFIXES if role == "image" else MASK_SUFFIXES):
        return None
    difficulty = next((part for part in reversed(parents) if part in ("easy", "hard")), "")
    stem = entry.path.stem
    name = stem if role == "image" else stem.removesuffix("_mask")
    return Item(role, split_of(parents), difficulty, name, stem + suffix, entry.size, entry.path)


def look(sources: Sources) -> Found:
    """Reads the names of all files, and the annotations among them."""
    found = Found()
    for entry in sources.entries():
        if found.sizes.setdefault(entry.path, entry.size) != entry.size:
            raise InputError(f"{entry.path}: two files of the sources have this name and different sizes; rename one")
        item = classify(entry)
        if item is not None:
            found.items.append(item)
            continue
        if entry.path.suffix.lower() == ".json":
            if entry.size > MAX_JSON_BYTES:
                found.foreign[entry.path] = f"larger than {MAX_JSON_BYTES / 1e9:g} GB"
                continue
            with reading(str(entry.path)), entry.open() as stream:
                content = load_json(stream.read())
            if is_coco(content):
                found.coco.append(parse_coco(entry.path, content))
                continue
            found.foreign[entry.path] = "not valid JSON" if content is None else "no COCO annotations"
    return found


def recognise(found: Found, sources: Sequence[Path]) -> str:
    """Returns the kind of what was found.

    Raises:
        InputError: if it could be several, or none.
    """
    roles = Counter(item.role for item in found.items)
    if found.coco and not roles["mask"]:
        return "coco"
    if found.coco:
        raise InputError("the source holds masks and COCO annotations: add --kind coco or another")
    if roles["mask"] and roles["mask_12"]:
        raise InputError(
            "the source holds masks of both versions of Trans10k: add --kind trans10k or --kind trans10k_v2"
        )
    if roles["mask_12"]:
        return "trans10k_v2"
    if not roles["mask"] or not roles["image"]:
        raise InputError(
            f"the source holds {roles['image']} pictures and {roles['mask']} masks in folders named image(s) and mask(s), and no COCO "
            f"annotations; it holds {found.others()}"
        )
    if any(item.difficulty for item in found.items):
        return "trans10k"
    words = {
        word
        for path in [*(source.name for source in sources), *map(str, found.sizes)]
        for word in re.split(r"[^a-z]+", path.lower())
    }
    named = [kind for kind in ("gdd", "gsd") if kind in words]
    if len(named) == 1:
        return named[0]
    if {item.split for item in found.items} == {"train", "test"}:
        raise InputError(
            "the source looks like GDD or GSD: add --kind gdd, --kind gsd, or --kind folder for your own pictures"
        )
    return "folder"


def coco_items(found: Found) -> list[Item]:
    """Returns picture and mask of every picture in the annotations.

    Raises:
        InputError: if a picture is not in the sources, or several could be it.
    """
    by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
    for path in found.sizes:
        by_name[path.name].append(path)
    items = []
    for file in found.coco:
        split = split_of(file.path.with_suffix("").parts)
        names = Counter(image.file_name.stem for image in file.images)
        for image in file.images:
            wanted = image.file_name
            # Annotations may name a folder that was another on the machine that wrote them.
            alike = by_name[wanted.name]
            matches = [path for path in alike if path.parts[-len(wanted.parts) :] == wanted.parts] or alike
            beside = [path for path in matches if path.is_relative_to(file.path.parent)]
            same_split = [path for path in matches if split and split_of(path.parts[:-1]) == split]
            chosen = next((paths for paths in (matches, beside, same_split) if len(paths) == 1), None)
            if chosen is None:
                where = f"{len(matches)} files of that name" if matches else "no such file in the sources"
                raise InputError(
                    f"{file.path}: picture {wanted}: {where}; add the folder or archive that holds it as a source"
                )
            source, suffix = chosen[0], wanted.suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                raise InputError(
                    f"{file.path}: picture {wanted}: training reads {', '.join(IMAGE_SUFFIXES)}; convert it"
                )
            name = (
                wanted.stem
                if names[wanted.stem] == 1
                else "_".join(part for part in wanted.with_suffix("").parts if part not in ("/", ".."))
            )
            place = split or split_of(source.parts[:-1])
            items.append(Item("image", place, "", name, name + suffix, found.sizes[source], source))
            items.append(Item("mask", place, "", name, f"{name}.png", None, file.path, image))
    return items


def place_items(
    items: Iterable[Item], kind: Kind, validation_share: float, test_share: float
) -> dict[PurePosixPath, Item]:
    """Returns the items by their path in the prepared folder.

    Where no split is named at all, `test_share` and `validation_share` of the pairs go to these splits, and where there is no
    validation split, `validation_share` of the training pairs, by a hash of the name: more pictures do not move the others.

    Raises:
        InputError: if a split has no difficulty folders and needs them, or two files have one place.
    """
    layout = LAYOUTS[kind.dataset_name]
    items = [item for item in items if item.role in ("image", kind.mask_role)]
    splits = {item.split for item in items}
    placed: dict[PurePosixPath, Item] = {}
    has_flat = {item.split for item in items if not item.difficulty}
    for item in items:
        split = item.split or ("train" if splits == {""} else "")
        if not split:
            raise InputError(f"{item.source}: lies in no split, as others do; put it below one of {', '.join(SPLITS)}")
        fraction = int.from_bytes(hashlib.sha256(item.name.encode(errors="replace")).digest()[:8], "big") / 2**64
        if splits == {""} and fraction >= 1 - test_share:
            split = "test"
        elif (
            split == "train" and "validation" not in splits and not layout.difficulties and fraction < validation_share
        ):
            split = "validation"
        difficulty = item.difficulty
        if split == "train" or not layout.difficulties or (layout.may_be_flat and item.split in has_flat):
            difficulty = ""
        elif not difficulty:
            raise InputError(f"{item.source}: {kind.dataset_name} has its {split} split in easy/ and hard/")
        folder = IMAGES_FOLDER if item.role == "image" else layout.masks_folder
        path = PurePosixPath(split, difficulty, folder, item.file_name)
        other = placed.setdefault(path, replace(item, split=split, difficulty=difficulty))
        if other.source != item.source and (other.size != item.size or item.size is None):
            raise InputError(f"{other.source} and {item.source}: both would become {path}; rename one")
    return placed
