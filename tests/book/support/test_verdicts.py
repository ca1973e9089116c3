"""Verdicts are computed: from intervals, Holm within a table, and a band of equivalence; a forest plot shows them."""

from __future__ import annotations

import numpy as np
import pytest

from book.support import forest, stored, vector, verdicts
from mmlib import metrics, statistics


def scores(mean: float, seeds: int = 6, samples: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((seeds, samples)) < mean) * 1.0


def test_the_four_words_and_not_run() -> None:
    base = scores(0.5)
    up, noise = np.maximum(base, scores(0.2, seed=1)), scores(0.5, 6, 20, 2)
    judged = verdicts.judge(
        [
            verdicts.compare("up", up, base),
            verdicts.compare("down", base, up),
            verdicts.compare("same", base, base),
            verdicts.compare("unclear", noise, scores(0.5, 6, 20, 3)),
            verdicts.compare("nothing", None, None),
            verdicts.compare("same is claimed", base, base, claim="equal"),
            verdicts.compare("same is claimed, but up", up, base, claim="equal"),
            verdicts.compare("no claim", up, base, claim=""),
            verdicts.compare("an error", up, base, metric="mae"),
        ]
    )
    words = [
        "supported",
        "opposite",
        "equivalent",
        "undecided",
        "not run",
        "supported",
        "opposite",
        "better",
        "opposite",
    ]
    assert list(judged["verdict"]) == words
    assert verdicts.tally(judged).startswith("2 of 9 supported, 3 opposite")
    assert not judged["exploratory"].any()
    assert judged["effect"][0] == pytest.approx(100 * (up - base).mean())
    assert judged["detectable"][3] > judged["detectable"][0]


def test_few_seeds_are_exploratory_and_one_is_undecided() -> None:
    rows = verdicts.judge([verdicts.compare("a", scores(0.9, 3), scores(0.2, 3)), verdicts.compare("b", [0.9], [0.1])])
    assert list(rows["exploratory"]) == [True, True]
    assert rows["verdict"][1] == "undecided"
    assert verdicts.sentence(rows.iloc[0]).endswith("3 seeds: supported (exploratory)")
    assert verdicts.sentence(rows.iloc[1]) == "+80.0 points, 1 seed: undecided (exploratory)"


def test_holm_counts_all_comparisons_of_the_table() -> None:
    one = verdicts.compare("x", [0.52, 0.55, 0.53, 0.56, 0.54], [0.50, 0.51, 0.52, 0.50, 0.53])
    alone = verdicts.judge([one])["p"][0]
    among = verdicts.judge([one] * 10)["p"][0]
    assert among == pytest.approx(min(1, 10 * alone))


def test_pseudo_values_have_the_score_as_mean_and_are_the_values_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=300)
    pred = target + rng.normal(size=300)
    for name in ("corr", "f1_non0", "acc7", "mae"):
        kind = stored.SCORES[name]
        values = stored._jackknife(kind.parts(pred, target), kind)
        assert values.mean() == pytest.approx(kind.score(kind.parts(pred, target).sum(0)))
    np.testing.assert_allclose(values, np.abs(pred - target))
    corr = stored._jackknife(stored.SCORES["corr"].parts(pred, target), stored.SCORES["corr"])
    assert corr.mean() == pytest.approx(metrics.msa_scores(pred, target)["corr"])
    r = corr.mean()  # the standard error of a correlation is about (1 - r^2) / sqrt(n)
    assert corr.std() / np.sqrt(300) == pytest.approx((1 - r**2) / np.sqrt(300), rel=0.2)


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    spread = lambda: 0.02 * rng.normal(size=(8, 1)) + 0.02 * rng.normal(size=(1, 60)) + 0.3 * rng.normal(size=(8, 60))
    sizes = [statistics.detectable(spread(), np.zeros((8, 60))) for _ in range(200)]
    size = float(np.sqrt(np.mean(np.square(sizes))))
    found = [statistics.paired_interval(spread() + size, np.zeros((8, 60))).low > 0 for _ in range(400)]
    assert 0.7 < np.mean(found) < 0.9


def test_a_forest_plot_is_svg_in_the_pages_ink_and_says_everything_in_text() -> None:
    base, up = scores(0.5), np.maximum(scores(0.5), scores(0.2, seed=1))
    rows = verdicts.judge(
        [
            verdicts.compare("rival", up, base, group="digits", paper=3.0),
            verdicts.compare("other", None, None, group="digits"),
            verdicts.compare("rival", base[:3], up[:3], group="mfeat"),
        ]
    )
    one, two = (forest.plot(rows, alt='a < "b"', better="ours") for _ in range(2))
    assert one._repr_html_() == two._repr_html_()
    assert 'aria-label="a &lt; &quot;b&quot;"' in one.markup
    assert 'role="img"' in one.markup
    assert "currentColor" in one.markup
    assert "#000000" not in one.markup
    for word in ("rival", "not run", "supported", "opposite", "mfeat", "exploratory", "paper"):
        assert word in one.markup, word
    assert "digits | other | not run" in str(one)


def test_a_figure_on_which_light_things_lie_keeps_a_card_and_its_ink() -> None:
    import matplotlib.pyplot as plt

    vector.inline()  # nothing happens outside a notebook
    with plt.rc_context({"axes.edgecolor": "#555555"}):
        plain, card = plt.figure(), plt.figure()
        plain.add_subplot().plot([0, 1], color="#7d1287")
        card.add_subplot().imshow([[0, 1]])
    drawn, kept = vector.svg(plain, "a line"), vector.svg(card, "a picture", text="two cells")
    assert "currentColor" in drawn.markup
    assert "var(--mm-purple, #7d1287)" in drawn.markup
    assert "background:#fff" not in drawn.markup
    assert "background:#fff" in kept.markup
    assert "currentColor" not in kept.markup
    assert (str(drawn), str(kept)) == ("a line", "two cells")
