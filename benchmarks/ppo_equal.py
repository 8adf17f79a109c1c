"""Replays one set of TRL's rollouts through our PPO and compares all that both compute from it.

TRL's unmodified trainer takes an iteration's steps and leaves a dump (`ppo_trl_dump.py`); our
functions are given the same weights and tokens, and step for step the same weights again. What
differs on purpose, and how the replay bridges it, is in `DIFFERENCES`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import ppo_trl
from benchmarks.ppo_replay import (
    Replay,
    clipped_by_trl,
    flat,
    longer_mask,
    longer_step_values,
    longer_values,
    read,
)
from benchmarks.table import Row

DIFFERENCES = (
    ("temperature", "TRL divides by T + 1e-7", "ours is set to that T"),
    ("old log-probabilities", "TRL keeps the sampler's; ours are of the training forward",
     "compared with each other: the same weights gave both"),
    ("masks", "TRL takes them from `!= pad`, ours are from lengths",
     "the dump's pad is sampled by nobody; both masks are compared"),
    ("score's place", "TRL adds it to the pad behind the end of turn, ours to the end of turn",
     "its slot is moved one to the left before rewards are compared"),
    ("terminal value", "TRL's V of the state behind the end of turn counts in GAE and in the value "
     "loss; ours ends with the end of turn",
     "our `gae` and `value_loss` get TRL's mask, one slot longer, and V of that state by "
     "`last_value`; answers that fill all places need no bridge"),
    ("answers without end of turn", "TRL subtracts a penalty from the score, ours takes its place",
     "ours is set to `truncated=score`, and the penalty subtracted"),
    ("whitening", "TRL's variance has Bessel's correction, ours is over N",
     "ours times sqrt((n - 1) / n)"),
    ("mean of a loss", "TRL divides policy and value loss each by its own mask's tokens, a micro-"
     "batch at a time; ours by the tokens of the minibatch that count",
     "each sum is divided by its own count; one micro-batch is one minibatch"),
    ("value model", "TRL trains a whole model, ours a head or an adapter",
     "a role on a model of its own with a head; gradients of all its weights are compared"),
    ("reward model", "TRL's is a whole model, ours an adapter on the base",
     "a role on a model of its own with a head"),
    ("KL in the reward", "TRL has k1 or k3, ours k1", "k1, which is TRL's default"),
    ("gradient clipping", "TRL has none", "compared before ours clips"),
    ("permutation", "TRL permutes rows, ours groups of a prompt's rows", "TRL's rows are taken"),
)  # fmt: skip
CASES = {
    "unequal lengths": (),
    "unequal lengths, two minibatches, penalty": ("--minibatches", "2", "--ppo",
        json.dumps({"missing_eos_penalty": 1.0, "learning_rate": 3e-3, "cliprange_value": 0.05})),
    "full length": ("--even", "--ppo", json.dumps({"learning_rate": 3e-3})),
}  # fmt: skip
LOSS, GRADIENT = 1e-5, 1e-4


# The comparison.


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A relative difference and its limit, of one thing that both computed."""

    what: str
    found: float
    limit: float

    @property
    def met(self) -> bool:
        return self.found <= self.limit


def relative(ours: Any, theirs: Any, *, least: float = 0.0) -> float:
    """||ours - theirs|| / max(||theirs||, least); the difference itself where that is 0."""
    gap = float((ours - theirs).double().norm())
    size = max(float(theirs.double().norm()), least)
    found = gap / size if size > 0 else gap
    return found if math.isfinite(found) else math.inf


def replayed(path: Path) -> list[Compared]:
    """Everything that the dump holds, against ours."""
    replay = Replay(read(path))
    found = [*before_steps(replay)]
    losses: dict[str, list[float]] = {}
    for step in range(replay.dumped.steps):
        for what, gap in one_step(replay, step):
            losses.setdefault(what, []).append(gap)
    for what, gaps in losses.items():
        limit = GRADIENT if "gradient" in what else LOSS
        found.append(Compared(what=what, found=max(gaps), limit=limit))
    after = replay.dumped.under("after")
    gap = max(relative(p.detach(), after[name].reshape(p.shape)) for name, p in replay.trained())
    found.append(Compared(what="weights after the last step", found=gap, limit=LOSS))
    return found


def before_steps(replay: Replay) -> Iterator[Compared]:
    """Of the rollouts: masks, log-probabilities, values, scores, rewards, advantages."""
    import torch

    from align.algorithms.ppo.advantages import gae, k1, token_rewards, whiten
    from align.rewards.role import RoleReward
    from align.rewards.source import Sample

    def compared(what: str, ours: Any, theirs: Any, limit: float = LOSS) -> Compared:
        return Compared(what=what, found=relative(ours, theirs), limit=limit)

    mask, seen, longer = replay.mask, replay.seen, longer_mask(replay)
    yield compared("mask", mask.float(), (~seen("padding_mask")).float(), 0.0)
    yield compared("mask of values", longer.float(), (~seen("padding_mask_p1")).float(), 0.0)
    for name, theirs in (("logprobs", "logprobs"), ("reference_logprobs", "ref_logprobs")):
        ours = getattr(replay.passes, name)
        yield compared(name.replace("_", " "), ours, seen(theirs) * mask)
    values = longer_values(replay)
    yield compared("values", values, seen("values"))
    samples = [
        Sample(
            prompt=None, text="", prompt_ids=row.prompt, completion_ids=row.completion, finish=""
        )  # type: ignore[arg-type]
        for row in replay.rollouts.rows
    ]
    scores = torch.tensor(RoleReward(replay.roles).scores(samples))
    penalty = replay.dumped.args["missing_eos_penalty"]
    scores = scores - (0.0 if penalty is None else penalty) * ~seen("contain_eos_token")
    yield compared("scores", scores, seen("scores"))
    rewards = token_rewards(
        scores,
        k1(replay.passes.logprobs, replay.passes.reference_logprobs) * mask,
        mask,
        beta=replay.settings.beta,
    )
    yield compared("rewards", rewards, moved(seen("rewards"), mask))
    # From here on TRL's own figures go in, so that each function is compared by itself.
    estimated = gae(
        seen("rewards"), seen("values"), longer, gamma=replay.settings.gamma,
        lam=replay.settings.lam,
    )  # fmt: skip
    raw = (seen("returns") - seen("values")) * longer
    yield compared("advantages before whitening", estimated.advantages, raw)
    yield compared("returns", estimated.returns, seen("returns") * longer)
    white = whiten(estimated.advantages * mask, mask) * bessel(mask)
    yield compared("advantages", white, seen("advantages"))
    if bool((mask == longer).all()):
        yield compared("advantages, all by `estimate`", whole(replay, scores), seen("advantages"))


def whole(replay: Replay, scores: Any) -> Any:
    """Advantages from our own passes by the function that training calls."""
    from align.algorithms.ppo.experience import estimate

    experience = experience_of(replay, replay.passes, scores)
    settings = replace(replay.settings, truncated="score")
    estimated = estimate(experience, beta=settings.beta, settings=settings)
    return estimated.advantages * bessel(replay.mask)


def experience_of(replay: Replay, passes: Any, scores: Any) -> Any:
    import torch

    from align.algorithms.ppo.experience import Experience

    taught = torch.ones(len(scores), dtype=torch.bool)
    return Experience(
        rollouts=replay.rollouts, passes=passes, scores=scores, raw=scores, taught=taught
    )


def bessel(mask: Any) -> float:
    """From a standard deviation over N to one over N - 1."""
    count = int(mask.sum())
    return math.sqrt((count - 1) / count)


def moved(rewards: Any, mask: Any) -> Any:
    """TRL's rewards, the score on the last token that counts."""
    import torch

    after = torch.zeros_like(rewards)
    after[:, :-1] = (rewards * ~mask)[:, 1:]
    return rewards * mask + after


# A step.


def one_step(replay: Replay, step: int) -> Iterator[tuple[str, float]]:
    """Losses and gradients of a minibatch, in TRL's order; then both have TRL's next weights."""
    from align.models.logprobs import collate, scored_tokens

    theirs = replay.dumped.under(f"step.{step}")
    rows = theirs["rows"].tolist()
    mask, longer = replay.mask[rows], longer_mask(replay)[rows]
    learner, total = replay.learner, replay.learner.totals
    chosen = [replay.rollouts.rows[i] for i in rows]
    batch = collate(chosen)
    clipped = float(total["clipped"])
    with replay.roles.role("policy") as model:
        tokens = scored_tokens(
            model, input_ids=batch.input_ids, response_mask=batch.response_mask,
            temperature=replay.settings.temperature,
        )  # fmt: skip
    policy = learner.policy_term(tokens.logprobs, flat(replay, rows, mask)) / mask.sum()
    values = longer_step_values(replay, chosen)
    value = learner.value_term(values, flat(replay, rows, longer)) / longer.sum()
    loss = policy + replay.settings.value_coef * value
    loss.backward()

    width = mask.shape[1]
    cut: Callable[[str], Any] = lambda name: theirs[name][:, :width]  # noqa: E731
    yield "new log-probabilities", relative(tokens.logprobs.detach(), cut("new_logprobs")[mask])
    yield "values of a step", relative(values.detach(), cut("vpred")[longer])
    # Whitened advantages nearly cancel in the mean; what is left is compared with what they are.
    terms = float((replay.seen("advantages")[rows] * cut("ratio"))[mask].abs().mean())
    yield "policy loss", relative(policy.detach(), theirs["pg_loss"], least=terms)
    yield "value loss", relative(value.detach(), theirs["vf_loss"])
    yield "loss", relative(loss.detach(), theirs["loss"], least=terms)
    yield (
        "tokens that are clipped",
        abs(float(total["clipped"]) - clipped - clipped_by_trl(replay, rows, mask, cut("ratio"))),
    )
    grown = dict(replay.trained())
    for name, parameter in grown.items():
        given = theirs[f"grad.{name}"].reshape(parameter.shape)
        part = "policy" if name.startswith("policy") else "value model"
        yield f"gradient of the {part}, worst tensor", relative(parameter.grad, given)
    if bool((replay.mask == longer_mask(replay)).all()):
        for name, gap in by_the_learner(replay, rows, theirs):
            yield name, gap
    for name, parameter in grown.items():  # TRL's own, for Adam would blow up what rounding left
        parameter.grad = theirs[f"grad.{name}"].reshape(parameter.shape).clone()
    replay.optimizer.step()
    replay.optimizer.zero_grad(set_to_none=True)


def by_the_learner(
    replay: Replay, rows: list[int], theirs: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """The same gradients by the method that training calls, where no bridge is needed."""
    from align.algorithms.ppo.advantages import Estimated
    from align.algorithms.ppo.learner import lesson_of

    replay.optimizer.zero_grad(set_to_none=True)
    passes = replace(
        replay.passes, logprobs=replay.seen("logprobs"), values=replay.seen("values"),
        reference_logprobs=replay.seen("ref_logprobs"),
    )  # fmt: skip
    estimated = Estimated(advantages=replay.seen("advantages"), returns=replay.seen("returns"))
    experience = experience_of(replay, passes, replay.seen("scores"))
    lesson = lesson_of(experience, estimated, settings=replay.settings)
    answers = [experience.rollouts.rows[i] for i in rows]
    flat = lesson.of(rows, replay.mask, device=replay.roles.model.device)
    replay.learner.accumulate(answers, flat, warming=False)
    for name, parameter in replay.trained():
        given = theirs[f"grad.{name}"].reshape(parameter.shape) * int(replay.mask[rows].sum())
        yield "gradient, all by `Learner.accumulate`", relative(parameter.grad, given)


# All of it.


def equal(folder: Path, *, threads: int = 1) -> dict[str, list[Compared]]:
    """Dumps and replays every case; needs TRL, which is installed beside on the first call.

    Raises:
        subprocess.CalledProcessError: TRL could not be installed, or failed.
    """
    found = {}
    for number, (case, arguments) in enumerate(CASES.items()):
        path = folder / f"{number}.safetensors"
        ppo_trl.run(["--dump", str(path), *arguments], threads=threads)
        found[case] = replayed(path)
    return found


def table(found: dict[str, list[Compared]]) -> list[Row]:
    """The worst of all cases, one line for each thing that is compared."""
    names = list(dict.fromkeys(each.what for every in found.values() for each in every))
    rows = []
    for name in names:
        each = [(c, case) for case, every in found.items() for c in every if c.what == name]
        worst, case = max(each, key=lambda pair: pair[0].found)
        rows.append(
            Row(
                what=name,
                measured=f"{worst.found:.1e} ({case})" if len(each) > 1 else f"{worst.found:.1e}",
                mark=f"≤ {worst.limit:g}",
                met=all(c.met for c, _ in each),
            )
        )
    return rows


def told() -> str:
    """What differs on purpose, as a list."""
    return "\n".join(f"- {what}: {how}; {bridge}." for what, how, bridge in DIFFERENCES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dump", type=Path)
    for one in replayed(parser.parse_args().dump):
        print(f"{one.what:45} {one.found:.2e} {one.limit:g} {one.met}")
