"""Training on pairs: the same gradient however a batch is split, the same end however often it is
killed.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from align.algorithms import checkpoints, dpo
from align.algorithms import fit as fitting
from align.algorithms.dpo_loss import PairLogprobs
from align.algorithms.pairs import GlobalBatchSampler, PairData, PairRows, collate_pairs
from align.algorithms.policy_objective import collapsed, values
from align.algorithms.preference_trainer import Policy, PreferenceTrainer, Results
from align.algorithms.settings import Dpo
from align.errors import ConfigError, StageError
from align.models.adapters import add_lora, load_adapter, without_adapter
from align.models.load import load_model
from align.models.logprobs import sequence_logprobs
from align.models.settings import Lora, Model

SETTINGS = Dpo(
    name="dpo",
    module=None,
    epochs=2,
    batch_size=4,
    micro_batch_size=4,
    learning_rate=1e-2,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    optimizer="adamw",
    gradient_checkpointing=False,
    held_out=0.2,
    evaluations=3,
    max_drop=50.0,
    loss="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    soft_labels=True,
    offset=0.0,
)


def rows(count: int) -> Any:
    draw = numpy.random.default_rng(5)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(5, 1024, draw.integers(low, high)).tolist()

    made = []
    for i in range(count):
        prompt, chosen, rejected = ids(3, 20), [*ids(0, 12), 1], [*ids(0, 12), 1]
        length = len(prompt) + max(len(chosen), len(rejected))
        made.append(
            {
                "id": str(i),
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "length": length,
                "p": float(draw.choice([0.6, 0.8, 1.0])),
            }
        )
    return Dataset.from_list(made)


def scored(base: Any, *, train: int = 18, held_out: int = 6) -> PairData:
    """Random pairs with the base's own log-probabilities as reference."""
    table = rows(train + held_out)
    batch = collate_pairs(
        [{**row, "reference_chosen": 0.0, "reference_rejected": 0.0} for row in table]
    )
    with torch.no_grad():
        found = sequence_logprobs(
            base, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
        )
    chosen, rejected = found.chunk(2)

    def view(indices: range) -> PairRows:
        return PairRows(table, chosen=chosen, rejected=rejected, indices=list(indices))

    return PairData(train=view(range(train)), held_out=view(range(train, train + held_out)), seed=3)


def train(model: Model, lora: Lora, out: Path, *, settings: Dpo = SETTINGS) -> None:
    out.mkdir(exist_ok=True)
    base = load_model(model)
    data = scored(base)
    policy = Policy(model=add_lora(base, settings=lora, seed=1), tokenizer=None, reference="base")
    dpo.train(policy, data, settings=settings, out=out)


def left(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def curves(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


def test_a_tie_of_the_judge_is_half_right_however_it_is_ranked() -> None:
    ahead = torch.tensor([2.0, 2.0, -2.0, 0.0])
    nothing, one = torch.zeros(4), torch.ones(4)
    pairs = PairLogprobs(
        policy_chosen=ahead, policy_rejected=nothing, reference_chosen=nothing,
        reference_rejected=nothing, chosen_length=one, rejected_length=one, margin=nothing,
    )  # fmt: skip
    results = Results(loss=nothing, chosen_reward=ahead, rejected_reward=nothing)
    found = values(pairs, results, p=torch.tensor([0.6, 0.5, 0.5, 1.0]))
    assert found["accuracy"].tolist() == [1.0, 0.5, 0.5, 0.5]


def test_pairs_are_learnt_and_nothing_that_runs_code_is_left(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    train(tiny, lora, tmp_path, settings=replace(SETTINGS, epochs=8))
    steps = [line for line in curves(tmp_path) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(numpy.log(2), abs=1e-3)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert steps[-1]["loss"] < 0.6 and steps[-1]["accuracy"] >= 0.75
    assert sorted(left(tmp_path)) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "counts.json",
        "curves.jsonl",
        "metrics.json",
    ]
    timed = {
        key for line in curves(tmp_path) for key in line if "runtime" in key or "second" in key
    }
    assert not timed


def test_the_kept_adapter_is_the_best_measurements(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    train(tiny, lora, tmp_path)
    measured = [line for line in curves(tmp_path) if "eval_accuracy" in line]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(measured) == 3
    kept = checkpoints.best(measured, pairs=6)
    assert metrics["train/best_step"] == kept["step"]
    assert metrics["train/held_out_accuracy"] == kept["eval_accuracy"]
    base = load_model(tiny)
    data = scored(base)
    policy = load_adapter(base, tmp_path / "adapter")
    batch = collate_pairs([data.held_out[i] for i in range(len(data.held_out))])
    chosen, rejected = sequence_logprobs(
        policy, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
    ).chunk(2)
    margin = 0.1 * (chosen - batch["reference_chosen"] - rejected + batch["reference_rejected"])
    assert margin.mean().item() == pytest.approx(metrics["train/held_out_margin"], abs=1e-5)


@pytest.mark.parametrize(
    ("accuracies", "pairs", "kept"),
    [
        # One standard error of 0.8 is 0.04 with 100 pairs and 0.02 with 400.
        ([0.7, 0.8, 0.77], 100, 2),
        ([0.7, 0.8, 0.77], 400, 1),
        ([40 / 40, 39 / 40], 40, 1),  # one pair is no evidence
        ([40 / 40, 38 / 40], 40, 0),
        ([0.9, 0.875, 0.85, 0.82], 100, 0),  # nor do small steps add up to a free fall
        ([0.8, 0.9, 0.9], 1000, 2),
    ],
)
def test_the_newest_is_kept_unless_an_earlier_one_is_better_by_more_than_noise(
    accuracies: list[float], pairs: int, kept: int
) -> None:
    logged: list[dict[str, float]] = [
        {"step": i, "eval_accuracy": accuracy} for i, accuracy in enumerate(accuracies)
    ]
    logged.insert(1, {"step": 1, "loss": 0.1})
    assert checkpoints.best(logged, pairs=pairs)["step"] == kept


def test_what_is_best_later_was_not_removed_before() -> None:
    draw = numpy.random.default_rng(0)
    for _ in range(300):
        logged = [{"step": i, "eval_accuracy": draw.uniform(0.7, 0.9)} for i in range(6)]
        standing: set[float] = set()
        for count in range(1, 7):
            standing.add(count - 1)
            kept = checkpoints.newest_and_top(logged[:count])
            standing &= {line["step"] for line in kept}
            assert checkpoints.best(logged[:count], pairs=50)["step"] in standing


@pytest.mark.parametrize("micro", [1, 2])
def test_the_split_into_micro_batches_changes_nothing(
    micro: int, tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    # A learning rate at which Adam does not blow the rounding of near-zero gradients up.
    settings = replace(SETTINGS, learning_rate=1e-3)
    train(tiny, lora, tmp_path / "whole", settings=settings)
    train(tiny, lora, tmp_path / "split", settings=replace(settings, micro_batch_size=micro))
    for one, other in zip(curves(tmp_path / "whole"), curves(tmp_path / "split"), strict=True):
        # At first every margin is zero but for rounding, whose sign is a coin.
        known = {key: value for key, value in one.items() if "accuracy" not in key}
        assert known == pytest.approx({key: other[key] for key in known}, rel=1e-3, abs=1e-3)


class Killed(BaseException):
    """As sudden as SIGKILL, but within this process."""


@pytest.mark.parametrize("moment", ["step 2", "step 6", "save 5", "mark", "close"])
def test_a_killed_run_ends_bit_identical(
    moment: str, tiny: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = replace(lora, dropout=0.1)
    train(tiny, dropping, tmp_path / "whole")

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    class Killer(fitting.Conductor):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control)
            if moment == f"step {state.global_step}":
                raise Killed

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if moment == f"save {state.global_step}":
                raise Killed  # all files are there, the mark is not
            super().on_save(args, state, control)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Conductor", Killer)
        if moment == "mark":
            patch.setattr(checkpoints, "keep_only", die)
        if moment == "close":
            patch.setattr(checkpoints, "export_adapter", die)
        with pytest.raises(Killed):
            train(tiny, dropping, tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter").exists()
    train(tiny, dropping, tmp_path / "killed")
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_a_half_removed_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    (tmp_path / "checkpoint-8" / checkpoints.COMPLETE).unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-4"
    checkpoints.remove_incomplete(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_training_of_one_step_is_not_all_warm_up(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    train(tiny, lora, tmp_path, settings=replace(SETTINGS, batch_size=18, epochs=1))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for key, value in weights.items() if "lora_B" in key)


def test_too_few_pairs_name_the_setting(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"algorithm\.batch_size=32.*18 training pairs"):
        train(tiny, lora, tmp_path, settings=replace(SETTINGS, batch_size=32))


def test_an_offset_without_margins_is_refused(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no pair has a margin"):
        train(tiny, lora, tmp_path, settings=replace(SETTINGS, offset=1.0))


def test_a_collapse_is_named_with_its_remedy(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    wild = replace(SETTINGS, learning_rate=0.3, max_drop=0.01, epochs=4)
    with pytest.raises(StageError, match=r"collapsed.*algorithm\.max_drop=0\.01.*learning_rate"):
        train(tiny, lora, tmp_path, settings=wild)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"grad_norm": float("inf")}, "grad_norm is inf"),
        ({"chosen_drop_per_token": 1.2}, "chosen answers lost 1.20 nats per token"),
        ({"rejected_drop_per_token": 4.9}, None),
        ({"rejected_drop_per_token": 5.1}, "rejected answers lost 5.10 .* 5 times algorithm.max_"),
    ],
)
def test_a_run_is_given_up_when_numbers_answers_or_margins_run_away(
    change: dict[str, float], says: str | None
) -> None:
    well = {"loss": 0.4, "grad_norm": 2.0, "chosen_drop_per_token": 0.1}
    found = collapsed({**well, "rejected_drop_per_token": 0.5, **change}, max_drop=1.0)
    assert (found is None) == (says is None)
    assert says is None or re.match(says, found or "")


def test_a_loss_that_is_no_number_ends_the_run(
    tiny: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.algorithms import dpo_loss

    def broken(pairs: PairLogprobs, *, beta: float, q: torch.Tensor) -> torch.Tensor:
        return pairs.policy_chosen * float("nan")

    monkeypatch.setitem(dpo_loss.LOSSES, "sigmoid", broken)
    with pytest.raises(StageError, match=r"collapsed at step 1: loss is nan"):
        train(tiny, lora, tmp_path)


@pytest.mark.parametrize(
    ("wanted", "processes", "expected"), [(4, 1, 4), (3, 1, 2), (8, 2, 2), (1, 4, 1)]
)
def test_a_micro_batch_that_does_not_divide_is_lowered(
    wanted: int, processes: int, expected: int
) -> None:
    settings = replace(SETTINGS, batch_size=4 if wanted < 8 else 8, micro_batch_size=wanted)
    settings = replace(settings, batch_size=4, micro_batch_size=min(wanted, 4))
    assert fitting.micro_batch(settings, processes) == expected


def test_processes_that_cannot_share_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.batch_size=4: .* among 3 processes"):
        fitting.micro_batch(SETTINGS, 3)


class TestSampler:
    lengths = numpy.random.default_rng(0).integers(5, 90, 50)

    def sampler(self, epoch: int = 0) -> GlobalBatchSampler:
        return GlobalBatchSampler(self.lengths, batch_size=12, seed=7, epoch=lambda: epoch)

    def batches(self, sampler: GlobalBatchSampler) -> Iterator[list[int]]:
        order = list(sampler)
        return (order[i : i + 12] for i in range(0, len(order), 12))

    def test_an_epoch_has_whole_batches_and_no_row_twice(self) -> None:
        order = list(self.sampler())
        assert len(order) == len(self.sampler()) == 48 == len(set(order))

    def test_a_batch_is_sorted_by_length(self) -> None:
        for batch in self.batches(self.sampler()):
            assert (numpy.diff(self.lengths[batch]) <= 0).all()

    def test_epochs_differ_and_repeat_with_the_seed(self) -> None:
        assert list(self.sampler(0)) == list(self.sampler(0)) != list(self.sampler(1))

    @pytest.mark.parametrize("processes", [2, 3])
    def test_any_number_of_processes_sees_the_same_rows_in_a_step(self, processes: int) -> None:
        from accelerate.data_loader import BatchSamplerShard
        from torch.utils.data import BatchSampler

        micro = 2
        shards = [
            list(
                BatchSamplerShard(
                    BatchSampler(self.sampler(), micro, drop_last=False), processes, rank
                )
            )
            for rank in range(processes)
        ]
        accumulation = 12 // (micro * processes)
        for step, batch in enumerate(self.batches(self.sampler())):
            mine = slice(step * accumulation, (step + 1) * accumulation)
            seen = [row for shard in shards for rows in shard[mine] for row in rows]
            assert sorted(seen) == sorted(batch)


class TestQuantizedBase:
    """The traps of 4-bit training that raise no error."""

    def policy(self, settings: Model, lora: Lora, *, spread: float = 0.05) -> Any:
        policy = add_lora(load_model(settings), settings=lora, seed=1)
        torch.manual_seed(2)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=spread)
        return policy

    def gradient(self, policy: Any) -> torch.Tensor:
        policy.zero_grad()
        batch = collate_pairs(
            [{**row, "reference_chosen": 0.0, "reference_rejected": 0.0} for row in rows(4)]
        )
        found = sequence_logprobs(
            policy, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
        )
        chosen, rejected = found.chunk(2)
        (chosen - rejected).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]).clone()

    def test_adapters_are_float32_and_move_at_a_learning_rate_of_1e_6(
        self, tiny_nf4: Model, lora: Lora
    ) -> None:
        policy = self.policy(tiny_nf4, lora)
        trained = [p for p in policy.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        before = [p.detach().clone() for p in trained]
        self.gradient(policy)
        torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0).step()
        moved = [(p != old).float().mean().item() for p, old in zip(trained, before, strict=True)]
        assert min(moved) > 0.9

    def test_a_measurement_without_gradients_leaves_the_gradient_alone(
        self, tiny_nf4: Model, lora: Lora
    ) -> None:
        """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights then, and backward loses
        them.
        """
        policy = self.policy(tiny_nf4, lora)
        before = self.gradient(policy)
        policy.eval()
        with torch.no_grad():
            policy(input_ids=torch.tensor([[5, 6, 7, 8]]))
        policy.train()
        torch.testing.assert_close(self.gradient(policy), before, rtol=0, atol=0)

    def test_recomputed_activations_train_the_same(
        self, tiny_nf4: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        calls = {"forward": 0}
        forward = LlamaMLP.forward

        def counting(self: Any, x: torch.Tensor) -> Any:
            calls["forward"] += 1
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", counting)
        settings, counts = replace(SETTINGS, epochs=1, evaluations=1), []
        for recomputes in (False, True):
            calls["forward"] = 0
            out = tmp_path / str(recomputes)
            train(
                tiny_nf4, lora, out, settings=replace(settings, gradient_checkpointing=recomputes)
            )
            counts.append(calls["forward"])
        steps = 18 // SETTINGS.batch_size
        assert counts[1] - counts[0] == 2 * steps, "both layers once more in every step"
        for here, there in zip(curves(tmp_path / "False"), curves(tmp_path / "True"), strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)

    def test_without_its_adapter_the_policy_is_the_base(self, tiny_nf4: Model, lora: Lora) -> None:
        ids = torch.tensor([[5, 6, 7, 8, 1]])
        base = load_model(tiny_nf4)
        expected = base(input_ids=ids).logits
        policy = self.policy(tiny_nf4, lora)
        with torch.no_grad():
            with without_adapter(policy):
                torch.testing.assert_close(policy(input_ids=ids).logits, expected, rtol=0, atol=0)
            assert (policy(input_ids=ids).logits - expected).abs().max() > 0.01

    def test_training_never_touches_the_base_and_plain_peft_loads_the_result(
        self, tiny_nf4: Model, lora: Lora, tmp_path: Path
    ) -> None:
        from peft import PeftModel

        base = load_model(tiny_nf4)
        data = scored(base)
        state = base.state_dict()
        packed = {k: v.clone() for k, v in state.items() if v.dtype == torch.uint8}
        policy = Policy(
            model=add_lora(base, settings=lora, seed=1), tokenizer=None, reference="base"
        )
        dpo.train(policy, data, settings=replace(SETTINGS, evaluations=1), out=tmp_path)
        after = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items()}
        assert sum(key.endswith(".weight") for key in packed) == 14
        assert all(torch.equal(value, after[key]) for key, value in packed.items())
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
        ids = torch.tensor([[5, 6, 7, 8, 1, 9]])
        fresh = PeftModel.from_pretrained(load_model(tiny_nf4), str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            here = policy.model.eval()(input_ids=ids).logits
            torch.testing.assert_close(fresh(input_ids=ids).logits, here, rtol=1e-5, atol=1e-5)


def test_the_trainers_gradient_is_the_mean_over_pairs(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    """One step by hand: the summed loss of the batch divided by its pairs."""
    seen: dict[str, torch.Tensor] = {}

    class Spy(PreferenceTrainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            if not seen:
                seen.update(
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
                )
                seen["rows"] = torch.tensor(list(self._get_train_sampler())[:4])
            return super()._clip_grad_norm(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "PreferenceTrainer", Spy)
        train(tiny, lora, tmp_path, settings=replace(SETTINGS, micro_batch_size=2))
    base = load_model(tiny)
    data = scored(base)
    policy = add_lora(base, settings=lora, seed=1)
    total = torch.zeros(())
    for row in seen.pop("rows").tolist():
        batch = collate_pairs([data.train[row]])
        chosen, rejected = sequence_logprobs(
            policy, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
        )
        ratio = chosen - batch["reference_chosen"] - rejected + batch["reference_rejected"]
        p = batch["p"]
        total = total - (
            p * torch.sigmoid(0.1 * ratio).log() + (1 - p) * torch.sigmoid(-0.1 * ratio).log()
        )
    (total / 4).sum().backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-6)
