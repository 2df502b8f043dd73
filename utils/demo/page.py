"""The layout of the demo page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from models.pipeline import VIEWS
from utils.demo.desk import MAX_FILES, MAX_MEMBERS, MAX_STEPS, NOTHING_YET, OPACITY, Desk, good
from utils.demo.results import DOWNLOADS, VIEW_NAMES
from utils.demo.visitors import KEPT_SECONDS, MAX_SIDE, MEGABYTE, MIN_SIDE

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "glass_sample" / "test"
EXAMPLES = (
    "easy/images/easy_00000",
    "easy/images/easy_00104",
    "hard/images/hard_00003",
    "hard/images/hard_00025",
    "hard/images/hard_00045",
)
TTA_NAMES = {"none": "as it is", "flip": "and mirrored", "flip_scale": "and mirrored, in three sizes"}
LABELS = {"mask": "Mask", "soft": "Soft mask", "overlay": "Overlay", "cutout": "Cut-out"}
# Safari saves what a link with `download` points to; the address is the file's own.
SAVE_SCRIPT = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url; link.download = file.orig_name; document.body.append(link); link.click(); link.remove();
}"""
# On a phone the result lies below what is to be seen.
SCROLL_SCRIPT = """() => {
  if (window.innerWidth < 620) document.getElementById("sentence").scrollIntoView({ behavior: "smooth" });
}"""
CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
#picture img, #shown img { width: 100%; height: 100%; object-fit: contain; }
.html-container { padding: 0 !important; }
#view label { padding: 6px 9px; }
.sentence { padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere; }
.good { background: var(--background-fill-secondary); }
.bad { background: #b3261e; color: #fff; }
.bar { height: 12px; border-radius: 3px; margin-top: 6px; }
.ends { display: flex; justify-content: space-between; font-size: .85em; font-variant-numeric: tabular-nums; }
.classes { display: flex; flex-wrap: wrap; gap: 2px 14px; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: 5px; border: 1px solid #888; }
.prose table.rows { width: 100%; border: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.prose table.rows tr { border: 0; }
.prose table.rows td { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 6px 12px 6px 0; overflow-wrap: anywhere; }
.prose table.rows td:first-child { width: 35%; }
#gallery .grid-wrap { height: auto; min-height: 0; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; }
@media (max-width: 620px) { #picture, #shown { height: 330px !important; } }
"""


def build_page(desk: Desk) -> gr.Blocks:
    """Lays out the page; nothing is loaded from outside, fonts included."""
    names = list(desk.models)
    first = desk.models[names[0]].pipe.config
    limits = desk.limits
    takes = (
        f"JPEG, PNG, WebP, BMP, TIFF or GIF, up to {limits.upload_mb} MB and {limits.pixels / 1e6:g} million pixels, sides of {MIN_SIDE} to "
        f"{MAX_SIDE:,} pixels."
    )
    model_events: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "preprocess": False,
        "api_visibility": "private",
    }
    quick_events: dict[str, Any] = {
        "queue": False,
        "preprocess": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    with gr.Blocks(title="Transparent objects", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# Transparent objects\nFinds glass, bottles and windows in pictures. Nothing that you send is kept."
        )
        told = gr.Markdown(desk.describe(names[0]))
        with gr.Accordion("Settings of the model", open=False):
            model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            tta = gr.Radio(
                [(TTA_NAMES[each], each) for each in VIEWS], value=first.tta, label="The model looks at the picture",
                info="More views take longer, are a little better, and show where the model is unsure.",
            )  # fmt: skip
            with gr.Row(visible=first.objective == "diffusion") as sampling:
                steps = gr.Slider(1, MAX_STEPS, min(MAX_STEPS, first.denoise_steps), step=1, label="Denoising steps")
                members = gr.Slider(
                    1, MAX_MEMBERS, min(MAX_MEMBERS, first.ensemble_size), step=1, label="Samples that vote"
                )
        with gr.Tab("One picture"), gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    label="Picture", sources=["upload", "webcam", "clipboard"], type="filepath", height=360, buttons=["fullscreen"],
                    webcam_options=gr.WebcamOptions(mirror=False), elem_id="picture",
                )  # fmt: skip
                again = gr.Button("Find glass", variant="primary")
                gr.set_static_paths(EXAMPLES_FOLDER)  # not among the uploads, which come and go
                examples = [str(path) for name in EXAMPLES if (path := EXAMPLES_FOLDER / f"{name}.jpg").is_file()]
                if examples:
                    gr.Examples(examples, picture, label="Or one of these", api_visibility="private")
            with gr.Column(min_width=300):
                sentence = gr.HTML(good(NOTHING_YET), padding=False, elem_id="sentence")
                with gr.Column(visible=False) as found:
                    view = gr.Radio(
                        list(VIEW_NAMES), value=VIEW_NAMES[0], show_label=False, container=False, elem_id="view"
                    )
                    shown = gr.Image(
                        label="What was found", interactive=False, height=420, buttons=["fullscreen"], elem_id="shown",
                        alt_text="The picture with what the model found in it",
                    )  # fmt: skip
                    meaning = gr.HTML(padding=False)
                    threshold = gr.Slider(
                        0, 1, round(first.threshold, 3), step=0.001, label="Threshold", elem_id="threshold",
                        info="Higher: only what the model is sure of. Nothing is predicted again.",
                    )  # fmt: skip
                    opacity = gr.Slider(0, 1, OPACITY, step=0.01, label="Opacity of the overlay", elem_id="opacity")
                    gr.Markdown("Save as PNG, in the picture’s own size")
                    with gr.Row():
                        savers = {kind: gr.Button(LABELS[kind], size="sm", min_width=100) for kind in DOWNLOADS}
        with gr.Tab("Several pictures"):
            gr.Markdown(
                f"Up to {MAX_FILES} pictures, one after the other. A file that cannot be used is named, and the others go on."
            )
            uploads = gr.File(label="Pictures", file_count="multiple", height=180, elem_id="uploads")
            batch_threshold = gr.Slider(
                0, 1, round(first.threshold, 3), step=0.001, label="Threshold", elem_id="batch_threshold"
            )
            start = gr.Button("Find glass in all", variant="primary")
            batch_sentence = gr.HTML(padding=False)
            masks = gr.DownloadButton("Save masks (zip)", visible=False)
            gallery = gr.Gallery(
                label="Overlays",
                columns=5,
                height="auto",
                object_fit="contain",
                visible=False,
                buttons=["fullscreen"],
                elem_id="gallery",
            )
            rows = gr.HTML(padding=False)
        gr.Markdown(
            f"Taken: {takes} Uploads and results go when this page is closed, or after {KEPT_SECONDS // 60} minutes without use."
        )
        file = gr.File(visible="hidden")  # what is saved passes through it
        settings = [model, tta, steps, members]
        result = [sentence, shown, meaning]
        for event in (picture.change, again.click):
            event(
                desk.segment, [picture, *settings, view, threshold, opacity], [*result, found, picture],
                show_progress_on=sentence, **model_events,
            ).then(None, js=SCROLL_SCRIPT)  # fmt: skip
        for event in (view.change, threshold.change, opacity.change):
            event(desk.look, [picture, view, threshold, opacity], result, trigger_mode="always_last", **quick_events)
        for kind, button in savers.items():
            saved = button.click(desk.save, [gr.State(kind), threshold, opacity], file, **quick_events)
            saved.then(None, file, js=SAVE_SCRIPT)
        uploads.upload(desk.note, uploads, None, **quick_events)
        start.click(
            desk.batch, [uploads, *settings, batch_threshold], [batch_sentence, rows, gallery, masks],
            show_progress_on=batch_sentence, **model_events,
        )  # fmt: skip
        model.change(
            desk.choose, model, [told, tta, sampling, steps, members, threshold, batch_threshold], **quick_events
        )
        page.unload(desk.leave)
    return page.queue(max_size=limits.queue)


def launch(desk: Desk, host: str, port: int, share: bool) -> tuple[str, str | None]:
    """Serves the page from threads of their own.

    Returns:
        Its address, and the public one if there is one.
    """
    # Gradio's own fonts come from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, public = build_page(desk).launch(
        server_name=host, server_port=port, share=share, max_file_size=desk.limits.upload_mb * MEGABYTE, prevent_thread_lock=True,
        quiet=True, show_error=True, ssr_mode=False, run_history=False, enable_monitoring=False, mcp_server=False, footer_links=[], css=CSS,
        theme=theme.set(block_info_text_color="*neutral_600"),
    )  # fmt: skip
    return local, public
