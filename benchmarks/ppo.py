"""Measures our PPO beside TRL 1.12.0's: time by phase, memory, equality, quality in equal time.

`python benchmarks/ppo.py [--shape 8B-like] [--rows N] [--repeats K] …` times both and counts bytes;
`--equal` replays TRL's rollouts through ours; `--quality` trains the starter's model for as many
seconds with each kind of value function. Every arm is a fresh process with the same environment and
threads; the arms take turns, and each repetition turns their order. TRL is installed in a folder
of its own on the first call.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ppo_equal, ppo_ours, ppo_setup, ppo_trl
from benchmarks.table import Row, machine, markdown

Figures = dict[str, Any]
PHASES = ("rollout", "optimisation", "rest")  # generation is not compared
MEASURES = ("time", "bytes")
ARMS: dict[str, tuple[str, ...]] = {
    "trl": (),
    "trunk": ("--value", "trunk"),
    "adapter": ("--value", "adapter"),
    "none": ("--value", "none"),
    "trunk-nf4": ("--value", "trunk", "--base", "nf4"),
    "adapter-nf4": ("--value", "adapter", "--base", "nf4"),
}
TOLD = {
    "trl": "TRL 1.12.0, float32, as shipped", "trunk": "ours, value on the trunk, float32",
    "adapter": "ours, value adapter, float32", "none": "ours, no value function, float32",
    "trunk-nf4": "ours, value on the trunk, NF4", "adapter-nf4": "ours, value adapter, NF4",
}  # fmt: skip
# Samples a prompt, and how many times as fast as TRL it has to be; by arm.
GOALS = {1: {"trunk": 1.9, "adapter": 1.1}, 4: {"trunk": 3.5, "adapter": 2.0}}
BYTES = (  # TRL's dtype, ours, and the most that the models may have of TRL's
    ("float32", "nf4", 0.25), ("bfloat16", "nf4", 0.4), ("bfloat16", "nf4-bfloat16", 0.4),
    ("bfloat16", "bfloat16", 0.4), ("float32", "float32", None),
)  # fmt: skip


# An arm.


def measured(arm: str, words: Sequence[str], *, inputs: Path, threads: int) -> Figures:
    """One fresh process of an arm."""
    if arm == "trl":
        return ppo_trl.run([*words], threads=threads)
    return ppo_ours.run([*words, *ARMS[arm]], inputs=inputs, threads=threads)


def compared(iteration: Figures) -> float:
    """Seconds of an iteration without generation."""
    return sum(iteration["seconds"][phase] for phase in PHASES)


def spread(values: Iterable[float]) -> str:
    """Median, least and most."""
    known = sorted(values)
    return f"{statistics.median(known):.3g} ({known[0]:.3g}–{known[-1]:.3g})"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.2f} MiB"


# Time.


def timed(given: argparse.Namespace, inputs: Path) -> dict[str, list[Figures]]:
    """Every arm's figures, a repetition each; in turns the first and the last comes first."""
    words = [*given.words, "--iterations", str(given.steps + 1)]
    found: dict[str, list[Figures]] = {arm: [] for arm in given.arms}
    for repetition in range(given.repeats):
        for arm in given.arms if repetition % 2 == 0 else given.arms[::-1]:
            figures = measured(arm, words, inputs=inputs, threads=given.threads)
            found[arm].append(figures)
            seconds = spread(map(compared, figures["iterations"]))
            print(f"{repetition + 1}/{given.repeats} {TOLD[arm]}: {seconds} s", flush=True)
    return found


def time(given: argparse.Namespace, inputs: Path) -> Iterator[Row]:
    found = timed(given, inputs)
    for arm, repetitions in found.items():
        yield Row(what=TOLD[arm], measured=phases(repetitions))
        yield Row(what="… most in memory", measured=held(repetitions))
    goals = GOALS.get(given.sizes.samples, {})
    for arm in found:
        if arm != "trl" and "trl" in found:
            yield ratio_row(arm, found["trl"], found[arm], goal=goals.get(arm))


def phases(repetitions: list[Figures]) -> str:
    """Seconds by phase, over the iterations of all repetitions; and what takes them."""
    iterations = [each for figures in repetitions for each in figures["iterations"]]
    tokens = sum(repetitions[0]["tokens"].values())
    whole = statistics.median(map(compared, iterations))
    told = ", ".join(
        f"{phase} {spread(each['seconds'][phase] for each in iterations)}" for phase in PHASES
    )
    names = sorted({name for each in iterations for name in each["parts"]})
    medians = {
        name: statistics.median(each["parts"].get(name, 0.0) for each in iterations)
        for name in names
    }
    parts = ", ".join(
        f"{name} {seconds:.3g}"
        for name, seconds in sorted(medians.items(), key=lambda pair: -pair[1])
        if seconds >= 0.005 * whole
    )
    return (
        f"{spread(map(compared, iterations))} s an iteration, {tokens / whole:,.0f} tokens/s: "
        f"{told}; in it: {parts}"
    )


def held(repetitions: list[Figures]) -> str:
    """Process and saved tensors, at most."""
    peak = max(figures["rss_peak_bytes"] for figures in repetitions)
    loaded = max(figures["rss_loaded_bytes"] for figures in repetitions)
    saved = max(figures["saved_tensor_bytes"] for figures in repetitions)
    return (
        f"process {mebibytes(peak)} ({mebibytes(loaded)} before training), saved for a backward "
        f"pass {mebibytes(saved)}"
    )


def ratio_row(arm: str, theirs: list[Figures], ours: list[Figures], *, goal: float | None) -> Row:
    """Time by time of the same repetition, of the same rows and tokens. The mark is held against
    TRL's time without its two garbage collections an iteration, whose cost is the process's size
    and not the batch's.
    """

    def without_gc(iteration: Figures) -> float:
        return compared(iteration) - float(iteration["parts"].get("gc", 0.0))

    def ratios(seconds: Callable[[Figures], float]) -> list[float]:
        return [
            statistics.median(map(seconds, t["iterations"]))
            / statistics.median(map(compared, o["iterations"]))
            for t, o in zip(theirs, ours, strict=True)
        ]

    plain = ratios(without_gc)
    return Row(
        what=f"times as fast as TRL without generation: {TOLD[arm]}",
        measured=(
            f"{spread(plain)}, {len(plain)} repetitions; with TRL's garbage collections "
            f"{spread(ratios(compared))}"
        ),
        mark="" if goal is None else f"≥ {goal:g}",
        met=None if goal is None else statistics.median(plain) >= goal,
    )


# Bytes, which depend on the models alone.


def bytes_of(given: argparse.Namespace, inputs: Path) -> Iterator[Row]:
    short = {"prompt": 8, "response": 8, "rows": given.sizes.samples}
    words = [*given.words, "--iterations", "2"]
    for key, value in short.items():
        words += [f"--{key}", str(value)]
    theirs = {
        dtype: ppo_trl.run([*words, "--dtype", dtype], threads=given.threads)["bytes"]
        for dtype in dict.fromkeys(dtype for dtype, _, _ in BYTES)
    }
    for dtype, sizes in theirs.items():
        yield Row(what=f"bytes of TRL's models, {dtype}", measured=sizes_told(sizes))
    for value in ("trunk", "adapter"):
        ours = {
            base: ppo_ours.run(
                [*words, "--value", value, "--base", base], inputs=inputs, threads=given.threads
            )["bytes"]
            for base in dict.fromkeys(base for _, base, _ in BYTES)
        }
        for base, sizes in ours.items():
            yield Row(what=f"bytes of ours, value={value}, {base}", measured=sizes_told(sizes))
        for dtype, base, most in BYTES:
            yield bytes_row(value, dtype, base, theirs[dtype], ours[base], most=most)


def models(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name != "optimizer")


def sizes_told(sizes: dict[str, int]) -> str:
    each = ", ".join(f"{name} {mebibytes(size)}" for name, size in sizes.items() if size)
    return f"{mebibytes(models(sizes))} without the optimizer: {each}"


def bytes_row(
    value: str, dtype: str, base: str, theirs: dict[str, int], ours: dict[str, int], *,
    most: float | None,
) -> Row:  # fmt: skip
    share = models(ours) / models(theirs)
    whole = sum(ours.values()) / sum(theirs.values())
    shipped = " as shipped" if dtype == "float32" else ""
    return Row(
        what=f"models: ours in {base}, value={value}, over TRL's in {dtype}{shipped}",
        measured=f"{share:.2f}; with the optimizer's state {whole:.2f}",
        mark="" if most is None else f"≤ {most:g}",
        met=None if most is None else share <= most,
    )


# Quality in equal time.


def quality(given: argparse.Namespace) -> Iterator[Row]:
    """Judge's win rate over the start, after as many seconds of learning; layouts take turns."""
    found: dict[str, list[Figures]] = {value: [] for value in given.values}
    for seed in range(given.repeats):
        for value in given.values if seed % 2 == 0 else given.values[::-1]:
            reached = trained(given, value, seed=seed)
            found[value].append(reached)
            told = f"{reached['eval_win_rate']:.3f} after {reached['iterations']} iterations"
            print(f"seed {seed}, value={value}: {told}", flush=True)
    for value, runs in found.items():
        each = ", ".join(f"{run['eval_win_rate']:.1%}" for run in runs)
        win = statistics.median(run["eval_win_rate"] for run in runs)

        def median(key: str, runs: list[Figures] = runs) -> float:
            return statistics.median(run[key] for run in runs)

        yield Row(
            what=f"win rate after {given.seconds:g} s, value={value}",
            measured=(
                f"**{win:.1%}** ({each}; {median('eval_judged'):.0f} prompts each); "
                f"{median('iterations'):.0f} iterations, KL {median('kl'):.2f}; seconds of "
                f"sampling {median('generate_s'):.0f}, of passes {median('score_s'):.0f}, of "
                f"learning {median('learn_s'):.0f}"
            ),
        )


def trained(given: argparse.Namespace, value: str, *, seed: int) -> Figures:
    """What a fresh process reaches on the starter's model, with its rubric as the reward."""
    with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
        words = [
            "recipe=ppo", "stages=[train]", f"workspace={folder}", f"seed={seed}",
            "algorithm.module=benchmarks.ppo_timed", f"+algorithm.seconds={given.seconds:g}",
            "algorithm.reward=rubric_reward:reward", f"algorithm.value={value}",
            "algorithm.iterations=100000", "algorithm.schedule=constant", "algorithm.warmup=0",
            "algorithm.monitor_every=100000", "algorithm.monitor_prompts=400",
            "algorithm.held_out=0.25", "launch=inline", *given.override,
        ]  # fmt: skip
        environment = ppo_setup.environment(
            given.threads, ppo_setup.REPOSITORY / "recipes" / "starter-ppo"
        )
        command = [sys.executable, "-m", "align.run", *words]
        subprocess.run(command, env=environment, cwd=folder, stdout=sys.stderr, check=True)
        (reached,) = Path(folder).glob("artifacts/**/reached.json")
        found: Figures = json.loads(reached.read_text())
        return found


# The command.


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    ppo_setup.add_shape(parser)
    parser.add_argument("--repeats", type=int, default=2, help="of every arm, or seeds")
    parser.add_argument("--steps", type=int, default=5, help="iterations that count, after one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["trl", "trunk", "adapter"],
        help="that are timed; none needs --samples 2 or more",
    )  # fmt: skip
    parser.add_argument("--equal", action="store_true", help="compare what both compute")
    parser.add_argument("--quality", action="store_true", help="compare what is learnt")
    parser.add_argument("--seconds", type=float, default=90, help="of learning, with --quality")
    parser.add_argument(
        "--values", nargs="+", choices=ppo_ours.VALUES, default=list(ppo_ours.VALUES),
        help="with --quality",
    )  # fmt: skip
    parser.add_argument(
        "--override", nargs="+", default=[], help="settings of the run, with --quality"
    )
    parser.add_argument("--markdown", type=Path, help="the table's file")
    given = parser.parse_args()
    given.sizes = ppo_setup.shape_of(given)
    given.words = shape_words(given)
    if "none" in given.arms and given.sizes.samples < 2:
        parser.error("--arms none compares a prompt's answers: give --samples 2 or more")
    if given.repeats < 1 or given.steps < 1:
        parser.error("--repeats and --steps: give 1 or more")
    return given


def shape_words(given: argparse.Namespace) -> list[str]:
    """The shape as the arms' own options."""
    words = []
    for key in ("shape", *ppo_setup.Shape.__dataclass_fields__):
        value = getattr(given, key)
        if value is True:
            words.append(f"--{key}")
        elif value is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def rows(given: argparse.Namespace) -> Iterator[Row]:
    if given.equal or given.quality:
        if given.equal:
            with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
                yield from ppo_equal.table(ppo_equal.equal(Path(folder), threads=given.threads))
        if given.quality:
            yield from quality(given)
        return
    with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
        inputs = Path(folder)
        ppo_ours.prepare(inputs, given.words, threads=given.threads)
        if "time" in given.only:
            yield from time(given, inputs)
        if "bytes" in given.only:
            yield from bytes_of(given, inputs)


def main() -> int:
    given = parsed()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")
    )
    typed = " ".join(["python", *sys.argv])
    heading = f"{machine(versions)}, load {os.getloadavg()[0]:.1f}: `{typed}`"
    print(heading, flush=True)
    found = []
    for row in rows(given):
        print(" | ".join(cell for cell in row.cells if cell), flush=True)
        found.append(row)
    table = markdown(found, heading)
    if given.equal:
        table += "\n" + ppo_equal.told() + "\n"
    print(table)
    if given.markdown is not None:
        given.markdown.write_text(table, "utf-8")
    return 1 if any(row.met is False for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
