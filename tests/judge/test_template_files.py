"""A judge's prompt is known by every file that it is made of."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from align.artifacts import HashCache
from align.config import CONF
from align.shapes import shape

MARK = {"fingerprint": "template", "shipped": "prompts"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    prompt: str = field(metadata=MARK)
    prompts: str = field(
        default=str(CONF / "judge" / "prompts"), metadata={"fingerprint": "content"}
    )


@pytest.fixture
def workspace(tmp_path) -> Path:
    (tmp_path / "runs" / "artifacts").mkdir(parents=True)
    return tmp_path / "runs"


def known(prompt: Path, workspace: Path) -> object:
    return shape(Asked(prompt=str(prompt)), HashCache(workspace / "artifacts" / "hashes.json"))


def changed(prompt: Path, workspace: Path, file: Path, text: str) -> bool:
    """Whether the prompt is another one once the file has another text."""
    before = known(prompt, workspace)
    file.write_text(text)
    return known(prompt, workspace) != before


def test_a_file_that_is_included_counts_however_it_is_reached(tmp_path, workspace):
    prompt = tmp_path / "my.j2"
    prompt.write_text("{% extends 'base.j2' %}{% block task %}{% include 'a.j2' %}{% endblock %}")
    (tmp_path / "a.j2").write_text("{% include 'house.txt' %}")
    (tmp_path / "house.txt").write_text("Be kind.")
    (tmp_path / "other.txt").write_text("x")
    assert changed(prompt, workspace, tmp_path / "house.txt", "Be strict.")
    assert changed(prompt, workspace, tmp_path / "a.j2", "{% include 'house.txt' %}!")
    assert not changed(prompt, workspace, tmp_path / "other.txt", "changed")
    assert changed(prompt, workspace, tmp_path / "base.j2", "{% block task %}{% endblock %}")


def test_a_file_that_is_missing_or_wrong_counts_once_it_is_there(tmp_path, workspace):
    prompt = tmp_path / "my.j2"
    prompt.write_text("{% include 'house.txt' ignore missing %}{% include 'my.j2' %}")
    assert changed(prompt, workspace, tmp_path / "house.txt", "{% wrong")
    assert changed(prompt, workspace, tmp_path / "house.txt", "{% wrong too")
    (tmp_path / "house.txt").write_bytes(b"\xff")
    assert known(prompt, workspace)


def test_a_name_that_is_worked_out_counts_all_of_the_folder_but_the_workspace(tmp_path, workspace):
    prompt = tmp_path / "my.j2"
    prompt.write_text("{% include kind ~ '.txt' %}")
    assert changed(prompt, workspace, tmp_path / "pairwise.txt", "Compare.")
    assert changed(prompt, workspace, tmp_path / "pairwise.txt", "Compare them.")
    assert not changed(prompt, workspace, workspace / "log.txt", "made")


def test_what_a_template_is_called_shapes_nothing(tmp_path, workspace):
    for name in ("a.j2", "b.j2"):
        (tmp_path / name).write_text("Compare.")
    assert known(tmp_path / "a.j2", workspace) == known(tmp_path / "b.j2", workspace)
