import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import visgain.registry
from visgain.counterfactuals import (
    CLIP_MEAN,
    CLIP_STD,
    COUNTERFACTUALS,
    DEFAULT_BLUR_SIGMA,
    Blur,
    Counterfactual,
    Noise,
    Shuffle,
    parse_counterfactual,
)
from visgain.errors import ConfigError, UnknownName

BUILT_IN = ("blur", "mean", "noise", "none", "shuffle", "swap")


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def never() -> Image.Image:
    raise AssertionError("this counterfactual has no use for another image")


def apply(spec: str, image: Image.Image, seed: int = 0, other: Callable[[], Image.Image] = never) -> Image.Image:
    return parse_counterfactual(spec)(image, rng=np.random.default_rng(seed), other=other)


# ---------------------------------------------------------------- the contract of all


def test_the_documented_counterfactuals_are_registered() -> None:
    assert set(BUILT_IN) <= set(COUNTERFACTUALS.names())


@pytest.mark.parametrize("size", [(37, 23), (64, 64), (1, 1), (1, 9), (3, 2), (300, 5)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_it_gives_an_rgb_picture_of_the_same_size_and_leaves_its_input_alone(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    before = image.tobytes()
    result = apply(name, image, other=lambda: picture(5, 50, seed=1))
    assert (result.mode, result.size) == ("RGB", size)
    assert image.tobytes() == before


@pytest.mark.parametrize("name", BUILT_IN)
def test_it_depends_on_its_arguments_alone(name: str) -> None:
    results = [apply(name, picture(), seed=seed, other=lambda: picture(seed=9)) for seed in (3, 3, 4)]
    assert results[0] == results[1]
    assert (results[0] != results[2]) == (name in ("noise", "shuffle"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_its_spec_reads_back_as_an_equal_one_and_it_survives_pickling(name: str) -> None:
    counterfactual = parse_counterfactual(name)
    assert counterfactual.name == name
    assert parse_counterfactual(counterfactual.spec) == counterfactual
    assert pickle.loads(pickle.dumps(counterfactual)) == counterfactual


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"none"}))
def test_all_but_none_change_the_picture(name: str) -> None:
    assert apply(name, picture(), other=lambda: picture(seed=9)) != picture()


def test_none_gives_the_identical_picture() -> None:
    assert apply("none", picture()).tobytes() == picture().tobytes()


# ---------------------------------------------------------------- blur


def naive_blur(image: Image.Image, sigma: float) -> np.ndarray:
    """Direct two-dimensional convolution with a sampled Gaussian, in float64, over the mirrored picture."""
    radius = math.ceil(8 * sigma)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    padded = np.pad(levels(image), ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    result = np.zeros_like(levels(image))
    for i, down in enumerate(weights / weights.sum()):
        for j, right in enumerate(weights / weights.sum()):
            result += down * right * padded[i : i + image.height, j : j + image.width]
    return result


@pytest.mark.parametrize(
    ("size", "sigma"),
    [((9, 7), 0.05), ((9, 7), 0.1), ((31, 20), 0.1), ((20, 31), 0.25), ((12, 40), 0.02), ((5, 6), 1.5), ((1, 8), 0.7)],
)
def test_blur_is_the_true_gaussian_convolution(size: tuple[int, int], sigma: float) -> None:
    image = picture(*size)
    expected = naive_blur(image, sigma * min(size))
    assert np.abs(levels(apply(f"blur:sigma={sigma}", image)) - expected).max() <= 0.51  # rounding to grey levels


def test_blur_of_an_edge_is_the_error_function() -> None:
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[:, 100:] = 200
    middle = levels(apply("blur:sigma=0.08", Image.fromarray(pixels)))[50, :, 0]
    expected = [200 * 0.5 * (1 + math.erf((x + 0.5 - 100) / (8 * math.sqrt(2)))) for x in range(200)]
    assert np.abs(middle - expected).max() < 0.6


def test_blur_has_the_same_strength_at_any_resolution() -> None:
    small = picture(30, 20)
    large = small.resize((300, 200), Image.Resampling.NEAREST)
    shrunk = apply("blur:sigma=0.2", large).resize((30, 20), Image.Resampling.BOX)
    assert np.abs(levels(shrunk) - levels(apply("blur:sigma=0.2", small))).max() < 1.5


@given(value=st.integers(0, 255), sigma=st.floats(1e-6, 100), width=st.integers(1, 60), height=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_blur_keeps_a_constant_picture(value: int, sigma: float, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (value, 0, 255))
    assert Blur(sigma=sigma)(image, rng=np.random.default_rng(0), other=never) == image


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5, 3])
def test_blur_keeps_the_mean_colour(sigma: float) -> None:
    image = picture(61, 47)
    blurred = apply(f"blur:sigma={sigma}", image)
    assert np.abs(levels(blurred).mean(axis=(0, 1)) - levels(image).mean(axis=(0, 1))).max() < 0.51


def test_a_stronger_blur_leaves_less_contrast_until_only_the_mean_is_left() -> None:
    contrasts = [levels(apply(f"blur:sigma={sigma}", picture())).std() for sigma in (1e-6, 0.05, 0.1, 0.2)]
    assert contrasts == sorted(contrasts, reverse=True)
    assert apply("blur:sigma=1e-6", picture()) == picture()
    assert apply("blur:sigma=100", picture()) == apply("mean", picture())


# ---------------------------------------------------------------- the others


def test_mean_is_one_colour_the_average() -> None:
    image = picture()
    colours = apply("mean", image).getcolors()
    expected = tuple(round(sum(channel.tobytes()) / (37 * 23)) for channel in image.split())
    assert colours == [(37 * 23, expected)]


@pytest.mark.parametrize("step", [100, 500, 900])
def test_noise_has_the_mean_and_the_spread_of_forward_diffusion(step: int) -> None:
    kept = 1.0
    for index in range(step + 1):  # the schedule of VCD, one step at a time
        beta = 1 / (1 + math.exp(-(-6 + 12 * index / 999))) * (0.5e-2 - 1e-5) + 1e-5
        kept *= 1 - beta
    image = Image.new("RGB", (200, 200), (120, 130, 140))
    result = levels(apply(f"noise:step={step}", image))
    for channel, value in enumerate((120, 130, 140)):
        mean, std = CLIP_MEAN[channel], CLIP_STD[channel]
        normalised = math.sqrt(kept) * (value / 255 - mean) / std
        drawn = normalised + math.sqrt(1 - kept) * np.random.default_rng(1).standard_normal(200_000)
        expected = ((drawn * std + mean) * 255).round().clip(0, 255)
        assert result[..., channel].mean() == pytest.approx(expected.mean(), abs=1.5)
        assert result[..., channel].std() == pytest.approx(expected.std(), rel=0.03)


def test_noise_of_the_first_step_is_hardly_there_and_differs_between_channels() -> None:
    grey = Image.new("RGB", (50, 50), (128, 128, 128))
    assert np.abs(levels(apply("noise:step=0", grey)) - 128).max() < 5
    strong = levels(apply("noise", grey))
    assert abs(np.corrcoef(strong[..., 0].ravel(), strong[..., 1].ravel())[0, 1]) < 0.1


@given(width=st.integers(1, 40), height=st.integers(1, 40), grid=st.integers(2, 12), seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_shuffle_moves_pixels_and_loses_none(width: int, height: int, grid: int, seed: int) -> None:
    numbered = np.arange(width * height)
    image = Image.fromarray(
        np.stack([numbered % 256, numbered // 256, numbered * 0], axis=1).astype(np.uint8).reshape(height, width, 3)
    )
    shuffled = Shuffle(grid=grid)(image, rng=np.random.default_rng(seed), other=never)
    colours = [tuple(pixel) for pixel in np.asarray(shuffled).reshape(-1, 3)]
    assert sorted(colours) == sorted(tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3))
    assert (shuffled == image) == (width * height == 1)


def test_shuffle_moves_whole_cells_and_leaves_the_remainder() -> None:
    image = picture(17, 11)
    before, after = np.asarray(image), np.asarray(apply("shuffle:grid=4", image))
    cells = [
        [pixels[i : i + 2, j : j + 4].tobytes() for i in range(0, 8, 2) for j in range(0, 16, 4)]
        for pixels in (before, after)
    ]
    assert cells[0] != cells[1]
    assert sorted(cells[0]) == sorted(cells[1])
    assert (before[8:] == after[8:]).all()
    assert (before[:, 16:] == after[:, 16:]).all()


def test_every_order_but_the_original_can_come_out_of_a_shuffle() -> None:
    image = Image.fromarray(np.arange(3, dtype=np.uint8).reshape(1, 3, 1).repeat(3, axis=2))
    rng = np.random.default_rng(0)
    orders = {tuple(np.asarray(Shuffle(grid=3)(image, rng=rng, other=never))[0, :, 0]) for _ in range(100)}
    assert orders == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}


def test_swap_shows_the_other_picture() -> None:
    same_size = picture(seed=5)
    assert apply("swap", picture(), other=lambda: same_size) == same_size
    red = Image.new("RGBA", (3, 90), (255, 0, 0, 255))
    assert apply("swap", picture(), other=lambda: red).getcolors() == [(37 * 23, (255, 0, 0))]


# ---------------------------------------------------------------- names and options


def test_a_spec_records_every_option() -> None:
    assert parse_counterfactual("blur").spec == f"blur:sigma={DEFAULT_BLUR_SIGMA}"
    assert parse_counterfactual(" blur : sigma = .25 ").spec == "blur:sigma=0.25"
    assert parse_counterfactual("noise:step=7") == Noise(step=7)
    assert parse_counterfactual("none").spec == "none"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'blur'"):
        parse_counterfactual("blurr:sigma=1")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("blur:strength=1", "options of blur: sigma=0.2"),
        ("blur:0.1", "options of blur: sigma=0.2"),
        ("blur:sigma=0.1,sigma=0.2", "options of blur: sigma=0.2"),
        ("blur:sigma=0.1,", "options of blur: sigma=0.2"),
        ("blur:sigma=strong", "not float; options of blur: sigma=0.2"),
        ("blur:sigma=0", "above 0"),
        ("blur:sigma=-1", "above 0"),
        ("blur:sigma=nan", "above 0"),
        ("blur:sigma=inf", "above 0"),
        ("noise:step=1000", "between 0 and 999"),
        ("noise:step=-1", "between 0 and 999"),
        ("noise:step=1.5", "not int; options of noise: step=500"),
        ("shuffle:grid=1", "at least 2"),
        ("mean:sigma=1", "mean takes no options"),
        ("blur:name=x", "options of blur: sigma=0.2"),
    ],
)
def test_a_wrong_option_is_a_configuration_error_that_lists_the_right_ones(spec: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_counterfactual(spec)


@given(spec=st.text() | st.builds("{}:{}={}".format, st.sampled_from(BUILT_IN), st.text(), st.text()))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_counterfactual_or_a_configuration_error(spec: str) -> None:
    try:
        result = parse_counterfactual(spec)
    except ConfigError:
        return
    assert parse_counterfactual(result.spec) == result


@dataclass(frozen=True)
class Paint(Counterfactual):
    """A toy plug-in."""

    level: int = 7
    name: ClassVar[str] = "paint"

    def __call__(
        self, image: Image.Image, *, rng: np.random.Generator, other: Callable[[], Image.Image]
    ) -> Image.Image:
        return Image.new("RGB", image.size, (self.level,) * 3)


def test_another_package_adds_a_counterfactual_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_plugin")
    module.Paint = Paint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_plugin", module)

    def entry_points(*, group: str) -> list[EntryPoint]:
        points = [EntryPoint("paint", "toy_plugin:Paint", "visgain.counterfactuals")]
        return [point for point in points if point.group == group]

    monkeypatch.setattr(visgain.registry, "entry_points", entry_points)
    assert "paint" in COUNTERFACTUALS.names()
    painter = parse_counterfactual("paint:level=9")
    assert painter.spec == "paint:level=9"
    assert painter(picture(), rng=np.random.default_rng(0), other=never).getcolors() == [(37 * 23, (9, 9, 9))]
