"""The CUDA kernels of `norm_lif`, run on the CPU from the same source, against the definition."""

import pytest
import torch
from cases import DYNAMICS, SURROGATES, currents, ids
from kernel_cases import DTYPES, Neuron, assert_equal, check_norm_lif

from spikeattn import ATan
from spikeattn.ops.norm_lif import cuda
from spikeattn.ops.norm_lif.cuda import norm_lif_backward_cuda, norm_lif_forward_cuda
from spikeattn.ops.norm_lif.reference import norm_lif_reference

pytestmark = pytest.mark.kernel

# (T, R, D): one warp to many a row, rows that do and do not fill them, loads of 1 to 8 elements, batches of steps that
# do and do not fill, one segment and several.
SIZES = [(1, 1, 1), (2, 3, 31), (7, 5, 33), (4, 2, 128), (32, 3, 129), (49, 2, 256), (3, 2, 512), (26, 2, 513)]
SIZES += [(3, 1, 1025), (7, 1, 2049), (5, 1, 4096), (200, 9, 5)]
EDGES = [(4, 3, 8), (5, 2, 24), (8, 2, 250), (3, 3, 251), (9, 2, 264), (13, 1, 512), (6, 2, 520), (5, 1, 1024)]
EDGES += [(T, 1, 256) for T in (1, 2, 3, 4, 67, 68, 69, 137)] + [(12, 1, 4095), (13, 1, 4096), (11, 1, 384)]


@pytest.fixture(params=[1, 1024], ids=["wide", "narrow"])
def busy(request, monkeypatch):
    """8 elements a thread on the way back, although so few rows keep no device busy, and fewer."""
    monkeypatch.setattr(cuda, "BUSY_WARPS", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_every_size_has_the_bits_of_the_definition(emulated, size, dtype):
    check_norm_lif(*size, dtype=dtype, masked=size[1] > 2, scalar_v0=size[1] == 2)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("size", EDGES, ids=ids)
def test_every_edge_of_a_tile_has_the_bits_of_the_definition(emulated, busy, size, dtype):
    check_norm_lif(*size, dtype=dtype, masked=size[1] > 1)


@pytest.mark.parametrize("D", [40, 256])
def test_tensors_that_are_not_aligned_are_loaded_one_by_one(emulated, busy, D):
    """Contiguous slices that start anywhere."""
    T, R, settings = 6, 3, Neuron().settings()
    for dtype in DTYPES:
        shifted = torch.empty(T * R * D + 1, dtype=dtype)[1:].view(T, R, D).copy_(currents(T, R, D, dtype=dtype))
        weight, bias, v0 = torch.randn(D), torch.randn(D), torch.randn(R, D)
        grads = torch.randn(T, R, D).to(dtype), torch.randn(R, D)
        results = []
        for x in (shifted, shifted.clone()):
            forward = norm_lif_forward_cuda(x, weight, bias, None, v0, T, 1e-5, *Neuron().forward())
            inputs = x, weight, bias, None, v0, *forward[2:]
            results.append((*forward, *norm_lif_backward_cuda(*grads, *inputs, T, *settings, "atan", 2.0)))
        assert_equal(results[0][:4], results[1][:4])
        for got, wanted in zip(results[0][4:], results[1][4:], strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("static", [False, True])
def test_padding_may_hold_any_number(emulated, busy, static):
    T, R, D = 5, 3, 256
    x, mask = currents(1 if static else T, R, D), torch.arange(R) == 1
    x[:, 1] = float("nan")
    weight, bias, v0 = torch.randn(D), torch.randn(D), torch.randn(R, D)
    forward = norm_lif_forward_cuda(x, weight, bias, mask, v0, T, 1e-5, *Neuron().forward())
    inputs = x, weight, bias, mask, v0, *forward[2:]
    grads = norm_lif_backward_cuda(torch.randn(T, R, D), None, *inputs, T, *Neuron().settings(), "atan", 2.0)
    assert all(grad.isfinite().all() for grad in (forward[0], *grads))
    assert not grads[0][:, 1].any()


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_every_neuron_has_the_bits_of_the_definition(emulated, dynamics):
    for static in (False, True):
        check_norm_lif(9, 4, 40, neuron=Neuron(*dynamics), static=static)
        check_norm_lif(9, 4, 40, neuron=Neuron(*dynamics), static=static, from_rest=True)


@pytest.mark.parametrize("D", [256, 384])
def test_a_static_input_goes_through_wide_tiles_too(emulated, busy, D):
    for T in (1, 8, 71):
        check_norm_lif(T, 2, D, static=True)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_every_surrogate_is_as_near_to_float64_as_the_definition(emulated, surrogate):
    check_norm_lif(6, 3, 70, surrogate=surrogate)


@pytest.mark.parametrize("size", [(3, 40, 20), (5, 9, 200), (2, 5, 1100)], ids=ids)
def test_more_rows_than_the_grid_has_are_reached_by_striding(emulated, busy, size, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_BLOCKS", 2)
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    monkeypatch.setattr(cuda, "BACKWARD_ELEMENTS", dict.fromkeys(cuda.BACKWARD_ELEMENTS, 2))
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
