"""Names to objects: lazily, with plug-ins from entry points, and with help for a mistyped name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from visgain import registry
from visgain.counterfactuals import COUNTERFACTUALS, Blur, parse_counterfactual
from visgain.errors import ConfigError, UnknownName
from visgain.registry import Registry, suggest

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from PIL import ImageOps

from visgain.counterfactuals import Counterfactual


@dataclass(frozen=True)
class Negative(Counterfactual):
    """Every colour's opposite."""

    strength: float = 1.0
    name: ClassVar[str] = "negative"

    def __call__(self, image, *, rng, other):
        return ImageOps.invert(image)
'''


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for modules of installed plug-ins, and an entry point `negative` that names one of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints(
        [
            EntryPoint("negative", "toy_plugin:Negative", "visgain.counterfactuals"),
            EntryPoint("blur", "toy_plugin:Missing", "visgain.counterfactuals"),
            EntryPoint("other", "toy_plugin:Missing", "visgain.data_formats"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda **query: points.select(**query))
    monkeypatch.delitem(sys.modules, "toy_plugin", raising=False)
    return tmp_path


def test_an_entry_given_as_text_is_imported_when_asked_for_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lazy_thing.py").write_text("made = object()\n")
    things: Registry[object] = Registry("thing", {"lazy": "lazy_thing:made", "here": 3})
    assert things.names() == ["here", "lazy"]
    assert "lazy_thing" not in sys.modules
    assert things.get("here") == 3
    first = things.get("lazy")
    assert first is sys.modules["lazy_thing"].made
    monkeypatch.delitem(sys.modules, "lazy_thing")
    assert things.get("lazy") is first


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownName, match=r"^unknown counterfactual 'blurr': did you mean 'blur'\?$"):
        COUNTERFACTUALS.get("blurr")


def test_a_name_like_no_other_gets_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"known: blur, drop, mask, mean, noise, none, shuffle, swap$"):
        COUNTERFACTUALS.get("xyzzy")


def test_suggestions_are_sorted_and_survive_having_nothing_to_suggest() -> None:
    assert suggest("q", ["b", "a"]) == "known: a, b"
    assert suggest("tune", iter(["align", "tune"])) == "did you mean 'tune'?"
    assert suggest("q", []) == "known: "


def test_registries_do_not_share_what_was_loaded() -> None:
    entries = {"path": "pathlib:Path"}
    one: Registry[object] = Registry("thing", entries)
    assert one.get("path") is Path
    assert entries == {"path": "pathlib:Path"}


def test_a_plug_in_is_listed_without_being_imported_and_then_works_like_a_built_in(install: Path) -> None:
    (install / "toy_plugin.py").write_text(PLUGIN)
    assert COUNTERFACTUALS.names() == ["blur", "drop", "mask", "mean", "negative", "noise", "none", "shuffle", "swap"]
    assert "toy_plugin" not in sys.modules
    made = parse_counterfactual("negative:strength=0.5")
    assert made == sys.modules["toy_plugin"].Negative(strength=0.5)
    assert made.spec == "negative:strength=0.5"


def test_a_plug_in_cannot_replace_a_built_in(install: Path) -> None:
    assert COUNTERFACTUALS.get("blur") is Blur


def test_plug_ins_of_another_kind_stay_out(install: Path) -> None:
    things: Registry[object] = Registry("data format", {})
    assert things.names() == ["other"]
    with pytest.raises(UnknownName, match=r"unknown data format 'negative': known: other"):
        things.get("negative")
