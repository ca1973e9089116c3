"""What the foundations draw and no other page does: the lattice of a game, samples with their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from book.support import figures

SHADES = (figures.BLUE, figures.AMBER, figures.GREEN)
LATTICE = {0: (0, 0), 1: (-2, 1), 2: (0, 1), 4: (2, 1), 3: (-2, 2), 5: (0, 2), 6: (2, 2), 7: (0, 3)}


def lattice(v: Sequence[float]) -> Any:
    """The game ``v`` [8] of three modalities as paths from the empty coalition to the full one; the Axes."""
    _, ax = figures.figure("tall")
    for coalition, (x, y) in LATTICE.items():
        for m in range(3):
            if not coalition >> m & 1:
                _arrival(ax, v, coalition, m)
        members = ", ".join(str(m) for m in range(3) if coalition >> m & 1)
        box = {"boxstyle": "round,pad=0.35", "facecolor": "#f3f3f3", "edgecolor": "#555555"}
        text = f"{{{members}}}\nv = {v[coalition]}"
        ax.text(x, y, text, ha="center", va="center", zorder=3, bbox=box, color="#2b2b2c")
    for m in range(3):
        ax.plot([], [], color=SHADES[m], linewidth=3, label=f"modality {m} arrives")
    ax.legend(loc="upper left", bbox_to_anchor=(0, 1.02))
    ax.set(title="Orders of arrival are paths", xlim=(-2.9, 2.9), ylim=(-0.35, 3.35))
    ax.axis("off")
    return ax


def _arrival(ax: Any, v: Sequence[float], coalition: int, m: int) -> None:
    """The edge from ``coalition`` to the one with ``m``, as wide as the fraction of the orders that use it."""
    (x, y), (x1, y1) = LATTICE[coalition], LATTICE[coalition | 1 << m]
    weight = 1 / 3 if coalition.bit_count() in (0, 2) else 1 / 6
    ax.plot([x, x1], [y, y1], color=SHADES[m], linewidth=9 * weight, solid_capstyle="round", zorder=1)
    at = 0.35 if coalition.bit_count() == 1 else 0.5
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    gain = f"+{v[coalition | 1 << m] - v[coalition]}"
    place = x + at * (x1 - x), y + at * (y1 - y)
    ax.text(*place, gain, color=SHADES[m], ha="center", va="center", weight="bold", bbox=box, zorder=2)


def credited(images: Sequence[Any], titles: Sequence[str], pss: Any, pas: Any, names: Sequence[str]) -> Any:
    """A column a sample: its picture [H, W] where there is one, below it bars of its PSS and PAS [samples, M]."""
    drawn = len(images) > 0
    size = "page" if drawn else "wide"
    figure, axes = figures.figure(size, rows=2 if drawn else 1, columns=len(titles), squeeze=False)
    tints, at = [figures.colour(n) for n in names], np.arange(len(names))
    top, bottom = float(pas.max()) + 0.2, min(-0.05, float(pas.min()) - 0.1)
    for column, title in enumerate(titles):
        if drawn:
            axes[0, column].imshow(images[column], cmap="gray_r")
            axes[0, column].axvline(3.5, color=figures.PINK, linewidth=1.2, linestyle="--")
            axes[0, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(title)
        ax = axes[-1, column]
        ax.bar(at - 0.2, pss[column], 0.38, color="white", edgecolor=tints, hatch="///", label="PSS")
        ax.bar(at + 0.2, pas[column], 0.38, color=tints, label="PAS")
        ax.axhline(0, color="#555555", linewidth=0.8)
        ax.set(xticks=at, ylim=(bottom, top))
        ax.set_xticklabels(names, rotation=20)
    axes[-1, 0].set_ylabel("score")
    axes[-1, 0].legend(loc="upper right")
    return figure


def settings(stored: Mapping[str, Any], modalities: Mapping[str, Sequence[str]], conditions: Mapping[str, Any]) -> Any:
    """Means with their intervals over seeds, a line a setting: a row of panels a data set, a panel a condition."""
    figure, axes = figures.figure("page", rows=len(stored), columns=4, sharey=True)
    for row, (where, table) in zip(axes, stored.items(), strict=True):
        columns = [*(f"{m} alone" for m in modalities[where]), "own rates"]
        for ax, column in zip(row, columns, strict=True):
            shade = figures.INK if column == "own rates" else figures.colour(column.removesuffix(" alone"))
            found = [table.mean(cell, conditions[where][column]) for cell in table.cells]
            for y, mean in enumerate(found):
                ax.plot([100 * mean.low, 100 * mean.high], [y, y], color=shade)
                ax.plot(100 * mean.mean, y, "o", color=shade)
            ax.set_title(column)
            ax.grid(True, axis="x")
        row[0].set_yticks(range(len(table.cells)), [cell[0] for cell in table.cells])
        row[0].set_ylabel(f"{where}: rates of\n{', '.join(modalities[where])}")
    axes[0, 0].invert_yaxis()
    figure.supxlabel("accuracy (%)", fontsize=10)
    return figure


def repairs(table: Any, columns: Mapping[str, str]) -> Any:
    """A line a row of ``table``, sorted by the first of ``columns``; a panel a column: its name -> its title."""
    first, *_ = columns
    ordered = table.sort_values(first)
    figure, axes = figures.figure("tall", columns=len(columns), sharey=True)
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        shade = figures.INK if column == first else figures.BLUE
        ax.barh(range(len(ordered)), ordered[column], 0.6, color=shade)
        for y, value in enumerate(ordered[column]):
            text = f"{value:.0f}" if value >= 10 else f"{value:.2f}"
            ax.annotate(text, (max(value, 0), y), (3, 0), textcoords="offset points", va="center")
        ax.set_title(title.replace(" ", "\n", 1), fontsize=10)
        ax.set_xlim(0, 1.45 * float(ordered[column].max()))
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
    axes[0].set_yticks(range(len(ordered)), list(ordered.index))
    axes[0].invert_yaxis()
    return figure


def avmnist_pairs(pairs: Any, recordings: Path) -> Any:
    """Image, waveform, mel spectrogram and MFCC picture of four pairs of AV-MNIST; ``recordings`` has the wav files."""
    import librosa
    import soundfile

    figure, axes = figures.figure("page", 4, 4)
    test, speakers = pairs["test"], ("jackson", "nicolas", "theo")
    for column, digit in enumerate((0, 3, 7, 9)):
        sample = test[int((test.target == digit).nonzero()[column])]
        speaker, take = speakers[int(sample.extras["speaker"])], int(sample.extras["take"])
        wave, rate = soundfile.read(recordings / f"{digit}_{speaker}_{take}.wav")
        figures.picture(-sample.features["image"][0], axes[0, column], cmap="gray")
        axes[0, column].set_title(f"a {digit}")
        axes[1, column].plot(np.arange(len(wave)) / rate, wave, color=figures.colour("audio"), lw=0.5)
        axes[1, column].set(xlim=(0, 0.65), ylim=(-0.6, 0.6), xlabel="time (s)")
        spectrogram = librosa.feature.melspectrogram(y=wave, n_mels=40, sr=rate, n_fft=512, hop_length=64)
        shown = {"aspect": "auto", "origin": "lower"}
        axes[2, column].imshow(librosa.power_to_db(spectrogram), extent=(0, len(wave) / rate, 0, 40), **shown)
        axes[2, column].set(xlim=(0, 0.65), xlabel="time (s)")
        mfcc = sample.features["audio"][0, 0].numpy().T[1:]
        mfcc = np.where(np.arange(20) < int(sample.extras["frames"]), mfcc, np.nan)
        axes[3, column].imshow(mfcc, extent=(-0.5, 19.5, 0.5, 19.5), **shown)
        axes[3, column].set(xlabel="frame")
        for ax in axes[2:, column]:
            ax.set_facecolor("#eeeeee")
    for row, name in enumerate(("image", "waveform", "mel band", "MFCC")):
        axes[row, 0].set_ylabel(name)
    return figure
