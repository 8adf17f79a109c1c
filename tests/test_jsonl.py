"""Durable lines: a torn one is cut off, a bad one is named by file and line."""

import pytest

from align.errors import DataError
from align.jsonl import IndexedRecords, JsonlAppender, read_records, truncate_lines
from align.records import Preference, Prompt


def test_a_half_written_last_line_is_cut_off_and_appending_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3, "b')
    with JsonlAppender(path) as out:
        assert out.lines == 2
        out.append([{"a": 4}])
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 4}\n'


def test_lone_surrogates_and_line_separators_survive_a_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    hostile = "\ud800 \u2028 \x00 \x1b[2J \u202e"
    with JsonlAppender(path) as out:
        out.append([{"prompt": hostile}, {"prompt": "b"}])
    assert [p.messages[0].content for p in read_records(path, Prompt.from_json)] == [hostile, "b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"', "not a line of JSON"),
        ("[1]", "not an object"),
        ('{"prompt": "   ", "chosen": "x", "rejected": "y"}', "the prompt is empty"),
        ('{"prompt": "a", "chosen": "x", "rejected": "x"}', "prefers nothing"),
        ('{"prompt": "a", "chosen": "x"}', 'no "rejected"'),
        ('{"prompt": "a", "chosen": "x", "rejected": "y", "p": 0.2}', "not a number from 0.5 to 1"),
        (
            '{"messages": [{"role": "boss", "content": "a"}], "chosen": "x", "rejected": "y"}',
            "role",
        ),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, says):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "good", "chosen": "x", "rejected": "y"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        list(read_records(path, Preference.from_json))
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)


def test_indexed_records_reach_every_line_in_any_order(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"id": "{i}", "prompt": "{"x" * i}é"}}\n' for i in range(1, 50)))
    records = IndexedRecords(path, Prompt.from_json)
    assert len(records) == 49
    assert [records[i].id for i in (48, 0, 20)] == ["49", "1", "21"]
    assert [r.id for r in records[3:5]] == ["4", "5"]
    truncate_lines(path, 7)
    assert len(IndexedRecords(path, Prompt.from_json)) == 7
