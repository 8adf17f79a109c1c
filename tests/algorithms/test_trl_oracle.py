"""TRL's unmodified DPOTrainer is the oracle: same tokens, same loss, same adapter gradients.

TRL rounds adapters on a quantized base to bfloat16, so the base is whole and in float32 here.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from align.algorithms.dpo_loss import LOSSES, PairLogprobs
from align.models.adapters import add_lora, without_adapter
from align.models.chat import encode_pair
from align.models.load import load_model, load_tokenizer
from align.models.logprobs import sequence_logprobs
from align.models.settings import Lora, Model
from align.records import Message, Preference

PREFERENCES = {
    "unequal lengths": [
        ("How many days may I work from home?", "Three days a week.", "No."),
        (
            "Who pays for travel?",
            "You do.",
            "The employer pays for all of it, whatever the distance.",
        ),
    ],
    "one-token answers": [("Yes or no?", "", "!"), ("And now?", "?", "")],
    "truncation": [
        ("How many days may I work from home?", "Three days a week, " * 6, "No, " * 20),
        ("Who?", "You do.", "I do."),
    ],
}
MAX_LENGTH = {"truncation": 48}


def records(case: str) -> list[Preference]:
    return [
        Preference(
            id=str(i), messages=(Message(role="user", content=prompt),), chosen=good, rejected=bad
        )
        for i, (prompt, good, bad) in enumerate(PREFERENCES[case])
    ]


def trl_trainer(policy: Any, base: Any, tokenizer: Any, case: str, *, loss: str, out: Path) -> Any:
    """TRL's trainer on `base`, with a fresh adapter (so its reference is the base) set to ours."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": [m.to_json() for m in record.messages],
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
        }
        for record in records(case)
    ]
    args = DPOConfig(
        output_dir=str(out),
        loss_type=loss,
        beta=0.3,
        max_length=MAX_LENGTH.get(case, 200),
        use_cpu=True,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(policy.peft_config["default"]),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(policy))
    return trainer


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def ours(policy: Any, batch: dict[str, torch.Tensor], *, loss: str) -> torch.Tensor:
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    found = sequence_logprobs(policy, input_ids=ids, response_mask=mask).chunk(2)
    with torch.no_grad(), without_adapter(policy):
        reference = sequence_logprobs(policy, input_ids=ids, response_mask=mask).chunk(2)
    lengths = mask.sum(1).chunk(2)
    pairs = PairLogprobs(
        policy_chosen=found[0],
        policy_rejected=found[1],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        chosen_length=lengths[0],
        rejected_length=lengths[1],
        margin=torch.zeros(len(lengths[0])),
    )
    return LOSSES[loss](pairs, beta=0.3, q=torch.ones(len(lengths[0]))).mean()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("case", list(PREFERENCES))
def test_loss_and_gradients_are_trls(
    case: str, loss: str, tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny)
    policy = add_lora(load_model(tiny), settings=lora, seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer = trl_trainer(policy, load_model(tiny), tokenizer, case, loss=loss, out=tmp_path)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    if case != "truncation":
        for row, record in zip(rows, records(case), strict=True):
            pair = encode_pair(tokenizer, record, max_length=200)
            assert (list(pair.prompt), list(pair.chosen), list(pair.rejected)) == (
                row["prompt_ids"],
                row["chosen_ids"],
                row["rejected_ids"],
            )
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    found = ours(policy, batch, loss=loss)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs, own = gradients(trainer.model), gradients(policy)
    assert len(own) == 28
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        scale = theirs[name].norm() + 1e-12
        assert (gradient - theirs[name]).norm() <= 1e-4 * scale, name
