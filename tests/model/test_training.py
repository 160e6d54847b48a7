"""Training end to end on made-up conversations: what a run leaves, resuming to the bit, and clear failures."""

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, f1_score

from spikemo_model import SpikEmo
from spikemo_model.config import DSWAConfig, FusionConfig, LossConfig, Preset, compact
from spikemo_model.data import synthetic_corpus
from spikemo_model.evaluation import logistic_regression, predict
from spikemo_model.runs import read_preset
from spikemo_model.training import SpikEmoTask, TrainingDivergedError, train

ROOT = Path(__file__).parent.parent.parent


def tiny(epochs=3, seed=0, dialogues=30, **training):
    """A corpus and a preset that train in a second or two: dropout, EMA, all losses, three modalities."""
    corpus = synthetic_corpus(dialogues)
    model, config = compact(corpus.widths, corpus.classes)
    model = replace(
        model, dim=16, classifier_hidden=16,
        dswa=DSWAConfig(time_steps=2, depth=1, num_heads=2, mlp_ratio=1.0, tau=2.0),
        fusion=FusionConfig(layers=1, num_heads=2, hidden=16),
    )  # fmt: skip
    loss = LossConfig(1.0, 0.5, 0.001)
    return corpus, Preset(model, replace(config, epochs=epochs, seed=seed, batch_size=8, loss=loss, **training))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run and its data."""
    run_dir = tmp_path_factory.mktemp("run") / "seed0"
    corpus, preset = tiny()
    return run_dir, corpus, preset, train(corpus, preset, run_dir, progress=False)


def facts(run_dir):
    """The metrics of a run without its times."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics.pop("seconds")
    for row in metrics["history"]:
        row.pop("seconds")
    return metrics


def assert_same_run(a, b):
    """Two runs left the same metrics, predictions and weights, to the bit."""
    assert facts(a) == facts(b)
    assert (a / "predictions.csv").read_bytes() == (b / "predictions.csv").read_bytes()
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_everything_and_scores_agree_with_scikit_learn(finished):
    run_dir, corpus, preset, result = finished
    assert read_preset(run_dir) == preset
    rows = list(csv.DictReader((run_dir / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == sum(map(len, corpus.splits["test"])) == result.test.utterances
    true, predicted = [r["label"] for r in rows], [r["predicted"] for r in rows]
    assert result.test.weighted_f1 == pytest.approx(100 * f1_score(true, predicted, average="weighted"), abs=1e-3)
    assert result.test.confusion == confusion_matrix(true, predicted, labels=corpus.classes).tolist()
    for name, f1 in result.test.class_f1.items():
        wanted = 100 * f1_score(true, predicted, labels=[name], average=None, zero_division=0)[0]
        assert f1 == pytest.approx(wanted, abs=1e-3)
    for row in rows:
        assert sum(float(row[name]) for name in corpus.classes) == pytest.approx(1, abs=1e-4)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]
    assert result.valid.weighted_f1 == pytest.approx(max(r["valid_weighted_f1"] for r in result.history), abs=1e-3)
    assert result.rates_before.keys() == result.rates_after.keys()
    assert len(list((run_dir / "logs" / "csv").rglob("metrics.csv"))) == 1
    assert list((run_dir / "logs" / "tensorboard").rglob("events.*"))


def test_the_saved_weights_are_the_selected_ones(finished):
    run_dir, corpus, preset, result = finished
    model = SpikEmo(preset.model)
    model.load_state_dict(load_file(run_dir / "model.safetensors"))
    again = predict(model, corpus.splits["test"], preset.training.batch_size)
    labels = torch.cat([d.labels for d in corpus.splits["test"]])
    f1 = f1_score(labels, torch.cat([p.argmax(-1) for p in again]), average="weighted")
    assert 100 * f1 == pytest.approx(result.test.weighted_f1, abs=1e-3)


def test_checkpoints_hold_random_states_and_position_and_load_without_unpickling(finished):
    run_dir, _, _, _ = finished
    for name in ("best", "last"):
        checkpoint = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        states = next(v for k, v in checkpoint["callbacks"].items() if k.startswith("RandomStates"))
        assert set(states["states"][0]) == {"torch", "cuda", "python", "numpy"}
        assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] > 0
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    run_dir, corpus, preset, _ = finished
    train(corpus, preset, tmp_path / "same", progress=False)
    assert_same_run(run_dir, tmp_path / "same")
    train(corpus, Preset(preset.model, replace(preset.training, seed=1)), tmp_path / "other", progress=False)
    assert facts(tmp_path / "other")["history"] != facts(run_dir)["history"]


class Interrupted(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize(("save_every", "stop_at"), [(0, 5), (0, 8), (3, 7), (3, 9), (1, 4), (1, 8), (1, 12)])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(finished, tmp_path, monkeypatch, save_every, stop_at):
    """4 steps an epoch, 3 epochs: before the first checkpoint, at an epoch's end, inside an epoch, at the last step."""
    run_dir, corpus, preset, _ = finished
    step = SpikEmoTask.training_step

    def stops(self, batch, batch_idx):
        if self.global_step == stop_at:
            raise Interrupted
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SpikEmoTask, "training_step", stops)
    stopped = tmp_path / "stopped"
    if stop_at < 12:
        with pytest.raises(Interrupted):
            train(corpus, preset, stopped, progress=False, save_every=save_every)
        assert not (stopped / "metrics.json").exists()
    else:
        train(corpus, preset, stopped, progress=False, save_every=save_every)
    monkeypatch.setattr(SpikEmoTask, "training_step", step)
    torch.rand(7)  # the state of this process's generators must not matter
    random.random()
    train(corpus, preset, stopped, progress=False, save_every=save_every)
    assert_same_run(run_dir, stopped)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from test_training import tiny, train
print("ready", flush=True)
train(*tiny(epochs=6), Path({run_dir!r}), progress=False)
"""


def test_runs_killed_at_random_moments_resume_to_the_same_bits(tmp_path):
    corpus, preset = tiny(epochs=6)
    start = time.monotonic()
    train(corpus, preset, tmp_path / "whole", progress=False)
    duration = time.monotonic() - start
    moments = random.Random(0)
    for i in range(5):
        run_dir = tmp_path / f"killed{i}"
        code = CHILD.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent), run_dir=str(run_dir))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.1, 0.9) * duration)
        child.send_signal(signal.SIGKILL)
        child.wait()
        train(corpus, preset, run_dir, progress=False)
        assert_same_run(tmp_path / "whole", run_dir)
        leftovers = [p.name for p in (run_dir / "checkpoints").iterdir() if p.suffix == ".ckpt"]
        assert sorted(leftovers) == ["best.ckpt", "last.ckpt"]


def test_early_stopping_stops_and_stays_stopped(tmp_path):
    corpus, preset = tiny(epochs=40, patience=2, learning_rate=1e-7, ema_decay=0.0)
    first = train(corpus, preset, tmp_path, progress=False)
    assert len(first.history) < 40
    again = train(corpus, preset, tmp_path, progress=False)
    assert again.history == first.history
    assert again.test == first.test


def test_a_loss_that_is_not_finite_stops_with_step_dialogues_and_checkpoint(tmp_path):
    corpus, preset = tiny(ema_decay=0.0)
    train(corpus, Preset(preset.model, replace(preset.training, epochs=1)), tmp_path / "one", progress=False)
    bad = corpus.splits["train"][5]
    features = {m: torch.full_like(x, 3e38) for m, x in bad.features.items()}
    dialogues = tuple(replace(d, features=features) if d is bad else d for d in corpus.splits["train"])
    broken = replace(corpus, splits={**corpus.splits, "train": dialogues})
    with pytest.raises(TrainingDivergedError, match=r"The loss is nan at step \d+ .*train5.*none: the first epoch"):
        train(broken, preset, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["training"]["epochs"] = 3
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    before = last.read_bytes()
    with pytest.raises(TrainingDivergedError, match=r"last good checkpoint is .*last\.ckpt"):
        train(broken, preset, tmp_path / "one", progress=False)
    assert last.read_bytes() == before


def test_a_run_of_another_configuration_is_not_resumed(finished):
    run_dir, corpus, preset, _ = finished
    with pytest.raises(ValueError, match=r"differs in training\.learning_rate"):
        train(corpus, Preset(preset.model, replace(preset.training, learning_rate=1.0)), run_dir, progress=False)


def test_data_that_does_not_fit_the_configuration_is_named(tmp_path):
    corpus, preset = tiny()
    with pytest.raises(ValueError, match=r"synthetic has features \{'text': 64\}, the configuration wants"):
        train(corpus.select(["text"]), preset, tmp_path / "a", progress=False)
    other = replace(preset.model, classes=("a", "b"))
    with pytest.raises(ValueError, match="synthetic has the classes"):
        train(corpus, Preset(other, preset.training), tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_an_error_not_a_fresh_start(finished, tmp_path):
    _, corpus, preset, _ = finished
    train(corpus, preset, tmp_path, progress=False)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        train(corpus, preset, tmp_path, progress=False)


def test_utterances_without_a_label_take_no_part(tmp_path):
    corpus, preset = tiny(epochs=1)

    def blank(d):
        return replace(d, labels=torch.where(torch.arange(len(d)) % 2 == 0, d.labels, -1))

    splits = {split: tuple(map(blank, dialogues)) for split, dialogues in corpus.splits.items()}
    result = train(replace(corpus, splits=splits), preset, tmp_path, progress=False)
    assert result.test.utterances == sum((len(d) + 1) // 2 for d in corpus.splits["test"])


def test_bfloat16_trains(tmp_path):
    corpus, preset = tiny(epochs=2, precision="bf16-mixed")
    result = train(corpus, preset, tmp_path, progress=False)
    assert result.history[1]["train_total"] < result.history[0]["train_total"]


def test_logistic_regression_is_the_plain_baseline():
    corpus = synthetic_corpus(200)
    scores = logistic_regression(corpus)
    assert 75 < scores.weighted_f1 < 95
    assert logistic_regression(corpus.select(["visual"])).weighted_f1 < scores.weighted_f1 - 20


DDP = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from test_training import SpikEmoTask, tiny, train
corpus, preset = tiny(epochs=2)
seen = []
step = SpikEmoTask.training_step
SpikEmoTask.training_step = lambda self, batch, i: seen.extend(batch.ids) or step(self, batch, i)
result = train(corpus, preset, Path({run_dir!r}), accelerator="cpu", progress=False)
print("got", result is not None, flush=True)
print("saw", *seen, flush=True)
"""


def test_two_processes_train_together_and_resume(tmp_path):
    script = tmp_path / "ddp.py"
    run_dir = tmp_path / "run"
    script.write_text(DDP.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent), run_dir=str(run_dir)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    scores = []
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert run.returncode == 0, run.stderr[-3000:]
        assert sorted(line for line in run.stdout.splitlines() if line.startswith("got")) == ["got False", "got True"]
        scores.append(facts(run_dir))
        shares = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("saw")]
        if len(scores) == 1:  # each epoch shows every dialogue once, to one of the two
            assert sorted(shares[0] + shares[1]) == sorted(2 * [d.id for d in tiny()[0].splits["train"]])
            assert set(shares[0]) != set(shares[1])
        else:
            assert shares == [[], []]
    assert scores[0] == scores[1]
    corpus, _ = tiny()
    assert scores[0]["test"]["utterances"] == sum(map(len, corpus.splits["test"]))
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    states = next(v for k, v in checkpoint["callbacks"].items() if k.startswith("RandomStates"))["states"]
    assert len(states) == 2


def test_steps_go_without_modalities_by_chance_and_never_without_all(tmp_path, monkeypatch):
    corpus, preset = tiny(epochs=4)
    preset = preset._replace(model=replace(preset.model, modality_dropout=0.5))
    subsets, plain = [], SpikEmo.forward

    def seen(model, batch):
        if model.training:
            subsets.append(frozenset(batch.features))
        else:
            assert set(batch.features) == set(corpus.widths)
        return plain(model, batch)

    monkeypatch.setattr(SpikEmo, "forward", seen)
    train(corpus, preset, tmp_path / "a", progress=False)
    first = subsets.copy()
    assert 4 <= len(set(first)) <= 7
    assert frozenset() not in first
    subsets.clear()
    train(corpus, preset, tmp_path / "b", progress=False)
    assert subsets == first
    weighted = replace(preset.training, loss=replace(preset.training.loss, corr_pair_weights=(1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="leave corr_pair_weights empty"):
        train(corpus, preset._replace(training=weighted), tmp_path / "c", progress=False)
