"""`visgain train`: Hugging Face's Trainer with our batches and our loss, and nothing else changed.

The trained model is a plain Hugging Face folder at --out. Checkpoints to resume from lie in --out/checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, set_seed

from visgain.config import TrainConfig
from visgain.data import open_dataset, reading
from visgain.errors import ConfigError, DataError
from visgain.storage import claim_run, file_hash, read_json, storage_errors, write_json
from visgain.training.arguments import training_arguments
from visgain.training.checkpoint import last_checkpoint
from visgain.training.collate import Collator, Rows, open_rows
from visgain.training.logs import JsonlLog, QuietProgress
from visgain.training.prepare import prepare_model
from visgain.training.recipe import Recipe, resolve_recipe
from visgain.training.trainer import SelectiveTrainer
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name
from visgain.vlm.profiles import find_profile
from visgain.vlm.projector import with_projector
from visgain.vlm.template import make_encoder

SUMMARY = "train.json"
"""In a trained model's folder, written last: the TrainSummary."""


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
    result = trainer.resume(last_checkpoint(config.out) if resumed else None)
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


def _save(model: Any, vlm: VLM, out: Path) -> None:
    """A plain Hugging Face folder: adapters are merged into the weights, and kept beside them."""
    if hasattr(model, "merge_and_unload"):
        with storage_errors(out):
            model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    with storage_errors(out):
        model.save_pretrained(out)
        vlm.processor.save_pretrained(out)


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
