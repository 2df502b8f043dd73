"""Writes masks for pictures and videos: python predict.py INPUT... --model DIR --output OUT.

An INPUT is a file, a folder or a quoted pattern ("photos/**/*.jpg"). What was done before is left out, so the same command goes
on after an interruption; a file that cannot be read is named at the end and does not stop the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dataset.pictures import as_rgb
from models.base import DTYPES
from models.pipeline import VIEWS, Segmentation, TransparencySegmentationPipeline
from utils.errors import (
    FULL_OR_FORBIDDEN,
    CommandError,
    InputError,
    InterruptedRunError,
    first_line,
    is_out_of_memory,
    run_command,
)
from utils.prediction_inputs import Source, find_files, name_files
from utils.prediction_record import PredictionRecord
from utils.publishing import load_model_on, usual_data_type
from utils.rendering import coco, contours, cut_out, overlay
from utils.seeding import Stream, torch_generator
from utils.signals import StopRequests
from utils.video import segment_video

KINDS = ("mask", "classes", "soft", "uncertainty", "overlay", "cutout", "contours")
VIDEO_KINDS = ("overlay", "mask")
CONTOURS_FILE_NAME = "contours.json"
DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
MAX_PENDING_WRITES = 8
SHOWN_FAILURES = 20
MAX_DIGITS = 6  # of a resolution


class Predictor:
    """Predicts files with one model into one folder.

    Args:
        pipeline: on its device.
        record: of the output folder.
        kinds: of outputs, of `KINDS`.
        settings: of the pipeline's call, without pictures and generators.
        batch_size: pictures per forward pass.
        stop: asked between batches.
    """

    def __init__(
        self,
        pipeline: TransparencySegmentationPipeline,
        record: PredictionRecord,
        kinds: Sequence[str],
        settings: dict[str, Any],
        batch_size: int,
        stop: StopRequests,
    ) -> None:
        self.pipeline, self.record, self.kinds = pipeline, record, kinds
        self.settings, self.batch_size, self.stop = settings, batch_size, stop
        self.failures: dict[Source, str] = {}
        self._inputs: frozenset[str] = frozenset()

    def predict(self, sources: Sequence[Source]) -> None:
        """Predicts files, pictures first; what fails is in `failures`.

        Raises:
            InterruptedRunError: after a signal.
            CommandError: if the disk is full or the device out of memory.
        """
        self._inputs = frozenset(source.key for source in sources)
        with tqdm(total=len(sources), unit="file", desc="predicting") as bar, ThreadPoolExecutor(2) as writers:
            pending: deque[tuple[Source, Future[None]]] = deque()
            pictures = [source for source in sources if not source.is_video]
            for batch in self._read(pictures):
                for source, picture, found, number in self._segment_batch(batch):
                    pending.append((source, writers.submit(self._write, source, picture, found, number)))
                while len(pending) > MAX_PENDING_WRITES or (pending and pending[0][1].done()):
                    self._check_written(*pending.popleft())
                bar.update(min(self.batch_size, len(pictures) - bar.n))
            while pending:
                self._check_written(*pending.popleft())
            for source in sources:
                if source.is_video:
                    self._leave_if_asked()
                    self._predict_video(source)
                    bar.update()

    def _read(self, sources: Sequence[Source]) -> Iterator[list[tuple[Source, NDArray[np.uint8]]]]:
        """Yields batches of readable pictures, the next one read while one is predicted."""
        batches = [sources[start : start + self.batch_size] for start in range(0, len(sources), self.batch_size)]
        with ThreadPoolExecutor(2) as readers:
            ahead: list[tuple[Source, Future[NDArray[np.uint8]]]] = []
            for following in [*batches, []]:
                due, ahead = ahead, [(source, readers.submit(as_rgb, source.path)) for source in following]
                if not due:
                    continue
                self._leave_if_asked()
                readable = []
                for source, future in due:
                    try:
                        picture = future.result()
                        self.record.start(source, self._file_names(source), self._inputs)
                        readable.append((source, picture))
                    except (InputError, MemoryError) as error:
                        self._fail(source, str(error) or "too large for this machine's memory")
                yield readable

    def _segment_batch(
        self, batch: list[tuple[Source, NDArray[np.uint8]]]
    ) -> list[tuple[Source, NDArray[np.uint8], Segmentation, int]]:
        """Segments pictures together, or one by one where that fails, because the memory is too small or for one of them."""
        if not batch:
            return []
        try:
            found = self._segment([picture for _, picture in batch], [source.name for source, _ in batch])
        except CommandError as error:  # a prediction that is not finite
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "out of memory; lower --resolution or --tile_size"
        else:
            return [(source, picture, found, number) for number, (source, picture) in enumerate(batch)]
        # Out of the handlers, whose error holds what the failed pass left on the device.
        if len(batch) == 1:
            self._fail(batch[0][0], reason)
            return []
        return [each for pair in batch for each in self._segment_batch([pair])]

    def _segment(self, pictures: list[NDArray[np.uint8]], names: Sequence[str]) -> Segmentation:
        # A picture's noise is its name's, so that it depends neither on the batch nor on where a run went on.
        generators = [
            torch_generator(Stream.INFERENCE_NOISE, 0, zlib.crc32(name.encode(errors="replace"))) for name in names
        ]
        return self.pipeline(pictures, batch_size=self.batch_size, generator=generators, **self.settings)

    def _file_names(self, source: Source) -> list[str]:
        if source.is_video:
            return [f"{source.name}_{kind}.mp4" for kind in VIDEO_KINDS]
        return [f"{source.name}_{kind}.png" for kind in self.kinds if kind != "contours"]

    def _write(self, source: Source, picture: NDArray[np.uint8], found: Segmentation, number: int) -> None:
        mask, soft, classes = found.masks[number], found.soft[number], found.classes[number]
        palette = self.pipeline.palette
        files = []
        for kind in self.kinds:
            if kind == "contours":
                continue
            if kind == "overlay":
                values = overlay(picture, classes, palette)
            elif kind == "cutout":
                values = cut_out(picture, mask)
            elif kind == "uncertainty":
                if found.uncertainty is None:
                    continue
                values = (found.uncertainty[number] * 2 * 255).round().clip(0, 255).astype(np.uint8)
            else:
                values = {
                    "mask": mask * np.uint8(255),
                    "classes": classes,
                    "soft": (soft * 255).round().astype(np.uint8),
                }[kind]
            path = self.record.folder / f"{source.name}_{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".part-{path.name}")
            partial.unlink(missing_ok=True)  # never through a link
            Image.fromarray(values).save(partial, format="png", compress_level=3)
            partial.replace(path)
            files.append(f"{source.name}_{kind}.png")
        details: dict[str, Any] = {"file_name": source.path.as_posix()}
        details |= {"width": mask.shape[1], "height": mask.shape[0], "share": round(float(mask.mean()), 4)}
        if "contours" in self.kinds:
            details["contours"] = contours(classes, soft)
        self.record.finish(source, files, **details)

    def _check_written(self, source: Source, written: Future[None]) -> None:
        try:
            written.result()
        except OSError as error:
            self._fail_or_leave(source, error)

    def _predict_video(self, source: Source) -> None:
        targets = dict(zip(VIDEO_KINDS, (self.record.folder / name for name in self._file_names(source)), strict=True))
        palette = self.pipeline.palette

        def segment(frames: list[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
            found = self._segment(frames, [source.name] * len(frames))
            painted = [overlay(frame, classes, palette) for frame, classes in zip(frames, found.classes, strict=True)]
            return {"overlay": painted, "mask": [np.dstack([mask * np.uint8(255)] * 3) for mask in found.masks]}

        try:
            self.record.start(source, self._file_names(source), self._inputs)
            targets["mask"].parent.mkdir(parents=True, exist_ok=True)
            frames = segment_video(source.path, targets, segment, self.batch_size, lambda: bool(self.stop.noticed()))
            self._leave_if_asked()
            self.record.finish(source, self._file_names(source), frames=frames)
        except InputError as error:
            self._fail(source, str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._fail(source, "out of memory; lower --batch_size, --resolution or --tile_size")
        except OSError as error:
            self._fail_or_leave(source, error)

    def _fail(self, source: Source, reason: str) -> None:
        self.failures[source] = printable(reason if str(source.path) in reason else f"{source.path}: {reason}")
        self.record.fail(source, self.failures[source])

    def _fail_or_leave(self, source: Source, error: OSError) -> None:
        if error.errno in FULL_OR_FORBIDDEN:
            folder = self.record.folder
            raise CommandError(f"{folder}: cannot be written ({error.strerror}); the same command goes on") from error
        self._fail(source, str(error))

    def _leave_if_asked(self) -> None:
        if code := self.stop.noticed():
            again = "the same command without --overwrite" if self.record.overwrite else "the same command"
            raise InterruptedRunError(f"interrupted; {again} goes on", code)


def fingerprint(pipeline: TransparencySegmentationPipeline) -> str:
    """Returns a short digest of a pipeline: of its settings and of some values of each tensor."""
    settings = {name: value for name, value in pipeline.config.items() if name[0] != "_" and name != "training"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part in (pipeline.transformer, pipeline.vae, pipeline.prompt, pipeline.mask_decoder):
        for name, value in sorted(part.state_dict().items()) if part is not None else ():
            digest.update(name.encode() + value.flatten()[:16].float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def printable(text: str) -> str:
    """Returns a text in one line, what is no printable character (a file's name may hold any) as its escape code."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="pictures, videos, folders, quoted patterns")
    parser.add_argument("--list", action="append", default=[], type=Path, help="file with one input a line")
    parser.add_argument(
        "--model", default="runs/quickstart", help="run, checkpoint, exported folder or hub id [runs/quickstart]"
    )
    parser.add_argument("--output", default="predictions", help="folder to write [predictions]")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below too")
    parser.add_argument(
        "--save",
        default="mask,overlay",
        help=f"what to write of pictures, with commas: {', '.join(KINDS)} [mask,overlay]",
    )
    parser.add_argument("--threshold", type=float, help="a pixel is transparent above this [the model's]")
    parser.add_argument(
        "--resolution", help="side that pictures are squashed to, or own: their own size, in tiles [the model's]"
    )
    parser.add_argument(
        "--tile_size", type=int, help="longer sides are predicted in overlapping tiles [none; own: the model's size]"
    )
    parser.add_argument("--tta", choices=sorted(VIEWS), help="views of a picture that are averaged [the model's]")
    parser.add_argument("--denoise_steps", type=int, help="of a diffusion model [the model's]")
    parser.add_argument("--ensemble_size", type=int, help="votes of a diffusion model [the model's]")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures at a time [4]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [cuda if there is one]")
    parser.add_argument("--data_type", choices=sorted(DTYPES), help="precision [bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what earlier runs or others left in the output folder"
    )
    return parser


def check_arguments(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Returns the kinds to save and the settings of the pipeline's call.

    Raises:
        InputError: naming the first flag that is out of range.
    """
    kinds = [part.strip() for part in arguments.save.split(",") if part.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"--save {arguments.save}: expected some of {', '.join(KINDS)}, with commas")
    for name in ("model", "output"):
        if not getattr(arguments, name):
            raise InputError(f"--{name}: is empty")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise InputError(f"--threshold {arguments.threshold}: must lie between 0 and 1")
    for name in ("tile_size", "denoise_steps", "ensemble_size", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    resolution = arguments.resolution
    if resolution not in (None, "own"):
        if not resolution.isdecimal() or len(resolution) > MAX_DIGITS or int(resolution) < 1:
            raise InputError(f"--resolution {resolution}: expected a number of pixels, or own")
        resolution = int(resolution)
    names = ("threshold", "tile_size", "tta", "denoise_steps", "ensemble_size")
    return kinds, {"resolution": resolution, **{name: getattr(arguments, name) for name in names}}


def usable_device(name: str | None) -> torch.device:
    """Returns the device to compute on, by default a GPU if there is one.

    Raises:
        InputError: if there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in DEVICE_TYPES:
            raise ValueError(f"expected one of {', '.join(DEVICE_TYPES)}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--device {name}: cannot be used ({first_line(error)})") from error
    return device


def main() -> None:
    """Command line of the prediction."""
    arguments = build_parser().parse_args()
    kinds, settings = check_arguments(arguments)
    if not Path(arguments.model).expanduser().exists() and arguments.model == "runs/quickstart":
        raise InputError(
            "runs/quickstart: no such model; make one with `make quickstart`, or name another with --model"
        )
    output = Path(arguments.output)
    found = find_files(arguments.inputs, arguments.list, arguments.recursive, output, print)  # before anything heavy
    stop = StopRequests()  # a list may be a pipe, and reading it must end at once
    device = usable_device(arguments.device)
    data_type = arguments.data_type or usual_data_type(device)
    pipeline = load_model_on(arguments.model, device, data_type)
    try:
        pipeline.check_call(settings["resolution"], arguments.batch_size, settings["tta"], settings["tile_size"])
    except ValueError as error:
        raise InputError(f"{error}") from error
    for name in ("threshold", "tta", "denoise_steps", "ensemble_size"):
        settings[name] = pipeline.config[name] if settings[name] is None else settings[name]
    if "uncertainty" in kinds and settings["tta"] == "none" and not pipeline.objective.stochastic:
        raise InputError("--save uncertainty: a deterministic model's single view tells none; add --tta flip")
    stored = {**settings, "save": sorted(kinds), "data_type": data_type, "model": fingerprint(pipeline)}
    record = PredictionRecord(output, stored, arguments.overwrite)
    sources = name_files(found, record.names)
    left = [source for source in sources if not record.is_done(source)]
    print(f"{arguments.model}: {pipeline.config.objective}, threshold {settings['threshold']:.3g}, on {device}")
    before = f", {len(sources) - len(left)} done before" if len(left) < len(sources) else ""
    print(f"{len(sources)} files{before} -> {output}")
    predictor = Predictor(pipeline, record, kinds, settings, arguments.batch_size, stop)
    predictor.predict(left)
    if "contours" in kinds:
        pictures = [entry for entry in record.finished() if "contours" in entry]
        record.write_whole(CONTOURS_FILE_NAME, json.dumps(coco(pictures, pipeline.palette)))
    if failures := predictor.failures:
        for reason in list(failures.values())[:SHOWN_FAILURES]:
            print(f"not predicted: {reason}")
        more = f", the first {SHOWN_FAILURES} are above" if len(failures) > SHOWN_FAILURES else ""
        raise CommandError(
            f"{len(failures)} of {len(sources)} files could not be predicted{more}; all reasons: {record.path}"
        )


if __name__ == "__main__":
    run_command(main)
