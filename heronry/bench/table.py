"""A contest as a table in Markdown, with failures listed below it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .contest import Outcome, Result


def print_table(outcome: Outcome, console: Console) -> None:
    """Print the contest; columns that no row fills are left out."""
    unit = outcome.contest.unit
    units = f"{unit}es" if unit.endswith(("ch", "ss")) else f"{unit}s"
    names = ["", f"ms/{unit}", f"{units}/s", "of the limit", "times as fast as"]
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
    """One text per column of `print_table`; "" where there is no figure."""
    row, figures = result.row, outcome.row_figures(result)
    comparisons = [f"{ratio:.2f} {name}" for name, ratio in figures.get("times_as_fast_as", {}).items() if ratio]
    if figures.get("part"):
        comparisons.append(f"{figures['part']:.0%} of the time of {row.part_of}")
    if "best_per_second" in figures:
        comparisons.append(f"at best {figures['best_per_second'] / 1e9:,.1f} G{'B' if row.job == 'read' else 'FLOP'}/s")
    memory = result.memory if outcome.contest.memory and (row.file or not row.cost) else {}
    return (
        row.name,
        f"{figures['ms']:,.1f}" if figures["ms"] >= 10 else f"{figures['ms']:.3g}",
        f"{figures['per_second']:,.1f}",
        f"{figures['share']:.0%}" if figures.get("share") else "",
        "; ".join(comparisons),
        f"{memory['resident'] / 1e6:,.0f} MB" if memory else "",
        f"{figures['beyond_weights_bytes'] / 1e6:,.0f} MB" if memory and row.weights else "",
        f"{memory['peak'] / 1e6:,.0f} MB" if memory else "",
        f"{result.load_seconds:.2f} s" if memory else "",
    )
