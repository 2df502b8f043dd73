"""Loads the base model: VAE, transformer, scheduler and the empty prompt, from a folder or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from models.folding import FoldedSD3Transformer2DModel
from models.latents import DOWNSCALE
from models.prompt import EmptyPrompt
from utils.errors import InputError, first_line

PROMPT_FILE_NAME = "empty_prompt.safetensors"
MODEL_PARTS = ("transformer", "vae", "scheduler")
MAX_SETTING = 100_000  # of a part, in the table that it comes with
MASK_DECODER = "mask_decoder"  # a part that a base may have
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt")

ROOT = Path(__file__).resolve().parent.parent
LOCAL_FOLDERS = ("assets/", "runs/", "data/")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Part = TypeVar("Part", AutoencoderKL, SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler, EmptyPrompt)


def resolve_base(
    base_model_path: str,
    parts: tuple[str, ...] = MODEL_PARTS,
    key: str = "base_model_path",
    files: tuple[str, ...] = (),
    revision: str | None = None,
) -> Path:
    """Returns the local folder of a base model or pipeline; a folder is looked at before any hub is asked.

    Args:
        base_model_path: a folder in the Diffusers layout, or a hub id.
        parts: the subfolders that are needed.
        key: in messages.
        files: wanted beside the subfolders.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: with the remedy, if the folder is incomplete or the hub does not give the model.
    """
    folder = Path(base_model_path).expanduser()
    if not folder.exists() and (ROOT / base_model_path).exists():
        folder = ROOT / base_model_path  # a run made here is read from anywhere
    if folder.exists():
        missing = [part for part in parts if not (folder / part).is_dir()]
        if missing:
            raise InputError(f"{folder}: not a model in the Diffusers layout, {', '.join(missing)} missing")
        return folder
    # Whoever owns such a name on the hub is not asked for what is missing here.
    if base_model_path.startswith((".", "~", os.sep, *LOCAL_FOLDERS)) or base_model_path.count("/") != 1:
        raise InputError(f"{base_model_path}: no such folder, and not a hub id (OWNER/NAME); check {key}")
    patterns = [*files, *(f"{part}/{pattern}" for part in (*parts, MASK_DECODER) for pattern in HUB_PATTERNS)]
    try:
        return Path(snapshot_download(base_model_path, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{base_model_path}: gated; accept its licence on its hub page, then log in with `hf auth login`, or set "
            f"{key} to a folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{base_model_path}: neither a folder here nor a model on the hub; check {key} (a private model "
            "needs `hf auth login`)"
        ) from error
    except (OSError, HfHubHTTPError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{base_model_path}: no such folder, and the hub did not give it ({first_line(error)}). Without a network set "
            f"{key} to a folder with the model; assets/tiny_sd3 is one"
        ) from error


def load_part(part_class: type[Part], folder: Path, part: str, dtype: torch.dtype = torch.float32) -> Part:
    """Loads one part from its subfolder, weights from safetensors only.

    Raises:
        InputError: naming the subfolder, if it is missing or broken.
    """
    try:
        _check_settings(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
        if part == "scheduler":
            return part_class.from_pretrained(folder, subfolder=part, local_files_only=True)
        _check_weight_files(folder / part)
        loaded, details = part_class.from_pretrained(
            folder,
            subfolder=part,
            local_files_only=True,
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        if details["missing_keys"]:
            raise ValueError(
                f"{len(details['missing_keys'])} tensors are missing, the first is {min(details['missing_keys'])}"
            )
        return loaded
    except Exception as error:  # every way in which foreign files can be broken, Diffusers has its own exception
        raise InputError(
            f"{folder / part}: cannot be loaded as {part_class.__name__} ({first_line(error)}); weights must be safetensors, and whole"
        ) from error


def _check_settings(path: Path) -> None:
    """Refuses a configuration that is no table, which Diffusers would look up on the hub, or whose sizes fill any memory."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no table of settings")
    for name, value in content.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= MAX_SETTING:
                raise ValueError(f"{path.name}: {name} {number:.3g} is more than {MAX_SETTING:,}")


def _check_weight_files(folder: Path) -> None:
    """Refuses an index of shards that names anything but safetensors files of its own folder."""
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        strangers = [name for name in names if not name.endswith(".safetensors") or "/" in name]
        if strangers:
            raise ValueError(f"{index.name} names {strangers[0]!r}")


def load_vae(folder: Path, dtype: torch.dtype, compiled: bool = False) -> AutoencoderKL:
    """Loads the VAE, frozen, in evaluation mode, channels last: its convolutions are a third faster that way.

    Args:
        folder: of the base.
        dtype: of the weights.
        compiled: whether encoder and decoder run through torch.compile.
    """
    vae = load_part(AutoencoderKL, folder, "vae", dtype).requires_grad_(False).eval()
    if compiled:
        compile_vae(vae)
    return vae.to(memory_format=torch.channels_last)


def compile_vae(vae: AutoencoderKL) -> None:
    """Compiles encoder and decoder in place."""
    vae.encoder.compile()
    vae.decoder.compile()


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """Loads the transformer from `folder`/transformer, folded if its configuration says so."""
    try:
        class_name = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        class_name = ""  # whatever is wrong, loading tells it better
    folded = class_name == FoldedSD3Transformer2DModel.__name__
    return load_part(FoldedSD3Transformer2DModel if folded else SD3Transformer2DModel, folder, "transformer", dtype)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """Loads the scheduler, of which only `shift` is used (models/flow.py owns the sigma grid)."""
    return load_part(FlowMatchEulerDiscreteScheduler, folder, "scheduler")


def load_prompt(base_model_path: str, prompt_embeds_path: str | None = None) -> EmptyPrompt:
    """Loads the empty prompt, or computes it once with the base's own CLIP encoders.

    Looked for in this order: `prompt_embeds_path`; `empty_prompt.safetensors` in the base's folder; the cache of what
    was computed before; the base's text encoders.

    Raises:
        InputError: if none of these gives it.
    """
    if prompt_embeds_path is not None:
        return EmptyPrompt.from_file(Path(prompt_embeds_path).expanduser())
    folder = Path(base_model_path).expanduser()
    if (folder / PROMPT_FILE_NAME).is_file():
        return EmptyPrompt.from_file(folder / PROMPT_FILE_NAME)
    try:
        folder = resolve_base(base_model_path, ("transformer", *TEXT_PARTS))
    except InputError as error:
        raise InputError(
            f"{error}; the empty prompt is computed from these, or read from prompt_embeds_path"
        ) from error
    cached = prompt_cache_path(folder)
    if cached.is_file():
        return EmptyPrompt.from_file(cached)
    prompt = compute_empty_prompt(folder)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run a few seconds, no more
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.part")
        prompt.save_file(partial)
        partial.replace(cached)
    return prompt


def check_prompt(prompt: EmptyPrompt, transformer: SD3Transformer2DModel) -> None:
    """Compares the widths of a prompt with what the transformer takes.

    Raises:
        InputError: if they differ.
    """
    needed = tuple(transformer.config[name] for name in ("joint_attention_dim", "pooled_projection_dim"))
    given = (prompt.prompt_embeds.shape[-1], prompt.pooled_prompt_embeds.shape[-1])
    if given != needed:
        raise InputError(
            f"the empty prompt is {given[0]} and {given[1]} wide, the transformer takes {needed[0]} and {needed[1]}; it "
            "belongs to another base, check prompt_embeds_path"
        )


def largest_side(settings: Mapping[str, Any]) -> int:
    """Returns the longest side in pixels for which a transformer of these settings has positions."""
    return int(DOWNSCALE * settings["patch_size"] * settings["pos_embed_max_size"])


def check_resolution(resolution: int, transformer: SD3Transformer2DModel) -> None:
    """Compares a resolution in pixels with the transformer's table of positions.

    Raises:
        InputError: if the table is too small.
    """
    side = DOWNSCALE * transformer.config.patch_size
    largest = largest_side(transformer.config)
    if resolution > largest or resolution % side:
        raise InputError(
            f"resolution: {resolution} does not fit this base, which takes multiples of {side} up to {largest}"
        )


def compute_empty_prompt(folder: Path) -> EmptyPrompt:
    """Encodes "" with the two CLIP encoders; T5 is left out and its 77 rows are zero, as in the published run.

    Args:
        folder: base model with text encoders and tokenizers.

    Returns:
        The prompt, (1, 154, joint_attention_dim) and (1, pooled) for CLIP's 77 tokens; the encoders are freed.

    Raises:
        InputError: if the encoders cannot be loaded.
    """
    try:
        encoders = {
            part: CLIPTextModelWithProjection.from_pretrained(
                folder, subfolder=part, dtype=torch.float32, use_safetensors=True, local_files_only=True
            ).eval()
            for part in ("text_encoder", "text_encoder_2")
        }
        tokenizers = {
            part: CLIPTokenizer.from_pretrained(folder, subfolder=part, local_files_only=True)
            for part in ("tokenizer", "tokenizer_2")
        }
        joint_attention_dim = SD3Transformer2DModel.load_config(folder, subfolder="transformer")["joint_attention_dim"]
        clip_embeds, pooled = [], []
        for encoder, tokenizer in zip(encoders.values(), tokenizers.values(), strict=True):
            tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
            with torch.no_grad():
                encoded = encoder(tokens.input_ids, output_hidden_states=True)
            clip_embeds.append(encoded.hidden_states[-2].float())  # SD3 takes the last layer but one
            pooled.append(encoded.text_embeds.float())
    except Exception as error:  # Transformers has no common exception for broken or missing files
        raise InputError(
            f"{folder}: its CLIP text encoders cannot be loaded to compute the empty prompt ({first_line(error)}); give a "
            "safetensors file with prompt_embeds_path"
        ) from error
    clip = torch.cat(clip_embeds, dim=-1)  # (1, 77, 2048)
    rows = torch.nn.functional.pad(clip, (0, joint_attention_dim - clip.shape[-1]))
    return EmptyPrompt.from_tensors(torch.cat([rows, torch.zeros_like(rows)], dim=1), torch.cat(pooled, dim=-1))


def widen_patch_projection(transformer: SD3Transformer2DModel, in_channels: int) -> SD3Transformer2DModel:
    """Widens the input to `in_channels`, keeping the pretrained function (Marigold, arXiv 2312.02145, section 3.3).

    The pretrained weights are copied to each block of input channels and divided by the number of blocks, so that equal
    blocks give the pretrained output. A transformer that is wide enough is returned as it is.

    Args:
        transformer: with `in_channels` dividing the new number.
        in_channels: of the result.

    Raises:
        InputError: if the channels do not divide, as with a base that is wider already.
    """
    old = transformer.pos_embed.proj
    if old.in_channels == in_channels:
        return transformer
    if in_channels % old.in_channels:
        raise InputError(
            f"the base takes {old.in_channels} input channels and this objective needs {in_channels}: a base trained in "
            "diffusion mode does not serve end to end; check base_model_path and objective"
        )
    copies = in_channels // old.in_channels
    new = torch.nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    new.to(device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight.repeat(1, copies, 1, 1) / copies)
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    transformer.pos_embed.proj = new
    # An unset out_channels means in_channels, which is not true of the result any more.
    transformer.register_to_config(in_channels=in_channels, out_channels=transformer.out_channels)
    return transformer


def prompt_cache_path(folder: Path) -> Path:
    """Returns where a base's computed prompt is cached, by its encoders' configurations and weight file sizes."""
    files = sorted(path for part in TEXT_PARTS for path in (folder / part).glob("*") if path.is_file())
    identity = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
    configs = [path.read_text(encoding="utf-8") for path in files if path.name == "config.json"]
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), identity, configs]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sd3-transparency" / f"empty_prompt_{digest}.safetensors"
