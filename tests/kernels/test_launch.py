"""What a launch does with CuPy and PyTorch, both of which are stood in for: there is no device."""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from spikeattn._cuda import module
from spikeattn._cuda.launch import LaunchPlan, _cupy_stream, launch, launches
from spikeattn._cuda.source import OPTIONS, Program, assemble

PLAN = LaunchPlan("spk_lif_forward_f32", (3, 1, 1), (128, 1, 1), 16)
PROGRAM = Program("lif", "forward", "f32", (("kVector", 1),))


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that notes what it is asked for."""
    log = types.SimpleNamespace(compiled=[], launched=[], streams=[], device=0)

    class RawModule:
        def __init__(self, code, options):
            log.compiled.append((code, options))

        def get_function(self, name):
            return types.SimpleNamespace(kernel=lambda *args: log.launched.append((name, *args)))

    def from_external(stream):
        log.streams.append(stream.__cuda_stream__())
        return log.streams[-1]

    fake = types.ModuleType("cupy")
    fake.RawModule = RawModule
    fake.cuda = types.SimpleNamespace(Stream=types.SimpleNamespace(from_external=from_external))
    monkeypatch.setitem(sys.modules, "cupy", fake)

    @contextlib.contextmanager
    def device(device):
        before, log.device = log.device, device.index
        yield
        log.device = before

    monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: log.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77 + log.device))
    _cupy_stream.cache_clear()
    yield log
    _cupy_stream.cache_clear()


def test_a_launch_passes_the_plan_on_the_current_stream(cupy):
    x, before = torch.zeros(3), launches[PLAN.kernel]
    launch(PLAN, PROGRAM, [x, None, 5, 0.5], torch.device("cuda"))
    ((name, grid, block, args, shared, stream),) = cupy.launched
    assert (name, grid, block, shared, stream) == (*PLAN[:4], (0, 77))
    assert args == [x.data_ptr(), 0, 5, 0.5]
    assert type(args[3]) is np.float32  # a float of Python would be passed as a double
    assert launches[PLAN.kernel] == before + 1


def test_another_device_is_the_current_one_for_the_launch_only(cupy):
    launch(PLAN, PROGRAM, [], torch.device("cuda", 1))
    assert cupy.device == 0
    launch(PLAN, PROGRAM, [], torch.device("cuda"))
    assert [launched[-1] for launched in cupy.launched] == [(0, 78), (0, 77)]
    assert list(module._kernels) == [(PROGRAM, PLAN.kernel, 1), (PROGRAM, PLAN.kernel, 0)]


def test_a_program_is_compiled_once_for_each_device(cupy):
    for device in (0, 0, 1, 1, 0):
        launch(PLAN, PROGRAM, [], torch.device("cuda", device))
    assert cupy.compiled == [(assemble(PROGRAM), OPTIONS)] * 2
    launch(PLAN, PROGRAM._replace(storage="bf16"), [], torch.device("cuda"))
    assert len(cupy.compiled) == 3
    assert len(cupy.launched) == 6


def test_a_plan_over_the_limits_compiles_nothing(cupy):
    with pytest.raises(ValueError, match="not empty"):
        launch(PLAN._replace(grid=(0, 1, 1)), PROGRAM, [], torch.device("cuda"))
    assert not cupy.compiled
