"""Triangle meshes of the rendered glass data set: lathe-turned bodies, boxes and flat sheets (z is up)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BODY_KINDS = ("tumbler", "jar", "bottle", "vase", "bowl", "goblet", "ball", "flask", "carafe", "dish", "block", "tank")


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh with outward faces.

    Attributes:
        vertices: (V, 3) positions in scene units (one unit is about the height of a tall bottle).
        faces: (F, 3) vertex indices, counter-clockwise seen from outside.
        texture_coordinates: (V, 2).
        smooth: whether vertex normals are interpolated.
    """

    vertices: FloatArray
    faces: IntArray
    texture_coordinates: FloatArray
    smooth: bool = False

    def moved(self, offset: tuple[float, float, float], yaw: float = 0.0, roll: float = 0.0) -> Mesh:
        """Roll about the x axis, then turn about z by `yaw` (both radians), then shift."""
        cos_roll, sin_roll, cos_yaw, sin_yaw = np.cos(roll), np.sin(roll), np.cos(yaw), np.sin(yaw)
        about_x = np.array([[1, 0, 0], [0, cos_roll, -sin_roll], [0, sin_roll, cos_roll]])
        about_z = np.array([[cos_yaw, -sin_yaw, 0], [sin_yaw, cos_yaw, 0], [0, 0, 1]])
        return replace(self, vertices=self.vertices @ (about_z @ about_x).T + np.asarray(offset))

    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """Lowest and highest corner, (3,) each."""
        return self.vertices.min(axis=0), self.vertices.max(axis=0)


@dataclass(frozen=True)
class TurnedBody:
    """A body standing on z = 0 around the z axis, and the liquid that fits inside it, if it can hold any."""

    mesh: Mesh
    liquid: Mesh | None


def round_corners(points: FloatArray, passes: int = 2) -> FloatArray:
    """Cut the corners of an open polyline (P, 2), keeping both ends."""
    for _ in range(passes):
        near, far = 0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]
        points = np.concatenate([points[:1], np.stack([near, far], axis=1).reshape(-1, 2), points[-1:]])
    return points


def lathe(profile: FloatArray, segments: int = 56, squareness: float = 2.0, flutes: int = 0) -> Mesh:
    """Turn a profile around z into a closed mesh.

    Args:
        profile: (P, 2) radius and height; both ends lie on the axis (radius 0).
        segments: corners of a cross-section.
        squareness: exponent of the superellipse that is the cross-section (2 round, 8 nearly square).
        flutes: number of shallow vertical grooves.
    """
    angles = np.arange(segments) * (2 * np.pi / segments)
    # The seam of the texture lies at the back; the texture is mirrored there, so that it does not show.
    directions = np.stack([-np.sin(angles), np.cos(angles)], axis=1)
    reach = (np.abs(directions) ** squareness).sum(axis=1) ** (-1.0 / squareness)
    if flutes:
        reach = reach * (1.0 + 0.035 * np.cos(flutes * angles))
    radii, heights = profile[:, 0], profile[:, 1]
    plane = radii[:, None, None] * (reach[:, None] * directions)[None]
    tall = np.broadcast_to(heights[:, None, None], (*plane.shape[:2], 1))
    vertices = np.concatenate([plane, tall], axis=2).reshape(-1, 3)
    around = np.broadcast_to(2 * np.abs(np.arange(segments) / segments - 0.5), (len(profile), segments))
    along = np.broadcast_to((heights / max(heights.max(), 1e-6))[:, None], (len(profile), segments))
    ring, corner = np.meshgrid(np.arange(len(profile) - 1), np.arange(segments), indexing="ij")
    following = (corner + 1) % segments
    low_here, low_next = ring * segments + corner, ring * segments + following
    high_here, high_next = low_here + segments, low_next + segments
    lower = np.stack([low_here, low_next, high_next], axis=-1)[radii[:-1] > 1e-9].reshape(-1, 3)
    upper = np.stack([low_here, high_next, high_here], axis=-1)[radii[1:] > 1e-9].reshape(-1, 3)
    faces = np.concatenate([lower, upper])
    mesh = Mesh(vertices, faces, np.stack([around, along], axis=2).reshape(-1, 2), smooth=True)
    return mesh if signed_volume(mesh) > 0 else inside_out(mesh)


def signed_volume(mesh: Mesh) -> float:
    """Volume of a closed mesh; negative where the faces look inwards."""
    first, second, third = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    return float(np.einsum("ij,ij->i", first, np.cross(second, third)).sum() / 6.0)


def inside_out(mesh: Mesh) -> Mesh:
    """The same surface with its faces turned round."""
    return replace(mesh, faces=mesh.faces[:, ::-1].copy())


def joined(first: Mesh, second: Mesh) -> Mesh:
    """Both surfaces in one mesh."""
    return Mesh(
        np.concatenate([first.vertices, second.vertices]),
        np.concatenate([first.faces, second.faces + len(first.vertices)]),
        np.concatenate([first.texture_coordinates, second.texture_coordinates]),
        first.smooth,
    )


def sheet(width: float, height: float, repeats: tuple[float, float] = (1.0, 1.0)) -> Mesh:
    """A rectangle in the xz plane, centred on x = 0, standing on z = 0, looking towards -y."""
    half = width / 2
    vertices = np.array([[-half, 0, 0], [half, 0, 0], [half, 0, height], [-half, 0, height]], dtype=np.float64)
    coordinates = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * np.asarray(repeats)
    return Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), coordinates)


def box(width: float, depth: float, height: float) -> Mesh:
    """A closed box centred on the z axis, standing on z = 0; every side carries the whole texture."""
    vertices, faces, coordinates = [], [], []
    for axis in range(3):
        for side in (-1.0, 1.0):
            first, second = (axis + 1) % 3, (axis + 2) % 3
            for across, up in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                corner = np.zeros(3)
                corner[axis], corner[first], corner[second] = side, across, up
                vertices.append(corner)
                coordinates.append([(across + 1) / 2, (up + 1) / 2])
            start = len(vertices) - 4
            order = (0, 1, 2, 0, 2, 3) if side > 0 else (0, 2, 1, 0, 3, 2)
            faces.append(np.array(order).reshape(2, 3) + start)
    corners = np.array(vertices) * np.array([width, depth, height]) / 2 + np.array([0, 0, height / 2])
    return Mesh(corners, np.concatenate(faces), np.array(coordinates, dtype=np.float64))


def ball(radius: float, wall: float | None = None, segments: int = 64) -> Mesh:
    """A ball resting on z = 0; with `wall` it is a hollow one with an inner surface as well."""
    polar = np.linspace(0, np.pi, segments // 2 + 1)

    def surface(reach: float) -> Mesh:
        profile = np.stack([reach * np.sin(polar), radius - reach * np.cos(polar)], axis=1)
        profile[[0, -1], 0] = 0.0
        return lathe(profile, segments)

    outer = surface(radius)
    return outer if wall is None else joined(outer, inside_out(surface(radius - wall)))


def outline(kind: str, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """Control points (P, 2) of the outer wall from the foot up to the rim, and the height of the inner floor."""
    even = rng.uniform
    foot_height = 0.0
    if kind == "tumbler":
        height, low = even(0.5, 1.1), even(0.22, 0.34)
        points = [(low, 0), (low, 0.03), (low * even(1.0, 1.35), height)]
    elif kind == "jar":
        height, wide = even(0.6, 1.0), even(0.28, 0.42)
        points = [
            (wide * 0.9, 0),
            (wide, 0.06),
            (wide, height * 0.75),
            (wide * 0.8, height * 0.86),
            (wide * 0.8, height),
        ]
    elif kind == "bottle":
        height, wide, neck, shoulder = even(1.0, 1.5), even(0.17, 0.28), even(0.06, 0.09), even(0.5, 0.68)
        points = [
            (wide * 0.95, 0),
            (wide, 0.04),
            (wide, height * shoulder),
            (neck, height * (shoulder + 0.16)),
            (neck, height * 0.97),
            (neck * 1.25, height * 0.97),
            (neck * 1.25, height),
        ]
    elif kind == "vase":
        height, widths = even(0.8, 1.3), even(0.14, 0.38, size=4)
        points = [
            (widths[0], 0),
            (widths[0], 0.03),
            (widths[1], height * 0.35),
            (widths[2], height * 0.7),
            (widths[3], height),
        ]
    elif kind == "bowl":
        height, wide = even(0.3, 0.55), even(0.4, 0.65)
        points = [(wide * 0.35, 0), (wide * 0.4, 0.02), (wide * 0.9, height * 0.45), (wide, height)]
    elif kind == "goblet":
        height, wide, foot_height = even(0.9, 1.25), even(0.2, 0.36), even(0.3, 0.45)
        foot, stem = wide * even(0.75, 1.0), even(0.025, 0.045)
        points = [
            (foot, 0),
            (foot, 0.02),
            (stem * 1.4, 0.05),
            (stem, 0.12),
            (stem, foot_height - 0.03),
            (wide * 0.75, foot_height + 0.08),
            (wide, foot_height + 0.3),
            (wide * even(0.7, 1.1), height),
        ]
    elif kind == "flask":
        height, wide, neck = even(0.8, 1.1), even(0.3, 0.42), even(0.09, 0.14)
        points = [(wide * 0.95, 0), (wide, 0.05), (neck, height * 0.68), (neck, height * 0.96), (neck * 1.3, height)]
    elif kind == "carafe":
        height, wide, neck = even(0.9, 1.2), even(0.28, 0.4), even(0.1, 0.16)
        points = [
            (wide * 0.7, 0),
            (wide, 0.12),
            (wide * 0.95, height * 0.35),
            (neck, height * 0.68),
            (neck * even(1.3, 1.9), height),
        ]
    elif kind == "dish":
        height, wide = even(0.12, 0.25), even(0.5, 0.75)
        points = [(wide * 0.6, 0), (wide * 0.65, 0.02), (wide, height)]
    else:
        height, wide = even(0.5, 0.8), even(0.4, 0.6)
        points = [(wide, 0), (wide, 0.02), (wide, height)]
    return np.array(points, dtype=np.float64), foot_height


def sample_body(rng: np.random.Generator, kind: str | None = None) -> TurnedBody:
    """Draw a body; it stands on z = 0 and is about 0.2 to 1.5 units tall."""
    kind = kind or str(rng.choice(BODY_KINDS))
    if kind == "ball":
        radius = rng.uniform(0.28, 0.5)
        return TurnedBody(ball(radius, rng.uniform(0.02, 0.06) if rng.random() < 0.4 else None), None)
    if kind == "block":
        width, depth, height = rng.uniform(0.3, 0.8, size=3)
        return TurnedBody(box(width, depth, height), None)
    points, foot_height = outline(kind, rng)
    squareness = rng.uniform(6, 10) if kind == "tank" else (rng.uniform(3, 7) if rng.random() < 0.2 else 2.0)
    flutes = int(rng.integers(6, 15)) if rng.random() < 0.15 else 0
    wall = rng.uniform(0.015, 0.04) * (0.7 if kind in ("bottle", "goblet", "flask") else 1.0)
    outer = round_corners(points)
    rim_radius, rim_height = outer[-1]
    if kind in ("vase", "bottle", "tumbler") and rng.random() < 0.12:
        solid = np.concatenate([[[0, 0]], outer, [[rim_radius * 0.6, rim_height + 0.01], [0, rim_height + 0.01]]])
        return TurnedBody(lathe(solid, squareness=squareness, flutes=flutes), None)
    floor_height = foot_height + rng.uniform(0.025, 0.07)
    kept = outer[outer[:, 1] > floor_height + 0.01]
    inner = np.stack([np.maximum(kept[:, 0] - wall, 0.012), kept[:, 1]], axis=1)
    # Without this point a steep wall would end in a cone instead of a floor.
    floor_edge = np.array([[inner[0, 0] * 0.92, floor_height]])
    rim = np.array([[rim_radius - wall / 2, rim_height + wall / 3]])
    hollow = np.concatenate([[[0, 0]], outer, rim, inner[::-1], floor_edge, [[0, floor_height]]])
    mesh = lathe(hollow, squareness=squareness, flutes=flutes)
    level = floor_height + rng.uniform(0.3, 0.85) * (rim_height - floor_height)
    wet = inner[inner[:, 1] < level]
    if len(wet) < 2:
        return TurnedBody(mesh, None)
    # A hair of air between wall and liquid: two coincident surfaces cannot be traced.
    gap = np.array([0.985, 1.0])
    surface = np.array([[np.interp(level, inner[:, 1], inner[:, 0]), level]])
    lifted = floor_edge + np.array([0, 0.006])
    profile = np.concatenate([lifted * gap, wet * gap, surface * gap, [[0, level]]])
    return TurnedBody(mesh, lathe(np.concatenate([[[0, lifted[0, 1]]], profile]), squareness=squareness, flutes=flutes))
