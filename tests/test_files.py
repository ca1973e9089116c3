"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmlib.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


def test_the_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "rows.csv"
    before = os.umask(0o027)
    try:
        atomic_write(path, b"first, longer")
        atomic_write(str(path), memoryview(b"second"))
    finally:
        os.umask(before)
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_atomic_write_keeps_the_old_file_where_the_limit_on_size_is_hit(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from mmlib.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    atomic_write(sys.argv[1], b'x' * 5000)\n"
        "except OSError as error:\n    print(error)\n"
    )
    path = tmp_path / "rows.csv"
    atomic_write(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "rows.csv could not be written (File too large)" in done.stdout
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_way_is_said_and_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(OSError, match=r"rows\.csv could not be written"):
        atomic_write(tmp_path / "rows.csv", b"new")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "other.csv", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_what_a_killed_writer_left_is_swept_but_no_living_writers_file(tmp_path: Path) -> None:
    script = (
        "import os, runpy, sys, time\n"
        "write = runpy.run_path('mmlib/files.py')['atomic_write']\n"
        "os.replace = lambda *_: (print('written', flush=True), time.sleep(600))\n"
        "write(sys.argv[1], b'new')\n"
    )
    path = tmp_path / "rows.csv"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        atomic_write(path, b"other")
        (left,) = tmp_path.glob(".rows.csv.*.tmp")  # it may still be at work
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    stranger = tmp_path / ".rows.csv.backup.tmp"
    stranger.touch()
    atomic_write(path, b"one")
    assert left.exists()
    long_ago = left.stat().st_mtime - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    atomic_write(path, b"two")
    assert {f.name for f in tmp_path.iterdir()} == {"rows.csv", stranger.name}
    left.touch()
    atomic_write(path, b"three", locked=True)  # nobody else writes it: whatever is there was left
    assert {f.name for f in tmp_path.iterdir()} == {"rows.csv", stranger.name}
