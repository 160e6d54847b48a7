"""From data sets as published to feature stores: what is in them, bad clips, kills, and the command line."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_helpers import LINES, scene, write_clip, write_meld

from spikemo_model.cli import main
from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS
from spikemo_model.data import DataError, load_corpus
from spikemo_model.features.audio import functionals
from spikemo_model.features.clips import read_release
from spikemo_model.features.extract import extract
from spikemo_model.features.media import read_audio
from spikemo_model.features.text import ContextEncoder
from spikemo_model.features.visual import FaceEncoder, Pictures, faces


@pytest.fixture(scope="module")
def release(tmp_path_factory, clip, recordings, photographs) -> Path:
    """MELD as published, with different and bad clips in train dialogue 0 and test."""
    root = write_meld(tmp_path_factory.mktemp("meld"), clip)
    train, test = root / "train_splits", root / "output_repeated_splits_test"
    for path in (*(train / f"dia0_utt{u}.mp4" for u in (1, 2, 3)), *(test / f"dia0_utt{u}.mp4" for u in (0, 1))):
        path.unlink()  # 0 is a link of the whole clip, 1 of dialogue 0 stays away
    (train / "dia0_utt2.mp4").write_bytes(b"no video")
    write_clip(train / "dia0_utt3.mp4", [scene()] * 5, sound=read_audio(recordings[1]))
    write_clip(test / "dia0_utt0.mp4", [scene((photographs[5], 60, 60, 120))] * 5, sound=np.zeros(16_000))
    write_clip(test / "dia0_utt1.mp4", [scene((photographs[5], 60, 60, 120))] * 5, sound=np.zeros(0))
    (train / "._dia0_utt1.mp4").write_bytes(b"what a Mac leaves behind")
    return root


@pytest.fixture(scope="module")
def extracted(release, text_encoder, face_encoder, tmp_path_factory):
    """The store and the flaws of that release."""
    out = tmp_path_factory.mktemp("out") / "store"
    return extract(release, out, text_encoder=text_encoder, face_encoder=face_encoder, workers=1), out


def test_bad_clips_are_listed_with_their_reasons(extracted):
    flaws, out = extracted
    assert [flaw[:4] for flaw in flaws] == [
        ("test", "dia0", "utt1", "audio"),
        ("train", "dia0", "utt1", "audio"),
        ("train", "dia0", "utt2", "audio"),
        ("train", "dia0", "utt1", "visual"),
        ("train", "dia0", "utt2", "visual"),
        ("train", "dia0", "utt3", "visual"),
    ]
    reasons = ["no sound track", "there is no ", "cannot be decoded", "there is no ", "cannot be decoded", "no face"]
    for part, flaw in zip(reasons, flaws, strict=True):
        assert part in flaw.reason
    with (out / "clips.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["split", "dialogue", "utterance", "modality", "reason"]
    assert [tuple(row) for row in rows] == [tuple(flaw) for flaw in flaws]
    assert load_corpus(out).notes[-2:] == (
        "3 utterances have no audio features of their own: clips.csv says why.",
        "3 utterances have no visual features of their own: clips.csv says why.",
    )


def test_the_store_holds_the_features_of_the_extractors(extracted, release, clip, text_encoder, face_encoder):
    corpus = load_corpus(extracted[1])
    assert corpus.name == "MELD"
    assert corpus.widths == {"text": 32, "audio": 6373, "visual": 12}
    first, second = corpus.splits["train"]
    assert second.texts == tuple(text for _, text, _ in LINES)
    assert second.labels.tolist() == [MELD_EMOTIONS.index(emotion) for *_, emotion in LINES]
    torch.testing.assert_close(second.features["text"], ContextEncoder(text_encoder).features(second))
    face = FaceEncoder(face_encoder)(faces(Pictures(clip)))
    torch.testing.assert_close(second.features["visual"], face.expand(4, 12))
    torch.testing.assert_close(first.features["visual"], torch.stack([face, *torch.zeros(3, 12)]))
    other = faces(Pictures(release / "output_repeated_splits_test" / "dia0_utt0.mp4"))
    assert torch.equal(corpus.splits["test"][0].features["visual"][0], FaceEncoder(face_encoder)(other))

    whole, own = functionals(clip), functionals(release / "train_splits" / "dia0_utt3.mp4")
    mean = (5 * whole + own) / 6  # of the training clips that can be read; it stands in for the other two
    mean_kept, std = corpus.standardised["audio"]
    torch.testing.assert_close(mean_kept, mean, rtol=1e-3, atol=1e-3)
    varied = std.isfinite() & (std > 1e-3 * mean.abs())  # else rounding is all there is
    expected = torch.stack([whole, mean, mean, own])
    expected = ((expected - mean_kept) / std).clamp(-5, 5)
    torch.testing.assert_close(first.features["audio"][:, varied], expected[:, varied], rtol=1e-3, atol=1e-3)
    assert first.features["audio"][1:3].abs().max() < 1e-2


def test_the_store_names_its_extractors_and_nothing_else_is_left(extracted, text_encoder, face_encoder):
    out = extracted[1]
    corpus = load_corpus(out)
    settings = corpus.extractors
    assert settings["text"]["encoder"] == text_encoder
    assert settings["text"]["max_tokens"] == 64
    assert settings["audio"] == {"name": "functionals", "opensmile": "2.6.0", "features": "ComParE_2016"}
    assert settings["visual"]["encoder"] == face_encoder
    assert settings["visual"]["pictures"] == 20
    assert corpus.about["audio"] == "functionals (opensmile 2.6.0, features ComParE_2016)"
    assert sorted(path.name for path in out.iterdir()) == ["clips.csv", "features.safetensors", "index.json"]
    assert list(out.parent.iterdir()) == [out]


def test_audio_may_be_reduced_and_folders_may_lie_one_level_down(release, tmp_path):
    root = tmp_path / "MELD.Raw"
    root.mkdir()
    for name, folder in (
        ("train", "train_splits"),
        ("dev", "dev_splits_complete"),
        ("test", "output_repeated_splits_test"),
    ):
        (root / f"{name}_sent_emo.csv").symlink_to(release / f"{name}_sent_emo.csv")
        (root / name).mkdir()
        (root / name / folder).symlink_to(release / folder)
    flaws = extract(root, tmp_path / "out", ("audio",), audio_width=2, workers=1)
    assert len(flaws) == 3
    corpus = load_corpus(tmp_path / "out")
    assert corpus.widths == {"audio": 2}
    assert corpus.extractors["audio"]["reduced_to"] == 2
    with pytest.raises(FileExistsError, match="out exists already"):
        extract(root, tmp_path / "out", ("audio",))


def alive(process: str) -> bool:
    """Whether a process is there and is more than a zombie that nobody has asked for."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "(zombie)" not in status.read_text()


def test_a_killed_extraction_goes_on_where_it_was(clip, text_encoder, tmp_path, monkeypatch):
    root, out = write_meld(tmp_path / "meld", clip, dialogues=8), tmp_path / "out"
    code = (
        "from pathlib import Path; from spikemo_model.features.extract import extract; "
        f"extract(Path({str(root)!r}), Path({str(out)!r}), ['audio'], workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    finished = lambda: list((tmp_path / "out.partial" / "audio").glob("t*.safetensors"))  # noqa: E731
    deadline = time.monotonic() + 120
    while len(finished()) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers)), "workers outlive their parent"
    assert not out.exists()
    left = 40 - len(finished())
    assert 0 < left <= 35
    with pytest.raises(ValueError, match=r"out\.partial holds unfinished work of other settings; they differ in text"):
        extract(root, out, ["text", "audio"], text_encoder=text_encoder, workers=1)
    measured = []
    monkeypatch.setattr(
        "spikemo_model.features.extract.functionals", lambda path: (measured.append(path), functionals(path))[1]
    )
    assert extract(root, out, ["audio"], workers=1) == []
    assert left - 1 <= len(measured) <= left
    mean, _ = load_corpus(out).standardised["audio"]
    torch.testing.assert_close(mean, functionals(clip), rtol=1e-4, atol=1e-4)
    assert list(tmp_path.glob("out*")) == [out]


def test_several_processes_give_the_same_store(release, extracted, tmp_path):
    flaws = extract(release, tmp_path / "out", ["audio"], workers=2)
    expected, corpus = load_corpus(extracted[1]), load_corpus(tmp_path / "out")
    assert flaws == [flaw for flaw in extracted[0] if flaw.modality == "audio"]
    for split, dialogues in corpus.splits.items():
        for dialogue, other in zip(dialogues, expected.splits[split], strict=True):
            assert torch.equal(dialogue.features["audio"], other.features["audio"])


def test_a_worker_that_dies_is_one_line(release, tmp_path, monkeypatch):
    monkeypatch.setattr("spikemo_model.features.extract.functionals", lambda path: os._exit(1))
    with pytest.raises(OSError, match="a worker process died: a clip crashed its decoder, or memory ran out"):
        extract(release, tmp_path / "out", ["audio"], workers=2)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_extracted_is_named(release, clip, tmp_path):
    with pytest.raises(ValueError, match=r"modalities must be some of .*'visual'\), got \('smell',\)"):
        extract(release, tmp_path / "out", ["smell"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds neither MELD .* nor IEMOCAP"):
        extract(tmp_path / "empty", tmp_path / "out", ["audio"])
    root = write_meld(tmp_path / "meld", clip, dialogues=1)
    for path in (root / "train_splits").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no clip of the training split can be used for audio; the first: there is no"):
        extract(root, tmp_path / "out", ["audio"], workers=1)
    (root / "dev_sent_emo.csv").unlink()
    with pytest.raises(DataError, match=r"there is no .*dev_sent_emo\.csv"):
        extract(root, tmp_path / "out", ["audio"], workers=1)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def iemocap(tmp_path_factory, photographs, recordings) -> Path:
    """IEMOCAP as published: three dialogues in each session, the woman on the left; turns out of order in the file."""
    root = tmp_path_factory.mktemp("IEMOCAP_full_release")
    film = [scene((photographs[0], 10, 50, 140), (photographs[5], 170, 50, 140))] * 2 + [scene()] * 4
    video = write_clip(root / "film.avi", film, fps=2)
    for session in range(1, 6):
        for n in (1, 2, 3):
            name, folder = f"Ses0{session}F_impro0{n}", root / f"Session{session}"
            for part in ("dialog/EmoEvaluation", "dialog/transcriptions", "dialog/avi/DivX", f"sentences/wav/{name}"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            turns = (
                ("M000", 0.5, 0.9, "fru"),
                ("F001", 1.0, 1.5, "xxx"),
                ("F000", 0.0, 0.5, "hap"),
                ("M001", 2.0, 3.0, "exc"),
            )
            (folder / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text(
                "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
                + "".join(
                    f"[{start:.4f} - {end:.4f}]\t{name}_{turn}\t{code}\t[2.5, 2.5, 2.5]\nC-E2:\tNeutral;\t()\n\n"
                    for turn, start, end, code in turns
                )
            )
            (folder / "dialog" / "transcriptions" / f"{name}.txt").write_text(
                "".join(f"{name}_{turn} [{start:08.4f}-{end:08.4f}]: I say {turn}.\n" for turn, start, end, _ in turns)
                + "M: (LAUGHTER)\n"
            )
            os.link(video, folder / "dialog" / "avi" / "DivX" / f"{name}.avi")
            for i, (turn, *_) in enumerate(turns):
                (folder / "sentences" / "wav" / name / f"{name}_{turn}.wav").symlink_to(recordings[i])
    return root


def test_iemocap_is_read_as_published(iemocap):
    corpus, clips = read_release(iemocap)
    assert {split: len(dialogues) for split, dialogues in corpus.splits.items()} == {"train": 11, "valid": 1, "test": 3}
    assert corpus.splits["valid"][0].id == "Ses04F_impro01"
    first = corpus.splits["train"][0]
    assert first.utterance_ids == ("Ses01F_impro01_F000", "Ses01F_impro01_M000", "Ses01F_impro01_M001")
    assert first.speakers == ("F", "M", "M")
    assert first.texts == ("I say F000.", "I say M000.", "I say M001.")
    assert [IEMOCAP_EMOTIONS[label] for label in first.labels] == ["happiness", "frustration", "excitement"]
    woman, man, _ = (clips["train", first.id, name].pictures for name in first.utterance_ids)
    assert woman[1:] == (0.0, 0.5, "left")
    assert man[1:] == (0.5, 0.9, "right")


def test_each_speaker_of_iemocap_is_seen_on_the_right_side(iemocap, face_encoder, recordings, tmp_path):
    flaws = extract(iemocap, tmp_path / "out", ["audio", "visual"], face_encoder=face_encoder, workers=1)
    assert {flaw.reason for flaw in flaws} == {"no face"}
    assert [flaw.utterance[-4:] for flaw in flaws] == ["M001"] * 15  # the film shows nobody after one second
    corpus = load_corpus(tmp_path / "out")
    assert corpus.name == "IEMOCAP"
    x = corpus.splits["train"][0].features["visual"]
    film = iemocap / "Session1" / "dialog" / "avi" / "DivX" / "Ses01F_impro01.avi"
    for row, (side, start, end) in zip(x, (("left", 0.0, 0.5), ("right", 0.5, 0.9)), strict=False):
        own = FaceEncoder(face_encoder)(faces(Pictures(film, start, end, side)))
        torch.testing.assert_close(row, own)
    assert not torch.allclose(x[0], x[1], rtol=0.01)
    mean, _ = corpus.standardised["audio"]
    three = torch.stack([functionals(recordings[i]) for i in (0, 2, 3)]).mean(0)  # M000 is first in the file
    torch.testing.assert_close(mean, three, rtol=1e-3, atol=1e-3)


def test_a_damaged_iemocap_is_named(iemocap, tmp_path):
    root = Path(shutil.copytree(iemocap, tmp_path / "copy", symlinks=True))
    transcript = root / "Session3" / "dialog" / "transcriptions" / "Ses03F_impro02.txt"
    transcript.write_text(transcript.read_text().replace("Ses03F_impro02_M000", "else"))
    with pytest.raises(DataError, match=r"Ses03F_impro02\.txt lacks \['Ses03F_impro02_M000'\]"):
        read_release(root)
    transcript.unlink()
    with pytest.raises(DataError, match=r"there is no .*Ses03F_impro02\.txt"):
        read_release(root)
    shutil.rmtree(root / "Session2")
    with pytest.raises(DataError, match=r"no files Ses\*\.txt in .*Session2"):
        read_release(root)


@pytest.fixture
def run(capsys):
    """Run a command of ``python -m spikemo_model``; its exit status and what it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def test_the_command_line_extracts_then_fine_tunes(run, release, text_encoder, face_encoder, tmp_path):
    store = tmp_path / "store"
    options = ("--text-encoder", text_encoder, "--face-encoder", face_encoder, "--workers", 1, "--audio-width", 3)
    status, printed, errors = run("extract", release, store, *options)
    assert not status, errors
    assert "train dia0 utt1: audio: there is no " in printed
    assert "6 such stand-ins in all" in printed
    assert load_corpus(store).widths == {"text": 32, "audio": 3, "visual": 12}
    options = ("--encoder", text_encoder, "--epochs", 1, "--max-tokens", 32)
    status, _, errors = run("finetune-text", store, tmp_path / "tuned", *options)
    assert not status, errors
    tuned = load_corpus(tmp_path / "tuned" / "features")
    assert tuned.widths == {"text": 32, "audio": 3, "visual": 12}
    assert tuned.extractors["text"]["start"] == text_encoder
    before, after = (c.splits["test"][0].features for c in (load_corpus(store), tuned))
    assert torch.equal(before["audio"], after["audio"])
    assert not torch.equal(before["text"], after["text"])


def test_the_command_line_says_in_one_line_what_is_wrong(run, release, text_encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("extract", tmp_path / "empty", tmp_path / "out"), "holds neither MELD"),
        (("extract", release, tmp_path / "out", "--text-encoder", tmp_path / "empty"), "download config.json"),
        (("extract", release, tmp_path / "out", "--modality", "smell"), "modalities must be some of"),
        (("finetune-text", release, tmp_path / "out", "--encoder", tmp_path / "empty"), "download config.json"),
        (("finetune-text", tmp_path / "empty", tmp_path / "out", "--encoder", text_encoder), "holds neither MELD"),
    ):
        status, _, errors = run(*arguments)
        assert status == 1
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert message in line
        assert not (tmp_path / "out").exists()
    assert "Folder of MELD or IEMOCAP as published" in run("extract", "--help")[1]
