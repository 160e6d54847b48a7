"""Model directories: the same bits, whole or not there, and clear words for what cannot be loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from model_helpers import random_batch, small_config
from safetensors.torch import load_file, save_file

from spikemo_model import SpikEmo
from spikemo_model.hub import Origin


def a_model():
    """A small model that remembers where it comes from."""
    model = SpikEmo(small_config(dropout=0.1)).eval()
    model.origin = Origin(
        data="MELD",
        about={"text": "of an encoder", "audio": "prosody"},
        extractors={"text": {"name": "encoder_features", "encoder": "tiny"}},
        scores={"weighted F1": 61.234},
        standardised={
            "audio": (torch.randn(3), torch.tensor([0.1, 2.0, torch.inf])),
            "visual": (torch.randn(9), torch.rand(9)),
        },
        reduced={"visual": (torch.randn(9), torch.randn(9, 5))},
    )
    return model


@pytest.fixture
def saved(tmp_path):
    """A model directory and what is in it."""
    model = a_model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_comes_back_with_the_same_bits(tmp_path, dtype):
    model = a_model().to(dtype)
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = SpikEmo.from_pretrained(tmp_path / "new" / "model")
    assert not loaded.training
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].dtype == dtype and torch.equal(x, theirs[name]) for name, x in ours.items())
    assert all(p.requires_grad for p in loaded.parameters())
    batch = random_batch([4, 2], dtype=dtype)
    assert torch.equal(loaded(batch).logits, model(batch).logits)
    bare = {"standardised": {}, "reduced": {}}
    assert replace(loaded.origin, **bare) == replace(model.origin, **bare)
    assert loaded.origin.standardised.keys() == {"audio", "visual"}
    assert loaded.origin.reduced.keys() == {"visual"}
    for name, pair in model.origin.standardised.items():
        assert all(map(torch.equal, loaded.origin.standardised[name], pair))
    assert all(map(torch.equal, loaded.origin.reduced["visual"], model.origin.reduced["visual"]))


def test_a_model_that_knows_nothing_of_its_data_is_saved_too(tmp_path):
    model = SpikEmo(small_config(dswa=None))
    model.save_pretrained(tmp_path)
    loaded = SpikEmo.from_pretrained(str(tmp_path))
    assert loaded.origin == Origin()
    assert loaded.config.dswa is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_card_says_what_the_model_takes_and_scores(saved):
    folder, model = saved
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "spikeattn"
    assert "# SpikEmo on MELD" in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    assert f"Classes: {', '.join(model.config.classes)}." in card.text
    assert "| text | 6 | of an encoder | name = encoder_features, encoder = tiny | no |" in card.text
    assert "| audio | 3 | prosody | unknown | yes |" in card.text
    assert "| visual | 5 | unknown | unknown | yes |" in card.text
    assert "| weighted F1 | 61.23 |" in card.text


def test_the_code_of_the_card_runs(saved, capsys):
    folder, model = saved
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("this directory, or its name on the Hub", str(folder)), {})
    (row,) = eval(capsys.readouterr().out)
    assert list(row) == list(model.config.classes)
    assert sum(row.values()) == pytest.approx(1, abs=1e-5)


def test_saving_leaves_a_whole_directory_or_none(saved, tmp_path, monkeypatch):
    folder, model = saved
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model exists already\. Choose another"):
        SpikEmo(small_config()).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    write = Path.write_bytes

    def fails(self, content):
        if self.name == "config.json":
            raise OSError("disk full")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "second")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def edit_config(folder, **changes):
    """Replace entries of ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_from_before_there_were_reductions_is_loaded(tmp_path):
    model = a_model()
    model.origin = replace(model.origin, standardised={}, reduced={})
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({k: x for k, x in config.items() if k != "reduced"}))
    assert SpikEmo.from_pretrained(tmp_path / "model").origin == model.origin


def edit_weights(folder, name, change):
    """Replace or drop a tensor of ``model.safetensors``."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")


WEIGHT = "classifier.mlp.3.bias"
DAMAGE = {
    "no configuration": (lambda f: (f / "config.json").unlink(), r"holds no config\.json\. Name one"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"incomplete: it has no model\.safetensors"),
    "no constants": (lambda f: (f / "standardised.safetensors").unlink(), r"it has no standardised\.safetensors"),
    "a pickle instead": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"it has no model\.safetensors",
    ),
    "another version": (
        lambda f: edit_config(f, format="spikemo-model-2"),
        r"format 'spikemo-model-1', got 'spikemo-model-2'",
    ),
    "another project": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "got None"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json cannot be read"),
    "half a configuration": (lambda f: (f / "config.json").write_text('{"format": "spi'), "config.json cannot be read"),
    "no model": (lambda f: edit_config(f, model=None), r"config\.json does not fit this version"),
    "an unknown option": (
        lambda f: edit_config(f, model={"modalities": {"text": {"features": 6}}, "width": 3}),
        r"unknown keys \['width'\]",
    ),
    "another width": (
        lambda f: edit_config(
            f, model={"modalities": {"text": {"features": 6}}, "dim": 16}, standardised=[], reduced={}
        ),
        r"model\.safetensors does not fit config\.json: .* must have shape .*Take both from one model",
    ),
    "another reduction": (
        lambda f: edit_config(f, reduced={"visual": 8}),
        r"standardised\.safetensors does not fit config\.json: axes/visual must have shape \(8, 5\), got \(9, 5\)",
    ),
    "an unknown modality": (lambda f: edit_config(f, standardised=["smell"]), r"does not fit this version .*smell"),
    "a lost weight": (lambda f: edit_weights(f, WEIGHT, lambda x: None), rf"{WEIGHT} must have shape \(7,\), got None"),
    "a cut weight": (lambda f: edit_weights(f, WEIGHT, lambda x: x[:6]), r"must have shape \(7,\), got \(6,\)"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        r"model\.safetensors is damaged",
    ),
    "no longer weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_cannot_be_loaded_is_said_in_one_line(saved, case):
    folder, _ = saved
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        SpikEmo.from_pretrained(folder)
    assert str(caught.value).startswith("from_pretrained: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's local cache, on a machine without network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_loaded_from_the_cache_without_network(saved, cache):
    folder, model = saved
    repository = cache / "models--somebody--spikemo"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = SpikEmo.from_pretrained("somebody/spikemo")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("name", ["somebody/other", "/nowhere/at/all", "no such directory"])
def test_a_name_that_is_nowhere_is_an_error_that_says_so(cache, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is no directory, and cannot be had from the Hugging Face"):
        SpikEmo.from_pretrained(name)


def test_pushing_uploads_the_directory(saved, tmp_path, monkeypatch):
    folder, model = saved
    calls = []

    def upload(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        calls.append((repo_id, revision))
        return type("Commit", (), {"commit_url": "https://hub/commit"})()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert model.push_to_hub("somebody/spikemo", private=True, revision="draft") == "https://hub/commit"
    assert calls == [("somebody/spikemo", {"private": True, "exist_ok": True}), ("somebody/spikemo", "draft")]
    for path in folder.iterdir():
        assert (tmp_path / "uploaded" / path.name).read_bytes() == path.read_bytes()
