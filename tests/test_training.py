"""The real trainer and inference, launched as a user launches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch


@pytest.mark.parametrize("objective", ["end_to_end", "diffusion"])
def test_train_infer(objective: str, flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    done = launch("trainer.py", {**flags, "objective": objective})
    print(done.stdout, done.stderr)
    done = launch("val_inference.py", {**flags})
    print(done.stdout, done.stderr)
