"""Checkpoints of the authors' code: the same numbers, and clear errors for others."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spikemo_model import DialogueBatch, SpikEmoConfig
from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS, DSWAConfig, FusionConfig, ModalityConfig
from spikemo_model.published import load_published_checkpoint

MODALITIES = ("text", "audio", "visual")


def published_config(fixtures, name):
    """Configuration of a fixture."""
    sizes = json.loads((fixtures / f"published_{name}.json").read_text())
    contexts = ("none", "forward", "forward") if name == "meld" else ("bidirectional",) * 3
    return SpikEmoConfig(
        {m: ModalityConfig(w, c) for m, w, c in zip(MODALITIES, sizes["widths"], contexts, strict=True)},
        classes=MELD_EMOTIONS if name == "meld" else IEMOCAP_EMOTIONS,
        dim=sizes["dim"],
        classifier_hidden=sizes["dim"] * (2 if name == "meld" else 1),
        dswa=DSWAConfig(
            time_steps=sizes["time_steps"], depth=sizes["depth"], num_heads=sizes["spiking_heads"],
            tau=sizes["tau"], v_threshold=sizes["v_threshold"], scale=sizes["scale"],
        ),
        fusion=FusionConfig(
            layers=sizes["multiattn_layers"], num_heads=sizes["multiattn_heads"], hidden=sizes["hidden"]
        ),
        published_behaviour=True,
    )  # fmt: skip


def published_batch(tensors):
    """The fixture's [L, B, ...] input as a batch."""
    return DialogueBatch(
        {m: tensors[f"input.{m}"].transpose(0, 1) for m in MODALITIES},
        tensors["input.speakers"].argmax(-1).T,
        tensors["input.utterance_mask"].bool(),
        tensors["input.labels"],
    )


@pytest.mark.parametrize("name", ["meld", "iemocap"])
def test_published_behaviour_reproduces_the_authors_numbers(fixtures, name):
    tensors = load_file(fixtures / f"published_{name}.tensors.safetensors")
    model = load_published_checkpoint(
        fixtures / f"published_{name}.checkpoint.safetensors", published_config(fixtures, name)
    )
    batch = published_batch(tensors)
    relevance = []
    model.dswa["shared"].norm.register_forward_hook(lambda module, args, out: relevance.append(out.mean(0)))
    with torch.no_grad():
        for _ in range(2):  # nothing is carried from one batch to the next
            relevance.clear()
            out = model(batch)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(out.logits[batch.mask], tensors["logits"], **close)
    for m, spikformer_out in zip(MODALITIES, relevance, strict=True):
        torch.testing.assert_close(out.fused[m][batch.mask], tensors[f"fused.{m}"], **close)
        torch.testing.assert_close(spikformer_out.transpose(0, 1), tensors[f"spikformer_out.{m}"], **close)


def test_the_same_weights_run_with_masks_and_a_centred_encoder(fixtures):
    config = replace(published_config(fixtures, "meld"), published_behaviour=False)
    path = fixtures / "published_meld.checkpoint.safetensors"
    model, published = (load_published_checkpoint(path, c) for c in (config, replace(config, published_behaviour=True)))
    batch = published_batch(load_file(fixtures / "published_meld.tensors.safetensors"))
    wider = {m: torch.nn.functional.pad(x, (0, 0, 0, 3)) for m, x in batch.features.items()}
    padded = DialogueBatch(
        wider, torch.nn.functional.pad(batch.speakers, (0, 3)), torch.nn.functional.pad(batch.mask, (0, 3))
    )
    with torch.no_grad():
        a, b = model(batch).logits[batch.mask], model(padded).logits[padded.mask]
        c, d = published(batch).logits[batch.mask], published(padded).logits[padded.mask]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (c - d).abs().max() > 1e-3  # in the authors' code padding changes predictions


def test_a_state_dict_and_a_torch_file_load_too(fixtures, tmp_path):
    config = published_config(fixtures, "meld")
    state = load_file(fixtures / "published_meld.checkpoint.safetensors")
    torch.save(state, tmp_path / "model.pt")
    from_dict, from_file = (
        load_published_checkpoint(state, config),
        load_published_checkpoint(tmp_path / "model.pt", config),
    )
    for a, b in zip(from_dict.parameters(), from_file.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_of_another_configuration_are_named(fixtures, tmp_path):
    config = published_config(fixtures, "meld")
    state = load_file(fixtures / "published_meld.checkpoint.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.safetensors"):
        load_published_checkpoint(tmp_path / "nowhere.safetensors", config)
    with pytest.raises(ValueError, match=r"lacks .*fusion\.stacks"):
        load_published_checkpoint(state, replace(config, fusion=replace(config.fusion, layers=3)))
    with pytest.raises(ValueError, match=r"has, beyond the configuration, .*blocks\.1"):
        load_published_checkpoint(state, replace(config, dswa=replace(config.dswa, depth=1)))
    modalities = {**config.modalities, "text": ModalityConfig(13, "none")}
    with pytest.raises(ValueError, match=r"text_fc\.weight \(32, 12\) instead of \(32, 13\)"):
        load_published_checkpoint(state, replace(config, modalities=modalities))
    with pytest.raises(ValueError, match="lacks"):
        load_published_checkpoint(load_file(fixtures / "published_meld.tensors.safetensors"), config)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, fixtures):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt cannot be read .*nothing is executed"):
        load_published_checkpoint(tmp_path / "bomb.pt", published_config(fixtures, "meld"))
    assert not (tmp_path / "ran").exists()
