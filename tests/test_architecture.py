"""What holds the package together: its public names, what importing it costs, and annotations that are true."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import visgain
from visgain.rules import kept_count
from visgain.types import Encoded, Selection, TokenScores
from visgain.vlm.logits import token_nll

# ---------------------------------------------------------------- public names


def test_every_public_name_resolves_and_is_listed() -> None:
    assert visgain.__all__ == sorted(visgain.__all__)
    for name in visgain.__all__:
        assert getattr(visgain, name).__name__ == name
        assert getattr(visgain, name).__module__.startswith("visgain.")
        assert name in dir(visgain)


def test_type_checkers_and_the_interpreter_find_public_names_in_the_same_modules() -> None:
    tree = ast.parse(Path(visgain.__file__).read_text())
    promised = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("visgain.")
        for alias in node.names
    }
    assert sorted(promised) == visgain.__all__
    for name, module in promised.items():
        assert getattr(visgain, name) is getattr(importlib.import_module(str(module)), name)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'visgain' has no attribute 'run_scores'"):
        visgain.run_scores  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = """
import sys
import visgain
print(sorted(name for name in sys.modules if name.startswith("visgain")))
heavy = ("torch", "transformers", "numpy", "pyarrow")
print([name for name in heavy if name in sys.modules])
visgain.read_scores, visgain.run_select, visgain.open_dataset, visgain.write_report, visgain.parse_counterfactual
print([name for name in heavy[:2] if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['visgain']", "[]", "[]"]


def test_every_module_can_be_imported_and_says_what_it_is() -> None:
    found = [module.name for module in pkgutil.walk_packages(visgain.__path__, "visgain.")]
    assert len(found) > 30
    for name in found:
        if name not in ("visgain.__main__", "visgain.evaluation.lmms"):  # it needs lmms-eval
            assert importlib.import_module(name).__doc__, f"{name} does not say what it is"


# ---------------------------------------------------------------- shapes


def encoded(length: int = 5, answers: int = 2, turn: int = 2, chars: int = 2) -> Encoded:
    return Encoded(
        input_ids=np.arange(5),
        is_answer=np.arange(length) < answers,
        turn=np.zeros(turn, np.int32),
        chars=np.zeros((chars, 2), np.int32),
        n_image_tokens=0,
    )


def test_arrays_that_do_not_fit_together_are_refused_while_tests_run() -> None:
    assert len(encoded().token_id) == 2
    for wrong in ({"length": 6}, {"turn": 3}, {"chars": 1}):
        with pytest.raises(TypeCheckError):
            encoded(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nll_seen": np.zeros(3, np.float64), "nll_blind": np.zeros(3, np.float64)},
        {"nll_seen": np.zeros(2, np.float32)},
        {"token_id": np.zeros(3, np.int64)},
        {"chars": np.zeros((3, 3), np.int32)},
    ],
)
def test_scores_of_another_dtype_or_length_are_refused_while_tests_run(wrong: dict[str, np.ndarray]) -> None:
    scores = TokenScores(
        row=0,
        id="0",
        fingerprint=0,
        source="",
        n_images=1,
        n_image_tokens=1,
        n_prompt_tokens=1,
        truncated=False,
        token_id=np.zeros(3, np.int32),
        turn=np.zeros(3, np.int32),
        chars=np.zeros((3, 2), np.int32),
        nll_seen=np.zeros(3, np.float32),
        nll_blind=np.ones(3, np.float32),
    )
    assert scores.mean_gain == 1.0
    with pytest.raises(TypeCheckError):
        replace(scores, **wrong)


def test_functions_on_tensors_are_checked_too() -> None:
    logits = torch.zeros(3, 7)
    assert token_nll(logits, torch.zeros(3, dtype=torch.int64)).shape == (3,)
    for wrong in (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), torch.zeros(3)):
        with pytest.raises(TypeCheckError):
            token_nll(logits, wrong)
    with pytest.raises(TypeCheckError):
        token_nll(logits.double(), torch.zeros(3, dtype=torch.int64))


def test_types_without_shapes_are_checked_too() -> None:
    assert kept_count(2, 50) == 1  # an int is a number where a float is wanted
    with pytest.raises(TypeCheckError):
        kept_count("2", 50.0)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        Selection(tau=0.0, token_tau=0.0, keep_percent="70", rows=np.arange(2), keep=())  # type: ignore[arg-type]
