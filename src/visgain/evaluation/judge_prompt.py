"""A user's own text for a judge, in place of ours: placeholders with names, and nothing else is special.

    system: You grade answers.
    Question: {question}
    Reference: {reference}
    Answer: {answer}

A first line that starts with `system:` is the system message. `{{` and `}}` stand for braces where a word in braces is
meant as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from visgain.errors import ConfigError
from visgain.registry import suggest

NEEDED = ("question", "answer")
"""Without these a judge cannot tell one request from another."""

_SYSTEM = "system:"
_PLACE = re.compile(r"\{\{|\}\}|\{(\w*)\}")


def read_prompt(path: Path) -> str:
    """The text of a --judge-prompt file. Raises ConfigError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --judge-prompt {path}: {getattr(error, 'strerror', None) or error}") from None
    return text.replace("\r\n", "\n")


def filled(prompt: str, fields: Mapping[str, str]) -> tuple[str, str]:
    """The system message, which may be empty, and the user's message. Raises ConfigError: what is wrong in `prompt`.

    fields: what each placeholder stands for; what they bring along is not looked into again.
    """
    used = {match[1] for match in _PLACE.finditer(prompt) if match[1] is not None}
    for name in sorted(used - set(fields)):
        hint = suggest(name, fields) if name else f"write one of {_list(fields)}"
        raise ConfigError(f"--judge-prompt has {{{name}}}, which stands for nothing here; {hint}")
    missing = [name for name in NEEDED if name not in used]
    if missing:
        raise ConfigError(f"--judge-prompt has no {_list(missing)}; it may use {_list(fields)}")

    def value(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else fields[match[1]]

    first, _, rest = prompt.partition("\n")
    if first.lower().startswith(_SYSTEM):
        return _PLACE.sub(value, first[len(_SYSTEM) :]).strip(), _PLACE.sub(value, rest)
    return "", _PLACE.sub(value, prompt)


def _list(names: Mapping[str, str] | list[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
