"""Products whose weight gradient is taken once give the gradients that autograd takes at every step."""

import pytest
import torch

from spikemo_model.context import DialogueCell, DialogueRNN
from spikemo_model.recurrent import RepeatedProduct

D = 8


def chain(weight, x, product):
    """A recurrence of four steps."""
    state = x
    for _ in range(4):
        state = torch.tanh(product(state) + x)
    return state.square().sum()


def both(weight, x):
    """The loss with `RepeatedProduct`, and with plain products."""
    return chain(weight, x, RepeatedProduct(weight, 5, x.shape[1])), chain(weight, x, lambda s: s @ weight)


def leaves():
    return (
        torch.randn(2, D, D, dtype=torch.float64).requires_grad_(),
        torch.randn(2, 3, D, dtype=torch.float64).requires_grad_(),
    )


def test_gradients_are_those_of_plain_products_in_any_order_of_asking():
    weight, x = leaves()
    ours, plain = both(weight, x)
    wanted = torch.autograd.grad(plain, (weight, x))
    torch.testing.assert_close(torch.autograd.grad(ours, x, retain_graph=True)[0], wanted[1])
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(ours, weight, retain_graph=True)[0], wanted[0])
    torch.testing.assert_close(torch.autograd.grad(ours, (weight, x)), wanted)


def test_a_changed_weight_is_noticed():
    weight = torch.ones(1, 3, 2, requires_grad=True)
    x = torch.ones(1, 1, 3, requires_grad=True)
    out = RepeatedProduct(weight, 1, 1)(x)
    with torch.no_grad():
        weight.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_there_is_no_second_derivative():
    weight, x = leaves()
    (grad,) = torch.autograd.grad(both(weight, x)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


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


def test_dialogue_cell_passes_gradcheck():
    cell = DialogueCell(3).double()
    u = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    speakers, mask = torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4).bool()
    assert torch.autograd.gradcheck(lambda u, *_: cell(u, speakers, mask), (u, *cell.parameters()))
