"""The first experiment's configs are those of the stored results; a probe on embedded data is a result."""

from __future__ import annotations

from book.studies import first
from book.support import results
from book.support.stored import Stored


def test_every_run_is_stored() -> None:
    from book.support.build import ROOT

    table = Stored(ROOT / "book/results/avmnist-first.csv", first.cells())
    assert table.note() == "all 40 runs stored, avmnist-first.csv"
    for name, choices in first.PROBED.items():
        assert len(results.load_results(ROOT / "book/results/data-probes.csv", first.probes(name, choices))) == len(
            choices
        )


def test_a_probe_is_one_result() -> None:
    (config,) = first.probes("digits", [("projection",)])
    (found,) = first.probe(config)
    assert found["condition"] == "projection"
    assert found["n"] == 450
    assert 0.5 < found["value"] < 0.6


def test_a_network_with_one_input_ignores_the_other() -> None:
    assert first.reads("image only", "image+audio") == "image"
    assert first.reads("image only", "audio") is None
    assert first.reads("modality dropout", "image+audio") == "image+audio"
