"""The model card of a pipeline: what it is, what it was trained from and on, what it scores, and under which licence it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

STABILITY_LICENCE = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}
UNKNOWN_LICENCE = {"license": "other", "license_name": "as-the-base-model"}


def model_card(config: Mapping[str, Any]) -> str:
    """Returns the card as Markdown with the hub's metadata in front.

    Args:
        config: of a pipeline; its `training`, as `utils.publishing.describe_training` gives it, may be None.
    """
    training = config.get("training") or {}
    licence = training.get("licence", UNKNOWN_LICENCE)
    scores = training.get("scores", [])
    name = training.get("name", "transparent-objects")
    data = ModelCardData(
        **licence,
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["transparent-objects", "glass", "stable-diffusion-3"],
        base_model=training.get("base_model") if training.get("base_on_hub") else None,
        model_name=name,
        eval_results=[result for score in scores for result in _results(score)] or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}", _what_it_is(config, training), _use(config)]
    if scores:
        parts += ["## Scores", _table(scores), _PROTOCOL]
    if recipe := training.get("recipe"):
        rows = "\n".join(f"- `{key}: {value}`" for key, value in sorted(recipe.items()))
        parts += ["## Recipe", "What differs from the defaults of `config.yaml`:\n\n" + rows]
    if commit := training.get("commit"):
        parts.append(f"Trained by the code at commit `{commit}`.")
    parts += ["## Licence", _licence_text(training)]
    return "\n\n".join(parts) + "\n"


_PROTOCOL = (
    "Per-image protocol: pictures and masks squashed to the model's resolution, masks by nearest neighbour; IoU and recall of the "
    "quantised mask and MSE of the raw 8-bit prediction for each picture, then the mean over pictures. An empty truth with an empty "
    "mask scores 1."
)


def _what_it_is(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    mode = {
        "end_to_end": "in one deterministic pass",
        "diffusion": f"as a diffusion model ({config.get('denoise_steps')} steps, {config.get('ensemble_size')} samples vote)",
    }.get(str(config.get("objective")), "")
    start = f"fine-tuned from `{training['base_model']}`" if "base_model" in training else "fine-tuned"
    palette = config.get("palette")
    told = (
        f"It tells these classes: {', '.join(palette['names'])}."
        if palette
        else "It tells transparent pixels from all others."
    )
    data = f" on `{training['data']}` (layout `{training.get('layout')}`)" if "data" in training else ""
    updates = f" for {training['updates']:,} updates" if "updates" in training else ""
    return (
        f"Segments transparent objects (glass, bottles, windows) {mode}. The transformer is {start}{data}{updates}, at "
        f"{config.get('resolution')} x {config.get('resolution')} pixels. {told}"
    )


def _use(config: Mapping[str, Any]) -> str:
    return f"""## Use

From the root of the repository that trained it, whose `requirements.txt` is installed:

```python
from models.pipeline import TransparencySegmentationPipeline

pipe = TransparencySegmentationPipeline.from_pretrained("FOLDER_OR_HUB_ID")
found = pipe("photo.jpg")  # found.masks[0]: (H, W), 1 where transparent; found.soft[0] in [0, 1], threshold {config.get("threshold"):.3g}
```

or `python predict.py photo.jpg --model FOLDER_OR_HUB_ID --output masks`. No code is loaded from this folder."""


def _table(scores: list[Mapping[str, Any]]) -> str:
    lines = [
        "| split | pictures | resolution | views | threshold | IoU | recall | MSE | boundary IoU |",
        "|" + "---|" * 9,
    ]
    for score in scores:
        figures = " | ".join(f"{score[name]:.4f}" for name in ("iou", "recall", "mse", "boundary_iou"))
        lines.append(
            f"| {score['split']} | {score['pictures']} | {score['resolution']} | {score['tta']} | {score['threshold']:.3g} | {figures} |"
        )
    return "\n".join(lines)


def _results(score: Mapping[str, Any]) -> list[EvalResult]:
    shared = {
        "task_type": "image-segmentation",
        "dataset_type": score["data"],
        "dataset_name": score["data"],
        "dataset_split": score["split"],
    }
    measures = (
        ("mean_iou", "IoU, per image", "iou"),
        ("recall", "recall, per image", "recall"),
        ("mse", "MSE, per image", "mse"),
    )
    return [
        EvalResult(metric_type=kind, metric_name=label, metric_value=round(score[key], 4), **shared)
        for kind, label, key in measures
    ]


def _licence_text(training: Mapping[str, Any]) -> str:
    licence = training.get("licence", UNKNOWN_LICENCE)
    named = licence.get("license_name", licence["license"])
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return (
        f"These weights are derived from `{training.get('base_model', 'the base model')}` and stand under its licence, "
        f"{named}{link}, which binds derived weights whatever the code's licence is. Data sets have terms of their own: Trans10k is for research only."
    )
