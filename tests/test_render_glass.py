from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mitsuba")
pytest.importorskip("skimage")

from dataset import render_glass
from dataset.glass_scenes import Body, Camera, GlassScene, sample_scene
from dataset.glass_shapes import BODY_KINDS, Mesh, ball, sample_body, sheet, signed_volume
from dataset.render_glass import draw_pair, main, render_pair

SIZE = 16
PAINT = {"type": "twosided", "bsdf": {"type": "diffuse"}}
GLASS = {"type": "dielectric"}
PANE = {"type": "thindielectric"}


def view_of(*bodies: Body, degrees: float = 60.0) -> GlassScene:
    """The bodies seen from y = -4 at height 0.5 with a picture so many degrees wide, under an even sky."""
    sky = np.ones((8, 16, 3), dtype=np.float32)
    return GlassScene(bodies, (), sky, Camera((0.0, -4.0, 0.5), (0.0, 0.0, 0.5), degrees))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def arguments(root: Path, count: int, workers: int = 1) -> list[str]:
    return [
        str(root),
        "--split",
        "test",
        "--count",
        str(count),
        "--size",
        str(SIZE),
        "--seed",
        "3",
        "--workers",
        str(workers),
    ]


def test_same_seed_gives_the_same_files_with_any_workers_and_after_an_interruption(tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "two", 4, workers=2)) == 0
    whole = contents(tmp_path / "two")
    assert sorted(whole) == sorted(
        f"test/{difficulty}/{folder}/{difficulty}_{index:05d}{ending}"
        for index, difficulty in enumerate(["easy", "hard", "easy", "hard"])
        for folder, ending in (("images", ".jpg"), ("masks", "_mask.png"))
    )
    # The state in which an interruption may leave a folder: a whole pair, a mask without its picture, a started file.
    cut = tmp_path / "cut" / "test"
    for name in ("easy/masks/easy_00000_mask.png", "easy/images/easy_00000.jpg", "hard/masks/hard_00001_mask.png"):
        (cut / name).parent.mkdir(parents=True, exist_ok=True)
        (cut / name).write_bytes(whole[f"test/{name}"])
    (cut / "hard/images").mkdir()
    (cut / "hard/images/.hard_00001.jpg.part").write_bytes(b"half a picture")
    kept = (cut / "easy/images/easy_00000.jpg").stat().st_mtime_ns
    assert main(arguments(tmp_path / "cut", 4)) == 0
    assert contents(tmp_path / "cut") == whole
    assert (cut / "easy/images/easy_00000.jpg").stat().st_mtime_ns == kept


def test_pairs_have_the_promised_types_and_mask_values() -> None:
    seen = set()
    for index in range(6):
        image, mask = draw_pair("train", 0, index, SIZE)
        assert image.shape == mask.shape == (SIZE, SIZE, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert (mask == mask[..., :1]).all()
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 85, 255}


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_glass_free_scenes_hold_no_glass_and_others_do(difficulty: str) -> None:
    scenes = [sample_scene(np.random.default_rng(seed), difficulty) for seed in range(45)]  # type: ignore[arg-type]
    assert {scene.has_glass for scene in scenes} == {True, False}
    for scene in scenes:
        roles = {body.role for body in scene.bodies}
        assert scene.has_glass or roles == {"opaque"}
        assert difficulty == "hard" or "stuff" not in roles


@pytest.mark.parametrize("kind", BODY_KINDS)
def test_bodies_stand_on_the_floor_with_their_faces_outwards(kind: str) -> None:
    for seed in range(5):
        turned = sample_body(np.random.default_rng(seed), kind)
        assert turned.mesh.bounds()[0][2] == pytest.approx(0.0, abs=1e-9)
        for mesh in filter(None, (turned.mesh, turned.liquid)):
            assert signed_volume(mesh) > 0
            # Closed and consistently turned: every edge is walked once in each direction, poles and doubles aside.
            assert boundary_length(mesh) == pytest.approx(0.0, abs=1e-6)


def boundary_length(mesh: Mesh) -> float:
    """Length of what is left when the edges of all faces are summed as vectors by their end points."""
    merged = np.unique(mesh.vertices.round(9), axis=0, return_inverse=True)[1].ravel()[mesh.faces]
    count: dict[tuple[int, int], int] = {}
    for first, second in np.concatenate([merged[:, [0, 1]], merged[:, [1, 2]], merged[:, [2, 0]]]).tolist():
        key, step = ((first, second), 1) if first < second else ((second, first), -1)
        count[key] = count.get(key, 0) + step
    corners = np.unique(mesh.vertices.round(9), axis=0)
    return float(sum(np.linalg.norm(corners[a] - corners[b]) for (a, b), left in count.items() if left and a != b))


def test_mask_of_a_ball_has_the_area_of_its_projection() -> None:
    radius, distance, size, degrees = 0.5, 4.0, 64, 20.0
    _, mask = render_pair(view_of(Body(ball(radius), GLASS, "thing"), degrees=degrees), size, 0)
    # A ball's outline is a cone of half angle asin(r / d) about the axis: on the film a disc of radius tan of it.
    disc = np.tan(np.arcsin(radius / distance)) / np.tan(np.radians(degrees / 2)) * size / 2
    assert (mask[..., 0] == 85).sum() == pytest.approx(np.pi * disc**2, rel=0.02)
    assert set(np.unique(mask)) == {0, 85}


def test_opaque_body_in_front_hides_glass() -> None:
    glass = Body(ball(0.5), GLASS, "thing")
    hidden = view_of(glass, Body(sheet(4.0, 4.0).moved((0.0, -1.0, -1.5)), PAINT))
    behind = view_of(glass, Body(sheet(4.0, 4.0).moved((0.0, 1.0, -1.5)), PAINT))
    assert not render_pair(hidden, SIZE, 0)[1].any()
    assert render_pair(behind, SIZE, 0)[1].any()
    half = view_of(glass, Body(sheet(4.0, 4.0).moved((2.0, -1.0, -1.5)), PAINT))
    mask = render_pair(half, 32, 0)[1][..., 0]
    assert mask[:, :16].any()
    assert not mask[:, 16:].any()


def test_nearer_glass_wins() -> None:
    thing, pane = Body(ball(0.5), GLASS, "thing"), sheet(4.0, 4.0)
    front = render_pair(view_of(thing, Body(pane.moved((0.0, -1.0, -1.5)), PANE, "stuff")), SIZE, 0)[1]
    back = render_pair(view_of(thing, Body(pane.moved((0.0, 1.0, -1.5)), PANE, "stuff")), SIZE, 0)[1]
    middle = (SIZE // 2, SIZE // 2, 0)
    assert front[middle] == 255
    assert back[middle] == 85
    assert set(np.unique(back)) >= {85, 255}


def test_picture_shows_what_stands_left_on_the_left() -> None:
    dark = Body(sheet(4.0, 4.0).moved((-2.0, 0.0, -1.5)), {"type": "diffuse", "reflectance": 0.02})
    picture = render_pair(view_of(dark), SIZE, 0)[0].astype(float)
    assert picture[:, : SIZE // 2 - 1].mean() < picture[:, SIZE // 2 + 1 :].mean()


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (["--count", "0"], "at least 1 pair"),
        (["--size", "100"], "multiple of 16"),
        (["--size", "0"], "multiple of 16"),
        (["--seed", "-1"], "0 or more"),
        (["--workers", "0"], "at least 1"),
    ],
)
def test_bad_arguments_leave_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], remedy: str
) -> None:
    assert main([str(tmp_path / "out"), "--count", "2", *change]) == 2
    message = capsys.readouterr().err
    assert remedy in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made_leaves_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file"), "--count", "1"]) == 2
    assert main([str(tmp_path / "file" / "below"), "--count", "1"]) == 2
    assert capsys.readouterr().err.count("name another one") == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder_leaves_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([str(tmp_path), "--count", "1"]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_missing_renderer_names_the_requirements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_glass.importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path), "--count", "1"]) == 2
    assert "pip install -r requirements-render.txt" in capsys.readouterr().err


def test_interrupt_leaves_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(render_glass, "render_split", interrupted)
    assert main([str(tmp_path), "--count", "1"]) == 130


def test_written_masks_are_readable_as_rgb(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--count", "1", "--size", "16", "--workers", "1"]) == 0
    assert Image.open(tmp_path / "train/masks/easy_00000_mask.png").mode == "RGB"
    assert Image.open(tmp_path / "train/images/easy_00000.jpg").size == (16, 16)
