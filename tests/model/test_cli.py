"""The command line: train, evaluate, predict and import as a user calls them, and one line for what is wrong."""

import csv
import io
import json
import re
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_helpers import small_config
from safetensors.torch import save_file
from test_legacy import multiemo

from spikemo_model import SpikEmo, Utterance
from spikemo_model.cli import main
from spikemo_model.config import MELD_EMOTIONS
from spikemo_model.conversation import read_conversations
from spikemo_model.data import load_corpus, save_corpus, standardise, synthetic_corpus
from spikemo_model.hub import Origin
from spikemo_model.insight import subset_scores
from spikemo_model.runs import open_run, read_preset

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run(capsys):
    """Call the command line; its status, output and errors."""

    def call(*arguments):
        capsys.readouterr()
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        torch.set_num_threads(threads)
        return stopped.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two stores, one standardised and one of the same features as they were, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    raw = synthetic_corpus(8)
    save_corpus(raw, folder / "raw")
    save_corpus(standardise(raw, ["audio", "text"]), folder / "store")
    threads = torch.get_num_threads()
    options = ["--data-dir", "store", "--modalities", "text,audio", "--epochs", "1", "--time-steps", "2"]
    options += ["--run-dir", "run", "--batch-size", "4", "--causal", "--modality-dropout", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            main(["train", *options])
    torch.set_num_threads(threads)
    assert stopped.value.code in (None, 0)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_a_run_is_a_model_directory_that_predicts_what_the_run_did(place):
    model = SpikEmo.from_pretrained(place / "run" / "seed0")
    assert model.config.dswa.time_steps == 2
    assert (model.config.is_causal, model.config.modality_dropout) == (True, 0.2)
    assert read_preset(place / "run" / "seed0").training.batch_size == 4
    rows = list(csv.DictReader((place / "run" / "seed0" / "predictions.csv").open(encoding="utf-8")))
    corpus = load_corpus(place / "raw")
    assert model.origin.data == "synthetic"
    assert model.origin.about == {name: corpus.about[name] for name in ("text", "audio")}
    metrics = json.loads((place / "run" / "seed0" / "metrics.json").read_text())
    scores = metrics["test"]
    assert model.origin.scores == {"weighted F1": scores["weighted_f1"], "accuracy": scores["accuracy"]}
    for d in corpus.splits["test"]:  # raw features: the model standardises as it has learned
        pieces = [{name: x[i] for name, x in d.features.items() if name != "visual"} for i in range(len(d))]
        predicted = model.predict([Utterance(who, "", x) for who, x in zip(d.speakers, pieces, strict=True)])
        for row, wanted in zip(predicted, (r for r in rows if r["dialogue"] == d.id), strict=True):
            assert all(row[name] == pytest.approx(float(wanted[name]), abs=1e-4) for name in MELD_EMOTIONS)


def test_a_finished_run_resumes_and_another_is_not_overwritten(place, run):
    weights = (place / "run" / "seed0" / "model.safetensors").read_bytes()
    status, output, _ = run("train", "--resume", "run")
    assert status == 0
    assert "epoch 1 of 1 selected on validation" in output
    assert (place / "run" / "seed0" / "model.safetensors").read_bytes() == weights
    status, _, errors = run("train", "--data-dir", "store", "--run-dir", "run")
    assert (status, errors) == (1, "error: run holds a run already; go on with it by --resume run.\n")


def test_evaluate_repeats_the_scores_of_the_run_from_either_store(place, run):
    metrics = json.loads((place / "run" / "seed0" / "metrics.json").read_text())
    for store in ("store", "raw"):
        for split in ("test", "valid"):
            status, output, _ = run("evaluate", "run/seed0", "--data-dir", store, "--split", split)
            assert status == 0
            assert f"data: feature store {store}" in output
            scores = metrics[split]
            assert re.search(rf"^weighted +{scores['weighted_f1']:.2f}\b", output, re.MULTILINE)
            assert f"{scores['utterances']} utterances, {scores['accuracy']:.2f} % right" in output
            for name, f1 in scores["class_f1"].items():
                assert re.search(rf"^{name} +{f1:.2f}\b", output, re.MULTILINE)
            assert f"F1 on {split}, %" in output
            assert ("paper" in output) == (split == "test")


def test_evaluate_scores_a_model_of_modality_dropout_on_what_there_is(place, run, tmp_path):
    model, corpus = SpikEmo.from_pretrained("run/seed0"), load_corpus(place / "store")
    for part in (model.classifier.mlp[3].weight, model.classifier.mlp[3].bias):
        torch.nn.init.normal_(part)  # else one epoch tells the commonest class of everything
    model.save_pretrained(tmp_path / "model")
    save_corpus(corpus.select(["audio"]), tmp_path / "audio")
    status, output, _ = run("evaluate", tmp_path / "model", "--data-dir", tmp_path / "audio")
    assert status == 0
    assert "\nwithout text, which the data lacks: scored on audio alone\n" in output
    wanted = subset_scores(model, corpus)
    assert wanted["audio",] != wanted["text", "audio"]
    assert re.search(rf"^weighted +{wanted['audio',]:.2f}\b", output, re.MULTILINE)
    assert "without" not in run("evaluate", "run/seed0", "--data-dir", "store")[1]
    save_corpus(load_corpus(place / "store").select(["visual"]), tmp_path / "visual")
    status, _, errors = run("evaluate", "run/seed0", "--data-dir", tmp_path / "visual")
    assert (status, len(errors.splitlines())) == (1, 1)
    assert errors.startswith(
        "error: synthetic has no text or audio features, but ['visual']. Choose data that has some"
    )


def test_evaluate_refuses_what_a_model_needs_and_the_data_lacks(place, run, tmp_path):
    model = SpikEmo.from_pretrained("run/seed0")
    model.config = replace(model.config, modality_dropout=0.0)
    model.save_pretrained(tmp_path / "model")
    save_corpus(load_corpus(place / "store").select(["text"]), tmp_path / "text")
    status, output, errors = run("evaluate", tmp_path / "model", "--data-dir", tmp_path / "text")
    assert (status, output, len(errors.splitlines())) == (1, "", 1)
    assert errors.startswith("error: synthetic has no audio features, but ['text'].")
    assert "trained to do without (train --modality-dropout)" in errors


@pytest.fixture
def chat(tmp_path):
    """A saved model of one modality, and two dialogues with features, as JSON Lines."""
    model = SpikEmo(small_config(["audio"])).eval()
    model.save_pretrained(tmp_path / "model")
    utterances = [("Joey", "How you doin'? 🙂", "one"), ("Ross", "x" * 10_000, "two"), ("Joey", "So...", "one")]
    lines = []
    for i, (speaker, text, dialogue) in enumerate(utterances):
        save_file({"audio": torch.randn(3)}, tmp_path / f"{i}.safetensors")
        row = {"speaker": speaker, "text": text, "dialogue": dialogue, "features": f"{i}.safetensors"}
        lines.append(json.dumps(row, ensure_ascii=False))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path


def test_predict_prints_an_object_a_line(chat, run):
    status, output, errors = run("predict", chat / "model", chat / "chat.jsonl", "--json")
    assert (status, errors) == (0, "")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [(row["dialogue"], row["speaker"]) for row in rows] == [("one", "Joey"), ("one", "Joey"), ("two", "Ross")]
    assert rows[0]["text"] == "How you doin'? 🙂"
    model = SpikEmo.from_pretrained(chat / "model")
    dialogues = read_conversations(chat / "chat.jsonl")
    wanted = [row for utterances in dialogues.values() for row in model.predict(utterances)]
    assert [row["probabilities"] for row in rows] == wanted
    assert list(wanted[0]) == list(MELD_EMOTIONS)


def test_predict_prints_a_table_of_each_dialogue(chat, run):
    status, output, _ = run("predict", chat / "model", chat / "chat.jsonl")
    assert status == 0
    lines = output.splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert lines[2].split() == ["utterance", "emotion", *MELD_EMOTIONS]
    said = next(line for line in lines if line.startswith("Joey: How you doin'? 🙂"))
    emotion, *numbers = said.removeprefix("Joey: How you doin'? 🙂").split()
    assert numbers[MELD_EMOTIONS.index(emotion)] == max(numbers)
    assert sum(map(float, numbers)) == pytest.approx(1, abs=0.04)
    assert any(line.startswith("Ross: ...") for line in lines)
    assert max(map(len, lines)) < 160


def test_import_makes_a_store(tmp_path, run):
    lengths = multiemo(tmp_path / "source")
    status, output, _ = run("import", tmp_path / "source", tmp_path / "store")
    assert status == 0
    assert "MELD: text 5-d, audio 4-d, visual 3-d" in output
    assert f"test: 5 dialogues, {sum(lengths[i] for i in range(1153, 1158))} utterances" in output
    assert load_corpus(tmp_path / "store").widths == {"text": 5, "audio": 4, "visual": 3}
    status, _, errors = run("import", tmp_path / "source", tmp_path / "store")
    assert status == 1
    assert re.fullmatch(r"error: .*store exists already\. Choose another folder or remove it\.\n", errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["train", "--preset", "large"], "Invalid value for '--preset'"),
        (["train", "--bogus"], "No such option: --bogus"),
        (["train", "--data-dir", "nowhere"], "MELD: --data-dir is nowhere, but neither it nor"),
        (["train", "--data-dir", "store", "--modalities", "smell"], r"asked for the modalities \['smell'\]"),
        (["train", "--data", "mosi", "--data-dir", "nowhere"], "CMU-MOSI: there is no nowhere"),
        (["train", "--resume", "nowhere"], "--resume: there is no nowhere/options.json; nowhere holds no run"),
        (["evaluate", "run"], r"run holds no config\.json\. These do: seed0\."),
        (["evaluate", "run/seed0", "--data-dir", "nowhere"], "--data-dir is nowhere"),
        (["predict", "run/seed0", "nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
        (["predict", "run/seed0", "bad.jsonl"], "bad.jsonl, line 2: this is no JSON"),
        (["predict", "run/seed0", "good.jsonl"], "predict: no utterance has text or audio features"),
        (["predict", "run/seed0"], "predict: give a file, or --live"),
        (["import", "nowhere", "new"], "legacy features: nowhere must hold"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place, run, arguments, message):
    good = '{"speaker": "Joey", "text": "Hi."}\n'
    (place / "good.jsonl").write_text(good)
    (place / "bad.jsonl").write_text(good + "{")
    before = sorted(p.name for p in place.iterdir())
    status, output, errors = run(*arguments)
    assert (status, output) == (1, "")
    assert re.match(f"error: .*{message}", errors)
    assert len(errors.splitlines()) == 1
    assert sorted(p.name for p in place.iterdir()) == before


def test_a_model_is_not_scored_on_features_that_it_does_not_know(place, run, tmp_path):
    save_corpus(standardise(synthetic_corpus(8, seed=1), ["text", "audio"]), tmp_path / "other")
    status, _, errors = run("evaluate", "run/seed0", "--data-dir", tmp_path / "other")
    assert status == 1
    assert re.match("error: synthetic: text features are standardised in another way", errors)


def test_an_unfinished_run_is_no_model(place, tmp_path):
    open_run(tmp_path / "seed0", read_preset(place / "run" / "seed0"))
    with pytest.raises(FileNotFoundError, match="is a run that is not finished"):
        SpikEmo.from_pretrained(tmp_path / "seed0")


def test_a_model_of_unknown_origin_is_scored_on_features_as_they_are(place, run, tmp_path):
    model = SpikEmo.from_pretrained(place / "run" / "seed0")
    model.origin = Origin()
    model.save_pretrained(tmp_path / "model")
    _, own, _ = run("evaluate", place / "run" / "seed0", "--data-dir", "store")
    _, unknown, _ = run("evaluate", tmp_path / "model", "--data-dir", "store")
    assert unknown.splitlines()[2:] == own.splitlines()[2:]


def test_without_a_command_all_are_listed():
    done = subprocess.run([sys.executable, "-m", "spikemo_model"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = ["train", "evaluate", "predict", "import", "experiment", "extract", "finetune-text"]
    assert re.findall(r"^  ([a-z-]+) +[A-Z]", done.stdout.partition("Commands:")[2], re.MULTILINE) == commands


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "import"])
def test_every_option_is_explained_and_examples_are_shown(run, command):
    status, output, _ = run(command, "--help")
    assert status == 0
    assert f"\n    {command} " in output.partition("Examples:")[2]
    options = output.partition("Options:")[2].partition("Examples:")[0]
    for entry in re.findall(r"^  (--.*(?:\n {4,}.*)*)", options, re.MULTILINE):
        assert len(entry.split()) > 3, entry


@pytest.fixture
def live_model(tmp_path):
    """A saved causal model of one modality."""
    SpikEmo(small_config(["audio"], ["forward"], is_causal=True)).save_pretrained(tmp_path / "live")
    return tmp_path / "live"


def predict_live(model, *options):
    """``predict --live`` in a process of its own, between pipes."""
    command = [sys.executable, "-m", "spikemo_model", "predict", str(model), "--live", *options]
    return subprocess.Popen(
        command, cwd=ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("table", [False, True], ids=["json lines", "csv"])
def test_live_answers_each_line_before_the_next_and_as_the_whole_conversation(live_model, table):
    said = [
        Utterance(who, text, {"audio": torch.randn(3).tolist()})
        for who, text in zip("abac", ("Hi. 🙂", "", "x" * 10_000, "So, well"), strict=True)
    ]
    rows = [{"speaker": u.speaker, "text": u.text, "features": dict(u.features)} for u in said]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if table:
        quoted = [json.dumps(row["features"]).replace('"', '""') for row in rows]
        lines = [f'{u.speaker},"{u.text}","{x}"' for u, x in zip(said, quoted, strict=True)]
    heard = []
    with predict_live(live_model, "--json") as process:
        if table:
            process.stdin.write(b"speaker,text,features\n")
        for line in lines:
            process.stdin.write(f"{line}\n".encode())
            ready, _, _ = select.select([process.stdout], [], [], 60)
            assert ready, "nothing is printed before the next line"
            heard.append(json.loads(process.stdout.readline()))
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait() == 0, process.stderr.read()
    assert [(row["speaker"], row["text"]) for row in heard] == [(u.speaker, u.text) for u in said]
    for row, wanted in zip(heard, SpikEmo.from_pretrained(live_model).predict(said), strict=True):
        assert row["probabilities"] == pytest.approx(wanted, abs=1e-5)


def test_live_prints_one_table_and_names_a_bad_line(live_model):
    good = '{"speaker": "Joey", "text": "Hi.", "features": {"audio": [1, 2, 3]}}\n'
    process = predict_live(live_model)
    output, errors = process.communicate((2 * good + "{\n").encode(), timeout=60)
    lines = output.decode().splitlines()
    assert lines[0].split() == ["utterance", "emotion", *MELD_EMOTIONS]
    assert [line[:9] for line in lines[1:]] == ["-" * 9, "Joey: Hi.", "Joey: Hi."]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert process.returncode == 1
    assert re.fullmatch(r"error: standard input, line 3: this is no JSON \(.*\)\.\n", errors.decode())


def test_live_names_each_dialogue_when_it_goes_on(live_model, run, monkeypatch):
    said = [("", "Hi."), ("one", "So?"), ("one", "No."), ("two", "Yes."), ("one", "Oh."), ("", "Bye.")]
    rows = [{"speaker": "a", "text": t, "dialogue": d, "features": {"audio": [1, 2, 3]}} for d, t in said]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    status, output, errors = run("predict", live_model, "--live")
    assert (status, errors) == (0, "")
    shown = [line[:7].strip() for line in output.splitlines()[2:]]
    assert shown == ["a: Hi.", "one", "a: So?", "a: No.", "two", "a: Yes.", "one", "a: Oh.", "", "a: Bye."]


def test_live_without_standard_input_is_an_error(live_model):
    command = f"{sys.executable} -m spikemo_model predict {live_model} --live <&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: predict: --live reads standard input, which is closed. Pipe the conversation into it.\n"
    )


def test_a_model_that_sees_the_future_is_refused_before_anybody_speaks(chat, run):
    status, output, errors = run("predict", chat / "model", "--live")
    assert (status, output, len(errors.splitlines())) == (1, "", 1)
    assert errors.startswith("error: LiveConversation: the model sees the future; train one with is_causal (train --ca")
    for arguments in (["predict", chat / "model"], ["predict", chat / "model", chat / "chat.jsonl", "--live"]):
        assert run(*arguments) == (1, "", "error: predict: give a file, or --live to read standard input.\n")
