"""The benchmarks' scripts run, at size 1, and their page says what the results hold. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.measure import contender, measure, peak_bytes
from benchmarks.pictures import growth
from benchmarks.registry import CannotRun, Case, Contender, Suite
from benchmarks.show import KINDS, _table, geometric_mean
from benchmarks.suites import attention, lif

ROOT = Path(__file__).parent.parent


def test_every_suite_runs_at_size_1():
    command = [sys.executable, "-m", "benchmarks.run", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("T=2 N=64") for line in lines) == 2
    assert sum(line.startswith("T=2 rows=4 D=16") for line in lines) == 2
    assert sum(line.startswith("T=2 B=1 H=2 L=3 E=4") for line in lines) == 6
    assert sum("torch.compile of two products + the loop" in line for line in lines) == 4
    assert sum(line.startswith("tiny: T=2") for line in lines) == 2
    assert sum(line.startswith("tiny: 2 dialogues, 5 utterances, L=3, T=2") for line in lines) == 2
    assert sum(line.startswith("utterance 4: T=2") for line in lines) == 1
    linear = [line for line in lines if line.startswith("8 rows, 16 to 16")]
    assert len(linear) == 5
    assert all("torch.nn.Linear" in line for line in linear)
    alone = [line for line in lines if line.endswith("ms ()")]  # how the cost of attention grows
    assert len(alone) == 2
    assert all("SpikingJelly 2.0.0" in line for line in lines if line not in linear + alone)


PRODUCTS = tuple(f"two products + {end}" for end in ("our LIF", "SpikingJelly 2.0.0"))
PRODUCTS += ("torch.compile of two products + the loop",)


def outcome(name, model, x):
    """In place of a contender: what its model computes, and the gradient."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y.detach(), torch.autograd.grad(y, leaf, weight)[0]


@pytest.mark.parametrize(
    ("make", "peers"),
    [
        (lambda: attention._case(4, 1, 2, 48, 16, False, torch.float32, "cpu"), PRODUCTS),
        (lambda: attention._case(4, 1, 2, 48, 16, True, torch.float32, "cpu"), PRODUCTS),
        (lambda: lif._case(4, 64, torch.float32, "cpu"), ("SpikingJelly 2.0.0", "torch.compile of the loop")),
    ],
    ids=["attention", "causal attention", "lif"],
)
def test_peers_compute_what_ours_does(make, peers, monkeypatch):
    torch.manual_seed(0)
    for module in ("benchmarks.measure", "benchmarks.suites.attention", "benchmarks.suites.lif"):
        monkeypatch.setattr(f"{module}.contender", outcome)
    case = make()
    spikes, gradient = case.ours
    assert 0.05 < spikes.mean() < 0.95
    for name in peers:
        others, its_gradient = case.peers[name]()
        assert torch.equal(others, spikes), name
        torch.testing.assert_close(its_gradient, gradient)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_a_replay_without_a_device_is_an_error_of_one_line():
    done = subprocess.run([sys.executable, "-m", "benchmarks.replay"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: benchmarks.replay needs a CUDA device")


def test_the_profile_of_a_training_step_runs_at_size_1():
    command = [sys.executable, "-m", "benchmarks.profile", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 dialogues, 5 utterances")
    parts = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in lines[4:]}
    assert parts["- linear layers"] > 0
    assert parts["whole step"] > parts["- norm and neurons"] + parts["- spiking attention"] > 0


def unavailable():
    raise ImportError("no module")


def test_a_peer_that_is_left_out_or_missing_is_listed_with_the_reason():
    x = torch.ones(3)
    makers = {name: lambda name=name: contender(name, torch.sigmoid, x) for name in ("slow peer", "peer")}
    makers["third"] = unavailable
    case = Case("c", {}, contender("ours", torch.sigmoid, x), makers, absent={"fourth": "too large"})
    row = measure(case, "cpu", 0.0, skip=["slow"])
    assert list(row["forward"]) == list(row["training"]) == ["ours", "peer"]
    assert row["absent"] == {
        "slow peer": "left out by --skip",
        "third": "cannot be imported: no module",
        "fourth": "too large",
    }


def test_what_is_skipped_is_not_made():
    case = Case("c", {}, contender("ours", torch.sigmoid, torch.ones(3)), {"peer": unavailable})
    assert measure(case, "cpu", 0.0, skip=["peer"])["absent"] == {"peer": "left out by --skip"}


def test_a_peer_that_stops_working_is_listed_and_the_rest_is_measured():
    def stops():
        raise CannotRun("its process ended with status -9")

    x = torch.randn(2, 4)
    broken = Contender("broken", stops, stops, times_itself=True)
    case = Case("case", {}, contender("ours", torch.relu, x), {"broken": lambda: broken})
    row = measure(case, "cpu", 0.0)
    assert row["absent"] == {"broken": "its process ended with status -9"}
    assert list(row["forward"]) == list(row["training"]) == ["ours"]


def test_leaving_out_an_unknown_peer_is_an_error_of_one_line():
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "event_linear", "--skip", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr == "error: --skip nobody: no peer has that in its name; the peers are torch.nn.Linear.\n"


def test_a_run_that_is_stopped_leaves_complete_suites_as_they_were(monkeypatch, tmp_path):
    out = tmp_path / "machine.json"
    partial = tmp_path / "machine.json.a.partial"
    measured = iter(["a1", "a2", "b1", "new a1", KeyboardInterrupt, "newer a1", "newer a2"])

    def next_row(*_):
        row = next(measured)
        if row is KeyboardInterrupt:
            raise KeyboardInterrupt
        return {"case": row}

    def main(*names):
        options = [part for name in names for part in ("--suite", name)]
        monkeypatch.setattr(sys, "argv", ["run", "--out", str(out), *options])
        run.main()

    def cases(path):
        suites = json.loads(path.read_text(encoding="utf-8"))["suites"]
        return {name: [row["case"] for row in suite["rows"]] for name, suite in suites.items()}

    suites = {name: Suite(name, [], lambda *_, n=n: [dict] * n) for name, n in (("a", 2), ("b", 1))}
    monkeypatch.setattr(run, "SUITES", suites)
    monkeypatch.setattr(run, "_run_tests", lambda tests: None)
    monkeypatch.setattr(run, "machine_facts", lambda device: {"name": "machine"})
    monkeypatch.setattr(run, "measure", next_row)
    main("a", "b")
    before = {"a": ["a1", "a2"], "b": ["b1"]}
    assert cases(out) == before
    with pytest.raises(KeyboardInterrupt):
        main("a")
    assert cases(out) == before
    assert cases(partial) == {"a": ["new a1"]}
    assert list(tmp_path.glob("*.json")) == [out]
    main("a")
    assert cases(out) == {"a": ["newer a1", "newer a2"], "b": ["b1"]}
    assert list(tmp_path.iterdir()) == [out]


def test_a_stop_while_results_are_written_leaves_the_old(monkeypatch, tmp_path):
    path = tmp_path / "machine.json"
    run._write(path, {"suites": {}})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run._write(path, {"suites": {"a": {}}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"suites": {}}


def test_ratios_are_the_peers_time_over_ours():
    def times(median):
        return {"median_s": median, "p20_s": median, "p80_s": median}

    row = {
        "case": "T=4",
        "sizes": {"dtype": "float32"},
        "ours": "spikeattn",
        "bytes": {"forward": 4_000_000},
        "items": None,
        "forward": {"spikeattn": times(0.0025), "peer": {**times(0.006), "ours_s": 0.002}},
        "kept_bytes": {"spikeattn": 1_000_000, "peer": 3_000_000},
        "peak_bytes": {"forward": {"spikeattn": 2_000_000, "peer": None}},
    }
    table = _table([row], "forward", bandwidth=4e9)
    assert "| T=4 | 2.50 (2.50-2.50) | 40 % | 1.0 | 2.0 | 3.00 (3.0; -) |" in table
    row["items"] = [4, "dialogues"]
    assert "| 1600.0 | 1.0 |" in _table([row], "forward", bandwidth=4e9)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_picture_of_growth_is_time_a_token_against_l():
    def row(L, causal, **median_s):
        sizes = {"T": 4, "B": 2, "H": 1, "L": L, "E": 8, "dtype": "float32", "is_causal": causal}
        times = {name: {"median_s": seconds} for name, seconds in median_s.items()}
        return {"sizes": sizes, "forward": times, "training": times}

    rows = [row(L, False, ours=1e-6 * L, peer=1e-6 * L * L) for L in (100, 1000, 10)]
    few = [row(L, True, ours=1e-6) for L in (10, 100)]
    forward, training = growth(rows + few).axes
    assert forward.get_title() == "forward (inference), T=4 B=2 H=1 E=8 float32"
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in training.lines}
    assert lines == {
        "ours": ([10, 100, 1000], pytest.approx([0.5, 0.5, 0.5])),
        "peer": ([10, 100, 1000], pytest.approx([5.0, 50.0, 500.0])),
    }
    assert growth(few) is None


def test_peaks_are_those_of_the_run_alone():
    def run():
        return torch.zeros(2**23).sum()  # 32 MiB

    peak = peak_bytes(run, "cpu")
    assert peak is None or 0.9 * 2**25 < peak < 1.5 * 2**25


def test_committed_results_are_complete():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for suite in json.loads(path.read_text(encoding="utf-8"))["suites"].values():
            assert {"device", "versions", "commit", "copy_bytes_per_s"} <= set(suite["machine"])
            for row in suite["rows"]:
                assert row["sizes"]
                for kind in KINDS.keys() & row.keys():
                    assert len(row[kind][row["ours"]]["samples_s"]) >= 3
