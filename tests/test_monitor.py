"""The monitor and its history: what is recorded, when a bad loss is noticed, what a resume cuts off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from utils import monitor as monitor_module
from utils.errors import EXIT_FAILED, TrainingDivergedError
from utils.history import COLUMNS, History, read_history
from utils.monitor import MAX_NAMES_IN_MESSAGE, TrainingMonitor

HEADER = ",".join(COLUMNS) + "\r\n"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


MakeMonitor = Callable[..., TrainingMonitor]


@pytest.fixture
def make_monitor(accelerator: Accelerator, tmp_path: Path) -> Iterator[MakeMonitor]:
    made = []

    def make(start: int = 0, total: int = 20, log_steps: int = 4) -> TrainingMonitor:
        made.append(TrainingMonitor(accelerator, str(tmp_path), start, total, 2, log_steps))
        return made[-1]

    yield make
    for monitor in made:
        monitor.bar.close()


def update(monitor: TrainingMonitor, step: int, *losses: float, names: tuple[str, ...] = ()) -> None:
    """Records an update of one batch per loss."""
    for loss in losses:
        monitor.record_batch(step, {"loss": torch.tensor([loss, loss])}, names or (f"{step}_a", f"{step}_b"))
    monitor.finish_update(step, step / 10, 1e-3, torch.tensor(0.5), len(losses))


def rows(tmp_path: Path) -> list[dict[str, str]]:
    return read_history(tmp_path / "history.csv")


def test_a_row_is_written_every_log_steps_and_at_the_end(make_monitor: MakeMonitor, tmp_path: Path) -> None:
    monitor = make_monitor(total=10, log_steps=4)
    for step in range(1, 11):
        update(monitor, step, float(step))
    assert [row["step"] for row in rows(tmp_path)] == ["4", "8", "10"]
    assert [float(row["loss"]) for row in rows(tmp_path)] == [4, 8, 10]
    assert rows(tmp_path)[0]["lr"] == "0.001"
    assert float(rows(tmp_path)[0]["grad_norm"]) == 0.5
    assert float(rows(tmp_path)[0]["epoch"]) == 0.4
    assert float(rows(tmp_path)[0]["samples_per_second"]) > 0


def test_the_loss_of_an_update_is_the_mean_over_its_batches(make_monitor: MakeMonitor, tmp_path: Path) -> None:
    monitor = make_monitor(log_steps=1)
    monitor.record_batch(1, {"loss": torch.tensor([1.0, 2.0, 6.0])}, "abc")
    monitor.record_batch(1, {"loss": torch.tensor([5.0, 5.0, 5.0])}, "def")
    monitor.finish_update(1, 0.1, 1e-3, None, 2)
    update(monitor, 2, 7.0)
    assert [float(row["loss"]) for row in rows(tmp_path)] == [4, 7]
    assert rows(tmp_path)[0]["grad_norm"] == "nan"


def test_a_validation_has_a_row_of_its_own(make_monitor: MakeMonitor, tmp_path: Path) -> None:
    monitor = make_monitor()
    monitor.record_validation(3, 0.5, {"iou": 0.25, "recall": 0.5, "mse": 0.125, "num_images": 7})
    (row,) = rows(tmp_path)
    assert (row["step"], row["val_iou"], row["val_recall"], row["val_mse"]) == ("3", "0.25", "0.5", "0.125")
    assert row["loss"] == ""


def test_a_row_holds_the_memory_of_its_process(
    make_monitor: MakeMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter((2_500_000, 4_000_000))  # KiB, as Linux counts
    monkeypatch.setattr(monitor_module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=next(peaks)))
    monitor = make_monitor(log_steps=1)
    update(monitor, 1, 1.0)
    monitor.record_validation(1, 0.5, {"iou": 0.25, "recall": 0.5, "mse": 0.125, "num_images": 7})
    assert [row["memory_gb"] for row in rows(tmp_path)] == ["2.56", "4.096"]
    assert monitor.row["memory_gb"] == 2.56


def test_a_gpus_peak_is_counted_anew_after_every_row(
    make_monitor: MakeMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = make_monitor(log_steps=1)
    resets: list[object] = []
    accelerator = SimpleNamespace(device=torch.device("cuda"), gather=lambda values: values)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1.5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(monitor_module.torch, "tensor", lambda values, device: np.array(values))
    monkeypatch.setattr(monitor, "accelerator", accelerator)
    assert monitor._peak_memory_gb() == 1.5
    assert resets == [torch.device("cuda")]


def test_a_rehearsal_writes_nothing_and_keeps_its_row(accelerator: Accelerator, tmp_path: Path) -> None:
    monitor = TrainingMonitor(accelerator, None, 0, 2, 2, 1)
    update(monitor, 1, 3.0)
    monitor.bar.close()
    assert monitor.row["loss"] == 3
    assert list(tmp_path.iterdir()) == []


class FakePanel:
    """Fails to be written."""

    def draw(self, title: str) -> str:
        return title

    def save(self, picture: object, path: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_panel_that_cannot_be_written_does_not_end_the_training(
    make_monitor: MakeMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = make_monitor()
    said: list[str] = []
    monkeypatch.setattr(monitor, "say", said.append)
    monitor.record_validation(3, 0.5, {"iou": 0.25, "recall": 0.5, "mse": 0.125, "num_images": 7}, FakePanel())  # type: ignore[arg-type]
    assert any("panel of update 3 could not be written" in line for line in said)
    assert [row["step"] for row in rows(tmp_path)] == ["3"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_loss_is_noticed_at_the_next_check_and_no_earlier(
    value: float, make_monitor: MakeMonitor, tmp_path: Path
) -> None:
    monitor = make_monitor(log_steps=4)
    for step in range(1, 5):
        update(monitor, step, 1.0)
    update(monitor, 5, 1.0, names=("before",))
    update(monitor, 6, 1.0, value, names=("culprit",))
    update(monitor, 7, 1.0, names=("after",))
    with pytest.raises(TrainingDivergedError) as caught:
        update(monitor, 8, 1.0, names=("last",))
    message = str(caught.value)
    assert "not finite at update 6 (noticed at 8)" in message
    assert "since the last check, that update's first: culprit, before, after, last." in message
    assert "4_a" not in message  # checked before
    assert "lower lr" in message
    assert "resume_from_checkpoint: latest" in message
    assert caught.value.exit_code == EXIT_FAILED
    assert [row["step"] for row in rows(tmp_path)] == ["4"]


def test_the_first_of_several_bad_updates_is_named(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor(log_steps=10)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, float("inf"))):
        update(monitor, step, loss)
    with pytest.raises(TrainingDivergedError, match="at update 2 "):
        monitor.check_finite(3)


def test_a_save_between_two_rows_checks_too(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor(log_steps=10)
    update(monitor, 1, 1.0)
    monitor.check_finite(1)
    update(monitor, 2, float("nan"), names=("culprit",))
    with pytest.raises(TrainingDivergedError, match=r"at update 2 \(noticed at 2\).*first: culprit\."):
        monitor.check_finite(2)


def test_the_files_of_the_first_bad_update_survive_the_cut(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor(log_steps=10)
    update(monitor, 1, 1.0, names=tuple(f"early{number}" for number in range(MAX_NAMES_IN_MESSAGE)))
    update(monitor, 2, 1.0, float("nan"), names=("culprit", "companion"))
    update(monitor, 3, float("nan"), names=("later",))
    with pytest.raises(TrainingDivergedError) as caught:
        monitor.check_finite(3)
    assert "first: culprit, companion, early0, early1," in str(caught.value)
    assert "and 3 more." in str(caught.value)
    assert "later" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_gradient_norm_is_noticed_though_the_loss_is_finite(value: float, make_monitor: MakeMonitor) -> None:
    monitor = make_monitor(log_steps=10)
    for step in (1, 2, 3):
        monitor.record_batch(step, {"loss": torch.tensor([1.0, 1.0])}, [f"{step}.jpg"])
        monitor.record_norm(step, torch.tensor(value if step == 2 else 0.5))
    with pytest.raises(
        TrainingDivergedError, match=r"gradient was not finite at update 2 .*first: 2\.jpg, 1\.jpg, 3\."
    ):
        monitor.check_finite(3)


def test_a_finite_or_absent_gradient_norm_is_no_error(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor()
    monitor.record_norm(1, torch.tensor(1e30))
    monitor.record_norm(2, None)
    monitor.check_finite(2)


def test_the_loss_scaler_of_fp16_may_meet_a_bad_gradient_norm_but_no_bad_loss(
    make_monitor: MakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = make_monitor()
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    monitor.record_norm(1, torch.tensor(float("inf")))
    monitor.check_finite(1)
    monitor.record_batch(2, {"loss": torch.tensor([float("nan")])}, ["a"])
    with pytest.raises(TrainingDivergedError, match="at update 2 "):
        monitor.check_finite(2)


def test_a_validation_is_remembered_as_long_as_the_history_holds_it(make_monitor: MakeMonitor) -> None:
    first = make_monitor(log_steps=1)
    assert not first.has_validated(0)
    for step in range(1, 5):
        update(first, step, 1.0)
    first.record_validation(3, 0.5, {"iou": 0.0, "recall": 0.5, "mse": 0.125, "num_images": 7})
    assert [first.has_validated(step) for step in range(1, 5)] == [False, False, True, False]
    assert make_monitor(start=3).has_validated(3)
    assert not make_monitor(start=2).has_validated(3)


def test_any_of_the_named_losses_may_be_the_bad_one(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor()
    losses = {"loss": torch.ones(2), "pixel_loss": torch.tensor([1.0, float("nan")])}
    monitor.record_batch(1, losses, ["a", "b"])
    with pytest.raises(TrainingDivergedError):
        monitor.check_finite(1)


def test_a_long_list_of_files_is_cut_and_has_no_duplicates(make_monitor: MakeMonitor) -> None:
    monitor = make_monitor()
    names = [f"picture{number}" for number in range(MAX_NAMES_IN_MESSAGE + 5)]
    for _ in range(2):
        monitor.record_batch(1, {"loss": torch.tensor([float("nan")])}, names)
    with pytest.raises(TrainingDivergedError) as caught:
        monitor.check_finite(1)
    message = str(caught.value)
    assert f"picture{MAX_NAMES_IN_MESSAGE - 1} and 5 more." in message
    assert f"picture{MAX_NAMES_IN_MESSAGE}," not in message


def write_history(path: Path, *steps: int) -> None:
    path.write_text(
        HEADER + "".join(f"{step},0.5,1.0,0.75,0.25,0.1,0.2,3.0,0.1,1.5,,,\r\n" for step in steps), newline=""
    )


@pytest.mark.parametrize(
    ("resumed_step", "kept"), [(0, []), (1, []), (2, ["2"]), (5, ["2", "4"]), (6, ["2", "4", "6"]), (100, "2 4 6 8 10")]
)
def test_a_history_is_cut_back_to_the_resumed_step(resumed_step: int, kept: list[str] | str, tmp_path: Path) -> None:
    write_history(tmp_path / "history.csv", 2, 4, 6, 8, 10)
    history = History(tmp_path / "history.csv", resumed_step)
    expected = kept.split() if isinstance(kept, str) else kept
    assert [row["step"] for row in rows(tmp_path)] == expected
    history.append(step=resumed_step + 1, loss=0.25)
    assert [row["step"] for row in rows(tmp_path)] == [*expected, str(resumed_step + 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_a_history_from_before_memory_was_recorded_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    old = [name for name in COLUMNS if name != "memory_gb"]
    path.write_text(",".join(old) + "\r\n" + "2,0.5,1.0,0.75,0.25,0.1,0.2,3.0,0.1,0.5,0.6,0.7\r\n", newline="")
    History(path, 2).append(step=4, loss=0.5, memory_gb=1.25)
    assert path.read_text().splitlines()[0] == HEADER.strip()
    assert [(row["step"], row["memory_gb"], row["val_mse"]) for row in rows(tmp_path)] == [
        ("2", "", "0.7"),
        ("4", "1.25", ""),
    ]


def test_a_resumed_monitor_cuts_its_history_back(make_monitor: MakeMonitor, tmp_path: Path) -> None:
    first = make_monitor(log_steps=1)
    for step in range(1, 7):
        update(first, step, float(step))
    second = make_monitor(start=3, log_steps=1)
    update(second, 4, 40.0)
    assert [(row["step"], float(row["loss"])) for row in rows(tmp_path)] == [("1", 1), ("2", 2), ("3", 3), ("4", 40)]


def test_a_last_row_cut_anywhere_by_a_kill_is_dropped_and_the_next_one_starts_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    write_history(path, 1, 2)
    whole = path.read_bytes()
    row = b"3,0.75,1.0,0.75,0.25,0.1,0.2,3.0,0.1,1.5,0.5,0.625,0.03125"
    for length in range(len(row) + 1):
        path.write_bytes(whole + row[:length])
        assert [line["step"] for line in read_history(path)] == ["1", "2"], row[:length]
        History(path, 3).append(step=4)
        assert [line["step"] for line in read_history(path)] == ["1", "2", "4"], row[:length]
    path.write_bytes(whole + row + b"\r\n")
    assert read_history(path)[2]["val_mse"] == "0.03125"


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surprise"):
        History(tmp_path / "history.csv", 0).append(step=1, surprise=2.0)
