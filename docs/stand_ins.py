"""Makes what `make docs-check` needs in its checkout: what stands in for SD3.5, for downloads and for pictures of the reader's own."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.base import prompt_cache_path  # noqa: E402

SAMPLE = ROOT / "assets" / "glass_sample"
BASE, REVISION = "stabilityai/stable-diffusion-3.5-medium", "0" * 40
PAIRS_OF_A_DOWNLOAD = 20


def pairs(split: str, count: int) -> list[tuple[Path, Path]]:
    """Returns the first pictures of a split of the sample with their masks."""
    images = sorted((SAMPLE / split / "images").iterdir())[:count]
    return [(image, SAMPLE / split / "masks" / f"{image.stem}_mask.png") for image in images]


def make_base() -> None:
    """Puts the tiny base into the hub's cache under the name of SD3.5, its prompt where computed ones lie: it has no text encoders."""
    model = Path(HF_HUB_CACHE) / f"models--{BASE.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    snapshot = model / "snapshots" / REVISION
    shutil.copytree(ROOT / "assets" / "tiny_sd3", snapshot)
    cached = prompt_cache_path(snapshot)
    cached.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(snapshot / "empty_prompt.safetensors", cached)


def make_trans10k() -> None:
    """Makes both versions of Trans10k, as folder and as downloads."""
    shutil.copytree(SAMPLE, ROOT / "data" / "Trans10k")
    (ROOT / "downloads").mkdir()
    with zipfile.ZipFile(ROOT / "Trans10K.zip", "w") as archive:
        for path in sorted(SAMPLE.rglob("*.*")):
            archive.write(path, f"Trans10K/{path.relative_to(SAMPLE)}")
    shutil.copy(ROOT / "Trans10K.zip", ROOT / "downloads")
    with zipfile.ZipFile(ROOT / "Trans10K_cls12.zip", "w") as archive:
        for split, place in (("train", "train"), ("validation/easy", "validation"), ("test/hard", "test")):
            for image, mask in pairs(split, PAIRS_OF_A_DOWNLOAD):
                archive.write(image, f"Trans10K_cls12/{place}/images/{image.name}")
                ids = Image.fromarray(np.where(np.asarray(Image.open(mask).convert("L")) > 0, 7, 0).astype(np.uint8))
                with archive.open(f"Trans10K_cls12/{place}/masks_12/{image.stem}_mask.png", "w") as file:
                    ids.save(file, format="png")


def make_other_data_sets() -> None:
    """Makes downloads of GDD and GSD, exports of COCO, and folders of somebody's own, with and without splits."""
    for split, place in (("train", "train"), ("validation/easy", "validation"), ("test/hard", "test")):
        for kind, files in zip(
            ("images", "masks"), zip(*pairs(split, 2 * PAIRS_OF_A_DOWNLOAD), strict=True), strict=True
        ):
            (folder := ROOT / "data" / "own" / place / kind).mkdir(parents=True)
            for path in files:
                shutil.copy(path, folder)
    photos, gdd = ROOT / "photos", ROOT / "work" / "GDD"
    for split, place in (("train", gdd / "train"), ("test/easy", gdd / "test"), ("test/easy", photos)):
        images, masks = ("images", "masks") if place is photos else ("image", "mask")
        (place / images).mkdir(parents=True)
        (place / masks).mkdir()
        for image, mask in pairs(split, 2 * PAIRS_OF_A_DOWNLOAD):
            shutil.copy(image, place / images / image.name)
            shutil.copy(mask, place / masks / f"{image.stem}.png")
    with zipfile.ZipFile(ROOT / "GDD.zip", "w") as archive:
        for path in sorted(gdd.rglob("*.*")):
            archive.write(path, path.relative_to(gdd.parent))
    with tarfile.open(ROOT / "GSD.tar.gz", "w:gz") as archive:
        archive.add(gdd, "GSD")
    shutil.rmtree(gdd.parent)
    (ROOT / "pictures").mkdir()
    images, annotations = [], []
    for number, (image, _) in enumerate(pairs("train", PAIRS_OF_A_DOWNLOAD), start=1):
        width, height = Image.open(image).size
        shutil.copy(image, ROOT / "pictures" / image.name)
        images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        square = [10.0, 10.0, width / 2, 10.0, width / 2, height / 2, 10.0, height / 2]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "segmentation": [square]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
    (ROOT / "instances.json").write_text(json.dumps(content))
    with zipfile.ZipFile(ROOT / "export.zip", "w") as archive:
        archive.write(ROOT / "instances.json", "export/annotations.json")
        for path in sorted((ROOT / "pictures").iterdir()):
            archive.write(path, f"export/images/{path.name}")


def make_masks() -> None:
    """Makes somebody's predictions, with the truths."""
    for name in ("predictions", "truths"):
        shutil.copytree(SAMPLE / "test" / "easy" / "masks", ROOT / "docs_check_masks" / name)


if __name__ == "__main__":
    make_base()
    make_trans10k()
    make_other_data_sets()
    make_masks()
