"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

import math

import numpy as np
import torch
from torch import Tensor

from spikeattn._cuda.launch import Argument, LaunchPlan, launch
from spikeattn._cuda.source import Program
from spikeattn.ops.surrogate import SURROGATES

STORAGE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}

BLOCK = 128
MAX_BLOCKS = 2**16  # far more than any device runs at once; the rest strides
BUSY_THREADS = 2**15  # below this a narrower load that keeps more threads busy is preferred

# Steps of a segment, and how many neurons a thread can then own: kSteps * kVector values of H stay in registers, at
# most 64 so that four blocks fit a multiprocessor; 128 steps are the last that do not spill (tests/kernels).
SEGMENTS = {4: 8, 8: 8, 16: 4, 32: 2, 64: 1, 128: 1}
CHECKPOINT_STEPS = 32  # of a segment when T is longer than all of these

# In the order of the enum in spikeattn.cuh.
SURROGATE_IDS = {name: number for number, name in enumerate([*SURROGATES, "custom"])}


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


def surrogate_constants(name: str, alpha: float) -> tuple[float, float]:
    """The ``a`` and ``b`` of ``derivative`` in spikeattn.cuh, in double as Python has them in ops/surrogate.py."""
    return {
        "sigmoid": (alpha, alpha),
        "atan": (math.pi / 2 * alpha, alpha / 2),
        "piecewise_quadratic": (alpha * alpha, alpha),
        "piecewise_exp": (-alpha, alpha / 2),
        "soft_sign": (1 / alpha, 2 * alpha),
        "super_spike": (0.0, alpha),
        "erf": (alpha, alpha / math.sqrt(math.pi)),
        "rect": (0.5 / alpha, alpha),
        "custom": (0.0, 0.0),
    }[name]


def leak_constants(tau: float, r_tau: Tensor | None) -> tuple[float, int]:
    """``(leak, kDivide)``: multiply where the reciprocal of tau is exact, which gives the same bits in less time."""
    if r_tau is not None:
        return 0.0, 0
    tau = float(np.float32(tau))
    exact = math.isinf(tau) or math.frexp(tau)[0] == 0.5
    return (1 / tau, 0) if exact else (tau, 1)


def lif_forward_cuda(
    x: Tensor,
    v0: Tensor,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    return_v_seq: bool,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_reference` in one launch; ``packed`` spikes are int32 [T, ceil(N / 32)], neuron n in bit n % 32.

    The surrogate and ``detach_reset`` change nothing here; they are arguments because the registered op has them.
    """
    storage, T, N = STORAGE[x.dtype], time_steps, v0.numel()
    x, v0, r_tau = x.contiguous(), _float(v0), None if r_tau is None else _float(r_tau)
    shape = (T, -(-N // 32)) if packed else (T, *x.shape[1:])
    spikes = x.new_empty(shape, dtype=torch.int32 if packed else x.dtype)
    v = torch.empty_like(v0)
    v_seq = v0.new_empty((T, *x.shape[1:]) if return_v_seq else (0,))
    if N == 0:
        return spikes, v, v_seq
    leak, divide = leak_constants(tau, r_tau)
    plan = plan_lif_forward(T, N, storage, _aligned(x, v0), packed)
    constants = _constants(plan, x, T, r_tau, decay_input, v_reset, False, divide, "sigmoid", return_v_seq)
    outputs = (None, spikes) if packed else (spikes, None)
    args: list[Argument] = [x, v0, r_tau, *outputs, v, v_seq, T, N, leak, v_threshold, v_reset or 0.0]
    launch(plan, Program("lif", storage, constants), args, x.device)
    return spikes, v, v_seq


def lif_backward_cuda(
    grad_spikes: Tensor,
    grad_v: Tensor,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor,
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
    """`lif_backward_reference` in one launch; ``derivative`` is the CUDA spelling of the surrogate ``"custom"``."""
    storage, T, N = STORAGE[x.dtype], time_steps, v0.numel()
    x, v0, r_tau = x.contiguous(), _float(v0), None if r_tau is None else _float(r_tau)
    grad_spikes, grad_v = grad_spikes.to(x.dtype).contiguous(), _float(grad_v)
    grad_v_seq = None if grad_v_seq is None else _float(grad_v_seq)
    grad_x, grad_v0 = torch.empty_like(x), torch.empty_like(v0)
    if N == 0:
        return grad_x, grad_v0, v0.new_zeros(())
    leak, divide = leak_constants(tau, r_tau)
    inputs = [grad_spikes, grad_v, x, v0] + ([] if grad_v_seq is None else [grad_v_seq])
    plan = plan_lif_backward(T, N, storage, _aligned(*inputs))
    constants = _constants(
        plan, x, T, r_tau, decay_input, v_reset, detach_reset, divide, surrogate, grad_v_seq is not None
    )
    checkpoints = v0.new_empty((T - 1) // dict(plan.constants)["kSteps"], N)
    partial_r_tau = v0.new_empty(0 if r_tau is None else plan.grid[0])
    args: list[Argument] = [grad_spikes, grad_v, grad_v_seq, x, v0, r_tau, grad_x, grad_v0, partial_r_tau, checkpoints]
    args += [T, N, leak, v_threshold, v_reset or 0.0, *surrogate_constants(surrogate, alpha)]
    launch(plan, Program("lif", storage, constants, derivative), args, x.device)
    return grad_x, grad_v0, partial_r_tau.sum()  # PyTorch sums in a fixed order; of no element it is 0


def _constants(
    plan: LaunchPlan,
    x: Tensor,
    T: int,
    r_tau: Tensor | None,
    decay_input: bool,
    v_reset: float | None,
    detach_reset: bool,
    divide: int,
    surrogate: str,
    v_seq: bool,
) -> tuple[tuple[str, int], ...]:
    return (
        *plan.constants,
        ("kStatic", int(x.shape[0] != T)),
        ("kTensorTau", int(r_tau is not None)),
        ("kDecayInput", int(decay_input)),
        ("kHardReset", int(v_reset is not None)),
        ("kDetachReset", int(detach_reset)),
        ("kDivide", divide),
        ("kSurrogate", SURROGATE_IDS[surrogate]),
        ("kVSeq", int(v_seq)),
    )


def _float(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _aligned(*tensors: Tensor) -> bool:
    """A contiguous slice can start anywhere; 16-byte loads cannot."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)
