"""PPO's losses: hand-worked numbers, and gradients that are what they should be."""

import math

import pytest
import torch

from align.algorithms.ppo.loss import (
    importance_weight,
    kl_loss,
    next_beta,
    policy_loss,
    value_loss,
)


def loss_at(ratio: float, advantage: float, **options: float) -> float:
    found = policy_loss(
        torch.tensor([math.log(ratio)]),
        torch.zeros(1),
        torch.tensor([advantage]),
        clip=0.2,
        **options,  # type: ignore[arg-type]
    )
    return float(found.loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # held: no more to gain
        (0.5, 2.0, -1.0),  # free: it may come back
        (0.5, -2.0, 1.6),  # held
        (3.0, -2.0, 6.0),  # free: the worse, the more
    ],
)
def test_the_surrogate_by_hand(ratio: float, advantage: float, expected: float) -> None:
    assert loss_at(ratio, advantage) == pytest.approx(expected)


def test_a_clipped_token_has_no_gradient_and_is_counted() -> None:
    logprobs = torch.tensor([0.5, 0.05, -0.5], requires_grad=True)
    found = policy_loss(logprobs, torch.zeros(3), torch.ones(3), clip=0.2)
    found.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0] == 0 and (logprobs.grad[1:] != 0).all()
    assert found.clipped.tolist() == [True, False, False]


def test_a_disliked_token_that_became_likely_is_bounded_by_dual_clipping_alone() -> None:
    assert loss_at(1000.0, -1.0) == pytest.approx(1000.0)
    assert loss_at(1000.0, -1.0, dual_clip=3.0) == pytest.approx(3.0)
    assert loss_at(1000.0, 1.0, dual_clip=3.0) == loss_at(1000.0, 1.0)
    assert loss_at(1.1, -1.0, dual_clip=3.0) == loss_at(1.1, -1.0)


def test_a_log_ratio_of_any_size_gives_a_finite_loss_and_gradient() -> None:
    logprobs = torch.tensor([1e4, -1e4], requires_grad=True)
    found = policy_loss(logprobs, torch.zeros(2), torch.tensor([-1.0, 1.0]), clip=0.2)
    found.loss.sum().backward()
    assert logprobs.grad is not None
    assert found.loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_with_the_old_policy_the_gradient_is_that_of_reinforce() -> None:
    logits = torch.tensor([0.2, -0.4, 1.0], requires_grad=True)
    logprobs = logits.log_softmax(-1)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    found = policy_loss(logprobs, logprobs.detach(), advantages, clip=0.2)
    (ours,) = torch.autograd.grad(found.loss.sum(), logits, retain_graph=True)
    (plain,) = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    assert torch.allclose(ours, plain)
    assert torch.equal(found.ratio, torch.ones(3)) and not found.clipped.any()


def test_the_value_loss_is_the_larger_of_clipped_and_unclipped() -> None:
    values, old = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3)
    returns = torch.tensor([2.0, 2.0, 2.0])
    # moved by 1, held at .2: 1/2 (1.8)^2; within: 1/2 (1.9)^2; away from it: 1/2 3^2
    found = value_loss(values, old, returns, clip=0.2)
    assert found.tolist() == pytest.approx([1.62, 1.805, 4.5])
    assert value_loss(values, old, returns, clip=None).tolist() == pytest.approx([0.5, 1.805, 4.5])
    assert torch.equal(
        value_loss(values, values, returns, clip=0.2), value_loss(values, old, returns, clip=None)
    )


def test_the_gradient_of_the_kl_loss_is_that_of_the_exact_kl() -> None:
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, -0.5, 1.2, 0.4, -1.0], dtype=torch.float64).log_softmax(-1)
    old = torch.tensor([0.5, 0.2, -0.3, 0.0, 0.4], dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True
    )
    # The expectation over tokens that the policy itself draws, and over an old policy's.
    for drawn in (logprobs.detach(), old):
        expected = (drawn.exp() * kl_loss(logprobs, reference, drawn)).sum()
        (ours,) = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(ours, exact, atol=1e-12)
    # k1 as a loss teaches nothing at all.
    (k1,) = torch.autograd.grad(
        (logprobs.detach().exp() * (logprobs - reference)).sum(), logits, retain_graph=True
    )
    assert torch.allclose(k1, torch.zeros_like(k1), atol=1e-12)


def test_the_importance_weight_is_1_where_sampler_and_trainer_agree_and_truncated_elsewhere() -> (
    None
):
    old, drawn = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, -0.5])
    found = importance_weight(old, drawn, most=2.0)
    assert found.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])


def test_beta_follows_the_kl_and_no_faster_than_a_fifth() -> None:
    step = {"answers": 1000, "horizon": 10_000}
    assert next_beta(0.1, kl=6.0, target=6.0, **step) == pytest.approx(0.1)
    assert next_beta(0.1, kl=60.0, target=6.0, **step) == pytest.approx(0.102)
    assert next_beta(0.1, kl=-5.0, target=6.0, **step) == pytest.approx(0.098)
    assert next_beta(0.1, kl=6.6, target=6.0, **step) == pytest.approx(0.101)
