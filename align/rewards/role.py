"""Rewards from the reward model that shares the policy's base: one more role of it."""

from collections.abc import Sequence

import torch

from align.models.implicit import implicit_reward
from align.models.logprobs import (
    Batch,
    Row,
    collate,
    default_budget,
    last_hidden,
    sequence_logprobs,
    token_budget_batches,
)
from align.models.roles import Roles
from align.rewards.source import Sample


class RoleReward:
    """With a head, its score of the last token of prompt and answer: by length, so the end of turn
    counts whatever padding is. Without one, the implicit reward against the bare base.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        role: str = "reward",
        beta: float | None = None,
        budget: int | None = None,
    ) -> None:
        """
        Args:
            beta: of an implicit reward; None: the role has a head.
            budget: padded tokens of a forward pass; None: what suits the device.
        """
        self.roles, self.role, self.name, self.beta = roles, role, role, beta
        self.budget = budget or default_budget(roles.model.device)
        self.bare = f"{role}_base"
        if beta is not None:
            roles.bind(self.bare)

    @torch.no_grad()
    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        rows = [Row(prompt=s.prompt_ids, completion=s.completion_ids) for s in samples]
        lengths = [len(row) for row in rows]
        found: list[float | None] = [None] * len(rows)
        device = self.roles.model.device
        for batch in token_budget_batches(lengths, budget=self.budget):
            mine = [rows[i] for i in batch]
            packed = collate(mine, device=device)
            if self.beta is None:
                read = self.at_the_end(packed, mine)
            else:
                read = self.implicit(packed, [samples[i].base_logprob for i in batch])
            for i, score in zip(batch, read.tolist(), strict=True):
                found[i] = score
        return found

    def at_the_end(self, batch: Batch, rows: Sequence[Row]) -> torch.Tensor:
        """What the head says of each row's last token, [B]."""
        ids = batch.input_ids
        ends = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        with self.roles.role(self.role) as model:
            hidden = last_hidden(model, ids)[torch.arange(len(rows), device=ids.device), ends]
        found: torch.Tensor = self.roles.head(self.role)(hidden)
        return found

    def implicit(self, batch: Batch, known: Sequence[float | None]) -> torch.Tensor:
        """How much more probable than the base the role makes each answer, times beta, [B]; the
        base runs only where what it says is not known.
        """
        assert self.beta is not None
        policy = self.logprobs(self.role, batch)
        said = [value for value in known if value is not None]
        if len(said) == len(known):
            reference = torch.tensor(said, device=policy.device)
        else:
            reference = self.logprobs(self.bare, batch)
        return implicit_reward(policy, reference, beta=self.beta)

    def logprobs(self, role: str, batch: Batch) -> torch.Tensor:
        with self.roles.role(role) as model:
            return sequence_logprobs(
                model, input_ids=batch.input_ids, response_mask=batch.response_mask
            )
