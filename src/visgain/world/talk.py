"""Talk about a scene, and know which words need the picture.

A reply is written with its visual words in square brackets: "The cup is [red]." A word is visual when its distribution,
given the question and the reply so far, changes with the picture. Replies are phrased so that this is exact: a caption
starts with the number of objects, so that where it ends is settled by a word already said; sizes stand before colours,
so that "a" never becomes "an"; after "Yes" or "No" the rest follows. In a conversation no question touches a kind that
was mentioned before, so that an earlier turn hardly ever gives a word away; where it does, the word is not marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from visgain.world.scene import COLOURS, COMPANION, HORIZONTAL, KINDS, MAX_OBJECTS, USUAL_COLOUR, VERTICAL, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
PLURAL = {kind: f"{kind}s" for kind in KINDS} | {"fish": "fish", "leaf": "leaves"}

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question and its reply.

    `visual` holds the [start, end) characters of the words that need the picture; `key` is what a grader looks for in a
    reply ("" where there is nothing); `topic` names the kind of question; `mentions` the kinds of object it touches.
    """

    topic: str
    question: str
    answer: str
    visual: tuple[Span, ...] = ()
    key: str = ""
    mentions: frozenset[str] = field(default_factory=frozenset)


def exchange(topic: str, question: str, marked: str, key: str = "", mentions: Iterable[str] = ()) -> Exchange:
    """An Exchange from a reply with its visual words in square brackets."""
    text, spans, start = "", [], 0
    for character in marked:
        if character == "[":
            start = len(text)
        elif character == "]":
            spans.append((start, len(text)))
        else:
            text += character
    return Exchange(
        topic=topic, question=question, answer=text, visual=tuple(spans), key=key, mentions=frozenset(mentions)
    )


def _pick(rng: np.random.Generator, *options: str) -> str:
    return options[int(rng.integers(len(options)))]


def _one(rng: np.random.Generator, things: list[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


# ---------------------------------------------------------------- about the picture


def caption(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    question = _pick(rng, "Describe the picture.", "What do you see?", "Write a caption for this picture.")
    number = len(scene.things)
    places = _marked_places([thing.cell for thing in scene.things])
    parts = [f"a [{t.size}] [{t.colour}] [{t.kind}] in the {p}" for t, p in zip(scene.things, places, strict=True)]
    listed = parts[0] if number == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    noun = "object" if number == 1 else "objects"
    return exchange("caption", question, f"[{NUMBERS[number].capitalize()}] {noun}: {listed}.", mentions=KINDS)


def _marked_places(cells: list[int]) -> list[str]:
    """Places of a caption's objects; a word is left unmarked where the reading order allows only one.

    With `n` objects in reading order, the i-th stands after the one before and leaves room for those to come.
    """
    marked, first = [], 0
    for i, cell in enumerate(cells):
        possible = range(first, 9 - (len(cells) - 1 - i))
        rows = {other // 3 for other in possible}
        columns = {other % 3 for other in possible if other // 3 == cell // 3}
        vertical, horizontal = VERTICAL[cell // 3], HORIZONTAL[cell % 3]
        marked.append(
            (f"[{vertical}]" if len(rows) > 1 else vertical)
            + " "
            + (f"[{horizontal}]" if len(columns) > 1 else horizontal)
        )
        first = cell + 1
    return marked


def colour(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange | None:
    if not scene.unique:
        return None
    thing = _one(rng, scene.unique)
    question = _pick(rng, f"What colour is the {thing.kind}?", f"Which colour does the {thing.kind} have?")
    return exchange("colour", question, f"The {thing.kind} is [{thing.colour}].", thing.colour, [thing.kind])


def size(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange | None:
    if not scene.unique:
        return None
    thing = _one(rng, scene.unique)
    question = _pick(rng, f"Is the {thing.kind} small or large?", f"How big is the {thing.kind}?")
    return exchange("size", question, f"The {thing.kind} is [{thing.size}].", thing.size, [thing.kind])


def place(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange | None:
    if not scene.unique:
        return None
    thing = _one(rng, scene.unique)
    question = _pick(rng, f"Where is the {thing.kind}?", f"In which place do you see the {thing.kind}?")
    return exchange("place", question, f"The {thing.kind} is in the [{thing.place}].", thing.place, [thing.kind])


def content(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    thing = _one(rng, list(scene.things))
    question = _pick(rng, f"What is in the {thing.place}?", f"Which object do you see in the {thing.place}?")
    reply = f"There is a [{thing.size}] [{thing.colour}] [{thing.kind}]."
    return exchange("content", question, reply, thing.kind, [thing.kind])


def count(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    present = rng.random() < 0.75
    kind = _one(rng, list(scene.things)).kind if present else str(rng.choice(KINDS))
    question = _pick(rng, f"How many {PLURAL[kind]} are there?", f"Count the {PLURAL[kind]}.")
    number = NUMBERS[scene.count(kind)]
    return exchange("count", question, f"I count [{number}].", number, [kind])


def existence(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    """Half yes, half no without bias; with it, mostly about the companion of something present, as people ask."""
    kind = _asked_kind(rng, scene, bias)
    question = _pick(rng, f"Is there a {kind} in the picture?", f"Do you see a {kind}?")
    if scene.count(kind):
        return exchange("existence", question, f"[Yes], there is a {kind}.", "yes", [kind])
    return exchange("existence", question, f"[No], there is no {kind}.", "no", [kind])


def _asked_kind(rng: np.random.Generator, scene: Scene, bias: float) -> str:
    companions = sorted({COMPANION[kind] for kind in scene.kinds})
    if bias > 0 and rng.random() < bias:
        return str(rng.choice(companions))
    if rng.random() < 0.5:
        return str(rng.choice(sorted(scene.kinds)))
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    expected = [kind for kind in companions if kind in absent]
    return str(rng.choice(expected if bias < 0 and expected else absent))


def relation(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange | None:
    pairs = [(a, b) for a in scene.unique for b in scene.unique if a.kind != b.kind]
    return _relation(rng, *pairs[int(rng.integers(len(pairs)))]) if pairs else None


def _relation(rng: np.random.Generator, one: Thing, other: Thing, sideways: bool = False) -> Exchange:
    sideways = sideways or (one.column != other.column and (one.row == other.row or rng.random() < 0.5))
    if sideways:
        words, said = "to the left or to the right", "left" if one.column < other.column else "right"
        question = f"Is the {one.kind} {words} of the {other.kind}?"
        reply = f"The {one.kind} is to the [{said}] of the {other.kind}."
    else:
        said = "above" if one.row < other.row else "below"
        question = f"Is the {one.kind} above or below the {other.kind}?"
        reply = f"The {one.kind} is [{said}] the {other.kind}."
    return exchange("relation", question, reply, said, [one.kind, other.kind])


def relations(rng: np.random.Generator, scene: Scene) -> list[Exchange]:
    """How every two objects stand to each other."""
    return _in_any_order(rng, list(itertools.combinations(scene.unique, 2)), sideways=False)


def far_relations(rng: np.random.Generator, scene: Scene) -> list[Exchange]:
    """Left or right, of every object in the left column and every one in the right."""
    pairs = [(a, b) for a, b in itertools.combinations(scene.unique, 2) if abs(a.column - b.column) == 2]
    return _in_any_order(rng, pairs, sideways=True)


def _in_any_order(rng: np.random.Generator, pairs: list[tuple[Thing, Thing]], *, sideways: bool) -> list[Exchange]:
    drawn = [[pairs[i][k] for k in rng.permutation(2)] for i in rng.permutation(len(pairs))]
    return [_relation(rng, one, other, sideways=sideways) for one, other in drawn]


def notes(rng: np.random.Generator, scene: Scene) -> list[Exchange]:
    """What there is, the kind first and in any order: the plainest way of asking for what belongs to a kind.

    To find an object by the word just before is learned much sooner than to find it by a word in a question. Where the
    list ends depends on the picture, so its words are not marked.
    """
    if not scene.unique:
        return []
    things = [scene.unique[i] for i in rng.permutation(len(scene.unique))]
    question = _pick(rng, "Take notes.", "List what you see.", "Note the objects.")
    listed = "; ".join(f"{t.kind} {t.colour} {t.size} {t.place}" for t in things)
    return [exchange("notes", question, f"{listed}.", mentions=KINDS)]


# ---------------------------------------------------------------- answered from the text alone


def usual_colour(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    kind = str(rng.choice(KINDS))
    question = _pick(rng, f"What colour does a {kind} usually have?", f"What is the usual colour of a {kind}?")
    usual = USUAL_COLOUR[kind]
    return exchange("usual colour", question, f"A {kind} is usually {usual}.", usual, [kind])


def companion(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    kind = str(rng.choice(KINDS))
    other = COMPANION[kind]
    question = _pick(rng, f"What is often found beside a {kind}?", f"What goes well with a {kind}?")
    return exchange("companion", question, f"A {kind} is often found beside a {other}.", other, [kind, other])


def arithmetic(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    a, b = (int(x) for x in rng.choice(5, size=2, replace=False))
    question = f"Which is more, {NUMBERS[a]} or {NUMBERS[b]}?"
    return exchange("arithmetic", question, f"{NUMBERS[max(a, b)].capitalize()} is more than {NUMBERS[min(a, b)]}.")


def named_colour(rng: np.random.Generator, scene: Scene, bias: float) -> Exchange:
    one, other = (str(x) for x in rng.choice(COLOURS, size=2, replace=False))
    return exchange("named colour", f"Name a colour that is not {one}.", f"One such colour is {other}.")


Speaker = Callable[[np.random.Generator, Scene, float], Exchange | None]
Lister = Callable[[np.random.Generator, Scene], list[Exchange]]
"""All that it has to say of a scene, which may be nothing."""

VISUAL: tuple[Speaker, ...] = (colour, size, place, content, count, existence, relation)
COMMON_SENSE: tuple[Speaker, ...] = (usual_colour, companion)
TEXT_ONLY: tuple[Speaker, ...] = (usual_colour, companion, arithmetic, named_colour)


def conversation(
    rng: np.random.Generator, scene: Scene, bias: float, speakers: Iterable[Speaker], turns: int
) -> list[Exchange]:
    """Up to `turns` exchanges (at least one) whose object kinds do not overlap (see the module's description)."""
    options = list(speakers)
    said: list[Exchange] = []
    mentioned: set[str] = set()
    for _ in range(50):
        if len(said) == turns:
            break
        candidate = options[int(rng.integers(len(options)))](rng, scene, bias)
        if candidate is not None and not (candidate.mentions & mentioned):
            said.append(_without_settled(candidate, said, scene))
            mentioned |= candidate.mentions
    # Counting can be asked of any scene, so a scene where nothing else fits still gets its question.
    return said or [count(rng, scene, bias)]


def _without_settled(candidate: Exchange, said: list[Exchange], scene: Scene) -> Exchange:
    """`candidate` without marks on the words that the turns before settle.

    There are two such cases: those turns account for as many objects as a picture can hold, so that there is none of
    another kind; and they name two of the three places of a row, so that an object in that row is in the third.
    """
    if candidate.topic in ("existence", "count") and sum(_accounted(turn, scene) for turn in said) == MAX_OBJECTS:
        return replace(candidate, visual=())
    if candidate.topic == "place":
        vertical = candidate.key.partition(" ")[0]
        taken = {t.place for t in scene.things for turn in said if t.place in turn.question + turn.answer}
        if sum(place.startswith(vertical) for place in taken) == 2:
            start, _ = candidate.visual[0]
            return replace(candidate, visual=((start, start + len(vertical)),))
    return candidate


def _accounted(turn: Exchange, scene: Scene) -> int:
    """How many objects one knows of after a turn about the picture: all of a kind that was counted, else one each."""
    if turn.topic == "count":
        return sum(scene.count(kind) for kind in turn.mentions)
    return len(turn.mentions & scene.kinds)
