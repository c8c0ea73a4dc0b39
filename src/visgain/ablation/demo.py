"""`visgain demo`: the whole idea on the embedded world, in minutes, on a laptop's processor.

Draw the world, score the training split with the aligned model, select, train three arms from that same model for the
same number of steps, evaluate them where the priors are broken, and show it. Everything lies in one folder, and every
stage resumes there.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from visgain.ablation.arms import Arm, parse_arm
from visgain.ablation.metrics import WORLD as METRICS
from visgain.ablation.on_world import World
from visgain.ablation.trial import Stages, run_arm, timed
from visgain.analysis.truth import auroc, read_truth, token_truth
from visgain.config import DemoConfig, ReportConfig, ScoreConfig, TrainConfig
from visgain.report.html import write_report
from visgain.scoring.run import run_score
from visgain.storage import claim_run, read_scores, write_json

MODEL, RECIPE = "embedded", "embedded-tune"

ARMS = (parse_arm("vanilla"), replace(parse_arm("random@70"), name="random"), replace(parse_arm("vig@70"), name="VIG"))


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo into `config.out`, print its table, and return what demo.json holds."""
    out = config.out
    claim_run(out, {"demo": asdict(config) | {"out": None}}, {})
    seconds: dict[str, float] = {}
    world = World(folder=out / "world", seed=config.seed, rows=config.rows, test_rows=config.test_rows)
    with timed(seconds, "draw"):
        world.draw()
    with timed(seconds, "score"):
        run_score(ScoreConfig(model=MODEL, data=world.train, out=out / "scores", seed=config.seed))
    area = token_auroc(out / "scores", out / "world/train/truth.jsonl")
    results = [_run_arm(arm, config, world, seconds) for arm in (parse_arm("aligned"), *ARMS)]
    demo = {
        "seed": config.seed,
        "rows": config.rows,
        "test_rows": config.test_rows,
        "steps": config.steps,
        "keep_percent": ARMS[-1].keep,
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


def _run_arm(arm: Arm, config: DemoConfig, world: World, seconds: dict[str, float]) -> dict[str, Any]:
    out = config.out
    stages = Stages(
        scores=lambda _: out / "scores",
        train=lambda: TrainConfig(
            model=MODEL,
            data=world.train,
            out=out / f"model-{arm.name}",
            selection=out / f"selection-{arm.name}",
            recipe=RECIPE,
            max_steps=config.steps,
            seed=config.seed,
        ),
        evaluate=lambda model: world.evaluate(model, arm.name),
        model=MODEL,
        seed=config.seed,
    )
    return run_arm(arm, stages, seconds)


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
