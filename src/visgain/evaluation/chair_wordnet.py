"""CHAIR's objects by NLTK's part of speech and WordNet's basic form, as OPERA, PAI and lmms-eval find them.

Needs nltk (`pip install visgain[chair]`) and its data. Verbs become objects here (seated -> seat -> chair), which is
part of the numbers published with it.
"""

from __future__ import annotations

from visgain.errors import ConfigError
from visgain.evaluation.chair_objects import objects_of

DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
_POS = {"J": "a", "V": "v", "N": "n", "R": "r"}
"""First letter of a tag -> WordNet's part of speech; anything else is taken for a noun."""


def tokens(caption: str) -> list[str]:
    """Words and marks in lower case, as NLTK divides them. Raises ConfigError without nltk or its data."""
    try:
        import nltk
    except ImportError as error:
        raise ConfigError(
            "the variant wordnet of chair needs nltk: pip install 'visgain[chair]'; the variant original needs nothing"
        ) from error
    try:
        return list(nltk.word_tokenize(caption.lower()))
    except LookupError as error:
        raise _no_data() from error


def objects(caption: str) -> list[str]:
    """The objects that a caption mentions, in order and with repetitions. Raises as `tokens`."""
    words = tokens(caption)
    import nltk
    from nltk.stem import WordNetLemmatizer

    lemmatizer = WordNetLemmatizer()
    try:
        tagged = nltk.pos_tag(words)
        return objects_of([lemmatizer.lemmatize(word, pos=_POS.get(tag[:1], "n")) for word, tag in tagged])
    except LookupError as error:
        raise _no_data() from error


def _no_data() -> ConfigError:
    return ConfigError(
        f"the variant wordnet of chair needs data of nltk that is not there: python -m nltk.downloader {' '.join(DATA)}"
    )
