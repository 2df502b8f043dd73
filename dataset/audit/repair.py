"""A corrected copy of a data set: what is certain is mended, the rest left out and listed; the original stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from dataset.audit.inspection import Inspection, MaskRepair, repaired
from dataset.audit.listing import Listing
from dataset.output_folder import OutputFolder, check_links, check_space, copy_file
from dataset.pictures import open_picture, read_picture
from dataset.trans10k import Layout

RECORD_FILE_NAME = "repairs.json"
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True)
class Written:
    """One file of the copy: where it comes from and what was done to it."""

    target: PurePosixPath
    source: Path
    done: str
    """Empty for a file that stays as it is."""
    write: Callable[[Path], None]


def open_copy(out: Path, root: Path, dataset_name: str, palette: Path | None) -> OutputFolder:
    """Returns the folder that a corrected copy is written to.

    Raises:
        InputError: if it holds anything but such a copy of this data set.
    """
    origin = {"command": "dataset.audit --fix", "source": str(root.resolve()), "dataset_name": dataset_name}
    return OutputFolder(out, RECORD_FILE_NAME, {**origin, "palette": str(palette.resolve()) if palette else None})


def write_copy(
    folder: OutputFolder,
    listing: Listing,
    inspections: Sequence[Inspection],
    dataset_name: str,
    layout: Layout,
    hard_links: bool = False,
) -> str:
    """Writes the corrected copy and its record.

    Args:
        folder: of `open_copy`.
        listing: of the data set.
        inspections: of all its pairs.
        dataset_name: a key of `LAYOUTS`.
        layout: how it is read.
        hard_links: whether files that stay as they are become links to the original's content instead of copies.

    Returns:
        What was written, in words.

    Raises:
        InputError: if the disk is too full, or the folder was begun when the data set was another.
    """
    files = [
        file for each in inspections if not each.left_out for file in _files(each, dataset_name, layout, hard_links)
    ]
    plan = [
        (str(file.target), str(file.source), file.done, *_state(file.source)) for file in files
    ]  # the data set's state too, so that a copy is never mixed from two
    if hard_links:
        check_links(folder.root, listing.root)
    was_finished = folder.begin(plan)
    missing = [file for file in files if not folder.holds(file.target)]
    left_out = {
        **listing.single,
        **{listing.relative(each.pair.image): each.left_out for each in inspections if each.left_out},
    }
    mended = {str(file.target): file.done for file in files if file.done}
    palette = f" --palette {folder.origin['palette']}" if folder.origin["palette"] else ""
    then = f"\nnext: python -m dataset.audit {folder.root} --dataset_name {dataset_name}{palette}"
    if was_finished and not missing:
        return f"{folder.root} is this repaired copy already, finished: nothing to do{then}"
    check_space(folder.root, sum(file.source.stat().st_size for file in missing if not hard_links or file.done))
    for file in tqdm(missing, desc="copy", unit="file", leave=False):
        folder.place(file.target, file.write)
    kept = "hard links to the original" if hard_links else "copies"
    record: dict[str, Any] = {"untouched_files": kept, "pairs": len(files) // 2}
    folder.finish({**record, "mended": mended, "left_out": left_out})
    again = f", {len(files) - len(missing)} files of which were there" if len(missing) < len(files) else ""
    return (
        f"repaired copy: {folder.root}: {len(files) // 2} pairs{again}; {len(mended)} files mended, {len(left_out)} left out "
        f"({folder.record} names each with its reason); files that stay as they were are {kept}{then}"
    )


def _files(found: Inspection, dataset_name: str, layout: Layout, hard_links: bool) -> Iterator[Written]:
    """Yields picture and mask of a pair, the mask first, so that a picture always has its mask."""
    pair, done = found.pair, []
    if found.repair != MaskRepair():
        done.append(str(found.repair))
    if pair.target_mask.name != pair.mask.name:
        done.append(f"written as {pair.target_mask.name} instead of {pair.mask.name}")
    redraw = found.repair != MaskRepair() or pair.mask.suffix.lower() != ".png"
    write_mask = partial(_write_mask, pair.mask, found.repair, dataset_name, layout)
    copy_mask, copy_image = (partial(copy_file, path, hard_link=hard_links) for path in (pair.mask, pair.image))
    yield Written(pair.target_mask, pair.mask, ", ".join(done), write_mask if redraw else copy_mask)
    convert = pair.target_image.suffix != pair.image.suffix
    renamed = f"written as {pair.target_image.name}" if pair.target_image.name != pair.image.name else ""
    yield Written(
        pair.target_image, pair.image, renamed, partial(_write_picture, pair.image) if convert else copy_image
    )


def _write_mask(source: Path, repair: MaskRepair, dataset_name: str, layout: Layout, target: Path) -> None:
    with open_picture(source) as mask:
        mended = repaired(mask, repair, dataset_name, layout)
        (mended if mended.mode in PNG_MODES else mended.convert("RGB")).save(target, format="PNG")


def _write_picture(source: Path, target: Path) -> None:
    read_picture(source).save(target, format="PNG")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
