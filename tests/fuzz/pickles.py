"""Forged and random pickles, and what reading them comes to: ``python -m tests.fuzz.pickles 10000`` from the root.

A reader that corrupts memory ends its process with a signal, so this runs in a process of its own. It prints one line
of JSON: how many pickles were loaded and refused, what broke the contract (another exception than a ValueError that
names the file), and by how many MiB the process grew.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

ADDRESS = b"\x41" * 8


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def raw(b: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(b)) + b


def number(n: int) -> bytes:
    return b"I%d\n" % n


def shape(*axes: int) -> bytes:
    return b"(" + b"".join(map(number, axes)) + b"t"


def dtype(code: str, state: bytes | None = b"(I3\nX\x01\x00\x00\x00<NNNI-1\nI-1\nI0\nt", copy: int = 1) -> bytes:
    """A dtype and its state, where it has one."""
    return (
        b"cnumpy\ndtype\n(" + text(code) + number(0) + number(copy) + b"tR" + (b"" if state is None else state + b"b")
    )


def array(axes: bytes, kind: bytes, data: bytes, fortran: bytes = b"\x89", version: int = 1) -> bytes:
    """An array by `_reconstruct` and its state."""
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btR"
    return start + b"(" + number(version) + axes + kind + fortran + data + b"tb"


def buffer(axes: bytes, kind: bytes, data: bytes, order: str = "C", more: bytes = b"") -> bytes:
    """An array by `_frombuffer`."""
    return b"cnumpy._core.numeric\n_frombuffer\n(" + data + kind + axes + text(order) + more + b"tR"


def scalar(kind: bytes, data: bytes) -> bytes:
    return b"cnumpy.core.multiarray\nscalar\n(" + kind + data + b"tR"


def call(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(".", "\n", 1).encode() + b"\n(" + b"".join(arguments) + b"tR"


def structured(
    kind: bytes, offset: int = 0, size: int = 8, flags: int = 0, names: bytes = b"(" + text("a") + b"t"
) -> bytes:
    """The state of a dtype with one field."""
    fields = b"}" + text("a") + b"(" + kind + number(offset) + b"ts"
    return b"(I3\n" + text("|") + b"N" + names + fields + number(size) + number(1) + number(flags) + b"t"


OBJECT = dtype("O8", b"(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI63\nt")
CLEARED = b"(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI0\nt"  # no flag says that these bytes are pointers
SUBARRAY = b"(I3\nX\x01\x00\x00\x00|(" + OBJECT + b"I1\n\x85tNNI8\nI8\nI0\nt"
F8 = dtype("f8")


def forged() -> dict[str, bytes]:
    """Pickles that ask for memory which is not theirs, for too much of it, or for other code; none may load."""
    v8 = dtype("V8", structured(OBJECT))
    cases = {
        "ndarray called": call("numpy.ndarray", shape(4), text("O"), raw(ADDRESS * 4)),
        "ndarray with strides": call("numpy.ndarray", shape(4), text("f8"), raw(ADDRESS), number(0), shape(1 << 40)),
        "ndarray without a buffer": call("numpy.ndarray", shape(1 << 40), text("f8")),
        "objects from a buffer": buffer(shape(4), OBJECT, raw(ADDRESS * 4)),
        "objects without their flag": buffer(shape(4), dtype("O8", CLEARED), raw(ADDRESS * 4)),
        "objects without their flag, rebuilt": array(shape(4), dtype("O8", CLEARED), raw(ADDRESS * 4)),
        "an object scalar": scalar(OBJECT, raw(ADDRESS)),
        "a structured buffer": buffer(shape(4), v8, raw(ADDRESS * 4)),
        "a structured array": array(shape(4), v8, raw(ADDRESS * 4)),
        "a structured scalar": scalar(v8, raw(ADDRESS)),
        "a structured f8": buffer(shape(4), dtype("f8", structured(OBJECT)), raw(ADDRESS * 4)),
        "a sub-array of objects": buffer(shape(4), dtype("V8", SUBARRAY), raw(ADDRESS * 4)),
        "a sub-array of objects, rebuilt": array(shape(4), dtype("V8", SUBARRAY), raw(ADDRESS * 4)),
        "a sub-array of objects, scalar": scalar(dtype("V8", SUBARRAY), raw(ADDRESS)),
        "a sub-array in f8": array(shape(4), dtype("f8", SUBARRAY), raw(ADDRESS * 4)),
        "a field far off": array(shape(1), dtype("V8", structured(F8, 10**6)), raw(ADDRESS)),
        "a negative field": array(shape(1), dtype("V8", structured(F8, -(10**6))), raw(ADDRESS)),
        "dates": array(shape(1), dtype("M8", CLEARED), raw(ADDRESS)),
        "dtype by a list": call("numpy.dtype", b"]((" + text("a") + text("O") + b"tl", number(0), number(1)),
        "dtype by commas": dtype("O,O"),
        "dtype by a sub-array": dtype("3f8"),
        "dtype without a state": buffer(shape(1), dtype("f8", None), raw(ADDRESS)),
        "dtype with its state twice": array(shape(1), F8 + CLEARED + b"b", raw(ADDRESS)),
        "dtype of another size": array(shape(1), dtype("f8", CLEARED.replace(b"I-1\nI-1", b"I800\nI8")), raw(ADDRESS)),
        "a state for a shared dtype": F8 + b"q\x01" + b"0" + b"h\x01" + structured(OBJECT) + b"b",
        "too few bytes": array(shape(10**6), F8, raw(ADDRESS)),
        "too many bytes": array(shape(1), F8, raw(ADDRESS * 2)),
        "a negative shape": array(shape(-1, -1), F8, raw(ADDRESS)),
        "a shape beyond 64 bits": array(shape(1 << 32, 1 << 32), dtype("i1"), raw(b"")),
        "a shape of overflowing bytes": array(shape(1 << 61), F8, raw(b"")),
        "an empty array of 2**62": array(shape(0, 1 << 62), F8, raw(b"")),
        "33 axes": array(shape(*[1] * 33), F8, raw(ADDRESS)),
        "a shape of floats": array(b"(F1.0\nt", F8, raw(ADDRESS)),
        "texts of no width": array(shape(10**6), dtype("S0"), raw(b"")),
        "texts of great width": array(shape(1), dtype("U999999999"), raw(b"")),
        "texts that are none": array(shape(2), dtype("U1"), raw(ADDRESS)),
        "booleans that are none": array(shape(8), dtype("b1"), raw(ADDRESS)),
        "an array's state twice": array(shape(1), F8, raw(ADDRESS))
        + b"(I1\n" + shape(4) + F8 + b"\x89" + raw(ADDRESS * 4) + b"tb",
        "an array as a list of objects": array(shape(2), F8, b"](I1\nI2\ne"),
        "objects as bytes": array(shape(1), OBJECT, raw(ADDRESS)),
        "objects of objects": array(shape(1), OBJECT, b"](]e"),
        "more objects than told": array(shape(2), OBJECT, b"](I1\ne"),
        "axes twice": buffer(shape(1, 1), F8, raw(ADDRESS), "K", shape(0, 0)),
        "axes that are not there": buffer(shape(1, 1), F8, raw(ADDRESS), "K", shape(0, 7)),
        "an array that holds itself": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btRq\x01"
        b"(I1\n" + shape(1) + OBJECT + b"\x89](h\x01etb",
        "an array without a state": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btR",
        "a list of names": b"](cnumpy\nndarray\ne",
        "a name as the value": b"cnumpy\nndarray\n",
        "a state for a name": b"cnumpy\nndarray\n}" + text("a") + b"Nsb",
        "slots of a name": b"cnumpy\ndtype\n(N}" + text("__setstate__") + b"Nstb",
        "a state for a list": b"]}b",
        "a new object": b"cnumpy\nndarray\n(I4\nt\x81",
        "a new object with keywords": b"cnumpy\nndarray\n)}\x92",
        "an old object": b"(cnumpy\nndarray\nI4\no",
        "an old instance": b"(I4\ninumpy\nndarray\n",
        "an extension": b"\x82\x01",
        "an extension of four bytes": b"\x84\xff\xff\xff\x7f",
        "a persistent id": b"Px\n",
        "a persistent id from the stack": b"I1\nQ",
        "a buffer outside": b"\x97",
        "bytes of 10**11": call("builtins.bytes", number(10**11)),
        "bytearray of 10**11": call("builtins.bytearray", number(10**11)),
        "list of a range": call("builtins.list", call("builtins.range", number(0), number(10**10), number(1))),
        "a range of 10**10": call("builtins.range", number(0), number(10**10), number(1)),
        "a range of 10**30": call("builtins.range", number(0), b"\x8a\x0d" + b"\x7f" * 13, number(1)),
        "a set of a range": call("builtins.set", call("builtins.range", number(0), number(10**10), number(1))),
        "complex of a text": call("builtins.complex", text("1" * 100)),
        "encode by another codec": call("_codecs.encode", text("a"), text("zip")),
        "a frame of 2**63": b"\x95" + b"\xff" * 7 + b"\x7fN",
        "bytes of 2**63": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "text of 2**64": b"\x8d" + b"\xff" * 8,
        "bytearray of 2**62": b"\x96" + struct.pack("<Q", 1 << 62),
        "bytes of 2**32": b"B\xff\xff\xff\xff",
        "a number of 2**31 bytes": b"\x8b\xff\xff\xff\x7f",
        "a number of -1 bytes": b"\x8b\xff\xff\xff\xff",
        "a number of 100,000 bytes": b"\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000,
        "a number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n",
        "a place of 2**31": b"Nr\xff\xff\xff\x7fj\xfe\xff\xff\x7f",
        "a negative place": b"Np-1\n",
        "a memo entry never stored": b"h\x07",
        "a list that holds itself": b"]q\x00h\x00a",
        "a dict that holds itself": b"}q\x00" + text("a") + b"h\x00s",
        "lists 100,000 deep": b"]" * 100_000 + b"a" * 99_999,
        "tuples 100,000 deep": b")" + b"\x85" * 100_000,
        "tuples 100,000 deep as a key": b"})" + b"\x85" * 100_000 + b"Ns",
        "tuples 100,000 deep in a set": b"\x8f()" + b"\x85" * 100_000 + b"\x90",
        "marks 100,000 deep": b"(" * 100_000 + b"t" * 100_000,
        "names 100,000 deep": b"cnumpy\nndarray\n" + b"\x85" * 100_000,
        "doubled 60 times": b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60)),
        "doubled as a key": b"})" + b"2\x86" * 60 + b"Ns",
        "an array 10,000 times": array(shape(10**4), F8, raw(ADDRESS * 10**4)) + b"q\x01](" + b"h\x01" * 10**4 + b"e",
        "copies without end": raw(b"x" * 10**6) + b"q\x010](" + b"".join(
            buffer(shape(10**6), dtype("i1"), b"h\x01") for _ in range(100)) + b"e",
        "a hundred sets of one list": b"](" + b"".join(map(number, range(10**4))) + b"eq\x01](" + call(
            "builtins.set", b"h\x01") * 100 + b"e",
        "a list as a key": b"}]Ns",
        "a set in a set": b"\x8f(\x8f\x90",
        "names of other code": b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
        "names by a path": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
        "a global that is no text": b"NN\x93",
        "nothing but an end": b"",
        "two values": b"NN",
        "an open mark": b"N(N",
        "an empty stack": b"a",
        "a key alone": b"}(Nu",
        "more after the end": b"N.N",
        "protocol 6": b"\x80\x06N",
        "a text without quotes": b"Sabc\n",
        "no instruction": b"\xff",
    }  # fmt: skip
    return {name: b"\x80\x04" * (name != "protocol 6") + content + b"." for name, content in cases.items()}


def honest() -> list[bytes]:
    """What data pickles hold, in every protocol."""
    g = np.random.default_rng(0)
    some = {
        "train": {"x": g.standard_normal((3, 2)).astype(np.float32), "id": np.array(["a", "bc"]), "n": [3, 1, 2]},
        "object": np.array(["v", None, 2.5, b"x", 7], object),
        "numbers": [1, -70_000, 1 << 40, 2.5, 1j, True, None, np.float32(1), np.int64(3), np.bool_(True)],
        "texts": ["", "ä", b"\xff", bytearray(b"abc"), np.str_("ab")],
        "sets": [{1, 2}, frozenset({"a"}), (1, (2, 3)), OrderedDict(a=1)],
        "odd": [np.asfortranarray(np.ones((2, 3), ">i2")), np.zeros((0, 3)), np.array(1.5), range(3)],
    }
    parts = [some, *some.values(), *some["odd"], ["same"] * 3]  # type: ignore[misc]
    return [pickle.dumps(part, protocol) for part in parts for protocol in range(6)]


def operations(data: bytes) -> list[bytes]:
    """A pickle cut into its instructions."""
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]


def random_pickles(count: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """``count`` pickles: sequences of instructions and forged pieces, and honest pickles that were damaged."""
    g = random.Random(seed)
    whole = honest()
    cut = [operations(data) for data in whole]
    known = [part for one in cut for part in one]
    bad = list(forged().values())
    pieces = [F8, OBJECT, dtype("U2"), dtype("V8", None), raw(ADDRESS), shape(1), shape(0, 3), b"NNN", b"\x89", b"I3\n"]
    pieces += [
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"c_codecs\nencode\n",
    ]
    pieces += [array(shape(1), F8, raw(ADDRESS)), scalar(F8, raw(ADDRESS)), buffer(shape(1), F8, raw(ADDRESS))]
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    for i in range(count):
        kind = i % 4
        if kind == 0:  # instructions in any order, most of them whole
            parts = [
                g.choice(
                    (g.choice(known), g.choice(pieces), g.choice(codes), b"(t", b"R", b"b", b"h%c" % g.randrange(9))
                )
                for _ in range(g.randrange(2, 40))
            ]
            data = b"\x80\x04" + b"".join(parts) + b"."
        elif kind == 1:  # honest instructions, some exchanged, lost, doubled, or from elsewhere
            parts = list(g.choice(cut))
            for _ in range(g.randrange(1, 3)):
                place = g.randrange(len(parts))
                parts[place : place + g.randrange(3)] = g.choice(
                    (
                        [],
                        [g.choice(known)],
                        [g.choice(pieces)],
                        [parts[place]] * 2,
                        [g.choice(parts)],
                        [g.choice(codes)],
                    )
                )
                parts = parts or [b"N"]
            data = b"".join(parts)
        else:  # bytes of honest or forged pickles
            damaged = bytearray(g.choice(whole) if kind == 2 else g.choice(bad)[:4000])
            for _ in range(g.randrange(1, 3)):
                place = g.randrange(len(damaged))
                change = g.randrange(4)
                if change == 0:
                    damaged[place] ^= 1 << g.randrange(8)
                elif change == 1:
                    damaged[place] = g.choice(codes)[0]
                elif change == 2:
                    del damaged[place : place + g.randrange(1, 9)]
                else:
                    damaged[place:place] = g.randbytes(g.randrange(1, 9))
                damaged = damaged or bytearray(b"N")
            data = bytes(damaged)
        yield f"random {i}", data


def use(value: object) -> None:
    """Touch every value, so that one which is not what it claims to be shows."""
    if isinstance(value, np.ndarray):
        value.tolist()
        if value.dtype.kind != "O":
            np.sort(value, axis=None)
    elif isinstance(value, dict):
        for key, item in value.items():
            hash(key)
            use(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            use(item)
    else:
        repr(value)


def main(count: int = 10_000, seed: int = 0) -> None:
    # The file itself, since importing the package would import torch, which takes longer than thousands of pickles
    source = Path(__file__).resolve().parents[2] / "mmlib" / "data" / "pickles.py"
    spec = importlib.util.spec_from_file_location("pickles", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    safe_pickle_load = module.safe_pickle_load
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, refused, wrong, silent = 0, 0, [], []
    cases = [(name, data, True) for name, data in forged().items()] if not seed else []
    cases += [(f"honest {i}", data, False) for i, data in enumerate(honest())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pkl"

        def attempt(name: str, data: bytes, must_fail: bool, must_load: bool) -> None:
            nonlocal loaded, refused
            path.write_bytes(data)
            print(name, file=sys.stderr, flush=True)  # the last one is what ended the process, if something does
            try:
                value = safe_pickle_load(path)
                use(value)
                loaded += 1
                if must_fail:
                    silent.append(name)
            except ValueError as error:
                refused += 1
                if str(path) not in str(error) or must_load:
                    wrong.append(f"{name}: {error}")
            except BaseException as error:  # whatever came instead
                wrong.append(f"{name}: {type(error).__name__}: {error}")

        for name, data, bad in cases:
            attempt(name, data, bad, not bad)
        for name, data in random_pickles(count, seed):
            attempt(name, data, False, False)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) >> 10
    facts = {"random": count, "loaded": loaded, "refused": refused, "silent": silent, "wrong": wrong, "grown": grown}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
