"""The pipeline: voting, independence of batches, saving and loading, and scoring a data set through it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from dataset.codecs import THINGS_STUFF
from dataset.trans10k import LAYOUTS, PairDataset, scan
from models.pipeline import TransparencySegmentationPipeline
from models.tiles import tile_spans
from tests.conftest import RESOLUTION, environment, make_prompt, make_transformer, make_vae
from utils.errors import InterruptedRunError
from utils.evaluation import evaluate
from utils.metrics import iou_curves
from utils.scoring import Scorer

OBJECTIVES = {"end_to_end": 16, "diffusion": 32}


class StubVae(torch.nn.Module):
    """Latents are eightfold means of the pixels; decoding repeats their first three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        mode = torch.nn.functional.avg_pool2d(pixels, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mode))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8))


class StubTransformer(torch.nn.Module):
    """Predicts no velocity, so that every member stays its own starting noise."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.device = SimpleNamespace(patch_size=2), torch.device("cpu")
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (torch.zeros_like(hidden_states[:, 3:]),)


def make_pipeline(objective: str = "diffusion", **settings: object) -> TransparencySegmentationPipeline:
    settings = {"denoise_steps": 2, "ensemble_size": 3, "resolution": RESOLUTION, **settings}
    transformer = make_transformer(in_channels=OBJECTIVES[objective]).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = TransparencySegmentationPipeline(
        transformer, make_vae(), scheduler, make_prompt(), objective=objective, **settings
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stub_pipeline(**settings: object) -> TransparencySegmentationPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return TransparencySegmentationPipeline(
        StubTransformer(), StubVae(), scheduler, make_prompt(), objective="diffusion", **settings
    )


def images(batch: int = 3, height: int = 16, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def members_of(generator: torch.Generator, members: int) -> torch.Tensor:
    """The clamped decode (members, 3, 16, 16) of what the stubs make of one generator."""
    noise = torch.cat([torch.randn(1, 3, 2, 2, generator=generator) for _ in range(members)])
    return noise.clamp(-1, 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_offloading_answers_the_same_call_after_call() -> None:
    expected, offloaded = make_pipeline(tta="flip"), make_pipeline(tta="flip")
    offloaded.enable_model_cpu_offload(device="cpu:0")  # the hooks do their work, from the CPU to the CPU
    hooked = [part for part in ("transformer", "vae", "prompt") if hasattr(getattr(offloaded, part), "_hf_hook")]
    assert hooked == ["transformer", "vae"]  # the prompt is never called: it has to stay where the others compute
    for _ in range(2):
        for one, other in zip(expected(images()).soft, offloaded(images()).soft, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_members_of_an_ensemble_vote_after_clamping() -> None:
    output = stub_pipeline().predict(torch.zeros(2, 3, 16, 16), generators(5, 6), ensemble_size=4, denoise_steps=3)
    for number, generator in enumerate(generators(5, 6)):
        members = (members_of(generator, 4) + 1) / 2
        torch.testing.assert_close(output.predictions[number], members.mean(dim=0))
        soft = members.mean(dim=1)
        torch.testing.assert_close(output.soft[number], soft.mean(dim=0))
        expected = torch.from_numpy(np.std(soft.numpy(), axis=0))
        torch.testing.assert_close(output.uncertainty[number], expected)
        assert torch.equal(output.masks[number], (soft.mean(dim=0) > 0.5).to(torch.uint8))
    assert output.uncertainty.max() > 0.1
    assert output.masks.unique().tolist() == [0, 1]


@pytest.mark.parametrize("tta", ["flip", "flip_scale"])
def test_views_vote_so_that_a_mirrored_picture_has_the_mirrored_mask(tta: str) -> None:
    pipeline = make_pipeline("end_to_end")
    straight, mirrored = pipeline.predict(images(), tta=tta), pipeline.predict(images().flip(-1), tta=tta)
    torch.testing.assert_close(mirrored.soft, straight.soft.flip(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored.uncertainty, straight.uncertainty.flip(-1), rtol=1e-4, atol=1e-5)
    alone = pipeline.predict(images())
    assert not torch.allclose(alone.soft, pipeline.predict(images().flip(-1)).soft.flip(-1), atol=1e-4)
    assert alone.uncertainty is None


def test_a_flips_vote_is_the_mean_of_both_views() -> None:
    pipeline = make_pipeline("end_to_end", tta="flip")
    both, alone = pipeline.predict(images()), pipeline.predict(images(), tta="none")
    mirrored = pipeline.predict(images().flip(-1), tta="none").predictions.flip(-1)
    torch.testing.assert_close(both.predictions, (alone.predictions + mirrored) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown tta 'turn'; valid: none, flip, flip_scale"):
        pipeline.predict(images(), tta="turn")


def test_one_member_has_no_uncertainty() -> None:
    assert not stub_pipeline().predict(torch.zeros(1, 3, 16, 16), ensemble_size=1).uncertainty.any()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_one_generator_for_all_is_drawn_from_in_turn_wherever_the_batches_are_cut(batch_size: int) -> None:
    (generator,) = generators(7)
    output = stub_pipeline().predict(torch.zeros(2, 3, 16, 16), generator, ensemble_size=3, batch_size=batch_size)
    expected = (members_of(*generators(7), 6) + 1) / 2
    torch.testing.assert_close(output.predictions, expected.view(2, 3, 3, 16, 16).mean(dim=1))


def test_without_a_generator_a_call_is_repeatable_and_pictures_have_noise_of_their_own() -> None:
    first, second = (stub_pipeline().predict(torch.zeros(2, 3, 16, 16)) for _ in range(2))
    assert torch.equal(first.predictions, second.predictions)
    assert not torch.equal(first.predictions[0], first.predictions[1])


def test_the_threshold_is_the_pipelines_unless_given() -> None:
    pipeline = stub_pipeline(threshold=1.0)
    assert not pipeline.predict(torch.zeros(1, 3, 16, 16)).masks.any()
    assert pipeline.predict(torch.zeros(1, 3, 16, 16), threshold=0.0).masks.all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_result_does_not_depend_on_the_batch_size(objective: str) -> None:
    pipeline = make_pipeline(objective)
    expected = pipeline.predict(images(), generators(1, 2, 3), batch_size=9)
    for batch_size in (1, 2):
        output = pipeline.predict(images(), generators(1, 2, 3), batch_size=batch_size)
        torch.testing.assert_close(output.predictions, expected.predictions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_result_of_a_picture_does_not_depend_on_its_company(objective: str) -> None:
    pipeline = make_pipeline(objective)
    together = pipeline.predict(images(), generators(1, 2, 3))
    alone = pipeline.predict(images()[1:2], generators(2))
    torch.testing.assert_close(together.predictions[1:2], alone.predictions, atol=1e-5, rtol=0)
    assert not torch.allclose(together.predictions[0], alone.predictions[0], atol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_have_their_shapes_ranges_and_types(objective: str) -> None:
    output = make_pipeline(objective).predict(images())
    assert output.predictions.shape == (3, 3, 16, 32)
    assert output.soft.shape == output.masks.shape == (3, 16, 32)
    assert output.masks.dtype == torch.uint8
    assert output.soft.min() >= 0
    assert output.soft.max() <= 1
    assert torch.equal(output.masks == 1, output.soft > 0.5)


def test_end_to_end_is_deterministic_and_has_no_uncertainty() -> None:
    pipeline = make_pipeline("end_to_end")
    first, second = (
        pipeline.predict(images(), generators(1, 2, 3)),
        pipeline.predict(images(), generators(4, 5, 6), ensemble_size=7),
    )
    assert torch.equal(first.predictions, second.predictions)
    assert first.uncertainty is None


def test_diffusion_depends_on_its_noise_and_on_the_picture() -> None:
    pipeline = make_pipeline("diffusion")
    first = pipeline.predict(images(), generators(1, 2, 3)).predictions
    assert not torch.equal(first, pipeline.predict(images(), generators(4, 5, 6)).predictions)
    assert not torch.equal(first, pipeline.predict(1 - images(), generators(1, 2, 3)).predictions)


def test_an_even_number_of_members_of_a_call_overrides_the_pipelines() -> None:
    pipeline = make_pipeline("diffusion")
    few, many = (pipeline.predict(images(1), generators(1), ensemble_size=size).predictions for size in (2, 4))
    assert not torch.equal(few, many)
    assert torch.equal(few, make_pipeline("diffusion", ensemble_size=2).predict(images(1), generators(1)).predictions)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 24, 16), (1, 3, 16, 8)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*multiples of 16") as caught:
        stub_pipeline().predict(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_the_number_of_generators_must_be_that_of_the_pictures() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 pictures"):
        stub_pipeline().predict(torch.zeros(3, 3, 16, 16), generators(1, 2))


PREDICT = """
import sys, torch
from models.pipeline import TransparencySegmentationPipeline
pipeline = TransparencySegmentationPipeline.from_pretrained(sys.argv[1])
output = pipeline.predict(torch.load(sys.argv[2], weights_only=True))
torch.save({"predictions": output.predictions, "masks": output.masks}, sys.argv[3])
"""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_saved_pipeline_gives_the_same_masks_when_loaded(objective: str, tmp_path: Path) -> None:
    settings = {"threshold": 0.4, "weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 1.0}
    pipeline = make_pipeline(objective, **settings)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = TransparencySegmentationPipeline.from_pretrained(tmp_path / "pipeline")
    assert dict(loaded.config).items() >= {**settings, "objective": objective, "resolution": RESOLUTION}.items()
    assert type(loaded.objective) is type(pipeline.objective)
    for part in ("transformer", "vae", "prompt"):
        before, after = (getattr(owner, part).state_dict() for owner in (pipeline, loaded))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), part
    output, expected = loaded.predict(images()), pipeline.predict(images())
    # Loaded weights may lie at another alignment, at which a CPU adds in another order.
    torch.testing.assert_close(output.predictions, expected.predictions, atol=1e-5, rtol=0)
    assert torch.equal(output.masks, expected.masks)
    assert expected.masks.unique().tolist() == [0, 1]


def test_a_saved_pipeline_is_safetensors_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    pipeline = make_pipeline("diffusion")
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert {path.suffix for path in (tmp_path / "pipeline").rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
        ".md",
    }
    torch.save(images(), tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, *(str(tmp_path / name) for name in ("pipeline", "images.pt", "output.pt"))],
        env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output, expected = torch.load(tmp_path / "output.pt", weights_only=True), pipeline.predict(images())
    torch.testing.assert_close(output["predictions"], expected.predictions, atol=1e-5, rtol=0)
    assert torch.equal(output["masks"], expected.masks)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def pairs(trans10k: Path) -> PairDataset:
    found = scan("trans10k", trans10k, "test").pairs
    return PairDataset(found, LAYOUTS["trans10k"].read_label, RESOLUTION)


def test_the_scorer_sees_every_picture_and_its_records_keep_the_order(
    pairs: PairDataset, accelerator: Accelerator
) -> None:
    pipeline = make_pipeline("end_to_end", threshold=0.45)
    scorer = Scorer("per_image,glass", "training,64,own", LAYOUTS["trans10k"], 0.45)
    found = evaluate(pipeline, pairs, accelerator, batch_size=4, seed=0, scorer=scorer)
    assert [record["own"].per_image.name for record in found.records] == [pair.name for pair in pairs.pairs]
    assert [record["training"].per_image for record in found.records] == found.scores


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_picture_is_scored_once_in_order_whatever_the_batch_size(
    objective: str, pairs: PairDataset, accelerator: Accelerator
) -> None:
    pipeline = make_pipeline(objective)
    written: dict[str, dict[str, NDArray[np.uint8]]] = {}
    runs = [
        evaluate(pipeline, pairs, accelerator, batch_size=size, seed=0, write=written.__setitem__).scores
        for size in (3, 4)
    ]
    assert [(score.name, score.difficulty) for score in runs[0]] == [(p.name, p.difficulty) for p in pairs.pairs]
    assert [score.iou for score in runs[0]] == pytest.approx([score.iou for score in runs[1]], abs=0.01)
    assert len(written) == len(pairs) == 10
    kinds = {"img", "pred", "maskq", "maskgt"} | ({"uncertainty"} if objective == "diffusion" else set())
    for picture, pair in zip(written.values(), range(len(pairs)), strict=True):
        assert picture.keys() == kinds
        assert picture["img"].shape == picture["pred"].shape == (RESOLUTION, RESOLUTION, 3)
        assert picture["maskq"].shape == picture["maskgt"].shape == (RESOLUTION, RESOLUTION)
        assert np.array_equal(picture["maskgt"], pairs[0, pair]["label"].numpy() * 255)
        assert {values.dtype for values in picture.values()} == {np.dtype(np.uint8)}


def test_curves_hold_the_score_at_the_threshold_in_the_order_of_the_pictures(
    pairs: PairDataset, accelerator: Accelerator
) -> None:
    pipeline = make_pipeline("end_to_end", threshold=127.5 / 255)
    found = evaluate(pipeline, pairs, accelerator, batch_size=4, seed=0)
    curves = iou_curves(found.histograms)
    assert curves.shape == (10, 256)
    assert [score.iou for score in found.scores] == pytest.approx(curves[:, 128].tolist(), abs=1e-6)


def test_scoring_depends_on_the_seed_and_uses_the_given_settings(pairs: PairDataset, accelerator: Accelerator) -> None:
    pipeline = make_pipeline("diffusion")

    def mses(seed: int, **settings: float) -> list[float]:
        found = evaluate(pipeline, pairs, accelerator, batch_size=5, seed=seed, settings=settings)
        return [score.mse for score in found.scores]

    assert mses(0) == mses(0)
    assert mses(0) != mses(1)
    assert mses(0) != mses(0, ensemble_size=1)


def test_scoring_stops_when_asked(pairs: PairDataset, accelerator: Accelerator) -> None:
    codes = iter([0, 143])
    with pytest.raises(InterruptedRunError) as caught:
        evaluate(make_pipeline(), pairs, accelerator, batch_size=3, seed=0, poll_stop=lambda: next(codes))
    assert caught.value.exit_code == 143


class Identity(TransparencySegmentationPipeline):
    """Predicts what it is shown, and keeps the sizes that it was shown."""

    def _predict(self, images: torch.Tensor, *rest: object) -> torch.Tensor:
        self.shown = [*getattr(self, "shown", []), tuple(images.shape[2:])]
        return images * 2 - 1


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (176, 112), (48, 240)])
def test_tiles_are_blended_without_seams(size: tuple[int, int]) -> None:
    bare = make_pipeline("end_to_end")
    pipeline = Identity(bare.transformer, bare.vae, bare.scheduler, bare.prompt)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    output = pipeline.predict(images, tile_size=64)
    torch.testing.assert_close(output.predictions, images, rtol=0, atol=1e-5)
    tile = tuple(min(length, 64) for length in size)
    assert set(pipeline.shown) == {tile}
    whole = pipeline.predict(images)
    assert pipeline.shown[-1] == size
    torch.testing.assert_close(whole.predictions, output.predictions, rtol=0, atol=1e-5)


def test_neighbouring_tiles_share_a_quarter_at_least_and_reach_both_ends() -> None:
    for length in range(65, 400, 7):
        tiles = tile_spans(length, 64)
        assert (tiles[0][0], tiles[-1][1]) == (0, length)
        assert all(end - start == 64 for start, end in tiles)
        assert all(here[1] - there[0] >= 16 - 1 for here, there in itertools.pairwise(tiles))


def test_a_real_model_predicts_by_tiles_and_refuses_an_odd_one() -> None:
    pipeline = make_pipeline()
    images = torch.rand(1, 3, 32, 80, generator=torch.Generator().manual_seed(0))
    assert pipeline.predict(images, tile_size=32).masks.shape == (1, 32, 80)
    assert pipeline.predict(images, tile_size=96).soft.equal(pipeline.predict(images).soft)
    with pytest.raises(ValueError, match="tile_size 40 must be a multiple of 16"):
        pipeline.predict(images, tile_size=40)


def test_classes_are_read_within_the_masks_and_survive_saving(tmp_path: Path) -> None:
    bare = make_pipeline("end_to_end")
    parts = (bare.transformer, bare.vae, bare.scheduler, bare.prompt)
    pipeline = Identity(*parts, codec="palette", palette=THINGS_STUFF.to_dict())
    label = torch.randint(3, (2, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    output = pipeline.predict((pipeline.codec.encode(label) + 1) / 2)
    assert output.classes.equal(label)
    assert output.masks.equal((label > 0).to(torch.uint8))
    TransparencySegmentationPipeline(*parts, codec="palette", palette=THINGS_STUFF.to_dict()).save_pretrained(tmp_path)
    loaded = TransparencySegmentationPipeline.from_pretrained(tmp_path)
    assert loaded.palette == THINGS_STUFF
    assert loaded.predict((pipeline.codec.encode(label) + 1) / 2).classes.unique().tolist() in (
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 2],
    )
