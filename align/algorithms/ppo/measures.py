"""What is told of an iteration: numbers, some of the answers, and what it took."""

import math
import resource
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.algorithms.online import Calibration
from align.algorithms.ppo.advantages import explained_variance, k3, masked_mean
from align.algorithms.ppo.experience import Experience
from align.algorithms.settings import OnAnswers
from align.jsonl import JsonlAppender
from align.rewards.source import Sample

CURVES, SAMPLES, TIMING = "curves.jsonl", "samples.jsonl", "timing.jsonl"


def measures(
    experience: Experience, returns: torch.Tensor, *, calibration: Calibration, settings: OnAnswers
) -> dict[str, float]:
    """Of the answers, of which some have a reward, before they are learnt from. Rewards are raw,
    `score` is what they count; KL is in nats an answer, entropy in nats a token, length in tokens
    with the end of turn.
    """
    mask, seen = experience.rollouts.response_mask(), experience.passes
    kl = experience.kl().sum(-1)
    raw = experience.raw[experience.taught]
    far = ((raw - calibration.mean) / calibration.std).abs() > settings.reward_clip
    gap = (seen.logprobs - experience.rollouts.sampler_logprobs).abs()
    return {
        "reward": float(raw.mean()),
        "reward_std": float(raw.std(correction=0)),
        "score": float(experience.scores[experience.taught].mean()),
        "clipped_rewards": float(far.float().mean()),
        "same_rewards": same_rewards(experience),
        "taught": float(experience.taught.float().mean()),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std(correction=0) / len(kl) ** 0.5),
        "kl_k3": float((k3(seen.logprobs, seen.reference_logprobs) * mask).sum(-1).mean()),
        "entropy": float(masked_mean(seen.entropies, mask)),
        "explained_variance": explained_variance(seen.values, returns, experience.mask()),
        "length": float(mask.sum(-1).float().mean()),
        "eos_rate": float(experience.rollouts.ended.float().mean()),
        "sampler_gap": float(masked_mean(gap, mask)),
    }


def same_rewards(experience: Experience) -> float:
    """Share of the prompts whose rewarded answers all count the same: nothing tells them apart."""
    taught = experience.taught
    given: dict[int, set[float]] = defaultdict(set)
    groups, scores = experience.rollouts.groups[taught], experience.scores[taught]
    for group, score in zip(groups.tolist(), scores.tolist(), strict=True):
        given[group].add(score)
    return sum(len(found) == 1 for found in given.values()) / len(given)


def told(
    samples: Sequence[Sample], experience: Experience, *, step: int, few: int
) -> list[dict[str, Any]]:
    """Some answers with their rewards: from the worst to the best, evenly.

    Args:
        samples: of this process, the first one, whose rows come first in the experience.
    """
    if not few or not samples:
        return []
    order = torch.argsort(experience.scores[: len(samples)], stable=True)
    places = torch.linspace(0, len(samples) - 1, min(few, len(samples))).round().long()
    kl = experience.kl().sum(-1)
    return [
        {
            "v": 1,
            "step": step,
            "id": samples[i].prompt.id,
            "messages": [message.to_json() for message in samples[i].prompt.messages],
            "text": samples[i].text,
            "finish": samples[i].finish,
            "reward": None if math.isnan(raw := float(experience.raw[i])) else raw,
            "score": float(experience.scores[i]),
            "kl": float(kl[i]),
            "tokens": len(samples[i].completion_ids),
        }
        for i in order[places].tolist()
    ]


def final_measures(
    last: Mapping[str, float], *, settings: OnAnswers, prompts: int
) -> dict[str, float]:
    """Of the last iteration, and how much was sampled; flat, `train/…`.

    Args:
        prompts: how many were trained on.
    """
    low, high = settings.kl_band
    watched = [key for key in last if key.startswith("eval_")]
    kept = ("kl", "reward", "entropy", "length", "eos_rate", *watched)
    return {
        "train/iterations": settings.iterations,
        "train/prompts": prompts,
        "train/answers": settings.iterations * settings.prompts * settings.samples,
        "train/kl_in_band": float(low <= last["kl"] <= high),
        **{f"train/{key}": last[key] for key in kept},
    }


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with JsonlAppender(path) as appender:
        appender.append(lines)


def timing(clock: Mapping[str, float], experience: Experience, *, step: int) -> dict[str, Any]:
    """Seconds by phase, tokens, and memory; not the same from run to run, so it stands in a file of
    its own.
    """
    rows = experience.rollouts.rows
    return {
        "step": step,
        **{f"{phase}_s": round(seconds, 4) for phase, seconds in clock.items()},
        "answer_tokens": sum(len(row.completion) for row in rows),
        "tokens": sum(len(row) for row in rows),
        "memory_mb": round(peak_memory() / 2**20),
    }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
