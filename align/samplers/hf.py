"""In-process sampling: prompts prefilled once for all their samples, finished rows dropped, noise
drawn per token.

The token at a position is the inverse of the distribution function at one uniform number that
depends on (seed, prompt id, sample, position) alone. Batches are laid out from all prompts before
looking at what is done, so a resumed run computes the same batches, down to the rounding.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from align.errors import StageError
from align.models.chat import encode_prompt, end_of_turn
from align.models.load import window
from align.records import Candidate, Prompt, Response
from align.samplers.cache import roomy_cache
from align.samplers.settings import Hf

# Rows are dropped from the cache when this share of them is finished: copying the cache costs
# something too.
DROP_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which prompts go together: `batches[i]` holds indices into the prompts, longest prompts
    first.
    """

    batches: "tuple[array[int], ...]"
    max_prompt_tokens: int


@dataclass(kw_only=True)
class Row:
    """One answer in the making: which prompt of the batch, which sample, its noise, and what was
    drawn.
    """

    prompt: int
    sample: int
    noise: numpy.ndarray[Any, numpy.dtype[numpy.float64]]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "length"


def lay_out(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, settings: Hf
) -> Layout:
    """Sorts all prompts by length and cuts them into batches of `settings.batch_size` answers.

    Raises:
        StageError: the model's window has no room for a prompt beside `sampler.max_new_tokens`.
    """
    room = window(model) - settings.max_new_tokens
    if room < 1:
        raise StageError(
            f"max_new_tokens={settings.max_new_tokens}: the model's window is {window(model)} "
            "tokens, which "
            "leaves no room for a prompt; lower it"
        )
    lengths = array(
        "l", (len(encode_prompt(tokenizer, p.messages, max_tokens=room).ids) for p in prompts)
    )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size = max(1, settings.batch_size // settings.n)
    batches = tuple(array("l", order[i : i + size]) for i in range(0, len(order), size))
    return Layout(batches=batches, max_prompt_tokens=room)


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    layout: Layout,
    settings: Hf,
    seed: int,
    skip: int = 0,
) -> Iterator[list[Candidate]]:
    """The candidates of one batch after the other, the first `skip` batches left out."""
    for batch in layout.batches[skip:]:
        chosen = [prompts[i] for i in batch]
        encoded = [
            encode_prompt(tokenizer, p.messages, max_tokens=layout.max_prompt_tokens)
            for p in chosen
        ]
        rows = [
            Row(prompt=i, sample=k, noise=noise(seed, prompt.id, k, settings.max_new_tokens))
            for i, prompt in enumerate(chosen)
            for k in range(settings.n)
        ]
        draw(model, tokenizer, [e.ids for e in encoded], rows, settings=settings)
        described = {
            "name": settings.name,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        yield [
            Candidate(
                id=prompt.id,
                messages=prompt.messages,
                meta={**prompt.meta, **({"cut": encoded[i].cut} if encoded[i].cut else {})},
                responses=tuple(finished(row, tokenizer, seed) for row in rows if row.prompt == i),
                sampler=described,
            )
            for i, prompt in enumerate(chosen)
        ]


def noise(
    seed: int, prompt_id: str, sample: int, length: int
) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    """Uniform numbers in [0, 1), one per position, from a counter-based generator keyed by its
    arguments.
    """
    digest = hashlib.sha256(
        f"{seed}/{sample}/{prompt_id}".encode("utf-8", "surrogatepass")
    ).digest()
    return numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest[:16]))).random(
        length
    )


def finished(row: Row, tokenizer: PreTrainedTokenizerBase, seed: int) -> Response:
    text = tokenizer.decode(row.tokens, skip_special_tokens=True)
    return Response(
        text=str(text).strip(),
        finish=row.finish,
        tokens=tuple(row.tokens),
        logprob=sum(row.logprobs),
        seed=seed,
    )


@torch.inference_mode()
def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    rows: list[Row],
    *,
    settings: Hf,
) -> None:
    """Fills `rows` in place, token by token, `settings.n` rows for each of `prompts`."""
    ends = end_tokens(model, tokenizer)  # first of all, for a model may have none
    width = max(len(ids) for ids in prompts)
    # Left padding, so that every row's next token stands in the same column; the mask comes from
    # the lengths.
    lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device)[None, :] >= (width - lengths)[:, None]).long()
    padded = [[0] * (width - len(ids)) + list(ids) for ids in prompts]
    input_ids = torch.tensor(padded, device=model.device)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = roomy_cache(model.config)
    logits = forward(model, input_ids, mask, position_ids, cache)
    # 1. The prompt was read once; every sample of it starts from a copy of its keys and values.
    cache.batch_repeat_interleave(settings.n)
    logits, mask, positions = (
        x.repeat_interleave(settings.n, dim=0) for x in (logits, mask, position_ids[:, -1])
    )
    alive = list(rows)
    done: list[bool] = [False] * len(rows)
    for step in range(settings.max_new_tokens):
        # 2. One token a row; a finished row idles until the next clearing.
        uniform = torch.tensor([row.noise[step] for row in alive], device=logits.device)
        tokens, logprobs = next_tokens(logits, uniform, settings=settings)
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            if math.isnan(logprob):
                raise StageError(
                    "the model's logits are no numbers; with model.dtype=float16 its activations "
                    "overflow: type model.dtype=bfloat16, or float32. Where it was just trained, "
                    "its training collapsed: lower algorithm.learning_rate"
                )
            if not done[i]:
                alive[i].tokens.append(token)
                alive[i].logprobs.append(logprob)
                if token in ends:
                    alive[i].finish, done[i] = "eos", True
        if all(done) or step + 1 == settings.max_new_tokens:
            return
        # 3. Finished rows leave the batch once there are enough of them.
        if sum(done) > DROP_SHARE * len(done):
            keep = torch.tensor(
                [i for i, over in enumerate(done) if not over], device=logits.device
            )
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            alive = [row for row, over in zip(alive, done, strict=True) if not over]
            done = [False] * len(alive)
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        logits = forward(model, tokens[:, None], mask, positions[:, None], cache)


def forward(
    model: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Logits of the last position, [rows, V]."""
    out = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = out.logits[:, -1]
    return logits


def next_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, *, settings: Hf
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row; returns (token ids, their log-probabilities under what was drawn
    from).

    Args:
        logits: [rows, V].
        uniform: [rows], in [0, 1).
    """
    logits = logits.float()
    if settings.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logprobs.argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
    logits = logits / settings.temperature
    no_ids: Any = None
    if settings.top_k > 0:
        logits = TopKLogitsWarper(settings.top_k)(no_ids, logits)
    if settings.top_p < 1:
        logits = TopPLogitsWarper(settings.top_p)(no_ids, logits)
    logprobs = logits.log_softmax(-1)
    # float64: in float32 the sum of a large vocabulary's probabilities misses the rare tokens at
    # its end
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, so that rounding can never point behind the last token that has any
    # probability.
    target = torch.minimum(
        uniform.double()[:, None] * total, total.nextafter(torch.zeros_like(total))
    )
    tokens = torch.searchsorted(cumulative, target, right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # NaN stands behind all; a GPU would abort
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's, and the
    template's.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in (*ids, tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None}
