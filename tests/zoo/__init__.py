"""Tiny random models of many families: `ZOO[name].build()` is a VLM, `ZOO[name].encode` makes a sample fit for it."""

from zoo import blip, direct, google, grids, llava, meta, mistral, others, qwen, tiles
from zoo.base import Entry

MODULES = (llava, qwen, grids, tiles, mistral, google, meta, blip, direct, others)
ZOO: dict[str, Entry] = {entry.name: entry for module in MODULES for entry in module.ENTRIES}

__all__ = ["ZOO", "Entry"]
