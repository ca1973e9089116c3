"""The style: colours that stay apart, plots that return their Axes and draw the numbers they were given."""

import itertools
import subprocess
import sys

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from book.support import figures as f


@pytest.fixture(autouse=True)
def _style():
    with mpl.rc_context():
        f.use_style()
        yield
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------- colours


def linear(shade):
    c = np.array([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    q = xyz / np.array([0.9505, 1, 1.089])
    q = np.where(q > 0.008856, np.cbrt(np.maximum(q, 0)), 7.787 * q + 16 / 116)
    return np.array([116 * q[1] - 16, 500 * (q[0] - q[1]), 200 * (q[1] - q[2])])


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


@pytest.mark.parametrize("vision", list(VISION))
def test_palette_stays_apart(vision):
    seen = {c: lab(np.clip(VISION[vision] @ linear(c), 0, 1)) for c in f.PALETTE}
    gaps = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(f.PALETTE, 2)}
    assert min(gaps.values()) > 20, min(gaps, key=gaps.get)  # CIE76; the eye sees about 2


def test_contrast_on_the_figures_own_white():
    assert mpl.rcParams["figure.facecolor"] == mpl.rcParams["axes.facecolor"] == "white"  # opaque: dark pages too
    for shade in f.PALETTE:
        luminance = np.array([0.2126, 0.7152, 0.0722]) @ linear(shade)
        assert 1.05 / (luminance + 0.05) >= 3, shade


@pytest.mark.parametrize(
    "together",
    [
        ("left", "right", "projection"),
        ("image", "audio"),
        ("language", "audio", "vision"),
        ("text", "audio", "visual"),
        ("fou", "fac", "kar", "pix", "zer", "mor"),
        ("mce", "dream", "dear", "balm", "joint"),
        ("image only", "audio only", "image + audio", "modality dropout"),
    ],
)
def test_names_that_meet_have_their_own_colour(together):
    assert len({f.colour(n) for n in together}) == len(together)
    assert len({f.marker(n) for n in together}) == len(together)


@pytest.mark.slow
def test_colours_are_fixed_for_any_name():
    assert f.colour("Audio") == f.colour("audio") == f.MODALITY_COLOURS["audio"]
    assert f.colour("modality_dropout") == f.METHOD_COLOURS["modality dropout"]
    code = "from book.support.figures import colour, marker; print(colour('lidar'), marker('lidar'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [f.colour("lidar"), f.marker("lidar")]
    assert other[0] in f.PALETTE


@pytest.mark.slow
def test_import_changes_nothing():
    code = (
        "import sys, book.support.figures; assert 'matplotlib.pyplot' not in sys.modules; import matplotlib as m;"
        "assert m.rcParams['figure.dpi'] == m.rcParamsDefault['figure.dpi']; book.support.figures.use_style();"
        "print(m.rcParams['figure.dpi'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "110.0\n"


def test_sizes():
    for size, (width, height) in f.SIZES.items():
        drawn, _ = f.figure(size)
        assert tuple(drawn.get_size_inches()) == (width, height)
        assert width * 110 <= 840
    with pytest.raises(ValueError, match="size: expected one of"):
        f.figure("huge")


# ------------------------------------------------------------------------------------------------------------ plots


def test_presence_grid_draws_the_mask():
    present = torch.tensor([[True, False], [True, True], [False, True]])
    ax = f.presence_grid(present, ["left", "right"], title="who has what")
    drawn = ax.images[0].get_array()
    assert drawn.shape == (3, 2, 3)
    assert np.array_equal(drawn.min(-1) < 0.999, present.numpy())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["left", "right"]
    valid = np.array([[True] * 4, [True, True, False, False]])
    ax = f.presence_grid(np.ones((2, 4)), valid=valid)
    assert len(ax.patches) == 2
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="two axes"):
        f.presence_grid([True])
    with pytest.raises(ValueError, match="expected 2 names"):
        f.presence_grid(present, ["left"])
    with pytest.raises(ValueError, match="valid: expected shape"):
        f.presence_grid(present, valid=np.ones((1, 2)))


def test_bars_draw_heights_intervals_and_holes():
    ax = f.bars(
        {"image only": [0.8, np.nan], "modality dropout": [0.7, 0.6]},
        ["image", "audio"],
        {"modality dropout": [(0.6, 0.8), (0.5, 0.65)]},
        chance=0.1,
        title="Accuracy",
    )
    assert [round(p.get_height(), 2) for p in ax.patches] == [0.8, 0.0, 0.7, 0.6]
    texts = [t.get_text() for t in ax.texts]
    assert texts == ["0.80", " not run", "0.70", "0.60"]
    assert ax.get_legend() is not None
    segments = ax.collections[0].get_segments()
    assert np.allclose([s[:, 1] for s in segments], [[0.6, 0.8], [0.5, 0.65]])
    with pytest.raises(ValueError, match="expected 2 values"):
        f.bars({"a": [1]}, ["x", "y"])
    with pytest.raises(ValueError, match="expected 2 pairs"):
        f.bars({"a": [1, 2]}, ["x", "y"], {"a": [(0, 1)]})


def test_band_and_marker_follow_the_name():
    ax = f.band([0, 0.5], [0.9, 0.4], [0.8, 0.3], [1.0, 0.5], "mce", xlabel="missing rate")
    f.band([0, 0.5], torch.tensor([0.7, 0.2]), name="dream", ax=ax)
    assert [line.get_color() for line in ax.lines] == [f.colour("mce"), f.colour("dream")]
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    assert len(ax.collections) == 1
    with pytest.raises(ValueError, match="both ends"):
        f.band([0], [1], low=[0])


def test_loss_curve_reads_a_history():
    from types import SimpleNamespace

    epochs = [{"epoch": i, "train_loss": 1 / i, "valid_accuracy": 0.5, "seconds": 0.1} for i in (1, 2, 3)]
    ax = f.loss_curve(SimpleNamespace(epochs=epochs, best_epoch=2))
    assert [line.get_label() for line in ax.lines] == ["train_loss", "kept epoch"]
    assert np.allclose(ax.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])
    assert len(f.loss_curve(epochs, keys=["valid_accuracy"]).lines) == 1
    with pytest.raises(ValueError, match="keys"):
        f.loss_curve(epochs, keys=["nothing"])
    with pytest.raises(ValueError, match="at least one epoch"):
        f.loss_curve([])


def test_training_curves_are_the_mean_over_seeds_as_far_as_a_run_goes():
    lines = {"curve of training": [[3.0, 1.0, np.nan], [1.0, 1.0, 0.5]], "curve of validation": [[0.2, 0.4, 0.5]]}
    one, two = f.training_curves({"a": lines, "never run": {}}, metric="accuracy").axes
    assert one.lines[0].get_ydata().tolist() == [2.0, 1.0, 0.5]
    assert two.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert (one.get_ylabel(), two.get_ylabel()) == ("training loss", "accuracy")
    with pytest.raises(ValueError, match=r"expected curves of a method, got none of \['never run'\]"):
        f.training_curves({"never run": {}})


def test_heat_map_prints_its_numbers_and_its_holes():
    ax = f.heat_map([[0.1, 0.9], [np.nan, 0.5]], ["a", "b"], ["x", "y"], label="accuracy")
    assert [t.get_text() for t in ax.texts] == ["0.10", "0.90", "not run", "0.50"]
    assert ax.texts[0].get_color() == "white"
    assert ax.texts[1].get_color() != "white"
    with pytest.raises(ValueError, match="values: expected shape"):
        f.heat_map([[1]], ["a"], ["x", "y"])


def test_picture_takes_every_feature_shape():
    shapes = {(4,): (1, 4), (8, 4): (8, 4), (1, 28, 28): (28, 28), (3, 5, 6): (5, 6, 3)}
    for given, drawn in shapes.items():
        assert f.picture(torch.rand(given)).images[0].get_array().shape == drawn
    assert f.picture(np.zeros((20, 13)), frames=True).images[0].get_array().shape == (13, 20)
    for bad in ((2, 5, 5), (1, 1, 2, 2)):
        with pytest.raises(ValueError, match="values: expected"):
            f.picture(np.zeros(bad))


def test_boxes_and_reliability():
    ax = f.boxes({"image": (0, 0, "encoder"), "z": (3, 0, "fuse")}, [("image", "z", "h")], title="A net")
    assert [t.get_text() for t in ax.texts] == ["encoder", "fuse", "h"]
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="no box named"):
        f.boxes({"a": (0, 0, "a")}, [("a", "b")])
    ax = f.reliability([0.5, np.nan, 0.9], [0.4, np.nan, 0.8], [10, 0, 5], "joint")
    assert len(ax.lines[1].get_xdata()) == 2


def test_given_axes_are_used_and_returned():
    _, (one, two) = f.figure("wide", 1, 2)
    assert f.bars({"a": [1.0]}, ["x"], ax=one) is one
    assert f.heat_map([[1.0]], ["a"], ["x"], two) is two
