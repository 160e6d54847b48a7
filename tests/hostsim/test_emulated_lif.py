"""The CUDA kernels of `lif`, run on the CPU from the same source, against the definition."""

import pytest
import torch
from cases import DYNAMICS, RATIONAL, SURROGATES, currents, ids
from emulator import CUSTOM
from kernel_cases import DTYPES, STEPS, WIDTHS, Neuron, assert_equal, check_lif

from spikeattn import ATan
from spikeattn.ops.lif.cuda import lif_backward_cuda, lif_forward_cuda
from spikeattn.ops.lif.reference import lif_backward_reference, lif_reference

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", STEPS)
def test_every_length_and_width_has_the_bits_of_the_definition(emulated, T, dtype):
    for N in WIDTHS:
        check_lif(T, N, dtype=dtype, v_seq=N % 2 == 0, scalar_v0=N % 3 == 0)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_every_neuron_has_the_bits_of_the_definition(emulated, dynamics):
    for surrogate in RATIONAL:
        for tensor_tau in (False, True):
            for static in (False, True):
                check_lif(9, 33, neuron=Neuron(*dynamics), surrogate=surrogate, tensor_tau=tensor_tau, static=static)
    for T in (9, 200):
        check_lif(T, 33, neuron=Neuron(*dynamics), v_seq=False, from_rest=True)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_surrogate_is_as_near_to_float64_as_the_definition(emulated, surrogate, dtype):
    exact = surrogate in RATIONAL
    for detach_reset in (False, True):
        check_lif(7, 130, neuron=Neuron(None, detach_reset), surrogate=surrogate, dtype=dtype, exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_loads_give_what_narrow_ones_give(emulated, dtype, monkeypatch):
    monkeypatch.setattr("spikeattn.ops.lif.cuda.BUSY_THREADS", 1)  # so that few neurons, too, are loaded 16 bytes each
    for T in (4, 8, 16, 32, 40, 129):
        for tensor_tau in (False, True):
            check_lif(T, 264, dtype=dtype, tensor_tau=tensor_tau, static=T == 40)


@pytest.mark.parametrize("N", WIDTHS)
def test_more_blocks_than_the_grid_has_are_reached_by_striding(emulated, N, monkeypatch):
    monkeypatch.setattr("spikeattn.ops.lif.cuda.MAX_BLOCKS", 2)
    check_lif(5, N, tensor_tau=True)


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_spikes_hold_one_bit_a_neuron(emulated, N, dtype):
    x, v0 = currents(6, N, dtype=dtype), torch.zeros(N)
    spikes, v, _ = lif_forward_cuda(x, v0, None, 6, *Neuron().forward(), False)
    packed, v_packed, _ = lif_forward_cuda(x, v0, None, 6, *Neuron().forward(), False, packed=True)
    bits = packed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
    assert packed.shape == (6, -(-N // 32))
    assert torch.equal(bits.flatten(1)[:, :N].to(dtype), spikes)
    assert not bits.flatten(1)[:, N:].any()
    assert torch.equal(v, v_packed)


def test_strided_and_unaligned_inputs_give_the_same_bits(emulated):
    buffer = currents(1, 9 * 264 + 1)[0]
    slices = {
        "unaligned": buffer[1:].view(9, 264),
        "transposed": buffer[:-1].view(264, 9).T,
        "every other": currents(9, 528)[:, ::2],
    }
    for x in slices.values():
        v0, grads = torch.randn(528)[::2], (torch.ones(()).expand(9, 264), torch.randn(264))
        assert_equal(
            lif_forward_cuda(x, v0, None, 9, *Neuron().forward(), False),
            lif_reference(x, v0, None, 9, *Neuron().settings(), ATan()),
        )
        assert_equal(
            lif_backward_cuda(*grads, None, x, v0, None, 9, *Neuron().settings(), "atan", 2.0)[:2],
            lif_backward_reference(*grads, None, x, v0, None, 9, *Neuron().settings(), ATan())[:2],
        )


def test_a_surrogate_of_ones_own_reaches_the_backward(emulated):
    inputs = (torch.randn(5, 40), torch.randn(40), None, currents(5, 40), torch.zeros(40), None, 5)
    own = lif_backward_cuda(*inputs, *Neuron().settings(), "custom_0", 1.0, derivative=CUSTOM)
    assert_equal(own, lif_backward_cuda(*inputs, *Neuron().settings(), "atan", 2.0))


def test_nan_never_fires_and_stays_and_infinity_becomes_nan(emulated):
    x = torch.tensor([[float("nan"), float("inf"), 3.0], [3.0, 3.0, 3.0]])
    for v_reset in (0.0, None):
        got = lif_forward_cuda(x, torch.zeros(3), None, 2, *Neuron(v_reset).forward(), False)
        wanted = lif_reference(x, torch.zeros(3), None, 2, *Neuron(v_reset).settings(), ATan())
        assert torch.equal(got[0], wanted[0])
        torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0, equal_nan=True)


def test_no_neurons_at_all_launch_nothing(monkeypatch):
    monkeypatch.setattr("spikeattn.ops.lif.cuda.launch", None)
    spikes, v, _ = lif_forward_cuda(torch.zeros(3, 0), torch.zeros(0), None, 3, *Neuron().forward(), False)
    assert spikes.shape == (3, 0)
    assert v.shape == (0,)
    grads = lif_backward_cuda(
        torch.zeros(3, 0), torch.zeros(0), None, torch.zeros(3, 0), torch.zeros(0), None, 3,
        *Neuron().settings(), "atan", 2.0,
    )  # fmt: skip
    assert [grad.shape for grad in grads] == [(3, 0), (0,), (0,)]
