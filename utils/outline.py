"""What can be known of a base model without its weights: the configurations of its parts, and whether the rest is here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from models.base import MODEL_PARTS, resolve_base
from utils.errors import InputError, first_line

HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Outline:
    """A base model without its weights.

    Args:
        transformer: its configuration.
        vae: its configuration.
        folder: where all parts lie on this machine, None if some are missing.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    folder: Path | None


def outline_of(base_model_path: str) -> Outline:
    """Returns the outline of a base in a folder, in the hub's cache or on the hub; downloads two small files at most.

    Raises:
        InputError: with the remedy, if the folder is incomplete or the hub does not give them.
    """
    if Path(base_model_path).expanduser().exists() or not _may_be_hub_id(base_model_path):
        folder = resolve_base(base_model_path)
        return Outline(read_settings(folder / "transformer"), read_settings(folder / "vae"), folder)
    try:
        parts = [_hub_file(base_model_path, f"{part}/config.json").parent for part in ("transformer", "vae")]
    except Exception as error:  # every way in which a hub, a login or a network may fail
        raise InputError(
            f"{base_model_path}: no such folder, and the hub did not give it ({first_line(error)}); accept its licence on its "
            "hub page and log in with `hf auth login`, or set base_model_path to a folder"
        ) from error
    return Outline(read_settings(parts[0]), read_settings(parts[1]), _snapshot(base_model_path))


def read_settings(part: Path) -> dict[str, Any]:
    """Returns a part's `config.json`.

    Raises:
        InputError: naming the file.
    """
    path = part / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a model's configuration ({first_line(error)})") from error


def _may_be_hub_id(name: str) -> bool:
    return not name.startswith((".", "~", os.sep)) and name.count("/") == 1


def _hub_file(name: str, file: str) -> Path:
    """Returns a file of the cache, or downloads it."""
    try:
        return Path(hf_hub_download(name, file, local_files_only=True))
    except LocalEntryNotFoundError:
        # Asks once, where the download itself goes on asking for a minute.
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT_SECONDS)
        return Path(hf_hub_download(name, file))


def _snapshot(name: str) -> Path | None:
    """Returns the folder of a hub's model if all of its parts are in the cache."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not there, in one of several ways
        return None
    weights = all(any((folder / part).glob("*.safetensors")) for part in ("transformer", "vae"))
    return folder if weights and all((folder / part).is_dir() for part in MODEL_PARTS) else None
