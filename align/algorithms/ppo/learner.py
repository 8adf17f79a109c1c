"""The optimisation of one iteration: epochs over minibatches of whole prompt groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from align.algorithms.ppo.advantages import Estimated
from align.algorithms.ppo.experience import (
    POLICY,
    VALUE,
    Experience,
    hidden_before,
    sampler_weights,
    values_of,
)
from align.algorithms.ppo.loss import kl_loss, policy_loss, value_loss
from align.algorithms.settings import Ppo
from align.models.logprobs import Row, collate, scored_tokens, token_budget_batches
from align.models.roles import Roles
from align.process_group import Ranks

Sums = dict[str, torch.Tensor]
MEASURED = (
    "policy_loss", "value_loss", "kl_loss", "clipped", "approx_kl", "ratio", "ratio_squared",
)  # fmt: skip
PER_STEP = ("grad_norm", "value_grad_norm")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What each token is learnt from: [N, R] of all answers, or [M] of the tokens of some rows that
    count, one after the other.
    """

    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor

    def of(self, rows: Sequence[int], mask: torch.Tensor, *, device: torch.device) -> "Lesson":
        """The tokens of some rows that `mask` [N, R] counts, in the order in which a forward pass
        gives them.
        """
        where = torch.tensor(rows)
        counted = mask[where]
        parts = {key: value[where][counted].to(device) for key, value in vars(self).items()}
        return Lesson(**parts)


def lesson_of(experience: Experience, estimated: Estimated, *, settings: Ppo) -> Lesson:
    """Of all answers, [N, R] each."""
    return Lesson(
        old_logprobs=experience.passes.logprobs,
        reference_logprobs=experience.passes.reference_logprobs,
        old_values=experience.passes.values,
        advantages=estimated.advantages,
        returns=estimated.returns,
        weights=sampler_weights(experience, settings=settings),
    )


@dataclass(kw_only=True)
class Learner:
    """Steps policy and value function; keeps nothing between iterations but the optimizer."""

    roles: Roles
    settings: Ppo
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    seed: int
    totals: Sums = field(default_factory=dict)

    def learn(
        self, experience: Experience, estimated: Estimated, *, iteration: int
    ) -> dict[str, float]:
        """All epochs; returns what was measured, token by token over all of them.

        1. A fresh permutation of prompt groups each epoch, cut into minibatches.
        2. Each minibatch's rows in micro-batches, shared out among the processes.
        3. Gradients are sums over tokens, divided by the tokens of the whole minibatch, so no
           split of it changes them.
        4. The epochs end before a step from which the policy is already further than `target_kl`.
        """
        measured = {key: 0.0 for key in (*MEASURED, *PER_STEP, "tokens", "steps")}
        warming = iteration < self.settings.critic_warmup and self.settings.value != "none"
        mask, lesson = experience.mask(), lesson_of(experience, estimated, settings=self.settings)
        for epoch in range(self.settings.epochs):
            order = minibatches(
                experience.rollouts.groups, count=self.settings.minibatches,
                key=(self.seed, iteration, epoch),
            )  # fmt: skip
            for rows in order:
                taught = [i for i in rows if bool(mask[i].any())]
                if not taught:
                    continue
                step = self.step(taught, experience.rollouts.rows, lesson, mask, warming=warming)
                for key, value in step.items():
                    measured[key] += value
                if not step["steps"]:
                    return averaged(measured) | {"stopped_early": 1.0}
        return averaged(measured)

    def step(
        self,
        rows: Sequence[int],
        answers: Sequence[Row],
        lesson: Lesson,
        mask: torch.Tensor,
        *,
        warming: bool,
    ) -> dict[str, float]:
        """One optimizer step on the minibatch of `rows`; none, and `steps` 0, where the policy has
        already moved too far.

        Args:
            lesson: [N, R], of all answers.
            mask: [N, R], True where a token counts and teaches.
        """
        tokens = int(mask[rows].sum())
        self.totals = {key: torch.zeros((), device=self.roles.model.device) for key in MEASURED}
        lengths = [len(answers[i]) for i in rows]
        batches = list(token_budget_batches(lengths, budget=self.settings.micro_batch_tokens))
        for batch in batches[self.ranks.index :: self.ranks.count]:
            mine = [rows[i] for i in batch]
            flat = lesson.of(mine, mask, device=self.roles.model.device)
            self.accumulate([answers[i] for i in mine], flat, warming=warming)
        trained = self.trained(warming=warming)
        self.ranks.add_gradients(trained)
        summed = self.ranks.summed(torch.stack([self.totals[key] for key in MEASURED]))
        found = dict(zip(MEASURED, summed.tolist(), strict=True)) | {"tokens": float(tokens)}
        most = self.settings.target_kl
        if most is not None and found["approx_kl"] / tokens > most:
            self.optimizer.zero_grad(set_to_none=True)
            return {**found, "steps": 0.0}
        # Here rather than in the loss: small gradients would vanish in a half precision base.
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= tokens
        norms = self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**found, **norms, "steps": 1.0}

    def clip_gradients(self) -> dict[str, float]:
        """Policy and value function each to the same norm; returns what theirs was."""
        found = {}
        for group in self.optimizer.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if given:
                norm = torch.nn.utils.clip_grad_norm_(given, self.settings.max_grad_norm)
                key = "grad_norm" if group["role"] == POLICY else "value_grad_norm"
                found[key] = float(norm)
        return found

    def trained(self, *, warming: bool) -> list[torch.nn.Parameter]:
        """What a step changes: while the critic warms up, the policy stands still."""
        groups = self.optimizer.param_groups
        chosen = [group for group in groups if not (warming and group["role"] == POLICY)]
        return [parameter for group in chosen for parameter in group["params"]]

    def accumulate(self, answers: Sequence[Row], flat: Lesson, *, warming: bool) -> None:
        """Adds the gradients of some answers, summed over their tokens."""
        device = self.roles.model.device
        packed = collate(answers, device=device)
        given: dict[str, Any] = {
            "input_ids": packed.input_ids, "response_mask": packed.response_mask
        }  # fmt: skip
        loss, values = torch.zeros((), device=device), None
        if not warming:
            with self.roles.role(POLICY) as model:
                found = scored_tokens(model, **given, temperature=self.settings.temperature)
            loss = loss + self.policy_term(found.logprobs, flat)
            if self.settings.value == "trunk":
                values = self.roles.head(VALUE)(found.hidden)
        elif self.settings.value == "trunk":
            with torch.no_grad():  # the trunk is the policy's, which stands still
                hidden = hidden_before(self.roles, POLICY, **given)
            values = self.roles.head(VALUE)(hidden)
        if self.settings.value == "adapter":
            if loss.requires_grad:  # the policy's activations go before the value's come
                torch.autograd.backward(loss)
                loss = torch.zeros((), device=device)
            values = values_of(self.roles, **given)
        if values is not None:
            loss = loss + self.settings.value_coef * self.value_term(values, flat)
        torch.autograd.backward(loss)

    def policy_term(self, logprobs: torch.Tensor, flat: Lesson) -> torch.Tensor:
        """Summed over tokens."""
        surrogate = policy_loss(
            logprobs, flat.old_logprobs, flat.advantages,
            clip=self.settings.clip, dual_clip=self.settings.dual_clip,
        )  # fmt: skip
        loss = (flat.weights * surrogate.loss).sum()
        log_ratio = (logprobs - flat.old_logprobs).detach()
        self.note(
            policy_loss=loss,
            clipped=surrogate.clipped.float().sum(),
            approx_kl=(log_ratio.exp() - 1 - log_ratio).sum(),
            ratio=surrogate.ratio.sum(),
            ratio_squared=(surrogate.ratio**2).sum(),
        )
        if self.settings.kl_loss:
            held = kl_loss(logprobs, flat.reference_logprobs, flat.old_logprobs).sum()
            self.note(kl_loss=held)
            loss = loss + self.settings.kl_loss * held
        return loss

    def value_term(self, values: torch.Tensor, flat: Lesson) -> torch.Tensor:
        """Summed over tokens."""
        loss = value_loss(
            values, flat.old_values, flat.returns, clip=self.settings.value_clip
        ).sum()
        self.note(value_loss=loss)
        return loss

    def note(self, **sums: torch.Tensor) -> None:
        for key, value in sums.items():
            self.totals[key] += value.detach()


def minibatches(groups: torch.Tensor, *, count: int, key: tuple[int, ...]) -> Iterator[list[int]]:
    """Rows of `count` minibatches: prompt groups in an order drawn from `key`, each whole."""
    names = torch.unique(groups).numpy()
    order = numpy.random.default_rng(list(key)).permutation(names)
    for part in numpy.array_split(order, min(count, len(order))):
        yield torch.isin(groups, torch.from_numpy(part)).nonzero()[:, 0].tolist()


def averaged(measured: dict[str, float]) -> dict[str, float]:
    """Means over tokens, and over steps of what is one number a step."""
    tokens, steps = max(measured.pop("tokens"), 1.0), max(measured["steps"], 1.0)
    ratio = measured.pop("ratio") / tokens
    squared = measured.pop("ratio_squared") / tokens
    for key in PER_STEP:
        measured[key] /= steps
    for key in ("policy_loss", "value_loss", "kl_loss", "approx_kl"):
        measured[key] /= tokens
    measured["clip_fraction"] = measured.pop("clipped") / tokens
    measured["ratio_mean"] = ratio
    measured["ratio_std"] = max(squared - ratio**2, 0.0) ** 0.5
    return measured
