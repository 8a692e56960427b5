"""Every form of the ridge regression is the same fit, and the cheap one is chosen."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from maestro_pl.conductor.choices import leading_directions
from maestro_pl.conductor.closed_form import PENALTIES, Form, Labelled, cheaper_form, fit_covariance, fit_varying

Sizes = tuple[int, ...]


def drawn(sizes: Sizes, width: int, rewards: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Groups of these sizes, each with one context."""
    torch.manual_seed(seed)
    x_NF = torch.randn(len(sizes), width)
    x_WF = x_NF.repeat_interleave(torch.tensor(sizes), 0)
    count = sum(sizes)
    z_WK, weight_W = torch.randn(count, rewards), 0.1 + torch.rand(count)
    z_WK[: sizes[0], 0] = 0.0  # a reward that does not apply there
    return x_WF, z_WK, torch.randn(count), weight_W


def by_hand(x: torch.Tensor, z: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, ridge: float) -> Any:
    """Coefficients, residual variance and the inverse of the normal equations, with one column a coefficient."""
    x, z, value, weight = (each.double() for each in (x, z, value, weight))
    design = torch.einsum("sk,sf->skf", z, x).flatten(1)
    gram = design.T @ (weight[:, None] * design) + ridge * torch.eye(design.shape[1], dtype=torch.float64)
    theta = torch.linalg.solve(gram, design.T @ (weight * value))
    noise = float((weight * (value - design @ theta).square()).sum() / weight.sum())
    return theta.view(z.shape[1], -1), noise, torch.linalg.inv(gram)


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize(
    ("sizes", "width", "rewards"),
    [((8,) * 6, 5, 3), ((1,) * 20, 4, 2), ((8, 1, 3, 2), 7, 5), ((2, 9), 3, 1), ((40,), 2, 4)],
)
def test_each_form_is_the_normal_equations(sizes: Sizes, width: int, rewards: int, form: Form) -> None:
    x, z, value, weight = drawn(sizes, width, rewards)
    fit = fit_varying(x, z, value, weight, 3.0, form)
    theta, noise, inverse = by_hand(x, z, value, weight, 3.0)
    assert fit.rows == sum(sizes)
    assert fit.form == form
    torch.testing.assert_close(fit.map_KF, theta.float(), atol=1e-6, rtol=1e-5)
    assert fit.noise == pytest.approx(noise, rel=1e-9)
    at = torch.randn(3, width)
    expected = torch.stack([
        torch.block_diag(*[row.double()[None]] * rewards) @ inverse @ torch.block_diag(*[row.double()[None]] * rewards).T
        for row in at
    ])  # fmt: skip
    torch.testing.assert_close(fit.covariance(at), (expected * noise).float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(8,) * 12, (1,) * 30, (5, 9, 1, 20)])
def test_the_most_probable_penalty_is_the_same_in_every_form(sizes: Sizes) -> None:
    """Against the evidence of the values under N(0, s (kernel / penalty + 1)), s profiled out."""
    for seed in range(4):
        x, z, value, weight = drawn(sizes, 3, 2, seed)
        value = value + 2.0 * (seed % 2) * (x[:, 0] * z[:, 1])
        root = weight.sqrt().double()
        scaled = value.double() * root
        kernel = (x @ x.T).double() * (z @ z.T).double() * root[:, None] * root

        def evidence(penalty: float, kernel: Any = kernel, target: Any = scaled) -> float:
            whole = kernel / penalty + torch.eye(len(kernel), dtype=torch.float64)
            square = float(target @ torch.linalg.solve(whole, target))
            return -0.5 * (len(kernel) * math.log(square / len(kernel)) + float(torch.logdet(whole)))

        expected = max(PENALTIES, key=evidence)
        assert {fit_varying(x, z, value, weight, "auto", form).penalty for form in get_args(Form)} == {expected}


def test_the_covariances_of_groups_have_two_forms_too() -> None:
    torch.manual_seed(1)
    q, weight = torch.randn(40, 3), torch.rand(40) + 0.1
    for width in (4, 60):  # coefficients fewer, and more, than groups
        x = torch.randn(40, width)
        fit = fit_covariance(x, q, weight, 20.0)
        gram = x.T @ (weight[:, None] * x) + 2.0 * torch.eye(width)
        torch.testing.assert_close(
            fit.map_KF, torch.linalg.solve(gram, x.T @ (weight[:, None] * q)).T, atol=1e-5, rtol=1e-4
        )
        at = torch.randn(2, width)
        expected = fit.noise * (at @ torch.linalg.inv(gram) @ at.T).diagonal()
        torch.testing.assert_close(
            fit.covariance(at).diagonal(dim1=1, dim2=2), expected[:, None].expand(2, 3), rtol=1e-3, atol=1e-5
        )
    assert fit_covariance(torch.randn(40, 4), q, weight, 20.0).form == "primal"
    assert fit_covariance(torch.randn(40, 60), q, weight, 20.0).form == "kernel"


def test_groups_of_one_context_are_as_cheap_as_their_rewards() -> None:
    """64 responses with 2 rewards say no more than 2 rows; what the rows leave out is noise."""
    x, z, value, weight = drawn((64,) * 3, 50, 2)
    short = Labelled.of(x, z, value[:, None], weight).shortened()
    assert short.factors_WK.shape == (6, 2)
    assert cheaper_form(short) == "kernel"
    total = (weight * value.square()).sum()
    assert float(short.energy_M + short.target_WM.square().sum()) == pytest.approx(float(total), rel=1e-6)
    assert cheaper_form(Labelled.of(*drawn((1,) * 400, 6, 2)[:2], torch.randn(400, 1), torch.ones(400))) == "primal"


def test_directions_of_repeated_contexts_are_those_of_all_rows() -> None:
    for sizes, width in (((3, 1, 4, 2), 9), ((3,) * 8, 3)):
        x = drawn(sizes, width, 1)[0].double()
        directions = leading_directions(x, 2)
        expected = torch.linalg.svd(x, full_matrices=False).Vh[:2].T
        torch.testing.assert_close((directions.T @ expected).abs(), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_is_named(broken: float) -> None:
    x, z, value, weight = drawn((4, 4), 3, 2)
    z[1, 1] = broken
    with pytest.raises(FloatingPointError, match="rewards" if not math.isfinite(broken) else "the kernel"):
        fit_varying(x, z, value, weight, 3.0)
