"""Where a run came from: commit, versions, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "deepspeed", "torchao", "peft")


def write_provenance(path: Path, seed: int) -> None:
    """Writes commit, seed, versions and command as JSON, so that a run can be told from its folder."""
    record = {"commit": _git("rev-parse", "HEAD"), "changed_files": _git("status", "--short"), "seed": seed}
    path.write_text(
        json.dumps({**record, "versions": versions(), "command": sys.argv}, indent=2) + "\n", encoding="utf-8"
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | dict[str, str]]:
    """Returns what a measurement ran on: processor, cores, accelerator and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": accelerator,
        "versions": versions(),
    }


def _git(*arguments: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent.parent
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
