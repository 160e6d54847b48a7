"""CUDA graphs without a GPU: what is captured, for which batches, and what comes back. tests/cuda has the rest."""

import logging
from dataclasses import replace

import pytest
import torch
from model_helpers import random_batch, small_config

from spikemo_model import SpikEmo
from spikemo_model.graphs import GraphedSpikEmo, rounded


@pytest.fixture
def captured(monkeypatch):
    """Stands in for PyTorch's capture, which needs a device: notes the shapes, and calls the function as it is."""
    shapes = []

    def make_graphed_callables(function, sample_args, *options, **keywords):
        shapes.append(tuple(sample_args[-1].shape))
        assert all(not x.requires_grad for x in sample_args)
        return function

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    return shapes


def assert_same_output(got, wanted):
    torch.testing.assert_close(got.logits, wanted.logits)
    assert list(got.fused) == list(wanted.fused)
    for name, x in wanted.fused.items():
        torch.testing.assert_close(got.fused[name], x)


def test_a_shape_is_captured_once_and_gives_what_the_model_gives(captured):
    model = SpikEmo(small_config()).double().eval()
    graphed = GraphedSpikEmo(model)
    for lengths in ((3, 5), (8, 7), (9, 2), (4, 1), (16, 2)):
        batch = random_batch(lengths)
        assert_same_output(graphed(batch), model(batch))
    assert captured == [(2, 8), (2, 16)]


def test_training_and_evaluation_and_fewer_modalities_are_captured_apart(captured):
    model = SpikEmo(small_config(dropout=0.0, modality_dropout=0.5)).double()
    graphed, batch = GraphedSpikEmo(model), random_batch((3, 5))
    some = replace(batch, features={name: batch.features[name] for name in ("visual", "text")})
    for _ in range(2):
        for model_is_training in (True, False):
            model.train(model_is_training)
            for own in (batch, some):
                assert_same_output(graphed(own), model(own))
                with torch.no_grad():
                    assert not graphed(own).logits.requires_grad
            assert model.training == model_is_training
    assert len(captured) == 8


def test_rounding_adds_padding_and_speakers_only():
    batch = random_batch((3, 5), dtype=torch.float32, parties=6)
    whole = rounded(batch)
    assert whole.mask.shape == (2, 8)
    assert whole.parties % 8 == 0
    assert whole.parties > batch.speakers.max()
    assert torch.equal(whole.mask[:, :5], batch.mask)
    assert not whole.mask[:, 5:].any()
    for name, x in batch.features.items():
        assert torch.equal(whole.features[name][:, :5], x)
    assert rounded(replace(batch, parties=7)).parties == 8


def test_a_capture_that_fails_says_so_once_and_runs_the_model(captured, monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    model = SpikEmo(small_config()).double().eval()
    graphed = GraphedSpikEmo(model)
    with caplog.at_level(logging.WARNING):
        for lengths in ((3, 5), (9, 2)):
            batch = random_batch(lengths)
            assert_same_output(graphed(batch), model(batch))
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graphs are not used, training is slower: operation not permitted when stream is capturing"
    ]


def test_frozen_parts_keep_their_mode_and_a_failure_keeps_no_graph(captured, monkeypatch):
    model = SpikEmo(small_config(dropout=0.0)).double().train()
    model.classifier.eval()
    graphed = GraphedSpikEmo(model)
    graphed(random_batch((3, 5)))
    assert model.training
    assert not model.classifier.training

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    graphed(random_batch((3, 12)))
    assert not graphed._graphs


def test_inference_mode_is_captured_apart(captured):
    model = SpikEmo(small_config()).double().eval()
    graphed, batch = GraphedSpikEmo(model), random_batch((3, 5))
    with torch.inference_mode():
        graphed(batch)
    with torch.no_grad():
        graphed(batch)
    assert len(captured) == 2
