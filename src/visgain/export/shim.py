"""Shims as single files: a foreign environment gets one module that needs torch and the standard library alone."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from visgain.storage import write_text

_FUTURE = "from __future__ import annotations\n"
_COMMON = re.compile(r"^from visgain\.export\.shims\.masks import [^(\n]+\n", re.M)
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.S)


def shim_source(name: str) -> str:
    """The source of shims/NAME.py, in which the line that imports from shims/masks.py has become that file."""
    folder = files("visgain.export") / "shims"
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    common = _DOCSTRING.sub("", (folder / "masks.py").read_text(encoding="utf-8")).replace(_FUTURE, "")
    return _COMMON.sub(lambda _: common.strip() + "\n", source, count=1)


def write_shim(out: Path, name: str, file_name: str | None = None) -> Path:
    """Put a shim into an export as `file_name`, by default visgain_NAME.py. Returns its path."""
    path = out / (file_name or f"visgain_{name}.py")
    write_text(path, shim_source(name))
    return path
