"""A seeded corpus of made-up conversations, for tests and for machines without data."""

import torch
from torch import Tensor

from spikemo_model.config import MELD_EMOTIONS
from spikemo_model.data.corpus import Conversation, Corpus

# MELD's own share of each class in training.
_SHARES = (0.47, 0.12, 0.03, 0.07, 0.17, 0.03, 0.11)
# Length of a class centre in standard deviations of the noise: text tells most, the face least.
_SEPARATION = {"text": 2.0, "audio": 1.2, "visual": 0.8}
_WIDTHS = {"text": 64, "audio": 24, "visual": 32}
# Chance that a turn keeps the emotion of the speaker's own last turn, and else of the turn before.
_INERTIA, _CONTAGION = 0.35, 0.2
# Chance that the next turn is the same speaker's.
_HOLD = 0.2


def synthetic_corpus(dialogues: int = 200, seed: int = 0) -> Corpus:
    """Make a corpus of conversations whose emotions can be learned, and never quite.

    Classes are as unbalanced as MELD's; a speaker tends to keep an emotion, and an emotion to carry over to the next
    turn; text separates the classes better than audio, audio better than visual.

    Args:
        dialogues: Dialogues of the training split; validation and test have a quarter of it each, at least one.
        seed: Of everything.

    Returns:
        A corpus with the modalities "text" (64), "audio" (24) and "visual" (32).
    """
    generator = torch.Generator().manual_seed(seed)
    centres = {
        name: torch.randn(len(MELD_EMOTIONS), width, generator=generator) * (_SEPARATION[name] / width**0.5)
        for name, width in _WIDTHS.items()
    }
    held_out = max(1, dialogues // 4)
    splits = {
        split: tuple(_conversation(f"{split}{i}", centres, generator) for i in range(count))
        for split, count in (("train", dialogues), ("valid", held_out), ("test", held_out))
    }
    about = {name: f"synthetic, {width}-d" for name, width in _WIDTHS.items()}
    return Corpus("synthetic", MELD_EMOTIONS, splits, about, ("Made-up conversations: not MELD results.",))


def _conversation(name: str, centres: dict[str, Tensor], generator: torch.Generator) -> Conversation:
    """One dialogue of 1 to 20 utterances by 2 to 5 speakers."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    L, parties = 1 + draw(20), 2 + draw(4)
    shares = torch.tensor(_SHARES)
    speakers: list[int] = []
    labels: list[int] = []
    for t in range(L):
        speakers.append(speakers[-1] if t and chance() < _HOLD else draw(parties))
        own = [labels[j] for j in range(t) if speakers[j] == speakers[t]]
        if own and chance() < _INERTIA:
            labels.append(own[-1])
        elif t and chance() < _CONTAGION:
            labels.append(labels[-1])
        else:
            labels.append(int(torch.multinomial(shares, 1, generator=generator)))
    y = torch.tensor(labels)
    features = {m: centre[y] + torch.randn(L, centre.shape[1], generator=generator) for m, centre in centres.items()}
    return Conversation(
        id=name,
        features=features,
        speakers=tuple(f"speaker {s}" for s in speakers),
        labels=y,
        utterance_ids=tuple(f"utt{t}" for t in range(L)),
    )
