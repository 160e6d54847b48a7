"""Compare the CUDA calls with the definitions: the same comparisons on the emulator and on a device."""

import math
from typing import NamedTuple

import torch
from cases import currents
from torch import Tensor

from spikeattn.ops.lif.cuda import lif_backward_cuda, lif_forward_cuda
from spikeattn.ops.lif.reference import lif_backward_reference, lif_reference
from spikeattn.ops.norm_lif.cuda import norm_lif_backward_cuda, norm_lif_forward_cuda
from spikeattn.ops.norm_lif.reference import norm_lif_backward_reference, norm_lif_reference
from spikeattn.ops.spiking_attention.call import Inputs, Settings
from spikeattn.ops.spiking_attention.cuda import (
    attention_backward_cuda,
    attention_bits_cuda,
    attention_forward_cuda,
    attention_gradients_cuda,
)
from spikeattn.ops.spiking_attention.reference import Neuron as KernelNeuron
from spikeattn.ops.spiking_attention.reference import (
    attend_backward,
    masked,
    product,
    product_backward,
    spiking_attention_reference,
)
from spikeattn.ops.surrogate import ATan, Surrogate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T: one step, a batch of loads that does and does not fill, every length of a segment, checkpoints.
STEPS = [1, 2, 4, 7, 8, 9, 32, 33, 64, 128, 129, 161]
WIDTHS = [1, 31, 32, 33, 127, 128, 129, 1000]


class Neuron(NamedTuple):
    """Settings of a neuron, in the order of the cases."""

    v_reset: float | None = 0.0
    detach_reset: bool = False
    decay_input: bool = True
    tau: float = 10.0

    def forward(self) -> tuple:
        """What the forward is given after ``time_steps``."""
        return self.tau, self.decay_input, 1.0, self.v_reset

    def settings(self) -> tuple:
        """What the backward is given after ``time_steps``."""
        return (*self.forward(), self.detach_reset)


def check_lif(
    T: int,
    N: int,
    *,
    neuron: Neuron = Neuron(),
    surrogate: Surrogate = ATan(),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    static: bool = False,
    v_seq: bool = True,
    tensor_tau: bool = False,
    scalar_v0: bool = False,
    exact: bool = True,
    from_rest: bool = False,
) -> None:
    """Spikes and potentials bit for bit; gradients too if ``exact``, else as near to float64 as the definition.

    ``from_rest`` leaves out ``v0`` and ``grad_v``.
    """
    x = currents(1 if static else T, N, dtype=dtype)
    v0 = torch.full((), 0.5).expand(N) if scalar_v0 else torch.randn(N)
    v0 = torch.full((N,), neuron.v_reset or 0.0) if from_rest else v0
    r_tau = torch.tensor(1 / neuron.tau) if tensor_tau else None
    wanted = lif_reference(x, v0, r_tau, T, *neuron.settings(), surrogate, v_seq)
    grad_v = torch.zeros(N) if from_rest else torch.randn(N)
    grads = [torch.randn(T, N).to(dtype), grad_v, torch.randn(T, N) if v_seq else None]
    inputs = move([x, None if from_rest else v0, r_tau], device)
    got = lif_forward_cuda(*inputs, T, *neuron.forward(), v_seq)
    assert_equal(got, wanted)

    definition = lif_backward_reference(*grads, x, v0, r_tau, T, *neuron.settings(), surrogate)
    own = move([grads[0], None if from_rest else grad_v, grads[2]], device)
    result = lif_backward_cuda(*own, *inputs, T, *neuron.settings(), surrogate.name, surrogate.alpha)
    wanted_back = [definition[0], definition[1][:0] if from_rest else definition[1]]
    double = [None if tensor is None else tensor.double() for tensor in (*grads, x, v0, r_tau)]
    truth = lif_backward_reference(*double, T, *neuron.settings(), surrogate)
    if exact:
        assert_equal(result[:2], wanted_back)
    else:
        assert_near(result[:2], wanted_back, truth[:2])
    if tensor_tau and exact:
        assert_near(result[2:], definition[2:], truth[2:], terms=T * N)  # a sum in another order


def check_norm_lif(
    T: int,
    R: int,
    D: int,
    *,
    neuron: Neuron = Neuron(),
    surrogate: Surrogate = ATan(),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    static: bool = False,
    masked: bool = True,
    scalar_v0: bool = False,
    from_rest: bool = False,
) -> None:
    """Spikes, potentials, mean, rstd bit for bit; gradients as near to float64 as those of the definition."""
    x = currents(1 if static else T, R, D, dtype=dtype)
    weight, bias = torch.randn(D) + 1, torch.randn(D)
    mask = torch.arange(R) % 3 == 1 if masked else None
    v0 = torch.full((), 0.5).expand(R, D) if scalar_v0 else torch.randn(R, D)
    v0 = torch.full((R, D), neuron.v_reset or 0.0) if from_rest else v0
    wanted = norm_lif_reference(x, weight, bias, mask, v0, T, 1e-5, *neuron.settings(), surrogate)
    inputs = move([x, weight, bias, mask, None if from_rest else v0], device)
    got = norm_lif_forward_cuda(*inputs, T, 1e-5, *neuron.forward())
    assert_equal(got, wanted)

    grads = [torch.randn(T, R, D).to(dtype), torch.zeros(R, D) if from_rest else torch.randn(R, D)]
    saved = [x, weight, bias, mask, v0, *wanted[2:]]
    definition = norm_lif_backward_reference(*grads, *saved, T, *neuron.settings(), surrogate)
    own = move([grads[0], None if from_rest else grads[1]], device)
    result = norm_lif_backward_cuda(*own, *inputs, *got[2:], T, *neuron.settings(), surrogate.name, surrogate.alpha)
    double = [t if t is None or t.dtype == torch.bool else t.double() for t in (*grads, *saved)]
    truth = norm_lif_backward_reference(*double, T, *neuron.settings(), surrogate)
    assert_near(result[:3], definition[:3], truth[:3])
    if from_rest:
        assert result[3].shape == (0,)
        return
    assert_near(result[3:], definition[3:], truth[3:])
    if surrogate == ATan() and dtype == torch.float32:
        assert_equal(result[3:], definition[3:])


def attention_inputs(
    T: int, B: int, H: int, L: int, S: int, E: int, *, rate: float, dtype: torch.dtype, fire: str | None, masked: bool
) -> Inputs:
    """Of `check_attention`: spikes with strides as the module has them, and scales at which some neurons fire.

    The last dialogue's keys are padding alone.
    """
    q, k, v = ((torch.rand(T, B, n, H, E) < rate).to(dtype).transpose(2, 3) for n in (L, S, S))
    masks = (
        (torch.rand(B, L) < 0.3, torch.arange(S) >= torch.tensor([[S]] * (B - 1) + [[0]])) if masked else (None, None)
    )
    mean = E * rate**2 * (1 if fire == "map" else S * rate)  # of a sum of spikes
    scale = 2.0 ** (torch.randint(0, 4, (B, 1, L, 1)) + round(-math.log2(mean + 0.1)))
    return Inputs(q, k, v, scale[None], *masks)


def attention_settings(
    fire: str | None, order: str, causal: bool, neuron: Neuron = Neuron(), surrogate: Surrogate = ATan()
) -> Settings:
    """For the kernels on a device, or the emulator."""
    own = (neuron.tau, 1.0, neuron.v_reset, neuron.detach_reset, surrogate.name, surrogate.alpha)
    return Settings(fire, order, causal, *own, "cupy")


def check_attention(
    T: int,
    B: int,
    H: int,
    L: int,
    S: int,
    E: int,
    *,
    fire: str | None = "output",
    order: str = "map_first",
    causal: bool = False,
    masked: bool = False,
    odd: int | None = None,
    rate: float = 0.3,
    neuron: Neuron = Neuron(),
    surrogate: Surrogate = ATan(),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    exact: bool = True,
) -> None:
    """Results bit for bit, and, where the output fires, the gradient of the currents; bit for bit too if ``exact``."""
    inputs = attention_inputs(T, B, H, L, S, E, rate=rate, dtype=dtype, fire=fire, masked=masked)
    if odd is not None:  # q, k or v holds numbers that are no spikes
        inputs[odd].mul_(torch.randint(-2, 5, inputs[odd].shape) / 2)
    settings = attention_settings(fire, order, causal, neuron, surrogate)
    wanted = spiking_attention_reference(*inputs, *settings[:7], surrogate)
    on_device = Inputs(*move(list(inputs), device))
    got = attention_forward_cuda(on_device, settings)
    assert_equal([got.transpose(2, 3)], [wanted.transpose(2, 3).contiguous()])
    grad = torch.randn(T, B, L, H, E).to(dtype).transpose(2, 3)
    products = grad.double() * inputs.scale.double()
    if fire == "output":
        products = _check_attention_backward(grad, inputs, on_device, settings, surrogate, exact)
    got = attention_gradients_cuda(*move([grad], device), on_device, settings)
    if fire == "map":
        truths = _gradients_of_map(grad, inputs, causal, neuron, surrogate)
    else:
        truths = _gradients_of_products(products, *inputs, causal)
    _check_gradients(got, truths, *inputs)


def _gradients_of_products(grad, q, k, v, scale, query_mask, key_mask, causal) -> tuple[Tensor, ...]:
    """From that of the products, ``grad`` in float64."""
    own = (masked(x, mask, torch.float64) for x, mask in zip((q, k, v), (query_mask, key_mask, key_mask), strict=True))
    return product_backward(grad, *own, causal)


def _gradients_of_map(grad, inputs, causal, neuron, surrogate) -> tuple[Tensor, ...]:
    """The definition's in float64, with the neurons' own backward in float32: its spikes are those of the kernel."""
    q, k, v, scale, query_mask, key_mask = inputs
    own = (masked(x, mask, torch.float64) for x, mask in zip((q, k, v), (query_mask, key_mask, key_mask), strict=True))
    lif = (q.shape[0], neuron.tau, True, 1.0, neuron.v_reset, neuron.detach_reset)

    def at_rest(x: Tensor) -> Tensor:
        return torch.full_like(x[0], neuron.v_reset or 0.0)

    def fire(current: Tensor) -> Tensor:
        return lif_reference(current.float(), at_rest(current.float()), None, *lif, surrogate)[0].double()

    def gradient(grad_spikes: Tensor, current: Tensor) -> Tensor:
        single = [grad_spikes.float(), torch.zeros_like(current[0]).float(), None, current.float()]
        return lif_backward_reference(*single, at_rest(current.float()), None, *lif, surrogate)[0].double()

    kernels = KernelNeuron(fire, gradient)
    return attend_backward(grad.double(), *own, scale.double(), "map", "map_first", causal, kernels)


def _check_gradients(got, truths, q, k, v, scale, query_mask, key_mask) -> None:
    """As near to float64 as G, its sums and the result are rounded; laid out as the inputs; zero at padding."""
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 0.02}[q.dtype]
    masks = (query_mask, key_mask, key_mask)
    for result, truth, x, mask in zip(got, truths, (q, k, v), masks, strict=True):
        truth = masked(truth, mask, torch.float64)
        assert result.dtype == x.dtype
        assert result.stride() == torch.empty_like(x).stride()
        assert (result.cpu().double() - truth).abs().max() <= bound * truth.abs().max()


def _check_attention_backward(grad, inputs, on_device, settings, surrogate, exact) -> Tensor:
    """``scale dL/dY`` of ``inputs`` and of the same tensors ``on_device``; returns the definition's."""
    q, k, v, scale, *_ = inputs
    current = product(*inputs.masked(q, k, v), settings.order, settings.is_causal)
    definition, truth = (
        lif_backward_reference(
            grad.to(dtype), torch.zeros(q.shape[1:], dtype=dtype), None, (current * scale).to(dtype),
            torch.full(q.shape[1:], settings.v_reset or 0.0, dtype=dtype), None,
            q.shape[0], settings.tau, True, *settings[4:7], surrogate,
        )[0] * scale
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    bits = attention_bits_cuda(on_device, settings, False)
    result = attention_backward_cuda(*move([grad], on_device.q.device), on_device, settings, bits)[..., : q.shape[-1]]
    if exact:
        assert result.dtype == (torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32)
        assert_equal([result.contiguous()], [definition.to(result.dtype)])
    else:
        assert_near([result.contiguous()], [definition], [truth])
    return definition.double()  # whose spikes are those of the kernel


def move(tensors: list[Tensor | None], device: str | torch.device) -> list[Tensor | None]:
    """The tensors on a device; an expanded one stays expanded."""
    return [t if t is None or str(device) == "cpu" else t.to(device) for t in tensors]


def assert_equal(got, wanted) -> None:
    """Same types, shapes and bits, and contiguous memory."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert torch.equal(a.cpu(), b.cpu())


def assert_near(got, definition, truth, terms: int = 0) -> None:
    """At most twice as far from float64 as the definition is, and 1e-6 of the largest number.

    A sum of many ``terms`` about 1 can be near 0: it may be off by a unit of float32 for each.
    """
    for a, b, exact in zip(got, definition, truth, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = exact.abs().max() if exact.numel() else 0.0
        # 16-bit results are rounded once more, by half a unit of their last place.
        unit = 0.5 * torch.finfo(a.dtype).eps if a.dtype in (torch.float16, torch.bfloat16) else 0.0
        error, allowed = (a.cpu().double() - exact).abs(), 2 * (b.double() - exact).abs().max() + 1e-6 * scale
        allowed += terms * torch.finfo(torch.float32).eps
        assert (error <= allowed + unit * exact.abs()).all(), f"{error.max()} is over {allowed}"
