"""Real photographs and recordings, a clip of them, and tiny encoders with random weights."""

from pathlib import Path

import pytest
import torch
from feature_helpers import LINES, scene, write_clip


@pytest.fixture(scope="session")
def photographs(data) -> list[Path]:
    return sorted((data / "faces").glob("*.jpg"))


@pytest.fixture(scope="session")
def recordings(data) -> list[Path]:
    return sorted((data / "audio").glob("*.wav"))


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> str:
    """A tiny RoBERTa with random weights and a byte-level tokenizer, windows of at most 64 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([line for _, line, _ in LINES], trainer)
    names = {"cls_token": "<s>", "bos_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
        initializer_range=0.1,
    )
    RobertaModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def face_encoder(tmp_path_factory) -> str:
    """A tiny ResNet with random weights."""
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory, recordings, photographs) -> Path:
    """A clip of 1.5 s of a real voice and a real face."""
    from spikemo_model.features.media import read_audio

    picture = scene((photographs[0], 90, 50, 140))
    path = tmp_path_factory.mktemp("clips") / "whole.mp4"
    return write_clip(path, [picture] * 3, fps=2, sound=read_audio(recordings[0])[:24_000])
