"""What the checkpoint decides at inference, and flags that contradict it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.prompt import EmptyPrompt
from tests.conftest import make_prompt
from utils.checkpoints import PROMPT_FILE_NAME, STATE_FILE_NAME, chosen_threshold, mark_best
from utils.config import Config
from utils.errors import InputError
from val_inference import check_flags, choose_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    make_prompt().save_file(folder / PROMPT_FILE_NAME)
    return folder


def test_flags_that_agree_or_are_absent_pass(checkpoint: Path) -> None:
    config = Config(objective="diffusion", prompt_embeds_path=str(checkpoint / PROMPT_FILE_NAME))
    check_flags(config, frozenset({"objective", "base_model_path", "prompt_embeds_path"}), config, checkpoint)
    # What only a file says is overruled by the checkpoint in silence.
    check_flags(Config(), frozenset(), config, checkpoint)


@pytest.mark.parametrize(("key", "value"), [("objective", "diffusion"), ("base_model_path", "elsewhere/base")])
def test_a_flag_that_contradicts_the_checkpoint_is_an_error(key: str, value: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=f"--{key} {value}: the checkpoint was trained"):
        check_flags(replace(Config(), **{key: value}), frozenset({key}), Config(), checkpoint)


def test_where_nothing_was_validated_a_file_that_asks_for_the_best_gets_the_latest(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path), load_checkpoint="best", threshold="validation")
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / STATE_FILE_NAME).write_text("{}")
    latest = choose_checkpoint(config, frozenset())
    assert latest.name == "checkpoint-10"
    assert chosen_threshold(config, latest) == 0.5
    with pytest.raises(InputError, match=r"best\.json names no checkpoint; use latest"):
        choose_checkpoint(config, frozenset({"load_checkpoint"}))
    mark_best(tmp_path, 2, 0.5, limit=2, threshold=0.25)
    best = choose_checkpoint(config, frozenset())
    assert best.name == "checkpoint-2"
    assert chosen_threshold(config, best) == 0.25
    with pytest.raises(InputError, match="chooses one for the best checkpoint alone, checkpoint-10 is not"):
        chosen_threshold(config, latest)


def test_another_prompt_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    other = make_prompt()
    EmptyPrompt.from_tensors(other.prompt_embeds + 1, torch.zeros(1, 16)).save_file(tmp_path / "other.safetensors")
    config = Config(prompt_embeds_path=str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="not the checkpoint's own prompt"):
        check_flags(config, frozenset({"prompt_embeds_path"}), Config(), checkpoint)
