"""The schema, its files and its flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT
from utils import config as config_module
from utils.config import (
    BASE_CONFIG_PATH,
    EXCLUSIVE_PAIRS,
    FIELDS,
    Config,
    convert,
    describe_type,
    load_layer,
    merge_layers,
    parse_config,
    to_yaml,
)
from utils.errors import InputError

REQUIRED_KEYS = (
    "base_model_path", "data_type", "output_dir", "dataset_path", "dataset_name", "val_difficulty", "test_difficulty",
    "dataloader_num_workers", "prompt_embeds_path", "resume_from_checkpoint", "epochs", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps", "save_checkpoint_steps", "save_checkpoint_epochs", "val_steps",
    "num_vals_train", "load_checkpoint", "num_vals_test", "lr", "min_lr_ratio", "lr_scheduler", "lr_cycles",
    "lr_warmup_steps", "lr_warmup_epochs", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "max_grad_norm", "objective", "resolution", "seed",
    "denoise_steps", "ensemble_size", "threshold", "tracker", "scale_lr", "checkpoints_total_limit",
    "gradient_checkpointing", "test_batch_size", "augmentation", "mismatched_pairs",
)  # fmt: skip
BOOLEANS = [name for name in FIELDS if describe_type(name) == "true or false"]
NUMBERS = [name for name in FIELDS if re.match("an integer|a number", describe_type(name))]
INTEGERS = [name for name in FIELDS if describe_type(name).startswith("an integer")]
OPTIONAL = [name for name in FIELDS if "null" in describe_type(name)]
CHOICES = [name for name in FIELDS if " | " in describe_type(name)]

Overlay = Callable[..., Path]


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    """Writes YAML text into a file."""

    def write(text: str, name: str = "overlay.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def parse(*argv: object) -> Config:
    return parse_config([str(argument) for argument in argv])[0]


def message(*argv: object) -> str:
    """Returns the error of a command line that must be refused; it is one line."""
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The schema and config.yaml


def test_config_yaml_is_what_the_schema_prints(capsys: pytest.CaptureFixture[str]) -> None:
    config_module.main()
    assert capsys.readouterr().out == BASE_CONFIG_PATH.read_text(encoding="utf-8")


def test_config_yaml_holds_every_key_in_its_section_with_its_default_and_a_comment() -> None:
    text = BASE_CONFIG_PATH.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    assert {name: section for section, keys in document.items() for name in keys} == {
        name: field.metadata["section"] for name, field in FIELDS.items()
    }
    assert load_layer(BASE_CONFIG_PATH) == asdict(Config())
    for name, field in FIELDS.items():
        assert re.search(rf"^  {name}: \S.*  # {re.escape(field.metadata['meaning'])}$", text, re.MULTILINE), name


def test_no_flags_give_the_defaults() -> None:
    assert parse_config([]) == (Config(), frozenset())


def test_the_names_that_users_rely_on_are_keys() -> None:
    assert set(REQUIRED_KEYS) <= set(FIELDS)


def test_every_default_is_valid_for_its_own_type() -> None:
    for name, field in FIELDS.items():
        assert convert(name, field.default, name) == field.default, name


def test_the_defaults_are_the_published_recipe() -> None:
    config = Config()
    assert (config.objective, config.data_type, config.resolution, config.epochs) == ("end_to_end", "bf16", 1024, 43)
    assert (config.lr, config.scale_lr, config.lr_cycles, config.min_lr_ratio) == (2e-6, True, 3.5, 0.1)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay) == (
        0.9,
        0.999,
        1e-15,
        0,
    )
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.max_grad_norm) == (4, 2, 1.0)
    assert (config.lr_scheduler, config.lr_warmup_epochs, config.threshold) == ("cosine", 1.0, 0.5)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().lr = 1.0  # type: ignore[misc]


def keys_read_in(source: str) -> set[str]:
    """Returns the keys that a source reads: as `config.KEY`, or as a name in a string that is an expression's part.

    Docstrings do not count, nor does the question whether a key was given as a flag.
    """
    tree = ast.parse(source)
    passive = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    passive |= {node.left for node in ast.walk(tree) if isinstance(node, ast.Compare)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in ("config", "trained"):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passive:
            found.add(node.value)
    return found & set(FIELDS)


def test_the_search_for_readers_tells_readers_from_mentions() -> None:
    assert keys_read_in("def f(config):\n    return config.lr, self.config.seed\n") == {"lr", "seed"}
    assert keys_read_in("names = ('logit_mean', 'logit_std')\n") == {"logit_mean", "logit_std"}
    assert keys_read_in('def f():\n    """lr"""\n    # config.lr\n    print(f"lr: {other.lr}")\n') == set()
    assert keys_read_in("if 'objective' in flags:\n    config.lr = 1\n") == set()


def test_every_key_is_read_somewhere() -> None:
    sources = [ROOT / "trainer.py", ROOT / "val_inference.py"]
    for folder in ("models", "utils", "dataset"):
        sources += sorted((ROOT / folder).glob("*.py"))
    sources.remove(ROOT / "utils" / "config.py")
    read = set().union(*(keys_read_in(path.read_text(encoding="utf-8")) for path in sources))
    assert sorted(set(FIELDS) - read) == []


def test_every_overlay_that_is_shipped_is_valid() -> None:
    overlays = sorted((ROOT / "configs").glob("*.yaml"))
    assert overlays
    for path in overlays:
        parse("--config", path)


def test_shipped_overlays_combine() -> None:
    config = parse("--config", ROOT / "configs" / "tiny.yaml", "--config", ROOT / "configs" / "diffusion.yaml")
    assert (config.objective, config.base_model_path, config.resolution) == ("diffusion", "assets/tiny_sd3", 128)


# Flags


@pytest.mark.parametrize("flag", ["--train-batch-size", "--train_batch_size"])
@pytest.mark.parametrize("joined", [False, True])
def test_flags_take_dashes_and_underscores(flag: str, joined: bool) -> None:
    config, flags = parse_config([f"{flag}=7"] if joined else [flag, "7"])
    assert config == replace(Config(), train_batch_size=7)
    assert flags == {"train_batch_size"}


def test_every_key_is_a_flag() -> None:
    for name, field in FIELDS.items():
        value = "null" if field.default is None else str(field.default)
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            config, flags = parse_config([flag, value])
            assert (config, flags) == (Config(), {name}), flag


@pytest.mark.parametrize(
    ("value", "expected"),
    [("False", False), ("false", False), ("FALSE", False), ("0", False), ("no", False), ("True", True), ("true", True)],
)
@pytest.mark.parametrize("name", BOOLEANS)
def test_a_word_for_false_is_false_as_a_flag(name: str, value: str, expected: bool) -> None:
    assert getattr(parse(f"--{name}", value), name) is expected


def test_a_boolean_flag_may_stand_alone(overlay: Overlay) -> None:
    off = overlay("augmentation: false\n")
    assert parse("--config", off, "--augmentation", "--lr", 1).augmentation is True


def test_a_negative_number_is_a_value() -> None:
    assert parse("--logit_mean", "-0.5").logit_mean == -0.5
    assert parse("--logit_mean=-1e-3").logit_mean == -1e-3


def test_the_last_of_repeated_flags_wins() -> None:
    assert parse("--seed", 1, "--seed", 2).seed == 2


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--learning_rat", "--lr"),
        ("--trian_batch_size", "--train_batch_size"),
        ("--train-batchsize", "--train_batch_size"),
        ("--Resolution", "--resolution"),
        ("--confg", "--config"),
        ("-seed", "--seed"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, nearest: str) -> None:
    text = message(flag, 3)
    assert flag in text
    if flag != "--learning_rat":
        assert f"did you mean {nearest}?" in text
    assert f"{flag}" in message(f"{flag}=3")


@pytest.mark.parametrize("flag", ["--resol", "--train_batch", "--epoch", "--conf", "--gradient"])
def test_abbreviated_flags_are_refused(flag: str) -> None:
    assert message(flag, 32).startswith(f"unknown flag {flag} ")


def test_a_value_without_its_flag_is_refused() -> None:
    assert "'128'" in message("128")
    assert "'extra'" in message("--seed", 1, "extra")


def test_a_flag_without_its_value_is_named() -> None:
    assert "--resolution" in message("--resolution")
    assert "--lr" in message("--lr", "--seed", "3")


def test_help_shows_every_key_by_section_with_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"], "Does a thing.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Does a thing." in text
    blocks = dict(re.findall(r"^(\w+):\n((?:  .*\n?)+)", text, re.MULTILINE))
    for name, field in FIELDS.items():
        default = "null" if field.default is None else str(field.default)
        block = " ".join(blocks[field.metadata["section"]].split())
        expected = f"{field.metadata['meaning']} [{describe_type(name)}; default: {default}]"
        assert re.search(rf"--{name}\b[^:]* {re.escape(expected)}", block), name


# Layers


def test_later_overlays_win_and_flags_win_over_files(overlay: Overlay) -> None:
    first = overlay("lr: 1.0\nseed: 1\nresolution: 16\n", "first.yaml")
    second = overlay("seed: 2\nresolution: 32\n", "second.yaml")
    config = parse("--resolution", 48, "--config", first, "--config", second)
    assert (config.lr, config.seed, config.resolution) == (1.0, 2, 48)
    assert parse("--config", second, "--config", first).seed == 1


def test_only_flags_count_as_given(overlay: Overlay) -> None:
    path = overlay("objective: diffusion\n")
    config, flags = parse_config(["--config", str(path), "--seed", "3"])
    assert config.objective == "diffusion"
    assert flags == {"seed"}


def test_the_top_level_file_is_the_first_layer(overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "BASE_CONFIG_PATH", overlay("seed: 7\nresolution: 64\n", "config.yaml"))
    assert parse("--seed", 8) == replace(Config(), seed=8, resolution=64)


def test_keys_stand_flat_or_under_their_section(overlay: Overlay) -> None:
    flat = overlay("lr: 3.0\nresolution: 64\n", "flat.yaml")
    sectioned = overlay("optimization:\n  lr: 3.0\ndata:\n  resolution: 64\n", "sectioned.yaml")
    mixed = overlay("optimization:\n  lr: 3.0\nresolution: 64\n", "mixed.yaml")
    assert load_layer(flat) == load_layer(sectioned) == load_layer(mixed) == {"lr": 3.0, "resolution": 64}


def test_empty_files_and_empty_sections_change_nothing(overlay: Overlay) -> None:
    assert load_layer(overlay("")) == load_layer(overlay("# only words\n")) == load_layer(overlay("training:\n")) == {}


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [(first, second, value) for pair in EXCLUSIVE_PAIRS for first, second in (pair, pair[::-1]) for value in (3,)],
)
class TestADurationIsGivenInOneUnit:
    """Epochs or steps, for the length, the saving and the warm-up."""

    def test_a_later_file_replaces_an_earlier_one(self, first: str, second: str, value: int, overlay: Overlay) -> None:
        earlier, later = overlay(f"{first}: 9\n", "earlier.yaml"), overlay(f"{second}: {value}\n", "later.yaml")
        config = parse("--config", earlier, "--config", later)
        assert (getattr(config, first), getattr(config, second)) == (None, value)

    def test_a_flag_replaces_a_file(self, first: str, second: str, value: int, overlay: Overlay) -> None:
        config = parse("--config", overlay(f"{first}: 9\n"), f"--{second}", value)
        assert (getattr(config, first), getattr(config, second)) == (None, value)

    def test_both_in_one_file_are_refused(self, first: str, second: str, value: int, overlay: Overlay) -> None:
        path = overlay(f"{first}: 9\n{second}: {value}\n")
        text = message("--config", path)
        assert text.startswith(f"{path}: ")
        assert first in text
        assert second in text

    def test_both_as_flags_are_refused(self, first: str, second: str, value: int) -> None:
        text = message(f"--{first}", 9, f"--{second}", value)
        assert f"--{first}" in text
        assert f"--{second}" in text

    def test_null_beside_a_value_is_no_conflict(self, first: str, second: str, value: int, overlay: Overlay) -> None:
        config = parse("--config", overlay(f"{first}: null\n{second}: {value}\n"))
        assert (getattr(config, first), getattr(config, second)) == (None, value)

    def test_null_alone_does_not_touch_the_other(self, first: str, second: str, value: int, overlay: Overlay) -> None:
        path = overlay(f"{first}: {value}\n")
        config = parse("--config", path, f"--{second}", "null")
        assert (getattr(config, first), getattr(config, second)) == (value, None)


def test_a_training_without_a_length_is_refused() -> None:
    assert "epochs and max_train_steps are both null" in message("--epochs", "null")


def test_zero_warm_up_steps_replace_warm_up_epochs() -> None:
    config = parse("--lr_warmup_steps", 0)
    assert (config.lr_warmup_epochs, config.lr_warmup_steps) == (None, 0)


def test_saving_may_be_switched_off() -> None:
    config = parse("--save_checkpoint_epochs", "null")
    assert (config.save_checkpoint_epochs, config.save_checkpoint_steps) == (None, None)


# Values


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "'1e-5'", "0.00001", "1.0e-05", ".00001"])
def test_a_number_without_a_point_is_a_number_in_yaml(text: str, overlay: Overlay) -> None:
    value = load_layer(overlay(f"lr: {text}\n"))["lr"]
    assert isinstance(value, float)
    assert value == 1e-5


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "'false'", "'False'", "0"])
@pytest.mark.parametrize("name", BOOLEANS)
def test_a_word_for_false_is_false_in_yaml(name: str, text: str, overlay: Overlay) -> None:
    assert load_layer(overlay(f"{name}: {text}\n"))[name] is False


@pytest.mark.parametrize("word", ["null", "None", "~", "'null'", ""])
@pytest.mark.parametrize("name", OPTIONAL)
def test_null_unsets_an_optional_key_in_yaml(name: str, word: str, overlay: Overlay) -> None:
    assert load_layer(overlay(f"{name}: {word}\n")) == {name: None}


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_unsets_an_optional_key_as_a_flag(name: str, overlay: Overlay) -> None:
    partner = {a: b for pair in EXCLUSIVE_PAIRS for a, b in (pair, pair[::-1])}.get(name)
    value = {"ema_decay": 0.5, "tile_size": 64}.get(name, 5)
    path = overlay(f"{partner}: 5\n" if partner else f"{name}: {value}\n")
    assert getattr(parse("--config", path, f"--{name}", "null"), name) is None


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in OPTIONAL])
def test_null_is_refused_where_a_value_is_needed(name: str, overlay: Overlay) -> None:
    path = overlay(f"{name}: null\n")
    assert message("--config", path).startswith(f"{path}: {name}: None is not valid, expected ")


def test_none_is_a_choice_of_the_tracker_and_of_the_weighting() -> None:
    config = parse("--tracker", "none", "--weighting_scheme", "none")
    assert (config.tracker, config.weighting_scheme) == ("none", "none")


@pytest.mark.parametrize("value", ["many", "1.5x", "[1]", "{a: 1}", "2024-01-01"])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused(name: str, value: str, overlay: Overlay) -> None:
    path = overlay(f"{name}: {value}\n")
    assert re.match(rf"{re.escape(str(path))}: {name}: .* is not valid, expected a", message("--config", path))
    assert message(f"--{name}", value).startswith(f"--{name}: '{value}' is not valid, expected ")


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in BOOLEANS])
def test_a_boolean_is_refused_for_anything_else(name: str, value: str, overlay: Overlay) -> None:
    path = overlay(f"{name}: {value}\n")
    assert message("--config", path).startswith(f"{path}: {name}: {value} is not valid, expected ")


@pytest.mark.parametrize("text", ["off", "'off'", "Off"])
def test_off_is_a_word_where_it_is_a_choice_and_false_where_it_is_none(text: str, overlay: Overlay) -> None:
    path = overlay(f"augmentation: {text}\n")
    assert parse("--config", path).augmentation is False
    if text != "Off":
        assert parse("--config", overlay(f"latent_cache: {text}\n")).latent_cache == "off"


@pytest.mark.parametrize("name", INTEGERS)
def test_a_fraction_is_refused_for_an_integer(name: str, overlay: Overlay) -> None:
    path = overlay(f"{name}: 16.5\n")
    assert message("--config", path).startswith(f"{path}: {name}: 16.5 is not valid, expected an integer")
    assert message(f"--{name}", "16.5").startswith(f"--{name}: '16.5' is not valid, expected an integer")


@pytest.mark.parametrize("name", BOOLEANS)
def test_what_is_no_boolean_is_refused(name: str) -> None:
    assert message(f"--{name}", "maybe") == f"--{name}: 'maybe' is not valid, expected true or false"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_names_its_options(name: str) -> None:
    text = message(f"--{name}", "nonsense")
    assert text == f"--{name}: 'nonsense' is not valid, expected {describe_type(name)}"
    for option in describe_type(name).split(" | "):
        assert getattr(parse(f"--{name}", option), name) == option


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", 100),
        ("resolution", 0),
        ("resolution", -16),
        ("threshold", 2),
        ("threshold", -0.1),
        ("threshold", "nan"),
        ("min_lr_ratio", 1.1),
        ("lr", "nan"),
        ("lr", "inf"),
        ("lr", 0),
        ("lr", -1e-5),
        ("logit_mean", "nan"),
        ("mode_scale", "inf"),
        ("max_grad_norm", 0),
        ("adam_beta1", 1),
        ("adam_beta2", -0.1),
        ("epochs", 0),
        ("train_batch_size", 0),
        ("dataloader_num_workers", -1),
        ("lr_warmup_epochs", -1),
        ("checkpoints_total_limit", 0),
        ("num_vals_train", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object, overlay: Overlay) -> None:
    expected = f" is not valid, expected {describe_type(name)}"
    assert message(f"--{name}={value}").startswith(f"--{name}: '{value}'{expected}")
    path = overlay(f"{name}: {value}\n")
    text = message("--config", path)
    assert text.startswith(f"{path}: {name}: ")
    assert text.endswith(expected)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_yaml_words_for_non_finite_numbers_are_refused(value: str, overlay: Overlay) -> None:
    for name in ("lr", "logit_mean", "threshold", "lr_cycles"):
        assert f": {name}: " in message("--config", overlay(f"{name}: {value}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!int ''",
        "lr: !!int '-'",
        "scale_lr: !!bool maybe",
        "lr: !!timestamp x",
        "lr: 1" + 3000 * ":59",
        "<<: {lr: 1}",
    ],
)
def test_odd_yaml_is_one_line(text: str, overlay: Overlay) -> None:
    assert message("--config", path := overlay(f"{text}\n")).startswith(f"{path}: ")


def test_numbers_that_nothing_can_be_computed_with_are_refused() -> None:
    for name in ("epochs", "max_train_steps", "lr_cycles"):
        for value in ("9" * 400, "9" * 5000, "1e300"):
            assert message(f"--{name}", value).startswith(f"--{name}: ")


def test_ranges_are_told_in_words() -> None:
    assert describe_type("resolution") == "an integer, >= 16, a multiple of 16"
    assert describe_type("adam_beta1") == "a number, >= 0, < 1"
    assert describe_type("lr") == "a number, > 0"
    assert describe_type("epochs") == "an integer, >= 1 or null"


def test_relative_paths_stay_as_they_are_and_home_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = parse("--dataset_path", "data/mine", "--output_dir", "~/runs/a", "--base_model_path", "owner/model")
    assert (config.dataset_path, config.base_model_path) == ("data/mine", "owner/model")
    assert config.output_dir == "/home/somebody/runs/a"


def test_the_home_of_nobody_is_refused() -> None:
    assert "--output_dir" in message("--output_dir", "~nobody-of-this-name/runs")
    assert "~nobody-of-this-name" in message("--config", "~nobody-of-this-name/a.yaml")


def test_an_empty_path_is_refused(overlay: Overlay) -> None:
    assert message("--output_dir", "").startswith("--output_dir: ")
    assert ": dataset_path: " in message("--config", overlay("dataset_path: '  '\n"))


def test_a_number_may_name_a_folder(overlay: Overlay) -> None:
    assert load_layer(overlay("output_dir: 2024\n")) == {"output_dir": "2024"}


# Files


def test_an_unknown_key_names_the_nearest(overlay: Overlay) -> None:
    path = overlay("resolutoin: 64\n")
    assert message("--config", path) == f"{path}: unknown key 'resolutoin' (did you mean 'resolution'?)"
    path = overlay("training:\n  epoch: 3\n")
    assert message("--config", path) == f"{path}: unknown key 'epoch' under training (did you mean 'epochs'?)"
    path = overlay("trainng:\n  epochs: 3\n")
    assert message("--config", path) == f"{path}: unknown key 'trainng' (did you mean 'training'?)"
    assert "unknown key 7" in message("--config", overlay("7: 3\n"))
    assert "unknown key None" in message("--config", overlay("~: 3\n"))


def test_dashes_in_a_file_are_unknown_and_name_the_key(overlay: Overlay) -> None:
    assert "did you mean 'train_batch_size'?" in message("--config", overlay("train-batch-size: 3\n"))


def test_a_key_under_a_wrong_section_names_the_right_one(overlay: Overlay) -> None:
    path = overlay("data:\n  lr: 1.0\n")
    assert message("--config", path) == f"{path}: lr belongs under optimization, not under data"


@pytest.mark.parametrize("value", ["3", "text", "[1, 2]", "true"])
def test_a_section_with_a_value_is_refused(value: str, overlay: Overlay) -> None:
    path = overlay(f"training: {value}\n")
    assert message("--config", path).startswith(f"{path}: training is a section and holds keys")


@pytest.mark.parametrize(
    "text",
    [
        "lr: 1.0\nlr: 2.0\n",
        "optimization:\n  lr: 1.0\n  lr: 2.0\n",
        "optimization:\n  lr: 1.0\nlr: 2.0\n",
        "optimization:\n  lr: 1.0\noptimization:\n  lr_cycles: 2.0\n",
    ],
)
def test_a_key_given_twice_is_refused(text: str, overlay: Overlay) -> None:
    path = overlay(text)
    assert re.match(rf"{re.escape(str(path))}: .*is given twice", message("--config", path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    assert message("--config", path) == f"{path}: no such configuration file"


@pytest.mark.parametrize(
    "content",
    [
        b"lr: [1.0\n",
        b"lr: 1.0\n\tseed: 3\n",
        b"{}}\n",
        b"a: b: c\n",
        b"? [1, 2]\n: 3\n",
        b"lr: !!python/object:os.x {}\n",
    ],
)
def test_malformed_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert message("--config", path).startswith(f"{path}: not valid YAML (")


@pytest.mark.parametrize(("text", "kind"), [("- lr\n- seed\n", "list"), ("just words\n", "str"), ("3\n", "int")])
def test_yaml_without_keys_is_refused(text: str, kind: str, overlay: Overlay) -> None:
    path = overlay(text)
    assert message("--config", path) == f"{path}: expected `key: value` lines, found a {kind}"


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"\xff\xfe\x00\x01", b"\x00\x01\x02", b"PK\x03\x04\x80"]
)
def test_a_binary_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(content)
    assert message("--config", path).startswith(f"{path}: ")


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    assert message("--config", tmp_path).startswith(f"{tmp_path}: cannot be read as a configuration file")


def test_deeply_nested_yaml_is_refused(overlay: Overlay) -> None:
    path = overlay("lr: " + "[" * 3000 + "]" * 3000 + "\n")
    assert message("--config", path).startswith(f"{path}: ")


# The resolved configuration

NASTY_TEXTS = (
    "runs/a b", "x: y", "#hash", "a #b", "1e-5", "123", "1.5", "true", "ünï/çode", "日本/語", "it's \"quoted\"", "-dash",
    "trailing ", " leading", "tab\there", "*star", "&and", "!bang", "a\nb", "%percent", "@at", "[list]", "{map}", "C:\\dir",
    "word " * 300, "word " * 300 + "end", "2024-01-01", "=", "null", "0x10", "🫙", "\x07bell",
)  # fmt: skip


def random_value(name: str, rng: np.random.Generator) -> Any:
    """Draws a valid value of a key from its type's description."""
    kind = describe_type(name)
    if name in CHOICES:
        return str(rng.choice(kind.split(" | ")))
    if name in BOOLEANS:
        return bool(rng.random() < 0.5)
    if name in OPTIONAL and rng.random() < 0.3:
        return None
    if name in INTEGERS:
        return int(rng.integers(1, 200)) * (16 if name in ("resolution", "tile_size") else 1)
    if name in NUMBERS:
        is_share = "<= 1" in kind or "< 1" in kind
        return float(rng.random()) if is_share else float(10.0 ** rng.uniform(-20, 6))
    text = str(rng.choice(NASTY_TEXTS))
    return "text" if name in OPTIONAL and text == "null" else text


def random_config(seed: int) -> Config:
    rng = np.random.default_rng(seed)
    values = {name: random_value(name, rng) for name in FIELDS}
    for pair in EXCLUSIVE_PAIRS:
        values[pair[rng.integers(2)]] = None
    if values["epochs"] is None and values["max_train_steps"] is None:
        values["max_train_steps"] = 5
    return Config(**values)


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_a_resolved_configuration_reproduces_itself(seed: int, comments: bool, overlay: Overlay) -> None:
    config = random_config(seed)
    path = overlay(to_yaml(config, comments))
    assert load_layer(path) == asdict(config)
    assert parse("--config", path) == config


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_any_text_survives_the_resolved_configuration(text: str, overlay: Overlay) -> None:
    config = replace(Config(), output_dir=text)
    assert load_layer(overlay(to_yaml(config))) == asdict(config)


def test_a_resolved_configuration_overrides_every_earlier_layer(overlay: Overlay) -> None:
    first = overlay(to_yaml(random_config(1)), "first.yaml")
    path = overlay(to_yaml(Config()), "second.yaml")
    assert parse("--config", first, "--config", path) == Config()


def test_the_last_layer_wins_in_merging() -> None:
    layers: list[dict[str, Any]] = [{"seed": 1, "epochs": 3}, {"max_train_steps": 4}, {"epochs": 5}]
    config = merge_layers(layers)
    assert (config.seed, config.epochs, config.max_train_steps) == (1, 5, None)


@pytest.mark.parametrize("value", ["-1e-3", "-0.5", "-2", "-.5E+1"])
def test_a_negative_number_is_a_value_and_no_flag(value: str) -> None:
    config, _ = parse_config(["--logit_mean", value])
    assert config.logit_mean == float(value)
