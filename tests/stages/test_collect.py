"""Candidates that somebody else made: a bad row is named by its place, and the rest goes on."""

import json
from pathlib import Path

import pytest

from align.errors import DataError
from align.stages import collect
from align.stages.settings import CollectStage

GOOD = '{"prompt": "?", "responses": ["a", "b"]}'
BAD = (
    '{"prompt": "?", "responses": ["a", "b"], "sampler": "gpt-4"}',
    '{"prompt": "?", "responses": [{"text": "a", "seed": 1e999}]}',
    '{"prompt": "?", "responses": [{"text": "a", "tokens": 5}]}',
    '{"prompt": "?", "responses": [{"text": "a", "logprob": "x"}]}',
    '{"prompt": "?", "responses": [{"text": "a", "logprob": 1' + "0" * 400 + "}]}",
    '{"prompt": "?", "responses": ["a"], "meta": "x"}',
    '{"prompt": "?", "responses": ["a"], "meta": ' + "[" * 100_000 + "]" * 100_000 + "}",
)


def collected(path: Path, out: Path) -> tuple[list[dict], list[dict]]:
    """The rows that were taken in, and those that were refused."""
    out.mkdir()
    collect.run(CollectStage(path=str(path)), {}, out)
    files = (out / "candidates.jsonl", out / "refused.jsonl")
    good, bad = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    return good, bad


def test_every_bad_row_is_named_by_file_and_line_and_the_rest_goes_on(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join((GOOD, *BAD, GOOD)))
    good, bad = collected(path, tmp_path / "out")
    assert len(good) == 2
    assert [row["place"] for row in bad] == [f"{path}:{n}" for n in range(2, len(BAD) + 2)]
    told = capsys.readouterr().err
    assert all(f"{row['place']}: {row['why']}" in told for row in bad)
    assert '"sampler" is a str' in bad[0]["why"] and '"tokens" is 5' in bad[2]["why"]


def test_an_id_stands_for_one_row(tmp_path):
    row = '{{"id": "{}", "prompt": "{}", "responses": ["a", "b"]}}'
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(row.format(id, n) for n, id in enumerate(["q", "r", "q", "\\ud800"])))
    good, bad = collected(path, tmp_path / "out")
    assert [row["id"] for row in good] == ["q", "r", "\ud800"]
    assert bad[0]["place"] == f"{path}:3" and "the id 'q' was used before" in bad[0]["why"]


def test_a_file_without_any_candidates_is_an_error(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(BAD[:3]))
    with pytest.raises(DataError, match="no row has candidates"):
        collected(path, tmp_path / "out")
