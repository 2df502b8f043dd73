"""Pictures that are there twice: a perceptual hash, confirmed on small pixels, within and across splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

HASH_SIDE = 32  # of the grey picture that is hashed, and on which a suspicion is confirmed
HASH_FREQUENCIES = 8
MAX_DISTANCE = 8  # of 63 bits
MIN_CORRELATION = 0.95  # of the small grey pictures
FLAT_STD = 4.0  # grey levels below which a hash is noise
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a picture to find it again.

    Args:
        pixels: digest of the decoded picture.
        bits: perceptual hash of 63 bits.
        mirrored_bits: that of the picture with left and right exchanged.
        grey: (32, 32), uint8.
    """

    pixels: bytes
    bits: int
    mirrored_bits: int
    grey: NDArray[np.uint8]

    @property
    def is_flat(self) -> bool:
        """Whether the picture is too even for its hash to mean anything."""
        return float(self.grey.std()) < FLAT_STD


@dataclass(frozen=True)
class Twin:
    """That a picture is there a second time.

    Args:
        number: of the other picture.
        distance: differing bits of the hash; 0 and `same_pixels` for an exact copy.
        same_pixels: whether the decoded pixels are equal.
        mirrored: whether left and right are exchanged.
    """

    number: int
    distance: int
    same_pixels: bool = False
    mirrored: bool = False

    def __str__(self) -> str:
        if self.same_pixels:
            return "the same pixels"
        return f"{'mirrored, ' if self.mirrored else ''}hash distance {self.distance} of 63"


def fingerprint(image: NDArray[np.uint8], size: tuple[int, int]) -> Fingerprint:
    """Returns the fingerprint of a picture.

    The hash is the sign of the lowest 63 frequencies (a cosine transform of 32 x 32 grey pixels) against their median.

    Args:
        image: upright RGB (H, W, 3), uint8, possibly decoded at a reduced size.
        size: its width and height in the file.
    """
    small = cv2.resize(image, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, salt=f"{size[0]}x{size[1]}".encode()[:16])
    return Fingerprint(digest.digest(), _hash(grey), _hash(grey[:, ::-1]), grey)


def find_twins(prints: Sequence[Fingerprint], ranks: Sequence[int]) -> dict[int, Twin]:
    """Returns for each picture that has one its most telling twin: of the highest rank, then the nearest.

    A picture of the lower rank names the one of the higher; of two of the same rank the later names the earlier. Pictures too
    flat to be hashed count as twins only where their pixels are equal.

    Args:
        prints: of all pictures.
        ranks: of their splits, in the same order; a train picture that is in test is a twin of the one in test.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, print_ in enumerate(prints):
        groups[print_.pixels].append(number)
    members = list(groups.values())
    near = _near_groups([prints[group[0]] for group in members])
    twins = {}
    for place, group in enumerate(members):
        for number in group:
            best: tuple[int, int, int] | None = None
            for other_place, twin in [(place, Twin(0, 0, same_pixels=True)), *near[place]]:
                # Groups are ordered by number, so the first of each rank is enough; a copy of itself is none.
                for other in _first_of_each_rank(members[other_place], ranks):
                    if other == number or (ranks[other], -other) <= (ranks[number], -number):
                        continue
                    key = (-ranks[other], twin.distance, other)
                    if best is None or key < best:
                        best = key
                        twins[number] = Twin(other, twin.distance, twin.same_pixels, twin.mirrored)
    return twins


def _first_of_each_rank(group: Sequence[int], ranks: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    for number in group:
        first.setdefault(ranks[number], number)
    return list(first.values())


def _near_groups(prints: Sequence[Fingerprint]) -> list[list[tuple[int, Twin]]]:
    """Returns for each picture the others whose hash is near and whose small pixels agree."""
    near: list[list[tuple[int, Twin]]] = [[] for _ in prints]
    numbers = np.array([number for number, each in enumerate(prints) if not each.is_flat], np.int64)
    if not len(numbers):
        return near
    bits, mirrored = (
        np.array([getattr(prints[number], name) for number in numbers], np.uint64) for name in ("bits", "mirrored_bits")
    )
    grey = np.stack([prints[number].grey.astype(np.float32) for number in numbers])
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    grey /= np.sqrt((grey**2).sum(axis=(1, 2), keepdims=True))
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        known: set[tuple[int, int]] = set()
        for turned, others in ((False, bits), (True, mirrored)):
            distances = np.bitwise_count(bits[rows, None] ^ others[None])
            for row, column in zip(*np.nonzero(distances <= MAX_DISTANCE), strict=True):
                one, other = int(row) + start, int(column)
                if other >= one or (one, other) in known:
                    continue
                pixels = grey[other][:, ::-1] if turned else grey[other]
                if float((grey[one] * pixels).sum()) >= MIN_CORRELATION:
                    known.add((one, other))
                    for first, second in ((one, other), (other, one)):
                        twin = Twin(0, int(distances[row, column]), mirrored=turned)
                        near[numbers[first]].append((int(numbers[second]), twin))
    return near


def _hash(grey: NDArray[np.uint8]) -> int:
    low = cv2.dct(grey.astype(np.float32))[:HASH_FREQUENCIES, :HASH_FREQUENCIES].ravel()[1:]
    return int.from_bytes(np.packbits(np.concatenate(([False], low > np.median(low)))).tobytes(), "big")
