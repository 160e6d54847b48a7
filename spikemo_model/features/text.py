"""Text features: utterances with their speakers, read in the context of their dialogue."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spikemo_model.data.corpus import Conversation, DataError
from spikemo_model.data.text import first_line, load_encoder

DEFAULT_ENCODER = "roberta-base"


class Window(NamedTuple):
    """What the encoder reads for one utterance.

    Args:
        ids: Token ids.
        own: [len(ids)] bool, True at the utterance's own tokens.
    """

    ids: Tensor
    own: Tensor


class ContextEncoder:
    """A Hugging Face encoder that reads each utterance in its dialogue.

    A window is ``[CLS] past [SEP] Speaker: utterance [SEP] future [SEP]``, as in EmoBERTa (Kim and Vossen 2021,
    arXiv:2108.12009). The utterance comes first, cut at the end if it is too long by itself; then whole neighbours
    are added, the nearest first, past and future in turn, until one on that side does not fit.

    The vector is the mean of the last hidden states at the utterance's own tokens. The first token, the other usual
    choice, is the same kind of summary only after fine-tuning: RoBERTa is not pretrained to put anything there.

    Args:
        encoder: A name on the hub or a local folder; nothing of its own code is run.
        max_tokens: Length of a window; None for the longest that the encoder takes.

    Raises:
        OSError: The encoder cannot be loaded; the message says what to download and where to put it.
        ValueError: ``max_tokens`` is less than 8 or more than the encoder takes.
    """

    def __init__(self, encoder: str = DEFAULT_ENCODER, max_tokens: int | None = None) -> None:
        try:
            self.tokenizer, self.model = load_encoder(encoder)
        except (ImportError, OSError, ValueError) as error:
            raise OSError(
                f"ContextEncoder: the encoder {encoder!r} cannot be loaded ({first_line(error)}). Install the extra "
                f'"features", download config.json, model.safetensors and the tokenizer\'s files of {DEFAULT_ENCODER} '
                "or another encoder, and give the folder that holds them."
            ) from error
        if None in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id):
            raise OSError(f"ContextEncoder: the tokenizer of {encoder!r} has no [CLS], [SEP] or padding token.")
        longest = _longest(self.tokenizer, self.model.config)
        self.max_tokens = longest if max_tokens is None else max_tokens
        if not 8 <= self.max_tokens <= longest:
            raise ValueError(f"ContextEncoder: max_tokens must be 8 ... {longest} for {encoder!r}, got {max_tokens}.")

    def windows(self, dialogue: Conversation) -> list[Window]:
        """One window for each utterance of a dialogue.

        Raises:
            DataError: The dialogue has no transcripts.
        """
        if not dialogue.texts:
            raise DataError(f"dialogue {dialogue.id} has no transcripts. Take a corpus that holds them.")
        lines = [f"{who}: {said}" for who, said in zip(dialogue.speakers, dialogue.texts, strict=True)]
        tokens = [self.tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"] for line in lines]
        return [self._window(tokens, i) for i in range(len(tokens))]

    def vectors(self, windows: Sequence[Window]) -> Tensor:
        """Mean of the last hidden states at the own tokens of each window, [len(windows), F]."""
        device = self.model.device
        ids = pad_sequence([w.ids for w in windows], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        own = pad_sequence([w.own for w in windows], batch_first=True)  # [B, tokens]
        real = torch.arange(ids.shape[1]) < torch.tensor([len(w.ids) for w in windows]).unsqueeze(1)
        hidden = self.model(input_ids=ids.to(device), attention_mask=real.long().to(device)).last_hidden_state
        weight = own.unsqueeze(-1).to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1)

    @torch.no_grad()
    def features(self, dialogue: Conversation, batch_size: int = 16) -> Tensor:
        """Vectors [L, F] float32 of a dialogue's utterances, ``batch_size`` windows at once."""
        windows = self.windows(dialogue)
        batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        return torch.cat([self.vectors(batch).float().cpu() for batch in batches])

    def _window(self, tokens: list[list[int]], i: int) -> Window:
        """The window of utterance ``i`` of a dialogue of ``tokens``."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        own = tokens[i][: self.max_tokens - 4]
        room = self.max_tokens - 4 - len(own)
        past: list[int] = []
        future: list[int] = []
        past_open = future_open = True
        for before, after in zip_longest(reversed(tokens[:i]), tokens[i + 1 :]):
            past_open = past_open and before is not None and len(before) <= room
            if past_open:
                past, room = before + past, room - len(before)
            future_open = future_open and after is not None and len(after) <= room
            if future_open:
                future, room = future + after, room - len(after)
        ids = torch.tensor([cls, *past, sep, *own, sep, *future, sep])
        position = torch.arange(len(ids)) - len(past) - 2
        return Window(ids, (position >= 0) & (position < len(own)))


def _longest(tokenizer: Any, config: Any) -> int:
    """Longest window in tokens; RoBERTa's positions start after that of padding."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    return min(tokenizer.model_max_length, positions - tokenizer.pad_token_id - 1)
