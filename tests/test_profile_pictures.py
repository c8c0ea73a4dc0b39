"""Pictures reach the vision tower as in the recipes, pixel by pixel, by plain numpy and one call of Pillow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tiny_llava import clip_llava, qwen2_like, siglip_llava, vicuna_like
from tiny_models import make_sample
from visgain.errors import EncodingError
from visgain.vlm.frozen import FrozenEncoder, pad_to_square
from visgain.vlm.load import VLM
from visgain.vlm.template import make_encoder

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZES = [(7, 3), (3, 7), (50, 31), (31, 50), (64, 64), (401, 337), (337, 401), (1, 9), (700, 500)]


def picture(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def padded(pixels: np.ndarray) -> np.ndarray:
    """In the middle of a square; what cannot be halved goes below or to the right."""
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.tile(np.array([122, 116, 104], np.uint8), (side, side, 1))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def normalised(pixels: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    return ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def tuned(pixels: np.ndarray) -> np.ndarray:
    return normalised(resized(padded(pixels), 336, 336), CLIP_MEAN, CLIP_STD)


def aligned(pixels: np.ndarray) -> np.ndarray:
    """The short side to 336, the long one in proportion and cut off to whole pixels; the middle 336 of it."""
    height, width, _ = pixels.shape
    short = min(height, width)
    big = resized(pixels, 336 * height // short, 336 * width // short)
    top, left = (big.shape[0] - 336) // 2, (big.shape[1] - 336) // 2
    return normalised(big[top : top + 336, left : left + 336], CLIP_MEAN, CLIP_STD)


def squashed(pixels: np.ndarray) -> np.ndarray:
    return normalised(resized(pixels, 384, 384), [0.5] * 3, [0.5] * 3)


RECIPES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[], VLM]]] = {
    "llava-1.5": (tuned, lambda: clip_llava(vicuna_like("legacy"))),
    "llava-1.5-align": (aligned, lambda: clip_llava(vicuna_like("legacy"))),
    "sharegpt4v": (tuned, lambda: clip_llava(vicuna_like("legacy"), do_pad=True)),
    "sharegpt4v-align": (aligned, lambda: clip_llava(vicuna_like("legacy"), do_pad=True)),
    "open-qwen2vl": (squashed, lambda: siglip_llava(qwen2_like(None))),
}


def seen(encoder: FrozenEncoder, image: Image.Image) -> np.ndarray:
    return encoder.encode(make_sample("<image>", "A cup."), [image]).model_inputs["pixel_values"][0].numpy()


@pytest.mark.parametrize("name", RECIPES)
def test_a_picture_reaches_the_tower_as_in_the_recipe(name: str) -> None:
    expected, build = RECIPES[name]
    encoder = make_encoder(build(), name)
    assert isinstance(encoder, FrozenEncoder)
    for size in SIZES:
        image = picture(size)
        assert np.allclose(seen(encoder, image), expected(np.asarray(image)), rtol=0, atol=1e-5), size


def test_an_image_processor_that_pads_by_itself_is_kept_from_it() -> None:
    one, other = (make_encoder(clip_llava(vicuna_like("legacy"), do_pad=pads), "llava-1.5") for pads in (True, False))
    assert one.processor.image_processor.do_pad
    image = picture((50, 31))
    assert np.array_equal(seen(one, image), seen(other, image))
    by_itself = one.processor.image_processor(image, return_tensors="np")["pixel_values"][0]
    aligning = make_encoder(clip_llava(vicuna_like("legacy"), do_pad=True), "llava-1.5-align")
    assert not np.allclose(seen(aligning, image), by_itself, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("setting", "value"), [("do_center_crop", False), ("size", {"height": 336, "width": 336}), ("resample", 2)]
)
def test_other_settings_of_the_processor_change_no_recipe(setting: str, value: object) -> None:
    for name in ("llava-1.5", "llava-1.5-align"):
        vlm = clip_llava(vicuna_like("legacy"))
        setattr(vlm.processor.image_processor, setting, value)
        image = picture((50, 31))
        assert np.allclose(seen(make_encoder(vlm, name), image), RECIPES[name][0](np.asarray(image)), atol=1e-5)


@pytest.mark.parametrize(("width", "height", "box"), [(7, 3, (0, 2, 7, 5)), (7, 4, (0, 1, 7, 5)), (4, 7, (1, 0, 5, 7))])
def test_padding_centres_with_the_odd_pixel_behind(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", (width, height), (1, 2, 3))
    square = pad_to_square(image)
    assert square.size == (7, 7)
    assert np.asarray(square.crop(box)).reshape(-1, 3).tolist() == [[1, 2, 3]] * (width * height)
    assert sorted(square.getcolors()) == sorted([(width * height, (1, 2, 3)), (49 - width * height, (122, 116, 104))])


def test_a_line_is_refused_before_it_grows_to_gigabytes() -> None:
    encoder = make_encoder(clip_llava(vicuna_like("legacy")), "llava-1.5-align")
    with pytest.raises(EncodingError, match="a picture of 2 x 1000 pixels is too narrow to be cropped"):
        seen(encoder, Image.new("RGB", (2, 1000)))
