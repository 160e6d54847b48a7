"""Rules that make spikingjelly's operation counters see our fused neurons; and `swap_attention`, from ``swap.py``.

spikingjelly counts the ATen operations of its own neurons' loop over T, and of attention's products. Ours run in one
registered operation, which its counters do not know and count as 0. The rules here count what spikingjelly would have
run in its place, with the same inputs: they run its loop, and the products with matmul, on a CPU under the counter, so
totals and scopes are those of the same network built from its nodes, and only the names of the operations differ.
Products are counted in the order in which `spiking_attention` associates them. Counting is as slow as its nodes are.

`FlopCounter`, `MACCounter`, `ACCounter`, `SynOpCounter` and `MemoryAccessCounter` take rules by ``extra_rules=``;
`add_rules` also reaches counters and profilers that take none. ``NeuronStateCounter``, and the profilers on top of it,
follow the storage of a neuron's state through its operations, and cannot be told.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from spikingjelly.activation_based import op_counter
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikeattn.interop._twins import AttentionTwin, LinearTwin, NeuronTwin, Twin
from spikeattn.interop.swap import swap_attention as swap_attention
from spikeattn.nn.neuron import IF, LIF, ParametricLIF
from spikeattn.ops.event_linear.op import event_linear_backward, event_linear_forward
from spikeattn.ops.lif.op import lif_backward, lif_forward
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.norm_lif.op import norm_lif_backward, norm_lif_forward
from spikeattn.ops.spiking_attention.registered import spiking_attention_backward, spiking_attention_forward

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
    """Make a counter or profiler of spikingjelly count our operations, also one that takes no ``extra_rules=``.

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
    for forward, backward, twin in (
        (lif_forward, lif_backward, NeuronTwin),
        (norm_lif_forward, norm_lif_backward, NeuronTwin),
        (spiking_attention_forward, spiking_attention_backward, AttentionTwin),
        (event_linear_forward, event_linear_backward, LinearTwin),
    ):
        for operation, count in ((forward, _count_forward), (backward, _count_backward)):
            overload = operation._opoverload
            rules[overload] = _rule(overload, twin, count, kind)
    aten, known = torch.ops.aten, kind().rules
    # What a scale of attention is made of: free, and so it stays in a mode that refuses what has no rule.
    if aten.full.default not in known:
        rules[aten.full.default] = lambda args, kwargs, out: 0
    # Products that are written to a given place, which spikingjelly's rules pass over.
    for placed, product in ((aten.baddbmm_.default, aten.baddbmm.default), (aten.bmm.out, aten.bmm.default)):
        if product in known and placed not in known:
            rules[placed] = known[product]
    return rules


def _rule(
    overload: Any, twin: Callable[[SimpleNamespace], Twin], count: Callable, kind: type
) -> Callable[[tuple, dict, Any], int]:
    """One rule: name the arguments of the call, then count in a thread of its own."""
    names = [argument.name for argument in overload._schema.arguments]

    def rule(args: tuple, kwargs: dict, out: Any) -> int:
        call = SimpleNamespace(**{**dict(zip(names, args, strict=False)), **kwargs})
        # A dispatch mode runs below autograd, where nothing can be differentiated; another thread is not below it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: count(kind(), twin(call))).result()

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


def _count_forward(counter: Any, twin: Twin) -> int:
    """What ``counter`` says of the forward of the twin."""
    with _Tally(counter, twin.passed_over) as tally, torch.no_grad():
        twin.run()
    return tally.total


def _count_backward(counter: Any, twin: Twin) -> int:
    """What ``counter`` says of autograd's way back through the twin."""
    inputs = twin.inputs()
    if not inputs:
        return 0
    arrived = [
        (output, grad.cpu().to(output.dtype))
        for output, grad in zip(twin.run(), twin.grads(), strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    # An output that nobody used has a gradient of zeros here, and none in spikingjelly's graph.
    used = [(output, grad) for output, grad in arrived if grad.any()] or arrived[:1]
    with _Tally(counter, twin.passed_over) as tally:
        torch.autograd.grad([output for output, _ in used], inputs, [grad for _, grad in used], allow_unused=True)
    return tally.total
