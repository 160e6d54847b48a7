"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

import torch
from torch import Tensor

from spikeattn._cuda.launch import MAX_SHARED_BYTES, Argument, LaunchPlan, launch
from spikeattn._cuda.neuron import (
    NO_GRADIENT,
    STORAGE,
    as_float,
    as_start,
    gradient_constants,
    neuron_constants,
    surrogate_scalars,
)
from spikeattn._cuda.source import Program
from spikeattn._leak import leak

BLOCK = 128  # threads, or one row if that takes more
MAX_WIDTH = 4096  # elements of a row
MAX_BLOCKS = 2**16
MAX_PARTIALS = 2048  # rows of partial sums for weight and bias: enough for every multiprocessor, little to sum

FORWARD_ELEMENTS = {32: 16, 128: 32}  # most elements of a row that a thread holds, by threads a row
BACKWARD_ELEMENTS = {32: 2, 128: 4, 256: 4, 512: 8}  # the same on the way back, where more are kept


def fits(D: int) -> bool:
    """Whether the kernels take rows of ``D`` elements; a wider row does not fit in registers."""
    return D <= MAX_WIDTH


def plan_norm_lif_forward(T: int, R: int, D: int, storage: str) -> LaunchPlan:
    """Plan of ``spk_norm_lif_forward``: a warp a row, or 128 threads if it is long; the same for any T."""
    threads = next(threads for threads, most in FORWARD_ELEMENTS.items() if threads * most >= D)
    elements = max(_elements(D, threads), 128 // threads)  # at least one for each partial sum
    grid = min(-(-R * threads // BLOCK), MAX_BLOCKS)
    constants = _tile(threads, elements)
    shared = 4 * 128 if threads > 32 else 0
    return LaunchPlan(f"spk_norm_lif_forward_{storage}", (grid, 1, 1), (BLOCK, 1, 1), shared, constants)


def plan_norm_lif_backward(T: int, R: int, D: int, storage: str) -> LaunchPlan:
    """Plan of ``spk_norm_lif_backward``."""
    threads, elements, steps = backward_tile(T, D)
    block = max(threads, BLOCK)
    grid = min(-(-R * threads // block), MAX_PARTIALS * threads // block)
    shared = 4 * threads // 16 + 4 * block * elements * steps
    return LaunchPlan(f"spk_norm_lif_backward_{storage}", (grid, 1, 1), (block, 1, 1), shared, _tile(threads, elements))


def backward_tile(T: int, D: int) -> tuple[int, int, int]:
    """Threads a row, elements a thread, and steps of a segment: as many as shared memory holds the potentials of."""
    threads = next(threads for threads, most in BACKWARD_ELEMENTS.items() if threads * most >= D)
    elements = _elements(D, threads)
    bytes_left = MAX_SHARED_BYTES - 4 * threads // 16
    return threads, elements, min(T, bytes_left // (4 * max(threads, BLOCK) * elements))


def _elements(D: int, threads: int) -> int:
    """Elements a thread, rounded up to a power of two so that few kernels serve all widths."""
    return 1 << (-(-D // threads) - 1).bit_length()


def _tile(threads: int, elements: int) -> tuple[tuple[str, int], ...]:
    return ("kVector", 1), ("kThreads", threads), ("kElements", elements), ("kBatch", max(1, min(4, 8 // elements)))


def norm_lif_forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    time_steps: int,
    eps: float,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_lif_reference` in one launch: ``(spikes, v, mean, rstd)``."""
    storage, T, D = STORAGE[x.dtype], time_steps, x.shape[-1]
    spikes = x.new_empty((T, *x.shape[1:]))
    v = x.new_empty(x.shape[1:], dtype=torch.float32)
    mean, rstd = (v.new_empty((*x.shape[:-1], 1)) for _ in range(2))
    if v.numel() == 0:
        return spikes, v, mean, rstd
    R = v.numel() // D
    x, padding_mask = x.contiguous(), None if padding_mask is None else padding_mask.contiguous()
    v0, scalar_v0 = as_start(v0)
    plan = plan_norm_lif_forward(T, R, D, storage)
    constants = plan.constants + _constants(x, T, scalar_v0) + neuron_constants(tau, decay_input, v_reset) + NO_GRADIENT
    args: list[Argument] = [x, as_float(weight), as_float(bias), padding_mask, v0, spikes, v, mean, rstd]
    args += [T, R, D, float(eps), leak(tau), float(v_threshold), float(v_reset or 0.0)]
    launch(plan, Program("norm_lif", "forward", storage, constants), args, x.device)
    return spikes, v, mean, rstd


def norm_lif_backward_cuda(
    grad_spikes: Tensor,
    grad_v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    mean: Tensor,
    rstd: Tensor,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    derivative: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_lif_backward_reference` in one launch: ``(grad_x, grad_weight, grad_bias, grad_v0)``.

    ``derivative`` is a surrogate's own spelling, as for `lif_backward_cuda`.
    """
    storage, T, D = STORAGE[x.dtype], time_steps, x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_v0 = x.new_empty(v0.shape, dtype=torch.float32)
    if v0.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias), grad_v0
    R = v0.numel() // D
    x, padding_mask = x.contiguous(), None if padding_mask is None else padding_mask.contiguous()
    v0, scalar_v0 = as_start(v0)
    plan = plan_norm_lif_backward(T, R, D, storage)
    constants = plan.constants + _constants(x, T, scalar_v0) + neuron_constants(tau, decay_input, v_reset)
    constants += gradient_constants(detach_reset, surrogate, derivative)
    threads, _, steps = backward_tile(T, D)
    partials = grad_v0.new_empty(plan.grid[0] * plan.block[0] // threads, 2, D)
    checkpoints = grad_v0.new_empty((T - 1) // steps, R, D)
    args: list[Argument] = [grad_spikes.to(x.dtype).contiguous(), as_float(grad_v), x, as_float(weight), as_float(bias)]
    args += [padding_mask, v0, as_float(mean), as_float(rstd), grad_x, grad_v0, partials, checkpoints, T, R, D, steps]
    args += [leak(tau), float(v_threshold), float(v_reset or 0.0), *surrogate_scalars(surrogate, alpha)]
    launch(plan, Program("norm_lif", "backward", storage, constants, derivative), args, x.device)
    grad_weight, grad_bias = partials.sum(0)  # PyTorch sums in a fixed order
    return grad_x, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True), grad_v0


def _constants(x: Tensor, T: int, scalar_v0: int) -> tuple[tuple[str, int], ...]:
    return ("kStatic", int(x.shape[0] != T)), ("kScalarV0", scalar_v0)
