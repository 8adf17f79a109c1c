"""From scores to advantages: hand-worked numbers, and padding that changes nothing."""

import math

import pytest
import torch

from align.algorithms.ppo.advantages import (
    explained_variance,
    gae,
    k1,
    k3,
    leave_one_out,
    masked_mean,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()


def random_case(rows: int = 5, width: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, width + 1, (rows,), generator=draw)
    mask = torch.arange(width)[None, :] < lengths[:, None]
    rewards = torch.randn(rows, width, generator=draw) * mask
    values = torch.randn(rows, width, generator=draw)
    return rewards, values, mask


def test_the_score_stands_on_the_last_valid_token_and_nowhere_else() -> None:
    kl = torch.tensor([[0.1, -0.2, 0.4, 9.0], [0.3, 9.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([2.0, -1.0]), kl, MASK, beta=0.5)
    expected = torch.tensor([[-0.05, 0.1, 1.8, 0.0], [-1.15, 0.0, 0.0, 0.0]])
    assert torch.allclose(found, expected)
    penalty = -0.5 * kl * MASK
    assert ((found - penalty).abs() > 1e-6).sum(-1).tolist() == [1, 1]


def test_gae_by_hand() -> None:
    # delta = r + gamma V' - V: [1 + .9*2 - 1, 2 + .9*3 - 2, 3 - 3] = [1.8, 2.7, 0]
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[1.0, 2.0, 3.0]])
    found = gae(rewards, values, torch.ones(1, 3).bool(), gamma=0.9, lam=0.5)
    # A3 = 0, A2 = 2.7, A1 = 1.8 + .45 * 2.7
    assert found.advantages[0].tolist() == pytest.approx([3.015, 2.7, 0.0])
    assert found.returns[0].tolist() == pytest.approx([4.015, 4.7, 3.0])


def test_lambda_one_is_reward_to_go_minus_value() -> None:
    rewards, values, mask = random_case()
    found = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(found.advantages, (to_go - values) * mask, atol=1e-5)
    assert torch.allclose(found.returns, to_go * mask, atol=1e-5)


def test_lambda_zero_is_one_step_of_temporal_difference() -> None:
    rewards, values, mask = random_case()
    found = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.zeros_like(values)
    following[:, :-1] = (values * mask)[:, 1:]
    assert torch.allclose(found.advantages, (rewards + 0.9 * following - values) * mask)


def test_padding_changes_no_advantage_and_no_statistic() -> None:
    rewards, values, mask = random_case()
    found = gae(rewards, values, mask, gamma=1.0, lam=0.95)

    def wider(x: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.nn.functional.pad(x.float(), (0, 3), value=filler)

    more = wider(mask, 0).bool()
    padded = gae(wider(rewards, 0), wider(values, 77.0), more, gamma=1.0, lam=0.95)
    assert torch.equal(padded.advantages[:, :7], found.advantages)
    assert not padded.advantages[:, 7:].any() and not padded.returns[:, 7:].any()
    white = whiten(padded.advantages, more)
    assert torch.allclose(white[:, :7], whiten(found.advantages, mask), atol=1e-6)
    assert explained_variance(wider(values, 77.0), padded.returns, more) == pytest.approx(
        explained_variance(values, found.returns, mask), abs=1e-6
    )


def test_an_answer_that_was_cut_goes_on_with_the_value_behind_it() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    mask = torch.tensor([[1, 1, 0]]).bool()
    found = gae(rewards * mask, values, mask, gamma=1.0, lam=0.0, bootstrap=torch.tensor([4.0]))
    assert found.advantages[0].tolist() == pytest.approx([1.0, 2.0, 0.0])


def test_whitened_advantages_have_mean_0_and_variance_1_over_what_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    values = 3 + 2 * torch.randn(40, 9, generator=draw)
    mask = torch.rand(40, 9, generator=draw) < 0.6
    found = whiten(values, mask)
    assert float(masked_mean(found, mask)) == pytest.approx(0, abs=1e-5)
    assert float(masked_mean(found**2, mask)) == pytest.approx(1, abs=1e-4)
    assert not found[~mask].any()
    assert not whiten(torch.ones(2, 3), torch.ones(2, 3).bool()).any()


def test_leave_one_out_by_hand() -> None:
    # Totals 1, 2, 6 to one prompt, 4 alone to another: 1 - 4, 2 - 3.5, 6 - 1.5, and nothing.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [6.0, 0.0], [4.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0], [1, 1]]).bool()
    found = leave_one_out(rewards, torch.tensor([7, 7, 7, 9]), mask)
    assert found.advantages.tolist() == [[-3.0, 0.0], [-1.5, -1.5], [4.5, 0.0], [0.0, 0.0]]


def test_the_kl_estimators_meet_the_exact_kl_and_are_0_for_equal_policies() -> None:
    logits = torch.tensor([[0.3, -1.0, 0.7, 0.1, -0.4], [0.0, -0.5, 1.2, 0.4, -1.0]])
    p, q = logits.double().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    draw = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=draw)
    for estimator in (k1, k3):
        expected = float((p.exp() * estimator(p, q)).sum())
        assert expected == pytest.approx(exact, abs=1e-12)
        assert float(estimator(p[tokens], q[tokens]).mean()) == pytest.approx(exact, rel=0.05)
        assert not estimator(p, p).any()
    assert (k3(p, q) >= 0).all() and k3(p, q).var() < k1(p, q).var()


def test_explained_variance_is_1_for_a_value_that_foresees_and_0_for_a_constant() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(1 - 4)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0
    assert math.isfinite(explained_variance(returns, returns, torch.zeros(1, 4).bool()))
