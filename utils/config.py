"""The configuration: one typed schema, its YAML files and its flags.

`Config` is the only source of names, types, defaults, ranges and help. A run's configuration is built in layers, later
ones winning: the top-level `config.yaml`, each `--config` overlay in turn, then the flags. Values from files and from
flags pass through the same pydantic conversion. `python -m utils.config` prints the `config.yaml` that the schema
describes.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import reprlib
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from utils.errors import InputError

BASE_CONFIG_PATH = Path(__file__).resolve().parent.parent / "config.yaml"

Difficulty = Literal["easy", "hard", "mix"]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

# A duration is given in one unit; setting one key of a pair in a later layer unsets the other.
MAX_WHOLE, MAX_REAL = 1e15, 1e36  # that any key takes: what is computed with them stays a number
EXCLUSIVE_PAIRS = (
    ("epochs", "max_train_steps"),
    ("save_checkpoint_epochs", "save_checkpoint_steps"),
    ("lr_warmup_epochs", "lr_warmup_steps"),
)


def key(section: str, default: Any, meaning: str, *, path: bool = False) -> Any:
    """Declares one configuration key: its section in the YAML file, its default and its one-line meaning."""
    return dataclasses.field(default=default, metadata={"section": section, "meaning": meaning, "path": path})


@dataclass(frozen=True)
class Config:
    """Every key of a run; the defaults are the published end-to-end recipe on SD3.5 medium at 1024 px."""

    base_model_path: str = key(
        "model",
        "stabilityai/stable-diffusion-3.5-medium",
        "base model in the Diffusers layout: a folder or a hub id",
        path=True,
    )
    prompt_embeds_path: str | None = key(
        "model", None, "safetensors with the empty prompt; null: the base's own, else computed once", path=True
    )
    objective: Literal["end_to_end", "diffusion"] = key(
        "model", "end_to_end", "how the transformer is trained and read"
    )
    prediction: Literal["clean", "velocity", "residual"] = key(
        "model",
        "clean",
        "end to end (diffusion has its own velocity): mask latents, picture minus mask, or mask minus picture",
    )
    data_type: Literal["bf16", "fp16", "fp32"] = key("model", "bf16", "precision of the computation")
    weights: Literal["fp32", "bf16"] = key(
        "model", "fp32", "precision that the weights are kept in; bf16 is rounded stochastically, half the memory"
    )
    trainable: Literal["full", "lora"] = key(
        "model", "full", "train all weights, or low-rank adapters of the linear layers"
    )
    lora_rank: PositiveInt = key("model", 16, "rank of the adapters; their scale is 1")
    lora_targets: str = key(
        "model",
        "to_q,to_k,to_v,to_out.0,net.0.proj,net.2",
        "ends of the names of the layers with adapters, with commas",
    )
    fold_conditioning: bool = key(
        "model", False, "end to end: replace what timestep and prompt compute by its constants, a third of the weights"
    )
    drop_zero_prompt_rows: bool = key("model", False, "leave out the prompt's rows that are all zero, T5's in SD3.5")
    mask_decoder: Literal["vae", "light"] = key(
        "model",
        "vae",
        "what reads masks from predicted latents: the VAE, or a small decoder trained with the transformer",
    )
    mask_decoder_path: str | None = key(
        "model", None, "folder of the light decoder to start from; null: the base's own", path=True
    )
    compile: bool = key("model", False, "torch.compile transformer and VAE: slower start, faster steps")
    gradient_checkpointing: bool = key("model", True, "recompute activations in the backward pass to save memory")

    dataset_name: Literal["trans10k", "trans10k_classes", "trans10k_v2", "folder"] = key(
        "data",
        "trans10k",
        "layout of the data set and what its masks tell: glass or not, things and stuff, or 12 classes",
    )
    dataset_path: str = key("data", "data/Trans10k", "root folder of the data set", path=True)
    palette: str | None = key(
        "data", None, "JSON of a folder's classes and their colours in the masks; null: glass or not", path=True
    )
    resolution: Annotated[int, Field(ge=16, multiple_of=16)] = key(
        "data", 1024, "side in pixels to which pictures and masks are resized; a multiple of 16"
    )
    augmentation: bool = key("data", True, "flip, colour jitter, blur and noise on training pictures")
    cutmix: Fraction = key(
        "data", 0.0, "share of the training samples in which a rectangle comes from another of the batch"
    )
    mismatched_pairs: Literal["error", "skip"] = key(
        "data", "error", "what to do with pairs whose picture and mask differ in size"
    )
    latent_cache: Literal["off", "disk"] = key(
        "data", "off", "disk: compute the training latents once, then leave the VAE out of the step"
    )
    latent_cache_path: str | None = key(
        "data", None, "folder of the latent cache, to share it between runs; null: in output_dir", path=True
    )
    latent_cache_variants: PositiveInt = key(
        "data", 4, "augmented versions of each picture and flip in the latent cache"
    )
    dataloader_num_workers: NonNegativeInt = key("data", 4, "loader processes per training process; 0: load in place")

    output_dir: str = key("run", "runs/sd35_medium_end_to_end", "folder of the run", path=True)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key("run", 42, "seed of every random draw")
    resume_from_checkpoint: str | None = key("run", None, "latest, best or the name of a checkpoint to resume from")
    tracker: Literal["wandb", "tensorboard", "trackio", "mlflow", "none"] = key(
        "run", "none", "experiment tracker beside history.csv"
    )
    log_steps: PositiveInt = key("run", 10, "updates between two rows of history.csv")

    epochs: PositiveInt | None = key("training", 43, "length in epochs, or else max_train_steps")
    max_train_steps: PositiveInt | None = key("training", None, "length in optimiser updates, or else epochs")
    train_batch_size: PositiveInt = key("training", 4, "pictures per process and batch")
    gradient_accumulation_steps: PositiveInt = key("training", 2, "batches per optimiser update")
    latent_loss_weight: NonNegativeFloat = key("training", 1.0, "weight of the objective's loss on latents")
    pixel_loss_weight: NonNegativeFloat = key(
        "training", 0.0, "weight of the mask's cross-entropy and Dice loss, through mask_decoder"
    )
    edge_weight: NonNegativeFloat = key(
        "training", 0.0, "what a pixel at the mask's edge weighs in the pixel loss above the others' 1"
    )
    max_grad_norm: PositiveFloat | None = key("training", 1.0, "gradients are clipped to this norm; null: no clipping")

    optimizer: Literal["adamw", "adamw_8bit"] = key(
        "optimization", "adamw", "AdamW, or with its moments in 8 bit (torchao)"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = key(
        "optimization", None, "decay of the moving average of the weights that is validated and saved; null: none"
    )
    lr: PositiveFloat = key("optimization", 2e-6, "learning rate; per sample of the effective batch if scale_lr")
    scale_lr: bool = key("optimization", True, "multiply lr by batch size x accumulation x processes")
    lr_scheduler: Literal["constant", "linear", "cosine"] = key("optimization", "cosine", "shape after the warm-up")
    lr_cycles: PositiveFloat = key("optimization", 3.5, "cosine periods; k + 0.5 ends at the floor")
    min_lr_ratio: Fraction = key("optimization", 0.1, "floor of linear and cosine, as a share of the peak rate")
    lr_warmup_epochs: NonNegativeFloat | None = key(
        "optimization", 1.0, "linear warm-up in epochs, or else lr_warmup_steps"
    )
    lr_warmup_steps: NonNegativeInt | None = key(
        "optimization", None, "linear warm-up in updates, or else lr_warmup_epochs"
    )
    adam_beta1: Beta = key("optimization", 0.9, "AdamW: decay of the first moment")
    adam_beta2: Beta = key("optimization", 0.999, "AdamW: decay of the second moment")
    adam_weight_decay: NonNegativeFloat = key("optimization", 0.0, "AdamW: decoupled weight decay")
    adam_epsilon: PositiveFloat = key("optimization", 1e-15, "AdamW: term added to the denominator")

    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = key(
        "diffusion", "logit_normal", "density and loss weight of the training sigmas (SD3 paper, section 3.1)"
    )
    logit_mean: float = key("diffusion", 0.0, "logit_normal: mean before the sigmoid; positive means more noise")
    logit_std: PositiveFloat = key("diffusion", 1.0, "logit_normal: standard deviation before the sigmoid")
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = key("diffusion", 1.29, "mode: scale of the density's peak")
    denoise_steps: PositiveInt = key("diffusion", 20, "Euler steps from noise to mask at inference")
    ensemble_size: PositiveInt = key("diffusion", 5, "predictions from different noise that vote at inference")

    save_checkpoint_epochs: PositiveInt | None = key("checkpoints", 1, "epochs between checkpoints, or else ..._steps")
    save_checkpoint_steps: PositiveInt | None = key(
        "checkpoints", None, "updates between checkpoints, or else ..._epochs"
    )
    checkpoints_total_limit: PositiveInt | None = key(
        "checkpoints", 2, "newest checkpoints kept beside the best; null: all"
    )

    val_steps: PositiveInt | None = key("validation", 500, "updates between validations; null: no validation at all")
    val_difficulty: Difficulty = key("validation", "mix", "which validation pictures: easy, hard or mix (both)")
    num_vals_train: PositiveInt | None = key("validation", None, "pictures per validation; null: all")

    load_checkpoint: str = key("inference", "latest", "latest, best, a checkpoint's name or the path of one")
    test_difficulty: Difficulty = key("inference", "mix", "which test pictures: easy, hard or mix (both)")
    num_vals_test: PositiveInt | None = key("inference", None, "test pictures; null: all")
    test_batch_size: PositiveInt = key("inference", 4, "pictures per process and forward pass, in validation too")
    tta: Literal["none", "flip", "flip_scale"] = key(
        "inference", "none", "views of a picture whose predictions are averaged: itself, mirrored, at three scales too"
    )
    tile_size: Annotated[int, Field(ge=16, multiple_of=16)] | None = key(
        "inference", None, "pictures longer than this are predicted in overlapping tiles of this side; null: whole"
    )
    protocol: str = key(
        "inference", "per_image,glass", "protocols to score by, with commas: per_image, glass, translab, classes"
    )
    score_sizes: str = key(
        "inference",
        "training,512,own",
        "sizes to score at, with commas: training, a side in pixels, own (each picture's)",
    )
    threshold: Fraction | Literal["validation"] = key(
        "inference",
        0.5,
        "a pixel is transparent where the prediction exceeds this; validation: what was best there for the best checkpoint",
    )


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = get_type_hints(Config, include_extras=True)
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(_TYPES[name], config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))
    for name in FIELDS
}
SECTIONS = tuple(dict.fromkeys(field.metadata["section"] for field in FIELDS.values()))


def parse_config(
    argv: Sequence[str], description: str = "", switches: Mapping[str, str] | None = None
) -> tuple[Config, frozenset[str]]:
    """Builds the configuration of a command from `config.yaml`, overlays and flags.

    Args:
        argv: the command's arguments without the program's name.
        description: shown by `--help`.
        switches: flags of the command that are no keys and take no value, by name, with their help.

    Returns:
        The configuration, and the names of the keys and switches that were given as flags.

    Raises:
        InputError: for an unknown key or flag, a wrong type, a value out of range, a missing or malformed file, or
            epochs and steps given together.
    """
    switches = switches or {}
    parser = _build_parser(description, switches)
    namespace, unknown = parser.parse_known_args(_bind_negative_numbers(argv))
    if unknown:
        raise InputError(_unknown_argument(unknown[0], [*FIELDS, *switches, "config"]))
    layers = [load_layer(BASE_CONFIG_PATH)] if BASE_CONFIG_PATH.is_file() else []
    layers += [load_layer(Path(_expand_home(path, "--config"))) for path in namespace.config]
    flags = {
        name: convert(name, value, f"--{name}") for name in FIELDS if (value := getattr(namespace, name)) is not None
    }
    _check_exclusive(flags, "the command line", prefix="--")
    given = {name for name in switches if getattr(namespace, name)}
    return merge_layers([*layers, flags]), frozenset({*flags, *given})


def merge_layers(layers: Sequence[Mapping[str, Any]]) -> Config:
    """Returns the configuration after the given layers of converted values, later ones winning.

    Raises:
        InputError: if neither epochs nor max_train_steps is left.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        for pair in EXCLUSIVE_PAIRS:
            if any(layer.get(name) is not None for name in pair):
                values.update(dict.fromkeys(pair))
        values.update(layer)
    config = Config(**values)
    if config.epochs is None and config.max_train_steps is None:
        raise InputError("epochs and max_train_steps are both null: give one of them, it is the length of the training")
    return config


def load_layer(path: Path) -> dict[str, Any]:
    """Reads one YAML file whose keys stand flat or under their section.

    Returns:
        Converted values by key.

    Raises:
        InputError: naming the file and the key.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a configuration file ({error})") from error
    except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(document).__name__}")
    layer: dict[str, Any] = {}

    def put(name: Any, value: Any, section: str | None) -> None:
        if name not in FIELDS:
            place = f" under {section}" if section else ""
            raise InputError(
                f"{path}: unknown key {name!r}{place} (did you mean {_nearest(str(name), [*FIELDS, *SECTIONS])!r}?)"
            )
        if section is not None and FIELDS[name].metadata["section"] != section:
            raise InputError(f"{path}: {name} belongs under {FIELDS[name].metadata['section']}, not under {section}")
        if name in layer:
            raise InputError(f"{path}: {name} is given twice, flat and under its section")
        layer[name] = convert(name, value, f"{path}: {name}")

    for name, value in document.items():
        if name not in SECTIONS:
            put(name, value, None)
        elif isinstance(value, dict):
            for inner_name, inner_value in value.items():
                put(inner_name, inner_value, name)
        elif value is not None:
            raise InputError(f"{path}: {name} is a section and holds keys, not the value {reprlib.repr(value)}")
    _check_exclusive(layer, str(path))
    return layer


def convert(name: str, value: Any, where: str) -> Any:
    """Converts one value from a file or a flag to the type of its key.

    Args:
        name: a key of `Config`.
        value: what YAML or the command line gave.
        where: file and key, or the flag, to begin an error message with.

    Raises:
        InputError: if the value has the wrong type or is out of range.
    """
    optional = type(None) in get_args(_TYPES[name])
    if isinstance(value, str) and optional and value.strip().lower() in ("null", "none", "~", ""):
        return None
    if isinstance(value, bool) and _TYPES[name] is not bool:
        raise InputError(f"{where}: {str(value).lower()} is not valid, expected {describe_type(name)}")
    _check_size(name, value, where)
    try:
        converted = _ADAPTERS[name].validate_python(value)
    except ValidationError as error:
        raise InputError(f"{where}: {reprlib.repr(value)} is not valid, expected {describe_type(name)}") from error
    _check_size(name, converted, where)
    if FIELDS[name].metadata["path"] and isinstance(converted, str):
        if not converted.strip():
            raise InputError(f"{where}: is empty, expected a path")
        return _expand_home(converted, where)
    return converted


def _check_size(name: str, value: Any, where: str) -> None:
    largest = MAX_WHOLE if describe_type(name).startswith("an integer") else MAX_REAL
    if isinstance(value, int | float) and abs(value) > largest:
        raise InputError(f"{where}: is larger than {largest:.0e}, expected {describe_type(name)}")


def describe_type(name: str) -> str:
    """Returns a key's type and range in words, for help and error messages."""
    return _describe(_TYPES[name])


def to_yaml(config: Config, comments: bool = True) -> str:
    """Returns a configuration as sectioned YAML, one line a key, with each key's meaning as its comment."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for name, field in FIELDS.items():
            if field.metadata["section"] == section:
                entry = (
                    "  " + yaml.safe_dump({name: getattr(config, name)}, width=sys.maxsize, allow_unicode=True).strip()
                )
                lines.append(f"{entry:<58}  # {field.metadata['meaning']}" if comments else entry)
    return "\n".join(lines[1:]) + "\n"


def _expand_home(path: str, where: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise InputError(f"{where}: {path}: no such user's home folder") from error


def _describe(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation in (int, float, str, bool):
        return {int: "an integer", float: "a number", str: "text", bool: "true or false"}[annotation]
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(arguments)
    if hasattr(annotation, "__metadata__"):
        words = [_describe(arguments[0])]
        for constraint in annotation.__metadata__[0].metadata:
            for attribute, word in (
                ("ge", ">="),
                ("gt", ">"),
                ("le", "<="),
                ("lt", "<"),
                ("multiple_of", "a multiple of"),
            ):
                if hasattr(constraint, attribute):
                    words.append(f"{word} {getattr(constraint, attribute)}")
        return ", ".join(words)
    return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)


def _nearest(name: str, names: Sequence[str]) -> str:
    return difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1, cutoff=0.0)[0]


def _check_exclusive(layer: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for first, second in EXCLUSIVE_PAIRS:
        if layer.get(first) is not None and layer.get(second) is not None:
            raise InputError(f"{where}: {prefix}{first} and {prefix}{second} are given together; give one of them")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice instead of taking the last, and takes `off` for a word."""

    # YAML 1.2: only true and false are booleans. A boolean key converts yes, no, on and off itself.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, re.compile("true|True|TRUE|false|False|FALSE") if tag == "tag:yaml.org,2002:bool" else pattern)
            for tag, pattern in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help shows every flag)")


def _build_parser(description: str, switches: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = _Parser(description=description, usage="%(prog)s [--config FILE]... [--KEY VALUE]...", allow_abbrev=False)
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML overlay; repeatable, later wins, flags win"
    )
    for name, help_text in switches.items():
        parser.add_argument(*_spellings(name), dest=name, action="store_true", help=help_text)
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        for name, field in FIELDS.items():
            if field.metadata["section"] != section:
                continue
            default = "null" if field.default is None else str(field.default)
            help_text = f"{field.metadata['meaning']} [{describe_type(name)}; default: {default}]".replace("%", "%%")
            # A boolean flag may stand alone: `--augmentation` means `--augmentation true`.
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if _TYPES[name] is bool else {}
            group.add_argument(*_spellings(name), dest=name, metavar="VALUE", default=None, help=help_text, **bare)
    return parser


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _bind_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Turns `--key -1e-3` into `--key=-1e-3`: argparse takes a negative number with an exponent for a flag."""
    bound: list[str] = []
    for argument in argv:
        if bound and bound[-1].startswith("--") and "=" not in bound[-1] and NEGATIVE_NUMBER.fullmatch(argument):
            bound[-1] = f"{bound[-1]}={argument}"
        else:
            bound.append(argument)
    return bound


def _unknown_argument(argument: str, names: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}: every value needs its flag (--help shows them)"
    flag = argument.split("=")[0]
    return f"unknown flag {flag} (did you mean --{_nearest(flag.lstrip('-'), names)}?)"


def main() -> None:
    """Prints the `config.yaml` that the schema describes."""
    header = (
        "# Every key with its default: the published end-to-end recipe on SD3.5 medium at 1024 px.\n"
        "# Any key is also a flag (--lr 1e-5); `--config overlay.yaml` overlays a part, later files win, flags win over all.\n"
        "# Written by `python -m utils.config > config.yaml` from utils/config.py.\n\n"
    )
    sys.stdout.write(header + to_yaml(Config()))


if __name__ == "__main__":
    main()
