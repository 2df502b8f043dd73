"""A fair study on the sample: named variants of one training, the same pictures seen, several seeds each.

`python -m benchmarks.study` trains and scores every variant through the real entry points, one after the other, and writes
`study.md`, `study.svg` and `study.json`; started again it goes on where it stopped. Networks from scratch train for the minutes
that the first variant took with the same seed. Flags that it does not know go to every training and inference, such as
`--data_type bf16`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray

from utils.checkpoints import list_checkpoints, read_config
from utils.compare import find_scores, interval, read_scores
from utils.errors import CommandError, InputError, run_command
from utils.history import read_history
from utils.provenance import machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Args:
        name: in the table.
        flags: of trainer.py, over configs/tiny.yaml.
        overlays: configuration files beneath configs/tiny.yaml.
        random_transformer: starts from the tiny base with a transformer of random weights.
        network: of `benchmarks.scratch`, trained in the place of all this.
    """

    name: str
    flags: Mapping[str, object] = field(default_factory=dict)
    overlays: tuple[str, ...] = ()
    random_transformer: bool = False
    network: str | None = None


# What the first row is, over configs/tiny.yaml, which may have taken up what a study found.
COMMON = {"prediction": "clean", "latent_loss_weight": 0.2}
BASELINE = Variant("clean latents, both losses")
VARIANTS = (
    BASELINE,
    Variant("folded conditioning", {"fold_conditioning": "true"}),
    Variant("fresh augmentation, no latent cache", {"latent_cache": "off"}),
    Variant("pixel loss alone", {"latent_loss_weight": 0.0}),
    Variant("VAE decoder, latent loss", {"mask_decoder": "vae", "latent_loss_weight": 1.0, "pixel_loss_weight": 0.0}),
    Variant("VAE decoder, latent and pixel loss", {"mask_decoder": "vae"}),
    Variant("predicts velocity", {"prediction": "velocity"}),
    Variant("predicts residual", {"prediction": "residual"}),
    Variant("predicts residual, pixel loss alone", {"prediction": "residual", "latent_loss_weight": 0.0}),
    Variant("without cutmix", {"cutmix": 0.0}),
    Variant("edges weigh more", {"edge_weight": 4.0}),
    Variant("random transformer", random_transformer=True),
    Variant("diffusion", {"tta": "none"}, ("configs/diffusion.yaml",)),  # its samples vote already
    Variant("U-Net from scratch", network="unet"),
    Variant("SegFormer-B0 from scratch", network="segformer"),
)
MEASURES = ("iou", "boundary_iou")


def train_and_score(
    variant: Variant, seed: int, out: Path, more: Sequence[str], seconds: float = 0.0
) -> dict[str, Any]:
    """Trains a variant with a seed, or goes on with it, and scores the test split with its best checkpoint.

    Args:
        variant: to train.
        seed: of every draw.
        out: folder of the study.
        more: flags of every training.
        seconds: that a network from scratch trains.

    Returns:
        `seconds` of the training; `iou` and `boundary_iou` of every test picture by name.

    Raises:
        CommandError: if a command fails.
    """
    folder = out / variant.name.replace("/", "_").replace(" ", "_").replace(",", "") / f"seed-{seed}"
    result = folder / "study.json"
    if result.is_file():
        record = json.loads(result.read_text(encoding="utf-8"))
        if record["flags"] != list(more):
            raise InputError(
                f"{result}: was trained with the flags {shlex.join(record['flags'])!r}, not {shlex.join(more)!r}; choose another --out"
            )
        return record
    if variant.network is not None:
        record = _train_network(variant.network, seed, folder, seconds / 60)
    else:
        record = _train_variant(variant, seed, out, folder, more)
    record["flags"] = list(more)
    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(result)
    return record


def _train_network(network: str, seed: int, folder: Path, minutes: float) -> dict[str, Any]:
    out = folder / "scratch.json"
    flags = {"network": network, "seed": seed, "minutes": minutes, "threshold": "validation", "out": out}
    _run("-m", ["benchmarks.scratch", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    content = json.loads(out.read_text(encoding="utf-8"))
    scores = {
        measure: {name: values[position] for name, values in content["pictures"].items()}
        for position, measure in enumerate(MEASURES)
    }
    return {"seconds": 60 * content["minutes"], **scores}


def _train_variant(variant: Variant, seed: int, out: Path, folder: Path, more: Sequence[str]) -> dict[str, Any]:
    flags: dict[str, object] = {"output_dir": folder, "seed": seed, **COMMON, **variant.flags}
    if variant.random_transformer:
        flags["base_model_path"] = random_base(out / "random_base")
    configs = [part for path in (*variant.overlays, "configs/tiny.yaml") for part in ("--config", str(ROOT / path))]
    arguments = [*configs, *(part for name, value in flags.items() for part in (f"--{name}", str(value))), *more]
    # Latents depend on the seed and on whether the recipe augments, not on the variant.
    cache = out / f"latents-{seed}{'-diffusion' if variant.overlays else ''}"
    resume = ["--resume_from_checkpoint", "latest"] if list_checkpoints(folder) else []
    _run("trainer.py", [*arguments, "--latent_cache_path", str(cache), *resume])
    _run("val_inference.py", [*arguments, "--load_checkpoint", "best"])
    scores = read_scores(find_scores(folder))
    by_measure = {measure: {name: row[measure] for name, row in scores.items()} for measure in MEASURES}
    return {"seconds": round(training_seconds(folder), 1), **by_measure}


def random_base(folder: Path) -> Path:
    """Writes the tiny base with a transformer of random weights, once, and returns its folder."""
    if not (folder / "transformer").is_dir():
        base = ROOT / "assets" / "tiny_sd3"
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
        torch.manual_seed(0)
        config = SD3Transformer2DModel.load_config(base, subfolder="transformer")
        partial = folder / "transformer.part"
        SD3Transformer2DModel.from_config(config).save_pretrained(partial)
        partial.replace(folder / "transformer")
    return folder


def table_row(name: str, records: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns a variant's line of the table: mean IoU over seeds and pictures, interval, difference from the baseline, cost."""

    def values(group: Sequence[dict[str, Any]], measure: str) -> NDArray[np.float64]:
        return np.array([[record[measure][picture] for picture in sorted(record[measure])] for record in group])

    scores, reference = values(records, "iou"), values(baseline, "iou")
    difference = scores - reference
    low, high = interval(scores)
    difference_low, difference_high = interval(difference)
    return {
        "variant": name,
        "iou": float(scores.mean()),
        "interval": [low, high],
        "iou_by_seed": [float(value) for value in scores.mean(axis=1)],
        "difference": float(difference.mean()),
        "difference_interval": [difference_low, difference_high],
        "boundary_iou": float(values(records, "boundary_iou").mean()),
        "minutes": float(np.mean([record["seconds"] for record in records]) / 60),
    }


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    lines = ["| variant | IoU | 95 % | seeds | difference | 95 % | boundary IoU | minutes |", "|---" * 8 + "|"]
    for row in rows:
        low, high = row["interval"]
        difference_low, difference_high = row["difference_interval"]
        seeds = " ".join(f"{value:.3f}" for value in row["iou_by_seed"])
        cells = [row["variant"], f"{row['iou']:.4f}", f"{low:.3f} to {high:.3f}", seeds, f"{row['difference']:+.4f}"]
        cells += [f"{difference_low:+.3f} to {difference_high:+.3f}", f"{row['boundary_iou']:.4f}"]
        cells.append(f"{row['minutes']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes an SVG of each variant's IoU with its interval and its seeds."""
    figure = matplotlib.figure.Figure(figsize=(7, 0.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        axes.plot(row["interval"], [number, number], color="#1a64dc")
        axes.plot(row["iou_by_seed"], [number] * len(row["iou_by_seed"]), "o", color="#e66100", markersize=4)
    names = [row["variant"] for row in rows]
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="IoU (dots: seeds; line: 95 %)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], command: str, seeds: int) -> None:
    """Writes `study.json`, `study.svg` and `study.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    computer = machine()
    record = {"command": command, "machine": computer, "rows": rows}
    (folder / "study.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(rows, folder / "study.svg")
    text = f"""# Study

    {command}

{seeds} seeds, {computer["cores"]} {"core" if computer["cores"] == 1 else "cores"} of {computer["processor"]}. Per-image protocol on the test split of the sample; the
threshold is chosen on validation where the recipe says so. Each row is the first one with one change, trained on as many
pictures; networks from scratch train for as many minutes on the sample, loading included, choose their threshold in the same way,
and see one view of each test picture where the recipe averages several. Intervals are 95 % bootstrap intervals over seeds and pictures, the
differences paired by picture; minutes are those of the training's updates, without latents and scoring.

{format_rows(rows)}

![IoU of every variant](study.svg)
"""
    (folder / "study.md").write_text(text, encoding="utf-8")


def _run(script: str, arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT)
    if done.returncode:
        raise CommandError(
            f"{script} failed with exit code {done.returncode}; mend that and start again: it goes on there"
        )


def training_seconds(folder: Path) -> float:
    """Returns how long the updates of a run took by its history, which outlives interruptions; validation is not in it."""
    config = read_config(folder)
    samples, seconds, last = config.train_batch_size * config.gradient_accumulation_steps, 0.0, 0
    for row in read_history(folder / "history.csv"):
        if row["samples_per_second"]:
            step = int(row["step"])
            seconds += (step - last) * samples / float(row["samples_per_second"])
            last = step
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of runs and results [runs/study]")
    parser.add_argument("--report", type=Path, default=Path("docs"), help="folder of study.md, .svg and .json [docs]")
    parser.add_argument("--only", nargs="+", default=names, help=f"variants: {'; '.join(names)} [all]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each [3]")
    arguments, more = parser.parse_known_args(argv)
    if unknown := set(arguments.only) - set(names):
        raise InputError(f"--only: no variant {min(unknown)!r}; there are: {'; '.join(names)}")
    if arguments.seeds < 1:
        raise InputError(f"--seeds: {arguments.seeds} is not valid, expected at least 1")
    chosen = [variant for variant in VARIANTS if variant is BASELINE or variant.name in arguments.only]
    records: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    for seed in range(arguments.seeds):  # all variants of a seed before the next, so that a part of a study is fair too
        for variant in chosen:
            seconds = records[BASELINE.name][seed]["seconds"] if variant is not BASELINE else 0.0
            records[variant.name].append(train_and_score(variant, seed, arguments.out, more, seconds))
    rows = [table_row(name, group, records[BASELINE.name]) for name, group in records.items()]
    command = shlex.join(["python", "-m", "benchmarks.study", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.report, rows, command, arguments.seeds)
    print(format_rows(rows))


if __name__ == "__main__":
    run_command(main)
