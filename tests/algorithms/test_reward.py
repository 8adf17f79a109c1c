"""The reward model's training: TRL's loss and gradients, and the same end however it is killed."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaAttention

from align.algorithms import fit as fitting
from align.algorithms import reward
from align.algorithms.dpo_loss import sigmoid_loss
from align.algorithms.pairs import PairRows, collate_pairs
from align.algorithms.policy_objective import pair_logprobs
from align.algorithms.preference_trainer import Policy
from align.algorithms.reward_loss import bradley_terry
from align.algorithms.settings import Reward
from align.errors import StageError
from align.models.adapters import add_lora
from align.models.chat import encode_pair
from align.models.classifier import load_classifier, load_reward_model, score_adapter, scores
from align.models.load import load_model, load_tokenizer
from align.models.settings import Lora, Model
from tests.algorithms.test_fit import Killed, left, scored
from tests.algorithms.test_fit import curves as read_curves
from tests.algorithms.test_trl_oracle import gradients, records

SETTINGS = Reward(
    name="reward",
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
    score="head",
    beta=0.1,
    label_smoothing=0.0,
    soft_labels=True,
    margin=0.0,
    centre=0.01,
)


def loss(chosen: float, rejected: float, **changes: float) -> float:
    known = {"q": 1.0, "margin": 0.0, "scale": 0.0, "centre": 0.0, **changes}
    tensors = {key: torch.tensor([known[key]]) for key in ("q", "margin")}
    return bradley_terry(
        torch.tensor([chosen]), torch.tensor([rejected]), scale=known["scale"],
        centre=known["centre"], **tensors,
    ).item()  # fmt: skip


class TestLoss:
    def test_equal_scores_cost_a_coin_flip(self) -> None:
        assert loss(3.0, 3.0) == pytest.approx(0.693147, abs=1e-6)

    def test_a_lead_of_ln_3_costs_ln_4_thirds(self) -> None:
        """sigmoid(ln 3) = 3/4."""
        assert loss(1.098612, 0.0) == pytest.approx(0.287682, abs=1e-5)

    def test_only_the_difference_counts_unless_scores_are_centred(self) -> None:
        assert loss(2.0, 1.0) == pytest.approx(loss(102.0, 101.0), abs=1e-5)
        assert loss(2.0, 1.0, centre=0.1) - loss(2.0, 1.0) == pytest.approx(0.9, abs=1e-5)
        assert loss(0.5, -0.5, centre=0.1) == pytest.approx(loss(0.5, -0.5))

    def test_a_margin_is_a_lead_that_costs_nothing(self) -> None:
        assert loss(2.5, 0.0, margin=5.0, scale=0.5) == pytest.approx(loss(0.0, 0.0), abs=1e-6)

    def test_a_soft_label_is_met_where_the_odds_are_its_own(self) -> None:
        """The minimum lies at d = logit(q): 0.8 to 0.2 is 4 to 1."""
        d = torch.tensor([1.386294], requires_grad=True)
        q, nothing = torch.tensor([0.8]), torch.zeros(1)
        bradley_terry(d, nothing, q=q, margin=nothing, scale=0.0, centre=0.0).sum().backward()
        assert d.grad is not None and abs(d.grad.item()) < 1e-5

    def test_a_tie_pulls_scores_together(self) -> None:
        assert loss(1.0, 0.0, q=0.5) == pytest.approx(loss(0.0, 1.0, q=0.5))
        assert loss(1.0, 0.0, q=0.5) > loss(0.0, 0.0, q=0.5)


def trl_trainer(ours: Any, base: Any, tokenizer: Any, *, margins: bool, out: Path) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {
            "prompt": [m.to_json() for m in record.messages],
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
            **({"margin": 0.7 * i} if margins else {}),
        }
        for i, record in enumerate(records("unequal lengths"))
    ]
    args = RewardConfig(
        output_dir=str(out),
        center_rewards_coefficient=0.05,
        max_length=200,
        use_cpu=True,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(ours.peft_config["default"]),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(ours))
    return trainer


@pytest.mark.parametrize("margins", [False, True])
def test_loss_and_gradients_of_adapter_and_head_are_trls(
    margins: bool, tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny)
    ours = score_adapter(load_classifier(tiny, seed=0), settings=lora, seed=0)
    torch.manual_seed(1)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    base = load_classifier(tiny, seed=5)
    trainer = trl_trainer(ours, base, tokenizer, margins=margins, out=tmp_path)
    rows = list(trainer.train_dataset)
    for row, record in zip(rows, records("unequal lengths"), strict=True):
        pair = encode_pair(tokenizer, record, max_length=200)
        # It ends after what the template puts behind the end of turn, we at the end of turn.
        assert [*pair.prompt, *pair.chosen] == row["chosen_ids"][: len(pair.prompt + pair.chosen)]
    batch = trainer.data_collator(rows)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    found = scores(ours, input_ids=batch["input_ids"], lengths=batch["attention_mask"].sum(1))
    chosen, rejected = found.chunk(2)
    mine = bradley_terry(
        chosen, rejected, q=torch.ones(len(rows)), scale=1.0, centre=0.05,
        margin=batch.get("margin", torch.zeros(len(rows))),
    ).mean()  # fmt: skip
    mine.backward()
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs, own = gradients(trainer.model), gradients(ours)
    assert own.keys() == theirs.keys() and len(own) == 29
    for name, gradient in own.items():
        scale = theirs[name].norm() + 1e-12
        assert (gradient - theirs[name]).norm() <= 1e-4 * scale, name


def train(model: Model, lora: Lora, out: Path, *, settings: Reward = SETTINGS) -> None:
    out.mkdir(exist_ok=True)
    data = scored(load_model(model))
    scorer = score_adapter(load_classifier(model, seed=1), settings=lora, seed=1)
    reward.train(
        Policy(model=scorer, tokenizer=load_tokenizer(model), reference=None), data,
        settings=settings, out=out,
    )  # fmt: skip


def test_what_is_measured_of_a_batch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard labels of which one in ten is wrong: q = 0.9, 0.9, and 0.5 for the tie. The first pair
    leads by 1 + ln 3, of which its margin takes 1; the second is ln 3 behind, the third ln 3 ahead.

        -log sigmoid(ln 3) = ln 4/3 = 0.287682,    -log sigmoid(-ln 3) = ln 4 = 1.386294
    """
    three = 1.098612
    given = torch.tensor([1 + three, 0.0, three, 0.0, three, 0.0])
    monkeypatch.setattr(reward, "scored", lambda *args, **kwargs: given)
    batch = {"p": torch.tensor([0.8, 0.7, 0.5]), "margin": torch.tensor([2.0, 0.0, 0.0])}
    settings = replace(SETTINGS, margin=0.5, label_smoothing=0.1, soft_labels=False, centre=0.0)
    found = reward.measure(None, batch, settings=settings)
    assert found["loss"].tolist() == pytest.approx([0.397543, 1.276433, 0.836988], abs=1e-5)
    assert found["accuracy"].tolist() == [1.0, 0.0, 0.5], "a tie has no right order"
    assert found["reward_margin"].tolist() == pytest.approx([1 + three, -three, three])
    assert found["chosen_reward"].tolist() == pytest.approx([1 + three, 0.0, three])
    assert found["rejected_reward"].tolist() == pytest.approx([0.0, three, 0.0])


def test_implicit_scores_are_trained_by_dpos_loss(tiny: Model, lora: Lora) -> None:
    base = load_model(tiny)
    data = scored(base)
    policy = add_lora(base, settings=lora, seed=1)
    torch.manual_seed(2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = collate_pairs([data.train[i] for i in range(4)])
    settings = replace(SETTINGS, score="implicit", beta=0.3, centre=0.0)
    found = reward.measure(policy, batch, settings=settings)
    expected = sigmoid_loss(pair_logprobs(policy, batch), beta=0.3, q=batch["p"])
    assert torch.equal(found["loss"], expected) and expected.std() > 0.01
    assert found["chosen_reward"].abs().min() > 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_head_and_adapter_are_trained_saved_and_loaded_again(
    quantization: str, tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    model = replace(tiny, quantization=quantization)
    train(model, lora, tmp_path, settings=replace(SETTINGS, epochs=8))
    steps = [line for line in read_curves(tmp_path) if "loss" in line]
    assert steps[-1]["accuracy"] >= 0.75 and steps[-1]["loss"] < 0.6
    assert {"chosen_reward", "rejected_reward", "reward_margin"} <= steps[0].keys()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    head = load_classifier(model, seed=1).score.weight.detach()
    moved = saved["base_model.model.score.weight"] - head
    assert moved.abs().max() > 1e-3
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    loaded = load_reward_model(model, tmp_path / "adapter")
    held_out = scored(load_model(model)).held_out
    batch = collate_pairs([held_out[i] for i in range(len(held_out))])
    with torch.no_grad():
        chosen, rejected = scores(
            loaded, input_ids=batch["input_ids"], lengths=batch["lengths"]
        ).chunk(2)
    margin = (chosen - rejected).mean().item()
    assert margin == pytest.approx(metrics["reward/held_out_margin"], abs=1e-4)


@pytest.mark.parametrize("moment", [2, 6])
def test_a_killed_training_ends_bit_identical(
    moment: int, tiny: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = replace(lora, dropout=0.1)
    train(tiny, dropping, tmp_path / "whole")

    class Killer(fitting.Conductor):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control)
            if state.global_step == moment:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Conductor", Killer)
        with pytest.raises(Killed):
            train(tiny, dropping, tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter").exists()
    train(tiny, dropping, tmp_path / "killed")
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_the_split_into_micro_batches_changes_nothing(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, learning_rate=1e-3)
    for name, micro in (("whole", 4), ("split", 1)):
        train(tiny, lora, tmp_path / name, settings=replace(settings, micro_batch_size=micro))
    for one, other in zip(
        read_curves(tmp_path / "whole"), read_curves(tmp_path / "split"), strict=True
    ):
        # The answers of one pair are equal; which of them is a last bit ahead is up to the batch.
        known = one.keys() - {"accuracy"}
        assert one.keys() == other.keys() and len(known) > 2
        assert {key: one[key] for key in known} == pytest.approx(
            {key: other[key] for key in known}, rel=1e-3, abs=1e-3
        )


def test_recomputed_activations_train_the_same(
    tiny_nf4: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, passes = LlamaAttention.forward, {False: 0, True: 0}

    def counted(part: Any, *args: Any, **kwargs: Any) -> Any:
        passes[recomputes] += torch.is_grad_enabled()
        return forward(part, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    for recomputes in (False, True):
        settings = replace(SETTINGS, epochs=1, gradient_checkpointing=recomputes)
        train(tiny_nf4, lora, tmp_path / str(recomputes), settings=settings)
    assert passes == {False: 4 * 2, True: 2 * 4 * 2}, "4 steps through 2 layers, and once more"
    for here, there in zip(
        read_curves(tmp_path / "False"), read_curves(tmp_path / "True"), strict=True
    ):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


def test_a_margin_that_no_pair_has_is_refused_before_a_row_is_read(
    tiny: Model, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(rows: PairRows, index: int) -> dict[str, Any]:
        raise AssertionError("its token ids are not needed")

    monkeypatch.setattr(PairRows, "__getitem__", read)
    with pytest.raises(StageError, match=r"algorithm\.margin=1: no pair has a margin"):
        train(tiny, lora, tmp_path, settings=replace(SETTINGS, margin=1.0))


@pytest.mark.parametrize(
    ("margins", "known"), [([None, 1.5], True), ([None, 0.0], False), ([None, None], False)]
)
def test_a_margin_of_another_sides_pairs_does_not_count(
    margins: list[float | None], known: bool
) -> None:
    table = Dataset.from_list([{"margin": m} for m in (*margins, 3.0)])
    nothing = torch.zeros(3)
    rows = PairRows(table, chosen=nothing, rejected=nothing, indices=[0, 1])
    assert rows.have_margins() is known


def test_a_loss_that_is_no_number_ends_the_run(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"collapsed at step .* lower algorithm\.learning_rate"):
        train(tiny, lora, tmp_path, settings=replace(SETTINGS, learning_rate=1e30))
