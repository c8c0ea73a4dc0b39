"""What sort of word a word is: by lists of English words, or by spaCy's part of speech.

The lists are short on purpose: they hold what captions and answers about pictures are full of. What none of them
holds is `other`, and a table says how much that is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from visgain.errors import ConfigError

Classify = Callable[[str], list[tuple[int, int, str]]]
"""Text -> (start, end, class) of its words."""

_LISTS = {
    "colour": """
        black white grey gray red orange yellow green blue purple pink brown violet golden gold silver beige tan
        maroon turquoise navy teal cream colorful colourful dark bright pale
    """,
    "number": """
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty hundred thousand first second third several many
        few couple pair both multiple single dozen
    """,
    "space": """
        left right top bottom middle center centre above below under over behind beside between near next inside
        outside front back background foreground upper lower corner side edge around across along against
        beneath underneath far close adjacent opposite up down away toward towards through
    """,
    "attribute": """
        small large big little tall short long wide narrow huge tiny old young new wooden metal plastic glass
        round square empty full open closed wet dry clean dirty striped plaid leather fluffy furry smooth rough
        thick thin heavy bare parked sunny cloudy snowy sandy grassy rocky busy crowded modern blurry shiny
    """,
    "action": """
        sitting standing walking running jumping riding holding playing wearing looking eating drinking smiling
        swimming climbing driving flying lying laying throwing catching kicking carrying watching talking
        reading cooking cutting hanging leaning posing skiing surfing skating sleeping
    """,
    "object": """
        man woman boy girl person people child children kid kids baby lady guy group crowd player dog cat horse
        cow sheep bird elephant bear zebra giraffe fish car truck bus train motorcycle bike bicycle boat plane
        airplane ship street road sidewalk building house window door wall fence bridge sign light pole tree
        trees grass field flower flowers plant leaf water ocean beach sand sky cloud clouds snow mountain hill
        rock rocks river lake pool table chair couch sofa bed desk bench shelf book books lamp clock cup glass
        bottle bowl plate fork knife spoon food pizza cake sandwich fruit apple banana orange carrot bread
        vegetable vegetables phone laptop computer keyboard mouse tv television camera umbrella bag backpack
        suitcase hat shirt jacket coat pants jeans shorts dress shoes helmet glasses sunglasses ball frisbee bat
        racket skateboard surfboard snowboard skis kite toy teddy kitchen bathroom bedroom room toilet sink
        mirror refrigerator oven stove microwave hand hands face head hair eyes mouth leg legs arm arms uniform
        park yard city floor vase box paper picture painting screen candle ring key drum star lock umbrella
    """,
    "yes/no": """yes no""",
    "function": """
        a an the this that these those and or but nor so yet of in on at to for from with by as is are was were
        be been being am do does did has have had will would can could may might shall should must not it
        its he she they them his her their him i you we me my your our us who whom which what when where why how
        there here if then than because while also just only very too more most some any each every all other
        another such same own into onto off out about after before during until since without within upon's s t
    """,
}
_CLASS = {word: name for name, text in reversed(list(_LISTS.items())) for word in text.split()}
"""The first list that holds a word wins: `orange` is a colour, `glass` an attribute."""

CLASSES = (*_LISTS, "other")

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def by_list(text: str) -> list[tuple[int, int, str]]:
    """Each word of `text` with its class; digits are numbers."""
    return [(*word.span(), class_of(word[0])) for word in _WORD.finditer(text)]


def class_of(word: str) -> str:
    word = word.lower()
    return "number" if word.isdigit() else _CLASS.get(word, "other")


def by_part_of_speech(model: str) -> Classify:
    """Universal parts of speech by spaCy's pipeline `model`, e.g. en_core_web_sm. Raises ConfigError without it."""
    try:
        import spacy

        pipeline = spacy.load(model)
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"parts of speech need spaCy and its pipeline {model} (pip install visgain[spacy]; "
            f"python -m spacy download {model}): {reason}"
        ) from error

    def classify(text: str) -> list[tuple[int, int, str]]:
        return [(token.idx, token.idx + len(token), token.pos_) for token in pipeline(text) if not token.is_space]

    return classify
