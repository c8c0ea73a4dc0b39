r"""Videos as what a model sees of them: a few pictures, evenly spaced, where the video stands in the text.

    {"video": "clips/7", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, ...]}

A video is a folder of frames (in the order of the numbers in their names), or a list of frames. Encoded files are not
decoded; for `clips/7.mp4` the folder `clips/7` is taken where somebody has extracted its frames to it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from visgain.data.conversation import Said, Unusable, printable
from visgain.data.images import ImageFile
from visgain.errors import ImageError
from visgain.types import IMAGE_MARK, ImageRef

VIDEO_MARK = "<video>"
FRAMES = 8
"""Frames of a video that are shown at most, unless the user says otherwise."""

_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|avif)$", re.IGNORECASE)
_PARTS = ("video", "video_url")
_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")

Frames = tuple[ImageRef, ...]


def listed_videos(value: Any) -> Sequence[Any]:
    """What stands in a field of videos: one (a path, or the list of its frames), several or none."""
    if value is None or value in ("", [], ()):
        return ()
    if not isinstance(value, list | tuple):
        return (value,)
    return (value,) if all(isinstance(path, str) and _PICTURE.search(path) for path in value) else value


def video_frames(video: Any, open_image: Callable[[Any], ImageRef], most: int) -> Frames:
    """At most `most` frames of a video, evenly spaced from its first to its last. Raises Unusable if it has none."""
    if isinstance(video, list | tuple):
        frames = [open_image(frame) for frame in evenly(video, most)]
    else:
        frames = [open_image(path) for path in evenly(_frame_paths(open_image(video)), most)]
    if not frames:
        raise Unusable("a video is a list of no frames")
    return tuple(frames)


def evenly(frames: Sequence[Any], most: int) -> list[Any]:
    """`most` of `frames` at equal distances, first and last among them (of one the middle); all if they are fewer."""
    last = len(frames) - 1
    if last < most:
        return list(frames)
    if most == 1:
        return [frames[last // 2]]
    return [frames[(2 * k * last + most - 1) // (2 * (most - 1))] for k in range(most)]


def _frame_paths(video: ImageRef) -> list[str]:
    """The paths of all frames of a video that is named by a path. Raises Unusable."""
    if not isinstance(video, ImageFile):
        raise Unusable("the row holds an encoded video; extract frames (ffmpeg) and name their folder, or list them")
    path = PurePosixPath(video.key)
    without_suffix = path.parent / path.stem
    try:
        there = video.is_there()
        for folder in (path, without_suffix):
            names = video.beside(str(folder)).names()
            frames = sorted(filter(_PICTURE.search, names), key=_by_number)
            if frames:
                return [str(folder / name) for name in frames]
            if names:
                raise Unusable(f"the folder {printable(str(folder))} holds no pictures that could be a video's frames")
    except ImageError as error:
        raise Unusable(str(error).replace("image", "video", 1)) from None
    if not there:
        raise Unusable(f"video not found: {printable(str(path))}, nor frames in {printable(str(without_suffix))}")
    out = shlex.quote(printable(str(without_suffix)))
    command = f"mkdir -p {out} && ffmpeg -i {shlex.quote(printable(str(path)))} -vf fps=1 {out}/%05d.jpg"
    raise Unusable(f"{printable(str(path))} is an encoded video, of which frames must be extracted: {command}")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Order in which frame 2 comes before frame 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def with_frames(said: Sequence[Said], images: Frames, videos: Sequence[Frames]) -> tuple[Sequence[Said], Frames]:
    """The conversation with a mark for each frame where there is one for a video, and all pictures in that order.

    Without any mark, videos follow the images at the front. LLaVA-Video's data marks its one video like an image, which
    is understood if there are no images. Raises Unusable if marks and videos or images are not equally many.
    """
    if not videos:
        return said, images
    marks = [mark for role, text in said if role == "user" for mark in _MARK.findall(text)]
    if not marks:
        return said, images + tuple(frame for video in videos for frame in video)
    if not images and VIDEO_MARK not in marks:
        said = [(role, text.replace(IMAGE_MARK, VIDEO_MARK) if role == "user" else text) for role, text in said]
        marks = [VIDEO_MARK] * len(marks)
    for mark, kind, media in ((VIDEO_MARK, "video", videos), (IMAGE_MARK, "image", images)):
        if marks.count(mark) != len(media):
            raise Unusable(f"the row has {len(media)} {kind}s but its text holds {mark} {marks.count(mark)} times")
    waiting_images, waiting_videos = iter(images), iter(videos)
    shown = [next(waiting_videos) if mark == VIDEO_MARK else (next(waiting_images),) for mark in marks]
    sizes = iter(map(len, shown))
    marked = [
        (role, _MARK.sub(lambda _: IMAGE_MARK * next(sizes), text) if role == "user" else text) for role, text in said
    ]
    return marked, tuple(frame for frames in shown for frame in frames)


def is_video(part: Any) -> bool:
    """Whether a part of a message is a video, or the place of one."""
    if not isinstance(part, Mapping):
        return False
    return part.get("type") in _PARTS or (part.get("type") is None and any(part.get(name) for name in _PARTS))


def part_video(part: Mapping[str, Any]) -> list[Any]:
    """The video that a part of a message holds; none where it only holds the place."""
    found = next((part[name] for name in (*_PARTS, "url", "path") if part.get(name)), None)
    found = found.get("url") if isinstance(found, Mapping) else found
    return [] if found is None else [found]
