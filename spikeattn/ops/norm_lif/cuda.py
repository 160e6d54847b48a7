"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

from functools import lru_cache

import torch
from torch import Tensor

from spikeattn._cuda.launch import MAX_SHARED_BYTES, Argument, LaunchPlan, Planned, launch
from spikeattn._cuda.neuron import (
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
    constants = _tile(D, threads, elements)
    shared = 4 * 128 if threads > 32 else 0
    return LaunchPlan(f"spk_norm_lif_forward_{storage}", (grid, 1, 1), (BLOCK, 1, 1), shared, constants)


def plan_norm_lif_backward(T: int, R: int, D: int, storage: str, aligned: bool = True) -> LaunchPlan:
    """Plan of ``spk_norm_lif_backward``."""
    threads, elements, steps = backward_tile(T, D)
    block = max(threads, BLOCK)
    grid = min(-(-R * threads // block), MAX_PARTIALS * threads // block)
    shared = 4 * _batch(threads, elements) * threads // 16 + 4 * block * elements * steps
    constants = _tile(D, threads, elements, contiguous=aligned and D % elements == 0)
    return LaunchPlan(f"spk_norm_lif_backward_{storage}", (grid, 1, 1), (block, 1, 1), shared, constants)


def backward_tile(T: int, D: int) -> tuple[int, int, int]:
    """Threads a row, elements a thread, and steps of a segment: as many as shared memory holds the potentials of."""
    threads = next(threads for threads, most in BACKWARD_ELEMENTS.items() if threads * most >= D)
    elements = _elements(D, threads)
    bytes_left = MAX_SHARED_BYTES - 4 * _batch(threads, elements) * threads // 16
    return threads, elements, min(T, bytes_left // (4 * max(threads, BLOCK) * elements))


def _elements(D: int, threads: int) -> int:
    """Elements a thread, rounded up to a power of two so that few kernels serve all widths."""
    return 1 << (-(-D // threads) - 1).bit_length()


@lru_cache(maxsize=1024)
def _forward_program(T: int, R: int, D: int, storage: str, options: Constants, neuron: tuple) -> Planned:
    plan = plan_norm_lif_forward(T, R, D, storage)
    constants = plan.constants + options + neuron_constants(*neuron) + NO_GRADIENT
    return plan, Program("norm_lif", "forward", storage, constants)


@lru_cache(maxsize=1024)
def _backward_program(
    T: int, R: int, D: int, storage: str, aligned: bool, options: Constants, neuron: tuple, gradient: tuple
) -> Planned:
    plan = plan_norm_lif_backward(T, R, D, storage, aligned)
    constants = plan.constants + options + neuron_constants(*neuron) + gradient_constants(*gradient)
    return plan, Program("norm_lif", "backward", storage, constants, gradient[-1])


def _batch(threads: int, elements: int) -> int:
    """Steps that go together on the way back: as many as registers hold, which are fewer for larger blocks."""
    if elements <= 2:
        return 4
    return 2 if threads <= 256 else 1


def _tile(D: int, threads: int, elements: int, contiguous: bool = False) -> Constants:
    tile = ("kThreads", threads), ("kElements", elements), ("kFull", int(threads * elements == D))
    loads = ("kContiguous", int(contiguous)), ("kVector", elements if contiguous else 1)
    return *tile, *loads, ("kBatch", _batch(threads, elements))


def norm_lif_forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor | None,
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
    neuron = (tau, decay_input, v_reset)
    plan, program = _forward_program(T, R, D, storage, _options(x, T, scalar_v0), neuron)
    args: list[Argument] = [x, as_float(weight), as_float(bias), padding_mask, v0, spikes, v, mean, rstd]
    args += [T, R, D, float(eps), leak(tau), float(v_threshold), float(v_reset or 0.0)]
    launch(plan, program, args, x.device)
    return spikes, v, mean, rstd


def norm_lif_backward_cuda(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor | None,
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

    ``grad_v0`` is empty without ``v0``; ``derivative`` as for `lif_backward_cuda`.
    """
    storage, T, D = STORAGE[x.dtype], time_steps, x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_v0 = x.new_empty((0,) if v0 is None else v0.shape, dtype=torch.float32)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias), grad_v0
    R, dtype = x.shape[1:].numel() // D, weight.dtype
    x, padding_mask = x.contiguous(), None if padding_mask is None else padding_mask.contiguous()
    v0, scalar_v0 = as_start(v0)
    neuron, gradient = (tau, decay_input, v_reset), (detach_reset, surrogate, derivative)
    grad_spikes, grad_v = grad_spikes.to(x.dtype).contiguous(), None if grad_v is None else as_float(grad_v)
    weight, bias = as_float(weight), as_float(bias)
    aligned = are_aligned(grad_spikes, grad_v, x, weight, bias, v0)
    plan, program = _backward_program(T, R, D, storage, aligned, _options(x, T, scalar_v0), neuron, gradient)
    threads, _, steps = backward_tile(T, D)
    partials = grad_v0.new_empty(plan.grid[0] * plan.block[0] // threads, 2, D)
    checkpoints = grad_v0.new_empty((T - 1) // steps, R, D) if steps < T else None
    args: list[Argument] = [grad_spikes, grad_v, x, weight, bias]
    args += [padding_mask, v0, as_float(mean), as_float(rstd), grad_x, None if v0 is None else grad_v0, partials]
    args += [checkpoints, T, R, D, steps, leak(tau), float(v_threshold), float(v_reset or 0.0)]
    args += surrogate_scalars(surrogate, alpha)
    launch(plan, program, args, x.device)
    grad_weight, grad_bias = partials.sum(0)  # PyTorch sums in a fixed order
    return grad_x, grad_weight.to(dtype, copy=True), grad_bias.to(dtype, copy=True), grad_v0


def _options(x: Tensor, T: int, scalar_v0: int) -> Constants:
    return ("kStatic", int(x.shape[0] != T)), ("kScalarV0", scalar_v0)
