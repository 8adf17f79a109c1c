"""The model card of an adapter: what it is, how well it did, how to load it, and its limits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.algorithms.ppo.health import overoptimised
from align.stages.evidence import Evidence
from align.stages.online_page import source
from align.stages.verdict import bounds, number, overall, percent, verdict

QUANTIZED = {
    "nf4": """quantized = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
)
""",
    "int8": "quantized = BitsAndBytesConfig(load_in_8bit=True)\n",
}
LOST = ("refusal", "malformed", "overflow", "failed", "duplicates", "empty", "inconsistent")


CONFIG = "adapter_config.json"


def is_whole(files: Sequence[str]) -> bool:
    """Whether a folder holds a model rather than an adapter."""
    return "config.json" in files and CONFIG not in files


def model_card(evidence: Evidence, *, name: str, command: str, files: Sequence[str]) -> str:
    """README.md of the adapter's folder: YAML front matter for the hub, then Markdown.

    Args:
        name: of the run.
        command: what reproduces it.
        files: names of the adapter's files, to know whether the tokenizer came along.
    """
    told, whole = verdict(evidence.metrics, judge=evidence.judge), is_whole(files)
    parts = [
        front_matter(evidence, whole=whole),
        f"# {inline(name)}",
        f"{'A model' if whole else 'An adapter'} aligned to preferences with "
        f"{algorithm(evidence)} by `align`. {inline(told.sentence)}",
        "## How well it did",
        results(evidence),
        "## What it was trained on",
        training(evidence, whole=whole),
        "## How to load it",
        loading(evidence, files=files),
        "## Limits",
        limits(evidence),
        "## How to reproduce it",
        fenced(command, "bash"),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(evidence: Evidence, *, whole: bool = False) -> str:
    """Hub metadata; the YAML library quotes every value, so no name can break out of it."""
    base = base_model(evidence)
    metadata: dict[str, Any] = {
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "align",
            "preference-alignment",
            algorithm(evidence).lower(),
            adapter_kind(evidence, whole=whole).lower(),
        ],
    }
    if is_folder(base):
        what = "The base model is a local folder; name its hub repository before you publish"
        note = f"# {what}: {json.dumps(base)}\n"
        return f"---\n{note}{dumped(metadata)}---"
    return f"---\n{dumped({'base_model': base, **metadata})}---"


def dumped(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=False, width=10_000)


def base_model(evidence: Evidence) -> str:
    return str(evidence.setting("model.name") or "unknown")


def revision(evidence: Evidence) -> str | None:
    """The commit that training resolved, else the one that was asked for."""
    trained = (evidence.manifests["train"].get("settings") or {}).get("model") or {}
    found = trained.get("revision") or evidence.setting("model.revision")
    return None if found is None else str(found)


def is_folder(base: str) -> bool:
    return base.startswith(("/", ".", "~")) or base.count("/") > 1 or Path(base).is_dir()


def algorithm(evidence: Evidence) -> str:
    return str(evidence.setting("algorithm.name") or "preference optimization").upper()


def adapter_kind(evidence: Evidence, *, whole: bool = False) -> str:
    if whole:
        return "full-fine-tuning"
    low_rank = "DoRA" if evidence.setting("adapter.name") == "dora" else "LoRA"
    return f"Q{low_rank}" if evidence.setting("model.quantization") == "nf4" else low_rank


def results(evidence: Evidence) -> str:
    """The table of measurements, each with its interval where there is one."""
    metrics, rate = evidence.metrics, overall(evidence.metrics)
    rows = []
    if rate is not None:
        rows.append(
            (
                "Win rate against the start",
                percent(rate.mean),
                f"{bounds(rate)}, {rate.n:,} prompts",
            )
        )
    for key, label in (
        ("evaluate/win_rate_length_controlled", "Win rate at equal length"),
        ("evaluate/win_rate_equal_manners", "Win rate at equal manners"),
        ("evaluate/correct_before", "Correct before"),
        ("evaluate/correct_after", "Correct after"),
        ("evaluate/held_out_accuracy", "Held-out preferences ranked right"),
    ):
        if key in metrics:
            ends = [metrics.get(f"{key}_low"), metrics.get(f"{key}_high")]
            known = [f"{100 * end:.1f}" for end in ends if end is not None]
            rows.append((label, percent(metrics[key]), "–".join(known)))
    for key, label in (
        ("evaluate/kl", "KL from the start (nats an answer)"),
        ("evaluate/length_before", "Mean length before (tokens)"),
        ("evaluate/length_after", "Mean length after (tokens)"),
    ):
        if key in metrics:
            rows.append((label, number(metrics[key]), ""))
    body = "\n".join(f"| {label} | {value} | {more} |" for label, value, more in rows)
    judged = (
        "No judge compared the answers."
        if evidence.judge is None
        else f"Judge: {inline(evidence.judge)}."
    )
    if evidence.same_judge:
        gave = evidence.online and not evidence.counts.get("preferences")
        did = "gave the rewards" if gave else "labelled the training data"
        judged += f" It {did} too, so this is no independent measurement."
    return f"| | | 95% interval |\n|---|---:|---|\n{body}\n\n{judged} A tie counts as half a win."


def training(evidence: Evidence, *, whole: bool = False) -> str:
    """Counts of what became data and of what did not."""
    counts, metrics = evidence.counts.get("preferences", {}), evidence.metrics
    lines = sampling(evidence) if evidence.online else []
    if "train/pairs" in metrics:
        steps = f", {metrics['train/steps']:,.0f} steps" if "train/steps" in metrics else ""
        lines.append(f"- {metrics['train/pairs']:,.0f} preference pairs{steps}")
    if "comparisons" in counts:
        labeller = f" by the judge {inline(evidence.label_judge)}" if evidence.label_judge else ""
        became = f"{counts.get('preferences', 0):,.0f} became preferences"
        lines.append(f"- {counts['comparisons']:,.0f} comparisons{labeller}, of which {became}")
        lost = [f"{counts[key]:,.0f} {key}" for key in ("tie", *LOST) if counts.get(key)]
        lines.append(f"- Of note among them: {', '.join(lost) or 'nothing'}")
    data = evidence.setting("data.name")
    if data:
        lines.append(f"- Data: {inline(str(data))}")
    without = "as it was before training" if whole else "without the adapter"
    reference = f"the base model {without}, in the same precision as in training"
    lines.append(f"- Reference policy: {reference}")
    return "\n".join(lines)


def sampling(evidence: Evidence) -> list[str]:
    """What a policy learnt from that learnt from its own answers."""
    metrics = evidence.metrics
    lines = [f"- {metrics['train/answers']:,.0f} answers that it sampled itself"]
    if "train/iterations" in metrics:
        lines[0] += f", in {metrics['train/iterations']:,.0f} iterations"
    if "train/prompts" in metrics:
        lines[0] += f", to {metrics['train/prompts']:,.0f} prompts"
    lines.append(f"- Rewards: {inline(source(evidence))}")
    if "reward/held_out_accuracy" in metrics:
        ranked = percent(metrics["reward/held_out_accuracy"])
        lines[-1] += f", which ranks {ranked} of held-out pairs as the judge does"
    if "train/kl" in metrics:
        told = f"{number(metrics['train/kl'])} nats an answer at the last iteration"
        lines.append(f"- KL from the reference: {told}")
    return lines


def loading(evidence: Evidence, *, files: Sequence[str]) -> str:
    """Plain peft and transformers; names are written as JSON, whose strings Python reads too."""
    if is_whole(files):
        return loading_whole(evidence, files=files)
    base, commit = json.dumps(base_model(evidence)), revision(evidence)
    config = QUANTIZED.get(str(evidence.setting("model.quantization")), "")
    where = "ADAPTER" if "tokenizer_config.json" in files else "BASE"
    pinned = f", revision={json.dumps(commit)}" if commit else ""
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if config else "")
    argument = ", quantization_config=quantized" if config else ""
    code = f"""import torch
from peft import PeftModel
from transformers import {imports}

BASE, ADAPTER = {base}, "."  # the folder of this file
dtype = torch.bfloat16  # torch.float32 on a CPU
{config}base = AutoModelForCausalLM.from_pretrained(BASE{pinned}, dtype=dtype{argument})
model = PeftModel.from_pretrained(base, ADAPTER).eval()
tokenizer = AutoTokenizer.from_pretrained({where}{pinned if where == "BASE" else ""})"""
    return fenced(code, "python") + template_note(evidence)


def loading_whole(evidence: Evidence, *, files: Sequence[str]) -> str:
    """Of a model, not an adapter; its tokenizer is the base's unless it came along."""
    base, commit = json.dumps(base_model(evidence)), revision(evidence)
    pinned = f", revision={json.dumps(commit)}" if commit else ""
    tokenizer = '"."' if "tokenizer_config.json" in files else f"{base}{pinned}"
    code = f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

dtype = torch.bfloat16  # torch.float32 on a CPU
model = AutoModelForCausalLM.from_pretrained(".", dtype=dtype).eval()  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""
    return fenced(code, "python") + template_note(evidence)


def template_note(evidence: Evidence) -> str:
    template = evidence.setting("model.chat_template")
    return f"\n\nIt was trained with the chat template {inline(str(template))}." if template else ""


def limits(evidence: Evidence) -> str:
    """What a reader must not conclude."""
    prefers = "source of rewards" if evidence.online else "judge"
    lines = [
        "- It was measured on held-out prompts of the kind it was trained on; elsewhere it may do "
        "better or worse.",
        f"- It repeats what its {prefers} prefers, the {prefers}'s blind spots included.",
        "- It was not examined for safety; the base model's limits and licence hold for it too.",
    ]
    best = overoptimised(evidence.curves)
    if best is not None:
        lines.append(
            "- On held-out prompts its reward went on rising while the judge's win rate fell since "
            f"iteration {best}: it is over-optimised."
        )
    if evidence.setting("model.quantization") == "nf4":
        gap = evidence.metrics.get("evaluate/precision_gap")
        known = f" (by {number(gap)} nats a token)" if gap is not None else ""
        lines.append(
            f"- It was trained on the 4-bit base; "
            f"on the base in full precision it answers slightly differently{known}. "
            "Do not merge it into 4-bit weights."
        )
    if evidence.judge == "rubric":
        lines.append(
            "- The rubric judge knows the starter's facts: "
            "what it measures says nothing about other domains."
        )
    return "\n".join(lines)


def inline(text: str) -> str:
    """Text of others on one line of Markdown, with nothing in it that Markdown would act on."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]#|":
        flat = flat.replace(mark, f"\\{mark}")
    return flat


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
