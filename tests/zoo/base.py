"""What every model of the zoo is made of: an entry, a tokenizer, random weights that see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL.Image import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers import PreTrainedTokenizerFast as Fast
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from visgain.types import IMAGE_MARK, Encoded, Sample
from visgain.vlm.batch import concatenated
from visgain.vlm.encode import finish
from visgain.vlm.load import VLM, no_videos
from visgain.vlm.template import make_encoder

# ---------------------------------------------------------------- entries

Pieces = tuple[str, dict[str, Any]]
"""The text that stands for one picture (image tokens and what is around them), and the model's inputs for it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tiny random model of one family. `make` gives the model, not yet strengthened, and its processor."""

    name: str
    make: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    note: str = ""
    text: str = "chat template"  # or "completion": the name of what writes it
    way: str = "shared"  # the fastest exact way of scoring
    pictures: str = "between turns"  # or "before the first question", or "one"
    missing: str = ""  # the image processor that needs torchvision: it is replaced here, and cannot be loaded back
    # A family whose processor cannot be built here: how a picture becomes text and inputs, and why. Its `make` gives a
    # processor that has a tokenizer alone.
    picture: Callable[[VLM, Image], Pieces] | None = None
    why: str = ""
    blind: str = "drop, mask"  # the conditions without another picture that it can be scored in
    cuttable: bool = True  # whether what is masked is as if cut out: no windows, no states but those of attention
    looks_ahead: bool = False  # whether an answer depends on pictures after it
    since: str = "5.17"  # transformers that has it without torchvision and without warnings; 5.18 to 5.22 not tried
    seed: int = 0
    strength: float = 1.0  # multiplies random weights
    ends: tuple[str, ...] = ()  # what may follow an answer in its supervised text

    @property
    def processor(self) -> bool:
        return self.picture is None

    @property
    def loads(self) -> bool:
        """Whether save_pretrained and load_vlm give the same model back."""
        return self.processor and not self.missing

    def skip_if_unknown(self) -> None:
        if Version(transformers.__version__) < Version(self.since):
            pytest.skip(f"{self.name} needs transformers {self.since}, this is {transformers.__version__}")

    def build(self) -> VLM:
        """The model with its processor, the same weights at every call. Skips the test if transformers is too old."""
        self.skip_if_unknown()
        with torch.random.fork_rng(), no_videos():
            torch.manual_seed(self.seed)
            model, processor = self.make()
            randomise(model, self.strength)
        return VLM(name=self.name, model=model.eval(), processor=processor)

    def encode(self, vlm: VLM, sample: Sample, images: Sequence[Image]) -> Encoded:
        if self.picture is None:
            return make_encoder(vlm).encode(sample, list(images))
        return encode_directly(vlm, sample, [self.picture(vlm, image) for image in images])


@torch.no_grad()
def randomise(model: nn.Module, strength: float = 1.0) -> None:
    """Weights that keep a signal's size from layer to layer, so that pictures matter; no bias, gate or norm at rest."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise if parameter.numel() > 1 else 0.5)
        elif id(parameter) in embeddings or 1 in parameter.shape[:-1]:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * strength / parameter[0].numel() ** 0.5)


# ---------------------------------------------------------------- tokenizers

CORPUS = ["user assistant What is this? A red cup on a table. No, there is a dog. Describe the picture."] * 4


def byte_tokenizer(special: Sequence[str], named: Mapping[str, str] | None = None, **roles: Any) -> Fast:
    """Byte-level BPE as in GPT-2, Llama 3, Qwen. `named`: attributes such as image_token; `roles`: eos_token..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 40,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return Fast(tokenizer_object=tokenizer, extra_special_tokens=dict(named or {}), **roles)


def spiece_tokenizer(special: Sequence[str], named: Mapping[str, str] | None = None, **roles: Any) -> Fast:
    """BPE with marks for spaces and bytes as a last resort, as Gemma's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 100,
        special_tokens=[*special, *(f"<0x{value:02X}>" for value in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return Fast(tokenizer_object=tokenizer, extra_special_tokens=dict(named or {}), unk_token="<unk>", **roles)


# ---------------------------------------------------------------- sizes that most families share

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def ids(tokenizer: Fast) -> dict[str, Any]:
    """The vocabulary's size and roles as a text configuration takes them."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


# ---------------------------------------------------------------- without a processor


class PreparedKwargs(ImagesKwargs, total=False):
    return_row_col_info: bool


class Prepared(BaseImageProcessor):
    """In place of an image processor that is written for torchvision: `prepare` makes a picture the model's inputs."""

    valid_kwargs = PreparedKwargs

    def __init__(self, prepare: Callable[[Image], dict[str, torch.Tensor]], **settings: Any) -> None:
        super().__init__()
        self.prepare = prepare
        for name, value in settings.items():
            setattr(self, name, value)

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        pictures = make_flat_list_of_images(images)
        return BatchFeature(data=concatenated([self.prepare(picture) for picture in pictures]))


def plain_template(picture: str, end: str) -> str:
    """Role, text, end-of-turn, and nothing else."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{picture}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if message['role'] == 'assistant' %}}{end}{{% else %}}{{{{ '\n' }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


class TokenizerOnly(ProcessorMixin):
    """What is left of a processor that cannot be built on this machine."""

    def __init__(self, tokenizer: Fast, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def encode_directly(vlm: VLM, sample: Sample, pictures: Sequence[Pieces]) -> Encoded:
    """The sample in a plain template (role, text, end-of-turn), pictures as their text says."""
    tokenizer, waiting = vlm.tokenizer, iter(pictures)
    token_ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    is_answer, turns, chars = [False] * len(token_ids), [], []

    def add(text: str) -> list[tuple[int, int]]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ids.extend(encoded["input_ids"])
        is_answer.extend([False] * len(encoded["input_ids"]))
        return list(encoded["offset_mapping"])

    number = 0
    for turn in sample.turns:
        add(f"{turn.role}: ")
        if turn.role == "user":
            for k, piece in enumerate(turn.text.split(IMAGE_MARK)):
                if k:
                    add(next(waiting)[0])
                add(piece)
            add("\n")
        else:
            start = len(token_ids)
            spans = add(turn.text)
            token_ids.append(tokenizer.eos_token_id)
            is_answer.append(False)
            is_answer[start:] = [True] * (len(token_ids) - start)
            chars += [*spans, (len(turn.text), len(turn.text))]
            turns += [number] * (len(spans) + 1)
            number += 1
    return finish(
        np.asarray(token_ids),
        np.asarray(is_answer),
        np.asarray(turns, dtype=np.int32),
        np.asarray(chars, dtype=np.int32).reshape(-1, 2),
        vlm.image_token_id,
        2048,
        concatenated([inputs for _, inputs in pictures]),
    )
