"""What every test shares: the kernels' environment, where real data lies, and what a missing browser means."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent

# Kernels that nbval, papermill and the book's build start inherit both: mmlib is found from any folder, figures appear.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.pop("MPLBACKEND", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; also the same numbers everywhere
for folder in (ROOT / "tests", ROOT):  # test files import toys of each other
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


# The same examples in every run, so that a change is what makes a test fail; HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (``mnist/``, ``fsdd/``, ...), or a skip that says where it looked."""
    folder = Path(os.environ.get("MMLIB_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: set MMLIB_DATA to the folder that holds mnist/, fsdd/, ... (looked at {folder})")
    return folder
