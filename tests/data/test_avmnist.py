"""AudiovisionMNIST: a made-up root folder for pairing, layout, damage and cache; the real files where they are."""

import gzip
import math
import struct
import wave

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmlib import data
from mmlib.data import avmnist

SPEAKERS = ("jackson", "nicolas", "theo")


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_wav(path, samples, rate=8000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def write_mnist(folder, part, per_class, seed=0):
    """Images in random order; the first pixels hold the class, the place within the class (two bytes) and the part."""
    g = np.random.default_rng(seed)
    labels = g.permutation(np.repeat(np.arange(10), per_class)).astype(np.uint8)
    images = g.integers(0, 256, (len(labels), 28, 28)).astype(np.uint8)
    place = np.zeros(10, int)
    for image, c in zip(images, labels, strict=True):
        image[0, :4] = c, place[c] // 256, place[c] % 256, part == "train"
        place[c] += 1
    folder.mkdir(exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root with 150 test images a class and 1,500 very short recordings; other speakers' files are ignored."""
    root = tmp_path_factory.mktemp("root")
    write_mnist(root / "mnist", "t10k", 150)
    folder = root / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    g = np.random.default_rng(1)
    for d in range(10):
        for k, s in enumerate(SPEAKERS):
            for t in range(50):
                write_wav(folder / f"{d}_{s}_{t}.wav", 0.1 * g.normal(size=300 + 20 * d + 100 * k + 3 * t).clip(-5, 5))
    write_wav(folder / "0_lucas_0.wav", np.zeros(10), rate=44100)
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache folder that all tests of this module share, so that the MFCCs are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def root(made, kept, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(kept))
    return made


@pytest.fixture
def copy(made, tmp_path):
    """A root whose files may be damaged: links to the made ones."""
    for folder in ("mnist", "fsdd/recordings"):
        (tmp_path / folder).mkdir(parents=True)
        for path in (made / folder).iterdir():
            (tmp_path / folder / path.name).symlink_to(path)
    return tmp_path


def replace(path, content: bytes):
    path.unlink()
    path.write_bytes(content)


def parse(name):
    digit, speaker, take = name.removeprefix("avmnist/").split("_")
    return int(digit), SPEAKERS.index(speaker), int(take)


def codes(d, units="release"):
    """Class, place and part that the made images hold."""
    pixels = (d.data.features["image"] * 0.5 + 0.5).mul(255).round().long()[:, 0, 0, :4]
    return pixels[:, 0], pixels[:, 1] * 256 + pixels[:, 2], pixels[:, 3]


class TestPairs:
    @pytest.mark.slow
    def test_shapes(self, root):
        splits = data.load("avmnist", root)
        assert {k: len(d) for k, d in splits.items()} == {"train": 900, "valid": 150, "test": 450}
        for split, d in splits.items():
            assert d.feature_shapes == {"image": (1, 28, 28), "audio": (1, 20, 20)}
            assert d.present.all()
            assert all(v.all() for v in d.data.valid.values())
            assert torch.bincount(d.target).tolist() == [len(d) // 10] * 10
            assert d.info["split"] == split
            assert d.info["images"].startswith("MNIST's test images for all splits")
            assert d.info["fingerprint"] == data.fingerprint(d)
        ids = torch.cat([d.ids for d in splits.values()])
        assert len(ids.unique()) == 1500

    @pytest.mark.parametrize("preset", ["default", "smil"])
    def test_classes_takes_and_images(self, root, preset):
        splits = data.load("avmnist", root, preset=preset)
        assert ("valid" in splits) == (preset == "default")
        used = {}
        for split, d in splits.items():
            names = [parse(n) for n in d.names]
            assert d.target.tolist() == [n[0] for n in names]
            assert d.data.extras["speaker"].tolist() == [n[1] for n in names]
            assert d.data.extras["take"].tolist() == [n[2] for n in names]
            assert all((take < 15) == (split == "test") for _, _, take in names)
            classes, place, _ = codes(d)
            assert classes.tolist() == d.target.tolist()
            used[split] = set(zip(classes.tolist(), place.tolist(), strict=True))
            assert len(used[split]) == len(d)
        assert len(set.union(*used.values())) == 1500  # no image in two places
        assert len(splits["train"]) == (900 if preset == "default" else 1050)

    def test_all_images_that_training_has_not_go_round_the_test_sounds(self, copy, kept, monkeypatch):
        monkeypatch.setenv("MMLIB_CACHE", str(kept))
        for path in (copy / "mnist").iterdir():
            path.unlink()
        write_mnist(copy / "mnist", "t10k", 200)
        few, many = (data.load("avmnist", copy, test_images=which) for which in ("paired", "all"))
        assert {k: len(d) for k, d in many.items()} == {"train": 900, "valid": 150, "test": 950}
        assert many["train"].info["fingerprint"] == few["train"].info["fingerprint"]
        test = many["test"]
        names = [parse("/".join(name.split("/")[:2])) for name in test.names]
        assert test.target.tolist() == [c for c, *_ in names]
        assert len(test.ids.unique()) == 950
        place = torch.arange(95) % 45  # the sounds of a class in turn: speaker, then take
        assert test.data.extras["speaker"].view(10, 95)[3].tolist() == (place // 15).tolist()
        assert test.data.extras["take"].view(10, 95)[3].tolist() == (place % 15).tolist()
        sounds = test.data.features["audio"].view(10, 95, -1)
        assert torch.equal(sounds[:, 45:90], sounds[:, :45])
        used = [set(zip(*(x.tolist() for x in codes(d)[:2]), strict=True)) for d in many.values()]
        assert [len(u) for u in used] == [900, 150, 950]
        assert len(set.union(*used)) == 2000

    def test_file_order_is_the_first_105_and_the_last_45(self, root):
        splits = data.load("avmnist", root, preset="smil", image_order="file")
        for d, first in ((splits["train"], 0), (splits["test"], 105)):
            _, place, _ = codes(d)
            n = len(d) // 10
            assert place.reshape(10, n).tolist() == [list(range(first, first + n))] * 10
            # sound j of a class: sorted by speaker, then take
            order = [parse(name)[1:] for name in d.names[:n]]
            assert order == sorted(order)
            assert [s for s, _ in order] == sorted([0, 1, 2] * (n // 3))

    @pytest.mark.slow
    def test_training_images_where_they_are(self, root, copy):
        write_mnist(copy / "mnist", "train", 120, seed=5)
        splits = data.load("avmnist", copy)
        assert "training images for train and valid" in splits["train"].info["images"]
        assert {k: set(codes(d)[2].tolist()) for k, d in splits.items()} == {"train": {1}, "valid": {1}, "test": {0}}
        for path in (copy / "mnist").glob("t10k*"):
            path.unlink()
        with pytest.raises(ValueError, match="expected at least 150 images of class 0 for train, got 120"):
            data.load("avmnist", copy)
        write_mnist(copy / "mnist", "train", 151, seed=5)
        assert data.load("avmnist", copy)["test"].info["images"].startswith("MNIST's training images for all")

    def test_unpacked_files_will_do(self, root, copy):
        for path in list((copy / "mnist").iterdir()):
            (copy / "mnist" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        a, b = data.load("avmnist", copy), data.load("avmnist", root)
        assert a["test"].info["fingerprint"] == b["test"].info["fingerprint"]

    @pytest.mark.slow
    def test_held_out(self, root):
        a, b, c = (data.load("avmnist", root, split_seed=s, held_out=6) for s in (0, 0, 1))
        assert len(a["valid"]) == 60
        assert a["valid"].names == b["valid"].names != c["valid"].names
        group = a["valid"].target * 3 + a["valid"].data.extras["speaker"]
        assert torch.bincount(group).tolist() == [2] * 30  # equal shares of classes and speakers
        smil = data.load("avmnist", root, preset="smil")["train"]
        assert set(a["train"].names) | set(a["valid"].names) == set(smil.names)
        assert a["test"].info["fingerprint"] == c["test"].info["fingerprint"]

    def test_scaling(self, root):
        release = data.load("avmnist", root)
        x = release["train"].data.features["image"]
        assert -1 <= x.min() < -0.9
        assert 0.9 < x.max() <= 1
        short = release["train"].data.extras["frames"]
        assert set(short.tolist()) == {1}  # made recordings are shorter than a hop
        assert (release["train"].data.features["audio"][:, 0, 1:] == -1).all()  # padding, as (0 - .5) / .5
        train = data.load("avmnist", root, scaling="train")
        audio = train["train"].data.features["audio"][:, 0]
        assert torch.allclose(audio[:, 0].mean(0), torch.zeros(20), atol=1e-4)
        assert torch.allclose(audio[:, 0].std(0, correction=0), torch.ones(20), atol=1e-3)
        assert (audio[:, 1:] == 0).all()
        assert abs(float(train["train"].data.features["image"].mean())) < 1e-4

    def test_mark_padding(self, root):
        d = data.load("avmnist", root, mark_padding=True)["valid"]
        assert torch.equal(d.data.valid["audio"].sum(-1), d.data.extras["frames"])
        assert (d.data.features["audio"][:, 0, 1:] == 0).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preset": "paper"}, "preset: expected"),
            ({"scaling": "none"}, "scaling: expected"),
            ({"image_order": "random"}, "image_order: expected"),
            ({"held_out": 10}, "held_out: expected a multiple of 3 from 3 to 102, got 10"),
            ({"held_out": 0}, "held_out"),
            ({"held_out": 105}, "held_out"),
            ({"every": 0}, "every: expected an integer of at least 1"),
            ({"hop_length": -1}, "hop_length: expected an integer of at least 1"),
        ],
    )
    def test_bad_options(self, root, options, message):
        with pytest.raises(ValueError, match=message):
            data.load("avmnist", root, **options)


class TestLittleSound:
    def test_counts(self):
        assert len(avmnist.PER_CLASS_COUNTS) == 10
        for k, p in enumerate(avmnist.PER_CLASS_COUNTS, start=1):
            assert p == 3 * math.ceil(math.floor(10.5 * k) / 3)

    @pytest.mark.slow
    def test_nested_and_balanced(self, root):
        train = data.load("avmnist", root, preset="smil")["train"]
        previous = torch.zeros(1050, dtype=torch.bool)
        for p in (0, *avmnist.PER_CLASS_COUNTS):
            present = avmnist.sound_for_first(train, p)
            assert present[:, 0].all()
            sound = present[:, 1]
            group = train.target * 3 + train.data.extras["speaker"]
            assert torch.bincount(group[sound], minlength=30).tolist() == [p // 3] * 30
            assert set(train.data.extras["take"][sound].tolist()) == set(range(15, 15 + p // 3))
            assert not (previous & ~sound).any()
            previous = sound
        shuffled = train.subset(torch.randperm(1050, generator=torch.Generator().manual_seed(0)))
        kept = lambda d: {n for n, s in zip(d.names, avmnist.sound_for_first(d, 21)[:, 1], strict=True) if s}
        assert kept(shuffled) == kept(train)
        dropped = train.drop(present=avmnist.sound_for_first(train, 21))
        assert int(dropped.present[:, 1].sum()) == 210
        assert (dropped.data.features["audio"][~dropped.present[:, 1]] == 0).all()

    def test_errors(self, root):
        train = data.load("avmnist", root)["train"]
        with pytest.raises(ValueError, match="per_class: expected a multiple of 3"):
            avmnist.sound_for_first(train, 10)
        with pytest.raises(ValueError, match="per_class: expected at most 90"):
            avmnist.sound_for_first(train, 105)
        for other in (train.select(["image"]), data.load("digits")["train"]):
            with pytest.raises(ValueError, match="train: expected a split of avmnist"):
                avmnist.sound_for_first(other, 12)


def loop_mfcc(samples, n_mfcc=20, rate=8000, n_fft=2048, hop=512):
    """MFCCs [T, 20] from the definition: power spectra of Hann windows, Slaney's mel bands, decibels, DCT-II."""
    hz = lambda mel: 200 / 3 * mel if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))
    top = 15 + math.log(rate / 2 / 1000) / (math.log(6.4) / 27)
    edges = [hz(m) for m in np.linspace(0, top, 130)]
    bands = np.zeros((128, n_fft // 2 + 1))
    for k in range(n_fft // 2 + 1):
        f = k * rate / n_fft
        for b in range(128):
            low, middle, high = edges[b : b + 3]
            rise, fall = (f - low) / (middle - low), (high - f) / (high - middle)
            bands[b, k] = max(0.0, min(rise, fall)) * 2 / (high - low)
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / n_fft) for i in range(n_fft)]
    padded = np.concatenate([np.zeros(n_fft // 2), samples, np.zeros(n_fft // 2)])
    rows = []
    for t in range(1 + len(samples) // hop):
        spectrum = np.abs(np.fft.rfft(padded[t * hop : t * hop + n_fft] * window)) ** 2
        rows.append([10 * math.log10(max(1e-10, float(band @ spectrum))) for band in bands])
    loud = max(max(row) for row in rows)
    rows = [[max(v, loud - 80) for v in row] for row in rows]
    out = []
    for row in rows:
        sums = [sum(v * math.cos(math.pi * q * (2 * i + 1) / 256) for i, v in enumerate(row)) for q in range(n_mfcc)]
        out.append([s * math.sqrt((1 if q == 0 else 2) / 128) for q, s in enumerate(sums)])
    return np.array(out)


class TestSound:
    @pytest.mark.parametrize(("length", "frames"), [(700, 1), (5000, 4), (40_000, 20)])
    def test_against_the_definition(self, tmp_path, length, frames):
        g = np.random.default_rng(length)
        t = np.arange(length) / 8000
        samples = 0.3 * np.sin(2 * np.pi * 220 * t) * np.exp(-3 * t) + 0.01 * g.normal(size=length)
        write_wav(tmp_path / "x.wav", samples)
        picture, count = avmnist._mfcc(tmp_path / "x.wav", 3, 512)
        assert picture.shape == (20, 20)
        assert count == frames
        exact = (samples * 32767).astype("<i2") / 32768
        expected = loop_mfcc(exact[::3])[:20]
        assert picture[:count] == pytest.approx(expected, abs=1e-2)
        assert (picture[count:] == 0).all()

    def test_more_frames_on_request(self, tmp_path):
        write_wav(tmp_path / "x.wav", 0.1 * np.sin(np.arange(3600) / 5))
        assert avmnist._mfcc(tmp_path / "x.wav", 3, 512)[1] == 3
        assert avmnist._mfcc(tmp_path / "x.wav", 1, 256)[1] == 15


class TestDamage:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("t10k-images-idx3-ubyte.gz", lambda b: b[:-200], "damaged gzip file"),
            ("t10k-images-idx3-ubyte.gz", lambda b: b[:500] + b"\0" * 50 + b[550:], "damaged gzip file"),
            ("t10k-images-idx3-ubyte.gz", lambda b: b"", "damaged gzip file|IDX"),
            ("t10k-images-idx3-ubyte.gz", lambda b: b"<html>404</html>", "damaged gzip file"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"nonsense"), "expected an IDX file"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b""), "expected an IDX file .* no data"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "00 00 0d 01"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\x08\x03\0\0"), "header is cut short"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1]), "header says 1500 .* 1499"),
            ("t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(idx(np.zeros(7, np.uint8))), "expected 1500 labels"),
            (
                "t10k-labels-idx1-ubyte.gz",
                lambda b: gzip.compress(idx(np.full(1500, 10, np.uint8))),
                "expected labels 0 to 9, got 10",
            ),
            (
                "t10k-images-idx3-ubyte.gz",
                lambda b: gzip.compress(idx(np.zeros((1500, 32, 32), np.uint8))),
                r"expected images \[n, 28, 28\]",
            ),
        ],
    )
    def test_mnist(self, copy, name, change, message):
        path = copy / "mnist" / name
        replace(path, change(path.read_bytes()))
        with pytest.raises(ValueError, match=message) as error:
            data.load("avmnist", copy)
        assert str(path) in str(error.value)

    def test_too_few_images(self, copy):
        write = lambda part: write_mnist(copy / "mnist", part, 149)
        for path in list((copy / "mnist").iterdir()):
            path.unlink()
        write("t10k")
        with pytest.raises(ValueError, match="expected at least 150 images of class 0") as error:
            data.load("avmnist", copy)
        assert avmnist.LAYOUT in str(error.value)

    @pytest.mark.parametrize("remove", ["t10k-images*", "t10k-labels*", "*"])
    def test_missing_mnist(self, copy, remove):
        for path in (copy / "mnist").glob(remove):
            path.unlink()
        with pytest.raises(FileNotFoundError, match="no MNIST files|is there, but not its") as error:
            data.load("avmnist", copy)
        assert avmnist.LAYOUT in str(error.value)

    @pytest.mark.slow
    def test_missing_recordings(self, copy):
        for name in ("3_theo_7.wav", "9_jackson_49.wav"):
            (copy / "fsdd" / "recordings" / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=r"2 of 1500 recordings are not in .*3_theo_7\.wav, 9_jack"
        ) as error:
            data.load("avmnist", copy)
        assert avmnist.LAYOUT in str(error.value)
        for path in (copy / "fsdd" / "recordings").iterdir():
            path.unlink()
        (copy / "fsdd" / "recordings").rmdir()
        with pytest.raises(FileNotFoundError, match="1500 of 1500 recordings"):
            data.load("avmnist", copy)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (lambda p: p.write_bytes(b"RIFF, or so"), "not a readable sound file"),
            (lambda p: p.write_bytes(b""), "not a readable sound file"),
            (lambda p: write_wav(p, np.zeros(500), rate=16000), "expected one channel at 8000 Hz, got 1 at 16000 Hz"),
            (lambda p: write_wav(p, np.zeros(500), channels=2), "expected one channel at 8000 Hz, got 2 at 8000 Hz"),
            (lambda p: write_wav(p, []), "got 0 samples"),
        ],
    )
    def test_bad_wav(self, copy, tmp_path, monkeypatch, write, message):
        monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
        path = copy / "fsdd" / "recordings" / "0_jackson_1.wav"
        path.unlink()
        write(path)
        with pytest.raises(ValueError, match=message) as error:
            data.load("avmnist", copy)
        assert str(path) in str(error.value)
        assert not (tmp_path / "cache").exists()  # nothing half done is kept


class TestCache:
    @pytest.fixture
    def count(self, monkeypatch):
        """How many recordings were read; the MFCCs are replaced by a cheap stand-in that depends on the file."""
        calls = []

        def fake(path, every, hop_length):
            calls.append(path.name)
            return np.full((20, 20), path.stat().st_size % 97 + every, np.float32), 2

        monkeypatch.setattr(avmnist, "_mfcc", fake)
        return calls

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "own"))
        return tmp_path / "own"

    @pytest.mark.slow
    def test_second_load_reads_no_recording(self, made, folder, count):
        a = data.load("avmnist", made, workers=1)
        assert len(count) == 1500
        b = data.load("avmnist", made)
        assert len(count) == 1500
        assert all(a[k].info["fingerprint"] == b[k].info["fingerprint"] for k in a)
        assert [p.suffix for p in folder.iterdir()] == [".npz"]  # no temporary file is left

    @pytest.mark.slow
    def test_keyed_by_content_and_settings(self, made, copy, folder, count):
        data.load("avmnist", made)
        data.load("avmnist", copy)  # the same content elsewhere
        assert len(count) == 1500
        data.load("avmnist", made, every=1)
        data.load("avmnist", made, hop_length=256)
        assert len(count) == 4500
        path = copy / "fsdd" / "recordings" / "5_theo_5.wav"
        replace(path, path.read_bytes()[:-2] + b"\x01\x02")  # the same size
        data.load("avmnist", copy)
        assert len(count) == 6000
        assert len(list(folder.iterdir())) == 4

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "damage",
        [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:1000] + b"\xff" * 64 + b[1064:], lambda b: b"x" * 99],
    )
    def test_a_damaged_file_is_made_again(self, made, folder, count, damage):
        a = data.load("avmnist", made)
        (store,) = folder.iterdir()
        store.write_bytes(damage(store.read_bytes()))
        with pytest.warns(UserWarning, match=rf"{store.name} is damaged .*computing it again"):
            b = data.load("avmnist", made)
        assert len(count) == 3000
        assert a["train"].info["fingerprint"] == b["train"].info["fingerprint"]
        data.load("avmnist", made)
        assert len(count) == 3000

    def test_a_cache_that_cannot_be_written_costs_a_warning(self, made, tmp_path, count, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="could not write the cache file"):
            assert len(data.load("avmnist", made)["train"]) == 900

    def test_full_disk(self, made, folder, count, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(avmnist, "atomic_write", full)
        with pytest.warns(UserWarning, match="No space left on device"):
            assert len(data.load("avmnist", made)["train"]) == 900
        assert not folder.exists() or list(folder.iterdir()) == []

    @pytest.mark.slow
    def test_off(self, made, folder, count):
        data.load("avmnist", made, cache=False)
        data.load("avmnist", made, cache=False)
        assert len(count) == 3000
        assert not folder.exists()

    def test_where(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "a"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
        assert avmnist.cache_folder() == tmp_path / "a"
        monkeypatch.delenv("MMLIB_CACHE")
        assert avmnist.cache_folder() == tmp_path / "b" / "mmlib"
        monkeypatch.setenv("HOME", str(tmp_path))
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert avmnist.cache_folder() == tmp_path / ".cache" / "mmlib"

    @pytest.mark.slow
    def test_progress(self, made, folder, count, capsys):
        data.load("avmnist", made, cache=False)  # not a terminal: silent
        assert capsys.readouterr().err == ""
        data.load("avmnist", made, cache=False, progress=True)
        out = capsys.readouterr()
        assert "1500/1500" in out.err
        assert out.out == ""
        data.load("avmnist", made, cache=False, progress=False)
        assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def splits(real_data):
    for folder in ("mnist", "fsdd"):
        if not (real_data / folder).is_dir():
            pytest.skip(f"no {folder}/ in {real_data}")
    return data.load("avmnist", real_data, scaling="train")


@pytest.mark.real
class TestReal:
    def test_shapes(self, splits):
        assert {k: len(d) for k, d in splits.items()} == {"train": 900, "valid": 150, "test": 450}
        frames = torch.cat([d.data.extras["frames"] for d in splits.values()])
        assert 1 <= frames.min() <= frames.max() <= 20
        assert frames.median() == 3  # most of the 20 x 20 picture is padding

    def test_linear_probes(self, splits):
        train, test = splits["train"].data, splits["test"].data
        bands = {("image",): (0.8, 0.92), ("audio",): (0.85, 0.95), ("image", "audio"): (0.93, 0.99)}
        for names, (low, high) in bands.items():
            x, z = (np.concatenate([b.features[m].flatten(1).numpy() for m in names], 1) for b in (train, test))
            accuracy = LogisticRegression(max_iter=300).fit(x, train.target).score(z, test.target)
            assert low <= accuracy <= high, (names, accuracy)
