"""Drawings of models side by side: arrays by model in, a figure of matplotlib out (`pip install 'heronry[plots]'`).

Models whose names begin with RWKV have solid lines, the others dashed ones. Lines that lie on each other are seen all
the same, as the lower ones are wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.0  # inches
# of Okabe and Ito, and a grey; the first are for the models that are drawn first
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX*"
LINE_WIDTHS = (5.5, 3.6, 1.8, 1.8, 3.4, 1.6, 1.6, 1.6)
Lines = Mapping[str, NDArray[Any]]


def draw_decoding(positions: NDArray[Any], seconds: Lines, state_bytes: Lines, slowdown: Mapping[str, float]) -> Figure:
    """Time and memory against the position. positions: [P]; seconds, of a token, and state_bytes: [P] by model;
    slowdown: by model, how many times as long a token takes at the last position as at the first."""
    figure = new_figure(WIDTH, 5.4)
    left, right = figure.subplots(1, 2)
    _draw_lines(left, positions, {name: 1000 * x for name, x in seconds.items()})
    left.set(ylabel="time for the next token, ms")
    _set_title(left, f"Time for a token, position {positions[-1]:,} over position {positions[0]:,}", slowdown)
    _draw_lines(right, positions, {name: x / 1e6 for name, x in state_bytes.items()})
    right.set(ylabel="kept to go on, MB")
    growth = {name: x[-1] / x[0] for name, x in state_bytes.items()}
    _set_title(right, f"Memory, position {positions[-1]:,} over position {positions[0]:,}", growth)
    return _finished(figure, "position: tokens read before", left, right)


def draw_training(contexts: NDArray[Any], seconds: Lines, peak_bytes: Lines, step_tokens: int) -> Figure:
    """A step of training against the length of its texts. contexts: [C]; seconds, of a token, peak_bytes: [C] by model;
    step_tokens: of every step."""
    figure = new_figure(WIDTH, 5.4)
    left, right = figure.subplots(1, 2)
    _draw_lines(left, contexts, {name: 1e6 * x for name, x in seconds.items()})
    left.set(ylabel="training time for a token, µs")
    growth = {name: x[-1] / x[0] for name, x in seconds.items()}
    _set_title(left, f"Time for a token, texts of {contexts[-1]:,} over texts of {contexts[0]:,}", growth)
    _draw_lines(right, contexts, {name: x / 1e6 for name, x in peak_bytes.items()})
    right.set(ylabel="largest memory of a step, MB", yscale="linear", ylim=(0, None))
    growth = {name: x[-1] / x[0] for name, x in peak_bytes.items()}
    _set_title(right, f"Memory of a step of {step_tokens:,} tokens, longest over shortest texts", growth)
    return _finished(figure, "tokens of a text", left, right)


def draw_learning(
    tokens: NDArray[Any], bits: Lines, held_out: Mapping[str, float], seconds: Mapping[str, float]
) -> Figure:
    """What is learned. tokens, read after each step: [S]; bits, of a byte in that step: [S] by model; held_out, bits at
    the end, and seconds of the training: by model."""
    figure = new_figure(WIDTH, 5.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    size = max(1, len(tokens) // 25)  # steps in a point
    n = len(tokens) // size
    ends = tokens[len(tokens) - n * size + size - 1 :: size] / 1000
    for name, style in _styles(bits):
        mean = bits[name][len(tokens) - n * size :].reshape(n, size).mean(1)
        left.plot(ends, mean, label=name, **{**style, "marker": "", "linewidth": 1.8})
    left.set(xlabel="thousand bytes read", ylabel="bits for a byte that is read for the first time", ylim=(None, 6))
    best = min(held_out, key=lambda name: held_out[name])
    left.set_title(f"What the models learn from the same bytes: {best} predicts best", fontsize="medium")
    left.legend(fontsize="small", ncols=2)
    order = sorted(held_out, key=lambda name: held_out[name], reverse=True)
    colours = {name: style["color"] for name, style in _styles(bits)}
    right.barh(range(len(order)), [held_out[name] for name in order], color=[colours[name] for name in order])
    for place, name in enumerate(order):
        right.text(held_out[name], place, f" {held_out[name]:.2f} after {seconds[name]:,.0f} s", va="center")
    right.set_yticks(range(len(order)), order)
    right.set(xlabel="bits for a byte of the part that is held out", xlim=(0, 1.45 * max(held_out.values())))
    right.set_title(f"Held-out text after {tokens[-1]:,} bytes, and the seconds of training", fontsize="medium")
    return figure


def _draw_lines(axis: Axes, x: NDArray[Any], lines: Lines) -> None:
    """On logarithmic scales, with plain numbers at the axes."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for name, style in _styles(lines):
        axis.plot(x, lines[name], label=name, **style)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(x, [f"{value:,}" for value in x])
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_formatter(NullFormatter())
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)


def _styles(lines: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of every model by name."""
    return [
        (
            name,
            {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": "-" if name.startswith("RWKV") else "--",
                "linewidth": LINE_WIDTHS[i % len(LINE_WIDTHS)],
                "markersize": 4 + LINE_WIDTHS[i % len(LINE_WIDTHS)],
            },
        )
        for i, name in enumerate(lines)
    ]


def _set_title(axis: Axes, what: str, growth: Mapping[str, float]) -> None:
    axis.set_title(f"{what}:\n{_factors(growth)}", fontsize="medium")


def _factors(growth: Mapping[str, float]) -> str:
    """ "RWKV 0.98 to 1.01, GPT 52, LSTM 1.00": how many times as much, of the generations of RWKV the range."""
    ours = [_factor(x) for name, x in sorted(growth.items(), key=lambda item: item[1]) if name.startswith("RWKV")]
    parts = ["RWKV " + " to ".join(dict.fromkeys((ours[0], ours[-1])))] if ours else []
    return ", ".join([*parts, *(f"{name} {_factor(x)}" for name, x in growth.items() if not name.startswith("RWKV"))])


def _factor(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


def _finished(figure: Figure, xlabel: str, *axes: Axes) -> Figure:
    """The figure with the label of all x axes, and one legend."""
    for axis in axes:
        axis.set_xlabel(xlabel)
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    """One for all axes, below them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=3)
