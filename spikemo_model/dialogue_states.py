"""Global and party states of M cells of DialogueRNN along a dialogue, and their backward, written out."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikemo_model.recurrent import (
    candidate_first,
    first_derivative_only,
    for_products,
    gate_bias,
    gate_derivatives,
    gru_step,
    weight_gradient,
    without_autocast,
)  # fmt: skip


def dialogue_states(
    u: Float[Tensor, "M B L D"],
    speakers: Int[Tensor, "M B L"],
    mask: Bool[Tensor, "M B L"],
    state: Sequence[Tensor],
    cells: Sequence[Tensor],
    attention: Float[Tensor, "M D"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States of the speaker of each utterance [M, B, L, D], and where the dialogues stand after the last one.

    Equations as in `DialogueCell`. ``state``, and what is returned after the speakers' states, are p [M, B, P, D], with
    P above all ``speakers``; g and the context c [M, B, D]; and the logarithm of the sum of the exponentials of all
    scores [M, B, 1]. ``cells`` are weight_ih, weight_hh, bias_ih and bias_hh of 2 M torch.nn.GRUCells, GRU_p and GRU_g
    of each cell. No second derivative.

    A step takes what it starts from, p of the speaker, g and c, out of one tensor of all states, so that it is one
    operation, and so is the sum of their gradients. At padding the update gate of GRU_p is 1, which keeps the state.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = cells
    M, _, _, D = u.shape
    by_u, by_other = candidate_first(weight_ih).view(M, 2, 3 * D, 2 * D).split(D, 3)
    p_by_c, g_by_own = by_other.unbind(1)
    p_by_own, g_by_g = weight_hh.view(M, 2, 3 * D, D).unbind(1)
    weights = (p_by_c, torch.cat([p_by_own, g_by_own], 1), g_by_g, by_u.flatten(1, 2))
    bias = gate_bias(bias_ih, bias_hh).view(M, 8 * D)
    rows = _rows(speakers, state[0].shape[2])
    return _DialogueStates.apply(u, mask, *rows, *state, *map(for_products, weights), bias, attention)


def _rows(speakers: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Where states lie as rows of [M, B, P + L + 1, 3, D]: what each step starts from [L, M * B * 3], and the last p.

    The 3 are p, g and c. Slots up to P hold the parties' first states; slot P + t holds p and g after utterance t, and
    c before it.
    """
    M, B, L = speakers.shape
    party = torch.arange(P, device=speakers.device)
    t = P + torch.arange(L, device=speakers.device)
    stands = torch.where(speakers[..., None] == party, t[:, None], party).cummax(2).values  # [M, B, L, P]
    before = torch.cat([party.expand(M, B, 1, P), stands[:, :, :-1]], 2)
    own = before.gather(3, speakers[..., None]).squeeze(3)
    slots = torch.stack([own, (t - 1).expand_as(own), t.expand_as(own)], -1)
    first = torch.arange(M * B, device=speakers.device).view(M, B, 1) * (P + L + 1)
    starts = (first[..., None] + slots) * 3 + torch.arange(3, device=speakers.device)
    return starts.permute(2, 0, 1, 3).flatten(1), (first + stands[:, :, -1]).flatten() * 3


class _DialogueStates(torch.autograd.Function):
    """Gates of GRU_p and GRU_g lie side by side, so that the speaker's p, which both read, is multiplied once."""

    @staticmethod
    @without_autocast
    def forward(ctx, u, mask, starts, last, p, g, c, logsumexp, by_c, by_own, by_g, by_u, bias, attention):
        (M, B, L, D), P = u.shape, p.shape[2]
        u = u.to(by_u.dtype).flatten(1, 2)
        sums = bias.to(u.dtype)[:, None].expand(M, B * L, 8 * D).clone()
        for_p, for_g = by_u.mT.chunk(2, 2)
        sums[..., : 3 * D].baddbmm_(u, for_p)
        sums[..., 4 * D : 7 * D].baddbmm_(u, for_g)
        sums = sums.view(M, B, L, 8 * D)
        sums[..., 2 * D : 3 * D].masked_fill_(~mask.unsqueeze(-1), torch.inf)
        gates = sums if sums.dtype == g.dtype else torch.empty_like(sums, dtype=g.dtype)

        states = g.new_empty(M, B, P + L + 1, 3, D)
        states[:, :, :P, 0], states[:, :, P - 1, 1], states[:, :, P, 2] = p, g, c
        flat = states.view(-1, D)
        scores = g.new_empty(L + 1, M, B, 2)  # of g_t, and of all before as one
        scores[0, ..., 1:] = logsumexp
        shares = torch.empty_like(scores[1:])
        for t in range(L):
            start = flat.index_select(0, starts[t]).view(M, B, 3, D)
            own, before, context = start.to(u.dtype).unbind(2)
            here = sums[:, :, t]
            here[..., D : 7 * D].baddbmm_(own, by_own.mT)
            here[..., 5 * D :].baddbmm_(before, by_g.mT)
            here[..., : 3 * D].baddbmm_(context, by_c.mT)
            if gates is not sums:
                gates[:, :, t] = here
            after, score = states[:, :, P + t], scores[t]
            gru_step(gates[:, :, t].view(M, B, 2, 4, D), start[:, :, :2], after[:, :, :2])
            torch.bmm(after[:, :, 1], attention.unsqueeze(-1), out=score[..., :1])
            torch.softmax(score, -1, out=shares[t])
            torch.logaddexp(score[..., 0], score[..., 1], out=scores[t + 1, ..., 1])
            torch.lerp(start[:, :, 2], after[:, :, 1], shares[t, ..., :1], out=states[:, :, P + t + 1, 2])
        ctx.save_for_backward(u, starts, last, by_c, by_own, by_g, by_u, attention, gates, states, shares)
        p = flat.index_select(0, last).view(M, B, P, D)
        spoken, g, c = states[:, :, P:-1, 0], states[:, :, -2, 1], states[:, :, -1, 2]
        # No views, which could not be changed in place; and backward reads the states.
        return spoken.clone(), p.clone(), g.clone(), c.clone(), scores[L, ..., 1:].clone()

    @staticmethod
    @without_autocast
    @first_derivative_only
    def backward(ctx, d_spoken, d_p, d_g, d_c, d_logsumexp):
        u, starts, last, by_c, by_own, by_g, by_u, attention, gates, states, shares = ctx.saved_tensors
        (M, B, L, D), P = d_spoken.shape, d_p.shape[2]
        rows = starts.view(L, M, B, 3).permute(1, 2, 0, 3).flatten()
        start = states.view(-1, D).index_select(0, rows).view(M, B, L, 3, D)
        g = states[:, :, P:-1, 1]
        g_above_c = g - start[..., 2, :]
        gates = gates.view(M, B, L, 2, 4, D)
        slopes = gate_derivatives(gates, start[..., :2, :])
        by_share = shares.prod(-1, keepdim=True)
        by_share = torch.cat([by_share, -by_share], -1)

        d_states = torch.zeros_like(states)
        flat = d_states.view(-1, D)
        flat.index_add_(0, last, d_p.flatten(0, 2))
        d_states[:, :, P:-1, 0] += d_spoken
        d_states[:, :, -2, 1] += d_g
        d_states[:, :, -1, 2] = d_c
        d_sums = torch.empty_like(gates, dtype=u.dtype).view(M, B, L, 8 * D)
        d_scores = torch.empty_like(shares)
        for t in reversed(range(L)):
            d_after, d_score, d_here = d_states[:, :, P + t], d_scores[t], d_sums[:, :, t]
            d_context = d_states[:, :, P + t + 1, 2]
            d_share = torch.bmm(g_above_c[:, :, t].flatten(0, 1).unsqueeze(1), d_context.flatten(0, 1).unsqueeze(2))
            torch.mul(by_share[t], d_share.view(M, B, 1), out=d_score).addcmul_(shares[t], d_logsumexp)
            d_logsumexp = d_score[..., 1:]
            d_after[:, :, 1:].addcmul_(shares[t].unsqueeze(-1), d_context.unsqueeze(2))
            d_after[:, :, 1].addcmul_(d_score[..., :1], attention.unsqueeze(1))
            torch.mul(slopes[:, :, t], d_after[:, :, :2, None], out=d_here.view(M, B, 2, 4, D))
            d_start = u.new_empty(M, B, 3, D)
            torch.bmm(d_here[..., D : 7 * D], by_own, out=d_start[:, :, 0])
            torch.bmm(d_here[..., 5 * D :], by_g, out=d_start[:, :, 1])
            torch.bmm(d_here[..., : 3 * D], by_c, out=d_start[:, :, 2])
            d_start = d_start.to(states.dtype)
            d_start[:, :, :2].addcmul_(gates[:, :, t, :, 2], d_after[:, :, :2])
            flat.index_add_(0, starts[t], d_start.view(-1, D))

        d_sums = d_sums.view(M, B * L, 8 * D)
        d_p_input, d_own, d_g_input, d_g_state = (
            d_sums[..., first * D : end * D] for first, end in ((0, 3), (1, 7), (4, 7), (5, 8))
        )
        own, before, context = start.to(u.dtype).view(M, B * L, 3, D).unbind(2)
        for_p, for_g = by_u.chunk(2, 1)
        wanted = ctx.needs_input_grad
        d_u = torch.bmm(d_p_input, for_p).baddbmm_(d_g_input, for_g).view(M, B, L, D) if wanted[0] else None
        d_weights = [
            weight_gradient(d_p_input, context) if wanted[8] else None,
            weight_gradient(d_own, own) if wanted[9] else None,
            weight_gradient(d_g_state, before) if wanted[10] else None,
            torch.cat([weight_gradient(d_p_input, u), weight_gradient(d_g_input, u)], 1) if wanted[11] else None,
            d_sums.sum(1, dtype=states.dtype),
            torch.bmm(d_scores[..., 0].permute(1, 2, 0).reshape(M, 1, B * L), g.reshape(M, B * L, D)).squeeze(1),
        ]
        d_state = [d_states[:, :, :P, 0], d_states[:, :, P - 1, 1], d_states[:, :, P, 2], d_logsumexp]
        return d_u, None, None, None, *d_state, *d_weights
