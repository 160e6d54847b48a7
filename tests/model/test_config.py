"""Configurations: presets as published, ranges checked, JSON there and back."""

import json
from dataclasses import replace

import pytest

from spikemo_model.config import (
    DSWAConfig,
    FusionConfig,
    LossConfig,
    ModalityConfig,
    SpikEmoConfig,
    TrainingConfig,
    compact,
    from_dict,
    iemocap,
    meld,
    to_dict,
)


def test_presets_are_the_published_ones():
    model, training = meld()
    assert {name: m.features for name, m in model.modalities.items()} == {"text": 768, "audio": 512, "visual": 1000}
    assert [m.context for m in model.modalities.values()] == ["none", "forward", "forward"]
    assert model.dswa == DSWAConfig(32, 2, 8, 4.0, 10.0, 1.0, 0.5, 0.125, "output")
    assert model.fusion == FusionConfig(6, 4, 1024, "features")
    assert (model.dim, len(model.classes), model.classifier_hidden) == (256, 7, 512)
    assert (training.batch_size, training.epochs, training.learning_rate, training.betas) == (64, 50, 1e-4, (0.9, 0.99))
    assert (training.weight_decay, training.lr_decay, training.lr_decay_epochs, training.optimizer) == (
        1e-5,
        0.95,
        10,
        "adam",
    )
    assert (training.loss.corr_weight, training.loss.dice_weight, training.loss.ce_weight) == (0.3, 1.0, 0.4)
    assert (training.loss.dice_alpha, training.loss.dice_gamma) == (1.5, 0.5)
    model, training = iemocap()
    assert [m.context for m in model.modalities.values()] == ["bidirectional"] * 3
    assert (len(model.classes), model.classifier_hidden, training.batch_size) == (6, 256, 32)
    assert (training.loss.corr_weight, training.loss.dice_weight, training.loss.ce_weight) == (0.4, 0.6, 1.0)


@pytest.mark.parametrize("preset", [meld(), iemocap(), compact({"text": 5, "visual": 7}, ("a", "b"))])
def test_json_there_and_back(preset):
    for config, cls in ((preset.model, SpikEmoConfig), (preset.training, TrainingConfig)):
        assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config
    without = replace(preset.model, dswa=None)
    assert from_dict(SpikEmoConfig, json.loads(json.dumps(to_dict(without)))) == without


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModalityConfig(0), "ModalityConfig: features must be at least 1, got 0"),
        (lambda: ModalityConfig(5, "both"), "context must be one of"),
        (lambda: DSWAConfig(time_steps=0), "time_steps must be at least 1"),
        (lambda: DSWAConfig(tau=1.0), "tau must be > 1"),
        (lambda: FusionConfig(layers=-1), "layers must be at least 0"),
        (lambda: FusionConfig(keys="all"), "keys must be"),
        (lambda: SpikEmoConfig({}), "modalities must name at least one"),
        (lambda: SpikEmoConfig({"text": ModalityConfig(5)}, classes=("a",)), "at least two"),
        (lambda: SpikEmoConfig({"text": ModalityConfig(5)}, classes=("a", "a")), "distinct"),
        (lambda: SpikEmoConfig({"text": ModalityConfig(5)}, dim=250), "dim must be a multiple of fusion.num_heads = 4"),
        (lambda: SpikEmoConfig({"text": ModalityConfig(5)}, dim=252), "dim must be a multiple of dswa.num_heads = 8"),
        (lambda: SpikEmoConfig({"text": ModalityConfig(5)}, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (
            lambda: SpikEmoConfig({"text": ModalityConfig(5)}, dswa=None, published_behaviour=True),
            "needs a DSWA shared",
        ),
        (lambda: LossConfig(0.0, 0.0, 0.0), "one of them > 0"),
        (lambda: LossConfig(dice_gamma=0.0), "dice_gamma must be > 0"),
        (lambda: LossConfig(contrastive_temperature=0.0), "contrastive_temperature must be > 0"),
        (lambda: LossConfig(contrastive_focus=0.5), "contrastive_focus must be at least 1"),
        (lambda: TrainingConfig(epochs=0), "epochs must be at least 1"),
        (lambda: TrainingConfig(optimizer="sgd"), "optimizer must be one of"),
        (lambda: TrainingConfig(ema_decay=1.0), "ema_decay must be in"),
        (lambda: from_dict(TrainingConfig, {"epoch": 3}), r"TrainingConfig: unknown keys \['epoch'\]"),
        (lambda: from_dict(SpikEmoConfig, {}), "SpikEmoConfig: .*modalities"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
