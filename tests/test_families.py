"""The contract that every family keeps, on the way that a user takes: a saved folder, load_vlm, make_encoder, score.

What is measured on the models themselves is in test_zoo.py and test_engine.py.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import FuyuProcessor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from naive import built, naive_nll, picture
from tiny_models import make_sample
from visgain.config import ScoreConfig
from visgain.data import open_dataset
from visgain.errors import EncodingError, ModelError
from visgain.scoring import run as run_module
from visgain.scoring.forward import answer_nll
from visgain.scoring.run import run_score
from visgain.storage import read_json, read_scores
from visgain.types import Encoded, Sample
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import PER_TOKEN_INPUTS, Encoder
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.logits import answer_logits, token_nll
from visgain.vlm.template import make_encoder
from zoo import ZOO
from zoo.table import table

FAMILIES = [name for name, entry in ZOO.items() if entry.processor]
EXACT = 1e-4  # nats

TALKS = {
    "turns": ("<image>\nWhat is this?", "A red cup.", "Is there a dog?", "No, there is a cup.", "Sure?", "Yes"),
    "picture amid words": ("What is <image> this?", "A red cup."),
    "unicode": ("<image>\nWas ist das?", "Ünïcode 🙂 中文", "Mehr?", "🙂"),
    "spaces": ("<image>\nWhat?", "  A red  cup. ", "More?", "\nline\nbreak\n"),
    "empty answer": ("<image>\nWhat?", "A cup.", "More?", "", "And?", "No."),
    "two pictures": ("<image>\n<image>\nWhat are these?", "A red cup.", "And?", "A dog."),
    "between turns": ("<image>\nWhat is this?", "A red cup.", "And this?\n<image>", "A dog."),
    "second turn": ("Hello", "Hi.", "<image>\nWhat is this?", "A red cup."),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: Path) -> VLM:
    """A family as it comes from disk; from memory, if its image processor cannot be had here."""
    return _loaded(request.param, folders)


@cache
def _loaded(name: str, folders: Path) -> VLM:
    vlm, folder = built(name), folders / name
    vlm.model.save_pretrained(folder)
    if not ZOO[name].loads:
        return vlm
    vlm.processor.save_pretrained(folder)
    loaded = load_vlm(str(folder), device="cpu")
    return VLM(name=name, model=loaded.model, processor=loaded.processor)


def sample(talk: str) -> Sample:
    texts = TALKS[talk]
    return make_sample(*texts, images=sum(text.count("<image>") for text in texts))


def encode(encoder: Encoder, talk: str, seed: int = 0) -> Encoded:
    one = sample(talk)
    return encoder.encode(one, [picture(seed + k) for k in range(len(one.images))])


def takes(name: str, talk: str) -> bool:
    """Whether the family takes the pictures of `talk`."""
    later = any("<image>" in text for text in TALKS[talk][1:])
    several = len(sample(talk).images) > 1
    return {"between turns": True, "before the first question": not later, "one": not (later or several)}[
        ZOO[name].pictures
    ]


# ---------------------------------------------------------------- the contract of an encoder


@pytest.mark.parametrize("talk", TALKS)
def test_supervised_tokens_are_the_answers_with_their_ends_in_order(family: VLM, talk: str) -> None:
    encoder, entry = make_encoder(family), ZOO[family.name]
    if not takes(family.name, talk):
        with pytest.raises(EncodingError, match=r"takes (one picture|pictures before the first question)"):
            encode(encoder, talk)
        return
    encoded, answers = encode(encoder, talk), sample(talk).answers
    strips = "| trim" in (family.processor.chat_template or "")
    for number, answer in enumerate(answers):
        written = answer.strip() if strips else answer
        decoded = family.tokenizer.decode(encoded.token_id[encoded.turn == number])
        assert decoded in [lead + written + end for end in entry.ends for lead in ("", " ")]
        spans = encoded.chars[encoded.turn == number].tolist()
        words = [span for span in spans if span[1] > span[0]]
        if answer and not strips:
            assert (words[0][0], words[-1][1]) == (0, len(answer))
        assert all(one[1] == other[0] or one == other for one, other in itertools.pairwise(words))
    assert (np.diff(encoded.turn) >= 0).all()
    assert encoded.is_answer.sum() == len(encoded.turn) == len(encoded.chars) == len(encoded.token_id)


def test_image_tokens_are_found_and_counted(family: VLM) -> None:
    encoder = make_encoder(family)
    one = encode(encoder, "turns")
    assert one.n_image_tokens == (one.input_ids == family.image_token_id).sum() > 0
    assert not one.is_answer[one.input_ids == family.image_token_id].any()
    for talk in ("two pictures", "between turns"):
        if takes(family.name, talk):
            assert encode(encoder, talk).n_image_tokens == 2 * one.n_image_tokens


def test_a_prompt_ends_where_the_first_answer_begins(family: VLM) -> None:
    encoder, one = make_encoder(family), sample("turns")
    encoded, prompt = encode(encoder, "turns"), encoder.prompt(one.turns[:1], [picture(0)])
    first = int(encoded.is_answer.argmax())
    common = min(first, len(prompt.input_ids))
    assert prompt.input_ids[:common].tolist() == encoded.input_ids[:common].tolist()
    assert abs(len(prompt.input_ids) - first) <= 1, "a space between the two may go with either"
    assert prompt.n_image_tokens == encoded.n_image_tokens
    assert not prompt.is_answer.any()


def test_truncation_keeps_a_prefix_and_never_half_a_picture(family: VLM) -> None:
    whole = encode(make_encoder(family), "turns")
    size, first = len(whole.input_ids), int(whole.is_answer.argmax())
    for length in (size - 4, first + 2):
        cut = encode(make_encoder(family, max_length=length), "turns")
        assert cut.truncated
        assert not whole.truncated
        assert np.array_equal(cut.input_ids, whole.input_ids[:length])
        assert np.array_equal(cut.is_answer, whole.is_answer[:length])
        assert len(cut.turn) == len(cut.chars) == cut.is_answer.sum()
        expected = answer_nll(family, [whole])[0][: len(cut.turn)]
        assert np.allclose(answer_nll(family, [cut])[0], expected, rtol=0, atol=2e-5) or family.name.startswith("pali")
    last = int(np.flatnonzero(whole.input_ids == family.image_token_id)[-1])
    with pytest.raises(EncodingError, match=r"do not fit into --max-length|no answer token fits"):
        encode(make_encoder(family, max_length=max(8, last)), "turns")


def test_conversations_about_the_same_picture_prepared_once_are_as_if_alone(family: VLM) -> None:
    encoder = make_encoder(family)
    samples = [sample(talk) for talk in ("turns", "picture amid words", "unicode")]
    together = encoder.encode_all(samples, [picture(0)])
    for one, found in zip(samples, together, strict=True):
        if isinstance(found, EncodingError):
            assert not takes(family.name, "picture amid words")
            continue
        alone = encoder.encode(one, [picture(0)])
        assert np.array_equal(alone.input_ids, found.input_ids)
        assert alone.model_inputs.keys() == found.model_inputs.keys()
        assert all(np.array_equal(alone.model_inputs[key], found.model_inputs[key]) for key in alone.model_inputs)


@pytest.mark.parametrize("name", [name for name in FAMILIES if ZOO[name].loads])
def test_a_saved_model_loads_to_the_same_numbers(name: str, folders: Path) -> None:
    loaded, vlm = _loaded(name, folders), built(name)
    before, after = (encode(make_encoder(one), "turns") for one in (vlm, loaded))
    assert np.array_equal(after.input_ids, before.input_ids)
    assert np.array_equal(after.is_answer, before.is_answer)
    assert np.allclose(answer_nll(loaded, [after])[0], answer_nll(vlm, [before])[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- a run of `visgain score`


ROWS = ("turns", "turns", "unicode", "two pictures", "between turns")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several turns and pictures, the first one again about another picture, and one without pictures."""
    folder = tmp_path_factory.mktemp("talks")
    rows = [*(TALKS[talk] for talk in ROWS), ("Capital of France?", "Paris.")]
    records = []
    for number, texts in enumerate(rows):
        names = [f"{k + number % 2}.png" for k in range(sum(text.count("<image>") for text in texts))]
        for name in names:
            picture(int(Path(name).stem)).save(folder / name)
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        records.append({"id": str(number), "conversations": turns} | ({"image": names} if names else {}))
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def some(*quick: str) -> list[object]:
    """All families; those that are not named here are tried when there is time."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize(
    "name", some("llava", "qwen2_5_vl", "idefics3", "gemma3", "paligemma", "blip-2", "mllama", "pixtral")
)
def test_none_gives_gain_zero_and_packed_equals_alone(
    name: str, folders: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = _loaded(name, folders)
    if not ZOO[family.name].loads:
        monkeypatch.setattr(run_module, "load_vlm", lambda *_, **__: family)
    run_score(
        ScoreConfig(
            model=str(folders / family.name),
            data=dataset,
            out=tmp_path / "scores",
            counterfactual="none",
            workers=0,
            device="cpu",
        )
    )
    encoder, rows = make_encoder(family), open_dataset(dataset)
    scores = {row["row"]: row for row in read_scores(tmp_path / "scores").to_pylist()}
    assert sorted(scores) == list(range(len(rows)))
    for number, talk in enumerate(ROWS):
        record = scores[number]
        if not takes(family.name, talk):
            assert "takes" in str(record["skip_reason"])
            continue
        encoded = encoder.encode(rows[number], [image.open() for image in rows[number].images])
        assert record["skip_reason"] is None
        assert record["gain"] == 0
        assert record["nll_seen"] == record["nll_blind"]
        assert np.allclose(record["nll_seen"], naive_nll(family, encoded), rtol=0, atol=EXACT)
        assert record["n_image_tokens"] == encoded.n_image_tokens
    assert read_json(tmp_path / "scores/run.json", "scores")["way"] == ZOO[family.name].way


def test_a_row_without_a_picture_is_text_alone_or_refused(family: VLM) -> None:
    encoder, one = make_encoder(family), make_sample("Who?", "A red dog.", images=0)
    if ZOO[family.name].pictures == "between turns":
        encoded = encoder.encode(one, [])
        assert encoded.n_image_tokens == 0
        assert set(encoded.model_inputs) <= set(PER_TOKEN_INPUTS)
    else:
        with pytest.raises(EncodingError, match="completes a question about a picture; this row has none"):
            encoder.encode(one, [])


@pytest.mark.parametrize("name", some("llava", "gemma3", "paligemma", "blip-2"))
def test_a_family_trains_and_answers_on_what_its_encoder_gives(name: str, folders: Path) -> None:
    family = replace(built(name), model=copy.deepcopy(built(name).model))
    encoder, one = make_encoder(family), sample("turns")
    for encoded in [encode(encoder, "turns")] + (
        [encoder.encode(make_sample("Who?", "A red dog.", images=0), [])]
        if ZOO[name].pictures == "between turns"
        else []
    ):
        batch = pad_batch([encoded], 0)
        logits = answer_logits(family.model.train(), batch.inputs, batch.is_answer)
        token_nll(logits, torch.from_numpy(encoded.token_id)).mean().backward()
        assert sum(float(p.grad.abs().sum()) for p in family.model.parameters() if p.grad is not None) > 0
    prompt = pad_batch([encoder.prompt(one.turns[:1], [picture(0)])], 0, side="left")
    expected = int(family.model.eval()(**prompt.inputs, use_cache=False).logits[0, -1].argmax())
    answer = family.model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)[0]
    assert int(answer[-2 if len(answer) > 1 else -1]) == expected


# ---------------------------------------------------------------- what cannot be had here, and the table


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.missing])
def test_an_image_processor_that_is_replaced_in_these_tests_really_needs_torchvision(name: str) -> None:
    ZOO[name].skip_if_unknown()
    with pytest.raises(ImportError, match=r"requires the Torchvision library"):
        getattr(transformers, ZOO[name].missing)()


def test_a_processor_that_writes_the_prompt_anew_is_told_that_it_has_no_template() -> None:
    tokenizer = built("fuyu").tokenizer
    processor = FuyuProcessor(FuyuImageProcessorPil(), tokenizer)
    vlm = VLM(name="fuyu", model=built("fuyu").model, processor=processor)
    with pytest.raises(ModelError, match="fuyu has no chat template"):
        make_encoder(vlm)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_written_by_what_the_table_says(name: str) -> None:
    assert make_encoder(built(name)).name == {"chat template": "chat"}.get(ZOO[name].text, ZOO[name].text)


def test_the_table_in_the_docs_is_what_the_tests_hold() -> None:
    path = Path(__file__).parents[1] / "docs/families.md"
    assert path.read_text() == table(), "run `make families`"
