"""Samples answers to prompts, with the starting policy or with a trained adapter on it."""

from pathlib import Path

from align.artifacts import write_json
from align.errors import StageError
from align.jsonl import IndexedRecords, JsonlAppender, read_records, truncate_lines
from align.named import named_module
from align.progress import progress_bar
from align.records import Candidate, Prompt
from align.stages.settings import GenerateStage

CANDIDATES = "candidates.jsonl"
BATCHES = "batches.jsonl"


def run(settings: GenerateStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes candidates.jsonl, one line a prompt in the prompts' order, and counts.json.

    Finished batches are appended to batches.jsonl as they come; a resumed run goes on after the
    last whole one.
    """
    if not (out / CANDIDATES).exists():
        order = sample_batches(settings, inputs, out / BATCHES)
        put_in_order(out / BATCHES, order, out / CANDIDATES)
    (out / BATCHES).unlink(missing_ok=True)
    counts = count(out / CANDIDATES)
    if counts["empty"] == counts["responses"]:
        raise StageError(
            "every sampled answer is empty; check model.chat_template and the model itself"
        )
    write_json(out / "counts.json", counts)


def sample_batches(settings: GenerateStage, inputs: dict[str, Path], path: Path) -> list[int]:
    """Samples what is missing in `path`; returns the prompts' indices in the order of its lines."""
    from align.models.adapters import load_adapter
    from align.models.load import load_model, load_tokenizer

    sampler = named_module("align.samplers", settings.sampler.name, settings.sampler.module)
    prompts = IndexedRecords(inputs["prompts"] / "prompts.jsonl", Prompt.from_json)
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model)
    if "train" in inputs:
        model = load_adapter(model, inputs["train"] / "adapter")
    layout = sampler.lay_out(model, tokenizer, prompts, settings=settings.sampler)
    with JsonlAppender(path) as appender:
        whole, lines = 0, 0
        while whole < len(layout.batches) and lines + len(layout.batches[whole]) <= appender.lines:
            lines += len(layout.batches[whole])
            whole += 1
        truncate_lines(path, lines)
        batches = sampler.sample(
            model,
            tokenizer,
            prompts,
            layout=layout,
            settings=settings.sampler,
            seed=settings.seed,
            skip=whole,
        )
        with progress_bar("generate", len(prompts), unit="tokens", done=lines) as advance:
            for candidates in batches:
                appender.append(candidate.to_json() for candidate in candidates)
                advance(len(candidates), sum(r.length for c in candidates for r in c.responses))
    return [i for batch in layout.batches for i in batch]


def put_in_order(source: Path, order: list[int], target: Path) -> None:
    """Copies lines so that the one of prompt 0 comes first; the target appears whole or not at
    all.
    """
    lines = IndexedRecords(source, Candidate.from_json)
    partial = target.with_suffix(".partial")
    line_of = {prompt: line for line, prompt in enumerate(order)}
    with partial.open("wb") as file:
        for prompt in range(len(order)):
            file.write(lines.raw(line_of[prompt]))
    partial.replace(target)


def count(path: Path) -> dict[str, int]:
    """What was sampled, in numbers."""
    counts = dict.fromkeys(
        (
            "prompts",
            "responses",
            "duplicates",
            "empty",
            "cut_prompts",
            "finished_by_length",
            "tokens",
        ),
        0,
    )
    for candidate in read_records(path, Candidate.from_json):
        texts = [response.text for response in candidate.responses]
        counts["prompts"] += 1
        counts["responses"] += len(texts)
        counts["duplicates"] += len(texts) - len(set(texts))
        counts["empty"] += sum(not text for text in texts)
        counts["cut_prompts"] += "cut" in candidate.meta
        counts["finished_by_length"] += sum(r.finish == "length" for r in candidate.responses)
        counts["tokens"] += sum(r.length for r in candidate.responses)
    return counts
