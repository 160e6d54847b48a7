"""`backend_report` says what runs here and why not something else."""

import subprocess
import sys

import pytest
import torch

import spikeattn
from spikeattn import backend_report


def test_the_command_prints_versions_devices_and_every_choice():
    done = subprocess.run([sys.executable, "-m", "spikeattn"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert f"spikeattn {spikeattn.__version__}" in lines[0]
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("devices: CPU, ")
    for op in ("lif", "norm_lif", "spiking_attention"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert f"{op}, cpu, {dtype}: numba" in lines
        assert f"{op}, cpu, float64: torch (numba: float64 runs on the plain definition)" in lines
    assert "event_linear, cpu, float32: numba" in lines
    assert any(line.startswith("event_linear, cpu, bfloat16: torch (numba: only float32") for line in lines)


def test_a_missing_backend_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr("spikeattn._backends.why_no_numba", lambda: "numba cannot be imported (gone)")
    assert "lif, cpu, float32: torch (numba: numba cannot be imported (gone))" in backend_report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_input_is_answered_as_the_call_decides(dtype):
    x = torch.zeros(3, 4, 5, dtype=dtype)
    said = backend_report(x).splitlines()[-4:]
    assert [line.partition(",")[0] for line in said] == ["lif", "norm_lif", "spiking_attention", "event_linear"]
    for line in said:
        taken = line.partition(": ")[2].split(" ")[0]
        spikeattn.lif(x, backend=taken)
        if taken != "numba":
            with pytest.raises(spikeattn.BackendUnavailableError):
                spikeattn.lif(x, backend="numba")
