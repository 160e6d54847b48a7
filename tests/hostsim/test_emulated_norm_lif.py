"""The CUDA kernels of `norm_lif`, run on the CPU from the same source, against the definition."""

import pytest
import torch
from cases import DYNAMICS, SURROGATES, currents, ids
from kernel_cases import DTYPES, Neuron, assert_equal, check_norm_lif

from spikeattn import ATan
from spikeattn.ops.norm_lif.cuda import norm_lif_backward_cuda, norm_lif_forward_cuda
from spikeattn.ops.norm_lif.reference import norm_lif_reference

pytestmark = pytest.mark.kernel

# (T, R, D): a warp and 128 threads a row, rows that do and do not fill it, one segment and several.
SIZES = [(1, 1, 1), (2, 3, 31), (7, 5, 33), (4, 2, 128), (32, 3, 129), (49, 2, 256), (3, 2, 512), (26, 2, 513)]
SIZES += [(3, 1, 1025), (7, 1, 2049), (5, 1, 4096), (200, 9, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_every_size_has_the_bits_of_the_definition(emulated, size, dtype):
    check_norm_lif(*size, dtype=dtype, masked=size[1] > 2, scalar_v0=size[1] == 2)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_every_neuron_has_the_bits_of_the_definition(emulated, dynamics):
    for static in (False, True):
        check_norm_lif(9, 4, 40, neuron=Neuron(*dynamics), static=static)
        check_norm_lif(9, 4, 40, neuron=Neuron(*dynamics), static=static, from_rest=True)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_every_surrogate_is_as_near_to_float64_as_the_definition(emulated, surrogate):
    check_norm_lif(6, 3, 70, surrogate=surrogate)


@pytest.mark.parametrize("size", [(3, 40, 20), (5, 9, 200), (2, 5, 1100)], ids=ids)
def test_more_rows_than_the_grid_has_are_reached_by_striding(emulated, size, monkeypatch):
    monkeypatch.setattr("spikeattn.ops.norm_lif.cuda.MAX_BLOCKS", 2)
    monkeypatch.setattr("spikeattn.ops.norm_lif.cuda.MAX_PARTIALS", 4)
    check_norm_lif(*size)
    check_norm_lif(*size, static=True)


def test_more_axes_and_strides_than_one_row_needs(emulated):
    x = currents(4, 6, 3, 2).permute(0, 3, 2, 1)  # [T, B, L, D]
    weight, bias, v0, mask = torch.randn(6), torch.randn(6), torch.randn(2, 3, 6), torch.rand(3, 2).T < 0.5
    wanted = norm_lif_reference(x, weight, bias, mask, v0, 4, 1e-5, *Neuron().settings(), ATan())
    assert_equal(norm_lif_forward_cuda(x, weight, bias, mask, v0, 4, 1e-5, *Neuron().forward()), wanted)


def test_no_rows_at_all_launch_nothing(monkeypatch):
    monkeypatch.setattr("spikeattn.ops.norm_lif.cuda.launch", None)
    x, weight, v0 = torch.zeros(3, 0, 4), torch.ones(4), torch.zeros(0, 4)
    spikes, _, mean, rstd = norm_lif_forward_cuda(x, weight, weight, None, v0, 3, 1e-5, *Neuron().forward())
    assert spikes.shape == (3, 0, 4)
    grads = norm_lif_backward_cuda(
        spikes, v0, x, weight, weight, None, v0, mean, rstd, 3, *Neuron().settings(), "atan", 2.0
    )
    assert grads[1].tolist() == [0.0] * 4
