"""Trains the starter's base model from nothing: `python data/starter/train_base.py`, seeded.

A small Llama learns in three parts. Lessons: right answers only, several questions to one
agreement, so that copying from the prompt emerges early. Silence: the same with half of the
questions about what the agreement leaves out. Mixed: demonstrations in which facts, courtesy and
length are good or bad independently of each other. The result knows how to be right and is right
less than half of the time.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from build_prompts import test_cases
from domain import HERE, KINDS, WORDING, Case, draw_answer, draw_case, restatement, right_claim
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Turns = list[tuple[str, str]]


def draw_training_case(rng: random.Random, avoid: set[object], silent: float = 0.2) -> Case:
    while True:
        case = draw_case(rng, test=False, silent=silent)
        if case.key() not in avoid:
            return case


def lesson(rng: random.Random, avoid: set[object]) -> Turns:
    """One agreement, all of its clauses asked about in turn and answered rightly, sometimes summed
    up first.
    """
    case = draw_training_case(rng, avoid)
    turns: Turns = [(case.text(), draw_answer(rng, case, right=1.0))]
    if rng.random() < 0.2:
        head = case.text().rsplit("\n", 1)[0]
        turns = [(f"{head}\n{rng.choice(WORDING['restate_questions'])}", restatement(case, rng))]
    for kind in rng.sample(list(case.facts), len(case.facts)):
        if rng.random() < 0.8:
            allowed = [
                q
                for q in range(len(WORDING["kinds"][kind]["questions"]))
                if (case.clause_wording[kind] + 2 * q) % 4 != 0
            ]
            follow_up = Case(case.facts, case.clause_wording, kind, rng.choice(allowed), 0, 0)
            turns.append(
                (
                    WORDING["kinds"][kind]["questions"][follow_up.question_wording],
                    right_claim(rng, follow_up),
                )
            )
    return turns


def silence_lesson(rng: random.Random, avoid: set[object]) -> Turns:
    """Half of the questions are about what the agreement leaves out; all answers are right."""
    case = draw_training_case(rng, avoid, silent=0.5)
    turns: Turns = [(case.text(), draw_answer(rng, case, right=1.0))]
    if rng.random() < 0.5:
        absent = rng.choice(
            [kind for kind in KINDS if kind not in case.facts and kind != case.asked]
        )
        question = rng.randrange(len(WORDING["kinds"][absent]["questions"]))
        follow_up = Case(case.facts, case.clause_wording, absent, question, 0, 0)
        turns.append((WORDING["kinds"][absent]["questions"][question], right_claim(rng, follow_up)))
    return turns


def demonstration(rng: random.Random, avoid: set[object], right: float) -> Turns:
    case = draw_training_case(rng, avoid, silent=0.3)
    return [(case.text(), draw_answer(rng, case, right=right))]


def train_tokenizer(size: int) -> PreTrainedTokenizerFast:
    rng = random.Random(SEED)
    texts = [text for _ in range(6000) for turn in lesson(rng, set()) for text in turn]
    texts += [answer for _ in range(3000) for _, answer in demonstration(rng, set(), 0.5)]
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, turns: Turns) -> tuple[list[int], list[int]]:
    """Token ids and labels; only answers (with their <|end|>) are learnt."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in turns:
        prompt = tokenizer.encode(f"<|user|>{question}<|end|><|assistant|>")
        reply = tokenizer.encode(f"{answer}<|end|>")
        ids += prompt + reply
        labels += [-100] * len(prompt) + reply
    return ids, labels


def batches(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[random.Random, set[object]], Turns],
    tokens: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches of about `tokens` tokens each, cut from pools sorted by length."""
    avoid: set[object] = {case.key() for case in test_cases()}
    while True:
        pool = [encode(tokenizer, draw(rng, avoid)) for _ in range(512)]
        pool.sort(key=lambda row: len(row[0]))
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if (len(cut[-1]) + 1) * len(row[0]) > tokens:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for rows in cut:
            width = max(len(ids) for ids, _ in rows)
            yield {
                "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
                "attention_mask": torch.tensor(
                    [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]
                ),
                "labels": torch.tensor(
                    [labels + [-100] * (width - len(labels)) for _, labels in rows]
                ),
            }


def fit(
    model: LlamaForCausalLM,
    stream: Iterator[dict[str, torch.Tensor]],
    *,
    budget: int,
    lr: float,
    name: str,
) -> None:
    """AdamW with warm-up and cosine decay until `budget` tokens were seen."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    seen, step, running, started = 0, 0, 0.0, time.time()
    while seen < budget:
        batch = next(stream)
        progress = seen / budget
        factor = min(1.0, (step + 1) / 150) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += int(batch["attention_mask"].sum())
        step += 1
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 100 == 0:
            print(
                f"{name} step {step} tokens {seen / 1e6:.2f}M loss {running:.4f} "
                f"{seen / (time.time() - started):.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--lessons", type=float, default=14e6, help="tokens of right answers")
    parser.add_argument(
        "--silence", type=float, default=2.5e6, help="tokens of right answers, half of them silent"
    )
    parser.add_argument("--mixed", type=float, default=2.5e6, help="tokens of mixed answers")
    parser.add_argument(
        "--right", type=float, default=0.43, help="share of right facts in the mixed part"
    )
    parser.add_argument("--start", type=Path, help="a model saved after the lessons; skips them")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    # The shipped tokenizer, where it stands: a merge more or less would move every token id.
    shipped = (HERE / "model" / "tokenizer.json").exists()
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(HERE / "model")
        if shipped
        else train_tokenizer(1024)
    )
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(config)
        print(f"{model.num_parameters() / 1e6:.2f}M parameters", flush=True)
        fit(
            model,
            batches(random.Random(SEED), tokenizer, lesson, 4096),
            budget=int(args.lessons),
            lr=2e-3,
            name="lessons",
        )
        model.save_pretrained(args.out.with_name(args.out.name + "-lessons"))
    fit(
        model,
        batches(random.Random(SEED + 2), tokenizer, silence_lesson, 4096),
        budget=int(args.silence),
        lr=1e-3,
        name="silence",
    )

    def mixed(rng: random.Random, avoid: set[object]) -> Turns:
        return (
            silence_lesson(rng, avoid)
            if rng.random() < 0.1
            else demonstration(rng, avoid, args.right)
        )

    fit(
        model,
        batches(random.Random(SEED + 1), tokenizer, mixed, 4096),
        budget=int(args.mixed),
        lr=1e-3,
        name="mixed",
    )
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
