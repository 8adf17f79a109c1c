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
    sampler_weights,
    values_of,
)
from align.algorithms.ppo.loss import kl_loss, policy_loss, value_loss
from align.algorithms.settings import Ppo
from align.models.logprobs import collate, scored_tokens, token_budget_batches
from align.models.roles import Roles
from align.process_group import Ranks

Sums = dict[str, torch.Tensor]
MEASURED = (
    "policy_loss", "value_loss", "kl_loss", "clipped", "approx_kl", "ratio", "ratio_squared",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The tokens of some rows that count, one after the other; each [M]."""

    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor


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
        4. The epochs end early when the policy has moved further than `target_kl`.
        """
        measured = {key: 0.0 for key in (*MEASURED, "tokens", "grad_norm", "steps")}
        warming = iteration < self.settings.critic_warmup and self.settings.value != "none"
        for epoch in range(self.settings.epochs):
            order = minibatches(
                experience.rollouts.groups, count=self.settings.minibatches,
                key=(self.seed, iteration, epoch),
            )  # fmt: skip
            for rows in order:
                step = self.step(rows, experience, estimated, warming=warming, first=epoch == 0)
                for key, value in step.items():
                    measured[key] += value
                far = step["approx_kl"] / max(step["tokens"], 1)
                if self.settings.target_kl is not None and far > self.settings.target_kl:
                    measured["stopped_early"] = 1.0
                    return averaged(measured)
        return averaged(measured)

    def step(
        self,
        rows: Sequence[int],
        experience: Experience,
        estimated: Estimated,
        *,
        warming: bool,
        first: bool,
    ) -> dict[str, float]:
        """One optimizer step on the minibatch of `rows`."""
        mask = experience.mask()
        rows = [i for i in rows if bool(experience.taught[i])]
        tokens = int(mask[rows].sum()) if rows else 0
        if tokens == 0:
            return {key: 0.0 for key in (*MEASURED, "tokens", "grad_norm", "steps")}
        trained = self.trained(warming=warming)
        self.totals = {key: torch.zeros((), device=self.roles.model.device) for key in MEASURED}
        lengths = [len(experience.rollouts.rows[i]) for i in rows]
        batches = list(token_budget_batches(lengths, budget=self.settings.micro_batch_tokens))
        for batch in batches[self.ranks.index :: self.ranks.count]:
            mine = [rows[i] for i in batch]
            self.accumulate(mine, experience, estimated, tokens=tokens, warming=warming)
        self.ranks.add_gradients(trained)
        norm = 0.0
        for group in self.optimizer.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if given:
                norm += float(torch.nn.utils.clip_grad_norm_(given, self.settings.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        summed = self.ranks.summed(torch.stack([self.totals[key] for key in MEASURED]))
        found = dict(zip(MEASURED, summed.tolist(), strict=True))
        return {**found, "tokens": float(tokens), "grad_norm": norm, "steps": 1.0}

    def trained(self, *, warming: bool) -> list[torch.nn.Parameter]:
        """What a step changes: while the critic warms up, the policy stands still."""
        groups = self.optimizer.param_groups
        chosen = [group for group in groups if not (warming and group["role"] == POLICY)]
        return [parameter for group in chosen for parameter in group["params"]]

    def accumulate(
        self,
        rows: Sequence[int],
        experience: Experience,
        estimated: Estimated,
        *,
        tokens: int,
        warming: bool,
    ) -> None:
        """Adds the gradients of some rows of a minibatch of `tokens` tokens."""
        device = self.roles.model.device
        flat = flattened(rows, experience, estimated, settings=self.settings, device=device)
        packed = collate([experience.rollouts.rows[i] for i in rows], device=device)
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
            with torch.no_grad(), self.roles.role(POLICY) as model:
                hidden = scored_tokens(model, **given).hidden
            values = self.roles.head(VALUE)(hidden)
        if self.settings.value == "adapter":
            if loss.requires_grad:  # the policy's activations go before the value's come
                torch.autograd.backward(loss / tokens)
                loss = torch.zeros((), device=device)
            values = values_of(self.roles, **given)
        if values is not None:
            loss = loss + self.settings.value_coef * self.value_term(values, flat)
        torch.autograd.backward(loss / tokens)

    def policy_term(self, logprobs: torch.Tensor, flat: Flat) -> torch.Tensor:
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

    def value_term(self, values: torch.Tensor, flat: Flat) -> torch.Tensor:
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


def flattened(
    rows: Sequence[int],
    experience: Experience,
    estimated: Estimated,
    *,
    settings: Ppo,
    device: torch.device,
) -> Flat:
    """The rows' tokens in the order in which a forward pass gives them."""
    where = torch.tensor(rows)
    mask = experience.mask()[where]

    def chosen(values: torch.Tensor) -> torch.Tensor:
        return values[where][mask].to(device)

    return Flat(
        old_logprobs=chosen(experience.passes.logprobs),
        reference_logprobs=chosen(experience.passes.reference_logprobs),
        old_values=chosen(experience.passes.values),
        advantages=chosen(estimated.advantages),
        returns=chosen(estimated.returns),
        weights=chosen(sampler_weights(experience, settings=settings)),
    )


def averaged(measured: dict[str, float]) -> dict[str, float]:
    """Means over tokens, and over steps of what is one number a step."""
    tokens, steps = max(measured.pop("tokens"), 1.0), max(measured["steps"], 1.0)
    ratio = measured.pop("ratio") / tokens
    squared = measured.pop("ratio_squared") / tokens
    measured["grad_norm"] /= steps
    for key in ("policy_loss", "value_loss", "kl_loss", "approx_kl"):
        measured[key] /= tokens
    measured["clip_fraction"] = measured.pop("clipped") / tokens
    measured["ratio_mean"] = ratio
    measured["ratio_std"] = max(squared - ratio**2, 0.0) ** 0.5
    return measured
