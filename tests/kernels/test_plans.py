"""Launch plans are pure functions of sizes; no device, no memory."""

import pytest
import torch

from spikeattn._cuda.launch import LaunchPlan, check_limits, typed
from spikeattn.ops.lif.cuda import SEGMENTS, plan_lif_backward, plan_lif_forward
from spikeattn.ops.norm_lif.cuda import MAX_WIDTH, backward_tile, fits, plan_norm_lif_backward, plan_norm_lif_forward

HUGE = 2**31 + 5


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
    steps = {T: tile(plan_lif_backward(T, 2**22, "f32"), "kSteps") for T in (1, 4, 5, 32, 33, 128, 129, 10_000)}
    assert steps == {1: 4, 4: 4, 5: 8, 32: 32, 33: 64, 128: 128, 129: 32, 10_000: 32}
    assert tile(plan_lif_backward(128, 2**22, "bf16"), "kSteps") == 32  # 128 steps would spill
    assert all(length % 4 == 0 for length in SEGMENTS)  # kBatch in kernels.cu divides them


@pytest.mark.parametrize("D", [1, 31, 64, 65, 256, 257, 512, 1000, 2048, MAX_WIDTH])
@pytest.mark.parametrize("R", [1, 127, 528, HUGE])
def test_plans_of_norm_lif_hold_a_row_within_the_limits(R, D):
    assert fits(D)
    assert not fits(MAX_WIDTH + 1)
    for T in (1, 32, 1000):
        forward, backward = plan_norm_lif_forward(T, R, D, "bf16"), plan_norm_lif_backward(T, R, D, "bf16")
        for plan in (forward, backward):
            check_limits(plan)
            assert tile(plan, "kThreads") * tile(plan, "kElements") >= D
            assert plan.block[0] % tile(plan, "kThreads") == 0
        assert tile(forward, "kThreads") in (32, 128)
        assert 1 <= backward_tile(T, D)[2] <= T


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
    assert [value.dtype.str for value in values] == ["<u8", "<u8", "<i8", "<f4"]
    assert [int(value) for value in values[:3]] == [x.data_ptr(), 0, 5]
