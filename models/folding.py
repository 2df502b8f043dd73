"""Constant conditioning folded into the vectors that it computes.

With one fixed timestep and one fixed prompt every modulation linear of the AdaLN layers, the embedder of timestep and pooled
text and the context embedder see a constant input. Their outputs replace them: 34.9 % of the parameters of SD3.5 medium go,
and the transformer's output stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401  a pipeline finds a part's loader by ModelMixin here
from diffusers.configuration_utils import register_to_config
from torch import nn

from models.prompt import EmptyPrompt


class ConstantVector(nn.Module):
    """Stands in for a linear layer whose input never changes.

    Args:
        width: of the linear layer's output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the constant, (1, width), in the precision in which the linear layer would have answered `x`."""
        return self.vector.to(_answer_dtype(x))


class ConstantRows(nn.Module):
    """Stands in for the context embedder; one parameter a row, because each row has a learning rate of its own.

    Args:
        num_rows: tokens of the prompt.
        width: of a row.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(num_rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the embedded prompt, (B, L, width), for any `x` of B prompts."""
        return torch.stack(list(self.rows)).to(_answer_dtype(x)).expand(len(x), -1, -1)


class NoEmbedding(nn.Module):
    """Stands in for the embedder of timestep and pooled text, whose output nothing reads any more."""

    def forward(self, timestep: torch.Tensor, pooled_projection: torch.Tensor) -> torch.Tensor:
        """Returns one zero, (1, 1)."""
        del timestep
        return pooled_projection.new_zeros(1, 1)


class FoldedSD3Transformer2DModel(SD3Transformer2DModel):
    """An SD3 transformer for one timestep and one prompt; it ignores both in its call.

    Args:
        num_prompt_rows: tokens of the folded prompt.
        timestep: that was folded.
        modulation_rate_scale: how much faster than the learning rate the modulation vectors train.
        prompt_rate_scales: the same for each row of the embedded prompt.
        **settings: of `SD3Transformer2DModel`.
    """

    # Small, and what a step moves in them is smaller than bf16 resolves.
    _keep_in_fp32_modules = ["vector", "rows"]  # noqa: RUF012  Diffusers reads a list alone

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
        num_prompt_rows: int = 77,
        timestep: float = 1000.0,
        modulation_rate_scale: float = 1.0,
        prompt_rate_scales: Sequence[float] = (),
    ) -> None:
        super().__init__(
            sample_size,
            patch_size,
            in_channels,
            num_layers,
            attention_head_dim,
            num_attention_heads,
            joint_attention_dim,
            caption_projection_dim,
            pooled_projection_dim,
            out_channels,
            pos_embed_max_size,
            tuple(dual_attention_layers),
            qk_norm,
        )
        self.time_text_embed = NoEmbedding()
        self.context_embedder = ConstantRows(num_prompt_rows, caption_projection_dim)
        for norm in modulated_norms(self):
            norm.linear = ConstantVector(norm.linear.out_features)


def modulated_norms(transformer: SD3Transformer2DModel) -> Iterator[Any]:
    """Yields the norm layers whose `linear` turns the timestep's embedding into shifts, scales and gates."""
    for block in transformer.transformer_blocks:
        yield block.norm1
        yield block.norm1_context
    yield transformer.norm_out


@torch.no_grad()
def fold(transformer: SD3Transformer2DModel, prompt: EmptyPrompt, timestep: float) -> FoldedSD3Transformer2DModel:
    """Returns a folded transformer with the same output for this prompt and timestep.

    Under AdamW a linear layer y = Wx + b moves y by about the learning rate times |x|_1 + 1 in a step, a bare vector by the
    rate alone. The folded vectors therefore carry |x|_1 + 1 as a factor on their rate (`parameter_groups`).

    Args:
        transformer: in fp32; its unfolded layers are shared with the result, not copied.
        prompt: of every later call, on any device.
        timestep: of every later call, 1000 * sigma.
    """
    device = transformer.proj_out.weight.device
    prompt_embeds, pooled = (rows.to(device) for rows in prompt.expand(1, torch.float32))
    embedding = transformer.time_text_embed(torch.full((1,), timestep, device=device), pooled)
    activation = nn.functional.silu(embedding)  # (1, width), what every modulation linear sees
    rows = transformer.context_embedder(prompt_embeds)[0]  # (L, caption_projection_dim)
    settings: dict[str, Any] = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        folded = FoldedSD3Transformer2DModel(
            **settings,
            num_prompt_rows=len(rows),
            timestep=timestep,
            modulation_rate_scale=_rate_scale(activation[0]),
            prompt_rate_scales=[_rate_scale(row) for row in prompt_embeds[0]],
        )
    constants = [norm.linear(activation).clone() for norm in modulated_norms(transformer)]
    for name in ("pos_embed", "transformer_blocks", "norm_out", "proj_out"):
        setattr(folded, name, getattr(transformer, name))
    for norm, constant in zip(modulated_norms(folded), constants, strict=True):
        norm.linear = ConstantVector(constant.shape[-1])
        norm.linear.vector = nn.Parameter(constant)
    folded.context_embedder.rows = nn.ParameterList(nn.Parameter(row.clone()) for row in rows)
    return folded


def is_folded(transformer: nn.Module) -> bool:
    """Returns whether a transformer is folded."""
    return isinstance(transformer, FoldedSD3Transformer2DModel)


def rate_scales(transformer: SD3Transformer2DModel) -> dict[str, float]:
    """Returns the factor on the learning rate of each parameter that has one, by name."""
    if not is_folded(transformer):
        return {}
    config = transformer.config
    scales = {f"context_embedder.rows.{row}": scale for row, scale in enumerate(config.prompt_rate_scales)}
    for name, module in transformer.named_modules():
        if isinstance(module, ConstantVector):
            scales[f"{name}.vector"] = config.modulation_rate_scale
    return scales


def parameter_groups(transformer: SD3Transformer2DModel, learning_rate: float) -> list[dict[str, Any]]:
    """Returns the optimiser's groups of trainable parameters, each with `lr` and the `rate_scale` that is in it."""
    scales = rate_scales(transformer)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * scale, "rate_scale": scale} for scale, parameters in groups.items()
    ]


def _rate_scale(x: torch.Tensor) -> float:
    return round(x.abs().sum().item() + 1, 4)


def _answer_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the precision of a linear layer's output: the autocast's, or that of its input."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
