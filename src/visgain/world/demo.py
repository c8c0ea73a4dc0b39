"""`visgain demo`: the whole idea on the embedded world, in minutes, on a laptop's processor.

Draw the world, score the training split with the aligned model, select, train three arms from that same model for the
same number of steps, evaluate them where the priors are broken, and show it. Everything lies in one folder, and every
stage resumes there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from visgain.analysis.truth import auroc, read_truth, token_truth
from visgain.config import DemoConfig, ReportConfig, ScoreConfig, SelectConfig, TrainConfig, WorldConfig
from visgain.report.html import write_report
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import claim_run, read_scores, write_json
from visgain.training.run import run_train
from visgain.world.dataset import write_world
from visgain.world.evaluate import WorldMetrics, evaluate_world

KEEP = 70.0
RECIPE = "embedded-tune"

METRICS: list[dict[str, str]] = [
    {"key": "accuracy", "label": "accuracy", "better": "higher", "format": "percent"},
    {"key": "existence_accuracy", "label": "existence", "better": "higher", "format": "percent"},
    {"key": "yes_rate", "label": "says yes", "better": "", "format": "percent"},
    {"key": "hallucinated_objects", "label": "invented", "better": "lower", "format": "percent"},
    {"key": "captions_with_hallucination", "label": "captions", "better": "lower", "format": "percent"},
]
"""What the table shows of WorldMetrics. A yes-rate is good when it is near the true one, which is printed beside it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of choosing what to train on; `by` is a rule of `visgain select`, None trains on everything."""

    name: str
    by: str | None


ARMS = (Arm(name="vanilla", by=None), Arm(name="random", by="random"), Arm(name="VIG", by="sample+token"))


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo into `config.out`, print its table, and return what demo.json holds."""
    out = config.out
    claim_run(out, {"demo": asdict(config) | {"out": None}}, {})
    seconds: dict[str, float] = {}
    with _timed(seconds, "draw"):
        train = write_world(WorldConfig(out=out / "world/train", split="train", rows=config.rows, seed=config.seed))
        write_world(WorldConfig(out=out / "world/test", split="test", rows=config.test_rows, seed=config.seed))
    with _timed(seconds, "score"):
        run_score(ScoreConfig(model="embedded", data=train, out=out / "scores", seed=config.seed))
    area = token_auroc(out / "scores", out / "world/train/truth.jsonl")
    results = [_aligned(out, seconds)]
    results += [_run_arm(arm, config, train, seconds) for arm in ARMS]
    demo = {
        "seed": config.seed,
        "rows": config.rows,
        "test_rows": config.test_rows,
        "steps": config.steps,
        "keep_percent": KEEP,
        "auroc": area,
        "metrics": METRICS,
        "arms": results,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }
    write_json(out / "demo.json", demo)
    report = write_report(
        ReportConfig(
            scores=out / "scores", selection=out / "selection-VIG", results=out / "demo.json", out=out / "report.html"
        )
    )
    _print(demo, report)
    return demo


def token_auroc(scores: Path, truth: Path) -> float:
    """AUROC of token gain as a detector of the tokens that need the picture."""
    gain, is_visual = token_truth(read_scores(scores), read_truth(truth))
    return auroc(gain, is_visual)


def _aligned(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    with _timed(seconds, "evaluate"):
        metrics = evaluate_world("embedded", out / "world/test", description="evaluating aligned")
    return _row("aligned", metrics, rows=0, active_tokens=0, steps=0, train_seconds=0.0)


def _run_arm(arm: Arm, config: DemoConfig, train: Path, seconds: dict[str, float]) -> dict[str, Any]:
    out = config.out
    selection, model = out / f"selection-{arm.name}", out / f"model-{arm.name}"
    # The vanilla arm goes through a selection that keeps everything, so that all arms see the same readable rows.
    by, keep = ("sample", 100.0) if arm.by is None else (arm.by, KEEP)
    with _timed(seconds, "select"):
        run_select(SelectConfig(scores=out / "scores", out=selection, by=by, keep=keep, seed=config.seed))
    print(f"training {arm.name}", file=sys.stderr)
    with _timed(seconds, "train"):
        trained = run_train(
            TrainConfig(
                model="embedded",
                data=train,
                out=model,
                selection=selection,
                recipe=RECIPE,
                max_steps=config.steps,
                seed=config.seed,
            )
        )
    with _timed(seconds, "evaluate"):
        metrics = evaluate_world(str(model), out / "world/test", description=f"evaluating {arm.name}")
    return _row(
        arm.name,
        metrics,
        rows=trained.rows,
        active_tokens=trained.active_tokens,
        steps=trained.steps,
        train_seconds=trained.seconds,
    )


def _row(name: str, metrics: WorldMetrics, **counts: float) -> dict[str, Any]:
    return {"name": name, "metrics": asdict(metrics), **counts}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _print(demo: dict[str, Any], report: Path) -> None:
    table = Table(
        title=f"Tested where the priors are broken (seed {demo['seed']})",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 0),
        collapse_padding=True,
    )
    table.add_column("trained on", no_wrap=True)
    for heading in ("rows", "tokens", *(metric["label"] for metric in METRICS)):
        table.add_column(heading, justify="right")
    for arm in demo["arms"]:
        values = [f"{100 * arm['metrics'][metric['key']]:.1f}%" for metric in METRICS]
        table.add_row(arm["name"], f"{arm['rows']:,}", f"{arm['active_tokens']:,}", *values)
    console = Console()
    console.print(table)
    true_rate = demo["arms"][0]["metrics"]["true_yes_rate"]
    console.print(
        f"existence: right answers to existence questions; says yes: replies of yes, {100 * true_rate:.1f}% would be "
        "right;\ninvented: named objects that are not there; captions: those that invent one or more.",
        highlight=False,
    )
    console.print(
        f"AUROC of token gain as a detector of tokens that need the picture: {demo['auroc']:.3f}", highlight=False
    )
    total = sum(demo["seconds"].values())
    console.print(f"{total:.0f} s in all. Report: {report}", highlight=False)
