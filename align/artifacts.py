"""What stages leave behind: fingerprints, manifests written last, locks, and the run's folder.

<workspace>/artifacts/<stage>/<fingerprint>/   an artifact; finished when its manifest.json exists
<workspace>/<name>/<fingerprint8>/             a run; links to its artifacts
<workspace>/<name>/latest                      the newest run of that name
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import StageError
from align.jsonl import repair

MANIFEST = "manifest.json"
COUNTS = "counts.json"
PACKAGES = (
    "align",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Floats print as Python's shortest round
    trip.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file as a whole: readers see the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class HashCache:
    """Content hashes of source files and local models; a file is read again only when its size or
    mtime moved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = read_json(path) if path.exists() else {}

    def content(self, path: Path) -> str:
        """SHA-256 of a file, or of the names and hashes of all files below a folder."""
        if path.is_file():
            return self.file(path)
        return fingerprint(
            {p.relative_to(path).as_posix(): self.file(p) for p in files_below(path)}
        )

    def file(self, path: Path) -> str:
        stat = path.stat()
        key, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        if self.known.get(key, [])[:2] != seen:
            self.known[key] = [*seen, hash_file(path)]
        return str(self.known[key][2])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.known)


@contextmanager
def lock(path: Path, *, waiting: str) -> Iterator[None]:
    """Holds `path` for this process; where another one holds it, says `waiting` and waits.

    flock and not a PID file: the kernel releases it when its owner dies, however it dies.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One stage's output folder, named by the fingerprint of everything that shaped it."""

    stage: str
    fingerprint: str
    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        return manifest

    def content(self) -> str:
        """Hash of what the files say, wherever they came from."""
        return fingerprint(
            {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        )

    def damage(self, *, verify: bool) -> str | None:
        """What differs from the manifest: a sentence, or None. Re-hashes where size or mtime moved,
        or with `verify`.
        """
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            stat = file.stat()
            if stat.st_size != entry["size"]:
                return f"{name} has {stat.st_size} bytes instead of {entry['size']}"
            moved = stat.st_mtime_ns != entry["mtime_ns"]
            if (moved or verify) and hash_file(file) != entry["sha256"]:
                return f"{name} has another sha256 than its manifest says"
        return None

    def finished(self, *, verify: bool = False) -> bool:
        """True when the manifest stands and the files agree with it.

        A damaged artifact is moved aside, never overwritten, and counts as not made.
        """
        if not (self.path / MANIFEST).exists():
            return False
        damage = self.damage(verify=verify)
        if damage is None:
            return True
        self.set_aside(damage, mark="damaged")
        return False

    def set_aside(self, why: str, *, mark: str) -> None:
        """Moves it to NAME.MARK-TIME: it is made again, and nothing is lost if that fails."""
        aside = self.path.with_name(f"{self.path.name}.{mark}-{time.time_ns()}")
        self.path.rename(aside)
        print(f"{self.stage}: {why}; moved it to {aside} and making it again", flush=True)

    def finish(self, *, body: Mapping[str, Any], duration_s: float, resumed: bool) -> None:
        """Writes the manifest, last of all, so that a killed stage is never taken for a finished
        one. What the stage says of itself in counts.json goes along. The duration of a `resumed`
        one leaves out what was done before.
        """
        remove_partials(self.path)
        files = {}
        for file in files_below(self.path):
            stat = file.stat()
            entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": hash_file(file)}
            files[file.relative_to(self.path).as_posix()] = entry
        rows = {name: count_lines(self.path / name) for name in files if name.endswith(".jsonl")}
        counts = read_json(self.path / COUNTS) if COUNTS in files else {}
        write_json(
            self.path / MANIFEST,
            {
                **body,
                "fingerprint": self.fingerprint,
                "rows": rows,
                "counts": counts,
                "files": files,
                "versions": versions(),
                "git_commit": git_commit(),
                "duration_s": round(duration_s, 3),
                "resumed": resumed,
                "cost_usd": float(counts.get("cost_usd", 0.0)),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )


def remove_partials(folder: Path) -> None:
    """Removes what starts with a dot: files and folders that a kill left half-written or
    half-removed.
    """
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the clone that this package runs from, None outside a clone."""
    clone = Path(__file__).parent.parent
    if not (clone / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


@dataclass(frozen=True, kw_only=True)
class Run:
    """`<workspace>/<name>/<fingerprint8>`: what one command made, by links, with its events and
    metrics.
    """

    workspace: Path
    name: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.workspace / self.name / self.fingerprint[:8]

    def artifact(self, stage: str, digest: str) -> Artifact:
        return Artifact(
            stage=stage, fingerprint=digest, path=self.workspace / "artifacts" / stage / digest
        )

    def open(self, config: str) -> None:
        """Makes the folder, writes the config and points `latest` here.

        Raises:
            StageError: the workspace cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.yaml", config)
            repair(self.path / "events.jsonl")
            self.link(self.path.with_name("latest"), self.path)
        except OSError as error:
            raise StageError(
                f"workspace={self.workspace}: cannot write there ({error.strerror}); give another "
                "workspace=DIR"
            ) from error

    def link(self, link: Path, target: Path) -> None:
        """A relative link, replaced atomically, so that the workspace can be moved."""
        partial = link.with_name(f".{link.name}.{os.getpid()}")
        partial.unlink(missing_ok=True)
        partial.symlink_to(os.path.relpath(target, link.parent))
        partial.replace(link)

    def event(self, kind: str, **what: Any) -> None:
        """One line in events.jsonl: what happened and when (UTC, seconds)."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **what})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
