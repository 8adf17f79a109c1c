"""Token log-probabilities of answers, without ever building a [B, T, V] tensor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

from align.progress import progress_bar

CHUNK_VALUES = 1 << 25  # logits held at a time: 128 MB in float32
LINEAR_HEADS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and one answer as token ids."""

    prompt: Sequence[int]
    completion: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        input_ids: [B, T].
        response_mask: [B, T], True where the token belongs to the answer (its end of turn
            included); from lengths.
    """

    input_ids: torch.Tensor
    response_mask: torch.Tensor


def collate(rows: Sequence[Row], *, device: torch.device | None = None) -> Batch:
    """Pads with token 0: what stands behind a row's end is masked by length and attended by nobody
    before it.
    """
    width = max(len(row) for row in rows)
    ids = [[*row.prompt, *row.completion, *([0] * (width - len(row)))] for row in rows]
    starts = torch.tensor([len(row.prompt) for row in rows])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    positions = torch.arange(width)[None, :]
    mask = (positions >= starts) & (positions < ends)
    return Batch(input_ids=torch.tensor(ids).to(device), response_mask=mask.to(device))


def sequence_logprobs(
    model: Any, *, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """Summed log-probability of each row's answer, [B], in nats; arguments as for
    `token_logprobs`.
    """
    return token_logprobs(model, input_ids=input_ids, response_mask=response_mask).sum(-1)


def token_logprobs(
    model: Any, *, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each token that counts, [B, T], 0 elsewhere; in nats, float32 (float64 for
    a float64 model).

        log p(y_t | x, y_<t) = log softmax(head(h_{t-1}))[y_t]

    The head runs only where the next token counts. Rows are padded on the right, so causal
    attention alone keeps padding away from every token that counts, positions count from 0, and no
    attention mask is needed (which lets the fast causal kernels run).

    Args:
        model: a causal language model, bare, with an adapter, or wrapped for data parallelism.
        input_ids: [B, T].
        response_mask: [B, T], True where the token counts; the first token of a row has nothing
            before it and never does.
    """
    found = scored_tokens(model, input_ids=input_ids, response_mask=response_mask).logprobs
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)
    whole = found.new_zeros(input_ids.shape)
    return whole.index_put((rows, columns + 1), found)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The M tokens of a batch that count, row after row.

    Attributes:
        logprobs: [M], nats.
        hidden: [M, H], the decoder's output at the position before, from which each was predicted.
        entropies: [M], nats, of the distribution that each was chosen from, where asked for.
    """

    logprobs: torch.Tensor
    hidden: torch.Tensor
    entropies: torch.Tensor | None = None


def scored_tokens(
    model: Any,
    *,
    input_ids: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float = 1.0,
    entropies: bool = False,
) -> Tokens:
    """As `token_logprobs`, without the zeros between, and with what else the same pass knows.

    Args:
        temperature: logits are divided by it, as in sampling.
        entropies: measure them too; meant for passes without gradients.
    """
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)
    targets = input_ids[rows, columns + 1]
    bare = unwrapped(model)
    if has_linear_head(bare):
        hidden = last_hidden(model, input_ids)[rows, columns]
        head = bare.get_output_embeddings()
        found = head_logprobs(head, hidden, targets, temperature=temperature, entropies=entropies)
    else:
        # A head that scales or caps its logits (Gemma 2, Granite, Cohere) runs inside the model,
        # but is given only the positions that count.
        with only_positions(bare, rows, columns) as seen:
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
        hidden = seen[0][0]
        found = measured(logits, targets, temperature=temperature, entropies=entropies)
    return Tokens(logprobs=found[0], hidden=hidden, entropies=found[1] if entropies else None)


def unwrapped(model: Any) -> Any:
    """The causal language model inside of DDP and PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def last_hidden(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """What the decoder hands to the head, [B, T, H].

    Taken by a hook while the outermost wrapper runs, so that data parallelism sees its forward
    pass; the wrapper itself computes logits for the last column alone, where it knows how to.
    """
    bare = unwrapped(model)
    seen: list[torch.Tensor] = []
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(bare.forward).parameters else {}

    def keep(module: Any, arguments: Any, output: Any) -> None:
        seen.append(output[0])

    handle = bare.get_decoder().register_forward_hook(keep)
    try:
        model(input_ids=input_ids, use_cache=False, **few)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def only_positions(
    bare: Any, rows: torch.Tensor, columns: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Within, the model's head sees [1, N, H], the hidden states at (rows, columns), instead of [B,
    T, H]; what it saw is in the list.
    """
    seen: list[torch.Tensor] = []

    def select(module: Any, arguments: Any) -> tuple[torch.Tensor]:
        seen.append(arguments[0][rows, columns][None])
        return (seen[0],)

    handle = bare.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


def has_linear_head(bare: Any) -> bool:
    """Whether the logits are exactly the output embedding of what the decoder returns; probed once
    per model.
    """
    if bare not in LINEAR_HEADS:
        LINEAR_HEADS[bare] = probe_head(bare)
    return LINEAR_HEADS[bare]


@torch.no_grad()
def probe_head(bare: Any) -> bool:
    """Runs the model on two tokens and compares bit for bit: decoder to head, and head to
    logits.
    """
    if "logits_to_keep" not in signature(bare.forward).parameters:
        return False
    seen: dict[str, torch.Tensor] = {}

    def keep_hidden(module: Any, arguments: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def keep_head(module: Any, arguments: Any, output: Any) -> None:
        seen["given"], seen["logits"] = arguments[0], output

    hooks = [
        bare.get_decoder().register_forward_hook(keep_hidden),
        bare.get_output_embeddings().register_forward_hook(keep_head),
    ]
    try:
        ids = torch.tensor([[1, 2]], device=bare.device)
        logits = bare(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    same_hidden = torch.equal(seen["hidden"].float(), seen["given"].float())
    return same_hidden and torch.equal(seen["logits"].float(), logits.float())


def head_logprobs(
    head: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
) -> torch.Tensor:
    """log p of `targets` [N] given `hidden` [N, H], and on demand the entropies: [1, N] or [2, N];
    logits of a chunk live only while it is worked on.
    """
    size = max(1, CHUNK_VALUES // head.weight.shape[0])

    def chunk(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return measured(head(h), t, temperature=temperature, entropies=entropies)

    if len(targets) <= size:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, hidden[i : i + size], targets[i : i + size], use_reentrant=False)
        for i in range(0, len(targets), size)
    ]
    return torch.cat(parts, dim=-1)


def measured(
    logits: torch.Tensor, targets: torch.Tensor, *, temperature: float, entropies: bool
) -> torch.Tensor:
    """[1, N] or [2, N]: log softmax of [N, V] at `targets` [N], and the entropies."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    whole = logits.logsumexp(-1)
    found = [logits.gather(-1, targets[:, None])[:, 0] - whole]
    if entropies:  # -sum p log p, where log p is a logit less their logsumexp
        p = (logits - whole[:, None]).exp()
        found.append(whole - torch.linalg.vecdot(p, logits))
    return torch.stack(found)


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
    """Padded tokens of a scoring batch: enough to make dequantizing 4-bit weights cheap beside the
    matmuls.
    """
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
