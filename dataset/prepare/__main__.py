"""Lays a data set out as training reads it, from the archives as they are downloaded or from folders.

`python -m dataset.prepare SOURCE... OUT` reads zip and tar archives, archives in them, and folders; Trans10k in both versions, GDD, GSD,
any folders of images and masks, and COCO annotations. The sources stay as they are; a second run finds its work done. Exit status: 0
done, 1 the counts differ from those published or a picture lacks its mask, 2 bad input.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.codecs import Palette
from dataset.output_folder import OutputFolder, check_links, check_space, copy_file
from dataset.prepare.archives import Entry, Sources, reading, write_stream
from dataset.prepare.coco import BACKGROUND, CocoFile, CocoImage, colours_for, draw
from dataset.prepare.downloads import KINDS, Item, coco_items, look, place_items, recognise
from dataset.render_glass import SPLITS
from dataset.trans10k import MAX_NAMES_IN_MESSAGE
from utils.errors import EXIT_FAILED, InputError, run_command

RECORD_FILE_NAME = "prepared.json"
PALETTE_FILE_NAME = "palette.json"


def count_pairs(placed: Mapping[PurePosixPath, Item]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Returns (split, difficulty) to the numbers of pictures, masks and pairs."""
    names: dict[tuple[str, str], tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for item in placed.values():
        names[item.split, item.difficulty][item.role != "image"].add(item.name)
    order = sorted(names, key=lambda key: (SPLITS.index(key[0]), key[1]))
    return {key: (*map(len, names[key]), len(names[key][0] & names[key][1])) for key in order}  # type: ignore[misc]


def check_counts(
    counts: Mapping[tuple[str, str], tuple[int, int, int]], expected: Mapping[str, int]
) -> tuple[list[str], bool]:
    """Returns a table beside the published counts, and whether all is as it should be.

    A validation split that was not published was taken from train and counts as such.
    """
    pairs: Counter[str] = Counter()
    lines, good = [f"{'':<18} {'pictures':>8} {'masks':>6} {'pairs':>6}"], True
    for (split, difficulty), (pictures, masks, paired) in counts.items():
        pairs[split if split in expected else "train"] += paired
        lines.append(f"{f'{split} {difficulty}':<18} {pictures:>8} {masks:>6} {paired:>6}")
        good &= pictures == masks == paired
    if not good:
        lines.append("pictures and masks do not pair up")
    for split, number in expected.items():
        told = "as published" if pairs[split] == number else f"published are {number:,}: the download is not whole"
        lines.append(f"{split}: {pairs[split]:,} pairs, {told}")
        good &= pairs[split] == number
    return lines, good


@dataclass(frozen=True)
class Painter:
    """Draws masks of annotations: white, or in the colours of a palette.

    Args:
        labels: category to class.
        palette: None for white.
    """

    labels: Mapping[str, int] = field(default_factory=dict)
    palette: Palette | None = None

    @classmethod
    def of(cls, files: Sequence[CocoFile], chosen: Sequence[str], binary: bool) -> Painter:
        """Returns the painter of the chosen categories, all where none are named; of one class where that is all there is.

        Raises:
            InputError: for a category that the annotations lack, or too many.
        """
        names = list(dict.fromkeys(name for file in files for name in file.categories))
        for name in chosen:
            if name not in names:
                raise InputError(f"--categories {name}: the annotations have {', '.join(names) or 'no shapes'}")
        names = [name for name in (chosen or names) if name.lower() != BACKGROUND]
        if not names:
            raise InputError(
                f"the annotations hold no shapes (polygons or run lengths) of a category but {BACKGROUND}, and boxes alone make no mask"
            )
        if binary or len(names) == 1:
            return cls(dict.fromkeys(names, 1))
        return cls({name: number for number, name in enumerate(names, 1)}, colours_for(names))

    def write(self, image: CocoImage, target: Path) -> None:
        """Writes a picture's mask as PNG."""
        label = draw(image, self.labels)
        pixels = label * np.uint8(255) if self.palette is None else self.palette.paint(label)
        Image.fromarray(pixels).save(target, format="PNG")


def write_items(
    folder: OutputFolder, sources: Sources, placed: Mapping[PurePosixPath, Item], painter: Painter, hard_links: bool
) -> int:
    """Writes what is missing and returns how many files that were, masks that are drawn first."""
    missing = {path: item for path, item in placed.items() if not folder.holds(path)}
    check_space(folder.root, sum(item.size or 0 for item in missing.values()))
    with tqdm(total=len(missing), desc="prepare", unit="file", leave=False) as progress:
        wanted: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
        for path, item in missing.items():
            if item.coco is None:
                wanted[item.source].append(path)
            else:
                try:
                    folder.place(path, partial(painter.write, item.coco))
                except InputError as error:
                    raise InputError(f"{item.source}: {error}") from error
                progress.update()
        for entry in sources.entries() if wanted else ():
            for path in wanted.pop(entry.path, ()):
                folder.place(path, partial(_write_entry, entry, hard_links))
                progress.update()
            if not wanted:
                break
    return len(missing)


def _write_entry(entry: Entry, hard_links: bool, target: Path) -> None:
    if entry.file is not None:
        copy_file(entry.file, target, hard_links)
        return
    with reading(str(entry.path)), entry.open() as stream:
        write_stream(stream, entry.size, target, str(entry.path))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="archive, folder, or COCO file of annotations"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="what the sources are [auto]")
    parser.add_argument("--expect", choices=("published", "none"), default="published", help="none: accept any counts")
    parser.add_argument(
        "--validation_share", type=float, default=0.1, help="of train, where there is no validation [0.1]"
    )
    parser.add_argument("--test_share", type=float, default=0.1, help="where the source names no splits at all [0.1]")
    parser.add_argument(
        "--categories", nargs="+", default=[], help="COCO: those that are transparent [all that have shapes]"
    )
    parser.add_argument(
        "--binary", action="store_true", help="COCO: transparent or not, instead of a class for each category"
    )
    parser.add_argument("--hard_links", action="store_true", help="link files of folders instead of copying them")
    parser.add_argument("--max_gigabytes", type=float, default=100, help="that archives may unpack to [100]")
    parser.add_argument("--max_files", type=int, default=1_000_000, help="that archives may hold [1000000]")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _arguments(argv)
    out: Path = arguments.out
    for name in ("validation_share", "test_share"):
        if not 0 <= getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: use a share from 0 to below 1")
    for name in ("max_gigabytes", "max_files"):
        if not getattr(arguments, name) > 0:  # not a number neither
            raise InputError(f"--{name} {getattr(arguments, name)}: must be more than 0")
    if arguments.validation_share + arguments.test_share >= 1:
        raise InputError("--validation_share and --test_share: together they leave nothing to train on")
    for source in arguments.sources:
        if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: lies in {source} or holds it, which stays as it is; name another folder")
    chosen = {
        name: getattr(arguments, name) for name in ("kind", "validation_share", "test_share", "categories", "binary")
    }
    sources_shown = [str(source.resolve()) for source in arguments.sources]
    for source in arguments.sources if arguments.hard_links else ():
        if source.exists():
            check_links(out, source)
    folder = OutputFolder(out, RECORD_FILE_NAME, {"command": "dataset.prepare", "sources": sources_shown, **chosen})
    scratch = out.absolute().with_name(f".{out.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        return _prepare(
            arguments, folder, Sources(arguments.sources, scratch, arguments.max_gigabytes * 1e9, arguments.max_files)
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(arguments: argparse.Namespace, folder: OutputFolder, sources: Sources) -> int:
    found = look(sources)
    left_aside = Counter(sources.skipped)
    name = recognise(found, arguments.sources) if arguments.kind == "auto" else arguments.kind
    kind, painter = KINDS[name], Painter()
    if name == "coco":
        if not found.coco:
            raise InputError(
                f"the source holds no COCO annotations (JSON with images, annotations and categories); it holds {found.others()}"
            )
        painter = Painter.of(found.coco, arguments.categories, arguments.binary)
    items = coco_items(found) if name == "coco" else found.items
    placed = place_items(items, kind, arguments.validation_share, arguments.test_share)
    if not placed:
        raise InputError(f"the source holds nothing of kind {name}; add --kind with another")
    plan: list[Any] = [(str(path), str(item.source), item.size) for path, item in sorted(placed.items())]
    plan.append([(str(file.path), found.sizes[file.path]) for file in found.coco])
    was_finished = folder.begin(plan)
    palette_path = folder.root / PALETTE_FILE_NAME
    written = write_items(folder, sources, placed, painter, arguments.hard_links)
    if painter.palette is not None and not palette_path.is_file():
        folder.place(PurePosixPath(PALETTE_FILE_NAME), painter.palette.save)
    counts = count_pairs(placed)
    lines, good = check_counts(counts, kind.expected if arguments.expect == "published" else {})
    if not was_finished or written:
        pairs = [{"split": split, "difficulty": hard, "pairs": each[2]} for (split, hard), each in counts.items()]
        folder.finish({"recognised": name, "dataset_name": kind.dataset_name, "counts": pairs})
    print(f"{name}, to be read as dataset_name: {kind.dataset_name}")
    print("\n".join(lines))
    if "validation" not in {item.split for item in items} and any(split == "validation" for split, _ in counts):
        print(f"validation is {arguments.validation_share:.0%} of what would be train, chosen by a hash of the names")
    left_aside.update(
        {f"files in {where}": number for where, number in found.left(item.source for item in placed.values()).items()}
    )
    for what, number in left_aside.most_common(MAX_NAMES_IN_MESSAGE):
        print(f"left aside: {number} {what}")
    if skipped := sum(file.skipped for file in found.coco):
        print(f"left aside: {skipped} annotations without a shape")
    total = len(placed)
    print(
        f"{folder.root}: {f'{written} of {total} files written' if written else f'all {total} files are there: nothing to do'}"
    )
    palette = f" --palette {palette_path}" if painter.palette is not None else ""
    print(f"next: python -m dataset.audit {folder.root} --dataset_name {kind.dataset_name}{palette}")
    return 0 if good or arguments.expect == "none" else EXIT_FAILED


if __name__ == "__main__":
    run_command(main)
