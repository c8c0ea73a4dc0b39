"""Which option of a multiple-choice question a reply chooses, as the implementations in circulation read it.

Each takes the reply and the options (letter -> text) and returns a letter, which need not be one of the options, or
None where it finds none. None of the two that look for words accepts a letter in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

Options = Mapping[str, str]
Matcher = Callable[[str, Options], str | None]

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_FORMS = ("_.", "_,", "_:", "_)", "_).", "(_)", "(_).", ":_", ":_,", ":_.", ":_)", ":_).")
_FIRST_LETTER = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)


def cambrian(reply: str, options: Options, *, strip: str = ".") -> str | None:
    """The first character after the last "answer is" or "answer:", without a bracket before it.

    strip: marks that do not count at the end of the reply; `.:,` for Omni3D, which shows in nothing but odd replies.
    """
    text = reply.lower().strip()
    for lead in ("answer is", "answer is:", "answer:"):
        text = text.split(lead)[-1]
    text = text.strip().rstrip(strip).lstrip("(").rstrip(")")
    return text[:1].upper() or None


def lmms_first_letter(reply: str, options: Options) -> str | None:
    """The letter that the reply begins with, so T for "The answer is B"."""
    found = _FIRST_LETTER.match(reply)
    return found[1].upper() if found else None


def mmbench_2023(reply: str, options: Options) -> str | None:
    """MMBench's first step as it was published: one letter of A to E that stands alone, else one option's text.

    A letter may have marks around it, in one of a few fixed forms. "A" in more than three words may be an article.
    """
    if _NO_ANSWER not in reply:
        words = reply.split()
        alone = [letter for letter in "ABCDE" if letter in words]
        if len(alone) == 1 and not ("A" in words and len(words) > 3):
            return alone[0]
        for form in _FORMS:
            marked = [letter for letter in "ABCDE" if form.replace("_", letter) in words]
            if len(marked) == 1:
                return marked[0]
    return _only(letter for letter, text in options.items() if text.lower() in reply.lower())


def vlmevalkit(reply: str, options: Options) -> str | None:
    """VLMEvalKit's present rule: the only letter of an option among the words, if near the end, else one option's text.

    Marks do not count, a long reply's text does not either, and Z stands for a refusal.
    """
    if _NO_ANSWER not in reply:
        if any(refusal in reply for refusal in _REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return "Z"
    if len(reply) > 2 * sum(len(text) for text in options.values()):
        return None
    return _only(letter for letter, text in options.items() if text.lower() in reply.lower())


def _only(letters: Iterable[str]) -> str | None:
    found = list(letters)
    return found[0] if len(found) == 1 else None
