"""Artifacts: finished means manifest, damage is found and set aside, fingerprints see content
only.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align import artifacts
from align.artifacts import HashCache, Run, fingerprint, lock, write_json


@pytest.fixture
def artifact(tmp_path):
    run = Run(workspace=tmp_path, name="dpo", fingerprint="f" * 64)
    made = run.artifact("label", "a" * 64)
    made.path.mkdir(parents=True)
    (made.path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (made.path / "counts.json").write_text('{"preferences": 2, "cost_usd": 0.25}')
    made.finish(body={"stage": "label"}, duration_s=1.0, resumed=False)
    return made


def test_only_a_manifest_makes_an_artifact_finished(artifact):
    assert artifact.finished()
    assert artifact.manifest["rows"] == {"rows.jsonl": 2}
    assert artifact.manifest["counts"]["preferences"] == 2
    assert artifact.manifest["cost_usd"] == 0.25
    (artifact.path / "manifest.json").unlink()
    assert not artifact.finished()


def test_what_a_kill_left_half_done_does_not_become_part_of_an_artifact(tmp_path):
    run = Run(workspace=tmp_path, name="dpo", fingerprint="f" * 64)
    made = run.artifact("train", "a" * 64)
    (made.path / ".checkpoints.done" / "checkpoint-4").mkdir(parents=True)
    (made.path / ".checkpoints.done" / "checkpoint-4" / "optimizer.pt").write_bytes(b"pickle")
    (made.path / ".metrics.json.4711").write_text("{")
    (made.path / "metrics.json").write_text("{}")
    made.finish(body={"stage": "train"}, duration_s=1.0, resumed=True)
    assert list(made.manifest["files"]) == ["metrics.json"]
    assert sorted(p.name for p in made.path.iterdir()) == ["manifest.json", "metrics.json"]


def test_a_copied_workspace_is_still_finished_though_its_times_moved(artifact):
    os.utime(artifact.path / "rows.jsonl", (1, 1))
    assert artifact.finished()


@pytest.mark.parametrize("damage", ['{"a": 1}\n', '{"a": 1}\n{"a": 3}\n', None])
def test_a_damaged_artifact_is_moved_aside_and_nothing_is_lost(artifact, damage, capsys):
    file = artifact.path / "rows.jsonl"
    file.unlink()
    if damage is not None:
        file.write_text(damage)
    assert not artifact.finished()
    aside = list(artifact.path.parent.glob("*.damaged-*"))
    assert len(aside) == 1 and (aside[0] / "manifest.json").exists()
    assert not artifact.path.exists()
    assert "moved it to" in capsys.readouterr().out


def test_verify_finds_a_change_that_size_and_time_hide(artifact):
    file = artifact.path / "rows.jsonl"
    stat = file.stat()
    file.write_text('{"a": 1}\n{"a": 9}\n')
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert artifact.damage(verify=False) is None
    assert "sha256" in artifact.damage(verify=True)


def test_a_fingerprint_knows_content_not_order_of_keys():
    assert fingerprint({"a": 1, "b": 0.1}) == fingerprint({"b": 0.1, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_the_hash_cache_notices_an_edit(tmp_path):
    cache, file = HashCache(tmp_path / "hashes.json"), tmp_path / "model.bin"
    file.write_text("one")
    first = cache.content(file)
    cache.save()
    file.write_text("two!")
    assert HashCache(tmp_path / "hashes.json").content(file) != first


def test_a_second_process_waits_for_the_lock_and_says_so(tmp_path):
    path = tmp_path / "x.lock"
    program = (
        "import sys, pathlib; from align.artifacts import lock\n"
        "with lock(pathlib.Path(sys.argv[1]), waiting='waiting'): print('got it', flush=True)"
    )
    with lock(path, waiting="never"):
        other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"waiting\n"
        time.sleep(0.2)
        assert other.poll() is None
    assert other.communicate(timeout=10)[0] == b"got it\n"
    assert other.returncode == 0


def test_a_torn_last_event_does_not_swallow_the_next_one(tmp_path):
    run = Run(workspace=tmp_path, name="dpo", fingerprint="f" * 64)
    run.open("a: 1\n")
    run.event("began")
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')
    run.open("a: 1\n")
    run.event("resumed")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["began", "resumed"]


def test_latest_points_at_the_newest_run_and_earlier_ones_stay(tmp_path):
    for digest in ("a" * 64, "b" * 64):
        run = Run(workspace=tmp_path, name="dpo", fingerprint=digest)
        run.open("")
        write_json(run.path / "metrics.json", {"d": digest})
    assert (tmp_path / "dpo" / "latest").resolve().name == "b" * 8
    assert (tmp_path / "dpo" / ("a" * 8) / "metrics.json").exists()


def test_an_installed_package_does_not_claim_the_commit_of_a_repository_around_it(
    tmp_path, monkeypatch
):
    assert artifacts.git_commit() is not None or not (Path(__file__).parents[1] / ".git").exists()
    inside = tmp_path / "venv" / "site-packages" / "align"
    inside.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    commit = ["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, check=True)
    monkeypatch.setattr(artifacts, "__file__", str(inside / "artifacts.py"))
    assert artifacts.git_commit() is None
