"""Calls of the CUDA kernels, which allocate their outputs. Layout and bytes: ``README.md``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spikeattn._cuda.launch import Argument, LaunchPlan, launch
from spikeattn._cuda.neuron import (
    NO_GRADIENT,
    STORAGE,
    Constants,
    gradient_constants,
    neuron_constants,
    surrogate_scalars,
)
from spikeattn._cuda.source import Program
from spikeattn._leak import leak
from spikeattn.ops.spiking_attention.call import Inputs, Masks, Settings
from spikeattn.ops.spiking_attention.cuda_plans import (
    LANE,
    MAX_MAP_KEYS,
    QUERIES,
    SCRATCH_BYTES,
    SEGMENT,
    is_state_first,
    pieces_of,
    plan_attention,
    plan_gather,
    plan_gradients,
    plan_map,
    plan_map_back,
    plan_map_tiles,
    plan_pack,
    plan_scan,
    plan_states,
    words_of,
)
from spikeattn.ops.spiking_attention.layout import room_for_gradient, rows_in_one_piece, strides
from spikeattn.ops.spiking_attention.reference import CHUNK
from spikeattn.ops.surrogate import surrogate_of

# What spikeattn.cuh and the neuron need where a kernel has no use for it.
_UNUSED = (("kVector", 1), *neuron_constants(2.0, True, 0.0), *NO_GRADIENT)


class Bits(NamedTuple):
    """Spikes of q, k and v as bits; what a call has no use for is None."""

    rows_q: Tensor
    columns_q: Tensor | None
    rows_k: Tensor | None
    columns_k: Tensor | None
    rows_v: Tensor | None
    columns_v: Tensor
    odd: Tensor  # [1], not 0 if there is a number that is no spike
    states: Tensor | None = None  # to attend to; causal ones, which take as much as q, are made when they are needed

    def of_steps(self, steps: slice) -> "Bits":
        """Of some time steps, without states."""
        own = [x if x is None or steps == slice(0, len(x)) else x[steps] for x in self[:6]]
        return Bits(*own, self.odd)  # type: ignore[arg-type, call-arg]


def attention_bits_cuda(inputs: Inputs, settings: Settings, backward: bool) -> Bits:
    """Pack q, k and v, in one piece, for the kernels that fire so, and for those of the way back."""
    q, k, v, _, *masks = inputs
    is_causal = settings.is_causal
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    state_first = is_state_first(S, settings.fire, settings.order)

    def rows(tokens: int) -> Tensor:
        return q.new_empty((T, B, H, tokens, words_of(E)), dtype=torch.int32)

    def columns(tokens: int) -> Tensor:
        return q.new_empty((T, B, H, -(-tokens // 32), 32 * words_of(E)), dtype=torch.int32)

    bits = Bits(
        rows_q=rows(L),
        columns_q=columns(L) if backward else None,
        rows_k=rows(S) if backward or is_causal or not state_first else None,
        columns_k=columns(S) if backward or state_first else None,
        rows_v=rows(S) if backward else None,
        columns_v=columns(S),
        odd=torch.zeros(1, dtype=torch.int32, device=q.device),
    )
    aligned = _are_aligned(16 // q.element_size(), q, k, v)
    plan = plan_pack(T * B * H * -(-max(L, S) // 32), E, storage, aligned)
    args: list[Argument] = [*_starts(q, k, v), *masks, *bits[:7], T, B, H, L, S, E]
    _run("pack", plan, [*args, *strides(q), *strides(k), *strides(v)], q)
    return bits._replace(states=_states(bits, q, S, False)) if state_first and not is_causal else bits


def attention_forward_cuda(inputs: Inputs, settings: Settings, bits: Bits | None = None) -> Tensor:
    """`spiking_attention_reference` of what `takes` takes, [T, B, L, H, E] in memory; ``bits`` of the same call."""
    inputs = inputs.in_one_piece()
    bits = bits or attention_bits_cuda(inputs, settings, False)
    q, k, v, scale, *masks = inputs
    fire, is_causal = settings.fire, settings.is_causal
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    out, width = q.new_empty((T, B, L, H, E)), 32 * words_of(E)
    target, operands = out, [bits.rows_q, bits.rows_k, bits.columns_v]
    if fire == "map" and S > MAX_MAP_KEYS:
        plan, direction = plan_map_tiles(B * H, L, E, storage, is_causal), "map_tiles"
        target, constants = q.new_empty((T, B, H, L, width), dtype=torch.float32), plan.constants
    elif fire == "map":
        plan, direction = plan_map(B * H, L, S, E, storage, is_causal), "map"
        constants = plan.constants
    else:
        state_first = is_state_first(S, fire, settings.order)
        operands.append(_states_to_attend_to(bits, q, S, is_causal) if state_first else None)
        plan = plan_attention("forward", B * H, L, S, E, storage, state_first, is_causal, E % LANE == 0)
        direction, constants = "forward", (*plan.constants, ("kFires", int(fire == "output")))
    constants += _neuron(settings) + NO_GRADIENT
    args: list[Argument] = [*operands, *_starts(scale), bits.odd, *_starts(q, k, v), *masks, target]
    args += [*_sizes(inputs), *_scalars(settings)]
    launch(plan, Program("spiking_attention", direction, storage, constants), args, q.device)
    if target is not out:
        out.copy_(target[..., :E].transpose(2, 3))
    return out.transpose(2, 3)


def attention_backward_cuda(grad: Tensor, inputs: Inputs, settings: Settings, bits: Bits) -> Tensor:
    """``scale dL/dY`` [T, B, H, L, 32 words] where the output fires, Y the currents: float32, or bfloat16 of bfloat16.

    ``inputs`` in one piece, and ``bits`` of them.
    """
    q, k, v, scale, *masks = inputs
    is_causal = settings.is_causal
    grad = rows_in_one_piece(grad.to(q.dtype))
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    state_first = is_state_first(S, "output", settings.order)
    out = q.new_empty((T, B, H, L, 32 * words_of(E)), dtype=_gradient_dtype(q))
    plan = plan_attention("backward", B * H, L, S, E, storage, state_first, is_causal, _are_aligned(LANE, grad))
    tiles = B * H * -(-L // QUERIES) * words_of(E)
    checkpoints = q.new_empty((-(-T // SEGMENT) - 1) * tiles * 32 * 2 * LANE, dtype=torch.float32)
    states = _states_to_attend_to(bits, q, S, is_causal) if state_first else None
    args: list[Argument] = [*_starts(grad), bits.rows_q, bits.rows_k, bits.columns_v, states]
    args += [*_starts(scale), bits.odd, *_starts(q, k, v), *masks, out, checkpoints]
    args += [*_sizes(inputs), *strides(grad), *_scalars(settings)]
    args += surrogate_scalars(settings.surrogate, settings.alpha)
    launch(plan, _gradient_program("backward", storage, plan, settings), args, q.device)
    return out


def attention_gradients_cuda(
    grad: Tensor, inputs: Inputs, settings: Settings, bits: Bits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as these; ``bits`` of the same call, for the way back."""
    outs = [room_for_gradient(x) for x in inputs[:3]]
    inputs = inputs.in_one_piece()
    bits = bits or attention_bits_cuda(inputs, settings, True)
    q, k, v, scale, *_ = inputs
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    if settings.fire == "map":
        wide = _gradients_of_map(_wide(grad, q), inputs, settings, bits)
        own = inputs.masked(*(x[..., :E] for x in wide))
        grad_q, grad_k, grad_v = (out.copy_(x) for out, x in zip(outs, own, strict=True))
        return grad_q, grad_k, grad_v
    if settings.fire == "output":
        grad = attention_backward_cuda(grad, inputs, settings, bits)
    else:
        grad = _wide(grad * scale, q)
    for steps in _slices(T, B * H, L, S, E, storage, settings.is_causal):
        tensors = [x if steps == slice(0, T) else x[steps] for x in (grad, q, k, v, *outs)]
        _gradients_of_products(tensors, inputs.masks, bits.of_steps(steps), settings.is_causal)
    grad_q, grad_k, grad_v = outs
    return grad_q, grad_k, grad_v


def _slices(T: int, heads: int, L: int, S: int, E: int, storage: str, is_causal: bool) -> list[slice]:
    """Time steps together as long as their states and sums take no more than `SCRATCH_BYTES`."""
    _, parts = plan_gather(T * heads, L, E, storage, is_causal)
    chunks, size = -(-S // CHUNK) if is_causal else 1, 2 if storage == "bf16" else 4
    bytes_a_step = heads * (32 * words_of(E)) ** 2 * (2 * chunks * pieces_of(S) + 2 * parts * size)
    steps = max(1, min(T, SCRATCH_BYTES // bytes_a_step))
    return [slice(t, min(T, t + steps)) for t in range(0, T, steps)]


def _gradients_of_products(tensors: Sequence[Tensor], masks: Masks, bits: Bits, is_causal: bool) -> None:
    """Write the gradients of q, k and v; ``tensors`` are G [T, B, H, L, 32 words], q, k, v and these gradients."""
    grad, q, k, v, *outs = tensors
    (T, B, H, L, E), S, storage, heads = q.shape, k.shape[3], STORAGE[q.dtype], q.shape[:3].numel()
    width = 32 * words_of(E)
    states = _states(bits, q, S, is_causal, back=True)
    plan, parts = plan_gather(heads, L, E, storage, is_causal)
    sums = grad.new_empty((2, parts, heads, width, width))
    _run("gather", plan, [grad, bits.columns_q, sums[0], sums[1], parts, heads, L], q)
    if is_causal:
        count = sums[0, 0].numel()
        _run("scan", plan_scan(count, storage), [sums, parts, count], q)
    elif parts > 1:
        sums = sums.sum(1)
    plan = plan_gradients(heads, L, S, E, storage, is_causal, _are_aligned(LANE, *outs))
    args: list[Argument] = [grad, bits.rows_q, bits.columns_q, bits.rows_k, bits.columns_k, bits.rows_v, states]
    args += [sums[0], sums[1], bits.odd, *_starts(q, k, v), *masks, *_starts(*outs)]
    args += [T, B, H, L, S, E, *(stride for x in (q, k, v, *outs) for stride in strides(x))]
    _run("gradients", plan, args, q)


def _gradients_of_map(grad: Tensor, inputs: Inputs, settings: Settings, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32 [T, B, H, tokens, 32 words] where the map fires."""
    q, k, v, scale, *masks = inputs
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    args: list[Argument] = [grad, bits.rows_q, bits.columns_q, bits.rows_k, bits.columns_k, bits.rows_v]
    args += [*_starts(scale), bits.odd, *_starts(q, k, v), *masks]
    rest = [*_sizes(inputs), *_scalars(settings), *surrogate_scalars(settings.surrogate, settings.alpha)]
    shapes = [(*x.shape[:-1], 32 * words_of(E)) for x in (q, k, v)]
    grad_q, grad_k, grad_v = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    for of_keys, outs in enumerate(((grad_q, None), (grad_k, grad_v))):
        rows = S if of_keys else L
        plan = plan_map_back(B * H, rows, E, storage, settings.is_causal, bool(of_keys))
        count = (-(-T // SEGMENT) - 1) * B * H * -(-rows // 16) * 32 * 16
        checkpoints = q.new_empty(count, dtype=torch.float32)
        program = _gradient_program("map_back", storage, plan, settings)
        launch(plan, program, [*args, *outs, checkpoints, *rest], q.device)
    return grad_q, grad_k, grad_v


def _wide(grad: Tensor, q: Tensor) -> Tensor:
    """``grad`` [T, B, H, L, E] with zeros up to 32 words, contiguous, in the dtype of G."""
    width = 32 * words_of(q.shape[-1])
    return torch.nn.functional.pad(grad, (0, width - q.shape[-1])).to(_gradient_dtype(q)).contiguous()


def _states_to_attend_to(bits: Bits, q: Tensor, S: int, is_causal: bool) -> Tensor:
    return _states(bits, q, S, is_causal) if bits.states is None else bits.states


def _states(bits: Bits, q: Tensor, S: int, is_causal: bool, back: bool = False) -> Tensor:
    """V^T K by bytes, and for the way back K^T V by bytes in bfloat16; if causal before every chunk."""
    (T, B, H, _, E), storage = q.shape, STORAGE[q.dtype]
    plan = plan_states(T * B * H, S, E, storage, is_causal, back)
    shape = (T, B, H, -(-S // CHUNK) if is_causal else 1, pieces_of(S), 32 * words_of(E), 32 * words_of(E))
    states = q.new_empty(shape, dtype=torch.bfloat16 if back else torch.uint8)
    keys, values = (bits.columns_v, bits.columns_k) if back else (bits.columns_k, bits.columns_v)
    _run("states_back" if back else "states", plan, [keys, values, states, T * B * H, S], q)
    return states


def _run(direction: str, plan: LaunchPlan, args: list[Argument], q: Tensor) -> None:
    """Launch a kernel without a neuron."""
    program = Program("spiking_attention", direction, STORAGE[q.dtype], plan.constants + _UNUSED)
    launch(plan, program, args, q.device)


def _sizes(inputs: Inputs) -> list[Argument]:
    """Sizes, and strides of the scale and the spikes, for kernels with neurons."""
    q, k, v, scale, *_ = inputs
    T, B, H, L, E = q.shape
    return [T, B * H, H, L, k.shape[3], E, *strides(scale), *strides(q), *strides(k), *strides(v)]


def _scalars(settings: Settings) -> list[Argument]:
    """What neurons are given by value."""
    return [leak(settings.tau), float(settings.v_threshold), float(settings.v_reset or 0.0)]


def _neuron(settings: Settings) -> Constants:
    return (("kVector", 1), *neuron_constants(settings.tau, True, settings.v_reset))


def _gradient_program(direction: str, storage: str, plan: LaunchPlan, settings: Settings) -> Program:
    """A kernel that goes back through neurons, with a surrogate's own spelling, if it has one for CUDA."""
    derivative = getattr(surrogate_of(settings.surrogate, settings.alpha), "cuda", None)
    gradient = gradient_constants(settings.detach_reset, settings.surrogate, derivative)
    constants = (*plan.constants, *_neuron(settings), *gradient)
    return Program("spiking_attention", direction, storage, constants, derivative)


def _gradient_dtype(x: Tensor) -> torch.dtype:
    """Of G: that of the sums, or bfloat16 (docs/numerics.md)."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _are_aligned(elements: int, *tensors: Tensor) -> bool:
    """Whether every row of ``tensors`` begins at a multiple of so many elements, and of 16 bytes, and ends at one."""
    return all(
        x.data_ptr() % 16 == 0 and x.shape[-1] % elements == 0 and all(stride % elements == 0 for stride in strides(x))
        for x in tensors
    )


def _starts(*tensors: Tensor) -> list[Argument]:
    """Where the memory of strided tensors begins."""
    return [x.as_strided((1,), (1,)) for x in tensors]
