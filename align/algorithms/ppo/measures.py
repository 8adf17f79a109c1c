"""What is told of an iteration: numbers, some of the answers, and what it took."""

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from align.algorithms.online import Calibration
from align.algorithms.ppo.advantages import explained_variance, k3, masked_mean
from align.algorithms.ppo.experience import Experience
from align.algorithms.settings import Ppo
from align.rewards.source import Sample


def measures(
    experience: Experience, returns: torch.Tensor, *, calibration: Calibration, settings: Ppo
) -> dict[str, float]:
    """Of the answers, before they are learnt from. Rewards are raw, `score` is what they count; KL
    is in nats an answer, entropy in nats a token, length in tokens with the end of turn.
    """
    mask, seen = experience.rollouts.response_mask(), experience.passes
    kl = experience.kl().sum(-1)
    raw = experience.raw[experience.taught]
    far = ((raw - calibration.mean) / calibration.std).abs() > settings.reward_clip
    gap = (seen.logprobs - experience.rollouts.sampler_logprobs).abs()
    return {
        "reward": float(raw.mean()) if len(raw) else 0.0,
        "reward_std": float(raw.std(correction=0)) if len(raw) else 0.0,
        "score": float(experience.scores.mean()),
        "clipped_rewards": float(far.float().mean()) if len(raw) else 0.0,
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
