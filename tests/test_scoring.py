"""One picture at several sizes under several protocols, and what cannot be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.trans10k import LAYOUTS, Pair, layout_of
from tests.conftest import RESOLUTION, Launch, write_pair
from utils.checkpoints import load_pipeline
from utils.errors import InputError
from utils.metrics import score_folder, summarise
from utils.protocols import summarise_classes, summarise_glass, summarise_translab
from utils.scoring import Scorer, intervals

CLASSES = LAYOUTS["trans10k_classes"]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A mask of 64 x 48 pixels whose left half is stuff and whose next quarter is things."""
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[:, :32], mask[:, 32:48] = 255, 85
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    return Pair("a", "easy", tmp_path / "a.jpg", tmp_path / "a_mask.png")


def test_each_size_is_scored_against_the_truth_of_that_size(pair: Pair) -> None:
    scorer = Scorer("per_image,glass,translab,classes", "training,512,own", CLASSES, 0.5)
    # At the training's 16 x 16 the prediction is right but for one column of background that it takes for things.
    truth = np.zeros((16, 16), np.uint8)
    truth[:, :8], truth[:, 8:12] = 2, 1
    classes = truth.copy()
    classes[:, 12] = 1
    soft = (classes > 0) * np.uint8(255)
    (record,) = [scorer.score(pair, np.repeat(soft[..., None], 3, axis=2), soft, classes, truth)]
    assert list(record) == ["training", "512", "own"]
    assert record["training"].per_image.iou == pytest.approx(12 / 13)
    assert record["own"].classes.sum() == 48 * 64
    assert record["512"].classes.sum() == 512 * 512
    figures = scorer.summarise([record])
    assert list(figures) == ["per_image", "glass", "translab", "classes"]
    for size in ("training", "512", "own"):
        assert figures["translab"][size]["iou_stuff"] == 1
        assert figures["translab"][size]["iou_things"] == pytest.approx(4 / 5)
        assert figures["classes"][size]["iou"]["background"] == pytest.approx(3 / 4)
        # Smoothed on the way to a larger size, so nearly.
        assert figures["glass"][size]["iou"] == pytest.approx(12 / 13, abs=0.02)
    assert figures["per_image"]["training"]["intervals"]["iou"] == [pytest.approx(12 / 13, abs=1e-6)] * 2


def test_the_threshold_decides_at_every_size_but_that_of_the_glass_protocol(pair: Pair) -> None:
    scorer = Scorer("per_image,glass", "training,own", LAYOUTS["trans10k"], 0.25)
    soft = np.zeros((48, 64), np.uint8)
    soft[:, :48] = 100
    truth = (soft > 0).astype(np.uint8)
    record = scorer.score(pair, np.repeat(soft[..., None], 3, axis=2), soft, truth, truth)
    assert [record[size].per_image.iou for size in ("training", "own")] == [1, 1]
    assert [record[size].glass.iou for size in ("training", "own")] == [0, 0]
    assert record["own"].glass.mae == pytest.approx(0.75 * (1 - 100 / 255))


@pytest.mark.parametrize(
    ("protocols", "sizes", "layout", "message"),
    [
        ("per_image,iou", "own", LAYOUTS["trans10k"], "protocol: 'iou' is none; there are: per_image, glass"),
        ("glass", "own,8", LAYOUTS["trans10k"], "score_sizes: '8' is not valid"),
        ("glass", "own,big", LAYOUTS["trans10k"], "score_sizes: 'big' is not valid"),
        ("", "own", LAYOUTS["trans10k"], "must each name at least one"),
        (
            "translab",
            "512",
            LAYOUTS["trans10k"],
            "translab tells things from stuff; train and score with dataset_name: ",
        ),
        ("translab", "512", LAYOUTS["trans10k_v2"], "translab tells things from stuff"),
        ("classes", "512", LAYOUTS["folder"], "classes needs a data set that tells classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(protocols: str, sizes: str, layout: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scorer(protocols, sizes, layout, 0.5)


def test_intervals_hold_the_mean(pair: Pair) -> None:
    scorer = Scorer("per_image", "training", layout_of("trans10k"), 0.5)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(20):
        soft, truth = rng.integers(0, 256, (8, 8), dtype=np.uint8), rng.integers(0, 2, (8, 8), dtype=np.uint8)
        raw = np.repeat(soft[..., None], 3, axis=2)
        scores.append(scorer.score(pair, raw, soft, (soft > 127).astype(np.uint8), truth)["training"].per_image)
    summary = summarise(scores)
    for column, (low, high) in intervals(scores).items():
        assert low < summary[column] < high


def test_a_training_on_classes_is_scored_by_their_protocols(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"dataset_name": "trans10k_classes", "max_train_steps": 2, "val_steps": 2, "save_checkpoint_steps": 2}
    flags |= {"protocol": "per_image,glass,translab,classes"}
    launch("trainer.py", flags)
    done = launch("val_inference.py", flags)
    (folder,) = (tmp_path / "run" / "mask_predictions").iterdir()
    metrics = json.loads((folder / "evaluation.json").read_text())
    assert set(metrics["protocols"]) == {"per_image", "glass", "translab", "classes"}
    for figures in metrics["protocols"].values():
        assert list(figures) == ["training", "512", "own"]
    assert list(metrics["protocols"]["classes"]["own"]["iou"]) == ["background", "things", "stuff"]
    assert metrics["threshold"] == {"value": 0.5, "chosen_on": "configuration"}
    assert "translab   512" in done.stdout
    name = "easy_0"
    classes = np.array(Image.open(folder / f"{name}_classes.png"))
    colours = np.array(Image.open(folder / f"{name}_maskq.png"))
    assert classes.shape == (RESOLUTION, RESOLUTION)
    assert np.array_equal(CLASSES.palette.paint(classes), colours)

    again = score_folder(folder)
    assert summarise(again) == json.loads((folder / "metrics.json").read_text())

    refused = launch("val_inference.py", {**flags, "dataset_name": "trans10k", "protocol": "per_image"}, check=2)
    assert "tells glass or not, the checkpoint was trained to tell background things stuff" in refused.stderr
    resumed = {**flags, "dataset_name": "trans10k", "resume_from_checkpoint": "latest", "max_train_steps": 4}
    assert (
        "was trained to tell other classes than the masks of dataset_name: trans10k"
        in launch("trainer.py", resumed, check=2).stderr
    )


@pytest.mark.slow
def test_a_checkpoint_keeps_the_classes_of_its_folder(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    colours = {"background": [0, 0, 0], "cup": [255, 0, 0], "window": [255, 255, 255]}
    palette = tmp_path / "palette.json"
    palette.write_text(json.dumps(colours))
    for split in ("train", "validation", "test"):
        write_pair(tmp_path / "data" / split, "1", 1)
        mask = np.array(Image.open(tmp_path / "data" / split / "masks" / "1_mask.png"))
        mask[:18, :, 1:] = 0  # the upper half is a cup
        Image.fromarray(mask).save(tmp_path / "data" / split / "masks" / "1_mask.png")
    flags |= {"dataset_name": "folder", "dataset_path": tmp_path / "data", "palette": palette, "train_batch_size": 1}
    flags |= {"max_train_steps": 1, "val_steps": "null", "save_checkpoint_steps": 1, "lr_warmup_steps": 0}
    launch("trainer.py", flags)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    palette.unlink()
    assert load_pipeline(checkpoint, torch.float32).palette.names == ("background", "cup", "window")
    scored = {**flags, "palette": checkpoint / "palette.json", "protocol": "classes"}
    launch("val_inference.py", scored)
    forgotten = launch("val_inference.py", {**scored, "palette": "null", "protocol": "glass"}, check=2)
    assert f"(--palette {checkpoint / 'palette.json'} for a folder)" in forgotten.stderr


def test_three_processes_score_as_one_does(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    flags |= {"max_train_steps": 2, "val_steps": "null", "save_checkpoint_steps": 2, "protocol": "per_image,glass"}
    launch("trainer.py", flags)
    (tmp_path / "three.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 3\n"
    )
    found = []
    for launcher in (None, str(tmp_path / "three.yaml")):
        launch("val_inference.py", flags, launcher)
        (folder,) = (tmp_path / "run" / "mask_predictions").iterdir()
        found.append(
            [
                (folder / name).read_text()
                for name in ("metrics.json", "evaluation.json", "curves.json", "per_image.csv")
            ]
        )
    assert found[0] == found[1]


def test_summaries_do_not_depend_on_the_order(pair: Pair) -> None:
    scorer = Scorer("per_image,glass,translab,classes", "training", CLASSES, 0.5)
    rng = np.random.default_rng(0)
    records = []
    for _ in range(5):
        classes, truth = rng.integers(0, 3, (2, 8, 8), dtype=np.uint8)
        soft = (classes > 0) * np.uint8(255)
        records.append(scorer.score(pair, np.repeat(soft[..., None], 3, axis=2), soft, classes, truth)["training"])
    for summarised, part in ((summarise_glass, "glass"), (summarise_translab, "translab")):
        parts = [getattr(record, part) for record in records]
        assert summarised(parts) == pytest.approx(summarised(parts[::-1]))
    matrices = [record.classes for record in records]
    names = CLASSES.palette.names
    assert summarise_classes(matrices, names) == summarise_classes(matrices[::-1], names)
