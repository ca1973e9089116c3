"""Data pickles without their danger: a pickle is a program, and this reader runs only what rebuilds data.

Python's own unpickler is not used. Each instruction is carried out here, on values that the instructions can neither
call nor change otherwise; those for objects of other classes do not exist. NumPy never sees a state or a buffer that
was not checked before.
"""

from __future__ import annotations

import codecs
import math
import os
import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["safe_pickle_load"]

# Names that a pickle may ask for, and what they mean here. A name is no more than a mark on the stack.
_NUMPY = [f"numpy.{core}" for core in ("core", "_core")]  # NumPy 1 and 2
_PYTHON = ("builtins", "__builtin__")  # protocols 0 to 2 use Python 2's names
_NAMES = {
    **{(place, name): name for place in _PYTHON for name in ("bytearray", "bytes", "complex", "frozenset", "range")},
    **{(place, "set"): "set" for place in _PYTHON},
    ("__builtin__", "xrange"): "range",
    ("collections", "OrderedDict"): "OrderedDict",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes for Python 2
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{(f"{core}.multiarray", name): name for core in _NUMPY for name in ("_reconstruct", "scalar")},
    **{(f"{core}.numeric", "_frombuffer"): "_frombuffer" for core in _NUMPY},
}
_DTYPES = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9][0-9]{0,8}|O8?")
_ELEMENTS = (str, bytes, int, float, type(None), np.generic)  # of object arrays

_BIG = 1 << 16  # longer bytes stay in the file's own memory until an array takes them
_MOST = 5_000_000  # containers, and entries of the memo
_DEEPEST = 100  # containers within containers
_AMPLE = 64  # how often an honest file may repeat itself by reference: values per byte


class _Refused(ValueError):
    """A pickle that is whole, but asks for what this reader does not do."""


class _Name:
    """A global by its name."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: str, text: str):
        self.kind, self.text = kind, text


class _Pending:
    """An array or dtype whose state is still to come; the memo finds what it became in ``built``."""

    __slots__ = ("built", "code")

    def __init__(self, code: str | None):
        self.code = code  # of a dtype, None for an array
        self.built: Any = None


class _Raw:
    """Many bytes of the file that nobody has copied yet; ``kind`` is what they are, as in `_Reader._content`."""

    __slots__ = ("kind", "view")

    def __init__(self, view: memoryview, kind: str):
        self.view, self.kind = view, kind


class _Arguments(tuple):
    """A tuple with something that is no data in it: good for a call or a state, not as a value."""

    __slots__ = ()


_INTERNAL = frozenset({_Name, _Pending, _Raw, _Arguments})


class _Reader:
    """One pickle's stack, memo and place. Errors are ValueError, IndexError, TypeError and the like: see the caller."""

    def __init__(self, data: bytes, encoding: str):
        self.data, self.view, self.encoding = data, memoryview(data), encoding
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made = 0  # containers so far
        self.spent = 0  # values and bytes that were copied

    def run(self) -> Any:
        """The value that the pickle makes."""
        data, steps = self.data, _STEPS
        while True:
            code = data[self.at] if self.at < len(data) else self._end(1)
            self.at += 1
            if code == 0x2E:  # STOP
                break
            step = steps[code]
            if step is None:
                self._unknown(code)
            else:
                step(self)
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack) + len(self.marks)} values are left at its end, expected one")
        if rest := len(data) - self.at:
            raise ValueError(f"{rest} bytes follow its end")
        value = self._plain(self.stack.pop())
        _check_tree(value, len(data))
        return value

    # what instructions read

    def _end(self, n: int) -> int:
        raise ValueError(f"it is truncated: byte {len(self.data)} of at least {self.at + n} is its last")

    def _take(self, n: int) -> memoryview:
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            self.at = start
            self._end(n)
        return self.view[start : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            self._end(len(self.data) - self.at + 1)
        line, self.at = self.data[self.at : end], end + 1
        return line

    # what instructions may do

    def _spend(self, n: int) -> None:
        self.spent += n
        if self.spent > 4 * len(self.data):  # protocol 2 copies a text to bytes, and the bytes to an array
            raise _Refused(f"it makes more out of its {len(self.data)} bytes than they hold")

    def _container(self, value: Any) -> None:
        self.made += 1
        if self.made > _MOST:
            raise _Refused(f"it has more than {_MOST:,} containers")
        self.stack.append(value)

    def _plain(self, value: Any) -> Any:
        """A value as data, which is what goes into a container and what the caller gets."""
        kind = type(value)
        if kind is _Raw:
            self._spend(len(value.view))
            return self._copied(value.view, value.kind)
        if kind is _Arguments:
            return tuple(self._plain(part) for part in value)  # one level: `_tuple` leaves no more
        if kind is _Name:
            raise _Refused(f"it has {value.text} where a value belongs")
        if kind is _Pending:
            raise _Refused("it uses an array or dtype before its state")
        return value

    def _all_plain(self, values: list[Any]) -> list[Any]:
        return values if _INTERNAL.isdisjoint(map(type, values)) else [self._plain(value) for value in values]

    def _tuple(self, values: list[Any]) -> None:
        if _INTERNAL.isdisjoint(map(type, values)):
            self._container(tuple(values))
        else:
            self._container(_Arguments(self._plain(v) if type(v) is _Arguments else v for v in values))

    def _key(self, value: Any) -> Any:
        """A value that may be hashed: a number, text or bytes, or a flat tuple or frozenset of them.

        Whatever takes long to hash or to compare is paid for, since a memo can offer it again and again.
        """
        flat = type(value) in (tuple, frozenset)
        for part in value if flat else (value,):
            if not isinstance(part, (str, bytes, int, float, complex, type(None), np.generic)):
                raise _Refused(f"it has a {type(value).__name__} as a key or in a set")
            if type(part) is int and part.bit_length() > 64:
                raise _Refused("it has a number of more than 64 bits as a key or in a set")
            if isinstance(part, (str, bytes)) and len(part) > 1000:
                self._spend(len(part))
        if flat:
            self._spend(len(value))
        return value

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _target(self, *kinds: type) -> Any:
        """What an instruction adds to, on top of the stack."""
        target = self.stack[-1]
        if type(target) not in kinds:
            raise _Refused(f"it adds to a {type(target).__name__.lstrip('_')} as if it were a {kinds[0].__name__}")
        return target

    def _fill(self, target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a key without a value")
        values = self._all_plain(values)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self._key(key)] = value

    def _remember(self, place: int) -> None:
        if place < 0 or len(self.memo) >= _MOST:
            raise _Refused(
                f"its memo has more than {_MOST:,} entries" if place >= 0 else "a negative place in its memo"
            )
        self.memo[place] = self.stack[-1]

    def _recall(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError(f"it recalls entry {place} of its memo before storing it")
        value = self.memo[place]
        self.stack.append(value.built if type(value) is _Pending and value.built is not None else value)

    def _integer(self, line: bytes) -> None:
        if line in (b"00", b"01"):
            self.stack.append(line == b"01")
        elif len(line) <= 80:
            self.stack.append(int(line.removesuffix(b"L")))
        else:
            raise _Refused(f"it has a number of {len(line)} digits")

    def _long(self, n: int) -> None:
        if n > 32:
            raise _Refused(f"it has a number of {n} bytes")
        self.stack.append(int.from_bytes(self._take(n), "little", signed=True))

    def _content(self, size: int, kind: str) -> None:
        """Bytes or text with their length in ``size`` bytes before them."""
        n = self._number(size)
        view = self._take(n)
        self.stack.append(_Raw(view, kind) if n >= _BIG and kind != "unicode" else self._copied(view, kind))

    def _copied(self, view: memoryview, kind: str) -> Any:
        if kind == "unicode":
            return str(view, "utf-8", "surrogatepass")
        if kind == "text":
            return str(view, self.encoding)
        return bytearray(view) if kind == "bytearray" else bytes(view)

    def _string(self, line: bytes) -> None:
        """Python 2's repr of a string."""
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise ValueError(f"a string without quotes: {line[:20]!r}")
        self.stack.append(str(codecs.escape_decode(line[1:-1])[0], self.encoding))

    # names, calls and states

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        kind = _NAMES.get((module, name))
        if kind is None:
            place = module if module != "__builtin__" else "builtins"
            raise _Refused(f"it asks for {place}.{name}, which is not a container or a NumPy array")
        self.stack.append(_Name(kind, f"{module}.{name}"))

    def _named(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(module, name)

    def _call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) not in (tuple, _Arguments):
            raise _Refused("it calls what is not a known name, or without a tuple of arguments")
        self._container(self._made(name, arguments))

    def _made(self, name: _Name, arguments: tuple[Any, ...]) -> Any:
        """What a name with these arguments stands for: the forms that Python and NumPy write, and no other."""
        match name.kind, *arguments:
            case ["_reconstruct", _Name(kind="ndarray"), _, b"b" | "b"]:
                return _Pending(None)
            case ["dtype", str() as code, 0 | 1, 0 | 1]:
                if not _DTYPES.fullmatch(code):
                    raise _Refused(f"it has the dtype {code[:40]!r}; read are booleans, numbers, S, U and O")
                return _Pending(code)
            case ["scalar", np.dtype() as dtype, raw] if dtype.kind != "O":
                return self._array((), dtype, raw, "C")[()]
            case ["_frombuffer", raw, np.dtype() as dtype, shape, "C" | "F" as order] if dtype.kind != "O":
                return self._array(shape, dtype, raw, order)
            case ["_frombuffer", raw, np.dtype() as dtype, shape, "K", tuple() as axes] if dtype.kind != "O":
                x = self._array(shape, dtype, raw, "C")
                if not all(type(axis) is int for axis in axes) or sorted(axes) != list(range(x.ndim)):
                    raise _Refused(f"it has the axes {axes!r:.80} for an array of {x.ndim}")
                return x.transpose(axes)
            case ["encode", str() as text, "latin1" | "latin-1"] | ["bytearray", str() as text, "latin1" | "latin-1"]:
                self._spend(len(text))
                return text.encode("latin-1") if name.kind == "encode" else bytearray(text, "latin-1")
            case ["bytes"]:
                return b""
            case ["bytearray"]:
                return bytearray()
            case ["bytearray", _Raw(kind="bytes", view=view)]:
                return _Raw(view, "bytearray")
            case ["bytearray", bytes() as raw]:
                self._spend(len(raw))
                return bytearray(raw)
            case ["complex", float() as real, float() as imaginary]:
                return complex(real, imaginary)
            case ["range", int() as start, int() as stop, int() as step]:
                return range(start, stop, step)
            case ["set" | "frozenset" | "OrderedDict"]:
                return {"set": set, "frozenset": frozenset, "OrderedDict": OrderedDict}[name.kind]()
            case ["set" | "frozenset", list() as items]:
                self._spend(len(items))
                return (set if name.kind == "set" else frozenset)(map(self._key, items))
            case ["OrderedDict", list() as pairs] if all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
                self._spend(len(pairs))
                return OrderedDict((self._key(key), value) for key, value in pairs)
        kinds = ", ".join(type(a).__name__.lstrip("_") for a in arguments[:6])
        raise _Refused(f"it calls {name.text} with ({kinds}), which no writer of data does")

    def _build(self) -> None:
        """The state of an array or a dtype, field by field."""
        state, pending = self.stack.pop(), self.stack[-1]
        if type(pending) is not _Pending or pending.built is not None or type(state) not in (tuple, _Arguments):
            raise _Refused("it sets the state of something else than a new array or dtype")
        if pending.code is None:
            match state:
                case [0 | 1, shape, np.dtype() as dtype, 0 | 1 as fortran, raw]:
                    pending.built = self._array(shape, dtype, raw, "F" if fortran else "C")
                case _:
                    raise _Refused("it has an array whose state is not (1, shape, dtype, order, data)")
        else:
            match state:
                case [3, "<" | ">" | "|" | "=" as order, None, None, None, int() as size, int(), int()]:
                    dtype = np.dtype(pending.code.removesuffix("8") if pending.code[0] == "O" else pending.code)
                    if size not in (-1, dtype.itemsize):
                        raise _Refused(f"it has the dtype {pending.code} of {size} bytes an item")
                    pending.built = dtype if order in "|=" else dtype.newbyteorder(order)
                case _:
                    raise _Refused(
                        f"it has a dtype {pending.code} that is not a plain one: structured, sub-array and void "
                        f"dtypes and dates are not read"
                    )
        self.stack[-1] = pending.built

    def _array(self, shape: Any, dtype: np.dtype, raw: Any, order: str) -> Any:
        """A new array from a copy of exactly the bytes that it needs, or from a list of plain values."""
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise _Refused(f"it has an array of the shape {shape!r:.80}")
        count = math.prod(shape)
        if max(shape, default=0) > len(self.data):  # also where another axis is of length 0
            raise _Refused(f"it has an array of the shape {shape!r:.80} in {len(self.data)} bytes")
        if dtype.kind == "O":
            if type(raw) is not list or len(raw) != count:
                raise _Refused(f"it has an object array {shape} whose data are not a list of {count} values")
            if wrong := [type(v).__name__ for v in raw if not isinstance(v, _ELEMENTS)]:
                raise _Refused(f"it has an object array with a {wrong[0]}; read are texts, numbers and None")
            self._spend(count)
            x = np.empty(count, object)
            x[:] = raw
            return x.reshape(shape, order=order)  # type: ignore[call-overload]
        if type(raw) is _Raw:
            raw = raw.view if raw.kind != "text" else str(raw.view, self.encoding)
        if isinstance(raw, str):  # Python 2's
            raw = raw.encode("latin-1")
        if not isinstance(raw, (bytes, bytearray, memoryview)) or len(raw) != count * dtype.itemsize:
            found = f"{len(raw)} bytes" if hasattr(raw, "__len__") else f"a {type(raw).__name__}"
            raise _Refused(f"it has an array {shape} of {dtype} with {found}, expected {count * dtype.itemsize}")
        self._spend(len(raw))
        flat = np.frombuffer(raw, dtype) if count else np.empty(0, dtype)
        if meaningless(flat):
            raise _Refused(f"it has an array of {dtype} with values that are none")
        x = flat.reshape(shape, order=order)  # type: ignore[call-overload]
        return x.copy("K")

    def _unknown(self, code: int) -> None:
        known = next((op for op in pickletools.opcodes if ord(op.code) == code), None)
        if known is None:
            raise ValueError(f"no instruction has the code {code} (at byte {self.at - 1})")
        if known.name == "INST":
            self._global(self._line().decode(), self._line().decode())
        if "PERSID" in known.name:
            raise _Refused("it refers to objects outside the file (a persistent id)")
        raise _Refused(f"it uses the instruction {known.name}, which makes objects of other classes")

    # the rest of the instructions

    def _protocol(self) -> None:
        if (version := self._number(1)) > 5:
            raise _Refused(f"it is of protocol {version}; the newest that is read is 5")

    def _frame(self) -> None:
        if (n := self._number(8)) > len(self.data) - self.at:
            self._end(n)

    def _append(self) -> None:
        value = self._plain(self.stack.pop())
        self._target(list).append(value)

    def _appends(self) -> None:
        values = self._all_plain(self._pop_mark())
        self._target(list).extend(values)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self._target(dict, OrderedDict), [key, value])

    def _set_items(self) -> None:
        values = self._pop_mark()
        self._fill(self._target(dict, OrderedDict), values)

    def _add_items(self) -> None:
        values = self._all_plain(self._pop_mark())
        self._target(set).update(map(self._key, values))

    def _new_dict(self) -> None:
        made: dict[Any, Any] = {}
        self._fill(made, self._pop_mark())
        self._container(made)

    def _pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _tail(self, n: int) -> None:
        values = self.stack[-n:]
        if len(values) < n:
            raise IndexError("the stack has too few values")
        del self.stack[-n:]
        self._tuple(values)


_Step = Callable[[_Reader], Any]
_BY_NAME: dict[str, _Step] = {
    "PROTO": _Reader._protocol,
    "FRAME": _Reader._frame,
    "NONE": lambda r: r.stack.append(None),
    "NEWTRUE": lambda r: r.stack.append(True),
    "NEWFALSE": lambda r: r.stack.append(False),
    "INT": lambda r: r._integer(r._line()),
    "LONG": lambda r: r._integer(r._line()),
    "BININT": lambda r: r.stack.append(int.from_bytes(r._take(4), "little", signed=True)),
    "BININT1": lambda r: r.stack.append(r._number(1)),
    "BININT2": lambda r: r.stack.append(r._number(2)),
    "LONG1": lambda r: r._long(r._number(1)),
    "LONG4": lambda r: r._long(r._number(4)),
    "FLOAT": lambda r: r.stack.append(float(r._line())),
    "BINFLOAT": lambda r: r.stack.append(struct.unpack(">d", r._take(8))[0]),
    "STRING": lambda r: r._string(r._line()),
    "UNICODE": lambda r: r.stack.append(str(r._line(), "raw-unicode-escape")),
    "SHORT_BINSTRING": lambda r: r._content(1, "text"),
    "BINSTRING": lambda r: r._content(4, "text"),
    "SHORT_BINUNICODE": lambda r: r._content(1, "unicode"),
    "BINUNICODE": lambda r: r._content(4, "unicode"),
    "BINUNICODE8": lambda r: r._content(8, "unicode"),
    "SHORT_BINBYTES": lambda r: r._content(1, "bytes"),
    "BINBYTES": lambda r: r._content(4, "bytes"),
    "BINBYTES8": lambda r: r._content(8, "bytes"),
    "BYTEARRAY8": lambda r: r._content(8, "bytearray"),
    "EMPTY_TUPLE": lambda r: r.stack.append(()),
    "EMPTY_LIST": lambda r: r._container([]),
    "EMPTY_DICT": lambda r: r._container({}),
    "EMPTY_SET": lambda r: r._container(set()),
    "TUPLE": lambda r: r._tuple(r._pop_mark()),
    "TUPLE1": lambda r: r._tail(1),
    "TUPLE2": lambda r: r._tail(2),
    "TUPLE3": lambda r: r._tail(3),
    "LIST": lambda r: r._container(list(r._all_plain(r._pop_mark()))),
    "DICT": _Reader._new_dict,
    "FROZENSET": lambda r: r._container(frozenset(map(r._key, r._all_plain(r._pop_mark())))),
    "APPEND": _Reader._append,
    "APPENDS": _Reader._appends,
    "SETITEM": _Reader._set_item,
    "SETITEMS": _Reader._set_items,
    "ADDITEMS": _Reader._add_items,
    "MARK": _Reader._mark,
    "POP": _Reader._pop,
    "POP_MARK": _Reader._pop_mark,
    "DUP": lambda r: r.stack.append(r.stack[-1]),
    "PUT": lambda r: r._remember(int(r._line())),
    "BINPUT": lambda r: r._remember(r._number(1)),
    "LONG_BINPUT": lambda r: r._remember(r._number(4)),
    "MEMOIZE": lambda r: r._remember(len(r.memo)),
    "GET": lambda r: r._recall(int(r._line())),
    "BINGET": lambda r: r._recall(r._number(1)),
    "LONG_BINGET": lambda r: r._recall(r._number(4)),
    "GLOBAL": lambda r: r._global(r._line().decode(), r._line().decode()),
    "STACK_GLOBAL": _Reader._named,
    "REDUCE": _Reader._call,
    "BUILD": _Reader._build,
}
_STEPS: list[_Step | None] = [None] * 256
for _op in pickletools.opcodes:
    _STEPS[ord(_op.code)] = _BY_NAME.get(_op.name)


def meaningless(flat: np.ndarray) -> bool:
    """Whether a flat array holds booleans that are neither 0 nor 1, or characters beyond Unicode's last."""
    if not flat.size or flat.dtype.kind not in "bU":
        return False
    if flat.dtype.kind == "b":
        return bool(flat.view(np.uint8).max() > 1)
    return bool(flat.view(np.dtype("u4").newbyteorder(flat.dtype.byteorder)).max() > 0x10FFFF)


def _check_tree(top: Any, size: int) -> None:
    """Refuse values that hold themselves, lie too deep, or, written out in full, are far larger than their file."""
    known: dict[int, tuple[int, int]] = {}  # of a container: how much is in it, and how many levels
    around: set[int] = set()

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if not isinstance(value, (list, tuple, dict, set, frozenset)):
            content = getattr(value, "nbytes", 0) or (
                len(value) if isinstance(value, (str, bytes, bytearray, range)) else 0
            )
            return 1 + content, 0
        if id(value) in around:
            raise _Refused("it has a container that holds itself")
        amount, height = known.get(id(value), (0, 0))
        if depth + height > _DEEPEST:
            raise _Refused(f"it has more than {_DEEPEST} containers within each other")
        if amount:
            return amount, height
        amount = 1 + len(value)
        parts: Sequence[Any] = [*value.values(), *value.keys()] if isinstance(value, dict) else value  # type: ignore[assignment]
        if not set(map(type, parts)) <= {int, float, bool, type(None)}:
            around.add(id(value))
            for part in parts:
                more, levels = measure(part, depth + 1)
                amount, height = amount + more, max(height, levels)
            around.discard(id(value))
        known[id(value)] = amount, height + 1
        return amount, height + 1

    amount, _ = measure(top, 0)
    if amount > _AMPLE * size + 1000:
        raise _Refused(f"it would unfold to {amount:.3g} values and bytes, out of {size} bytes")


def safe_pickle_load(path: str | os.PathLike[str], encoding: str = "latin1") -> Any:
    """The data in a pickle file of protocol 0 to 5: containers, numbers, texts and plain NumPy arrays, nothing else.

    encoding : how 8-bit strings of Python 2 pickles are read; "latin1" keeps their arrays intact

    Read are None, booleans, integers of up to 256 bits, floats, complex numbers, str, bytes, bytearray, list, tuple,
    dict, OrderedDict, set, frozenset and range; NumPy's arrays and scalars of booleans, integers, floats and complex
    numbers of up to 64 bits a part, of S and U; and object arrays of texts, bytes, numbers and None. Keys and members
    of sets are texts, bytes, numbers, None, or tuples and frozensets of these.

    Nothing is imported or called by name, and no state reaches NumPy unchecked: an array is a copy of as many bytes of
    the file as its shape and dtype need. All copies together are bounded by four times the file's size, and the result,
    written out in full, by 64 values or bytes a byte. Containers lie at most 100 deep, and no more than 5,000,000 are
    read. The file itself is read into memory as a whole.

    Raises FileNotFoundError, and ValueError naming the file for everything else in it: other globals (by name), other
    dtypes (structured, sub-array, void, dates), instructions that make objects, containers that hold themselves, and
    files that are truncated, damaged, or go on after the pickle's end.
    """
    if not isinstance(path, (str, os.PathLike)):  # by hand, since this file needs no other
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    if not isinstance(encoding, str):
        raise TypeError(f"encoding: expected a string, got {type(encoding).__name__}")
    path = Path(path)
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding: expected one that Python knows, got {encoding!r}") from error
    if not path.is_file():
        raise FileNotFoundError(f"path: no pickle file at {path}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: the file is empty, expected a pickle")
    try:
        return _Reader(data, encoding).run()
    except _Refused as error:
        raise ValueError(f"{path}: refused to read this pickle: {error}") from error
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: the pickle is truncated or damaged ({reason}); copy or download it again") from error
