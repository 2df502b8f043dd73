"""The two objectives against oracles and hand-computed losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from models import flow
from models.objectives import Diffusion, EndToEnd, Objective, build_objective
from models.prompt import EmptyPrompt
from tests.conftest import make_prompt, make_transformer

SETTINGS = {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
SHIFT = 3.0
Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StubTransformer(torch.nn.Module):
    """Answers by a function of (hidden_states, timestep) and remembers how it was called."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.answer = answer
        self.calls: list[dict[str, torch.Tensor]] = []

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        assert inputs.pop("return_dict") is False
        self.calls.append(inputs)
        return (self.answer(inputs["hidden_states"], inputs["timestep"]),)


def latents(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 16, 4, 4, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def velocity_oracle(clean: torch.Tensor) -> Answer:
    """Knows the clean latents and reads noise level and noisy latents from its inputs."""

    def answer(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noisy, sigmas = hidden_states[:, 16:], timestep.view(-1, 1, 1, 1) / 1000
        return (noisy - clean) / sigmas

    return answer


def zero(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden_states[:, :16])


def diffusion(**changes: object) -> Diffusion:
    return Diffusion({**SETTINGS, **changes}, SHIFT)


@pytest.fixture(scope="module")
def prompt() -> EmptyPrompt:
    return make_prompt()


def test_the_end_to_end_oracle_has_no_loss_and_predicts_its_target(prompt: EmptyPrompt) -> None:
    objective, condition, target = EndToEnd({}, SHIFT), latents(0), latents(1)
    oracle = StubTransformer(lambda hidden_states, timestep: target)
    assert objective.loss(oracle, condition, target, prompt).latent_loss.tolist() == [0, 0, 0]
    for steps in (1, 2, 7, 50):
        assert torch.equal(objective.predict(oracle, condition, prompt, (), steps), target)


def test_end_to_end_reads_the_condition_alone_at_timestep_1000_once(prompt: EmptyPrompt) -> None:
    transformer, condition = StubTransformer(zero), latents(0)
    EndToEnd({}, SHIFT).predict(transformer, condition, prompt, generators(1, 2, 3), 20)
    (call,) = transformer.calls
    assert torch.equal(call["hidden_states"], condition)
    assert call["timestep"].tolist() == [1000, 1000, 1000]
    assert torch.equal(call["encoder_hidden_states"], prompt.prompt_embeds.expand(3, -1, -1))
    assert torch.equal(call["pooled_projections"], prompt.pooled_prompt_embeds.expand(3, -1))


def test_the_end_to_end_loss_of_a_zero_predictor_is_the_targets_mean_square(prompt: EmptyPrompt) -> None:
    target = torch.stack([torch.full((16, 4, 4), value) for value in (1.0, 2.0, -3.0)])
    assert EndToEnd({}, SHIFT).loss(StubTransformer(zero), latents(0), target, prompt).latent_loss.tolist() == [1, 4, 9]


@pytest.mark.parametrize(("prediction", "sign"), [("velocity", -1), ("residual", 1)])
def test_a_zero_predictor_of_a_difference_answers_with_the_condition(
    prediction: str, sign: int, prompt: EmptyPrompt
) -> None:
    objective, condition, target = EndToEnd({"prediction": prediction}, SHIFT), latents(0), latents(1)
    assert torch.equal(objective.predict(StubTransformer(zero), condition, prompt), condition)

    def oracle(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        del timestep
        return sign * (target - hidden_states)

    estimate = objective.loss(StubTransformer(oracle), condition, target, prompt)
    assert estimate.latent_loss.max() < 1e-10
    torch.testing.assert_close(estimate.clean_latents, target)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_the_diffusion_oracle_has_no_loss(scheme: str, prompt: EmptyPrompt) -> None:
    target = latents(1)
    loss = diffusion(weighting_scheme=scheme).loss(
        StubTransformer(velocity_oracle(target)), latents(0), target, prompt, generators(1, 2, 3)
    )
    assert loss.latent_loss.shape == (3,)
    torch.testing.assert_close(loss.clean_latents, target, atol=1e-4, rtol=1e-4)
    assert loss.latent_loss.max() < 1e-6  # rounding of (noisy - clean) / sigma; a zero predictor has about 2


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_diffusion_oracle_predicts_its_target_in_any_number_of_steps(steps: int, prompt: EmptyPrompt) -> None:
    target = latents(1)
    transformer = StubTransformer(velocity_oracle(target))
    predicted = diffusion().predict(transformer, latents(0), prompt, generators(1, 2, 3), steps)
    torch.testing.assert_close(predicted, target, atol=1e-4, rtol=1e-4)
    assert len(transformer.calls) == steps


def test_the_steps_visit_the_shifted_grid_and_see_condition_before_noise(prompt: EmptyPrompt) -> None:
    transformer, condition = StubTransformer(zero), latents(0)
    predicted = diffusion().predict(transformer, condition, prompt, generators(1, 2, 3), 4)
    assert [call["timestep"].tolist() for call in transformer.calls] == [
        pytest.approx([1000 * sigma] * 3) for sigma in (1, 0.9, 0.75, 0.5)
    ]
    noise = torch.cat([torch.randn(1, 16, 4, 4, generator=generator) for generator in generators(1, 2, 3)])
    for call in transformer.calls:
        assert torch.equal(call["hidden_states"], torch.cat([condition, noise], dim=1))
    assert torch.equal(predicted, noise)


def test_the_diffusion_loss_of_a_zero_predictor_is_the_weighted_mean_square_of_the_velocity(
    prompt: EmptyPrompt,
) -> None:
    target = latents(1)
    transformer = StubTransformer(zero)
    loss = diffusion(weighting_scheme="cosmap").loss(transformer, latents(0), target, prompt, generators(1, 2, 3))
    expected = []
    for number, generator in enumerate(generators(1, 2, 3)):
        u = torch.rand(1, generator=generator).item()
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn(1, 16, 4, 4, generator=generator)[0]
        weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        expected.append(weight * (noise - target[number]).square().mean().item())
        seen = transformer.calls[0]
        assert seen["timestep"][number].item() == pytest.approx(1000 * sigma, rel=1e-5)
        torch.testing.assert_close(seen["hidden_states"][number, 16:], (1 - sigma) * target[number] + sigma * noise)
    assert loss.latent_loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_draws_of_a_sample_do_not_depend_on_its_batch(prompt: EmptyPrompt) -> None:
    objective, condition, target = diffusion(), latents(0), latents(1)
    transformer = StubTransformer(zero)
    together = objective.loss(transformer, condition, target, prompt, generators(4, 5, 6)).latent_loss
    alone = objective.loss(transformer, condition[1:2], target[1:2], prompt, generators(5)).latent_loss
    assert torch.equal(transformer.calls[0]["hidden_states"][1:2], transformer.calls[1]["hidden_states"])
    assert together[1].item() == pytest.approx(alone.item(), rel=1e-6)
    predicted = objective.predict(transformer, condition, prompt, generators(4, 5, 6), 3)
    assert torch.equal(predicted[1:2], objective.predict(transformer, condition[1:2], prompt, generators(5), 3))


@pytest.mark.parametrize(
    "objective", [EndToEnd({}, SHIFT), Diffusion(SETTINGS, SHIFT)], ids=["end_to_end", "diffusion"]
)
def test_losses_of_a_real_transformer_are_one_per_sample_and_reach_its_weights(
    objective: Objective, prompt: EmptyPrompt
) -> None:
    transformer = make_transformer(in_channels=16 * objective.in_channels_factor)
    losses = objective.loss(transformer, latents(0), latents(1), prompt, generators(1, 2, 3))
    assert losses.latent_loss.shape == (3,)
    assert losses.clean_latents.shape == latents(1).shape
    assert all(values.dtype == torch.float32 for values in losses)
    losses.latent_loss.mean().backward()
    gradient = transformer.pos_embed.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_half_precision_transformer_is_called_in_its_own_precision(prompt: EmptyPrompt) -> None:
    transformer = StubTransformer(zero).to(torch.bfloat16)
    predicted = EndToEnd({}, SHIFT).predict(transformer, latents(0), prompt)
    (call,) = transformer.calls
    floats = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    assert {call[name].dtype for name in floats} == {torch.bfloat16}
    assert predicted.dtype == torch.float32


@pytest.mark.parametrize(
    "objective", [EndToEnd({}, SHIFT), Diffusion(SETTINGS, SHIFT)], ids=["end_to_end", "diffusion"]
)
@pytest.mark.parametrize("shape", [(3, 16, 4, 2), (1, 16, 4, 4), (3, 1, 4, 4), (3, 16, 4)])
def test_latents_that_do_not_fit_each_other_are_refused(
    objective: Objective, shape: tuple[int, ...], prompt: EmptyPrompt
) -> None:
    with pytest.raises(ValueError, match="same shape"):
        objective.loss(StubTransformer(zero), latents(0), torch.zeros(shape), prompt, generators(1, 2, 3))


def test_an_unknown_objective_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="'sideways'; valid: end_to_end, diffusion"):
        build_objective("sideways", SETTINGS, SHIFT)
    assert isinstance(build_objective("end_to_end", SETTINGS, SHIFT), EndToEnd)
    built = build_objective("diffusion", SETTINGS, 2.0)
    assert isinstance(built, Diffusion)
    assert built.shift == 2.0


def test_the_shift_of_the_scheduler_reaches_training_and_inference(prompt: EmptyPrompt) -> None:
    transformer = StubTransformer(zero)
    unshifted = Diffusion(SETTINGS, 1.0)
    unshifted.loss(transformer, latents(0), latents(1), prompt, generators(1, 2, 3))
    drawn = flow.sample_sigmas("logit_normal", 1.0, generators(1, 2, 3)).flatten()
    torch.testing.assert_close(transformer.calls[0]["timestep"], 1000 * drawn)
    unshifted.predict(transformer, latents(0), prompt, generators(1, 2, 3), 2)
    assert transformer.calls[2]["timestep"].tolist() == [500, 500, 500]
