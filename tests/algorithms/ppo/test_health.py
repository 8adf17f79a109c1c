"""What goes wrong is said in plain words, with what to try; what is well is not spoken of."""

from typing import Any

import pytest

from align.algorithms.ppo.health import hopeless, warnings_of
from tests.algorithms.ppo.running import settings

WELL: dict[str, float] = {
    "kl": 2.0, "kl_error": 0.2, "ratio_std": 0.05, "entropy": 1.0, "length": 24.0, "eos_rate": 1.0,
    "clipped_rewards": 0.0, "reward": 0.3, "taught": 1.0, "beta": 0.05, "policy_loss": 0.1,
    "value_loss": 0.1, "grad_norm": 1.0,
}  # fmt: skip


def told(*, before: int = 9, best: float | None = None, **now: float) -> dict[str, str]:
    history = [WELL] * before + [{**WELL, **now}]
    return warnings_of(history, settings=settings(kl_band=[0.0, 20.0]), best_reference=best)


def test_a_run_that_is_well_is_not_warned_of() -> None:
    assert told() == {} and told(before=0) == {}


@pytest.mark.parametrize(
    ("name", "now", "says"),
    [
        ("negative_kl", {"kl": -1.5}, "KL cannot be negative"),
        ("ratio", {"ratio_std": 0.8}, "moves far within one iteration"),
        ("entropy", {"entropy": 0.1}, "entropy fell from 1.00 to 0.10"),
        ("length", {"length": 100.0}, "answers run longer"),
        ("length", {"length": 5.0}, "answers run shorter"),
        ("eos", {"eos_rate": 0.4}, "only 40% of the answers end"),
        ("reward_range", {"clipped_rewards": 0.5}, "out of the range"),
        ("kl_band", {"kl": 25.0}, "above algorithm.kl_band=[0,20]"),
        ("left_out", {"taught": 0.9}, "10% of the answers have no reward"),
    ],
)
def test_what_is_odd_is_named_with_a_remedy(name: str, now: dict[str, float], says: str) -> None:
    found = told(**now)
    assert list(found) == [name] and says in found[name]
    assert any(word in found[name] for word in ("algorithm.", "Look", "See"))


def test_a_mean_reward_beyond_every_reference_answer_is_out_of_range() -> None:
    assert list(told(best=0.2)) == ["reward_range"] and told(best=0.5) == {}


def test_a_clip_that_is_meant_to_hold_many_is_not_warned_of() -> None:
    history = [{**WELL, "clipped_rewards": 0.5}]
    tight = settings(kl_band=[0.0, 20.0], reward_clip=1.0)
    assert warnings_of(history, settings=tight, best_reference=None) == {}


def test_a_trend_needs_more_than_a_few_iterations() -> None:
    assert told(before=2, entropy=0.1, length=100.0) == {}


def test_noise_around_zero_is_no_negative_kl() -> None:
    assert told(kl=-0.5, kl_error=0.3) == {}


@pytest.mark.parametrize("key", ["policy_loss", "value_loss", "grad_norm", "value_grad_norm", "kl"])
def test_a_number_that_is_none_ends_the_run(key: str) -> None:
    spoilt: dict[str, Any] = {**WELL, key: float("nan")}
    assert hopeless(spoilt) == f"{key} is nan" and hopeless(WELL) is None


def test_a_policy_that_hardly_moved_by_the_end_is_told_of_then_and_no_sooner() -> None:
    few, many = (settings(kl_band=[3.0, 20.0], iterations=n) for n in (10, 100))
    history = [WELL] * 10
    found = warnings_of(history, settings=few, best_reference=None)
    assert "below algorithm.kl_band=[3,20]" in found["kl_band"]
    assert warnings_of(history, settings=many, best_reference=None) == {}
