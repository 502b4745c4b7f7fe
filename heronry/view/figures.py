"""Drawings of what models compute: arrays in, a figure of matplotlib out (`pip install 'heronry[plots]'`).

Nothing here depends on a model; view/vision.py computes the arrays from one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUARTERS = ("left", "right", "above", "below")  # the neighbour that a Q-shift takes each quarter of the channels from
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable with colour blindness (Okabe and Ito)
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # their offsets in columns and rows


def draw_receptive_fields(fields: Mapping[str, NDArray[Any]]) -> Figure:
    """Draws effective receptive fields [height, width] side by side, titled with their keys. Each is relative to its
    largest gradient, on a logarithmic scale that ends at 1/10000."""
    figure = new_figure(3.2 * len(fields) + 0.8, 3.6)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, (name, field) in zip(axes, fields.items(), strict=True):
        shares = np.sort(field, axis=None)[::-1].cumsum() / max(field.sum(), 1e-30)
        half = (np.searchsorted(shares, 0.5) + 1) / field.size
        image = axis.imshow(np.maximum(field / max(field.max(), 1e-30), 1e-4), norm="log", vmin=1e-4, vmax=1)
        axis.set(title=f"{name}\nhalf of it in {half:.1%} of the pixels", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="gradient, share of the largest")
    return figure


def draw_decays(weights: NDArray[Any]) -> Figure:
    """Draws weights [layers, C, 2 T - 1], of patches T - 1 before to T - 1 after, as one heat map per layer, with
    channels sorted from the fastest decay to the slowest. Blue: below 1, red: above 1, both up to a factor of 1000.
    Grey: a bonus below 0, or no weight because attention is causal."""
    layers, channels, offsets = weights.shape
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    figure = new_figure(2.6 * columns + 0.8, max(3.6, 2.1 * rows + 0.4))  # the labels at the sides need this height
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    reach = offsets // 2
    own = np.arange(offsets) == reach  # the bonus is not part of the decay
    for axis in axes.flat[layers:]:
        axis.set_visible(False)
    for layer, (axis, curves) in enumerate(zip(axes.flat, weights, strict=False)):
        order = np.argsort(curves[:, ~own].sum(1), kind="stable")
        shown = np.where(curves > 0, curves.clip(1e-3, 1e3), np.nan)[order]
        place = {"extent": (-reach - 0.5, reach + 0.5, channels, 0), "aspect": "auto", "interpolation": "nearest"}
        image = axis.imshow(shown, norm="log", vmin=1e-3, vmax=1e3, cmap="RdBu_r", **place)
        axis.set_facecolor("lightgrey")
        axis.set_title(f"layer {layer}", fontsize="medium")
    figure.supxlabel("offset of the other patch, counted row by row")
    figure.supylabel("channels, from the fastest to the slowest")
    figure.colorbar(image, ax=axes, label="weight, the middle column is the bonus")
    return figure


def draw_q_shift(picture: NDArray[Any], channels: Sequence[int], before: NDArray[Any], after: NDArray[Any]) -> Figure:
    """Draws where each quarter of the channels comes from, and one channel of each quarter `before` and `after` the
    shift, [4, rows, columns], beside the picture [height, width, 3]."""
    figure = new_figure(13, 5)
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


def _draw_patches(axis: Axes) -> None:
    """Nine patches with their channels as four stripes, and arrows from those that the middle one reads."""
    from matplotlib.patches import Rectangle  # optional, see new_figure

    for x, y in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
        for i, colour in enumerate(COLOURS):
            is_read = (x, y) in ((0, 0), NEIGHBOURS[i])
            corner = (x - 0.4 + 0.2 * i, y - 0.4)
            axis.add_patch(Rectangle(corner, 0.2, 0.8, color=colour, alpha=1 if is_read else 0.15, linewidth=0))
        axis.add_patch(Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fill=False, color="black"))
    for i, (x, y) in enumerate(NEIGHBOURS):
        stripe = 0.2 * i - 0.3
        start, end = ((x + stripe, stripe), (stripe, stripe)) if x else ((stripe, y), (stripe, 0.25 * y))
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.8})
    axis.set(xlim=(-1.5, 1.5), ylim=(1.5, -1.5), aspect="equal", title="each quarter from one neighbor")
    axis.axis("off")


def draw_class_maps(pictures: NDArray[Any], scores: NDArray[Any], titles: Sequence[str], patch: int) -> Figure:
    """Draws pictures [n, height, width, 3], and over each the scores of its patches [n, rows, columns]: red for its
    class, blue against it, each picture on its own scale. patch: the side of a patch in pixels."""
    figure = new_figure(2.4 * len(pictures) + 0.4, 5.2)
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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("drawings need matplotlib: pip install 'heronry[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")
