"""Reads, at each backward of TRL's PPO trainer, what its own code has computed, and writes a file.

The tensors of the safetensors file (N rows in TRL's order, P prompt, R response, m a minibatch):
- `rollout.*`: the local variables of `PPOTrainer.train` before the first backward, under their
  names there; `queries` [N, P], `responses` [N, R], `query_responses` [N, P + R] as token ids;
  `logprobs`, `ref_logprobs`, `values`, `kl`, `rewards`, `advantages`, `returns` [N, R]; `scores`
  [N] after the penalty for a missing EOS. `padding_mask`: True where nothing counts for the policy;
  `padding_mask_p1`: for the value. `returns - values` are the advantages before whitening.
  Beside them `prompt_mask` [N, P] and `response_mask` [N, R], from lengths: True where a token is.
- `step.K.*` for each minibatch K over all epochs: `rows` [m] of the rollout, `new_logprobs`,
  `vpred`, `ratio` [m, R], and the scalars `pg_loss`, `vf_loss`, `loss`.
- `step.K.grad.NAME`: gradients after its backward; there is no clipping.
- `before.NAME`, `after.NAME`: weights that train, at first and after the last step; `NAME` starts
  with `policy.` (the adapter) or `value_model.`.
- `policy.NAME`: the policy's weights without the adapter, which are the reference's; `reward.NAME`.

The metadata holds `trl`, and as JSON `shape`, `args` (PPOConfig), `lora` and `model` (its config).
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from benchmarks.ppo_setup import Rollouts, Shape

ROLLOUT = (
    "queries", "responses", "query_responses", "sequence_lengths", "padding_mask",
    "padding_mask_p1", "contain_eos_token", "logprobs", "ref_logprobs", "values", "scores", "kl",
    "non_score_reward", "rewards", "advantages", "returns",
)  # fmt: skip
STEP = ("new_logprobs", "vpred", "ratio", "pg_loss", "vf_loss", "loss", "vf_clipfrac")


class Dump:
    """Hooks a trainer, once; `tensors` grows as it trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.tensors: dict[str, Any] = {}
        self.steps = 0

    def hook(self) -> None:
        accelerator, backward = self.trainer.accelerator, self.trainer.accelerator.backward
        self.weights("before")
        frozen = self.trainer.policy_model.named_parameters()
        self.add("policy", {unwrapped(k): v for k, v in frozen if not v.requires_grad})
        self.add("reward", self.trainer.reward_model.state_dict())

        def read(loss: Any, **more: Any) -> None:
            caller = inspect.currentframe().f_back  # type: ignore[union-attr]
            assert caller is not None and caller.f_code is type(self.trainer).train.__code__
            backward(loss, **more)
            self.read(dict(caller.f_locals))

        accelerator.backward = read

    def read(self, local: dict[str, Any]) -> None:
        import torch

        if self.steps == 0:
            self.add("rollout", {name: local[name] for name in ROLLOUT})
        step = f"step.{self.steps}"
        rows = torch.from_numpy(local["micro_batch_inds"])
        self.add(step, {"rows": rows} | {name: local[name] for name in STEP})
        self.add(f"{step}.grad", {k: v.grad for k, v in self.trained().items()})
        self.steps += 1

    def trained(self) -> dict[str, Any]:
        named = self.trainer.model.named_parameters()
        return {unwrapped(name): p for name, p in named if p.requires_grad}

    def weights(self, when: str) -> None:
        self.add(when, self.trained())

    def add(self, prefix: str, tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.tensors[f"{prefix}.{name}"] = tensor.detach().clone().contiguous()

    def write(self, path: Path, shape: Shape, ours: Rollouts) -> dict[str, Any]:
        from safetensors.torch import save_file

        self.weights("after")
        self.add("rollout", self.masks(ours))
        trainer = self.trainer
        told = {
            "shape": dataclasses.asdict(shape),
            "args": trainer.args.to_dict(),
            "lora": trainer.policy_model.peft_config["default"].to_dict(),
            "model": trainer.policy_model.config.to_dict(),
        }
        metadata = {name: json.dumps(value, default=plain) for name, value in told.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, metadata | {"trl": "1.12.0"})
        return {"dump": str(path), "steps": self.steps, "tensors": len(self.tensors)}

    def masks(self, ours: Rollouts) -> dict[str, Any]:
        """Masks from lengths, in TRL's order of rows."""
        import torch

        wanted = self.tensors["rollout.query_responses"].tolist()
        given = torch.cat((ours.prompts, ours.responses), 1).tolist()
        order = torch.tensor([given.index(row) for row in wanted])
        prompts, responses = ours.prompt_lengths[order], ours.response_lengths[order]
        size = (ours.prompts.shape[1], ours.responses.shape[1])
        return {
            "prompt_mask": torch.arange(size[0]) >= size[0] - prompts[:, None],
            "response_mask": torch.arange(size[1]) < responses[:, None],
            "ended": ours.ended[order],
        }


def plain(value: Any) -> Any:
    """What JSON lacks: PEFT has sets and enumerations in its config."""
    return sorted(value) if isinstance(value, set) else str(value)


def unwrapped(name: str) -> str:
    """A parameter's name without what PEFT puts around the model."""
    return name.replace("base_model.model.", "").replace(".base_layer", "")
