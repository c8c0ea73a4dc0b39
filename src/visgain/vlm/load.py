"""Load any image-text-to-text model of transformers with its processor.

Safetensors only, and no remote code unless asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto import video_processing_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.processing_utils import VideosKwargs

import visgain
from visgain.errors import ModelError
from visgain.vlm.families import PART_PATHS
from visgain.vlm.pixtral import mend_pixtral

LOADING = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""What transformers raises for a model that it cannot load."""

REMOTE_CLASSES = (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel)
"""Under which of these a model with code of its own may be registered, the best first."""

EMBEDDED = Path(visgain.__file__).parent / "world" / "embedded"
"""The trained model that ships with the package; its name on the command line is `embedded`."""


@dataclass(frozen=True, kw_only=True)
class VLM:
    """A model and the processor that belongs to it."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        """The id that stands for image features in the model's input."""
        config = self.model.config
        for place in (config, getattr(config, "vision_config", None)):
            for name in ("image_token_id", "image_token_index"):
                if getattr(place, name, None) is not None:
                    return int(getattr(place, name))
        known = _known_token(self.processor)
        if known is None:
            raise ModelError(f"{self.name}: neither model nor processor names an image token; is it a vision model?")
        return known


def _known_token(processor: ProcessorMixin) -> int | None:
    """The id of the token that a processor calls its image token."""
    number, token = (getattr(processor, name, None) for name in ("image_token_id", "image_token"))
    if number is None and token is not None:
        number = processor.tokenizer.convert_tokens_to_ids(str(token))
    return None if number is None else int(number)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the original LLaVA code's: it names parts where Hugging Face's describes them."""
    return "vision_config" not in config and ("mm_vision_tower" in config or "mm_projector_type" in config)


def _refuse_original(folder: Path) -> None:
    """Raises ModelError for a folder of the original LLaVA code, with the way to use it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    if not isinstance(config, dict) or not is_original(config):
        return
    projector = folder / "mm_projector.bin"
    weights = [*folder.glob("pytorch_model*"), *folder.glob("model*.safetensors")]
    if projector.is_file() and not weights:
        raise ModelError(
            f"{folder} holds a projector alone; give the model that it goes into and --projector {projector}"
        )
    raise ModelError(
        f"{folder} is a checkpoint of the original LLaVA code; convert it once: "
        f"python -m visgain.vlm.original {folder} {folder.name}-hf"
    )


def resolve_model(name: str) -> str:
    """`name` as from_pretrained takes it. Raises ModelError if it looks like a folder and is not a model's."""
    if name == "embedded":
        return str(EMBEDDED)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json; give the folder of a Hugging Face model")
        _refuse_original(path)
        return str(path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if path.exists() or looks_local:
        raise ModelError(f"{name} is neither a model folder nor a hub name (owner/model), nor `embedded`")
    return name


def model_source(name: str) -> str:
    """`name` as from_pretrained takes it, and known to be there.

    The hub is asked for one small file, so that a wrong name or a missing network is told soon and in one line.
    """
    source = resolve_model(name)
    if not Path(source).is_dir():
        try:
            hf_hub_download(source, "config.json")
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ModelError(f"{name} is no folder here, and the hub does not give it: {_first_line(error)}") from error
    return source


class NoVideos(ImageProcessingMixin):  # type: ignore[misc]
    """Stands where a processor class insists on a video processor, and keeps its settings for when it is saved again.

    The real ones need torchvision and know no other backend, so they cannot be loaded beside PIL image processing.
    """

    model_input_names: ClassVar[list[str]] = []
    valid_kwargs = VideosKwargs

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> NoVideos:
        places = ("cache_dir", "force_download", "token", "revision", "local_files_only")
        known = {key: options[key] for key in places if key in options}
        return cls(video_processing_auto.get_video_processor_config(name, **known))

    def __getattr__(self, name: str) -> Any:
        """Some processors read their video processor's settings even if there is no video."""
        if name == "settings" or name not in self.settings:
            raise AttributeError(name)
        return self.settings[name]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def __call__(self, *videos: Any, **options: Any) -> NoReturn:
        raise ModelError("visgain shows a model pictures, not videos")


@contextmanager
def no_videos() -> Iterator[None]:
    """While it lasts, transformers loads NoVideos for every video processor, and its processors accept it."""
    auto, check = video_processing_auto.AutoVideoProcessor, ProcessorMixin.check_argument_for_proper_class

    def accept(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return NoVideos if isinstance(argument, NoVideos) else check(self, name, argument)

    video_processing_auto.AutoVideoProcessor = NoVideos
    ProcessorMixin.check_argument_for_proper_class = accept
    try:
        yield
    finally:
        video_processing_auto.AutoVideoProcessor = auto
        ProcessorMixin.check_argument_for_proper_class = check


def load_processor(name: str, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of model `name`, with PIL image processing so that pictures are prepared alike on every machine."""
    source = model_source(name)
    mend_pixtral()
    try:
        with no_videos():
            processor = AutoProcessor.from_pretrained(source, backend="pil", trust_remote_code=trust_remote_code)
    except LOADING as error:
        raise ModelError(f"cannot load the processor of {name}: {loading_reason(error)}") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{name} has no image processor with a tokenizer; is it a vision-language model?")
    if not getattr(processor.tokenizer, "is_fast", False):
        raise ModelError(f"the tokenizer of {name} gives no character offsets; convert it to tokenizer.json first")
    return processor


def load_vlm(name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False) -> VLM:
    """Model and processor, on `device`, in eval mode. `dtype` auto is that of the file.

    Raises ModelError with one line if that is impossible.
    """
    source = model_source(name)
    auto = _auto_class(source, name, trust_remote_code)
    processor = load_processor(name, trust_remote_code=trust_remote_code)
    try:
        model, loaded = auto.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except LOADING as error:
        raise ModelError(f"cannot load model {name}: {loading_reason(error)}") from error
    _check_complete(model, set(loaded["missing_keys"]), name)
    return VLM(name=name, model=model.to(pick_device(device)).eval(), processor=processor)


def _auto_class(source: str, name: str, trust_remote_code: bool) -> Any:
    """The class of transformers that loads such a model, before anything large is read.

    Raises ModelError if the configuration is that of a model that we cannot use.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LOADING as error:
        raise ModelError(f"cannot load the configuration of {name}: {loading_reason(error)}") from error
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config(decoder=True))):
        raise ModelError(f"{name} is an encoder-decoder model ({config.model_type}); visgain scores decoders alone")
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    known = getattr(config, "auto_map", None) or {}
    found = [auto for auto in REMOTE_CLASSES if auto.__name__ in known]
    if not found:
        raise ModelError(f"{name} is a {config.model_type} model, which takes no pictures with its text")
    return found[0]


def _check_complete(model: PreTrainedModel, missing: set[str], name: str) -> None:
    """Raises ModelError if the checkpoint has no weight at all for a part: it would be random, and score nonsense."""
    for path in itertools.chain(*PART_PATHS.values()):
        names = {known for known, _ in model.named_parameters() if known.startswith(f"{path}.")}
        if names and names <= missing:
            raise ModelError(f"{name} has no weights for {path} ({len(names)} tensors); it is not a complete model")


def pick_device(device: str) -> torch.device:
    """The torch device for a --device value. Raises ModelError if it does not exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device} cannot be used here: {_first_line(error)}") from error
    return chosen


def model_fingerprint(name: str) -> str:
    """Hash of a local model's weights and configuration, so that a retrained model in the same folder is noticed.

    A hub name stands for itself.
    """
    source = Path(resolve_model(name))
    if not source.is_dir():
        return name
    digest = hashlib.blake2b(digest_size=16)
    names = ("*.safetensors", "config.json", "tokenizer*.json", "*processor_config.json", "chat_template*")
    for path in sorted(path for pattern in names for path in source.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def model_name(name: str) -> str:
    """`name` as it is recorded: a local folder by its full path, so that it means the same from everywhere."""
    path = Path(resolve_model(name))
    return str(path.resolve()) if name != "embedded" and path.is_dir() else name


def loading_reason(error: BaseException) -> str:
    """Why loading failed, with what to do where the words of transformers do not say it for this tool."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it runs code of its own, which comes with the model; read that, then allow it with --trust-remote-code"
    if "model.safetensors" in text:
        return "it has no weights in safetensors; other formats can run code when read, so convert them first"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or incomplete ({text})"
    if "Can't load image processor" in text:
        return "it has no settings for pictures (processor_config.json or preprocessor_config.json)"
    if "torchvision" in text:
        return "it needs torchvision; install the one that belongs to your torch"
    if library := re.search(r"requires the (\S+) library", text):
        return f"it needs {library[1]} (pip install {library[1]})"
    if "ignore_mismatched_sizes" in text:
        return "weights have other shapes than its configuration says (see the report above)"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(": ")
