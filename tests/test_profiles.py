"""Profiles give the ids and labels of their recipes, and a template that is off by a letter is found out.

What is compared with is in golden.py: the same rules once more, in another way and without any of visgain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from functools import cache, partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import golden
import visgain.registry
from golden import Conversation
from tiny_llava import clip_llava, qwen2_like, siglip_llava, vicuna_like
from tiny_models import make_sample
from visgain.data import open_dataset
from visgain.errors import EncodingError, ModelError, UnknownName
from visgain.types import Encoded, Sample
from visgain.vlm import frozen, profiles
from visgain.vlm.frozen import FrozenEncoder
from visgain.vlm.load import VLM
from visgain.vlm.profiles import PROFILES, Profile, find_profile, images_first, template_names
from visgain.vlm.template import make_encoder

PICTURE = Image.new("RGB", (8, 8), (200, 30, 30))

# name of a model -> the model; "small" ones take 4 tokens a picture, the others as many as were published
MODELS: dict[str, Callable[[], VLM]] = {
    "vicuna": lambda: clip_llava(vicuna_like("legacy")),
    "small legacy": lambda: clip_llava(vicuna_like("legacy"), 28),
    "small always": lambda: clip_llava(vicuna_like("always"), 28),
    "small first": lambda: clip_llava(vicuna_like("first"), 28),
    "qwen": lambda: siglip_llava(qwen2_like(None)),
    "small qwen": lambda: siglip_llava(qwen2_like(None), 28),
    "small qwen with BOS": lambda: siglip_llava(qwen2_like("<s>"), 28),
}
RULES = {
    "llava-1.5": golden.v1,
    "llava-1.5-align": golden.plain,
    "sharegpt4v": golden.v1,
    "sharegpt4v-align": golden.plain,
    "open-qwen2vl": golden.open_qwen2vl,
}
VICUNAS = ["small legacy", "small always", "small first"]
QWENS = ["small qwen", "small qwen with BOS"]
PAIRS = [
    *((profile, model) for profile in ("llava-1.5", "llava-1.5-align") for model in VICUNAS),
    *(("open-qwen2vl", model) for model in QWENS),
]


@cache
def model(name: str) -> VLM:
    return MODELS[name]()


def talk(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


LONG = "The white cat is sitting on a table in front of a house. " * 160

MADE_UP = {
    "one turn": talk("<image>\nWhat is this?", "A red cup."),
    "three turns": talk("<image>\nWhat is this?", "A red cup.", "Is there a dog?", "No.", "Sure?", "Yes, quite sure."),
    "a number": talk("<image>\nHow many?", "2", "And cats?", "12 cats, 3 dogs."),
    "picture last": talk("What is this?\n<image>", "A red cup."),
    "picture in the middle": talk("What is <image> this?", "A red cup.", " And that? ", "A dog."),
    "picture alone": talk("<image>", "A red cup.", "And?", "A table."),
    "picture in a later turn": talk("Hello!", "Hi.", "<image>\nWhat is this?", "A red cup."),
    "two pictures": talk("<image>\n<image>\nWhat changed?", "The dog is gone."),
    "pictures between turns": talk("<image>\nThis?", "A cup.", "And <image>?", "A dog.", "<image><image>", "3 cats."),
    "text alone": talk(" What is a dog? ", "An animal."),
    "an empty answer": talk("<image>\nWhat is this?", "A red cup.", "Hm?", "", "Is there a dog?", "No."),
    "an empty answer at the end": talk("<image>\nWhat is this?", "A red cup.", "Hm?", ""),
    "an empty question": talk("Hello!", "Hi.", "", "What else?"),
    "white space around answers": talk("<image>\nWhat?", "  A red cup. \n", "And?", "\tA dog"),
    "lines": talk("<image>\nWhat?\n\nIn one line.", "\n- a cup\n- a dog\n", "More?", "1\n2"),
    "Unicode": talk("<image>\nWas ist dás? 犬", "Ünïcode 🙂 and  two  spaces, é", "さて", "犬です。"),
    "words of the template": talk("<image>\nUSER: ASSISTANT: what?", "It says USER: and {text} {end}."),
    "cut in the second answer": talk("<image>\nWhat is this?", "A red cup.", "Tell more.", LONG),
    "cut in a question": talk("<image>\nWhat is this?", "A red cup.", LONG, "Yes."),
    "long, text alone": talk("Tell me.", LONG, "More?", LONG),
}
SINGLE = ["one turn", "picture last", "picture in the middle", "picture alone", "two pictures", "text alone"]
CAPTIONS = {
    **{name: said[:2] for name, said in MADE_UP.items() if name in SINGLE},
    "a number": talk("<image>\nHow many?", "2 cats"),
    "empty": talk("<image>", ""),
    "Unicode": talk("Beschreibe.\n<image>", "é, 🙂 und 犬です。"),
    "white space": talk("<image>", " A cup.\n\n"),
    "long": talk("<image>\nDescribe it.", LONG),
}


def made_up(profile: str) -> dict[str, list[tuple[str, str]]]:
    return CAPTIONS if profile.endswith("align") else MADE_UP


def encoder_of(profile: Profile | str, name: str) -> FrozenEncoder:
    known = profile if isinstance(profile, str) else profile.name
    encoder = make_encoder(model(name), known)
    assert isinstance(encoder, FrozenEncoder)
    return encoder if isinstance(profile, str) else replace(encoder, profile=profile)


def expected(encoder: FrozenEncoder, conversation: Conversation) -> tuple[list[int], list[bool], bool]:
    """Ids and labels by the rules, and whether they were cut."""
    tokenizer = encoder.processor.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokenize = partial(tokenizer.encode, add_special_tokens=False)
    ids, labels = RULES[encoder.name](tokenize, bos, conversation)
    picture = [tokenizer.convert_tokens_to_ids("<image>")] * (encoder.side // 14) ** 2
    limit = 4096 if encoder.name == "open-qwen2vl" else 2048
    full = len(ids) + ids.count(golden.HOLE) * (len(picture) - 1)
    return *golden.cut_twice(ids, labels, limit, picture), full > limit


def encode(encoder: FrozenEncoder, conversation: Conversation) -> Encoded:
    texts = [text for _, text in conversation]
    n_images = sum(text.count("<image>") for text in texts)
    return encoder.encode(make_sample(*texts, images=n_images), [PICTURE] * n_images)


def agree(encoder: FrozenEncoder, conversation: Conversation) -> bool:
    """Whether ids and labels are those of the rules."""
    found = encode(encoder, conversation)
    return (found.input_ids.tolist(), found.is_answer.tolist(), found.truncated) == expected(encoder, conversation)


# ---------------------------------------------------------------- ids and labels


@pytest.mark.parametrize(("profile", "name"), PAIRS)
def test_made_up_conversations_get_the_ids_and_labels_of_the_rules(profile: str, name: str) -> None:
    encoder = encoder_of(profile, name)
    wrong = [title for title, conversation in made_up(profile).items() if not agree(encoder, conversation)]
    assert wrong == []


@pytest.mark.parametrize(("profile", "name"), [("llava-1.5", "vicuna"), ("open-qwen2vl", "qwen")])
def test_pictures_of_the_published_size_fill_the_published_length(profile: str, name: str) -> None:
    encoder = encoder_of(profile, name)
    n_tokens = {"llava-1.5": 576, "open-qwen2vl": 729}[profile]
    for conversation in (MADE_UP["one turn"], MADE_UP["cut in the second answer"], MADE_UP["cut in a question"]):
        assert agree(encoder, conversation)
        assert encode(encoder, conversation).n_image_tokens == n_tokens


@pytest.mark.parametrize(("profile", "name"), [("llava-1.5", "small legacy"), ("open-qwen2vl", "small qwen")])
def test_lengths_one_below_at_and_above_the_limit_agree(profile: str, name: str) -> None:
    encoder = encoder_of(profile, name)
    length = len(encoder.encode(make_sample("<image>\nWhat?", "x"), [PICTURE]).input_ids)
    for more in range(encoder.max_length - length - 2, encoder.max_length - length + 3):
        assert agree(encoder, talk("<image>\nWhat?", "x" + "7" * more))


def test_a_picture_beyond_the_limit_is_refused_and_not_cut() -> None:
    encoder = encoder_of("llava-1.5", "vicuna")
    with pytest.raises(EncodingError, match="do not fit into --max-length 2048"):
        encoder.encode(make_sample("Tell me.", LONG[:6000], "<image>\nThis?", "A cup."), [PICTURE])


def real_samples(shared: Path) -> Iterator[tuple[str, Sample]]:
    files = ["mix.json", "mantis_chat/llava.json", "llava_bench_wild/llava.json", "celeba_dialog/llava.json"]
    for path in [*files, "formats/llava_instruct_100/llava_instruct_100.json", "formats/scienceqa_llava"]:
        found = sorted((shared / path).rglob("*.json")) if (shared / path).is_dir() else [shared / path]
        for file in found:
            if not file.is_file():
                continue
            dataset = open_dataset(file, shared)
            for row in range(0, len(dataset), max(1, len(dataset) // 25)):
                if isinstance(sample := dataset[row], Sample):
                    yield path, sample


@pytest.mark.parametrize(("profile", "name"), [("llava-1.5", "small legacy"), ("open-qwen2vl", "small qwen")])
def test_real_conversations_get_the_ids_and_labels_of_the_rules(profile: str, name: str, shared_data: Path) -> None:
    encoder, counted = encoder_of(profile, name), dict[str, int]()
    for path, sample in real_samples(shared_data):
        if all(not answer.strip() for answer in sample.answers):
            continue
        assert agree(encoder, [(turn.role, turn.text) for turn in sample.turns]), (path, sample.row)
        counted[path] = counted.get(path, 0) + 1
        counted["several turns"] = counted.get("several turns", 0) + (len(sample.answers) > 1)
        counted["several pictures"] = counted.get("several pictures", 0) + (len(sample.images) > 1)
    assert counted["mix.json"] > 20
    assert counted["several turns"] > 20
    assert counted["several pictures"] > 20


def test_real_captions_get_the_ids_and_labels_of_the_rules(shared_data: Path) -> None:
    encoder = encoder_of("llava-1.5-align", "small legacy")
    dataset = open_dataset(shared_data / "flickr8k/llava_align.json", shared_data)
    for row in range(0, len(dataset), len(dataset) // 40):
        sample = dataset[row]
        assert isinstance(sample, Sample)
        assert agree(encoder, [(turn.role, turn.text) for turn in sample.turns])


@pytest.mark.parametrize("name", ["small legacy", "small always"])
def test_labels_are_those_that_llavas_counting_of_rounds_gives(name: str) -> None:
    """Where its counts do not add up LLaVA ignores the whole row; visgain keeps it, labelled like any other."""
    encoder = encoder_of("llava-1.5", name)
    tokenizer = encoder.processor.tokenizer
    mismatched = []
    for title, conversation in MADE_UP.items():
        encoded = encode(replace(encoder, max_length=1 << 20), conversation)
        counted = golden.v1_as_llava_counts(
            partial(tokenizer.encode, add_special_tokens=False), [tokenizer.bos_token_id], conversation
        )
        if counted is None:
            mismatched.append(title)
        else:
            assert (encoded.token_id == [i for i, label in zip(*counted, strict=True) if label]).all(), title
    assert mismatched == ["an empty answer at the end", "an empty question", "words of the template"]


# ---------------------------------------------------------------- what a change would do


def changed(name: str, **changes: Any) -> Any:
    said = (f"{field} {getattr(value, '__name__', value)!r}" for field, value in changes.items())
    return pytest.param(replace(PROFILES.get(name), **changes), id=f"{name}: {', '.join(said)}")


def swapped(name: str, field: str, old: str, new: str) -> Any:
    text = getattr(PROFILES.get(name), field)
    assert old in text
    return changed(name, **{field: text.replace(old, new, 1)})


ALTERED = [
    swapped("llava-1.5", "system", "curious user", "curious human"),
    swapped("llava-1.5", "system", "questions. ", "questions."),
    swapped("llava-1.5", "user", "USER: ", "USER:"),
    swapped("llava-1.5", "user", " ASSISTANT:", "\nASSISTANT:"),
    swapped("llava-1.5", "user", "ASSISTANT:", "ASSISTANT: "),
    swapped("llava-1.5", "answer", " {text}", "{text}"),
    swapped("llava-1.5", "answer", "{end}", ""),
    swapped("llava-1.5", "answer", "{end}", "{end} "),
    swapped("llava-1.5", "answer", "{end}", "\n{end}"),
    changed("llava-1.5", empty_answer=None),
    changed("llava-1.5", empty_user=None),
    changed("llava-1.5", user_text=str.strip),
    changed("llava-1.5", user_text=profiles.as_it_is),
    changed("llava-1.5", answer_text=str.strip),
    changed("llava-1.5", turn_by_turn=True),
    swapped("llava-1.5-align", "answer", "\n", ""),
    swapped("llava-1.5-align", "answer", "\n", "{end}"),
    swapped("llava-1.5-align", "answer", "{text}", " {text}"),
    changed("llava-1.5-align", user_text=images_first),
    changed("llava-1.5-align", answer_text=str.strip),
    changed("llava-1.5-align", system=" "),
    swapped("open-qwen2vl", "system", "helpful assistant.", "helpful assistant"),
    swapped("open-qwen2vl", "system", "<|im_end|>\n", "<|im_end|>"),
    swapped("open-qwen2vl", "user", "<|im_end|>assistant", "<|im_end|>\nassistant"),
    swapped("open-qwen2vl", "user", "<|im_end|>assistant", "<|im_end|>\n<|im_start|>assistant"),
    swapped("open-qwen2vl", "user", "assistant\n", "assistant"),
    swapped("open-qwen2vl", "answer", "<|im_end|>\n", "<|im_end|>"),
    swapped("open-qwen2vl", "answer", "<|im_end|>\n", "{end}"),
    changed("open-qwen2vl", empty_answer="<|im_end|>\n"),
    changed("open-qwen2vl", user_text=images_first),
    changed("open-qwen2vl", user_text=profiles.as_it_is),
    changed("open-qwen2vl", answer_text=profiles.as_it_is),
]


@pytest.mark.parametrize("profile", ALTERED)
def test_a_template_that_is_altered_does_not_agree_with_the_rules(profile: Profile) -> None:
    encoder = encoder_of(profile, "small qwen" if profile.name == "open-qwen2vl" else "small first")
    assert not all(agree(encoder, conversation) for conversation in made_up(profile.name).values())


def moved(start: int, stop: int, covers: Callable[..., Any]) -> Callable[..., Any]:
    """Labels that begin or end some characters off."""

    def off(answer: Any, offsets: np.ndarray) -> np.ndarray:
        return covers(replace(answer, start=answer.start + start, stop=answer.stop + stop), offsets)

    return off


OFF = [  # what stands before or behind a label, if anything does
    *(("llava-1.5", start, stop) for start, stop in [(-3, 0), (2, 0), (0, -4), (0, 3)]),
    *(("llava-1.5-align", start, stop) for start, stop in [(-3, 0), (2, 0), (0, -1)]),
    *(("open-qwen2vl", start, stop) for start, stop in [(2, 0), (0, -1), (0, -12)]),
]


@pytest.mark.parametrize(("profile", "start", "stop"), OFF)
def test_labels_that_are_off_do_not_agree_with_the_rules(
    profile: str, start: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(profile, "small qwen" if profile == "open-qwen2vl" else "small first")
    conversations = [made_up(profile)[title] for title in ("one turn", "a number", "Unicode")]
    assert all(agree(encoder, conversation) for conversation in conversations)
    monkeypatch.setattr(frozen.Answer, "covers", moved(start, stop, frozen.Answer.covers))
    assert not all(agree(encoder, conversation) for conversation in conversations)


# ---------------------------------------------------------------- characters


@pytest.mark.parametrize(("profile", "name"), PAIRS)
def test_character_spans_tile_each_answer(profile: str, name: str) -> None:
    encoder = encoder_of(profile, name)
    for title, conversation in made_up(profile).items():
        encoded = encode(encoder, conversation)
        for number, (_, answer) in enumerate(conversation[1::2] if not encoded.truncated else []):
            spans = encoded.chars[encoded.turn == number]
            words = spans[spans[:, 1] > spans[:, 0]].tolist()
            kept = answer.strip() if profile == "open-qwen2vl" else answer
            covered = {place for start, stop in words for place in range(start, stop)}
            first = answer.index(kept)
            assert covered >= set(range(first, first + len(kept))), title
            assert covered <= set(range(len(answer))), title
            assert (np.diff(spans[:, 0]) >= 0).all(), title
            ends = spans[len(words) :]
            assert (ends == len(answer)).all(), title
            n_ends = {"llava-1.5": bool(answer), "llava-1.5-align": 1 + (not answer), "open-qwen2vl": 2 + (not kept)}
            assert len(ends) == n_ends[profile], title


# ---------------------------------------------------------------- names and refusals


def test_every_profile_is_frozen_and_has_rules_to_agree_with() -> None:
    assert set(PROFILES.names()) == set(RULES)
    assert template_names() == ["auto", "chat", *PROFILES.names()]
    with pytest.raises(FrozenInstanceError):
        PROFILES.get("llava-1.5").system = ""  # type: ignore[misc]


@pytest.mark.parametrize("name", ["llava-1.5", "llava-1.5-align"])
def test_sharegpt4v_is_llava_under_another_name(name: str) -> None:
    other = name.replace("llava-1.5", "sharegpt4v")
    assert replace(PROFILES.get(other), name=name) == PROFILES.get(name)
    assert make_encoder(model("vicuna"), other).name == other


def test_a_profiles_length_holds_unless_the_user_says_another() -> None:
    assert make_encoder(model("qwen"), "open-qwen2vl").max_length == 4096
    assert make_encoder(model("vicuna"), "sharegpt4v").max_length == 2048
    assert make_encoder(model("qwen"), "open-qwen2vl", 300).max_length == 300
    assert make_encoder(model("vicuna")).max_length == 2048


def test_the_table_in_the_docs_names_every_profile_and_its_length() -> None:
    rows = [line.split("|")[2:-1] for line in (Path(__file__).parents[1] / "docs/profiles.md").read_text().splitlines()]
    [names] = [row for row in rows if row and "`llava-1.5`" in row[0]]
    [lengths] = [row for row in rows if row and row[0].strip() == "2048"]
    listed = {
        name.strip(" `"): int(length) for group, length in zip(names, lengths, strict=True) for name in group.split(",")
    }
    assert listed == {name: PROFILES.get(name).max_length for name in PROFILES.names()}


def test_an_unknown_template_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match=r"unknown --template 'llava1.5': did you mean 'llava-1.5'\?"):
        find_profile("llava1.5")


MINE = replace(PROFILES.get("llava-1.5"), name="mine", system="Look. ")


def test_a_plug_in_adds_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str) -> list[EntryPoint]:
        points = [EntryPoint("mine", f"{__name__}:MINE", "visgain.templates")]
        return [point for point in points if point.group == group]

    monkeypatch.setattr(visgain.registry, "entry_points", entry_points)
    assert "mine" in template_names()
    encoded = make_encoder(model("vicuna"), "mine").encode(make_sample("<image>\nWhat?", "A cup."), [PICTURE])
    assert model("vicuna").tokenizer.decode(encoded.input_ids).startswith("<s> Look. USER:")


def test_a_profile_of_another_models_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"has no <\|im_start\|>, which --template open-qwen2vl writes"):
        make_encoder(model("vicuna"), "open-qwen2vl")


def test_a_profile_is_refused_for_a_model_that_takes_a_picture_in_tiles(llava_next: VLM) -> None:
    with pytest.raises(ModelError, match="LlavaNextProcessor is not LLaVA's, so --template sharegpt4v"):
        make_encoder(llava_next, "sharegpt4v")


def test_a_caption_template_refuses_a_conversation() -> None:
    with pytest.raises(EncodingError, match=r"--template llava-1\.5-align takes 1 answer; this sample has 2"):
        encoder_of("llava-1.5-align", "small first").encode(make_sample("<image>", "A.", "And?", "B."), [PICTURE])


def test_an_answer_that_would_be_taken_for_a_picture_is_refused() -> None:
    with pytest.raises(EncodingError, match="turn 1 contains '<image>'"):
        encoder_of("llava-1.5", "small first").encode(make_sample("<image>\nWhat?", "An <image>."), [PICTURE])


@pytest.mark.parametrize(("profile", "name"), [("llava-1.5", "small legacy"), ("open-qwen2vl", "small qwen")])
def test_a_prompt_is_what_stands_before_the_answer(profile: str, name: str) -> None:
    encoder = encoder_of(profile, name)
    sample = make_sample("<image>\nWhat?", "A cup.", "And?", "A dog.")
    prompt = encoder.prompt(sample.turns[:3], [PICTURE])
    encoded = encoder.encode(sample, [PICTURE])
    last = int(np.flatnonzero(encoded.is_answer)[encoded.turn == 1][0])
    assert prompt.input_ids.tolist() == encoded.input_ids[:last].tolist()
    assert not prompt.is_answer.any()
