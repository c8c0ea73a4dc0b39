"""A recipe in the words of Hugging Face's Trainer, and how several processes share the model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import enable_fsdp_ram_efficient_loading
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.registry import suggest
from visgain.scoring.claims import Rank
from visgain.training.recipe import Recipe
from visgain.vlm.load import pick_device

PARALLEL = Path(__file__).parent / "parallel"
"""How a model is sharded, by name: settings of FSDP or DeepSpeed."""


def training_arguments(recipe: Recipe, config: TrainConfig) -> TrainingArguments:
    """The recipe in Trainer's words. From here on the processes that torchrun started know each other.

    Raises ConfigError for a way to share that cannot be had, ModelError for a GPU that is not there.
    """
    if not torch.cuda.is_available():
        pick_device(config.device)  # says so if a GPU is asked for; where there are some, each process takes its own
    use_cpu = config.device == "cpu" or not torch.cuda.is_available()
    sharding = _sharding(config.parallel)
    _check_processes(config)
    _check_trackers(config.report_to)
    if sharding.get("fsdp_config", {}).get("cpu_ram_efficient_loading"):
        enable_fsdp_ram_efficient_loading()  # it must be known before the model is loaded
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        # A batch is all that a rank computes of a step: what goes through the model at once is the trainer's business.
        per_device_train_batch_size=max(1, recipe.batch_size // Rank.here().world),
        gradient_accumulation_steps=1,
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs={"num_cycles": recipe.cosine_cycles} if recipe.schedule == "cosine" else None,
        warmup_steps=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=use_cpu,
        seed=config.seed,
        data_seed=config.seed,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log 0 in their place
        report_to=list(config.report_to) or "none",
        disable_tqdm=False,
        remove_unused_columns=False,
        dataloader_num_workers=min(recipe.workers, os.cpu_count() or 1),
        dataloader_pin_memory=not use_cpu,
        average_tokens_across_devices=True,
        # What runs may have no gradient all the same: LLaVA does not look at the last layer of its vision tower.
        ddp_find_unused_parameters=True,
        **sharding,
    )
    _one_device(arguments)
    return arguments


def parallel_names() -> list[str]:
    """Ways to share a model that ship with the package."""
    return ["ddp", *sorted(path.stem for path in PARALLEL.glob("*.yaml"))]


def _sharding(name: str) -> dict[str, Any]:
    """What Trainer is told for `--parallel NAME`. Raises ConfigError for an unknown name or an unusable file."""
    if name == "ddp":
        return {}
    shipped = PARALLEL / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise ConfigError(f"--parallel {name} is no name and no file: {suggest(name, parallel_names())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read --parallel {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--parallel {path}: settings are a mapping of names to values")
    if "zero_optimization" not in values:
        return {"fsdp": True, "fsdp_config": values}
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"--parallel {name} needs DeepSpeed: pip install deepspeed")
    return {"deepspeed": values}


def _check_processes(config: TrainConfig) -> None:
    """Raises ConfigError if there are too few processes, or several that would not know of each other."""
    here = Rank.here()
    if "RANK" not in os.environ and here.world > 1:
        raise ConfigError(
            f"srun started {here.world} processes, and each would train a model of its own; let it start torchrun once "
            "a machine: srun --ntasks-per-node 1 torchrun --nnodes ... (docs/clusters.md)"
        )
    if config.parallel != "ddp" and here.world == 1:
        raise ConfigError(
            f"--parallel {config.parallel} shares a model among several processes, and there is one; start them with "
            "torchrun --nproc-per-node 8 -m visgain train ..."
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for an experiment tracker that Trainer does not know, or whose package is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"--report-to {name} is no known tracker: {suggest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"--report-to {name} needs that tracker's package, which is not installed")


def _one_device(arguments: TrainingArguments) -> None:
    """Without torchrun, one GPU: Trainer would copy the model to all for every batch, which is slow."""
    if arguments.n_gpu > 1:
        tqdm.write(
            f"visgain: this uses one of {arguments.n_gpu} GPUs; for all of them: "
            f"torchrun --nproc-per-node {arguments.n_gpu} -m visgain train ...",
            file=sys.stderr,
        )
        arguments._n_gpu = 1
