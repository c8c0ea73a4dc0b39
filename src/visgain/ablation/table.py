"""A study as tables: means over seeds, and differences from vanilla. For the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from visgain.ablation.arms import VANILLA
from visgain.ablation.metrics import Metric, written
from visgain.ablation.result import COUNTS, Ablation
from visgain.ablation.statistics import Interval

FORMULA = (
    "±: half of the 95% confidence interval, t(0.975, n − 1) · s / √n over n seeds (Student 1908); with one seed there "
    "is none. Each interval is for one number alone: of twenty differences that are none, one is marked."
)

WIDEST = 1000
"""Characters of a line on a terminal, which goes on in the next if it is not as wide."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def grids(ablation: Ablation) -> list[Grid]:
    """What each arm trained on, the means, and the differences from vanilla where there are any."""
    if not ablation.arms:
        return []
    tables = [_counts(ablation), _means(ablation)]
    if any(arm.versus for arm in ablation.arms):
        tables.append(_differences(ablation))
    return tables


def _counts(ablation: Ablation) -> Grid:
    return Grid(
        title="What each arm trained on, means over its n seeds; a token counts each time that it carried loss",
        heads=("arm", "n", "rows", "active tokens", "steps", "seconds"),
        lines=tuple((arm.name, str(arm.n), *(f"{arm.counts[name]:,.0f}" for name in COUNTS)) for arm in ablation.arms),
    )


def _means(ablation: Ablation) -> Grid:
    whole = all(arm.n == len(ablation.seeds) for arm in ablation.arms)
    whose = "the" if whole else "each arm's n of the"
    return Grid(
        title=f"Tested, mean over {whose} seeds {', '.join(map(str, ablation.seeds))}",
        heads=("arm", *map(_head, ablation.metrics)),
        lines=tuple((arm.name, *_cells(arm.metrics, ablation.metrics)) for arm in ablation.arms),
    )


def _differences(ablation: Ablation) -> Grid:
    arms = [arm for arm in ablation.arms if arm.versus]
    return Grid(
        title=f"Minus {VANILLA}, paired by seed (* the interval leaves 0 out)",
        heads=("arm", *map(_head, ablation.metrics)),
        lines=tuple((arm.name, *_cells(arm.versus, ablation.metrics, signed=True)) for arm in arms),
    )


def _head(metric: Metric) -> str:
    arrow = {"higher": " ↑", "lower": " ↓"}.get(metric["better"], "")
    return f"{metric['label']}{' %' if metric['format'] == 'percent' else ''}{arrow}"


def _cells(values: Mapping[str, Interval], metrics: Sequence[Metric], *, signed: bool = False) -> list[str]:
    return [_cell(metric, values.get(metric["key"]), signed) for metric in metrics]


def _cell(metric: Metric, value: Interval | None, signed: bool) -> str:
    if value is None:
        return "–"
    text = written(metric, value.mean, signed=signed)
    if value.half is not None:
        text += f" ± {written(metric, value.half)}"
    return f"{text} *" if signed and value.excludes_zero else text


def as_markdown(ablation: Ablation) -> str:
    """Both tables, what is missing, and the formula."""
    tables = [f"{grid.title}\n\n{_markdown(grid)}" for grid in grids(ablation)]
    return "\n\n".join([*tables, *notes(ablation), FORMULA]) + "\n"


def _markdown(grid: Grid) -> str:
    rule = ["---", *["---:"] * (len(grid.heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (grid.heads, rule, *grid.lines))


def notes(ablation: Ablation) -> list[str]:
    """What must be told with the numbers: cells that are missing, and the right rate of yes."""
    missing = ablation.n_cells - len(ablation.cells)
    said = [f"{missing} of {ablation.n_cells} cells are missing."] if missing else []
    said += [f"{name} failed: {' '.join(reason.split())}" for name, reason in ablation.failures.items()]
    right = next((arm.metrics["true_yes_rate"] for arm in ablation.arms if "true_yes_rate" in arm.metrics), None)
    said += [f"Yes would be right for {100 * right.mean:.1f}% of the existence questions."] if right else []
    return said


def print_ablation(ablation: Ablation) -> None:
    """The tables on stdout, as wide as they are: a number that is cut off is lost."""
    wide, console = Console(width=WIDEST), Console()
    for grid in grids(ablation):
        table = RichTable(title=grid.title, title_justify="left", box=box.SIMPLE, padding=(0, 0), collapse_padding=True)
        table.add_column(grid.heads[0], no_wrap=True)
        for head in grid.heads[1:]:
            table.add_column(head, justify="right", no_wrap=True)
        for line in grid.lines:
            table.add_row(*line)
        wide.print(table)
    for note in [*notes(ablation), FORMULA]:
        console.print(note, highlight=False)
