"""The demo page without a browser: what it takes, what it holds and for how long, and what it answers."""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from dataset.codecs import THINGS_STUFF
from models.pipeline import Segmentation
from tests.test_pipeline import make_pipeline
from utils.demo import visitors as visitors_module
from utils.demo.results import VIEW_NAMES, Result
from utils.demo.visitors import Limits, Visitors, read_upload
from utils.errors import InputError
from utils.rendering import overlay

LIMITS = Limits(upload_mb=1, pixels=100_000)
SIZE = (50, 40)  # width, height of most pictures here
SKIPPED = {"__type__": "update"}  # what leaves a part of the page as it is
ROWS = np.broadcast_to(np.linspace(0, 1, SIZE[1], dtype=np.float32)[:, None], SIZE[::-1])


def picture(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def a_result(uncertain: bool = True) -> Result:
    uncertainty = ROWS / 4 if uncertain else None
    return Result("a photo.jpg", np.array(picture()), np.ascontiguousarray(ROWS), uncertainty, 1.0)


def png_header(width: int, height: int) -> bytes:
    """A PNG of black that ends before its pixels do: what a few bytes can claim to be."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9999)))]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_bad_files(folder: Path) -> dict[str, str]:
    """Writes files that the page refuses; returns the sentence for each."""
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "notes.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "bomb.png").write_bytes(png_header(20_000, 20_000))
    Image.new("1", (20_000, 16)).save(folder / "strip.png")
    Image.new("1", (400, 300)).save(folder / "large.png")
    Image.new("F", SIZE).save(folder / "range.tiff")
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, "jpeg")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    picture(60, 60).resize((16, 16)).save(folder / "heavy.bmp")
    with (folder / "heavy.bmp").open("ab") as file:
        file.write(bytes(2**20))
    no_picture = "is no picture that can be read here; JPEG, PNG, WebP, BMP, TIFF and GIF are."
    return {
        "moving.gif": "moving.gif is an animation of 3 pictures; send a single one.",
        "notes.png": f"notes.png {no_picture}",
        "empty.png": f"empty.png {no_picture}",
        "dot.png": "dot.png has 1 x 1 pixels; this page takes sides of 16 to 10,000 pixels.",
        "bomb.png": "bomb.png has more than the 0.1 million pixels that this page takes.",
        "strip.png": "strip.png has more than the 0.1 million pixels that this page takes: 20,000 x 16.",
        "large.png": "large.png has more than the 0.1 million pixels that this page takes: 400 x 300.",
        "cut.jpg": "cut.jpg cannot be read: image file is truncated",
        "range.tiff": "range.tiff cannot be read: mode F has no known range; save it with 8 or 16 bits.",
        "heavy.bmp": "heavy.bmp is larger than the 1 MB that this page takes.",
        "gone.png": "gone.png is no longer here, since no upload is kept; send it again.",
    }


def test_what_the_page_refuses_gets_a_sentence(tmp_path: Path) -> None:
    for name, sentence in write_bad_files(tmp_path).items():
        with pytest.raises(InputError) as caught:
            read_upload(str(tmp_path / name), name, LIMITS)
        assert str(caught.value).startswith(sentence)
        assert str(caught.value).endswith(".")
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InputError, match=r"strip.png has 20,000 x 16 pixels; this page takes sides of 16 to 10,000"):
        read_upload(str(tmp_path / "strip.png"), "strip.png", Limits())


def test_too_many_pixels_are_refused_before_one_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bad_files(tmp_path)

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for name in ("bomb.png", "strip.png", "large.png", "dot.png", "heavy.bmp"):
        with pytest.raises(InputError):
            read_upload(str(tmp_path / name), name, LIMITS)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_any_mode_are_taken(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    picture().convert(mode).save(path)
    assert read_upload(str(path), "picture", LIMITS).shape == (*SIZE[::-1], 3)


def test_an_upright_photo_is_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture().save(tmp_path / "turned.jpg", exif=exif)
    assert read_upload(str(tmp_path / "turned.jpg"), "turned", LIMITS).shape == (*SIZE, 3)


def test_a_result_has_the_pipelines_mask_at_every_threshold() -> None:
    pipeline = make_pipeline("end_to_end", tta="flip")
    image = picture()
    for threshold in (0.3, 0.5, 0.52):
        found = pipeline([image], threshold=threshold)
        result = Result("a", np.array(image), found.soft[0], found.uncertainty[0], 0.0)  # type: ignore[index]
        np.testing.assert_array_equal(result.mask(threshold), found.masks[0])


def test_a_result_has_the_pipelines_classes_at_every_threshold(tmp_path: Path) -> None:
    desk_module = pytest.importorskip("utils.demo.desk", exc_type=ImportError)
    pipeline = make_pipeline("end_to_end", codec="palette", palette=THINGS_STUFF.to_dict())
    picture().save(tmp_path / "a.png")
    desk = desk_module.Desk({"classes": desk_module.Model(pipeline, "")}, LIMITS, tmp_path)
    result = desk.predict(str(tmp_path / "a.png"), "a.png", "classes", "none", 1, 1)
    for threshold in (0.3, 0.5, 0.55):
        classes = pipeline([picture()], threshold=threshold).classes[0]
        assert len(np.unique(classes)) > 1
        painted = overlay(np.array(picture()), classes, THINGS_STUFF, 0.25)
        np.testing.assert_array_equal(result.render("Overlay", threshold, 0.25), painted)
    assert set(np.unique(result.reduced(20).classes)) <= {0, 1, 2}
    assert "rgb(255, 255, 0)" in (shown := desk_module.legend(result, "Overlay"))
    assert ">things<" in shown


def test_views_of_a_result() -> None:
    result = a_result()
    views = {view: result.render(view, 0.5, 0.25) for view in VIEW_NAMES}
    glass = ROWS > 0.5
    np.testing.assert_array_equal(views["Mask"], glass * np.uint8(255))
    np.testing.assert_array_equal(views["Soft"], np.rint(ROWS * 255))
    assert [view.shape for view in views.values()] == [(40, 50, 3), (40, 50), (40, 50), (40, 50, 3), (40, 50, 3)]
    np.testing.assert_array_equal(views["Overlay"][~glass], result.picture[~glass])
    assert (views["Overlay"][glass] != result.picture[glass]).any()
    np.testing.assert_array_equal(views["Cut-out"][glass], result.picture[glass])
    assert set(np.unique(views["Cut-out"][~glass])) == {208, 255}
    assert views["Uncertainty"][-1, 0].sum() > 600 > 100 > views["Uncertainty"][0, 0].sum()  # light yellow, black
    np.testing.assert_array_equal(a_result(uncertain=False).render("Uncertainty", 0.5, 0.5), result.picture)
    small = result.reduced(10)
    assert small.soft.shape == small.picture.shape[:2] == (8, 10)
    assert result.reduced(50) is result


def test_downloads_are_png_in_the_pictures_own_size() -> None:
    result = a_result()
    files = dict(result.download(kind, 0.5, 0.5) for kind in ("mask", "soft", "overlay", "cutout"))
    names = ["a_photo_mask.png", "a_photo_soft.png", "a_photo_overlay.png", "a_photo_cutout.png"]
    assert list(files) == names
    read = [Image.open(io.BytesIO(files[name])) for name in names]
    assert [image.mode for image in read] == ["L", "I;16", "RGB", "RGBA"]
    assert {image.size for image in read} == {SIZE}
    np.testing.assert_array_equal(np.asarray(read[0]), result.mask(0.5) * 255)
    np.testing.assert_allclose(np.asarray(read[1]) / 65535, ROWS, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(read[2]), result.render("Overlay", 0.5, 0.5))
    np.testing.assert_array_equal(np.asarray(read[3]), np.dstack([result.picture, result.mask(0.5) * 255]))


def test_whoever_leaves_leaves_nothing(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path)
    for key in ("a", "b"):
        for name in (key, "both"):
            path = tmp_path / name / "upload.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
            visitors[key].add_upload(path)
        visitors[key].add_upload(Path(__file__))  # an example, not an upload
        visitors[key].write("view", "view.jpg", b"")
    visitors.leave("a")
    visitors.leave("nobody")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    folder = visitors["b"].folder.name
    assert files == sorted(["b/upload.png", "both/upload.png", f"{folder}/view/1/view.jpg"])
    visitors.leave("b")
    assert list(tmp_path.iterdir()) == []
    assert Path(__file__).is_file()


def test_files_made_do_not_pile_up(tmp_path: Path) -> None:
    visitor = Visitors(tmp_path)["a"]
    paths = [Path(visitor.write("view", "view.jpg", bytes([number]))) for number in range(20)]
    assert len(set(paths)) == 20
    assert [path.is_file() for path in paths] == [False] * 12 + [True] * 8


def test_who_was_away_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visitors = Visitors(tmp_path)
    for key in "abc":
        visitors[key].keep(a_result())
    size = visitors["a"].num_bytes
    assert size == 50 * 40 * (3 + 4)
    monkeypatch.setattr(visitors_module, "MAX_HELD_BYTES", 2 * size)
    assert visitors["c"].result is not None
    assert len(visitors) == 2
    assert visitors["b"].result is None  # b was away longer than a
    monkeypatch.setattr(visitors_module, "MAX_HELD_BYTES", 0)
    assert visitors["a"].result is not None  # whoever asks is never the one to go
    assert len(visitors) == 1
    visitors["a"].last_seen -= visitors_module.KEPT_SECONDS + 1
    assert visitors["d"].result is None
    assert len(visitors) == 1
    visitors.forget_idle()
    assert len(visitors) == 1
    visitors["d"].last_seen -= visitors_module.KEPT_SECONDS + 1
    visitors.forget_idle()
    assert len(visitors) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_upload_in_use_is_not_old(tmp_path: Path) -> None:
    visitor = Visitors(tmp_path)["a"]
    upload = tmp_path / "upload.png"
    upload.touch()
    os.utime(upload, (0, 0))
    visitor.add_upload(upload)
    assert upload.stat().st_mtime > 0


def test_the_newest_run_or_exported_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="make quickstart"):
        demo.find_model()
    for number, (folder, file) in enumerate(
        [("runs/old/checkpoints/checkpoint-3", "training_state.json"), ("exported", "model_index.json")]
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
        for path in (tmp_path / folder, tmp_path / folder / file):
            os.utime(path, (number, number))
    assert demo.find_model() == "exported"
    os.utime(tmp_path / "runs/old/checkpoints/checkpoint-3", (5, 5))
    assert demo.find_model() == "runs/old"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(InputError) as caught:
        demo.main()
    return str(caught.value)


def test_a_page_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert run_main(patch) == "the page needs Gradio: pip install -r requirements-demo.txt"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = run_main(monkeypatch, "--port", str(port))
        assert (
            told == f"--host 127.0.0.1 --port {port}: Address already in use; choose another, such as --port {port + 1}"
        )
    assert run_main(monkeypatch, "--port", "99999") == "--port 99999: ports end at 65535"
    monkeypatch.chdir(tmp_path)
    assert "make quickstart" in run_main(monkeypatch, "--port", str(port))


class CountingPipe:
    """Answers as a pipeline, rows from 0 to 1, and counts."""

    def __init__(self, objective: str = "end_to_end") -> None:
        self.config = SimpleNamespace(
            objective=objective, threshold=0.123456, denoise_steps=80, ensemble_size=5, tta="none", resolution=32
        )
        self.palette = None
        self.calls: list[dict[str, Any]] = []

    def __call__(self, pictures: list[np.ndarray], **settings: Any) -> Segmentation:
        self.calls.append(settings)
        height, width = pictures[0].shape[:2]
        soft = np.repeat(np.linspace(0, 1, height, dtype=np.float32)[:, None], width, axis=1)
        return Segmentation([(soft > 0.5).astype(np.uint8)], [soft], [(soft > 0.5).astype(np.uint8)], None)


class DeskCase:
    """A desk with two visitors, and how the page calls it."""

    def __init__(self, folder: Path) -> None:
        desk_module = pytest.importorskip("utils.demo.desk", exc_type=ImportError)
        self.pipe = CountingPipe()
        self.pages = folder / "pages"
        self.pages.mkdir()
        models = {"one": desk_module.Model(self.pipe, "a model")}
        models["two"] = desk_module.Model(CountingPipe("diffusion"), "another")
        self.desk = desk_module.Desk(models, LIMITS, self.pages)
        self.folder = folder

    def segment(self, visitor: str, name: str | None, **changes: Any) -> list[Any]:
        upload = {"path": str(self.folder / name), "orig_name": name} if name else None
        values = {
            "model": "one",
            "tta": "none",
            "steps": 2,
            "members": 1,
            "view": "Mask",
            "threshold": 0.5,
            "opacity": 0.5,
        }
        return self.desk.segment(upload, *{**values, **changes}.values(), SimpleNamespace(session_hash=visitor))

    def look(self, visitor: str, view: str, threshold: float | None) -> list[Any]:
        return self.desk.look({"path": "shown"}, view, threshold, 0.5, SimpleNamespace(session_hash=visitor))


@pytest.fixture
def case(tmp_path: Path) -> DeskCase:
    picture().save(tmp_path / "a.png")
    picture(64, 100).save(tmp_path / "b.png")
    return DeskCase(tmp_path)


def test_the_threshold_moves_without_a_prediction_and_visitors_see_their_own(case: DeskCase) -> None:
    assert "<b>50.0%</b> of a.png (50 × 40)" in case.segment("first", "a.png")[0]
    assert "of b.png (64 × 100)" in case.segment("second", "b.png")[0]
    assert len(case.pipe.calls) == 2
    for threshold, share in ((0.75, "25.0%"), (0.9, "10.0%"), (5, "0.0%"), (None, "97.5%")):
        for view in VIEW_NAMES:
            sentence, shown, _ = case.look("first", view, threshold)
            assert f"<b>{share}</b> of a.png" in sentence
            with Image.open(shown) as image:
                assert image.size == SIZE
    assert "of b.png" in case.look("second", "Overlay", 0.5)[0]
    request = SimpleNamespace(session_hash="first")
    saved = Path(case.desk.save("mask", 0.9, 0.5, request))
    assert saved.name == "a_mask.png"
    assert np.asarray(Image.open(saved)).mean() == pytest.approx(25.5)
    assert len(case.pipe.calls) == 2
    case.desk.leave(request)
    assert "no longer held" in case.look("first", "Mask", 0.5)[0]
    assert case.desk.save("mask", 0.5, 0.5, request) is None
    assert "of b.png" in case.look("second", "Overlay", 0.5)[0]


def test_what_goes_wrong_is_a_sentence_and_the_next_picture_works(
    case: DeskCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in write_bad_files(case.folder).items():
        sentence, shown, _, found, upload = case.segment("a", name)
        assert told in sentence
        assert 'role="alert"' in sentence
        assert shown is upload is None  # taken off the page
        assert case.segment("a", None) == [SKIPPED] * 5  # which leaves what was told
        assert "appears here" in case.segment("a", None)[0]
        assert found["visible"] is False
    assert case.pipe.calls == []
    evil = "<img src=x onerror=alert(1)>.png"
    (case.folder / evil).touch()
    assert "<img" not in case.segment("a", evil)[0]
    assert capsys.readouterr().err == ""
    with monkeypatch.context() as patch:
        for error, told in (
            (torch.OutOfMemoryError("CUDA out of memory"), "The memory here does not suffice for a.png"),
            (MemoryError(), "The memory here does not suffice for a.png"),
            (RuntimeError("secret"), "a.png could not be predicted, through a fault of this page"),
        ):
            patch.setattr(CountingPipe, "__call__", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            sentence, *_, upload = case.segment("a", "a.png")
            assert told in sentence
            assert "secret" not in sentence
            assert upload == SKIPPED  # it may be tried again with other settings
        assert "RuntimeError: secret" in capsys.readouterr().err
    assert "of a.png" in case.segment("a", "a.png")[0]
    assert "appears here" in case.segment("a", None)[0]
    assert "no longer held" in case.look("a", "Mask", 0.5)[0]
    assert case.desk.look(None, "Mask", 0.5, 0.5, SimpleNamespace(session_hash="a")) == [SKIPPED] * 3


def test_settings_stay_within_bounds_and_follow_the_model(case: DeskCase) -> None:
    case.segment("a", "a.png", steps=10**9, members=None, tta="flip")
    assert case.pipe.calls == [{"threshold": 0.0, "tta": "flip", "denoise_steps": 50, "ensemble_size": 1}]
    told, tta, sampling, *numbers = case.desk.choose("two")
    assert told == "Model: `two`, another."
    assert (tta, sampling["visible"], numbers) == ("none", True, [50, 5, 0.123, 0.123])
    assert case.desk.choose("one")[2]["visible"] is False


def test_a_batch_goes_on_after_a_bad_file(case: DeskCase) -> None:
    write_bad_files(case.folder)
    uploads = [{"path": str(case.folder / name), "orig_name": name} for name in ("a.png", "notes.png", "b.png")]
    request = SimpleNamespace(session_hash="a")
    steps = list(case.desk.batch(uploads, "one", "none", 2, 1, 0.5, request))
    assert [len(step[2]["value"]) for step in steps] == [1, 1, 2, 2]
    sentence, rows, gallery, archive = steps[-1]
    assert "Done at threshold 0.5, 2 of 3, see below." in sentence
    assert "<td>notes.png</td><td>notes.png is no picture" in rows
    assert [name for _, name in gallery["value"]] == ["a.png", "b.png"]
    with zipfile.ZipFile(archive["value"]) as opened:
        assert opened.namelist() == ["01_a_mask.png", "03_b_mask.png"]
        mask = np.asarray(Image.open(io.BytesIO(opened.read("03_b_mask.png"))))
    assert mask.shape == (100, 64)
    assert (mask[:50] == 0).all()
    assert (mask[50:] == 255).all()
    (step,) = case.desk.batch(uploads * 7, "one", "none", 2, 1, 0.5, request)
    assert "These are 21 files; send up to 20 at a time." in step[0]
    (step,) = case.desk.batch(None, "one", "none", 2, 1, 0.5, request)
    assert "Choose pictures first." in step[0]
    *_, last = case.desk.batch(uploads[1:2], "one", "none", 2, 1, 0.5, request)
    assert "None of these could be used" in last[0]
    assert last[3]["visible"] is False


def test_uncertainty_has_a_legend_or_the_way_to_get_one() -> None:
    desk_module = pytest.importorskip("utils.demo.desk", exc_type=ImportError)
    assert "<span>0.25</span>" in desk_module.legend(a_result(), "Uncertainty")
    assert "mirrored" in desk_module.legend(a_result(uncertain=False), "Uncertainty")
    assert set(desk_module.LEGENDS) | {"Uncertainty"} == set(VIEW_NAMES)


def test_models_are_told_before_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    from utils.demo.page import EXAMPLES, EXAMPLES_FOLDER

    training = {"data": "Trans10k"}
    make_pipeline("end_to_end", training=training).save_pretrained(tmp_path / "first" / "model")
    make_pipeline("diffusion").save_pretrained(tmp_path / "second" / "model")
    names = [str(tmp_path / "first" / "model"), str(tmp_path / "second" / "model")]
    models = demo.load_models(names, "fp32")
    told = "end to end, 32 x 32 pixels, trained on Trans10k, float32 on cpu"
    assert {name: model.description for name, model in models.items()} == {
        "model": told,
        names[1]: "diffusion, 32 x 32 pixels, float32 on cpu",
    }
    assert capsys.readouterr().out.splitlines()[:2] == [f"loading {names[0]}", f"  {told}"]
    assert all((EXAMPLES_FOLDER / f"{name}.jpg").is_file() for name in EXAMPLES)
