"""What the demo page answers to its visitors: predictions, views of the kept ones, downloads, and sentences for what goes wrong."""

from __future__ import annotations

import html
import secrets
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from models.pipeline import TransparencySegmentationPipeline
from utils.demo.results import Result, encode, in_colours, stem_of
from utils.demo.visitors import Limits, Visitor, Visitors, read_upload
from utils.errors import InputError, is_out_of_memory

MAX_FILES = 20  # of a batch, which holds the model until its end
MAX_STEPS, MAX_MEMBERS = 50, 10
THUMBNAIL_SIDE = 480
OPACITY = 0.5
LEGENDS = {
    "Overlay": "Pink is what the model takes for transparent.",
    "Mask": "White is what the model takes for transparent.",
    "Soft": "How sure the model is, before the threshold: white is sure of glass.",
    "Cut-out": "What lies within the mask; the download is transparent around it.",
}
NOTHING_YET = "Choose or take a picture: what the model finds appears here."
ONE_ANSWER = (
    "This model gives one answer only. Let it see the picture <b>mirrored</b> too (settings), and find glass again."
)
NO_RESULT = "This result is no longer held here; press “Find glass” again."


@dataclass(frozen=True)
class Model:
    """What the page offers.

    Args:
        pipe: on its device.
        description: for people.
    """

    pipe: TransparencySegmentationPipeline
    description: str


class Desk:
    """Answers what visitors ask of the page.

    Args:
        models: by the name that the page shows.
        limits: what is taken.
        folder: for files, emptied by its owner.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, folder: Path) -> None:
        self.models = models
        self.limits = limits
        self.visitors = Visitors(folder)

    def visitor(self, request: gr.Request) -> Visitor:
        """Returns who asks; a request written by hand, without a session, is a visitor of its own."""
        return self.visitors[request.session_hash or secrets.token_hex()]

    def predict(self, path: str, name: str, model: str, tta: str, steps: float, members: float) -> Result:
        """Runs a model on an upload.

        Raises:
            InputError: if the upload cannot be used.
        """
        picture = read_upload(path, name, self.limits)
        start = time.monotonic()
        steps, members = int(within(steps, 1, MAX_STEPS)), int(within(members, 1, MAX_MEMBERS))
        pipe = self.models[model].pipe
        # At threshold 0 each pixel has its class, whatever the visitor's threshold will be.
        found = pipe([picture], threshold=0.0, tta=tta, denoise_steps=steps, ensemble_size=members)
        uncertainty = None if found.uncertainty is None else found.uncertainty[0]
        classes = found.classes[0] if pipe.palette else None
        return Result(name, picture, found.soft[0], uncertainty, time.monotonic() - start, classes, pipe.palette)

    def segment(
        self, upload: dict[str, Any] | None, model: str, tta: str, steps: float, members: float, view: str, threshold: float,
        opacity: float, request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        """Predicts for an upload, keeps the result and shows it: sentence, picture, legend, all of what was found, upload.

        An upload that cannot be used is taken off the page: no browser should have to show 400 million pixels.
        """
        visitor = self.visitor(request)
        if upload is None:
            if visitor.refused:  # and taken off the page, which is why we are asked; what was told about it stays
                visitor.refused = False
                return [gr.skip()] * 5
            visitor.keep(None)
            return [good(NOTHING_YET), None, "", gr.update(visible=False), gr.skip()]
        path, name = upload["path"], upload.get("orig_name") or "the picture"
        visitor.add_upload(Path(path))
        try:
            visitor.keep(self.predict(path, name, model, tta, steps, members))
        except Exception as error:
            visitor.keep(None)
            visitor.refused = isinstance(error, InputError)
            taken_off = None if visitor.refused else gr.skip()
            return [bad(explain(error, name)), None, "", gr.update(visible=False), taken_off]
        return [*self.look(upload, view, threshold, opacity, request), gr.update(visible=True), gr.skip()]

    def look(
        self, upload: dict[str, Any] | None, view: str, threshold: float, opacity: float, request: gr.Request
    ) -> list[Any]:
        """Shows the kept result under other settings, without a prediction: sentence, picture, legend."""
        visitor = self.visitor(request)
        result, preview = visitor.result, visitor.preview
        if result is None or preview is None:
            return [gr.skip()] * 3 if upload is None else [bad(NO_RESULT), None, ""]
        threshold, opacity = within(threshold), within(opacity)
        shown = visitor.write("view", "view.jpg", encode(preview.render(view, threshold, opacity), ".jpg"))
        height, width = result.soft.shape
        sentence = (
            f"<b>{result.mask(threshold).mean():.1%}</b> of {html.escape(result.name)} ({width} × {height}) is transparent at threshold "
            f"{threshold:.3g}; found in {result.seconds:.1f} s."
        )
        return [good(sentence), shown, legend(preview, view)]

    def save(self, kind: str, threshold: float, opacity: float, request: gr.Request) -> str | None:
        """Writes a download of the kept result and returns its path."""
        visitor = self.visitor(request)
        if visitor.result is None:
            return None
        return visitor.write("download", *visitor.result.download(kind, within(threshold), within(opacity)))

    def note(self, uploads: Sequence[dict[str, Any]] | None, request: gr.Request) -> None:
        """Notes files that may never be used, so that they go with their visitor."""
        for upload in uploads or []:
            self.visitor(request).add_upload(Path(upload["path"]))

    def batch(
        self, uploads: Sequence[dict[str, Any]] | None, model: str, tta: str, steps: float, members: float, threshold: float,
        request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Predicts for several pictures: sentence, table, gallery, zip; once more after each."""
        visitor = self.visitor(request)
        uploads, threshold = uploads or [], within(threshold)
        rows: list[tuple[str, str]] = []
        gallery: list[tuple[str, str]] = []

        def answer(sentence: str, archive: str | None = None) -> list[Any]:
            overlays = gr.update(value=list(gallery), visible=bool(gallery))
            return [sentence, table(rows), overlays, gr.update(value=archive, visible=archive is not None)]

        if not 0 < len(uploads) <= MAX_FILES:
            told = f"These are {len(uploads)} files; send up to {MAX_FILES} at a time."
            yield answer(bad(told if uploads else "Choose pictures first."))
            return
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:  # PNG files shrink no further
            for number, upload in enumerate(uploads, start=1):
                name = upload.get("orig_name") or f"picture {number}"
                try:
                    result = self.predict(upload["path"], name, model, tta, steps, members)
                except Exception as error:
                    rows.append((name, explain(error, name)))
                else:
                    mask = result.mask(threshold)
                    file = f"{number:02d}_{stem_of(name)}_mask.png"
                    archive.writestr(file, encode(mask * np.uint8(255)))
                    small = result.reduced(THUMBNAIL_SIDE).render("Overlay", threshold, OPACITY)
                    gallery.append((visitor.write("batch", "overlay.jpg", encode(small, ".jpg")), name))
                    rows.append((name, f"{mask.mean():.1%} is transparent: {file}"))
                yield answer(good(f"{number} of {len(uploads)} done"))
        if not gallery:
            yield answer(bad("None of these could be used; see below."))
            return
        failed = len(uploads) - len(gallery)
        told = f"Done at threshold {threshold:.3g}, {len(gallery)} of {len(uploads)}" + (
            ", see below." if failed else "."
        )
        yield answer(good(told), visitor.write("batch", "masks.zip", packed.getvalue()))

    def choose(self, model: str) -> list[Any]:
        """Shows another model's description and defaults: description, views, sampling, steps, members, both thresholds."""
        config = self.models[model].pipe.config
        sampling = gr.update(visible=config.objective == "diffusion")
        steps, members = min(MAX_STEPS, config.denoise_steps), min(MAX_MEMBERS, config.ensemble_size)
        return [self.describe(model), config.tta, sampling, steps, members, *2 * [round(config.threshold, 3)]]

    def describe(self, model: str) -> str:
        """Returns a model's description as Markdown."""
        return f"Model: `{model}`, {self.models[model].description}."

    def leave(self, request: gr.Request) -> None:
        """Forgets a visitor whose page was closed."""
        self.visitors.leave(request.session_hash or "")


def within(value: float | None, lowest: float = 0.0, highest: float = 1.0) -> float:
    """Returns a number of the page within bounds, which hold for hand-written requests too; an emptied box is the lowest."""
    return lowest if value is None else min(highest, max(lowest, value))


def explain(error: Exception, name: str) -> str:
    """Returns a sentence for the visitor; what is not the visitor's doing is printed for whoever runs the page."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    if is_out_of_memory(error):
        return f"The memory here does not suffice for {name}; try a smaller picture, or fewer samples."
    return f"{name} could not be predicted, through a fault of this page; whoever runs it finds the reason in its terminal."


def good(sentence: str) -> str:
    """Returns a sentence, HTML already, as the page shows it."""
    return f'<div class="sentence good" role="status">{sentence}</div>'


def bad(sentence: str) -> str:
    """Returns plain text as the page shows what went wrong."""
    return f'<div class="sentence bad" role="alert">{html.escape(sentence)}</div>'


def legend(result: Result, view: str) -> str:
    """Returns what the colours of a view mean."""
    if view == "Overlay" and result.palette is not None:
        swatches = (
            f'<span class="swatch" style="background: rgb{colour}"></span>{html.escape(class_name)}'
            for class_name, colour in zip(result.palette.names[1:], result.palette.colours[1:], strict=True)
        )
        return f'<div class="classes"><span>{"</span><span>".join(swatches)}</span></div>'
    if view != "Uncertainty":
        return LEGENDS[view]
    if result.uncertainty is None:
        return ONE_ANSWER
    colours = in_colours(np.linspace(0, 1, 9, dtype=np.float32)[None], 1)[0].tolist()
    bar = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)
    return (
        "How far views or samples disagree: the standard deviation of their soft masks."
        f'<div class="bar" style="background: linear-gradient(to right, {bar})"></div>'
        f'<div class="ends"><span>0, all agree</span><span>{result.highest_uncertainty:.2f}</span></div>'
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Returns the table of a batch: a picture's name, and its share and mask or what was wrong."""
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="rows">{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'
