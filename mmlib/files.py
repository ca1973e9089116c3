"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
from pathlib import Path

__all__ = ["atomic_write"]


STALE = 24 * 3600.0  # seconds after which nobody writes on


def atomic_write(path: str | os.PathLike[str], content: bytes | memoryview, *, locked: bool = False) -> None:
    """Replace the file as a whole: readers see the old content or the new, even if the machine stops in between.

    What a writer that was killed left beside the file is removed after a day.

    locked : no other process writes this file now (the caller holds a lock on it): leftovers are removed at once

    Raises OSError with the reason (a full disk, no permission); the old file is then untouched.
    """
    for name, given, kinds, words in (  # by hand, since this file needs no other
        ("path", path, (str, os.PathLike), "a path"),
        ("content", content, (bytes, bytearray, memoryview), "bytes"),
        ("locked", locked, bool, "True or False"),
    ):
        if not isinstance(given, kinds):
            raise TypeError(f"{name}: expected {words}, got {type(given).__name__}")
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path, 0.0 if locked else STALE)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno, f"{path.name} could not be written ({error.strerror}); what was stored before is untouched"
        ) from error
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(path: Path, age: float) -> None:
    """Remove temporary files of this path that nobody wrote to for so many seconds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"):  # the names that mkstemp gives
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= age:
                left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
