"""Runs the steps of a plan: reuses what is finished, resumes what is not, and keeps the run's
folder up to date.
"""

import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from align.artifacts import Artifact, HashCache, Run, fingerprint, lock, read_json, write_json
from align.config import Config, Launch
from align.errors import StageError
from align.launch import perform
from align.models.identity import pinned
from align.plan import Step, needed, plan
from align.shapes import shape


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run ended, for the table that compares the runs of a sweep."""

    overrides: list[str]
    folder: Path | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def run_pipeline(config: Config, *, tree: Mapping[str, Any], overrides: list[str]) -> Outcome:
    """Everything from the configuration to the report; what is finished already is not done again.

    Args:
        tree: the same configuration as plain values, to be frozen in the run's folder.

    Raises:
        AlignError: the plan cannot work, or a stage cannot go on.
    """
    command = shlex.join(["python", "-m", "align.run", *overrides])
    tell_left_out(config)
    plan(config, yaml="", command=command)  # what cannot work is refused before the hub is asked
    config = replace(config, model=pinned(config.model))
    frozen = {**tree, "model": {**tree["model"], "revision": config.model.revision}}
    text = yaml.safe_dump(frozen, sort_keys=False, allow_unicode=True)
    steps = plan(config, yaml=text, command=command)
    done = bring_about(
        steps,
        workspace=config.workspace,
        name=config.name,
        text=text,
        command=command,
        how=Work(verify=config.verify, retry=config.retry, launch=config.launch),
    )
    metrics = gather_metrics(done.made, done.run)
    done.run.event("finished")
    closing(done)
    return Outcome(overrides=overrides, folder=done.run.path, metrics=metrics)


def tell_left_out(config: Config) -> None:
    kept = needed(config)
    if odd := [stage for stage in config.stages if stage not in kept]:
        print(f"not needed with algorithm.reward={config.algorithm.reward}: {', '.join(odd)}")


@dataclass(frozen=True, kw_only=True)
class Work:
    """How steps are brought about.

    Attributes:
        verify: finished artifacts are hashed anew.
        retry: those in which a judge failed are made anew.
    """

    verify: bool
    retry: bool
    launch: Launch


@dataclass(frozen=True, kw_only=True)
class Done:
    """A run that went through: its folder, its artifacts by step, and whether anything was new."""

    run: Run
    made: Mapping[str, Artifact]
    anything: bool


def bring_about(
    steps: Sequence[Step], *, workspace: str, name: str, text: str, command: str, how: Work
) -> Done:
    """Makes every step's artifact that does not stand already, in the folder of a run.

    Args:
        text: the configuration, to be frozen in the run's folder.
    """
    root = Path(workspace).absolute()
    hashes = HashCache(root / "artifacts" / "hashes.json")
    shapes = {step.name: identity(step, hashes) for step in steps}
    whole = {step.name: [shapes[step.name], dict(step.inputs)] for step in steps}
    run = Run(workspace=root, name=name, fingerprint=fingerprint(whole))
    run.open(text)
    hashes.save()
    run.event("started", command=command)
    made: dict[str, Artifact] = {}
    worked = [make(step, shapes[step.name], made, run, how) for step in steps]
    return Done(run=run, made=made, anything=any(worked))


def identity(step: Step, hashes: HashCache) -> dict[str, Any]:
    """What a step is, its inputs' content aside."""
    return {
        "stage": step.stage,
        "stage_version": step.settings.version,
        "settings": shape(step.settings, hashes),
    }


def make(
    step: Step, shaped: dict[str, Any], made: dict[str, Artifact], run: Run, how: Work
) -> bool:
    """Brings one step's artifact about; False when it stood there already."""
    contents = {name: made[source].content() for name, source in step.inputs.items()}
    body = {**shaped, "inputs": contents}
    artifact = run.artifact(step.stage, fingerprint(body))
    artifact.path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{step.name}: another run is making it; waiting for it to finish"
    with lock(artifact.path.with_suffix(".lock"), waiting=waiting):
        worked = not stands(artifact, how)
        if worked:
            resumed = artifact.path.is_dir()
            work(step, artifact, body, made, run, how)
            if resumed and not stands(artifact, how):  # it failed before, too
                work(step, artifact, body, made, run, how)
        else:
            print(f"{step.name:<13} up to date", flush=True)
            run.event("reused", step=step.name, artifact=str(artifact.path))
    made[step.name] = artifact
    for name, file in step.links.items():
        run.link(run.path / name, artifact.path / file)
    return worked


def stands(artifact: Artifact, how: Work) -> bool:
    """Whether it is finished and may be used as it is."""
    if not artifact.finished(verify=how.verify):
        return False
    failed = artifact.manifest["counts"].get("failed", 0)
    if failed and how.retry:
        artifact.set_aside(f"{failed} comparisons failed and are asked again", mark="retried")
        return False
    return True


def work(
    step: Step,
    artifact: Artifact,
    body: dict[str, Any],
    made: dict[str, Artifact],
    run: Run,
    how: Work,
) -> None:
    """Calls the stage and closes its artifact with the manifest."""
    resumed = artifact.path.is_dir()
    artifact.path.mkdir(exist_ok=True)
    run.event("resumed" if resumed else "began", step=step.name, artifact=str(artifact.path))
    print(f"{step.name:<13} {'goes on' if resumed else 'starts'}", flush=True)
    started = time.monotonic()
    inputs = {name: made[source].path for name, source in step.inputs.items()}
    try:
        perform(step, inputs=inputs, out=artifact.path, run=run, launch=how.launch)
        artifact.finish(body=body, duration_s=time.monotonic() - started, resumed=resumed)
    except Exception as error:
        run.event(
            "failed",
            step=step.name,
            error=str(error).splitlines()[0] if str(error) else repr(error),
        )
        if "No space left" in str(error) or shutil.disk_usage(artifact.path).free < 1 << 20:
            raise StageError(
                f"{step.name}: no space left below {run.workspace}; free some, then the same "
                "command goes on"
            ) from error
        raise
    seconds = time.monotonic() - started
    print(f"{step.name:<13} done in {seconds:.1f} s", flush=True)
    run.event("made", step=step.name, artifact=str(artifact.path), seconds=round(seconds, 3))


def gather_metrics(made: Mapping[str, Artifact], run: Run) -> dict[str, Any]:
    """The flat metrics of all steps, written to the run's metrics.json."""
    metrics: dict[str, Any] = {}
    for artifact in made.values():
        file = artifact.path / "metrics.json"
        if file.exists():
            metrics |= read_json(file)
    write_json(run.path / "metrics.json", metrics)
    return metrics


def closing(done: Done) -> None:
    run, made = done.run, done.made
    latest, workspace = shortest(run.path.with_name("latest")), shortest(run.workspace)
    if not done.anything:
        print(f"everything is up to date: {latest}")
    if "reward" in made:
        print((made["reward"].path / "verdict.txt").read_text(encoding="utf-8").strip())
        print(f"reward model: {latest / 'reward_model'}, its page: {latest / 'reward.html'}")
    if "report" in made:
        print((made["report"].path / "verdict.txt").read_text(encoding="utf-8").strip())
        print(f"report: {latest / 'report.html'}")
        print(
            f"try it: python -m align.chat run={run.name} workspace={shlex.quote(str(workspace))}"
        )


def shortest(path: Path) -> Path:
    """Relative to the current folder where it lies in it: what one can read and type."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
