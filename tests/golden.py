"""Published recipes once more, from their rules (docs/profiles.md) and in the plainest way, for golden tests.

Nothing here comes from visgain. A conversation is a list of (role, text); `tokenize` gives the ids of a text without
any special token in front. Where labels stand is found by tokenising the text so far, where visgain uses offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Conversation = Sequence[tuple[str, str]]
Tokenize = Callable[[str], list[int]]

MARK = "<image>"
HOLE = -200  # stands for a picture before it is expanded

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def in_pieces(tokenize: Tokenize, text: str) -> list[int]:
    """Ids of a text that is tokenised anew before and behind each picture."""
    first, *rest = text.split(MARK)
    ids = tokenize(first)
    for piece in rest:
        ids = [*ids, HOLE, *tokenize(piece)]
    return ids


def cut_twice(ids: list[int], labels: list[bool], limit: int, picture: list[int]) -> tuple[list[int], list[bool]]:
    """Cut, put the pictures in, cut again."""
    ids, labels = ids[:limit], labels[:limit]
    full_ids: list[int] = []
    full_labels: list[bool] = []
    for token, label in zip(ids, labels, strict=True):
        full_ids += picture if token == HOLE else [token]
        full_labels += [False] * len(picture) if token == HOLE else [label]
    return full_ids[:limit], full_labels[:limit]


# ---------------------------------------------------------------- LLaVA-1.5, tuning


def v1_question(text: str) -> str:
    if MARK in text:
        words = "".join(text.split(MARK)).strip()
        text = (text.count(MARK) * (MARK + "\n") + words).strip()
    return "USER: " + text + " ASSISTANT:" if text else "USER:ASSISTANT:"


def v1_line(conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The line, and from where to where in it answers are supervised."""
    line, spans = VICUNA_SYSTEM + " ", []
    for role, text in conversation:
        if role == "user":
            line += v1_question(text)
        elif text:
            spans.append((len(line), len(line) + len(" " + text + "</s>")))
            line += " " + text + "</s>"
    return line, spans


def v1(tokenize: Tokenize, bos: list[int], conversation: Conversation) -> tuple[list[int], list[bool]]:
    line, spans = v1_line(conversation)
    ids = bos + in_pieces(tokenize, line)
    labels = [False] * len(ids)
    for start, stop in spans:
        before, after = (bos + in_pieces(tokenize, line[:end]) for end in (start, stop))
        assert ids[: len(before)] == before
        assert ids[: len(after)] == after
        labels[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, labels


def v1_as_llava_counts(
    tokenize: Tokenize, bos: list[int], conversation: Conversation
) -> tuple[list[int], list[bool]] | None:
    """LLaVA's own way to the labels: lengths of rounds that are tokenised apart. None where its lengths do not add up.

    Exact for tokenizers that mark the beginning of every piece, special tokens or not, as LLaVA counts on.
    """
    line, _ = v1_line(conversation)
    ids = bos + in_pieces(tokenize, line)
    labels = [False] * len(ids)
    position = 1
    for part in line.split("</s>"):
        question, *answers = part.split(" ASSISTANT: ")
        if not part or len(answers) != 1:
            break
        n_round = len(bos + in_pieces(tokenize, part))  # its BOS makes up for the end token that the split took
        n_question = len(bos + in_pieces(tokenize, question + " ASSISTANT: ")) - 2  # without BOS and the last space
        labels[position + n_question : position + n_round] = [True] * (n_round - n_question)
        position += n_round
    return (ids, labels[: len(ids)]) if position == len(ids) else None


# ---------------------------------------------------------------- LLaVA-1.5, pre-training


def plain(tokenize: Tokenize, bos: list[int], conversation: Conversation) -> tuple[list[int], list[bool]]:
    (_, question), (_, caption) = conversation
    words = tokenize(caption + "\n")
    before = bos + [HOLE] * question.count(MARK)
    return before + words, [False] * len(before) + [True] * len(words)


# ---------------------------------------------------------------- Open-Qwen2VL


def open_qwen2vl(tokenize: Tokenize, bos: list[int], conversation: Conversation) -> tuple[list[int], list[bool]]:
    ids, labels = list(bos), [False] * len(bos)
    for number, (role, text) in enumerate(conversation):
        if role == "user":
            system = "" if number else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            turn = in_pieces(tokenize, system + "<|im_start|>user\n" + text.strip() + "<|im_end|>assistant\n")
        else:
            turn = in_pieces(tokenize, (text.strip() or " ") + "<|im_end|>\n")
        ids += turn
        labels += [role == "assistant"] * len(turn)
    return ids, labels
