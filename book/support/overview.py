"""The figure on the first page: what is missing, what that costs, and what each modality is worth. Takes a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RATES = {"left": 0.2, "right": 0.5, "projection": 0.7}
SEEDS = (0, 1, 2)
EPOCHS = 60


def numbers() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Who has what, bool [n, M]; per method the accuracy of every coalition, [2**M], and its Shapley values, [M]."""
    import torch

    from mmlib import coalitions, data, training
    from mmlib.backbones import GenericBackbone
    from mmlib.baselines import JointTraining
    from mmlib.missing import MissingPlan

    splits = data.load("digits")
    test, every = splits["test"], coalitions.coalition_masks(len(RATES))
    accuracy: dict[str, Any] = {}
    for method, dropout in (("joint training", 0.0), ("modality dropout", 0.5)):
        runs = []
        for seed in SEEDS:
            plan = MissingPlan("imbalanced", rates=RATES, seed=seed)
            train, valid = (plan.draw(splits[s]).apply(splits[s]) for s in ("train", "valid"))
            with training.random_state(seed):
                model = JointTraining(GenericBackbone.for_data(test), modality_dropout=dropout)
            training.fit(model, train, valid, training.TrainConfig(epochs=EPOCHS, seed=seed, device="cpu"))
            with coalitions.scoring(model):
                logits = coalitions.coalition_logits(model.backbone, test.data, every)
            runs.append((logits.argmax(-1) == test.target).float().mean(-1))  # type: ignore[attr-defined]
        accuracy[method] = torch.stack(runs).mean(0)
    shapley = {method: coalitions.shapley_values(v) for method, v in accuracy.items()}
    present = MissingPlan("imbalanced", rates=RATES).draw(splits["train"]).present
    return present, accuracy, shapley


def draw(path: Path) -> None:
    """Compute the numbers and write the figure to ``path``; prints what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from book.support import figures
    from mmlib import coalitions

    present, accuracy, shapley = numbers()
    names = list(RATES)
    masks = coalitions.coalition_masks(len(names))
    order = sorted(range(1, len(masks)), key=lambda k: (int(masks[k].sum()), k))
    initials = {"left": "L", "right": "R", "projection": "P"}
    groups = ["".join(initials[n] for n, on in zip(names, masks[k].tolist(), strict=True) if on) for k in order]
    for method, values in accuracy.items():
        print(method, {g: round(values[k].item(), 3) for g, k in zip(groups, order, strict=True)})
        print(" Shapley values", {n: round(x, 3) for n, x in zip(names, shapley[method].tolist(), strict=True)})

    figures.use_style()
    fig, places = plt.subplot_mosaic(
        [["grid", "worth"], ["cost", "cost"]], figsize=(7.6, 6.6), width_ratios=[1.0, 1.25]
    )
    grid, worth, cost = places["grid"], places["worth"], places["cost"]
    figures.presence_grid(present[:30], names, grid, title="What is missing", xlabel="", ylabel="training sample")
    gone = (~present).float().mean(0).tolist()
    grid.set_xticks(range(3), [f"{n}\n{r:.0%}" for n, r in zip(names, gone, strict=True)], fontsize=10)
    grid.set_xlabel("modality, fraction missing")
    values = {method: phi.tolist() for method, phi in shapley.items()}
    figures.bars(values, names, ax=worth, title="What each is worth", ylabel="Shapley value of the accuracy")
    worth.set_ylim(0, 1.15 * max(max(phi) for phi in values.values()))  # the numbers above the bars
    scores = {method: [values[k].item() for k in order] for method, values in accuracy.items()}
    figures.bars(scores, groups, ax=cost, title="What it costs", ylabel="test accuracy", chance=0.1, labels=False)
    cost.set_xlabel("modalities at test time (left, right, projection)")
    handles, labels = cost.get_legend_handles_labels()
    for ax in (grid, worth, cost):
        if (legend := ax.get_legend()) is not None:
            legend.remove()
        ax.set_title(ax.get_title(loc="left"), loc="left", pad=6, y=None)
        for text in (*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()):
            text.set_fontsize(max(text.get_fontsize(), 10))
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    fig.savefig(path, dpi=220, metadata={"Software": None})
    plt.close(fig)
