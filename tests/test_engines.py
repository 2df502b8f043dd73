"""DeepSpeed on the CPU, and launches that came out otherwise than asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.conftest import Launch
from utils.checkpoints import list_checkpoints
from utils.history import read_history

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
DEEPSPEED = "configs/accelerate/deepspeed_cpu.yaml"


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_zero_2_runs_both_scripts_and_resumes(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"max_train_steps": 4, "save_checkpoint_steps": 2, "gradient_accumulation_steps": 2}
    plain, engine = tmp_path / "plain", tmp_path / "engine"
    launch("trainer.py", {**flags, "output_dir": plain}, "configs/accelerate/cpu.yaml")
    launch("trainer.py", {**flags, "output_dir": engine}, DEEPSPEED)
    first, second = (read_history(run / "history.csv") for run in (plain, engine))
    for column in ("loss", "grad_norm", "lr"):
        values = [[float(row[column]) for row in rows if row[column]] for rows in (first, second)]
        assert len(values[0]) == 4
        assert values[0] == pytest.approx(values[1], rel=1e-3), column
    launch("val_inference.py", {**flags, "output_dir": engine}, DEEPSPEED)
    metrics = json.loads((engine / "mask_predictions" / "test_mix_4" / "metrics.json").read_text())
    assert metrics["num_images"] == 10
    resumed = {**flags, "output_dir": engine, "max_train_steps": 6, "resume_from_checkpoint": "latest"}
    launch("trainer.py", resumed, DEEPSPEED)
    assert list_checkpoints(engine)[-1][0] == 6
    # Another engine reads the weights and the position, and says that the optimiser starts fresh.
    done = launch("trainer.py", {**resumed, "max_train_steps": 8})
    assert "the optimiser starts fresh" in done.stdout
    assert list_checkpoints(engine)[-1][0] == 8


def test_processes_that_each_believe_to_be_alone_are_refused(
    flags: dict[str, object], launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils import engine
    from utils.config import parse_config
    from utils.errors import InputError

    config, _ = parse_config([])

    class Alone:
        num_processes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine, "Accelerator", lambda **_: Alone())
    with pytest.raises(InputError, match="2 processes were launched but each sees 1"):
        engine.build_accelerator(config)
