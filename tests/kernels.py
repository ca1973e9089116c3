"""Run a command on the arithmetic of another CPU: ``python tests/kernels.py COMMAND ARGUMENT...``.

Training follows the CPU's kernels, so the same run gives other digits elsewhere. PyTorch, oneDNN and MKL can be told to
use those of an old CPU. A probe, a short training, is printed as it comes out here and there; where the numbers do not
differ, the command would prove nothing and is not run (exit 1), unless this CPU has no better kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

OLD_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}

PROBE = """
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.randn(256, 24, 16), torch.randint(0, 5, (256,))
net = torch.nn.Sequential(torch.nn.Conv1d(24, 32, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(448, 5))
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for _ in range(30):
    loss = torch.nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(torch.backends.cpu.get_cpu_capability(), f"{loss.item():.9f}", f"{net[0].weight.sum().item():.9f}")
"""


def probe(**environment: str) -> list[str]:
    """The kernels' name and two numbers of a short training."""
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, env={**os.environ, **environment}, text=True, stdout=-1, check=True).stdout.split()


def main(command: list[str]) -> int:
    """Print the probe, then run ``command`` on the old CPU's kernels; its exit status."""
    here, there = probe(), probe(**OLD_CPU)
    print("kernels here:", *here)
    print("kernels there:", *there, "with", " ".join(f"{k}={v}" for k, v in OLD_CPU.items()), flush=True)
    if here[1:] == there[1:]:
        print("The numbers do not differ.", flush=True)
        if here[0] not in ("DEFAULT", "NO AVX"):
            return 1
    return subprocess.run(command, env={**os.environ, **OLD_CPU}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
