"""Sources: local files in both formats, TRL's conversational form, and the QA-Feedback release."""

import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from align.errors import DataError
from align.sources import preferences, prompts, qa_feedback
from align.sources.settings import Preferences
from align.stages.read import run
from align.stages.settings import ReadStage

RELEASE = Path(__file__).parents[3] / "shared" / "data" / "qa_feedback" / "dev_feedback.json"


def settings(path: Path, **changes) -> Preferences:
    given = {
        "name": "preferences",
        "module": None,
        "path": str(path),
        "test_path": None,
        "limit": None,
        "max_length": None,
    }
    return Preferences(**{**given, **changes})


def test_parquet_and_jsonl_give_the_same_records(tmp_path):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    lines, table = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    one, other = (list(preferences.read(path, settings=settings(path))) for path in (lines, table))
    assert one == other and len(one) == 3


def test_columns_of_ones_own_survive_from_parquet_too(tmp_path):
    import datetime
    from decimal import Decimal

    when = datetime.datetime(2026, 3, 1, 12, 30)
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    own = {"when": when, "price": Decimal("1.50"), "tags": [{"day": when.date()}]}
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **own}]), path)
    run(ReadStage(source=settings(path), test=False, limit=None), {}, tmp_path)
    read = json.loads((tmp_path / "preferences.jsonl").read_text())
    assert read["meta"] == {
        "when": "2026-03-01T12:30:00",
        "price": "1.50",
        "tags": [{"day": "2026-03-01"}],
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "raw": b"\xff"}]), path)
    with pytest.raises(DataError, match="row 1: column 'raw' holds bytes"):
        run(ReadStage(source=settings(path), test=False, limit=None), {}, tmp_path)


def test_the_conversational_form_of_trl_is_read(tmp_path):
    path = tmp_path / "p.jsonl"
    turn = {"role": "user", "content": "q"}
    row = {
        "chosen": [turn, {"role": "assistant", "content": "a"}],
        "rejected": [turn, {"role": "assistant", "content": "b"}],
    }
    path.write_text(json.dumps(row) + "\n")
    (read,) = preferences.read(path, settings=settings(path))
    assert (read.messages[0].content, read.chosen, read.rejected) == ("q", "a", "b")


def turns(*texts: str) -> list[dict]:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": turns("q", "a"), "rejected": turns("other", "b")}, "different conversations"),
        ({"chosen": turns("q", "a"), "rejected": turns("b")}, "the last turn of .rejected. is not"),
        ({"chosen": turns("q", "a", "thanks"), "rejected": turns("q", "b")}, "is not the assis"),
        ({"prompt": "p", "chosen": turns("q", "a"), "rejected": turns("q", "b")}, "another conv"),
        ({"messages": turns("q"), "rejected": turns("q", "b")}, "no .chosen."),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": math.nan}, "margin.*nan, not a"),
    ],
)
def test_an_answer_is_never_told_as_one_to_another_question(tmp_path, row, says):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"p.jsonl:1: .*{says}"):
        list(preferences.read(path, settings=settings(path)))


def test_the_whole_conversation_counts_where_the_prompt_is_only_its_beginning_or_end(tmp_path):
    path = tmp_path / "p.jsonl"
    whole = {"chosen": turns("q", "x", "q2", "a"), "rejected": turns("q", "x", "q2", "b")}
    path.write_text("".join(json.dumps({"prompt": p, **whole}) + "\n" for p in ("q", "q2")))
    for read in preferences.read(path, settings=settings(path)):
        assert [message.content for message in read.messages] == ["q", "x", "q2"]
        assert (read.chosen, read.rejected) == ("a", "b")


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "q", "messages": turns("q", "a")},  # HuggingFaceH4/ultrafeedback_binarized
        {"prompt": " q\n"},
        {"prompt": [{"role": "system", "content": "Be kind."}, *turns("q")]},
    ],
)
def test_a_prompt_that_is_given_twice_is_the_same_one(tmp_path, more):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"chosen": turns("q", "a"), "rejected": turns("q", "b"), **more}))
    (read,) = preferences.read(path, settings=settings(path))
    system = ["Be kind."] if isinstance(more["prompt"], list) else []
    assert [message.content for message in read.messages] == [*system, "q"]
    assert (read.chosen, read.rejected) == ("a", "b")


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_numbers_and_nestings_without_end_are_named_by_file_and_line(tmp_path, value):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "q"}}\n{{"prompt": "q", "n": {value}}}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not a line of JSON"):
        list(prompts.read(path, settings=settings(path)))


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("prompt,chosen\n")
    with pytest.raises(DataError, match="parquet"):
        list(prompts.read(path, settings=settings(path)))


def test_an_id_used_twice_an_empty_file_and_a_limit(tmp_path):
    path = tmp_path / "p.jsonl"
    row = json.dumps({"id": "1", "prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
    path.write_text(row * 3)
    from align.sources.settings import Prompts

    given = {
        "name": "prompts",
        "module": None,
        "path": str(path),
        "test_path": None,
        "limit": None,
        "max_length": None,
    }
    with pytest.raises(DataError, match="record 2: the id '1' was used before"):
        run(ReadStage(source=Prompts(**given), test=False, limit=None), {}, tmp_path)
    run(ReadStage(source=settings(path), test=False, limit=2), {}, tmp_path)
    assert len((tmp_path / "preferences.jsonl").read_text().splitlines()) == 2, (
        "pairs may share a prompt"
    )
    path.write_text(row + row.replace('"q"', '"another"'))
    with pytest.raises(DataError, match="record 2: the id '1' was used before"):
        run(ReadStage(source=settings(path), test=False, limit=None), {}, tmp_path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no preferences in it"):
        run(ReadStage(source=settings(path), test=False, limit=None), {}, tmp_path)


@pytest.mark.skipif(
    not RELEASE.exists(), reason="the QA-Feedback release is not beside the project"
)
def test_qa_feedback_gives_each_strict_human_vote_once_with_the_question_last():
    entries = json.loads(RELEASE.read_text())
    rows = list(qa_feedback.read(RELEASE, settings=settings(RELEASE)))
    strict = sum(vote != 0 for entry in entries for vote in entry["preference"])
    same = strict - len(rows)
    assert 0 <= same < 0.02 * strict, "only pairs of equal text are lost"
    assert rows[0].messages[0].content.endswith(f"Question: {entries[0]['question']}")
    first = next(i for i, vote in enumerate(entries[0]["preference"]) if vote)
    better, worse = qa_feedback.PAIRS[first][:: 1 if entries[0]["preference"][first] == 1 else -1]
    assert rows[0].chosen == entries[0][f"prediction {better}"].strip()
    assert rows[0].rejected == entries[0][f"prediction {worse}"].strip()


def test_a_file_that_is_not_the_release_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"question": "?"}]')
    with pytest.raises(DataError, match="entry 1: not as in the release"):
        list(qa_feedback.read(path, settings=settings(path)))
