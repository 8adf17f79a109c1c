"""Token log-probabilities of answers, without ever building a [B, T, V] tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from align.progress import progress_bar

CHUNK_VALUES = 1 << 25  # logits held at a time: 128 MB in float32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and one answer as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        input_ids: [B, T].
        response_mask: [B, T], True where the token belongs to the answer (its end of turn included); from lengths.
    """

    input_ids: torch.Tensor
    response_mask: torch.Tensor


def collate(rows: Sequence[Row], *, device: torch.device | None = None) -> Batch:
    """Pads with token 0: what stands behind a row's end is masked by length and attended by nobody before it."""
    width = max(len(row) for row in rows)
    ids = [[*row.prompt, *row.completion, *([0] * (width - len(row)))] for row in rows]
    starts = torch.tensor([len(row.prompt) for row in rows])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    positions = torch.arange(width)[None, :]
    mask = (positions >= starts) & (positions < ends)
    return Batch(input_ids=torch.tensor(ids).to(device), response_mask=mask.to(device))


def sequence_logprobs(model: Any, *, input_ids: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each row's answer, [B], in nats, float32 (float64 for a float64 model).

        log p(y | x) = sum_{t in answer} log softmax(head(h_{t-1}))[y_t]

    The head runs only where the next token counts, a chunk at a time. Rows are padded on the right, so causal
    attention alone keeps padding away from every token that counts and no attention mask is needed.

    Args:
        model: a causal language model, bare, with an adapter, or wrapped for data parallelism.
        input_ids: [B, T].
        response_mask: [B, T].
    """
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)
    targets = input_ids[rows, columns + 1]
    bare = unwrapped(model)
    if has_linear_head(bare):
        out = model(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = bare.get_output_embeddings()
        logprobs = head_logprobs(head, out.hidden_states[-1][rows, columns], targets)
    else:
        # Heads that scale or cap their logits (Gemma 2, Granite, Cohere) are left to the model itself.
        logits = model(input_ids=input_ids, use_cache=False).logits[rows, columns]
        logprobs = target_logprobs(logits, targets)
    return logprobs.new_zeros(len(input_ids)).index_add(0, rows, logprobs)


def unwrapped(model: Any) -> Any:
    """The causal language model inside of DDP and PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def has_linear_head(model: Any) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing else; asked once per model."""
    if not hasattr(model, "_align_linear_head"):
        with torch.no_grad():
            probe = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            out = model(input_ids=probe, output_hidden_states=True, use_cache=False)
            plain = model.get_output_embeddings()(out.hidden_states[-1])
        model._align_linear_head = bool(torch.allclose(plain.float(), out.logits.float(), rtol=1e-3, atol=1e-3))
    return bool(model._align_linear_head)


def head_logprobs(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of `targets` [N] given `hidden` [N, H], [N]; logits of a chunk live only while it is worked on."""
    size = max(1, CHUNK_VALUES // head.weight.shape[0])

    def chunk(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return target_logprobs(head(h), t)

    if len(targets) <= size:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, hidden[i : i + size], targets[i : i + size], use_reentrant=False)
        for i in range(0, len(targets), size)
    ]
    return torch.cat(parts)


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax of [N, V] at `targets` [N], at least in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def token_budget_batches(lengths: Sequence[int], *, budget: int) -> Iterator[list[int]]:
    """Indices of rows in batches of at most `budget` padded tokens, longest rows first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def default_budget(device: torch.device) -> int:
    """Padded tokens of a scoring batch: enough to make dequantizing 4-bit weights cheap beside the matmuls."""
    return 4096 if device.type == "cpu" else 32768


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Row], *, title: str) -> list[float]:
    """The summed log-probability of every row's answer, in the rows' order."""
    scores = [0.0] * len(rows)
    lengths = [len(row) for row in rows]
    with progress_bar(title, len(rows), unit="tokens") as advance:
        for batch in token_budget_batches(lengths, budget=default_budget(model.device)):
            packed = collate([rows[i] for i in batch], device=model.device)
            found = sequence_logprobs(
                model, input_ids=packed.input_ids, response_mask=packed.response_mask
            )
            for i, score in zip(batch, found.tolist(), strict=True):
                scores[i] = score
            advance(len(batch), sum(lengths[i] for i in batch))
    return scores
