"""Networks of our neurons as NIR graphs (Neuromorphic Intermediate Representation), and back.

spikingjelly's ``nir_exchange`` does the work, on its own neurons in the place of ours: what it knows of layers, shapes
and files holds here. NIR's neurons are in continuous time, tau in seconds; ours count time steps of ``dt`` seconds.
Pedersen et al. 2024 (doi 10.1038/s41467-024-52259-9), discretised by forward Euler as in spikingjelly::

    nir.LIF   tau = tau_steps * dt    r = 1 (decay_input) or tau_steps    v_leak = v_reset
    nir.IF    r = 1 / dt

NIR has no soft reset, no surrogate and no normalisation, and its ParametricLIF is a LIF.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, fx, nn

from spikeattn._backends import Backend
from spikeattn.nn.neuron import IF, LIF, ParametricLIF
from spikeattn.nn.projection import SpikingLinear
from spikeattn.ops.surrogate import Sigmoid


def to_nir(net: nn.Module, example_input: Tensor, path: str | Path | None = None, *, dt: float = 1e-4) -> Any:
    """Export a network of `LIF`, `IF`, `ParametricLIF` and the layers that spikingjelly exports.

    Args:
        net: The network; it stays as it is.
        example_input: One input [T, B, *N], for the shapes that NIR writes down.
        path: A file to write, too.
        dt: Length of a time step in seconds.

    Returns:
        ``nir.NIRGraph``, the one that spikingjelly exports of the same network of its neurons.

    Raises:
        ImportError: nir or nirtorch is missing.
        NotImplementedError: A neuron has a soft reset; a layer has a norm, for which NIR has no node.
        ValueError: A tau is infinite.

    Example:
        >>> graph = to_nir(nn.Sequential(nn.Linear(3, 2), LIF(tau=20.0)), torch.zeros(5, 1, 3), dt=1e-3)
        >>> sorted(type(node).__name__ for node in graph.nodes.values())
        ['Affine', 'Input', 'LIF', 'Output']
    """
    exchange = _nir_exchange()
    if any(isinstance(module, SpikingLinear) for module in net.modules()):
        raise NotImplementedError("to_nir: net must have no spiking layer with a norm: NIR has no node for LayerNorm.")
    twins: dict[int, nn.Module] = {}
    for name, module in net.named_modules():
        if isinstance(module, LIF | IF | ParametricLIF):
            if module.v_reset is None:
                raise NotImplementedError(f"to_nir: v_reset must be a number, got None in {name!r}; NIR has no other.")
            if isinstance(module, LIF) and math.isinf(module.tau):
                raise ValueError(f"to_nir: tau must be finite, got inf in {name!r}. Is IF meant?")
            twins[id(module)] = _twin(module)
    # Given what to put for our neurons, deepcopy puts it in and copies no state, which may hang on a graph.
    return exchange.export_to_nir(copy.deepcopy(net, twins), example_input, path, dt)


def from_nir(
    graph: Any,
    *,
    dt: float = 1e-4,
    leak: Literal["fixed", "learned"] = "fixed",
    surrogate_function: Callable[[Tensor], Tensor] = Sigmoid(4.0),
    detach_reset: bool = False,
    step_mode: Literal["m", "s"] = "m",
    backend: Backend = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> fx.GraphModule:
    """Import a NIR graph as a network of our neurons.

    Called as ``out, state = net(x, state)``, with no ``state`` at first and then the one that the last call returned.
    What `to_nir` wrote comes back with the same spikes bit for bit, if ``dt`` and ``leak`` are what they were.

    Args:
        graph: ``nir.NIRGraph``, or the path of a file. Each neuron's parameters are the same for all its neurons.
        dt: Length of a time step in seconds, as at the export.
        leak: "fixed" makes a `LIF` of each ``nir.LIF``, which divides by tau; "learned" a `ParametricLIF`, which
            multiplies by 1 / tau.
        surrogate_function: Gives the gradient, which NIR does not hold.
        detach_reset: Whether the gradient ignores the reset.
        step_mode: "m": inputs [T, B, *N]. "s": one step [B, *N], for graphs with cycles.
        backend: As in `lif`.
        device: Where the network lives.
        dtype: Of its parameters.

    Raises:
        ImportError: nir or nirtorch is missing.
        ValueError: A node does not fit ``dt``, or is none of ours; the message says which.

    Example:
        >>> graph = to_nir(nn.Sequential(nn.Linear(3, 2), LIF(tau=20.0)), torch.zeros(5, 1, 3), dt=1e-3)
        >>> spikes, state = from_nir(graph, dt=1e-3)(torch.ones(5, 1, 3))
        >>> spikes.shape
        torch.Size([5, 1, 2])
    """
    exchange = _nir_exchange()
    if leak not in ("fixed", "learned"):
        raise ValueError(f'from_nir: leak must be "fixed" or "learned", got {leak!r}.')

    def ours(node: Any) -> nn.Module | None:
        if type(node) not in (neuron.LIFNode, neuron.IFNode):
            return None
        options: dict[str, Any] = {"v_threshold": node.v_threshold, "v_reset": node.v_reset, "backend": backend}
        options |= {"surrogate_function": surrogate_function, "detach_reset": detach_reset, "step_mode": step_mode}
        if type(node) is neuron.IFNode:
            return IF(**options)
        if leak == "fixed":
            return LIF(_shortest(node.tau, dt), node.decay_input, **options)
        learned = ParametricLIF(node.tau, node.decay_input, **options)
        learned.w.data = _weight_of(node.tau)
        return learned.to(device=device, dtype=dtype)

    net = exchange.import_from_nir(graph, dt, device, dtype, step_mode)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            mine = ours(child)
            if mine is not None:
                setattr(module, name, mine)
    return net


def _nir_exchange() -> ModuleType:
    """spikingjelly's module, which needs nir and nirtorch."""
    try:
        from spikingjelly.activation_based import nir_exchange
    except ImportError as error:
        raise ImportError(f'NIR needs nir and nirtorch ({error}): pip install "spikeattn[nir]"') from error
    return nir_exchange


def _twin(module: LIF | IF | ParametricLIF) -> nn.Module:
    """spikingjelly's neuron with the parameters that NIR writes down."""
    options: dict[str, Any] = {
        "v_threshold": module.v_threshold,
        "v_reset": module.v_reset,
        "step_mode": module.step_mode,
    }
    if isinstance(module, IF):
        return neuron.IFNode(**options)
    if isinstance(module, LIF):
        return neuron.LIFNode(module.tau, module.decay_input, **options)
    node = neuron.ParametricLIFNode(decay_input=module.decay_input, **options)
    node.w = module.w
    return node


def _shortest(tau: float, dt: float) -> float:
    """The tau of which ``tau`` came by ``* dt / dt``, which rounds twice: the one with at most 15 digits, if any."""
    short = float(f"{tau:.15g}")
    return short if short * dt / dt == tau else tau


def _weight_of(tau: float) -> Tensor:
    """A float32 ``w`` whose sigmoid is 1 / tau rounded to float32, or as near as one comes."""
    r_tau = torch.tensor(1 / tau)
    near = torch.logit(torch.tensor(1 / tau, dtype=torch.float64)).float()
    bits = near.view(torch.int32) + torch.arange(-512, 513, dtype=torch.int32)
    candidates = torch.cat([near.reshape(1), bits.view(torch.float32)])
    return candidates[(candidates.sigmoid() - r_tau).abs().nan_to_num(torch.inf).argmin()].clone()
