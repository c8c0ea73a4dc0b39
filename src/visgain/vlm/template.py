"""Choose the encoder for a model: by what its chat template does, not by its name."""

from __future__ import annotations

from visgain.errors import ModelError
from visgain.vlm.encode import ChatEncoder, Encoder
from visgain.vlm.families import PROFILES
from visgain.vlm.llava import LlavaAlignEncoder, LlavaEncoder
from visgain.vlm.load import VLM


def make_encoder(vlm: VLM, template: str = "auto", max_length: int = 2048) -> Encoder:
    """The encoder called `template` for `vlm`.

    `auto` takes the processor's chat template if that supervises the end of each turn, else the profile of the model's
    family, else the chat template as it is. Raises ModelError if none can locate the answers.
    """
    options = {"processor": vlm.processor, "image_token_id": vlm.image_token_id, "max_length": max_length}
    if template.startswith("llava-1.5") and not hasattr(vlm.processor, "patch_size"):
        raise ModelError(f"{type(vlm.processor).__name__} is not LLaVA's, so --template {template} cannot be used")
    if template == "llava-1.5":
        return LlavaEncoder(**options)
    if template == "llava-1.5-align":
        return LlavaAlignEncoder(**options, name=template)
    if not vlm.processor.chat_template:
        profile = PROFILES.get(vlm.model.config.model_type)
        if template == "auto" and profile is not None:
            return make_encoder(vlm, profile, max_length)
        raise ModelError(f"{vlm.name} has no chat template; give one with --template, e.g. --template llava-1.5")
    chat = ChatEncoder(**options)
    profile = PROFILES.get(vlm.model.config.model_type)
    if template == "auto" and profile is not None and not chat.ends_turns():
        return make_encoder(vlm, profile, max_length)
    return chat
