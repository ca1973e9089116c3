"""What the models of one modality alone get right."""

from __future__ import annotations

import pytest
from methods.mce_loop import make_splits

from mmlib.backbones import GenericBackbone
from mmlib.backbones.alone import UpperBounds
from mmlib.baselines import JointTraining
from mmlib.missing import MissingPlan


def test_upper_bounds_are_what_the_models_get_right():
    whole = make_splits()["train"]
    train = MissingPlan("bernoulli", 0.4).draw(whole).apply(whole)
    models = {m: JointTraining(GenericBackbone.for_data(train.select([m]), width=8)) for m in train.modalities}
    for model in models.values():
        model.train()
    upper = UpperBounds.from_models(models, train, batch_size=7)
    assert all(model.training for model in models.values())
    for m, name in enumerate(train.modalities):
        models[name].eval()
        for i in range(0, len(train), 9):
            expected = 0.0
            if train.present[i, m]:
                logits = models[name](train.data.select([name])[i]).logits[0]
                expected = float(logits.argmax() == train.data.target[i])
            assert upper(train.ids[i : i + 1])[0, m].item() == expected
    assert 0 < upper.table.mean() < 1
    with pytest.raises(ValueError, match="models: expected one for each"):
        UpperBounds.from_models({"a": models["a"]}, train)
