"""MultimodalBatch and MultimodalDataset: every invariant, every error, and the algebra of dropping."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmlib.batch import MultimodalBatch, MultimodalDataset, Output, frame_axis, per_frame, stable_ids

NAN = float("nan")


def make_batch(n: int = 4, seed: int = 0, **changes) -> MultimodalBatch:
    """Three kinds of modality: a sequence [n, 3, 2], a vector [n, 1, 5], tokens [n, 6] with ends 101 and 102."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([101, 11, 12, 13, 102, 0]).repeat(n, 1)
    fields = {
        "features": {
            "audio": torch.randn(n, 3, 2, generator=g),
            "vision": torch.randn(n, 1, 5, generator=g),
            "language": tokens,
        },
        "present": torch.ones(n, 3, dtype=torch.bool),
        "target": torch.arange(n) % 2,
        "valid": {"language": tokens != 0},
        "ids": torch.arange(n) + 10,
        "fill": {"language": 100},
        "extras": {"speaker": torch.arange(n)},
    }
    return MultimodalBatch(**{**fields, **changes})


def equal(a: MultimodalBatch, b: MultimodalBatch) -> bool:
    same = a.modalities == b.modalities and torch.equal(a.present, b.present)
    for what in ("features", "valid", "observed"):
        x, y = getattr(a, what), getattr(b, what)
        same = same and set(x) == set(y) and all(torch.equal(x[m], y[m]) for m in x)
    return same


class TestFrames:
    @pytest.mark.parametrize(
        ("x", "lead", "axis"),
        [
            (torch.zeros(2, 7, dtype=torch.int64), 1, 1),
            (torch.zeros(2, 7, 3), 1, 1),
            (torch.zeros(2, 5, 7, 3), 2, 2),
            (torch.zeros(2, 1, 7, 3), 1, 2),  # an image: rows
            (torch.zeros(2, 4, 7, 3, 3), 1, 2),  # a volume: X slices
        ],
    )
    def test_axis(self, x, lead, axis):
        assert frame_axis(x, lead) == axis

    @pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 1, 1, 1, 1, 1)])
    def test_other_ranks_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"features: expected .* of shape"):
            frame_axis(torch.zeros(shape), 1)

    def test_per_frame_broadcasts_over_rows_of_an_image(self):
        mask = torch.tensor([[True, False]])
        out = per_frame(mask, torch.zeros(1, 3, 2, 4))
        assert out.shape == (1, 1, 2, 1)
        assert out.flatten().tolist() == [True, False]


class TestIds:
    def test_integers_stay_and_names_are_hashed(self):
        assert stable_ids([5, np.int64(7)]).tolist() == [5, 7]
        # BLAKE2b-64, little endian, shifted right by one: the same everywhere, for ever
        assert stable_ids(["a"]).tolist() == [
            int.from_bytes(__import__("hashlib").blake2b(b"a", digest_size=8).digest(), "little") >> 1
        ]
        assert len(set(stable_ids([f"x{i}" for i in range(1000)]).tolist())) == 1000
        assert int(stable_ids([f"x{i}" for i in range(1000)]).min()) >= 0


class TestBatchInvariants:
    def test_defaults(self):
        b = MultimodalBatch({"a": torch.zeros(2, 3, 1)}, torch.tensor([[True], [False]]))
        assert b.valid["a"].all()
        assert b.observed["a"].tolist() == [[True] * 3, [False] * 3]
        assert b.shape == (2,)
        assert len(b) == 2
        assert b.modalities == ("a",)
        assert b.target is None
        assert "a [2, 3, 1]" in repr(b)
        assert b.device == torch.device("cpu")

    def test_dialogue_shape(self):
        b = MultimodalBatch(
            {"a": torch.zeros(2, 5, 3, 4)},
            torch.ones(2, 5, 1, dtype=torch.bool),
            target=torch.zeros(2, 5),
            extras={"speaker": torch.zeros(2, 5)},
        )
        assert b.shape == (2, 5)
        assert b.observed["a"].shape == (2, 5, 3)
        assert b[1].shape == (1, 5)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"features": {}},
                ValueError,
                "features: expected (a dict by names with at least 1|at least one modality)",
            ),
            ({"present": torch.ones(4, 3)}, TypeError, r"present: expected a bool tensor .*float32"),
            ({"present": np.ones((4, 3), bool)}, TypeError, "present: expected a bool tensor .*ndarray"),
            ({"present": torch.ones(4, 2, dtype=torch.bool)}, ValueError, r"present: expected shape \[\*N, 3\]"),
            ({"present": torch.ones(3, dtype=torch.bool)}, ValueError, "present: expected shape"),
            ({"present": torch.ones(5, 3, dtype=torch.bool)}, ValueError, r"features\['audio'\]: expected the leading"),
            ({"valid": {"smell": torch.ones(4, 3)}}, ValueError, r"valid: unknown modalities \['smell'\]"),
            ({"observed": {"smell": torch.ones(4, 3)}}, ValueError, "observed: unknown"),
            ({"fill": {"smell": 1}}, ValueError, "fill: unknown"),
            ({"valid": {"audio": torch.ones(4, 3)}}, ValueError, r"valid\['audio'\]: expected bool \(4, 3\)"),
            ({"valid": {"audio": torch.ones(4, 2, dtype=torch.bool)}}, ValueError, r"valid\['audio'\]: expected"),
            ({"observed": {"audio": torch.ones(4, 2, dtype=torch.bool)}}, ValueError, r"observed\['audio'\]"),
            ({"target": torch.zeros(3)}, ValueError, r"target: expected the leading shape \(4,\), got \(3,\)"),
            ({"target": np.zeros(4)}, TypeError, "target: expected a tensor, got ndarray"),
            ({"ids": torch.zeros(3)}, TypeError, "ids: expected (4 rows|None or a tensor of integers)"),
            ({"ids": torch.tensor(1)}, ValueError, "ids: expected (4 rows|None or a tensor of integers)"),
            ({"extras": {"speaker": torch.zeros(2)}}, ValueError, "speaker: expected 4 rows"),
        ],
    )
    def test_errors_name_the_argument(self, changes, error, message):
        with pytest.raises(error, match=message):
            make_batch(**changes)

    @pytest.mark.parametrize(
        ("x", "error"),
        [
            (np.zeros((4, 3, 2)), TypeError),
            (torch.zeros(4, 3, dtype=torch.int32), TypeError),
            (torch.zeros(4, 3, dtype=torch.bool), TypeError),
            (torch.zeros(4, 3, 2, dtype=torch.int64), TypeError),
            (torch.zeros(4, 3, 2, dtype=torch.complex64), TypeError),
            (torch.zeros(4), ValueError),
            (torch.zeros(4, 3), ValueError),
            (torch.zeros(4, 1, 1, 1, 1, 1), ValueError),
        ],
    )
    def test_wrong_rank_or_dtype(self, x, error):
        with pytest.raises(error, match="features"):
            MultimodalBatch({"a": x}, torch.ones(4, 1, dtype=torch.bool))

    def test_complete_must_have_the_same_samples(self):
        with pytest.raises(ValueError, match="complete: expected the leading shape"):
            make_batch(4, complete=make_batch(3))

    def test_unknown_modality(self):
        with pytest.raises(ValueError, match=r"modality: expected one of .*'vision'.*, got 'smell'"):
            make_batch().index("smell")

    def test_values(self):
        b = make_batch()
        b.check_values(classes=2)
        with pytest.raises(ValueError, match=r"target: expected classes in \[0, 1\), got values from 0 to 1"):
            b.check_values(classes=1)
        with pytest.raises(ValueError, match="target: expected finite scores"):
            b.replace(target=torch.tensor([0.0, 1.0, NAN, 0.0])).check_values()
        b.features["audio"][2, 1, 0] = float("inf")
        with pytest.raises(
            ValueError, match=r"features\['audio'\]: .* 1 NaN or infinite ones, the first in sample \[2\]"
        ):
            b.check_values()
        b.drop(torch.tensor([False, True, True])).check_values()  # what is not there may be anything

    def test_observed_may_not_exceed_valid(self):
        seen = torch.ones(4, 3, dtype=torch.bool)
        b = make_batch(valid={"audio": ~seen}, observed={"audio": seen})
        with pytest.raises(ValueError, match=r"observed\['audio'\]: expected only frames that are valid"):
            b.check_values()


class TestRows:
    def test_every_way_to_index(self):
        b = make_batch()
        mask = torch.tensor([False, True, False, True])
        for rows in ([1, 3], np.array([1, 3]), torch.tensor([1, 3]), mask, mask.tolist(), slice(1, 4, 2)):
            part = b[rows]
            assert part.ids.tolist() == [11, 13]
            assert part.extras["speaker"].tolist() == [1, 3]
            assert torch.equal(part.features["audio"], b.features["audio"][[1, 3]])
            assert part.fill == b.fill
        for row in (2, np.int64(2), torch.tensor(2), -2):
            assert b[row].shape == (1,)
            assert b[row].ids.tolist() == [12]
        assert b[-1].ids.tolist() == [13]
        assert len(b[[]]) == 0

    @pytest.mark.parametrize("row", [4, -5])
    def test_out_of_range(self, row):
        with pytest.raises(IndexError, match="rows: expected an index below 4"):
            make_batch()[row]

    def test_to_and_replace(self):
        b = make_batch()
        b = b.drop(torch.tensor([True, True, False]), keep_complete=True)
        moved = b.to("meta")
        assert moved.features["audio"].device.type == "meta"
        assert moved.complete.present.device.type == "meta"
        assert b.device.type == "cpu"
        with pytest.raises(ValueError, match="target"):
            b.replace(target=torch.zeros(9))


class TestDrop:
    def test_whole_modalities(self):
        b = make_batch()
        d = b.drop(torch.tensor([[True, True, True], [False, True, True], [True, False, True], [True, True, False]]))
        assert d.features["audio"][1].abs().sum() == 0
        assert torch.equal(d.features["audio"][0], b.features["audio"][0])
        assert not d.observed["audio"][1].any()
        assert d.features["vision"][2].abs().sum() == 0
        # tokens: [CLS] and [SEP] stay, the rest becomes fill, padding stays; all of it is masked
        assert d.features["language"][3].tolist() == [101, 100, 100, 100, 102, 0]
        assert not d.observed["language"][3].any()
        assert torch.equal(d.valid["language"], b.valid["language"])
        assert d.complete is None
        assert b.present.all()  # the batch itself does not change
        assert torch.equal(b.features["audio"], make_batch().features["audio"])

    def test_one_pattern_for_all(self):
        d = make_batch().drop(torch.tensor([True, False, True]))
        assert d.present.tolist() == [[True, False, True]] * 4

    def test_frames(self):
        b = make_batch()
        keep = torch.tensor([[True, False, True]] * 3 + [[False] * 3])
        words = torch.tensor([[False, True, False, True, True, True]] * 4)
        d = b.drop(observed={"audio": keep, "language": words})
        assert d.features["audio"][0, 1].tolist() == [0, 0]
        assert torch.equal(d.features["audio"][0, 2], b.features["audio"][0, 2])
        assert d.present[3].tolist() == [False, True, True]  # all frames gone: the modality is absent
        assert d.features["language"][0].tolist() == [101, 11, 100, 13, 102, 0]
        assert d.observed["language"][0].tolist() == [False, True, False, True, True, False]

    def test_image_rows(self):
        b = MultimodalBatch({"image": torch.ones(1, 2, 3, 4)}, torch.ones(1, 1, dtype=torch.bool))
        d = b.drop(observed={"image": torch.tensor([[True, False, True]])})
        assert d.features["image"].sum((0, 1, 3)).tolist() == [8, 0, 8]

    def test_a_nan_placeholder_does_not_survive(self):
        b = make_batch()
        b.features["audio"][1] = NAN
        d = b.drop(torch.tensor([[True] * 3, [False, True, True], [True] * 3, [True] * 3]))
        assert torch.isfinite(d.features["audio"]).all()

    def test_no_gradient_through_what_is_gone(self):
        x = torch.ones(1, 2, 1, requires_grad=True)
        b = MultimodalBatch({"a": x}, torch.ones(1, 1, dtype=torch.bool))
        b.drop(observed={"a": torch.tensor([[True, False]])}).features["a"].sum().backward()
        assert x.grad.flatten().tolist() == [1, 0]

    def test_complete_is_kept_once(self):
        b = make_batch()
        once = b.drop(torch.tensor([False, True, True]), keep_complete=True)
        twice = once.drop(torch.tensor([True, False, True]), keep_complete=True)
        assert once.complete is b
        assert twice.complete is b
        assert twice[1:3].complete.ids.tolist() == [11, 12]
        assert twice.select(["audio"]).complete.modalities == ("audio",)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"present": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "present: expected"),
            ({"present": torch.ones(4, 1, dtype=torch.bool)}, ValueError, "present: expected"),
            ({"present": torch.ones(4, 3)}, TypeError, "present: expected a bool tensor"),
            ({"present": [True, True, True]}, TypeError, "present: expected a bool tensor"),
            ({"observed": {"smell": torch.ones(4, 3)}}, ValueError, "observed: unknown"),
            ({"observed": {"audio": torch.ones(4, 2, dtype=torch.bool)}}, ValueError, r"observed\['audio'\]: expected"),
            ({"observed": {"audio": torch.ones(4, 3)}}, TypeError, r"observed\['audio'\]: expected a bool"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            make_batch().drop(**arguments)

    def test_blank(self):
        b = make_batch(2)
        assert b.blank("audio").abs().sum() == 0
        assert b.blank("language").tolist() == [[101, 100, 100, 100, 102, 0]] * 2
        assert torch.equal(b.blank("audio"), b.drop(torch.tensor([False, True, True])).features["audio"])
        with pytest.raises(ValueError, match="modality"):
            b.blank("smell")


class TestTokenEnds:
    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [
            ([7, 0, 0], [7, 0, 0]),  # one token is both ends
            ([7, 8, 0], [7, 8, 0]),
            ([7, 8, 9], [7, 1, 9]),
            ([0, 0, 0], [0, 0, 0]),  # nothing but padding
        ],
    )
    def test_ends_stay(self, tokens, expected):
        x = torch.tensor([tokens])
        b = MultimodalBatch({"t": x}, torch.ones(1, 1, dtype=torch.bool), valid={"t": x != 0}, fill={"t": 1})
        assert b.blank("t").tolist() == [expected]

    def test_without_fill_zero(self):
        b = MultimodalBatch({"t": torch.tensor([[7, 8, 9]])}, torch.ones(1, 1, dtype=torch.bool))
        assert b.blank("t").tolist() == [[7, 0, 9]]


class TestSelect:
    def test_order_and_fields(self):
        b = make_batch(present=torch.tensor([[True, False, True]] * 4))
        s = b.select(["language", "audio"])
        assert s.modalities == ("language", "audio")
        assert s.present[0].tolist() == [True, True]
        assert s.fill == {"language": 100}
        assert b.select(["audio"]).fill == {}
        assert torch.equal(s.valid["language"], b.valid["language"])
        assert not b.select(["vision"]).present.any()

    @pytest.mark.parametrize("names", [["smell"], ["audio", "audio"], [], "audio"])
    def test_errors(self, names):
        with pytest.raises((TypeError, ValueError), match=r"modalit(y|ies)|features"):
            make_batch().select(names)


@st.composite
def batches_and_masks(draw):
    n = draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    b = make_batch(n, seed=draw(st.integers(0, 100)))
    rate = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    present = torch.rand(n, 3, generator=g) >= rate
    observed = {m: torch.rand(b.valid[m].shape, generator=g) >= rate for m in b.modalities}
    if draw(st.booleans()):
        observed.pop(draw(st.sampled_from(b.modalities)))
    return b, present, observed


class TestDropAlgebra:
    @settings(deadline=None, max_examples=30)
    @given(batches_and_masks())
    def test_idempotent(self, case):
        b, present, observed = case
        once = b.drop(present, observed)
        assert equal(once, once.drop(present, observed))
        assert equal(once, once.drop())

    @settings(deadline=None, max_examples=30)
    @given(batches_and_masks(), st.randoms(use_true_random=False))
    def test_commutes_with_row_selection(self, case, random):
        b, present, observed = case
        rows = [random.randrange(len(b)) for _ in range(random.randint(1, 6))]
        some = {m: x[rows] for m, x in observed.items()}
        assert equal(b.drop(present, observed)[rows], b[rows].drop(present[rows], some))

    @settings(deadline=None, max_examples=30)
    @given(batches_and_masks())
    def test_only_takes_away(self, case):
        b, present, observed = case
        d = b.drop(present, observed)
        assert not (d.present & ~b.present).any()
        assert not (d.present & ~present).any()
        for m, name in enumerate(b.modalities):
            assert not (d.observed[name] & ~b.observed[name]).any()
            assert torch.equal(d.present[:, m], d.observed[name].any(-1))
            assert torch.equal(d.valid[name], b.valid[name])
            kept = per_frame(d.observed[name], d.features[name]).expand_as(d.features[name])
            assert torch.equal(d.features[name][kept], b.features[name][kept])
            if name != "language":
                assert (d.features[name][~kept] == 0).all()
        d.check_values()

    @settings(deadline=None, max_examples=30)
    @given(batches_and_masks(), st.permutations(["audio", "vision", "language"]), st.integers(1, 3))
    def test_commutes_with_select(self, case, names, k):
        b, present, observed = case
        chosen = names[:k]
        places = [b.index(m) for m in chosen]
        some = {m: x for m, x in observed.items() if m in chosen}
        assert equal(b.drop(present, observed).select(chosen), b.select(chosen).drop(present[:, places], some))

    @settings(deadline=None, max_examples=30)
    @given(batches_and_masks())
    def test_order_of_two_drops_does_not_matter(self, case):
        b, present, observed = case
        assert equal(b.drop(present).drop(None, observed), b.drop(None, observed).drop(present))


class TestFromArrays:
    def test_vectors_and_masks_by_hand(self):
        d = MultimodalDataset.from_arrays(
            {"a": np.array([[1.0, 2.0], [NAN, NAN]]), "b": np.array([[[1.0], [NAN]], [[2.0], [3.0]]])},
            np.array([0, 2]),
            classes=3,
            ids=["x", "y"],
            info={"name": "mine"},
        )
        assert d.feature_shapes == {"a": (1, 2), "b": (2, 1)}
        assert d.present.tolist() == [[True, True], [False, True]]
        assert d.data.observed["b"].tolist() == [[True, False], [True, True]]
        assert d.data.features["a"].tolist() == [[[1, 2]], [[0, 0]]]
        assert d.data.features["b"].tolist() == [[[1], [0]], [[2], [3]]]
        assert d.data.features["a"].dtype == torch.float32
        assert d.names == ["x", "y"]
        assert torch.equal(d.ids, stable_ids(["x", "y"]))
        assert d.info == {"name": "mine", "outputs": 3, "task": "classification"}
        assert "a [1, 2] (50%)" in repr(d)

    def test_lists_with_none_and_unequal_lengths(self):
        d = MultimodalDataset.from_arrays(
            {"a": [np.ones((2, 3)), None, np.ones((4, 3))], "b": [[1.0, 2.0], [3.0, 4.0], None]}, [0.5, 1.0, -1.0]
        )
        assert d.data.valid["a"].sum(-1).tolist() == [2, 0, 4]
        assert d.present.tolist() == [[True, True], [False, True], [True, False]]
        assert d.feature_shapes == {"a": (4, 3), "b": (1, 2)}
        assert d.info["task"] == "regression"
        assert d.info["outputs"] == 1
        assert torch.isfinite(d.data.features["a"]).all()

    def test_tokens(self):
        d = MultimodalDataset.from_arrays(
            {"t": [np.array([101, 5, 102]), np.array([101, 102]), None], "b": np.ones((3, 1))}, fill={"t": 100}
        )
        assert d.data.features["t"].dtype == torch.int64
        assert d.data.features["t"].tolist() == [[101, 5, 102], [101, 102, 0], [0, 0, 0]]
        assert d.data.valid["t"].sum(-1).tolist() == [3, 2, 0]
        assert d.present[:, 0].tolist() == [True, True, False]
        plain = MultimodalDataset.from_arrays({"t": np.array([[1, 2], [3, 4]])}, tokens=("t",))
        assert plain.data.features["t"].tolist() == [[1, 2], [3, 4]]
        assert plain.data.features["t"].dtype == torch.int64

    def test_images_volumes_and_none(self):
        d = MultimodalDataset.from_arrays({"i": [np.ones((1, 4, 5)), None], "v": np.ones((2, 1, 2, 3, 4))})
        assert d.feature_shapes == {"i": (1, 4, 5), "v": (1, 2, 3, 4)}
        assert d.present[:, 0].tolist() == [True, False]
        assert d.data.valid["i"].shape == (2, 4)

    def test_lengths(self):
        x = np.ones((3, 4, 1), np.float32)
        x[0, 2:] = 99  # padding is not data
        d = MultimodalDataset.from_arrays({"a": x, "b": np.ones((3, 2))}, lengths={"a": [2, 4, 0]})
        assert d.data.valid["a"].sum(-1).tolist() == [2, 4, 0]
        assert d.data.features["a"][0].flatten().tolist() == [1, 1, 0, 0]
        assert d.present[:, 0].tolist() == [True, True, False]

    def test_present_overrides_values(self):
        x = np.array([[1.0, NAN], [3.0, 4.0]])
        d = MultimodalDataset.from_arrays(
            {"a": x, "b": np.ones((2, 1))}, present=np.array([[False, True], [True, True]])
        )
        assert d.data.features["a"][0].flatten().tolist() == [0, 0]
        assert d.present.tolist() == [[False, True], [True, True]]

    def test_the_input_is_not_changed(self):
        x = np.array([[1.0, 2.0], [NAN, NAN]], np.float32)
        x.setflags(write=False)
        present = torch.ones(2, 1, dtype=torch.bool)
        MultimodalDataset.from_arrays({"a": x}, allow_empty=True)
        MultimodalDataset.from_arrays({"a": x[:1]}, present=present[:1])
        assert np.isnan(x[1]).all()
        assert present.all()

    def test_batch_of_one_and_one_class(self):
        d = MultimodalDataset.from_arrays({"a": np.ones((1, 2))}, [0])
        assert len(d) == 1
        assert d.info["outputs"] == 1
        assert d[0].shape == (1,)

    def test_no_target(self):
        d = MultimodalDataset.from_arrays({"a": np.ones((2, 2))}, classes=5)
        assert d.target is None
        assert d.info["outputs"] == 5

    @pytest.mark.parametrize(
        ("features", "options", "error", "message"),
        [
            ({}, {}, ValueError, "features: expected (a dict by names with at least 1|at least one modality)"),
            ({"a": np.ones((0, 2))}, {}, ValueError, "got an empty split"),
            ({"a": np.ones((2, 2)), "b": np.ones((3, 2))}, {}, ValueError, "same number of samples .*'a': 2, 'b': 3"),
            ({"a": np.ones(2)}, {}, ValueError, r"features\['a'\]: expected \[n, D\]"),
            ({"a": np.ones((2, 1, 1, 1, 1, 1))}, {}, ValueError, r"features\['a'\]: expected"),
            ({"a": np.ones((2, 0))}, {}, ValueError, "at least one frame and one value"),
            ({"a": np.ones((2, 0, 3))}, {}, ValueError, "at least one frame and one value"),
            ({"a": np.ones((2, 2), bool)}, {}, TypeError, r"features\['a'\]: expected floats or integers"),
            ({"a": np.ones((2, 2), complex)}, {}, TypeError, "expected floats"),
            ({"a": [["x"], ["y"]]}, {}, ValueError, r"features\['a'\]: expected an array of numbers"),
            ({"a": [[1.0, 2.0], [1.0]]}, {}, ValueError, r"features\['a'\]: expected an array of numbers"),
            ({"a": [np.ones((2, 3)), np.ones((2, 4))]}, {}, ValueError, "one rank and width"),
            ({"a": [np.ones((2, 3)), np.ones(3)]}, {}, ValueError, "one rank and width"),
            ({"a": [np.ones(2), np.ones(3)]}, {}, ValueError, "one rank and width"),
            ({"a": [None, None]}, {}, ValueError, "missing in every sample"),
            ({"a": np.full((2, 2), NAN), "b": np.ones((2, 1))}, {}, ValueError, r"features\['a'\].*missing in every"),
            ({"a": np.array([[1.0], [NAN]])}, {}, ValueError, r"1 have none, the first at \[1\]"),
            ({"a": np.array([[1.0, NAN], [1, 1]])}, {}, ValueError, r"features\['a'\]: sample 0 has NaN values"),
            ({"a": np.array([[1.0, np.inf], [1, 1]])}, {}, ValueError, "expected finite values"),
            (
                {"a": np.array([[NAN, NAN], [1, 1]])},
                {"present": np.ones((2, 1), bool)},
                ValueError,
                "sample 0 has NaN values where the modality is present",
            ),
            (
                {"a": np.ones((2, 2))},
                {"present": np.ones((2, 2), bool)},
                ValueError,
                r"present: expected bool \(2, 1\)",
            ),
            ({"a": np.ones((2, 2))}, {"present": np.ones((2, 1))}, TypeError, "present: expected bool"),
            ({"a": np.ones((2, 2))}, {"present": np.zeros((2, 1), bool)}, ValueError, "missing in every sample"),
            ({"a": np.ones((2, 2))}, {"lengths": {"b": [1, 1]}}, ValueError, r"lengths: unknown modalities \['b'\]"),
            ({"a": np.ones((2, 2))}, {"fill": {"b": 1}}, ValueError, "fill: unknown modalities"),
            ({"a": np.ones((2, 3, 1))}, {"lengths": {"a": [4, 1]}}, ValueError, r"lengths\['a'\]: expected 2 integers"),
            ({"a": np.ones((2, 3, 1))}, {"lengths": {"a": [-1, 1]}}, ValueError, r"lengths\['a'\]"),
            ({"a": np.ones((2, 3, 1))}, {"lengths": {"a": [1.0, 1.0]}}, TypeError, r"lengths\['a'\]"),
            ({"a": np.ones((2, 3, 1))}, {"lengths": {"a": [1]}}, ValueError, r"lengths\['a'\]"),
            ({"a": np.ones((2, 2))}, {"ids": ["x"]}, ValueError, "ids: expected 2 unique ids, got 1"),
            ({"a": np.ones((2, 2))}, {"ids": ["x", "x"]}, ValueError, "ids: expected 2 unique ids, got 2 of which 1"),
            ({"a": np.ones((2, 2))}, {"target": [0]}, ValueError, "target: expected 2 values"),
            ({"a": np.ones((2, 2))}, {"target": 1}, ValueError, "target: expected 2 values"),
            ({"a": np.ones((2, 2))}, {"target": [None, 1]}, TypeError, "target: expected numbers"),
            ({"a": np.ones((2, 2))}, {"target": [0.0, NAN]}, ValueError, "target: expected finite scores"),
            ({"a": np.ones((2, 2))}, {"target": [0, -1]}, ValueError, r"target: expected classes in \[0, "),
            ({"a": np.ones((2, 2))}, {"target": [0, 3], "classes": 3}, ValueError, r"classes in \[0, 3\), .* 0 to 3"),
            (
                {"a": np.ones((2, 2))},
                {"target": [0.0, 1.0], "classes": 2},
                TypeError,
                "target: expected integers for 2",
            ),
        ],
    )
    def test_errors(self, features, options, error, message):
        target = options.pop("target", None) if options else None
        with pytest.raises(error, match=message):
            MultimodalDataset.from_arrays(features, target, **options)

    def test_allow_empty(self):
        d = MultimodalDataset.from_arrays({"a": np.full((2, 2), NAN), "b": np.array([[1.0], [NAN]])}, allow_empty=True)
        assert d.present.tolist() == [[False, True], [False, False]]
        assert all(torch.isfinite(x).all() for x in d.data.features.values())


class TestFromFrame:
    frame = pd.DataFrame(
        {"u": [1.0, None, 3.0], "v": [4.0, None, 6.0], "w": pd.array([7, 8, None], dtype="Int64"), "y": [0, 1, 0]},
        index=["p", "q", "r"],
    )

    def test_nan_and_none_are_missing(self):
        d = MultimodalDataset.from_frame(self.frame, {"a": ["u", "v"], "b": ["w"]}, "y")
        assert d.present.tolist() == [[True, True], [False, True], [True, False]]
        assert d.data.features["a"][0].tolist() == [[1, 4]]
        assert d.target.tolist() == [0, 1, 0]
        assert d.names == ["p", "q", "r"]
        objects = self.frame.astype(object).where(self.frame.notna(), None)
        assert torch.equal(MultimodalDataset.from_frame(objects, {"a": ["u", "v"], "b": ["w"]}).present, d.present)

    @pytest.mark.parametrize(
        ("columns", "target", "message"),
        [
            ({"a": ["u", "x"]}, "y", r"columns, target: \['x'\] are not in the frame"),
            ({"a": ["u"]}, "z", r"columns, target: \['z'\] are not in the frame"),
            ({"a": ["u"], "b": ["u"]}, "y", "every column once"),
            ({"a": ["u"], "b": ["y"]}, "y", "every column once"),
        ],
    )
    def test_column_errors(self, columns, target, message):
        with pytest.raises(ValueError, match=message):
            MultimodalDataset.from_frame(self.frame, columns, target)

    def test_half_a_row_missing_is_an_error(self):
        frame = self.frame.assign(v=[4.0, 5.0, 6.0])
        with pytest.raises(ValueError, match=r"features\['a'\]: sample 1 has NaN"):
            MultimodalDataset.from_frame(frame, {"a": ["u", "v"], "b": ["w"]})

    def test_index_must_be_unique(self):
        with pytest.raises(ValueError, match="ids: expected 3 unique"):
            MultimodalDataset.from_frame(self.frame.set_axis([0, 0, 1]), {"a": ["u", "v"], "b": ["w"]})


class TestDataset:
    def make(self, n: int = 10) -> MultimodalDataset:
        return MultimodalDataset(make_batch(n), {"name": "mine"}, [f"s{i}" for i in range(n)])

    def test_facts(self):
        d = self.make()
        assert len(d) == 10
        assert d.modalities == ("audio", "vision", "language")
        assert d.feature_shapes == {"audio": (3, 2), "vision": (1, 5), "language": (6,)}
        assert d.info == {"name": "mine", "task": "classification", "outputs": 2}
        assert d.ids.tolist() == list(range(10, 20))
        assert MultimodalDataset(make_batch(ids=None), names=list("abcd")).ids.tolist() == stable_ids("abcd").tolist()
        assert MultimodalDataset(make_batch(ids=None)).info["name"] == "arrays"

    def test_errors(self):
        with pytest.raises(ValueError, match="data: expected at least one sample, got an empty split"):
            MultimodalDataset(make_batch()[[]])
        with pytest.raises(ValueError, match="names: expected 4 names, got 1"):
            MultimodalDataset(make_batch(), names=["x"])
        for rows in ([], torch.zeros(10, dtype=torch.bool)):
            with pytest.raises(ValueError, match="rows: expected at least one sample"):
                self.make().subset(rows)

    def test_subset_select_drop_to(self):
        d = self.make()
        mask = torch.arange(10) >= 8
        for rows in ([8, 9], torch.tensor([8, 9]), mask, mask.tolist()):
            s = d.subset(rows)
            assert s.names == ["s8", "s9"]
            assert s.ids.tolist() == [18, 19]
            assert s.info == d.info
        assert d.select(["vision"]).modalities == ("vision",)
        assert d.drop(torch.tensor([True, False, True]), keep_complete=True).data.complete is d.data
        assert d.to("cpu").names == d.names

    def test_data_loader_takes_whole_batches(self):
        d = self.make()
        loader = DataLoader(d, batch_size=4, collate_fn=MultimodalDataset.collate)
        batches = list(loader)
        assert [len(b) for b in batches] == [4, 4, 2]
        assert all(isinstance(b, MultimodalBatch) for b in batches)
        assert torch.cat([b.ids for b in batches]).tolist() == d.ids.tolist()
        shuffled = DataLoader(
            d,
            batch_size=4,
            shuffle=True,
            collate_fn=MultimodalDataset.collate,
            generator=torch.Generator().manual_seed(0),
        )
        assert sorted(torch.cat([b.ids for b in shuffled]).tolist()) == d.ids.tolist()

    def test_output(self):
        out = Output(torch.zeros(2, 3), {"task": torch.tensor(1.0)})
        assert out.logits.shape == (2, 3)
        assert list(out.losses) == ["task"]
