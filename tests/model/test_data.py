"""Readers of real data, the feature store, the synthetic corpus and the batches made of them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS
from spikemo_model.data import (
    Conversation,
    Corpus,
    DataError,
    TextFeatures,
    collate,
    load_corpus,
    read_iemocap,
    read_meld,
    read_mosi,
    read_transcripts,
    save_corpus,
    standardise,
    synthetic_corpus,
)
from spikemo_model.data.corpus import reduce_by
from spikemo_model.data.loader import DialogueLoader


@pytest.fixture
def meld_copy(data, tmp_path):
    """A copy of MELD's files that a test may damage."""
    return shutil.copytree(data / "meld", tmp_path / "meld", copy_function=shutil.copyfile)


def edit(path, old, new, count=1):
    """Replace text in a file that is sure to hold it."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def test_meld_has_its_published_size_and_classes(data):
    corpus = read_meld(data / "meld")
    sizes = {s: (len(d), sum(map(len, d))) for s, d in corpus.splits.items()}
    assert sizes == {"train": (1038, 9989), "valid": (114, 1109), "test": (280, 2610)}
    assert corpus.classes == MELD_EMOTIONS
    assert corpus.widths == {"text": 384, "audio": 8}
    labels = torch.cat([d.labels for d in corpus.splits["train"]])
    assert torch.bincount(labels).tolist() == [4710, 1205, 268, 683, 1743, 271, 1109]


def test_meld_rows_are_joined_by_id_and_ordered_by_utterance(data):
    corpus = read_meld(data / "meld", "finetuned")
    vectors = np.load(data / "meld" / "dev_text_minilm.npz")["finetuned"]
    first = corpus.splits["valid"][0]
    assert torch.equal(first.features["text"], torch.from_numpy(vectors[: len(first)].astype(np.float32)))
    for dialogues in corpus.splits.values():
        for d in dialogues:
            numbers = [int(u.removeprefix("utt")) for u in d.utterance_ids]
            assert numbers == sorted(set(numbers))
    gap = next(d for d in corpus.splits["train"] if int(d.utterance_ids[-1][3:]) != len(d) - 1)
    assert len(gap.texts) == len(gap)


def test_missing_audio_is_the_mean_of_training(data):
    corpus = read_meld(data / "meld")
    silent = next(d for d in corpus.splits["train"] if d.id == "dia125")
    row = silent.features["audio"][silent.utterance_ids.index("utt3")]
    duration = torch.cat([d.features["audio"][:, 0] for d in corpus.splits["train"]]).double()
    measured = duration[duration != row[0]]
    assert len(measured) == 9988
    assert row[0].item() == pytest.approx(measured.mean().item(), abs=1e-6)
    unvoiced = (data / "meld" / "train_prosody8.csv").read_text().count(",,")
    assert unvoiced > 100
    assert all(d.features["audio"].isfinite().all() for split in corpus.splits.values() for d in split)


def test_the_repeated_scene_is_reported(data):
    notes = read_meld(data / "meld").notes
    assert "Test dialogue dia85 repeats a scene of training dialogue dia12." in notes
    assert len(notes) == 2


def test_standardising_sees_training_only_and_survives_constants(data):
    corpus = standardise(read_meld(data / "meld"), ["text", "audio"])
    for name in ("text", "audio"):
        x = torch.cat([d.features[name] for d in corpus.splits["train"]])
        constant = x.std(0) == 0
        assert x.mean(0).abs().max() < 0.05
        assert (x[:, ~constant].std(0) - 1).abs().max() < 0.1
        for split in ("valid", "test"):
            assert torch.cat([d.features[name] for d in corpus.splits[split]]).abs().max() <= 5
    mean, std = corpus.standardised["audio"]
    raw = read_meld(data / "meld").splits["test"][3].features["audio"]
    wanted = ((raw - mean) / std).clamp(-5, 5)
    assert torch.equal(corpus.splits["test"][3].features["audio"], wanted)


def test_modalities_can_be_left_out(data):
    assert read_meld(data / "meld", audio=None).widths == {"text": 384}
    assert read_meld(data / "meld", text=None).widths == {"audio": 8}
    corpus = read_meld(data / "meld")
    assert corpus.select(["audio"]).widths == {"audio": 8}
    assert list(corpus.select(["audio", "text"]).about) == ["audio", "text"]
    with pytest.raises(DataError, match=r"asked for the modalities \['visual'\], but there are \['text', 'audio'\]"):
        corpus.select(["visual"])


def test_features_made_from_transcripts_are_taken_in_the_order_of_the_rows(data):
    texts = read_transcripts(data / "meld")
    rows = {split: torch.arange(len(own), dtype=torch.float32).unsqueeze(1) for split, own in texts.items()}
    corpus = read_meld(data / "meld", TextFeatures(rows, "row numbers"), audio=None)
    found = {}
    for d in corpus.splits["test"]:
        found |= {int(i): text for i, text in zip(d.features["text"][:, 0], d.texts, strict=True)}
    assert [found[i] for i in range(2610)] == texts["test"]
    assert corpus.about == {"text": "row numbers"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "dev_sent_emo.csv").unlink(), r"there is no .*dev_sent_emo\.csv"),
        (lambda p: edit(p / "train_sent_emo.csv", "Chandler,neutral,", "Chandler,bored,"),
         r"train_sent_emo\.csv, dialogue 0, utterance 0: unknown emotion 'bored'"),
        (lambda p: edit(p / "test_sent_emo.csv", "Speaker", "Person"), r"lacks the columns \['Speaker'\]"),
        (lambda p: (p / "test_sent_emo.csv").write_bytes((p / "test_sent_emo.csv").read_bytes()[:-60]),
         r"test_sent_emo\.csv, row 2611 is cut short"),
        (lambda p: (p / "dev_text_minilm.npz").write_bytes((p / "dev_text_minilm.npz").read_bytes()[:5000]),
         r"dev_text_minilm\.npz cannot be read"),
        (lambda p: (p / "dev_text_minilm.npz").unlink(), r"there is no .*dev_text_minilm\.npz"),
        (lambda p: shutil.copyfile(p / "dev_text_minilm.npz", p / "test_text_minilm.npz"),
         r"test_sent_emo\.csv has 2610 utterances, but there are 1109 text features"),
        (lambda p: shutil.copyfile(p / "dev_prosody8.csv", p / "train_prosody8.csv"), r"train_prosody8\.csv covers"),
        (lambda p: edit(p / "train_prosody8.csv", "62.4524616420555", "loud"), r"prosody8\.csv, row 2 cannot be read"),
        (lambda p: edit(p / "train_prosody8.csv", "62.4524616420555", "inf"), r"\(dia900_utt4\.wav\) holds infinity"),
        (lambda p: (p / "dev_prosody8.csv").unlink(), r"there is no .*dev_prosody8\.csv"),
    ],
)  # fmt: skip
def test_damaged_meld_files_are_named(meld_copy, damage, message):
    damage(meld_copy)
    with pytest.raises(DataError, match=message):
        read_meld(meld_copy)


def test_nan_in_features_names_dialogue_and_utterance(meld_copy):
    arrays = dict(np.load(meld_copy / "dev_text_minilm.npz"))
    arrays["frozen"][1, 7] = np.nan
    np.savez(meld_copy / "dev_text_minilm.npz", **arrays)
    with pytest.raises(DataError, match="valid dialogue dia0, utterance utt1: text features hold NaN or infinity"):
        read_meld(meld_copy)
    with pytest.raises(DataError, match=r"has no array 'best'; it has \['finetuned', 'frozen'\]"):
        read_meld(meld_copy, "best")


def test_pickled_arrays_are_refused(meld_copy):
    np.savez(meld_copy / "dev_text_minilm.npz", frozen=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"dev_text_minilm\.npz cannot be read"):
        read_meld(meld_copy)


def test_mosi_has_its_usual_split_and_three_modalities(data):
    corpus = read_mosi(data / "mosi")
    assert {split: len(videos) for split, videos in corpus.splits.items()} == {"train": 52, "valid": 10, "test": 31}
    assert sum(len(v) for videos in corpus.splits.values() for v in videos) == 2199
    assert corpus.widths == {"text": 100, "audio": 73, "visual": 100}
    arrays = np.load(data / "mosi" / "cmu_mosi_trimodal.npz")
    video = corpus.splits["test"][0]
    rows = np.flatnonzero(arrays["video"] == video.id)
    assert [int(u) for u in video.utterance_ids] == sorted(arrays["segment"][rows].tolist())
    for row in rows:
        i = video.utterance_ids.index(str(arrays["segment"][row]))
        assert video.labels[i].item() == arrays["label2"][row]
        assert np.array_equal(video.features["visual"][i].numpy(), arrays["video100"][row])


def test_damaged_mosi_files_are_named(data, tmp_path):
    with pytest.raises(DataError, match=r"there is no .*cmu_mosi_trimodal\.npz"):
        read_mosi(tmp_path)
    for name in ("cmu_mosi_trimodal.npz", "gcnet_standard_split_videos.json"):
        shutil.copyfile(data / "mosi" / name, tmp_path / name)
    edit(tmp_path / "gcnet_standard_split_videos.json", "03bSnISJMiM", "unknown")
    with pytest.raises(DataError, match=r"differ in the videos \['03bSnISJMiM', 'unknown'\]"):
        read_mosi(tmp_path)
    content = (tmp_path / "cmu_mosi_trimodal.npz").read_bytes()
    (tmp_path / "cmu_mosi_trimodal.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_mosi(tmp_path)


def conversation(name="a", L=2, **changes):
    """A valid dialogue, with something changed."""
    values = {
        "id": name,
        "features": {"text": torch.zeros(L, 3)},
        "speakers": ("x",) * L,
        "labels": torch.zeros(L, dtype=torch.long),
        "utterance_ids": tuple(f"utt{i}" for i in range(L)),
    }
    return Conversation(**{**values, **changes})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (conversation("b", 0), "test dialogue b has no utterance"),
        (conversation("b", features={}), r"test dialogue b must have features of \['text'\]; it differs in \['text'\]"),
        (conversation("b", features={"text": torch.zeros(2, 4)}), "text features must be 2 utterances x 3, got"),
        (conversation("b", labels=torch.tensor([0, 9])), r"labels \[0, 9\] outside"),
        (conversation("b", labels=torch.tensor([0])), "has 2 speakers, but labels"),
        (conversation("b", features={"text": torch.full((2, 3), torch.inf)}), "utterance utt0: text features hold NaN"),
        (conversation("a"), "test dialogue a is there twice"),
    ],
)
def test_bad_dialogues_are_named(bad, message):
    good = (conversation(),)
    with pytest.raises(DataError, match=message):
        Corpus("mine", ("p", "q"), {"train": good, "valid": good, "test": (*good, bad)}, {"text": "zeros"})


def test_a_missing_split_is_named():
    with pytest.raises(DataError, match="the valid split is missing or empty"):
        Corpus("mine", ("p", "q"), {"train": (conversation(),), "test": (conversation(),)}, {"text": "zeros"})


def same(a: Corpus, b: Corpus) -> bool:
    """Whether two corpora hold the same."""
    plain = lambda c: (c.name, c.classes, c.about, c.notes)  # noqa: E731
    dialogues = [(x, y) for split in a.splits for x, y in zip(a.splits[split], b.splits[split], strict=True)]
    return plain(a) == plain(b) and all(
        (x.id, x.speakers, x.utterance_ids, x.texts) == (y.id, y.speakers, y.utterance_ids, y.texts)
        and torch.equal(x.labels, y.labels)
        and all(torch.equal(x.features[m], y.features[m]) for m in a.about)
        for x, y in dialogues
    )


def test_a_store_gives_back_what_was_saved(tmp_path, data):
    for corpus in (synthetic_corpus(12), read_mosi(data / "mosi")):
        save_corpus(corpus, tmp_path / corpus.name)
        assert same(load_corpus(tmp_path / corpus.name), corpus)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CMU-MOSI", "synthetic"]
    with pytest.raises(FileExistsError, match="exists already"):
        save_corpus(corpus, tmp_path / corpus.name)


def test_a_store_keeps_how_its_features_were_made(tmp_path):
    extractors = {"text": {"name": "encoder_features", "encoder": "roberta-base"}}
    corpus = replace(standardise(synthetic_corpus(4), ["text", "visual"]), extractors=extractors)
    save_corpus(corpus, tmp_path / "store")
    stored = load_corpus(tmp_path / "store")
    assert stored.extractors == extractors
    assert set(stored.standardised) == {"text", "visual"}
    for name, constants in corpus.standardised.items():
        assert all(map(torch.equal, stored.standardised[name], constants))


def test_a_store_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("spikemo_model.data.store.save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_corpus(synthetic_corpus(4), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_damaged_stores_are_named(tmp_path):
    store = tmp_path / "store"
    with pytest.raises(DataError, match=r"there is no .*index\.json"):
        load_corpus(store)
    save_corpus(synthetic_corpus(4), store)
    tensors = load_file(store / "features.safetensors")
    content = (store / "features.safetensors").read_bytes()
    (store / "features.safetensors").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"features\.safetensors cannot be read"):
        load_corpus(store)
    save_file({name: x for name, x in tensors.items() if name != "test/audio"}, store / "features.safetensors")
    with pytest.raises(DataError, match="do not fit together"):
        load_corpus(store)
    save_file({**tensors, "test/audio": tensors["test/audio"][:-1].clone()}, store / "features.safetensors")
    with pytest.raises(DataError, match="do not fit together"):
        load_corpus(store)
    (store / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json cannot be read"):
        load_corpus(store)
    (store / "index.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="must be of format 'spikemo-features-1', got 'other'"):
        load_corpus(store)


def test_iemocap_is_read_from_its_store(tmp_path):
    corpus = synthetic_corpus(8)
    save_corpus(corpus, tmp_path / "meld")
    with pytest.raises(DataError, match="holds synthetic with the classes neutral"):
        read_iemocap(tmp_path / "meld")
    relabelled = {
        split: tuple(replace(d, labels=d.labels % 6) for d in dialogues) for split, dialogues in corpus.splits.items()
    }
    save_corpus(replace(corpus, name="IEMOCAP", classes=IEMOCAP_EMOTIONS, splits=relabelled), tmp_path / "store")
    assert read_iemocap(tmp_path / "store").classes == IEMOCAP_EMOTIONS
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "Speakers.pkl").touch()
    with pytest.raises(DataError, match="Import them once: import_legacy_features"):
        read_iemocap(tmp_path / "pickles")


def test_the_synthetic_corpus_is_repeatable_unbalanced_and_carries_emotions_over():
    corpus = synthetic_corpus(400, seed=3)
    assert same(corpus, synthetic_corpus(400, seed=3))
    assert not same(corpus, synthetic_corpus(400, seed=4))
    labels = torch.cat([d.labels for d in corpus.splits["train"]])
    shares = torch.bincount(labels, minlength=7) / len(labels)
    assert 0.4 < shares[0] < 0.55
    assert shares[2] < 0.06
    pairs = [(a, b) for d in corpus.splits["train"] for a, b in zip(d.labels[:-1], d.labels[1:], strict=True)]
    kept = sum(int(a == b) for a, b in pairs) / len(pairs)
    assert kept > float((shares**2).sum()) + 0.1
    assert list(corpus.widths) == ["text", "audio", "visual"]
    assert any("not MELD" in note for note in corpus.notes)


def test_a_batch_pads_with_silence_and_numbers_speakers_within_the_dialogue():
    a = conversation("a", 3, speakers=("Ross", "Rachel", "Ross"), labels=torch.tensor([0, 1, -1]))
    b = conversation("b", 1, speakers=("Joey",))
    batch = collate([a, b])
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.speakers.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch.labels.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert batch.ids == ("a", "b")
    assert len(batch) == 2


@given(count=st.integers(2, 40), batch_size=st.integers(2, 9), world_size=st.integers(1, 2), epoch=st.integers(0, 3))
def test_an_epoch_gives_every_dialogue_once_over_all_processes(count, batch_size, world_size, epoch):
    dialogues = [conversation(f"d{i}", 1 + i % 5) for i in range(count)]
    seen, shapes = [], []
    for rank in range(world_size):
        loader = DialogueLoader(dialogues, batch_size, seed=1, rank=rank, world_size=world_size)
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [name for batch in batches if (batch.labels >= 0).any() for name in batch.ids]
        shapes.append(len(batches))
    assert len(set(shapes)) == 1
    assert sorted(seen) == sorted(d.id for d in dialogues)
    evaluated = [
        name
        for rank in range(world_size)
        for batch in DialogueLoader(dialogues, batch_size, None, rank, world_size)
        for name in batch.ids
    ]
    assert sorted(evaluated) == sorted(d.id for d in dialogues)


@given(cut=st.integers(0, 7))
def test_a_loader_goes_on_where_it_was(cut):
    dialogues = [conversation(f"d{i}", 1 + i % 3) for i in range(20)]
    order = lambda loader: [batch.ids for batch in loader]  # noqa: E731
    loader = DialogueLoader(dialogues, 3, seed=5)
    loader.set_epoch(2)
    whole = order(loader)
    stopped = DialogueLoader(dialogues, 3, seed=5)
    stopped.set_epoch(2)
    iterator = iter(stopped)
    first = [next(iterator).ids for _ in range(min(cut, len(whole)))]
    resumed = DialogueLoader(dialogues, 3, seed=5)
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(2 if cut < len(whole) else 3)
    rest = order(resumed)
    if cut < len(whole):
        assert first + rest == whole
        resumed.set_epoch(3)
    loader.set_epoch(3)
    assert order(loader) != whole
    assert order(DialogueLoader(dialogues, 3, seed=6)) != order(DialogueLoader(dialogues, 3, seed=5))


def test_more_processes_than_dialogues_is_an_error():
    with pytest.raises(ValueError, match="2 processes need at least as many dialogues"):
        DialogueLoader([conversation()], 4, seed=0, rank=0, world_size=2)


def test_a_choice_of_modalities_leaves_nothing_of_the_others(tmp_path):
    corpus = standardise(synthetic_corpus(8), ["audio", "text"])
    extractors = {name: {"name": f"of {name}"} for name in ("audio", "text")}
    reductions = {name: (torch.zeros(width), torch.eye(width, 2)) for name, width in corpus.widths.items()}
    corpus = replace(reduce_by(corpus, reductions), extractors=extractors)
    save_corpus(corpus.select(["text"]), tmp_path / "text")
    written = load_file(tmp_path / "text" / "features.safetensors")
    assert not [name for name in written if name.endswith(("/audio", "/visual"))]
    stored = load_corpus(tmp_path / "text")
    assert stored.extractors == {"text": {"name": "of text"}}
    assert (list(stored.standardised), list(stored.reduced)) == (["text"], ["text"])
