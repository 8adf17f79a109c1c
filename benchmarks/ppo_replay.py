"""TRL's dump, read; and our roles and rollouts with its weights and tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ppo_ours
from benchmarks.ppo_setup import Shape, config


@dataclass(frozen=True, kw_only=True)
class Dumped:
    """A dump's tensors, and what TRL was told."""

    tensors: dict[str, Any]
    args: dict[str, Any]
    lora: dict[str, Any]
    shape: Shape

    def under(self, prefix: str) -> dict[str, Any]:
        start = f"{prefix}."
        found = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        assert found, f"the dump has no {prefix}"
        return found

    @property
    def steps(self) -> int:
        return 1 + max(int(k.split(".")[1]) for k in self.tensors if k.startswith("step."))


def read(path: Path) -> Dumped:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = {k: json.loads(v) for k, v in file.metadata().items() if k != "trl"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Dumped(
        tensors=tensors, args=told["args"], lora=told["lora"],
        shape=Shape(**told["shape"]),
    )  # fmt: skip


# Our side of it.


class Replay:
    """Our roles with the dump's weights, and our rollouts of its tokens."""

    def __init__(self, dumped: Dumped) -> None:
        import torch

        from align.algorithms.ppo.experience import passes
        from align.algorithms.ppo.learner import MEASURED, Learner
        from align.process_group import Ranks

        args = dumped.args
        self.dumped = dumped
        self.settings = ppo_ours.settings(
            value="adapter", temperature=args["temperature"] + 1e-7, beta=args["kl_coef"],
            gamma=args["gamma"], lam=args["lam"], clip=args["cliprange"],
            value_clip=args["cliprange_value"], value_coef=args["vf_coef"], samples=1,
            truncated="bootstrap",  # which asks for V behind the last token
        )  # fmt: skip
        self.roles = roles_of(dumped)
        self.rollouts = rollouts_of(dumped)
        self.mask = self.rollouts.response_mask()
        self.passes = passes(self.roles, self.rollouts, settings=self.settings)
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.trained()], lr=args["learning_rate"], weight_decay=0.0
        )
        self.learner = Learner(
            roles=self.roles, settings=self.settings, optimizer=self.optimizer, seed=0,
            ranks=Ranks(index=0, count=1, device=torch.device("cpu")),
            totals={key: torch.zeros(()) for key in MEASURED},
        )  # fmt: skip

    def trained(self) -> Iterator[tuple[str, Any]]:
        """Parameters under the dump's names."""
        named = dict(self.roles.model.named_parameters())
        for name, parameter in named.items():
            if ".lora_" in name:
                bare = name.replace("base_model.model.", "", 1)
                yield "policy." + bare.replace(".policy.", ".default."), parameter
        value = self.roles.bound["value"]
        for name, parameter in value.model.named_parameters():
            if "lm_head" not in name:
                yield f"value_model.{name}", parameter
        yield "value_model.score.weight", self.roles.head("value").weight

    def seen(self, name: str) -> Any:
        """Of the dump's rollout, cut to the width of ours."""
        found = self.dumped.tensors[f"rollout.{name}"]
        return found[:, : self.mask.shape[1]] if found.ndim == 2 else found


def roles_of(dumped: Dumped) -> Any:
    """The reference is the base, the policy an adapter on it; reward and value have models of their
    own, as TRL's have.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from align.models.roles import Head, Role, Roles

    def model(state: dict[str, Any]) -> Any:
        made = AutoModelForCausalLM.from_config(config(dumped.shape))
        odd = made.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
        assert not odd.unexpected_keys and set(odd.missing_keys) <= {"lm_head.weight"}, odd
        return made.eval()

    def scorer(state: dict[str, Any], *, trains: bool) -> Any:
        head = Head(state.pop("score.weight"))
        head.bias.requires_grad_(False)
        head.weight.requires_grad_(trains)
        return Role(model=model(state).requires_grad_(trains), head=head)

    roles = Roles(model(dumped.under("policy")))
    lora = {k: dumped.lora[k] for k in ("r", "lora_alpha", "target_modules", "task_type")}
    state = {
        "base_model.model." + key.replace(".default.", "."): value
        for key, value in dumped.under("before.policy").items()
    }
    roles.put("policy", LoraConfig(**lora), state)
    roles.settle("policy", None, trained=True)
    roles.bind("reference")
    roles.bound["reward"] = scorer(dumped.under("reward"), trains=False)
    roles.bound["value"] = scorer(
        dumped.under("reward") | dumped.under("before.value_model"), trains=True
    )
    assert torch.is_grad_enabled()
    return roles


def rollouts_of(dumped: Dumped) -> Any:
    import torch

    from align.algorithms.ppo.rollout import Rollouts
    from align.models.logprobs import Row

    seen = dumped.under("rollout")
    rows = [
        Row(prompt=tuple(prompt[there].tolist()), completion=tuple(response[counts].tolist()))
        for prompt, there, response, counts in zip(
            seen["queries"], seen["prompt_mask"], seen["responses"], seen["response_mask"],
            strict=True,
        )
    ]  # fmt: skip
    return Rollouts(
        rows=rows,
        groups=torch.arange(len(rows)),
        ended=seen["ended"],
        sampler_logprobs=torch.zeros(len(rows), max(len(row.completion) for row in rows)),
    )


# In TRL's shape.


def longer_mask(replay: Replay) -> Any:
    """[N, R], the mask with the slot behind the end, where there is room for one."""
    import torch

    lengths = replay.mask.sum(-1)
    return torch.arange(replay.mask.shape[1])[None] <= lengths[:, None]


def longer_values(replay: Replay) -> Any:
    """[N, R], ours, and V of the state behind the end in the slot behind it."""
    found = replay.passes.values.clone()
    behind = longer_mask(replay) & ~replay.mask
    found[behind] = replay.passes.behind[behind.any(-1)]
    return found


def flat(replay: Replay, rows: list[int], mask: Any) -> Any:
    """TRL's own figures at the tokens of `mask`."""
    import torch

    from align.algorithms.ppo.learner import Lesson

    def chosen(name: str) -> Any:
        return replay.seen(name)[rows][mask]

    return Lesson(
        old_logprobs=chosen("logprobs"),
        reference_logprobs=chosen("ref_logprobs"),
        old_values=chosen("values"),
        advantages=chosen("advantages"),
        returns=chosen("returns"),
        weights=torch.ones(int(mask.sum())),
    )


def longer_step_values(replay: Replay, rows: list[Any]) -> Any:
    """[M], V at the tokens that count and in the slot behind the end, where there is room."""
    from align.algorithms.ppo.experience import values_of
    from align.models.logprobs import Row, collate

    width = replay.mask.shape[1]
    grown = [
        Row(prompt=row.prompt, completion=(*row.completion, 0)[:width]) for row in rows
    ]  # what stands in the slot is not looked at: a value is of the state before its token
    batch = collate(grown)
    return values_of(replay.roles, input_ids=batch.input_ids, response_mask=batch.response_mask)


def clipped_by_trl(replay: Replay, rows: list[int], mask: Any, ratio: Any) -> float:
    """How many tokens TRL's loss takes the clipped ratio for (lines 839-841)."""
    advantages, clip = replay.seen("advantages")[rows], replay.settings.clip
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return float(((held > free) & mask).sum())
