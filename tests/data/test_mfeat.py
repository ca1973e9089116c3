"""Multiple Features: generated files for the layout and its failures, the real ones where they are."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmlib import data
from mmlib.data.mfeat import VIEWS


@pytest.fixture
def root(tmp_path):
    """120 made-up digits in six views; the first feature of every view is 10 times the row number."""
    g = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 12)
    folder = tmp_path / "mfeat"
    folder.mkdir()
    for view, (width, _) in VIEWS.items():
        x = g.normal(labels[:, None], 1, (120, width))
        x[:, 0] = 10 * np.arange(120)
        rows = [",".join(map(str, range(width + 1)))]
        rows += [",".join([*(f"{v:.5g}" for v in row), str(c)]) for row, c in zip(x, labels, strict=True)]
        (folder / f"mfeat-{view}.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_layout(root, monkeypatch):
    monkeypatch.setenv("MMLIB_DATA", str(root))
    splits = data.load("mfeat", standardised=False)
    assert {k: len(d) for k, d in splits.items()} == {"train": 72, "valid": 18, "test": 30}
    for d in splits.values():
        assert d.modalities == ("fou", "fac", "kar", "pix", "zer", "mor")
        assert d.feature_shapes == {m: (1, width) for m, (width, _) in VIEWS.items()}
        rows = [int(name.split("/")[1]) for name in d.names]
        assert d.target.tolist() == [row // 12 for row in rows]
        for x in d.data.features.values():  # the views of one row stay together
            assert x[:, 0, 0].tolist() == [10 * row for row in rows]
    assert sorted(int(n.split("/")[1]) for d in splits.values() for n in d.names) == list(range(120))
    inside = data.load("mfeat", root / "mfeat", standardised=False)  # the folder itself will do
    assert inside["test"].info["fingerprint"] == splits["test"].info["fingerprint"]


def test_standardised_on_train(root):
    splits = data.load("mfeat", root)
    for x in splits["train"].data.features.values():
        assert torch.allclose(x.mean(0), torch.zeros(1), atol=1e-5)
        assert torch.allclose(x.std(0, correction=0), torch.ones(1), atol=1e-4)
    assert "standardised" in splits["test"].info["units"]["mor"]


def test_seed(root):
    a, b, c = (data.load("mfeat", str(root), split_seed=s)["test"] for s in (0, 0, 1))
    assert a.info["fingerprint"] == b.info["fingerprint"] != c.info["fingerprint"]


def edit(view, change):
    def apply(folder):
        path = folder / f"mfeat-{view}.csv"
        path.write_text(change(path.read_text()))

    return apply


def swap_last_classes(text):
    return text[:-3].rsplit("\n", 1)[0] + "\n" + text[:-3].rsplit("\n", 1)[1] + ",8\n"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "mfeat-kar.csv").unlink(), FileNotFoundError, r"mfeat-kar\.csv not found in"),
        (edit("pix", lambda t: ""), ValueError, r"mfeat-pix\.csv: not a CSV file of numbers"),
        (edit("zer", lambda t: t.replace("1", "one")), ValueError, r"mfeat-zer\.csv: not a CSV file of numbers"),
        (edit("mor", lambda t: t.splitlines()[0] + "\n"), ValueError, r"mfeat-mor\.csv: expected 6 features"),
        (edit("mor", lambda t: "\n".join(x[2:] for x in t.splitlines())), ValueError, r"mfeat-mor\.csv"),
        (edit("mor", lambda t: t.replace("10,", "nan,", 1)), ValueError, r"mfeat-mor\.csv: expected finite numbers"),
        (edit("mor", lambda t: t.replace("\n0,", "\n,", 1)), ValueError, r"mfeat-mor\.csv: expected finite numbers"),
        (edit("fac", lambda t: t[:-2] + "11\n"), ValueError, r"mfeat-fac\.csv: expected classes 0 to 9"),
        (edit("fac", lambda t: t[:-2] + "8.5\n"), ValueError, r"mfeat-fac\.csv: expected classes 0 to 9"),
        (
            edit("fac", swap_last_classes),
            ValueError,
            r"mfeat-fac\.csv: its 120 classes differ from the 120 of mfeat-fou",
        ),
        (edit("fac", lambda t: t.rstrip("\n").rsplit("\n", 1)[0]), ValueError, r"its 119 classes differ from the 120"),
        (
            lambda f: (f / "mfeat-mor.csv").write_bytes(b"\xff\xfe\x00\x81" * 30),
            ValueError,
            r"mfeat-mor\.csv: not a CSV",
        ),
    ],
)
def test_damage(root, damage, error, message):
    damage(root / "mfeat")
    with pytest.raises(error, match=message) as caught:
        data.load("mfeat", root)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.real
def test_real_files(real_data):
    if not (real_data / "mfeat").is_dir():
        pytest.skip(f"no mfeat/ in {real_data}")
    splits = data.load("mfeat", real_data)
    assert {k: len(d) for k, d in splits.items()} == {"train": 1200, "valid": 300, "test": 500}
    assert torch.bincount(splits["test"].target).tolist() == [50] * 10
    train, test = splits["train"].data, splits["test"].data
    bands = {("fac",): (0.95, 1.0), ("mor",): (0.66, 0.79), ("zer",): (0.75, 0.86), train.modalities: (0.97, 1.0)}
    for names, (low, high) in bands.items():
        x, z = (np.concatenate([b.features[m].flatten(1).numpy() for m in names], 1) for b in (train, test))
        accuracy = LogisticRegression(max_iter=1000).fit(x, train.target).score(z, test.target)
        assert low <= accuracy <= high, (names, accuracy)
