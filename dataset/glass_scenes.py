"""Random scenes of glass among opaque bodies of the same shapes, described without any renderer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.glass_shapes import BODY_KINDS, Mesh, box, sample_body, sheet
from dataset.glass_surfaces import (
    SCENIC,
    Material,
    Texture,
    colour,
    glass_material,
    opaque_material,
    photograph_crop,
    surface_texture,
    textured,
    tint,
)

Role = Literal["opaque", "thing", "stuff"]
Difficulty = Literal["easy", "hard"]

GLASS_FREE_SHARE = 0.045


@dataclass(frozen=True)
class Body:
    """A mesh with a material: a nested plugin dictionary whose `pixels` are (H, W, 3) linear values in 0..1."""

    mesh: Mesh
    material: Material
    role: Role = "opaque"


@dataclass(frozen=True)
class Light:
    """A rectangular lamp at `position` that faces `target`; `radiance` is linear RGB."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    half_size: tuple[float, float]
    radiance: tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; `field_of_view` in degrees is that of the picture's width."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    field_of_view: float


@dataclass(frozen=True)
class GlassScene:
    """Everything a picture shows.

    Attributes:
        bodies: opaque bodies and glass.
        lights: lamps.
        environment: (H, W, 3) linear radiance all around, row 0 at the zenith.
        camera: the view.
        brightness: value in 0..1 at which the 92nd percentile of luminance is exposed.
        has_glass: whether glass was meant to be in the picture.
    """

    bodies: tuple[Body, ...]
    lights: tuple[Light, ...]
    environment: Texture
    camera: Camera
    brightness: float = 0.75
    has_glass: bool = True


@dataclass
class _Draft:
    """A scene in the making: the bodies so far and the circles (x, y, radius) they stand on."""

    rng: np.random.Generator
    glass: bool
    bodies: list[Body] = field(default_factory=list)
    taken: list[tuple[float, float, float]] = field(default_factory=list)


def sample_environment(rng: np.random.Generator) -> Texture:
    """Radiance all around, (H, W, 3): a photograph with its highlights stretched, a sky, or a dim studio."""
    kind = rng.choice(["photograph", "sky", "studio"], p=[0.5, 0.25, 0.25])
    if kind == "photograph":
        crop = photograph_crop(rng, SCENIC, 0.7)
        wide = np.concatenate([crop, crop[:, ::-1]], axis=1)
        planes = [np.asarray(Image.fromarray(wide[..., channel]).resize((256, 128))) for channel in range(3)]
        picture = np.stack(planes, axis=2)
        # Lamps and daylight are nearly white, whatever the photographs show.
        grey = float(rng.uniform(0.5, 0.9))
        picture = grey * picture.mean(axis=2, keepdims=True) + (1 - grey) * picture
        return np.clip(picture * 0.9 + 3.0 * picture**3 + 0.1, 0.03, 4.0).astype(np.float32)
    lift = np.broadcast_to((1.0 - np.arange(64) / 32.0)[:, None, None], (64, 128, 1))
    zenith, horizon, ground = colour(rng, 0.2, 1.0), colour(rng, 0.5, 1.2), colour(rng, 0.05, 0.4)
    sky = np.where(lift > 0, horizon + (zenith - horizon) * np.abs(lift) ** 0.6, ground) * np.ones((64, 128, 1))
    if kind == "studio":
        sky = sky * rng.uniform(0.25, 0.6)
    for _ in range(int(rng.integers(1, 5))):
        top, left = rng.integers(2, 26), rng.integers(0, 110)
        lamp = rng.uniform(1.5, 4) * colour(rng, 0.7, 1)
        sky[top : top + rng.integers(3, 9), left : left + rng.integers(4, 18)] = lamp
    return sky.astype(np.float32)


def sample_lights(rng: np.random.Generator, target: tuple[float, float, float]) -> tuple[Light, ...]:
    """One to three soft lamps above and beside the target."""
    lights = []
    for _ in range(int(rng.integers(1, 4))):
        turn, lift, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.4), rng.uniform(3.5, 5.5)
        across = far * np.cos(lift)
        position = (float(across * np.cos(turn)), float(-abs(across * np.sin(turn))), float(far * np.sin(lift)))
        power = rng.uniform(1.0, 7.0) * (np.array([1.0, 0.92, 0.82]) ** rng.uniform(-0.8, 2.0))
        half = rng.uniform(0.7, 1.8, size=2)
        lights.append(Light(position, target, (half[0], half[1]), (power[0], power[1], power[2])))
    return tuple(lights)


def place_body(draft: _Draft, glass: bool, spot: Callable[[], tuple[float, float]], scale: float = 1.0) -> bool:
    """Stand a body where there is room, with its liquid; False where ten tries found none."""
    rng = draft.rng
    turned = sample_body(rng, str(rng.choice(BODY_KINDS)))
    roll = rng.uniform(1.3, 1.57) * rng.choice([-1, 1]) if rng.random() < 0.06 else 0.0
    yaw = rng.uniform(0, 2 * np.pi)
    mesh = replace(turned.mesh, vertices=turned.mesh.vertices * scale).moved((0, 0, 0), yaw, roll)
    low, high = mesh.bounds()
    radius = float(np.abs(np.stack([low, high])[:, :2]).max())
    for _ in range(10):
        x, y = spot()
        if all(np.hypot(x - other[0], y - other[1]) > radius + other[2] + 0.02 for other in draft.taken):
            break
    else:
        return False
    draft.taken.append((x, y, radius))
    offset = (x, y, float(-low[2]) + 0.003)
    glass = glass and draft.glass
    material = glass_material(rng) if glass else opaque_material(rng)
    draft.bodies.append(Body(mesh.moved(offset), material, "thing" if glass else "opaque"))
    if glass and turned.liquid is not None and roll == 0.0 and rng.random() < 0.3:
        liquid = replace(turned.liquid, vertices=turned.liquid.vertices * scale).moved(offset, yaw)
        wet = {"type": "dielectric", "int_ior": 1.33, "specular_transmittance": tint(rng, 0.6)}
        draft.bodies.append(Body(liquid, wet, "thing"))
    return True


def add_room(draft: _Draft, wall_distance: float, wall_share: float) -> None:
    """A floor, mostly a wall behind, and sometimes pictures hanging on it."""
    rng = draft.rng
    repeats = float(rng.uniform(3, 10))
    floor = sheet(24.0, 24.0, (repeats, repeats)).moved((0, 0, 0), rng.uniform(0, np.pi), -np.pi / 2)
    low, high = floor.bounds()
    centre = (low + high) / 2
    draft.bodies.append(Body(floor.moved((-centre[0], -centre[1], -centre[2])), textured(rng, surface_texture(rng))))
    if rng.random() > wall_share:
        return
    if rng.random() < 0.35:
        wide = rng.uniform(4, 8) * max(1.0, wall_distance / 4)
        backdrop = sheet(wide * 3, wide * 0.75, (3.0, 1.0)).moved((rng.uniform(-1, 1), wall_distance, 0))
        draft.bodies.append(Body(backdrop, textured(rng, photograph_crop(rng, SCENIC, 0.5), 0.0)))
        return
    many = float(rng.uniform(2, 6))
    wall = sheet(24.0, 9.0, (many, many * 9 / 24)).moved((0, wall_distance, 0), rng.uniform(-0.25, 0.25))
    draft.bodies.append(Body(wall, textured(rng, surface_texture(rng), 0.1)))
    for _ in range(int(rng.integers(0, 3))):
        at = (float(rng.uniform(-2, 2)), wall_distance - 0.65, float(rng.uniform(0.3, 1.4)))
        add_frame(draft, at, rng.uniform(0.6, 1.5), rng.uniform(0.6, 1.5), (1, 1), "opaque")


def add_frame(
    draft: _Draft,
    corner: tuple[float, float, float],
    width: float,
    height: float,
    cells: tuple[int, int],
    filling: Literal["glass", "opaque"],
    yaw: float = 0.0,
    bar: float | None = None,
) -> None:
    """A frame with muntins (columns, rows of cells) standing on `corner`, glazed or filled with opaque panels."""
    rng = draft.rng
    bar = float(rng.uniform(0.03, 0.1)) if bar is None else bar
    bar_depth = float(rng.uniform(0.04, 0.12))
    wood = opaque_material(rng)
    pane = glass_material(rng, pane=True)
    frosted = {"type": "roughdielectric", "int_ior": 1.5, "alpha": float(rng.uniform(0.04, 0.15))}
    rough = rng.random() < 0.1
    columns, rows = cells
    wide, tall = width / columns, height / rows
    # A pane ends inside its bars, or its edge would show beyond them.
    clear_wide, clear_tall = wide - 0.8 * bar, tall - 0.8 * bar
    parts = [(box(bar, bar_depth, height + bar), (-width / 2 + wide * step, 0.0)) for step in range(columns + 1)]
    parts += [(box(width + bar, bar_depth * 0.9, bar), (0.0, tall * step)) for step in range(rows + 1)]
    turn = np.array([np.cos(yaw), np.sin(yaw)])

    def put(mesh: Mesh, x: float, z: float, material: Material, role: Role = "opaque") -> None:
        across = turn * x
        place = (corner[0] + float(across[0]), corner[1] + float(across[1]), corner[2] + z)
        draft.bodies.append(Body(mesh.moved(place, yaw), material, role))

    for mesh, (x, z) in parts:
        put(mesh, x, z, wood)
    panelled = rng.random() < 0.2
    for column in range(columns):
        for row in range(rows):
            x, z = -width / 2 + wide * (column + 0.5), tall * row + bar * 0.9
            if filling == "glass" and draft.glass and not (panelled and rng.random() < 0.35):
                glazing = box(clear_wide, 0.02, clear_tall) if rough else sheet(clear_wide, clear_tall)
                put(glazing, x, z, frosted if rough else pane, "stuff")
            elif filling == "opaque" or rng.random() < 0.75:
                pixels = photograph_crop(rng) if rng.random() < 0.6 else surface_texture(rng)
                panel = textured(rng, pixels, 0.4) if rng.random() < 0.7 else opaque_material(rng)
                put(sheet(clear_wide, clear_tall), x, z, panel)


def look(
    rng: np.random.Generator,
    target: NDArray[np.float64],
    extent: float,
    fill: float,
    lifts: tuple[float, float],
    turn: float,
) -> Camera:
    """A camera from which `extent` around the target (3,) fills the share `fill` of the picture's width.

    `lifts` is the range of elevations and `turn` the largest angle to either side of the y axis, in radians.
    """
    field_of_view = float(rng.uniform(26, 58))
    far = extent / fill / (2 * np.tan(np.radians(field_of_view) / 2))
    lift, side = rng.uniform(*lifts), rng.uniform(-turn, turn)
    away = far * np.array([np.sin(side) * np.cos(lift), -np.cos(side) * np.cos(lift), np.sin(lift)])
    aimed = target + rng.normal(0, 0.07, size=3) * extent
    position = target + away
    position[2] = max(position[2], 0.08)
    return Camera(tuple(position.tolist()), tuple(aimed.tolist()), field_of_view)


def middle_and_extent(bodies: list[Body]) -> tuple[NDArray[np.float64], float]:
    """Centre of the bodies' common box (3,) and the longer of its width and height."""
    corners = np.stack([corner for body in bodies for corner in body.mesh.bounds()])
    low, high = corners.min(axis=0), corners.max(axis=0)
    return (low + high) / 2, float(max(high[0] - low[0], high[2] - low[2]))


def table_scene(draft: _Draft, glass_count: int, opaque_count: int, fill: tuple[float, float]) -> Camera:
    """Bodies on a table; the camera frames the glass (or the first bodies, in a picture without glass)."""
    rng = draft.rng
    spread = 0.12 + 0.24 * (glass_count - 1)
    for _ in range(glass_count):
        place_body(draft, True, lambda: (rng.normal(0, spread + 0.1), rng.normal(0, spread + 0.1)))
    centre, extent = middle_and_extent(draft.bodies)
    reach = 0.5 + 0.18 * opaque_count
    for _ in range(opaque_count):
        place_body(draft, False, lambda: (rng.normal(centre[0], reach), rng.normal(centre[1] + 0.2, reach)))
    add_room(draft, float(rng.uniform(1.6, 6.0)), 0.72)
    return look(rng, centre, extent, float(rng.uniform(*fill)), (0.03, 0.85), 0.5)


def pane_scene(draft: _Draft) -> Camera:
    """A window, door or partition with things behind it and some in front."""
    rng = draft.rng
    kind = str(rng.choice(["window", "door", "partition"], p=[0.45, 0.25, 0.3]))
    yaw = float(rng.uniform(-0.5, 0.5))
    if kind == "window":
        width, height, cells = (
            rng.uniform(1.4, 2.8),
            rng.uniform(1.3, 2.3),
            (int(rng.integers(1, 4)), int(rng.integers(1, 3))),
        )
        foot = float(rng.uniform(0.1, 0.8))
    elif kind == "door":
        width, height, cells, foot = rng.uniform(1.0, 1.8), rng.uniform(2.0, 2.6), (int(rng.integers(1, 3)), 1), 0.0
    else:
        count = int(rng.integers(2, 5))
        width, height, cells, foot = count * rng.uniform(0.8, 1.2), rng.uniform(1.5, 2.4), (count, 1), 0.02
    thin = float(rng.uniform(0.02, 0.06)) if kind == "partition" else None
    add_frame(draft, (0.0, 0.0, foot), width, height, cells, "glass", yaw, thin)
    centre, extent = middle_and_extent(draft.bodies)
    turn = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    if kind == "door":
        knob = box(0.04, 0.16, 0.25).moved(tuple((turn * width * 0.42 + [0, 0, 1.0]).tolist()), yaw)
        draft.bodies.append(Body(knob, {"type": "twosided", "bsdf": {"type": "roughconductor", "material": "Al"}}))
    if kind != "partition" and rng.random() < 0.65:
        plaster = textured(rng, surface_texture(rng), 0.1)
        side = 5.0
        for mesh, x, z in (
            (box(side, 0.1, 6), -(width + side) / 2, 0.0),
            (box(side, 0.1, 6), (width + side) / 2, 0.0),
            (box(width, 0.1, 3), 0.0, foot + height),
            (box(width, 0.1, max(foot, 0.01)), 0.0, 0.0),
        ):
            draft.bodies.append(Body(mesh.moved(tuple((turn * x + [0, 0, z]).tolist()), yaw), plaster))
    if rng.random() < 0.3:
        beside = turn * (width + 0.9) * rng.choice([-1, 1])
        at = (float(beside[0]), float(beside[1]) - 0.15, max(foot, 0.05))
        add_frame(draft, at, width * 0.6, height * 0.8, (1, 1), "opaque", yaw)
    for _ in range(int(rng.integers(1, 5))):
        place_body(draft, False, lambda: (rng.uniform(-2, 2), rng.uniform(1.2, 3.2)), 1.6)
    for _ in range(int(rng.integers(0, 3))):
        place_body(draft, rng.random() < 0.4, lambda: (rng.uniform(-1.1, 1.1), rng.uniform(-1.6, -0.9)), 0.9)
    add_room(draft, float(rng.uniform(3.6, 7.0)), 0.75)
    return look(rng, centre, extent, float(rng.uniform(0.6, 1.15)), (-0.05, 0.3), 0.55)


def sample_scene(rng: np.random.Generator, difficulty: Difficulty) -> GlassScene:
    """Draw a scene: `easy` shows one glass body, `hard` panes or several bodies among clutter."""
    draft = _Draft(rng, glass=bool(rng.random() >= GLASS_FREE_SHARE))
    if difficulty == "easy":
        camera = table_scene(draft, 1, int(rng.choice([0, 1, 2], p=[0.45, 0.35, 0.2])), (0.4, 0.95))
    elif rng.random() < 0.62:
        camera = pane_scene(draft)
    else:
        camera = table_scene(draft, int(rng.integers(2, 5)), int(rng.integers(2, 5)), (0.7, 1.15))
    environment = sample_environment(rng)
    lights = sample_lights(rng, camera.target)
    return GlassScene(tuple(draft.bodies), lights, environment, camera, float(rng.uniform(0.45, 0.9)), draft.glass)
