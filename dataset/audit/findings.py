"""What an audit of a data set found: one row a file, worst kinds first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from dataset.render_glass import SPLITS


@dataclass(frozen=True)
class Kind:
    """One kind of finding; a note leaves the exit status at 0."""

    heading: str
    is_fault: bool = True


# In the order of tables and of the contact sheet.
KINDS = {
    "leak_train_test": Kind("train pictures that are in test too"),
    "leak_train_validation": Kind("train pictures that are in validation too"),
    "leak_validation_test": Kind("validation pictures that are in test too"),
    "unreadable": Kind("files that cannot be read"),
    "missing": Kind("pictures or masks without partner"),
    "name": Kind("file names that training stumbles over"),
    "size": Kind("pairs of unequal sizes"),
    "rotated": Kind("pairs rotated against each other"),
    "values": Kind("odd mask values"),
    "link": Kind("links that leave the data set"),
    "folder": Kind("missing folders"),
    "duplicate": Kind("pictures that are twice in one split", is_fault=False),
    "empty": Kind("masks without anything transparent", is_fault=False),
    "full": Kind("masks that are transparent all over", is_fault=False),
    "ignored": Kind("files that training does not look at", is_fault=False),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        kind: a key of `KINDS`.
        file: path relative to the data set.
        what: what is the matter.
        remedy: what to do about it.
        other: the other file concerned, relative to the data set; may be empty.
        image: the pair's picture, relative to the data set, where it can be shown; may be empty.
        mask: the pair's mask, likewise.
    """

    kind: str
    file: str
    what: str
    remedy: str
    other: str = ""
    image: str = ""
    mask: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether the exit status tells of it."""
        return KINDS[self.kind].is_fault

    def to_dict(self) -> dict[str, object]:
        """Returns it as JSON holds it."""
        row = {name: value for name, value in asdict(self).items() if name not in ("image", "mask")}
        return {**row, "fault": self.is_fault}


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Returns the findings of each kind that occurs, in the order of `KINDS`, by split and file."""
    rows: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        rows[finding.kind].append(finding)
    splits = {name: number for number, name in enumerate(SPLITS)}
    for found in rows.values():
        found.sort(key=lambda row: (splits.get(row.file.split("/")[0], len(splits)), row.file, row.other))
    return {kind: found for kind, found in rows.items() if found}
