"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikeattn._cuda.launch import MAX_SHARED_BYTES, Argument, LaunchPlan, Planned, launch
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

MAX_WIDTH = 4096  # elements of a row
MAX_BLOCKS = 2**16
PROCESSORS = 132  # that the grid fills on the way back, an H100: each block has partial sums, the same on any device
BUSY_WARPS = 1024  # below this, on the way back, fewer elements a thread that keep more threads busy are preferred

FORWARD_ELEMENTS = {32: 16, 128: 32}  # most elements of a row that a thread holds, by threads a row
# The same on the way back, for any number of threads, and the warps of a multiprocessor that registers leave room for.
BACKWARD_ELEMENTS = {8: 12, 4: 16, 2: 24}
WARP_SHARED_BYTES = 16 * 1024  # on the way back: 12 warps fit on a multiprocessor of an H100
BATCHES = {192: 4, 384: 2, 512: 1}  # steps whose potentials a thread has registers for, by the threads of a row


class Tile(NamedTuple):
    """How a row is spread over threads on the way back: 8 elements a thread at most, ``vector`` loaded at once."""

    threads: int
    elements: int
    vector: int

    @property
    def cost(self) -> int:
        """Instructions of a row and step, roughly: each element, load or store, and thread has its own."""
        return self.threads * (self.elements + self.elements // self.vector + 2)


def fits(D: int) -> bool:
    """Whether the kernels take rows of ``D`` elements; a wider row does not fit in registers."""
    return D <= MAX_WIDTH


def plan_norm_lif_forward(T: int, R: int, D: int, storage: str, aligned: bool = True) -> LaunchPlan:
    """Plan of ``spk_norm_lif_forward``: a warp a row, or 128 threads if it is long; the same for any T."""
    threads = next(threads for threads, most in FORWARD_ELEMENTS.items() if threads * most >= D)
    sums = 128 // threads  # partial sums of a thread; where it loads as many neighbours, these have one each
    elements = -(-D // 128) * sums if threads == 32 else _power_of_two(-(-D // threads))
    vector = 4 if threads == 32 and aligned and D % 4 == 0 else 1
    shared = 4 * 128 if threads > 32 else 0
    constants = _constants(D, Tile(threads, elements, vector))
    return LaunchPlan(f"spk_norm_lif_forward_{storage}", (min(R, MAX_BLOCKS), 1, 1), (threads, 1, 1), shared, constants)


def plan_norm_lif_backward(T: int, R: int, D: int, storage: str, aligned: bool = True) -> LaunchPlan:
    """Plan of ``spk_norm_lif_backward``."""
    tile = backward_tile(R, D, storage, aligned)
    batch, blocks = _batch(T, tile), _blocks(tile)
    grid = min(R, PROCESSORS * blocks)
    batches = -(-segment_steps(T, tile) // batch)
    shared = _sums_bytes(T, tile) + (batches - 1) * _batch_bytes(tile)
    constants = (*_constants(D, tile), ("kSteps", batch), ("kWhole", int(T % batch == 0)), ("kBlocks", blocks))
    return LaunchPlan(f"spk_norm_lif_backward_{storage}", (grid, 1, 1), (tile.threads, 1, 1), shared, constants)


@lru_cache(maxsize=1024)
def backward_tile(R: int, D: int, storage: str, aligned: bool = True) -> Tile:
    """The cheapest tile that keeps a device busy."""
    widest = 16 // ELEMENT_BYTES[storage] if aligned else 1
    vectors = [vector for vector in (8, 4, 2, 1) if vector <= widest and D % vector == 0]
    for most in BACKWARD_ELEMENTS:
        tiles = [
            Tile(threads, elements, vector)
            for vector in vectors
            for threads in range(32, max(BATCHES) + 1, 32)
            if (elements := -(-D // (threads * vector)) * vector) <= most
        ]
        if not tiles:
            break
        best = min(tiles, key=lambda tile: tile.cost)
        if R * best.threads >= BUSY_WARPS * 32:
            break
    return best


def segment_steps(T: int, tile: Tile) -> int:
    """Steps of a segment: as many batches as a fair share of shared memory holds the potentials between."""
    share = min(MAX_SHARED_BYTES, WARP_SHARED_BYTES * tile.threads // 32)
    kept = (share - _sums_bytes(T, tile)) // _batch_bytes(tile)
    return min(T, (kept + 1) * _batch(T, tile))


def _power_of_two(x: int) -> int:
    """The next one, so that few kernels serve all widths."""
    return 1 << (x - 1).bit_length()


def _blocks(tile: Tile) -> int:
    """Blocks of a multiprocessor that registers leave room for on the way back."""
    warps = next(warps for most, warps in reversed(BACKWARD_ELEMENTS.items()) if most >= tile.elements)
    return max(1, 32 * (warps if tile.threads <= min(BATCHES) else 16) // tile.threads)


def _batch(T: int, tile: Tile) -> int:
    """Steps whose potentials a thread holds on the way back, a power of two."""
    steps = next(steps for threads, steps in BATCHES.items() if threads >= tile.threads)
    return min(2 if tile.vector == 1 < tile.elements else steps, steps, _power_of_two(T))


def _batch_bytes(tile: Tile) -> int:
    """Shared memory of a block for the potentials before a batch."""
    return 4 * tile.threads * tile.elements


def _sums_bytes(T: int, tile: Tile) -> int:
    """Shared memory of a block for the sums of a batch that meet there: two each step, twice."""
    return 4 * 2 * 2 * _batch(T, tile) * tile.threads // 32 if tile.threads > 32 else 0


def _constants(D: int, tile: Tile) -> Constants:
    threads, elements, vector = tile
    inside = min(elements, D // (threads * vector) * vector)
    return ("kThreads", threads), ("kElements", elements), ("kVector", vector), ("kInside", inside)


@lru_cache(maxsize=1024)
def _forward_program(T: int, R: int, D: int, storage: str, aligned: bool, options: Constants, neuron: tuple) -> Planned:
    plan = plan_norm_lif_forward(T, R, D, storage, aligned)
    constants = plan.constants + options + neuron_constants(*neuron) + NO_GRADIENT
    return plan, Program("norm_lif", "forward", storage, constants)


@lru_cache(maxsize=1024)
def _backward_program(
    T: int, R: int, D: int, storage: str, aligned: bool, options: Constants, neuron: tuple, gradient: tuple
) -> Planned:
    plan = plan_norm_lif_backward(T, R, D, storage, aligned)
    constants = plan.constants + options + neuron_constants(*neuron) + gradient_constants(*gradient)
    return plan, Program("norm_lif", "backward", storage, constants, gradient[-1])


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
    weight, bias = as_float(weight), as_float(bias)
    aligned = are_aligned(x, weight, bias, v0)
    plan, program = _forward_program(T, R, D, storage, aligned, _options(x, T, scalar_v0), neuron)
    args: list[Argument] = [x, weight, bias, padding_mask, v0, spikes, v, mean, rstd]
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
    tile = backward_tile(R, D, storage, aligned)
    steps = segment_steps(T, tile)
    partials = grad_v0.new_empty(plan.grid[0], 2, D)
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
