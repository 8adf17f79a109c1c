"""Tokenizes preferences once and scores them under the base model: the reference, cached for every later training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Sequence as ListOf, Value
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import load_file, save_file

from align.artifacts import write_json
from align.jsonl import read_records
from align.models.chat import encode_pair
from align.models.load import load_model, load_tokenizer, window
from align.models.logprobs import Row, collate, default_budget, sequence_logprobs, token_budget_batches
from align.progress import progress_bar
from align.records import Preference
from align.stages.settings import ReferenceStage

REFERENCE = "the base model, adapter off"
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


def run(settings: ReferenceStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes pairs.arrow (memory-mapped rows), reference.safetensors {chosen, rejected: [N]} and counts.json.

    Both are in the order of the preferences. Scores are kept in parts/ until all are there.
    """
    model = load_model(settings.model)
    length = min(settings.max_length or window(model), window(model))
    if not (out / PAIRS).exists():
        tokenize(load_tokenizer(settings.model), inputs["preferences"], out / PAIRS, max_length=length)
    rows = Dataset.from_file(str(out / PAIRS))
    if settings.score and not (out / SCORES).exists():
        score(model, rows, out)
    elif not settings.score:
        nothing = torch.zeros(len(rows))
        save_file({"chosen": nothing, "rejected": nothing.clone()}, out / SCORES)
    counts = {
        "pairs": len(rows),
        "prompts_cut": sum(cut > 0 for cut in rows["prompt_cut"]),
        "completions_cut": sum(cut > 0 for cut in rows["completion_cut"]),
        "max_length": length,
        "reference": REFERENCE if settings.score else None,
    }
    write_json(out / "counts.json", counts)
    print(
        f"{counts['pairs']} pairs of at most {length} tokens: {counts['prompts_cut']} prompts cut from the left, "
        f"{counts['completions_cut']} answers cut; reference: {counts['reference']}",
        flush=True,
    )


def tokenize(tokenizer: Any, preferences: Path, path: Path, *, max_length: int) -> None:
    """One row a pair, written as it comes; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with ArrowWriter(path=str(partial), features=FEATURES) as writer:
        for preference in read_records(preferences / "preferences.jsonl", Preference.from_json):
            pair = encode_pair(tokenizer, preference, max_length=max_length)
            writer.write(
                {
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
            )
        writer.finalize()
    partial.replace(path)


def score(model: Any, rows: Any, out: Path) -> None:
    """Both answers' summed log-probabilities under the model, longest pairs first, resumable by parts."""
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    lengths = [2 * length for length in rows["length"]]
    batches = list(token_budget_batches(lengths, budget=default_budget(model.device)))
    scores = {side: torch.zeros(len(rows)) for side in ("chosen", "rejected")}
    with progress_bar("reference", len(rows), unit="tokens") as advance:
        for start in range(0, len(batches), CHUNK_BATCHES):
            part = parts / f"{start:08}.safetensors"
            chunk = batches[start : start + CHUNK_BATCHES]
            if not part.exists():
                found = score_chunk(model, rows, chunk)
                save_file(found, part.with_suffix(".partial"))
                part.with_suffix(".partial").replace(part)
            found, where = load_file(part), torch.tensor([i for batch in chunk for i in batch])
            for side, values in scores.items():
                values[where] = found[side]
            advance(len(where), sum(lengths[i] for i in where.tolist()))
    save_file(scores, out / "scores.partial")
    (out / "scores.partial").replace(out / SCORES)
    for part in parts.iterdir():
        part.unlink()
    parts.rmdir()


@torch.no_grad()
def score_chunk(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The scores of some batches, in their order: {chosen, rejected: [n]}."""
    chosen, rejected = [], []
    for batch in chunk:
        pairs = [rows[i] for i in batch]
        sides = [
            Row(prompt=tuple(pair["prompt_ids"]), completion=tuple(pair[f"{side}_ids"]))
            for side in ("chosen", "rejected")
            for pair in pairs
        ]
        packed = collate(sides, device=model.device)
        both = sequence_logprobs(model, input_ids=packed.input_ids, response_mask=packed.response_mask)
        first, second = both.float().cpu().chunk(2)
        chosen.append(first)
        rejected.append(second)
    return {"chosen": torch.cat(chosen), "rejected": torch.cat(rejected)}
