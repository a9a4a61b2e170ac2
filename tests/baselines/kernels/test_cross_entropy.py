"""The cross-entropy that overwrites its logits, against torch's own."""

import pytest
import torch
from torch.nn import functional

from baselines.kernels.cross_entropy import LARGE, LogitsInPlace

V = 3001
"""Words, so that the table is cut into parts of uneven size."""
N = LARGE // V + 5


def inputs(scale=1.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(N, 8)).requires_grad_()
    weight = torch.randn(V, 8)
    labels = torch.randint(V, (N,))
    labels[::7] = -100
    return hidden, weight, labels


def losses(hidden, weight, labels):
    logits = functional.linear(hidden[None], weight)
    return functional.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="none")


def in_place(actual):
    return "_InPlace" in type(actual.grad_fn).__name__


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_losses_and_gradients_are_those_of_torch(scale):
    hidden, weight, labels = inputs(scale)
    upstream = torch.rand(N)
    expected = losses(hidden, weight, labels)
    (wanted,) = torch.autograd.grad(expected, hidden, upstream)
    with LogitsInPlace():
        actual = losses(hidden, weight, labels)
        (ours,) = torch.autograd.grad(actual, hidden, upstream)
    assert in_place(actual)
    assert not actual[::7].any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_logits_in_bfloat16_are_widened_before():
    hidden, weight, labels = inputs()
    half = hidden.detach().bfloat16().requires_grad_()
    expected = losses(half, weight.bfloat16(), labels)
    (wanted,) = torch.autograd.grad(expected.sum(), half)
    with LogitsInPlace():
        actual = losses(half, weight.bfloat16(), labels)
        (ours,) = torch.autograd.grad(actual.sum(), half)
    assert in_place(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", [torch.tanh, torch.softmax])
def test_logits_that_are_needed_to_go_back_are_left(change):
    hidden, weight, labels = inputs()

    def changed():
        logits = functional.linear(hidden, weight)
        logits = change(logits) if change is torch.tanh else change(logits, dim=1)
        return functional.cross_entropy(logits, labels, reduction="none")

    (wanted,) = torch.autograd.grad(changed().sum(), hidden)
    with LogitsInPlace():
        actual = changed()
        (ours,) = torch.autograd.grad(actual.sum(), hidden)
    assert not in_place(actual)
    assert torch.equal(ours, wanted)


def test_who_keeps_the_logits_is_told():
    hidden, weight, labels = inputs()
    logits = functional.linear(hidden, weight)
    squared = logits.square().sum()
    with LogitsInPlace():
        total = functional.cross_entropy(logits, labels, reduction="none").sum() + squared
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_going_back_twice_is_refused():
    hidden, weight, labels = inputs()
    with LogitsInPlace():
        total = losses(hidden, weight, labels).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.1}], ids=["mean", "sum", "smooth"]
)
def test_what_else_cross_entropy_can_do_is_left_to_torch(options):
    hidden, weight, labels = inputs()
    expected = functional.cross_entropy(functional.linear(hidden, weight), labels, **options)
    with LogitsInPlace():
        actual = functional.cross_entropy(functional.linear(hidden, weight), labels, **options)
    assert torch.equal(actual, expected)


def test_small_tables_and_those_without_gradients_are_left():
    hidden, weight, labels = inputs()
    few = 4
    with LogitsInPlace():
        assert not in_place(losses(hidden[:few], weight, labels[:few]))
        with torch.no_grad():
            logits = functional.linear(hidden, weight)
            copy_before = logits.clone()
            functional.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(logits, copy_before)


def test_labels_out_of_range_are_refused():
    hidden, weight, labels = inputs()
    labels[1] = V
    with LogitsInPlace(), pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
        losses(hidden, weight, labels)
