"""The figure on the first page: what is missing, what that costs, and what each modality is worth. Needs half a minute."""

from __future__ import annotations

from pathlib import Path

RATES = {"left": 0.2, "right": 0.5, "projection": 0.7}


def numbers(seed: int = 0, epochs: int = 60) -> tuple[object, object, object]:
    """(which of 30 samples has what, accuracy of every coalition with and without modality dropout, Shapley values)."""
    from mmlib import coalitions, data, training
    from mmlib.backbones import GenericBackbone
    from mmlib.methods import JointTraining
    from mmlib.missing import MissingPlan

    splits = data.load("digits")
    plan = MissingPlan("imbalanced", rates=RATES, seed=seed)
    mask = plan.draw(splits["train"])
    test, every = splits["test"], coalitions.coalition_masks(len(RATES))
    accuracy = {}
    for name, rate in (("joint training", 0.0), ("modality dropout", 0.5)):
        with training.random_state(seed):
            method = JointTraining(GenericBackbone.for_data(test), modality_dropout=rate)
        config = training.TrainConfig(epochs=epochs, seed=seed, device="cpu")
        training.fit(method, mask.apply(splits["train"]), plan.draw(splits["valid"]).apply(splits["valid"]), config)
        with coalitions.scoring(method):
            logits = coalitions.coalition_logits(method.backbone, test.data, every)
        accuracy[name] = (logits.argmax(-1) == test.target).float().mean(-1)
    shapley = {name: coalitions.shapley_values(v) for name, v in accuracy.items()}
    return mask.present[:30], accuracy, shapley
