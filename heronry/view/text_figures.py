"""Drawings of what text models compute: arrays in, a figure of matplotlib out (`pip install 'heronry[plots]'`).

Nothing here depends on a model; the modules beside this one compute the arrays. Colours are told apart with colour
blindness: viridis for amounts, cividis where zero is dark, purple against orange for signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.0  # inches
MAX_LABELS = 60  # tokens that are written along an axis
MAX_ROWS = 48  # heads that get a row of their own
MAX_CELLS = 18  # tokens whose predictions are written out
HALF_LIVES = (1e-2, 1e7)  # tokens; what is beyond is drawn at the edge
MAX_LETTERS = 16  # of a token on an axis
FONTS = (  # for what the usual font lacks, as far as they are installed
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # the name by which older matplotlib knows the file with all of them
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
    "Segoe UI Symbol",
    "Noto Emoji",
)
VISIBLE = {"\n": "⏎", "\r": r"\r", "\t": "⇥"}


def draw_reads(shares: NDArray[Any], labels: Sequence[str]) -> Figure:
    """What every token reads, see reads.py. shares: [L, H, T, T]; labels: the T tokens."""
    layers, heads, n = shares.shape[:3]
    by_head = layers * heads <= MAX_ROWS
    last = shares[:, :, -1].reshape(-1, n) if by_head else shares[:, :, -1].mean(1)  # [rows, T]
    columns = min(layers, 6)
    rows = math.ceil(layers / columns)
    figure = new_figure(WIDTH, 2.2 + 0.16 * len(last) + 2.1 * rows)
    halves: Any = figure.subfigures(2, 1, height_ratios=[2.2 + 0.16 * len(last), 2.1 * rows])
    top, bottom = halves
    axis = top.subplots()
    # of many tokens each has a small share
    scale: dict[str, Any] = {"vmin": 0} if n <= MAX_LABELS else {"norm": "log", "vmin": 1e-4, "vmax": 1}
    image = axis.imshow(last.clip(1e-9), aspect="auto", cmap="cividis", interpolation="nearest", **scale)
    if by_head and heads > 1:
        names = [f"layer {i} head {h}" if h == 0 else f"head {h}" for i in range(layers) for h in range(heads)]
    else:
        names = [f"layer {i}" for i in range(layers)]
    axis.set_yticks(range(len(names)), names, fontsize="x-small")
    _label_tokens(axis, labels)
    axis.set_title(f"Where the last token, “{_label(labels[-1])}”, reads: the share of every earlier token")
    top.colorbar(image, ax=axis, label="share of what is read")
    axes = bottom.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for layer, axis in enumerate(axes.flat):
        if layer < layers:
            axis.imshow(shares[layer].mean(0).clip(1e-9), cmap="cividis", interpolation="nearest", **scale)
            axis.set_title(f"layer {layer}", fontsize="medium")
            for side in (axis.xaxis, axis.yaxis):
                side.get_major_locator().set_params(integer=True)
        else:
            axis.set_visible(False)
    bottom.supxlabel("token that is read" + (" (positions; the mean of all heads)" if heads > 1 else " (positions)"))
    bottom.supylabel("token that reads")
    return _with_fonts(figure)


def draw_flow(
    restored: NDArray[Any],
    remembered: NDArray[Any],
    clean: float,
    corrupted: float,
    influence: NDArray[Any],
    labels: Sequence[str],
    answer: str,
) -> Figure:
    """Causal tracing and the influence of every token, see flow.py. restored, influence: [L + 1, T]; remembered:
    [L, T]."""
    layers, n = remembered.shape
    figure = new_figure(WIDTH, max(4.2, 1.6 + 0.21 * min(n, MAX_LABELS)))
    axes = figure.subplots(1, 3, sharey=True)
    word = f"“{_label(answer)}”"
    most = max(clean, restored.max(), remembered.max())
    panels = (
        (restored, "one layer's output\nput back at one token", most),
        (remembered, "one layer's memory\nput back after one token", most),
        (influence, f"how much the logit of {word}\ndepends on one output", None),
    )
    images = []
    for axis, (values, title, largest) in zip(axes, panels, strict=True):
        images.append(axis.imshow(values.T, aspect="auto", cmap="viridis", vmin=0, vmax=largest))
        axis.set_title(title, fontsize="medium")
        names = [*(["in"] if len(values) > layers else []), *map(str, range(layers))]
        places = _few(len(names))
        axis.set_xticks(places, [names[place] for place in places])
        axis.set_xlabel("layer" + (" (in: the embedding)" if len(values) > layers else ""))
    figure.colorbar(images[0], ax=axes[:2], label=f"probability of {word}")
    figure.colorbar(images[2], ax=axes[2], label="length of the gradient")
    figure.suptitle(
        f"Where {word} comes from: {100 * clean:.3g}% as it is, {100 * corrupted:.3g}% with noise on the subject"
    )
    _label_tokens(axes[0], labels, on_y=True)
    return _with_fonts(figure)


def draw_lens(said: Sequence[Sequence[str]], probability: NDArray[Any], labels: Sequence[str]) -> Figure:
    """What every layer would say next, see lens.py. said, probability: [L + 1, T]; the last tokens are drawn."""
    n = min(len(labels), MAX_CELLS)
    layers = len(said)
    shown = probability[::-1, -n:]
    figure = new_figure(WIDTH, 1.8 + 0.32 * layers)
    axis = figure.subplots()
    image = axis.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for i in range(layers):
        for t in range(n):
            colour = "black" if shown[i, t] > 0.6 else "white"
            word = said[layers - 1 - i][len(labels) - n + t]
            word = _shown(word if len(word) < 11 else word[:9] + "…")
            axis.text(t, i, word, ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(layers), [f"layer {i}" for i in reversed(range(layers - 1))] + ["embedding"])
    _label_tokens(axis, labels[-n:])
    axis.set_xlabel("the token that was read last")
    axis.set_title("What each layer would say next, read by the head of the model")
    figure.colorbar(image, ax=axis, label="probability of that word")
    return _with_fonts(figure)


def draw_decay_curves(
    half_lives: NDArray[Any],
    on_text: NDArray[Any] | None,
    rates: NDArray[Any] | None,
    mixes: Mapping[str, NDArray[Any]],
) -> Figure:
    """How fast layers forget, see decay.py. half_lives: [L, A]; on_text, log decays, and rates: [L, T, A] or None;
    mixes: [L, C] each."""
    layers, channels = half_lives.shape
    figure = new_figure(WIDTH, 8)
    axes = figure.subplots(2, 2)
    colours = _layer_colours(layers)
    curves, histogram, shift, text = axes.flat
    half_lives = half_lives.clip(*HALF_LIVES)
    low = 10.0 ** math.floor(np.log10(half_lives.min()))
    high = max(10 * low, 10.0 ** math.ceil(np.log10(half_lives.max())))  # whole decades: their labels have room
    for layer in range(layers):
        curves.plot(np.linspace(0, 100, channels), np.sort(half_lives[layer]), color=colours[layer])
    curves.set(yscale="log", ylim=(low, high), xlabel="share of the channels, %", ylabel="half-life, tokens")
    curves.set_title("How long channels remember, by layer")
    histogram.hist(list(half_lives), bins=np.geomspace(low, high, 41), stacked=True, color=colours)
    histogram.set(xscale="log", xlim=(low, high), xlabel="half-life, tokens", ylabel="channels")
    histogram.set_title("Half-lives of all channels")
    for (name, share), style in zip(mixes.items(), _line_styles(len(mixes)), strict=True):
        shift.plot(range(layers), share.mean(1), marker="o", label=name, **style)
    shift.set(xlabel="layer", ylabel="share of the token before", xticks=_few(layers))
    shift.set_title("Token shift: how much of the token before is mixed in")
    shift.legend(fontsize="small", ncols=2)
    _draw_by_layer(text, half_lives, on_text, rates)
    if on_text is None:
        text.set_ylim(low, high)
    for axis in (curves.yaxis, histogram.xaxis, *([text.yaxis] if on_text is None else [])):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")  # between two decades there is no room
    _add_layer_scale(figure, axes[0, :], colours)
    return figure


def _draw_by_layer(
    axis: Axes, half_lives: NDArray[Any], on_text: NDArray[Any] | None, rates: NDArray[Any] | None
) -> None:
    """The spread of what depends on the text, by layer; where nothing does, that of the half-lives."""
    layers = len(half_lives)
    places = np.arange(layers)
    if on_text is None:
        data, name = list(half_lives), "half-life, tokens"
        axis.set_title("Half-lives by layer")
        axis.set_yscale("log")
    else:
        data, name = [np.exp(x).ravel() for x in on_text], "decay by one token"
        axis.set_title("What the text decides, token by token")
    spread = [np.quantile(x, (0.05, 0.25, 0.5, 0.75, 0.95)) for x in data]
    _draw_spread(axis, places - (0.0 if rates is None else 0.16), spread, "#0072b2", name)
    if rates is not None:
        spread = [np.quantile(x, (0.05, 0.25, 0.5, 0.75, 0.95)) for x in rates]
        _draw_spread(axis, places + 0.16, spread, "#d55e00", "in-context learning rate")
    axis.set(xlabel="layer", ylabel=name if rates is None else "decay, learning rate (0 to 1)", xticks=_few(layers))
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_spread(axis: Axes, places: NDArray[Any], spread: Sequence[NDArray[Any]], colour: str, name: str) -> None:
    """Thin lines from 5% to 95%, thick ones from 25% to 75%, and the median."""
    low, first, median, third, high = np.array(spread).T
    axis.vlines(places, low, high, color=colour, linewidth=1)
    axis.vlines(places, first, third, color=colour, linewidth=5, alpha=0.5)
    axis.plot(places, median, "o", color=colour, markersize=4, label=f"{name} (median, 50%, 90%)")


def draw_history(positions: NDArray[Any], norms: NDArray[Any], ranks: NDArray[Any], final: NDArray[Any]) -> Figure:
    """The state while a text is read, see state.py. norms, ranks: [P, L, H]; final: [L, H, N, N]."""
    layers, heads, size = final.shape[:3]
    shown_layers = np.unique(np.linspace(0, layers - 1, min(layers, 8)).round().astype(int))
    shown_heads = range(min(heads, 8))
    figure = new_figure(WIDTH, 4 + 1.35 * len(shown_heads) + 0.4)
    halves: Any = figure.subfigures(2, 1, height_ratios=[4, 1.35 * len(shown_heads) + 0.4])
    top, bottom = halves
    left, right = top.subplots(1, 2)
    colours = _layer_colours(layers)
    for layer in range(layers):
        for axis, values in ((left, norms), (right, ranks)):
            axis.plot(positions, values[:, layer].mean(1), color=colours[layer], label=f"layer {layer}")
            axis.fill_between(
                positions,
                values[:, layer].min(1),
                values[:, layer].max(1),
                color=colours[layer],
                alpha=0.1,
                linewidth=0,
            )
    left.set(xlabel="tokens read", ylabel="norm of a head's state")
    left.set_title("How much is in the state (mean of the heads; band: all heads)", fontsize="medium")
    right.set(xlabel="tokens read", ylabel="effective rank", ylim=(0, None))
    right.set_title(f"How many of its {size} directions are in use", fontsize="medium")
    if layers <= 12:
        left.legend(fontsize="x-small", ncols=2)
    else:
        _add_layer_scale(top, [left, right], colours)
    axes = bottom.subplots(len(shown_heads), len(shown_layers), squeeze=False)
    for column, layer in enumerate(shown_layers):
        for head in shown_heads:
            axis = axes[head, column]
            most = max(np.abs(final[layer, head]).max(), 1e-30)
            axis.imshow(final[layer, head], cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if head == 0:
                axis.set_title(f"layer {layer}", fontsize="small")
            if column == 0:
                axis.set_ylabel(f"head {head}", fontsize="small")
    some = f" ({len(shown_heads)} of {heads} heads)" if heads > len(shown_heads) else ""
    bottom.suptitle(
        f"The state at the end{some}: values (down) by keys (across), every head on its own scale", fontsize="medium"
    )
    return figure


def draw_knockout(heads: NDArray[Any], layers: NDArray[Any], prompt: str) -> Figure:
    """What silencing memory does to the next token, see state.py. heads: [L, H] in nats, H = 0 where there are none;
    layers: [L]."""
    n_layers, n_heads = heads.shape
    figure = new_figure(WIDTH, max(3.4, 1.6 + 0.25 * n_layers))
    axes = figure.subplots(1, 2 if n_heads else 1, squeeze=False, sharey=True)[0]
    axes[0].barh(range(n_layers), layers, color="#0072b2")
    axes[0].set(xlabel="KL divergence of the next token, nats", ylabel="layer", yticks=_few(n_layers))
    axes[0].set_title("Without what a whole layer remembers", fontsize="medium")
    axes[0].invert_yaxis()
    if n_heads:
        image = axes[1].imshow(heads, aspect="auto", cmap="viridis", vmin=0)
        axes[1].set(xlabel="head", xticks=_few(n_heads))
        axes[1].set_title("Without what one head remembers", fontsize="medium")
        figure.colorbar(image, ax=axes[1], label="KL divergence, nats")
    figure.suptitle(f"What the next word after “{_end_of(prompt)}” rests on", fontsize="medium")
    return _with_fonts(figure)


def draw_difference(apart: NDArray[Any], first: str, second: str) -> Figure:
    """How far apart the states after two texts are, [L, H], see state.py."""
    layers, heads = apart.shape
    figure = new_figure(min(max(8.0, 1.8 + 0.4 * heads), WIDTH), max(3.4, 1.8 + 0.25 * layers))
    axis = figure.subplots()
    image = axis.imshow(apart, aspect="auto", cmap="viridis", vmin=0)
    axis.set(xlabel="head", ylabel="layer", xticks=_few(heads), yticks=_few(layers))
    texts = f"“{_end_of(first)}”\nand “{_end_of(second)}”"
    axis.set_title(f"How far apart the states are after {texts}", fontsize="medium")
    figure.colorbar(image, ax=axis, label="norm of the difference / larger norm")
    return _with_fonts(figure)


def _layer_colours(layers: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(layers - 1, 1)) for i in range(layers)]


def _add_layer_scale(figure: Any, axes: Any, colours: Sequence[Any]) -> None:
    """Which colour is which layer, beside the axes of a figure or of a part of one."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(-0.5, len(colours) - 0.5), ListedColormap(colours))
    figure.colorbar(scale, ax=axes, label="layer", ticks=_few(len(colours)))


def _line_styles(n: int) -> list[dict[str, Any]]:
    """Colours of Okabe and Ito, then the same with dashes."""
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
    return [{"color": colours[i % 7], "linestyle": "-" if i < 7 else "--"} for i in range(n)]


def _few(n: int) -> list[int]:
    """At most 13 of the numbers below n."""
    return list(range(0, n, max(1, math.ceil(n / 13))))


def _label_tokens(axis: Axes, labels: Sequence[str], on_y: bool = False) -> None:
    """Writes the tokens along an axis, or their numbers where they are too many."""
    if len(labels) > MAX_LABELS:
        axis.set_ylabel("position") if on_y else axis.set_xlabel("position")
    elif on_y:
        axis.set_yticks(range(len(labels)), [_label(x) for x in labels], fontsize="small")
    else:
        axis.set_xticks(range(len(labels)), [_label(x) for x in labels], rotation=90, fontsize="small")


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The families that words are drawn in, and the characters that these have."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    files = {font.name: font.fname for font in fontManager.ttflist if font.name in FONTS}
    names = [name for name in FONTS if name in files]
    paths = [findfont(FontProperties()), *(files[name] for name in names)]
    characters = frozenset(character for path in paths for character in get_font(path).get_charmap())
    return [*FontProperties().get_family(), *names], characters


def _with_fonts(figure: Figure) -> Figure:
    """The figure with all that is written in it in fonts that have the characters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily(_fonts()[0])
    return figure


def _shown(text: str) -> str:
    """A text so that one sees it: what is invisible as a sign, what no font has as its code point."""
    if text.isspace():
        text = text.replace(" ", "␣")
    characters = _fonts()[1]
    drawn = "".join(VISIBLE.get(x) or (x if ord(x) in characters else f"U+{ord(x):04X}") for x in text)
    return drawn.replace("$", r"\$") or "∅"  # a bare $ would begin a formula


def _label(token: str) -> str:
    return _shown(token if len(token) <= MAX_LETTERS else token[: MAX_LETTERS - 1] + "…")


def _end_of(text: str) -> str:
    text = " ".join(text.split())
    return _shown(text if len(text) <= 60 else "…" + text[-58:])


def draw_memory(
    positions: NDArray[Any],
    loss: NDArray[Any],
    error: NDArray[Any],
    distances: NDArray[Any],
    gain: NDArray[Any],
    fact: str,
) -> Figure:
    """The loss by position and the recall of a fact, see memory.py."""
    figure = new_figure(WIDTH, 4.5)
    left, right = figure.subplots(1, 2)
    left.plot(positions, loss, marker="o", color="#0072b2")
    left.fill_between(positions, loss - 2 * error, loss + 2 * error, color="#0072b2", alpha=0.2, linewidth=0)
    left.set(xscale="log", xlabel="position in the text, tokens", ylabel="loss, nats a token")
    left.set_title("The loss by position in the text (band: two standard errors)", fontsize="medium")
    right.axhline(0, color="grey", linewidth=1)
    right.plot(distances, gain, marker="o", color="#d55e00")
    right.set_xscale("symlog", linthresh=4)
    right.set(xlabel="tokens between the fact and the question", ylabel="gain of the answer's log-probability, nats")
    right.set_title(f"How long “{_end_of(fact)}” is remembered", fontsize="medium")
    return _with_fonts(figure)


def draw_cascade(
    steps: NDArray[Any], chunks: Sequence[int], measured: Sequence[float], ideal: Sequence[float]
) -> Figure:
    """The waterfall, see cascade.py. steps: [L, C]; of every size of a piece, the seconds that reading took and would
    take if all cells ran as early as they can."""
    figure = new_figure(WIDTH, 4.8)
    left, right = figure.subplots(1, 2)
    layers, pieces = steps.shape
    left.imshow(steps, cmap="viridis", origin="lower", aspect="auto", alpha=0.85)
    numbered = layers <= 24
    if numbered:
        for layer in range(layers):
            for piece in range(pieces):
                colour = "white" if steps[layer, piece] < steps.max() * 0.6 else "black"
                left.text(
                    piece, layer, steps[layer, piece] + 1, ha="center", va="center", fontsize="small", color=colour
                )
    left.set(xlabel="piece of the text", ylabel="layer", xticks=_few(pieces), yticks=_few(layers))
    left.set_title(
        f"Cells of the same {'number' if numbered else 'colour'} can run together:\n"
        f"{steps.max() + 1} steps in place of {layers * pieces}",
        fontsize="medium",
    )
    places = np.arange(len(chunks))
    right.bar(places - 0.2, measured, 0.4, color="#0072b2", label="measured: cell after cell")
    right.bar(places + 0.2, ideal, 0.4, color="#e69f00", label="ideal: every cell as early as it can")
    right.set_xticks(places, [str(chunk) for chunk in chunks])
    right.set(xlabel="tokens a piece", ylabel="seconds to read the text")
    right.set_title("One processor works through the grid, or one for every layer", fontsize="medium")
    right.legend()
    return figure


def animate_cascade(
    begins: NDArray[Any], seconds: NDArray[Any], ideal_begins: NDArray[Any], chunk: int, frames: int = 48
) -> bytes:
    """A GIF of both orders in the same time, see cascade.py: [L, C] each, in seconds."""
    import io

    from PIL import Image

    figure = new_figure(8, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    end = float((begins + seconds).max())
    figure.suptitle("after 0 ms; yellow: done", fontsize="medium")
    images = []
    for title, axis in zip(("as early as possible", "cell after cell, as measured"), axes, strict=True):
        images.append(
            axis.imshow(np.zeros(seconds.shape), vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        )
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel=f"piece of {chunk} tokens", xticks=_few(seconds.shape[1]), yticks=_few(seconds.shape[0]))
    axes[0].set_ylabel("layer")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it would place everything anew in every frame
    pictures = []
    for now in np.linspace(0, end, frames):
        for image, start in zip(images, (ideal_begins, begins), strict=True):
            image.set_data(((now - start) / np.maximum(seconds, 1e-12)).clip(0, 1))
        figure.suptitle(f"after {1000 * now:.0f} ms; yellow: done", fontsize="medium")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        pictures.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE))
    out = io.BytesIO()
    durations = [80] * (frames - 1) + [2000]  # ms
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return out.getvalue()
