import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from visgain.data.images import ImageFile, ImageSpan
from visgain.errors import ImageError
from visgain.types import ImageRef


def picture(width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(root: Path, path: str, **options: object) -> str:
    """The reason for which the image is refused, after checking its form."""
    with pytest.raises(ImageError) as caught:
        ImageFile(root=root, path=path, **options).open()  # type: ignore[arg-type]
    reason = str(caught.value)
    assert reason.isprintable()
    assert len(reason) < 500
    return reason


def outcome(image: ImageFile) -> Image.Image | str:
    """The picture, or the reason for which there is none."""
    try:
        return image.open()
    except ImageError as error:
        return str(error)


def opened(root: Path, data: bytes, name: str = "x.jpg", **options: object) -> Image.Image:
    (root / name).write_bytes(data)
    image = ImageFile(root=root, path=name, **options).open()  # type: ignore[arg-type]
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    return image


# ---------------------------------------------------------------- what comes out


def test_a_lossless_picture_comes_out_as_it_was_saved(tmp_path: Path) -> None:
    assert opened(tmp_path, encoded(picture(), "PNG")) == picture()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "MPO"])
def test_formats_are_recognised_by_content_whatever_the_name(tmp_path: Path, kind: str) -> None:
    module = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}.get(kind)
    if module and not features.check(module):
        pytest.skip(f"this Pillow has no {kind}")
    smooth = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))
    image = opened(tmp_path, encoded(smooth, kind), name="named.gif")
    assert image.size == (32, 32)
    assert np.abs(np.asarray(image, float) - np.asarray(smooth, float)).mean() < 12


def test_a_gif_named_jpg_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(tmp_path, data, name="x.jpg") == frames[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16] = 250  # white at the top left; the other corners differ from each other
    pixels[8:, :16] = (250, 0, 0)
    pixels[:8, 16:] = (0, 0, 250)
    by_hand = {  # what the EXIF standard says about row 0 and column 0
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"subsampling": 0, "quality": 95} if kind == "JPEG" else {}
    image = opened(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif, **options))
    assert image.size == (by_hand.shape[1], by_hand.shape[0])
    assert np.abs(np.asarray(image, int) - by_hand).max() < 16
    assert dict(image.getexif()) == {}
    assert image.info == {}


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no TIFF header", b"Exif\0\0"])
def test_unreadable_exif_leaves_the_picture_as_it_is(tmp_path: Path, exif: bytes) -> None:
    assert opened(tmp_path, encoded(picture(), "PNG", exif=exif)) == picture()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257, 32767, 65407, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = opened(tmp_path, encoded(Image.fromarray(levels), kind))
        expected = [round(int(level) / 65535 * 255) for level in levels[0]]
        assert [pixel[0] for pixel in np.asarray(image)[0]] == expected == [0, 0, 1, 1, 127, 255, 255]


def test_32_bit_grey_has_no_known_range_and_is_refused(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        (tmp_path / "x.tif").write_bytes(encoded(Image.fromarray(np.ones((2, 2), dtype=dtype)), "TIFF"))
        assert "no known range" in refused(tmp_path, "x.tif")


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_every_mode_becomes_rgb_without_a_warning(tmp_path: Path, mode: str, kind: str) -> None:
    image = opened(tmp_path, encoded(picture().convert(mode), kind))
    assert image.size == (12, 8)


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 30, 40, 50])
    palette.putpixel((1, 0), 1)
    image = opened(tmp_path, encoded(palette, "PNG", transparency=bytes([0, 128])))
    assert np.asarray(image).tolist() == [[[200, 10, 20], [30, 40, 50]]]


def test_transparency_is_dropped_as_trainers_do(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert opened(tmp_path, encoded(see_through, "PNG")).getpixel((0, 0)) == (10, 20, 30)


def test_an_image_reference_is_picklable_and_comparable(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(picture(), "PNG"))
    image: ImageRef = ImageFile(root=tmp_path, path="x.png")
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image
    assert copy.open() == image.open()


@pytest.mark.parametrize(
    ("path", "key"), [("a/b.jpg", "a/b.jpg"), ("./a//b.jpg", "a/b.jpg"), ("a/../b.jpg", "b.jpg"), ("", ".")]
)
def test_the_key_is_the_path_without_detours(path: str, key: str) -> None:
    assert ImageFile(root=Path(), path=path).key == key


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder with a secret beside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "fine.png").write_bytes(encoded(picture(), "PNG"))
    return folder


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "the image path is empty"),
        (".", "not a regular file"),
        ("../secret.png", "leads out of --image-root"),
        ("a/../../secret.png", "leads out of --image-root"),
        ("..", "leads out of --image-root"),
        ("/etc/passwd", "is absolute"),
        ("//etc/passwd", "is absolute"),
        ("fine.png\0.jpg", "null byte"),
        ("http://host/x.jpg", "is a URL"),
        ("S3://bucket/x.jpg", "is a URL"),
        ("data:image/png;base64,AAAA" + "A" * 10_000, "base64"),
        ("missing.jpg", "image not found: missing.jpg"),
        ("fine.png/x.jpg", "image not found: fine.png/x.jpg"),
        ("a\nb.jpg", r"image not found: 'a\nb.jpg'"),
        ("\ud800.jpg", "cannot read image"),
        ("x" * 5000, "cannot read image"),
    ],
)
def test_a_path_that_is_not_an_image_inside_the_root_is_refused(root: Path, path: str, expected: str) -> None:
    assert expected in refused(root, path)
    refused(root, path, follow_links=True)


@pytest.mark.parametrize("path", ["x" * 5000, "\ud800.jpg", "fine.png\0.jpg"])
def test_a_name_that_no_file_can_have_is_an_image_error_wherever_it_is_asked_for(root: Path, path: str) -> None:
    image = ImageFile(root=root, path=path)
    assert image.hint() is None
    for ask in (image.is_there, image.names):
        with pytest.raises(ImageError):
            ask()


def test_an_empty_file_has_no_hint_so_that_it_is_looked_into(root: Path) -> None:
    (root / "empty.png").write_bytes(b"")
    assert ImageFile(root=root, path="empty.png").hint() is None
    assert ImageSpan(container=root / "fine.png", name="0.png", offset=3, size=0).hint() is None
    assert ImageFile(root=root, path="fine.png").hint() is not None


def test_a_link_out_of_the_root_needs_the_flag(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    for path in ("link.png", "folder/secret.png"):
        assert "--follow-links" in refused(root, path)
        assert ImageFile(root=root, path=path, follow_links=True).open() == picture()


def test_a_link_inside_of_the_root_and_a_root_that_is_a_link_are_fine(root: Path) -> None:
    (root / "link.png").symlink_to("fine.png")
    (root.parent / "alias").symlink_to(root)
    assert ImageFile(root=root.parent / "alias", path="link.png").open() == picture()


def test_links_in_a_circle_or_into_nothing_are_refused(root: Path) -> None:
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    (root / "gone.png").symlink_to("nowhere.png")
    assert "cannot read image a.png" in refused(root, "a.png")
    assert ImageFile(root=root, path="a.png").hint() is None
    with pytest.raises(ImageError, match=r"cannot read image a\.png"):
        ImageFile(root=root, path="a.png").is_there()
    assert "not found" in refused(root, "gone.png")


_SEGMENT = st.sampled_from(["..", ".", "", "secret.png", "fine.png", "images", "up", "\0", "\\", "C:"]) | st.text()


@given(path=st.lists(_SEGMENT, max_size=6).map("/".join))
@settings(max_examples=300, deadline=None)
def test_no_path_reads_outside_of_the_root(outside: Path, path: str) -> None:
    result = outcome(ImageFile(root=outside / "images", path=path))
    if isinstance(result, Image.Image):
        assert result.getpixel((0, 0)) == (0, 255, 0)  # never the red secret
    else:
        assert result.isprintable()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "images").mkdir()
    Image.new("RGB", (2, 2), (0, 255, 0)).save(folder / "images" / "fine.png")
    Image.new("RGB", (2, 2), (255, 0, 0)).save(folder / "secret.png")
    (folder / "images" / "up").symlink_to(folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    assert "not a regular file" in refused(root, "pipe.jpg")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"not a picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"P6 1 1 255\n\0\0\0",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_a_file_that_is_no_picture_of_a_known_format_is_refused(root: Path, data: bytes) -> None:
    (root / "x.jpg").write_bytes(data)
    assert "x.jpg" in refused(root, "x.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_a_truncated_file_is_refused(root: Path, kind: str) -> None:
    data = encoded(picture(200, 200), kind)
    (root / "x").write_bytes(data[: len(data) // 2])
    assert "x" in refused(root, "x")


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(root: Path) -> None:
    data = encoded(picture(20, 10), "PNG")
    header_only = data[: data.index(b"IDAT") + 4]
    (root / "x.png").write_bytes(header_only)
    assert refused(root, "x.png", max_pixels=199) == "image x.png has 20 x 10 pixels; --max-pixels is 199"
    assert "cannot read image" in refused(root, "x.png", max_pixels=200)
    assert opened(root, data, name="whole.png", max_pixels=200).size == (20, 10)


def test_pillows_own_limit_neither_warns_nor_refuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(20, 10), "PNG")
    for limit in (150, 50):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert opened(root, data).size == (20, 10)


def test_a_warning_of_pillow_does_not_cost_the_picture(root: Path) -> None:
    data = bytearray(encoded(picture(), "TIFF"))
    exif_like = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x09\0\0\0\xff\xff\0\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(root, bytes(data)).size == (12, 8)
        assert opened(root, exif_like).size == (12, 8)


_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000")
_WHOLE = {kind: encoded(picture(24, 24), kind) for kind in _KINDS}


@given(
    kind=st.sampled_from(_KINDS),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 200),
)
@settings(max_examples=400, deadline=None)
def test_a_damaged_file_is_a_picture_or_an_image_error(
    outside: Path, kind: str, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(_WHOLE[kind])
    for position, value in edits:
        data[position % min(len(data), 400)] = value
    (outside / "images" / "damaged").write_bytes(data[: len(data) - cut])
    result = outcome(ImageFile(root=outside / "images", path="damaged", max_pixels=10_000))
    if isinstance(result, Image.Image):
        assert result.mode == "RGB"
        assert result.width * result.height <= 10_000
    else:
        assert result.isprintable()
