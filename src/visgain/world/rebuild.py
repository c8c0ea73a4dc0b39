"""Rebuild the embedded model from nothing: `make embedded-model`, or `python -m visgain.world.rebuild --out FOLDER`.

A curriculum of eleven runs of the project's own `train`: one object to a picture, full scenes, notes, questions about
one thing, everything, how objects stand to each other (all pairs, far ones, all again), everything twice more, and once
with more counting.
Rerunning resumes. The trained model is FOLDER/model; how good it is lands in FOLDER/quality.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import cyclopts

from visgain.config import SplitName, TrainConfig, WorldConfig
from visgain.storage import write_json
from visgain.training.run import run_train
from visgain.training.save import save_model
from visgain.vlm.load import load_vlm
from visgain.world.dataset import write_world
from visgain.world.evaluate import evaluate_world
from visgain.world.model import build_blank


@dataclass(frozen=True, kw_only=True)
class Stage:
    split: SplitName
    rows: int
    recipe: str
    number: int = 1  # which stage with this split it is: each draws pictures of its own

    @property
    def name(self) -> str:
        return self.split if self.number == 1 else f"{self.split}-{self.number}"


STAGES = (
    Stage(split="easy", rows=40_000, recipe="embedded-easy"),
    Stage(split="align", rows=80_000, recipe="embedded-align"),
    Stage(split="notes", rows=25_600, recipe="embedded-notes"),
    Stage(split="ask", rows=25_600, recipe="embedded-ask"),
    Stage(split="questions", rows=57_600, recipe="embedded-questions"),
    Stage(split="relate", rows=25_600, recipe="embedded-relate"),
    Stage(split="far", rows=25_600, recipe="embedded-relate"),
    Stage(split="relate", rows=25_600, recipe="embedded-relate", number=2),
    Stage(split="everything", rows=76_800, recipe="embedded-questions"),
    Stage(split="everything", rows=76_800, recipe="embedded-questions", number=2),
    Stage(split="count", rows=38_400, recipe="embedded-questions"),
)


def rebuild(out: Path, *, seed: int = 0, stages: Sequence[Stage] = STAGES, test_rows: int = 1000) -> Path:
    """Run the stages into `out`; returns the folder of the trained model."""
    model = out / "blank"
    if not (model / "processor_config.json").is_file():
        build_blank(model, seed)
    for stage in stages:
        data = out / f"world-{stage.name}" / "data.json"
        if not data.is_file():
            write_world(WorldConfig(out=data.parent, split=stage.split, rows=stage.rows, seed=seed + stage.number - 1))
        trained = out / stage.name
        run_train(
            TrainConfig(model=str(model), data=data, out=trained, recipe=stage.recipe, dtype="bfloat16", seed=seed)
        )
        model = trained
    # Trained in 16 bits, used in 32: whoever scores with it compares sums to the last digits.
    vlm = load_vlm(str(model), dtype="float32", device="cpu")
    model = out / "model"
    save_model(vlm.model, vlm, model, "float32")
    quality = {}
    for name, bias in (("independent", 0.0), ("priors hold", 1.0), ("priors broken", -1.0)):
        world = out / f"world-test-{bias:g}"
        write_world(WorldConfig(out=world, split="test", rows=test_rows, bias=bias, seed=seed + 1))
        quality[name] = asdict(evaluate_world(str(model), world))
    write_json(out / "quality.json", quality)
    return model


def main(*, out: Annotated[Path, cyclopts.Parameter(help="Folder to work in.")], seed: int = 0) -> None:
    """Rebuild the embedded model."""
    print(f"model: {rebuild(out, seed=seed)}")


if __name__ == "__main__":
    cyclopts.run(main)
