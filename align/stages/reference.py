"""Tokenizes preferences once and scores them under the base model: the reference, cached for later
trainings.
"""

from array import array
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
from align.errors import ConfigError, DataError
from align.jsonl import read_records
from align.models.chat import encode_pair
from align.models.classifier import encodes
from align.models.load import load_config, load_model, load_tokenizer, room
from align.models.logprobs import (
    Row,
    collate,
    default_budget,
    sequence_logprobs,
    token_budget_batches,
)
from align.progress import progress_bar
from align.records import Preference
from align.split import prompt_key
from align.stages.settings import ReferenceStage

# Said in the log and beside the adapter: the wrong reference is a silent bug.
REFERENCE = "base model, adapter off"
PAIRS = "pairs.arrow"
SCORES = "reference.safetensors"
SIDES = ("chosen", "rejected")
CHUNK_BATCHES = 32  # batches scored between two writes to disk

FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),  # its key, by which the pairs of a prompt are kept together
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
        save_whole({"chosen": self.chosen, "rejected": self.rejected}, path)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to be scored, each distinct one of a prompt once.

    Attributes:
        sides: [M], where it stands first: 2 * pair, plus 1 where it is the rejected one.
        lengths: [M], tokens of prompt and answer.
        answer_of: [2N], for chosen and rejected of every pair the answer that it is.
    """

    sides: "array[int]"
    lengths: "array[int]"
    answer_of: "array[int]"


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def load_scores(path: Path) -> Scores:
    return Scores(**load_file(path))


def run(settings: ReferenceStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes pairs.arrow (memory-mapped rows), reference.safetensors and counts.json.

    Rows and scores are in the order of the preferences. Scores are kept in parts/ until all are
    there, so that a killed stage goes on where it was.

    Raises:
        ConfigError: answers are to be scored, and the base is an encoder.
        DataError: a prompt whose template alone does not fit, or no preferences at all.
    """
    encoder = encodes(settings.model)
    if encoder and settings.score:
        raise ConfigError(
            f"model.name={settings.model.name}: reads in both directions, so no answer has a "
            "probability under it; type reward.score=head for a reward model, or give a causal "
            "language model"
        )
    # Without scores the weights are not needed.
    model = load_model(settings.model) if settings.score else None
    tokenizer = load_tokenizer(settings.model, encoder=encoder)
    most = room(load_config(settings.model) if model is None else model, tokenizer)
    length = min(settings.max_length or most, most)
    if not (out / PAIRS).exists():
        tokenize(tokenizer, inputs["preferences"], out / PAIRS, max_length=length)
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
    held_to = f"; reference: {REFERENCE}" if settings.score else ""
    print(
        f"{counts['pairs']} pairs of at most {length} tokens: {counts['prompts_cut']} prompts cut "
        f"from the left, answers cut in {counts['completions_cut']}{held_to}",
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
                "prompt": prompt_key(preference.messages),
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
    """Every answer's log-probability under the model, longest first, resumable by parts.

    Which answers share a batch depends on all lengths alone, so a resumed stage gives the same
    bits.
    """
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    answers = distinct_answers(rows)
    batches = list(token_budget_batches(answers.lengths, budget=default_budget(model.device)))
    logprobs = torch.zeros(len(answers.lengths))
    with progress_bar("reference", len(answers.lengths), unit="tokens") as advance:
        for start in range(0, len(batches), CHUNK_BATCHES):
            part = parts / f"{start:08}.safetensors"
            chunk = batches[start : start + CHUNK_BATCHES]
            where = torch.tensor([i for batch in chunk for i in batch])
            known = part.exists()
            if not known:
                sides = [[answers.sides[i] for i in batch] for batch in chunk]
                save_whole({"logprobs": score_chunk(model, rows, sides)}, part)
            logprobs[where] = load_file(part)["logprobs"]
            advance(len(where), 0 if known else sum(answers.lengths[i] for i in where.tolist()))
    chosen, rejected = logprobs[torch.tensor(answers.answer_of).view(-1, 2)].unbind(-1)
    Scores(chosen=chosen.contiguous(), rejected=rejected.contiguous()).save(out / SCORES)
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()


def distinct_answers(rows: Any) -> Answers:
    """Each answer of a prompt once. The pairs of a prompt stand together where a judge made them,
    so looking at neighbours finds all repetitions in little memory; elsewhere some are scored
    twice.
    """
    sides, lengths, answer_of = array("q"), array("q"), array("q")
    prompt: Sequence[int] = ()
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(rows):
        if row["prompt_ids"] != prompt:
            prompt, seen = row["prompt_ids"], {}
        for k, side in enumerate(SIDES):
            completion = tuple(row[f"{side}_ids"])
            if completion not in seen:
                seen[completion] = len(sides)
                sides.append(2 * i + k)
                lengths.append(len(prompt) + len(completion))
            answer_of.append(seen[completion])
    return Answers(sides=sides, lengths=lengths, answer_of=answer_of)


@torch.no_grad()
def score_chunk(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> torch.Tensor:
    """The summed log-probabilities of the answers in some batches, in their order, float32."""
    found = []
    for batch in chunk:
        answers = []
        for side in batch:
            pair = rows[side // 2]
            completion = pair[f"{SIDES[side % 2]}_ids"]
            answers.append(Row(prompt=pair["prompt_ids"], completion=completion))
        packed = collate(answers, device=model.device)
        scores = sequence_logprobs(
            model, input_ids=packed.input_ids, response_mask=packed.response_mask
        )
        found.append(scores.float().cpu())
    return torch.cat(found)
