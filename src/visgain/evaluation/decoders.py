"""The decoding methods by name; importing this imports none of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visgain.registry import Registry

if TYPE_CHECKING:
    from visgain.evaluation.generate import Decoder

DECODERS: Registry[Any] = Registry(
    "decoding",
    {
        "greedy": "visgain.evaluation.generate:Greedy",
        "sample": "visgain.evaluation.decoding:Sample",
        "vcd": "visgain.evaluation.decoding:VCD",
        "pai": "visgain.evaluation.decoding:PAI",
        "m3id": "visgain.evaluation.decoding:M3ID",
        "guidance": "visgain.evaluation.decoding:Guidance",
        "var": "visgain.evaluation.decoding:VAR",
    },
)


def parse_decoder(spec: str, seed: int = 0) -> Decoder:
    """The decoder that `name` or `name:key=value,key=value` says. Raises UnknownName or ConfigError.

    seed: that of a decoder that draws, where `spec` says none.
    """
    made: Any = DECODERS.make(spec)
    options = {option.partition("=")[0].strip() for option in spec.partition(":")[2].split(",")}
    decoder: Decoder = replace(made, seed=seed) if hasattr(made, "seed") and "seed" not in options else made
    return decoder
