"""The modality level (paper, III-A1): a projection and the context of the dialogue."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spikemo_model.config import Context, ModalityConfig


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

        No party speaks at padding (``mask`` False).
        """
        B, L, D = u.shape
        parties = int(speakers.max()) + 1
        speaking = nn.functional.one_hot(speakers, parties).bool().unsqueeze(-1)  # [B, L, P, 1]
        g, e, context = (u.new_zeros(B, D) for _ in range(3))
        p = u.new_zeros(B, parties, D)
        weighted, total = u.new_zeros(B, D), u.new_zeros(B, 1)
        highest = u.new_full((B, 1), -torch.inf)
        states = []
        for t in range(L):
            own = p.gather(1, speakers[:, t, None, None].expand(B, 1, D)).squeeze(1)
            g = self.g_cell(torch.cat([u[:, t], own], dim=-1), g)
            spoken = self.p_cell(torch.cat([u[:, t], context], dim=-1), own)
            own = torch.where(mask[:, t, None], spoken, own)
            p = torch.where(speaking[:, t], own.unsqueeze(1), p)
            e = self.e_cell(own, e)
            states.append(e)
            score = self.attention(g)
            above = torch.maximum(highest, score)
            fade, weight = torch.exp(highest - above), torch.exp(score - above)
            weighted, total, highest = weighted * fade + weight * g, total * fade + weight, above
            context = weighted / total
        return torch.stack(states, dim=1)


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
        e = self.forward_cell(u, speakers, mask)
        if self.reverse_cell is not None and self.merge is not None:
            order = reversed_order(mask)  # its own inverse
            wide = order.unsqueeze(-1).expand_as(u)
            reverse = self.reverse_cell(u.gather(1, wide), speakers.gather(1, order), mask).gather(1, wide)
            e = self.merge(torch.cat([e, reverse * mask.unsqueeze(-1)], dim=-1))
        return torch.relu(self.dropout(e))


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

    def forward(
        self, features: Float[Tensor, "B L F"], speakers: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """``features`` [B, L, F] to [B, L, D]."""
        u = self.dropout(self.projection(self.input_dropout(features)))
        return u if self.context is None else self.context(u, speakers, mask)
