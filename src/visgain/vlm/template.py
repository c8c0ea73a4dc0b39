"""Choose the encoder for a model: by what its chat template does, not by its name."""

from __future__ import annotations

import torch
from PIL import Image as PILImage
from transformers import ProcessorMixin

from visgain.errors import ModelError
from visgain.types import IMAGE_MARK, Turn
from visgain.vlm.chat import ChatTemplate
from visgain.vlm.completion import completion_encoder
from visgain.vlm.encode import ChatEncoder, Encoder
from visgain.vlm.families import REPAIRS
from visgain.vlm.frozen import FrozenEncoder
from visgain.vlm.load import VLM
from visgain.vlm.profiles import CHAT_FORMS, CHAT_LENGTH, Profile, find_profile

PROBE = PILImage.linear_gradient("L").rotate(90).resize((64, 32)).convert("RGB")
"""From dark to light along its longer side: padded, cropped and squashed it is three different squares."""


def make_encoder(vlm: VLM, template: str = "auto", max_length: int | None = None) -> Encoder:
    """The encoder called `template` for `vlm`, with the template's own length unless `max_length` says another.

    `auto` takes the processor's chat template if that supervises the end of each turn (in its place a profile that it
    stands for, where that prepares pictures as the processor does), else the profile of the model's family, else the
    chat template as it is, else the processor's own way to write a question. Raises ModelError if none can locate the
    answers or if the profile is not for such a model, UnknownName if there is no such template.
    """
    profile = find_profile(template)
    if profile is not None:
        return _frozen(vlm, profile, max_length)
    repair = REPAIRS.get(vlm.model.config.model_type) if template == "auto" else None
    if repair is not None and not vlm.processor.chat_template:
        return make_encoder(vlm, repair, max_length)
    chat = ChatTemplate.of(vlm.processor, vlm.image_token_id)
    if template == "auto" and chat is not None and chat.source in CHAT_FORMS:
        exact = make_encoder(vlm, CHAT_FORMS[chat.source], max_length)
        if _sees_as_the_processor(exact):
            return exact
    options = {
        "processor": vlm.processor,
        "image_token_id": vlm.image_token_id,
        "max_length": max_length or CHAT_LENGTH,
    }
    if chat is None:
        completion = completion_encoder(**options) if template == "auto" else None
        if completion is None:
            raise ModelError(f"{vlm.name} has no chat template; give one with --template, e.g. --template llava-1.5")
        return completion
    if repair is not None and not chat.ends_turns():
        return make_encoder(vlm, repair, max_length)
    return ChatEncoder(template=chat, **options)


def end_of_turn(processor: ProcessorMixin, image_token_id: int) -> int | None:
    """The first special token that the chat template writes behind an answer; None if it writes none, or there is none.

    Special tokens alone: text such as a line break may stand in the middle of an answer. Raises as `ChatTemplate.of`
    and `ChatTemplate.write` do.
    """
    chat = ChatTemplate.of(processor, image_token_id)
    if chat is None:
        return None
    text, [answer] = chat.write((Turn(role="user", text="question"), Turn(role="assistant", text="probe")))
    behind = text[answer.first + len("probe") : answer.stop]
    known = processor.tokenizer.added_tokens_decoder
    ids = processor.tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in known and known[token].special), None)


def _sees_as_the_processor(encoder: Encoder) -> bool:
    """Whether `encoder` prepares a picture as its processor does, which is what other tools show the model."""
    ours = encoder.prompt([Turn(role="user", text=IMAGE_MARK)], [PROBE]).model_inputs["pixel_values"]
    own = encoder.processor.image_processor([PROBE], return_tensors="pt")["pixel_values"]
    return ours.shape == own.shape and torch.allclose(ours, own, atol=1e-3)


def _frozen(vlm: VLM, profile: Profile, max_length: int | None) -> FrozenEncoder:
    """`profile` on `vlm`. Raises ModelError if it does not see or read as the recipe's model does."""
    processor, tokenizer, asked = vlm.processor, vlm.processor.tokenizer, f"--template {profile.name}"
    tiles = hasattr(processor.image_processor, "image_grid_pinpoints")
    if not hasattr(processor, "patch_size") or not hasattr(processor, "num_additional_image_tokens") or tiles:
        raise ModelError(f"{type(processor).__name__} is not LLaVA's, so {asked} cannot be used")
    side = getattr(getattr(vlm.model.config, "vision_config", None), "image_size", None)
    if not isinstance(side, int):
        raise ModelError(f"{vlm.name} names no one size of its pictures (image_size), so {asked} cannot be used")
    missing = [token for token in profile.special_tokens if token not in tokenizer.get_vocab()]
    if missing or ("{end}" in profile.answer and tokenizer.eos_token is None):
        what = missing[0] if missing else "end-of-sequence token"
        raise ModelError(f"the tokenizer of {vlm.name} has no {what}, which {asked} writes; is it another model's?")
    return FrozenEncoder(
        profile=profile,
        processor=processor,
        image_token_id=vlm.image_token_id,
        side=side,
        max_length=max_length or profile.max_length,
    )
