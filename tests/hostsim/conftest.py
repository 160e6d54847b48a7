"""The CUDA calls of the ops run on the emulator, in both orders of threads."""

import shutil

import pytest
from emulator import Emulator
from tiers import skip_without

CALLERS = ("spikeattn.ops.lif.cuda.launch", "spikeattn.ops.norm_lif.cuda.launch")


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
        monkeypatch.setattr(caller, emulator.launch)
    return emulator
