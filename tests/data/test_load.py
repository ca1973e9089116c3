"""One call for every source: names, options, roots, and the facts that every split carries."""

import json

import numpy as np
import pytest
import torch

from mmlib import MultimodalDataset, data
from mmlib.data._readers import standardise, stratified_split

INFO = {"name", "task", "outputs", "classes", "source", "licence", "fingerprint", "split", "split_seed"}


def test_names_and_options():
    known = ("digits", "synthetic", "avmnist", "mfeat", "iemocap", "mosi", "mosei", "sims", "simsv2", "dialogue")
    assert data.names() == (*known, "conversations")
    assert data.options("digits") == {"split_seed": 0, "valid": 0.15, "test": 0.25, "standardised": True}
    assert "root" not in data.options("avmnist")


def test_unknown_name():
    for call in (data.load, data.options):
        with pytest.raises(
            ValueError, match="expected one of digits, .*, mfeat, iemocap, mosi, .*, simsv2, .*, got 'mnist'"
        ):
            call("mnist")


def test_unknown_option():
    with pytest.raises(TypeError, match="'digits' has no option colour, size; it has split_seed, valid, test, stand"):
        data.load("digits", size=3, colour="red")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("avmnist", "fsdd/recordings/"),
        ("mfeat", "mfeat-{fou,fac"),
        ("iemocap", "V/denseface.h5"),
        ("mosi", "MOSI/Processed/unaligned_50.pkl"),
        ("simsv2", "SIMSv2/Processed/sims_unaligned.pkl"),
        ("dialogue", "mosi/mosi_conversation.pkl"),
    ],
)
@pytest.mark.parametrize("root", [None, "", "/does/not/exist"])
def test_no_root(name, layout, root, monkeypatch):
    monkeypatch.delenv("MMLIB_DATA", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, root)
    assert layout in str(error.value)
    assert "https://" in str(error.value)
    assert ("/does/not/exist" if root else "MMLIB_DATA") in str(error.value)


def test_root_from_the_environment(monkeypatch):
    monkeypatch.setenv("MMLIB_DATA", "/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all is not a folder"):
        data.load("mfeat")
    with pytest.raises(FileNotFoundError, match="/but/here is not a folder"):
        data.load("mfeat", "/but/here")


@pytest.mark.parametrize("name", ["digits", "synthetic", "conversations"])
def test_embedded_sources_ignore_the_root(name):
    options = {} if name == "digits" else {"sizes": (20, 10, 10)}
    a, b = data.load(name, "/does/not/exist", **options), data.load(name, **options)
    assert a["test"].info["fingerprint"] == b["test"].info["fingerprint"]


@pytest.mark.parametrize("name", ["digits", "synthetic", "conversations"])
def test_every_split_has_its_facts(name):
    splits = data.load(name)
    assert list(splits) == ["train", "valid", "test"]
    for split, d in splits.items():
        assert isinstance(d, MultimodalDataset)
        assert set(d.info) >= INFO
        assert d.info["name"] == name
        assert d.info["split"] == split
        assert d.info["fingerprint"] == data.fingerprint(d)
        json.dumps(d.info)  # facts go into result files
        assert len(d.info["classes"]) == d.info["outputs"]
        d.data.check_values(d.info["outputs"])
    ids = torch.cat([d.ids for d in splits.values()])
    assert len(ids.unique()) == len(ids)


def test_fingerprint_sees_everything():
    d = data.load("digits")["test"]
    base = data.fingerprint(d)
    assert base == data.fingerprint(d.data)
    assert base == data.fingerprint(d.subset(torch.arange(len(d))))
    changed = [
        d.subset(torch.arange(len(d)).flip(0)),
        d.select(["left", "right"]),
        d.select(["right", "left", "projection"]),
        d.drop(torch.tensor([True, True, False])),
        MultimodalDataset(d.data.replace(target=d.target.roll(1)), d.info),
        MultimodalDataset(d.data.replace(ids=d.ids + 1), d.info),
        MultimodalDataset(d.data.replace(extras={"x": d.ids}), d.info),
        d.drop(torch.tensor([True, True, True]), keep_complete=True),
        d.subset(range(len(d) - 1)),
    ]
    prints = {data.fingerprint(c) for c in changed} | {base}
    assert len(prints) == len(changed) + 1


class TestShared:
    labels = np.repeat(np.arange(4), [40, 40, 80, 40])

    def test_split_is_stratified_and_complete(self):
        rows = stratified_split(self.labels, 0.1, 0.3, 0)
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(200))
        assert np.bincount(self.labels[rows["test"]]).tolist() == [12, 12, 24, 12]
        assert np.bincount(self.labels[rows["valid"]]).tolist() == [4, 4, 8, 4]
        again, other = (stratified_split(self.labels, 0.1, 0.3, s) for s in (0, 1))
        assert all((rows[k] == again[k]).all() for k in rows)
        assert (rows["test"] != other["test"]).any()

    @pytest.mark.parametrize(
        ("valid", "test", "match"),
        [(0, 0.2, "valid: expected"), (0.2, 1.0, "test: expected"), (0.5, 0.5, "valid, test: expected")],
    )
    def test_bad_shares(self, valid, test, match):
        with pytest.raises(ValueError, match=match):
            stratified_split(self.labels, valid, test, 0)

    def test_standardise_looks_at_train_alone(self):
        x = {"a": np.array([[0.0, 5.0], [2.0, 5.0], [100.0, 6.0]])}
        train = np.array([0, 1])
        scaled, facts = standardise(x, train, per_feature=True)
        assert scaled["a"].tolist() == [[-1, 0], [1, 0], [99, 1]]  # a constant feature is only centred
        assert facts["a"] == {"mean": [1, 5], "std": [1, 1]}
        whole, _ = standardise(x, train, per_feature=False)  # mean 3, variance (9 + 4 + 1 + 4) / 4
        assert whole["a"][0] == pytest.approx(np.array([-3, 2]) / np.sqrt(4.5))
