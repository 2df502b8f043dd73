"""Render pairs of pictures and masks of glass in the layout of Trans10k v1.

Usage: python -m dataset.render_glass OUT --split train --count 800 --size 128 --seed 0
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dataset.glass_scenes import Difficulty, GlassScene, sample_scene
from dataset.glass_shapes import Mesh

MASK_VALUES = {"thing": 85, "stuff": 255}
SPLITS = ("train", "validation", "test")
SMALLEST_COVERAGE, LARGEST_COVERAGE = 0.04, 0.85
ATTEMPTS = 40
PICTURE_OVERSAMPLING, PICTURE_SAMPLES, PATH_DEPTH = 3, 4, 10
MASK_OVERSAMPLING = 3
HIGHLIGHT_LIMIT, STRAY_FACTOR, STRAY_MARGIN = 1.6, 2.5, 0.05
JPEG_QUALITY = 92
DENOISING, GRAIN = 0.065, (0.008, 0.022)

ByteImage = NDArray[np.uint8]


class RenderError(Exception):
    """A problem the user can mend; the message says how."""


def load_mitsuba() -> Any:
    """Mitsuba with its scalar variant on one thread: the work is spread over processes instead."""
    import drjit
    import mitsuba

    mitsuba.set_variant("scalar_rgb")
    drjit.set_thread_count(1)
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


def plugin(mitsuba: Any, description: Any) -> Any:
    """A nested plugin dictionary with its pixel arrays (H, W, 3) turned into bitmaps."""
    if not isinstance(description, dict):
        return description
    converted = {key: plugin(mitsuba, value) for key, value in description.items()}
    if "pixels" in converted:
        # Row 0 of a bitmap lies at texture coordinate v = 1, as in a picture.
        converted["bitmap"] = mitsuba.Bitmap(np.ascontiguousarray(converted.pop("pixels"), dtype=np.float32))
        converted["raw"] = True
    return converted


def build_mesh(mitsuba: Any, name: str, mesh: Mesh, material: Any) -> Any:
    """A Mitsuba mesh with the given surface."""
    properties = mitsuba.Properties()
    properties["mesh_bsdf"] = material
    built = mitsuba.Mesh(
        name,
        len(mesh.vertices),
        len(mesh.faces),
        has_vertex_normals=mesh.smooth,
        has_vertex_texcoords=True,
        props=properties,
    )
    parameters = mitsuba.traverse(built)
    parameters["vertex_positions"] = mesh.vertices.astype(np.float32).ravel()
    parameters["faces"] = mesh.faces.astype(np.uint32).ravel()
    parameters["vertex_texcoords"] = mesh.texture_coordinates.astype(np.float32).ravel()
    parameters.update()
    return built


def build_scene(mitsuba: Any, scene: GlassScene) -> Any:
    """The Mitsuba scene, without a camera; body number k becomes the shape with the id body_k."""
    transform = mitsuba.ScalarTransform4f
    description: dict[str, Any] = {"type": "scene"}
    for number, body in enumerate(scene.bodies):
        surface = mitsuba.load_dict(plugin(mitsuba, body.material))
        description[f"body_{number}"] = build_mesh(mitsuba, f"body_{number}", body.mesh, surface)
    # Lamps are made one by one: Mitsuba puts nested ones into the scene in an order that varies from run to run, and
    # with the order the lamp that a random number picks.
    for number, light in enumerate(scene.lights):
        facing = transform().look_at(light.position, light.target, [0.0, 0.1, 1.0])
        description[f"light_{number}"] = mitsuba.load_dict(
            {
                "type": "rectangle",
                "to_world": facing @ transform().scale([*light.half_size, 1.0]),
                "emitter": {"type": "area", "radiance": {"type": "rgb", "value": list(light.radiance)}},
            }
        )
    # The environment's own axis is y.
    description["environment"] = mitsuba.load_dict(
        {
            "type": "envmap",
            "bitmap": mitsuba.Bitmap(scene.environment),
            "to_world": transform().rotate([1, 0, 0], 90),
        }
    )
    return mitsuba.load_dict(description)


def build_sensor(mitsuba: Any, scene: GlassScene, pixels: int, samples: int) -> Any:
    """The scene's camera with a square film of `pixels` and a box filter."""
    view = mitsuba.ScalarTransform4f().look_at(scene.camera.position, scene.camera.target, [0, 0, 1])
    return mitsuba.load_dict(
        {
            "type": "perspective",
            "fov": scene.camera.field_of_view,
            "near_clip": 0.01,
            "to_world": view,
            "film": {
                "type": "hdrfilm",
                "width": pixels,
                "height": pixels,
                "pixel_format": "rgb",
                "rfilter": {"type": "box"},
            },
            # One sample lies in the middle of its pixel: jitter would fray the edges of masks.
            "sampler": {"type": "stratified", "sample_count": samples, "jitter": samples > 1},
        }
    )


def averaged(values: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Mean over blocks of factor x factor pixels: (H * factor, W * factor, C) to (H, W, C)."""
    rows, columns, channels = values.shape
    return values.reshape(rows // factor, factor, columns // factor, factor, channels).mean(axis=(1, 3))


def render_mask(mitsuba: Any, built: Any, scene: GlassScene, size: int, seed: int) -> ByteImage:
    """Mask (size, size, 3): where the nearest surface is glass over more than half a pixel, 85 things and 255 panes.

    The nearest shape is looked up instead of lighting the glass up: smooth normals would darken an emitter's rim.
    """
    integrator = mitsuba.load_dict({"type": "aov", "aovs": "nearest:shape_index"})
    # One sample a fine pixel, as indices cannot be averaged.
    sensor = build_sensor(mitsuba, scene, size * MASK_OVERSAMPLING, 1)
    rendered = np.asarray(mitsuba.render(built, sensor=sensor, integrator=integrator, spp=1, seed=seed))
    roles = {f"body_{number}": body.role for number, body in enumerate(scene.bodies)}
    # Index 0 stands for no hit; lamps have no role.
    order = ["opaque"] + [roles.get(shape.id(), "opaque") for shape in built.shapes()]
    nearest = np.rint(rendered[..., -1]).astype(np.int64)
    is_class = np.array([[role == name for name in MASK_VALUES] for role in order], dtype=np.float32)
    shares = averaged(is_class[nearest], MASK_OVERSAMPLING)
    values = np.array(list(MASK_VALUES.values()), dtype=np.uint8)[shares.argmax(axis=2)]
    plane = np.where(shares.sum(axis=2) > 0.5, values, 0).astype(np.uint8)
    return np.repeat(plane[..., None], 3, axis=2)


def expose(radiance: NDArray[np.float32], brightness: float) -> NDArray[np.float32]:
    """Linear radiance (H * k, W * k, 3) with k = PICTURE_OVERSAMPLING to sRGB values (H, W, 3) in 0..1.

    The 92nd percentile of luminance becomes `brightness`; brighter samples are cut before they are averaged, which
    keeps single stray paths from showing as bright dots.
    """
    from scipy.ndimage import uniform_filter

    radiance = np.nan_to_num(radiance, nan=0.0, posinf=0.0, neginf=0.0)
    luminance = averaged(radiance, PICTURE_OVERSAMPLING) @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    bright, middle = np.percentile(luminance, [92, 50])
    # A bright window must not leave the rest of the picture black.
    reference = min(float(bright) / brightness, float(middle) / 0.1)
    fine = np.clip(radiance / max(reference, 1e-6), 0.0, HIGHLIGHT_LIMIT)
    around = uniform_filter(averaged(fine, PICTURE_OVERSAMPLING), size=(5, 5, 1))
    limit = STRAY_FACTOR * around + STRAY_MARGIN
    limit = limit.repeat(PICTURE_OVERSAMPLING, axis=0).repeat(PICTURE_OVERSAMPLING, axis=1)
    scaled = averaged(np.minimum(fine, limit), PICTURE_OVERSAMPLING)
    scaled = np.clip(np.where(scaled > 0.8, 0.8 + 0.2 * np.tanh((scaled - 0.8) / 0.4), scaled), 0.0, 1.0)
    encoded = np.where(scaled <= 0.0031308, 12.92 * scaled, 1.055 * np.maximum(scaled, 1e-8) ** (1 / 2.4) - 0.055)
    return encoded.astype(np.float32)


def developed(picture: NDArray[np.float32], seed: int) -> ByteImage:
    """Smooth the path tracer's noise, which is stronger in glass than elsewhere, and lay even grain over the picture.

    Without it a network could tell glass by its noise. The picture is (H, W, 3) in 0..1.
    """
    from skimage.restoration import denoise_nl_means

    smooth = denoise_nl_means(picture, patch_size=3, patch_distance=5, h=DENOISING, fast_mode=True, channel_axis=-1)
    rng = np.random.default_rng(seed)
    grain = rng.normal(0.0, rng.uniform(*GRAIN), size=picture.shape)
    return np.rint(np.clip(smooth + grain, 0.0, 1.0) * 255.0).astype(np.uint8)


def render_pair(scene: GlassScene, size: int, seed: int) -> tuple[ByteImage, ByteImage]:
    """Render a scene.

    Args:
        scene: what to render.
        size: side of the square picture in pixels.
        seed: of the sampler, 0 to 2**31 - 1.

    Returns:
        Picture and mask, both uint8 (size, size, 3).
    """
    mitsuba = load_mitsuba()
    built = build_scene(mitsuba, scene)
    return render_picture(mitsuba, built, scene, size, seed), render_mask(mitsuba, built, scene, size, seed)


def render_picture(mitsuba: Any, built: Any, scene: GlassScene, size: int, seed: int) -> ByteImage:
    """The picture alone, uint8 (size, size, 3)."""
    # Unlike path, volpath lets light straight through panes, so that the view behind them is not noisier than the rest.
    name = "volpath" if any(body.role == "stuff" for body in scene.bodies) else "path"
    integrator = mitsuba.load_dict({"type": name, "max_depth": PATH_DEPTH, "rr_depth": 5})
    sensor = build_sensor(mitsuba, scene, size * PICTURE_OVERSAMPLING, PICTURE_SAMPLES)
    rendered = mitsuba.render(built, sensor=sensor, integrator=integrator, spp=PICTURE_SAMPLES, seed=seed)
    return developed(expose(np.asarray(rendered, dtype=np.float32), scene.brightness), seed)


def coverage(mask: ByteImage) -> float:
    """Share of the pixels that are glass."""
    return float((mask[..., 0] > 0).mean())


def draw_pair(split: str, seed: int, index: int, size: int) -> tuple[ByteImage, ByteImage]:
    """Picture and mask number `index` of a split: the first drawn scene in which glass takes a fair part."""
    mitsuba = load_mitsuba()
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index, attempt]))
        scene = sample_scene(rng, difficulty_of(index))
        sampler_seed = int(rng.integers(0, 2**31))
        built = build_scene(mitsuba, scene)
        mask = render_mask(mitsuba, built, scene, size, sampler_seed)
        fair = SMALLEST_COVERAGE <= coverage(mask) <= LARGEST_COVERAGE
        if fair or not scene.has_glass or attempt == ATTEMPTS - 1:
            break
    return render_picture(mitsuba, built, scene, size, sampler_seed), mask


def difficulty_of(index: int) -> Difficulty:
    """Even numbers are easy, odd ones hard."""
    return "easy" if index % 2 == 0 else "hard"


def pair_paths(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """Where picture and mask number `index` of a split lie."""
    difficulty = difficulty_of(index)
    folder = root / split if split == "train" else root / split / difficulty
    stem = f"{difficulty}_{index:05d}"
    return folder / "images" / f"{stem}.jpg", folder / "masks" / f"{stem}_mask.png"


def write_pair(root: Path, split: str, seed: int, index: int, size: int) -> int:
    """Render and write one pair; the picture comes last, so that a picture always has its mask. Returns `index`."""
    image, mask = draw_pair(split, seed, index, size)
    image_path, mask_path = pair_paths(root, split, index)
    for path, pixels in ((mask_path, mask), (image_path, image)):
        unfinished = path.with_name(f".{path.name}.part")
        file_format = "PNG" if path.suffix == ".png" else "JPEG"
        Image.fromarray(pixels).save(unfinished, format=file_format, quality=JPEG_QUALITY)
        unfinished.replace(path)
    return index


def prepare_worker() -> None:
    """Leave interrupts, which reach the whole process group, to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def render_split(root: Path, split: str, count: int, size: int, seed: int, workers: int) -> int:
    """Render the pairs of a split that are missing; returns how many were rendered."""
    for index in range(min(count, 2)):
        for path in pair_paths(root, split, index):
            path.parent.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(count) if not all(path.exists() for path in pair_paths(root, split, index))]
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        futures = [executor.submit(write_pair, root, split, seed, index, size) for index in missing]
        with tqdm(total=count, initial=count - len(missing), desc=split, unit="picture") as progress:
            for future in as_completed(futures):
                future.result()
                progress.update()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return len(missing)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dataset.render_glass", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the data set; pairs that are already there are kept")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, required=True, help="pairs in the split, half easy and half hard")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser.parse_args(arguments)


def check_arguments(options: argparse.Namespace) -> None:
    """Raise RenderError where the command cannot work."""
    if options.count < 1:
        raise RenderError(f"--count is {options.count}: ask for at least 1 pair")
    if options.size < 16 or options.size % 16:
        raise RenderError(f"--size is {options.size}: use a multiple of 16, such as 128")
    if options.seed < 0:
        raise RenderError(f"--seed is {options.seed}: use 0 or more")
    if options.workers < 1:
        raise RenderError(f"--workers is {options.workers}: use at least 1")
    for module in ("mitsuba", "skimage"):
        if importlib.util.find_spec(module) is None:
            raise RenderError(f"{module} is not installed: run pip install -r requirements-render.txt")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RenderError(f"cannot make the folder {options.out} ({error.strerror}): name another one") from error
    if not os.access(options.out, os.W_OK | os.X_OK):
        raise RenderError(f"cannot write into {options.out}: name another folder or change its permissions")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        check_arguments(options)
        render_split(options.out, options.split, options.count, options.size, options.seed, options.workers)
    except RenderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: cannot write into {options.out} ({error.strerror}): free some space or name another folder",
            file=sys.stderr,
        )
        return 2
    except BrokenProcessPool:
        print(
            "error: a worker was killed, perhaps for memory: run again with fewer --workers; finished pairs are kept",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
