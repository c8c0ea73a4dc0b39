"""Recipes: named sets of training values, as YAML files. They hold values only; a flag of the same name wins."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.registry import suggest

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every value that training needs; the field names are the YAML keys."""

    parts: tuple[str, ...]  # of vision, projector, language
    learning_rate: float
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
    save_steps: int = 500
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
        unknown = set(self.parts) - {"vision", "projector", "language"}
        if unknown:
            raise ConfigError(f"unknown part {sorted(unknown)[0]!r}; known: vision, projector, language")


_COUNTS = ("batch_size", "micro_batch", "save_steps", "max_steps", "lora_rank", "workers")
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
        if name in _COUNTS and not (_is_whole(value) and value >= (0 if name == "workers" else 1)):
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
        return Recipe(**{**values, "parts": tuple(values.get("parts") or ())})
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).replace('Recipe.__init__()', 'a recipe')}") from error


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
    return replace(recipe, **given)
