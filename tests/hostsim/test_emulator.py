"""The emulator sees the mistakes that it is there for."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from emulator import FLAGS, HERE, in_memory
from tiers import skip_without

pytestmark = pytest.mark.kernel

# Each thread writes a number to shared memory and reads the one of its opposite.
SOURCE = """
#include "hostsim.hpp"
#define SPK_STORAGE f32
#define SPK_PASTE_(name, storage) name##_##storage
#define SPK_PASTE(name, storage) SPK_PASTE_(name, storage)
void spk_swap_f32(const float* x, float* out)
{
    float* shared = reinterpret_cast<float*>(hostsim::dynamic_smem);
    shared[threadIdx.x] = x[threadIdx.x];
    BARRIER;
    out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
HOSTSIM_EXPORT(spk_swap)
"""


def swap(folder, barrier: str, backwards: bool) -> tuple[torch.Tensor, bytes | None]:
    """What the kernel writes with a barrier of this kind, and what the emulator says."""
    if shutil.which("g++") is None:
        skip_without("hostsim", "there is no g++")
    source, library = folder / "swap.cpp", folder / "swap.so"
    source.write_text(SOURCE)
    command = ["g++", *FLAGS, f"-I{HERE}", "-DHOSTSIM_STACK=65536", f"-DBARRIER={barrier}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    entry = ctypes.CDLL(str(library)).hostsim_spk_swap_f32
    entry.restype = ctypes.c_char_p
    x, out = torch.arange(64.0), torch.full((64,), -1.0)
    held = in_memory([x, out])
    params = (ctypes.c_void_p * 2)(*[ctypes.addressof(value) for value in held])
    one, block = (ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(64, 1, 1)
    return out, entry(one, block, 4 * 64, params, 2, int(backwards))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_missing_barrier_reads_what_nobody_wrote(tmp_path, backwards):
    out, problem = swap(tmp_path, "", backwards)
    assert problem is None
    assert out.isnan().any()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_barrier_orders_the_threads(tmp_path, backwards):
    out, problem = swap(tmp_path, "__syncthreads()", backwards)
    assert problem is None
    assert torch.equal(out, torch.arange(64.0).flip(0))


def test_a_barrier_that_some_threads_leave_out_is_reported(tmp_path):
    assert swap(tmp_path, "if (threadIdx.x) __syncthreads()", False)[1] == b"a barrier that not every thread reaches"
