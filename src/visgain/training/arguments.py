"""A recipe in the words of Hugging Face's Trainer."""

from __future__ import annotations

import math

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.registry import suggest
from visgain.training.recipe import Recipe


def training_arguments(recipe: Recipe, config: TrainConfig, *, n_rows: int) -> TrainingArguments:
    """The recipe in Trainer's words. Raises ConfigError for an unknown schedule or an indivisible batch size."""
    if recipe.schedule not in {s.value for s in SchedulerType}:
        raise ConfigError(
            f"unknown schedule {recipe.schedule!r}: {suggest(recipe.schedule, (s.value for s in SchedulerType))}"
        )
    use_cpu = config.device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        per_device_train_batch_size=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs={"num_cycles": recipe.cosine_cycles} if recipe.schedule == "cosine" else None,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        use_cpu=use_cpu,
        seed=config.seed,
        data_seed=config.seed,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=list(config.report_to) or "none",
        disable_tqdm=False,
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=not use_cpu,
        average_tokens_across_devices=True,
    )
    in_one_pass = recipe.micro_batch * arguments.world_size
    if recipe.batch_size % in_one_pass:
        raise ConfigError(
            f"batch size {recipe.batch_size} does not divide into micro batches of {recipe.micro_batch} on "
            f"{arguments.world_size} devices; change --batch-size or --micro-batch"
        )
    arguments.gradient_accumulation_steps = recipe.batch_size // in_one_pass
    steps = recipe.max_steps or math.ceil(recipe.epochs * math.ceil(n_rows / recipe.batch_size))
    arguments.warmup_steps = math.ceil(recipe.warmup_ratio * steps)
    return arguments
