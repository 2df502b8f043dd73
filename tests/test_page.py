"""The page of predictions: one file, every picture in it, what is wrong in colour, and nothing that a name could break."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.errors import InputError
from utils.metrics import score_picture, summarise
from utils.page import INVENTED, MISSED, PAGE_FILE_NAME, error_map, write_page
from utils.protocols import calibration, histogram
from utils.report import write_evaluation, write_scores
from utils.scoring import intervals

NAMES = ("easy_1", "<!--<script><b>&", "büro 2")


def write_folder(folder: Path, names: tuple[str, ...] = NAMES, uncertain: bool = False) -> Path:
    """Writes a folder as an inference leaves it."""
    folder.mkdir()
    rng, scores, levels = np.random.default_rng(0), [], []
    for number, name in enumerate(names):
        picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        truth, mask = np.zeros((2, 32, 32), np.bool_)
        truth[:, :16], mask[: 16 + number] = True, True
        kinds = {"img": picture, "maskgt": truth * np.uint8(255), "maskq": mask * np.uint8(255), "pred": picture}
        if uncertain:
            kinds["uncertainty"] = picture[..., 0]
        for kind, values in kinds.items():
            Image.fromarray(values).save(folder / f"{name}_{kind}.png")
        scores.append(score_picture(picture, mask, truth, name, "easy" if number % 2 else "hard"))
        levels.append(histogram(picture[..., 0], truth))
    write_scores(folder, summarise(scores), scores)
    histograms = np.stack(levels)
    evaluation = {
        "threshold": {"value": 0.4, "chosen_on": "validation"},
        "intervals": intervals(scores),
        "calibration": calibration(histograms.sum(axis=0)),
        "protocols": {
            "glass": {"own": {"iou": 0.5, "mae": 0.25}, "512": {"iou": 0.75, "mae": None}},
            "classes": {"own": {"iou": {"background": 0.5, "cup": None}, "miou": 0.5}},
        },
    }
    write_evaluation(folder, evaluation, histograms)
    return folder


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(found))


@pytest.mark.parametrize("uncertain", [False, True])
def test_the_page_holds_every_picture_with_its_scores(uncertain: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "test_mix_3", uncertain=uncertain)
    page = write_page(folder).read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.glob("*report*")) == [PAGE_FILE_NAME]
    data = data_of(page)
    assert data["columns"] == ["IoU", "recall", "MSE", "boundary IoU"]
    tiles = ["picture", "truth", "prediction", "raw", "error"] + (["uncertainty"] if uncertain else [])
    assert data["tiles"] == tiles
    assert [row[0] for row in data["rows"]] == list(NAMES)
    with (folder / "per_image.csv").open(newline="", encoding="utf-8") as file:
        assert [row[2] for row in data["rows"]] == [float(row["iou"]) for row in csv.DictReader(file)]
    for row in data["rows"]:
        strip = Image.open(io.BytesIO(base64.b64decode(row[-1])))
        assert (strip.format, strip.size) == ("WEBP", (96 * len(tiles), 96))
    assert page.count("</script>") == 2


def test_the_page_needs_no_network_and_shows_tables_and_curves(tmp_path: Path) -> None:
    page = write_page(write_folder(tmp_path / "run")).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert "@" not in re.sub(r'<script id="data".*?</script>|base64,[^"]*|@media', "", page, flags=re.DOTALL)
    assert "threshold 0.4, from validation" in page
    assert "<td>512</td><td>0.7500</td><td>-</td>" in page
    assert "<th>background</th><th>cup</th>" in page


def test_errors_are_coloured_by_their_kind() -> None:
    image = np.full((1, 4, 3), 100, np.uint8)
    mask, truth = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    hit, invented, missed, background = error_map(image, mask, truth)[0].tolist()
    assert (tuple(invented), tuple(missed)) == (INVENTED, MISSED)
    assert len(set(hit)) == len(set(background)) == 1
    assert hit[0] > background[0]


def test_a_folder_that_lacks_something_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"metrics\.json: cannot be read .* give a folder that val_inference\.py wrote"
    ):
        write_page(tmp_path)
    folder = write_folder(tmp_path / "run", ("a",))
    (folder / "a_pred.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a_pred\.png: cannot be read as a picture"):
        write_page(folder)
    (folder / "per_image.csv").write_text("name\n1\n")
    with pytest.raises(InputError, match=r"per_image\.csv: cannot be read as scores"):
        write_page(folder)
