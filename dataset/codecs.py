"""What a label means: mask files <-> labels <-> pixels. Knows nothing of latents."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from utils.errors import InputError, first_line

LabelReader = Callable[[Image.Image], NDArray[np.uint8]]
MIN_COLOUR_DISTANCE = 100.0  # in 8-bit RGB; what a VAE blurs moves a colour by a few tens
MIN_EDGE_DISTANCE = 60.0
MAX_CLASSES = 64


@dataclass(frozen=True)
class Palette:
    """Classes and the colour that each has in a mask picture; label k is the k-th.

    Args:
        names: the background first.
        colours: RGB, 8 bits each; black for the background.

    Raises:
        InputError: if a name or colour occurs twice, is malformed, or colours are too near to survive a VAE.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        """Checks names and colours."""
        if not 2 <= len(self.names) == len(self.colours) <= MAX_CLASSES:
            raise InputError(f"palette: expected 2 to {MAX_CLASSES} classes, each with a name and a colour")
        for name, colour in zip(self.names, self.colours, strict=True):
            whole = [isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255 for value in colour]
            if not isinstance(name, str) or not name or len(whole) != 3 or not all(whole):
                raise InputError(f"palette: class {name!r} needs a name and a colour of three numbers from 0 to 255")
        if any(self.colours[0]):
            raise InputError(f"palette: the first class, {self.names[0]}, is the background and must be black")
        for (name, colour), (other, another) in itertools.combinations(zip(self.names, self.colours, strict=True), 2):
            if name == other:
                raise InputError(f"palette: two classes are called {name}; rename one")
            if np.hypot.reduce(np.subtract(colour, another, dtype=float)) < MIN_COLOUR_DISTANCE:
                raise InputError(
                    f"palette: {name} {list(colour)} and {other} {list(another)} collide: colours must be at least "
                    f"{MIN_COLOUR_DISTANCE:.0f} apart to survive the VAE; choose others"
                )
        for (name, colour), (other, another) in itertools.permutations(
            zip(self.names[1:], self.colours[1:], strict=True), 2
        ):
            # The edge of a class runs through the colours between its own and black, where no other class may lie.
            line, point = np.array(another, dtype=float), np.array(colour, dtype=float)
            share = float(np.clip(point @ line / (line @ line), 0, 1))
            if np.linalg.norm(point - share * line) < MIN_EDGE_DISTANCE:
                raise InputError(
                    f"palette: {name} {list(colour)} lies between the background and {other} {list(another)}: its colour would "
                    "appear along every edge of that; choose another"
                )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Palette:
        """Returns the palette that `to_dict` made `content` of."""
        return cls(tuple(content["names"]), tuple(tuple(colour) for colour in content["colours"]))

    @classmethod
    def from_file(cls, path: Path) -> Palette:
        """Reads `{"class": [r, g, b], ...}` from JSON, the background first.

        Raises:
            InputError: naming the file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
            return cls(tuple(name for name, _ in content), tuple(tuple(colour) for _, colour in content))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f'{path}: cannot be read as a palette ({first_line(error)}); expected {{"background": [0, 0, 0], "cup": [255, 255, 0]}}'
            ) from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Writes what `from_file` reads."""
        content = {name: list(colour) for name, colour in zip(self.names, self.colours, strict=True)}
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Returns names and colours as JSON holds them."""
        return {"names": list(self.names), "colours": [list(colour) for colour in self.colours]}

    def paint(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turns labels (..., H, W) into their colours (..., H, W, 3), uint8."""
        return np.array(self.colours, np.uint8)[label]


# Trans10k's classes, in equilateral colours; and those of its second version (arXiv 2101.08461), on a grid of colours.
THINGS_STUFF = Palette(("background", "things", "stuff"), ((0, 0, 0), (255, 255, 0), (0, 255, 255)))
TRANS10K_V2 = Palette(
    (
        "background",
        "shelf",
        "jar",
        "freezer",
        "window",
        "door",
        "eyeglass",
        "cup",
        "wall",
        "bowl",
        "bottle",
        "box",
    ),
    (
        (0, 0, 0),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (0, 255, 255),
        (255, 0, 255),
        (255, 255, 255),
        (255, 128, 0),
        (0, 255, 128),
        (128, 0, 255),
        (255, 0, 128),
    ),
)


class Codec(Protocol):
    """The seam between a task's labels and the three-channel pictures that the VAE knows."""

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Turns labels (B, H, W) into pixels (B, 3, H, W) in [-1, 1]."""

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W) in [-1, 1] into soft labels (B, H, W) in [0, 1]."""

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns decoded pixels (B, 3, H, W), not clamped, into logits of any label but 0 (B, H, W), with their gradient."""

    def quantise(self, soft: torch.Tensor, threshold: float) -> torch.Tensor:
        """Turns soft labels (B, H, W) into masks (B, H, W), uint8, 1 for any label but 0."""

    def classes(self, pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Turns the pixels of a picture's voters (M, 3, H, W) in [-1, 1] and its mask (H, W) into a label (H, W), uint8."""


class BinaryCodec:
    """Transparent or not: label 1 is white, label 0 is black."""

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Turns labels in {0, 1}, or soft labels between, (B, H, W), into float32 pixels in [-1, 1], (B, 3, H, W)."""
        return (label.float() * 2 - 1).unsqueeze(1).expand(-1, 3, -1, -1)

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W), clamped to [-1, 1], into the mean over their channels in [0, 1], (B, H, W)."""
        return (pixels.float().clamp(-1, 1).mean(dim=1) + 1) / 2

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W) into four times their channels' mean: white means .982, black .018."""
        return 4 * pixels.float().mean(dim=1)

    def quantise(self, soft: torch.Tensor, threshold: float) -> torch.Tensor:
        """Turns soft labels in [0, 1] into labels in {0, 1}, uint8: 1 where soft > threshold."""
        return (soft > threshold).to(torch.uint8)

    def classes(self, pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Returns the masks: there is but one class beside the background."""
        return masks


class PaletteCodec:
    """Classes as colours; a pixel belongs to the colour whose way from the background's black it is nearest to.

    A blurred edge lies on that way, so that it shows no third class.

    Args:
        palette: classes and colours.
    """

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self._colours = torch.tensor(palette.colours, dtype=torch.float32) / 127.5 - 1  # (K, 3)

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Turns labels (B, H, W), uint8, into the colours of their classes, float32 pixels in [-1, 1], (B, 3, H, W)."""
        return self._colours.to(label.device)[label.long()].permute(0, 3, 1, 2)

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W), clamped to [-1, 1], into how far they are from black to their class's colour, (B, H, W) in [0, 1].

        On the greys of black and white that is what the binary codec says.
        """
        shares, distances = self._towards(pixels.float().clamp(-1, 1))
        return shares.gather(1, distances.argmin(dim=1, keepdim=True))[:, 0].clamp(0, 1)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W) into 8 s - 4, (B, H, W), where s is that share, not clamped: .982 for a colour, .018 for black."""
        shares, distances = self._towards(pixels.float())
        return 8 * shares.gather(1, distances.argmin(dim=1, keepdim=True))[:, 0] - 4

    def quantise(self, soft: torch.Tensor, threshold: float) -> torch.Tensor:
        """Turns soft labels in [0, 1] into masks in {0, 1}, uint8: 1 where soft > threshold."""
        return (soft > threshold).to(torch.uint8)

    def classes(self, pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Returns within the mask the class whose colour, or a darker one on its edge, is nearest to all voters, (H, W), uint8.

        Voters are averaged as probabilities, softmax(-4 d^2), and not as colours, whose mean may be a third class's.
        """
        _, distances = self._towards(pixels.float())
        return ((-4 * distances).softmax(dim=1).mean(dim=0).argmax(dim=0) + 1).to(torch.uint8) * masks

    def _towards(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns for each class but the background how far pixels are on the way from black to its colour, and their squared
        distance to that way, both (B, K - 1, H, W).
        """
        lit = (pixels + 1) / 2
        colours = (self._colours[1:].to(pixels.device) + 1) / 2
        shares = torch.stack(
            [(lit * colour[:, None, None]).sum(dim=1) / colour.square().sum() for colour in colours], dim=1
        )
        on_way = shares.clamp(0, 1)[:, :, None] * colours[:, :, None, None]  # (B, K - 1, 3, H, W)
        return shares, 4 * (lit[:, None] - on_way).square().sum(dim=2)


CODECS = ("binary", "palette")


def build_codec(name: str, palette: Palette | None = None) -> Codec:
    """Returns the codec of that name.

    Args:
        name: one of `CODECS`.
        palette: of the palette codec.

    Raises:
        ValueError: naming the valid choices, or that the palette is missing.
    """
    if name == "binary":
        return BinaryCodec()
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; valid: {', '.join(CODECS)}")
    if palette is None:
        raise ValueError("the palette codec needs a palette")
    return PaletteCodec(palette)


def read_trans10k_label(mask: Image.Image) -> NDArray[np.uint8]:
    """Reads a Trans10k v1 mask: the mean over channels is 0 (background), 85 (things) or 255 (stuff).

    Returns:
        Label (H, W), uint8 in {0, 1}; things and stuff are both transparent.

    Raises:
        ValueError: if another value occurs.
    """
    return (read_trans10k_classes(mask) > 0).astype(np.uint8)


def read_trans10k_classes(mask: Image.Image) -> NDArray[np.uint8]:
    """Reads a Trans10k v1 mask as classes.

    Returns:
        Label (H, W), uint8: 0 background, 1 things, 2 stuff.

    Raises:
        ValueError: if another value occurs.
    """
    channels: NDArray[np.integer]
    if mask.mode.startswith("I"):  # 16 bits, which the conversion to RGB would clip
        channels = np.stack([np.asarray(mask, dtype=np.int64)] * 3, axis=2)
    else:
        channels = np.asarray(mask.convert("RGB"), dtype=np.uint16)
    sums = channels.sum(axis=2, dtype=channels.dtype)
    things, stuff = sums == 3 * 85, sums == 3 * 255
    odd = ~things & ~stuff & (sums != 0)
    if odd.any():
        row, column = (int(value) for value in np.argwhere(odd)[0])
        raise ValueError(
            f"has {int(odd.sum())} pixels whose channel mean is none of 0, 85, 255; the first, at row {row}, column "
            f"{column}, is RGB {tuple(int(value) for value in channels[row, column])}. If any non-zero colour means "
            "transparent, use dataset_name: folder"
        )
    return things.astype(np.uint8) + stuff.astype(np.uint8) * np.uint8(2)


def read_class_ids(mask: Image.Image, num_classes: int) -> NDArray[np.uint8]:
    """Reads a mask of one channel, or of a palette, whose values are the classes themselves, as in Trans10k v2.

    Returns:
        Label (H, W), uint8 below `num_classes`.

    Raises:
        ValueError: if it has several channels that differ, or another value occurs.
    """
    values = np.asarray(mask)
    if values.ndim == 3:
        if (values[..., :1] != values[..., :3]).any():
            raise ValueError("is coloured; expected class ids in one channel")
        values = values[..., 0]
    if int(values.max(initial=0)) >= num_classes:
        row, column = (int(value) for value in np.argwhere(values >= num_classes)[0])
        raise ValueError(
            f"has the value {int(values[row, column])} at row {row}, column {column}; class ids go from 0 to {num_classes - 1}"
        )
    return values.astype(np.uint8)


def read_coloured_classes(mask: Image.Image, palette: Palette) -> NDArray[np.uint8]:
    """Reads a mask whose colours are those of a palette, exactly.

    Returns:
        Label (H, W), uint8.

    Raises:
        ValueError: if another colour occurs.
    """
    colours = np.asarray(mask.convert("RGB"), dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    label = np.full(colours.shape, 255, np.uint8)
    for number, colour in enumerate(palette.colours):
        label[colours == np.dot(colour, (1 << 16, 1 << 8, 1))] = number
    if (label == 255).any():
        row, column = (int(value) for value in np.argwhere(label == 255)[0])
        found = int(colours[row, column])
        raise ValueError(
            f"has the colour {[found >> 16, found >> 8 & 255, found & 255]} at row {row}, column {column}, which the palette lacks"
        )
    return label


def read_nonzero_label(mask: Image.Image) -> NDArray[np.uint8]:
    """Reads a mask in which any non-zero colour, after palette conversion, is transparent; alpha is ignored.

    Returns:
        Label (H, W), uint8 in {0, 1}.
    """
    if mask.mode in ("P", "PA", "RGBA", "LA", "La", "RGBa", "CMYK", "YCbCr"):
        mask = mask.convert("RGB")
    values = np.asarray(mask) != 0
    return (values.any(axis=2) if values.ndim == 3 else values).astype(np.uint8)
