"""What an audit found, to look at: one HTML file that needs no network, runs no script and shows names as they are."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.audit.findings import KINDS, Finding, by_kind
from dataset.audit.inspection import Inspection, MaskRepair, read_reduced, repaired
from dataset.pictures import open_picture
from dataset.trans10k import Layout

SHEET_FILE_NAME = "contact_sheet.html"
TEMPLATE = Path(__file__).with_name("contact_sheet.html")
TILES_OF_A_KIND = 12
ROWS_OF_A_KIND = 200
SAMPLE_PAIRS = 12
TILE_SIDE = 186
WEBP_QUALITY = 60
TINT = (230, 97, 0)
TINT_SHARE = 0.35


def build_sheet(
    root: Path,
    dataset_name: str,
    layout: Layout,
    inspections: Sequence[Inspection],
    findings: Sequence[Finding],
    counts: Sequence[Mapping[str, Any]],
) -> str:
    """Returns the page: counts, then for each kind of finding up to `TILES_OF_A_KIND` in pictures and the others in words.

    Args:
        root: of the data set, from which pictures are read.
        dataset_name: a key of `LAYOUTS`.
        layout: how it is read.
        inspections: of all pairs; some are shown as they are.
        findings: of the audit.
        counts: a row for each split and difficulty, see `dataset.audit.count`.
    """
    by_mask = {each.pair.mask.relative_to(root).as_posix(): each.repair for each in inspections}
    kinds = by_kind(findings)
    sections = []
    for kind, rows in kinds.items():
        shown = [row for row in rows if row.image or row.mask][:TILES_OF_A_KIND]
        tiles = "".join(_finding_tile(root, row, by_mask.get(row.mask), dataset_name, layout) for row in shown)
        rest = [row for row in rows if row not in shown]
        sections.append(f'<h2 id="{kind}">{_heading(kind, rows)}</h2><div class="tiles">{tiles}</div>{_table(rest)}')
    good = [each.pair for each in inspections if not each.left_out and each.repair == MaskRepair()]
    sample = (
        [good[place * len(good) // SAMPLE_PAIRS] for place in range(SAMPLE_PAIRS)] if len(good) > SAMPLE_PAIRS else good
    )
    tiles = "".join(
        _figure([(_overlay(pair.image, pair.mask), "")], pair.image.relative_to(root).as_posix()) for pair in sample
    )
    sections.append(
        f'<h2 id="pairs">Some pairs without a fault, evenly spread</h2><div class="tiles plain">{tiles}</div>'
    )
    faults = sum(finding.is_fault for finding in findings)
    parts = {
        "title": html.escape(f"Audit of {root.resolve().name}"),
        "summary": f"{dataset_name}: {len(inspections)} pairs, {faults} faults, {len(findings) - faults} notes",
        "links": "".join(f'<a href="#{kind}">{_heading(kind, rows)}</a>' for kind, rows in kinds.items()),
        "counts": _counts(counts),
        "sections": "".join(sections),
    }
    return re.sub(r"@(\w+)@", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def _heading(kind: str, rows: Sequence[Finding]) -> str:
    return f"{KINDS[kind].heading[:1].upper()}{KINDS[kind].heading[1:]}: {len(rows)}"


def _finding_tile(root: Path, finding: Finding, repair: MaskRepair | None, dataset_name: str, layout: Layout) -> str:
    """Returns a finding as pictures: the pair as it is and as repaired, or the two pictures that are alike."""
    image, mask = (root / name if name else None for name in (finding.image, finding.mask))
    if finding.kind.startswith("leak") or finding.kind == "duplicate":
        pictures = [(_overlay(image, None), finding.file), (_overlay(root / finding.other, None), finding.other)]
    else:
        pictures = [(_overlay(image, mask), "as it is")]
        if repair is not None and repair != MaskRepair():
            pictures.append((_overlay(image, mask, repair, dataset_name, layout), "repaired"))
    return _figure(pictures, finding.file, f"{finding.what}; {finding.remedy}")


def _figure(pictures: Sequence[tuple[bytes, str]], name: str, text: str = "") -> str:
    shown = "".join(
        f'<span><img alt="" src="data:image/webp;base64,{base64.b64encode(picture).decode()}">{_escape(label)}</span>'
        for picture, label in pictures
        if picture
    )
    return f"<figure><div>{shown}</div><figcaption><b>{_escape(name)}</b> <i>{_escape(text)}</i></figcaption></figure>"


def _overlay(
    image: Path | None,
    mask: Path | None,
    repair: MaskRepair = MaskRepair(),  # noqa: B008  frozen
    dataset_name: str = "",
    layout: Layout | None = None,
) -> bytes:
    """Returns a small picture with its mask tinted, as WebP; what cannot be read is left away, nothing if neither can."""
    picture = _read(image) if image is not None else None
    label = None
    if mask is not None:
        try:
            with open_picture(mask) as stored:
                drawn = repaired(stored, repair, dataset_name, layout) if layout is not None else stored
                label = np.asarray(drawn.convert("RGB")).max(axis=2) > 0
        except Exception:  # the tile of a damaged file is that of its partner
            label = None
    if picture is None and label is None:
        return b""
    if picture is None:
        assert label is not None
        picture = np.zeros((*label.shape, 3), np.uint8)
    scale = TILE_SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    shown = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.float32)
    if label is not None:
        inside = cv2.resize(label.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        shown[inside > 0] = shown[inside > 0] * (1 - TINT_SHARE) + np.array(TINT) * TINT_SHARE
        shown[cv2.dilate(inside, np.ones((3, 3), np.uint8)) != inside] = TINT
    buffer = io.BytesIO()
    Image.fromarray(shown.astype(np.uint8)).save(buffer, "WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()


def _read(image: Path) -> NDArray[np.uint8] | None:
    try:
        return read_reduced(image)[0]
    except Exception:  # as above
        return None


def _counts(counts: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "pictures", "masks", "pairs", "usable", "sizes", "commonest", "sides in pixels")
    names = list(counts[0]["share"]) if counts else []
    lines = ["<tr>" + "".join(f"<th>{_escape(name)}</th>" for name in (*head, *names)) + "</tr>"]
    for row in counts:
        commonest = next(iter(row["sizes"]), "-")
        sides = f"{row['smallest_side']} to {row['largest_side']}" if row["sizes"] else "-"
        shares = ["-" if share is None else f"{share:.1%}" for share in row["share"].values()]
        cells = [
            f"{row['split']} {row['difficulty']}",
            *(row[name] for name in head[1:5]),
            row["num_sizes"],
            commonest,
            sides,
        ]
        lines.append("<tr>" + "".join(f"<td>{_escape(str(cell))}</td>" for cell in (*cells, *shares)) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _table(rows: Sequence[Finding]) -> str:
    """Returns further findings in words, folded away where there are many."""
    if not rows:
        return ""
    lines = [
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in (row.file, row.other, row.what, row.remedy)) + "</tr>"
        for row in rows[:ROWS_OF_A_KIND]
    ]
    more = f"<p>and {len(rows) - ROWS_OF_A_KIND} more in audit.json</p>" if len(rows) > ROWS_OF_A_KIND else ""
    return f'<details open><summary>{len(rows)} in words</summary><table class="rows">{"".join(lines)}</table>{more}</details>'


def _escape(text: str) -> str:
    # A name on disk need not be valid Unicode.
    return html.escape(text.encode(errors="backslashreplace").decode())
