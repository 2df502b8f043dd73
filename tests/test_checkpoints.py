"""Checkpoints: found, rotated and cleaned up by name, written whole; optimiser states as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import PROMPT_FILE_NAME, load_transformer, widen_patch_projection
from tests.conftest import RESOLUTION, make_prompt, make_transformer
from utils import checkpoints
from utils.checkpoints import (
    BEST_FILE_NAME,
    COUNTS,
    OPTIMIZER_FILE_NAME,
    STATE_FILE_NAME,
    TrainingState,
    check_disk_space,
    clean_up,
    find_checkpoint,
    list_checkpoints,
    load_pipeline,
    mark_best,
    partial_folder,
    publish_checkpoint,
    read_best,
    read_config,
    read_state,
    same_base,
    set_aside_later,
    write_checkpoint,
)
from utils.config import Config
from utils.errors import InputError
from utils.tensors import gather_optimizer, load_optimizer, save_optimizer

KEY = "resume_from_checkpoint"


def state_of(step: int) -> TrainingState:
    return TrainingState(
        global_step=step, batches_seen=2 * step, global_batch_size=4, num_pairs=6, num_processes=1, engine="torch"
    )


def put(run: Path, name: str, complete: bool = True) -> Path:
    """Puts a checkpoint's folder into a run; one that is not complete lacks its state."""
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "optimizer.safetensors").touch()
    if complete:
        (folder / STATE_FILE_NAME).write_text("{}")
    return folder


def put_best(run: Path, name: str, iou: float = 0.5) -> None:
    content = {"checkpoint": name, "iou": iou, "global_step": 1}
    (run / "checkpoints" / BEST_FILE_NAME).write_text(json.dumps(content))


def publish(run: Path, step: int, limit: int | None = None, iou: float | None = None) -> Path:
    """Publishes a checkpoint and, given an IoU, marks it as the best."""
    put(run, f".partial-checkpoint-{step}")
    final = publish_checkpoint(run, step, limit)
    if iou is not None:
        mark_best(run, step, iou, limit)
    return final


def names(run: Path) -> list[str]:
    """Every entry of the checkpoints' folder."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def message_of(call: object, *arguments: object) -> str:
    """Returns the message of the InputError that a call ends with; it has one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_complete_checkpoints_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-20", "checkpoint-3"):
        put(tmp_path, name)
    for name in ("checkpoint-5000", ".partial-checkpoint-6000", ".trash-checkpoint-2"):
        put(tmp_path, name, complete=False)
    for name in ("checkpoint-7000-copy", "my-checkpoint-8000", ".partial-checkpoint-9000", "checkpoint-"):
        put(tmp_path, name)
    (tmp_path / "checkpoints" / "checkpoint-9999").touch()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 20, 1000]


def test_a_run_without_a_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "absent") == []
    assert read_best(tmp_path / "absent") is None
    clean_up(tmp_path / "absent")


def test_latest_is_the_highest_number_and_ignores_incomplete_folders(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10"):
        put(tmp_path, name)
    put(tmp_path, "checkpoint-11", complete=False)
    assert find_checkpoint(tmp_path, "latest", KEY).name == "checkpoint-10"


def test_a_checkpoint_is_found_by_its_name_and_by_its_path(tmp_path: Path) -> None:
    folder = put(tmp_path, "checkpoint-9")
    put(tmp_path, "checkpoint-10")
    assert find_checkpoint(tmp_path, "checkpoint-9", KEY) == folder
    assert find_checkpoint(tmp_path / "another_run", str(folder), KEY) == folder


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-11", "nonsense"])
def test_a_checkpoint_that_is_missing_or_incomplete_is_an_error_that_names_the_others(
    name: str, tmp_path: Path
) -> None:
    put(tmp_path, "checkpoint-9")
    put(tmp_path, "checkpoint-11", complete=False)
    message = message_of(find_checkpoint, tmp_path, name, KEY)
    assert message.startswith(f"{KEY}: no complete checkpoint {name!r} in {tmp_path / 'checkpoints'}")
    assert "(there: checkpoint-9)" in message


def test_latest_of_a_run_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-11", complete=False)
    message = message_of(find_checkpoint, tmp_path, "latest", "load_checkpoint")
    assert message.startswith(f"load_checkpoint: {tmp_path / 'checkpoints'} holds no complete checkpoint")


def test_best_is_what_best_json_names(tmp_path: Path) -> None:
    folder = put(tmp_path, "checkpoint-9")
    put(tmp_path, "checkpoint-10")
    put_best(tmp_path, "checkpoint-9", 0.25)
    assert find_checkpoint(tmp_path, "best", KEY) == folder
    assert read_best(tmp_path) == {"checkpoint": "checkpoint-9", "iou": 0.25, "global_step": 1, "threshold": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"checkpoint": "checkpoint-9"}',
        '{"checkpoint": "checkpoint-9", "iou": 0.5}',
        '{"checkpoint": "checkpoint-9", "global_step": 9}',
        '{"iou": 0.5, "global_step": 9}',
        '{"checkpoint": "checkpoint-9", "iou": "high", "global_step": 9}',
        '{"checkpoint": "checkpoint-9", "iou": 0.5, "global_step": "late"}',
        '{"checkpoint": 9, "iou": 0.5, "global_step": 9}',
        '{"checkpoint": "checkpoint-9", "iou": 0.5, "global_step": 9, "threshold": "low"}',
    ],
)
def test_a_missing_or_broken_best_json_names_no_checkpoint(content: str | None, tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-9")
    if content is not None:
        (tmp_path / "checkpoints" / BEST_FILE_NAME).write_text(content)
    assert read_best(tmp_path) is None
    assert "best.json names no checkpoint" in message_of(find_checkpoint, tmp_path, "best", KEY)


@pytest.mark.parametrize("complete", [True, False])
def test_a_best_json_that_names_a_missing_checkpoint_is_an_error(complete: bool, tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-9")
    if not complete:
        put(tmp_path, "checkpoint-8", complete=False)
    put_best(tmp_path, "checkpoint-8")
    assert read_best(tmp_path) is None
    assert "best.json names no checkpoint; use latest" in message_of(find_checkpoint, tmp_path, "best", KEY)


def test_publishing_renames_the_whole_checkpoint_into_place(tmp_path: Path) -> None:
    final = publish(tmp_path, 12)
    assert final == tmp_path / "checkpoints" / "checkpoint-12"
    assert names(tmp_path) == ["checkpoint-12"]
    assert (final / "optimizer.safetensors").is_file()


def test_publishing_again_replaces_the_checkpoint_of_that_step(tmp_path: Path) -> None:
    (publish(tmp_path, 12) / "old").touch()
    assert not (publish(tmp_path, 12) / "old").exists()
    assert names(tmp_path) == ["checkpoint-12"]


def test_rotation_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    publish(tmp_path, 8, limit=2)
    publish(tmp_path, 9, limit=2, iou=0.5)
    for step in (10, 11, 12):
        publish(tmp_path, step, limit=2)
    assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-11", "checkpoint-12", "checkpoint-9"]
    publish(tmp_path, 13, limit=2, iou=0.6)
    assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-12", "checkpoint-13"]
    best = read_best(tmp_path)
    assert best == {"checkpoint": "checkpoint-13", "iou": 0.6, "global_step": 13, "threshold": 0.5}


def test_without_a_limit_every_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        publish(tmp_path, step)
    assert len(list_checkpoints(tmp_path)) == 5


def test_publishing_does_not_mark_the_best_and_rotation_spares_the_best_that_is_marked(tmp_path: Path) -> None:
    publish(tmp_path, 1, limit=1)
    assert names(tmp_path) == ["checkpoint-1"]
    mark_best(tmp_path, 1, 0.5, limit=1)
    publish(tmp_path, 2, limit=1)
    publish(tmp_path, 3, limit=1)
    assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-1", "checkpoint-3"]  # until another is marked
    assert read_best(tmp_path) == {"checkpoint": "checkpoint-1", "iou": 0.5, "global_step": 1, "threshold": 0.5}


def test_marking_the_best_removes_the_former_best_that_is_none_of_the_newest(tmp_path: Path) -> None:
    publish(tmp_path, 1, iou=0.5)
    for step in (2, 3):
        publish(tmp_path, step, limit=2)
    mark_best(tmp_path, 2, 0.75, limit=2, threshold=0.25)
    assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "checkpoints" / BEST_FILE_NAME).read_text()) == {
        "checkpoint": "checkpoint-2",
        "iou": 0.75,
        "global_step": 2,
        "threshold": 0.25,
    }


def test_marking_the_best_without_a_limit_removes_nothing(tmp_path: Path) -> None:
    for step in range(1, 4):
        publish(tmp_path, step, iou=step / 10)
    assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert find_checkpoint(tmp_path, "best", KEY).name == "checkpoint-3"


def test_rotation_counts_every_checkpoint_in_the_order_of_numbers_and_touches_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-1", "abandoned-checkpoint-7", "mine"):
        put(tmp_path, name)
    put(tmp_path, "checkpoint-2", complete=False)
    publish(tmp_path, 101, limit=2)
    assert names(tmp_path) == ["abandoned-checkpoint-7", "checkpoint-100", "checkpoint-101", "checkpoint-2", "mine"]


# A run that resumes from an earlier checkpoint


def test_checkpoints_beyond_the_resumed_step_are_set_aside(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        publish(tmp_path, step, iou=0.9 if step == 6 else None)
    (tmp_path / "checkpoints" / "checkpoint-12" / "mark").touch()
    assert set_aside_later(tmp_path, 6) == ["abandoned-checkpoint-9", "abandoned-checkpoint-12"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 6]
    assert find_checkpoint(tmp_path, "latest", KEY).name == "checkpoint-6"
    assert find_checkpoint(tmp_path, "best", KEY).name == "checkpoint-6"  # of this history
    aside = find_checkpoint(tmp_path, "abandoned-checkpoint-12", KEY)
    assert aside == tmp_path / "checkpoints" / "abandoned-checkpoint-12"
    assert {file.name for file in aside.iterdir()} == {"optimizer.safetensors", STATE_FILE_NAME, "mark"}
    assert set_aside_later(tmp_path, 6) == []


def test_a_best_of_the_abandoned_future_is_forgotten(tmp_path: Path) -> None:
    publish(tmp_path, 3, iou=0.1)
    publish(tmp_path, 6, iou=0.9)
    set_aside_later(tmp_path, 3)
    assert names(tmp_path) == ["abandoned-checkpoint-6", "checkpoint-3"]
    publish(tmp_path, 6)  # the new history's
    assert read_best(tmp_path) is None


def test_setting_aside_again_replaces_what_was_set_aside_before(tmp_path: Path) -> None:
    for mark in ("old", "new"):
        publish(tmp_path, 3)
        (publish(tmp_path, 6) / mark).touch()
        assert set_aside_later(tmp_path, 3) == ["abandoned-checkpoint-6"]
    files = {file.name for file in (tmp_path / "checkpoints" / "abandoned-checkpoint-6").iterdir()}
    assert "new" in files
    assert "old" not in files
    assert names(tmp_path) == ["abandoned-checkpoint-6", "checkpoint-3"]


def test_a_run_without_checkpoints_has_none_to_set_aside(tmp_path: Path) -> None:
    assert set_aside_later(tmp_path, 0) == []


def test_one_base_may_be_written_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = Config(base_model_path=str(tmp_path / "base"))
    for same in ("base", "./base", "base/", "link", f"{tmp_path}/other/../base"):
        assert same_base(config, Config(base_model_path=same)), same
    for other in ("base2", "owner/base", str(tmp_path)):
        assert not same_base(config, Config(base_model_path=other)), other
    assert same_base(Config(base_model_path="owner/name"), Config(base_model_path="owner/name"))
    assert not same_base(Config(base_model_path="owner/name"), Config(base_model_path="owner/name2"))


def test_what_a_kill_left_is_cleaned_up_and_nothing_else(tmp_path: Path) -> None:
    for name in (".partial-checkpoint-5", ".trash-checkpoint-3", ".trash-abandoned-checkpoint-8"):
        put(tmp_path, name, complete=False)
    for name in ("checkpoint-4", "abandoned-checkpoint-9"):
        put(tmp_path, name)
    put_best(tmp_path, "checkpoint-4")
    clean_up(tmp_path)
    assert names(tmp_path) == ["abandoned-checkpoint-9", BEST_FILE_NAME, "checkpoint-4"]


class KilledError(BaseException):
    """Stands for a SIGKILL; nothing catches it."""


def operations_until_killed(
    killed_at: int, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, bool]:
    """Ends a call just before its file operation `killed_at`; returns how many it began and whether it was ended."""
    operations = 0

    def count_then(operation: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **keywords: object) -> object:
            nonlocal operations
            operations += 1
            if operations == killed_at:
                raise KilledError
            return operation(*arguments, **keywords)

        return counted

    with monkeypatch.context() as patched:
        for owner, name in (
            (Path, "replace"),
            (Path, "write_text"),
            (os, "unlink"),  # Path.unlink too
            (os, "rmdir"),
        ):
            patched.setattr(owner, name, count_then(getattr(owner, name)))
        try:
            call()
        except KilledError:
            return operations, True
    return operations, False


PUBLISH_OPERATIONS = 11  # of a checkpoint that replaces another and becomes the best in place of a third


@pytest.mark.parametrize("killed_at", range(1, PUBLISH_OPERATIONS + 2))
def test_a_kill_at_any_moment_of_publishing_leaves_only_complete_checkpoints(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1, iou=0.1)
    publish(tmp_path, 2)
    put(tmp_path, ".partial-checkpoint-2")

    def save() -> None:
        publish_checkpoint(tmp_path, 2, 1)
        mark_best(tmp_path, 2, 0.9, 1)

    operations, killed = operations_until_killed(killed_at, save, monkeypatch)
    assert (operations, killed) == (min(killed_at, PUBLISH_OPERATIONS), killed_at <= PUBLISH_OPERATIONS)
    clean_up(tmp_path)
    for _, path in list_checkpoints(tmp_path):
        assert {file.name for file in path.iterdir()} == {"optimizer.safetensors", STATE_FILE_NAME}
    assert find_checkpoint(tmp_path, "latest", KEY).name in ("checkpoint-1", "checkpoint-2")
    best = read_best(tmp_path)
    assert best is not None
    assert (best["checkpoint"], best["iou"], best["global_step"]) in (
        ("checkpoint-1", 0.1, 1),
        ("checkpoint-2", 0.9, 2),
    )
    assert not [name for name in names(tmp_path) if "-checkpoint-" in name]
    if not killed:
        assert names(tmp_path) == [BEST_FILE_NAME, "checkpoint-2"]


SET_ASIDE_OPERATIONS = 4  # best.json goes and three folders are renamed


@pytest.mark.parametrize("killed_at", range(1, SET_ASIDE_OPERATIONS + 2))
def test_a_kill_at_any_moment_of_setting_aside_leaves_no_best_of_the_abandoned_future(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        publish(tmp_path, step, iou=step / 10 if step < 4 else None)

    def resume() -> None:
        set_aside_later(tmp_path, 1)

    operations, killed = operations_until_killed(killed_at, resume, monkeypatch)
    assert (operations, killed) == (min(killed_at, SET_ASIDE_OPERATIONS), killed_at <= SET_ASIDE_OPERATIONS)
    clean_up(tmp_path)
    resume()
    assert names(tmp_path) == [*(f"abandoned-checkpoint-{step}" for step in (2, 3, 4)), "checkpoint-1"]
    publish(tmp_path, 3)  # the new history's
    assert read_best(tmp_path) is None


def test_a_full_disk_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4 * 12 * 10**9
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_disk_space(tmp_path, 10**9, 2, 100)  # two newest, the best and the one being written just fit
    message = message_of(check_disk_space, tmp_path, 10**9, 3, 100)
    assert message.startswith(f"{tmp_path}: 5 checkpoints of 12.0 GB need 60.0 GB, 48.0 GB are free")
    assert "checkpoints_total_limit" in message


def test_an_engines_larger_checkpoints_need_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 20 * 10**9))
    check_disk_space(tmp_path, 10**9, 2, 100, 20)
    message = message_of(check_disk_space, tmp_path, 1_010_000_000, 2, 100, 20)
    assert message.startswith(f"{tmp_path}: 4 checkpoints of 20.2 GB need 80.8 GB, 80.0 GB are free")


def test_a_short_run_needs_no_space_for_checkpoints_that_it_will_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 12 * 10**9))
    check_disk_space(tmp_path, 10**9, 50, 3)
    assert ": 5 checkpoints of 12.0 GB" in message_of(check_disk_space, tmp_path, 10**9, 50, 4)


def test_a_resumed_run_needs_space_for_what_its_folder_may_still_grow_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 12 * 10**9))
    for step in range(1, 3):
        put(tmp_path, f"checkpoint-{step}")
    check_disk_space(tmp_path, 10**9, 5, 1)
    assert ": 3 checkpoints of 12.0 GB" in message_of(check_disk_space, tmp_path, 10**9, 5, 2)
    check_disk_space(tmp_path, 10**9, 2, 100)


def test_without_a_limit_every_save_needs_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 12 * 10**9))
    for step in range(1, 10):  # none of these makes place
        put(tmp_path, f"checkpoint-{step}")
    check_disk_space(tmp_path, 10**9, None, 3)
    assert ": 5 checkpoints of 12.0 GB" in message_of(check_disk_space, tmp_path, 10**9, None, 4)


def test_checkpoints_on_the_disk_already_need_no_further_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 10):
        put(tmp_path, f"checkpoint-{step}")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=12 * 10**9))
    check_disk_space(tmp_path, 10**9, 3, 100)
    with pytest.raises(InputError, match=r"1 checkpoints of 12\.1 GB"):
        check_disk_space(tmp_path, 1_010_000_000, 3, 100)  # the one being written always needs its place


def trained(steps: int = 2, in_channels: int = 16) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    transformer = widen_patch_projection(make_transformer(), in_channels)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in transformer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return transformer, optimizer


def assert_same_state(
    transformer: torch.nn.Module, first: torch.optim.Optimizer, second: torch.optim.Optimizer
) -> None:
    for name, parameter in transformer.named_parameters():
        left, right = first.state[parameter], second.state[parameter]
        assert left.keys() == right.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for entry in left:
            assert left[entry].dtype == right[entry].dtype
            assert torch.equal(left[entry], right[entry]), f"{name}/{entry}"


def test_an_optimisers_state_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    transformer, optimizer = trained()
    save_optimizer(optimizer, transformer.named_parameters(), tmp_path / "optimizer.safetensors")
    fresh = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    load_optimizer(fresh, transformer.named_parameters(), tmp_path / "optimizer.safetensors")
    assert_same_state(transformer, optimizer, fresh)
    before = [parameter.detach().clone() for parameter in transformer.parameters()]
    optimizer.step()
    after = [parameter.detach().clone() for parameter in transformer.parameters()]
    with torch.no_grad():
        for parameter, value in zip(transformer.parameters(), before, strict=True):
            parameter.copy_(value)
    fresh.step()
    assert all(torch.equal(p, value) for p, value in zip(transformer.parameters(), after, strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_an_optimiser_that_never_stepped_has_an_empty_file(tmp_path: Path) -> None:
    transformer, optimizer = trained(steps=0)
    save_optimizer(optimizer, transformer.named_parameters(), tmp_path / "optimizer.safetensors")
    load_optimizer(optimizer, transformer.named_parameters(), tmp_path / "optimizer.safetensors")
    assert not optimizer.state


def test_an_optimisers_state_of_another_model_is_refused(tmp_path: Path) -> None:
    transformer, optimizer = trained()
    save_optimizer(optimizer, transformer.named_parameters(), tmp_path / "optimizer.safetensors")
    wider = widen_patch_projection(make_transformer(), 32)
    with pytest.raises(ValueError, match=r"pos_embed\.proj\.weight has shape \(16, 16, 2, 2\), not \(16, 32, 2, 2\)"):
        load_optimizer(torch.optim.AdamW(wider.parameters()), wider.named_parameters(), tmp_path / OPTIMIZER_FILE_NAME)
    tensors = load_file(tmp_path / OPTIMIZER_FILE_NAME)
    save_file({**tensors, "foreign.weight/exp_avg": torch.zeros(1)}, tmp_path / OPTIMIZER_FILE_NAME)
    with pytest.raises(ValueError, match=r"foreign\.weight, which the model does not have"):
        load_optimizer(optimizer, transformer.named_parameters(), tmp_path / OPTIMIZER_FILE_NAME)


@pytest.mark.parametrize("threshold", ["NaN", "7", "-1", "1e999"])
def test_a_best_threshold_that_is_none_is_named(threshold: str, tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-3")
    best = tmp_path / "checkpoints" / "best.json"
    best.write_text(f'{{"checkpoint": "checkpoint-3", "iou": 0.5, "global_step": 3, "threshold": {threshold}}}')
    assert "best.json: threshold" in message_of(read_best, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"checkpoint": [], "iou": 1, "global_step": 1}',
        '{"checkpoint": "a", "iou": 1, "global_step": 1e999}',
        "[" * 100_000,
    ],
)
def test_a_best_file_that_is_none_names_nothing(content: str, tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-3")
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    assert read_best(tmp_path) is None


def test_a_state_without_numbers_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path, "checkpoint-3")
    state = dict.fromkeys(COUNTS, 1) | {"engine": "single"}
    for change in ({"global_step": "x"}, {"num_pairs": None}):
        (folder / "training_state.json").write_text(json.dumps(state | change))
        assert "must be whole numbers" in message_of(read_state, folder)


def write_run(run: Path, base: Path, objective: str = "end_to_end", step: int = 3) -> Path:
    """Writes a run with one real checkpoint and returns it."""
    transformer, optimizer = trained(in_channels=16 if objective == "end_to_end" else 32)
    config = Config(
        base_model_path=str(base),
        output_dir=str(run),
        objective=objective,
        resolution=RESOLUTION,
        threshold=0.4,
        denoise_steps=2,
        ensemble_size=3,
        logit_mean=0.5,
    )
    partial = partial_folder(run, step)
    partial.mkdir(parents=True)
    state_dict = transformer.state_dict()
    optimizer_state = gather_optimizer(optimizer, transformer.named_parameters())
    write_checkpoint(partial, state_of(step), config, transformer, state_dict, make_prompt(), optimizer_state)
    return publish_checkpoint(run, step, limit=2)


@pytest.mark.parametrize("objective", ["end_to_end", "diffusion"])
def test_a_checkpoint_holds_weights_optimiser_prompt_configuration_and_state(
    objective: str, base: Path, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", base, objective)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
        PROMPT_FILE_NAME,
        "config.yaml",
        STATE_FILE_NAME,
    }
    assert read_state(folder) == state_of(3)
    assert read_config(folder).objective == objective
    assert read_config(folder).logit_mean == 0.5
    expected, optimizer = trained(in_channels=16 if objective == "end_to_end" else 32)
    loaded = load_transformer(folder)
    assert loaded.config.in_channels == expected.config.in_channels
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.state_dict().items())
    fresh = torch.optim.AdamW(expected.parameters())
    load_optimizer(fresh, expected.named_parameters(), folder / OPTIMIZER_FILE_NAME)
    assert_same_state(expected, optimizer, fresh)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"global_step": 1, "unknown": 2}'])
def test_an_unreadable_state_names_its_file(content: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE_NAME).write_text(content)
    message = message_of(read_state, tmp_path)
    assert message.startswith(f"{tmp_path / STATE_FILE_NAME}: cannot be read")


def test_a_checkpoint_without_its_base_or_prompt_is_told(base: Path, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", base)
    (checkpoint / PROMPT_FILE_NAME).unlink()
    assert f"{checkpoint / PROMPT_FILE_NAME}: no such prompt file" in message_of(
        load_pipeline, checkpoint, torch.float32
    )
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(config.replace(str(base), str(tmp_path / "gone")))
    assert f"{tmp_path / 'gone'}: no such folder" in message_of(load_pipeline, checkpoint, torch.float32)
