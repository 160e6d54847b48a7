"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

from functools import lru_cache

import torch
from torch import Tensor

from spikeattn._cuda.launch import Argument, LaunchPlan, Planned, launch
from spikeattn._cuda.neuron import (
    ELEMENT_BYTES,
    NO_GRADIENT,
    STORAGE,
    Constants,
    are_aligned,
    as_float,
    as_start,
    gradient_constants,
    neuron_constants,
    surrogate_scalars,
)
from spikeattn._cuda.source import Program
from spikeattn._leak import leak

BLOCK = 128
MAX_BLOCKS = 2**16  # far more than any device runs at once; the rest strides
BUSY_THREADS = 2**15  # below this a narrower load that keeps more threads busy is preferred

# Steps of a segment, and how many neurons a thread can then own: kSteps * kVector values of H stay in registers. With
# more of them too few threads fit on a multiprocessor: 128 steps took twice the time of checkpoints (H100, float32).
SEGMENTS = {4: 8, 8: 8, 16: 4, 32: 2, 64: 1}
CHECKPOINT_STEPS = 32  # of a segment when T is longer than any of these


def plan_lif_forward(T: int, N: int, storage: str, aligned: bool = True, packed: bool = False) -> LaunchPlan:
    """Plan of ``spk_lif_forward``; a thread walks over all T, so the plan is the same for any T."""
    vector = 1 if packed else _vector(N, 16 // ELEMENT_BYTES[storage], aligned)
    constants = (("kVector", vector), ("kSteps", min(SEGMENTS)), ("kPacked", int(packed)))
    return LaunchPlan(f"spk_lif_forward_{storage}", _grid(N, vector), (BLOCK, 1, 1), 0, constants)


def plan_lif_backward(T: int, N: int, storage: str, aligned: bool = True) -> LaunchPlan:
    """Plan of ``spk_lif_backward``: the shortest segment that holds all T, else checkpoints."""
    steps = next((steps for steps in SEGMENTS if steps >= T), CHECKPOINT_STEPS)
    vector = _vector(N, min(SEGMENTS[steps], 16 // ELEMENT_BYTES[storage]), aligned)
    constants = (("kVector", vector), ("kSteps", steps), ("kPacked", 0))
    return LaunchPlan(f"spk_lif_backward_{storage}", _grid(N, vector), (BLOCK, 1, 1), 4 * BLOCK // 32, constants)


def _vector(N: int, widest: int, aligned: bool) -> int:
    """Neurons a thread: the widest load that N and the addresses allow and that leaves enough threads."""
    vector = widest if aligned else 1
    while vector > 1 and (N % vector != 0 or N // vector < BUSY_THREADS):
        vector //= 2
    return vector


def _grid(N: int, vector: int) -> tuple[int, int, int]:
    return min(-(-N // (vector * BLOCK)), MAX_BLOCKS), 1, 1


@lru_cache(maxsize=1024)
def _forward_program(
    T: int, N: int, storage: str, aligned: bool, packed: bool, options: Constants, neuron: tuple
) -> Planned:
    plan = plan_lif_forward(T, N, storage, aligned, packed)
    return plan, Program("lif", "forward", storage, plan.constants + options + neuron_constants(*neuron) + NO_GRADIENT)


@lru_cache(maxsize=1024)
def _backward_program(
    T: int, N: int, storage: str, aligned: bool, options: Constants, neuron: tuple, gradient: tuple
) -> Planned:
    plan = plan_lif_backward(T, N, storage, aligned)
    constants = plan.constants + options + neuron_constants(*neuron) + gradient_constants(*gradient)
    return plan, Program("lif", "backward", storage, constants, gradient[-1])


def lif_forward_cuda(
    x: Tensor,
    v0: Tensor | None,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    return_v_seq: bool,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_reference` in one launch: ``(spikes, v, v_seq)``.

    Packed spikes are int32 [T, ceil(N / 32)], neuron n in bit n % 32 of word n / 32.
    """
    storage, T, divisor = STORAGE[x.dtype], time_steps, tau if r_tau is None else None
    v = x.new_empty(x.shape[1:], dtype=torch.float32)
    N = v.numel()
    spikes = x.new_empty((T, -(-N // 32)), dtype=torch.int32) if packed else x.new_empty((T, *x.shape[1:]))
    v_seq = v.new_empty((T, *x.shape[1:]) if return_v_seq else (0,))
    if N == 0:
        return spikes, v, v_seq
    x, r_tau = x.contiguous(), None if r_tau is None else as_float(r_tau)
    v0, scalar_v0 = as_start(v0)
    options = _options(x, T, r_tau, scalar_v0, return_v_seq)
    neuron = (divisor, decay_input, v_reset)
    plan, program = _forward_program(T, N, storage, are_aligned(x, v0), packed, options, neuron)
    args: list[Argument] = [x, v0, r_tau, None if packed else spikes, spikes if packed else None, v, v_seq]
    args += [T, N, leak(divisor), float(v_threshold), float(v_reset or 0.0)]
    launch(plan, program, args, x.device)
    return spikes, v, v_seq


def lif_backward_cuda(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    derivative: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_backward_reference` in one launch: ``(grad_x, grad_v0, grad_r_tau)``, the last two empty where None came in.

    ``derivative`` is a surrogate's own spelling, a C expression of ``float x``; it takes the place of ``surrogate``.
    """
    storage, T, N, divisor = STORAGE[x.dtype], time_steps, x.shape[1:].numel(), tau if r_tau is None else None
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_v0 = x.new_empty((0,) if v0 is None else v0.shape, dtype=torch.float32)
    if N == 0:
        return grad_x, grad_v0, grad_v0.new_zeros((0,) if r_tau is None else ())
    x, r_tau = x.contiguous(), None if r_tau is None else as_float(r_tau)
    v0, scalar_v0 = as_start(v0)
    grad_spikes, grad_v = grad_spikes.to(x.dtype).contiguous(), None if grad_v is None else as_float(grad_v)
    grad_v_seq = None if grad_v_seq is None else as_float(grad_v_seq)
    options = _options(x, T, r_tau, scalar_v0, grad_v_seq is not None)
    neuron, gradient = (divisor, decay_input, v_reset), (detach_reset, surrogate, derivative)
    aligned = are_aligned(grad_spikes, grad_v, x, v0, grad_v_seq)
    plan, program = _backward_program(T, N, storage, aligned, options, neuron, gradient)
    segments = -(-T // dict(plan.constants)["kSteps"])
    checkpoints = grad_v0.new_empty(segments - 1, N) if segments > 1 else None
    partial_r_tau = None if r_tau is None else grad_v0.new_empty(plan.grid[0])
    args: list[Argument] = [grad_spikes, grad_v, grad_v_seq, x, v0, r_tau, grad_x, None if v0 is None else grad_v0]
    args += [partial_r_tau, checkpoints, T, N, leak(divisor), float(v_threshold), float(v_reset or 0.0)]
    args += surrogate_scalars(surrogate, alpha)
    launch(plan, program, args, x.device)
    # PyTorch sums in a fixed order.
    return grad_x, grad_v0, grad_v0.new_empty(0) if partial_r_tau is None else partial_r_tau.sum()


def _options(x: Tensor, T: int, r_tau: Tensor | None, scalar_v0: int, v_seq: bool) -> Constants:
    static, tensor_tau = int(x.shape[0] != T), int(r_tau is not None)
    return ("kStatic", static), ("kTensorTau", tensor_tau), ("kScalarV0", scalar_v0), ("kVSeq", int(v_seq))
