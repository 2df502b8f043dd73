"""The tiny base on real Trans10k pairs, where these lie beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Launch

SAMPLE = ROOT.parent / "shared" / "trans10k_sample"
BASE = ROOT / "assets" / "tiny_sd3"


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir() or not (BASE / "vae").is_dir(), reason="the real pairs are not there")
def test_the_tiny_base_fits_eight_real_pairs(launch: Launch, tmp_path: Path) -> None:
    # The same eight pairs for training and scoring; the real test split is only predicted.
    data = tmp_path / "data"
    (data / "test" / "hard" / "images").mkdir(parents=True)
    (data / "test" / "hard" / "masks").mkdir()
    (data / "train").symlink_to(SAMPLE / "train")
    (data / "test" / "easy").symlink_to(SAMPLE / "train")
    flags: dict[str, object] = {
        "config": ROOT / "configs" / "tiny.yaml",
        "base_model_path": BASE,
        "dataset_path": data,
        "output_dir": tmp_path / "run",
        "resolution": 256,
        "augmentation": "false",
        "cutmix": 0,
        "tta": "none",
        "train_batch_size": 8,
        "max_train_steps": 200,
        "lr_warmup_steps": 20,
        "val_steps": "null",
        "test_batch_size": 4,
    }
    launch("trainer.py", flags, "configs/accelerate/cpu.yaml", timeout=900, threads=2)
    launch("val_inference.py", {**flags, "test_difficulty": "easy"}, timeout=300, threads=2)
    metrics = json.loads((tmp_path / "run" / "mask_predictions" / "test_easy_200" / "metrics.json").read_text())
    print(metrics)
    assert metrics["num_images"] == 8
    assert metrics["iou"] >= 0.9
    done = launch(
        "val_inference.py", {**flags, "dataset_path": SAMPLE, "test_difficulty": "mix"}, timeout=300, threads=2
    )
    assert "mix" in done.stdout
    assert (tmp_path / "run" / "mask_predictions" / "test_mix_200" / "metrics.json").is_file()
