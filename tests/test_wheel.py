"""The built wheel works by itself, in an empty environment without extras."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import torch, spikeattn
from spikeattn import SpikingSelfAttention
out = SpikingSelfAttention(64)(torch.randn(4, 2, 5, 64))
assert out.shape == (4, 2, 5, 64) and sorted(out.unique().tolist()) == [0.0, 1.0], out
assert "site-packages" in spikeattn.__file__, spikeattn.__file__
print("attention ran")
"""


def test_wheel_runs_one_attention_layer_in_an_empty_environment(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("spikeattn-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"spikeattn/py.typed", "spikeattn/ops/lif/README.md", "spikemo_model/py.typed"} <= names
    assert "spikemo_model/templates/report.html" in names
    assert {"spikeattn/_cuda/spikeattn.cuh", "spikeattn/ops/lif/kernels.cu"} <= names
    assert {"spikeattn/ops/norm_lif/kernels.cu", "spikeattn/ops/spiking_attention/kernels.cu"} <= names
    assert not {name for name in names if name.startswith(("tests/", "examples/"))}

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check",
         "-c", str(ROOT / "constraints.txt"), str(wheel)],
        check=True,
    )  # fmt: skip
    run = subprocess.run([str(python), "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "attention ran" in run.stdout
    installed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert "lightning" not in installed
