"""Experiments: what their cells vary, the gate, the table's numbers, and runs that go on where they were."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from scipy.stats import t as student
from typer.testing import CliRunner

from spikemo_model import SpikEmo
from spikemo_model.config import to_dict
from spikemo_model.data import save_corpus, synthetic_corpus
from spikemo_model.evaluation import predict, score
from spikemo_model.experiment_cli import register
from spikemo_model.experiments import EXPERIMENTS, CellResult, base, write_summary
from spikemo_model.experiments.gate import measure_gate
from spikemo_model.experiments.summary import paired_p


@pytest.fixture(scope="module")
def corpus():
    """Made-up conversations under the name of MELD, so that the paper's numbers stand beside them."""
    return replace(synthetic_corpus(12), name="MELD")


def differing(a, b, prefix=""):
    """Dotted names of the settings in which two configurations differ."""
    found = set()
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= differing(x, y, f"{prefix}{name}.")
        elif x != y:
            found.add(prefix + name)
    return found


def settings(preset):
    return {"model": to_dict(preset.model), "training": to_dict(preset.training)}


def test_ablation_takes_out_what_it_says_and_has_the_papers_numbers(corpus):
    full, *others = EXPERIMENTS["ablation"](base(corpus)).cells
    loss = full.preset.training.loss
    assert (loss.ce_weight, loss.dice_weight, loss.corr_weight) == (0.4, 1.0, 0.3 * 1e-3)
    dice, corr, dswa = "training.loss.dice_weight", "training.loss.corr_weight", "model.dswa"
    changes = {cell.name: differing(settings(full.preset), settings(cell.preset)) for cell in others}
    assert changes == {
        "without DSC and corr": {dice, corr},
        "without DSC": {dice},
        "without corr": {corr},
        "without DSWA": {dswa},
        "without DSWA, DSC and corr": {dice, corr, dswa},
    }
    assert [cell.paper.get("MELD") for cell in (full, *others)] == [65.92, 61.53, 64.10, 63.00, 62.44, None]
    assert [cell.paper.get("IEMOCAP") for cell in (full, *others)] == [71.50, 68.71, 69.75, 69.84, 69.03, None]


def test_modalities_are_all_subsets_with_the_papers_numbers(corpus):
    cells = EXPERIMENTS["modalities"](base(corpus)).cells
    assert {cell.name: cell.paper["MELD"] for cell in cells} == {
        "text + audio + visual": 65.92, "text + audio": 62.22, "text + visual": 63.22, "audio + visual": 39.98,
        "text": 59.56, "audio": 35.91, "visual": 31.27,
    }  # fmt: skip
    assert [" + ".join(cell.preset.model.modalities) for cell in cells] == [cell.name for cell in cells]


def test_time_steps_double_from_2_to_64_and_change_nothing_else(corpus):
    cells = EXPERIMENTS["timesteps"](base(corpus)).cells
    assert [cell.preset.model.dswa.time_steps for cell in cells] == [2, 4, 8, 16, 32, 64]
    for a, b in pairwise(cells):
        assert differing(settings(a.preset), settings(b.preset)) == {"model.dswa.time_steps"}


def test_dialogue_rnn_alone_has_no_attention_and_no_spikes(corpus):
    alone = next(c for c in EXPERIMENTS["compare"](base(corpus)).cells if c.name == "DialogueRNN")
    kinds = {type(module).__name__ for module in SpikEmo(alone.preset.model).modules()}
    assert "DialogueRNN" in kinds
    assert not kinds & {"MultiheadAttention", "LIF", "GRUContext"}


def test_a_level_gate_has_no_spread_and_is_worth_nothing(corpus):
    preset = base(corpus)
    model = SpikEmo(preset.model).eval()
    test = corpus.splits["test"]
    whole = score(predict(model, test), test, corpus.classes).weighted_f1
    gate = measure_gate(model, corpus)
    assert gate.spread > 0.1
    norm = model.dswa["shared"].norm
    with torch.no_grad():
        norm.weight.zero_()
    levelled = measure_gate(model, corpus)
    assert levelled.spread == pytest.approx(0, abs=1e-6)
    assert levelled.level_f1 == score(predict(model, test), test, corpus.classes).weighted_f1 == gate.level_f1
    with torch.no_grad():
        norm.weight.fill_(1.0)
    assert score(predict(model, test), test, corpus.classes).weighted_f1 == whole  # no hook is left
    assert measure_gate(SpikEmo(replace(preset.model, dswa=None)), corpus) is None


def test_spread_is_the_mean_distance_of_the_gate_from_level(corpus):
    model = SpikEmo(base(corpus).model).eval()
    seen = []
    model.dswa["shared"].register_forward_hook(lambda module, args, out: seen.append((args, out)))
    one = replace(corpus, splits={**corpus.splits, "valid": corpus.splits["valid"][:3]})
    spread = measure_gate(model, one).spread
    (x, mask), out = seen[0]
    distances = []
    for row, kept, result in zip(x, mask, out, strict=True):
        row, result = row[kept].double(), result[kept].double()
        clear = row.abs() > 0.05  # the gate is out / x - 1
        distances.append(((result / row - 1) * len(row) - 1).abs()[clear])
    assert spread == pytest.approx(torch.cat(distances).mean().item(), rel=0.05)


def test_p_is_of_the_paired_t_test():
    a, b = [60.0, 61.0, 59.5], [59.0, 60.5, 59.4]
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    statistic = (d.mean() / (d.std() / 3**0.5)).item()
    assert paired_p(a, b) == pytest.approx(2 * student.sf(statistic, df=2), rel=1e-9)
    assert paired_p([1.0], [2.0]) is None
    assert paired_p([1.0, 2.0], [2.0, 3.0]) is None


def test_the_table_has_means_deviations_and_differences_of_both(corpus, tmp_path):
    experiment = EXPERIMENTS["ablation"](base(corpus))
    results = {
        cell.name: [CellResult(seed, 50.0, 60.0 - i + seed * (i + 1), {}, None, 1.0) for seed in (0, 1)]
        for i, cell in enumerate(experiment.cells)
    }
    text = write_summary(experiment, results, corpus, "the command", tmp_path).read_text(encoding="utf-8")
    assert "\n    the command\n" in text
    assert "| SpikEmo | 50.00 | 60.00, 61.00 | 60.50 ± 0.71 |  |  | 65.92 |  |" in text
    assert "| without DSWA | 50.00 | 56.00, 61.00 | 58.50 ± 3.54 | -2.00 | 0.50 | 62.44 | -3.48 |" in text
    plot = (tmp_path / "results.svg").read_bytes()
    assert plot.count(b"<svg") == 1
    write_summary(experiment, results, corpus, "the command", tmp_path)
    assert (tmp_path / "results.svg").read_bytes() == plot


def invoke(*options):
    """Run the command as a user would; its result."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["experiment", *map(str, options)])


def test_the_command_runs_side_by_side_resumes_and_refuses_what_differs(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    save_corpus(corpus, tmp_path / "store")
    options = ["compare", "--data-dir", tmp_path / "store", "--seeds", 2, "--epochs", 1, "--batch-size", 8]
    options += ["--workers", 2, "--accelerator", "cpu", "--out", tmp_path / "out"]
    first = invoke(*options)
    assert first.exit_code == 0, first.output
    assert "6 runs, 0 of them finished before" in first.output
    cells = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("cell.json"))
    names = ("dialoguernn", "multiemo", "spikemo")
    assert [str(c) for c in cells] == [f"{name}/seed{k}/cell.json" for name in names for k in (0, 1)]
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    for name, title in zip(names, ("DialogueRNN", "MultiEMO", "SpikEmo"), strict=True):
        own = [json.loads((tmp_path / "out" / name / f"seed{k}" / "cell.json").read_text()) for k in (0, 1)]
        metrics = [json.loads((tmp_path / "out" / name / f"seed{k}" / "metrics.json").read_text()) for k in (0, 1)]
        assert [c["test"] for c in own] == [m["test"]["weighted_f1"] for m in metrics]
        assert f"| {title} | " in table
        assert ", ".join(f"{c['test']:.2f}" for c in own) in table
        assert [c["gate"] is not None for c in own] == [name == "spikemo"] * 2
    contrastive = json.loads((tmp_path / "out/multiemo/seed0/metrics.json").read_text())["history"][0]
    assert contrastive["train_contrastive"] > 0

    before = (tmp_path / "out/spikemo/seed1/cell.json").read_bytes()
    (tmp_path / "out/spikemo/seed1/cell.json").unlink()
    kept = os.stat(tmp_path / "out/multiemo/seed0/cell.json").st_mtime_ns
    again = invoke(*options)
    assert again.exit_code == 0, again.output
    assert "6 runs, 5 of them finished before" in again.output
    assert os.stat(tmp_path / "out/multiemo/seed0/cell.json").st_mtime_ns == kept
    assert (tmp_path / "out/spikemo/seed1/cell.json").read_bytes() == before
    assert re.search(r"Table II.*\n", again.output)

    other = invoke(*options, "--epochs", 2)
    assert other.exit_code == 1
    assert other.output.strip().splitlines()[-1].startswith("error: train: ")
    assert "holds a run of another configuration" in other.output
    save_corpus(replace(corpus, about={**corpus.about, "text": "others"}), tmp_path / "second")
    moved = invoke(*options, "--data-dir", tmp_path / "second")
    assert moved.exit_code == 1
    assert "holds an experiment on other data" in moved.output


def test_a_killed_experiment_leaves_no_worker(tmp_path):
    save_corpus(replace(synthetic_corpus(30), name="MELD"), tmp_path / "data")
    command = [sys.executable, "-m", "spikemo_model", "experiment", "compare", "--data-dir", str(tmp_path / "data")]
    command += ["--epochs", "500", "--workers", "1", "--accelerator", "cpu", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()], "workers outlive their parent"
