"""`visgain ablate`: every arm at every seed, a cell each, in folders that resume.

out/run.json                what all cells depend on
out/seed-0/vig@70/cell.json one cell's numbers, written last; beside it selection/, and model/ while it is needed
out/seed-0/vig@70/error.txt why a cell failed, until it succeeds
out/ablation.json           the numbers of every finished cell, and what follows from them; table.md, figure.svg

A cell depends on its seed and its arm alone, so more arms and seeds can join later, and any number of processes can
work on one folder: each cell is claimed by a lock that the operating system drops when its holder dies. The result is
that of all finished cells in the folder, whichever command they are of.
"""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import visgain
from visgain.ablation.arms import DEFAULT, KINDS, Arm, parse_arms
from visgain.ablation.bench import Bench, bench_identity, bench_metrics, open_bench, recipe_name, recipe_of
from visgain.ablation.figure import draw, panels
from visgain.ablation.result import Ablation, summarise
from visgain.ablation.statistics import CONFIDENCE
from visgain.ablation.table import FORMULA, as_markdown, grids, notes
from visgain.ablation.trial import Stages, run_arm
from visgain.config import AblateConfig
from visgain.counterfactuals import parse_condition
from visgain.errors import ConfigError, VisgainError
from visgain.evaluation.benchmark import BENCHMARKS, JudgedBenchmark
from visgain.scoring.claims import Rank, claim_named
from visgain.storage import claim_run, read_json, storage_errors, write_json, write_text
from visgain.training.recipe import decisive
from visgain.training.run import SUMMARY
from visgain.vlm.load import model_fingerprint, model_name
from visgain.vlm.profiles import find_profile

CELL, ERROR = "cell.json", "error.txt"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm at one seed."""

    out: Path  # of the whole study
    seed: int
    arm: Arm

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.arm.name}"

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}" / self.arm.name

    @property
    def is_done(self) -> bool:
        return (self.folder / CELL).is_file()


def run_ablation(config: AblateConfig) -> Ablation:
    """Work as one of any number of processes until every cell is done or failed; write and return the result.

    A cell that fails is told on stderr and in `failures`, and the others go on. Raises VisgainError for a mistake that
    concerns all cells, before any is begun.
    """
    arms = parse_arms(config.arms or DEFAULT)
    _check(config, arms)
    identity = _identity(config)
    bench = cache(lambda seed: open_bench(config, seed))
    bench(config.seed_list[0]).check()  # before --out belongs to a study that cannot be
    claim_run(config.out, identity, {"visgain": visgain.__version__})
    cells = [Cell(out=config.out, seed=seed, arm=arm) for seed in config.seed_list for arm in arms]
    failures: dict[str, str] = {}
    pace = _Pace(total=len(cells), done=sum(cell.is_done for cell in cells))
    while todo := [cell for cell in cells if not cell.is_done and cell.name not in failures]:
        worked = False
        for cell in todo:
            worked |= _work(cell, config, bench(cell.seed), failures, pace)
            write_ablation(config.out, _result(config, cells, failures, identity))
        if not worked:
            time.sleep(1)  # other processes have what is left; if one dies, its cell is free
    for cell in cells:
        _clear(cell, config)
    result = _result(config, cells, failures, identity)
    write_ablation(config.out, result)
    return result


def _work(cell: Cell, config: AblateConfig, bench: Bench, failures: dict[str, str], pace: _Pace) -> bool:
    """Do the cell if nobody else has it or did it. Returns whether it was ours to do."""
    lock = claim_named(cell.out, f"seed-{cell.seed}-{cell.arm.name}")
    if lock is None:
        return False
    try:
        if cell.is_done:
            return False
        print(pace.line(cell.name), file=sys.stderr)
        start = time.perf_counter()
        write_json(cell.folder / CELL, run_cell(cell, config, bench))
        (cell.folder / ERROR).unlink(missing_ok=True)
        _clear(cell, config)
        pace.took(time.perf_counter() - start, trained=cell.arm.is_trained)
    except Exception as error:  # whatever it was, the other cells do not depend on it
        failures[cell.name] = str(error) if isinstance(error, VisgainError) else f"{type(error).__name__}: {error}"
        write_text(cell.folder / ERROR, traceback.format_exc())
        print(f"visgain: {cell.name} failed, the others go on: {failures[cell.name]}", file=sys.stderr)
    finally:
        lock.release()
    return True


def run_cell(cell: Cell, config: AblateConfig, bench: Bench) -> dict[str, Any]:
    """What cell.json holds: the arm, run_arm's numbers, those of selection and training, and wall times by stage."""
    seconds: dict[str, float] = {}
    stages = Stages(
        scores=bench.scores,
        train=lambda: bench.train(cell.folder),
        evaluate=lambda model: bench.evaluate(model, cell.folder, cell.arm.name),
        model=config.model,
        seed=cell.seed,
    )
    numbers = run_arm(cell.arm, stages, seconds)
    return {
        **numbers,
        "seed": cell.seed,
        "arm": asdict(cell.arm) | {"train": dict(cell.arm.train)},
        "selection": _selected(cell.folder / "selection") if cell.arm.is_trained else None,
        "training": read_json(cell.folder / "model" / SUMMARY, "training") if cell.arm.is_trained else None,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }


def _selected(folder: Path) -> dict[str, Any]:
    """Of selection.json: thresholds, and how many rows and tokens were kept."""
    record = read_json(folder / "selection.json", "selection")
    return {"tau": record["tau"], "token_tau": record["token_tau"], **record["totals"]}


def _clear(cell: Cell, config: AblateConfig) -> None:
    """Delete the trained model of a cell that is done, unless it is to be kept."""
    if cell.is_done and not config.keep_models:
        with storage_errors(cell.folder):
            shutil.rmtree(cell.folder / "model", ignore_errors=True)


# ---------------------------------------------------------------- before the first cell


def _check(config: AblateConfig, arms: Sequence[Arm]) -> None:
    """Names and combinations that would otherwise fail after hours. Raises ConfigError."""
    if Rank.here().world > 1:
        raise ConfigError(
            "ablate trains every arm in one process; start it without torchrun, several times with the same --out "
            "where there is room for several"
        )
    for counterfactual in {arm.counterfactual or config.counterfactual for arm in arms}:
        parse_condition(counterfactual)
    recipe = recipe_of(config)
    find_profile(recipe.template)
    if config.equal == "epochs" and recipe.max_steps:
        raise ConfigError(
            f"recipe {recipe_name(config)} sets max_steps, so epochs would not be equal; use --equal steps"
        )
    names = [name for part in config.benchmarks.split(",") if (name := part.strip())]
    for name in names:
        if isinstance(BENCHMARKS.get(name)(), JudgedBenchmark):
            raise ConfigError(f"{name} is graded by a judge; keep the models (--keep-models) and use `visgain eval`")


def _identity(config: AblateConfig) -> dict[str, Any]:
    """What every cell depends on; arms and seeds are the cells' own."""
    return {
        "ablation": {
            "model": model_name(config.model),
            "model_fingerprint": model_fingerprint(config.model),
            "recipe": decisive(recipe_of(config)),
            "equal": config.equal,
            "steps": config.steps,
            "counterfactual": parse_condition(config.counterfactual).spec,
            "benchmarks": config.benchmarks,
            **bench_identity(config),
        }
    }


# ---------------------------------------------------------------- the result


def _result(
    config: AblateConfig, cells: Sequence[Cell], failures: dict[str, str], identity: dict[str, Any]
) -> Ablation:
    """Of every finished cell in the folder. Arms come as the command names them, then those that it does not name."""
    done = [read_json(path, "cell") for path in config.out.glob(f"seed-*/*/{CELL}")]
    arms = list(dict.fromkeys([*(cell.arm.name for cell in cells), *(cell["name"] for cell in _in_order(done))]))
    return summarise(
        sorted(done, key=lambda cell: (cell["seed"], arms.index(cell["name"]))),
        arms=arms,
        seeds=sorted({*config.seed_list, *(cell["seed"] for cell in done)}),
        metrics=bench_metrics(config),
        study={**identity["ablation"], "recipe": recipe_name(config)},
        failures=failures,
    )


def _in_order(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the usual grid has its arms: by kind and by what they keep."""
    kinds = [*KINDS, *(cell["arm"]["kind"] for cell in cells)]
    return sorted(cells, key=lambda cell: (kinds.index(cell["arm"]["kind"]), cell["arm"]["keep"]))


def write_ablation(out: Path, ablation: Ablation) -> None:
    """ablation.json, table.md and figure.svg in `out`."""
    tables = [asdict(grid) for grid in grids(ablation)]
    said = {"confidence": CONFIDENCE, "tables": tables, "notes": [*notes(ablation), FORMULA]}
    write_json(out / "ablation.json", {**asdict(ablation), **said})
    write_text(out / "table.md", as_markdown(ablation))
    write_text(out / "figure.svg", draw(panels(ablation)))


@dataclass(kw_only=True)
class _Pace:
    """How far the study is and how long the rest takes, by the mean of the cells trained here."""

    total: int
    done: int
    seconds: list[float] = field(default_factory=list)

    def took(self, seconds: float, *, trained: bool) -> None:
        self.done += 1
        self.seconds += [seconds] if trained else []

    def line(self, name: str) -> str:
        left = self.total - self.done
        text = f"visgain: cell {self.done + 1} of {self.total}: {name}"
        if not self.seconds:
            return text
        minutes = left * sum(self.seconds) / len(self.seconds) / 60
        return f"{text}; about {minutes:.0f} min left"
