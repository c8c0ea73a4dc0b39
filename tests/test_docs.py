"""What README and docs say is true of the code: verbs, flags, files, columns."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from visgain import config as configs
from visgain.export import EXPORTERS
from visgain.storage import PER_IMAGE_SCHEMA, SELECTION_SCHEMA

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = sorted((ROOT / "docs/trainers").glob("*.md"))
VERBS = {
    "demo": configs.DemoConfig,
    "check": configs.CheckConfig,
    "score": configs.ScoreConfig,
    "select": configs.SelectConfig,
    "eval": configs.EvalConfig,
    "ablate": configs.AblateConfig,
    "analyze": configs.AnalyzeConfig,
    "assemble": configs.AssembleConfig,
    "train": configs.TrainConfig,
    "export": configs.ExportConfig,
    "report": configs.ReportConfig,
    "show": configs.ShowConfig,
    "world": configs.WorldConfig,
    "list": None,
    "env": None,
}


def commands() -> list[tuple[str, list[str]]]:
    """Every `visgain ...` line in a code block, with continued lines joined."""
    found = []
    for page in [*PAGES, *GUIDES]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("visgain "):
                    words = shlex.split(line, comments=True)
                    found.append((words[1], words[2:]))
    return found


def test_readme_shows_commands() -> None:
    assert {verb for verb, _ in commands()} >= {"score", "select", "report", "train", "show"}


@pytest.mark.parametrize(("verb", "words"), commands())
def test_every_documented_command_has_flags_that_exist(verb: str, words: list[str]) -> None:
    known = {f"--{field.name.replace('_', '-')}" for field in fields(VERBS[verb])} if VERBS[verb] else set()
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_mentioned_in_prose_exists(page: Path) -> None:
    known = {f"--{field.name.replace('_', '-')}" for config in VERBS.values() if config for field in fields(config)}
    mentioned = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", page.read_text()))
    launchers = {"--nproc-per-node"}
    assert mentioned <= known | launchers | {"--help", "--config"}


def test_every_column_is_documented_and_every_documented_column_exists() -> None:
    text = (ROOT / "docs/schema.md").read_text()
    table = {name.strip() for row in re.findall(r"^\| ([a-z_, ]+) \| ", text, re.M) for name in row.split(",")}
    assert table - {"column"} == set(PER_IMAGE_SCHEMA.names)
    assert all(f"`{name}`" in text for name in SELECTION_SCHEMA.names)


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        assert set(re.findall(r"`?make ([a-z-]+)", page.read_text())) <= targets


def test_the_table_of_trainers_is_complete() -> None:
    text = (ROOT / "docs/trainers.md").read_text()
    assert set(re.findall(r"\]\(trainers/([a-z-]+\.md)\)", text)) == {page.name for page in GUIDES}
    told = text + (ROOT / "docs/trainers/llava.md").read_text()
    assert all(f"`{name}`" in told for name in EXPORTERS.names())
