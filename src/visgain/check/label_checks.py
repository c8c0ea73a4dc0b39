"""What can be wrong between a dataset and a model: the template, the labels, the pictures' tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from visgain.check.data_checks import MANY, reasons
from visgain.check.findings import Finding, count, listed, share, shortened, some
from visgain.check.reading import Read, Reading, Supervised
from visgain.types import IMAGE_MARK

MARK = re.compile(r"<[|｜][^<>]{1,40}[|｜]>|</?[A-Za-z][A-Za-z0-9_]{0,30}>")
"""What special tokens look like in nearly every template. Brackets as in [INST] are plain text to some models."""

LEAVE_THEM = "mend them in the dataset, or leave them: they are listed in skipped.jsonl and nothing takes their place"
ITS_OWN = "use the chat template and the processor that came with the model, or name another --template"

LARGE = 4_000_000
"""Pixels of a picture beyond which decoding costs more than most models look at."""


# ---------------------------------------------------------------- the template


def template_fails(facts: Reading) -> Finding | None:
    """The template, the processor or the tokenizer raises something."""
    crashed = [read for read in facts.rows if read.crash]
    told = crashed[0].crash if crashed else facts.probe.crash
    if not told:
        return None
    where = share(len(crashed), len(facts.rows)) + " sampled rows" if crashed else "a plain test conversation"
    return Finding(
        check="template-fails",
        severity="error" if crashed else "warning",
        what=f"the model's template or processor fails on {where}",
        seen=shortened(told, 200),
        rows=some(read.sample.row for read in crashed),
        mend=ITS_OWN,
    )


def foreign_template(facts: Reading) -> Finding | None:
    """Special strings that are none to this tokenizer."""
    unknown = [mark for mark in marks(facts.probe.text) if not _is_token(facts, mark)]
    unknown += [mark for mark in marks(facts.probe.own_text) if not _is_token(facts, mark)] if _is_chat(facts) else []
    if not unknown:
        return None
    sizes = [f"{mark} ({len(_ids(facts, mark))} tokens)" for mark in dict.fromkeys(unknown)]
    return Finding(
        check="foreign-template",
        severity="error",
        what=f"the template {facts.encoder.name} writes special tokens that this tokenizer does not have: "
        "it was made for another model",
        seen=listed(sizes, 5),
        mend=ITS_OWN,
    )


def other_than_own(facts: Reading) -> Finding | None:
    """The model was given a template on the command line and was trained on another one."""
    own = [mark for mark in marks(facts.probe.own_text) if _is_token(facts, mark)]
    own = [mark for mark in own if mark not in _roles(facts)]
    if _is_chat(facts) or not own or not facts.probe.text or any(mark in facts.probe.text for mark in own):
        return None
    return Finding(
        check="other-template",
        severity="warning",
        what=f"the model's own chat template writes {listed(list(dict.fromkeys(own)), 4)}; {facts.encoder.name} "
        "writes none of that",
        mend="--template chat, unless the model was trained on the other one",
    )


def no_end_of_turn(facts: Reading) -> Finding | None:
    """A model that is never shown where an answer ends does not learn to end it."""
    ends = facts.probe.ends
    if not ends or any(end.strip() for end in ends) or (facts.encoder.name.endswith("-align") and any(ends)):
        return None
    return Finding(
        check="no-end-of-turn",
        severity="warning",
        what="no end-of-turn is supervised: a model trained so would not learn to stop",
        seen=f"behind an answer the template {facts.encoder.name} supervises {ends[0]!r}",
        mend="--template llava-1.5 for a LLaVA; else put the template's end token inside its {% generation %} marks",
    )


def other_end_of_turn(facts: Reading) -> Finding | None:
    """The supervised end is a token at which generation would not stop."""
    read = next((read for read in facts.readable if read.runs and read.runs[0].found), None)
    stops = _stop_ids(facts)
    if read is None or read.whole is None or not stops or not read.runs[0].after.strip():
        return None
    run = read.runs[0]
    last = read.whole.input_ids[run.start : run.stop].tolist()[-len(_ids(facts, run.after)) :]
    if set(last) & stops:
        return None
    return Finding(
        check="other-end-of-turn",
        severity="warning",
        what=f"answers end with {run.after!r}, at which the model's own generation does not stop",
        seen=f"generation stops at {listed([facts.tokenizer.decode([stop]) for stop in sorted(stops)])}",
        rows=(read.sample.row,),
        mend="use the template that came with the model; or set eos_token_id in generation_config.json after training",
    )


def doubled_bos(facts: Reading) -> Finding | None:
    """BOS twice in front shifts everything that the model was trained on."""
    bos = facts.tokenizer.bos_token_id
    rows = [read.sample.row for read in facts.readable if read.whole is not None and _leading(facts, read, bos) > 1]
    if rows:
        return Finding(
            check="doubled-bos",
            severity="error",
            what=f"BOS stands twice in front of {share(len(rows), len(facts.readable))} sampled rows",
            seen=shortened(facts.tokenizer.bos_token * 2 + " ..."),
            rows=some(rows),
            mend="take the BOS out of the chat template, or stop the tokenizer from adding one (add_bos_token: false)",
        )
    if not facts.probe.adds_bos:
        return None
    return Finding(
        check="doubled-bos",
        severity="warning",
        what="the chat template writes BOS and the tokenizer adds one more; visgain leaves it out, others may not",
        seen=shortened(facts.tokenizer.bos_token * 2 + " ..."),
        mend="a trainer that tokenises the template's text itself must do so with add_special_tokens=False",
    )


def unknown_words(facts: Reading) -> Finding | None:
    """Text that the tokenizer cannot write."""
    unk = facts.tokenizer.unk_token_id
    if unk is None or unk in (facts.tokenizer.eos_token_id, facts.tokenizer.bos_token_id, facts.tokenizer.pad_token_id):
        return None
    rows = [read.sample.row for read in facts.readable if read.whole is not None and unk in read.whole.token_id]
    if not rows:
        return None
    return Finding(
        check="unknown-words",
        severity="warning",
        what=f"{share(len(rows), len(facts.readable))} sampled rows have answers that the tokenizer cannot write",
        seen=f"{facts.tokenizer.unk_token} among the labels",
        rows=some(rows),
        mend="is this the tokenizer of this model, and the language that it was made for?",
    )


# ---------------------------------------------------------------- labels


def supervised_prompt(facts: Reading) -> Finding | None:
    """Labels on text that the model is asked, not answers."""
    wrong = [(read, run) for read in facts.readable for run in read.runs if _reaches_out(facts, run)]
    if not wrong:
        return None
    read, run = wrong[0]
    rows = {read.sample.row for read, _ in wrong}
    reached = run.before if _words(facts, run.before) else run.after
    return Finding(
        check="supervised-prompt",
        severity="error",
        what=f"labels cover text outside the answers in {share(len(rows), len(facts.readable))} sampled rows",
        seen=f"{shortened(reached)!r} is supervised in row {read.sample.row}",
        rows=some(rows),
        mend="put {% generation %} and {% endgeneration %} around the assistant's text and its end token alone, "
        "or name another --template",
    )


def unsupervised_answer(facts: Reading) -> Finding | None:
    """Answers without labels."""
    lossy = facts.tokenizer.unk_token_id
    rows = {
        read.sample.row
        for read in facts.readable
        if read.whole is not None
        and lossy not in read.whole.token_id
        and len(answered(read)) < sum(bool(answer.strip()) for answer in read.sample.answers)
    }
    rows -= {read.sample.row for read in facts.readable if any(_reaches_out(facts, run) for run in read.runs)}
    if not rows:
        return None
    read = next(read for read in facts.readable if read.sample.row in rows)
    text = next((run.before for run in read.runs if not run.found), "")
    return Finding(
        check="unsupervised-answer",
        severity="error",
        what=f"{share(len(rows), len(facts.readable))} sampled rows have answers that the labels do not say",
        seen=f"labels say {shortened(text)!r}, row {read.sample.row} {shortened(read.sample.answers[0])!r}",
        rows=some(rows),
        mend="the template or the tokenizer changes answers: compare the conversations above, try another --template",
    )


def answered(read: Read) -> list[Supervised]:
    """Runs of labels that hold an answer with something in it, blanks and letters' forms apart."""

    def plain(text: str) -> str:
        return "".join(text.casefold().split())

    return [
        run
        for run in read.runs
        if run.answer is not None and run.answer.strip() and (run.found or plain(run.answer) in plain(run.before))
    ]


def no_labels(facts: Reading) -> Finding | None:
    """Rows that would give no gradient at all."""
    rows = [
        read.sample.row
        for read in facts.rows
        if read.whole is not None and not read.whole.is_answer[1 : facts.max_length].any()
    ]
    if not rows:
        return None
    return Finding(
        check="no-labels",
        severity="error" if len(rows) >= MANY * len(facts.rows) else "warning",
        what=f"{share(len(rows), len(facts.rows))} sampled rows have no label within --max-length "
        f"{facts.max_length} and will be skipped",
        rows=some(rows),
        mend=f"--max-length {enough(facts)} fits every sampled row",
    )


# ---------------------------------------------------------------- pictures


def no_image_tokens(facts: Reading) -> Finding | None:
    """Pictures whose place in the text the template does not write."""
    seeing = [read for read in facts.readable if read.sample.images and read.whole is not None]
    rows = [read.sample.row for read in seeing if read.whole is not None and not facts.is_image(read.whole).any()]
    if not rows:
        return None
    token = facts.tokenizer.decode([facts.vlm.image_token_id])
    return Finding(
        check="no-image-tokens",
        severity="error",
        what=f"{share(len(rows), len(seeing))} sampled rows with a picture have no image token: it would not be seen",
        seen=f"the template {facts.encoder.name} writes no {token}, which is this model's image token",
        rows=some(rows),
        mend=ITS_OWN,
    )


def cut_image(facts: Reading) -> Finding | None:
    """A picture's tokens do not all fit."""
    seeing = [read for read in facts.readable if read.sample.images and read.whole is not None]
    short = [read for read in seeing if _image_end(facts, read) > facts.max_length]
    partial = [
        read
        for read in seeing
        if read.whole is not None
        and read.cut is not None
        and facts.is_image(read.cut).sum() < facts.is_image(read.whole).sum()
    ]
    if not short and not partial:
        return None
    worst = max(short or partial, key=lambda read: _image_end(facts, read))
    many = len(short) >= MANY / 5 * len(seeing) or bool(partial)
    tokens = 0 if worst.whole is None else int(facts.is_image(worst.whole).sum())
    return Finding(
        check="cut-image",
        severity="error" if many else "warning",
        what=f"{share(len(short or partial), len(seeing))} sampled rows lose image tokens at --max-length "
        f"{facts.max_length}" + (" and are scored with a part of it" if partial else " and will be skipped"),
        seen=f"row {worst.sample.row} has {count(tokens, 'image token')}, the last at {_image_end(facts, worst):,}",
        rows=some(read.sample.row for read in short or partial),
        mend=f"--max-length {enough(facts)} fits every sampled row",
    )


def cut_answers(facts: Reading) -> Finding | None:
    """Answers that go on beyond the limit."""
    long = [read for read in facts.readable if read.whole is not None and len(read.whole.input_ids) > facts.max_length]
    total = sum(len(read.whole.turn) for read in facts.readable if read.whole is not None)
    lost = sum(int(read.whole.is_answer[facts.max_length :].sum()) for read in long if read.whole is not None)
    if not long or lost == 0:
        return None
    return Finding(
        check="cut-answers",
        severity="warning",
        what=f"{share(len(long), len(facts.readable))} sampled rows are longer than --max-length {facts.max_length}; "
        f"{share(lost, total)} of their answers' tokens are cut off",
        seen=f"the longest has {max(len(read.whole.input_ids) for read in long if read.whole is not None):,} tokens",
        rows=some(read.sample.row for read in long),
        mend=f"--max-length {enough(facts)} fits every sampled row",
    )


def cropped_pictures(facts: Reading) -> Finding | None:
    """Pictures whose edges the model never sees, as when LLaVA's processor is left without do_pad."""
    sizes = [size for read in facts.rows for size in read.sizes]
    hidden = 1 - facts.probe.visible
    lost = [hidden / 0.5 * (1 - min(size) / max(size)) for size in sizes]  # the probe is twice as long as high
    mean = float(np.mean(lost)) if lost else 0.0
    if hidden < 0.1 or mean < 0.01:
        return None
    align = not _is_chat(facts)  # a recipe that crops, on purpose
    llava = hasattr(facts.vlm.processor, "patch_size")
    return Finding(
        check="cropped-pictures",
        severity="note" if align else "warning",
        what=f"the model never sees the edges of long pictures: {100 * mean:.0f} % of the sampled pictures' area is "
        f"cropped away, {100 * max(lost):.0f} % of the longest",
        seen="the image processor crops and does not pad (do_pad)",
        rows=some(read.sample.row for read in facts.rows if any(size[0] != size[1] for size in read.sizes)),
        mend=f"as the recipe {facts.encoder.name} does; tuning pads to a square: --template llava-1.5"
        if align
        else "--template llava-1.5 pads to a square as LLaVA-1.5 was tuned; for other programs set do_pad: true "
        "in the image processor's configuration"
        if llava
        else "if the model was trained on whole pictures, set do_pad: true or do_center_crop: false in its processor's "
        "configuration",
    )


def skipped_rows(facts: Reading) -> Finding | None:
    """Rows that the reader takes and the encoder or the decoder of pictures refuses."""
    told = [(read.sample.row, read.reason) for read in facts.rows if read.reason and read.whole is None]
    told = [(row, reason) for row, reason in told if row not in set(facts.scan.without_picture())]
    if not told:
        return None
    kinds = reasons(told)
    return Finding(
        check="skipped-rows",
        severity="error" if len(told) >= MANY * len(facts.rows) else "warning",
        what=f"{share(len(told), len(facts.rows))} sampled rows will be skipped when they are read",
        seen="; ".join(f"{text} ({len(rows):,})" for text, rows in kinds[:4]),
        rows=some(rows[0] for _, rows in kinds),
        mend=LEAVE_THEM if len(told) < len(facts.rows) else f"{ITS_OWN}; if that changes nothing, mend the dataset",
    )


def large_pictures(facts: Reading) -> Finding | None:
    """Pictures that take longer to decode than to look at."""
    pixels = [width * height for read in facts.rows for width, height in read.sizes]
    if not pixels or np.median(pixels) < LARGE:
        return None
    return Finding(
        check="large-pictures",
        severity="note",
        what=f"pictures are large: {np.median(pixels) / 1e6:.1f} megapixels in the middle, "
        f"{max(pixels) / 1e6:.1f} at most",
        mend="shrink them once, if the model's tokens do not grow with them; more --workers decode faster",
    )


CHECKS: list[Callable[[Reading], Finding | None]] = [
    template_fails,
    foreign_template,
    other_than_own,
    no_end_of_turn,
    other_end_of_turn,
    doubled_bos,
    supervised_prompt,
    unsupervised_answer,
    unknown_words,
    no_image_tokens,
    cut_image,
    no_labels,
    cut_answers,
    cropped_pictures,
    skipped_rows,
    large_pictures,
]


# ---------------------------------------------------------------- what they share


def marks(text: str) -> list[str]:
    """What looks like a special token in `text`, each once; not the place of a picture in a dataset's own texts."""
    return [mark for mark in dict.fromkeys(MARK.findall(text)) if mark != IMAGE_MARK]


def enough(facts: Reading) -> int:
    """The least --max-length that cuts no sampled row."""
    return max((len(read.whole.input_ids) for read in facts.readable if read.whole is not None), default=0)


def _ids(facts: Reading, text: str) -> list[int]:
    return list(facts.tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_token(facts: Reading, mark: str) -> bool:
    ids = _ids(facts, mark)
    return len(ids) == 1 and ids[0] != facts.tokenizer.unk_token_id


def _is_chat(facts: Reading) -> bool:
    return facts.encoder.name == "chat"


def _roles(facts: Reading) -> set[str]:
    """Marks that any template may leave out: the beginning, the end, padding."""
    return {str(mark) for mark in facts.tokenizer.special_tokens_map.values() if isinstance(mark, str)}


def _stop_ids(facts: Reading) -> set[int]:
    config = getattr(facts.vlm.model, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    stops = facts.tokenizer.eos_token_id if stops is None else stops
    return set(stops) if isinstance(stops, list) else set() if stops is None else {int(stops)}


def _leading(facts: Reading, read: Read, bos: int | None) -> int:
    """How many BOS a row begins with, blanks between them apart."""
    n = 0
    for token in [] if bos is None or read.whole is None else read.whole.input_ids[:8].tolist():
        if token == bos:
            n += 1
        elif facts.tokenizer.decode([token]).strip():
            break
    return n


def _words(facts: Reading, text: str) -> bool:
    """Whether there is more in `text` than special tokens, marks and blanks."""
    known = {*facts.tokenizer.all_special_tokens, *facts.tokenizer.get_added_vocab()}
    for mark in sorted(known, key=len, reverse=True):
        text = text.replace(mark, "")
    return any(sign.isalnum() for sign in MARK.sub("", text))


def _reaches_out(facts: Reading, run: Supervised) -> bool:
    """Whether a run of labels holds its answer and words that are not the answer's."""
    return run.found and ((run.n_before > 0 and _words(facts, run.before)) or _words(facts, run.after))


def _image_end(facts: Reading, read: Read) -> int:
    """The length at which the last image token fits; 0 without any."""
    where = np.flatnonzero(facts.is_image(read.whole)) if read.whole is not None else np.zeros(0)
    return int(where[-1]) + 1 if len(where) else 0
