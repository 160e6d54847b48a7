"""What is said of a machine that cannot run the CUDA kernels, and what helps."""

import subprocess
import sys
import types

import pytest
import torch

from spikeattn import BackendUnavailableError
from spikeattn._backends import backend_status, resolve_backend
from spikeattn._cuda import neuron
from spikeattn._cuda.status import _status
from spikeattn.ops.surrogate import SURROGATES


@pytest.fixture(autouse=True)
def _fresh():
    _status.cache_clear()
    yield
    _status.cache_clear()


def fake_cupy(monkeypatch, version=lambda: (12, 9), path=None, headers=None):
    """A CuPy that imports, and what it finds."""
    cupy, pathfinder = types.ModuleType("cupy"), types.ModuleType("cuda.pathfinder")
    nvrtc = types.SimpleNamespace(getVersion=version)
    cupy.__version__, cupy.cuda = "14", types.SimpleNamespace(nvrtc=nvrtc, get_cuda_path=lambda: path)
    pathfinder.find_nvidia_header_directory = lambda name: headers
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    monkeypatch.setattr("spikeattn._cuda.status.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_missing_cupy_is_named_with_the_cure(monkeypatch):
    monkeypatch.setattr("spikeattn._cuda.status.find_spec", lambda name: None)
    usable, reason = _status()
    assert not usable
    assert 'cupy is not installed (pip install "spikeattn[cuda1' in reason
    with pytest.raises(BackendUnavailableError, match='backend "cupy" is not usable: cupy is not installed'):
        resolve_backend("cupy", torch.device("cuda"), "lif")
    assert resolve_backend("auto", torch.device("cuda"), "lif") == "torch"


def test_a_broken_cupy_is_named_with_its_first_line(monkeypatch):
    fake_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cupy is installed and does not import: ModuleNotFoundError" in _status()[1]


def test_a_missing_device_is_named(monkeypatch):
    fake_cupy(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _status() == (False, "PyTorch finds no CUDA device")


def test_a_missing_compiler_is_named(monkeypatch):
    def missing():
        raise RuntimeError("\n====\nCuPy failed to load libnvrtc.so.12: no such file\n====")

    fake_cupy(monkeypatch, version=missing)
    assert "cupy finds no NVRTC: RuntimeError: CuPy failed to load libnvrtc.so.12: no such file (pip" in _status()[1]


def test_missing_headers_are_named(monkeypatch):
    fake_cupy(monkeypatch)
    assert "cupy finds no CUDA headers and compiles nothing without them (pip install" in _status()[1]


@pytest.mark.parametrize("found", [{"path": "somewhere"}, {"headers": "somewhere"}])
def test_a_complete_one_is_usable_and_preferred(monkeypatch, found):
    fake_cupy(monkeypatch, **found)
    assert backend_status("cuda")[0] == ("cupy", True, "CuPy 14, NVRTC 12.9")
    assert resolve_backend("auto", torch.device("cuda"), "lif") == "cupy"
    assert [status.name for status in backend_status("cpu")][-1] == "torch"


def test_numbers_of_surrogates_are_those_of_the_device_code():
    assert tuple(SURROGATES) == neuron.SURROGATES


def test_importing_the_calls_imports_no_cupy():
    code = "import sys, spikeattn, spikeattn.ops.lif.cuda, spikeattn.ops.norm_lif.cuda; print('cupy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
