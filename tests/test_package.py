"""The wheel holds the whole library and nothing else, and what is installed from it imports and trains."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import mmlib

ROOT = Path(__file__).resolve().parent.parent
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TRAINS = """
import mmlib, torch
from mmlib import MultimodalDataset
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
data = MultimodalDataset.from_arrays({"a": torch.randn(8, 3), "b": torch.randn(8, 2)}, torch.arange(8) % 2)
print(mmlib.__version__, mmlib.__file__, sum(JointTraining(GenericBackbone.for_data(data))(data[:]).losses.values()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what it is made of, so that the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "mmlib", source / "mmlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = target.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "mmlib").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == ours


@pytest.mark.slow
def test_what_is_installed_from_it_trains_in_a_clean_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n{TRAINS}"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, file, *_ = done.stdout.split()
    assert version == METADATA["version"]
    assert Path(file).is_relative_to(target)


def test_every_place_that_states_the_version_states_the_same() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert mmlib.__version__ == METADATA["version"] == citation["version"]
    assert citation["license"] == METADATA["license"]
