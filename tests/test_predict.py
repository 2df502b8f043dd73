"""Predicting users' files: real launches on a mixed folder, broken files among them, going on, and the same masks as the pipeline's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from models.pipeline import TransparencySegmentationPipeline
from predict import Predictor, build_parser, check_arguments, fingerprint, printable
from tests.conftest import ROOT, environment
from tests.test_checkpoints import write_run
from tests.test_pipeline import make_pipeline
from utils.errors import CommandError, InputError, InterruptedRunError, is_out_of_memory
from utils.prediction_inputs import Source, find_files, name_files
from utils.prediction_record import PredictionRecord
from utils.publishing import load_model

RNG = np.random.default_rng(0)
EVERYTHING = ("mask", "classes", "soft", "uncertainty", "overlay", "cutout", "contours")


def write_photos(folder: Path) -> None:
    """Writes six usable pictures of different kinds and three broken ones."""
    (folder / "deep").mkdir(parents=True)
    colour = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "a.png")
    Image.fromarray(colour).save(folder / "a.jpg")
    Image.fromarray(colour).save(folder / "deep" / "a.webp")
    Image.fromarray(colour[..., 0]).save(folder / "grey.png")
    Image.fromarray(colour[..., 0].astype(np.uint16) * 257).save(folder / "deep16.png")
    Image.fromarray(np.dstack([colour, colour[..., :1]])).save(folder / "alpha.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])


def launch(*arguments: str | Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "predict.py"), *(str(part) for part in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    return done


def test_a_mixed_folder_is_predicted_in_one_go_and_not_again(base: Path, tmp_path: Path) -> None:
    photos, out, run = tmp_path / "photos", tmp_path / "out", tmp_path / "run"
    write_photos(photos)
    write_run(run, base)
    flags = ("--model", run, "--output", out, "--recursive", "--save", "mask,contours", "--batch_size", "2")
    done = launch(photos, *flags, check=1)
    assert "3 of 9 files could not be predicted" in done.stderr
    for name in ("empty.png", "text.png", "cut.png"):
        assert f"not predicted: {photos / name}: cannot be read as a picture" in done.stdout
    names = ["a_mask.png", "a_png_mask.png", "alpha_mask.png", "deep/a_mask.png", "deep16_mask.png", "grey_mask.png"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == sorted(names)
    pipeline = load_model(str(run))
    for name, source in (
        ("a_mask.png", "a.jpg"),
        ("a_png_mask.png", "a.png"),
        ("deep16_mask.png", "deep16.png"),
        ("deep/a_mask.png", "deep/a.webp"),
    ):
        found = np.array(Image.open(out / name))
        assert np.array_equal(found, pipeline(photos / source).masks[0] * 255), name
    content = json.loads((out / "contours.json").read_text())
    assert len(content["images"]) == 6

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (photos / "text.png").unlink()
    (out / "grey_mask.png").unlink()
    done = launch(photos, *flags, check=1)
    assert "8 files, 5 done before" in done.stdout
    changed = [path.name for path in out.rglob("*.png") if before.get(path) != path.stat().st_mtime_ns]
    assert changed == ["grey_mask.png"]
    assert json.loads((out / "contours.json").read_text()) == content

    done = launch(photos, *flags, "--threshold", "0.9", check=2)
    assert f"{out}: holds predictions of other settings (threshold 0.4, now 0.9)" in done.stderr


def predictor_into(
    folder: Path, pipeline: TransparencySegmentationPipeline, kinds: tuple[str, ...] = EVERYTHING, batch_size: int = 2
) -> Predictor:
    stop = SimpleNamespace(noticed=lambda: 0)
    return Predictor(pipeline, PredictionRecord(folder, {}, False), kinds, {}, batch_size, stop)  # type: ignore[arg-type]


def test_every_kind_is_written_as_it_says(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("end_to_end", tta="flip")
    source = Source(tmp_path / "in" / "a.png", "a")
    predictor = predictor_into(tmp_path / "out", pipeline)
    predictor.predict([source])
    found = pipeline(source.path)
    assert found.uncertainty is not None
    expected = {
        "mask": found.masks[0] * 255,
        "classes": found.classes[0],
        "soft": (found.soft[0] * 255).round().astype(np.uint8),
        "uncertainty": (found.uncertainty[0] * 510).round().astype(np.uint8),
    }
    for kind, values in expected.items():
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / f"a_{kind}.png")), values), kind
    cut = np.array(Image.open(tmp_path / "out" / "a_cutout.png"))
    assert np.array_equal(cut[..., 3], expected["mask"])
    assert Image.open(tmp_path / "out" / "a_overlay.png").size == (30, 20)
    (details,) = predictor.record.finished()
    assert (details["width"], details["height"]) == (30, 20)
    assert details["share"] == pytest.approx(found.masks[0].mean(), abs=1e-4)
    assert sum(each["area"] for each in details["contours"]) == found.masks[0].sum()


def test_a_deterministic_model_has_no_uncertainty_to_write(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    predictor_into(tmp_path / "out", make_pipeline("end_to_end")).predict([Source(tmp_path / "in" / "a.png", "a")])
    assert not (tmp_path / "out" / "a_uncertainty.png").exists()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_diffusion_models_noise_is_its_pictures_own(batch_size: int, tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("diffusion")
    sources = name_files(find_files([str(tmp_path / "in")], (), True, tmp_path / "out"), {})
    predictor_into(tmp_path / "together", pipeline, ("soft",), batch_size).predict(sources)
    (alone,) = [source for source in sources if source.name == "grey"]
    predictor_into(tmp_path / "alone", pipeline, ("soft",)).predict([alone])
    left, right = (
        np.array(Image.open(tmp_path / name / "grey_soft.png")).astype(int) for name in ("together", "alone")
    )
    np.testing.assert_allclose(left, right, atol=1)


def test_a_signal_ends_it_between_batches_and_it_goes_on(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("end_to_end")
    sources = [Source(tmp_path / "in" / name, name) for name in ("a.png", "a.jpg", "grey.png")]
    predictor = predictor_into(tmp_path / "out", pipeline, ("mask",), batch_size=1)
    answers = iter([0, 0, signal.SIGINT])
    predictor.stop = SimpleNamespace(noticed=lambda: next(answers))  # type: ignore[assignment]
    with pytest.raises(InterruptedRunError, match="the same command goes on"):
        predictor.predict(sources)
    predictor.record._running.close()
    record = PredictionRecord(tmp_path / "out", {}, False)
    assert [record.is_done(source) for source in sources] == [True, True, False]


def test_after_overwriting_the_way_to_go_on_is_without_it(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    predictor = predictor_into(tmp_path / "out", make_pipeline("end_to_end"), ("mask",))
    predictor.record.overwrite = True
    predictor.stop = SimpleNamespace(noticed=lambda: signal.SIGINT)  # type: ignore[assignment]
    with pytest.raises(InterruptedRunError, match="the same command without --overwrite goes on"):
        predictor.predict([Source(tmp_path / "in" / "a.png", "a")])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory; lower --resolution"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (MemoryError(), "out of memory"),
        (CommandError("the prediction is not finite"), "the prediction is not finite"),
    ],
)
def test_one_picture_that_fails_takes_no_other_along(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("end_to_end")
    predict_together = pipeline.predict

    def fail_for_all_of_one_colour(pictures: torch.Tensor, *arguments: object, **settings: object) -> object:
        if any(len(picture.unique()) == 1 for picture in pictures):
            raise error
        return predict_together(pictures, *arguments, **settings)

    monkeypatch.setattr(pipeline, "predict", fail_for_all_of_one_colour)
    Image.new("RGB", (20, 20), "red").convert("L").save(tmp_path / "in" / "plain.png")
    sources = [Source(tmp_path / "in" / name, name) for name in ("a.png", "plain.png", "grey.png")]
    predictor = predictor_into(tmp_path / "out", pipeline, ("mask",), batch_size=3)
    predictor.predict(sources)
    assert list(predictor.failures) == [sources[1]]
    assert told in predictor.failures[sources[1]]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.png_mask.png", "grey.png_mask.png"}


def test_another_error_of_a_card_is_not_taken_for_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_disk_that_fills_ends_it_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "in")

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device", "a_mask.png")

    monkeypatch.setattr(predict.Image.Image, "save", fail)
    predictor = predictor_into(tmp_path / "out", make_pipeline("end_to_end"), ("mask",))
    with pytest.raises(CommandError, match="No space left on device"):
        predictor.predict([Source(tmp_path / "in" / "a.png", "a")])


def test_videos_are_predicted_too_and_broken_ones_told(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.test_video import read_video, write_video

    write_video(tmp_path / "film.mp4", count=3)
    (tmp_path / "text.mp4").write_text("not a video")
    predictor = predictor_into(tmp_path / "out", make_pipeline("end_to_end"))
    sources = [Source(tmp_path / f"{name}.mp4", name) for name in ("film", "text")]
    predictor.predict(sources)
    assert len(read_video(tmp_path / "out" / "film_mask.mp4")[0]) == 3
    assert (tmp_path / "out" / "film_overlay.mp4").is_file()
    assert [source.name for source in predictor.failures] == ["text"]
    assert [entry["frames"] for entry in predictor.record.finished()] == [3]


def test_a_name_that_the_disk_refuses_is_that_files_failure(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    sources = [Source(tmp_path / "in" / "a.png", "a" * 250), Source(tmp_path / "in" / "grey.png", "grey")]
    predictor = predictor_into(tmp_path / "out", make_pipeline("end_to_end"), ("mask",))
    predictor.predict(sources)
    assert [source.name for source in predictor.failures] == ["a" * 250]
    assert (tmp_path / "out" / "grey_mask.png").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--save", "mask,masks"], "--save mask,masks: expected some of"),
        (["--save", ","], "--save ,: expected"),
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--resolution", "big"], "--resolution big"),
        (["--resolution", "0"], "--resolution 0"),
    ],
)
def test_flags_out_of_range_are_told(flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_arguments(build_parser().parse_args(["a.png", *flags]))


def test_the_fingerprint_tells_models_apart() -> None:
    first = make_pipeline("end_to_end")
    assert fingerprint(first) == fingerprint(first)
    changed = make_pipeline("end_to_end")
    changed.transformer.proj_out.bias.data += 1
    assert fingerprint(changed) != fingerprint(first)


def test_a_changed_decoder_or_setting_is_another_model() -> None:
    first, other = make_pipeline("end_to_end"), make_pipeline("end_to_end", tta="flip")
    assert fingerprint(first) != fingerprint(other)
    other = make_pipeline("end_to_end")
    other.vae.decoder.conv_in.bias.data += 1
    assert fingerprint(first) != fingerprint(other)


def test_an_input_is_never_written_over(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "grey_mask.png")
    record = PredictionRecord(tmp_path / "in", {}, True)
    stop = SimpleNamespace(noticed=lambda: 0)
    predictor = Predictor(make_pipeline("end_to_end"), record, ("mask",), {}, 2, stop)  # type: ignore[arg-type]
    before = (tmp_path / "in" / "grey_mask.png").read_bytes()
    predictor.predict([Source(tmp_path / "in" / f"{name}.png", name) for name in ("grey", "grey_mask")])
    assert (tmp_path / "in" / "grey_mask.png").read_bytes() == before
    assert [source.name for source in predictor.failures] == ["grey"]


def test_too_little_memory_for_a_batch_is_enough_for_its_pictures(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("end_to_end")

    def segment(pictures: list[object], **settings: object) -> object:
        if len(pictures) > 1 or pictures[0].shape[0] > 20:  # type: ignore[attr-defined]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pipeline(pictures, **settings)

    Image.new("RGB", (30, 40)).save(tmp_path / "in" / "large.png")
    predictor = predictor_into(tmp_path / "out", segment, ("mask",))  # type: ignore[arg-type]
    segment.palette = None  # type: ignore[attr-defined]
    predictor.predict([Source(tmp_path / "in" / f"{name}.png", name) for name in ("a", "grey", "large")])
    assert [reason.split(": ")[1] for reason in predictor.failures.values()] == [
        "out of memory; lower --resolution or --tile_size"
    ]
    assert (tmp_path / "out" / "grey_mask.png").is_file()


def test_a_prediction_that_is_not_finite_is_told_and_not_written(tmp_path: Path) -> None:
    write_photos(tmp_path / "in")
    pipeline = make_pipeline("end_to_end")
    pipeline.transformer.proj_out.bias.data *= float("nan")
    predictor = predictor_into(tmp_path / "out", pipeline)
    predictor.predict([source := Source(tmp_path / "in" / "a.png", "a")])
    assert "the prediction is not finite" in predictor.failures[source]
    assert not list((tmp_path / "out").glob("*.png"))


def test_names_are_printed_without_codes_for_the_terminal() -> None:
    assert printable("a\n\x1b[31mred\udc80 é") == "a\\n\\x1b[31mred\\udc80 é"
