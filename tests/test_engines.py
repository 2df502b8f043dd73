"""DeepSpeed on the CPU, and launches that came out otherwise than asked."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, Launch, arguments_of, environment
from utils import engine
from utils.checkpoints import list_checkpoints
from utils.history import read_history

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
DEEPSPEED = "configs/accelerate/deepspeed_cpu.yaml"


def zero_3(folder: Path) -> str:
    """Writes a launch file for ZeRO-3 with one process on the CPU."""
    settings = json.loads((ROOT / "ds_config.json").read_text())
    settings["zero_optimization"] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    launch_file = yaml.safe_load((ROOT / DEEPSPEED).read_text())
    launch_file["deepspeed_config"]["deepspeed_config_file"] = str(folder / "ds_zero3.json")
    (folder / "ds_zero3.json").write_text(json.dumps(settings))
    (folder / "zero3.yaml").write_text(yaml.safe_dump(launch_file))
    return str(folder / "zero3.yaml")


@needs_deepspeed
@pytest.mark.slow
def test_all_engines_give_the_same_losses_and_read_each_others_checkpoints(
    flags: dict[str, object], base: Path, launch: Launch, tmp_path: Path
) -> None:
    flags |= {"max_train_steps": 4, "save_checkpoint_steps": 4, "val_steps": 4}
    # A second module, called beside the transformer, and not by its forward alone.
    flags |= {"mask_decoder": "light", "mask_decoder_path": base / "lateral", "pixel_loss_weight": 0.5}
    launchers = {
        "plain": "configs/accelerate/cpu.yaml",
        "two processes": "configs/accelerate/cpu_2_processes.yaml",
        "zero 2": DEEPSPEED,
        "zero 3": zero_3(tmp_path),
    }
    losses, scores = {}, {}
    for name, launcher in launchers.items():
        share = {"train_batch_size": 1} if name == "two processes" else {}
        launch("trainer.py", {**flags, **share, "output_dir": tmp_path / name}, launcher)
        history = read_history(tmp_path / name / "history.csv")
        losses[name] = [float(row["loss"]) for row in history if row["loss"]]
        scores[name] = [float(row["val_mse"]) for row in history if row["val_mse"]]
    for name in launchers:
        assert len(losses[name]) == 4
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-3), name
        assert scores[name] == pytest.approx(scores["plain"], abs=1e-3), name
    # Every engine goes on from every other's checkpoint, and inference reads all of them.
    for name in launchers:
        for other, launcher in launchers.items():
            share = {"train_batch_size": 1} if other == "two processes" else {}
            copy = tmp_path / f"{name} to {other}"
            (copy / "checkpoints").mkdir(parents=True)
            shutil.copytree(tmp_path / name / "checkpoints" / "checkpoint-4", copy / "checkpoints" / "checkpoint-4")
            resumed = {**flags, **share, "output_dir": copy, "max_train_steps": 5, "resume_from_checkpoint": "latest"}
            done = launch("trainer.py", resumed, launcher)
            assert list_checkpoints(copy)[-1][0] == 5
            same_form = {name, other} <= {"plain", "two processes"} or name == other
            assert ("the optimiser starts fresh" in done.stdout) == (not same_form), f"{name} to {other}"
        launch("val_inference.py", {**flags, "output_dir": tmp_path / name})


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    """Both machines are this one: the launch file for two, with a CPU process each."""
    settings = yaml.safe_load((ROOT / "configs/accelerate/two_machines.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings |= {"num_processes": 2, "use_cpu": True, "main_process_port": free.getsockname()[1]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    flags |= {"max_train_steps": 4, "val_steps": 4, "save_checkpoint_steps": 4}
    launch("trainer.py", {**flags, "output_dir": tmp_path / "one"})
    both = {**flags, "output_dir": tmp_path / "two", "train_batch_size": 1}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, str(ROOT / "trainer.py"), *arguments_of(both)], env=environment()
        )
        for rank in ("0", "1")
    ]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    one, two = (
        [float(row["loss"]) for row in read_history(tmp_path / run / "history.csv") if row["loss"]]
        for run in ("one", "two")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-3)


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


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_zero_2_resumes_a_moving_average(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    flags |= {"max_train_steps": 4, "save_checkpoint_steps": 2, "val_steps": "null", "ema_decay": 0.9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch("trainer.py", {**flags, "output_dir": whole}, DEEPSPEED)
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", parts / "checkpoints" / "checkpoint-2")
    launch("trainer.py", {**flags, "output_dir": parts, "resume_from_checkpoint": "latest"}, DEEPSPEED)
    for name in ("average.safetensors", "raw_weights.safetensors"):
        left, right = (load_file(run / "checkpoints" / "checkpoint-4" / name) for run in (whole, parts))
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_saves_the_fp32_weights_behind_its_half_precision(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"data_type": "bf16", "max_train_steps": 3, "val_steps": "null"}
    launch("trainer.py", flags, "configs/accelerate/deepspeed_cpu.yaml")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    weights = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = {name: value for name, value in weights.items() if name.endswith(".weight")}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    rounded = [name for name, value in trained.items() if value.bfloat16().float().equal(value)]
    assert all(
        "added_q" in name or "add_q_proj" in name for name in rounded
    )  # of the last block, which asks nothing of the text
    launch("trainer.py", {**flags, "max_train_steps": 4, "resume_from_checkpoint": "latest"})


def test_fsdp_refuses_what_it_cannot_shard() -> None:
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from utils.config import Config
    from utils.engine import _check_support
    from utils.errors import InputError

    fsdp = SimpleNamespace(distributed_type=DistributedType.FSDP)
    for changes, message in (
        ({"mask_decoder": "light"}, "mask_decoder: light works with one process, DDP or DeepSpeed"),
        ({"ema_decay": 0.9}, "ema_decay: the average needs whole weights"),
        ({"trainable": "lora"}, "trainable: lora works with one process"),
        ({"weights": "bf16"}, "optimizer: adamw with weights: bf16 works with one process or DDP"),
    ):
        with pytest.raises(InputError, match=message):
            _check_support(Config(**changes), fsdp)
    _check_support(Config(), fsdp)


def test_processes_that_each_believe_to_be_alone_are_refused(
    flags: dict[str, object], launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.config import parse_config
    from utils.errors import InputError

    config, _ = parse_config([])

    class Alone:
        num_processes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine, "Accelerator", lambda **_: Alone())
    with pytest.raises(InputError, match="2 processes were launched but each sees 1"):
        engine.build_accelerator(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "the launch file's mixed_precision is fp16, data_type is fp32"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "the launch file's gradient_accumulation_steps is 4, the "),
    ],
)
def test_a_launch_file_that_disagrees_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.config import Config
    from utils.engine import build_accelerator
    from utils.errors import InputError

    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        build_accelerator(Config(data_type="fp32"))


def test_fp16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.config import Config
    from utils.engine import build_accelerator
    from utils.errors import InputError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="data_type: fp16 needs a GPU; use bf16 or fp32 on this machine"):
        build_accelerator(Config(data_type="fp16"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8, train_batch_size is 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, gradient_accumulation_steps is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, max_grad_norm is 1.0"),
        ({"train_batch_size": 64}, "train_batch_size is 64, train_batch_size times .* is 8; write auto"),
        ({"fp16": {"enabled": True}}, "fp16 is true, data_type is bf16"),
        ({"bf16": {"enabled": False}}, "bf16 is false, data_type is bf16"),
    ],
)
def test_a_deepspeed_file_that_disagrees_is_refused(settings: dict[str, object], message: str) -> None:
    from utils.config import Config
    from utils.engine import _check_engine_settings
    from utils.errors import InputError

    with pytest.raises(InputError, match=message):
        _check_engine_settings(Config(), settings)


def test_a_deepspeed_file_that_leaves_it_open_or_agrees_is_taken() -> None:
    from utils.config import Config
    from utils.engine import _check_engine_settings

    agreeing = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    for settings in ({}, {name: "auto" for name in agreeing if "16" not in name}, agreeing):
        _check_engine_settings(Config(), settings)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (2**40, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),
        (0, [(-3, 2**30), (-3, 2**25)]),  # trimming alone would make things worse
    ],
)
def test_freed_memory_is_kept_as_far_as_the_c_library_allows(
    largest: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return int(name == -1 or value <= largest)

    monkeypatch.setattr(engine.ctypes, "CDLL", lambda _: Library())
    engine.keep_freed_memory()
    assert calls == expected
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda _: object())  # another library
    engine.keep_freed_memory()
