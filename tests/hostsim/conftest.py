"""The CUDA calls of the ops run on the emulator, in both orders of threads."""

import shutil
from importlib import import_module

import pytest
from emulator import Emulator
from tiers import skip_without

CALLERS = [import_module(f"spikeattn.ops.{op}.cuda") for op in ("lif", "norm_lif", "spiking_attention")]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    """The kernels, compiled for the CPU once."""
    if shutil.which("g++") is None:
        skip_without("hostsim", "there is no g++")
    return Emulator(tmp_path_factory.mktemp("hostsim"))


@pytest.fixture(params=["forwards", "backwards"])
def emulated(request, emulator, monkeypatch, poisoned) -> Emulator:
    """Launches go to the emulator; a missing barrier shows in at least one order of threads."""
    emulator.reversed = request.param == "backwards"
    for caller in CALLERS:
        monkeypatch.setattr(caller, "launch", emulator.launch)
        for function in vars(caller).values():
            if hasattr(function, "cache_clear"):  # plans, which tests change the limits of
                function.cache_clear()
    return emulator
