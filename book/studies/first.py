"""The runs behind "Data and metrics": linear probes, and the first experiment on AV-MNIST.

The chapter itself fills both tables with ``-p profile book -p data_root FOLDER``; see `COMMAND`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from book.support.results import grid
from mmlib import data, metrics

COMMAND = "papermill book/foundations/data-and-metrics.ipynb out.ipynb -p profile book -p data_root PATH"
VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
PROBED = {
    "mfeat": [*[(view,) for view in VIEWS], VIEWS],
    "avmnist": [("image",), ("audio",), ("image", "audio")],
}
METHODS = {  # modalities that the network reads, rate of modality dropout
    "image only": (["image"], 0.0),
    "audio only": (["audio"], 0.0),
    "image + audio": (["image", "audio"], 0.0),
    "modality dropout": (["image", "audio"], 0.5),
}
SEEDS, RATES = list(range(5)), (1e-3, 3e-4)


def probe(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The result of a linear probe: the test accuracy of a logistic regression on the config's modalities."""
    from sklearn.linear_model import LogisticRegression

    splits = data.load(config["data"], config["data_root"], **config["data_options"])
    x = {
        key: torch.cat([splits[key].data.features[m].flatten(1) for m in config["modalities"]], 1).numpy()
        for key in ("train", "test")
    }
    model = LogisticRegression(max_iter=2000).fit(x["train"], splits["train"].target.numpy())
    guess = model.predict(x["test"])
    return [
        {
            "condition": "+".join(config["modalities"]),
            "metric": "accuracy",
            "value": metrics.classification_scores(guess, splits["test"].target)["accuracy"],
            "n": len(guess),
            "data_hash": splits["test"].info["fingerprint"][:12],
        }
    ]


def probes(name: str, choices: Sequence[Sequence[str]], root: str | None = None) -> list[dict[str, Any]]:
    """The configs of linear probes on a data set, one a choice of modalities."""
    options = {"scaling": "train", "mark_padding": True} if name == "avmnist" else {}
    common = {"method": "linear probe", "backbone": "logistic regression", "data": name, "data_root": root}
    common |= {"data_options": options, "seed": 0, "profile": "book"}
    return [{**common, "modalities": list(choice)} for choice in choices]


def runs(method: str, lr: float, root: str | None = None, device: str = "cpu") -> list[dict[str, Any]]:
    """The five runs of one of `METHODS` on AV-MNIST at one learning rate."""
    modalities, dropout = METHODS[method]
    return grid(
        data="avmnist",
        data_root=root,
        modalities=(modalities,),
        backbone="AVMNISTBackbone",
        method="JointTraining",
        method_options={"modality_dropout": dropout},
        conditions="subsets",
        train={"epochs": 40, "batch_size": 64, "lr": lr},
        seed=SEEDS,
        profile="book",
        device=device,
    )


def cells(root: str | None = None, device: str = "cpu") -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """(method, learning rate) -> its runs."""
    return {(method, f"{lr:g}"): runs(method, lr, root, device) for method in METHODS for lr in RATES}


def reads(method: str, condition: str) -> str | None:
    """What a method reads of a test ``condition``: a network with one input ignores the other. None: nothing."""
    there = [m for m in METHODS[method][0] if m in condition.split("+")]
    return "+".join(there) or None
