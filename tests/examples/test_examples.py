"""The examples run, as a user would run them, and show what they say."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent


def run(script, *options, cwd=ROOT, data=None, check=True, **environment):
    """Run an example; its output."""
    inherited = {name: value for name, value in os.environ.items() if name != "SPIKEMO_DATA"}
    if data is not None:
        inherited["SPIKEMO_DATA"] = str(data)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, options)],
        cwd=cwd, capture_output=True, text=True, env={**inherited, **environment}, timeout=300,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_digits_are_learned_to_over_95_percent():
    output = run("digits.py").stdout
    accuracy = float(re.search(r"held-out digits: ([\d.]+) %", output)[1])
    assert accuracy > 95
    rates = [float(rate) for rate in re.findall(r"lif\s+([\d.]+) %", output)]
    assert len(rates) == 7
    assert all(1 < rate < 60 for rate in rates)


@pytest.fixture(scope="module")
def meld_run(data, tmp_path_factory):
    """One epoch of the main job on real MELD."""
    run_dir = tmp_path_factory.mktemp("runs") / "meld"
    options = ["--epochs", 1, "--time-steps", 2, "--run-dir", run_dir]
    return run_dir, run("train_meld.py", *options, data=data)


def test_the_main_job_trains_on_real_meld_and_reports(meld_run):
    run_dir, done = meld_run
    output = done.stdout
    assert "data: MELD in $SPIKEMO_DATA" in output
    assert "note: Test dialogue dia85 repeats" in output
    baseline = float(re.search(r"same features: ([\d.]+) %", output)[1])
    assert baseline == pytest.approx(56.9, abs=0.3)
    assert re.search(r"^weighted +[\d.]+ +56\.\d+ +62\.22$", output, re.MULTILINE)
    report = Path(re.search(r"^report: (.*)$", output, re.MULTILINE)[1])
    assert report == run_dir / "seed0" / "report.html"
    assert "MiniLM sentence vectors, frozen" in report.read_text(encoding="utf-8")
    rows = list(csv.DictReader((run_dir / "seed0" / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 2610
    assert rows[0]["text"]
    metrics = json.loads((run_dir / "seed0" / "metrics.json").read_text())
    assert metrics["test"]["utterances"] == 2610
    assert metrics["test"]["weighted_f1"] > 45
    assert all(0.01 < rate < 0.5 for rate in metrics["rates_before"].values())


def test_a_finished_run_resumes_with_its_own_options(meld_run, data):
    run_dir, _ = meld_run
    weights = load_file(run_dir / "seed0" / "model.safetensors")
    output = run("train_meld.py", "--resume", run_dir, data=data).stdout
    assert "epoch 1 of 1 selected" in output
    again = load_file(run_dir / "seed0" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_raw_text_for_vectors_that_came_with_the_data_is_one_line_with_the_cure(meld_run, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"speaker": "Joey", "text": "How you doing?"}\n')
    command = [sys.executable, "-m", "spikemo_model", "predict", str(meld_run[0] / "seed0"), str(chat)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "line 1: there are no text features, and the model cannot make them: it knows them as 'MiniLM" in line
    assert "train --text ENCODER --modalities text, or extract CLIPS STORE and train --data-dir STORE" in line


def test_several_seeds_are_summed_up_without_data_or_network(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    options = ["--seeds", 2, "--epochs", 1, "--time-steps", 2, "--modalities", "audio", "--run-dir", tmp_path / "run"]
    output = run("train_meld.py", *options, cwd=tmp_path, **environment).stdout
    assert "NOT MELD results" in output
    assert re.search(r"weighted F1 on test, 2 seeds: [\d.]+, [\d.]+; mean [\d.]+, standard deviation", output)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["options.json", "seed0", "seed1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-dir", "/nowhere"], "error: MELD: --data-dir is /nowhere"),
        (["--modalities", "visual"], r"error: MELD: asked for the modalities \['visual'\]"),
        (["--resume", "/nowhere"], "--resume: there is no /nowhere/options.json"),
        (["--epochs", "-1"], "error: TrainingConfig: epochs must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, tmp_path, options, message):
    if "--resume" not in options:
        options = [*options, "--run-dir", tmp_path / "run"]
    done = run("train_meld.py", *options, data=data, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(meld_run, data):
    run_dir, _ = meld_run
    done = run("train_meld.py", "--run-dir", run_dir, data=data, check=False)
    assert "holds a run already; go on with it by --resume" in done.stderr


def test_mosi_trains_all_three_branches(data, tmp_path):
    output = run("train_mosi.py", "--epochs", 2, "--run-dir", tmp_path / "mosi", data=data).stdout
    assert "visual: 100-d 3D-CNN vectors of the face, 100-d" in output
    assert "The paper has no results on this data (CMU-MOSI)" in output
    metrics = json.loads((tmp_path / "mosi" / "seed0" / "metrics.json").read_text())
    assert metrics["test"]["utterances"] == 686
    assert metrics["test"]["weighted_f1"] > 60
    assert run("train_mosi.py", cwd=tmp_path, check=False).stderr.startswith("error: set SPIKEMO_DATA")


def test_a_causal_model_is_trained_and_listens_to_a_dialogue(data, tmp_path):
    output = run("live.py", "--epochs", 1, "--dialogues", 1, data=data, TMPDIR=str(tmp_path)).stdout
    heard = output.partition("\ndia17\n")[2].splitlines()
    assert len(heard) == 33  # the longest of MELD's test dialogues
    pattern = r" +(neutral|surprise|fear|sadness|joy|disgust|anger) +\d+% \(it is \w+; \d+ ms\)  \w+: .+"
    assert all(re.fullmatch(pattern, line) for line in heard), heard
    assert "Joey: Question. Was ah" in output
