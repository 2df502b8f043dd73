"""How the transformer is trained and read. An objective has no parameters and is handed the prepared transformer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor

from models import flow
from models.prompt import EmptyPrompt


class LatentEstimate(NamedTuple):
    """What a training step knows of a batch."""

    latent_loss: torch.Tensor
    """(B,), float32: what the objective minimises in latent space."""
    clean_latents: torch.Tensor
    """(B, C, h, w), float32, with gradient: the estimate of the target latents."""


class Objective(Protocol):
    """The seam between the trainer and a way of training; roles are condition and target, whatever a task calls them."""

    in_channels_factor: int
    """Input channels of the transformer as a multiple of the latent channels."""
    constant_timestep: float | None
    """The timestep of every call, if there is but one."""
    stochastic: bool
    """Whether `predict` starts from noise, so that predictions can vote."""

    def loss(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        target_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator],
    ) -> LatentEstimate:
        """Returns the loss of each sample and the estimate of its target, for latents (B, C, h, w)."""

    def predict(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator],
        num_inference_steps: int,
    ) -> torch.Tensor:
        """Returns predicted target latents (B, C, h, w), float32."""


class EndToEnd:
    """Condition latents at the constant timestep 1000 -> target latents, in one deterministic pass.

    Args:
        settings: `prediction`, what the transformer's output means: `clean`, the target (the published recipe); `velocity`,
            condition - target, what the pretrained transformer answers at that timestep with the condition in the noise's place;
            `residual`, target - condition.
        shift: has no effect.
    """

    in_channels_factor = 1
    constant_timestep: float | None = float(flow.NUM_TRAIN_TIMESTEPS)
    stochastic = False

    def __init__(self, settings: Mapping[str, Any], shift: float) -> None:
        del shift  # one fixed timestep is not shifted
        self.prediction = settings.get("prediction", "clean")

    def predict(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator] = (),
        num_inference_steps: int = 1,
    ) -> torch.Tensor:
        """Returns predicted target latents (B, C, h, w), float32; generator and steps have no effect."""
        timesteps = condition_latents.new_full((len(condition_latents),), float(flow.NUM_TRAIN_TIMESTEPS))
        model_pred = call_transformer(transformer, condition_latents, timesteps, prompt)
        if self.prediction == "velocity":
            return condition_latents - model_pred
        return condition_latents + model_pred if self.prediction == "residual" else model_pred

    def loss(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        target_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator] = (),
    ) -> LatentEstimate:
        """Returns the mean squared error in latent space, (B,), and the prediction."""
        _check_shapes(condition_latents, target_latents)
        model_pred = self.predict(transformer, condition_latents, prompt)
        return LatentEstimate((model_pred - target_latents).square().mean(dim=(1, 2, 3)), model_pred)


class Diffusion:
    """Condition latents and noisy target latents -> the flow's velocity; read by Euler steps from noise.

    Args:
        settings: `weighting_scheme`, `logit_mean`, `logit_std`, `mode_scale`.
        shift: of the base's scheduler.
    """

    in_channels_factor = 2
    constant_timestep: float | None = None
    stochastic = True

    def __init__(self, settings: Mapping[str, Any], shift: float) -> None:
        names = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
        self.density = {name: settings[name] for name in names}
        self.shift = shift

    def loss(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        target_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator],
    ) -> LatentEstimate:
        """Returns the weighted squared error of the velocity (SD3, equation 8 in its rectified form), (B,), and the data that it points to."""
        _check_shapes(condition_latents, target_latents)
        sigmas = flow.sample_sigmas(shift=self.shift, generators=generator, **self.density)
        sigmas = _sent(sigmas, target_latents.device)
        noise = _noise_like(target_latents, generator)
        noisy = flow.add_noise(target_latents, noise, sigmas)
        model_pred = self._velocity(transformer, condition_latents, noisy, sigmas, prompt)
        weights = flow.loss_weights(self.density["weighting_scheme"], sigmas)
        error = (model_pred - flow.velocity(target_latents, noise)).square()
        clean_latents = flow.clean_from_velocity(noisy, model_pred, sigmas)
        return LatentEstimate((weights * error).mean(dim=(1, 2, 3)), clean_latents)

    def predict(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        prompt: EmptyPrompt,
        generator: Sequence[torch.Generator],
        num_inference_steps: int,
    ) -> torch.Tensor:
        """Returns target latents (B, C, h, w) after `num_inference_steps` Euler steps from each generator's noise."""
        sigmas = flow.inference_sigmas(num_inference_steps, self.shift).to(condition_latents.device)
        noisy = _noise_like(condition_latents, generator)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            model_pred = self._velocity(transformer, condition_latents, noisy, sigma.expand(len(noisy)), prompt)
            noisy = flow.euler_step(noisy, model_pred, sigma, next_sigma)
        return noisy

    def _velocity(
        self,
        transformer: torch.nn.Module,
        condition_latents: torch.Tensor,
        noisy: torch.Tensor,
        sigmas: torch.Tensor,
        prompt: EmptyPrompt,
    ) -> torch.Tensor:
        hidden_states = torch.cat([condition_latents, noisy], dim=1)  # (B, 2C, h, w)
        return call_transformer(transformer, hidden_states, flow.timesteps_from_sigmas(sigmas), prompt)


OBJECTIVES: dict[str, type[EndToEnd] | type[Diffusion]] = {"end_to_end": EndToEnd, "diffusion": Diffusion}


def build_objective(name: str, settings: Mapping[str, Any], shift: float) -> Objective:
    """Returns the objective of that name.

    Args:
        name: a key of `OBJECTIVES`.
        settings: the configuration's keys; each objective reads its own.
        shift: of the base's scheduler.

    Raises:
        ValueError: naming the valid choices.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; valid: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](settings, shift)


def call_transformer(
    transformer: torch.nn.Module, hidden_states: torch.Tensor, timesteps: torch.Tensor, prompt: EmptyPrompt
) -> torch.Tensor:
    """Runs the transformer in its own precision.

    Args:
        transformer: an `SD3Transformer2DModel`, as it is or prepared by an engine.
        hidden_states: (B, C_in, h, w).
        timesteps: (B,), 1000 * sigma.
        prompt: the text condition.

    Returns:
        Model prediction (B, C, h, w), float32.
    """
    dtype = next(transformer.parameters()).dtype
    prompt_embeds, pooled_prompt_embeds = prompt.expand(len(hidden_states), dtype)
    (model_pred,) = transformer(
        hidden_states=hidden_states.to(dtype),
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )
    return model_pred.float()


def _noise_like(latents: torch.Tensor, generator: Sequence[torch.Generator]) -> torch.Tensor:
    noise = randn_tensor(
        tuple(latents.shape), generator=list(generator), device=torch.device("cpu"), dtype=torch.float32
    )
    return _sent(noise, latents.device)


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns values on the device; a GPU gets them without the host waiting for the work before them."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _check_shapes(condition_latents: torch.Tensor, target_latents: torch.Tensor) -> None:
    if condition_latents.shape != target_latents.shape or target_latents.ndim != 4:
        raise ValueError(
            "condition and target latents must have the same shape (B, C, h, w), got "
            f"{tuple(condition_latents.shape)} and {tuple(target_latents.shape)}"
        )
