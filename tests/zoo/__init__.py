"""Tiny random models of many families: `ZOO[name].build()` is a VLM, `ZOO[name].encode` makes a sample fit for it."""

from zoo import llava
from zoo.base import Entry

ZOO: dict[str, Entry] = {entry.name: entry for module in (llava,) for entry in module.ENTRIES}

__all__ = ["ZOO", "Entry"]
