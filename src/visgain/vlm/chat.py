"""How a chat template writes a conversation, and where in its text the answers stand.

Templates differ in what they take (parts or plain text), in what they do with an answer (strip it, drop its reasoning
once the talk has gone on), and in what they refuse. Nothing of that is looked up. What a template takes is tried once,
on a short conversation. Where the answers stand is told by its generation marks; a template without them writes the
conversation once more with a mark in each answer's place, and what is around the marks is the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from visgain.errors import EncodingError, ModelError
from visgain.types import IMAGE_MARK, Turn

Span = tuple[int, int]

_MASK = "\ue000\ue001\ue002"
"""Stands in an answer's place: characters that no tokenizer, and no text that is written by hand, has a use for."""

REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a template may raise for a conversation that it was not written for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer in the text of a conversation: characters [start, stop), end-of-turn included.

    `first` is where the answer's first character stands, or would if the template had not left it out.
    """

    start: int
    stop: int
    first: int


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A processor's chat template. `image_token` is what the processor takes for a picture in plain text."""

    owner: str  # whose it is, for messages
    source: str
    special: Mapping[str, Any]  # names of special tokens, as templates use them
    image_token: str

    @classmethod
    def of(cls, processor: ProcessorMixin, image_token_id: int) -> ChatTemplate | None:
        """The processor's, else its tokenizer's; None if neither has one.

        Raises ModelError if there are several, or if it writes no conversation.
        """
        name = type(processor).__name__
        known = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        if isinstance(known, dict):
            if "default" not in known:
                raise ModelError(f"{name} has several chat templates, none called `default`: {', '.join(known)}")
            known = known["default"]
        if not known:
            return None
        template = cls(
            owner=name,
            source=known,
            special=processor.tokenizer.special_tokens_map,
            image_token=token_text(getattr(processor, "image_token", None))
            or processor.tokenizer.convert_ids_to_tokens(image_token_id),
        )
        template.messages(())  # what it takes, it is asked here, before any row
        return template

    # ------------------------------------------------------------ writing

    def write(self, turns: Sequence[Turn]) -> tuple[str, list[Answer]]:
        """The conversation, and its answers in order. Raises EncodingError if the template refuses or changes it."""
        try:
            return self._marked(turns) if self.marks_generation else self._searched(turns)
        except REFUSALS as error:
            raise EncodingError(f"the chat template refuses this conversation: {_first_line(error)}") from error

    def write_prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation that the assistant is to go on. Raises EncodingError as `write` does."""
        try:
            return self._render(self.messages(turns), add_generation_prompt=True)
        except REFUSALS as error:
            raise EncodingError(f"the chat template refuses this conversation: {_first_line(error)}") from error

    def ends_turns(self) -> bool:
        """Whether an answer goes on after its text, that is, whether the end of the turn is supervised."""
        turns = (Turn(role="user", text="question"), Turn(role="assistant", text="probe"))
        text, [answer] = self.write(turns)
        return text[answer.first + len("probe") : answer.stop].strip() != ""

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template says itself which text the assistant generates."""
        return re.search(r"{%-?\s*generation\s*-?%}", self.source) is not None

    def _marked(self, turns: Sequence[Turn]) -> tuple[str, list[Answer]]:
        texts, [spans] = render_jinja_template(
            conversations=[self.messages(turns)],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.special,
        )
        text, answers = str(texts[0]), [turn.text for turn in turns if turn.role == "assistant"]
        if len(spans) != len(answers):
            raise EncodingError(f"the template marks {len(spans)} answers where the sample has {len(answers)}")
        found = []
        for number, ((start, stop), answer) in enumerate(zip(spans, answers, strict=True)):
            place = text.find(answer.strip(), start, stop)
            if place < 0:
                raise EncodingError(f"the template changed answer {number}, so its tokens cannot be located")
            found.append(Answer(start=start, stop=stop, first=place - _lead(answer)))
        return text, found

    def _searched(self, turns: Sequence[Turn]) -> tuple[str, list[Answer]]:
        """Without generation marks: an answer is where a mark comes out when it is put in the answer's place."""
        text = self._render(self.messages(turns))
        numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        answers = [turns[number].text for number in numbers]
        spans = self._all_at_once(text, turns, numbers) or [self._alone(text, turns, number) for number in numbers]
        # A space that ends a turn belongs to the next word, in most tokenizers.
        ending = self._ending(text, turns, numbers, spans).rstrip(" ")
        return text, [
            Answer(
                start=start,
                stop=stop + _common(text[stop:], ending),
                first=_first(answer, text[start:stop], start),
            )
            for answer, (start, stop) in zip(answers, spans, strict=True)
        ]

    def _all_at_once(self, text: str, turns: Sequence[Turn], numbers: Sequence[int]) -> list[Span] | None:
        """Spans of the answers; None if an answer's own text changes what the template writes around it."""
        pieces = self._around(turns, numbers)
        if len(pieces) != len(numbers) + 1 or not text.startswith(pieces[0]):
            return None
        position, spans = len(pieces[0]), []
        for number, after in zip(numbers, pieces[1:], strict=True):
            forms = (form for form in _forms(turns[number].text) if text.startswith(form + after, position))
            form = next(forms, None)
            if form is None:
                return None
            spans.append((position, position + len(form)))
            position += len(form) + len(after)
        return spans if position == len(text) else None

    def _alone(self, text: str, turns: Sequence[Turn], number: int) -> Span:
        """The span of one answer, all others being themselves: for templates that treat reasoning as such.

        What follows is the same with a mark, so the answer's end is known. A template may have left out what it begins
        with, but nothing else.
        """
        answer = turns[number].text
        before, *after = self._around(turns, [number])
        if len(after) == 1 and text.endswith(after[0]):
            stop = len(text) - len(after[0])
            form = next((form for form in _forms(answer) if text.endswith(form, 0, stop)), "")
            if form or not answer.strip():
                return stop - len(form), stop
            kept = text[len(before) : stop].strip()
            if text.startswith(before) and kept and answer.rstrip().endswith(kept):
                return text.index(kept, len(before)), stop
        raise EncodingError("the chat template changed an answer, so its tokens cannot be located")

    def _around(self, turns: Sequence[Turn], numbers: Sequence[int]) -> list[str]:
        """What the template writes around the turns `numbers`, in one piece more than there are turns."""
        masked = [Turn(role=turn.role, text=_MASK) if number in numbers else turn for number, turn in enumerate(turns)]
        return self._render(self.messages(masked)).split(_MASK)

    def _ending(self, text: str, turns: Sequence[Turn], numbers: Sequence[int], spans: Sequence[Span]) -> str:
        """What the template writes after the last answer of a conversation that ends with it."""
        if not numbers or numbers[-1] == len(turns) - 1:
            return text[spans[-1][1] :] if spans else ""
        return self._around(turns[: numbers[-1] + 1], numbers[-1:])[-1]

    # ------------------------------------------------------------ what the template takes

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Turns as this template takes them. Raises ModelError if it takes no style that we know."""
        return self._style(turns, self.image_token)

    @cached_property
    def _style(self) -> Style:
        """The first style in which a question, a picture and a reply all come out."""
        reply = Turn(role="assistant", text="reply")
        asked, shown = ([Turn(role="user", text=text), reply] for text in ("question", f"{IMAGE_MARK}\nquestion"))
        refusals = []
        for style in STYLES:
            try:
                without, text = (self._render(style(turns, self.image_token)) for turns in (asked, shown))
            except REFUSALS as error:
                refusals.append(_first_line(error))
                continue
            written = all(word in text for word in ("question", "reply"))
            if written and text != without and "'type'" not in text:  # a list printed as such
                return style
        said = f": {refusals[0]}" if refusals else ""
        raise ModelError(
            f"the chat template of {self.owner} does not write a question about a picture with its answer{said}; "
            "give another with --template"
        )

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            **self.special,
        )
        return str(texts[0])


# ---------------------------------------------------------------- messages


def chat_messages(turns: Sequence[Turn], image_token: str = "") -> list[dict[str, Any]]:
    """Turns as chat messages whose content is a list of image and text parts, in the order they stand in the text.

    The line break that LLaVA's data puts between an image mark and the text is the template's business: it is dropped.
    """
    return [{"role": turn.role, "content": list(_parts(turn))} for turn in turns]


def text_part_messages(turns: Sequence[Turn], image_token: str) -> list[dict[str, Any]]:
    """The same for a template that leaves pictures out: their tokens stand in the text."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in text_messages(turns, image_token)
    ]


def text_messages(turns: Sequence[Turn], image_token: str) -> list[dict[str, Any]]:
    """Turns whose content is text, pictures as their tokens."""
    return [
        {
            "role": turn.role,
            "content": turn.text.replace(IMAGE_MARK, image_token) if turn.role == "user" else turn.text,
        }
        for turn in turns
    ]


Style = Callable[[Sequence[Turn], str], list[dict[str, Any]]]
STYLES: tuple[Style, ...] = (chat_messages, text_part_messages, text_messages)


def _parts(turn: Turn) -> Iterator[dict[str, str]]:
    pieces = turn.text.split(IMAGE_MARK) if turn.role == "user" else [turn.text]
    for number, piece in enumerate(pieces):
        if number > 0:
            yield {"type": "image"}
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}


# ---------------------------------------------------------------- text


def token_text(token: Any) -> str | None:
    """A processor's token as text; processors hold some as AddedToken."""
    text = getattr(token, "content", token)
    return text if isinstance(text, str) else None


def _forms(answer: str) -> Iterator[str]:
    """How a template may write an answer: as it is, or without white space at its ends."""
    stripped = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
    yield from dict.fromkeys((*stripped, answer.strip("\n"), answer.lstrip("\n"), answer.rstrip("\n")))


def _first(answer: str, written: str, start: int) -> int:
    """Where `answer` begins if `written`, which is at `start`, is what a template left of it."""
    core = written.strip()
    return start + _lead(written) - answer.rfind(core) if core else start


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _lead(text: str) -> int:
    return len(text) - len(text.lstrip())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
