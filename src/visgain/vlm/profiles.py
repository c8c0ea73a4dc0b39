r"""Published training recipes, frozen: how a conversation is written, which of it carries loss, how pictures enter.

A profile repairs what a chat template cannot do: text around pictures tokenised in separate pieces, an end of turn that
carries loss, a picture padded to a square. Each is one value, tested token by token and label by label against its
rules; docs/profiles.md has them in a table, with the sources. `--template NAME` takes one, plug-ins add more through
the entry point group `visgain.templates`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from visgain.errors import UnknownName
from visgain.registry import Registry, suggest
from visgain.types import IMAGE_MARK

CHAT_TEMPLATES = ("auto", "chat")
"""The values of --template that are no profile: the processor's own chat template, if it can, and at any rate."""

CHAT_LENGTH = 2048
"""The default of --max-length where no profile is used."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One recipe. `{text}` stands for a turn's text, `{end}` for the tokenizer's end-of-sequence token.

    Everything that `answer` writes carries loss and nothing else does. A token belongs to it if any of its characters
    does.
    """

    name: str
    system: str
    """Stands before the first turn, behind BOS where the tokenizer has one."""
    user: str
    answer: str
    empty_user: str | None = None
    """Stands for a turn without text, where the recipe's code writes something else there."""
    empty_answer: str | None = None
    user_text: Callable[[str], str]
    """What becomes of a user's text before it is written."""
    answer_text: Callable[[str], str]
    """The same of an answer's: as it is, or without the white space around it."""
    turn_by_turn: bool = False
    """Whether each turn is tokenised by itself, or the conversation in one go. Around pictures text is always cut."""
    most_answers: int | None = None
    special_tokens: tuple[str, ...] = ()
    """What it writes that the tokenizer must know as single tokens."""
    pictures: Literal["pad", "crop", "squash"]
    """To the square that the vision tower takes: in the middle of a larger one; short side and centre; out of shape."""
    max_length: int
    """Tokens, pictures included. The recipes cut before and after the pictures are expanded, which is one cut after."""

    def __post_init__(self) -> None:
        if self.answer.count("{text}") != 1 or "{end}" in self.answer.partition("{text}")[0]:
            raise ValueError(f"profile {self.name}: an answer is written with one {{text}}, and {{end}} after it")


# ---------------------------------------------------------------- what becomes of a turn's text


def images_first(text: str) -> str:
    """A user turn with its image marks moved to the front, each on a line of its own; as it is if it has none."""
    marks = text.count(IMAGE_MARK)
    return (f"{IMAGE_MARK}\n" * marks + text.replace(IMAGE_MARK, "").strip()).strip() if marks else text


def images_only(text: str) -> str:
    """The image marks of a user turn, without its words."""
    return IMAGE_MARK * text.count(IMAGE_MARK)


def as_it_is(text: str) -> str:
    return text


# ---------------------------------------------------------------- the recipes

LLAVA_1_5 = Profile(
    name="llava-1.5",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user="USER: {text} ASSISTANT:",
    answer=" {text}{end}",
    empty_user="USER:ASSISTANT:",
    empty_answer="",
    user_text=images_first,
    answer_text=as_it_is,
    pictures="pad",
    max_length=2048,
)
"""The tuning stage of LLaVA-1.5, template "v1". Nothing is written, and nothing supervised, for an empty answer."""

LLAVA_1_5_CHAT = (
    "{{ bos_token if bos_token else '' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    "{% else %}" + LLAVA_1_5.system + "{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ASSISTANT:' }}{% else %}{% generation %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
"""The same as a chat template, for tools that know no profiles; it marks what is generated."""

CHAT_FORMS = {LLAVA_1_5_CHAT: LLAVA_1_5.name}
"""Chat templates that stand for a profile: `auto` takes the profile, which is exact where a chat template cannot be."""

LLAVA_1_5_ALIGN = Profile(
    name="llava-1.5-align",
    system="",
    user="{text}",
    answer="{text}\n",
    user_text=images_only,
    answer_text=as_it_is,
    most_answers=1,
    pictures="crop",
    max_length=2048,
)
"""The pre-training stage of LLaVA-1.5, template "plain": the picture, its caption and a line break."""

SHAREGPT4V = replace(LLAVA_1_5, name="sharegpt4v")
"""ShareGPT4V tunes as LLaVA-1.5 does; other data, other parts trained (recipes), the same tokens and labels."""

SHAREGPT4V_ALIGN = replace(LLAVA_1_5_ALIGN, name="sharegpt4v-align")

OPEN_QWEN2VL = Profile(
    name="open-qwen2vl",
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    # Without a line break or another <|im_start|> before the role: so it was trained.
    user="<|im_start|>user\n{text}<|im_end|>assistant\n",
    answer="{text}<|im_end|>\n",
    empty_answer=" <|im_end|>\n",
    user_text=str.strip,
    answer_text=str.strip,
    turn_by_turn=True,
    special_tokens=("<|im_start|>", "<|im_end|>"),
    pictures="squash",
    max_length=4096,
)
"""The tuning stage of Open-Qwen2VL; with its SigLIP-384 in patches of 14 a picture is 729 tokens."""

PROFILES: Registry[Profile] = Registry(
    "template",
    {profile.name: profile for profile in (LLAVA_1_5, LLAVA_1_5_ALIGN, SHAREGPT4V, SHAREGPT4V_ALIGN, OPEN_QWEN2VL)},
)


def template_names() -> list[str]:
    """Every value of --template."""
    return [*CHAT_TEMPLATES, *PROFILES.names()]


def find_profile(template: str) -> Profile | None:
    """The profile called `template`; None for those that use the chat template. Raises UnknownName."""
    if template in CHAT_TEMPLATES:
        return None
    if template not in PROFILES.names():
        raise UnknownName(f"unknown --template {template!r}: {suggest(template, template_names())}")
    return PROFILES.get(template)
