"""The real trainer and inference, launched as a user launches them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import Launch
from utils.checkpoints import list_checkpoints
from utils.history import read_history

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def names_of(run: Path) -> list[str]:
    return [path.name for _, path in list_checkpoints(run)]


def assert_same_checkpoint(first: Path, second: Path) -> None:
    for file in (WEIGHTS, "optimizer.safetensors"):
        left, right = load_file(first / file), load_file(second / file)
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].equal(right[name]), f"{file}: {name}"


@pytest.mark.parametrize("objective", ["end_to_end", "diffusion"])
def test_six_steps_equal_three_and_resume_and_three_bit_for_bit(
    objective: str, flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    # Six updates of two batches each over three batches an epoch: resuming falls amid an epoch and crosses epochs' ends.
    flags |= {"objective": objective, "gradient_accumulation_steps": 2, "val_steps": 3}
    launch("trainer.py", flags)
    whole, parts = tmp_path / "run", tmp_path / "parts"
    # The first half runs on the whole's schedule, and is then carried alone into another run's folder.
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", parts / "checkpoints" / "checkpoint-3")
    launch("trainer.py", {**flags, "output_dir": parts, "resume_from_checkpoint": "latest"})
    assert_same_checkpoint(whole / "checkpoints" / "checkpoint-6", parts / "checkpoints" / "checkpoint-6")

    history = {int(row["step"]): row["loss"] for row in read_history(whole / "history.csv") if row["loss"]}
    resumed = {int(row["step"]): row["loss"] for row in read_history(parts / "history.csv") if row["loss"]}
    assert set(history) == {1, 2, 3, 4, 5, 6}
    assert resumed == {step: loss for step, loss in history.items() if step > 3}

    infer = {**flags, "load_checkpoint": "latest"}
    del infer["objective"]
    done = launch("val_inference.py", infer)
    folder = whole / "mask_predictions" / "test_mix_6"
    kinds = ["img", "maskgt", "maskq", "pred"] + (["uncertainty"] if objective == "diffusion" else [])
    expected = {f"{difficulty}_{n}_{kind}.png" for difficulty in ("easy", "hard") for n in range(5) for kind in kinds}
    assert {path.name for path in folder.glob("*.png")} == expected
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_images"] == 10
    assert metrics["easy"]["num_images"] == metrics["hard"]["num_images"] == 5
    assert all(0 <= metrics[name] <= 1 for name in ("iou", "recall", "mse"))
    with (folder / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "difficulty", "iou", "recall", "mse", "boundary_iou"]
    assert sum(float(row["iou"]) for row in rows) / 10 == pytest.approx(metrics["iou"], abs=1e-6)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("mix", "easy", "hard"))] == [
        "mix",
        "easy",
        "hard",
    ]


def test_resolved_config_reproduces_the_run(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    launch("trainer.py", {**flags, "max_train_steps": 3})
    resolved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(resolved.read_text())["training"]["max_train_steps"] == 3
    launch("trainer.py", {"config": resolved, "output_dir": tmp_path / "again"})
    assert_same_checkpoint(
        tmp_path / "run" / "checkpoints" / "checkpoint-3", tmp_path / "again" / "checkpoints" / "checkpoint-3"
    )
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["seed"] == 42
    assert provenance["versions"]["torch"]


def test_two_processes_equal_one(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    one = {**flags, "train_batch_size": 4, "output_dir": tmp_path / "one", "max_train_steps": 3}
    two = {**flags, "train_batch_size": 2, "output_dir": tmp_path / "two", "max_train_steps": 3}
    launch("trainer.py", one, "configs/accelerate/cpu.yaml")
    launch("trainer.py", two, "configs/accelerate/cpu_2_processes.yaml")
    first, second = (read_history(tmp_path / name / "history.csv") for name in ("one", "two"))
    for column in ("loss", "grad_norm", "lr"):
        left = [float(row[column]) for row in first if row[column]]
        right = [float(row[column]) for row in second if row[column]]
        assert len(left) == 3
        assert left == pytest.approx(right, rel=1e-4)
    # The same checkpoint, scored by one and by two processes: ten pictures in batches of three.
    launch("val_inference.py", one, "configs/accelerate/cpu.yaml")
    folder = tmp_path / "one" / "mask_predictions" / "test_mix_3"
    alone = (folder / "metrics.json").read_text(), (folder / "per_image.csv").read_text()
    launch("val_inference.py", one, "configs/accelerate/cpu_2_processes.yaml")
    assert alone == ((folder / "metrics.json").read_text(), (folder / "per_image.csv").read_text())


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch("trainer.py", {**flags, "max_train_steps": 3})
    broken = {"resume_from_checkpoint": "latest", "lr": 1e30, "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    done = launch("trainer.py", {**flags, **broken, "max_train_steps": 9, "max_grad_norm": "null"}, check=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "was not finite at update" in errors[0]
    assert "Pictures since the last check" in errors[0]
    assert "Traceback" not in done.stderr
    assert names_of(run) == ["checkpoint-3"]
    done = launch("trainer.py", {**flags, "max_train_steps": 4}, check=2)
    assert "holds checkpoint-3 of an earlier run" in done.stderr


def test_validation_names_the_best_checkpoint_and_keeps_it(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # A rate of next to nothing: the first validation stays the best, ties do not replace it.
    launch(
        "trainer.py",
        {**flags, "lr": 1e-30, "val_steps": 2, "save_checkpoint_steps": 1, "checkpoints_total_limit": 1},
    )
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "checkpoint-2"
    assert names_of(run) == ["checkpoint-2", "checkpoint-6"]
    scores = {int(row["step"]): float(row["val_iou"]) for row in read_history(run / "history.csv") if row["val_iou"]}
    assert set(scores) == {2, 4, 6}
    assert best["iou"] == pytest.approx(scores[2], abs=1e-6)
