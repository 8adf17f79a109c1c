"""Tokenizes preferences once and scores them under the base model: the reference, cached for later
trainings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import load_file, save_file

from align.artifacts import write_json
from align.errors import DataError
from align.jsonl import read_records
from align.models.chat import encode_pair
from align.models.load import load_model, load_tokenizer, window
from align.models.logprobs import (
    Row,
    collate,
    default_budget,
    sequence_logprobs,
    token_budget_batches,
)
from align.progress import progress_bar
from align.records import Preference
from align.stages.settings import ReferenceStage

# Said in the log and beside the adapter: the wrong reference is a silent bug.
REFERENCE = "base model, adapter off"
PAIRS = "pairs.arrow"
SCORES = "reference.safetensors"
CHUNK_BATCHES = 32  # batches scored between two writes to disk

FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": ListOf(Value("int32")),
        "chosen_ids": ListOf(Value("int32")),
        "rejected_ids": ListOf(Value("int32")),
        "length": Value("int32"),
        "p": Value("float32"),
        "margin": Value("float32"),
        "prompt_cut": Value("int32"),
        "completion_cut": Value("int32"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Summed log-probabilities of both answers, each [N], float32, in nats."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    def save(self, path: Path) -> None:
        """The file appears whole or not at all."""
        partial = path.with_suffix(".partial")
        save_file({"chosen": self.chosen, "rejected": self.rejected}, partial)
        partial.replace(path)


def load_scores(path: Path) -> Scores:
    return Scores(**load_file(path))


def run(settings: ReferenceStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes pairs.arrow (memory-mapped rows), reference.safetensors and counts.json.

    Rows and scores are in the order of the preferences. Scores are kept in parts/ until all are
    there, so that a killed stage goes on where it was.

    Raises:
        DataError: a prompt whose template alone does not fit, or no preferences at all.
    """
    model = load_model(settings.model)
    length = min(settings.max_length or window(model), window(model))
    if not (out / PAIRS).exists():
        tokenize(
            load_tokenizer(settings.model), inputs["preferences"], out / PAIRS, max_length=length
        )
    rows: Any = Dataset.from_file(str(out / PAIRS))
    if not settings.score:
        nothing = torch.zeros(len(rows))
        Scores(chosen=nothing, rejected=nothing.clone()).save(out / SCORES)
    elif not (out / SCORES).exists():
        score(model, rows, out)
    counts = {
        "pairs": len(rows),
        "prompts_cut": sum(cut > 0 for cut in rows["prompt_cut"]),
        "completions_cut": sum(cut > 0 for cut in rows["completion_cut"]),
        "max_length": length,
        "reference": REFERENCE if settings.score else None,
    }
    write_json(out / "counts.json", counts)
    print(
        f"{counts['pairs']} pairs of at most {length} tokens: {counts['prompts_cut']} prompts cut "
        f"from the left, answers cut in {counts['completions_cut']}; reference: "
        f"{counts['reference']}",
        flush=True,
    )


def tokenize(tokenizer: Any, preferences: Path, path: Path, *, max_length: int) -> None:
    """One row a pair, written as it comes; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    count = 0
    with ArrowWriter(path=str(partial), features=FEATURES) as writer:
        for row in tokenized(tokenizer, preferences, max_length=max_length):
            writer.write(row)
            count += 1
        if count == 0:
            raise DataError(
                f"{preferences}: not one preference in it; check the labels, or loosen label.ties"
            )
        writer.finalize()
    partial.replace(path)


def tokenized(tokenizer: Any, preferences: Path, *, max_length: int) -> Iterator[dict[str, Any]]:
    """The rows of all shards, in order."""
    for shard in sorted(preferences.glob("preferences*.jsonl")):
        for preference in read_records(shard, Preference.from_json):
            try:
                pair = encode_pair(tokenizer, preference, max_length=max_length)
            except DataError as error:
                raise DataError(f"{shard}: id {preference.id!r}: {error}") from error
            yield {
                "id": preference.id,
                "prompt_ids": pair.prompt,
                "chosen_ids": pair.chosen,
                "rejected_ids": pair.rejected,
                "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
                "p": preference.p,
                "margin": preference.margin,
                "prompt_cut": pair.prompt_cut,
                "completion_cut": pair.completion_cut,
            }


def score(model: Any, rows: Any, out: Path) -> None:
    """Both answers' log-probabilities under the model, longest pairs first, resumable by parts.

    Which rows share a batch depends on all lengths alone, so a resumed stage gives the same bits.
    """
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    lengths = [2 * length for length in rows["length"]]
    batches = list(token_budget_batches(lengths, budget=default_budget(model.device)))
    whole = Scores(chosen=torch.zeros(len(rows)), rejected=torch.zeros(len(rows)))
    with progress_bar("reference", len(rows), unit="tokens") as advance:
        for start in range(0, len(batches), CHUNK_BATCHES):
            part = parts / f"{start:08}.safetensors"
            chunk = batches[start : start + CHUNK_BATCHES]
            where = torch.tensor([i for batch in chunk for i in batch])
            known = part.exists()
            if not known:
                score_chunk(model, rows, chunk).save(part)
            found = load_scores(part)
            whole.chosen[where], whole.rejected[where] = found.chosen, found.rejected
            advance(len(where), 0 if known else sum(lengths[i] for i in where.tolist()))
    whole.save(out / SCORES)
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()


@torch.no_grad()
def score_chunk(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> Scores:
    """The scores of some batches, in their order."""
    chosen, rejected = [], []
    for batch in chunk:
        pairs = [rows[i] for i in batch]
        sides = [
            Row(prompt=pair["prompt_ids"], completion=pair[f"{side}_ids"])
            for side in ("chosen", "rejected")
            for pair in pairs
        ]
        packed = collate(sides, device=model.device)
        both = sequence_logprobs(
            model, input_ids=packed.input_ids, response_mask=packed.response_mask
        )
        first, second = both.float().cpu().chunk(2)
        chosen.append(first)
        rejected.append(second)
    return Scores(chosen=torch.cat(chosen), rejected=torch.cat(rejected))
