"""Random textures and materials of the rendered glass data set, as nested plugin dictionaries."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Material = dict[str, Any]
Texture = NDArray[np.float32]

# Photographs in the public domain or under CC0 that lie inside scikit-image's wheel: no download is needed.
PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "hubble_deep_field",
    "camera",
    "brick",
    "grass",
    "gravel",
    "moon",
)
SCENIC = ("astronaut", "coffee", "chelsea", "rocket")


@cache
def photograph(name: str) -> Texture:
    """A bundled photograph as (H, W, 3) linear values in 0..1, at most 512 pixels wide."""
    import skimage.data

    picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    picture.thumbnail((512, 512))
    return ((np.asarray(picture, dtype=np.float32) / 255.0) ** 2.2).astype(np.float32)


def photograph_crop(rng: np.random.Generator, names: tuple[str, ...] = PHOTOGRAPHS, smallest: float = 0.35) -> Texture:
    """A random part of a random photograph, mirrored and tinted at random."""
    picture = photograph(str(rng.choice(names)))
    share = rng.uniform(smallest, 1.0)
    rows, columns = (max(16, int(length * share)) for length in picture.shape[:2])
    top, left = rng.integers(0, picture.shape[0] - rows + 1), rng.integers(0, picture.shape[1] - columns + 1)
    crop = picture[top : top + rows, left : left + columns]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return np.clip(crop * rng.uniform(0.75, 1.15, size=3), 0.0, 0.95).astype(np.float32)


def colour(rng: np.random.Generator, low: float = 0.04, high: float = 0.85) -> NDArray[np.float64]:
    """Linear RGB, (3,), from greyish to saturated."""
    grey = rng.uniform(low, high)
    return np.clip(grey + rng.normal(0.0, rng.choice([0.02, 0.06, 0.18], p=[0.4, 0.4, 0.2]), size=3), low, high)


def noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int], octaves: int = 4) -> Texture:
    """Smooth noise of the given shape in 0..1 with `cells` grid cells in its coarsest octave."""
    total = np.zeros(shape, dtype=np.float32)
    for octave in range(octaves):
        grid = rng.random((min(cells[0] << octave, shape[0]), min(cells[1] << octave, shape[1]))).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC)) * 0.55**octave
    return (total - total.min()) / max(float(np.ptp(total)), 1e-6)


def surface_texture(rng: np.random.Generator, size: int = 192) -> Texture:
    """A procedural surface or photograph, linear (H, W, 3) in 0..1: checks, stripes, wood, tiles, stone, shelves."""
    first, second = colour(rng), colour(rng)
    row, column = np.mgrid[0:size, 0:size] / size
    kind = str(
        rng.choice(
            ["checks", "stripes", "wood", "tiles", "stone", "shelves", "photograph", "plain"],
            p=[0.12, 0.1, 0.18, 0.1, 0.16, 0.12, 0.1, 0.12],
        )
    )
    if kind == "photograph":
        return photograph_crop(rng)
    if kind == "checks":
        blend = ((row * rng.integers(2, 9)).astype(int) + (column * rng.integers(2, 9)).astype(int)) % 2.0
    elif kind == "stripes":
        blend = (np.sin(2 * np.pi * rng.integers(2, 16) * (row if rng.random() < 0.5 else column)) > 0) * 1.0
    elif kind == "wood":
        first = np.array([0.42, 0.22, 0.1]) * rng.uniform(0.3, 1.7)
        second = first * rng.uniform(0.35, 0.7)
        blend = noise(rng, (size, size), (int(rng.integers(8, 24)), 2)).astype(np.float64)
        blend = np.maximum(blend, ((row * rng.integers(3, 7)) % 1.0 < 0.03) * 1.0)
    elif kind == "tiles":
        count, gap = rng.integers(3, 9), rng.uniform(0.04, 0.1)
        blend = (((row * count) % 1.0 < gap) | ((column * count) % 1.0 < gap)) * 1.0
    elif kind == "stone":
        blend = noise(rng, (size, size), (int(rng.integers(2, 12)),) * 2, 5).astype(np.float64)
    elif kind == "shelves":
        shelf = np.tile(first, (size, size, 1))
        for _ in range(int(rng.integers(20, 70))):
            top, left = rng.integers(0, size, size=2)
            tall, wide = rng.integers(8, 50, size=2)
            shelf[top : top + tall, left : left + wide] = colour(rng)
        return shelf.astype(np.float32)
    else:
        blend = np.zeros((size, size))
    grain = 1.0 + 0.08 * (noise(rng, (size, size), (24, 24), 3) - 0.5)
    mixed = first * (1.0 - blend[..., None]) + second * blend[..., None]
    return np.clip(mixed * grain[..., None], 0.02, 0.92).astype(np.float32)


def opaque_material(rng: np.random.Generator) -> Material:
    """Diffuse, plastic, metal or mirror."""
    paint: Material = (
        {"type": "bitmap", "pixels": surface_texture(rng, 96)}
        if rng.random() < 0.3
        else {"type": "rgb", "value": colour(rng).tolist()}
    )
    kind = rng.choice(
        ["diffuse", "plastic", "roughplastic", "roughconductor", "conductor"], p=[0.34, 0.22, 0.14, 0.18, 0.12]
    )
    if kind == "diffuse":
        return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": paint}}
    if kind in ("plastic", "roughplastic"):
        return {"type": "twosided", "bsdf": {"type": str(kind), "diffuse_reflectance": paint}}
    metal = {"type": str(kind), "material": str(rng.choice(["Al", "Ag", "Cu", "Au", "Cr"]))}
    rough = {"alpha": float(rng.uniform(0.06, 0.3))} if kind == "roughconductor" else {}
    return {"type": "twosided", "bsdf": {**metal, **rough}}


def tint(rng: np.random.Generator, share: float) -> Material:
    """Colour that one passage through a glass surface leaves; white for all but a share of the draws."""
    value = rng.uniform(rng.uniform(0.45, 0.95), 1.0, size=3) if rng.random() < share else np.full(3, 0.985)
    return {"type": "rgb", "value": (value / max(value.max(), 1e-3) * 0.985).tolist()}


def glass_material(rng: np.random.Generator, pane: bool = False) -> Material:
    """Clear, tinted or frosted glass; panes are single sheets."""
    if pane:
        thickness = float(rng.uniform(1.45, 1.75))
        return {"type": "thindielectric", "int_ior": thickness, "specular_transmittance": tint(rng, 0.3)}
    index = float(rng.uniform(1.42, 1.6))
    if rng.random() < 0.1:
        return {
            "type": "roughdielectric",
            "int_ior": index,
            "alpha": float(rng.uniform(0.05, 0.22)),
            "specular_transmittance": tint(rng, 0.3),
        }
    return {"type": "dielectric", "int_ior": index, "specular_transmittance": tint(rng, 0.2)}


def textured(rng: np.random.Generator, pixels: Texture, glossy: float = 0.3) -> Material:
    """A painted surface; a share of them under a coat of varnish."""
    paint = {"type": "bitmap", "pixels": pixels}
    if rng.random() < glossy:
        return {"type": "twosided", "bsdf": {"type": "roughplastic", "diffuse_reflectance": paint, "alpha": 0.12}}
    return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": paint}}
