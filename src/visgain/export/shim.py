"""Shims as single files: a foreign environment gets one module that needs torch and the standard library alone."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from visgain.storage import write_text

_FUTURE = "from __future__ import annotations\n"
_IMPORT = re.compile(r"^from visgain\.export\.shims\.(\w+) import [^(\n]+\n", re.M)
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.S)


def shim_source(name: str) -> str:
    """The source of shims/NAME.py, in which the first line that imports from another shim has become that shim."""
    return _joined(name, set())


def _joined(name: str, there: set[str]) -> str:
    def in_place(found: re.Match[str]) -> str:
        if found[1] in there:
            return ""
        there.add(found[1])
        return _body(_joined(found[1], there))

    source = (files("visgain.export") / "shims" / f"{name}.py").read_text(encoding="utf-8")
    return _IMPORT.sub(in_place, source)


def _body(source: str) -> str:
    return _DOCSTRING.sub("", source).replace(_FUTURE, "").strip() + "\n"


def write_shim(out: Path, name: str, file_name: str | None = None) -> Path:
    """Put a shim into an export as `file_name`, by default visgain_NAME.py. Returns its path."""
    path = out / (file_name or f"visgain_{name}.py")
    write_text(path, shim_source(name))
    return path
