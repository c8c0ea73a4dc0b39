"""Videos as frames: which of them, where they stand in the text, and what is said of those that are not frames."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visgain.config import ScoreConfig
from visgain.data import open_dataset
from visgain.data.videos import FRAMES, evenly
from visgain.errors import ConfigError
from visgain.scoring.run import run_score
from visgain.storage import read_scores
from visgain.types import Sample, Skipped


def row(text: str, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A dog runs."}], **fields}


def messages(content: list[Any], **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog runs."}],
        **fields,
    }


def read(folder: Path, one: dict[str, Any], **options: Any) -> Sample | Skipped:
    """The row, of a file that has another one, to be told by as what it is."""
    other = row("Q") if "conversations" in one else messages(["Q"])
    (folder / "data.json").write_text(json.dumps([one, other]))
    return open_dataset(folder / "data.json", **options)[0]


def shown(folder: Path, one: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    """The text of the first turn, and the pictures by name."""
    sample = read(folder, one, **options)
    assert isinstance(sample, Sample), sample
    return sample.turns[0].text, [image.key for image in sample.images]


def reason(folder: Path, one: dict[str, Any]) -> str:
    skipped = read(folder, one)
    assert isinstance(skipped, Skipped), skipped
    assert "\n" not in skipped.reason
    return skipped.reason


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """clips/7 with 12 frames whose names sort wrongly as text, clips/short with 2, clips/9.mp4 and its frames."""
    for name, count in (("7", 12), ("short", 2), ("9", 3)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for k in range(1, count + 1):
            Image.new("RGB", (20, 20), (20 * k, 0, 0)).save(tmp_path / "clips" / name / f"frame{k}.png")
    (tmp_path / "clips/7/notes.txt").write_text("not a frame")
    for name in ("9.mp4", "cut it.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"\0\0\0\x18ftypmp42")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.png")
    return tmp_path


SEVEN = [f"clips/7/frame{k}.png" for k in (1, 3, 4, 6, 7, 9, 10, 12)]
SHORT = ["clips/short/frame1.png", "clips/short/frame2.png"]


# ---------------------------------------------------------------- which frames


@given(n=st.integers(0, 300), most=st.integers(1, 40))
def test_frames_are_spread_evenly_from_the_first_to_the_last(n: int, most: int) -> None:
    chosen = evenly(range(n), most)
    assert len(chosen) == min(n, most)
    assert chosen == sorted(set(chosen))
    if n > 1 and most > 1:
        assert (chosen[0], chosen[-1]) == (0, n - 1)
        gaps = {later - earlier for earlier, later in pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1
    if n and most == 1:
        assert chosen == [(n - 1) // 2]


def test_a_folder_of_frames_is_eight_pictures_in_the_order_of_their_numbers(clips: Path) -> None:
    assert shown(clips, row("<video>\nWhat happens?", video="clips/7")) == (
        "<image>" * FRAMES + "\nWhat happens?",
        SEVEN,
    )


@pytest.mark.parametrize(("most", "numbers"), [(1, [6]), (2, [1, 12]), (3, [1, 7, 12]), (50, list(range(1, 13)))])
def test_the_user_says_how_many_frames(clips: Path, most: int, numbers: list[int]) -> None:
    text, keys = shown(clips, row("<video>What?", video="clips/7"), columns=f"frames={most}")
    assert text == "<image>" * len(numbers) + "What?"
    assert keys == [f"clips/7/frame{k}.png" for k in numbers]


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "2.5"])
def test_a_number_of_frames_that_is_none_is_refused(clips: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"frames={wrong}"):
        read(clips, row("<video>", video="clips/7"), columns=f"frames={wrong}")


@pytest.mark.parametrize(
    "fields",
    [
        {"video": SHORT},
        {"videos": [SHORT]},
        {"videos": SHORT},  # pictures: the frames of one video
        {"videos": ["clips/short"]},
        {"video": "clips/short/"},
        {"video": {"path": "clips/short"}},
    ],
    ids=str,
)
def test_frames_may_be_listed_or_lie_in_a_folder(clips: Path, fields: dict[str, Any]) -> None:
    assert shown(clips, row("<video>\nWhat?", **fields)) == ("<image><image>\nWhat?", SHORT)


def test_the_frames_of_an_encoded_file_are_looked_for_beside_it(clips: Path) -> None:
    _, keys = shown(clips, row("<video>\nWhat?", video="clips/9.mp4"))
    assert keys == [f"clips/9/frame{k}.png" for k in (1, 2, 3)]


# ---------------------------------------------------------------- where they stand


def test_images_and_videos_stand_where_their_marks_do(clips: Path) -> None:
    one = row("See <image> and <video>, then <video>.", image="a.png", videos=["clips/short", "clips/9"])
    text, keys = shown(clips, one)
    assert text == "See <image> and <image><image>, then <image><image><image>."
    assert keys == ["a.png", *SHORT, *(f"clips/9/frame{k}.png" for k in (1, 2, 3))]


def test_a_video_in_a_later_turn_stands_there(clips: Path) -> None:
    one = row("<image>\nWhat?", image="a.png", video="clips/short")
    one["conversations"] += [{"from": "human", "value": "And here? <video>"}, {"from": "gpt", "value": "A cat."}]
    sample = read(clips, one)
    assert isinstance(sample, Sample)
    assert [turn.text for turn in sample.turns[::2]] == ["<image>\nWhat?", "And here? <image><image>"]
    assert [image.key for image in sample.images] == ["a.png", *SHORT]


def test_without_any_mark_frames_are_at_the_front_after_the_images(clips: Path) -> None:
    text, keys = shown(clips, row("What?", image="a.png", video="clips/short"))
    assert text == "<image>\n<image>\n<image>\nWhat?"
    assert keys == ["a.png", *SHORT]


def test_a_video_that_is_marked_as_an_image_is_understood_where_there_is_no_image(clips: Path) -> None:
    assert shown(clips, row("<image>\nWhat?", video="clips/short")) == ("<image><image>\nWhat?", SHORT)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "video", "video": "clips/short"}, {"type": "text", "text": "What?"}],
        [{"type": "video", "video": SHORT}, {"type": "text", "text": "What?"}],
        [{"video": "clips/short"}, {"text": "What?"}],
        [{"type": "video_url", "video_url": {"url": "clips/short"}}, {"type": "text", "text": "What?"}],
    ],
    ids=str,
)
def test_a_video_may_be_a_part_of_a_message(clips: Path, content: list[Any]) -> None:
    assert shown(clips, messages(content)) == ("<image><image>What?", SHORT)


def test_a_part_may_hold_the_place_alone(clips: Path) -> None:
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    text, keys = shown(clips, messages(content, images=["a.png"], videos=["clips/short"]))
    assert (text, keys) == ("<image><image><image>What?", ["a.png", *SHORT])


def test_a_word_in_pointed_brackets_is_a_word_where_there_is_no_video(clips: Path) -> None:
    assert shown(clips, row("What does <video> do in HTML?")) == ("What does <video> do in HTML?", [])


# ---------------------------------------------------------------- what is no video


def test_an_encoded_video_is_a_reason_with_the_command_that_helps(clips: Path) -> None:
    why = reason(clips, row("<video>\nWhat?", video="clips/cut it.mp4"))
    assert "encoded video, of which frames must be extracted" in why
    command = why.partition("extracted: ")[2]
    assert command == "mkdir -p 'clips/cut it' && ffmpeg -i 'clips/cut it.mp4' -vf fps=1 'clips/cut it'/%05d.jpg"
    ffmpeg = 'ffmpeg() { cp a.png "${@: -1}"; }; '  # where there is none: what it is told to write is what is read
    subprocess.run(["bash", "-c", ffmpeg + command.replace("%05d.jpg", "00001.jpg")], cwd=clips, check=True)
    assert shown(clips, row("<video>\nWhat?", video="clips/cut it.mp4"))[1] == ["clips/cut it/00001.jpg"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": "clips/gone"}, "video not found: clips/gone"),
        ({"video": "../clips"}, "video path ../clips leads out of --image-root"),
        ({"video": "/etc"}, "is absolute"),
        ({"video": "https://a.b/c.mp4"}, "is a URL"),
        ({"video": "a\0b"}, "null byte"),
        ({"videos": ["", "clips/7"]}, "the video path is empty"),
        ({"video": 7}, "a number, not a path"),
        ({"videos": [[]]}, "a list of no frames"),
        ({"videos": ["clips/7", "clips/9"]}, "2 videos but its text holds <video> 1 times"),
        ({"video": "clips/7", "image": "a.png"}, "1 images but its text holds <image> 0 times"),
        ({"video": "clips/7", "audio": "a.wav"}, "the row has 'audio'"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_a_reason(clips: Path, fields: dict[str, Any], message: str) -> None:
    assert message in reason(clips, row("<video>\nWhat?", **fields))


def test_a_folder_without_pictures_is_no_video(clips: Path) -> None:
    (clips / "texts").mkdir()
    (clips / "texts/a.txt").write_text("a")
    assert "holds no pictures" in reason(clips, row("<video>", video="texts"))


def test_a_link_out_of_the_image_folder_is_not_followed(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (20, 20)).save(outside / "1.png")
    (clips / "linked").symlink_to(outside)
    assert "link out of --image-root" in reason(clips, row("<video>", video="linked"))
    assert shown(clips, row("<video>", video="linked"), follow_links=True)[1] == ["linked/1.png"]


# ---------------------------------------------------------------- scored


def test_a_video_is_scored_as_its_frames_are_as_images(blank_model: Path, clips: Path, tmp_path: Path) -> None:
    rows = [row("<video>\nWhat?", video="clips/short"), row("<image><image>\nWhat?", images=SHORT)]
    (clips / "data.json").write_text(json.dumps([*rows, row("<video>", video="clips/cut it.mp4")]))
    options = {"model": str(blank_model), "data": clips / "data.json", "workers": 0, "per_image": True}
    done = run_score(ScoreConfig(out=tmp_path / "out", **options))
    assert (done.multimodal, done.skipped) == (2, 1)
    video, images, _ = read_scores(tmp_path / "out", ["nll_seen", "nll_blind_image", "n_images"]).to_pylist()
    assert video == images
    assert len(video["nll_blind_image"]) == 2
