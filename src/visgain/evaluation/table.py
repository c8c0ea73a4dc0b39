"""Results of benchmarks as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from visgain.evaluation.bootstrap import Estimate
from visgain.evaluation.run import Result


def table(results: Sequence[Result]) -> str:
    """A paragraph for each benchmark: what was measured how, then a line for each metric with its 95% interval."""
    return "\n\n".join(_paragraph(result) for result in results)


def _paragraph(result: Result) -> str:
    head = f"{result.benchmark} ({result.variant}): {result.questions:,} questions"
    head += ", the first ones only" if result.limited else ""
    head += "".join(f", {what} {value}" for what, value in result.notes.items())
    head += f", {result.unparsed:,} replies not understood" if result.unparsed else ""
    width = max(map(len, result.metrics))
    return "\n".join([head, *(f"  {name:<{width}}  {_shown(one)}" for name, one in result.metrics.items())])


def _shown(one: Estimate) -> str:
    if one.value is None:
        return "undefined"
    interval = "" if one.low is None else f"  [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:>7.2f}{interval}"
