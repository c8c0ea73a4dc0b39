"""`visgain assemble`: a vision tower and a causal language model, joined as a LLaVA by a projector of random weights.

Both parts stay what they were, to the bit: their modules are put into a model that was built without memory of its own,
and a few tokens through the language part must give the logits that they gave before. LLaVA's head is one matrix, so a
language model whose logits have a bias, a scale or a cap fails that check, as does one that is not causal. Towers are
tried as well, on one black picture: whatever gives a vector for each patch, class token or not, can be used.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers' own asks for torchvision
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from visgain.config import AssembleConfig
from visgain.errors import ModelError
from visgain.storage import write_json
from visgain.types import IMAGE_MARK
from visgain.vlm.families import PART_PATHS
from visgain.vlm.load import LOADING, loading_reason, model_fingerprint, model_name, model_source
from visgain.vlm.original import save_whole
from visgain.vlm.profiles import LLAVA_1_5_CHAT
from visgain.vlm.template import end_of_turn

RECORD = "assemble.json"
"""In an assembled model's folder: the options, and what the parts were."""

SAME = 1e-3
"""Largest difference of logits, in parts of their largest, that counts as rounding."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower and how pictures enter it. `extra`: vectors before those of the patches, 0 or 1."""

    model: PreTrainedModel
    extra: int
    images: Any  # the image processor of its checkpoint

    @property
    def side(self) -> int:
        return int(self.model.config.image_size)

    @property
    def patch(self) -> int:
        return int(self.model.config.patch_size)

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


@dataclass(frozen=True, kw_only=True)
class Language:
    """A causal language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What was built: parameters by part, and how many tokens stand for a picture."""

    image_tokens: int
    image_size: int
    parameters: dict[str, int]
    dtype: str
    template: str


def run_assemble(config: AssembleConfig) -> Assembled:
    """Build the model and write it to `config.out`, which must not exist.

    Raises ModelError if a part cannot be loaded, is no such part, or does not fit into a LLaVA.
    """
    if config.out.exists():
        raise ModelError(f"{config.out} is there already; name a folder that is not")
    tower = load_tower(config.vision, layer=config.vision_feature_layer, side=config.image_size)
    language = load_language(config.language)
    if config.dtype == "auto":
        dtype = torch.promote_types(tower.model.dtype, language.model.dtype)
    else:
        dtype = getattr(torch, config.dtype)
    strategy = _strategy(config, tower)
    model = join(tower, language, layer=config.vision_feature_layer, strategy=strategy, seed=config.seed).to(dtype)
    template, name = _chat_template(config, language.tokenizer)
    processor = _processor(tower, language.tokenizer, strategy, config.pictures, template)
    model.generation_config = _generation(language, _end_of_turn(processor, config))
    done = Assembled(
        image_tokens=model.config.image_seq_length,
        image_size=tower.side,
        parameters={
            "vision": _size(model.model.vision_tower),
            "projector": _size(model.model.multi_modal_projector),
            "language": _size(language.model),
        },
        dtype=str(dtype).removeprefix("torch."),
        template=name,
    )
    save_whole(model, processor, config.out)
    sources = {part: model_name(getattr(config, part)) for part in ("vision", "language")}
    prints = {f"{part}_fingerprint": model_fingerprint(getattr(config, part)) for part in sources}
    options = {key: value for key, value in asdict(config).items() if key != "out"}
    write_json(config.out / RECORD, {**options, **sources, **prints, **asdict(done)})
    return done


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------- the vision tower


def load_tower(name: str, *, layer: int, side: int | None = None) -> Tower:
    """The vision tower in `name`: a tower alone, half of a CLIP or SigLIP, or that of a vision-language model.

    `layer` is the hidden state that will be looked at, as LLaVA counts them; `side` another side of its pictures in
    pixels than it was trained with. Raises ModelError if there is none, or if it gives something else than a vector a
    patch.
    """
    config = _config(name)
    whole = _loaded(AutoModel, name, config, "vision tower")
    paths = [path.removeprefix("model.") for path in PART_PATHS["vision"]]
    found = (getattr(whole, path, None) for path in paths)
    model = next((part for part in found if isinstance(part, PreTrainedModel)), whole)
    patch = getattr(model.config, "patch_size", None)
    if side is not None and isinstance(patch, int) and side < patch:
        raise ModelError(f"--image-size is {side}; a patch of {name} alone has {patch} pixels")
    if hasattr(model.config, "num_patches") and not hasattr(model.config, "image_size"):
        model = of_one_size(model, side)
    for key in ("image_size", "patch_size", "hidden_size"):
        if not isinstance(getattr(model.config, key, None), int):
            raise ModelError(f"{name} is no vision tower: its configuration has no one {key}; give a CLIP or a SigLIP")
    if side is not None and side != model.config.image_size:
        model = resized(model, side, name)
    if getattr(model.config, "vision_use_head", False):
        # The pooling head is nothing that LLaVA looks at. SigLIP's own switch leaves it out.
        model.config.vision_use_head = model.use_head = False
        del model.head
    model = model.eval()
    return Tower(model=model, extra=_extra(model, name, layer), images=_image_processor(name))


def of_one_size(tower: PreTrainedModel, side: int | None = None) -> SiglipVisionModel:
    """A SigLIP 2 for pictures of any shape (NaFlex) as the SigLIP that it is for squares of `side` pixels.

    `side` is by default the one that its positions were made for. It takes flattened patches where SigLIP takes
    pictures, [rows, columns, channels] there against [channels, rows, columns] here, and stretches its positions.
    """
    old = tower.config
    grid = round(old.num_patches**0.5) if side is None else side // old.patch_size
    names: tuple[str, ...] = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_channels", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout")
    config = SiglipVisionConfig(
        **{name: getattr(old, name) for name in names},
        image_size=grid * old.patch_size if side is None else side,
        vision_use_head=False,
    )
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("head.")}
    width, patch = old.hidden_size, old.patch_size
    place = "embeddings.patch_embedding.weight"
    state[place] = state[place].reshape(width, patch, patch, old.num_channels).permute(0, 3, 1, 2).contiguous()
    place = "embeddings.position_embedding.weight"
    own = round(old.num_patches**0.5)
    if grid != own:
        stretch = tower.embeddings.resize_positional_embeddings
        shape = torch.tensor([[grid, grid]])
        state[place] = stretch(state[place].reshape(own, own, width), shape, max_length=grid * grid)[0]
    return _filled(SiglipVisionModel, config, state)


def resized(tower: PreTrainedModel, side: int, name: str) -> PreTrainedModel:
    """`tower` for pictures of `side` pixels: its positions are stretched once, as its own code would at every call."""
    embeddings: Any = getattr(tower, "embeddings", None)
    config = copy.deepcopy(tower.config)
    config.image_size = side
    state = tower.state_dict()
    place = "embeddings.position_embedding.weight"
    if place not in state or not hasattr(embeddings, "interpolate_pos_encoding"):
        raise ModelError(f"{name} cannot be given another size of pictures; leave --image-size {side} out")
    grid, width = side // config.patch_size, config.hidden_size
    extra = state[place].shape[0] - (tower.config.image_size // config.patch_size) ** 2
    with torch.no_grad():
        vectors = torch.zeros(1, grid * grid + extra, width, dtype=state[place].dtype)
        state[place] = embeddings.interpolate_pos_encoding(vectors, side, side)[0]
    return _filled(type(tower), config, state)


def _filled(kind: Any, config: PreTrainedConfig, state: dict[str, Tensor]) -> Any:
    """A model of `kind` with exactly these weights, in their precision."""
    model = kind(config).to(next(iter(state.values())).dtype)
    model.load_state_dict(state, strict=True)
    return model


def _extra(tower: PreTrainedModel, name: str, layer: int) -> int:
    """How many vectors the tower gives beside those of its patches. Raises ModelError if that is not 0 or 1."""
    config = tower.config
    channels, side = getattr(config, "num_channels", 3), config.image_size
    patches = (side // config.patch_size) ** 2
    try:
        with torch.no_grad():
            black = torch.zeros(1, channels, side, side, dtype=tower.dtype)
            states = tower(pixel_values=black, output_hidden_states=True).hidden_states
    except (*LOADING, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{name} is no vision tower that takes one square picture: {loading_reason(error)}") from error
    if not states or states[0].ndim != 3 or states[0].shape[-1] != config.hidden_size:
        raise ModelError(f"{name} is no vision tower: it gives no vectors of its hidden size for a picture")
    if not -len(states) <= layer < len(states):
        raise ModelError(
            f"--vision-feature-layer is {layer}; {name} has {len(states)} hidden states, -1 being the last"
        )
    if layer == 0:
        raise ModelError(
            f"--vision-feature-layer is 0, which transformers' LLaVA takes for no layer at all; {-len(states)} is the "
            f"same hidden state of {name}"
        )
    extra = states[layer].shape[1] - patches
    if extra not in (0, 1):
        raise ModelError(
            f"{name} gives {patches + extra} vectors for {patches} patches; LLaVA knows one class token at most"
        )
    return int(extra)


def _image_processor(name: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(model_source(name), backend="pil")
    except LOADING as error:
        raise ModelError(f"cannot load the image processor of {name}: {loading_reason(error)}") from error


# ---------------------------------------------------------------- the language model


def load_language(name: str) -> Language:
    """The causal language model in `name`, which may be part of a vision-language model, with an image token.

    Raises ModelError if there is none, or if it has no fast tokenizer.
    """
    config = _config(name)
    text = getattr(config, "text_config", None)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and text is not None:
        model = _language_part(name, config, text)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        model = _loaded(AutoModelForCausalLM, name, config, "causal language model")
    else:
        raise ModelError(f"{name} is a {config.model_type} model, which is no causal language model")
    language = Language(model=model.eval(), tokenizer=_tokenizer(name))
    grow(language)
    return language


def _language_part(name: str, config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedModel:
    """The language model inside a vision-language model, as one of its own."""
    whole = _loaded(AutoModelForImageTextToText, name, config, "vision-language model")
    part = getattr(getattr(whole, "model", None), "language_model", None)
    head = whole.get_output_embeddings()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or part is None or head is None:
        raise ModelError(f"the language part of {name} ({text.model_type}) is no causal language model of its own")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    if type(model.base_model) is not type(part):
        raise ModelError(f"the language part of {name} ({type(part).__name__}) is no causal language model of its own")
    setattr(model, model.base_model_prefix, part)
    model.set_output_embeddings(head)
    return model


def _tokenizer(name: str) -> Any:
    """The tokenizer with an image token and something to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(name))
    except LOADING as error:
        raise ModelError(f"cannot load the tokenizer of {name}: {loading_reason(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"the tokenizer of {name} gives no character offsets; convert it to tokenizer.json first")
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {name} has no end-of-sequence token, so no answer could end")
    tokenizer.add_tokens(AddedToken(IMAGE_MARK, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


@torch.no_grad()
def grow(language: Language) -> None:
    """Rows for tokens that the model does not have yet, in the embeddings and in the head: the mean of the others.

    The image token's embedding is never read, pictures stand there. Its logit is that of an average word, to which a
    trained model gives no probability to speak of.
    """
    model, rows = language.model, language.model.get_input_embeddings().weight.shape[0]
    if len(language.tokenizer) <= rows:
        return  # models often have more rows than their tokenizer has tokens
    model.resize_token_embeddings(len(language.tokenizer), mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)


# ---------------------------------------------------------------- both together


def join(tower: Tower, language: Language, *, layer: int, strategy: str, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of both, which shares their memory. `strategy`: whether the class token is left out ("default") or not.

    Raises ModelError if the language model does not fit into one.
    """
    causal, name = language.model, type(language.model).__name__
    base, head, embeddings = causal.base_model, causal.get_output_embeddings(), causal.get_input_embeddings()
    text = copy.deepcopy(causal.config)
    if MODEL_MAPPING.get(type(text), None) is not type(base):
        raise ModelError(f"the body of {name} is not what AutoModel gives for it, so it cannot be put into a LLaVA")
    if not isinstance(head, nn.Linear) or not embeddings.weight.shape[1] == head.in_features == text.hidden_size:
        raise ModelError(f"{name} has embeddings or a head of another width than its layers, which no LLaVA has")
    tied = head.weight is embeddings.weight
    # LLaVA ties its head to embeddings of this name alone; elsewhere each gets a copy of its own.
    text.tie_word_embeddings = tied and getattr(base, "embed_tokens", None) is embeddings
    tokens = tower.patches + (tower.extra if strategy == "full" else 0)
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=text,
        image_token_index=language.tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        image_seq_length=tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower.model
    model.model.language_model = base
    if text.tie_word_embeddings or not tied:
        model.lm_head.weight = head.weight
    else:
        model.lm_head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)  # torch's own start, as the original LLaVA
    _check_language(model.eval(), causal)
    return model


def _generation(language: Language, end: int) -> GenerationConfig:
    """Which tokens begin, end and fill: what the language model says, else its tokenizer. How it draws is left out.

    `end`, the chat template's end of turn, ends as well: training teaches the model to say that one, and a base model's
    settings know its end of text alone.
    """
    known = language.model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    said = {name: getattr(known, name, None) for name in names}
    said = {name: getattr(language.tokenizer, name) if value is None else value for name, value in said.items()}
    ends = said["eos_token_id"] if isinstance(said["eos_token_id"], list) else [said["eos_token_id"]]
    if end not in ends:
        said["eos_token_id"] = [*ends, end]
    return GenerationConfig(**said)


@torch.no_grad()
def _check_language(model: LlavaForConditionalGeneration, causal: PreTrainedModel) -> None:
    """Raises ModelError unless text gives the logits that it gave before, each from what stands before it."""
    name = type(causal).__name__
    ids = torch.arange(8)[None] % min(8, model.config.text_config.vocab_size)
    other = ids.clone()
    other[0, -1] = 0
    try:
        expected = causal(input_ids=ids).logits
        found, changed = (model(input_ids=some).logits for some in (ids, other))
    except (*LOADING, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{name} does not run inside a LLaVA: {loading_reason(error)}") from error
    rounding = SAME * float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=rounding):
        raise ModelError(
            f"{name} makes more of its logits than a matrix (a bias, a scale, a cap), which LLaVA's head cannot; "
            "take another language model"
        )
    if not torch.allclose(found[:, :-1], changed[:, :-1], rtol=0, atol=rounding):
        raise ModelError(f"{name} looks ahead: it is no causal language model")


# ---------------------------------------------------------------- the processor


def _strategy(config: AssembleConfig, tower: Tower) -> str:
    """Whether LLaVA drops the vector before those of the patches. Raises ModelError if there is none to drop."""
    if config.vision_feature_select == "auto":
        return "default" if tower.extra else "full"
    if config.vision_feature_select == "default" and not tower.extra:
        raise ModelError(
            f"{config.vision} has no class token, so --vision-feature-select default would drop a patch; use full"
        )
    return config.vision_feature_select


def _processor(tower: Tower, tokenizer: Any, strategy: str, pictures: str, template: str) -> LlavaProcessor:
    """LLaVA's processor: pictures to a square as `pictures` says (visgain.vlm.profiles), colours as the tower's."""
    square = {"height": tower.side, "width": tower.side}
    own = {name: getattr(tower.images, name) for name in ("image_mean", "image_std", "rescale_factor", "resample")}
    images = LlavaImageProcessorPil(
        **own,
        do_convert_rgb=True,
        do_pad=pictures == "pad",
        size=square if pictures == "squash" else {"shortest_edge": tower.side},
        do_center_crop=pictures != "squash",
        crop_size=square,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tower.extra,
        chat_template=template,
    )


PICTURES_AS_TEXT = (
    "{%- set seen = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set said = namespace(text=message['content']) -%}"
    "{%- if message['content'] is not string and message['content'] is iterable -%}"
    "{%- set said.text = '' -%}{%- for part in message['content'] -%}"
    "{%- set said.text = said.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set seen.messages = seen.messages + [dict(message, content=said.text)] -%}"
    "{%- endfor -%}{%- set messages = seen.messages %}"
)
"""Stands before a language model's chat template, which knows text alone: messages in parts become text, with the image
token and a line break where a picture is."""


def _chat_template(config: AssembleConfig, tokenizer: Any) -> tuple[str, str]:
    """The chat template, and what it is called. The language model's own, unless it has none or the user says so."""
    own = tokenizer.chat_template
    tokenizer.chat_template = None  # the processor's is the one that counts
    if isinstance(own, dict):
        own = own.get("default")
    if own is None or config.template == "llava-1.5":
        return LLAVA_1_5_CHAT, "llava-1.5"
    return own if IMAGE_MARK in own else PICTURES_AS_TEXT + own, "its own"


def _end_of_turn(processor: LlavaProcessor, config: AssembleConfig) -> int:
    """The token with which the chat template ends a turn.

    Raises ModelError if the template does not write a picture, or leaves the end of a turn without loss.
    """
    end = end_of_turn(processor, processor.image_token_id)
    if end is None:
        raise ModelError(
            f"the chat template of {config.language} writes no special token after an answer, so no model would learn "
            "to stop; use --template llava-1.5"
        )
    return end


# ---------------------------------------------------------------- loading


def _config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model_source(name))
    except LOADING as error:
        raise ModelError(f"cannot load the configuration of {name}: {loading_reason(error)}") from error


def _loaded(auto: Any, name: str, config: PreTrainedConfig, what: str) -> PreTrainedModel:
    """The model of `name` in the precision it was saved in. Raises ModelError if weights are missing."""
    try:
        model, report = auto.from_pretrained(
            model_source(name), config=config, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except LOADING as error:
        raise ModelError(f"cannot load the {what} {name}: {loading_reason(error)}") from error
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise ModelError(f"{name} has no weights for {first}: it is no complete {what}")
    return model
