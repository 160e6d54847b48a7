"""Launch plans of the CUDA kernels and the calls that allocate their outputs. Layout and bytes: ``README.md``."""

from functools import lru_cache

import torch
from torch import Tensor

from spikeattn._cuda.launch import Argument, LaunchPlan, launch
from spikeattn._cuda.neuron import NO_GRADIENT, STORAGE, gradient_constants, neuron_constants, surrogate_scalars
from spikeattn._cuda.source import Program
from spikeattn._leak import leak
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece, strides
from spikeattn.ops.spiking_attention.reference import CHUNK, cheaper_order

BLOCK = 128
MAX_BLOCKS = 2**16  # far more than any device runs at once; the rest strides
BUSY_WARPS = 2**12  # below this narrower tiles that keep more warps busy are preferred

MAX_CHANNELS = 128  # of a head: 4 words of spikes
MAX_MAP_KEYS = 512  # where the map fires: the potentials of a query with all of them stay in registers

LANE_SUMS = 16  # sums, or potentials, of a tile that a lane holds at most
STATE_ROWS = 8  # channels of keys a warp of spk_attention_states; divides 32

# What spikeattn.cuh and the neuron need where a kernel has no use for it.
UNUSED = (("kVector", 1), *neuron_constants(2.0, True, 0.0), *NO_GRADIENT)


def takes(S: int, E: int, fire: str | None) -> bool:
    """Whether the kernels take such a call; matrix products and `lif` run the others."""
    return E <= MAX_CHANNELS and (fire != "map" or S <= MAX_MAP_KEYS)


@lru_cache(maxsize=1024)
def plan_pack(tokens: int, E: int, storage: str, transposed: bool) -> LaunchPlan:
    """Plan of ``spk_attention_pack`` of so many groups of 32 ``tokens``, over all steps and heads."""
    words = _words(E)
    constants = ("kWords", words), ("kTransposed", int(transposed))
    return LaunchPlan(f"spk_attention_pack_{storage}", _grid(tokens * words), (BLOCK, 1, 1), 0, constants)


@lru_cache(maxsize=1024)
def plan_states(heads: int, E: int, storage: str, is_causal: bool = False) -> LaunchPlan:
    """Plan of ``spk_attention_states``; ``heads`` of all steps."""
    constants = ("kWords", _words(E)), ("kRows", STATE_ROWS), ("kCausal", int(is_causal))
    tasks = heads * -(-E // STATE_ROWS)
    return LaunchPlan(f"spk_attention_states_{storage}", _grid(tasks), (BLOCK, 1, 1), 0, constants)


@lru_cache(maxsize=1024)
def plan_attention(
    direction: str, heads: int, L: int, E: int, storage: str, state_first: bool, is_causal: bool = False
) -> LaunchPlan:
    """Plan of ``spk_attention_forward`` or ``spk_attention_backward``: the same for any T and S."""
    words = _words(E)
    rows = _rows(heads, L, 8 if words <= 2 else LANE_SUMS // 4)
    constants = ("kWords", words), ("kRows", rows), ("kStateFirst", int(state_first)), ("kCausal", int(is_causal))
    shared = 0 if state_first and not is_causal else 4 * rows * BLOCK
    tasks = heads * -(-L // rows)
    return LaunchPlan(f"spk_attention_{direction}_{storage}", _grid(tasks), (BLOCK, 1, 1), shared, constants)


@lru_cache(maxsize=1024)
def plan_map(heads: int, L: int, S: int, E: int, storage: str, is_causal: bool = False) -> LaunchPlan:
    """Plan of ``spk_attention_map``; the same for any T."""
    groups = 1 << (-(-S // 32) - 1).bit_length()  # a power of two: fewer programs to compile
    rows = _rows(heads, L, max(1, min(4, LANE_SUMS // groups)))
    constants = ("kWords", _words(E)), ("kRows", rows), ("kGroups", groups), ("kCausal", int(is_causal))
    tasks = heads * -(-L // rows)
    return LaunchPlan(f"spk_attention_map_{storage}", _grid(tasks), (BLOCK, 1, 1), 0, constants)


def _words(E: int) -> int:
    return -(-E // 32)


def _rows(heads: int, L: int, most: int) -> int:
    """Queries a warp: as many as share a key, as long as there is work for enough warps."""
    rows = most
    while rows > 1 and (rows >= 2 * L or heads * -(-L // rows) < BUSY_WARPS):
        rows //= 2
    return rows


def _grid(warps: int) -> tuple[int, int, int]:
    return min(-(-warps * 32 // BLOCK), MAX_BLOCKS), 1, 1


def attention_forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    fire: str | None,
    order: str,
    is_causal: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
) -> Tensor:
    """`spiking_attention_reference` of what `takes` takes, [T, B, L, H, E] in memory."""
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    out = q.new_empty((T, B, L, H, E))
    state_first = _is_state_first(L, S, E, fire, order, is_causal)
    q, k, v = (rows_in_one_piece(x) for x in (q, k, v))
    masks = in_one_piece(query_padding_mask), in_one_piece(key_padding_mask)
    odd = torch.zeros(1, dtype=torch.int32, device=q.device)
    operands = _operands(q, k, v, *masks, odd, state_first, is_causal)
    if fire == "map":
        plan, operands = plan_map(B * H, L, S, E, storage, is_causal), operands[:3]
        direction, constants = "map", plan.constants
    else:
        plan = plan_attention("forward", B * H, L, E, storage, state_first, is_causal)
        direction, constants = "forward", (*plan.constants, ("kFires", int(fire == "output")))
    constants += _neuron(tau, v_reset) + NO_GRADIENT
    args: list[Argument] = [*operands, _start(scale), odd, _start(q), _start(k), _start(v), *masks, out]
    args += [T, B * H, H, L, S, E, *strides(scale), *strides(q), *strides(k), *strides(v)]
    args += [leak(tau), float(v_threshold), float(v_reset or 0.0)]
    launch(plan, Program("spiking_attention", direction, storage, constants), args, q.device)
    return out.transpose(2, 3)


def attention_backward_cuda(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    order: str,
    is_causal: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    derivative: str | None = None,
) -> Tensor:
    """``scale dL/dY`` [T, B, H, L, E] in float32 where the output fires, Y the currents.

    ``derivative`` is a surrogate's own spelling, as for `lif_backward_cuda`.
    """
    (T, B, H, L, E), S, storage = q.shape, k.shape[3], STORAGE[q.dtype]
    grad = rows_in_one_piece(grad.to(q.dtype))
    state_first = _is_state_first(L, S, E, "output", order, is_causal)
    q, k, v = (rows_in_one_piece(x) for x in (q, k, v))
    masks = in_one_piece(query_padding_mask), in_one_piece(key_padding_mask)
    odd = torch.zeros(1, dtype=torch.int32, device=q.device)
    operands = _operands(q, k, v, *masks, odd, state_first, is_causal)
    out = q.new_empty(q.shape, dtype=torch.float32)
    plan = plan_attention("backward", B * H, L, E, storage, state_first, is_causal)
    constants = (*plan.constants, *_neuron(tau, v_reset))
    constants += gradient_constants(detach_reset, surrogate, derivative)
    args: list[Argument] = [_start(grad), *operands, _start(scale), odd, _start(q), _start(k), _start(v), *masks, out]
    args += [T, B * H, H, L, S, E, *strides(scale), *strides(q), *strides(k), *strides(v), *strides(grad)]
    args += [leak(tau), float(v_threshold), float(v_reset or 0.0)]
    args += surrogate_scalars(surrogate, alpha)
    launch(plan, Program("spiking_attention", "backward", storage, constants, derivative), args, q.device)
    return out


def _is_state_first(L: int, S: int, E: int, fire: str | None, order: str, is_causal: bool) -> bool:
    if order == "auto" and fire != "map":
        order = cheaper_order(L, S, E, E, is_causal)
    return order == "state_first"


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    odd: Tensor,
    state_first: bool,
    is_causal: bool,
) -> list[Tensor | None]:
    """Rows of Q, rows of K and columns of V where there is a map, the states where they come first."""
    queries = _packed(q, query_padding_mask, odd, transposed=False)
    values = _packed(v, key_padding_mask, odd, transposed=True)
    keys = None if state_first and not is_causal else _packed(k, key_padding_mask, odd, transposed=False)
    if not state_first:
        return [queries, keys, values, None]
    states = _states(_packed(k, key_padding_mask, odd, transposed=True), values, k, is_causal)
    return [queries, keys, values, states]


def _packed(x: Tensor, padding_mask: Tensor | None, odd: Tensor, transposed: bool) -> Tensor:
    """Spikes [T, B, H, L, E] as bits: columns if ``transposed``, else rows; ``odd`` is set where one is no spike."""
    (T, B, H, L, E), storage = x.shape, STORAGE[x.dtype]
    words, groups = _words(E), -(-L // 32)
    shape = (T, B, H, groups, 32 * words) if transposed else (T, B, H, L, words)
    packed = x.new_empty(shape, dtype=torch.int32)
    plan = plan_pack(T * B * H * groups, E, storage, transposed)
    args: list[Argument] = [_start(x), padding_mask, packed, odd, T, B, H, L, E, *strides(x)]
    launch(plan, Program("spiking_attention", "pack", storage, plan.constants + UNUSED), args, x.device)
    return packed


def _states(keys: Tensor, values: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """K^T V [T, B, H, chunks, E, 32 words] of columns; of those before each chunk if causal, else one."""
    (T, B, H, S, E), storage = k.shape, STORAGE[k.dtype]
    chunks = -(-S // CHUNK) if is_causal else 1
    states = k.new_empty((T, B, H, chunks, E, 32 * _words(E)), dtype=torch.float32)
    plan = plan_states(T * B * H, E, storage, is_causal)
    program = Program("spiking_attention", "states", storage, plan.constants + UNUSED)
    launch(plan, program, [keys, values, states, T * B * H, S, E], k.device)
    return states


def _neuron(tau: float, v_reset: float | None) -> tuple[tuple[str, int], ...]:
    return ("kVector", 1), *neuron_constants(tau, True, v_reset)


def _start(x: Tensor) -> Tensor:
    """Where the memory of a strided ``x`` begins."""
    return x.as_strided((1,), (1,))
