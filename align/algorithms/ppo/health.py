"""What goes wrong in a PPO run, told in plain words with what to try."""

import math
from collections.abc import Mapping, Sequence

from align.algorithms.settings import OnAnswers
from align.errors import StageError

History = Sequence[Mapping[str, float]]  # measures by iteration, the newest last

SETTLED = 5  # iterations after which a trend means something
FAR_RATIO = 0.5  # standard deviation of the probability ratio within one iteration
LOW_ENTROPY = 0.2  # of what it was at first
LENGTHS = (1 / 3, 3.0)  # times the first length
CLIPPED_SHARE = 0.25
LOOSE = 3.0  # deviations; a tighter clip is meant to hold many
SURE = 2.0  # standard errors by which a win rate must have fallen


def hopeless(measured: Mapping[str, float]) -> str | None:
    """Why a run cannot recover, None where it can."""
    given = {"value_loss": 0.0, "value_grad_norm": 0.0, **measured}  # RLOO and GRPO have neither
    for key in ("policy_loss", "value_loss", "grad_norm", "value_grad_norm", "kl"):
        if not math.isfinite(given[key]):
            return f"{key} is {given[key]}"
    return None


def check_hopeful(measured: Mapping[str, float], iteration: int, *, settings: OnAnswers) -> None:
    """
    Args:
        iteration: counted from 1.

    Raises:
        StageError: the run cannot recover.
    """
    reason = hopeless(measured)
    if reason is not None:
        key = "value_learning_rate" if reason.startswith("value_") else "learning_rate"
        rate = getattr(settings, key)
        raise StageError(
            f"training collapsed at iteration {iteration}: {reason}; lower algorithm.{key} (now "
            f"{rate:g}; try {rate / 4:g})"
        )


def warnings_of(
    history: History, *, settings: OnAnswers, best_reference: float | None
) -> dict[str, str]:
    """What is odd in the newest iteration, by a short name.

    Args:
        history: measures by iteration, the newest last.
        best_reference: the highest raw reward of reference answers, where known.
    """
    return {
        **of_the_policy(history, settings),
        **of_the_answers(history),
        **of_the_rewards(history, settings, best_reference),
    }


def of_the_policy(history: History, settings: OnAnswers) -> dict[str, str]:
    """How far it moves, and where it stands."""
    now, first = history[-1], history[0]
    found: dict[str, str] = {}
    if now["kl"] < -max(1.0, 3 * now["kl_error"]):
        found["negative_kl"] = (
            f"KL is {now['kl']:.2f} nats an answer, and a KL cannot be negative: the answers were "
            "not drawn from the policy that scores them. Type algorithm.top_p=1 algorithm.top_k=0"
        )
    if now.get("ratio_std", 0.0) > FAR_RATIO:
        found["ratio"] = (
            f"the policy moves far within one iteration (the probability ratio spreads by "
            f"{now['ratio_std']:.2f}). Lower algorithm.learning_rate (now "
            f"{settings.learning_rate:g}) or algorithm.epochs, or set algorithm.target_kl=0.05"
        )
    if len(history) > SETTLED and now["entropy"] < LOW_ENTROPY * first["entropy"]:
        found["entropy"] = (
            f"entropy fell from {first['entropy']:.2f} to {now['entropy']:.2f} nats a token: the "
            "policy says nearly the same each time. Raise algorithm.beta or lower "
            "algorithm.learning_rate"
        )
    low, high = settings.kl_band
    if len(history) >= max(settings.iterations, SETTLED) and 0 <= now["kl"] < low:
        found["kl_band"] = (
            f"KL ends at {now['kl']:.2f} nats an answer, below algorithm.kl_band=[{low:g},"
            f"{high:g}]: the policy hardly moved. Raise algorithm.learning_rate or "
            f"algorithm.iterations, or lower algorithm.beta (now {now['beta']:.3g})"
        )
    if len(history) > SETTLED and now["kl"] > high:
        found["kl_band"] = (
            f"KL is {now['kl']:.1f} nats an answer, above algorithm.kl_band=[{low:g},{high:g}]. "
            f"Raise algorithm.beta (now {now['beta']:.3g}) or lower algorithm.learning_rate"
        )
    return found


def of_the_answers(history: History) -> dict[str, str]:
    """Whether they run away in length, or end no more."""
    now, first = history[-1], history[0]
    found: dict[str, str] = {}
    times = now["length"] / max(first["length"], 1e-9)
    if len(history) > SETTLED and not LENGTHS[0] < times < LENGTHS[1]:
        way = "longer" if times > 1 else "shorter"
        found["length"] = (
            f"answers run {way}: {now['length']:.0f} tokens, {first['length']:.0f} at first. Look "
            "at samples.jsonl; the reward may pay for length. Raise algorithm.beta, or train the "
            "reward model on pairs of equal length"
        )
    if now["eos_rate"] < 0.5 and now["eos_rate"] < first["eos_rate"] - 0.2:
        found["eos"] = (
            f"only {now['eos_rate']:.0%} of the answers end by themselves ({first['eos_rate']:.0%} "
            "at first). Raise algorithm.max_new_tokens, or lower algorithm.penalty"
        )
    return found


def of_the_rewards(
    history: History, settings: OnAnswers, best_reference: float | None
) -> dict[str, str]:
    """Whether they can be trusted still."""
    now = history[-1]
    found: dict[str, str] = {}
    if settings.reward_clip >= LOOSE and now["clipped_rewards"] > CLIPPED_SHARE:
        found["reward_range"] = (
            f"{now['clipped_rewards']:.0%} of the rewards lie beyond algorithm.reward_clip="
            f"{settings.reward_clip:g}: the reward model is out of the range that it was "
            "calibrated on. Look at samples.jsonl for what it overrates, raise algorithm.beta, or "
            "train it on answers of the new policy"
        )
    elif best_reference is not None and now["reward"] > best_reference:
        found["reward_range"] = (
            f"the mean reward {now['reward']:.2f} is beyond the best reference answer's "
            f"({best_reference:.2f}): the reward model judges what it never saw. Compare with the "
            "judge's curve, raise algorithm.beta, or train it on answers of the new policy"
        )
    if now["taught"] < 1:
        found["left_out"] = (
            f"{1 - now['taught']:.0%} of the answers have no reward and teach nothing. See what "
            "the source of rewards says of them"
        )
    best = overoptimised(history)
    if best is not None:
        found["over_optimised"] = (
            f"on held-out prompts the reward went on rising while the judge's win rate fell since "
            f"iteration {best}: answers come to please the reward more than the judge. Type "
            f"algorithm.iterations={best}, raise algorithm.beta (now {now['beta']:.3g}), or train "
            "the reward model on answers of the new policy"
        )
    return found


def overoptimised(curves: Sequence[Mapping[str, float]]) -> int | None:
    """The iteration of the judge's best win rate, if the policy has since learnt to please the
    reward at the judge's expense: the win rate p fell by more than chance explains, and the reward
    rose.

        p_best - p_last > 2 sqrt(p_best (1 - p_best) / n_best + p_last (1 - p_last) / n_last)

    See Gao, Schulman and Hilton 2022, arXiv:2210.10760, figure 1.

    Args:
        curves: lines by iteration, of which some have eval_reward, eval_win_rate and eval_judged;
            without `step`, a line's place is its iteration.
    """
    keys = ("eval_reward", "eval_win_rate", "eval_judged")
    watched = [
        (int(line.get("step", place)), line)
        for place, line in enumerate(curves, start=1)
        if all(key in line for key in keys)
    ]
    if not watched:
        return None
    step, best = max(watched, key=lambda one: one[1]["eval_win_rate"])
    last = watched[-1][1]
    fell = best["eval_win_rate"] - last["eval_win_rate"]
    if fell > SURE * error_between(best, last) and last["eval_reward"] > best["eval_reward"]:
        return step
    return None


def error_between(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Standard error of the difference of two lines' win rates."""
    rates = [(line["eval_win_rate"], line["eval_judged"]) for line in (one, other)]
    return math.sqrt(sum(p * (1 - p) / n for p, n in rates))
