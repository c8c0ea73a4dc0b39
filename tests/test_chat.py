"""Chat templates as they are found: what they take, refuse, rewrite and leave out, on a tiny LLaVA-NeXT."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import processors
from transformers import ProcessorMixin

from tiny_models import CHATML, make_sample
from visgain.errors import EncodingError, ModelError
from visgain.types import Encoded, Turn
from visgain.vlm.chat import ChatTemplate
from visgain.vlm.encode import ChatEncoder, processed, token_spans
from visgain.vlm.load import VLM
from visgain.vlm.template import make_encoder

TALK = ("<image>\nWhat is this?", "A red cup.", "Is there a dog?", "No, there is a cup.")
PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))

# ---------------------------------------------------------------- templates in the manner of well known ones

ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
)
TEMPLATES = {
    # text alone, as most tokenizers' templates: joined, filtered, printed
    "text, joined": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "text, stripped": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content.strip() }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "text, printed": (
        "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT: {% else %}"
        "{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    # parts, but no word of pictures
    "parts of text": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # roles must alternate; strips; a default system prompt; the number of messages in front
    "alternating": ALTERNATING
    + (
        "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "default system": "<|im_start|>system\nYou are helpful.<|im_end|>\n" + CHATML,
    "rewriting": CHATML.replace("<|im_start|>{{", "{{ messages | length }}<|im_start|>{{"),
    "end at the end": CHATML.replace("<|im_end|>\n{% endfor %}", "{{ '\n' }}{% endfor %}<|im_end|>"),
    "end at the end alone": CHATML.replace("<|im_end|>\n{% endfor %}", "{% endfor %}<|im_end|>"),
    "a long end": CHATML.replace("<|im_end|>\n{% endfor %}", "{% endfor %}" + "<|im_end|>" * 5),
    "next speaker ends": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    ),
    "a space before the answer": (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %} {% endfor %}"
    ),
}
ENDS = {
    "text, printed": "<|im_end|>",
    "end at the end": "\n",
    "end at the end alone": "",
    "a long end": "",
    "next speaker ends": "",
    "a space before the answer": "<|im_end|>",
}

# Qwen3's: reasoning is written in the last answer, empty if there is none, and dropped from those before.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% else %}{% set content = message['content'][0]['text'] %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def templated(llava_next: VLM) -> Iterator[Callable[[Any], ChatEncoder]]:
    """An encoder for any chat template."""

    def make(template: Any) -> ChatEncoder:
        llava_next.processor.chat_template = template
        encoder = make_encoder(llava_next)
        assert isinstance(encoder, ChatEncoder)
        return encoder

    yield make
    llava_next.processor.chat_template = CHATML
    llava_next.tokenizer.chat_template = None


def supervised(encoder: ChatEncoder, encoded: Encoded) -> list[str]:
    """The supervised text of each answer."""
    decode = encoder.processor.tokenizer.decode
    return [decode(encoded.token_id[encoded.turn == turn]) for turn in range(int(encoded.turn.max()) + 1)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_found_whatever_the_template_does_around_them(
    name: str, templated: Callable[[Any], ChatEncoder]
) -> None:
    encoder = templated(TEMPLATES[name])
    sample = make_sample(*TALK, "And?", "user", "Who?", "user")
    encoded = encoder.encode(sample, [PICTURE])
    ends = [ENDS.get(name, "<|im_end|>\n")] * len(sample.answers)
    ends[-1] += "<|im_end|>" * {"end at the end": 1, "end at the end alone": 1, "a long end": 5}.get(name, 0)
    expected = [answer + end for answer, end in zip(sample.answers, ends, strict=True)]
    assert [text.removeprefix(" ") for text in supervised(encoder, encoded)] == expected
    assert encoded.n_image_tokens > 5
    for number, answer in enumerate(sample.answers):
        spans = encoded.chars[encoded.turn == number]
        assert spans[0].tolist()[0] == 0
        assert spans[spans[:, 1] > spans[:, 0]][-1][1] == len(answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_an_answer(name: str, templated: Callable[[Any], ChatEncoder]) -> None:
    encoder = templated(TEMPLATES[name])
    if "add_generation_prompt" not in TEMPLATES[name] or name == "rewriting":
        pytest.skip("nothing to compare with")
    sample = make_sample(*TALK)
    encoded, prompt = encoder.encode(sample, [PICTURE]), encoder.prompt(sample.turns[:3], [PICTURE])
    first = int(np.flatnonzero(encoded.is_answer)[encoded.turn.tolist().index(1)])
    if not name.startswith(("end at the end", "a long end")):
        assert prompt.input_ids.tolist() == encoded.input_ids[:first].tolist()


# ---------------------------------------------------------------- odd answers

ODD = {
    "spaces around": ("<image>\nWhat?", "  A red cup. ", "And?", "No."),
    "line breaks around": ("<image>\nWhat?", "\nA red cup.\n\n", "And?", "\tNo.\n"),
    "two spaces inside": ("<image>\nWhat?", "A  red   cup.", "And?", "1  2"),
    "unicode": ("<image>\nWhat?", "Ünïcode 🙂 中文 e\u0301", "And?", "🙂"),
    "the same twice": ("<image>\nassistant", "assistant", "assistant", "assistant"),
    "empty in the middle": ("<image>\nWhat?", "", "And?", "No."),
    "empty at the end": ("<image>\nWhat?", "A cup.", "And?", ""),
    "a picture in the second turn": ("Hello", "Hi.", "<image>And this?", "A cup."),
    "braces": ("<image>\n{{ question }} {% if %}", "{{ answer }} {% raw %}", "And?", "No."),
}


@pytest.mark.parametrize("template", ["text, joined", "text, stripped", "parts of text", "alternating", "rewriting"])
@pytest.mark.parametrize("name", ODD)
def test_odd_answers_are_found_as_the_template_writes_them(
    name: str, template: str, templated: Callable[[Any], ChatEncoder]
) -> None:
    encoder, sample = templated(TEMPLATES[template]), make_sample(*ODD[name])
    strips = "strip" in TEMPLATES[template] or "trim" in TEMPLATES[template]
    encoded = encoder.encode(sample, [PICTURE])
    written = [answer.strip() if strips else answer for answer in sample.answers]
    assert supervised(encoder, encoded) == [text + "<|im_end|>\n" for text in written]
    for number, answer in enumerate(sample.answers):
        spans = encoded.chars[encoded.turn == number].tolist()
        lead = len(answer) - len(answer.lstrip()) if strips else 0
        if answer:
            assert spans[0][0] == lead
        assert spans[-1] == [len(answer), len(answer)] or strips


@settings(deadline=None, max_examples=60)
@given(
    answers=st.lists(st.text("ab .\n<>|e\u0301🙂{}%", max_size=12), min_size=1, max_size=3),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_any_answers_stand_where_the_template_is_said_to_have_written_them(answers: list[str], name: str) -> None:
    template = ChatTemplate(owner="it", source=TEMPLATES[name], special={"bos_token": "<s>"}, image_token="<image>")
    turns = [turn for answer in answers for turn in (Turn(role="user", text="q"), Turn(role="assistant", text=answer))]
    text, found = template.write(turns)
    for place, answer, after in zip(found, answers, [*found[1:], None], strict=True):
        written = text[place.start : place.stop]
        assert written.strip().startswith(answer.strip())
        assert text[place.first :].startswith(answer) or written.startswith(answer.strip())
        assert after is None or place.stop <= after.start


def test_a_conversation_that_goes_on_after_the_last_answer_supervises_that_alone(
    templated: Callable[[Any], ChatEncoder],
) -> None:
    encoder = templated(TEMPLATES["text, joined"])
    encoded = encoder.encode(make_sample(*TALK, "And then?"), [PICTURE])
    assert supervised(encoder, encoded) == ["A red cup.<|im_end|>\n", "No, there is a cup.<|im_end|>\n"]


# ---------------------------------------------------------------- reasoning


def test_an_empty_thought_that_the_template_writes_is_no_part_of_an_answer(
    templated: Callable[[Any], ChatEncoder],
) -> None:
    encoder = templated(THINKING)
    encoded = encoder.encode(make_sample(*TALK), [PICTURE])
    assert supervised(encoder, encoded) == ["A red cup.<|im_end|>\n", "No, there is a cup.<|im_end|>\n"]
    assert encoder.processor.tokenizer.decode(encoded.input_ids).count("<think>") == 1


def test_a_thought_is_supervised_where_the_template_keeps_it(templated: Callable[[Any], ChatEncoder]) -> None:
    encoder = templated(THINKING)
    thinking = "<think>\nIt is red.\n</think>\n\nA red cup."
    sample = make_sample("<image>\nWhat?", thinking, "And?", thinking)
    encoded = encoder.encode(sample, [PICTURE])
    assert supervised(encoder, encoded) == ["A red cup.<|im_end|>\n", thinking + "<|im_end|>\n"]
    starts = [encoded.chars[encoded.turn == turn][0, 0] for turn in (0, 1)]
    assert starts == [len(thinking) - len("A red cup."), 0]


@pytest.mark.parametrize(
    "change",
    [
        "part['text'] | upper",
        "part['text'].replace('red', 'r')",
        "part['text'][:-1]",
        "''",
        "part['text'] | length ~ part['text'][-3:]",
    ],
)
def test_a_template_that_changes_an_answer_is_an_error_and_no_guess(
    change: str, templated: Callable[[Any], ChatEncoder]
) -> None:
    changed = f"{{{{ ({change}) if part['text'] not in ('question', 'reply', 'What?') else part['text'] }}}}"
    encoder = templated(CHATML.replace("{{ part['text'] }}", changed))
    with pytest.raises(EncodingError, match="changed an answer"):
        encoder.encode(make_sample("<image>\nWhat?", "A red cup"), [PICTURE])


# ---------------------------------------------------------------- refusals


def test_what_a_template_refuses_is_the_rows_reason_in_its_own_words(templated: Callable[[Any], ChatEncoder]) -> None:
    encoder = templated(TEMPLATES["alternating"])
    for texts in (
        [Turn(role="assistant", text="Hi."), *make_sample(*TALK).turns],
        [*make_sample(*TALK).turns, Turn(role="assistant", text="Twice.")],
    ):
        sample = make_sample(*TALK)
        object.__setattr__(sample, "turns", tuple(texts))
        with pytest.raises(EncodingError, match="refuses this conversation: Conversation roles must alternate"):
            encoder.encode(sample, [PICTURE])
    with pytest.raises(EncodingError, match="must alternate"):
        encoder.prompt([Turn(role="assistant", text="Hi.")], [])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('A system message is needed') }}", "A system message is needed"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] }}", "does not write a question about a picture with its answer"),
        ("{% for m in messages %}{{ m.content[0].words }}{% endfor %}", "does not write a question"),
    ],
)
def test_a_template_that_no_conversation_suits_is_told_at_once(
    template: str, reason: str, templated: Callable[[Any], ChatEncoder]
) -> None:
    with pytest.raises(ModelError, match=reason):
        templated(template)


def test_of_several_templates_the_default_is_taken(templated: Callable[[Any], ChatEncoder]) -> None:
    encoder = templated({"tool_use": "{{ tools }}", "default": CHATML})
    assert encoder.encode(make_sample(*TALK), [PICTURE]).n_image_tokens
    with pytest.raises(ModelError, match="several chat templates, none called `default`: rag, tool_use"):
        templated({"rag": CHATML, "tool_use": CHATML})


def test_a_tokenizers_template_serves_where_the_processor_has_none(
    llava_next: VLM, templated: Callable[[Any], ChatEncoder]
) -> None:
    llava_next.tokenizer.chat_template = TEMPLATES["text, joined"]
    encoded = templated(None).encode(make_sample(*TALK), [PICTURE])
    assert encoded.n_image_tokens


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_picture_token_in_the_words_of_a_row_is_no_picture(
    where: int, templated: Callable[[Any], ChatEncoder]
) -> None:
    texts = ["What?", "A cup.", "And?", "No."]
    texts[where] += "<image>" if where == 1 else ""
    sample = make_sample(*texts, images=0)
    encoder = templated(CHATML)
    if where == 1:
        with pytest.raises(EncodingError, match=r"turn 1 contains '<image>', which this model takes for a picture"):
            encoder.encode(sample, [])
    else:
        assert encoder.encode(sample, []).n_image_tokens == 0


def test_more_marks_than_pictures_are_the_rows_reason(templated: Callable[[Any], ChatEncoder]) -> None:
    with pytest.raises(
        EncodingError,
        match=r"LlavaNextProcessor does not take this row: .*(2 <image> tokens|more marks than its 1 pictures)",
    ):
        templated(CHATML).encode(make_sample("<image><image>What?", "A cup."), [PICTURE])


# ---------------------------------------------------------------- tokenizers and processors


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_that_a_tokenizer_trims_from_its_offsets_are_supervised(
    trim: bool, llava_next: VLM, templated: Callable[[Any], ChatEncoder]
) -> None:
    backend = llava_next.tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    try:
        sample = make_sample("<image>\nWhat?", "A  red   cup ", "And?", "  x = 1  2")
        encoder = templated(CHATML)
        encoded = encoder.encode(sample, [PICTURE])
        assert supervised(encoder, encoded) == [answer + "<|im_end|>\n" for answer in sample.answers]
        for number, answer in enumerate(sample.answers):
            spans = encoded.chars[encoded.turn == number].tolist()
            assert spans[0][0] == 0
            assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
            assert spans[-1] == [len(answer)] * 2
    finally:
        backend.post_processor = before


def test_only_spaces_are_given_back_and_only_once() -> None:
    text = "ab  c\n d"
    trimmed = [(0, 0), (0, 2), (3, 3), (4, 5), (7, 8), (0, 0)]
    assert token_spans(trimmed, text).tolist() == [[0, 0], [0, 2], [2, 3], [3, 5], [7, 8], [0, 0]]


class Nested(ProcessorMixin):
    """A processor that takes pictures as one list a text."""

    def __init__(self) -> None:
        pass

    def __call__(self, text: Sequence[str], images: Sequence[Any], **_: Any) -> dict[str, Any]:
        if len(images) != len(text) or not isinstance(images[0], list):
            raise ValueError("as many lists of pictures as texts\nand more words")
        if len(images[0]) > 2:
            raise ValueError("two pictures at most")
        return {"input_ids": [1], "attention_mask": [1], "n": len(images[0])}


def test_pictures_are_given_as_a_processor_takes_them() -> None:
    assert processed(Nested(), "x", [PICTURE, PICTURE]) == {"input_ids": [1], "n": 2}
    with pytest.raises(
        EncodingError, match=re.escape("Nested does not take this row: as many lists of pictures as texts")
    ):
        processed(Nested(), "x", [PICTURE] * 3)


class Starved(ProcessorMixin):
    """A processor that runs out of pictures, in the manner of transformers 5.17."""

    def __init__(self) -> None:
        pass

    def __call__(self, **_: Any) -> dict[str, Any]:
        raise StopIteration


def test_a_processor_that_runs_out_of_pictures_says_so() -> None:
    with pytest.raises(EncodingError, match="Starved does not take this row: its text has more marks than its 2 pict"):
        processed(Starved(), "x", [PICTURE, PICTURE])
