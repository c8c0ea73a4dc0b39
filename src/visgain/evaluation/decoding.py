"""How a model's next token is chosen: greedily, or by one of the training-free methods against hallucination."""

from __future__ import annotations

from visgain.evaluation.generate import Decoder
from visgain.registry import Registry

DECODERS: Registry[Decoder] = Registry("decoding", {"greedy": "visgain.evaluation.generate:Greedy"})


def parse_decoder(spec: str) -> Decoder:
    """The decoder that `name` or `name:key=value,key=value` says. Raises UnknownName or ConfigError."""
    made: Decoder = DECODERS.make(spec)
    return made
