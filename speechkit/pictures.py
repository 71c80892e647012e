"""Pictures: what a model heard and where, what it mistook for what, and how a training went."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from speechkit.types import Event, Seconds

INK, SOFT, SIGNAL, WARM = "#20262e", "#9aa4b1", "#0b6e99", "#d9572b"
MEASURES = {"wer": "word error rate", "accuracy": "accuracy", "mAP": "mean average precision"}
"""What dev may be judged by, by the beginning of its name in ``dev.csv``: shares of 1."""


def heard(
    features: Float[np.ndarray, "T F"],
    posteriors: Float[np.ndarray, "U V"],
    symbols: Sequence[str],
    seconds: Seconds,
    title: str,
) -> Figure:
    """Features above, and below them when CTC hears which symbol.

    Args:
        features: log-mel frames, normalised or not.
        posteriors: probabilities, 0 to 1; column 0 is the blank.
        symbols: how the tokens read.
        seconds: how long the utterance is.
        title: for example what was said.
    """
    figure = Figure(figsize=(min(24.0, max(7.0, 1.6 * seconds)), 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _spectrogram(above, features, (0.0, seconds), title)
    times = (np.arange(len(posteriors)) + 0.5) * seconds / max(1, len(posteriors))
    below.fill_between(times, posteriors[:, 0], color=SOFT, alpha=0.25, linewidth=0, label="blank")
    audible = np.flatnonzero(posteriors[:, 1:].max(axis=0, initial=0.0) > 0.05) + 1
    below.plot(times, posteriors[:, audible], linewidth=1.3)
    for first, last, token in _runs(posteriors.argmax(axis=1)):
        below.text((times[first] + times[last]) / 2, 1.06, _visible(symbols[token]), ha="center", fontsize=9, color=INK)
    below.set(xlabel="seconds", ylabel="probability", ylim=(0.0, 1.22), xlim=(0.0, seconds), yticks=[0, 0.5, 1])
    below.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    _bare(above, below)
    return figure


def explained(
    features: Float[np.ndarray, "T F"],
    heat: Float[np.ndarray, "T F"],
    tags: Sequence[tuple[str, float]],
    times: tuple[Seconds, Seconds],
    title: str,
    how: str,
) -> Figure:
    """A spectrogram, the same with what a tagger looked at over it, and its labels beside them.

    Args:
        features: log-mel frames, normalised or not.
        heat: how much each of them counts; where it is least, nothing is drawn.
        tags: labels and scores, highest first.
        times: where they begin and end.
        title: for example the name of the file.
        how: what ``heat`` is.
    """
    figure = Figure(figsize=(min(20.0, max(9.0, 4.5 + 0.7 * (times[1] - times[0]))), 5.2), layout="constrained")
    axes = figure.subplot_mosaic([["heard", "tags"], ["seen", "tags"]], width_ratios=[3, 1])
    above, below, right = axes["heard"], axes["seen"], axes["tags"]
    extent = _spectrogram(above, features, times, title)
    _spectrogram(below, features, times, how, colours="gray_r")
    least, most = np.percentile(heat, [5, 99.5])
    strength = np.clip((heat - least) / max(most - least, 1e-12), 0, 1).T
    seen: dict[str, Any] = {"cmap": "autumn_r", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    below.imshow(strength, origin="lower", aspect="auto", extent=extent, alpha=0.85 * strength, **seen)
    above.set(xticklabels=[])
    below.set(xlabel="seconds")
    rows = np.arange(len(tags))[::-1]
    right.barh(rows, [score for _, score in tags], color=SIGNAL, height=0.3)
    for row, (label, score) in zip(rows, tags, strict=True):
        right.text(0.0, row + 0.2, f"{score:.2f}  {label}", va="bottom", fontsize=9, color=INK)
    right.set(xlim=(0, 1), ylim=(-0.5, len(tags) - 0.3), yticks=[], xticks=[0, 0.5, 1])
    _bare(above, below, right)
    right.spines["left"].set_visible(False)
    return figure


class Scene(NamedTuple):
    """A recording, or a stretch of one, with what is there and what was found in it."""

    title: str
    features: Float[np.ndarray, "T F"]
    times: tuple[Seconds, Seconds]  # where the features begin and end
    there: Sequence[Event]
    found: Sequence[Event]


def scenes(shown: Sequence[Scene], title: str) -> Figure:
    """For each recording its spectrogram, and below it for each class bars: when it is there, and when it was found.

    Args:
        shown: with their events in any order; of those beyond ``times`` only what is within is drawn.
        title: for example the name of the run.
    """
    rows = [_classes(scene) for scene in shown]
    heights = [height for classes in rows for height in (1.5, 0.5 + 0.3 * len(classes))]
    figure = Figure(figsize=(11.0, 0.8 + 1.1 * sum(heights)), layout="constrained")
    axes = figure.subplots(2 * len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for scene, classes, above, below in zip(shown, rows, axes[::2], axes[1::2], strict=True):
        _spectrogram(above, scene.features, scene.times, scene.title)
        above.set(xlim=scene.times, xticklabels=[])
        for side, color, lower in ((scene.there, SIGNAL, -0.36), (scene.found, WARM, 0.04)):
            for row, label in enumerate(classes):
                bars = [(event.start, event.end - event.start) for event in side if event.label == label]
                below.broken_barh(bars, (row + lower, 0.32), color=color, linewidth=0)
        below.set(xlabel="seconds", xlim=scene.times, ylim=(max(1, len(classes)) - 0.5, -0.5))
        below.set_yticks(range(len(classes)), classes)
        below.grid(axis="x", color=SOFT, alpha=0.3, linewidth=0.5)
        below.set_axisbelow(True)
        _bare(above, below)
    legend = [Patch(color=SIGNAL, label="is there"), Patch(color=WARM, label="was found")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _classes(scene: Scene) -> list[str]:
    """What is heard within the times of a scene, in the order in which it begins."""
    first, last = scene.times
    within = [event for event in (*scene.there, *scene.found) if event.end > first and event.start < last]
    return list(dict.fromkeys(event.label for event in sorted(within, key=lambda event: event.start)))


def confusion(counts: Int[np.ndarray, "C C"], labels: Sequence[str], title: str) -> Figure:
    """How often each class (row) was heard as each (column): shares of a row as colours, and the counts.

    Up to fifty classes and more can be read: names and counts get smaller, and no count of 0 is written.
    """
    count = len(labels)
    size = max(3.2, min(0.62, 0.18 + 4 / count) * count)
    figure = Figure(figsize=(size + 2.2, size + 1.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    small = 9 if count <= 12 else 6.5
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=small, color=color)
    turned = 0.085 * max(map(len, labels)) > size / count  # a letter is about so many inches wide
    axes.set_xticks(range(count), labels, rotation=90 if turned else 0, fontsize=small + 0.5)
    axes.set_yticks(range(count), labels, fontsize=small + 0.5)
    axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axes.grid(which="minor", color=SOFT, alpha=0.3, linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel="heard as", ylabel="is")
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_color(SOFT)
    return figure


def reconstructed(
    features: Float[np.ndarray, "T F"],
    hidden: Bool[np.ndarray, "T F"],
    rebuilt: Float[np.ndarray, "T F"],
    seconds: Seconds,
    title: str,
) -> Figure:
    """A spectrogram, below it what an encoder saw of it, and what was guessed in the places it did not see.

    Args:
        features: log-mel frames, normalised or not.
        hidden: where nothing was seen.
        rebuilt: the features with guesses in the hidden places.
        seconds: how long the clip is.
        title: for example its name.
    """
    figure = Figure(figsize=(min(24.0, max(7.0, 1.6 * seconds)), 6.5), layout="constrained")
    rows = {title: features, "seen": np.where(hidden, np.nan, features), "rebuilt": rebuilt}
    for axes, (name, shown) in zip(figure.subplots(3, 1, sharex=True), rows.items(), strict=True):
        axes.set_facecolor(SOFT)
        _spectrogram(axes, shown, (0.0, seconds), name, like=features)
        _bare(axes)
    axes.set(xlabel="seconds")
    return figure


def curve(folder: str | Path) -> Figure:
    """The losses of a run folder's ``train.csv`` and ``dev.csv``, and below them what dev was judged by."""
    train, dev = (_columns(Path(folder, name)) for name in ("train.csv", "dev.csv"))
    judged = {name: title for name in dev for start, title in MEASURES.items() if name.startswith(start)}
    figure = Figure(figsize=(7.5, 6.0 if judged else 3.6), layout="constrained")
    above, *below = figure.subplots(2 if judged else 1, 1, sharex=True, squeeze=False)[:, 0]
    if train:
        above.plot(train["step"], train["loss"], color=SOFT, linewidth=0.6, alpha=0.6)
        above.plot(train["step"], _smooth(train["loss"]), color=SIGNAL, linewidth=1.6, label="train, smoothed")
        if (train["loss"] > 0).all():
            above.set_yscale("log")
    if dev:
        above.plot(dev["step"], dev["loss"], color=WARM, marker="o", markersize=3, linewidth=1.4, label="dev")
    above.set(ylabel="loss")
    for axes in below:
        for name, color in zip(judged, (WARM, SIGNAL, INK), strict=False):
            axes.plot(dev["step"], 100 * dev[name], "o-", color=color, markersize=3, linewidth=1.4, label=name)
        axes.set(ylabel=f"{', '.join(dict.fromkeys(judged.values()))} in %")
        axes.set_ylim(0, max([1.0, *(105 * dev[name].max() for name in judged)]))
    for axes in (above, *below):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        axes.grid(axis="y", color=SOFT, alpha=0.25, linewidth=0.6)
        axes.set_xlabel("optimizer step" if axes is (above, *below)[-1] else "")
    _bare(above, *below)
    return figure


def _runs(best: np.ndarray) -> list[tuple[int, int, int]]:
    """Where the best symbol is the same and no blank: first frame, last frame, token."""
    borders = np.flatnonzero(np.diff(best)) + 1
    starts, ends = [0, *borders], [*borders, len(best)]
    return [(first, end - 1, int(best[first])) for first, end in zip(starts, ends, strict=True) if end and best[first]]


def _visible(symbol: str) -> str:
    return symbol if symbol.strip() else "\N{OPEN BOX}"


def _columns(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, as many as 2 % of the run."""
    sums, width = np.cumsum(np.insert(values, 0, 0.0)), max(1, len(values) // 50)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _spectrogram(
    axes: Any,
    features: Float[np.ndarray, "T F"],
    times: tuple[Seconds, Seconds],
    title: str,
    *,
    like: Float[np.ndarray, "T F"] | None = None,
    colours: str = "magma",
) -> tuple[float, float, float, float]:
    """Draw features, in the colours of those they are ``like``; where they lie, for what is drawn over them."""
    low, high = np.percentile(features if like is None else like, [2, 99.5])
    extent = (*times, 0.0, float(features.shape[1]))
    axes.imshow(features.T, origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=low, vmax=high)
    axes.set(ylabel="mel band")
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    return extent


def _bare(*many) -> None:  # type: ignore[no-untyped-def]
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
