"""Recipes: named sets of training values, as YAML files. They hold values only; a flag of the same name wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.registry import suggest

RECIPES = Path(__file__).parent / "recipes"


class Rule(NamedTuple):
    """What a number must be, beyond its type."""

    said: str
    holds: Callable[[float], bool]


Count = Annotated[int, Rule("from 1 on", lambda number: number >= 1)]
FromZero = Annotated[int, Rule("from 0 on", lambda number: number >= 0)]
Length = Annotated[int, Rule("from 8 on", lambda number: number >= 8)]
Above = Annotated[float, Rule("above 0", lambda number: number > 0)]
Amount = Annotated[float, Rule("from 0 on", lambda number: number >= 0)]
Share = Annotated[float, Rule("from 0 to below 1", lambda number: 0 <= number < 1)]
Part = Literal["vision", "projector", "language"]
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]
"""Trainer's schedules, save those that need values of their own (a least rate, a phase's steps) or an evaluation."""
Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every value that training needs; the field names are the YAML keys, their types what a value is checked by."""

    parts: tuple[Part, ...] = ()  # with a lora_rank language is trained by its adapters alone, named here or not
    vision_from_layer: FromZero | None = None  # of the vision part, only its layers from this one on, counted from 0
    learning_rate: Amount
    learning_rates: Mapping[str, Amount] = field(default_factory=dict)  # of single parts in place of learning_rate
    batch_size: Count
    micro_batch: Count
    epochs: Above = 1.0
    max_steps: Count | None = None
    schedule: Schedule = "cosine"
    cosine_cycles: Amount = 0.5  # 0.5 walks the cosine down to zero, less stops higher
    warmup_ratio: Share = 0.03
    weight_decay: Amount = 0.0
    adam_beta2: Share = 0.999
    max_grad_norm: Amount = 1.0  # 0 does not clip
    loss_reduction: Literal["global", "micro-batch"] = "global"
    template: str = "auto"
    max_length: Length | None = None  # tokens, image tokens included; None: the template's
    dtype: Literal["float32", "bfloat16"] = "float32"
    packing: Literal["auto", "on", "off"] = "auto"  # auto: on for models that can be trained in packs
    pack_tokens: Count | None = None  # in one pack; None: by device
    save_steps: Count = 500
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    workers: FromZero = 0  # processes that prepare batches; 0 prepares them in the training process
    attention: Attention | None = None  # implementation in transformers; None takes the model's default
    lora_rank: Count | None = None
    lora_alpha: Above | None = None  # None: twice the rank
    lora_dropout: Share = 0.0

    def __post_init__(self) -> None:
        if self.lora_rank is not None:
            # Adapters replace training of the language part itself.
            object.__setattr__(self, "parts", tuple(part for part in self.parts if part != "language"))
        if self.batch_size % self.micro_batch:
            raise ConfigError(
                f"batch_size is {self.batch_size}, which is not a multiple of micro_batch, {self.micro_batch}; "
                "change either (--batch-size, --micro-batch)"
            )
        if self.schedule == "polynomial" and self.learning_rate <= 1e-7:
            raise ConfigError(f"learning_rate is {self.learning_rate}; with schedule polynomial it must be above 1e-7")
        if not self.parts and self.lora_rank is None:
            raise ConfigError("nothing to train: the recipe names no parts and no lora_rank")
        for part in self.learning_rates:
            if part not in get_args(Part):
                raise ConfigError(f"learning_rates has {part!r}; its names are {_words(Part)}")
        if self.vision_from_layer is not None and "vision" not in self.parts:
            raise ConfigError("vision_from_layer is set, but vision is not among the parts that are trained")


_FREE = ("packing", "pack_tokens", "gradient_checkpointing", "workers", "save_steps")
"""Values on which nothing depends but time and memory: they may change between a start and the next."""


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The values that the trained model depends on, by name."""
    return {name: value for name, value in asdict(recipe).items() if name not in _FREE}


# ---------------------------------------------------------------- what a value must be


@cache
def _kinds() -> dict[str, Any]:
    """The type of each key, with the rules that its numbers obey."""
    return get_type_hints(Recipe, include_extras=True)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`. A truth value is no number here, and a number is finite."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, inner[0]) and all(rule.holds(value) for rule in inner[1:])
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


def _words(kind: Any) -> str:
    """What a value of the type `kind` is, for a message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join((_words(inner[0]), *(rule.said for rule in inner[1:])))
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner if one is not NoneType)
    if origin is Literal:
        return f"{', '.join(inner[:-1])} or {inner[-1]}"
    if origin is tuple:
        return f"a list of {_words(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names, each to {_words(inner[1])}"
    return _NAMES[kind]


def _check(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that is not what its key takes."""
    for name, value in values.items():
        if not _fits(value, _kinds()[name]):
            said = "empty" if value is None else repr(value)
            raise ConfigError(f"{name} is {said}; it must be {_words(_kinds()[name])}")


def _read(value: Any, kind: Any) -> Any:
    """2e-5, which YAML 1.1 takes for a text, as the number it is where `kind` says so; anything else as it is."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Annotated, Union, UnionType):
        return _read(value, inner[0])
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _read(one, inner[1]) for key, one in value.items()}
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# ---------------------------------------------------------------- from a file and from flags


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`, or in the YAML file `name`. Raises ConfigError for anything unknown or ill-typed."""
    shipped = RECIPES / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise ConfigError(f"no recipe and no file {name!r}: {suggest(name, recipe_names())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no text, or no such date
        raise ConfigError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    return _recipe(values, str(path))


def _recipe(values: Any, where: str) -> Recipe:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of names to values")
    known = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggest(str(key), known)}")
    values = {key: _read(value, _kinds()[key]) for key, value in values.items()}
    needed = (one.name for one in fields(Recipe) if one.default is MISSING and one.default_factory is MISSING)
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; every recipe says these")
    try:
        _check(values)
        return Recipe(**{**values, "parts": tuple(values.get("parts", ()))})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def resolve_recipe(config: TrainConfig) -> Recipe:
    """The recipe of `config` with the flags that were given laid over it."""
    recipe = load_recipe(config.recipe)
    names = {field.name for field in fields(Recipe)} & {field.name for field in fields(TrainConfig)}
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    if "batch_size" in given and "micro_batch" not in given:
        given["micro_batch"] = min(recipe.micro_batch, given["batch_size"])
    if "lora_rank" in given and recipe.lora_alpha is not None and recipe.lora_rank is not None:
        # The ratio is what scales the adapters.
        given["lora_alpha"] = recipe.lora_alpha * given["lora_rank"] / recipe.lora_rank
    if "vision" not in given.get("parts", recipe.parts):
        given["vision_from_layer"] = None
    try:
        _check(given)
        return replace(recipe, **given)
    except ConfigError as error:
        raise ConfigError(f"--recipe {config.recipe}: {error}") from None
