"""Surrogates: derivative of their primitive, equality fires, and the same numbers as spikingjelly."""

import pytest
import torch
from cases import SMOOTH, SURROGATES, ids
from spikingjelly.activation_based import surrogate as theirs

from spikeattn import ATan, Rect, Sigmoid, Surrogate, lif, spike
from spikeattn.ops.surrogate import as_surrogate

GRID = torch.linspace(-3, 3, 1001, dtype=torch.float64)  # holds 0


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_derivative_is_that_of_the_primitive(surrogate):
    x = GRID[GRID.abs() != 0.5 / surrogate.alpha].clone().requires_grad_()  # not at the corners of Rect
    surrogate.primitive(x).sum().backward()
    torch.testing.assert_close(x.grad, surrogate.derivative(x.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", SMOOTH, ids=ids)
def test_primitive_passes_gradcheck(surrogate):
    x = (torch.randn(20, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(surrogate.primitive, (x,))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_primitive_rises_through_one_half_at_zero(surrogate):
    at_zero = surrogate.primitive(torch.zeros(1, dtype=torch.float64))
    assert at_zero.item() == pytest.approx(0.5, abs=1e-15)
    assert (surrogate.derivative(GRID) >= 0).all()


def test_step_fires_at_equality_and_not_for_nan():
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, float("nan")])
    assert spike(x, ATan()).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_gradient_is_the_derivative_times_the_gradient_of_the_spike(surrogate):
    x = GRID.clone().requires_grad_()
    weight = torch.randn_like(GRID)
    (spike(x, surrogate) * weight).sum().backward()
    assert torch.equal(x.grad, weight * surrogate.derivative(GRID))


@pytest.mark.parametrize("ours", SURROGATES, ids=ids)
def test_spikingjellys_surrogate_of_the_same_name_has_the_same_default_and_gradient(ours):
    other = getattr(theirs, type(ours).__name__)()
    assert as_surrogate(other) == ours
    a, b = GRID.clone().requires_grad_(), GRID.clone().requires_grad_()
    spike(a, ours).sum().backward()
    other(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_surrogates_without_a_counterpart_stay_what_they_are():
    smooth = theirs.Sigmoid(spiking=False)
    unknown = theirs.S2NN()
    assert as_surrogate(smooth) is smooth
    assert as_surrogate(unknown) is unknown
    with pytest.raises(TypeError, match="callable, got str"):
        as_surrogate("atan")


def test_values_that_are_no_sharpness_are_refused():
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="alpha must be positive"):
            Sigmoid(alpha)


def test_second_derivative_exists_where_the_derivative_is_smooth():
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(spike(x, ATan()), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    z = torch.pi * 0.3
    assert second.item() == pytest.approx(-2 * z * torch.pi / (1 + z * z) ** 2, rel=1e-12)


def test_rect_is_flat_inside_its_width():
    assert Rect(2.0).derivative(torch.tensor([-0.3, -0.2, 0.0, 0.2, 0.3])).tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("base", [Surrogate, ATan])
def test_a_class_of_ones_own_is_pointed_to_custom_surrogate(base):
    class Own(base):
        def derivative(self, x):
            return torch.ones_like(x)

    with pytest.raises(TypeError, match=r"got Own\. CustomSurrogate takes functions"):
        lif(torch.ones(2, 3), surrogate=Own(2.0))
