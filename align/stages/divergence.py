"""How far the policy moved from its reference, and how much the quantized base matters to it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from align.models.adapters import load_adapter, without_adapter
from align.models.chat import encode_prompt
from align.models.load import load_model, load_tokenizer, window
from align.models.logprobs import Row, score_rows
from align.stages.settings import EvaluateStage

if TYPE_CHECKING:
    from align.stages.evaluate import Pair


def divergence(settings: EvaluateStage, pairs: "Sequence[Pair]", adapter: Path) -> dict[str, float]:
    """KL to the reference on the policy's own answers, and the gap to the full-precision base.

        KL = mean over answers y ~ policy of sum_t log policy(y_t | x, y_<t) - log reference(y_t |
        x, y_<t)

    In nats per answer; an unbiased estimate of KL(policy || reference) (the k1 estimator), so it
    can be slightly negative by chance. The gap is the mean over tokens of |log p (quantized base) -
    log p (full-precision base)|.
    """
    base = load_model(settings.model)
    model = load_adapter(base, adapter)
    rows = policy_rows(settings, model, pairs)
    policy = score_rows(model, rows, title="KL: policy")
    with without_adapter(model, base) as bare:
        reference = score_rows(bare, rows, title="KL: reference")
    ratios = numpy.array([p - r for p, r in zip(policy, reference, strict=True)])
    metrics = {"evaluate/kl": float(ratios.mean())}
    tokens = numpy.array([len(row.completion) for row in rows])
    sampled = numpy.array([pair.after.logprob for pair in pairs])
    # The sampler's own log-probabilities against the scorer's: a large gap means that sampling and
    # training differ.
    metrics["evaluate/sampler_gap"] = float(
        numpy.mean(numpy.abs(sampled - numpy.array(policy)) / tokens)
    )
    few = settings.precision_samples
    if few and settings.model.quantization != "none":
        full = load_adapter(load_model(replace(settings.model, quantization="none")), adapter)
        exact = numpy.array(score_rows(full, rows[:few], title="precision"))
        gaps = numpy.abs(exact - numpy.array(policy[:few])) / tokens[:few]
        metrics["evaluate/precision_gap"] = float(gaps.mean())
    return metrics


def policy_rows(settings: EvaluateStage, model: Any, pairs: "Sequence[Pair]") -> list[Row]:
    """Each prompt as the sampler saw it, with the tokens that the policy drew, end-of-sequence
    token included.
    """
    tokenizer = load_tokenizer(settings.model)
    room = window(model) - settings.max_new_tokens
    return [
        Row(
            prompt=encode_prompt(tokenizer, pair.prompt.messages, max_tokens=room).ids,
            completion=pair.after.tokens,
        )
        for pair in pairs
    ]
