"""Drawings of what models do: arrays in, a figure of matplotlib out (`pip install 'heronry[plots]'`).

Nothing here knows a model. What there is to draw of one is computed beside: view/vision.py for models of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = ("left", "right", "above", "below")  # where a Q-shift takes each quarter of the channels from
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind too (Okabe and Ito)
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # columns and rows that they are away


def draw_receptive_fields(fields: Mapping[str, np.ndarray]) -> Figure:
    """Effective receptive fields [height, width], by the names to write over them, beside each other. Each is drawn
    as shares of its largest gradient, in logarithms; below 1/10000 everything is dark."""
    figure = _figure(3.2 * len(fields) + 0.8, 3.6)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, (name, field) in zip(axes, fields.items(), strict=True):
        shares = np.sort(field, axis=None)[::-1].cumsum() / max(field.sum(), 1e-30)
        half = (np.searchsorted(shares, 0.5) + 1) / field.size
        image = axis.imshow(np.maximum(field / max(field.max(), 1e-30), 1e-4), norm="log", vmin=1e-4, vmax=1)
        axis.set(title=f"{name}\nhalf of it in {half:.1%} of the pixels", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="gradient, share of the largest")
    return figure


def draw_decays(weights: np.ndarray) -> Figure:
    """Weights [layers, C, 2 T - 1] of what lies T - 1 patches before to T - 1 after, one heat map a layer, whose
    channels are sorted from the fastest decay to the slowest: blue what weighs less than 1, red what weighs more, both
    to a factor of 1000. Grey: a bonus below 0, or nothing because attention looks back only."""
    layers, channels, offsets = weights.shape
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    figure = _figure(2.6 * columns + 0.8, max(3.6, 2.1 * rows + 0.4))  # what stands at the sides needs its height
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    reach = offsets // 2
    own = np.arange(offsets) == reach  # the bonus is no part of the decay
    for axis in axes.flat[layers:]:
        axis.set_visible(False)
    for layer, (axis, curves) in enumerate(zip(axes.flat, weights, strict=False)):
        order = np.argsort(curves[:, ~own].sum(1), kind="stable")
        shown = np.where(curves > 0, curves.clip(1e-3, 1e3), np.nan)[order]
        place = {"extent": (-reach - 0.5, reach + 0.5, channels, 0), "aspect": "auto", "interpolation": "nearest"}
        image = axis.imshow(shown, norm="log", vmin=1e-3, vmax=1e3, cmap="RdBu_r", **place)
        axis.set_facecolor("lightgrey")
        axis.set_title(f"layer {layer}", fontsize="medium")
    figure.supxlabel("where the other patch stands, counted row by row")
    figure.supylabel("channels, from the fastest to the slowest")
    figure.colorbar(image, ax=axes, label="weight, the middle column is the bonus")
    return figure


def draw_q_shift(picture: np.ndarray, channels: Sequence[int], before: np.ndarray, after: np.ndarray) -> Figure:
    """Where each quarter of the channels comes from, and a channel of each quarter, [4, rows, columns] `before` and
    `after` the shift, beside the picture [height, width, 3] that they read."""
    figure = _figure(13, 5)
    axes = figure.subplots(2, 5, width_ratios=[1.5, 1, 1, 1, 1])
    _draw_patches(axes[0, 0])
    axes[1, 0].imshow(picture)
    axes[1, 0].axis("off")
    for i, (quarter, colour) in enumerate(zip(QUARTERS, COLOURS, strict=True)):
        axes[0, i + 1].set_title(f"channel {channels[i]}", color=colour)
        axes[1, i + 1].set_title(f"from {quarter}", color=colour)
        for axis, values in zip(axes[:, i + 1], (before[i], after[i]), strict=True):
            axis.imshow(values, cmap="gray", vmin=before[i].min(), vmax=before[i].max())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=colour, linewidth=3)
    return figure


def _draw_patches(axis) -> None:
    """Nine patches with their channels as four stripes, and what the one in the middle takes of the others."""
    from matplotlib.patches import Rectangle

    for x, y in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
        for i, colour in enumerate(COLOURS):
            lit = (x, y) in ((0, 0), NEIGHBOURS[i])
            corner = (x - 0.4 + 0.2 * i, y - 0.4)
            axis.add_patch(Rectangle(corner, 0.2, 0.8, color=colour, alpha=1 if lit else 0.15, linewidth=0))
        axis.add_patch(Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fill=False, color="black"))
    for i, (x, y) in enumerate(NEIGHBOURS):
        stripe = 0.2 * i - 0.3
        start, end = ((x + stripe, stripe), (stripe, stripe)) if x else ((stripe, y), (stripe, 0.25 * y))
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.8})
    axis.set(xlim=(-1.5, 1.5), ylim=(1.5, -1.5), aspect="equal", title="each quarter from one neighbour")
    axis.axis("off")


def draw_class_maps(pictures: np.ndarray, scores: np.ndarray, titles: Sequence[str], patch: int) -> Figure:
    """Pictures [n, height, width, 3], and over each what its patches of so many pixels, [n, rows, columns], say for
    its class (red) and against it (blue). The scale is each picture's own."""
    figure = _figure(2.4 * len(pictures) + 0.4, 5.2)
    axes = figure.subplots(2, len(pictures), squeeze=False)
    height, width = pictures.shape[1:3]
    rows, columns = scores.shape[1:]
    for i, title in enumerate(titles):
        for axis in axes[:, i]:
            axis.imshow(pictures[i], extent=(0, width, height, 0))
            axis.set(xticks=[], yticks=[])
        most = max(np.abs(scores[i]).max(), 1e-30)
        over = (0, columns * patch, rows * patch, 0)  # the last patches may reach beyond the picture
        axes[1, i].imshow(scores[i], cmap="bwr", vmin=-most, vmax=most, alpha=0.5, extent=over, interpolation="nearest")
        axes[1, i].set(xlim=(0, width), ylim=(height, 0))
        axes[0, i].set_title(title, fontsize="medium")
    return figure


def _figure(width: float, height: float) -> Figure:
    """In inches; of no window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("drawings need matplotlib: pip install 'heronry[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")
