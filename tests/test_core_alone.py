"""The core, copied alone and renamed, imports and trains with torch and the standard library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmlib

ROOT = Path(mmlib.__file__).parent
CORE = [
    "_arrays.py",
    "_streams.py",
    "batch.py",
    "checks.py",
    "files.py",
    "missing",
    "coalitions.py",
    "losses.py",
    "gradients.py",
    "layers.py",
    "backbones",
    "methods",
    "baselines",
]

SCRIPT = '''
import builtins, sys

class Hook:
    """Forbids our package under its old name, and whatever our files import beyond torch and the standard library."""
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmlib":
            raise ImportError("mmlib is not here")
sys.meta_path.insert(0, Hook())

plain = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    top = name.partition(".")[0]
    if importer.partition(".")[0] == "copied" and level == 0:
        if top != "torch" and top not in sys.stdlib_module_names:
            raise ImportError(f"{importer} imports {name}")
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = guarded

import torch
from copied.backbones import GenericBackbone, GenericConfig
from copied.batch import MultimodalDataset
from copied.coalitions import shapley_values, subset_values
from copied.baselines import JointTraining
import copied.losses, copied.missing

torch.manual_seed(0)
present = copied.missing.imbalanced_mask(32, [0.3, 0.5], torch.Generator().manual_seed(0))
data = MultimodalDataset.from_arrays(
    {"a": torch.randn(32, 5, 3), "b": torch.randn(32, 4)}, torch.arange(32) % 3).drop(present=present)
method = JointTraining(GenericBackbone.for_data(data, width=8), modality_dropout=0.2)
optimiser = torch.optim.Adam(method.parameters(), 0.01)
losses = []
for step in range(3):
    loss = sum(method(data[:]).losses.values())
    optimiser.zero_grad(); loss.backward(); optimiser.step()
    losses.append(loss.item())
phi = shapley_values(subset_values(method.backbone, data[:]))
assert phi.shape == (32, 2) and all(x == x for x in losses), losses
print("trained", len(losses))
'''


@pytest.mark.slow
def test_core_copied_and_renamed_trains(tmp_path):
    missing = [name for name in CORE if not (ROOT / name).exists()]
    if missing:
        pytest.fail(f"the core lacks {missing}")
    package = tmp_path / "copied"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in CORE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, package / name)
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runpy; "
         f"runpy.run_path({str(tmp_path / 'train.py')!r})"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "trained 3"


def test_core_imports_are_relative_or_torch():
    files = [p for name in CORE for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    for path in files:
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*(?:from|import)\s+([\w.]+)", line):
                top = found[1].partition(".")[0]
                allowed = found[1].startswith(".") or top == "torch" or top in sys.stdlib_module_names
                assert allowed, f"{path.name}: {line.strip()}"
