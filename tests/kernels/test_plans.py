"""Launch plans are pure functions of sizes; no device, no memory."""

import itertools

import numpy as np
import pytest
import torch

from spikeattn._cuda.launch import LaunchPlan, check_limits, typed
from spikeattn.ops.lif.cuda import SEGMENTS, plan_lif_backward, plan_lif_forward
from spikeattn.ops.norm_lif.cuda import (
    MAX_WIDTH,
    backward_tile,
    fits,
    plan_norm_lif_backward,
    plan_norm_lif_forward,
    segment_steps,
)
from spikeattn.ops.spiking_attention.cuda_plans import (
    plan_attention,
    plan_gather,
    plan_gradients,
    plan_map,
    plan_map_back,
    plan_map_tiles,
    plan_pack,
    plan_scan,
    plan_states,
)

HUGE = 2**31 + 5
TILE = ("Threads", "Elements", "Vector", "Inside")


def tile(plan: LaunchPlan, name: str) -> int:
    """One compile-time constant of a plan."""
    return dict(plan.constants)[name]


@pytest.mark.parametrize("storage", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("N", [1, 127, 128, 129, 2**20, HUGE - 5, HUGE])
@pytest.mark.parametrize("plan_of", [plan_lif_forward, plan_lif_backward])
def test_plans_of_lif_reach_every_neuron_within_the_limits(plan_of, N, storage):
    for T in (1, 7, 32, 1000):
        plan = plan_of(T, N, storage)
        check_limits(plan)
        vector = tile(plan, "kVector")
        assert N % vector == 0
        assert plan.grid[0] * plan.block[0] * vector >= min(N, 2**23)
        assert plan.kernel.endswith(storage)
        assert plan_of(T, N, storage, aligned=False) == plan or vector > 1
        assert tile(plan_of(T, N, storage, aligned=False), "kVector") == 1


def test_loads_are_16_bytes_where_registers_allow():
    for storage, widest in (("f32", 4), ("f16", 8), ("bf16", 8)):
        assert tile(plan_lif_forward(32, 2**22, storage), "kVector") == widest
        assert tile(plan_lif_backward(4, 2**22, storage), "kVector") == widest
        assert tile(plan_lif_forward(32, 2**22, storage, packed=True), "kVector") == 1
    assert tile(plan_lif_forward(32, 1000, "f32"), "kVector") == 1  # too few neurons to keep a device busy


def test_short_trajectories_stay_in_registers_and_long_ones_go_by_segments():
    steps = {T: tile(plan_lif_backward(T, 2**22, "f32"), "kSteps") for T in (1, 4, 5, 32, 33, 64, 65, 10_000)}
    assert steps == {1: 4, 4: 4, 5: 8, 32: 32, 33: 64, 64: 64, 65: 32, 10_000: 32}
    assert all(length % 4 == 0 for length in SEGMENTS)  # kBatch in kernels.cu divides them


@pytest.mark.parametrize("storage", ["f32", "bf16"])
@pytest.mark.parametrize("D", [1, 8, 31, 64, 65, 250, 256, 257, 512, 1000, 2048, MAX_WIDTH - 1, MAX_WIDTH])
@pytest.mark.parametrize("R", [1, 127, 528, HUGE])
def test_plans_of_norm_lif_hold_a_row_within_the_limits(R, D, storage):
    assert fits(D)
    assert not fits(MAX_WIDTH + 1)
    for T, aligned in itertools.product((1, 2, 3, 32, 68, 69, 1000), (True, False)):
        forward = plan_norm_lif_forward(T, R, D, storage, aligned)
        backward = plan_norm_lif_backward(T, R, D, storage, aligned)
        for plan in (forward, backward):
            check_limits(plan)
            threads, elements, vector, inside = (tile(plan, f"k{name}") for name in TILE)
            assert threads * elements >= D
            assert plan.block[0] == threads
            assert elements % vector == D % vector == inside % vector == 0
            assert threads * inside <= D
            assert aligned or vector == 1
        assert tile(forward, "kThreads") in (32, 128)
        steps, batch = segment_steps(T, backward_tile(R, D, storage, aligned)), tile(backward, "kSteps")
        assert steps == T or steps % batch == 0
        assert tile(backward, "kWhole") == (T % batch == 0)


def test_a_warp_owns_a_row_on_the_way_back_if_it_can():
    assert backward_tile(12_288, 256, "bf16") == (32, 8, 8)
    assert backward_tile(12_288, 256, "f32") == (32, 8, 4)
    assert backward_tile(12_288, 250, "f32") == (32, 8, 2)
    assert backward_tile(12_288, 384, "bf16") == (96, 4, 4)  # full, where two warps of 8 elements are not
    assert backward_tile(12_288, 512, "bf16") == (64, 8, 8)
    assert backward_tile(528, 256, "bf16") == (64, 4, 4)  # few rows keep a device busy by more threads


@pytest.mark.parametrize("E", [1, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("heads", [1, 8, 512, HUGE])
def test_plans_of_spiking_attention_reach_every_token_within_the_limits(heads, E):
    words = -(-E // 32)
    for L in (1, 2, 7, 110, 4096):
        for order, is_causal in itertools.product((False, True), repeat=2):
            settings = (heads, L, L, E, "bf16", order, is_causal, True)
            plans = [plan_attention(direction, *settings) for direction in ("forward", "backward")]
            for plan in plans:
                check_limits(plan)
                assert plan.grid[0] * plan.block[0] // 32 >= min(heads * -(-L // 16) * words, 2**18)
            states, (gather, parts) = (
                plan_states(heads, L, E, "bf16", is_causal),
                plan_gather(heads, L, E, "bf16", is_causal),
            )
            check_limits(states)
            assert states.block[0] // 32 % tile(states, "kSplit") == 0
            assert states.shared_bytes == (2048 * states.block[0] // 32 if tile(states, "kSplit") > 1 else 0)
            check_limits(gather)
            assert parts == -(-L // 64) if is_causal else 1 <= parts <= max(1, L // 32)
            gradients = plan_gradients(heads, L, L, E, "bf16", is_causal, True)
            check_limits(gradients)
            assert gradients.grid[1] == 3
        for S in (1, 32, 33, 110, 512):
            plan = plan_map(heads, L, S, E, "bf16")
            check_limits(plan)
            rows = tile(plan, "kRows")
            assert plan.grid[0] * plan.block[0] // 32 >= min(heads * -(-L // rows), 2**18)
            assert rows < 2 * L
            assert rows * words <= 16
            for of_keys in (False, True):
                check_limits(plan_map_back(heads, L, E, "bf16", True, of_keys))
            check_limits(plan_map_tiles(heads, L, E, "bf16", False))
    check_limits(plan_pack(heads, E, "bf16", True))
    check_limits(plan_scan(heads * 1024 * words**2, "bf16"))


def test_states_are_shared_out_where_heads_are_few():
    assert [tile(plan_states(heads, 4096, 64, "f32", False), "kSplit") for heads in (8, 256, 512, 1024)] == [
        16,
        2,
        1,
        1,
    ]
    assert [plan_gather(heads, 4096, 64, "f32", False)[1] for heads in (8, 256, 512, 1024)] == [32, 4, 2, 1]
    assert [tile(plan_states(8, S, 128, "f32", True), "kSplit") for S in (64, 512, 4096)] == [1, 4, 16]


def test_tiles_of_maps_are_wide_where_that_leaves_warps_enough():
    assert [tile(plan_map(512, 110, S, 32, "f32"), "kRows") for S in (32, 110, 256, 512)] == [4, 4, 2, 1]
    assert [tile(plan_map(512, 110, S, 32, "f32"), "kGroups") for S in (1, 33, 110, 129, 512)] == [1, 2, 4, 8, 16]


def test_a_plan_that_no_device_can_launch_is_refused():
    good = LaunchPlan("spk", (1, 1, 1), (128, 1, 1))
    check_limits(good)
    for bad, message in (
        (good._replace(block=(2048, 1, 1)), "1 to 1024 threads"),
        (good._replace(block=(0, 1, 1)), "1 to 1024 threads"),
        (good._replace(grid=(0, 1, 1)), "not empty"),
        (good._replace(grid=(1, 70_000, 1)), "within"),
        (good._replace(shared_bytes=50_000), "48 KiB"),
    ):
        with pytest.raises(ValueError, match=message):
            check_limits(bad)


def test_arguments_are_pointers_long_longs_and_floats():
    x = torch.zeros(3)
    values = typed([x, None, 5, 0.1])
    assert [type(value) for value in values] == [int, int, int, np.float32]  # CuPy makes 8 bytes of an int
    assert values[:3] == [x.data_ptr(), 0, 5]
