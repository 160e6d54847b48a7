"""Rules that make spikingjelly's operation counters see our fused neurons; and `swap_attention`, from ``swap.py``.

spikingjelly counts the ATen operations of its own neurons' loop over T. Ours run in one registered operation, which its
counters do not know and count as 0. The rules here count what spikingjelly's neuron would have run in its place, with
the same inputs: they run its loop on a CPU under the counter, so totals and scopes are those of the same network built
from its nodes, and only the names of the operations differ. Counting is as slow as spikingjelly's neurons are.

`FlopCounter`, `MACCounter`, `ACCounter`, `SynOpCounter` and `MemoryAccessCounter` take rules by ``extra_rules=``;
`add_rules` also reaches counters and profilers that take none. ``NeuronStateCounter``, and the profilers on top of it,
follow the storage of a neuron's state through its operations, and cannot be told.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from spikingjelly.activation_based import functional, op_counter, surrogate
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikeattn.interop.swap import swap_attention as swap_attention
from spikeattn.nn.neuron import IF, LIF, ParametricLIF
from spikeattn.ops.lif.op import lif_backward, lif_forward
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.norm_lif.op import norm_lif_backward, norm_lif_forward
from spikeattn.ops.surrogate import surrogate_of

Rules = dict[Any, Callable[[tuple, dict, Any], int]]
Target = TypeVar("Target")

_TAKE_RULES = (
    op_counter.FlopCounter,
    op_counter.MACCounter,
    op_counter.ACCounter,
    op_counter.SynOpCounter,
    op_counter.MemoryAccessCounter,
)


def flop_rules() -> Rules:
    """Rules for spikingjelly's ``FlopCounter(extra_rules=flop_rules())``: forward and backward.

    Example:
        >>> counter = op_counter.FlopCounter(extra_rules=flop_rules())
        >>> with op_counter.DispatchCounterMode([counter]):
        ...     _ = LIF()(torch.ones(4, 10))
        >>> counter.get_total()  # 10 operations a neuron and step
        400
    """
    return _rules(op_counter.FlopCounter)


def mac_rules() -> Rules:
    """Rules for spikingjelly's ``MACCounter``, which counts no multiply-accumulate in a neuron: they say 0."""
    return _rules(op_counter.MACCounter)


def ac_rules() -> Rules:
    """Rules for spikingjelly's ``ACCounter``: the additions of a neuron, fewer where both operands are spikes."""
    return _rules(op_counter.ACCounter)


def synop_rules() -> Rules:
    """Rules for spikingjelly's ``SynOpCounter``, which counts no synaptic operation in a neuron: they say 0."""
    return _rules(op_counter.SynOpCounter)


def memory_access_rules() -> Rules:
    """Rules for spikingjelly's ``MemoryAccessCounter``: bytes that its loop moves, not the fewer that ours does."""
    return _rules(op_counter.MemoryAccessCounter)


def add_rules(target: Target) -> Target:
    """Make a counter or profiler of spikingjelly count our neurons, also one that takes no ``extra_rules=``.

    Args:
        target: A ``FlopCounter``, ``MACCounter``, ``ACCounter``, ``SynOpCounter``, ``MemoryAccessCounter``,
            ``NeuromorphicMemoryAccessCounter`` (state in bytes as our neurons hold it: float32 or wider), or a
            ``SimpleEnergyProfiler``.

    Returns:
        ``target``, changed in place.

    Raises:
        TypeError: No rules for such a target.

    Example:
        >>> profiler = add_rules(op_counter.SimpleEnergyProfiler())
        >>> model = LIF()
        >>> profiler.bind_model(model)
        >>> with profiler:
        ...     _ = model(torch.ones(4, 10))
        >>> profiler.get_counts()["ac"] > 0
        True
    """
    if isinstance(target, op_counter.SimpleEnergyProfiler):
        for counter in (target.mac_counter, target.ac_counter, target.synop_counter, target.memory_counter):
            add_rules(counter)
    elif isinstance(target, op_counter.NeuromorphicMemoryAccessCounter):
        count_node = target.rules["forward", BaseNode]
        target.rules.update({("forward", cls): _state_rule(count_node) for cls in (LIF, IF, ParametricLIF)})
    elif isinstance(target, _TAKE_RULES):
        kind = next(cls for cls in _TAKE_RULES if isinstance(target, cls))
        target.rules.update(_rules(kind))
    else:
        raise TypeError(f"add_rules: target must be a counter that takes rules, got {type(target).__name__}.")
    return target


def _state_rule(count_node: Callable) -> Callable:
    """Count a neuron whose potential lives in a kernel as ``count_node`` counts one that keeps it in ``v``."""

    def rule(module: BaseNode, inputs: tuple, kwargs: dict, output: Any) -> int:
        x = inputs[0] if inputs else kwargs["x_seq"]
        step = x[0] if module.step_mode == "m" else x
        v = torch.empty(step.shape, dtype=state_dtype(x), device="meta")
        return count_node(SimpleNamespace(step_mode=module.step_mode, memories=lambda: [v]), inputs, kwargs, output)

    return rule


def _rules(kind: type) -> Rules:
    """A rule for each registered operation, for counters of one kind."""
    rules: Rules = {}
    for operation, count in (
        (lif_forward, _count_forward),
        (norm_lif_forward, _count_forward),
        (lif_backward, _count_backward),
        (norm_lif_backward, _count_backward),
    ):
        overload = operation._opoverload
        rules[overload] = _rule(overload, count, kind)
    # What an absent initial potential is made of: free, and so it stays in a mode that refuses what has no rule.
    full = torch.ops.aten.full.default
    if full not in kind().rules:
        rules[full] = lambda args, kwargs, out: 0
    return rules


def _rule(overload: Any, count: Callable, kind: type) -> Callable[[tuple, dict, Any], int]:
    """One rule: name the arguments of the call, then count in a thread of its own."""
    names = [argument.name for argument in overload._schema.arguments]

    def rule(args: tuple, kwargs: dict, out: Any) -> int:
        call = SimpleNamespace(**{**dict(zip(names, args, strict=False)), **kwargs})
        # A dispatch mode runs below autograd, where nothing can be differentiated; another thread is not below it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(count, kind(), call).result()

    return rule


class _Tally(TorchDispatchMode):
    """Add up what a counter says of each operation; ``passed_over`` is a tensor whose operations are not ours."""

    def __init__(self, counter: Any, passed_over: Tensor | None) -> None:
        super().__init__()
        self.counter, self.passed_over, self.total = counter, passed_over, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        ours = self.passed_over is None or not args or args[0] is not self.passed_over
        if ours and self.counter.has_rule(func):
            self.total += self.counter.count(func, args, kwargs, out)
        return out


class _Twin:
    """spikingjelly's neuron, after LayerNorm if the call has one, with the inputs of a call of ours."""

    def __init__(self, call: SimpleNamespace) -> None:
        self.call = call
        x = _leaf(call.x)
        self.x = x.detach().expand(call.time_steps, *x.shape[1:]).requires_grad_(x.requires_grad)
        self.weight, self.bias = _leaf_of(call, "weight"), _leaf_of(call, "bias")
        self.fresh = call.v0.ndim > 0 and not any(call.v0.stride())  # no v0 was given, and none was kept
        self.v0 = _leaf(call.v0).to(call.x.dtype)  # spikingjelly's potential has the dtype of its input
        r_tau = _leaf_of(call, "r_tau")
        self.w = None if r_tau is None else torch.logit(r_tau.detach()).requires_grad_(r_tau.requires_grad)

    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""
        tensors = (self.x, self.weight, self.bias, self.v0, self.w)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(spikes, v, v_seq)``."""
        call, x, v = self.call, self.x, self.v0
        if self.weight is not None:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, getattr(call, "eps", 1e-5))
            if call.padding_mask is not None:
                x = x.masked_fill(call.padding_mask.cpu().unsqueeze(-1), 0.0)
        if self.fresh:
            v = torch.full_like(x[0], 0.0 if call.v_reset is None else call.v_reset, requires_grad=False)
        reset = (call.v_threshold, call.v_reset)
        fire = (_spikingjelly_surrogate(call.surrogate, call.alpha), call.detach_reset)
        keep = getattr(call, "return_v_seq", getattr(call, "grad_v_seq", None) is not None)
        if self.w is not None:
            return functional.plif_multi_step(x, v, self.w, call.decay_input, *reset, *fire, keep)
        if math.isinf(call.tau) and not call.decay_input:
            return functional.if_multi_step(x, v, *reset, *fire, keep)
        return functional.lif_multi_step(x, v, call.tau, call.decay_input, *reset, *fire, keep)


def _leaf(tensor: Tensor) -> Tensor:
    """The same values on a CPU, cut off from the graph, wanting a gradient if the tensor does."""
    return tensor.detach().cpu().requires_grad_(tensor.requires_grad)


def _leaf_of(call: SimpleNamespace, name: str) -> Tensor | None:
    """`_leaf` of an argument that a call may lack."""
    tensor = getattr(call, name, None)
    return None if tensor is None else _leaf(tensor)


def _spikingjelly_surrogate(name: str, alpha: float) -> Callable[[Tensor], Tensor]:
    """spikingjelly's surrogate of that name; ours if it has none."""
    ours = surrogate_of(name, alpha)
    cls = getattr(surrogate, type(ours).__name__, None)
    if cls is None:
        return ours
    theirs = cls(alpha)
    # Rect alone has no name in spikingjelly's operations and would be called as a module, which a counter's
    # hooks on modules would take for a part of the network.
    return theirs.forward if name == "rect" else theirs


def _count_forward(counter: Any, call: SimpleNamespace) -> int:
    """What ``counter`` says of the forward of the twin."""
    twin = _Twin(call)
    with _Tally(counter, twin.w) as tally, torch.no_grad():
        twin.run()
    return tally.total


def _count_backward(counter: Any, call: SimpleNamespace) -> int:
    """What ``counter`` says of autograd's way back through the twin."""
    twin = _Twin(call)
    inputs = twin.inputs()
    if not inputs:
        return 0
    grads = (call.grad_spikes, call.grad_v, getattr(call, "grad_v_seq", None))
    arrived = [
        (output, grad.cpu().to(output.dtype))
        for output, grad in zip(twin.run(), grads, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    # An output that nobody used has a gradient of zeros here, and none in spikingjelly's graph.
    used = [(output, grad) for output, grad in arrived if grad.any()] or arrived[:1]
    with _Tally(counter, twin.w) as tally:
        torch.autograd.grad([output for output, _ in used], inputs, [grad for _, grad in used], allow_unused=True)
    return tally.total
