"""An iteration against its equations, token by token in plain loops: what the policy, reference and
value function say, what each token earns, and the gradient of the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from align.algorithms.ppo.experience import POLICY, REFERENCE, VALUE, Experience
from align.algorithms.ppo.run import made
from align.algorithms.ppo.trainer import Trainer
from align.algorithms.settings import Ppo
from align.models.logprobs import Row
from align.models.settings import Model
from align.process_group import Ranks
from tests.algorithms.ppo.running import likely_to_end, online, settings
from tests.conftest import model_settings, save_tiny

ALONE = Ranks(index=0, count=1, device=torch.device("cpu"))
DRIFT = 0.1  # nats a token by which the sampler is made to disagree
# Everything that has a switch is switched on, at a value that shows.
EVERYTHING: dict[str, Any] = {
    "prompts": 6, "samples": 3, "max_new_tokens": 5, "temperature": 0.7, "minibatches": 1,
    "epochs": 2, "truncated": "penalty", "penalty": -0.7, "reward_clip": 0.8,
    "reward": "tests.algorithms.ppo.running:sparing", "beta": 0.3, "kl_target": 5.0,
    "kl_horizon": 36, "gamma": 0.9, "lam": 0.8, "clip": 0.05, "dual_clip": 1.05, "value_clip": 0.02,
    "value_coef": 0.7, "kl_loss": 0.4, "importance_cap": 1.05, "micro_batch_tokens": 60,
    "max_grad_norm": 1e9, "monitor_every": 9,
}  # fmt: skip


@dataclass
class Followed:
    """The second iteration of a run: what it learnt from, and its second step."""

    run: Trainer
    experience: Experience
    began: dict[str, list[torch.Tensor]]  # weights before the first step
    stood: dict[str, list[torch.Tensor]]  # weights before the second
    gradients: dict[str, list[torch.Tensor]]


def followed(run: Trainer) -> Followed:
    experiences: list[Experience] = []
    steps: list[tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]] = []
    drawn, seen = run.drawn, run.experience

    def disagreeing(*given: Any, **named: Any) -> Any:
        found = drawn(*given, **named)
        return replace(found, sampler_logprobs=found.sampler_logprobs - DRIFT)

    def kept(*given: Any) -> Any:
        found = seen(*given)
        experiences.append(found[0])
        return found

    def step(optimizer: Any, *_: Any) -> None:
        groups = optimizer.param_groups
        weights = {g["role"]: [p.detach().clone() for p in g["params"]] for g in groups}
        steps.append((weights, {g["role"]: [p.grad.clone() for p in g["params"]] for g in groups}))

    run.drawn, run.experience = disagreeing, kept  # type: ignore[method-assign]
    run.learner.optimizer.register_step_pre_hook(step)
    run.begin()
    run.iterate(0)
    run.iterate(1)
    (began, _), (stood, gradients) = steps[-2:]
    return Followed(run, experiences[-1], began, stood, gradients)


@torch.no_grad()
def put(run: Trainer, weights: dict[str, list[torch.Tensor]]) -> None:
    for group in run.learner.optimizer.param_groups:
        for parameter, value in zip(group["params"], weights[group["role"]], strict=True):
            parameter.copy_(value)


# The same in plain loops.


@dataclass
class Said:
    """Of one answer, a number for each of its tokens."""

    policy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    entropies: list[float]
    behind: float


def said(run: Trainer, row: Row) -> Said:
    """By passes over this row alone, with all logits."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    start, count = len(row.prompt), len(row.completion)

    def logprobs(role: str) -> tuple[torch.Tensor, torch.Tensor]:
        with run.roles.role(role) as model:
            found = model(input_ids=ids, output_hidden_states=True)
        chances = log_softmax(found.logits[0].float() / run.settings.temperature, dim=-1)
        return chances, found.hidden_states[-1][0]

    def chosen(chances: torch.Tensor) -> torch.Tensor:
        return torch.stack([chances[start + t - 1, row.completion[t]] for t in range(count)])

    policy, hidden = logprobs(POLICY)
    with torch.no_grad():
        reference, _ = logprobs(REFERENCE)
    values = torch.zeros(count + 1)
    if run.settings.value == "adapter":
        _, hidden = logprobs(VALUE)
    if run.settings.value != "none":
        head = run.roles.head(VALUE)
        values = torch.stack(
            [(hidden[start + t - 1] * head.weight).sum() + head.bias for t in range(count + 1)]
        )
    before = policy[start - 1 : start + count - 1].detach()
    entropies = [-float((p.exp() * p).sum()) for p in before]
    return Said(
        policy=chosen(policy), reference=chosen(reference), values=values[:count],
        entropies=entropies, behind=float(values[count].detach()),
    )  # fmt: skip


def scores_of(experience: Experience, run: Trainer) -> list[float | None]:
    """What each answer counts; None teaches nothing."""
    found: list[float | None] = []
    for raw, ended in zip(experience.raw.tolist(), experience.rollouts.ended.tolist(), strict=True):
        scaled = (raw - run.calibration.mean) / run.calibration.std
        clipped = max(-run.settings.reward_clip, min(run.settings.reward_clip, scaled))
        if math.isnan(raw):
            found.append(None)
        elif ended or run.settings.truncated == "score":
            found.append(clipped)
        else:
            found.append(run.settings.penalty if run.settings.truncated == "penalty" else 0.0)
    return found


def advantages_of(
    before: Sequence[Said], scores: Sequence[float | None], experience: Experience, *,
    beta: float, config: Ppo,
) -> tuple[list[list[float]], list[list[float]]]:  # fmt: skip
    """Advantages, whitened, and returns."""
    earned = []
    for one, score in zip(before, scores, strict=True):
        pairs = zip(one.policy.tolist(), one.reference.tolist(), strict=True)
        tokens = [-beta * (p - q) for p, q in pairs]
        tokens[-1] += score or 0.0
        earned.append(tokens)
    groups, ended = experience.rollouts.groups.tolist(), experience.rollouts.ended.tolist()
    advantages, returns = [], []
    for i, (one, tokens) in enumerate(zip(before, earned, strict=True)):
        if config.value == "none":
            others = [
                sum(earned[j]) for j in range(len(earned))
                if j != i and groups[j] == groups[i] and scores[j] is not None
            ]  # fmt: skip
            mean = sum(others) / len(others) if others else sum(tokens)
            advantages.append([sum(tokens) - mean] * len(tokens))
            returns.append([sum(tokens)] * len(tokens))
            continue
        goes_on = config.truncated == "bootstrap" and not ended[i]
        values = [*one.values.tolist(), one.behind if goes_on else 0.0]
        running, row = 0.0, []
        for t in reversed(range(len(tokens))):
            delta = tokens[t] + config.gamma * values[t + 1] - values[t]
            running = delta + config.gamma * config.lam * running
            row.insert(0, running)
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values[:-1], strict=True)])
    known = [a for row, s in zip(advantages, scores, strict=True) if s is not None for a in row]
    mean = sum(known) / len(known)
    deviation = (sum((a - mean) ** 2 for a in known) / len(known)) ** 0.5
    return [[(a - mean) / deviation for a in row] for row in advantages], returns


def loss_of_token(
    new: torch.Tensor, value: torch.Tensor, *, old: float, reference: float, old_value: float,
    sampler: float, advantage: float, goal: float, config: Ppo,
) -> torch.Tensor:  # fmt: skip
    ratio = (new - old).exp()
    r = float(ratio.detach())
    if advantage > 0 and r > 1 + config.clip:
        policy = torch.tensor(-advantage * (1 + config.clip))
    elif advantage < 0 and r < 1 - config.clip:
        policy = torch.tensor(-advantage * (1 - config.clip))
    elif advantage < 0 and config.dual_clip is not None and r > config.dual_clip:
        policy = torch.tensor(-advantage * config.dual_clip)
    else:
        policy = -advantage * ratio
    if config.importance_cap is not None:
        policy = policy * min(math.exp(old - sampler), config.importance_cap)
    kl = ratio.detach() * 0.5 * (new - reference) ** 2
    loss = policy + config.kl_loss * kl
    if config.value != "none":
        error = (value - goal) ** 2
        if config.value_clip is not None:
            near = old_value + (value - old_value).clamp(-config.value_clip, config.value_clip)
            error = torch.maximum(error, (near - goal) ** 2)
        loss = loss + config.value_coef * 0.5 * error
    return loss


def expected_gradients(found: Followed, *, beta: float) -> dict[str, list[torch.Tensor]]:
    run, config = found.run, found.run.settings
    rows = found.experience.rollouts.rows
    put(run, found.began)
    with torch.no_grad():
        before = [said(run, row) for row in rows]
    scores = scores_of(found.experience, run)
    advantages, returns = advantages_of(before, scores, found.experience, beta=beta, config=config)
    put(run, found.stood)
    total, count = torch.zeros(()), 0
    for i, row in enumerate(rows):
        if scores[i] is None:
            continue
        now = said(run, row)
        for t in range(len(row.completion)):
            count += 1
            total = total + loss_of_token(
                now.policy[t], now.values[t], old=float(before[i].policy[t]),
                reference=float(before[i].reference[t]), old_value=float(before[i].values[t]),
                sampler=float(before[i].policy[t]) - DRIFT, advantage=advantages[i][t],
                goal=returns[i][t], config=config,
            )  # fmt: skip
    (total / count).backward()
    groups = run.learner.optimizer.param_groups
    return {g["role"]: [p.grad.clone() for p in g["params"]] for g in groups}


def begun(model: Model, out: Path, **changes: Any) -> Trainer:
    given = online(model)
    push = 9.0 if given.base.config.model_type == "gemma2" else 4.0  # its logits are larger
    likely_to_end(given.base, given.tokenizer.eos_token_id, push=push)
    return made(given, settings=settings(**{**EVERYTHING, **changes}), out=out, ranks=ALONE)


CASES = [
    ("llama", "trunk", {}),
    ("llama", "adapter", {}),
    ("llama", "none", {}),
    ("gpt2", "trunk", {"truncated": "score"}),
    ("gpt2", "adapter", {"truncated": "bootstrap"}),
    ("llama", "trunk", {"truncated": "bootstrap"}),
    ("gemma2", "trunk", {}),  # its head caps its logits inside of the model
    ("llama", "trunk", {"dual_clip": None, "value_clip": None, "importance_cap": None}),
]


@pytest.mark.parametrize(("architecture", "value", "changes"), CASES)
def test_a_step_is_the_gradient_of_the_equations(
    tmp_path: Path, architecture: str, value: str, changes: dict[str, Any]
) -> None:
    """The second step of the second iteration, where no ratio is 1 any more, the policy is not the
    reference, and beta has followed the KL.
    """
    model = model_settings(save_tiny(tmp_path / "model", architecture))
    found = followed(begun(model, tmp_path, value=value, **changes))
    config, rollouts = found.run.settings, found.experience.rollouts
    assert len({len(row.completion) for row in rollouts.rows}) > 2
    assert 0 < int(rollouts.ended.sum()) < len(rollouts.rows)
    assert 0 < int(found.experience.taught.sum()) < len(rollouts.rows)
    # The KL of the first iteration is 0: beta falls by a fifth for every 36 answers, of 18.
    beta = config.beta * (1 - 0.2 * 18 / 36)
    assert found.run.history[1]["beta"] == pytest.approx(beta)
    expected = expected_gradients(found, beta=beta)
    assert expected.keys() == found.gradients.keys()
    for role, theirs in expected.items():
        for one, other in zip(found.gradients[role], theirs, strict=True):
            assert float(other.norm()) > 0
            assert float((one - other).norm() / other.norm()) < 5e-4, role
    put(found.run, found.began)
    compare_passes(found)


def compare_passes(found: Followed) -> None:
    seen = found.experience.passes
    for i, row in enumerate(found.experience.rollouts.rows):
        with torch.no_grad():
            alone = said(found.run, row)
        count = len(row.completion)
        for ours, theirs in (
            (seen.logprobs, alone.policy), (seen.reference_logprobs, alone.reference),
            (seen.values, alone.values), (seen.entropies, torch.tensor(alone.entropies)),
        ):  # fmt: skip
            assert torch.allclose(ours[i, :count], theirs, atol=2e-4)
            assert not ours[i, count:].any()
        if found.run.settings.truncated == "bootstrap":
            assert float(seen.behind[i]) == pytest.approx(alone.behind, abs=2e-4)


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_gradients_of_policy_and_value_function_are_each_clipped_to_the_norm(
    tiny: Model, tmp_path: Path, value: str
) -> None:
    for name in ("free", "held"):
        (tmp_path / name).mkdir()
    free = followed(begun(tiny, tmp_path / "free", value=value, epochs=1))
    held = followed(begun(tiny, tmp_path / "held", value=value, epochs=1, max_grad_norm=1e-3))
    for role, gradients in held.gradients.items():
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3), role
        assert float(torch.cat([g.flatten() for g in free.gradients[role]]).norm()) > 1e-2, role


def test_each_epoch_has_an_order_of_its_own(tiny: Model, tmp_path: Path) -> None:
    run = begun(tiny, tmp_path, value="none", minibatches=3, epochs=3)
    seen: list[tuple[int, ...]] = []
    step = run.learner.step

    def noted(rows: list[int], *given: Any, **named: Any) -> dict[str, float]:
        seen.append(tuple(rows))
        return step(rows, *given, **named)

    run.learner.step = noted  # type: ignore[method-assign]
    run.begin()
    run.iterate(0)
    epochs = [frozenset(seen[i : i + 3]) for i in (0, 3, 6)]
    assert len(set(epochs)) == 3
    assert all(
        sorted(row for part in epoch for row in part) == sorted(sum(seen[:3], ()))
        for epoch in epochs
    )
