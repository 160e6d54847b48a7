"""What a launch does with CuPy and PyTorch, both of which are stood in for: there is no device."""

import contextlib
import sys
import types

import pytest
import torch

from spikeattn._cuda import module
from spikeattn._cuda.launch import LaunchPlan, launch, launches
from spikeattn._cuda.source import OPTIONS, Program, assemble

PLAN = LaunchPlan("spk_lif_forward_f32", (3, 1, 1), (128, 1, 1), 16)
PROGRAM = Program("lif", "forward", "f32", (("kVector", 1),))


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that notes what it is asked for."""
    log = types.SimpleNamespace(compiled=[], launched=[], streams=[])

    class RawModule:
        def __init__(self, code, options):
            log.compiled.append((code, options))

        def get_function(self, name):
            return lambda *args, **kwargs: log.launched.append((name, args, kwargs, log.streams[-1]))

    @contextlib.contextmanager
    def from_external(stream):
        log.streams.append(stream.__cuda_stream__())
        yield

    fake = types.ModuleType("cupy")
    fake.RawModule = RawModule
    fake.cuda = types.SimpleNamespace(Stream=types.SimpleNamespace(from_external=from_external))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))
    return log


def test_a_launch_passes_the_plan_on_the_current_stream(cupy):
    x, before = torch.zeros(3), launches[PLAN.kernel]
    launch(PLAN, PROGRAM, [x, None, 5, 0.5], torch.device("cuda"))
    ((name, (grid, block, args), keywords, stream),) = cupy.launched
    assert (name, grid, block, keywords, stream) == (*PLAN[:3], {"shared_mem": 16}, (0, 77))
    assert [arg.item() for arg in args] == [x.data_ptr(), 0, 5, 0.5]
    assert launches[PLAN.kernel] == before + 1


def test_a_program_is_compiled_once_for_each_device(cupy, monkeypatch):
    for device in (0, 0, 1, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        launch(PLAN, PROGRAM, [], torch.device("cuda", device))
    assert cupy.compiled == [(assemble(PROGRAM), OPTIONS)] * 2
    launch(PLAN, PROGRAM._replace(storage="bf16"), [], torch.device("cuda"))
    assert len(cupy.compiled) == 3
    assert len(cupy.launched) == 6


def test_a_plan_over_the_limits_compiles_nothing(cupy):
    with pytest.raises(ValueError, match="not empty"):
        launch(PLAN._replace(grid=(0, 1, 1)), PROGRAM, [], torch.device("cuda"))
    assert not cupy.compiled
