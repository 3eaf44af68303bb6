"""The floor of a training step: that every matrix product and attention of a call is noted, and done again."""

import torch
from torch import nn

from benchmarks.bare_products import ATTENTION, ATTENTION_BACKWARD, BareProducts, Form
from sdft_kernels import fused_linear_divergence
from tests.cases import random_case


def flops(products: BareProducts) -> int:
    """Of the noted matrix products."""
    total = 0
    for (func, arguments, _), times in products.calls.items():
        if func not in (ATTENTION, ATTENTION_BACKWARD):
            left, right = [value for value in arguments if isinstance(value, Form)][-2:]
            total += times * 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
    return total


def test_a_layer_makes_three_products() -> None:
    layer, inputs = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    with BareProducts() as products:
        layer(inputs).sum().backward()
    assert sum(products.calls.values()) == 3 and flops(products) == 3 * 2 * 3 * 5 * 7
    assert products.seconds() > 0


def test_the_loss_makes_four_products_inside_its_operator() -> None:
    case = random_case(32, 48, 40, 1008)  # whole vectors of tokens, so that nothing is padded
    student = [case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()]
    with BareProducts() as products:
        fused_linear_divergence(*student, case.teacher_hidden, case.teacher_weight).loss.backward()
    assert flops(products) == 2 * 32 * 1008 * (3 * 48 + 40)
    assert products.seconds() > 0


def test_attention_is_noted_both_ways() -> None:
    queries, keys, values = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    with BareProducts() as products:
        nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True).sum().backward()
    assert {func: times for (func, _, _), times in products.calls.items()} == {ATTENTION: 1, ATTENTION_BACKWARD: 1}
    assert products.seconds() > 0


def test_every_call_is_done_again_as_often() -> None:
    left, right = torch.randn(30, 40), torch.randn(50, 40)
    with BareProducts() as products:
        for _ in range(3):
            left @ right.T
        right @ left.T
    with BareProducts() as again:
        assert products.seconds() > 0
    assert again.calls == products.calls and sorted(products.calls.values()) == [1, 3]
