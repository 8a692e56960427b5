"""Log-probabilities from hidden states against a plain log-softmax: values, gradients, and how much is held at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_pl.policy.head import token_logps

T, D, V = 23, 12, 50


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float, softcap: float | None) -> Any:
    logits = head(hidden)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_softmax = (logits / temperature).log_softmax(-1)
    return log_softmax.gather(1, targets[:, None]).squeeze(1), -(log_softmax.exp() * log_softmax).sum(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_values_and_gradients_equal_autograd(bias: bool, softcap: float | None, rows: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).double()
    hidden = torch.randn(T, D, dtype=torch.double, requires_grad=True)
    targets, upstream = torch.randint(V, (T,)), torch.randn(T)
    leaves = [hidden, *head.parameters()]
    expected, entropies = plain(hidden, head, targets, 0.7, softcap)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    got, got_entropies = token_logps(hidden, head, targets, 0.7, True, softcap, chunk_elements=rows * V)
    ours = torch.autograd.grad((got * upstream).sum(), leaves)
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(got_entropies, entropies.float(), atol=1e-5, rtol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_entropy_is_optional() -> None:
    head = nn.Linear(D, V).requires_grad_(False)
    hidden = torch.randn(T, D, requires_grad=True)
    logps, entropies = token_logps(hidden, head, torch.randint(V, (T,)))
    assert entropies is None
    logps.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_bfloat16_is_as_good_as_a_plain_head_in_bfloat16() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(D, V).double()
    hidden, targets = torch.randn(400, D, dtype=torch.double, requires_grad=True), torch.randint(V, (400,))
    (truth,) = torch.autograd.grad(plain(hidden, exact, targets, 1.0, None)[0].sum(), hidden)
    head = nn.Linear(D, V).bfloat16()
    head.load_state_dict(exact.state_dict())
    errors = []
    for ours in (True, False):
        low = hidden.detach().bfloat16().requires_grad_()
        logps = token_logps(low, head, targets)[0] if ours else plain(low, head, targets, 1.0, None)[0]
        (gradient,) = torch.autograd.grad(logps.sum(), low)
        errors.append(float((gradient.double() - truth).norm() / truth.norm()))
    assert errors[0] < max(1.2 * errors[1], 0.01)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_is_larger_than_a_chunk(frozen: bool) -> None:
    head = nn.Linear(8, 4000, bias=False).requires_grad_(not frozen)
    hidden, targets = torch.randn(500, 8, requires_grad=True), torch.randint(4000, (500,))
    with Largest() as largest:
        token_logps(hidden, head, targets, entropy=True, chunk_elements=10 * 4000)[0].sum().backward()
    assert largest.elements == 40_000
