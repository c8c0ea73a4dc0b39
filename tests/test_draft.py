"""float8: what it rounds, what it leaves alone, and that the run tells how rough it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_models import llava_next
from torch import nn

from visgain.config import ScoreConfig, WorldConfig
from visgain.errors import ModelError, VisgainError
from visgain.scoring.draft import draft_error, read_draft
from visgain.scoring.run import run_score
from visgain.storage import read_json, read_scores
from visgain.vlm.float8 import Float8Linear, make_draft, multiplies, rounded
from visgain.world.dataset import write_world

needs_products = pytest.mark.skipif(
    not multiplies(torch.device("cpu")), reason=f"torch {torch.__version__} has no float8 products on a CPU"
)


def test_rounding_keeps_each_row_within_float8s_precision() -> None:
    values = torch.randn(7, 64) * torch.logspace(-4, 4, 7)[:, None]
    values[3] = 0
    eight, scale = rounded(values)
    assert eight.dtype == torch.float8_e4m3fn
    # Three bits of mantissa: half a unit in the last place is 1/16 of a normal number; below lie 2**-9 steps.
    largest = values.abs().amax(1, keepdim=True)
    assert ((eight.float() * scale - values).abs() <= values.abs() / 16 + largest / 448 * 2**-9).all()


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_what_was_rounded(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype)
    states = torch.randn(2, 5, 64, dtype=dtype)
    (x, x_scale), (w, w_scale) = rounded(states.reshape(10, 64)), rounded(linear.weight.detach())
    by_hand = (x.double() * x_scale) @ (w.double() * w_scale).T + (linear.bias.double() if bias else 0)
    found = Float8Linear(linear)(states)
    assert (found.shape, found.dtype) == ((2, 5, 48), dtype)
    torch.testing.assert_close(
        found.double().reshape(10, 48), by_hand, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0.01
    )


@needs_products
def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = Float8Linear(nn.Linear(64, 48))
    states = torch.randn(1, 5, 64)
    louder = states.clone()
    louder[0, 1:] *= 1000
    torch.testing.assert_close(layer(louder)[0, 0], layer(states)[0, 0])


@needs_products
def test_a_draft_leaves_vision_and_the_head_alone() -> None:
    model = llava_next().model
    n_linear = sum(type(m) is nn.Linear for m in model.model.language_model.modules())
    assert make_draft(model) == n_linear > 0
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not any(isinstance(m, Float8Linear) for m in model.model.vision_tower.modules())
    assert not any(isinstance(m, Float8Linear) for m in model.model.multi_modal_projector.modules())


@needs_products
def test_a_model_without_fitting_layers_is_refused() -> None:
    model = llava_next().model
    for layer in model.model.language_model.modules():
        if type(layer) is nn.Linear:
            layer.in_features = 17
    with pytest.raises(ModelError, match="multiples of 16"):
        make_draft(model)


def test_a_device_without_float8_products_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("Could not run 'aten::_scaled_mm_v2' with arguments from the 'CPU' backend.")

    monkeypatch.setattr("visgain.vlm.float8.scaled_mm", missing)
    with pytest.raises(
        ModelError, match=rf"torch {re.escape(torch.__version__)} does not .* this CPU; use --dtype auto"
    ):
        make_draft(llava_next().model)


def test_the_comparison_counts_by_hand() -> None:
    exact = [np.array([3.0, 1.0], np.float32), np.array([0.0, 0.5], np.float32), np.array([-1.0, -2.0], np.float32)]
    draft = [np.array([3.0, 0.0], np.float32), np.array([0.0, 0.5], np.float32), np.array([-1.0, 1.0], np.float32)]
    # Means 2, 0.25, -1.5 and 1.5, 0.25, 0: 70% of 3 is 3 samples, tau -1.5 and 0. Tokens of the exact selection: the
    # first five; of the draft's: all but the fifth. Both keep 4 of 6. Ranks 2, 1, 0 twice.
    error = draft_error(draft, exact)
    assert (error.rows, error.tokens) == (3, 6)
    assert error.mean_error == pytest.approx(4 / 6)
    assert error.largest_error == 3
    assert error.overlap == pytest.approx(4 / 6)
    assert error.rank_correlation == pytest.approx(1)
    reversed_ranks = draft_error([-gain for gain in exact], exact)
    assert reversed_ranks.rank_correlation == pytest.approx(-1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(WorldConfig(out=tmp_path_factory.mktemp("draft") / "world", rows=12, seed=3))


@needs_products
def test_a_draft_run_is_rough_and_says_how(world: Path, tmp_path: Path) -> None:
    run_score(ScoreConfig(model="embedded", data=world, out=tmp_path / "exact", workers=0))
    run_score(ScoreConfig(model="embedded", data=world, out=tmp_path / "draft", dtype="float8", workers=0))
    assert read_json(tmp_path / "draft" / "run.json", "scores")["identity"]["dtype"] == "float8"
    gains = {}
    for name in ("exact", "draft"):
        columns = read_scores(tmp_path / name, ["row", "nll_seen", "nll_blind"]).to_pydict()
        gains[name] = [
            np.subtract(blind, seen, dtype=np.float32)
            for seen, blind in zip(columns["nll_seen"], columns["nll_blind"], strict=True)
            if seen
        ]
    off = np.abs(np.concatenate(gains["draft"]) - np.concatenate(gains["exact"]))
    told = read_draft(tmp_path / "draft")
    assert told is not None
    assert told.rows == len(gains["exact"])
    assert told.mean_error == pytest.approx(off.mean(), abs=1e-4)
    assert 0.001 < told.mean_error < 0.5
    assert 0.5 < told.overlap <= 1
    assert read_draft(tmp_path / "exact") is None
    assert f"{told.rows} rows" in str(told)


def test_a_draft_is_no_resumption_of_an_exact_run(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    run_score(ScoreConfig(model="embedded", data=world, out=out, limit=2, workers=0))
    with pytest.raises(VisgainError, match="dtype"):
        run_score(ScoreConfig(model="embedded", data=world, out=out, limit=2, dtype="float8", workers=0))


def test_a_damaged_comparison_is_told(tmp_path: Path) -> None:
    (tmp_path / "draft.json").write_text(json.dumps([1]))
    with pytest.raises(VisgainError, match=r"draft\.json"):
        read_draft(tmp_path)


def test_tokens_of_samples_that_are_not_kept_do_not_count() -> None:
    kept = [np.array([2.0, 2.0], np.float32), np.array([1.0, 1.0], np.float32), np.array([0.0, 0.0], np.float32)]
    # 70% of 4 samples is 3, tau 0: the last sample is out, and so is its token of 5 nats.
    exact, draft = np.array([-9.0, 5.0], np.float32), np.array([-9.0, -9.0], np.float32)
    assert draft_error([*kept, draft], [*kept, exact]).overlap == 1
