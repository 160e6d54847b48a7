"""How CPU kernels run: threads, forks, processes, kept compilations, freed memory."""

import inspect
import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from lif_helpers import results, run_python

import spikeattn
from spikeattn import LIF, ATan, lif
from spikeattn._cpu import compiler, threads
from spikeattn._cpu.memory import Pool
from spikeattn.ops.lif import cpu
from spikeattn.ops.spiking_attention import cpu_backward, cpu_inputs, cpu_state


@pytest.fixture
def many_threads():
    """More threads than a small machine has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def heavy(seed):
    """Enough work for several threads, with every gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, v0 = torch.randn(8, 20_000, generator=generator) * 3, torch.randn(20_000, generator=generator)
    outputs, grads = results(x, v0, "numba", tau=4.0, learned=True, surrogate=ATan())
    return [*outputs, *grads]


def test_the_number_of_threads_changes_no_bit(many_threads):
    wanted = heavy(0)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        assert all(map(torch.equal, heavy(0), wanted))


COUNT = compiler.Frame("hits limit")
_record = COUNT.record


def count_blocks(frame):
    """A kernel that counts how often it is given each block, and runs into an error from ``limit`` on."""
    p = numba.carray(frame, 1, _record)[0]
    hits = compiler.memory(p.hits, p.blocks, np.int64)
    first, last = compiler.next_blocks(frame, p.pieces, p.blocks, 0)
    while first < last:
        for block in range(first, last):
            if block >= p.limit:
                raise MemoryError
            hits[block] += 1
        first, last = compiler.next_blocks(frame, p.pieces, p.blocks, 1)


@pytest.fixture(params=["openmp", "pool"])
def team(request, monkeypatch):
    """Both kinds of threads."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    else:
        assert threads._gomp_parallel() is not None


def test_every_block_is_run_once_by_as_many_threads_as_torch_says(many_threads, team, monkeypatch):
    kernel = compiler.Kernel(count_blocks, COUNT, keep=False)
    for number, blocks in itertools.product((1, 2, 4), (1, 3, 64)):
        torch.set_num_threads(number)
        hits = np.zeros(blocks, np.int64)
        threads.spread(kernel, blocks, 1 << 30, hits=hits.ctypes.data, limit=blocks)
        assert hits.tolist() == [1] * blocks


def test_kernels_run_on_pytorchs_own_threads(many_threads, monkeypatch):
    parallel, calls = threads._gomp_parallel(), []

    def recorded(function, frame, number, flags):
        calls.append(number)
        parallel(function, frame, number, flags)

    monkeypatch.setattr(threads, "_gomp_parallel", lambda: recorded)
    heavy(0)
    torch.set_num_threads(3)
    heavy(0)
    assert set(calls) == {4, 3}
    torch.set_num_threads(1)
    heavy(0)
    assert set(calls) == {4, 3}  # one thread: no team


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what numba prints
def test_a_kernel_that_stops_early_is_an_error_and_not_a_result(many_threads, team):
    kernel = compiler.Kernel(count_blocks, COUNT, keep=False)
    hits = np.zeros(64, np.int64)
    with pytest.raises(MemoryError, match="count_blocks"):
        threads.spread(kernel, 64, 1 << 30, hits=hits.ctypes.data, limit=40)


def test_calls_from_several_threads_at_once_are_right(many_threads, team):
    wanted, got = [heavy(seed) for seed in range(8)], {}

    def call(seed):
        torch.set_num_threads(4)
        for _ in range(3):
            got[seed] = heavy(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    for seed in range(8):
        assert all(map(torch.equal, got[seed], wanted[seed]))


class Fired(torch.utils.data.Dataset):
    """Runs neurons, forward and backward, in the worker that loads, on several threads."""

    def __init__(self):
        self.x, self.v0 = [torch.randn(8, 20_000) * 3 for _ in range(4)], torch.randn(20_000)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        torch.set_num_threads(4)  # a worker has one by itself
        settings = (8, 2.0, True, 1.0, 0.0, False)
        spikes, v, _ = lif(self.x[i], self.v0, backend="numba")
        grads = torch.ops.spikeattn.lif_backward(
            spikes, v, None, self.x[i], self.v0, None, *settings, "atan", 2.0, "numba"
        )
        torch.set_num_threads(1)  # PyTorch's own threads (OpenMP) do not outlive a fork
        return [spikes, v, *grads]


def test_forked_loader_workers_are_right(many_threads):
    dataset = Fired()
    wanted = [dataset[i] for i in range(4)]  # the pool of this process is running when it forks
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, want in zip(loader, wanted, strict=True):
        assert all(map(torch.equal, got, want))


FORK_SCRIPT = """
import os, signal, torch
from spikeattn import lif
torch.set_num_threads(2)
x = torch.full((4, 100_000), 2.0)  # on PyTorch's threads; no kernel of ours has run
child = os.fork()
if child == 0:
    signal.alarm(60)
    spikes = lif(x, backend="numba").spikes
    os._exit(0 if spikes.numpy().all() else 1)  # not by PyTorch, which hangs here
print(os.waitpid(child, 0)[1])
"""


def test_the_first_kernel_may_run_in_a_forked_process():
    assert run_python(FORK_SCRIPT).strip() == "0"


def train_one_step(rank, folder):
    """Rank ``rank`` of two: one step on its half of a batch, the gradient left in ``folder``."""
    torch.set_num_threads(2)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    model = torch.nn.parallel.DistributedDataParallel(network())
    model(batch()[:, rank * 500 : (rank + 1) * 500]).mean().backward()
    torch.save(model.module[0].weight.grad, f"{folder}/{rank}.pt")
    # The model first: its reducer, if it is the last to let go of the process group, joins Gloo's threads while holding
    # the interpreter's lock, which one of them may be waiting for.
    del model
    torch.distributed.destroy_process_group()


def network():
    """A small spiking network, the same in every process."""

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 64), LIF(surrogate_function=ATan(), backend="numba"))


def batch():
    """Its input [T, B, 8]."""
    return torch.randn(8, 1000, 8, generator=torch.Generator().manual_seed(1)) * 3


def test_two_ddp_processes_agree_with_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    processes = torch.multiprocessing.spawn(train_one_step, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not processes.join(timeout=1):
        assert time.monotonic() < deadline, "a process hangs"
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    model = network()
    model(batch()).mean().backward()
    torch.testing.assert_close(first, model[0].weight.grad, rtol=1e-4, atol=1e-6)


CACHE_SCRIPT = """
import torch
from numba.core import event
from spikeattn import lif, norm_lif
with event.install_recorder("numba:compile") as recorder:
    x = torch.randn(4, 3, 5, requires_grad=True)
    lif(x, backend="numba").spikes.sum().backward()
    norm_lif(x, torch.ones(5), torch.zeros(5), backend="numba").spikes.sum().backward()
print(len(recorder.buffer))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    first, second = (int(run_python(CACHE_SCRIPT, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert first > 0
    assert second == 0


def test_a_changed_helper_is_part_of_the_key_of_every_kernel():
    kind = (torch.float32, True, True, True)
    for kernel in (cpu.forward_kernel(*kind), cpu.backward_kernel(*kind, False, True)):
        plans = [cell.cell_contents for cell in kernel.function.__closure__ if isinstance(cell.cell_contents, tuple)]
        assert [plan[-1] for plan in plans] == [compiler.SOURCES]


def test_whatever_a_kernel_inlines_is_part_of_that_key():
    """Every function of this package that is compiled by numba lies in a file of the digest."""
    kernels = {Path(inspect.getfile(module)) for module in (cpu, cpu_inputs, cpu_state, cpu_backward)}
    texts = {path: path.read_text() for path in Path(spikeattn.__file__).parent.rglob("*.py")}
    compiled = {path for path, text in texts.items() if "@inline" in text or "numba.carray(" in text}
    assert kernels <= compiled <= set(compiler.sources())


def test_addresses_become_pointers_in_one_place_that_keeps_what_is_read_and_written_there():
    """Elsewhere LLVM would be free to drop it, and did: a loop of the gradients of attention was gone."""
    sources = [path.read_text() for path in compiler.sources()]
    found = [line.strip() for source in sources for line in source.splitlines() if ".inttoptr(" in line]
    assert found == ["return builder.inttoptr(address, kind)"]


def test_without_a_folder_to_write_to_kernels_still_run(monkeypatch, caplog):
    cfunc = numba.cfunc

    def refuse(*args, cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return cfunc(*args, **options)

    monkeypatch.setattr("spikeattn._backends._said", set())
    monkeypatch.setattr(compiler.numba, "cfunc", refuse)
    hits = np.zeros(5, np.int64)
    with caplog.at_level(logging.INFO, "spikeattn"):
        threads.spread(compiler.Kernel(count_blocks, COUNT), 5, 5, hits=hits.ctypes.data, limit=5)
    assert hits.tolist() == [1] * 5
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_freed_results_are_used_again_and_not_before_they_are_free():
    pool, shape = Pool(most_kept=1 << 20), (256, 256)
    x = pool.empty(shape, torch.float32)
    x[:] = 1.0
    row, address = x[7], x.data_ptr()
    del x
    assert pool.kept == 0  # the row is still in use
    y = pool.empty(shape, torch.float32)
    y[:] = 2.0
    assert row.eq(1.0).all()
    del row
    assert pool.kept == y.nbytes
    z = pool.empty((512, 256), torch.bfloat16)
    assert (z.data_ptr(), z.dtype, z.is_contiguous(), pool.kept) == (address, torch.bfloat16, True, 0)
    assert pool.empty((0, 3), torch.float32).shape == (0, 3)


def test_no_more_freed_memory_is_kept_than_allowed():
    pool = Pool(most_kept=1 << 20)
    for size in (200_000, 300_000, 400_000, 500_000, 600_000, 2_000_000):
        pool.empty((size,), torch.int8)
        assert pool.kept <= 1 << 20
    tensors = [pool.empty((200_000,), torch.int8) for _ in range(9)]
    size = tensors[0].numel()
    del tensors
    assert (1 << 20) - 2 * size < pool.kept <= 1 << 20  # as many as there is room for


def test_results_freed_in_other_threads_do_not_disturb_a_pool():
    pool = Pool(most_kept=1 << 22)

    def work(number):
        for _ in range(300):
            x = pool.empty((1 << 16,), torch.float32)
            x[:] = number
            assert x.eq(number).all()

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))
    assert pool.kept <= 1 << 22
