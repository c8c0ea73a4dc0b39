"""Recipes: named sets of training values, as YAML files. They hold values only; a flag of the same name wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.registry import suggest

RECIPES = Path(__file__).parent / "recipes"
PARTS = ("vision", "projector", "language")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every value that training needs; the field names are the YAML keys."""

    parts: tuple[str, ...]  # of vision, projector, language
    vision_from_layer: int | None = None  # of the vision part, only its layers from this one on, counted from 0
    learning_rate: float
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # of single parts in place of learning_rate
    batch_size: int
    micro_batch: int
    epochs: float = 1.0
    max_steps: int | None = None
    schedule: str = "cosine"
    cosine_cycles: float = 0.5  # 0.5 walks the cosine down to zero, less stops higher
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    loss_reduction: str = "global"  # or micro-batch
    template: str = "auto"
    max_length: int | None = None  # tokens, image tokens included; None: the template's
    dtype: str = "float32"  # or bfloat16
    packing: str = "auto"  # on, off, or on for models that can be trained in packs
    pack_tokens: int | None = None  # in one pack; None: by device
    save_steps: int = 500
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    workers: int = 0  # processes that prepare batches; 0 prepares them in the training process
    attention: str | None = None  # attention implementation of transformers; None takes the model's default
    lora_rank: int | None = None
    lora_alpha: float | None = None  # None: twice the rank
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ConfigError(f"batch size {self.batch_size} is not a multiple of micro batch {self.micro_batch}")
        if not self.parts and self.lora_rank is None:
            raise ConfigError("nothing to train: the recipe names no parts and no lora_rank")
        if self.loss_reduction not in ("global", "micro-batch"):
            raise ConfigError(f"loss reduction is {self.loss_reduction!r}; it must be global or micro-batch")
        if self.packing not in ("auto", "on", "off"):
            raise ConfigError(f"packing is {self.packing!r}; it must be auto, on or off")
        for part in (*self.parts, *self.learning_rates):
            if part not in PARTS:
                raise ConfigError(f"unknown part {part!r}; known: {', '.join(PARTS)}")
        if self.vision_from_layer is not None and "vision" not in self.parts:
            raise ConfigError("vision_from_layer is set, but vision is not among the parts that are trained")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be float32 or bfloat16")


_FROM_ZERO = ("workers", "vision_from_layer")
_COUNTS = (
    "batch_size",
    "micro_batch",
    "pack_tokens",
    "save_steps",
    "max_steps",
    "max_length",
    "lora_rank",
    *_FROM_ZERO,
)
_NUMBERS = (
    "learning_rate",
    "epochs",
    "warmup_ratio",
    "cosine_cycles",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "lora_alpha",
    "lora_dropout",
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_number(value: Any) -> Any:
    """2e-5, which YAML 1.1 takes for a text, as the number it is; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_numbers(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if value is None:
            continue
        if name in _COUNTS and not (_is_whole(value) and value >= (0 if name in _FROM_ZERO else 1)):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a positive whole number")
        if name in _NUMBERS and not (isinstance(value, int | float) and value >= 0):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a number that is not negative")


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
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    return _recipe(values, str(path))


def _recipe(values: Any, where: str) -> Recipe:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of names to values")
    known = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggest(str(key), known)}")
    try:
        values = {key: _as_number(value) if key in _NUMBERS else value for key, value in values.items()}
        _check_numbers(values, where)
        rates = _rates(values.get("learning_rates") or {}, where)
        return Recipe(**{**values, "parts": tuple(values.get("parts") or ()), "learning_rates": rates})
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).replace('Recipe.__init__()', 'a recipe')}") from error


def _rates(values: Any, where: str) -> dict[str, float]:
    """Learning rates by part."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: learning_rates is a mapping of parts to numbers, as in {{projector: 2e-5}}")
    rates = {str(part): _as_number(value) for part, value in values.items()}
    for part, value in rates.items():
        if not (isinstance(value, int | float) and value >= 0):
            raise ConfigError(f"{where}: the learning rate of {part} is {value!r}; it must be a number")
    return rates


def resolve_recipe(config: TrainConfig) -> Recipe:
    """The recipe of `config` with the flags that were given laid over it."""
    recipe = load_recipe(config.recipe)
    names = {field.name for field in fields(Recipe)} & {field.name for field in fields(TrainConfig)}
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    if "batch_size" in given and "micro_batch" not in given:
        given["micro_batch"] = min(recipe.micro_batch, given["batch_size"])
    if "lora_rank" in given and "parts" not in given:
        # Adapters replace training of the language part itself; the projector stays as the recipe says.
        given["parts"] = tuple(part for part in recipe.parts if part != "language")
    if "vision" not in given.get("parts", recipe.parts):
        given["vision_from_layer"] = None
    return replace(recipe, **given)
