"""Rewards from the reward model that shares the policy's base: one more role of it."""

from collections.abc import Sequence

import torch

from align.models.logprobs import Row, collate, default_budget, last_hidden, token_budget_batches
from align.models.roles import Roles
from align.rewards.source import Sample


class RoleReward:
    """The score of the last token of prompt and answer: by length, so the end of turn counts
    whatever padding is.
    """

    def __init__(self, roles: Roles, *, role: str = "reward") -> None:
        self.roles, self.role, self.name = roles, role, role

    @torch.no_grad()
    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        rows = [Row(prompt=s.prompt_ids, completion=s.completion_ids) for s in samples]
        lengths = [len(row) for row in rows]
        found: list[float | None] = [None] * len(rows)
        head = self.roles.head(self.role)
        with self.roles.role(self.role) as model:
            for batch in token_budget_batches(lengths, budget=default_budget(model.device)):
                ids = collate([rows[i] for i in batch], device=model.device).input_ids
                ends = torch.tensor([lengths[i] - 1 for i in batch], device=ids.device)
                hidden = last_hidden(model, ids)[torch.arange(len(batch), device=ids.device), ends]
                for i, score in zip(batch, head(hidden).tolist(), strict=True):
                    found[i] = score
        return found
