"""Runs every command of the documentation in a fresh clone with a new environment: `make docs-check`.

Commands are the lines of ```bash and ```python blocks and of indented blocks, and inline code that starts with a program's name, in the
order of the pages. The tiny base stands in for SD3.5 in a hub cache without a network and the sample for Trans10k, so that commands
run as they are written; what a laptop cannot do is made smaller by the flags that `RULES` append, or left out with its reason, and
every line of the report says which.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
PROGRAMS = ("python ", "accelerate ", "make ", "pip ", "hf ")
# Inline, without arguments.
MENTIONS = (
    "accelerate launch",
    "python trainer.py",
    "python val_inference.py",
    "python -m dataset.audit",
    "python -m dataset.prepare",
    "python -m utils.publishing",
)
SECONDS_PER_COMMAND = 1800
SMALL_RUN = "--resolution 64 --epochs null --max_train_steps 2 --dataloader_num_workers 0"
# What stands in a command for something of the reader's own.
WORDS = {
    "DOWNLOADS": "downloads",
    "FOLDER": "data/own",
    "OUT": "docs_check_out",
    "DECODER": "docs_check_decoder",
    "PREDICTIONS": "docs_check_masks/predictions",
    "TRUTHS": "docs_check_masks/truths",
    "RUN_A": "runs/quickstart",
    "RUN_B": "runs/quickstart",
    "RUN": "runs/quickstart",
}


@dataclass(frozen=True)
class Rule:
    """How commands that match a pattern are run; the first match counts.

    Args:
        pattern: searched in the command.
        flags: appended.
        skip: why they are left out.
        fresh: folders removed before.
        serves: whether they run until they are stopped.
    """

    pattern: str
    flags: str = ""
    skip: str = ""
    fresh: tuple[str, ...] = ()
    serves: bool = False


RULES = (
    Rule(
        r"--num_processes [2-9]|two_machines|deepspeed|accelerate_config",
        skip="needs several GPUs, or DeepSpeed on one",
    ),
    Rule(r"^hf |--push|OWNER/NAME", skip="needs a login"),
    Rule(r"benchmarks\.memory|--device cuda", skip="needs a GPU"),
    Rule(r"make PYTHON=", skip="names a Python that may not be installed"),
    Rule(r"^make (docs-check|clean)", skip="is this, or takes the environment away"),
    Rule(r"^make test-slow|pytest -m slow", skip="takes more than an hour; run it by itself"),
    Rule(r"dataset\.prepare photos", fresh=("data/mine", "data/mine_fixed")),
    Rule(r"dataset\.prepare .*data/Trans10k$", flags="--expect none", fresh=("data/Trans10k",)),
    Rule(r"dataset\.prepare", flags="--expect none"),
    Rule(r"demo\.py", flags="--port 7979", serves=True),
    Rule(r"models\.tiny_base .*--check"),
    Rule(r"models\.tiny_base", skip="takes hours"),
    Rule(r"dataset\.render_glass", flags="--count 2", fresh=("docs_check_out",)),
    Rule(
        r"benchmarks\.study",
        flags="--seeds 1 --only 'pixel loss alone' --epochs null --max_train_steps 2 --out runs/docs_check_study --report runs",
        fresh=("runs/docs_check_study",),
    ),
    Rule(r"benchmarks\.scratch", flags="--minutes 0.05"),
    Rule(r"benchmarks\.(training|inference)", flags="--size tiny --resolution 64 --batch_size 2 --steps 1"),
    Rule(r"benchmarks\.prediction", flags="--count 20 --broken 2"),
    Rule(r"models\.mask_decoder", flags="--resolution 64 --steps 2 --batch_size 2", fresh=("docs_check_decoder",)),
    Rule(r"--dry_run", flags="--resolution 64 --dataloader_num_workers 0"),
    Rule(r"trainer\.py.*--help|trainer\.py.*--resume_from_checkpoint|trainer\.py.*--max_train_steps"),
    Rule(r"utils\.lr_finder", flags=SMALL_RUN),
    Rule(
        r"trainer\.py",
        flags=SMALL_RUN,
        fresh=("runs/sd35_medium_end_to_end", "runs/sd35_medium_diffusion"),
    ),
    Rule(r"val_inference\.py", flags="--resolution 64 --num_vals_test 4 --dataloader_num_workers 0"),
)


def commands_of(text: str) -> list[tuple[str, str]]:
    """Returns the commands of a page as (language, text), `sh` or `python`, in order."""
    found: list[tuple[str, str]] = []
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$|^((?:    [^\n]+\n)+)|`([^`\n]+)`", text, re.MULTILINE | re.DOTALL):
        language, body, indented, inline = block.groups()
        if language == "python":
            found.append(("python", body))
            continue
        for line in (body or indented or inline or "").replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*", "", line).strip()
            mentioned = inline and command in MENTIONS
            if command.startswith(PROGRAMS) and "..." not in command and not mentioned:
                found.append(("sh", command))
    return found


def with_words(command: str) -> str:
    """Returns a command with the reader's own words filled in."""
    for word, value in WORDS.items():
        command = re.sub(rf"(?<![\w/.-]){word}(?![\w/.-])", value, command)
    return command.replace("configs/accelerate/gpu.yaml", "configs/accelerate/cpu.yaml")


def set_up(checkout: Path, environment: dict[str, str]) -> None:
    """Makes the environment, and what stands in for what is not at hand."""
    subprocess.run(["make", ".venv/dev.stamp"], cwd=checkout, env=environment, check=True)
    subprocess.run([".venv/bin/python", "docs/stand_ins.py"], cwd=checkout, env=environment, check=True)


def answers(line: str, checkout: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Starts a page, asks for it and stops it; returns 0 if it answered, and what it printed."""
    script = f". .venv/bin/activate && exec {line}"
    with subprocess.Popen(
        ["bash", "-c", script], cwd=checkout, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as page:  # fmt: skip
        giving_up = threading.Timer(SECONDS_PER_COMMAND, page.kill)
        giving_up.start()
        assert page.stdout is not None
        printed, status = "", 1
        try:
            for printed_line in page.stdout:
                printed += printed_line
                if address := re.search(r"http://[\w.:]+", printed_line):
                    with urllib.request.urlopen(address[0]) as answer:
                        status = int(answer.status != HTTPStatus.OK)
                    break
        except OSError as error:  # a page that answers with an error is a failure of its command, not of the check
            printed += f"{error}\n"
        page.terminate()
        page.wait()
        giving_up.cancel()
    return status, printed


def run(kind: str, command: str, checkout: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Runs one command by the first rule that matches it.

    Returns:
        What became of it (`passed`, `failed`, or why it was left out), and what a failure printed last.
    """
    rule = next((rule for rule in RULES if re.search(rule.pattern, command)), Rule(""))
    if rule.skip:
        return f"left out: {rule.skip}", ""
    for folder in rule.fresh:
        shutil.rmtree(checkout / folder, ignore_errors=True)
    if kind == "python":
        script = checkout / "docs_check.py"
        script.write_text(f"import sys; sys.path.insert(0, '.')\n{command}")
        line = "python docs_check.py"
    else:
        line = f"{with_words(command)} {rule.flags}".strip()
    start = time.monotonic()
    try:
        if rule.serves:
            code, output = answers(line, checkout, environment)
            return (
                f"{'FAILED' if code else 'passed'} with {rule.flags}, stopped once it answered",
                output if code else "",
            )
        done = subprocess.run(
            ["bash", "-c", f". .venv/bin/activate && {line}"], cwd=checkout, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=SECONDS_PER_COMMAND,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, output = 124, f"ran longer than {SECONDS_PER_COMMAND} s"
    how = f" with {rule.flags}" if rule.flags else ""
    seconds = time.monotonic() - start
    # An audit that finds faults says so by 1 and not by 2.
    passed = code == 0 or (code == 1 and "dataset.audit" in command)
    return f"{'passed' if passed else f'FAILED ({code})'} in {seconds:.0f} s{how}", "" if passed else output[-1500:]


def main() -> int:
    """Command line; returns 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="print the commands and how they would be run, and run none"
    )
    parser.add_argument("--only", default="", help="run those that match this pattern, beside make quickstart")
    arguments = parser.parse_args()
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    found = [(page, kind, command) for page in pages for kind, command in commands_of(page.read_text(encoding="utf-8"))]
    unique = {command: (page, kind) for page, kind, command in reversed(found)}
    chosen = [(*unique[command], command) for command in dict.fromkeys(command for _, _, command in found)]
    chosen = [each for each in chosen if re.search(arguments.only, each[2]) or each[2] == "make quickstart"]
    if arguments.list:
        for page, _, command in chosen:
            rule = next((rule for rule in RULES if re.search(rule.pattern, command)), Rule(""))
            print(f"{page.name}: {command.strip().splitlines()[0]}  [{rule.skip or rule.flags or 'as written'}]")
        return 0
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name) / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        environment = {**os.environ, "HF_HOME": f"{name}/hub", "XDG_CACHE_HOME": f"{name}/cache", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHON": sys.executable, "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
        set_up(checkout, environment)
        for page, kind, command in chosen:
            answer, output = run(kind, command, checkout, environment)
            failures += answer.startswith("FAILED")
            print(
                f"{page.relative_to(ROOT)}: {command.strip().splitlines()[0]}\n    {answer}\n{output}",
                end="",
                flush=True,
            )
    print(f"{len(chosen)} commands, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
