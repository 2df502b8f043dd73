"""The empty prompt: the constant text condition of every forward pass."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.errors import InputError, first_line


class EmptyPrompt(ModelMixin, ConfigMixin):
    """Holds the embeddings of the empty prompt, so that a Diffusers pipeline saves and moves them as one of its parts.

    Args:
        num_tokens: L, 154 for SD3.5 without T5 (77 CLIP tokens and 77 zero rows).
        joint_attention_dim: 4096 for SD3.5.
        pooled_projection_dim: 2048 for SD3.5.
    """

    @register_to_config
    def __init__(
        self, num_tokens: int = 154, joint_attention_dim: int = 4096, pooled_projection_dim: int = 2048
    ) -> None:
        super().__init__()
        # Parameters, because ModelMixin saves and loads these by name; they are never trained.
        self.prompt_embeds = torch.nn.Parameter(torch.zeros(1, num_tokens, joint_attention_dim), requires_grad=False)
        self.pooled_prompt_embeds = torch.nn.Parameter(torch.zeros(1, pooled_projection_dim), requires_grad=False)

    @classmethod
    def from_tensors(cls, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> EmptyPrompt:
        """Wraps embeddings (1, L, joint_attention_dim) and (1, pooled_projection_dim).

        Raises:
            ValueError: if the shapes are others.
        """
        if (
            prompt_embeds.ndim != 3
            or pooled_prompt_embeds.ndim != 2
            or len(prompt_embeds) != 1
            or len(pooled_prompt_embeds) != 1
        ):
            raise ValueError(
                "expected prompt_embeds (1, L, D) and pooled_prompt_embeds (1, P), got "
                f"{tuple(prompt_embeds.shape)} and {tuple(pooled_prompt_embeds.shape)}"
            )
        prompt = cls(prompt_embeds.shape[1], prompt_embeds.shape[2], pooled_prompt_embeds.shape[1])
        prompt.prompt_embeds.data = prompt_embeds.float().contiguous()
        prompt.pooled_prompt_embeds.data = pooled_prompt_embeds.float().contiguous()
        return prompt

    @classmethod
    def from_file(cls, path: Path) -> EmptyPrompt:
        """Reads a safetensors file with `prompt_embeds` and `pooled_prompt_embeds`.

        Raises:
            InputError: naming the file.
        """
        try:
            tensors = load_file(path)
            return cls.from_tensors(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"])
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such prompt file; check prompt_embeds_path") from error
        except KeyError as error:
            raise InputError(
                f"{path}: holds no tensor {error}; it needs prompt_embeds and pooled_prompt_embeds"
            ) from error
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path}: not a usable prompt file ({first_line(error)})") from error

    def without_zero_rows(self) -> EmptyPrompt:
        """Returns the prompt without the tokens whose embedding is zero throughout; at least one is kept."""
        rows = self.prompt_embeds.data[0]
        kept = rows[rows.abs().sum(dim=1) > 0]
        return self.from_tensors(kept[None] if len(kept) else rows[None, :1], self.pooled_prompt_embeds.data)

    def save_file(self, path: Path) -> None:
        """Writes the safetensors file that `from_file` reads."""
        tensors = {"prompt_embeds": self.prompt_embeds.data, "pooled_prompt_embeds": self.pooled_prompt_embeds.data}
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)

    def expand(self, batch_size: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns prompt_embeds (B, L, D) and pooled_prompt_embeds (B, P) for a batch, without copying.

        Args:
            batch_size: B.
            dtype: of the result; None keeps the stored one.
        """
        return (
            self.prompt_embeds.to(dtype).expand(batch_size, -1, -1),
            self.pooled_prompt_embeds.to(dtype).expand(batch_size, -1),
        )
