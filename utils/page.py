"""A page to look at predictions: `report.html` beside the PNGs, one file that needs no network and nothing else.

`python -m utils.page FOLDER` writes it anew for a folder that val_inference.py wrote, which writes it by itself.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.errors import InputError, first_line, run_command
from utils.metrics import COLUMNS
from utils.scoring import PUBLISHED_SIZES

PAGE_FILE_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("page_template.html")
TILE_SIDE = 96
MAX_THREADS = 4  # each holds a prediction's pictures
WEBP_QUALITY = 55
MISSED, INVENTED = (230, 97, 0), (26, 100, 220)  # told apart by colour-blind readers too
HEADINGS = {"iou": "IoU", "recall": "recall", "mse": "MSE", "boundary_iou": "boundary IoU"}
TILES = ("picture", "truth", "prediction", "raw", "error", "uncertainty")


def write_page(folder: Path, title: str | None = None) -> Path:
    """Writes `report.html` from the folder's `metrics.json`, `evaluation.json`, `curves.json`, `per_image.csv` and PNGs.

    Args:
        folder: that val_inference.py wrote.
        title: of the page; None: the folder's name.

    Returns:
        The page's path.

    Raises:
        InputError: naming the file that is missing or cannot be read.
    """
    metrics, evaluation, curves = (_read_json(folder / f"{name}.json") for name in ("metrics", "evaluation", "curves"))
    table = folder / "per_image.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        scores = [[row["name"], row["difficulty"], *(float(row[column]) for column in COLUMNS)] for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{table}: cannot be read as scores ({first_line(error)})") from error
    with ThreadPoolExecutor(MAX_THREADS) as pool:  # decoding and compressing release the interpreter lock
        strips = list(pool.map(lambda row: strip(folder, row["name"]), rows))
    data = {
        "columns": [HEADINGS[column] for column in COLUMNS],
        "tiles": list(TILES[: 6 if any((folder / f"{row['name']}_uncertainty.png").is_file() for row in rows) else 5]),
        "rows": [[*score, base64.b64encode(image).decode()] for score, image in zip(scores, strips, strict=True)],
    }
    parts = {
        "title": html.escape(title or folder.resolve().name),
        "summary": summary_table(metrics, evaluation),
        "protocols": protocols_table(evaluation.get("protocols", {})),
        "plots": "".join(
            f'<img alt="{html.escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
            for name, svg in plots(evaluation, curves).items()
        ),
        # A tag in a name would end the script or change how it is read.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = re.sub(r"@(\w+)@", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    partial = folder / f".{PAGE_FILE_NAME}.part"
    partial.write_text(page, encoding="utf-8")
    return partial.replace(folder / PAGE_FILE_NAME)


def strip(folder: Path, name: str) -> bytes:
    """Returns small pictures of one prediction side by side, in the order of `TILES`, as WebP.

    Raises:
        InputError: naming the file that is missing or cannot be read.
    """
    images = {kind: _read_png(folder / f"{name}_{kind}.png") for kind in ("img", "maskgt", "maskq", "pred")}
    if images["maskgt"].size != images["maskq"].size:
        raise InputError(f"{folder / name}_maskq.png: not the size of {name}_maskgt.png")
    if (folder / f"{name}_uncertainty.png").is_file():
        images["uncertainty"] = _read_png(folder / f"{name}_uncertainty.png")
    small = {kind: np.array(image.resize((TILE_SIDE,) * 2, Image.Resampling.BOX)) for kind, image in images.items()}
    level = 0 if (folder / f"{name}_classes.png").is_file() else 127  # as in utils.metrics
    truth, mask = (small[kind].max(axis=2) > level for kind in ("maskgt", "maskq"))
    tiles = [small[kind] for kind in ("img", "maskgt", "maskq", "pred")]
    tiles.append(error_map(small["img"], mask, truth))
    tiles += [small["uncertainty"]] if "uncertainty" in small else []
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1)).save(buffer, "WEBP", quality=WEBP_QUALITY, method=2)
    return buffer.getvalue()


def error_map(image: NDArray[np.uint8], mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Returns the picture pale and grey, its glass brighter, with what was missed and what was invented in colour.

    Args:
        image: (H, W, 3), uint8.
        mask: predicted (H, W), bool.
        truth: (H, W), bool.
    """
    grey = image.mean(axis=2, keepdims=True) * 0.35 + 90 + 60 * (mask & truth)[..., None]
    shown = np.repeat(grey, 3, axis=2)
    shown[truth & ~mask] = MISSED
    shown[mask & ~truth] = INVENTED
    return shown.astype(np.uint8)


def summary_table(metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Returns the per-image figures as an HTML table: all pictures with their intervals, then each difficulty."""
    rows = [("all", metrics)] + [(name, metrics[name]) for name in ("easy", "hard") if name in metrics]
    cells = [["", *HEADINGS.values(), "pictures", "without glass"]]
    for name, values in rows:
        line = [name]
        for column in COLUMNS:
            interval = evaluation.get("intervals", {}).get(column) if name == "all" else None
            line.append(f"{values[column]:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""))
        cells.append([*line, str(values["num_images"]), str(values["num_empty_truth"])])
    threshold, calibration = evaluation.get("threshold"), evaluation.get("calibration")
    notes = [str(metrics.get("protocol", ""))]
    if threshold:
        notes.append(f"threshold {threshold['value']:.3g}, from {threshold['chosen_on']}")
    if calibration:
        notes.append(f"expected calibration error {calibration['ece']:.4f}")
    return _html_table(cells) + f"<p>{html.escape('; '.join(notes))}; in brackets the 95 % bootstrap interval</p>"


def protocols_table(protocols: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns every protocol's figures at every size as HTML tables."""
    tables = []
    for protocol, sizes in protocols.items():
        columns = [name for name, value in next(iter(sizes.values()), {}).items() if isinstance(value, float)]
        cells = [[protocol, *columns]]
        cells += [
            [
                f"{size}{' (as published)' if PUBLISHED_SIZES.get(protocol) == size else ''}",
                *(_number(figures.get(name)) for name in columns),
            ]
            for size, figures in sizes.items()
        ]
        tables.append(_html_table(cells))
        classes = {size: figures["iou"] for size, figures in sizes.items() if isinstance(figures.get("iou"), dict)}
        if classes:
            names = list(next(iter(classes.values())))
            lines = [[size, *(_number(scores[name]) for name in names)] for size, scores in classes.items()]
            tables.append(_html_table([["IoU", *names], *lines]))
    return "".join(tables)


def plots(evaluation: Mapping[str, Any], curves: Mapping[str, Sequence[float]]) -> dict[str, bytes]:
    """Returns SVGs: IoU over thresholds, precision over recall, glass over certainty."""
    levels = np.arange(256) / 255
    chosen = evaluation["threshold"]["value"] if "threshold" in evaluation else None

    def draw(x: Any, y: Any, x_label: str, y_label: str, mark: float | None = None, diagonal: bool = False) -> bytes:
        figure = matplotlib.figure.Figure(figsize=(3.4, 2.8), layout="constrained")
        axes = figure.subplots()
        if diagonal:
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axes.plot(x, y, color="#1a64dc", marker="o" if diagonal else None, markersize=4)
        if mark is not None:
            axes.axvline(mark, color="#e66100", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    pictures = {
        "mean IoU over thresholds": draw(levels, curves["iou"], "threshold (chosen: orange)", "mean IoU", chosen),
        "precision over recall": draw(curves["recall"], curves["precision"], "recall", "precision"),
    }
    if bins := evaluation.get("calibration", {}).get("bins"):
        certainty, glass = ([each[name] for each in bins] for name in ("certainty", "glass"))
        pictures["calibration"] = draw(certainty, glass, "predicted certainty", "share of glass", diagonal=True)
    return pictures


def _html_table(cells: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, line in enumerate(cells):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); give a folder that val_inference.py wrote"
        ) from error


def _read_png(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder that val_inference.py wrote")
    print(write_page(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
