"""The dry run: what it prints of a good run, that it names all that is wrong at once, and that it leaves no trace."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from dataset.trans10k import Pair, Scan
from tests.conftest import ROOT, arguments_of, environment, make_prompt
from utils import dry_run as dry_run_module
from utils import outline, rehearsal
from utils.checkpoints import STATE_FILE_NAME
from utils.config import Config, convert, parse_config
from utils.dry_run import dry_run
from utils.errors import InputError
from utils.outline import outline_of
from utils.rehearsal import Measured

Report = tuple[int, dict[str, list[str]]]
Run = Callable[..., Report]


@pytest.fixture
def run(flags: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a dry run that neither counts nor measures, for two seconds an update; returns its exit code and its lines by name."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    parts = {"weights": 9e9, "passes": 1e9, "VAE": 0.0}
    monkeypatch.setattr(dry_run_module, "memory_parts", lambda *arguments: parts)
    monkeypatch.setattr(dry_run_module, "measure", lambda config, train, make_trainer: Measured(2.0, 5, 1.5))

    def report(**changes: Any) -> Report:
        values = {
            name: convert(name, str(value), name)
            for name, value in {
                **flags,
                "epochs": "null",
                "lr_warmup_epochs": "null",
                "save_checkpoint_epochs": "null",
                **changes,
            }.items()
        }
        code = dry_run(replace(Config(), **values), object)
        lines: dict[str, list[str]] = {}
        name = ""
        for line in capsys.readouterr().out.splitlines():
            name = line[:14].strip() or name
            lines.setdefault(name, []).append(line[14:])
        return code, lines

    return report


def test_the_report_of_a_good_run(run: Run, tmp_path: Path) -> None:
    code, report = run(gradient_accumulation_steps=2, scale_lr="true", latent_cache="disk")
    assert code == 0
    assert report["wrong"] == ["nothing"]
    assert report["data"] == ["train: 6 pairs", "validation: 6 pairs (3 easy, 3 hard)"]
    assert report["batch"] == ["effective batch 4 = 2 per process x 2 accumulated x 1 process"]
    assert report["length"] == ["6 updates, 2 an epoch, 3 epochs"]
    assert report["rate"][0].startswith(
        "peak 0.004 = 0.001 x 4 (scale_lr); linear warm-up over 2 updates to 0.004, then 3.5 cosine"
    )
    assert "every 3 updates, 2 in all; the newest 2 and the best are kept" in report["checkpoints"][0]
    assert report["memory"][0] == "10.0 GB per process, computed: weights 9.0 GB, passes 1.0 GB"
    assert report["time"][0] == "2 s an update (median of 5), 2 pictures/s: 12 s for 6 updates"
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_wrong_is_named_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "peft") else find(name))
    code, report = run(
        dataset_path=tmp_path / "nowhere",
        tracker="wandb",
        trainable="lora",
        fold_conditioning="true",
        cutmix=0.5,
        train_batch_size=1,
        resolution=256,
    )
    assert code == 2
    wrong = report["wrong"]
    for part in (
        "no such data set folder",
        "tracker: wandb is not installed",
        "peft is not installed",
        "trainable: lora keeps",
        "cutmix takes parts",
        "resolution: 256 does not fit",
    ):
        assert sum(part in line for line in wrong) == 1, part
    assert len(wrong) == 6
    assert report["plan"] == ["unknown without the training pairs"]
    assert report["time"][0].startswith("not measured, something is wrong")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_path": "./missing"}, "no such folder"),
        ({"base_model_path": "nobody/nothing"}, "no such folder, and the hub did not give it"),
        ({"prompt_embeds_path": "missing.safetensors"}, "no such prompt file"),
        ({"data_type": "fp16"}, "fp16 needs a GPU"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
        ({"dataset_name": "folder"}, "no such folder"),
        ({"mask_decoder": "light", "pixel_loss_weight": 1, "mask_decoder_path": "missing"}, "missing/config.json"),
        ({"palette": "missing.json"}, "palette"),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, object], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, report = run(**changes)
    assert code == 2
    assert any(message in line for line in report["wrong"]), report["wrong"]


def test_an_occupied_folder_is_wrong(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "checkpoint-3" / STATE_FILE_NAME).write_text("{}")
    code, report = run()
    assert code == 2
    assert any("holds checkpoint-3 of an earlier run" in line for line in report["wrong"])


def test_a_disk_that_is_too_small_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, report = run(latent_cache="disk")
    assert code == 2
    assert any("checkpoints of" in line for line in report["wrong"])
    assert any(line.startswith("latent_cache: needs") for line in report["wrong"])


def test_a_base_that_is_not_here_is_estimated_by_the_published_figures(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, report = run(base_model_path="nobody/nothing", resolution=1024)
    assert report["model"] == [
        "not here; what follows is that of the published SD3.5 medium",
        "2,243.2 M of 2,243.2 M parameters are trained",
    ]
    assert report["memory"][0] == "10.0 GB per process, computed: weights 9.0 GB, passes 1.0 GB"


def test_a_process_that_does_not_print_leaves_with_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tracker="none", dataset_path="missing") == (0, {})


def test_an_outline_needs_no_weights(base: Path) -> None:
    found = outline_of(str(base))
    assert found.folder == base
    assert found.transformer["num_layers"] == 2
    assert found.vae["latent_channels"] == 16


def test_an_outline_of_the_hub_asks_for_its_configurations_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, file: str, **settings: object) -> str:
        asked.append(file)
        return str(base / file)

    def snapshot(name: str, local_files_only: bool) -> str:
        assert local_files_only
        return str(base)

    monkeypatch.setattr(outline, "hf_hub_download", download)
    monkeypatch.setattr(outline, "snapshot_download", snapshot)
    found = outline_of("somebody/something")
    assert asked == ["transformer/config.json", "vae/config.json"]
    assert found.folder == base
    monkeypatch.setattr(outline, "snapshot_download", lambda name, local_files_only: str(base / "vae"))
    assert outline_of("somebody/something").folder is None


def test_a_broken_configuration_is_named(base: Path, tmp_path: Path) -> None:
    for part in ("transformer", "vae", "scheduler"):
        (tmp_path / part).mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"transformer/config\.json: cannot be read"):
        outline_of(str(tmp_path))


def test_a_base_without_a_prompt_and_encoders_is_wrong(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for part in ("transformer", "vae", "scheduler"):
        (bare / part).symlink_to(base / part)
    code, report = run(base_model_path=bare)
    assert code == 2
    assert any("text_encoder" in line and "missing" in line for line in report["wrong"])
    cached = tmp_path / "cached.safetensors"
    monkeypatch.setattr(dry_run_module, "prompt_cache_path", lambda folder: cached)
    make_prompt().save_file(cached)
    assert run(base_model_path=bare)[0] == 0
    make_prompt().save_file(tmp_path / "prompt.safetensors")
    assert run(base_model_path=bare, prompt_embeds_path=tmp_path / "prompt.safetensors")[0] == 0


def test_the_flag_is_no_key_and_help_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    switches = {"dry_run": "leaves nothing behind"}
    assert parse_config(["--dry-run", "--lr", "1e-3"], "", switches)[1] == {"dry_run", "lr"}
    assert parse_config([], "", switches)[1] == frozenset()
    with pytest.raises(InputError, match=r"unknown flag --dry_run"):
        parse_config(["--dry_run"])
    with pytest.raises(InputError, match=r"did you mean --dry_run\?"):
        parse_config(["--dry_runn"], "", switches)
    with pytest.raises(SystemExit):
        parse_config(["--help"], "", switches)
    assert "leaves nothing behind" in capsys.readouterr().out


def test_a_real_dry_run_measures_and_leaves_no_trace(flags: dict[str, object], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "trainer.py"), "--dry_run", *arguments_of({**flags, "latent_cache": "disk"})]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "s an update (median of 5)" in done.stdout
    assert "computed: weights" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["wrong", "nothing"]
    assert list(tmp_path.iterdir()) == []


class FakeTrainer:
    """Yields rows for as many updates as the plan has."""

    def __init__(
        self, config: Config, accelerator: Any, train: Scan, validation: None, stop: Any, make_plan: Any
    ) -> None:
        assert not Path(config.output_dir).samefile(Path.cwd())
        assert (config.val_steps, config.tracker, len(train.pairs)) == (None, "none", 8)
        self.updates = config.max_train_steps or 0
        self.monitor = SimpleNamespace(close=lambda: None)

    def rehearse(self) -> Iterator[dict[str, float]]:
        for number in range(self.updates):
            yield {"memory_gb": float(number)}


@pytest.mark.parametrize(("patience", "timed", "memory"), [(60.0, 5, 6.0), (-1.0, 1, 0.0)])
def test_measuring_ends_after_a_few_updates_or_a_minute(
    patience: float, timed: int, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(rehearsal, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(rehearsal, "StopRequests", lambda: SimpleNamespace(share=lambda: None))
    pairs = [Pair(str(number), "", Path("a"), Path("b")) for number in range(20)]
    config = replace(Config(), data_type="fp32", output_dir="runs/mine", tracker="wandb")
    measured = rehearsal.measure(config, Scan("train", pairs), FakeTrainer)
    assert (measured.updates, measured.memory_gb) == (timed, memory)
    AcceleratorState._reset_state(reset_partial_state=True)
