"""Where a run came from: commit, versions, command."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "deepspeed")


def write_provenance(path: Path, seed: int) -> None:
    """Writes commit, seed, versions and command as JSON, so that a run can be told from its folder."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {"commit": _git("rev-parse", "HEAD"), "changed_files": _git("status", "--short"), "seed": seed}
    path.write_text(
        json.dumps({**record, "versions": versions, "command": sys.argv}, indent=2) + "\n", encoding="utf-8"
    )


def _git(*arguments: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent.parent
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
