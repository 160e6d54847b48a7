"""Launch plans of the CUDA kernels: pure functions of sizes. Layout and bytes: ``README.md``."""

from collections.abc import Sequence
from functools import lru_cache

from spikeattn._cuda.launch import LaunchPlan
from spikeattn.ops.spiking_attention.reference import CHUNK

BLOCK = 128
MAX_BLOCKS = 2**16  # far more than any device runs at once; the rest strides
BUSY_WARPS = 2**12  # as many keep a device busy

MAX_CHANNELS = 128  # of a head: 4 words of spikes
MAX_TOKENS = 2**24  # sums of bytes stay below 2**31
MAX_GROUPS = 2**26  # of 32 tokens, of all heads and steps: tasks are counted in 32 bits
MAX_MAP_KEYS = 512  # of spk_attention_map: the potentials of a query with all of them stay in registers

QUERIES = 16  # of a warp of spk_attention_forward and _backward; kQueries in kernels.cu
LANE = 8  # channels of a query that a lane holds there; kLane in kernels.cu
SEGMENT = 4  # steps between checkpoints on the way back; kSegment in kernels.cu
SCRATCH_BYTES = 2**27  # of states and sums of gradients at once, but of one step at least
MAP_SUMS = 16  # potentials that a lane of spk_attention_map holds at most
FEW_KEYS = 64  # up to so many, counting keys costs less than making a state and reading it


def takes(shape: Sequence[int], S: int) -> bool:
    """Whether the kernels take queries of a ``shape`` [T, B, H, L, E] and S keys; products and `lif` run the others."""
    T, B, H, L, E = shape
    tokens = max(L, S)
    return E <= MAX_CHANNELS and tokens < MAX_TOKENS and T * B * H * -(-tokens // 32) < MAX_GROUPS


@lru_cache(maxsize=1024)
def plan_pack(tokens: int, E: int, storage: str, aligned: bool) -> LaunchPlan:
    """Plan of ``spk_attention_pack`` of three times so many groups of 32 ``tokens``, over all steps and heads."""
    constants = ("kWords", words_of(E)), ("kAligned", int(aligned))
    grid = (_grid(tokens * words_of(E))[0], 3, 1)
    return LaunchPlan(f"spk_attention_pack_{storage}", grid, (BLOCK, 1, 1), 0, constants)


@lru_cache(maxsize=1024)
def plan_states(heads: int, S: int, E: int, storage: str, is_causal: bool, back: bool = False) -> LaunchPlan:
    """Plan of ``spk_attention_states``, or ``_states_back``; ``heads`` of all steps."""
    words, split = words_of(E), 1
    units, tasks = -(-S // (CHUNK if is_causal else 32)), heads * 2 * words_of(E) ** 2
    while split < 16 and 4 * split <= units and tasks * split < BUSY_WARPS:
        split *= 2
    constants = ("kWords", words), ("kPieces", pieces_of(S)), ("kSplit", split), ("kCausal", int(is_causal))
    threads = max(BLOCK, 32 * split)
    shared = 2048 * threads // 32 if split > 1 else 0
    grid = min(-(-tasks * split * 32 // threads), MAX_BLOCKS)
    name = "states_back" if back else "states"
    return LaunchPlan(f"spk_attention_{name}_{storage}", (grid, 1, 1), (threads, 1, 1), shared, constants)


@lru_cache(maxsize=1024)
def plan_attention(
    direction: str, heads: int, L: int, S: int, E: int, storage: str, state_first: bool, is_causal: bool, aligned: bool
) -> LaunchPlan:
    """Plan of ``spk_attention_forward`` or ``spk_attention_backward``: the same for any T."""
    words = words_of(E)
    order = ("kPieces", pieces_of(S) if state_first else 1), ("kStateFirst", int(state_first))
    constants = ("kWords", words), *order, ("kCausal", int(is_causal)), ("kAligned", int(aligned))
    shared = 4 * 2 * LANE * (SEGMENT + 1) * BLOCK if direction == "backward" else 0
    grid = _grid(heads * -(-L // QUERIES) * words)
    return LaunchPlan(f"spk_attention_{direction}_{storage}", grid, (BLOCK, 1, 1), shared, constants)


@lru_cache(maxsize=1024)
def plan_gather(heads: int, L: int, E: int, storage: str, is_causal: bool) -> tuple[LaunchPlan, int]:
    """Plan of ``spk_attention_gather``, and in how many parts the tokens are summed: if causal the chunks."""
    words, parts = words_of(E), -(-L // CHUNK) if is_causal else 1
    # Of 16 channels of the queries: registers hold the sums of four, but float32 is split once for all of them.
    tiles = (2, 2 if storage == "bf16" else 4, 3, 4)[words - 1]
    warps = heads * words * 2 * words // tiles
    while not is_causal and 8 * parts <= -(-L // 32) and warps * parts < BUSY_WARPS // 2:
        parts *= 2
    constants = ("kWords", words), ("kTiles", tiles), ("kCausal", int(is_causal))
    return LaunchPlan(f"spk_attention_gather_{storage}", _grid(warps * parts), (BLOCK, 1, 1), 0, constants), parts


@lru_cache(maxsize=1024)
def plan_scan(count: int, storage: str) -> LaunchPlan:
    """Plan of ``spk_attention_scan`` of twice so many numbers a chunk."""
    grid = (_grid(-(-count // 256))[0], 2, 1)
    return LaunchPlan(f"spk_attention_scan_{storage}", grid, (BLOCK, 1, 1), 0, (("kWords", 1),))


@lru_cache(maxsize=1024)
def plan_gradients(heads: int, L: int, S: int, E: int, storage: str, is_causal: bool, aligned: bool) -> LaunchPlan:
    """Plan of ``spk_attention_gradients``; ``heads`` of all steps."""
    constants = (
        ("kWords", words_of(E)),
        ("kPieces", pieces_of(S)),
        ("kCausal", int(is_causal)),
        ("kAligned", int(aligned)),
    )
    grid = (_grid(heads * -(-max(L, S) // QUERIES))[0], 3, 1)
    return LaunchPlan(f"spk_attention_gradients_{storage}", grid, (BLOCK, 1, 1), 0, constants)


@lru_cache(maxsize=1024)
def plan_map(heads: int, L: int, S: int, E: int, storage: str, is_causal: bool = False) -> LaunchPlan:
    """Plan of ``spk_attention_map``; the same for any T."""
    groups = 1 << (-(-S // 32) - 1).bit_length()  # a power of two: fewer programs to compile
    rows = max(1, min(4, MAP_SUMS // groups))
    while rows > 1 and (rows >= 2 * L or heads * -(-L // rows) < BUSY_WARPS):
        rows //= 2  # as many queries as share a key, as long as there is work for enough warps
    constants = ("kWords", words_of(E)), ("kRows", rows), ("kGroups", groups), ("kCausal", int(is_causal))
    tasks = heads * -(-L // rows)
    return LaunchPlan(f"spk_attention_map_{storage}", _grid(tasks), (BLOCK, 1, 1), 0, constants)


@lru_cache(maxsize=1024)
def plan_map_tiles(heads: int, L: int, E: int, storage: str, is_causal: bool) -> LaunchPlan:
    """Plan of ``spk_attention_map_tiles``; the same for any T and S."""
    constants = ("kWords", words_of(E)), ("kCausal", int(is_causal)), ("kOfKeys", 0)
    grid = _grid(heads * -(-L // 16))
    return LaunchPlan(f"spk_attention_map_tiles_{storage}", grid, (BLOCK, 1, 1), 4 * 16 * BLOCK, constants)


@lru_cache(maxsize=1024)
def plan_map_back(heads: int, rows: int, E: int, storage: str, is_causal: bool, of_keys: bool) -> LaunchPlan:
    """Plan of ``spk_attention_map_back`` of so many ``rows``, queries or keys; the same for any T and other side."""
    constants = ("kWords", words_of(E)), ("kCausal", int(is_causal)), ("kOfKeys", int(of_keys))
    shared = 4 * 16 * (SEGMENT + 2) * BLOCK
    grid = _grid(heads * -(-rows // 16))
    return LaunchPlan(f"spk_attention_map_back_{storage}", grid, (BLOCK, 1, 1), shared, constants)


def words_of(E: int) -> int:
    """Words of 32 bits that a token takes."""
    return -(-E // 32)


def pieces_of(S: int) -> int:
    """Bytes of a count of up to ``S`` tokens."""
    return -(-S.bit_length() // 8)


def _grid(warps: int) -> tuple[int, int, int]:
    return min(-(-warps * 32 // BLOCK), MAX_BLOCKS), 1, 1


def is_state_first(S: int, fire: str | None, order: str) -> bool:
    """Whether states come first: where that is asked for, or is cheaper."""
    return fire != "map" and (order == "state_first" or (order == "auto" and S > FEW_KEYS))
