"""The peers, each at its best setting."""

from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from spikeattn import ATan
from spikeattn.ops.lif.reference import lif_reference

Model = Callable[[Tensor], Tensor]
COMPILED_STEPS = 16
NOT_COMPILED = f"unrolls the loop: compiling T > {COMPILED_STEPS} takes minutes"


def spikingjelly_lif(tau: float, v_threshold: float = 1.0) -> Model:
    """SpikingJelly 2.0.0: a Python loop, but on a GPU in float32 its fused kernel; reset before each call."""
    fire = surrogate.ATan()
    node = neuron.LIFNode(tau, v_threshold=v_threshold, detach_reset=True, surrogate_function=fire, step_mode="m")

    def run(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return run


def spikingjelly_fused(tau: float, low_state: bool) -> Model:
    """SpikingJelly 2.0.0's fused kernel for 16-bit inputs, which its module does not reach.

    ``low_state`` is its low-precision profile, potentials in the dtype of the input; else they are float32, as ours.
    """
    fire = surrogate.ATan()

    def run(x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1:], device=x.device)
        options = {"neuron_storage": x.dtype} if low_state else {}
        v = v.to(x.dtype) if low_state else v
        return functional.lif_multi_step(x, v, tau, surrogate_function=fire, detach_reset=True, **options)[0]

    return run


def loop(x: Tensor, tau: float, v_threshold: float = 1.0) -> Tensor:
    """The plain loop over T with autograd."""
    settings = (tau, True, v_threshold, 0.0, True, ATan())
    return lif_reference(x, x.new_zeros(x.shape[1:]), None, x.shape[0], *settings)[0]


def compiled(model: Model) -> Model:
    """``torch.compile`` of the whole of ``model``."""
    torch._dynamo.reset()  # else the cases together pass the limit of recompilations, and the rest runs uncompiled
    return torch.compile(model, fullgraph=True, dynamic=False)


def snntorch_lif(tau: float) -> Model:
    """snnTorch's Leaky, stepped in Python; its input is not divided by tau: another scale, the same work."""
    import snntorch

    leaky = snntorch.Leaky(beta=1 - 1 / tau, spike_grad=snntorch.surrogate.atan(alpha=2.0), reset_mechanism="zero")

    def run(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        spikes = []
        for x_t in x:
            s, v = leaky(x_t, v)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def norse_lif(tau: float) -> Model:
    """norse's LIF box neurons (no synaptic current), stepped by its own sequence lifting."""
    import norse.torch as norse

    parameters = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(1000.0 / tau), v_th=torch.tensor(1.0))
    layer = norse.Lift(norse.LIFBoxCell(parameters))

    def run(x: Tensor) -> Tensor:
        return layer(x)[0]

    return run
