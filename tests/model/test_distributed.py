"""Two processes train as one does: the same losses, the same metrics, every utterance once."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import facts, tiny

from spikemo_model.config import LossConfig, Preset

HERE = Path(__file__).parent


def exact():
    """A corpus and a preset without dropout, with all losses, whose batches do not come out even.

    26 dialogues in batches of 5 leave one for the last, and so none for the second of two processes; of 5 in
    validation the first has two batches, the second one. Some utterances have no label.
    """
    corpus, preset = tiny(epochs=2, dialogues=26, learning_rate=3e-3)

    def blank(d):
        return replace(d, labels=torch.where(torch.arange(len(d)) % 4 == 1, -1, d.labels))

    splits = {split: tuple(map(blank, dialogues)) for split, dialogues in corpus.splits.items()}
    splits["valid"] = splits["valid"][:5]
    model = replace(preset.model, dropout=0.0, input_dropout=0.0)
    # Adam alone does not see a gradient that is twice as large; beside L2 regularisation it does.
    training = replace(preset.training, batch_size=5, optimizer="adam", weight_decay=0.1, gradient_clip=0.0)
    loss = LossConfig(1.0, 0.5, 0.01, balance=0.2, contrastive_weight=0.4)
    return replace(corpus, splits=splits), Preset(model, replace(training, loss=loss))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The metrics of one process and of two, in float64; each of the three is a process of its own."""
    folder = tmp_path_factory.mktemp("distributed")
    script = folder / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]\n"
        "from test_distributed import exact\n"
        "from spikemo_model.training import train\n"
        "torch.set_num_threads(1)\n"
        "corpus, preset = exact()\n"
        "torch.set_default_dtype(torch.float64)\n"
        'train(corpus, preset, Path(sys.argv[1]), accelerator="cpu", progress=False)\n'
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    runs = [
        subprocess.Popen(
            [sys.executable, *launcher, str(script), str(folder / name)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for name, launcher in (("one", []), ("two", together))
    ]  # fmt: skip
    try:
        for run in runs:
            output, _ = run.communicate(timeout=240)
            assert run.returncode == 0, output[-3000:]
    finally:
        for run in runs:
            run.terminate()
    return facts(folder / "one"), facts(folder / "two")


def test_two_processes_reproduce_the_loss_curve_of_one(both):
    one, two = ([list(row.items()) for row in run["history"]] for run in both)
    assert len(one) == 2
    for own, other in zip(one, two, strict=True):
        for (name, value), (other_name, other_value) in zip(own, other, strict=True):
            assert name == other_name
            assert other_value == pytest.approx(value, rel=1e-9, abs=1e-9), name
    first, last = both[0]["history"][0], both[0]["history"][-1]
    for term in ("total", "ce", "dice", "corr", "contrastive"):
        assert first[f"train_{term}"] != 0
        assert abs(first[f"train_{term}"] - last[f"train_{term}"]) > 1e-4  # it has learned: the gradients counted


def test_two_processes_have_exactly_the_metrics_of_one(both):
    one, two = both
    for name in ("valid", "test", "best_epoch", "parameters"):
        assert one[name] == two[name]
    assert [r["valid_weighted_f1"] for r in one["history"]] == [r["valid_weighted_f1"] for r in two["history"]]
    labels = torch.cat([d.labels for d in exact()[0].splits["valid"]])
    assert one["valid"]["utterances"] == int((labels >= 0).sum()) < len(labels)
