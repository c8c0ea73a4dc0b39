"""Arms: named ways of choosing what to train on. An arm is values only; trial.py knows what to do with them.

`vig@70` is the kind `vig` that keeps 70 percent. A new kind is one entry of KINDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from visgain.errors import ConfigError
from visgain.registry import suggest

VANILLA = "vanilla"
"""The arm that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of choosing what to train on."""

    name: str
    kind: str  # arms of one kind differ in `keep` alone
    by: str | None = None  # a rule of `visgain select`; None: not trained at all
    keep: float = 100.0  # percent
    counterfactual: str | None = None  # what the scores are measured with; None: what the whole study uses
    weights: str = "hard"  # of the kept tokens, as in `visgain select --weights`
    train: Mapping[str, Any] = field(default_factory=dict)  # options of `visgain train` that only this arm has

    @property
    def is_trained(self) -> bool:
        return self.by is not None


KINDS: dict[str, Arm] = {
    arm.kind: arm
    for arm in (
        Arm(name="aligned", kind="aligned"),
        Arm(name=VANILLA, kind=VANILLA, by="sample"),
        Arm(name="", kind="random", by="random", keep=70),
        Arm(name="", kind="sample", by="sample", keep=70),
        Arm(name="", kind="token", by="token", keep=70),
        Arm(name="", kind="vig", by="sample+token", keep=70),
        Arm(name="", kind="soft", by="sample", weights="clamp"),
        Arm(name="", kind="pvi", by="sample+token", keep=70, counterfactual="drop"),
        Arm(name="", kind="cal", by="sample", counterfactual="mask", weights="clamp"),
        Arm(name="", kind="refresh", by="sample+token", keep=70, train={"refresh_every": 25}),
    )
}
"""Kinds of arms, each with its usual share; one with a name of its own takes no other share."""

SHARES = (30, 50, 70, 90)

DEFAULT = ",".join(
    ["aligned", VANILLA]
    + [f"{kind}@{share}" for kind in ("random", "sample", "token", "vig") for share in SHARES]
    + ["soft@100", "pvi@70", "cal@100", "refresh@70"]
)
"""The grid that is tried when nothing else is said."""


def parse_arms(spec: str) -> tuple[Arm, ...]:
    """The arms that `spec` names, e.g. vanilla,random,vig@30. Raises ConfigError that says which name is wrong."""
    names = [name for part in spec.split(",") if (name := part.strip())]
    if not names:
        raise ConfigError(f"--arms names none; name some of {', '.join(KINDS)}, as in vanilla,random@70,vig@70")
    arms = [parse_arm(name) for name in names]
    for index, arm in enumerate(arms):
        if arm.name in {other.name for other in arms[:index]}:
            raise ConfigError(f"--arms names {arm.name} twice")
    return tuple(arms)


def parse_arm(text: str) -> Arm:
    """The arm that `KIND` or `KIND@PERCENT` names. Raises ConfigError."""
    kind, at, share = text.partition("@")
    if kind not in KINDS:
        raise ConfigError(f"--arms: unknown arm {text!r}; {suggest(kind, KINDS)}")
    usual = KINDS[kind]
    if usual.name:
        if at:
            raise ConfigError(f"--arms: {text!r}: {kind} takes no percentage")
        return usual
    keep = _percent(text, share) if at else usual.keep
    return replace(usual, name=f"{kind}@{keep:g}", keep=keep)


def _percent(text: str, share: str) -> float:
    try:
        keep = float(share)
    except ValueError:
        keep = float("nan")
    if not 0 < keep <= 100:
        raise ConfigError(f"--arms: {text!r}: what follows @ is a percentage to keep, above 0 and at most 100")
    return keep
