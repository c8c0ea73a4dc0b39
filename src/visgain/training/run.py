"""`visgain train`: Hugging Face's Trainer with our batches and our loss, and nothing else changed.

The trained model is a plain Hugging Face folder at --out. Checkpoints to resume from lie in --out/checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainingArguments, set_seed

from visgain.config import TrainConfig
from visgain.data import reading
from visgain.errors import ConfigError, StorageError
from visgain.scored import open_as_scored
from visgain.storage import CANDIDATES, claim_run, file_hash, read_candidates, read_json, write_json
from visgain.training.arguments import training_arguments
from visgain.training.checkpoint import last_checkpoint
from visgain.training.collate import Rows, SelectedRows, open_rows
from visgain.training.logs import JsonlLog, QuietProgress
from visgain.training.prepare import prepare_model, recompute_activations, set_precision, shard_by_layer
from visgain.training.ranks import from_first, leave
from visgain.training.recipe import Recipe, decisive, resolve_recipe
from visgain.training.refresh import Refresh, RefreshedRows, cost, selection_record
from visgain.training.save import outline, save_model, whole_model
from visgain.training.trainer import SelectiveTrainer, Tokens
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name
from visgain.vlm.profiles import find_profile
from visgain.vlm.projector import with_projector
from visgain.vlm.template import make_encoder
from visgain.vlm.threads import computing_with, n_threads

SUMMARY = "train.json"
"""In a trained model's folder, written last: the TrainSummary."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    rows: int
    steps: int
    active_tokens: int  # that carried loss, counted once for each time
    mean_loss: float  # nats, over the steps
    seconds: float
    refreshed_rows: int = 0  # scored while training, counted once for each time
    refresh_seconds: float = 0.0  # what that took of `seconds`


def run_train(config: TrainConfig) -> TrainSummary:
    """Train on the selected rows and tokens. Resumes from the last checkpoint in `config.out`; does nothing if done."""
    summary = _train(config)
    leave()
    return summary


def _train(config: TrainConfig) -> TrainSummary:
    recipe = resolve_recipe(config)
    find_profile(recipe.template)  # a mistyped name is told before the model is loaded
    if config.refresh_every is not None:
        selection_record(config)  # a rule that cannot follow the model is told before the model is loaded
    arguments = training_arguments(recipe, config)
    scored = _scored_identity(config)
    dataset = open_as_scored(config, scored)
    set_seed(config.seed)  # what the model's files lack is drawn
    vlm = with_projector(
        config.projector,
        lambda: load_vlm(config.model, dtype="auto", device="cpu", trust_remote_code=config.trust_remote_code),
    )
    encoder = make_encoder(vlm, recipe.template, recipe.max_length)
    if encoder.max_length > scored.get("max_length", encoder.max_length):
        encoder = make_encoder(vlm, recipe.template, _cut_as_scored(config, scored["max_length"]))
    recipe = replace(recipe, max_length=encoder.max_length)
    if scored and scored["template"] != encoder.name:
        raise ConfigError(
            f"the selection was scored with --template {scored['template']}, and --recipe {config.recipe} trains with "
            f"{encoder.name}; score with --template {encoder.name}, or train with --template {scored['template']}"
        )
    end_of_turn = scored.get("end_of_turn", "score")
    rows = open_rows(dataset, encoder, config.selection, end_of_turn=end_of_turn)
    if config.refresh_every is not None and config.selection is not None and isinstance(rows, SelectedRows):
        candidates = read_candidates(config.selection)
        rows = RefreshedRows(dataset, encoder, rows.selection, candidates, end_of_turn=end_of_turn)
    done, checkpoint = from_first(lambda: _begin(config, recipe, dataset.fingerprint))
    if done is not None:
        return done
    set_seed(config.seed)  # adapters are drawn alike however the model was loaded
    model = prepare_model(vlm, recipe)
    set_precision(model, recipe.dtype)
    empty = outline(model)
    trainer = build_trainer(model, vlm, rows, recipe, config, arguments)
    with computing_with(n_threads(vlm)):
        result = trainer.resume(checkpoint)
    summary = TrainSummary(
        rows=rows.n_selected,
        steps=int(result.global_step),
        active_tokens=trainer.active_tokens,
        mean_loss=mean_loss(trainer.state.log_history),
        seconds=round(trainer.seconds, 4),
        **cost(config.out),
    )
    trained = whole_model(trainer, empty)
    if trainer.is_world_process_zero():
        save_model(trained, vlm, config.out, recipe.dtype)
        write_json(config.out / SUMMARY, asdict(summary))
    return summary


def _cut_as_scored(config: TrainConfig, limit: int) -> int:
    """The `limit` of the scores, where sequences would be longer: what was cut for them has no scores behind the cut.

    Raises ConfigError if more was asked for.
    """
    if config.max_length is not None:
        raise ConfigError(
            f"--max-length is {config.max_length}, and the selection was scored with --max-length {limit}: tokens "
            f"behind that have no scores; leave it out, or score with --max-length {config.max_length}"
        )
    return limit


def mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Of all steps, those of earlier starts too; 0 without any."""
    losses = [logged["loss"] for logged in history if "loss" in logged]
    return sum(losses) / max(len(losses), 1)


def _begin(config: TrainConfig, recipe: Recipe, data_fingerprint: str) -> tuple[TrainSummary | None, Path | None]:
    """Make the folder ours. What was done there before: all of it (its summary), or the checkpoint to go on from."""
    if not (config.out / "run.json").exists() and _has_model(config.out):
        raise StorageError(f"{config.out} holds a model that no training of ours has put there; use another --out")
    resumed = claim_run(config.out, _identity(config, recipe, data_fingerprint), {"recipe": asdict(recipe)})
    if resumed and (config.out / SUMMARY).is_file() and _has_model(config.out):
        return TrainSummary(**read_json(config.out / SUMMARY, "training")), None
    return None, last_checkpoint(config.out) if resumed else None


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def build_trainer(
    model: Any, vlm: VLM, rows: Rows, recipe: Recipe, config: TrainConfig, arguments: TrainingArguments | None = None
) -> SelectiveTrainer:
    """The trainer that runs `recipe`. Raises ConfigError if the model cannot be shared as `config` says."""
    pad_id = vlm.tokenizer.pad_token_id
    arguments = arguments or training_arguments(recipe, config)
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    if config.parallel != "ddp":
        shard_by_layer(model)
    refresh = None
    if config.refresh_every is not None and isinstance(rows, RefreshedRows):
        refresh = Refresh(config=config, vlm=vlm, rows=rows, every=config.refresh_every)
    trainer = SelectiveTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        recipe=recipe,
        tokens=Tokens(image=vlm.image_token_id, pad=0 if pad_id is None else pad_id),
        refresh=refresh,
        callbacks=[JsonlLog(config.out / "log.jsonl")],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    if config.parallel != "ddp" and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(f"--parallel {config.parallel} needs GPUs: Accelerate shards models on nothing else")
    return trainer


def _scored_identity(config: TrainConfig) -> dict[str, Any]:
    """What the selection says about the scores it was made from; nothing without a selection."""
    if config.selection is None:
        return {}
    identity: dict[str, Any] = read_json(config.selection / "selection.json", "selection")["identity"]
    return identity


def _identity(config: TrainConfig, recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """Everything that the trained model depends on."""
    selection = None if config.selection is None else file_hash(config.selection / "selection.parquet")
    refreshed = {}
    if config.refresh_every is not None and config.selection is not None:
        refreshed = {"refresh_every": config.refresh_every, "candidates": file_hash(config.selection / CANDIDATES)}
    return {
        "model": model_name(config.model),
        "model_fingerprint": model_fingerprint(config.model),
        "data_fingerprint": data_fingerprint,
        "selection": selection,
        "recipe": decisive(recipe),
        "seed": config.seed,
        "parallel": config.parallel,
        **({"projector": file_hash(config.projector)} if config.projector else {}),
        **refreshed,
        **reading(config.columns, config.format),
    }
