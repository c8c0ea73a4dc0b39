"""`visgain train`: Hugging Face's Trainer with our batches and our loss, and nothing else changed.

The trained model is a plain Hugging Face folder at --out. Checkpoints to resume from lie in --out/checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType

from visgain.config import TrainConfig
from visgain.data import open_dataset, reading
from visgain.errors import ConfigError, DataError, StorageError
from visgain.registry import suggest
from visgain.storage import claim_run, file_hash, read_json, storage_errors, write_json
from visgain.training.collate import IGNORED, Collator, Rows, open_rows
from visgain.training.loss import active_nll, reduce_loss
from visgain.training.recipe import Recipe, resolve_recipe
from visgain.vlm.families import named_parts, part_modules
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name
from visgain.vlm.logits import output_head
from visgain.vlm.profiles import find_profile
from visgain.vlm.projector import with_projector
from visgain.vlm.template import make_encoder

BESIDE_ADAPTER = "trained.safetensors"
"""In a checkpoint of adapters: every parameter that is trained."""

SUMMARY = "train.json"
"""In a trained model's folder, written last: the TrainSummary."""

PROGRESS = "visgain.json"
"""In a checkpoint: the number of active tokens so far."""


class SelectiveTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the cross-entropy of the active tokens (labels other than -100) alone."""

    def __init__(self, *, loss_reduction: str = "global", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Tells Trainer whether to count the labels of the whole optimiser step for us (global), or to average the
        # losses of its micro-batches itself.
        self.model_accepts_loss_kwargs = loss_reduction == "global"
        self.active_tokens = 0  # that carried loss on this device since the start of the run

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float32[Tensor, ""] | tuple[Float32[Tensor, ""], dict[str, Tensor]]:
        """Loss of one micro-batch, scaled for accumulation as Trainer expects."""
        labels = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        active = labels != IGNORED
        self.active_tokens += int(active.sum())
        nll = active_nll(model, model_inputs, active, output_head(self._unwrapped(model)))
        loss = reduce_loss(nll, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over devices, while the count is that of all of them together.
            loss = loss * self.accelerator.num_processes
        return (loss, {"nll": nll}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "active_tokens": self.active_tokens}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        write_json(folder / PROGRESS, {"active_tokens": self.active_tokens})
        if not isinstance(self.model, PreTrainedModel):
            # An adapter's checkpoint leaves out whatever else is trained beside it, such as the projector.
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / BESIDE_ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights through from_pretrained, and all of them.

        Trainer's own way matches the file's names with the module's, which differ in models whose file format is older
        than their code (LLaVA): it would warn, load nothing, and go on from the initial weights.
        """
        model = self.model if model is None else model
        self.active_tokens = read_json(Path(resume_from_checkpoint) / PROGRESS, "checkpoint")["active_tokens"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif isinstance(model, PreTrainedModel):
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())
        else:
            trained = load_file(Path(resume_from_checkpoint) / BESIDE_ADAPTER)
            if model.load_state_dict(trained, strict=False).unexpected_keys:
                raise StorageError(f"{resume_from_checkpoint} is a checkpoint of another model; use another --out")

    def _unwrapped(self, model: nn.Module) -> PreTrainedModel:
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped


class QuietProgress(ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar with the loss in it, instead of log lines among the results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class JsonlLog(TrainerCallback):  # type: ignore[misc]
    """Appends everything Trainer logs to `path`, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs})
            with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    rows: int
    steps: int
    active_tokens: int  # that carried loss on this device, counted once for each time
    mean_loss: float  # nats, over the steps of this start
    seconds: float


def run_train(config: TrainConfig) -> TrainSummary:
    """Train on the selected rows and tokens. Resumes from the last checkpoint in `config.out`; does nothing if done."""
    recipe = resolve_recipe(config)
    find_profile(config.template)  # a mistyped name is told before the model is loaded
    scored = _scored_identity(config)
    dataset = open_dataset(
        config.data,
        config.image_root,
        max_pixels=config.max_pixels,
        follow_links=config.follow_links,
        columns=config.columns or scored.get("columns"),
        format=config.format or scored.get("format"),
    )
    if scored and scored["data_fingerprint"] != dataset.fingerprint:
        raise DataError(f"{config.data} changed since it was scored (or is another dataset); score and select again")
    set_seed(config.seed)  # before the model: adapters are initialised at random
    vlm = with_projector(
        config.projector,
        lambda: load_vlm(config.model, device="cpu", trust_remote_code=config.trust_remote_code),
    )
    encoder = make_encoder(vlm, config.template, config.max_length)
    config = replace(config, max_length=encoder.max_length)
    if scored and scored["template"] != encoder.name:
        raise ConfigError(f"the selection was scored with --template {scored['template']}, this is {encoder.name}")
    end_of_turn = scored.get("end_of_turn", "score")
    rows = open_rows(dataset, encoder, config.selection, end_of_turn=end_of_turn)
    resumed = claim_run(config.out, _identity(config, recipe, dataset.fingerprint), {"recipe": asdict(recipe)})
    if resumed and (config.out / SUMMARY).is_file():
        return TrainSummary(**read_json(config.out / SUMMARY, "training"))
    model = prepare_model(vlm, recipe)
    trainer = build_trainer(model, vlm, rows, recipe, config)
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(config.out) if resumed else None)
    if trainer.is_world_process_zero():
        _save(trainer.model, vlm, config.out)
    summary = TrainSummary(
        rows=len(rows),
        steps=int(result.global_step),
        active_tokens=trainer.active_tokens,
        mean_loss=float(result.training_loss),
        seconds=float(result.metrics["train_runtime"]),
    )
    if trainer.is_world_process_zero():
        write_json(config.out / SUMMARY, asdict(summary))
    return summary


def prepare_model(vlm: VLM, recipe: Recipe) -> Any:
    """The model with only the recipe's parts (and adapters) left trainable."""
    model = vlm.model
    if recipe.attention is not None:
        model.set_attn_implementation(recipe.attention)
    trained = named_parts(model, recipe.parts)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model if recipe.lora_rank is None else _with_lora(model, recipe, recipe.lora_rank)


def _with_lora(model: PreTrainedModel, recipe: Recipe, rank: int) -> Any:
    """Low-rank adapters on every linear layer of the language part; what was trainable stays so."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("LoRA needs peft: pip install 'visgain[lora]'") from None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = output_head(model)
    language = {id(m) for part in part_modules(model, "language") for m in part.modules() if m is not head}
    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in language
    ]
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if recipe.lora_alpha is None else recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
    )
    adapted = get_peft_model(model, lora)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return adapted


def build_trainer(model: Any, vlm: VLM, rows: Rows, recipe: Recipe, config: TrainConfig) -> SelectiveTrainer:
    pad_id = vlm.tokenizer.pad_token_id
    arguments = training_arguments(recipe, config, n_rows=len(rows))
    trainer = SelectiveTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(0 if pad_id is None else pad_id),
        callbacks=[JsonlLog(config.out / "log.jsonl")],
        loss_reduction=recipe.loss_reduction,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    return trainer


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


def _save(model: Any, vlm: VLM, out: Path) -> None:
    """A plain Hugging Face folder: adapters are merged into the weights, and kept beside them."""
    if hasattr(model, "merge_and_unload"):
        with storage_errors(out):
            model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    with storage_errors(out):
        model.save_pretrained(out)
        vlm.processor.save_pretrained(out)


def _last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that was written completely (Trainer writes its state last)."""
    complete = [path for path in out.glob("checkpoints/checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _scored_identity(config: TrainConfig) -> dict[str, Any]:
    """What the selection says about the scores it was made from; nothing without a selection."""
    if config.selection is None:
        return {}
    identity: dict[str, Any] = read_json(config.selection / "selection.json", "selection")["identity"]
    return identity


def _identity(config: TrainConfig, recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """Everything that the trained model depends on."""
    selection = None if config.selection is None else file_hash(config.selection / "selection.parquet")
    return {
        "model": model_name(config.model),
        "model_fingerprint": model_fingerprint(config.model),
        "data_fingerprint": data_fingerprint,
        "selection": selection,
        "recipe": asdict(recipe),
        "template": config.template,
        "max_length": config.max_length,
        "seed": config.seed,
        "dtype": config.dtype,
        **({"projector": file_hash(config.projector)} if config.projector else {}),
        **reading(config.columns, config.format),
    }
