"""Blind conditions: what becomes of the real image when a sample is scored blind.

Another picture stands in its place (a counterfactual), or it is left out (`drop`), or its tokens are hidden (`mask`).
A condition is a small frozen dataclass whose fields are its options, each with a default. It is named in text, `blur`
or `blur:sigma=0.1`; `parse_condition` reads that and `spec` writes it back with every option. Add a counterfactual by
subclassing Counterfactual and naming it in COUNTERFACTUALS or in the entry-point group `visgain.counterfactuals`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32
from PIL import Image

from visgain.errors import ConfigError
from visgain.registry import Registry, spec_of

DEFAULT_BLUR_SIGMA = 0.2
"""Standard deviation of the default blur, relative to the shorter side of the picture."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Condition(ABC):
    """How a sample is blind. Subclasses are frozen dataclasses, so equal specs are equal."""

    name: ClassVar[str]

    @property
    def spec(self) -> str:
        """The canonical text with the value of every option, which `parse_condition` reads back."""
        return spec_of(self.name, self)


class Counterfactual(Condition):
    """Makes the picture that the blind condition sees."""

    @abstractmethod
    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        """An RGB picture of the same size as the RGB picture `image`, which stays as it is.

        The result depends on the arguments alone: equal generators give equal pictures. `other()` decodes another
        sample's image; whoever needs none does not call it.
        """


@dataclass(frozen=True)
class Blur(Counterfactual):
    """Gaussian blur, with `sigma` relative to the shorter side so that its strength is the same at any resolution.

    The replacement that Visual Information Gain is defined with (Lee & Hwang 2026, arXiv 2602.17186). It is the exact
    convolution with a sampled Gaussian; beyond its border the picture is mirrored (the edge pixel repeated), so
    nothing foreign enters and the mean colour is kept.
    """

    sigma: float = DEFAULT_BLUR_SIGMA
    name: ClassVar[str] = "blur"

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 100:
            raise ConfigError(f"blur:sigma is {self.sigma}; it must be above 0 and at most 100 times the shorter side")

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        sigma = self.sigma * min(image.size)  # pixels
        columns, column_gain = _gaussian_modes(image.width, sigma)
        rows, row_gain = _gaussian_modes(image.height, sigma)
        gain = np.outer(row_gain, column_gain)

        def blurred(channel: Image.Image) -> Image.Image:
            pixels = np.asarray(channel, dtype=np.float32)
            return _to_image(rows @ (gain * (rows.T @ pixels @ columns)) @ columns.T)

        return Image.merge("RGB", [blurred(channel) for channel in image.split()])


def _gaussian_modes(length: int, sigma: float) -> tuple[Float32[np.ndarray, "n k"], Float32[np.ndarray, " k"]]:
    """The cosines that survive a Gaussian blur of a mirrored line of `length` pixels, and by how much.

    Mirroring makes the blur diagonal in the orthonormal cosines (DCT-II), where high frequencies die like a Gaussian.
    The few above 1e-6 make the product exact to a hundredth of a grey level, and much cheaper than a convolution:
    their number depends on sigma relative to the length, not on the length.
    """
    negligible = math.sqrt(2 * math.log(1e6))  # in units of 1/sigma
    n_modes = length if sigma < 1 else min(length, 1 + math.ceil(negligible * length / (math.pi * sigma)))
    frequency = np.pi * np.arange(n_modes) / length  # radians a pixel
    # A sampled Gaussian's spectrum is the continuous one summed over its aliases, which matter below a pixel of sigma.
    aliases = frequency[:, None] + 2 * np.pi * np.arange(-8, 9)
    gain = np.exp(-0.5 * (sigma * aliases) ** 2).sum(axis=1)
    modes = np.cos(np.outer(np.arange(length) + 0.5, frequency)) * math.sqrt(2 / length)
    modes[:, 0] = math.sqrt(1 / length)
    return modes.astype(np.float32), (gain / gain[0]).astype(np.float32)


@dataclass(frozen=True)
class Mean(Counterfactual):
    """Every pixel the picture's mean colour: the limit of a strong blur, with no layout left at all."""

    name: ClassVar[str] = "mean"

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        red, green, blue = (round(float(np.asarray(channel).mean(dtype=np.float64))) for channel in image.split())
        return Image.new("RGB", image.size, (red, green, blue))


@dataclass(frozen=True)
class Noise(Counterfactual):
    """Gaussian noise as after `step` steps of forward diffusion.

    The distorted image of Visual Contrastive Decoding (VCD: Leng et al. 2023, arXiv 2311.16922) with its schedule of
    1,000 steps, in which pixels are normalised as CLIP does. Two things differ from VCD, which noises the tensor that
    enters the model: here values are clipped to what a picture can hold, and the noise has the resolution of the
    picture, so that a model that shrinks the picture averages part of it away.
    """

    step: int = 500
    name: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        if not 0 <= self.step <= 999:
            raise ConfigError(f"noise:step is {self.step}; it must lie between 0 and 999")

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        kept = diffusion_signal(self.step)

        def noised(channel: Image.Image, mean: float, std: float) -> Image.Image:
            # sqrt(kept) * x + sqrt(1 - kept) * noise for x = (pixels / 255 - mean) / std, in grey levels
            pixels = rng.standard_normal((image.height, image.width), dtype=np.float32)
            pixels *= 255 * std * math.sqrt(1 - kept)
            pixels += 255 * mean * (1 - math.sqrt(kept))
            pixels += np.asarray(channel) * np.float32(math.sqrt(kept))
            return _to_image(pixels)

        return Image.merge(
            "RGB", [noised(*channel) for channel in zip(image.split(), CLIP_MEAN, CLIP_STD, strict=True)]
        )


def diffusion_signal(step: int) -> float:
    """Share of the signal's variance that is left after `step` steps: VCD's alpha-bar."""
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    return float(np.cumprod(1 - betas)[step])


@dataclass(frozen=True)
class Shuffle(Counterfactual):
    """The picture cut into `grid` x `grid` equal cells in random order: colours and textures stay, the layout goes.

    Cells have whole pixels, so up to grid - 1 columns at the right and rows at the bottom stay where they are. The
    order is never the original one, except for a picture of one pixel.
    """

    grid: int = 8
    name: ClassVar[str] = "shuffle"

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise ConfigError(f"shuffle:grid is {self.grid}; it must be at least 2")

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        pixels = np.array(image)
        rows, columns = min(self.grid, image.height), min(self.grid, image.width)
        height, width = image.height // rows, image.width // columns
        whole = pixels[: rows * height, : columns * width]
        cells = whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
        cells = cells[_new_order(len(cells), rng)]
        whole[:] = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(whole.shape)
        return Image.fromarray(pixels)


def _new_order(n: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A random permutation of 0..n-1 that is not the identity (unless n is 1)."""
    order = rng.permutation(n)
    return np.roll(order, 1) if np.array_equal(order, np.arange(n)) else order


@dataclass(frozen=True)
class Swap(Counterfactual):
    """Another sample's image, resized to this one's size: a sharp picture that tells nothing of this one."""

    name: ClassVar[str] = "swap"

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        return other().convert("RGB").resize(image.size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Unchanged(Counterfactual):
    """The same picture, for which every gain must be exactly 0: a check of the scoring, not a measurement."""

    name: ClassVar[str] = "none"

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        return image


@dataclass(frozen=True)
class Drop(Condition):
    """The conversation without its pictures: no image tokens, every word as it was.

    As pointwise V-information (PVI: Ethayarajh et al. 2022, arXiv 2110.08420) leaves an input out, but for one thing:
    PVI trains a model for each condition, and here one model is asked in both. The text moves up to where the image
    tokens were, so its positions differ from those of the seen condition.
    """

    name: ClassVar[str] = "drop"


@dataclass(frozen=True)
class Mask(Condition):
    """The same sequence with the same pictures, to whose tokens no token attends, at the same positions.

    The blind condition of Contrastive ALignment (CAL: Xiao et al. 2024, arXiv 2405.17871), whose code sets the
    attention mask of image tokens to 0, for every query in every layer, and leaves inputs and positions alone. Also as
    there, an answer token that directly follows a picture is predicted at the picture's last token, and knows that one
    patch. The one difference: an image token with nothing before it, which in LLaVA does not occur, may see itself.
    """

    name: ClassVar[str] = "mask"


COUNTERFACTUALS: Registry[type[Condition]] = Registry(
    "counterfactual", {kind.name: kind for kind in (Blur, Drop, Mask, Mean, Noise, Shuffle, Swap, Unchanged)}
)


def parse_condition(spec: str) -> Condition:
    """The blind condition that `name` or `name:key=value,key=value` says. Raises UnknownName or ConfigError."""
    made: Condition = COUNTERFACTUALS.make(spec)
    return made


def parse_counterfactual(spec: str) -> Counterfactual:
    """The same where a picture is needed. Raises ConfigError for a condition that makes none, too."""
    made = parse_condition(spec)
    if not isinstance(made, Counterfactual):
        raise ConfigError(f"counterfactual {spec!r} puts no picture in the image's place, which is needed here")
    return made


def _to_image(pixels: Float32[np.ndarray, "h w"]) -> Image.Image:
    """Grey levels, rounded and clipped to 0..255, as one channel. Overwrites `pixels`: a fresh array costs time."""
    np.rint(pixels, out=pixels)
    np.clip(pixels, 0, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8))
