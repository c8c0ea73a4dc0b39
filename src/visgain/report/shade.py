"""How strongly a gain is coloured: one diverging scale for the page and for the terminal."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

FAINT = 0.04  # weaker than this share of the scale is left uncoloured


def colour_limit(gains: Float[np.ndarray, " N"]) -> float:
    """The gain in nats that takes full colour: nearly the largest magnitude, or a few outliers would pale the rest.

    Rounded up to halves, at least 0.5; the same colour means the same gain in every sample that shares the limit.
    """
    if len(gains) == 0:
        return 0.5
    return max(0.5, float(np.ceil(np.quantile(np.abs(gains.astype(np.float64)), 0.97) * 2) / 2))


def strength(gain: float, limit: float) -> float:
    """Signed colour strength in [-1, 1], 0 where the gain is too small to colour."""
    share = max(-1.0, min(1.0, gain / limit))
    return share if abs(share) >= FAINT else 0.0
