"""The panel of fixed validation pictures: which ones, whose rows, what is drawn, on any number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from dataset.trans10k import Pair
from tests.conftest import Launch
from utils import panel as panel_module
from utils.metrics import PictureScore
from utils.panel import GAP, KINDS, LINE, NUM_PICTURES, SIDE, Panel


def pairs(count: int) -> list[Pair]:
    return [Pair(f"p{number}", "", Path("a"), Path("b")) for number in range(count)]


def score(name: str, iou: float) -> PictureScore:
    return PictureScore(name, "", iou, 0.0, 0.0, 0.0, False, False)


def pictures(level: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Flat pictures whose brightness tells the kind."""
    grey = {kind: np.full((40, 60), level + number, np.uint8) for number, kind in enumerate(KINDS)}
    return {**grey, "img": np.repeat(grey["img"][..., None], 3, axis=2), "other": grey["pred"]}


@pytest.mark.parametrize(("count", "chosen"), [(1, ["p0"]), (3, ["p0", "p1", "p2"]), (10, ["p0", "p2", "p5", "p7"])])
def test_the_pictures_are_spread_evenly(count: int, chosen: list[str]) -> None:
    assert Panel(pairs(count)).names == chosen
    assert len(chosen) <= NUM_PICTURES


def test_rows_of_all_processes_are_drawn_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Panel(pairs(3)), Panel(pairs(3))
    there.write("p0", pictures(10))
    there.write("p9", pictures(90))  # not a chosen one
    here.write("p2", pictures(50))
    here.write("p1", pictures(30))
    monkeypatch.setattr(panel_module, "gather_object", lambda rows: [*there._rows.items(), *rows])
    scores = [score(f"p{number}", number / 10) for number in range(9)]
    here.gather(SimpleNamespace(is_main_process=True), scores)  # type: ignore[arg-type]
    drawn = here.draw("update 5")
    assert drawn.shape == (2 * LINE + 3 * (SIDE + LINE) + GAP, len(KINDS) * (SIDE + GAP) + GAP, 3)
    for row in range(3):
        for column in range(len(KINDS)):
            top, left = 2 * LINE + row * (SIDE + LINE), GAP + column * (SIDE + GAP)
            tile = drawn[top : top + SIDE, left : left + SIDE]
            assert (tile == 10 + 20 * row + column).all()
    assert here._captions["p2"] == "p2   IoU 0.200"


def test_only_the_main_process_keeps_the_pictures() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    panel = Panel(pairs(1))
    panel.write("p0", pictures(10))
    panel.gather(SimpleNamespace(is_main_process=False), [score("p0", 1.0)])  # type: ignore[arg-type]
    assert panel._rows == {}


def test_a_panel_is_written_whole(tmp_path: Path) -> None:
    panel = Panel(pairs(1))
    drawn = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    panel.save(drawn, tmp_path / "panels" / "step-000003.png")
    assert [path.name for path in (tmp_path / "panels").iterdir()] == ["step-000003.png"]
    with Image.open(tmp_path / "panels" / "step-000003.png") as image:
        assert (np.array(image) == drawn).all()


@pytest.mark.slow
def test_two_processes_draw_the_panels_of_one(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    shared = {**flags, "max_train_steps": 3, "val_steps": 2, "test_batch_size": 1, "lr": 1e-30}
    launch(
        "trainer.py", {**shared, "output_dir": tmp_path / "one", "train_batch_size": 4}, "configs/accelerate/cpu.yaml"
    )
    launch("trainer.py", {**shared, "output_dir": tmp_path / "two"}, "configs/accelerate/cpu_2_processes.yaml")
    for name in ("step-000002.png", "step-000003.png"):
        one, two = (np.array(Image.open(tmp_path / run / "panels" / name)) for run in ("one", "two"))
        assert (one == two).all()
        assert len(np.unique(one)) > 50
