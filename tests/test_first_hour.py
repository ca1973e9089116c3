"""What a user has in his first hour: frames, strings, masked arrays, ragged lists, images of the other kind."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split

from mmlib import MultimodalBatch, MultimodalDataset, Output
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.training import TrainConfig, class_names, fit, predict

NAN = float("nan")
from_arrays = MultimodalDataset.from_arrays
ONES = {"a": np.ones((4, 2))}


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestNumbers:
    @pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "int64", "uint64", "float16", "float64"])
    def test_a_table_of_numbers_is_vectors(self, dtype):
        data = from_arrays({"a": np.array([[3, 200 % 128], [5, 6]], dtype)})
        assert data.feature_shapes == {"a": (1, 2)}
        assert data.data.features["a"].dtype == torch.float32
        assert data.data.features["a"].tolist() == [[[3, 72]], [[5, 6]]]

    def test_lists_of_integers_too(self):
        assert from_arrays({"a": [[1, 2], [3, 4]]}).feature_shapes == {"a": (1, 2)}
        data = from_arrays({"a": [np.array([1, 2]), None], "b": [[5], [6]]})
        assert data.feature_shapes == {"a": (1, 2), "b": (1, 1)}
        assert data.present.tolist() == [[True, True], [False, True]]

    def test_masked_values_are_missing(self):
        x = np.ma.MaskedArray([[1, 2], [3, 4], [5, 6]], mask=[[0, 0], [1, 1], [0, 0]])
        data = from_arrays({"a": x, "b": np.ma.MaskedArray(np.ones((3, 1)))})
        assert data.present.tolist() == [[True, True], [False, True], [True, True]]
        assert data.data.features["a"][:, 0].tolist() == [[1, 2], [0, 0], [5, 6]]
        x.mask[0, 0] = True
        with pytest.raises(ValueError, match=r"features\['a'\]: sample 0 has NaN"):
            from_arrays({"a": x, "b": np.ones((3, 1))})
        rows = from_arrays({"a": [x[1], x[2]], "b": np.ones((2, 1))})
        assert rows.present[:, 0].tolist() == [False, True]
        with pytest.raises(ValueError, match="target: .*masked"):
            from_arrays(ONES, np.ma.MaskedArray([0, 1, 0, 1], mask=[0, 0, 0, 1]))


class TestTokens:
    def test_ragged_lists(self):
        data = from_arrays({"t": [[101, 7, 102], [101, 102], [], None], "b": np.ones((4, 1))}, tokens=("t",))
        assert data.data.features["t"].tolist() == [[101, 7, 102], [101, 102, 0], [0, 0, 0], [0, 0, 0]]
        assert data.data.valid["t"].sum(-1).tolist() == [3, 2, 0, 0]
        assert data.present[:, 0].tolist() == [True, True, False, False]

    def test_masked_ids_are_padding(self):
        x = np.ma.MaskedArray([[5, 6, 7], [8, 9, 9], [1, 1, 1]], mask=[[0, 0, 0], [0, 1, 1], [1, 1, 1]])
        data = from_arrays({"t": x, "b": np.ones((3, 1))}, tokens=["t"])
        assert data.data.valid["t"].sum(-1).tolist() == [3, 1, 0]
        x.mask = [[0, 1, 0]] * 3
        with pytest.raises(ValueError, match=r"features\['t'\]: expected masked token ids after the others"):
            from_arrays({"t": x}, tokens=["t"])

    def test_the_vocabulary_is_checked_where_ids_are_read(self):
        ids = np.array([[1, 9, -1], [2, 30, 77]])
        data = from_arrays({"t": ids}, [0, 1], lengths={"t": [2, 1]}, tokens={"t": 10})
        assert data.info["vocabulary"] == {"t": 10}
        assert data.data.features["t"].tolist() == [[1, 9, 0], [2, 0, 0]]  # padding that no embedding has becomes 0
        assert GenericBackbone.for_data(data, width=4).config.vocabulary == 10
        with pytest.raises(
            ValueError, match=r"features\['t'\]: expected token ids in \[0, 9\).* from 1 to 9.*sample 0"
        ):
            from_arrays({"t": ids}, lengths={"t": [2, 1]}, tokens={"t": 9})
        with pytest.raises(ValueError, match=r"features\['t'\]: expected token ids of at least 0, got .* -1 to 9"):
            from_arrays({"t": ids}, lengths={"t": [3, 1]}, tokens=("t",))

    def test_a_backbone_refuses_what_its_embedding_has_not(self):
        data = from_arrays({"t": np.array([[1, 12], [2, 3]])}, [0, 1], tokens=("t",))
        with pytest.raises(ValueError, match=r"features\['t'\]: expected token ids in \[0, 12\).*from 1 to 12"):
            GenericBackbone.for_data(data, vocabulary=12)
        model = JointTraining(GenericBackbone.for_data(data, vocabulary=13, width=4))
        later = from_arrays({"t": np.array([[13, 1]])}, tokens=("t",))
        with pytest.raises(ValueError, match=r"features\['t'\]: expected token ids in \[0, 13\)"):
            predict(model, later)

    @pytest.mark.parametrize(
        ("features", "options", "error", "message"),
        [
            ({"t": [[1, 2], [3]]}, {}, ValueError, r"features\['t'\]"),
            ({"t": [np.array([1, 2]), np.array([3])]}, {}, ValueError, r"say so: tokens=\('t',\)"),
            ({"t": np.ones((2, 2))}, {"tokens": ("t",)}, TypeError, r"features\['t'\]: expected integer token ids"),
            ({"t": [[1.0, 2.0], [3.0]]}, {"tokens": ("t",)}, TypeError, r"features\['t'\]: expected integer token ids"),
            (
                {"t": np.ones((2, 2, 2), int)},
                {"tokens": ("t",)},
                ValueError,
                r"features\['t'\]: expected integer token",
            ),
            ({"t": [[1], [2]]}, {"tokens": "t"}, TypeError, "tokens: expected a list of names"),
            ({"t": [[1], [2]]}, {"tokens": 3}, TypeError, "tokens: expected a list of names"),
            ({"t": [[1], [2]]}, {"tokens": ("u",)}, ValueError, r"tokens: unknown modalities \['u'\]"),
            ({"t": [[1], [2]]}, {"tokens": {"t": 0}}, ValueError, r"tokens\['t'\]: expected an integer"),
            ({"t": [[1], [2]]}, {"tokens": {"t": 5.0}}, TypeError, r"tokens\['t'\]: expected an integer"),
            ({"t": [[1], [2]]}, {"tokens": {"t": 5}, "fill": {"t": 5}}, ValueError, r"fill\['t'\]: expected"),
            ({"t": [[1], [2]]}, {"fill": {"t": -1}}, ValueError, r"fill\['t'\]: expected"),
            ({"t": [[1], [2]]}, {"fill": {"t": "unk"}}, TypeError, r"fill\['t'\]: expected"),
            ({"t": [[1], [2]]}, {"fill": 3}, TypeError, "fill: expected a dict"),
            ({"t": [[1], [2]]}, {"lengths": [1, 1]}, TypeError, "lengths: expected a dict"),
        ],
    )
    def test_errors(self, features, options, error, message):
        with pytest.raises(error, match=message):
            from_arrays(features, **options)


class TestNames:
    @pytest.mark.parametrize("name", ["a.b", "", "train", "keys", "values", "type", "forward", "training"])
    def test_names_that_torch_keeps_are_refused(self, name):
        with pytest.raises(ValueError, match=f"features: {name!r} cannot name a modality"):
            from_arrays({name: np.ones((2, 2))})
        batch = MultimodalBatch({name: torch.ones(2, 1, 2)}, torch.ones(2, 1, dtype=torch.bool))
        with pytest.raises(ValueError, match="cannot name a modality"):
            MultimodalDataset(batch)
        with pytest.raises((KeyError, ValueError)):  # or torch would have taken it
            torch.nn.ModuleDict({name: torch.nn.Identity()})

    def test_names_are_strings(self):
        with pytest.raises(TypeError, match="features: expected strings .* got 1"):
            from_arrays({1: np.ones((2, 2))})
        with pytest.raises(TypeError, match="features: expected a dict of arrays, got ndarray"):
            from_arrays(np.ones((2, 2)))


class TestImages:
    def test_channels_last(self):
        with pytest.warns(
            UserWarning, match=r"features\['i'\]: .*images \[n, H, W, C\].*transpose\(0, 3, 1, 2\)"
        ) as found:
            data = from_arrays({"i": np.ones((2, 8, 9, 3), "float32")})
        assert found[0].filename == __file__
        assert data.feature_shapes == {"i": (8, 9, 3)}
        from_arrays({"i": np.ones((2, 3, 8, 9))})
        with pytest.warns(UserWarning, match="looks like images"):
            from_arrays({"i": [np.ones((8, 9, 3)), None], "b": np.ones((2, 1))})

    def test_bytes(self):
        with pytest.warns(UserWarning, match=r"features\['i'\]: bytes are read as numbers from 0 to 7.*x / 255"):
            data = from_arrays({"i": np.arange(8, dtype="uint8").reshape(2, 1, 2, 2)})
        assert data.data.features["i"].flatten().tolist() == list(range(8))
        from_arrays({"i": (np.arange(8) % 2).astype("uint8").reshape(2, 1, 2, 2)})  # a mask is in order


class TestFrames:
    table = pd.DataFrame(
        {
            "age": [31, 54, 47, 28, 60, 39],
            "bmi": pd.array([22, 27, None, 24, 30, 21], dtype="Int64"),
            "ill": ["no", "yes", "yes", "no", "yes", "no"],
            "cough": [1, 0, 1, 0, 1, 1],
            "fever": [False, False, True, True, True, False],
        },
        index=list("uvwxyz"),
    )
    columns = {"clinic": ["age"], "scale": ["bmi"]}

    def test_labels_of_every_kind(self):
        ill = self.table["ill"]
        order = pd.Categorical(ill, categories=["yes", "no", "unknown"])
        expected = [0, 1, 1, 0, 1, 0]
        for target in (ill, ill.to_numpy(), ill.tolist(), tuple(ill), ill.astype("string"), np.array(ill.tolist())):
            data = from_arrays({"a": np.ones((6, 1))}, target)
            assert data.target.tolist() == expected
            assert data.info["classes"] == ["no", "yes"]
            assert data.info["outputs"] == 2
            assert data.info["task"] == "classification"
        for target in (order, pd.Series(order), pd.Series(order, index=list("abcdef"))):
            data = from_arrays({"a": np.ones((6, 1))}, target)
            assert data.target.tolist() == [1, 0, 0, 1, 0, 1]  # the categories' order, the one that is not there too
            assert data.info["classes"] == ["yes", "no", "unknown"]
            assert data.info["outputs"] == 3

    def test_names_of_the_classes_can_be_said(self):
        few = from_arrays({"a": np.ones((2, 1))}, ["yes", "yes"], classes=["no", "yes"])
        assert few.target.tolist() == [1, 1]
        assert few.info["classes"] == ["no", "yes"]
        assert few.info["outputs"] == 2
        named = from_arrays({"a": np.ones((2, 1))}, [0, 1], classes=("no", "yes", "never"))
        assert named.info["classes"] == ["no", "yes", "never"]
        assert named.info["outputs"] == 3
        again = from_arrays({"a": np.ones((2, 1))}, ["yes", "no"], info={"classes": ["yes", "no"]})
        assert again.target.tolist() == [0, 1]
        with pytest.raises(
            ValueError, match=r"target: expected one of the classes \['no', 'yes'\], got 'so' for sample 1"
        ):
            from_arrays({"a": np.ones((2, 1))}, ["no", "so"], classes=["no", "yes"])

    @pytest.mark.parametrize(
        ("target", "options", "error", "message"),
        [
            (["x", None, "y", "x"], {}, ValueError, "target: .* got nothing for sample 1"),
            (np.array(["x", NAN, "y", "x"], object), {}, ValueError, "target: .* got nothing for sample 1"),
            (pd.Series(["x", pd.NA, "y", "x"], dtype="string"), {}, ValueError, "got nothing for sample 1"),
            (pd.Categorical(["x", None, "y", "x"]), {}, ValueError, "got nothing for sample 1"),
            (["x", 1, "y", "x"], {}, TypeError, "target: expected strings alone or numbers alone, got 1"),
            (["x", "y"], {}, ValueError, "target: expected 4 values, one a sample, got 2"),
            (pd.array([1, None, 0, 1], dtype="Int64"), {}, ValueError, "target: expected finite scores"),
            ([0, 1, 2, 2], {"classes": []}, ValueError, "classes: expected a number or different names"),
            ([0, 1, 2, 2], {"classes": ["x", "x"]}, ValueError, "classes: expected a number or different names"),
            ([0, 1, 2, 2], {"classes": ["x", "y"]}, ValueError, r"target: expected classes in \[0, 2\)"),
            ([0, 1, 2, 2], {"classes": "xyz"}, TypeError, "classes: expected an integer"),
            ([0, 1, 2, 2], {"classes": 3.0}, TypeError, "classes: expected an integer"),
            ([0, 1, 2, 2], {"classes": 0}, ValueError, "classes: expected an integer"),
            ([0, 1, 2, 2], {"classes": 4, "info": {"classes": ["x", "y", "z"]}}, ValueError, "classes: expected 3"),
            (np.ones((4, 1)), {}, ValueError, r"target: expected 4 values.* pass target\[:, 0\]"),
            (np.full((4, 2), 0.5), {}, ValueError, r"target: expected 4 scores, or zeros and ones \[4, K\]"),
            (np.ones((4, 2), complex), {}, TypeError, "target: expected classes"),
            ([[1, 0, 1]] * 4, {"classes": ["x", "y"]}, ValueError, "target: expected 2 labels a sample"),
        ],
    )
    def test_targets_that_are_refused(self, target, options, error, message):
        with pytest.raises(error, match=message):
            from_arrays(ONES, target, **options)

    def test_several_labels_a_sample(self):
        y = self.table[["cough", "fever"]]
        zeros_and_ones = np.array([[1, 0], [0, 0], [1, 1], [0, 1], [1, 1], [1, 0]])
        for target in (
            y,
            zeros_and_ones,
            zeros_and_ones.astype("float64"),
            zeros_and_ones > 0,
            zeros_and_ones.tolist(),
        ):
            data = from_arrays({"a": np.ones((6, 1))}, target)
            assert data.target.dtype == torch.bool
            assert data.target.tolist() == (zeros_and_ones > 0).tolist()
            assert data.info["task"] == "multilabel"
            assert data.info["outputs"] == 2
            assert data.info.get("classes") == (["cough", "fever"] if target is y else None)
        named = MultimodalDataset.from_frame(self.table, self.columns, ["cough", "fever"])
        assert named.info["classes"] == ["cough", "fever"]
        part = named.drop(present=["clinic"]).subset([4, 0])
        assert part.target.tolist() == [[True, True], [True, False]]
        assert part.info == named.info
        part.data.check_values(2)
        places = from_arrays({"a": np.ones((6, 1))}, zeros_and_ones, classes=2)
        assert places.target.dtype == torch.int64
        with pytest.warns(UserWarning, match=r"exactly one of 3 labels; if these are classes, pass target.argmax\(1\)"):
            from_arrays({"a": np.ones((3, 1))}, np.eye(3))

    def test_batches_check_several_labels(self):
        x, here = {"a": torch.ones(2, 1, 2)}, torch.ones(2, 1, dtype=torch.bool)
        assert MultimodalBatch(x, here, torch.ones(2, 1, dtype=torch.bool))[0].target.shape == (1, 1)
        for target in (torch.ones(2, dtype=torch.bool), torch.ones(2, 2, 2, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"target: expected bool labels \[\*N, K\]"):
                MultimodalBatch(x, here, target)
        with pytest.raises(TypeError, match=r"target: expected int64 classes, .* got torch.int32"):
            MultimodalBatch(x, here, torch.ones(2, dtype=torch.int32))

    def test_frames_as_modalities_keep_their_index(self):
        data = from_arrays({"a": self.table[["age"]], "b": self.table[["bmi"]]}, self.table["ill"])
        assert data.names == list("uvwxyz")
        assert data.present[:, 1].tolist() == [True, True, False, True, True, True]
        assert data.data.features["b"][0].tolist() == [[22]]
        assert torch.equal(data.ids, MultimodalDataset.from_frame(self.table, self.columns).ids)
        with pytest.raises(ValueError, match=r"target: its index is another than that of features\['a'\]"):
            from_arrays({"a": self.table[["age"]]}, self.table["ill"].sort_values())
        with pytest.raises(ValueError, match=r"features\['a'\]: expected an array of numbers, got DataFrame"):
            from_arrays({"a": self.table[["age", "ill"]]})
        with pytest.raises(ValueError, match=r"features\['a'\]: expected \[n, D\]"):
            from_arrays({"a": self.table["age"]})

    def test_the_pieces_of_a_split_work(self):
        train, test = train_test_split(self.table, test_size=2, random_state=0)
        data = MultimodalDataset.from_frame(train, self.columns, "ill")
        assert data.names == train.index.tolist() != list("uvwx")
        x, y = self.table.reset_index(drop=True)[["age"]], self.table["ill"].reset_index(drop=True)
        x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=2, random_state=1)
        pieces = [from_arrays({"a": a}, b, classes=["no", "yes"]) for a, b in ((x_train, y_train), (x_test, y_test))]
        assert pieces[0].ids.tolist() == x_train.index.tolist() != [0, 1, 2, 3]
        assert pieces[0].data.features["a"].flatten().tolist() == x_train["age"].tolist()
        assert [["no", "yes"][k] for k in pieces[1].target.tolist()] == y_test.tolist()
        whole = MultimodalDataset.from_frame(self.table, self.columns)
        assert whole.subset(np.array([5, 0])).names == ["z", "u"]
        assert whole.subset(pd.Series([5, 0], index=[9, 8])).names == ["z", "u"]
        assert whole.subset(self.table["age"] > 40).names == ["v", "w", "y"]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((np.ones((2, 2)), {"a": ["u"]}), TypeError, "frame: expected a pandas DataFrame"),
            ((table, ["age"]), TypeError, "columns: expected a dict"),
            ((table, {"a": "age"}), TypeError, r"columns\['a'\]: expected a list of names"),
            ((table, {"a": ["age"]}, ["ill", "so"]), ValueError, r"columns, target: \['so'\] are not in the frame"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            MultimodalDataset.from_frame(*arguments)


@pytest.mark.slow
def test_strings_in_strings_out() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    names = np.array(["calm", "cross", "glad"])
    x = {"a": rng.normal(size=(90, 3)) + 3 * np.eye(3)[y], "b": rng.normal(size=(90, 2))}
    data = from_arrays(x, names[y])
    torch.manual_seed(0)
    model = JointTraining(GenericBackbone.for_data(data, width=8))
    fit(model, data, config=TrainConfig(epochs=20, lr=0.01, select="last", device="cpu"))
    said = class_names(predict(model, data), data.info)
    assert np.mean(np.array(said) == names[y]) > 0.8
    logits = torch.tensor([[[1.0, -1.0], [2.0, 3.0]]])
    assert class_names(logits, {"classes": ["x", "y"]}) == [["x", "y"]]
    assert class_names(logits, {"classes": ["x", "y"], "task": "multilabel"}) == [[["x"], ["x", "y"]]]
    for info in ({}, {"classes": None}, {"classes": ["x"]}):
        with pytest.raises(ValueError, match=r"info: expected the names of K classes"):
            class_names(logits, info)


def test_splits_that_disagree_do_not_meet() -> None:
    x = {"a": np.ones((3, 2))}
    train = from_arrays(x, [0, 1, 2])
    model = JointTraining(GenericBackbone.for_data(train, width=4))
    with pytest.raises(ValueError, match="valid: expected train's outputs 3, got 2; pass the same classes="):
        fit(model, train, from_arrays(x, [0, 1, 1]))
    with pytest.raises(ValueError, match="valid: expected train's task 'classification', got 'regression'"):
        fit(model, train, from_arrays(x, [0.0, 1.0, 2.0]))
    named = from_arrays(x, ["p", "q", "r"])
    with pytest.raises(ValueError, match=r"valid: expected train's classes \['p', 'q', 'r'\]"):
        fit(model, named, from_arrays(x, ["q", "r", "s"]))
    fit(model, train, from_arrays(x, [0, 1, 1], classes=3), TrainConfig(epochs=1, device="cpu"))


class TestOneRecord:
    """`predict` on what a user has at the bedside: one sample, some of it."""

    def make(self) -> tuple[MultimodalDataset, JointTraining]:
        rng = np.random.default_rng(0)
        arrays = {
            "voice": rng.normal(size=(9, 5)),
            "face": rng.normal(size=(9, 6, 4)),
            "scan": rng.normal(size=(9, 1, 8, 8)),
            "text": rng.integers(2, 20, (9, 7)),
        }
        data = from_arrays(arrays, np.arange(9) % 3, tokens={"text": 20}, fill={"text": 1})
        torch.manual_seed(0)
        return data, JointTraining(GenericBackbone.for_data(data, width=8))

    def test_modalities_may_be_left_out(self):
        data, method = self.make()
        arrays = {name: x[4].numpy() for name, x in data.data.features.items()}
        vector = {**arrays, "voice": arrays["voice"][0]}
        whole = predict(method, data)[4:5]
        for record in (arrays, vector, dict(reversed(vector.items())), {k: v[None] for k, v in arrays.items()}):
            torch.testing.assert_close(predict(method, record), whole)
        for names in (["voice"], ["scan", "face"], ["text", "voice"]):
            expected = predict(method, data[4], present=names)
            assert not torch.allclose(expected, whole)
            torch.testing.assert_close(predict(method, {m: vector[m] for m in names}), expected)
            torch.testing.assert_close(predict(method, {m: vector[m] for m in names}, like=data), expected)
            torch.testing.assert_close(predict(method, data[4].select(names)), expected)
            torch.testing.assert_close(predict(method, data.select(names))[4:5], expected)
            torch.testing.assert_close(
                predict(method, {**vector, **{m: None for m in arrays if m not in names}}), expected
            )
        torch.testing.assert_close(
            predict(method, vector, present=["voice"]), predict(method, {"voice": vector["voice"]})
        )
        short = {"face": arrays["face"][:3]}
        cut = from_arrays({"face": arrays["face"][None, :3]}).data.widened(data.feature_shapes)
        torch.testing.assert_close(predict(method, short), predict(method, cut))

    def test_present_by_names(self):
        data, method = self.make()
        mask = torch.tensor([False, True, False, True])
        torch.testing.assert_close(predict(method, data, present=["face", "text"]), predict(method, data, present=mask))
        torch.testing.assert_close(predict(method, data, present=mask.tolist()), predict(method, data, present=mask))
        dropped = data.drop(present=("text", "face"))
        assert torch.equal(dropped.present, data.drop(present=mask).present)
        assert torch.equal(data.data.drop(present=["text", "face"]).features["voice"], torch.zeros(9, 1, 5))
        for call in (lambda: data.drop(present=["smell"]), lambda: predict(method, data, present=["smell"])):
            with pytest.raises(ValueError, match=r"present: unknown modalities \['smell'\]; known are"):
                call()

    def test_a_method_that_does_not_say_its_shapes(self):
        class Bare(torch.nn.Module):
            modalities = ("voice", "face")

            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(5 + 4, 2)

            def forward(self, batch):
                seen = [batch.features[m].mean(1) for m in self.modalities]
                return Output(self.net(torch.cat(seen, -1)), {})

        data, _ = self.make()
        data = data.select(["voice", "face"])
        record = {"voice": data.data.features["voice"][0, 0]}
        with pytest.raises(ValueError, match="like: expected a data set .* since Bare does not say the shapes"):
            predict(Bare(), record)
        bare = Bare()
        torch.testing.assert_close(predict(bare, record, like=data), predict(bare, data[0], present=["voice"]))

    @pytest.mark.parametrize(
        ("record", "error", "message"),
        [
            ({}, ValueError, "dataset: expected at least one modality"),
            ({"voice": None}, ValueError, "dataset: expected at least one modality"),
            ({"smell": [1.0]}, ValueError, "dataset: unknown modality 'smell'"),
            ({"voice": np.ones(4)}, ValueError, r"dataset\['voice'\]: expected one sample of shape \(5,\), got \(4,\)"),
            ({"voice": np.ones((2, 3, 5))}, ValueError, r"dataset\['voice'\]: expected one sample"),
            ({"face": np.ones((6, 3))}, ValueError, r"dataset\['face'\]: expected one sample of shape \(6, 4\)"),
            ({"scan": np.ones((3, 8, 8))}, ValueError, r"dataset\['scan'\]: expected one sample of shape \(1, 8, 8\)"),
            ({"voice": ["x"] * 5}, ValueError, r"dataset\['voice'\]: expected an array of numbers"),
            ({"text": np.ones(3)}, TypeError, r"features\['text'\]: expected integer token ids"),
            ({"text": [1, 25]}, ValueError, r"features\['text'\]: expected token ids in \[0, 20\)"),
            ([1.0], TypeError, "dataset: expected a MultimodalDataset, a MultimodalBatch or a dict, got"),
        ],
    )
    def test_errors(self, record, error, message):
        with pytest.raises(error, match=message):
            predict(self.make()[1], record)
        with pytest.raises(TypeError, match="like: expected None or a MultimodalDataset"):
            predict(self.make()[1], record, like={})


class TestRows:
    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            ([True, False], ValueError, "rows: expected a bool mask of the 4 samples, got one of 2"),
            (torch.ones(5, dtype=torch.bool), ValueError, "rows: expected a bool mask of the 4 samples, got one of 5"),
            ([0, 4], IndexError, "rows: expected an index below 4, got 4"),
            (torch.tensor([0, -5]), IndexError, "rows: expected an index below 4, got -5"),
            ([0.0, 1.0], TypeError, "rows: expected integers, a bool mask or a slice, got torch.float32"),
            (torch.ones(4), TypeError, "rows: expected integers"),
            ("all", TypeError, "rows: expected"),
            (None, TypeError, "rows: expected"),
            ([[0, 1]], ValueError, r"rows: expected one axis, got shape \(1, 2\)"),
            (True, TypeError, "rows: expected integers"),
        ],
    )
    def test_what_is_no_row_is_refused(self, rows, error, message):
        data = from_arrays(ONES)
        with pytest.raises(error, match=message):
            data.subset(rows)
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64:
            with pytest.raises(error, match=message):
                data[rows]

    def test_rows_of_every_kind(self):
        data = from_arrays(ONES, ids=list("abcd"))
        assert data.subset(slice(1, None, 2)).names == ["b", "d"]
        assert data.subset([-1, 0]).names == ["d", "a"]
        assert data.subset(np.array([2], "uint8")).names == ["c"]
        assert data.subset(range(2)).names == ["a", "b"]
