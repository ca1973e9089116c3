"""The embedded digits: three views of one image, and what linear probes see in each."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mmlib import data


@pytest.fixture(scope="module")
def splits():
    return data.load("digits")


def test_shapes_and_shares(splits):
    assert {k: len(d) for k, d in splits.items()} == {"train": 1077, "valid": 270, "test": 450}
    for d in splits.values():
        assert d.feature_shapes == {"left": (8, 4), "right": (8, 4), "projection": (8, 1)}
        assert d.present.all()
        assert d.info["classes"] == list("0123456789")
        share = torch.bincount(d.target, minlength=10) / len(d)
        assert (share - 0.1).abs().max() < 0.02


def test_the_views_are_the_image():
    pixels, target = load_digits(return_X_y=True)
    for d in data.load("digits", standardised=False).values():
        rows = [int(name.split("/")[1]) for name in d.names]
        assert d.target.tolist() == target[rows].tolist()
        for i in (0, 1, -1):
            image = pixels[rows[i]].reshape(8, 8) / 16
            x = {m: v[i].numpy() for m, v in d.data.features.items()}
            assert x["left"] == pytest.approx(image[:, :4])
            assert x["right"] == pytest.approx(image[:, 4:])
            assert x["projection"][:, 0] == pytest.approx([image[:, c].sum() / 8 for c in range(8)])
        assert "in [0, 1]" in d.info["units"]["left"]


def test_standardised_on_train_alone(splits):
    for m, x in splits["train"].data.features.items():
        assert abs(float(x.mean())) < 1e-5
        assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-5)
        facts = splits["train"].info["standardised"][m]
        raw = data.load("digits", standardised=False)
        for split in ("train", "test"):
            back = splits[split].data.features[m] * facts["std"] + facts["mean"]
            assert torch.allclose(back, raw[split].data.features[m], atol=1e-5)
    assert any(abs(float(x.mean())) > 1e-4 for x in splits["test"].data.features.values())


def test_seeds(splits):
    again, other = data.load("digits"), data.load("digits", split_seed=1)
    assert again["train"].info["fingerprint"] == splits["train"].info["fingerprint"]
    assert other["train"].info["fingerprint"] != splits["train"].info["fingerprint"]
    assert set(other["test"].names) != set(splits["test"].names)
    # the same digit has the same id in every split, so masks follow it
    where = {name: int(i) for d in splits.values() for name, i in zip(d.names, d.ids, strict=True)}
    assert all(where[name] == int(i) for name, i in zip(other["test"].names, other["test"].ids, strict=True))


def test_linear_probes(splits):
    train, test = splits["train"].data, splits["test"].data
    bands = {
        ("left",): (0.80, 0.88),
        ("right",): (0.85, 0.93),
        ("projection",): (0.50, 0.62),
        ("left", "right", "projection"): (0.94, 0.99),
    }
    for names, (low, high) in bands.items():
        x, z = (np.concatenate([b.features[m].flatten(1).numpy() for m in names], 1) for b in (train, test))
        accuracy = LogisticRegression(max_iter=2000).fit(x, train.target).score(z, test.target)
        print(names, round(accuracy, 4))
        assert low <= accuracy <= high, (names, accuracy)


def test_bad_shares():
    with pytest.raises(ValueError, match="test: expected a number in"):
        data.load("digits", test=1.5)
