"""A page for the browser: a picture goes in, the mask of what is transparent comes out; no upload is kept."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from models.base import DTYPES
from models.pipeline import INDEX_FILE_NAME, TransparencySegmentationPipeline
from utils.checkpoints import CONFIG_FILE_NAME, list_checkpoints, read_config
from utils.demo.visitors import Limits
from utils.errors import EXIT_SIGINT, InputError, InterruptedRunError, run_command
from utils.publishing import load_model_on

if TYPE_CHECKING:
    from utils.demo.desk import Model

SECONDS_BETWEEN_SWEEPS = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MODES = {"end_to_end": "end to end", "diffusion": "diffusion"}


def describe(model: str, pipe: TransparencySegmentationPipeline) -> str:
    """Returns what a model is, as the page and the terminal tell it."""
    side, dtype = pipe.config.resolution, str(pipe.transformer.dtype).removeprefix("torch.")
    parts = [MODES[pipe.config.objective], f"{side} x {side} pixels"]
    if (Path(model) / CONFIG_FILE_NAME).is_file():
        parts.append(f"trained on {Path(read_config(Path(model)).dataset_path).name}")
    elif pipe.config.training:
        parts.append(f"trained on {pipe.config.training.get('data', 'data that it does not name')}")
    return ", ".join([*parts, f"{dtype} on {pipe.device.type}"])


def find_model() -> str:
    """Returns the newest run or exported folder below the working folder.

    Raises:
        InputError: if there is none.
    """
    exported = [path for pattern in ("*", "runs/*") for path in Path().glob(f"{pattern}/{INDEX_FILE_NAME}")]
    found = {path.parent: path.stat().st_mtime for path in exported}
    for run in Path("runs").glob("*"):
        for _, checkpoint in list_checkpoints(run):
            found[run] = max(found.get(run, 0.0), checkpoint.stat().st_mtime)
    if not found:
        raise InputError(
            "--model: neither runs/ nor this folder holds one; make one with `make quickstart`, or name a folder or hub id"
        )
    return str(max(found, key=lambda folder: found[folder]))


def check_port(host: str, port: int) -> None:
    """Binds an address for a moment.

    Raises:
        InputError: if it cannot be bound.
    """
    if port > 65535:
        raise InputError(f"--port {port}: ports end at 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: {error.strerror}; choose another, such as --port {port + 1}"
        ) from error


def terminate(number: int, frame: FrameType | None) -> None:
    """Ends the page at SIGTERM as Ctrl-C does, so that its files are removed."""
    raise InterruptedRunError("terminated")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    defaults = Limits()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        help="run, checkpoint, exported folder or hub id; several times for a choice [default: the newest]",
    )
    add("--data_type", choices=sorted(DTYPES), help="precision of the weights [default: bf16 on a GPU, fp32 on a CPU]")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets in everybody who reaches this machine [default: %(default)s]",
    )
    add("--port", type=at_least_one, default=7860, help="to listen on [default: %(default)s]")
    add(
        "--share",
        action="store_true",
        help="also at a public address of Gradio's: its servers pass all pictures on, and who knows it may come",
    )
    add("--max_upload_mb", type=at_least_one, default=defaults.upload_mb, help="size of a file [default: %(default)s]")
    add(
        "--max_pixels",
        type=at_least_one,
        default=defaults.pixels,
        help="width times height of a picture [default: %(default)s]",
    )
    add(
        "--queue",
        type=at_least_one,
        default=defaults.queue,
        help="requests that may wait for the model [default: %(default)s]",
    )
    return parser.parse_args()


def at_least_one(text: str) -> int:
    """Reads a whole number of at least 1 from the command line."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def load_models(names: Sequence[str], data_type: str | None) -> dict[str, Model]:
    """Loads models onto the GPU if there is one, telling what they are; a folder is called by its last part."""
    from utils.demo.desk import Model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Model] = {}
    for name in names:
        print(f"loading {name}", flush=True)
        pipe = load_model_on(name, device, data_type)
        pipe.set_progress_bar_config(disable=True)
        description = describe(name, pipe)
        print(f"  {description}", flush=True)
        label = Path(name).resolve().name if Path(name).is_dir() else name
        models[name if label in models else label] = Model(pipe, description)
    return models


def main() -> None:
    """Command line."""
    arguments = parse_arguments()
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio: pip install -r requirements-demo.txt")
    check_port(arguments.host, arguments.port)
    names = arguments.model or [find_model()]
    limits = Limits(arguments.max_upload_mb, arguments.max_pixels, arguments.queue)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with tempfile.TemporaryDirectory(prefix="glass_page_", ignore_cleanup_errors=True) as folder:
            # Gradio reads these when it is imported: no reports home, and where uploads lie.
            os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
            from utils.demo.desk import Desk
            from utils.demo.page import launch

            desk = Desk(load_models(names, arguments.data_type), limits, Path(folder))
            local, public = launch(desk, arguments.host, arguments.port, arguments.share)
            print(f"the page: {local} (Ctrl-C ends it)", flush=True)
            if arguments.host not in LOOPBACK:
                print("open to everybody who reaches this machine", flush=True)
            if arguments.share:
                print(
                    f"open to whoever knows {public}" if public else "no public address: Gradio gave none", flush=True
                )
            while not threading.Event().wait(SECONDS_BETWEEN_SWEEPS):
                desk.visitors.forget_idle()
    except (KeyboardInterrupt, InterruptedRunError) as error:
        # Not by returning: a prediction that is under way would abort the interpreter's exit.
        os._exit(getattr(error, "exit_code", EXIT_SIGINT))


if __name__ == "__main__":
    run_command(main)
