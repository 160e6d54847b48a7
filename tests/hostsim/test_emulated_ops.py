"""The registered operations hand over to the CUDA calls, surrogates of one's own included."""

import math

import pytest
import torch
from cases import currents
from emulator import CUSTOM

from spikeattn import ATan, CustomSurrogate
from spikeattn.ops.norm_lif.op import norm_lif_kernels_take

pytestmark = pytest.mark.kernel

MINE = CustomSurrogate(
    primitive=lambda x: torch.atan(math.pi * x) / math.pi + 0.5,
    derivative=lambda x: 1 / (1 + (x * math.pi) * (x * math.pi)),
    cuda=CUSTOM,
)


@pytest.mark.parametrize("surrogate", [ATan(), MINE], ids=["built in", "custom"])
def test_lif_and_norm_lif_have_the_gradients_of_the_definition(emulated, surrogate):
    neuron = (10.0, True, 1.0, 0.0, False, surrogate.name, float(surrogate.alpha))
    weight, bias, mask = torch.randn(40), torch.randn(40), torch.arange(3) == 1
    results = {}
    for backend in ("torch", "cupy"):
        torch.manual_seed(0)
        x, v0 = currents(6, 3, 40).requires_grad_(), torch.zeros(()).expand(3, 40)
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        plain = torch.ops.spikeattn.lif_forward(x, v0, None, 6, *neuron, True, backend)
        grads = torch.autograd.grad(plain[0].sum() + plain[2].sum(), x)
        normed = torch.ops.spikeattn.norm_lif_forward(x, weight, bias, mask, v0, 6, 1e-5, *neuron, backend)
        summed = torch.autograd.grad((normed[0] * x.detach()).sum(), (x, weight, bias))
        results[backend] = ([*plain, *grads, *normed], summed)
    for wanted, got in zip(results["torch"][0], results["cupy"][0], strict=True):
        assert torch.equal(wanted, got)
    for wanted, got in zip(results["torch"][1], results["cupy"][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_rows_too_wide_for_the_kernels_are_refused_with_the_width():
    usable, reason = norm_lif_kernels_take("cupy", torch.zeros(1, 1, 5000), ATan())
    assert not usable
    assert "D = 5000" in reason
    assert norm_lif_kernels_take("cupy", torch.zeros(1, 1, 4096), ATan())[0]
