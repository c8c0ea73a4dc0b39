"""How a model's next token is chosen: greedily, by drawing, or by a training-free method against hallucination.

Each method is a frozen dataclass whose fields are its options, named in text as `vcd:alpha=1,beta=0.1`. All are greedy
over what they compute unless a temperature is given; some were published with sampling, so a comparison must say it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visgain.counterfactuals import diffusion_signal, parse_counterfactual
from visgain.errors import ConfigError, ModelError
from visgain.evaluation import contrast
from visgain.evaluation.attend import Boost, Redistribute, edited, unedited
from visgain.evaluation.generate import Prompt, batch_seed, generated, pad_id
from visgain.registry import spec_of
from visgain.types import IMAGE_MARK, Encoded, Turn
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import PER_TOKEN_INPUTS, Encoder
from visgain.vlm.load import VLM

Ids = Int64[Tensor, "B new"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Drawn from the model's distribution."""

    temperature: float = 1.0
    seed: int = 0

    @property
    def spec(self) -> str:
        return spec_of("sample", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        return generated(vlm, prompts, max_new_tokens, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class VCD:
    """Visual contrastive decoding (Leng et al. 2023). Its second branch sees the prepared pixels under diffusion noise.

    second: `noised` (at `step` of 1,000), `text`, `soft:FILE`, or any counterfactual of the picture, e.g. blur.
    """

    alpha: float = 1.0
    beta: float = 0.1
    step: int = 500
    second: str = "noised"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(0 < self.beta <= 1, f"vcd:beta is {self.beta}; it must be above 0 and at most 1")
        _check(0 <= self.step <= 999, f"vcd:step is {self.step}; it must lie between 0 and 999")

    @property
    def spec(self) -> str:
        return spec_of("vcd", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        branch = _branch(vlm, encoder, prompts, self.second, seed=self.seed, step=self.step)
        mixed = contrast.Contrast(branch, lambda seen, other, t: contrast.vcd(seen, other, self.alpha, self.beta))
        return generated(vlm, prompts, max_new_tokens, contrast=mixed, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class PAI:
    """Paying more attention to the image (Liu et al. 2024).

    Scores over image tokens in layers [first, last) are raised by `alpha` of their size, and the text alone is
    subtracted with weight `gamma` (1: not at all).

    The first generated token is treated like the others; the published code leaves it out where gamma is not 1.
    """

    alpha: float = 0.2
    gamma: float = 1.1
    first: int = 2
    last: int = 32
    temperature: float = 0.0
    seed: int = 0

    @property
    def spec(self) -> str:
        return spec_of("pai", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        mixed = None
        if self.gamma != 1:
            branch = _branch(vlm, encoder, prompts, "text", aside=True)
            mixed = contrast.Contrast(branch, lambda seen, other, t: contrast.pai(seen, other, self.gamma))
        boost = Boost(is_image=_is_image(vlm, prompts), alpha=self.alpha, first=self.first, stop=self.last)
        with edited(vlm.model, boost):
            return generated(vlm, prompts, max_new_tokens, contrast=mixed, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class M3ID:
    """Multi-modal mutual information decoding (Favero et al. 2024): the picture counts more as the answer grows."""

    alpha: float = 0.9
    forgetting: float = 0.02
    second: str = "text"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.alpha > 0, f"m3id:alpha is {self.alpha}; it must be positive")

    @property
    def spec(self) -> str:
        return spec_of("m3id", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        branch = _branch(vlm, encoder, prompts, self.second, seed=self.seed)
        mixed = contrast.Contrast(
            branch, lambda seen, other, t: contrast.m3id(seen, other, self.alpha, self.forgetting, t)
        )
        return generated(vlm, prompts, max_new_tokens, contrast=mixed, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance against a picture that says nothing, as LACING does with its learned soft image.

    second: `soft:FILE` (safetensors with one tensor, a row or a row for each image token), `text`, or a counterfactual.
    """

    scale: float = 1.5
    second: str = "mean"
    temperature: float = 0.0
    seed: int = 0

    @property
    def spec(self) -> str:
        return spec_of("guidance", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        branch = _branch(vlm, encoder, prompts, self.second, seed=self.seed)
        mixed = contrast.Contrast(branch, lambda seen, other, t: contrast.guidance(seen, other, self.scale))
        return generated(vlm, prompts, max_new_tokens, contrast=mixed, temperature=self.temperature, seed=self.seed)


SINK_DIMS = {("llama", 4096): (1415, 2533), ("llama", 5120): (2100, 4743)}
"""(type, width) of a language model -> the dimensions in which its sinks are large: LLaMA-2-7B and -13B (Vicuna)."""


@dataclass(frozen=True, kw_only=True)
class VAR:
    """Visual attention redistribution (Kang et al. 2025), for language models whose sink dimensions are known.

    dims: the dimensions with slashes between, e.g. 1415/2533; `auto` knows those of LLaMA-2.
    """

    p: float = 0.6
    rho: float = 0.5
    least: float = 0.2
    tau: float = 20.0
    first: int = 2
    dims: str = "auto"
    temperature: float = 0.0
    seed: int = 0

    @property
    def spec(self) -> str:
        return spec_of("var", self)

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: Sequence[Prompt], max_new_tokens: int) -> Ids:
        move = Redistribute(
            is_image=_is_image(vlm, prompts),
            dims=self._dims(vlm),
            p=self.p,
            rho=self.rho,
            least=self.least,
            tau=self.tau,
            first=self.first,
        )
        with edited(vlm.model, move):
            return generated(vlm, prompts, max_new_tokens, temperature=self.temperature, seed=self.seed)

    def _dims(self, vlm: VLM) -> tuple[int, ...]:
        config = vlm.model.config.get_text_config(decoder=True)
        if self.dims == "auto":
            known = SINK_DIMS.get((config.model_type, config.hidden_size))
            if known is None:
                raise ModelError(
                    f"the sink dimensions of {vlm.name} are not known; give them, as in var:dims=1415/2533"
                )
            return known
        try:
            dims = tuple(int(number) for number in self.dims.split("/"))
        except ValueError:
            raise ConfigError(f"var:dims is {self.dims!r}; it must be numbers with slashes between") from None
        _check(all(0 <= dim < config.hidden_size for dim in dims), f"var:dims is {self.dims}; {vlm.name} has no such")
        return dims


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_image(vlm: VLM, prompts: Sequence[Prompt]) -> Tensor:
    batch = pad_batch([prompt.encoded for prompt in prompts], pad_id(vlm), side="left")
    is_image: Tensor = (batch.inputs["input_ids"] == vlm.image_token_id) & (batch.inputs["attention_mask"] > 0)
    return is_image.to(vlm.device)


# ---------------------------------------------------------------- second branches


def _branch(
    vlm: VLM,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    second: str,
    *,
    seed: int = 0,
    step: int = 500,
    aside: bool = False,
) -> contrast.SecondBranch:
    """The prompts as the second branch reads them (see VCD)."""
    around = unedited if aside else nullcontext
    kind, _, path = second.partition(":")
    if second == "text":
        return contrast.SecondBranch(vlm, [_text_only(encoder, prompt) for prompt in prompts], aside=around)
    if kind == "soft":
        bare = [replace(prompt.encoded, model_inputs=_own(prompt.encoded)) for prompt in prompts]
        return contrast.SecondBranch(vlm, bare, soft=_soft_image(Path(path)), aside=around)
    generator = torch.Generator().manual_seed(batch_seed(seed, prompts))
    if second == "noised":
        noisy = [noised(prompt.encoded, step, generator) for prompt in prompts]
        return contrast.SecondBranch(vlm, noisy, aside=around)
    counterfactual = parse_counterfactual(second)
    rng = np.random.default_rng(batch_seed(seed, prompts))

    def refuse() -> Image:
        raise ConfigError(f"{second} needs another sample's picture, which an answer does not have")

    replaced = [
        encoder.prompt(prompt.ask.turns, [counterfactual(image, rng=rng, other=refuse) for image in prompt.images])
        for prompt in prompts
    ]
    return contrast.SecondBranch(vlm, replaced, aside=around)


def noised(encoded: Encoded, step: int, generator: torch.Generator) -> Encoded:
    """Prepared pixels v -> sqrt(a) v + sqrt(1 - a) e, a the cumulated signal of VCD's schedule after `step` steps."""
    kept = diffusion_signal(step)
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    own = _own(encoded)
    inputs = {
        name: signal * value + noise * torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        if name not in own and "mask" not in name and isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in encoded.model_inputs.items()
    }
    return replace(encoded, model_inputs=inputs)


def _own(encoded: Encoded) -> dict[str, Tensor]:
    return {name: value for name, value in encoded.model_inputs.items() if name in PER_TOKEN_INPUTS}


def _text_only(encoder: Encoder, prompt: Prompt) -> Encoded:
    turns = tuple(
        Turn(role=turn.role, text=turn.text.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, ""))
        for turn in prompt.ask.turns
    )
    return encoder.prompt(turns, [])


def _soft_image(path: Path) -> Float[Tensor, "N D"]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the soft image {path}: {error}") from error
    if len(tensors) != 1:
        raise ModelError(f"{path} holds {len(tensors)} tensors ({', '.join(tensors)}); a soft image is one")
    [soft] = tensors.values()
    return soft.reshape(-1, soft.shape[-1])
