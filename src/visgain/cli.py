"""The command line: one thin function a verb. Imports neither torch nor transformers until a verb needs them.

Results go to stdout, progress and errors to stderr. Exit code 0: done, 1: failed, 2: wrong usage.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, Token, convert

import visgain
from visgain.config import (
    AblateConfig,
    AnalyzeConfig,
    AssembleConfig,
    CheckConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    ReportConfig,
    ScoreConfig,
    SelectConfig,
    ShowConfig,
    TrainConfig,
    WorldConfig,
)
from visgain.errors import ConfigError, VisgainError
from visgain.registry import suggest


def _converted(kind: Any, tokens: Sequence[Token]) -> Any:
    """What cyclopts makes of an option, except that it would round 2.5 to a whole number without a word."""
    value = convert(kind, tokens)
    for token in tokens:
        if isinstance(value, int) and "." in token.value and float(token.value) != value:
            raise ValueError(f'"{token.value}" is not a whole number.')
    return value


app = App(
    name="visgain",
    help="Measure how much each answer token of a vision-language dataset needs the image, and train on those that do.",
    version=visgain.__version__,
    help_flags=["--help", "-h"],
    result_action="return_value",
    default_parameter=Parameter(converter=_converted),
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False  # main() says how to go on
FLAT = Parameter(name="*", negative_iterable=())


@app.command
def demo(config: Annotated[DemoConfig | None, FLAT] = None) -> None:
    """Run the whole idea on the embedded world and model: minutes on a laptop, ends with a report."""
    _quiet()
    from visgain.ablation.demo import run_demo

    run_demo(config or DemoConfig())


@app.command
def check(config: Annotated[CheckConfig, FLAT]) -> None:
    """Say in seconds what `score` would do with the same options, and what to mend first."""
    _quiet()
    from visgain.check.run import run_check
    from visgain.check.view import print_checked
    from visgain.storage import write_json

    checked = run_check(config)
    if config.json == "-":
        print(json.dumps(checked.as_json(), indent=2, ensure_ascii=False))
    else:
        print_checked(checked)
        if config.json:
            write_json(Path(config.json), checked.as_json())
    if checked.has_errors:
        sys.exit(1)


@app.command
def score(config: Annotated[ScoreConfig, FLAT]) -> None:
    """Measure every answer token with the real and with a counterfactual image."""
    _quiet()
    from visgain.scoring.draft import read_draft
    from visgain.scoring.run import run_score

    done = run_score(config)
    print(
        f"{done.rows:,} rows: {done.multimodal:,} scored, {done.text_only:,} text-only, {done.skipped:,} skipped; "
        f"{done.answer_tokens:,} answer tokens; mean gain {done.mean_gain:.4f} nats"
    )
    if done.skipped:
        print(f"reasons for skipping: {config.out / 'skipped.jsonl'}")
    if (roughness := read_draft(config.out)) is not None:
        print(roughness)
    print(f"scores: {config.out}")


@app.command
def select(config: Annotated[SelectConfig, FLAT]) -> None:
    """Choose the samples and tokens to train on, from scores."""
    from visgain.selection import run_select, selection_report

    print(selection_report(run_select(config)))
    print(f"selection: {config.out}")


@app.command
def assemble(config: Annotated[AssembleConfig, FLAT]) -> None:
    """Join a vision tower and a language model to a LLaVA, whose projector is to be trained."""
    _quiet()
    from visgain.training.assemble import run_assemble

    done = run_assemble(config)
    parts = ", ".join(f"{name} {count:,}" for name, count in done.parameters.items())
    print(f"{parts} parameters in {done.dtype}; {done.image_tokens} tokens for a picture of {done.image_size} pixels")
    print(f"chat template: {done.template}")
    print(f"model: {config.out}")


@app.command
def train(config: Annotated[TrainConfig, FLAT]) -> None:
    """Train a model on the selected samples and tokens."""
    _quiet()
    from visgain.scoring.claims import Rank
    from visgain.training.run import run_train

    done = run_train(config)
    if Rank.here().number > 0:
        return  # what all did, the first tells
    print(
        f"{done.steps:,} steps over {done.rows:,} rows in {done.seconds:.0f} s; "
        f"{done.active_tokens:,} active tokens; loss {done.mean_loss:.4f} nats"
    )
    if done.refreshed_rows:
        print(f"{done.refreshed_rows:,} rows were scored while training, in {done.refresh_seconds:.0f} s of these")
    print(f"model: {config.out}")


@app.command
def export(config: Annotated[ExportConfig, FLAT]) -> None:
    """Write a selection as files for another trainer."""
    from visgain.export.run import run_export

    done = run_export(config)
    print(f"{done.rows:,} rows, {done.active_tokens:,} of {done.tokens:,} answer tokens active")
    for note in done.notes:
        print(note)
    print(f"export: {config.out}")


@app.command(name="eval")
def evaluate(config: Annotated[EvalConfig, FLAT]) -> None:
    """Ask a model the questions of benchmarks and score its answers by their protocols."""
    _quiet()
    from visgain.evaluation.run import run_eval
    from visgain.evaluation.table import table

    print(table(run_eval(config)))
    print(f"results: {config.out}")


@app.command
def ablate(config: Annotated[AblateConfig, FLAT]) -> None:
    """Compare what is trained on: arms (vanilla, random, vig@70 ...) over seeds, as a table with intervals."""
    _quiet()
    from visgain.ablation.run import run_ablation
    from visgain.ablation.table import print_ablation

    done = run_ablation(config)
    print_ablation(done)
    print(f"every number: {config.out / 'ablation.json'}; table.md and figure.svg beside it")
    if done.failures:
        sys.exit(1)


@app.command
def analyze(config: Annotated[AnalyzeConfig, FLAT]) -> None:
    """Look into scores, into a model's attention, or into what a benchmark needs of its pictures."""
    from dataclasses import replace

    from visgain.tables import as_text

    if config.scores is None:
        _quiet()
    if config.benchmarks:
        from visgain.evaluation.need import score_benchmarks

        config = replace(config, scores=score_benchmarks(config), model=None, data=None, benchmarks="")
    if config.scores is not None:
        from visgain.analysis.run import analyze_scores

        tables = analyze_scores(config)
    else:
        from visgain.evaluation.attention import analyze_attention

        tables = [analyze_attention(config)]
    print("\n\n".join(map(as_text, tables)))
    print(f"tables and figures: {config.out}")


@app.command
def report(config: Annotated[ReportConfig, FLAT]) -> None:
    """Write one self-contained HTML file about scores and selection."""
    from visgain.report.html import write_report

    print(f"report: {write_report(config)}")


@app.command
def show(row: int, /, config: Annotated[ShowConfig, FLAT]) -> None:
    """Show one sample in the terminal, its answers coloured by gain.

    Parameters
    ----------
    row
        Position of the sample in the dataset, from 0.

    """
    from visgain.report.terminal import show as show_row

    show_row(row, config)


@app.command
def world(config: Annotated[WorldConfig, FLAT]) -> None:
    """Draw pictures and conversations of the embedded world, with ground truth."""
    from visgain.world.dataset import write_world

    print(f"dataset: {write_world(config)}")


@app.command(name="list")
def list_names() -> None:
    """List what options take by name: arms, benchmarks, counterfactuals, formats, decodings, recipes, weightings."""
    from visgain.ablation.arms import KINDS
    from visgain.counterfactuals import COUNTERFACTUALS
    from visgain.data import FORMATS
    from visgain.data.records import LAYOUTS
    from visgain.evaluation.benchmark import BENCHMARKS
    from visgain.evaluation.decoders import DECODERS
    from visgain.evaluation.export import EXPORTS
    from visgain.export import EXPORTERS
    from visgain.training.recipe import recipe_names
    from visgain.vlm.profiles import template_names
    from visgain.weights import WEIGHTINGS

    for kind, names in (
        ("arms", KINDS),
        ("benchmarks", BENCHMARKS.names()),
        ("counterfactuals", COUNTERFACTUALS.names()),
        ("data formats", FORMATS.names()),
        ("data layouts", LAYOUTS.names()),
        ("decodings", DECODERS.names()),
        ("exporters", EXPORTERS.names()),
        ("exports of answers", EXPORTS.names()),
        ("recipes", recipe_names()),
        ("templates", template_names()),
        ("weightings", WEIGHTINGS.names()),
    ):
        print(f"{kind}: {', '.join(names)}")


@app.command
def env() -> None:
    """Print versions and devices, for a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"visgain {visgain.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}")  # with what it was built for
    for package in ("transformers", "accelerate", "peft", "tokenizers", "pyarrow", "numpy", "pillow"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(names) or 'cpu'}; {os.cpu_count()} logical cores, {torch.get_num_threads()} threads")


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="YAML file with the options of the verb; flags win.")] = None,
) -> Any:
    """Take `--config FILE` off the line, then run the verb."""
    if config is not None:
        app.config = (_yaml_options(config, tokens),)
    try:
        return app(tokens, exit_on_error=True)
    finally:
        app.config = ()


def _yaml_options(path: Path, tokens: tuple[str, ...]) -> Any:
    """The options in a YAML file, as a cyclopts source below the flags. Raises ConfigError for unknown keys."""
    import yaml
    from cyclopts.config import Dict

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: options are a mapping of names to values")
    verb = next((token for token in tokens if not token.startswith("-")), "")
    known = _option_names(verb)
    for key in values:
        if known and str(key).replace("-", "_") not in known:
            raise ConfigError(f"{path}: unknown key {key!r} for `visgain {verb}`; {suggest(str(key), known)}")
    flat = {str(key).replace("_", "-"): value for key, value in values.items() if value is not None}
    return Dict({verb: flat}, source=str(path))


def _option_names(verb: str) -> list[str]:
    from dataclasses import fields

    configs: dict[str, Any] = {
        "demo": DemoConfig,
        "assemble": AssembleConfig,
        "check": CheckConfig,
        "score": ScoreConfig,
        "select": SelectConfig,
        "train": TrainConfig,
        "export": ExportConfig,
        "eval": EvalConfig,
        "ablate": AblateConfig,
        "analyze": AnalyzeConfig,
        "report": ReportConfig,
        "show": ShowConfig,
        "world": WorldConfig,
    }
    return [field.name for field in fields(configs[verb])] if verb in configs else []


def _quiet() -> None:
    """Leave stderr to our own progress: transformers' loading bars and advice are not results."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `visgain` command; without `arguments` it takes the process's own."""
    try:
        app.meta(arguments)
    except VisgainError as error:
        print(f"visgain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: what follows is the end
        print("visgain: interrupted; the same command resumes", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output (head, less) is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
