"""Where MELD is found, in order; what is said of it; features made on the spot."""

import http.server
import logging
import shutil
import threading
from functools import partial

import pytest
import torch

from spikemo_model.data import DataError, locate_meld, save_corpus, synthetic_corpus, text_features
from spikemo_model.data.text import encoder_features, ngram_features

NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("SPIKEMO_DATA", raising=False)


@pytest.fixture
def transcripts(data, tmp_path):
    """The first rows of MELD's transcripts, and nothing else."""
    folder = tmp_path / "transcripts"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        lines = (data / "meld" / f"{name}_sent_emo.csv").read_text(encoding="utf-8").splitlines()[:60]
        (folder / f"{name}_sent_emo.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_folder_given_comes_first_and_may_hold_meld_itself_or_in_a_folder(data, monkeypatch):
    monkeypatch.setenv("SPIKEMO_DATA", "/nowhere")
    for folder in (data, data / "meld"):
        corpus, source = locate_meld(folder)
        assert source.startswith("MELD in")
        assert corpus.about["text"] == "MiniLM sentence vectors, frozen"
    assert locate_meld(data, "finetuned", audio=False).corpus.about == {"text": "MiniLM sentence vectors, finetuned"}


def test_a_feature_store_is_recognised(tmp_path):
    save_corpus(synthetic_corpus(4), tmp_path / "store")
    corpus, source = locate_meld(tmp_path / "store")
    assert corpus.name == "synthetic"
    assert source == f"feature store {tmp_path / 'store'}"


def test_the_environment_comes_second(data, monkeypatch):
    monkeypatch.setenv("SPIKEMO_DATA", str(data))
    assert locate_meld().source == "MELD in $SPIKEMO_DATA"


def test_a_place_that_was_named_and_is_wrong_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"--data-dir is .*train_sent_emo\.csv"):
        locate_meld(tmp_path)
    monkeypatch.setenv("SPIKEMO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"\$SPIKEMO_DATA is .*leave it unset"):
        locate_meld()


def test_without_data_or_network_the_corpus_is_made_up_and_says_so(no_environment, tmp_path):
    corpus, source = locate_meld(cache_dir=tmp_path, url=NOWHERE)
    assert corpus.name == "synthetic"
    assert "NOT MELD results" in source
    assert list(tmp_path.iterdir()) == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_transcripts_are_downloaded_once_and_get_features(no_environment, transcripts, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=transcripts))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    corpus, source = locate_meld(text="ngrams", cache_dir=tmp_path / "cache", url=url)
    assert "downloaded to" in source
    assert corpus.about == {"text": "hashed n-grams, reduced on the training split"}
    assert sum(map(len, corpus.splits["train"])) == 59
    (transcripts / "dev_sent_emo.csv").unlink()
    again = locate_meld(text="ngrams", cache_dir=tmp_path / "cache", url=url)
    assert "in the user cache" in again.source
    assert torch.equal(again.corpus.splits["test"][0].features["text"], corpus.splits["test"][0].features["text"])
    broken = locate_meld(text="ngrams", cache_dir=tmp_path / "other", url=url)
    assert broken.corpus.name == "synthetic"
    assert list((tmp_path / "other").iterdir()) == []
    server.shutdown()


def test_ngrams_are_fitted_on_training_and_repeatable():
    texts = {
        "train": ["so happy today!", "what a sad day", "happy happy joy", "no, no, no", "sad and angry"],
        "valid": ["a sad day"],
        "test": ["unheard words entirely"],
    }
    features = ngram_features(texts, width=4)
    assert features["train"].shape == (5, 4)
    assert not features["test"].any()
    others = {**texts, "valid": ["something else"], "test": ["other"]}
    assert torch.equal(ngram_features(others, width=4)["train"], features["train"])
    similarity = torch.nn.functional.cosine_similarity(features["valid"], features["train"])
    assert similarity.argmax() == 1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT with random weights, as a local folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "a", "sad", "happy", "day", "!"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def test_an_encoder_gives_the_mean_over_an_utterances_own_tokens(encoder):
    long, short = "what a sad sad sad day !", "happy"
    together = encoder_features({"train": [long, short]}, encoder)["train"]
    alone = encoder_features({"train": [short]}, encoder)["train"]
    assert together.shape == (2, 16)
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])
    assert text_features({"train": [short]}, encoder).about == f"{encoder}, mean over tokens"


def test_an_encoder_that_was_named_and_cannot_load_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r'empty\' cannot be loaded .*choose "ngrams"'):
        text_features({"train": ["a"]}, str(tmp_path / "empty"))


def test_the_default_encoder_falls_back_and_says_so(caplog, monkeypatch):
    def missing(*args):
        raise OSError("no such model\nmore lines")

    monkeypatch.setattr("spikemo_model.data.text.encoder_features", missing)
    with caplog.at_level(logging.WARNING, "spikemo_model"):
        features = text_features({"train": ["a b", "c d", "e f"]})
    assert features.about == "hashed n-grams, reduced on the training split"
    assert "cannot be loaded (no such model); hashed n-grams instead" in caplog.text


def test_transcripts_alone_train_no_audio(no_environment, transcripts):
    corpus, _ = locate_meld(transcripts, "ngrams")
    assert list(corpus.about) == ["text"]
    shutil.rmtree(transcripts)
