"""MCE as its release computes it, by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.mce_loop import Reference, last_of, make_batch, make_mce

from mmlib.backbones import AVMNISTBackbone, AVMNISTConfig
from mmlib.batch import MultimodalBatch
from mmlib.methods.mce import MCE, MCEConfig, UpperBounds
from mmlib.methods.released.mce import ReleasedMCE, ReleasedMCEConfig, released_shapley


def test_which_class_an_option_asks_for():
    batch = make_batch()
    assert type(make_mce(batch, lambda_sub=2.0)) is MCE
    for options in ({"preset": "iemocap"}, {"mask_negative": False}, {"columns": (0, 2, 1)}, {"subsets": 2}):
        model = make_mce(batch, **options)
        assert type(model) is ReleasedMCE, options
        assert model.config == MCE.configured(options.pop("preset", "paper"), {**options, "attention_heads": 2,
            "hidden": 16, "dropout": 0.0})  # fmt: skip


def test_with_its_defaults_it_is_the_papers_to_the_bit():
    assert ReleasedMCEConfig() == ReleasedMCEConfig(**vars(MCEConfig()))
    batch = make_batch(n=20)
    paper, released = make_mce(batch), make_mce(batch, train_position=True)
    assert type(released) is ReleasedMCE
    ours, theirs = paper(batch), released(batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.losses == theirs.losses
    assert torch.equal(paper.last_values, released.last_values)


def test_released_shapley_reverses_the_order():
    from mmlib.coalitions import shapley_values

    counts = torch.tensor([0.0, 5, 3, 6, 1, 5, 4, 8])  # c_0 = 5, c_1 = 3, c_01 = 6, c_2 = 1, c_02 = 5, c_12 = 4, all 8
    np.testing.assert_allclose(shapley_values(counts), [4.1667, 2.6667, 1.1667], atol=5e-5)
    np.testing.assert_allclose(released_shapley(counts), [2.8333, 3.3333, 3.8333], atol=5e-5)
    np.testing.assert_allclose(released_shapley(counts, 7), [0.7667, 0.5714, 0.3762], atol=5e-5)
    two = torch.tensor([0.0, 5, 3, 7])
    np.testing.assert_allclose(shapley_values(two), [4.5, 2.5])
    np.testing.assert_allclose(released_shapley(two, 3), [2, 1.6667], atol=5e-5)
    with pytest.raises(ValueError, match="players"):
        released_shapley(counts, 2)


@pytest.mark.slow
@given(st.lists(st.floats(0, 100), min_size=8, max_size=8))
@settings(deadline=None, max_examples=25)
def test_released_shapley_of_three_by_hand(c):
    c[0] = 0.0
    v = torch.tensor(c, dtype=torch.float64)
    for i, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        pair = [c[(1 << i) | (1 << j)] for j in others]
        expected = c[1 << i] / 3 + sum(p - c[1 << i] for p in pair) / 6 + (c[7] - c[1 << i]) / 3
        assert released_shapley(v)[i].item() == pytest.approx(expected, abs=1e-6)


def test_released_values_by_hand():
    """With the release's subset loss and Shapley formula, from the counts of each subset's feasible samples."""
    batch = make_batch(3, 10, seed=5)
    model = make_mce(batch, shapley="released", subset_loss="strict", rate_norm="none").double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    ref = Reference(model, batch)
    with torch.no_grad():
        logits = {(i, s): ref.logits(ref.rebuilt(ref.h[i], s)) for i in range(ref.n) for s in ref.subsets(ref.has[i])}
    c = np.zeros(8)
    for (i, s), said in logits.items():
        c[sum(1 << m for m in s)] += ref.right(said, i)
    phi = []
    for i in range(3):
        total = c[1 << i] / 3
        for code in range(8):
            size = bin(code).count("1")
            if code >> i & 1 and size >= 2:
                weight = math.factorial(size - 1) * math.factorial(3 - size) / math.factorial(3)
                total += weight * (c[code] - c[1 << i])
        phi.append(total)
    strict = 0.0
    for i in range(ref.n):
        own = [ref.loss(logits[i, s], i) for s in ref.subsets(ref.has[i]) if s != ref.has[i]]
        strict += sum(own) / (2 ** len(ref.has[i]) - 1) / ref.n
    out = model(batch)
    np.testing.assert_allclose(model.last["shapley"].numpy(), phi, atol=1e-6)
    np.testing.assert_allclose(model.last["rate_factor"].numpy(), ref.n / ref.present.sum(0))
    assert out.losses["subset"].item() == pytest.approx(strict, abs=1e-6)


def test_released_two_passes_single_and_completion_by_hand():
    batch = make_batch(3, 10, seed=7)
    options = {"subset_features": "reconstructed", "single_loss": "released", "completion_loss": "released"}
    model = make_mce(batch, **options).double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    ref = Reference(model, batch)
    with torch.no_grad():
        first = [ref.rebuilt(ref.h[i], ref.has[i]) for i in range(ref.n)]
        strict = {
            (i, s): ref.rebuilt(list(first[i]), s)
            for i in range(ref.n)
            for s in ref.subsets(ref.has[i])
            if s != ref.has[i]
        }
    out = model(batch)
    w = (model.last["rate_factor"] * model.last["state_factor"]).numpy()
    single = 0.0
    for m, name in enumerate(ref.names):
        each = [
            ref.loss(model.heads[name](first[i][m][None])[0], i) if ref.present[i, m] else math.log(3)
            for i in range(ref.n)
        ]
        single += w[m] * np.mean(each)
    assert out.losses["single"].item() == pytest.approx(single, abs=1e-6)

    def completion(only_last: bool) -> float:
        total = 0.0
        for i in range(ref.n):
            own = [s for s in ref.subsets(ref.has[i]) if s != ref.has[i]]
            if only_last:
                own = sorted(own, key=lambda s: sum(4 >> m for m in s))[-1:]  # the first modality is the high bit
            for s in own:
                gaps = [w[m] * float((strict[i, s][m] - first[i][m]).abs().mean()) for m in ref.has[i] if m not in s]
                total += sum(gaps) / (2 ** len(ref.has[i]) - 1) / ref.n
        return total

    assert out.losses["completion"].item() == pytest.approx(completion(False), abs=1e-6)
    last = make_mce(batch, **{**options, "completion_loss": "released_last"}).double()
    assert last(batch).losses["completion"].item() == pytest.approx(completion(True), abs=1e-6)
    # the full set's prediction is the first pass, not completed twice
    with torch.no_grad():
        expected = [ref.loss(ref.logits(first[i]), i) for i in range(ref.n)]
    assert out.losses["task"].item() == pytest.approx(np.mean(expected), abs=1e-6)


def by_hand(model: MCE, batch: MultimodalBatch) -> dict[str, float]:
    """A preset's step, one sample and one subset at a time, as the release goes; weights of 1."""
    ref, name = Reference(model, batch), model.config
    iemocap, nuscenes = name.single_loss == "released", name.players == 7
    M, n, slip = ref.M, ref.n, list(name.columns or range(ref.M))
    has = [tuple(m for m in range(M) if ref.present[i, slip[m]]) for i in range(n)]
    subsets = {i: list(ref.subsets(has[i])) for i in range(n)}
    with torch.no_grad():
        seen = [tuple(range(M)) if not nuscenes else ref.has[i] for i in range(n)]
        first = [ref.rebuilt(ref.h[i], seen[i]) for i in range(n)]
        source = ref.h if nuscenes else first
        again = {(i, s): ref.rebuilt(list(source[i]), s) for i in range(n) for s in subsets[i] if s != has[i]}
        said = {key: ref.logits(x) for key, x in again.items()}
        main = [ref.logits(x) for x in first]
    said |= {(i, has[i]): main[i] for i in range(n) if has[i]}
    right = np.zeros(2**M)
    for (i, s), logits in said.items():
        right[sum(1 << m for m in s)] += ref.right(logits, i)
    count = np.array([sum(m in h for h in has) for m in range(M)])
    single = [model.heads[name_] for name_ in ref.names]
    if nuscenes:
        upper = [sum(ref.right(single[m](ref.h[i][m][None])[0], i) for i in range(n) if m in has[i]) for m in range(M)]
    else:
        upper = [sum(float(model.upper.table[i, m]) for i in range(n) if m in has[i]) for m in range(M)]
    phi = released_shapley(torch.tensor(right), name.players).numpy()
    B = np.maximum(np.array(upper) - phi, 0) / (1 if nuscenes else count)
    w = n / count * B
    losses = {
        "task": np.mean([ref.loss(main[i], i) for i in range(n)]),
        "single": 0.0,
        "subset": 0.0,
        "completion": 0.0,
    }
    for m in range(M):
        each = [ref.loss(single[m](first[i][m][None])[0], i) for i in range(n)]
        if iemocap:
            mean = np.mean([each[i] if m in has[i] else math.log(3) for i in range(n)])
        else:
            mean = np.mean(each) * count[m] / n
        losses["single"] += w[m] * mean / (1 if nuscenes else M)
    some = sum(map(bool, has)) if iemocap else n
    for i in range(n):
        strict = [s for s in subsets[i] if s != has[i]]
        counted = subsets[i] if nuscenes else strict
        losses["subset"] += sum(ref.loss(said[i, s], i) for s in counted) / max(2 ** len(has[i]) - 1, 1) / some
        if name.completion_loss == "released_last":
            strict = sorted(strict, key=lambda s: sum(2 ** (M - 1 - m) for m in s))[-1:]
        for s in strict:
            gaps = [w[m] * float((again[i, s][m] - first[i][m]).abs().mean()) for m in has[i] if m not in s]
            losses["completion"] += sum(gaps) / (2 ** len(has[i]) - 1) / some
    return losses | {"state": B, "shapley": phi}


@pytest.mark.parametrize("preset", ["avmnist", "iemocap", "nuscenes"])
@pytest.mark.parametrize("M", [2, 3])
def test_the_three_releases_by_hand(preset, M):
    if preset == "iemocap" and M == 2:
        with pytest.raises(ValueError, match="columns"):
            make_mce(make_batch(2), preset=preset)
        return
    nuscenes = preset == "nuscenes"
    present = make_batch(M, 12, seed=4).present
    if preset == "iemocap":
        present[3] = False  # samples with nothing
        present[8] = False
    batch = make_batch(M, 12, seed=4, present=present)
    if nuscenes:  # batches of one sample, where its means are ours: of one subset each, in which all samples are
        batch = make_batch(M, 1, seed=4, present=torch.ones(1, M, dtype=torch.bool))
    model = make_mce(batch, preset=preset, encode_absent=not nuscenes, lambda_aux=1.0).double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    out, found = model(batch), by_hand(model, batch)
    for term, loss in out.losses.items():
        assert loss.item() == pytest.approx(found[term], abs=1e-6), term
    assert set(out.losses) == {"task", "single", "subset", "completion"}
    np.testing.assert_allclose(model.last["state_factor"].numpy(), found["state"], atol=1e-6)
    np.testing.assert_allclose(model.last["shapley"].numpy(), found["shapley"], atol=1e-6)
    assert model.reconstruction.position.requires_grad == (preset != "iemocap")


FIXTURES = Path(os.environ.get("MMLIB_DATA") or Path(__file__).resolve().parents[3].parent / "shared" / "data").parent


@pytest.mark.real
@pytest.mark.skipif(not (FIXTURES / "fixtures").is_dir(), reason="the releases' outputs are not there")
def test_the_avmnist_preset_equals_the_release_on_equal_weights_and_inputs():
    kept = dict(np.load(FIXTURES / "fixtures" / "mce_avmnist_release.npz", allow_pickle=False))
    given, release = ({k: v for k, v in kept.items() if k.startswith(s) == want} for s, want in
                      (("weight:", True), ("release:", True)))  # fmt: skip
    batch = MultimodalBatch(
        {m: torch.tensor(kept[m]) for m in ("image", "audio")},
        torch.tensor(kept["present"]),
        target=torch.tensor(kept["target"]),
        ids=torch.arange(64),
    )
    bounds = UpperBounds(torch.tensor(kept["upper"]), batch.ids, batch.modalities)
    backbone = AVMNISTBackbone(AVMNISTConfig(encode_absent=True))
    model = MCE(backbone, bounds, preset="avmnist", dropout=0.0).train()
    weights = {k.removeprefix("weight:"): torch.tensor(v) for k, v in given.items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.rates.copy_(torch.tensor(kept["rate_factor"]))
    seen = []
    model._value, value = lambda *x: seen.append(value(*x)) or seen[-1], model._value
    out = model(batch)
    of = lambda name: release[f"release:{name}"]
    np.testing.assert_allclose(out.logits.detach(), of("logits"), atol=2e-6)
    for term in ("task", "single", "subset", "completion"):
        assert out.losses[term].item() == pytest.approx(float(of(term)), rel=2e-6), term
    for name in ("shapley", "upper", "state_factor"):
        np.testing.assert_allclose(model.last[name], of(name), rtol=1e-6, err_msg=name)
    code = batch.present.long() @ torch.tensor([1, 2])  # pairs are listed by subset, then sample
    pairs = [(s, i) for s in (1, 2, 3) for i in range(64) if code[i] & s == s]
    right = [sum(v for (t, _), v in zip(pairs, seen[-1].tolist(), strict=True) if t == s) for s in (1, 2, 3)]
    assert right == of("counts").tolist()


@pytest.mark.parametrize("what", ["single_loss", "completion_loss"])
def test_losses_of_completed_features(what):
    """Eqs. 9 and 13 on features after f_rec, by hand."""
    batch = make_batch(3, 10, seed=6)
    model = make_mce(batch, **{what: "completed"}).double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    ref, out = Reference(model, batch), model(batch)
    with torch.no_grad():
        full = [ref.rebuilt(ref.h[i], ref.has[i]) for i in range(ref.n)]
    w = (model.last["rate_factor"] * model.last["state_factor"]).numpy()
    if what == "single_loss":
        each = [[ref.loss(model.heads[name](full[i][m][None])[0], i) for i in range(ref.n) if m in ref.has[i]]
                for m, name in enumerate(ref.names)]  # fmt: skip
        assert out.losses["single"].item() == pytest.approx(sum(a * np.mean(b) for a, b in zip(w, each, strict=True)))
        halved = make_mce(make_batch(3, 10, seed=6), single_loss="completed", single_mean=True)
        once = make_mce(make_batch(3, 10, seed=6), single_loss="completed")
        a, b = (m(make_batch(3, 10, seed=6)).losses["single"].item() for m in (halved, once))
        assert a == pytest.approx(b / 3)
        return
    subsets = sorted({s for i in range(ref.n) for s in ref.subsets(ref.has[i])})
    total = 0.0
    for s in subsets:
        feasible, gaps = [i for i in range(ref.n) if set(s) <= set(ref.has[i])], 0.0
        for i in feasible:
            gone = [m for m in ref.has[i] if m not in s]
            again = ref.rebuilt(ref.h[i], s)
            own = [w[m] * float(torch.linalg.norm(again[m] - full[i][m])) for m in gone]
            gaps += sum(own) / max(len(gone), 1)
        total += gaps / len(feasible)
    assert out.losses["completion"].item() == pytest.approx(total / len(subsets))


def test_a_scaled_completion_loss_is_over_the_root_of_the_width():
    batch = make_batch(3, 10, seed=6)
    plain, scaled = make_mce(batch), make_mce(batch, completion_loss="scaled")
    losses = [m(batch).losses["completion"].item() for m in (plain, scaled)]
    assert losses[1] == pytest.approx(losses[0] / math.sqrt(8))


def test_columns_slip_changes_what_the_losses_count_not_the_prediction():
    batch = make_batch(3, 10, seed=3)
    straight, slipped = make_mce(batch), make_mce(batch, columns=(0, 2, 1))
    a, b = straight(batch), slipped(batch)
    torch.testing.assert_close(a.logits, b.logits)
    counts = batch.present.sum(0)
    assert slipped.last["counts"].tolist() == counts[[0, 2, 1]].tolist()
    np.testing.assert_allclose(slipped.rates, straight.rates[[0, 2, 1]])
    with pytest.raises(ValueError, match="columns"):
        make_mce(batch, columns=(0, 1))


def test_other_options_do_what_they_say():
    batch = make_batch(3, 12, seed=2)
    base = make_mce(batch)
    base(batch)
    n = base.last["counts"]
    per_batch = make_mce(batch, state_norm=False)
    per_batch(batch)
    torch.testing.assert_close(per_batch.last["state_factor"], base.last["state_factor"] * n)
    unmasked = make_mce(batch, mask_negative=False)
    unmasked.upper.table.zero_()
    unmasked(batch)
    assert (unmasked.last["state_factor"] <= 0).all()
    assert (unmasked.last["state_factor"] < 0).any()
    current = make_mce(batch, upper_source="current")
    current(batch)
    with torch.no_grad():
        heads = [
            int(((current.heads[m](x).argmax(-1) == batch.target) & batch.present[:, k]).sum())
            for k, (m, x) in enumerate(current.backbone.encode(batch).items())
        ]
    assert current.last["upper"].tolist() == heads
    held = make_mce(batch, train_position=False)
    assert not held.reconstruction.position.requires_grad
    assert base.reconstruction.position.requires_grad
    without = make_mce(batch, rate_factor=False, state_factor=False)
    without(batch)
    assert without.last["rate_factor"].tolist() == without.last["state_factor"].tolist() == [1, 1, 1]


def test_values_from_a_pass_of_their_own():
    batch = make_batch(3, 40, seed=1)
    shared, own = make_mce(batch, dropout=0.5), make_mce(batch, dropout=0.5, value_pass="eval")
    seen = set()
    for _ in range(5):
        own(batch)
        seen.add(tuple(own.last["shapley"].tolist()))
    assert len(seen) == 1  # no dropout in it
    assert own.training
    assert all(part.training for part in own.modules())
    spread = set()
    for _ in range(5):
        shared(batch)
        spread.add(tuple(shared.last["shapley"].tolist()))
    assert len(spread) > 1
    plain = make_mce(batch)
    plain(batch)
    torch.testing.assert_close(plain.last["shapley"], last_of(make_mce(batch, value_pass="eval"), batch)["shapley"])


@pytest.mark.slow
def test_drawn_coalitions_leave_the_means_unbiased():
    batch = make_batch(3, 12, seed=4)
    full = make_mce(batch, state_factor=False)(batch).losses
    drawn = make_mce(batch, state_factor=False, subsets=2)
    draws = {"subset": [], "completion": []}
    with torch.no_grad():
        for _ in range(400):
            losses = drawn(batch).losses
            assert losses["task"].item() == pytest.approx(full["task"].item(), rel=1e-5)
            for name in draws:
                draws[name].append(losses[name].item())
    for name, values in draws.items():
        error = np.std(values) / np.sqrt(len(values))
        assert error > 0
        assert abs(np.mean(values) - full[name].item()) < 4 * error, name
    everything = make_mce(batch, state_factor=False, subsets=7)(batch).losses
    for name in full:
        assert everything[name].item() == pytest.approx(full[name].item(), rel=1e-5)


def test_released_formula_needs_all_coalitions():
    with pytest.raises(ValueError, match="every coalition"):
        ReleasedMCEConfig(shapley="released", permutations=3)
    with pytest.raises(ValueError, match="complete_absent: True needs"):
        ReleasedMCEConfig(complete_absent=True)
    with pytest.raises(ValueError, match="players: expected at least the 3 modalities"):
        make_mce(make_batch(3), shapley="released", players=2)
    with pytest.raises(ValueError, match="Eqs. 11 and 13"):
        ReleasedMCEConfig(subset_loss="strict", subsets=3)
