"""Recurrences whose backward is written out give the states and gradients of their equations, step by step."""

from typing import NamedTuple

import pytest
import torch
from spikingjelly.activation_based import op_counter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikeattn.interop.spikingjelly import add_rules
from spikemo_model.context import DialogueCell, DialogueRNN, advance
from spikemo_model.dialogue_states import dialogue_states
from spikemo_model.recurrent import gru

D = 8
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Case(NamedTuple):
    """Cells, and dialogues of unequal lengths for them."""

    cells: list[DialogueCell]
    u: Tensor
    speakers: Tensor
    mask: Tensor

    @property
    def leaves(self):
        return [self.u, *(p for cell in self.cells for p in cell.parameters())]


def case(dtype=torch.float64, M=2, lengths=(7, 3, 1), speakers=3):
    B, L = len(lengths), max(lengths)
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).expand(M, B, L)
    u = torch.randn(M, B, L, D, dtype=dtype, requires_grad=True)
    return Case([DialogueCell(D).to(dtype) for _ in range(M)], u, torch.randint(0, speakers, (M, B, L)), mask)


def definition(cell, u, speakers, mask, parties):
    """Emotion states [L, D] of one dialogue with its padding; in the end g, p, the context and the scores' logsumexp.

    Utterance by utterance, with a softmax over all global states so far; ``u`` counts as 0 at padding.
    """
    u = torch.where(mask[:, None], u, 0.0)
    g, e, context, scores, past, states = *(u.new_zeros(3, D).unbind()), [], [], []
    p = [u.new_zeros(D)] * parties
    for u_t, s, here in zip(u, speakers.tolist(), mask.tolist(), strict=True):
        g_after = cell.g_cell(torch.cat([u_t, p[s]]), g)
        if here:
            p[s] = cell.p_cell(torch.cat([u_t, context]), p[s])
        g = g_after
        e = cell.e_cell(p[s], e)
        past.append(g)
        scores.append(cell.attention(g))
        context = torch.softmax(torch.cat(scores), 0) @ torch.stack(past)
        states.append(e)
    return torch.stack(states), g, torch.stack(p), context, torch.logsumexp(torch.cat(scores), 0, keepdim=True)


def wanted(cells, u, speakers, mask):
    """`definition` of every dialogue, [M, B, ...]."""
    parties = int(speakers.max()) + 1
    rows = [
        [definition(cell, *of_one, parties) for of_one in zip(*of_cell, strict=True)]
        for cell, *of_cell in zip(cells, u, speakers, mask, strict=True)
    ]
    return [torch.stack([torch.stack([of_one[i] for of_one in row]) for row in rows]) for i in range(5)]


def in_pieces(cells, u, speakers, mask, cuts):
    """`advance` piece by piece; as `wanted`."""
    states, state, start = [], None, 0
    for end in (*cuts, u.shape[2]):
        piece = slice(start, end)
        more, state = advance(cells, u[:, :, piece], speakers[:, :, piece], mask[:, :, piece], state)
        states.append(more)
        start = end
    return [torch.cat(states, 2), state.g, state.p, state.context, state.logsumexp]


def weighted(parts):
    """A loss to which every element of ``parts`` counts differently."""
    generator = torch.Generator().manual_seed(0)
    return sum((part.double() * torch.randn(part.shape, generator=generator)).sum() for part in parts)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5, 6), (4,)])
def test_states_and_gradients_are_those_of_the_definition_in_any_pieces(cuts):
    dialogues = case()
    got, expected = in_pieces(*dialogues, cuts), wanted(*dialogues)
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, **EXACT)
    grads = (torch.autograd.grad(weighted(parts), dialogues.leaves) for parts in (got, expected))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, **EXACT)


def test_one_gru_is_pytorchs():
    cell, x = torch.nn.GRU(5, D, batch_first=True).double(), torch.randn(1, 3, 6, 5, dtype=torch.float64)
    state = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    leaves = [state, *cell.parameters()]
    ours = gru(x, state, *(weight[None] for weight in cell.parameters()))[0]
    plain = cell(x[0], state)[0]
    torch.testing.assert_close(ours, plain, **EXACT)
    grads = (torch.autograd.grad(weighted([parts]), leaves) for parts in (ours, plain))
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, **EXACT)


def random_weights(M, E, D):
    """weight_ih, weight_hh, bias_ih and bias_hh of M GRU cells."""
    shapes = ((M, 3 * D, E), (M, 3 * D, D), (M, 3 * D), (M, 3 * D))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_a_gru_passes_gradcheck():
    assert torch.autograd.gradcheck(gru, (*random_leaves((2, 1, 3, 2), (2, 1, 3)), *random_weights(2, 2, 3)))


def test_dialogue_states_pass_gradcheck_by_all_that_they_depend_on():
    M, B, L, P, E = 2, 2, 3, 2, 2
    speakers, mask = torch.randint(0, P, (M, B, L)), torch.tensor([[True, True, True], [True, False, False]])

    def states(u, p, g, c, logsumexp, attention, *weights):
        state = (p, g, c, logsumexp)
        return dialogue_states(u, speakers, mask.expand(M, B, L), state, weights, attention)

    leaves = random_leaves((M, B, L, E), (M, B, P, E), (M, B, E), (M, B, E), (M, B, 1), (M, E))
    assert torch.autograd.gradcheck(states, (*leaves, *random_weights(2 * M, 2 * E, E)))


def test_large_scores_give_finite_gradients():
    dialogues = case()
    with torch.no_grad():
        for cell in dialogues.cells:
            cell.attention.weight.mul_(1e5)
    grads = [torch.autograd.grad(weighted(f(*dialogues)[:4]), dialogues.leaves) for f in (wanted, in_one)]
    for ours, plain in zip(*reversed(grads), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)


def in_one(*dialogues):
    return in_pieces(*dialogues, ())


def test_padding_keeps_the_parties_to_the_bit():
    for low in (False, True):
        dialogues = case(torch.float32, lengths=(9, 9))
        mask = dialogues.mask.clone()
        mask[:, :, 4:] = False
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            _, before = advance(dialogues.cells, dialogues.u[:, :, :4], dialogues.speakers[:, :, :4], mask[:, :, :4])
            _, after = advance(
                dialogues.cells, dialogues.u[:, :, 4:], dialogues.speakers[:, :, 4:], mask[:, :, 4:], before
            )
        parties = before.p.shape[2]
        assert torch.equal(after.p[:, :, :parties], before.p)
        assert not after.p[:, :, parties:].any()
        assert not torch.equal(after.g, before.g)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("anything", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_padding_may_hold_any_number(anything, low):
    cells, u, speakers, mask = case(torch.float32, lengths=(7, 3, 0))
    u.data[~mask] = 0.0
    leaves = [u, *(p for cell in cells for p in cell.parameters())]
    got = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            parts = in_one(cells, u, speakers, mask)
        got.append([*parts, *torch.autograd.grad(weighted(parts), leaves)])
        u.data[~mask] = anything
    for ours, plain in zip(*got, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, plain)
    assert not got[1][5][~mask].any()


def test_memory_is_written_before_it_is_read(poisoned):
    dialogues = case()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(weighted(in_one(*dialogues)), dialogues.leaves))


@pytest.mark.parametrize("within", [False, True])
def test_autocast_multiplies_in_bfloat16_and_keeps_states_in_float32(within):
    dialogues = case(torch.float32, lengths=(20, 6))
    cells, u, speakers, mask = dialogues
    with torch.autocast("cpu", torch.bfloat16):
        low = in_one(cells, u.bfloat16(), speakers, mask)
        if within:  # a backward pass that is under autocast, too, has the same types
            got = torch.autograd.grad(weighted(low), dialogues.leaves)
    if not within:
        got = torch.autograd.grad(weighted(low), dialogues.leaves)
    full = in_one(*dialogues)
    assert all(part.dtype == torch.float32 for part in low)
    for ours, plain in zip(low, full, strict=True):
        assert not torch.equal(ours, plain)
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.02)
    for ours, plain in zip(got, torch.autograd.grad(weighted(full), dialogues.leaves), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() < 0.03 * plain.norm()


def test_what_needs_no_gradient_changes_no_other():
    dialogues = case()
    names = [name for name, _ in dialogues.cells[0].named_parameters()]
    expected = torch.autograd.grad(weighted(in_one(*dialogues)), dialogues.leaves)
    for frozen in ("u", *names):
        for leaf, name in zip(dialogues.leaves, ["u", *names * 2], strict=True):
            leaf.requires_grad_(name != frozen)
        left = [i for i, leaf in enumerate(dialogues.leaves) if leaf.requires_grad]
        grads = torch.autograd.grad(weighted(in_one(*dialogues)), [dialogues.leaves[i] for i in left])
        for i, grad in zip(left, grads, strict=True):
            torch.testing.assert_close(grad, expected[i], **EXACT)


def test_a_changed_weight_is_noticed():
    weights = random_weights(1, D, D)
    out = gru(*random_leaves((1, 2, 3, D), (1, 2, D)), *weights)
    with torch.no_grad():
        weights[1].mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_returned_may_be_changed_in_place():
    for frozen in (False, True):
        dialogues = case()
        for leaf in dialogues.leaves:
            leaf.requires_grad_(not frozen)
        expected = weighted([2 * part for part in in_one(*dialogues)])
        states, state = advance(*dialogues)
        state.e.zero_()  # which leaves the states
        got = weighted([part.mul_(2) for part in (states, state.g, state.p, state.context, state.logsumexp)])
        torch.testing.assert_close(got, expected, **EXACT)
        if not frozen:
            grads = (torch.autograd.grad(loss, dialogues.leaves) for loss in (got, expected))
            for ours, plain in zip(*grads, strict=True):
                torch.testing.assert_close(ours, plain, **EXACT)
        cell, *one = dialogues.cells[0], *(part[0] for part in dialogues[1:])
        assert torch.equal(cell(*one).neg_(), -cell(*one))


@pytest.mark.parametrize("part", range(5))
def test_there_is_no_second_derivative(part):
    """Also of a linear loss, whose gradient needs none."""
    dialogues = case()
    loss = in_one(*dialogues)[part].sum()
    with pytest.raises(RuntimeError, match="no second derivative; call backward without create_graph=True"):
        torch.autograd.grad(loss, dialogues.u, create_graph=True, retain_graph=True)
    assert torch.autograd.grad(loss, dialogues.u)[0].isfinite().all()


def test_a_gru_alone_has_no_second_derivative():
    x, state = random_leaves((1, 2, 3, D), (1, 2, D))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gru(x, state, *random_weights(1, D, D)).sum(), x, create_graph=True)


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fresh = not any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        self.count += fresh and "empty" not in func._schema.name
        return func(*args, **(kwargs or {}))


def test_energy_counts_every_product_of_the_cells():
    profiler = add_rules(op_counter.SimpleEnergyProfiler())
    cells, u, speakers, mask = case(torch.float32)
    profiler.bind_model(torch.nn.ModuleList(cells))
    _, state = advance(cells, u, speakers, mask)  # whose products with states of 0 would count as nothing
    with profiler:
        advance(cells, u, speakers, mask, state)
    assert profiler.mac_counter.get_total() == u[..., 0].numel() * (24 * D**2 + D)


@pytest.mark.parametrize(("low", "most"), [(False, 34), (True, 42)])
def test_an_utterance_costs_a_few_dozen_operations(low, most):
    """Forward and backward; a GPU takes microseconds for each, however small. Step by step by autograd it is 180."""
    counts = []
    for L in (4, 5):
        cells, u, speakers, mask = case(torch.float32, lengths=(L, 2))
        with Operations() as operations:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                states, _ = advance(cells, u, speakers, mask, parties=3)
            states.sum().backward()
        counts.append(operations.count)
    assert 0 < counts[1] - counts[0] <= most


def test_dialogue_rnn_takes_parametrised_cells_and_gradients_part_by_part():
    rnn = DialogueRNN(D, bidirectional=True).double()
    torch.nn.utils.parametrizations.weight_norm(rnn.forward_cell.g_cell, "weight_hh")
    u = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    speakers, mask = torch.randint(0, 2, (2, 5)), torch.ones(2, 5).bool()
    loss = rnn(u, speakers, mask).square().sum()
    parameters = list(rnn.parameters())
    together = torch.autograd.grad(loss, [u, *parameters], retain_graph=True)
    for tensor, wanted in zip([u, *parameters], together, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, tensor, retain_graph=True)[0], wanted)
