"""Multi-step spiking neurons as modules: parameters and state around `ops.lif`."""

import math
from collections.abc import Callable
from typing import TypeGuard

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.ops.lif.op import LIFOutput, integrate
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.norm_lif import norm_lif
from spikeattn.ops.norm_lif.reference import layer_norm_statistics, normalise
from spikeattn.ops.surrogate import ATan, Sigmoid


class Spike(nn.Module):
    """Step function with a surrogate gradient, as a module; calls `ops.surrogate.spike`.

    Args:
        surrogate_function: Gives the gradient.

    Example:
        >>> Spike()(torch.tensor([-1.0, 0.0, 2.0])).tolist()
        [0.0, 1.0, 1.0]
    """

    def __init__(self, surrogate_function: Callable[[Tensor], Tensor] = ATan(2.0)) -> None:
        super().__init__()
        self.surrogate_function = surrogate_function

    def forward(self, x: Tensor) -> Tensor:
        """1 where ``x`` >= 0, else 0; any shape."""
        return self.surrogate_function(x)

    def extra_repr(self) -> str:
        """The surrogate, as printed in the module's repr."""
        return f"{self.surrogate_function}"


class _Neuron(neuron.BaseNode):
    """State and options that LIF, IF and ParametricLIF share.

    A spikingjelly ``BaseNode``, so that its monitors, counters, ``functional.reset_net`` and
    ``functional.set_step_mode`` treat ours like its own.
    """

    def __init__(
        self,
        v_threshold: float,
        v_reset: float | None,
        surrogate_function: Callable[[Tensor], Tensor],
        detach_reset: bool,
        step_mode: str,
        store_v_seq: bool,
        stateful: bool,
        backend: Backend,
    ) -> None:
        _checks.check_potentials(type(self).__name__, v_threshold, v_reset)
        v_reset = None if v_reset is None else float(v_reset)
        super().__init__(float(v_threshold), v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.stateful = stateful
        self.backend: Backend = backend

    def _integrate(self, x_seq: Tensor, v0: Tensor | None, return_v_seq: bool = False) -> LIFOutput:
        """Run `ops.lif` with this neuron's leak; each neuron says what its leak is."""
        raise NotImplementedError

    def _run(
        self, x_seq: Tensor, v0: Tensor | None, r_tau: Tensor | None, tau: float, decay_input: bool, v_seq: bool
    ) -> LIFOutput:
        """`ops.lif` with the options of this module."""
        options = (self.v_threshold, self.v_reset, self.detach_reset, self.surrogate_function, v_seq, self.backend)
        return integrate(x_seq, v0, r_tau, tau, decay_input, *options)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Fire over ``x_seq`` [T, *N]; from rest, unless the module is stateful."""
        v0 = self.materialize_states((x_seq,), tuple(self.memories()), "m")[0] if self.stateful else None
        spikes, v, v_seq = self._integrate(x_seq, v0, self.store_v_seq)
        if self.stateful:
            self.v = v
        if self.store_v_seq:
            self.v_seq = v_seq
        return spikes

    def single_step_functional_forward(self, inputs, states, **kwargs):
        """One time step with explicit state: ``(x,), (v,) -> (spikes,), (v,)``."""
        outputs, states = self.multi_step_functional_forward((inputs[0].unsqueeze(0),), states)
        return (outputs[0].squeeze(0),), states

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        """All time steps with explicit state: ``(x_seq,), (v,) -> (spikes,), (v,)``."""
        spikes, v, _ = self._integrate(inputs[0], states[0])
        return (spikes,), (v,)

    def materialize_states(self, inputs, states, step_mode):
        """Make the potential a tensor like one step of the input, float32 or wider.

        Raises:
            ValueError: The state was left by an input of another shape.
        """
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        v = states[0]
        if not isinstance(v, Tensor):
            # full_like, which spikingjelly's memory counter knows, as in its own neurons.
            v = torch.full_like(x, v, dtype=state_dtype(x), memory_format=torch.contiguous_format, requires_grad=False)
            return (v, *states[1:])
        if v.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: the stored potential has shape {tuple(v.shape)}, but this input needs "
                f"{tuple(x.shape)}. Call spikingjelly's functional.reset_net between unrelated inputs."
            )
        return (v.to(dtype=state_dtype(x), device=x.device), *states[1:])

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, stateful={self.stateful}, backend={self.backend!r}"


class LIF(_Neuron):
    """Leaky integrate-and-fire neurons; calls `ops.lif`, which holds the equation.

    Arguments, names and defaults of spikingjelly 2.0.0 ``LIFNode``, except ``step_mode="m"``, and:

    Args:
        tau: Membrane time constant in time steps, > 1.
        decay_input: Whether the input, too, is divided by ``tau``.
        v_threshold: Firing threshold (dimensionless, the unit of the input).
        v_reset: Potential after a spike; None subtracts ``v_threshold`` (soft reset).
        surrogate_function: A `Surrogate`, a spikingjelly surrogate, or any function that fires.
        detach_reset: Whether the gradient ignores the reset.
        step_mode: "m": input [T, *N], all steps at once. "s": input [*N], one step, state kept between calls.
        store_v_seq: Whether to keep V[1 ... T] of the last call in ``v_seq``.
        stateful: Whether a multi-step call goes on from the last potential of the call before (streaming). If not,
            it starts from ``v_reset``, and ``v`` stays as it is: nothing to reset, nothing that leaks.
        backend: As in `ops.lif`.

    State:
        ``v``, the potential after the last reset; not in ``state_dict``. ``functional.reset_net`` resets it.

    Raises:
        ValueError: tau <= 1; the threshold is not above the reset; a kept potential of another shape.

    Example:
        >>> LIF(tau=2.0)(torch.full((3, 1), 2.0)).flatten().tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = Sigmoid(4.0),
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        stateful: bool = False,
        backend: Backend = "auto",
    ) -> None:
        _checks.check_tau("LIF", tau)
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, stateful, backend
        )
        self.tau = float(tau)
        self.decay_input = decay_input

    def multi_step_forward(
        self, x_seq: Tensor, norm: nn.LayerNorm | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Fire over ``x_seq`` [T, *N]; from rest, unless the module is stateful.

        With ``norm`` the neurons are given ``norm(x_seq)``, zero where ``padding_mask`` [*N without the last axis] is
        True, in one pass: `ops.norm_lif`. The norm lends its parameters and is not called itself.
        """
        if norm is None:
            return super().multi_step_forward(x_seq)
        if self.store_v_seq:
            x_seq = x_seq.to(state_dtype(x_seq))
            statistics = layer_norm_statistics(x_seq, norm.eps)
            return super().multi_step_forward(normalise(x_seq, *statistics, norm.weight, norm.bias, padding_mask))
        v0 = self.materialize_states((x_seq,), tuple(self.memories()), "m")[0] if self.stateful else None
        spikes, v, _ = norm_lif(
            x_seq,
            norm.weight,
            norm.bias,
            v0,
            padding_mask=padding_mask,
            eps=norm.eps,
            tau=self.tau,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate_function,
            backend=self.backend,
        )
        if self.stateful:
            self.v = v
        return spikes

    def _integrate(self, x_seq: Tensor, v0: Tensor | None, return_v_seq: bool = False) -> LIFOutput:
        return self._run(x_seq, v0, None, self.tau, self.decay_input, return_v_seq)

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, tau={self.tau}, decay_input={self.decay_input}"


def is_watched(module: nn.Module) -> bool:
    """Whether a hook looks at a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def fires_inside(neuron: nn.Module) -> "TypeGuard[LIF]":
    """Whether an operation may fire in the place of ``neuron``: it is a plain `LIF`, and nobody looks at it."""
    if type(neuron) is not LIF or not neuron.decay_input or neuron.step_mode != "m":
        return False
    return not (is_watched(neuron) or neuron.stateful or neuron.store_v_seq)


class IF(_Neuron):
    """Integrate-and-fire neurons, `LIF` without a leak: H[t] = V[t-1] + X[t].

    Arguments, names and defaults of spikingjelly 2.0.0 ``IFNode``, except ``step_mode="m"``, and ``stateful`` and
    ``backend`` as in `LIF`.

    Example:
        >>> IF()(torch.full((4, 1), 0.5)).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = Sigmoid(4.0),
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        stateful: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, stateful, backend
        )

    def _integrate(self, x_seq: Tensor, v0: Tensor | None, return_v_seq: bool = False) -> LIFOutput:
        return self._run(x_seq, v0, None, math.inf, False, return_v_seq)


class ParametricLIF(_Neuron):
    """LIF neurons with a learned time constant, 1 / tau = sigmoid(w) (Fang et al. 2021, arXiv:2007.05785).

    Arguments, names and defaults of spikingjelly 2.0.0 ``ParametricLIFNode``, except ``step_mode="m"``, and
    ``stateful`` and ``backend`` as in `LIF`. Like it, multiplies by sigmoid(w) where `LIF` divides by tau.

    Args:
        init_tau: Initial membrane time constant in time steps, > 1.

    Parameters:
        w: Scalar, -log(init_tau - 1) at the start.

    Example:
        >>> ParametricLIF(init_tau=2.0)(torch.full((3, 1), 2.0)).flatten().tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = Sigmoid(4.0),
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        stateful: bool = False,
        backend: Backend = "auto",
    ) -> None:
        _checks.check_tau("ParametricLIF", init_tau, "init_tau")
        if math.isinf(init_tau):
            raise ValueError("ParametricLIF: init_tau must be finite, got inf. Is IF meant?")
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, stateful, backend
        )
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    def _integrate(self, x_seq: Tensor, v0: Tensor | None, return_v_seq: bool = False) -> LIFOutput:
        return self._run(x_seq, v0, self.w.sigmoid(), 1.0, self.decay_input, return_v_seq)

    def extra_repr(self) -> str:
        """Hyper-parameters and the present time constant, as printed in the module's repr."""
        tau = 1 / self.w.detach().sigmoid().item()
        return f"{super().extra_repr()}, tau={tau:.4g}, decay_input={self.decay_input}"
