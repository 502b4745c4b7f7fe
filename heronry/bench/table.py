"""A contest for people: a table in Markdown, and what went wrong below it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .contest import Outcome, Result


def show(outcome: Outcome, console: Console) -> None:
    """Prints it; columns that no row fills are left out."""
    unit = outcome.contest.unit
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    names = ["", f"ms a {unit}", f"{units} a second", "of the limit", "times as fast as"]
    names += ["resident", "beyond weights", "peak", "load"]
    rows = [_cells(outcome, result) for result in outcome.results.values() if result.seconds]
    table = Table(box=box.MARKDOWN, header_style="")
    filled = [i for i in range(len(names)) if any(row[i] for row in rows)]
    for i in filled:
        table.add_column(names[i], justify="left" if i in (0, 4) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    console.print(f"\n{outcome.contest.title}\n")
    if rows:
        console.print(table)
    console.print()
    for result in outcome.results.values():
        if result.problem or not result.seconds:
            console.print(f"- {result.row.name}: {result.problem or 'not reached'}", markup=False, highlight=False)


def _cells(outcome: Outcome, result: Result) -> tuple[str, ...]:
    row, told = result.row, outcome.describe(result)
    beside = [f"{ratio:.2f} {name}" for name, ratio in told.get("times_as_fast_as", {}).items() if ratio]
    if told.get("part"):
        beside.append(f"{told['part']:.0%} of the time of {row.part_of}")
    if "best_per_second" in told:
        beside.append(f"at best {told['best_per_second'] / 1e9:,.1f} G{'B' if row.job == 'read' else 'FLOP'}/s")
    memory = result.memory if outcome.contest.memory and (row.file or not row.cost) else {}
    return (
        row.name,
        f"{told['ms']:,.1f}" if told["ms"] >= 10 else f"{told['ms']:.3g}",
        f"{told['per_second']:,.1f}",
        f"{told['share']:.0%}" if told.get("share") else "",
        "; ".join(beside),
        f"{memory['resident'] / 1e6:,.0f} MB" if memory else "",
        f"{told['beyond_weights_bytes'] / 1e6:,.0f} MB" if memory and row.weights else "",
        f"{memory['peak'] / 1e6:,.0f} MB" if memory else "",
        f"{result.load_seconds:.2f} s" if memory else "",
    )
