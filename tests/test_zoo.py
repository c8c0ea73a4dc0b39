"""Every family of the zoo: scored exactly, supervised exactly, seeing, and the same again from disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from naive import built, naive_nll, picture
from tiny_models import make_sample
from visgain.errors import ModelError
from visgain.scoring.forward import answer_nll
from visgain.types import Encoded
from visgain.vlm.batch import signature
from visgain.vlm.load import load_processor
from visgain.vlm.template import make_encoder
from zoo import ZOO

SHORT = make_sample("<image>\nWhat is this?", "A dog.")
TWO = make_sample("<image>\nWhat is this?", "A red cup.", "Is there a dog?", "No, there is a cup.")


def encode(name: str, sample=TWO, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Encoded:
    return ZOO[name].encode(built(name), sample, [picture(seed, size)])


@pytest.mark.parametrize("name", ZOO)
def test_a_family_scores_as_its_own_full_forward_does(name: str) -> None:
    vlm, encoded = built(name), encode(name)
    nll = answer_nll(vlm, [encoded])[0]
    assert nll.dtype == np.float32
    assert len(nll) == len(encoded.turn) > 10
    assert np.allclose(nll, naive_nll(vlm, encoded), rtol=0, atol=2e-5)
    assert 0.3 < nll.std() < 20, "nearly uniform, or nearly certain"


@pytest.mark.parametrize("name", ZOO)
def test_another_picture_changes_the_answer_and_the_same_does_not(name: str) -> None:
    vlm = built(name)
    one, again, other = (answer_nll(vlm, [encode(name, seed=seed)])[0] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.pictures == "between turns"])
def test_two_pictures_are_two_pictures(name: str) -> None:
    vlm, entry = built(name), ZOO[name]
    sample = make_sample("<image>\nWhat is this?", "A red cup.", "<image>And this?", "A dog.", images=2)
    one, other = (entry.encode(vlm, sample, [picture(0), picture(seed)]) for seed in (1, 2))
    assert one.n_image_tokens == 2 * encode(name).n_image_tokens
    nll = answer_nll(vlm, [one])[0]
    assert np.allclose(nll, naive_nll(vlm, one), rtol=0, atol=2e-5)
    change = np.abs(nll - answer_nll(vlm, [other])[0])
    assert change[one.turn == 1].max() > 1e-3
    assert (change[one.turn == 0].max() > 1e-5) == entry.looks_ahead


@pytest.mark.parametrize("name", ZOO)
def test_an_answer_token_is_predicted_from_what_is_before_it_alone(name: str) -> None:
    vlm = built(name)
    encoded = encode(name)
    ids = encoded.input_ids.copy()
    cut = int(encoded.is_answer.nonzero()[0][len(encoded.turn) // 2])
    later = encoded.is_answer.copy()
    later[: cut + 1] = False
    ids[later] = np.roll(ids[later], 1)
    changed = replace(encoded, input_ids=ids)
    before = int(encoded.is_answer[: cut + 1].sum())
    one, other = answer_nll(vlm, [encoded])[0], answer_nll(vlm, [changed])[0]
    assert np.allclose(one[:before], other[:before], rtol=0, atol=1e-5)
    assert not np.allclose(one[before:], other[before:], rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ZOO)
def test_beside_a_longer_sample_the_numbers_are_the_same(name: str) -> None:
    vlm = built(name)
    short, long = encode(name, SHORT, seed=1), encode(name)
    alone = [answer_nll(vlm, [encoded])[0] for encoded in (short, long)]
    together = answer_nll(vlm, [short, long])
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ZOO)
def test_pictures_of_different_shape_go_together_or_are_refused(name: str) -> None:
    vlm = built(name)
    tall, wide = encode(name, SHORT, seed=1, size=(24, 40)), encode(name)
    if signature(tall) != signature(wide):
        with pytest.raises(ModelError, match="different shapes"):
            answer_nll(vlm, [tall, wide])
        return
    for one, other in zip([tall, wide], answer_nll(vlm, [tall, wide]), strict=True):
        assert np.allclose(answer_nll(vlm, [one])[0], other, rtol=0, atol=2e-5)


def test_settings_for_videos_survive_though_no_video_is_ever_read(tmp_path: Path) -> None:
    vlm = built("qwen3_vl")
    vlm.processor.save_pretrained(tmp_path / "one")
    vlm.model.config.save_pretrained(tmp_path / "one")
    path = tmp_path / "one/processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    path.write_text(json.dumps(settings))
    processor = load_processor(str(tmp_path / "one"))
    assert processor.video_processor.fps == 3
    with pytest.raises(ModelError, match="not videos"):
        processor(text=["<|video_pad|>"], videos=[np.zeros((2, 16, 16, 3), np.uint8)])
    processor.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other/processor_config.json").read_text()) == settings


# mllama: refused, as the test below says; the others complete a question about a picture, and take none without
@pytest.mark.parametrize(
    "name", [name for name, entry in ZOO.items() if name != "mllama" and entry.pictures == "between turns"]
)
def test_a_row_without_pictures_goes_beside_one_with(name: str) -> None:
    vlm = built(name)
    seeing, blind = encode(name), ZOO[name].encode(vlm, make_sample("Who?", "A red dog.", images=0), [])
    together = answer_nll(vlm, [blind, seeing])
    for one, other in zip([blind, seeing], together, strict=True):
        assert np.allclose(answer_nll(vlm, [one])[0], other, rtol=0, atol=2e-5)


def test_a_row_without_pictures_is_refused_where_it_would_see_its_neighbours() -> None:
    blind = ZOO["mllama"].encode(built("mllama"), make_sample("Who?", "A red dog.", images=0), [])
    with pytest.raises(ModelError, match="in one batch"):
        answer_nll(built("mllama"), [blind, encode("mllama")])


def test_llavas_own_template_is_refused_for_a_model_that_is_no_llava() -> None:
    with pytest.raises(ModelError, match="Idefics3Processor is not LLaVA's"):
        make_encoder(built("idefics3"), "llava-1.5")
