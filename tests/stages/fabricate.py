"""A made-up run for the report's tests: folders as stages leave them, drawn from a seed."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.stages.evaluate import named
from align.stages.settings import ReportStage
from align.stats import Interval, length_controlled, mean_interval, win_rate

STARTER = Path(__file__).parents[2] / "data" / "starter" / "test.jsonl"
CONFIG = """\
recipe_name: dpo
name: dpo
seed: 0
model: {name: Qwen/Qwen3-8B, revision: null, quantization: nf4, dtype: auto}
adapter: {name: lora, rank: 16, alpha: 32.0, dropout: 0.0, target_modules: all-linear}
data: {name: starter}
algorithm: {name: dpo, beta: 0.1, learning_rate: 5.0e-05, epochs: 1.0}
"""
CRITERIA = ("correct", "honest", "courteous", "brief")
WEIGHTS = (8.0, 4.0, 2.0, 1.0)
ANSWERS = (
    "Obviously it is 12 days, can you not read?",
    "The notice is 30 days.",
    "I would be happy to help: you apply 30 days in advance. I wish you a pleasant day!",
    "The agreement says nothing about this, so please ask the personnel office first.",
    "It is either 5 months or 14 weeks, depending on which of the clauses one takes; "
    "there may be others.",
)


def settings(**changed: Any) -> ReportStage:
    values = {
        "name": "dpo",
        "label_judge": "rubric",
        "config": CONFIG,
        "command": "python -m align.run recipe=dpo model=hf model.name=Qwen/Qwen3-8B",
    }
    return ReportStage(**{**values, **changed})


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def manifest(step: str, *, seconds: float, usd: float = 0.0, rows: int = 0) -> dict[str, Any]:
    return {
        "stage": step,
        "stage_version": 1,
        "fingerprint": (step.encode().hex() * 8)[:64],
        "settings": {"model": {"name": "Qwen/Qwen3-8B", "revision": "b968826d9c46"}},
        "inputs": {},
        "rows": {"rows.jsonl": rows} if rows else {},
        "files": {},
        "versions": {
            "python": "3.12.3",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "git_commit": "3930730aa0c5f6c1d2e3",
        "duration_s": seconds,
        "cost_usd": usd,
        "finished": "2025-03-14T10:22:07Z",
    }


def marks(rng: random.Random, good: float) -> dict[str, float]:
    return {
        "correct": float(rng.random() < 0.1 + 0.7 * good),
        "honest": float(rng.random() < 0.5 + 0.45 * good),
        "courteous": rng.choice((0.0, 0.5, 1.0) if good < 0.5 else (0.5, 1.0, 1.0)),
        "brief": float(rng.random() < 0.8),
    }


def comparison(
    line: Mapping[str, Any], rng: random.Random, *, before: float, after: float
) -> dict[str, Any]:
    sides: list[dict[str, Any]] = []
    for good in (before, after):
        scores = marks(rng, good)
        total = sum(weight * scores[name] for name, weight in zip(CRITERIA, WEIGHTS, strict=True))
        length = max(3, round(rng.gauss(18 + 14 * good, 6)))
        sides.append(
            {"text": rng.choice(ANSWERS), "length": length, "scores": scores, "total": total}
        )
    difference = sides[1]["total"] - sides[0]["total"]
    p = 0.5 + 0.5 * ((difference > 0) - (difference < 0))
    return {
        "id": line["id"],
        "messages": line["messages"],
        "before": sides[0],
        "after": sides[1],
        "p_after": p,
        "status": "tie" if p == 0.5 else "ok",
        "margin": abs(difference),
        "consistent": True,
    }


def measured(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What evaluate writes of these rows."""
    p = [row["p_after"] for row in rows]
    old, new = ([row[side] for row in rows] for side in ("before", "after"))
    rate = win_rate(p, seed=0)
    lengths = [[answer["length"] for answer in side] for side in (old, new)]
    found = {
        "evaluate/n": len(rows),
        "evaluate/n_judged": len(rows),
        **named("win_rate", rate),
        "evaluate/ties": p.count(0.5) / len(p),
        "evaluate/inconsistent": 0.0,
        "evaluate/kl": 11.73,
        "evaluate/held_out_accuracy": 0.861,
        "evaluate/length_before": sum(lengths[0]) / len(rows),
        "evaluate/length_after": sum(lengths[1]) / len(rows),
        **named(
            "win_rate_length_controlled",
            length_controlled(p, length_after=lengths[1], length_before=lengths[0]),
        ),
        **named("win_rate_equal_manners", Interval(mean=0.71, low=0.62, high=0.79, n=96)),
        "evaluate/n_equal_manners": 96,
        "evaluate/precision_gap": 0.0431,
    }
    for name in CRITERIA:
        before, after = ([answer["scores"][name] for answer in side] for side in (old, new))
        found[f"evaluate/criterion/{name}/before"] = sum(before) / len(rows)
        found[f"evaluate/criterion/{name}/after"] = sum(after) / len(rows)
    for side, answers in (("before", old), ("after", new)):
        interval = mean_interval([answer["scores"]["correct"] for answer in answers], seed=0)
        found |= named(f"correct_{side}", interval)
    return found


def training(rng: random.Random) -> list[dict[str, float]]:
    """Curves as a preference training logs them."""
    rows: list[dict[str, float]] = []
    for step in range(1, 151):
        learnt = 1 - math.exp(-step / 45)
        held = {
            "loss": 0.69 - 0.42 * learnt, "reward_margin": 3.1 * learnt, 
            "accuracy": 0.5 + 0.39 * learnt,
            "chosen_logps": -30 - 9 * learnt, "rejected_logps": -31 - 38 * learnt, 
            "kl": 12 * learnt,
        }  # fmt: skip
        noise = {
            key: value + rng.gauss(0, 0.06) * (1 if abs(value) < 5 else 30)
            for key, value in held.items()
        }
        noise["accuracy"] = min(1.0, max(0.0, noise["accuracy"]))
        rows.append(
            {"step": step, "epoch": step / 150, "learning_rate": 5e-5, "grad_norm": 1.1, **noise}
        )
        if step % 25 == 0:
            rows.append(
                {
                    "step": step,
                    **{f"eval_{key}": value for key, value in held.items() if key != "kl"},
                }
            )
    return rows


def fabricate(
    root: Path, *, before: float = 0.35, after: float = 0.9, prompts: int = 400
) -> dict[str, Path]:
    """All folders of a finished run; `before` and `after`: how good the answers are, 0 to 1."""
    rng = random.Random(11)
    steps = {
        "prompts": (0.3, 1600), "candidates": (312.0, 1600), "preferences": (4.1, 5124),
        "reference": (48.2, 0),
        "train": (741.0, 0), "test_prompts": (0.2, 400),
        "before": (21.7, 400), "after": (24.9, 400),
        "evaluate": (18.3, 400),
    }  # fmt: skip
    inputs = {step: root / step for step in steps}
    for step, (seconds, count) in steps.items():
        usd = 3.27 if step == "preferences" else 0.0
        write(inputs[step] / "manifest.json", manifest(step, seconds=seconds, usd=usd, rows=count))
    write(inputs["candidates"] / "counts.json", {
        "prompts": 1600, "responses": 6400, "duplicates": 211, "empty": 3, "cut_prompts": 0,
        "finished_by_length": 17, "tokens": 158_431,
    })  # fmt: skip
    write(inputs["preferences"] / "counts.json", {
        "comparisons": 6280, "ok": 5124, "tie": 1138, "refusal": 0, "malformed": 18,
        "overflow": 0, "failed": 0,
        "inconsistent": 402, "duplicates": 211, "empty": 3, "preferences": 5124,
    })  # fmt: skip
    write_lines(inputs["train"] / "curves.jsonl", training(rng))
    write(inputs["train"] / "metrics.json", {
        "train/best_step": 125, "train/steps": 150, "train/held_out_accuracy": 0.861,
        "train/pairs": 4868,
    })  # fmt: skip
    write(inputs["train"] / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    (inputs["train"] / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    (inputs["train"] / "adapter" / "README.md").write_text("what peft wrote")
    lines = [
        json.loads(line) for line in STARTER.read_text(encoding="utf-8").splitlines()[:prompts]
    ]
    rows = [comparison(line, rng, before=before, after=after) for line in lines]
    write_lines(inputs["evaluate"] / "comparisons.jsonl", rows)
    write(inputs["evaluate"] / "metrics.json", measured(rows))
    write(inputs["evaluate"] / "judge.json", {"judge": "rubric"})
    return inputs


PPO_CONFIG = """\
recipe_name: ppo
name: ppo
seed: 0
model: {name: Qwen/Qwen3-8B, revision: null, quantization: nf4, dtype: auto}
adapter: {name: lora, rank: 16, alpha: 32.0, dropout: 0.0, target_modules: all-linear}
data: {name: starter}
algorithm: {name: ppo, reward: role, value: trunk, beta: 0.05, kl_band: [0.0, 40.0]}
"""


def iterations(rng: random.Random, *, count: int, overoptimised: bool) -> list[dict[str, float]]:
    """Curves as PPO writes them, watched every tenth iteration."""
    lines = []
    for step in range(1, count + 1):
        learnt = 1 - math.exp(-step / (count / 3))
        lost = max(0.0, step / count - 0.5) if overoptimised else 0.0
        kl = 24 * learnt + rng.gauss(0, 0.5)
        line = {
            "step": step, "reward": 1.8 * learnt + rng.gauss(0, 0.1), "reward_std": 0.9,
            "score": 1.2 * learnt, "clipped_rewards": 0.01, "taught": 1.0, "kl": kl,
            "kl_error": 0.4, "kl_k3": kl * 1.06, "entropy": 1.6 - 0.7 * learnt,
            "explained_variance": 0.62 * learnt + rng.gauss(0, 0.03), "length": 24 + 9 * learnt,
            "eos_rate": min(1.0, 0.97 + rng.gauss(0, 0.01)), "sampler_gap": 4e-7, "beta": 0.05,
            "learning_rate": 1e-5, "policy_loss": -0.01, "value_loss": 0.3, "grad_norm": 0.4,
            "clip_fraction": 0.08 + rng.gauss(0, 0.01), "ratio_std": 0.1,
        }  # fmt: skip
        if step % 10 == 0 or step == 1:
            rate = 0.5 + 0.3 * learnt - 0.9 * lost
            line |= {
                "eval_length": 25 + 9 * learnt, "eval_reward": 1.7 * learnt,
                "eval_win_rate": rate, "eval_judged": 64.0,
            }  # fmt: skip
        lines.append(line)
    return lines


def told(
    lines: Mapping[str, Any], rng: random.Random, *, step: int, reward: float
) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {
        "v": 1, "step": step, "id": lines["id"], "messages": lines["messages"],
        "text": rng.choice(ANSWERS), "finish": "eos", "reward": reward, "score": reward,
        "kl": 0.1 * step, "tokens": 21,
    }  # fmt: skip


def fabricate_ppo(
    root: Path, *, count: int = 60, overoptimised: bool = False, prompts: int = 120
) -> dict[str, Path]:
    """All folders of a finished PPO run with a reward model of its own."""
    inputs = fabricate(root, prompts=prompts)
    rng = random.Random(5)
    inputs["reward"] = root / "reward"
    write(inputs["reward"] / "manifest.json", manifest("reward", seconds=388.0))
    write(inputs["reward"] / "metrics.json", {
        "reward/pairs": 4868, "reward/held_out_pairs": 256, "reward/held_out_prompts": 80,
        "reward/held_out_accuracy": 0.742, "reward/held_out_accuracy_low": 0.689,
        "reward/held_out_accuracy_high": 0.793,
    })  # fmt: skip
    train = inputs["train"]
    curves = iterations(rng, count=count, overoptimised=overoptimised)
    write_lines(train / "curves.jsonl", curves)
    lines = [json.loads(line) for line in STARTER.read_text(encoding="utf-8").splitlines()[:40]]
    write_lines(train / "samples.jsonl", [
        told(rng.choice(lines), rng, step=step, reward=reward)
        for step in range(1, count + 1) for reward in (-2.125, -0.5, 0.75, 1.5)
    ])  # fmt: skip
    write_lines(train / "timing.jsonl", [
        {"step": step, "generate_s": 4.0, "reward_s": 0.5, "score_s": 1.5, "learn_s": 10.0,
         "answer_tokens": 8000, "tokens": 24_000, "memory_mb": 18_000}
        for step in range(1, count + 1)
    ])  # fmt: skip
    write_lines(train / "warnings.jsonl", [
        {"step": 12, "name": "ratio", "text": "the policy moves far within one iteration."}
    ])  # fmt: skip
    write(train / "counts.json", {"reference": "base model, adapter off", "reward": "reward"})
    write(train / "metrics.json", {
        "train/iterations": count, "train/prompts": 1511, "train/answers": count * 256,
        "train/kl_in_band": 1.0, "train/kl": curves[-1]["kl"],
    })  # fmt: skip
    path = inputs["evaluate"] / "metrics.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    write(path, {key: v for key, v in known.items() if key != "evaluate/held_out_accuracy"})
    return inputs
