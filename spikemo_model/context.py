"""The modality level (paper, III-A1): a projection and the context of the dialogue."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spikemo_model.config import Context, ModalityConfig
from spikemo_model.dialogue_states import dialogue_states
from spikemo_model.recurrent import gru


class DialogueCell(nn.Module):
    """One direction of DialogueRNN: three GRU cells that advance utterance by utterance.

    For utterance u_t of speaker s, with g the global, p the parties' and e the emotion state::

        g_t = GRU_g([u_t; p_s], g_{t-1})
        c_t = sum over j < t of softmax_j(w . g_j) g_j           (0 for the first utterance)
        p_s = GRU_p([u_t; c_t], p_s)                             (other parties keep theirs)
        e_t = GRU_e(p_s, e_{t-1})

    Source: Majumder et al. 2019 (DialogueRNN, arXiv:1811.00405), "simple" attention, no listener state. The past
    global states enter c_t through a running softmax, so that a step costs the same at every t.

    Args:
        dim: Width D of the input and of all three states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g_cell = nn.GRUCell(2 * dim, dim)
        self.p_cell = nn.GRUCell(2 * dim, dim)
        self.e_cell = nn.GRUCell(dim, dim)
        self.attention = nn.Linear(dim, 1, bias=False)

    def forward(
        self, u: Float[Tensor, "B L D"], speakers: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Emotion states [B, L, D] of utterances ``u`` [B, L, D]; state t has seen utterances 1 ... t.

        No party speaks at padding (``mask`` False), whatever ``u`` holds there, NaN included.
        """
        return advance([self], u[None], speakers[None], mask[None])[0][0]


class DialogueState(NamedTuple):
    """Where M cells stand in B dialogues: states g and e [M, B, D] and p [M, B, parties, D], and the running softmax.

    That is the last context [M, B, D], and the logarithm of the sum of the exponentials of all scores [M, B, 1].
    """

    g: Tensor
    e: Tensor
    p: Tensor
    context: Tensor
    logsumexp: Tensor

    @classmethod
    def start(cls, u: Tensor, dtype: torch.dtype) -> "DialogueState":
        """Before the first utterance of ``u`` [M, B, L, D]."""
        M, B, _, D = u.shape
        g, e, context = (u.new_zeros(M, B, D, dtype=dtype) for _ in range(3))
        p, logsumexp = u.new_zeros(M, B, 0, D, dtype=dtype), u.new_full((M, B, 1), -torch.inf, dtype=dtype)
        return cls(g, e, p, context, logsumexp)


def advance(
    cells: Sequence[DialogueCell],
    u: Float[Tensor, "M B L D"],
    speakers: Int[Tensor, "M B L"],
    mask: Bool[Tensor, "M B L"],
    state: DialogueState | None = None,
    parties: int | None = None,
) -> tuple[Float[Tensor, "M B L D"], DialogueState]:
    """Emotion states of M cells, cell m on ``u[m]``, which all go from utterance to utterance together.

    Also returned is where they stand after the last one, from which another call with ``state`` goes on. ``parties`` is
    more than the largest index of a speaker; None looks it up. At padding ``u`` counts as 0.

    The emotion states, which nothing else depends on, follow the others.
    """
    u = u.masked_fill(~mask.unsqueeze(-1), 0.0)  # else NaN there would get into g, c and the gradients of weights
    dtype = torch.promote_types(u.dtype, cells[0].attention.weight.dtype)  # under autocast that of u alone is smaller
    g, e, p, context, logsumexp = DialogueState.start(u, dtype) if state is None else state
    parties = max(int(speakers.max()) + 1 if parties is None else parties, p.shape[2])
    p = nn.functional.pad(p, (0, 0, 0, parties - p.shape[2]))  # who has not spoken yet stands at 0

    def stacked(*names: str) -> list[Tensor]:
        parts = attrgetter("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        of_each = (parts(getattr(cell, name)) for cell in cells for name in names)
        return [torch.stack(part) for part in zip(*of_each, strict=True)]

    attention = torch.cat([cell.attention.weight for cell in cells])
    before = (p, g, context, logsumexp)
    spoken, *after = dialogue_states(u, speakers, mask, before, stacked("p_cell", "g_cell"), attention)
    p, g, context, logsumexp = after
    states = gru(spoken, e, *stacked("e_cell"))
    return states, DialogueState(g, states[:, :, -1].clone(), p, context, logsumexp)


class DialogueRNN(nn.Module):
    """Context of a dialogue: ``relu(dropout(e))``, or with both directions ``relu(dropout(Linear([e_f; e_r])))``.

    Args:
        dim: Width D of input, states and output.
        bidirectional: Whether a second cell reads each dialogue from its own last utterance to its first.
        dropout: Probability.
    """

    def __init__(self, dim: int, bidirectional: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.forward_cell = DialogueCell(dim)
        self.reverse_cell = DialogueCell(dim) if bidirectional else None
        self.merge = nn.Linear(2 * dim, dim) if bidirectional else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Float[Tensor, "B L D"], speakers: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Contextual features [B, L, D]; an utterance's depend on its own dialogue's utterances only."""
        return together([self], [u], speakers, mask)[0][0]


def together(
    contexts: Sequence[DialogueRNN],
    utterances: Sequence[Tensor],
    speakers: Tensor,
    mask: Tensor,
    state: DialogueState | None = None,
    parties: int | None = None,
) -> tuple[list[Tensor], DialogueState]:
    """What each of ``contexts`` makes of its ``utterances`` [B, L, D]; all directions of all advance at once.

    ``state`` is that of an earlier call with the utterances before, where all contexts read forward only; ``parties``
    as in `advance`.
    """
    order = reversed_order(mask)  # its own inverse
    wide = order.unsqueeze(-1).expand_as(utterances[0])
    cells, inputs, speaks = [], [], []
    for context, u in zip(contexts, utterances, strict=True):
        cells.append(context.forward_cell)
        inputs.append(u)
        speaks.append(speakers)
        if context.reverse_cell is not None:
            cells.append(context.reverse_cell)
            inputs.append(u.gather(1, wide))
            speaks.append(speakers.gather(1, order))
    masks = mask.expand(len(cells), *mask.shape)
    all_states, state = advance(cells, torch.stack(inputs), torch.stack(speaks), masks, state, parties)
    states, outs = iter(all_states), []
    for context in contexts:
        e = next(states)
        if context.merge is not None:
            reverse = next(states).gather(1, wide)
            e = context.merge(torch.cat([e, reverse * mask.unsqueeze(-1)], dim=-1))
        outs.append(torch.relu(context.dropout(e)))
    return outs, state


class GRUContext(nn.Module):
    """Context of a dialogue by two plain GRUs beside the utterance: ``r + dropout([GRU_f(r); GRU_r(r)])``, r = relu(u).

    Source: ours; the recurrence of bc-LSTM (Poria et al. 2017, ACL P17-1081) with GRUs and a residual. It knows no
    speakers, trains on less data than DialogueRNN, and costs one call for all utterances.

    Args:
        dim: Width D of input and output, even: each direction has half of it.
        dropout: Probability.
    """

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.forward_gru = nn.GRU(dim, dim // 2, batch_first=True)
        self.reverse_gru = nn.GRU(dim, dim // 2, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Float[Tensor, "B L D"], speakers: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Contextual features [B, L, D]; an utterance's depend on its own dialogue's utterances only."""
        u = torch.relu(u)
        order = reversed_order(mask).unsqueeze(-1)  # its own inverse
        ahead, _ = self.forward_gru(u)
        back, _ = self.reverse_gru(u.gather(1, order.expand_as(u)))
        context = torch.cat([ahead, back.gather(1, order.expand_as(back))], dim=-1)
        return u + self.dropout(context)


def reversed_order(mask: Tensor) -> Tensor:
    """Indices [B, L] that reverse each row's own utterances and leave its padding where it is."""
    L = mask.shape[1]
    position = torch.arange(L, device=mask.device).expand_as(mask)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - position, position)


class ModalityEncoder(nn.Module):
    """Features of one modality to the model's width, with the context of the dialogue.

    Args:
        config: Width of the features and directions of the context.
        dim: Width D of the output.
        dropout: Probability, after the projection and the context.
        input_dropout: Probability, of the features.
    """

    def __init__(self, config: ModalityConfig, dim: int, dropout: float = 0.0, input_dropout: float = 0.0) -> None:
        super().__init__()
        self.input_dropout = nn.Dropout(input_dropout)
        self.projection = nn.Linear(config.features, dim)
        self.dropout = nn.Dropout(dropout)
        context: Context = config.context
        self.context: DialogueRNN | GRUContext | None = None
        if context == "gru":
            self.context = GRUContext(dim, dropout)
        elif context != "none":
            self.context = DialogueRNN(dim, context == "bidirectional", dropout)

    def project(self, features: Float[Tensor, "B L F"]) -> Float[Tensor, "B L D"]:
        """``features`` at the width of the model."""
        return self.dropout(self.projection(self.input_dropout(features)))


class ModalityEncoders(nn.ModuleDict):
    """The `ModalityEncoder` of each modality, by name; those that are DialogueRNNs go through the dialogue together."""

    def forward(
        self,
        features: dict[str, Float[Tensor, "B L F"]],
        speakers: Int[Tensor, "B L"],
        mask: Bool[Tensor, "B L"],
        parties: int | None = None,
    ) -> dict[str, Float[Tensor, "B L D"]]:
        """``features`` [B, L, F] of every modality that there is to [B, L, D]; ``parties`` as in `DialogueBatch`."""
        return self.go_on(features, speakers, mask, None, parties)[0]

    def go_on(
        self,
        features: dict[str, Tensor],
        speakers: Tensor,
        mask: Tensor,
        state: DialogueState | None,
        parties: int | None = None,
    ) -> tuple[dict[str, Tensor], DialogueState | None]:
        """The same from ``state`` on, if the contexts read forward only, and the state after the last utterance."""
        encoders = {name: cast(ModalityEncoder, self[name]) for name in self if name in features}
        encoded = {name: encoder.project(features[name]) for name, encoder in encoders.items()}
        recurrent = {name: e.context for name, e in encoders.items() if isinstance(e.context, DialogueRNN)}
        if recurrent:
            inputs = [encoded[name] for name in recurrent]
            outs, state = together(list(recurrent.values()), inputs, speakers, mask, state, parties)
            encoded |= zip(recurrent, outs, strict=True)
        for name, encoder in encoders.items():
            if isinstance(encoder.context, GRUContext):
                encoded[name] = encoder.context(encoded[name], speakers, mask)
        return encoded, state
