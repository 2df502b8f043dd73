"""Loading a base model: folder before hub, safetensors only, the empty prompt, the widened input."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import models.base
from models.base import (
    PROMPT_FILE_NAME,
    TEXT_PARTS,
    check_prompt,
    check_resolution,
    load_part,
    load_prompt,
    load_scheduler,
    load_transformer,
    load_vae,
    resolve_base,
    widen_patch_projection,
)
from models.prompt import EmptyPrompt
from tests.conftest import ROOT, make_prompt, make_transformer, make_vae
from utils.errors import InputError

PUBLISHED_PROMPT = ROOT.parent / "shared" / "sd35_empty_prompt" / "empty_prompt.safetensors"
CLIP_LENGTH = 77


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a hub is asked."""

    def ask(*_: object, **__: object) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(models.base, "snapshot_download", ask)


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Writes a CLIP tokenizer of three tokens."""
    folder.mkdir(parents=True)
    start, end = "<|startoftext|>", "<|endoftext|>"
    (folder / "vocab.json").write_text(json.dumps({start: 0, end: 1, "!": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad_token}
    settings |= {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text_parts(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes two CLIP encoders of widths 8 and 16, pooled 6 and 10, their tokenizers, and the transformer they fit."""
    for number, (part, tokenizer, width, pooled, pad) in enumerate(
        (("text_encoder", "tokenizer", 8, 6, "<|endoftext|>"), ("text_encoder_2", "tokenizer_2", 16, 10, "!"))
    ):
        torch.manual_seed(number)
        config = CLIPTextConfig(
            vocab_size=3,
            hidden_size=width,
            intermediate_size=16,
            projection_dim=pooled,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.5,
        )
        CLIPTextModelWithProjection(config).to(dtype).save_pretrained(folder / part)
        write_tokenizer(folder / tokenizer, pad)
    make_transformer().save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with text encoders and without a stored prompt."""
    return write_text_parts(tmp_path_factory.mktemp("text_base"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def message_of(call: object, *arguments: object) -> str:
    """Returns the message of the InputError that a call ends with; it has one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_looked_at_before_any_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base(str(base)) == base
    monkeypatch.chdir(base.parent.parent)
    relative = base.relative_to(base.parent.parent)
    assert str(relative).count("/") == 1  # looks like OWNER/NAME
    assert resolve_base(str(relative)) == relative


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["nothing", "./owner/name", "../name", "~/owner", "/a/b", "a/b/c"])
def test_a_missing_folder_is_not_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = message_of(resolve_base, name)
    assert message.startswith(f"{name}: no such folder")
    assert "base_model_path" in message


@pytest.mark.usefixtures("no_hub")
def test_an_incomplete_folder_names_the_missing_parts(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "vae", tmp_path / "vae")
    message = message_of(resolve_base, str(tmp_path))
    assert str(tmp_path) in message
    assert "transformer, scheduler missing" in message


def test_a_hub_id_is_downloaded_without_pickles_and_without_foreign_parts(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked[repository] = allow_patterns
        return str(base)

    monkeypatch.setattr(models.base, "snapshot_download", download)
    assert resolve_base("owner/name") == base
    (patterns,) = asked.values()
    assert {pattern.split("/")[0] for pattern in patterns} == {"transformer", "vae", "scheduler", "mask_decoder"}
    assert {pattern.rsplit(".", 1)[1] for pattern in patterns} == {"json", "safetensors", "txt"}


@pytest.mark.parametrize(
    ("error_class", "words"),
    [
        (GatedRepoError, ("accept its licence", "hf auth login", "base_model_path")),
        (RepositoryNotFoundError, ("neither a folder here nor a model on the hub", "base_model_path")),
        (LocalEntryNotFoundError, ("Without a network", "base_model_path to a folder")),
        (ConnectionError, ("Without a network", "base_model_path to a folder")),
    ],
)
def test_a_hub_that_gives_nothing_is_told_with_the_remedy(
    error_class: type[Exception], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_class.__new__(error_class)  # the hub's own errors want a response to be made
    Exception.__init__(error, "first line\nsecond line")

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(models.base, "snapshot_download", fail)
    message = message_of(resolve_base, "owner/name")
    assert message.startswith("owner/name: ")
    assert all(word in message for word in words)


def test_the_parts_of_a_folder_load_and_the_vae_is_frozen(base: Path) -> None:
    vae = load_vae(base, torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert load_scheduler(base).config.shift == 3.0
    transformer, expected = load_transformer(base), make_transformer().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in transformer.parameters())


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_pickled_weights_are_refused_and_never_loaded(part: str, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    (folder / part / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    load = load_transformer if part == "transformer" else lambda path: load_vae(path, torch.float32)
    message = message_of(load, folder)
    assert str(folder / part) in message
    assert "safetensors" in message
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / part / "diffusion_pytorch_model.bin").read_bytes()).close()
    assert (tmp_path / "sprung").exists()  # the trap works


def test_even_harmless_pickled_weights_are_refused(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert "safetensors" in message_of(load_transformer, folder)


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_broken_part_is_named(file: str, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "vae" / file).write_text("{broken")
    message = message_of(load_part, models.base.AutoencoderKL, folder, "vae")
    assert message.startswith(f"{folder / 'vae'}: cannot be loaded as AutoencoderKL")


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler"])
def test_a_configuration_that_names_a_model_of_the_hub_is_not_followed(
    part: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (config,) = (folder / part).glob("*config.json")
    config.write_text('"someone/else"')

    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert "holds no table of settings" in message_of(load_part, models.base.AutoencoderKL, folder, part)


@pytest.mark.parametrize("value", ["2147483648", "NaN", "[64, 1e12]"])
def test_sizes_that_fill_any_memory_are_refused(value: str, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().rstrip().removesuffix("}") + f', "num_layers": {value}}}')
    assert "config.json: num_layers" in message_of(load_transformer, folder)


def random_inputs(channels: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompt_embeds, pooled = make_prompt().expand(2)
    return {
        "hidden_states": torch.randn(2, channels, 4, 4, generator=generator),
        "timestep": torch.tensor([300.0, 1000.0]),
        "encoder_hidden_states": prompt_embeds,
        "pooled_projections": pooled,
    }


def test_widening_copies_and_halves_so_that_equal_halves_give_the_pretrained_output() -> None:
    pretrained, widened, inputs = make_transformer(), make_transformer(), random_inputs()
    assert widen_patch_projection(widened, 32) is widened
    double = {**inputs, "hidden_states": inputs["hidden_states"].repeat(1, 2, 1, 1)}
    with torch.no_grad():
        expected = pretrained(**inputs).sample
        torch.testing.assert_close(widened(**double).sample, expected)
        other = {**inputs, "hidden_states": torch.cat([inputs["hidden_states"], inputs["hidden_states"] * 0], dim=1)}
        assert not torch.allclose(widened(**other).sample, expected)  # both halves are read


def test_widening_leaves_every_pretrained_weight_as_it_is() -> None:
    old, new = make_transformer().state_dict(), widen_patch_projection(make_transformer(), 32).state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        if name == "pos_embed.proj.weight":
            assert torch.equal(new[name][:, :16], value / 2)
            assert torch.equal(new[name][:, 16:], value / 2)
        else:
            assert torch.equal(new[name], value), name


@pytest.mark.parametrize("out_channels", [16, None])
def test_a_widened_transformer_says_so_and_is_saved_and_loaded(out_channels: int | None, tmp_path: Path) -> None:
    widened = widen_patch_projection(make_transformer(out_channels=out_channels), 32)
    assert widened.config.in_channels == 32
    widened.save_pretrained(tmp_path / "transformer")
    loaded = load_transformer(tmp_path)
    assert loaded.config.in_channels == 32
    with torch.no_grad():
        inputs = random_inputs(32)
        assert torch.equal(loaded(**inputs).sample, widened(**inputs).sample)


def test_a_transformer_of_the_right_width_is_returned_as_it_is() -> None:
    transformer = make_transformer()
    weight = transformer.pos_embed.proj.weight
    assert widen_patch_projection(transformer, 16).pos_embed.proj.weight is weight


@pytest.mark.parametrize(("old", "new"), [(16, 24), (32, 16)])
def test_channels_that_do_not_divide_cannot_be_widened_to(old: int, new: int) -> None:
    transformer = make_transformer(in_channels=old)
    message = message_of(widen_patch_projection, transformer, new)
    assert f"takes {old} input channels and this objective needs {new}" in message
    assert "check base_model_path and objective" in message
    assert transformer.pos_embed.proj.in_channels == old  # left as it was


@pytest.mark.parametrize("resolution", [16, 32, 112, 128])
def test_a_resolution_within_the_table_of_positions_is_taken(resolution: int) -> None:
    check_resolution(resolution, make_transformer())  # patches of 2 latents of 8 pixels, a table of 8 x 8


@pytest.mark.parametrize("resolution", [144, 1024, 8, 24, 120, 129])
def test_a_resolution_that_does_not_fit_is_told_with_those_that_do(resolution: int) -> None:
    message = message_of(check_resolution, resolution, make_transformer())
    assert message.startswith(f"resolution: {resolution} does not fit")
    assert message.endswith("multiples of 16 up to 128")


def test_the_table_of_positions_is_the_transformers_own() -> None:
    check_resolution(192, make_transformer(pos_embed_max_size=12))
    check_resolution(120, make_transformer(patch_size=1, pos_embed_max_size=16))
    assert "multiples of 8 up to 128" in message_of(
        check_resolution, 136, make_transformer(patch_size=1, pos_embed_max_size=16)
    )


def test_a_prompt_that_fits_the_transformer_is_taken() -> None:
    check_prompt(make_prompt(), make_transformer())


@pytest.mark.parametrize(("width", "pooled"), [(31, 16), (32, 15), (16, 32)])
def test_a_prompt_of_another_base_is_told_with_both_widths(width: int, pooled: int) -> None:
    prompt = EmptyPrompt.from_tensors(torch.zeros(1, 3, width), torch.zeros(1, pooled))
    message = message_of(check_prompt, prompt, make_transformer())
    assert f"is {width} and {pooled} wide, the transformer takes 32 and 16" in message
    assert "prompt_embeds_path" in message


def test_a_prompt_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    prompt = make_prompt()
    prompt.save_file(tmp_path / "prompt.safetensors")
    loaded = EmptyPrompt.from_file(tmp_path / "prompt.safetensors")
    assert torch.equal(loaded.prompt_embeds, prompt.prompt_embeds)
    assert torch.equal(loaded.pooled_prompt_embeds, prompt.pooled_prompt_embeds)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_prompt_survives_diffusers_saving_and_loading(tmp_path: Path) -> None:
    prompt = make_prompt()
    prompt.save_pretrained(tmp_path)
    loaded = EmptyPrompt.from_pretrained(tmp_path)
    assert torch.equal(loaded.prompt_embeds, prompt.prompt_embeds)
    assert torch.equal(loaded.pooled_prompt_embeds, prompt.pooled_prompt_embeds)


def test_a_prompt_expands_to_a_batch_in_the_wanted_precision() -> None:
    prompt_embeds, pooled = make_prompt().expand(5, torch.bfloat16)
    assert (prompt_embeds.shape, pooled.shape) == ((5, 3, 32), (5, 16))
    assert prompt_embeds.dtype == pooled.dtype == torch.bfloat16
    assert torch.equal(prompt_embeds[4], make_prompt().prompt_embeds[0].bfloat16())


def test_a_missing_prompt_file_is_told(tmp_path: Path) -> None:
    message = message_of(load_prompt, "unused", str(tmp_path / "absent.safetensors"))
    assert "absent.safetensors: no such prompt file" in message
    assert "prompt_embeds_path" in message


@pytest.mark.parametrize("missing", ["prompt_embeds", "pooled_prompt_embeds"])
def test_a_prompt_file_without_a_tensor_names_it(missing: str, tmp_path: Path) -> None:
    tensors = {"prompt_embeds": torch.zeros(1, 3, 4), "pooled_prompt_embeds": torch.zeros(1, 5)}
    del tensors[missing]
    save_file(tensors, tmp_path / "prompt.safetensors")
    assert f"holds no tensor '{missing}'" in message_of(EmptyPrompt.from_file, tmp_path / "prompt.safetensors")


@pytest.mark.parametrize(
    ("prompt_shape", "pooled_shape"),
    [((2, 3, 4), (1, 5)), ((1, 3, 4), (2, 5)), ((3, 4), (1, 5)), ((1, 3, 4), (5,)), ((0, 3, 4), (0, 5))],
)
def test_a_prompt_of_wrong_shape_is_refused(
    prompt_shape: tuple[int, ...], pooled_shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"prompt_embeds": torch.zeros(prompt_shape), "pooled_prompt_embeds": torch.zeros(pooled_shape)}
    save_file(tensors, tmp_path / "prompt.safetensors")
    message = message_of(EmptyPrompt.from_file, tmp_path / "prompt.safetensors")
    assert "not a usable prompt file" in message
    assert str(prompt_shape) in message


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.safetensors").write_bytes(b"not tensors")
    assert "not a usable prompt file" in message_of(EmptyPrompt.from_file, tmp_path / "prompt.safetensors")
    assert "not a usable prompt file" in message_of(EmptyPrompt.from_file, tmp_path)


@pytest.mark.skipif(not PUBLISHED_PROMPT.is_file(), reason="the published prompt is not here")
def test_the_published_prompt_has_77_clip_rows_and_77_zero_rows() -> None:
    prompt = load_prompt("unused", str(PUBLISHED_PROMPT))
    assert prompt.prompt_embeds.shape == (1, 154, 4096)
    assert prompt.pooled_prompt_embeds.shape == (1, 2048)
    assert not prompt.prompt_embeds[:, :, 2048:].any()
    assert not prompt.prompt_embeds[:, CLIP_LENGTH:].any()
    assert prompt.prompt_embeds[0, :CLIP_LENGTH, :2048].any(dim=-1).all()


@pytest.mark.usefixtures("no_hub", "cache")
def test_the_prompt_in_the_folder_comes_before_the_encoders(base: Path, tmp_path: Path) -> None:
    assert torch.equal(load_prompt(str(base)).prompt_embeds, make_prompt().prompt_embeds)
    other = EmptyPrompt.from_tensors(torch.ones(1, 2, 32), torch.ones(1, 16))
    other.save_file(tmp_path / "other.safetensors")
    assert load_prompt(str(base), str(tmp_path / "other.safetensors")).prompt_embeds.unique().tolist() == [1]


@pytest.mark.usefixtures("no_hub", "cache")
def test_a_base_without_prompt_and_encoders_is_told(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "transformer", tmp_path / "transformer")
    message = message_of(load_prompt, str(tmp_path))
    assert f"{', '.join(TEXT_PARTS)} missing" in message


@pytest.mark.usefixtures("no_hub", "cache")
def test_the_computed_prompt_is_clip_padded_with_zeros_and_then_zero_rows(text_base: Path) -> None:
    prompt = load_prompt(str(text_base))
    assert prompt.prompt_embeds.shape == (1, 2 * CLIP_LENGTH, 32)
    assert prompt.pooled_prompt_embeds.shape == (1, 6 + 10)
    assert prompt.prompt_embeds[0, :CLIP_LENGTH, :24].all()
    assert not prompt.prompt_embeds[0, :CLIP_LENGTH, 24:].any()
    assert not prompt.prompt_embeds[0, CLIP_LENGTH:].any()
    assert prompt.prompt_embeds.dtype == prompt.pooled_prompt_embeds.dtype == torch.float32


@pytest.mark.usefixtures("no_hub", "cache")
def test_the_computed_prompt_is_that_of_the_stable_diffusion_3_pipeline(text_base: Path) -> None:
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(text_base, subfolder="transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(text_base, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text_base, subfolder="tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(text_base, subfolder="text_encoder_2"),
        tokenizer_2=CLIPTokenizer.from_pretrained(text_base, subfolder="tokenizer_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    with torch.no_grad():
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            "", "", "", do_classifier_free_guidance=False, max_sequence_length=CLIP_LENGTH
        )
    prompt = load_prompt(str(text_base))
    torch.testing.assert_close(prompt.prompt_embeds.data, prompt_embeds)
    torch.testing.assert_close(prompt.pooled_prompt_embeds.data, pooled)


@pytest.mark.usefixtures("no_hub")
def test_the_computed_prompt_is_cached_and_the_encoders_are_not_loaded_again(
    text_base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_prompt(str(text_base))
    (cached,) = cache.rglob("*.*")
    assert cached.suffix == ".safetensors"

    def load(*_: object, **__: object) -> None:
        pytest.fail("the encoders were loaded again")

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", load)
    second = load_prompt(str(text_base))
    assert torch.equal(second.prompt_embeds, first.prompt_embeds)
    assert torch.equal(second.pooled_prompt_embeds, first.pooled_prompt_embeds)


@pytest.mark.usefixtures("no_hub", "cache")
def test_other_encoders_in_the_same_folder_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    folder = write_text_parts(tmp_path / "base")
    load_prompt(str(folder))
    file = folder / "text_encoder" / "config.json"
    config = file.read_text()
    assert '"layer_norm_eps": 1e-05' in config
    file.write_text(config.replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e-01'))  # a file of the same size
    changed = load_prompt(str(folder))
    shutil.rmtree(models.base.prompt_cache_path(folder).parent)
    assert torch.equal(changed.prompt_embeds, load_prompt(str(folder)).prompt_embeds)


@pytest.mark.usefixtures("no_hub", "cache")
def test_encoders_stored_in_half_precision_compute_in_single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_text_parts(tmp_path / "base", torch.float16)
    dtypes, forward = [], CLIPTextModelWithProjection.forward

    def watched(self: CLIPTextModelWithProjection, *arguments: object, **keywords: object) -> object:
        dtypes.append(self.dtype)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(CLIPTextModelWithProjection, "forward", watched)
    load_prompt(str(folder))
    assert dtypes == [torch.float32, torch.float32]


@pytest.mark.usefixtures("no_hub", "cache")
def test_encoders_that_cannot_be_loaded_are_told_with_the_remedy(tmp_path: Path) -> None:
    folder = write_text_parts(tmp_path / "base")
    (folder / "text_encoder_2" / "model.safetensors").write_bytes(b"broken")
    message = message_of(load_prompt, str(folder))
    assert str(folder) in message
    assert "prompt_embeds_path" in message
    assert not (folder / PROMPT_FILE_NAME).exists()
