"""Bad input ends a command with exit code 2 and one line that names the file or flag, and no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Launch, environment, write_pair
from utils.errors import (
    CommandError,
    InputError,
    InterruptedRunError,
    TrainingDivergedError,
    first_line,
    one_line,
    run_command,
)

# The real entry points. A launch takes seconds: the many other cases are tested at their functions.


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line of ours, and checks that there is no other and no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return lines[0].removeprefix("error: ")


def test_the_trainer_refuses_an_unknown_key_of_an_overlay(launch: Launch, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("training:\n  epoch: 3\n")
    done = launch("trainer.py", {"config": overlay, "output_dir": tmp_path / "run"}, check=2)
    assert the_error(done) == f"{overlay}: unknown key 'epoch' under training (did you mean 'epochs'?)"
    assert not (tmp_path / "run").exists()


def test_the_inference_refuses_a_flag_out_of_range(launch: Launch) -> None:
    done = launch("val_inference.py", {"threshold": 2}, check=2)
    assert the_error(done) == "--threshold: '2' is not valid, expected a number, >= 0, <= 1 or validation"


def test_the_trainer_lists_the_pairs_that_differ_in_size(
    launch: Launch, flags: dict[str, object], tmp_path: Path
) -> None:
    for number in range(3):
        write_pair(tmp_path / "data" / "train", str(number), number)
    for number in (0, 2):
        Image.new("L", (36, 40)).save(tmp_path / "data" / "train" / "masks" / f"{number}_mask.png")
    done = launch("trainer.py", {**flags, "dataset_path": tmp_path / "data"}, check=2)
    text = the_error(done)
    assert text.startswith(f"{tmp_path / 'data'}: 2 pairs differ in size: ")
    assert text.count("rotated by 90 degrees") == 2


def test_the_trainer_names_a_truncated_picture_that_a_worker_reads(
    launch: Launch, flags: dict[str, object], tmp_path: Path
) -> None:
    for number in range(2):
        write_pair(tmp_path / "data" / "train", str(number), number)
    path = tmp_path / "data" / "train" / "images" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    own = {**flags, "dataset_path": tmp_path / "data", "dataloader_num_workers": 1, "val_steps": "null"}
    done = launch("trainer.py", own, check=2)
    assert the_error(done).startswith(f"{path}: cannot be read as a picture (")


# How any command ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("file.yaml: no"), 2),
        (TrainingDivergedError("loss"), 1),
        (InterruptedRunError("asked to stop"), 143),
        (InterruptedRunError("asked to stop", 130), 130),
        (CommandError("other"), 1),
    ],
)
def test_a_known_error_becomes_one_line_and_its_exit_code(
    error: CommandError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {error}\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_ends_with_what_it_returns(
    returned: int | None, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    main: Callable[[], int | None] = lambda: returned  # noqa: E731
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_a_command_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("file", [None, "/data/run/checkpoints/x.safetensors"])
def test_a_full_or_forbidden_disk_is_one_line_and_exit_code_1(
    number: int, file: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main() -> None:
        raise OSError(number, os.strerror(number), file)

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 1
    captured = capsys.readouterr()
    expected = f"error: {file or 'a file'}: cannot be written ({os.strerror(number)})\n"
    assert (captured.out, captured.err) == ("", expected)


@pytest.mark.parametrize("error", [OSError("no number"), FileNotFoundError(errno.ENOENT, "gone"), TimeoutError()])
def test_another_error_of_the_system_keeps_its_traceback(error: OSError) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_command(main)
    assert caught.value is error


def test_an_unknown_error_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)


def test_one_of_several_processes_does_not_wait_for_the_others() -> None:
    program = (
        "import atexit\n"
        "from utils.errors import InputError, run_command\n"
        "atexit.register(lambda: print('waited'))\n"
        "def main():\n"
        "    raise InputError('bad')\n"
        "run_command(main)\n"
    )
    for world_size, output in (("1", "waited\n"), ("2", "")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**environment(), "WORLD_SIZE": world_size},
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, output, "error: bad\n")


def test_a_reader_that_leaves_early_ends_nothing(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from utils.errors import run_command\n"
        "def main():\n"
        "    for _ in range(20000):\n"
        "        print('line')\n"
        "    open('done', 'w').close()\n"
        "run_command(main)\n"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=60,
            cwd=tmp_path,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").is_file()


@pytest.mark.parametrize(
    ("call", "code", "told"),
    [
        ("open('file/deeper', 'w')", 1, "file/deeper: cannot be used (Not a directory)"),
        ("open('x' * 300, 'w')", 1, "cannot be used (File name too long)"),
        ("Path('loop').resolve()", 2, "Symlink loop from"),
        ("Path('~nobody_is_called_so').expanduser()", 2, "Could not determine home directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(call: str, code: int, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    program = f"from pathlib import Path\nfrom utils.errors import run_command\nrun_command(lambda: {call} and None)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=60, cwd=tmp_path
    )
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_terminal_has_no_letter_for_is_printed_as_its_code() -> None:
    program = "from utils.errors import run_command\nrun_command(lambda: print('\\udcff', '\u00fc'))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"\\udcff \\xfc\n")


def test_a_message_of_several_lines_becomes_one() -> None:
    assert one_line(InputError("a\n  b\n\n c ")) == "a b c"


def test_a_workers_traceback_is_reduced_to_its_message() -> None:
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    g()\nutils.errors.InputError: x.jpg: broken (Error: y)\n'
    )
    assert one_line(InputError(text)) == "x.jpg: broken (Error: y)"


def test_a_foreign_message_is_cut_to_its_first_line() -> None:
    assert first_line(ValueError("\n  one  \ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("x" * 500)) == "x" * 200
    assert len(first_line(ValueError(np.zeros(5000)), 400)) <= 400
