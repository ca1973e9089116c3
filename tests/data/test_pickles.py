"""The restricted unpickler: arrays and containers pass, everything else is refused before it runs."""

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmlib.data import safe_pickle_load


def write(path, value, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


class Call:
    """Unpickled, it calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


GOOD = {
    "text": np.arange(6, dtype=np.float16).reshape(2, 3),
    "fortran": np.asfortranarray(np.ones((2, 3))),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "big": np.arange(100_000, dtype=">f4"),
    "bits": np.array([True, False]),
    "number": np.array(3.5),
    "strings": np.array(["a", "bc"]),
    "bytes": np.array([b"a", b"bc"]),
    "object": np.array(["v$_$1", None, 3], dtype=object),
    "scalar": np.float32(1.5),
    "nested": [{"a": (1, 2.5, None, True)}, {1, 2}, frozenset({3}), b"x", bytearray(b"y"), 1j, "ä", range(3)],
    "ordered": collections.OrderedDict(z=1, a=2),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers(tmp_path, protocol):
    back = safe_pickle_load(write(tmp_path / "d.pkl", GOOD, protocol))
    assert list(back) == list(GOOD)
    for key, value in GOOD.items():
        if isinstance(value, np.ndarray):
            assert back[key].dtype == value.dtype
            assert back[key].shape == value.shape
            assert (back[key] == value).all()
        else:
            assert back[key] == value


def test_python_2_pickle(tmp_path):
    # dumps({'x': np.array([1., 2.])}, 2) as Python 2 wrote it: __builtin__, numpy.core, raw bytes in a str
    data = (
        b"\x80\x02}q\x00U\x01xq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x10\x00\x00\x00\x00\x00\x00\xf0?\x00\x00\x00\x00\x00\x00\x00@tbs."
    )
    (tmp_path / "old.pkl").write_bytes(data)
    assert safe_pickle_load(tmp_path / "old.pkl")["x"].tolist() == [1, 2]
    (tmp_path / "set.pkl").write_bytes(b"\x80\x02c__builtin__\nset\nq\x00]q\x01K\x01a\x85R.")
    assert safe_pickle_load(tmp_path / "set.pkl") == {1}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_does_not_run(tmp_path, protocol):
    mark = tmp_path / "was-here"
    hostile = [
        (Call(os.system, f"touch {mark}"), r"posix\.system|nt\.system"),
        (Call(subprocess.check_call, ["touch", str(mark)]), r"(subprocess|commands)\.check_call"),
        (Call(eval, f"open({str(mark)!r}, 'w')"), r"builtins\.eval"),
        (Call(getattr, "x", "upper"), r"builtins\.getattr"),
        (Call(open, str(mark), "w"), r"(_?io)\.open"),
        (Call(np.load, str(mark)), r"numpy.*\.load"),
        ({"data": [np.ones(2), {"deep": Call(os.mkdir, str(mark))}]}, r"posix\.mkdir|nt\.mkdir"),
        (np.array([Call(os.system, f"touch {mark}")], dtype=object), r"system"),
    ]
    for value, name in hostile:
        path = write(tmp_path / "bad.pkl", value, protocol)
        with pytest.raises(ValueError, match=name) as error:
            safe_pickle_load(path)
        assert str(path) in str(error.value)
        assert not mark.exists()


@pytest.mark.parametrize(
    "name", [b"numpy.dtypes\nos.systemDType", b"numpy\nndarray.tofile", b"builtins\n__import__", b"os\nsystem"]
)
def test_dotted_and_private_names_are_refused(tmp_path, name):
    path = tmp_path / "bad.pkl"
    module, attribute = name.split(b"\n")
    encode = lambda s: b"\x8c" + bytes([len(s)]) + s
    path.write_bytes(b"\x80\x04" + encode(module) + encode(attribute) + b"\x93.")
    with pytest.raises(ValueError, match="refused to read this pickle: it asks for"):
        safe_pickle_load(path)


def test_persistent_ids_are_refused(tmp_path):
    (tmp_path / "p.pkl").write_bytes(b"Pmodel\n.")
    with pytest.raises(ValueError, match="persistent id"):
        safe_pickle_load(tmp_path / "p.pkl")


def test_own_classes_are_refused(tmp_path):
    path = write(tmp_path / "c.pkl", collections.Counter("aab"))
    with pytest.raises(ValueError, match=r"collections\.Counter, which is not a container or a NumPy array"):
        safe_pickle_load(path)


@pytest.mark.parametrize("keep", [1, 10, 0.5, 0.99, -1])
def test_truncated(tmp_path, keep):
    whole = pickle.dumps(GOOD)
    n = keep if isinstance(keep, int) else int(keep * len(whole))
    path = tmp_path / "t.pkl"
    path.write_bytes(whole[:n])
    with pytest.raises(ValueError, match="truncated") as error:
        safe_pickle_load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello world, this is text", b"\x80\x63", b"\x1f\x8b\x08\x00", b"\x00" * 40])
def test_not_a_pickle(tmp_path, content):
    path = tmp_path / "n.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"n\.pkl"):
        safe_pickle_load(path)


def test_every_prefix_is_an_error(tmp_path):
    whole = pickle.dumps({"a": np.arange(3), "b": [1, "x"]})
    path = tmp_path / "d.pkl"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"d\.pkl"):
            safe_pickle_load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pickle file"):
        safe_pickle_load(tmp_path / "none.pkl")


@pytest.mark.slow
def test_forged_and_random_pickles_in_a_process_of_their_own():
    count = 10_000  # `python -m tests.fuzz.pickles 100000 1` runs more, of another seed
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.pickles", str(count)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, f"ended with {done.returncode} in the case {done.stderr.splitlines()[-1:]}"
    facts = json.loads(done.stdout)
    assert facts["silent"] == []  # forged pickles that loaded
    assert facts["wrong"] == []  # other errors than a ValueError that names the file, and honest ones that were refused
    assert facts["random"] == count
    assert facts["refused"] + facts["loaded"] > count + 150
    assert facts["loaded"] > 400
    assert facts["grown"] < 200  # MiB


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.zeros(2, dtype=[("a", "<i4"), ("b", "O")]), "the dtype 'V12'; read are booleans, numbers, S, U and O"),
        (np.int32, r"numpy\.int32, which is not a container"),
        (np.array(["2020-01-01"], "M8[D]"), "the dtype 'M8'"),
        (np.array([[1], None], dtype=object), "an object array with a list; read are texts, numbers and None"),
        (range(10**10), r"would unfold to 1e\+10"),
        (10**100, "a number of 42 bytes"),
    ],
)
def test_what_is_no_plain_data_is_named(tmp_path, value, match):
    path = write(tmp_path / "p.pkl", value)
    with pytest.raises(ValueError, match=f"p.pkl: refused to read this pickle: it .*{match}"):
        safe_pickle_load(path)


def test_what_is_shared_stays_shared_and_cycles_are_refused(tmp_path):
    x = np.ones(3)
    back = safe_pickle_load(write(tmp_path / "s.pkl", {"a": x, "b": [x, x]}))
    assert back["a"] is back["b"][0] is back["b"][1]
    back["a"][0] = 5  # an array of its own, not a view of the file
    loop = [1]
    loop.append({"a": loop})
    with pytest.raises(ValueError, match="a container that holds itself"):
        safe_pickle_load(write(tmp_path / "l.pkl", loop))


def test_much_content(tmp_path):
    long = {"bytes": b"x" * 70_000, "array": bytearray(b"y" * 70_000), "text": "ä" * 70_000, "pair": (b"z" * 70_000, 1)}
    for protocol in range(6):
        back = safe_pickle_load(write(tmp_path / "l.pkl", long, protocol))
        assert back == long
        assert list(map(type, back.values())) == list(map(type, long.values()))


def test_python_2_text_encoding(tmp_path):
    (tmp_path / "t.pkl").write_bytes(b"\x80\x02U\x02\xc3\xa4.")
    assert safe_pickle_load(tmp_path / "t.pkl") == "Ã¤"
    assert safe_pickle_load(tmp_path / "t.pkl", encoding="utf-8") == "ä"
    (tmp_path / "line.pkl").write_bytes(b"(lp0\nS'\\xe4\\n'\np1\nag1\naI01\naL12L\na.")
    assert safe_pickle_load(tmp_path / "line.pkl") == ["ä\n", "ä\n", True, 12]


@pytest.mark.slow
@pytest.mark.real
def test_real_pickle(real_data):
    path = real_data / "mosi" / "mosi_conversation.pkl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    content = safe_pickle_load(path)
    assert {"text", "audio", "visual", "label", "trainVid"} <= set(content)
    assert len(content["label"]) == 93
