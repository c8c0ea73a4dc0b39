"""CHAIR: which share of the objects in a caption is not in the picture? Rohrbach et al. 2018, arXiv 1809.02156.

Data: MSCOCO's annotation files, or a file of image id -> objects; see `chair_truth`. Scores depend on the pictures that
were drawn (LLaVA-1.5's C_S moves between 45 and 50), so compare on one list of ids only; a result names its list.

Two variants are in circulation, and no number means anything without its variant.

- original   words in the singular, by rule (`chair_objects`); the POPE paper's table
- wordnet    words in WordNet's basic form by part of speech (`chair_wordnet`, needs nltk); OPERA, PAI, most since 2024

C_S: share of captions with an object that is not there. C_I: share of such among all mentions of objects. Recall: share
of the pictures' objects that are mentioned. Length: tokens a caption. Reference captions are read like the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visgain.data.images import ImageFile
from visgain.evaluation import chair_objects, chair_wordnet
from visgain.evaluation.benchmark import Item, Question, Scored, mean, ratio
from visgain.evaluation.chair_truth import read_pictures
from visgain.evaluation.records import unique

PROMPT = "Please describe this image in detail."  # OPERA's and lmms-eval's


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A way to find objects in captions."""

    about: str
    objects: Callable[[str], list[str]]  # in order, with repetitions
    tokens: Callable[[str], list[str]]


READERS: Mapping[str, Reader] = {
    "original": Reader(
        about="words in the singular, by the rules of the first implementation",
        objects=chair_objects.objects,
        tokens=chair_objects.tokens,
    ),
    "wordnet": Reader(
        about="words in WordNet's basic form by part of speech (OPERA, PAI); needs nltk",
        objects=chair_wordnet.objects,
        tokens=chair_wordnet.tokens,
    ),
}


class Chair:
    name = "chair"
    source = "https://cocodataset.org (annotations_trainval2014.zip, val2014.zip)"
    variants: Mapping[str, str] = {name: reader.about for name, reader in READERS.items()}
    max_new_tokens = 512

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """A question a picture; see `chair_truth.read_pictures` for what `data` may be."""
        pictures, origin = read_pictures(data)
        root = image_root or (data.parent if data.is_file() else data)
        questions = [
            Question(
                id=str(picture.id),
                prompt=PROMPT,
                images=(ImageFile(root=root, path=picture.file),),
                facts={"objects": list(picture.objects), "captions": list(picture.captions), "origin": origin},
            )
            for picture in pictures
        ]
        return unique(questions, data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Raises ConfigError if the variant needs what is not installed."""
        reader = READERS[variant]
        mentions, absent, right, there, lengths = [], [], [], [], []
        for item in items:
            facts = item.question.facts
            truth = {*facts["objects"], *(one for text in facts["captions"] for one in reader.objects(text))}
            said = reader.objects(item.prediction)
            mentions.append(len(said))
            absent.append(sum(one not in truth for one in said))
            right.append(len(truth.intersection(said)))
            there.append(len(truth))
            lengths.append(len(reader.tokens(item.prediction)))
        return Scored(
            metrics={
                "c_s": mean([bool(n) for n in absent], scale=100),
                "c_i": ratio(absent, mentions, scale=100),
                "recall": ratio(right, there, scale=100),
                "length": mean(lengths),
            },
            counts={
                "captions": len(items),
                "captions_without_objects": sum(not n for n in mentions),
                "captions_empty": sum(not item.prediction.strip() for item in items),
                "mentions": sum(mentions),
                "hallucinated": sum(absent),
            },
            notes={"pictures": items[0].question.facts["origin"]} if items else {},
        )
