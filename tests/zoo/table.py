"""docs/families.md, from what the tests of the zoo hold each family to. `make families` writes it."""

from __future__ import annotations

from pathlib import Path

from zoo import ZOO
from zoo.base import Entry

PATH = Path(__file__).parents[2] / "docs/families.md"

HEAD = """\
# Model families

<!-- written by `make families` from tests/zoo; a test holds it to what the tests hold -->

visgain takes any image-text-to-text model of transformers through its own processor and chat template. Nothing is
looked up by a model's name, except for the repairs in `vlm/families.py` and `vlm/pixtral.py`. The table is what was
tried: a tiny model with random weights of each family, with the real configuration, model, processor and
image-processor classes, saved, loaded, encoded and scored (`tests/test_families.py`, `tests/test_zoo.py`,
`tests/test_engine.py`).

All of them keep one contract: supervised tokens decode to the answers and their ends of turn, in order, over several
turns and pictures; image tokens are found and counted; `none` gives a gain of exactly 0; what is packed, batched or
cached is within 1e-4 nats of one conversation alone; a cut keeps a prefix and never half a picture; saved and loaded,
the numbers are the same.

- **works**: `but for loading`: see below.
- **way**: the fastest exact way of scoring ([engine.md](engine.md)), found by trying. All but `single` are fast
  paths.
- **text by**: the processor's chat template, or, where it knows no chat, a question that is completed.
- **pictures**: `between turns` is anywhere, in any number. Rows that hold more than the model takes are skipped, with
  the reason.
- **blind too by**: `drop` and `mask`, which put no picture in the image's place ([engine.md](engine.md)), beside all
  that do. What is missing is refused with one message.

"""

TAIL = """
## What could not be had on the machine where this is tested

There is no torchvision for its torch. These image processors are written for torchvision alone, so the pictures of
their families were prepared by a stand-in of the same layout, and saving and loading was not tried; processor and
model are the real ones. Tests fail on the day that one of them can be had.

{missing}

{why}

`PixtralProcessor` (Pixtral, Mistral 3) asks torchvision for one function that the PIL image processor has too, and is
mended to do without. With torchvision installed, all of these load as they are.

## Models that need more

| model | what is said |
|---|---|
| with code of its own | refused until `--trust-remote-code` allows it; then loaded through its own class |
| weights in pickle files (`pytorch_model.bin`) | refused: convert them to safetensors |
| a checkpoint without any weight for the projector, the vision or the language part | refused: it would be random |
| text alone (Llama, Qwen3 ...) | refused: takes no pictures |
| encoder and decoder (Florence-2, Pix2Struct, T5 in BLIP-2 ...) | refused: decoders alone are scored |
| a vision part of timm (PerceptionLM, FastVLM, Gemma 3n) | needs `pip install timm`; not tried |
| a tokenizer without tokenizer.json | refused: it gives no character offsets |

## Chat templates

What a template takes is tried on a short conversation: parts with pictures, parts of text, plain text with the
picture's token in it. A template without generation marks is written twice, the second time with a mark in each
answer's place; what comes out around the marks is the template's own, and what follows the last answer is the end of
a turn. So default system prompts, templates that strip answers, number turns or drop the reasoning of earlier turns
need no care. What a template refuses (roles that do not alternate) is the row's reason to be skipped, in the
template's words. An answer that a template changes in any other way is an error, never a guess; so is a text that
holds the model's own image token.
"""


def table() -> str:
    """The document."""
    rows = ["| family | works | text by | way | pictures | blind too by | notes |", "|---|---|---|---|---|---|---|"]
    rows += [_row(entry) for entry in sorted(ZOO.values(), key=lambda entry: entry.name)]
    missing = "\n".join(f"- {entry.name}: `{entry.missing}`" for entry in ZOO.values() if entry.missing)
    why = "\n".join(
        f"{entry.name} is scored here but cannot be encoded from its processor: {entry.why}."
        for entry in ZOO.values()
        if not entry.processor
    )
    return HEAD + "\n".join(rows) + "\n" + TAIL.format(missing=missing, why=why)


def _row(entry: Entry) -> str:
    works = "yes" if entry.loads else "but for loading" if entry.processor else "scoring alone"
    return f"| {entry.name} | {works} | {entry.text} | {entry.way} | {entry.pictures} | {entry.blind} | {entry.note} |"


if __name__ == "__main__":
    PATH.write_text(table())
