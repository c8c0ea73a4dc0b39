"""The command line as a user meets it: flags, exit codes, what goes to which stream, and how fast it answers."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest

import tiny_run
import visgain
from visgain import config as configs
from visgain.cli import app, main
from visgain.errors import ConfigError, StorageError, VisgainError
from visgain.training.run import TrainSummary

SURFACE = {
    "demo": "--out --rows --seed --steps --test-rows",
    "score": (
        "--backend --batch-tokens --columns --counterfactual --data --device --dtype --end-of-turn --follow-links "
        "--format --image-root --limit --max-length --max-pixels --model --no-follow-links --no-per-image "
        "--no-trust-remote-code --out --part-rows --per-image --projector --seed --template --trust-remote-code "
        "--way --workers"
    ),
    "select": "--by --end-of-turn --keep --keep-tokens --out --scores --seed --skipped --table --weights",
    "assemble": (
        "--dtype --image-size --language --out --pictures --seed --template --vision --vision-feature-layer "
        "--vision-feature-select"
    ),
    "train": (
        "--batch-size --columns --data --device --dtype --epochs --follow-links --format --gradient-checkpointing "
        "--image-root --learning-rate --lora-rank --loss-reduction --max-length --max-pixels --max-steps "
        "--micro-batch --model --no-follow-links --no-gradient-checkpointing --no-trust-remote-code --out "
        "--pack-tokens --packing --parallel --parts --projector --recipe --refresh-every --report-to --save-steps "
        "--seed --selection --template --trust-remote-code"
    ),
    "export": (
        "--columns --data --follow-links --format --image-root --max-pixels --no-follow-links --out --scores "
        "--selection --to"
    ),
    "eval": (
        "--answers --batch-size --benchmarks --data --decoding --device --dtype --export --force --image-root --judge "
        "--judge-concurrency --judge-per-minute --judge-price --judge-prompt --judge-runs --limit --max-length "
        "--max-new-tokens --model --no-force --no-trust-remote-code --out --seed --stages --template "
        "--trust-remote-code --variant"
    ),
    "ablate": (
        "--arms --benchmark-data --benchmarks --columns --counterfactual --data --device --dtype --equal --eval-data "
        "--format --image-root --keep-models --max-length --model --no-keep-models --no-trust-remote-code --out "
        "--recipe --rows --seeds --steps --template --test-rows --trust-remote-code"
    ),
    "analyze": (
        "--benchmarks --counterfactual --data --device --dtype --image-root --max-length --model "
        "--no-trust-remote-code --out --part-of-speech --rows --scores --template --trust-remote-code"
    ),
    "report": (
        "--ablation --analyses --data --evals --image-root --out --results --samples --scores --selection --truth"
    ),
    "show": "--data --scores ROW",
    "world": "--bias --out --rows --seed --split",
    "list": "",
    "env": "",
}
SURFACE["check"] = " ".join(sorted([*SURFACE["score"].split(), "--json", "--sample", "--show"]))  # the same command
"""Every verb and every flag. People's scripts depend on them: a flag may be added here, and not renamed or removed."""

REQUIRED = {
    "check": "--data --model",
    "score": "--data --model --out",
    "select": "--out --scores",
    "assemble": "--language --out --vision",
    "train": "--data --model --out",
    "export": "--data --out --selection --to",
    "eval": "--benchmarks --data --out",
    "ablate": "--out",
    "analyze": "--out",
    "report": "--scores",
    "show": "--scores ROW",
    "world": "--out",
}

HEAVY = ("torch", "transformers", "matplotlib", "accelerate", "pyarrow", "numpy", "PIL")


def visgain_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "visgain", *arguments], capture_output=True, text=True, timeout=120)


class Outcome:
    """What `main` did: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`main` in this process, which is quicker than a process for each of many mistakes."""
    monkeypatch.setenv("COLUMNS", "200")  # no message or help text is wrapped

    def run(*arguments: object) -> Outcome:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def one_message(error: str) -> str:
    """The text of the only message on stderr, whether in a frame or not."""
    assert "Traceback" not in error
    lines = [line.strip("│ ") for line in error.splitlines() if not set(line) <= set("╭╮╰╯─ ErrorI")]
    return " ".join(lines)


# ---------------------------------------------------------------- the surface


def parameters(verb: str) -> list[Any]:
    collection = app[verb].assemble_argument_collection()
    return [argument for argument in collection if argument.names != ("*",)]


def test_the_surface_is_the_one_in_the_table() -> None:
    verbs = [name for name in app if not name.startswith("-")]
    real = {verb: sorted(name for argument in parameters(verb) for name in argument.names) for verb in verbs}
    assert real == {verb: sorted(names.split()) for verb, names in SURFACE.items()}


def test_exactly_these_flags_are_required() -> None:
    for verb in SURFACE:
        required = sorted(name for argument in parameters(verb) if argument.required for name in argument.names)
        assert required == sorted(REQUIRED.get(verb, "").split()), verb


def test_every_field_of_a_verbs_configuration_is_a_flag_of_the_verb() -> None:
    for verb, names in SURFACE.items():
        kind = getattr(configs, f"{verb.capitalize()}Config", None)
        own = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} if kind else set()
        assert own == {name for name in names.split() if not name.startswith("--no-")} - {"ROW"}


def field_docs() -> dict[str, dict[str, str]]:
    """Configuration -> flag -> the sentences below the field in the source."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(configs.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            inherited = (docs.get(base.id, {}) for base in node.bases if isinstance(base, ast.Name))
            docs[node.name] = dict(ChainMap(*inherited)) | {
                f"--{field.target.id.replace('_', '-')}": text.value.value
                for field, text in pairwise(node.body)
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
            }
    return docs


def test_the_help_of_every_verb_explains_every_flag_in_the_words_of_the_source(cli: Callable[..., Outcome]) -> None:
    docs = field_docs()
    for verb, names in SURFACE.items():
        outcome = cli(verb, "--help")
        assert (outcome.code, outcome.err) == (0, ""), verb
        assert outcome.out.startswith(f"Usage: visgain {verb}"), verb
        assert "--config" in outcome.out
        explained = docs.get(f"{verb.capitalize()}Config", {}) | {"ROW": "Position of the sample"}
        for name in names.split():
            if not name.startswith("--no-"):
                beginning = " ".join(explained[name].replace("`", "").split()[:3])
                assert re.search(rf"{name} .*{re.escape(beginning)}", outcome.out), (verb, name)


def test_without_a_verb_the_verbs_are_listed(cli: Callable[..., Outcome]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        outcome = cli(*arguments)
        assert outcome.code == 0
        assert all(f" {verb} " in outcome.out for verb in SURFACE)


def test_the_version_is_the_packages(cli: Callable[..., Outcome]) -> None:
    assert cli("--version").out.strip() == visgain.__version__


# ---------------------------------------------------------------- quick, because nothing heavy is imported


def test_no_help_imports_anything_heavy() -> None:
    code = f"""
import sys
from visgain.cli import main
for arguments in (["--help"], *([verb, "--help"] for verb in {list(SURFACE)})):
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code, arguments
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert visgain_process("--help").returncode == 0
        return time.perf_counter() - start

    # 0.2 s on an idle machine, where transformers alone would take 5; the best of three, since tests share machines.
    assert min(seconds() for _ in range(3)) < 2.5


# ---------------------------------------------------------------- results, progress, exit codes


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path) -> None:
    done = visgain_process("world", "--out", str(tmp_path / "w"), "--rows", "5")
    assert done.returncode == 0
    assert done.stdout == f"dataset: {tmp_path / 'w' / 'data.json'}\n"
    assert "drawing train" in done.stderr
    assert (tmp_path / "w" / "data.json").is_file()


def test_select_prints_its_table_and_nothing_else(tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path)
    tiny_run.write_scores(tmp_path / "scores", data)
    out = tmp_path / "selection"
    done = visgain_process("select", "--scores", str(tmp_path / "scores"), "--out", str(out), "--keep", "50")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["source", "rows", "kept", "%", "tokens", "active", "%"]
    assert lines[-1] == f"selection: {out}"
    assert (out / "selection.json").is_file()


def test_an_error_of_the_users_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = visgain_process("select", "--scores", str(tmp_path), "--out", str(tmp_path / "s"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"visgain: {tmp_path / 'run.json'} does not exist: {tmp_path} holds no scores\n"


def test_a_wrong_value_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = visgain_process("world", "--out", str(tmp_path / "w"), "--rows", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "visgain: --rows is 0; it must be positive\n"
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("selct", 'Unknown command "selct". Did you mean "select"?'),
        ("select --scores a --out b --kep 3", "Unknown option: --kep. Did you mean --keep?"),
        ("select --out b", "--scores requires an argument"),
        ("show --scores a", "ROW requires an argument"),
        ("show one --scores a", 'Invalid value for ROW: unable to convert "one" into int.'),
        ("world --out w --rows many", 'Invalid value for --rows: unable to convert "many" into int.'),
        ("world --out w --rows 2.5", 'Invalid value for --rows: "2.5" is not a whole number.'),
        ("world --out w --split tets", 'Invalid value "tets" for --split. Choose from: "train", "test"'),
        ("world --out w --bias -2", "--bias is -2.0; it must lie between -1 and 1"),
        ("world --out", "--out requires an argument"),
        ("world --out w --rows", "--rows requires an argument"),
        ("world --out w x", "Unused Tokens: ['x']"),
        ("select --scores a --out b --keep 0", "--keep is 0.0; it must be above 0 and at most 100 percent"),
        ("select --scores a --out b --keep nan", "--keep is nan; it must be above 0 and at most 100 percent"),
        ("select --scores a --out b --keep 101", "--keep is 101.0"),
        ("select --scores a --out b --by samples", "--by is 'samples'; it must be one of"),
        ("select --scores a --out b --by column:", "--by is 'column:'; it must be one of"),
        ("select --scores a --out b --by sample --keep-tokens 5", "--keep-tokens does not go with --by sample"),
        ("select --scores a --out b --table t.csv", "--table does not go with --by sample+token"),
        ("score --model m --data d --out o --max-length 7", "--max-length is 7; it must be at least 8 tokens"),
        ("score --model m --data d --out o --limit 0", "--limit is 0; it must be positive"),
        ("score --model m --data d --out o --counterfactual blurr", "did you mean 'blur'?"),
        ("train --model m --data d --out o --batch-size 0", "--batch-size is 0; it must be positive"),
        ("train --model m --data d --out o --parts vison", 'Invalid value "vison" for --parts'),
        ("train --model m --data d --out o --parts vision eyes", 'Invalid value "eyes" for --parts'),
        ("train --model m --data d --out o --epochs 0", "--epochs is 0.0; it must be a finite number above 0"),
        ("train --model m --data d --out o --epochs nan", "--epochs is nan; it must be a finite number above 0"),
        ("train --model m --data d --out o --epochs inf", "--epochs is inf; it must be a finite number above 0"),
        ("train --model m --data d --out o --learning-rate -1", "--learning-rate is -1.0; it must be a finite number"),
        ("train --model m --data d --out o --learning-rate nan", "--learning-rate is nan; it must be a finite number"),
        ("train --model m --data d --out o --seed -1", "--seed is -1; it must be from 0 to 4,294,967,295"),
        ("train --model m --data d --out o --seed 4294967296", "--seed is 4294967296; it must be from 0 to"),
        ("train --model m --data d --out o --device gpuu", "--device is 'gpuu'; training takes auto, cpu or cuda"),
        ("train --model m --data d --out o --device cuda:1", "choose among several by CUDA_VISIBLE_DEVICES"),
        ("train --model m --data d --out o --batch-size 6 --micro-batch 4", "--recipe tune: batch_size is 6, which is"),
        ("ablate --out o --seeds 0,4294967296", "one of --seeds is 4294967296; it must be from 0 to"),
        ("ablate --out o --device cuda:1", "--device is 'cuda:1'; training takes auto, cpu or cuda"),
        ("train --model m --data d --out o --recipe tone", "did you mean 'tune'?"),
        ("report --scores a --samples -1", "--samples is -1; it must not be negative"),
        ("demo --rows 7", "--rows is 7; it must be at least 8"),
        ("list --all", "Unknown option: --all"),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_exits_2(cli: Callable[..., Outcome], arguments: str, says: str) -> None:
    outcome = cli(*arguments.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert says in one_message(outcome.err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("score --model embedded --data {tmp}/no.json --out {tmp}/o", "no.json does not exist; check --data"),
        ("report --scores {tmp}", "holds no scores"),
        ("show 0 --scores {tmp}", "holds no scores"),
        ("world --rows 1 --out {tmp}/file", "cannot write {tmp}/file"),
    ],
)
def test_a_failure_says_what_failed_and_exits_1(
    cli: Callable[..., Outcome], tmp_path: Path, arguments: str, says: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    outcome = cli(*arguments.format(tmp=tmp_path).split())
    assert outcome.code == 1
    assert outcome.err.startswith("visgain: ")
    assert says.format(tmp=tmp_path) in one_message(outcome.err)


def test_a_row_that_is_not_there_is_an_error_of_the_users(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path)
    tiny_run.write_scores(tmp_path / "scores", data)
    outcome = cli("show", 999, "--scores", tmp_path / "scores")
    assert outcome.code == 1
    assert "999" in one_message(outcome.err)


def fail(error: BaseException) -> Callable[..., NoReturn]:
    def raise_it(*_: object) -> NoReturn:
        raise error

    return raise_it


@pytest.mark.parametrize(("error", "code"), [(StorageError("full"), 1), (VisgainError("no"), 1), (ConfigError("x"), 2)])
def test_errors_raised_deep_inside_become_one_line(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, error: VisgainError, code: int
) -> None:
    monkeypatch.setattr("visgain.selection.run_select", fail(error))
    outcome = cli("select", "--scores", "a", "--out", "b")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"visgain: {error}\n")


def test_a_defect_of_ours_keeps_its_traceback(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgain.selection.run_select", fail(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli("select", "--scores", "a", "--out", "b")


def test_an_interrupted_run_says_how_to_go_on(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgain.selection.run_select", fail(KeyboardInterrupt()))
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome = cli("select", "--scores", "a", "--out", "b")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a second one would cut off the message"
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.err) == (1, "visgain: interrupted; the same command resumes\n")


def test_a_reader_that_hangs_up_gets_no_traceback() -> None:
    command = f"'{sys.executable}' -m visgain list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1)  # 0 where all was written before the reader left
    assert done.stderr == ""


# ---------------------------------------------------------------- what the verbs without options say


def test_list_names_what_can_be_chosen() -> None:
    done = visgain_process("list")
    assert (done.returncode, done.stderr) == (0, "")
    named = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {"blur", "mean", "noise", "none", "shuffle", "swap"} <= set(named["counterfactuals"].split(", "))
    assert "json" in named["data formats"].split(", ")
    assert "llava" in named["data layouts"].split(", ")
    assert {"pope", "chair", "mmvet"} <= set(named["benchmarks"].split(", "))
    assert {"greedy", "vcd", "pai"} <= set(named["decodings"].split(", "))
    assert {"tune", "align"} <= set(named["recipes"].split(", "))
    assert "llava-1.5" in named["templates"].split(", ")


def test_the_templates_that_are_listed_are_those_that_can_be_given(cli: Callable[..., Outcome]) -> None:
    listed = next(line for line in cli("list").out.splitlines() if line.startswith("templates: "))
    for verb in ("score", "train"):
        refused = one_message(cli(verb, "--model", "m", "--data", "d", "--out", "o", "--template", "?").err)
        assert all(name in refused for name in listed.removeprefix("templates: ").split(", "))


def test_env_names_the_versions_that_matter(cli: Callable[..., Outcome]) -> None:
    outcome = cli("env")
    assert outcome.code == 0
    assert outcome.out.startswith(f"visgain {visgain.__version__}, Python {sys.version.split()[0]}")
    import torch
    import transformers

    assert f"torch {torch.__version__}" in outcome.out
    assert f"transformers {transformers.__version__}" in outcome.out
    assert "devices: " in outcome.out


# ---------------------------------------------------------------- options from a file


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that `select`, `world` and `train` were called with; they do nothing here."""
    seen: list[Any] = []
    monkeypatch.setattr("visgain.selection.run_select", seen.append)
    monkeypatch.setattr("visgain.selection.selection_report", str)
    monkeypatch.setattr("visgain.world.dataset.write_world", seen.append)

    def train(config: configs.TrainConfig) -> Any:
        seen.append(config)
        return TrainSummary(rows=1, steps=1, active_tokens=1, mean_loss=1.0, seconds=1.0)

    monkeypatch.setattr("visgain.training.run.run_train", train)
    return seen


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_gives_the_same_options_as_flags(cli: Callable[..., Outcome], called: list[Any], tmp_path: Path) -> None:
    text = "scores: a\nout: b\nkeep: 30\nkeep-tokens: 12.5\nend_of_turn: drop\ntable:\n"
    options = written(tmp_path / "run.yaml", text)
    flags = "--scores a --out b --keep 30 --keep-tokens 12.5 --end-of-turn drop"
    for arguments in (["--config", options, "select"], ["select", "--config", options], ["select", *flags.split()]):
        assert cli(*arguments).code == 0
    assert called[0] == called[1] == called[2]
    assert called[0] == configs.SelectConfig(
        scores=Path("a"), out=Path("b"), keep=30, keep_tokens=12.5, end_of_turn="drop"
    )


def test_lists_and_switches_can_stand_in_a_file(cli: Callable[..., Outcome], called: list[Any], tmp_path: Path) -> None:
    text = "model: m\ndata: d\nout: o\nparts: [projector, language]\nfollow_links: true\nlearning_rate: 2.0e-5\n"
    assert cli("train", "--config", written(tmp_path / "run.yaml", text), "--no-follow-links").code == 0
    assert cli("train", "--config", tmp_path / "run.yaml", "--parts", "vision").code == 0
    assert called[0].parts == ("projector", "language")
    assert (called[0].follow_links, called[1].follow_links) == (False, True)
    assert called[0].learning_rate == 2e-5
    assert called[1].parts == ("vision",)


@pytest.mark.parametrize(
    "flags",
    [
        "--parts vision projector --report-to tensorboard wandb --seed 1",
        "--parts vision --parts projector --report-to tensorboard --report-to wandb",
    ],
)
def test_several_names_can_follow_one_flag(cli: Callable[..., Outcome], called: list[Any], flags: str) -> None:
    assert cli("train", "--model", "m", "--data", "d", "--out", "o", *flags.split()).code == 0
    assert (called[0].parts, called[0].report_to) == (("vision", "projector"), ("tensorboard", "wandb"))


def test_flags_win_over_the_file(cli: Callable[..., Outcome], called: list[Any], tmp_path: Path) -> None:
    options = written(tmp_path / "run.yaml", "out: w\nrows: 5\nseed: 3\n")
    assert cli("world", "--rows", 9, "--config", options).code == 0
    assert called == [configs.WorldConfig(out=Path("w"), rows=9, seed=3)]


def test_a_file_does_not_outlive_its_command(cli: Callable[..., Outcome], called: list[Any], tmp_path: Path) -> None:
    options = written(tmp_path / "run.yaml", "out: w\nrows: 5\n")
    assert cli("world", "--config", options).code == 0
    assert cli("world", "--out", "w").code == 0
    assert [config.rows for config in called] == [5, configs.WorldConfig(out=Path("w")).rows]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("out: w\nrwos: 5\n", "unknown key 'rwos' for `visgain world`; did you mean 'rows'?"),
        ("out: w\n7: 5\n", "unknown key 7 for `visgain world`; known: bias, out, rows, seed, split"),
        ("out: w\nrows: many\n", 'Invalid value for [rows] from {path}: unable to convert "many" into int.'),
        ("out: w\nrows: 2.5\n", 'Invalid value for [rows]: "2.5" is not a whole number.'),
        ("out: w\nrows: [1, 2]\n", "Invalid value for [rows] from {path}"),
        ("out: w\nrows: {a: 1}\n", 'Unknown option: "[rows][a]" from {path}.'),
        ("out: w\nsplit: 5\n", 'Invalid value "5" for [split] from {path}. Choose from: "train"'),
        ("out: w\nrows: 0\n", "--rows is 0; it must be positive"),
        ("rows: 5\n", "--out requires an argument"),
        ("out: [w\n", "cannot read {path}: while parsing a flow sequence"),
        ("- out\n", "{path}: options are a mapping of names to values"),
        ("", "{path}: options are a mapping of names to values"),
        ("out: \x01\n", "cannot read {path}"),
    ],
)
def test_a_wrong_file_is_wrong_usage(
    cli: Callable[..., Outcome],
    called: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # short names keep messages on one line
    outcome = cli("world", "--config", written(Path("run.yaml"), text))
    assert (outcome.code, outcome.out, called) == (2, "", [])
    assert says.format(path="run.yaml") in one_message(outcome.err)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe\x00")])
def test_a_file_that_cannot_be_read_is_wrong_usage(
    cli: Callable[..., Outcome], tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "run.yaml"
    make(path)
    outcome = cli("world", "--config", path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"visgain: cannot read {path}: ")
    assert len(outcome.err.splitlines()) == 1


def test_a_file_for_a_verb_without_options_is_wrong_usage(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = cli("list", "--config", written(tmp_path / "run.yaml", "rows: 3\n"))
    assert outcome.code == 2
    assert "[rows]" in outcome.err


def test_arguments_default_to_those_of_the_process(tmp_path: Path) -> None:
    for arguments in (["--version"], ["world", "--rows", "1", "--out", str(tmp_path)]):
        assert visgain_process(*arguments).returncode == 0
    assert (tmp_path / "data.json").is_file()


def test_a_parameter_of_main_is_taken_instead_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: Sequence[str] = ["--version"]
    monkeypatch.setattr(sys, "argv", ["visgain", "nonsense"])
    main(arguments)
    assert capsys.readouterr().out.strip() == visgain.__version__
