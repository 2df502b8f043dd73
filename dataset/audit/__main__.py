"""Counts and checks a data set before it is trained on, and on request writes a corrected copy.

`python -m dataset.audit PATH` prints a table and writes `audit.json` and `contact_sheet.html`, never into PATH. `--fix OUT`
writes a copy in which every fault that has a certain remedy is mended. Exit status: 0 clean, 1 faults found, mended or not,
2 bad input.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from dataset.audit.contact_sheet import SHEET_FILE_NAME, build_sheet
from dataset.audit.duplicates import find_twins
from dataset.audit.findings import KINDS, Finding, by_kind
from dataset.audit.inspection import Inspection, inspect_pair
from dataset.audit.listing import Listing, list_pairs
from dataset.audit.repair import open_copy, write_copy
from dataset.render_glass import SPLITS, prepare_worker
from dataset.trans10k import LAYOUTS, Layout, layout_of
from utils.errors import EXIT_FAILED, CommandError, InputError, run_command

AUDIT_FILE_NAME = "audit.json"
ROWS_SHOWN = 5  # of each kind, on the screen
COMMONEST_SIZES = 5
PAIRS_AT_ONCE = 4  # that a worker fetches


@dataclass(frozen=True)
class Audit:
    """All that is known of a data set.

    Args:
        dataset_name: a key of `LAYOUTS`.
        layout: how it is read.
        listing: its files.
        inspections: its pairs.
        findings: of names, pairs and duplicates.
    """

    dataset_name: str
    layout: Layout
    listing: Listing
    inspections: list[Inspection]
    findings: list[Finding]

    @property
    def num_faults(self) -> int:
        """How many findings are faults and not notes."""
        return sum(finding.is_fault for finding in self.findings)


def run_audit(root: Path, dataset_name: str, layout: Layout, workers: int = 1) -> Audit:
    """Looks at every file of a data set and finishes whatever the files hold.

    Args:
        root: the data set's root.
        dataset_name: a key of `LAYOUTS`.
        layout: of `layout_of`.
        workers: processes; 1 works in this one.

    Raises:
        InputError: if the folder does not have the layout.
        CommandError: if a worker was killed.
    """
    listing = list_pairs(root, dataset_name, layout)
    inspect = partial(inspect_pair, root=root, dataset_name=dataset_name, layout=layout)
    progress = partial(tqdm, total=len(listing.pairs), desc="audit", unit="pair", leave=False)
    if workers == 1:
        inspections = list(progress(map(inspect, listing.pairs)))
    else:
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _prepare) as pool:
                inspections = list(progress(pool.map(inspect, listing.pairs, chunksize=PAIRS_AT_ONCE)))
        except BrokenProcessPool as error:
            raise CommandError("a worker was killed, perhaps for memory: run again with fewer --workers") from error
    inspections, twins = _mark_twins(listing, inspections)
    findings = [*listing.findings, *(finding for each in inspections for finding in each.findings), *twins]
    return Audit(dataset_name, layout, listing, inspections, findings)


def count(audit: Audit) -> list[dict[str, Any]]:
    """Returns for each split and difficulty the numbers of files, pairs, sizes and classes as JSON holds them.

    A class's share is the mean over pairs, as training, which squashes every picture to one size, sees it.
    """
    names = audit.layout.palette.names if audit.layout.palette else ("background", "transparent")
    rows = []
    for (split, difficulty), (pictures, masks) in audit.listing.files.items():
        found = [each for each in audit.inspections if (each.pair.split, each.pair.difficulty) == (split, difficulty)]
        shares = np.array([each.shares for each in found if each.shares])
        sizes = Counter(each.size for each in found if each.size)
        row: dict[str, Any] = {"split": split, "difficulty": difficulty, "pictures": pictures, "masks": masks}
        row["pairs"] = len(found)
        row["usable"] = sum(not each.left_out for each in found)
        row["sizes"] = {f"{width}x{height}": number for (width, height), number in sizes.most_common(COMMONEST_SIZES)}
        row["num_sizes"] = len(sizes)
        if sizes:
            row["smallest_side"] = min(min(size) for size in sizes)
            row["largest_side"] = max(max(size) for size in sizes)
        row["share"] = {
            name: float(shares[:, number].mean()) if len(shares) else None for number, name in enumerate(names)
        }
        row["pictures_with"] = {
            name: int((shares[:, number] > 0).sum()) if len(shares) else 0
            for number, name in enumerate(names)
            if number
        }
        rows.append(row)
    return rows


def to_dict(audit: Audit) -> dict[str, Any]:
    """Returns an audit as JSON holds it."""
    kinds = by_kind(audit.findings)
    return {
        "path": str(audit.listing.root),
        "dataset_name": audit.dataset_name,
        "faults": audit.num_faults,
        "notes": len(audit.findings) - audit.num_faults,
        "kinds": {kind: len(rows) for kind, rows in kinds.items()},
        "counts": count(audit),
        "findings": [finding.to_dict() for rows in kinds.values() for finding in rows],
    }


def format_audit(audit: Audit) -> str:
    """Returns counts and the first findings of each kind as text."""
    names = list(audit.layout.palette.names if audit.layout.palette else ("background", "transparent"))[1:]
    lines = [f"{'':<18} {'pictures':>8} {'masks':>6} {'pairs':>6} {'usable':>7}  {'sizes':<30} share of pixels"]
    for row in count(audit):
        sizes = ", ".join(f"{size} ({number})" for size, number in list(row["sizes"].items())[:2])
        sizes += f", {row['num_sizes'] - 2} more" if row["num_sizes"] > 2 else ""
        shares = [(name, row["share"][name], row["pictures_with"][name]) for name in names]
        classes = ", ".join(f"{name} {share:.1%} in {number}" for name, share, number in shares if number)
        where = f"{row['split']} {row['difficulty']}"
        files = f"{row['pictures']:>8} {row['masks']:>6} {row['pairs']:>6} {row['usable']:>7}"
        lines.append(f"{where:<18} {files}  {sizes:<30} {classes}")
    for kind, rows in by_kind(audit.findings).items():
        lines += ["", f"{KINDS[kind].heading}: {len(rows)}" + ("" if KINDS[kind].is_fault else " (a note)")]
        for finding in rows[:ROWS_SHOWN]:
            other = f" ({finding.other})" if finding.other else ""
            lines.append(f"  {finding.file}{other}: {finding.what}; {finding.remedy}")
        if len(rows) > ROWS_SHOWN:
            lines.append(f"  and {len(rows) - ROWS_SHOWN} more in {AUDIT_FILE_NAME}")
    faults = audit.num_faults
    lines += ["", f"{faults or 'no'} fault{'' if faults == 1 else 's'}, {len(audit.findings) - faults} notes"]
    return "\n".join(line.encode(errors="replace").decode() for line in lines)


def _mark_twins(listing: Listing, inspections: list[Inspection]) -> tuple[list[Inspection], list[Finding]]:
    """Returns the inspections, where a picture is in a later split too left out, and a finding for each picture with a twin."""
    places = [place for place, each in enumerate(inspections) if each.fingerprint is not None]
    prints = [each.fingerprint for each in inspections if each.fingerprint is not None]
    ranks = [SPLITS.index(inspections[place].pair.split) for place in places]
    marked, findings = list(inspections), []
    for number, twin in find_twins(prints, ranks).items():
        one, other = inspections[places[number]].pair, inspections[places[twin.number]].pair
        name, elsewhere = listing.relative(one.image), listing.relative(other.image)
        if one.split == other.split:
            remedy = "remove one, unless its weight is meant"
            findings.append(Finding("duplicate", name, f"is there twice: {twin}", remedy, elsewhere, image=name))
            continue
        what = f"is in {other.split} too: {twin}"
        remedy = f"remove it from {one.split}, as --fix does"
        findings.append(Finding(f"leak_{one.split}_{other.split}", name, what, remedy, elsewhere, image=name))
        reason = marked[places[number]].left_out or f"its picture is in {other.split} too, as {elsewhere}: {twin}"
        marked[places[number]] = replace(marked[places[number]], left_out=reason)
    return marked, findings


def _prepare() -> None:
    prepare_worker()
    cv2.setNumThreads(0)


def _write(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.part")
    partial_path.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial_path.replace(path)


def _check_place(path: Path, root: Path, flag: str, may_hold: bool) -> None:
    """Raises InputError if what is written would lie in the data set, or, where that matters, the data set in it."""
    written, kept = path.resolve(), root.resolve()
    if written.is_relative_to(kept) or (kept.is_relative_to(written) and not may_hold):
        raise InputError(f"{flag} {path}: lies in {root} or holds it, which stays as it is; name another folder")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="root of the data set")
    parser.add_argument("--dataset_name", choices=LAYOUTS, default="trans10k", help="its layout [trans10k]")
    parser.add_argument("--palette", type=Path, help="colours of the classes of a folder, as in training")
    parser.add_argument("--out", type=Path, help="folder for audit.json and contact_sheet.html [runs/audit_NAME]")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a corrected copy into this folder")
    parser.add_argument("--hard_links", action="store_true", help="with --fix: link untouched files instead of copying")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes [one a core: {cores}]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _arguments(argv)
    root = arguments.path
    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: use at least 1")
    if arguments.hard_links and arguments.fix is None:
        raise InputError("--hard_links: goes with --fix OUT")
    layout = layout_of(arguments.dataset_name, arguments.palette)
    out = arguments.out or Path("runs") / f"audit_{root.resolve().name}"
    _check_place(out, root, "--out", may_hold=True)
    copy = None
    if arguments.fix is not None:
        _check_place(arguments.fix, root, "--fix", may_hold=False)
        copy = open_copy(arguments.fix, root, arguments.dataset_name, arguments.palette)
    audit = run_audit(root, arguments.dataset_name, layout, arguments.workers)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / AUDIT_FILE_NAME, json.dumps(to_dict(audit), indent=1) + "\n")
    _write(
        out / SHEET_FILE_NAME,
        build_sheet(root, audit.dataset_name, layout, audit.inspections, audit.findings, count(audit)),
    )
    messages = [f"every finding: {out / AUDIT_FILE_NAME}; pictures of them: {out / SHEET_FILE_NAME}"]
    if copy is not None:
        pairs = audit.inspections
        messages.append(write_copy(copy, audit.listing, pairs, audit.dataset_name, layout, arguments.hard_links))
    print(json.dumps(to_dict(audit), indent=1) if arguments.json else "\n".join([format_audit(audit), *messages]))
    return EXIT_FAILED if audit.num_faults else 0


if __name__ == "__main__":
    run_command(main)
