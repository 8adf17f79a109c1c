"""A judge against people: what is read, what is counted, and a page that withstands its texts."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from align.agreement import Agreement
from align.errors import ConfigError, DataError
from align.judge.orders import over_both_orders
from align.judge_commands.agreement import comparison
from align.records import Comparison, Message, Prompt, Verdict
from align.stages.agreement import (
    AgreementReport,
    Columns,
    JudgedPair,
    decode_label,
    join,
    kappa,
    measure,
    people_apart,
    read_pairs,
    sentence,
    verdicts_from_labels,
    with_verdicts,
    write_report,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets are not at {DATA}")

COLUMNS = Columns(prompt="q", first="a", second="b", human=("h",))
ROWS: list[dict[str, Any]] = [
    {"q": "Q0", "a": "one", "b": 'two, "quoted"\nline', "h": "1"},
    {"q": "Q1", "a": "ä", "b": "b" * 200_000, "h": "2"},
    {"q": "Q2", "a": "", "b": "x", "h": "0"},
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(number: int = 0, human: Any = "first", **changed: Any) -> JudgedPair:
    given: dict[str, Any] = {
        "id": str(number), "prompt": f"question {number}", "first": "yes", "second": "no, never",
        "human": human if isinstance(human, dict) else {"h": human},
    }  # fmt: skip
    return JudgedPair(**{**given, **changed})


def looked(row: JudgedPair, first: float, swapped: float) -> Verdict:
    comparison = Comparison(
        prompt=Prompt(id=row.id, messages=row.messages), first=row.first, second=row.second
    )
    return over_both_orders(comparison, p_first=first, p_first_swapped=swapped, judge="fake")


def lost(status: str, looks: tuple[float, ...] = ()) -> Verdict:
    return Verdict(
        id="0", first=0, second=1, status=status, p_first=None, consistent=False, judge="fake",
        looks=looks,
    )  # fmt: skip


def measured(rows: list[JudgedPair], verdicts: list[Verdict | None]) -> AgreementReport:
    return measure(with_verdicts(rows, verdicts), judge_name="fake", seed=0, resamples=200)


# Rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    pairs = list(read_pairs(written(tmp_path / name, ROWS), COLUMNS))
    assert [(p.id, p.prompt, p.first, p.second) for p in pairs] == [
        (str(i), row["q"], row["a"], row["b"]) for i, row in enumerate(ROWS, start=1)
    ]
    assert [p.human["h"] for p in pairs] == ["first", "second", "tie"]


def test_json_lines_may_be_called_json(tmp_path):
    path = written(tmp_path / "p.jsonl", ROWS).rename(tmp_path / "p.json")
    assert len(list(read_pairs(path, COLUMNS))) == 3


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("first", [1, 1.0, "1", "1.0", "a", "A", "first", "model_a", "chosen_first", " A "]),
        ("second", [2, 2.0, "2", "b", "B", "second", "model_b"]),
        ("tie", [0, 0.0, "0", "tie", "Tie", "TIE", "equal", "both", "tie (bothbad)"]),
        (None, [None, "", " ", math.nan, "NaN"]),
    ],
)
def test_labels_are_read_however_they_are_spelt(label, values):
    assert {decode_label(value) for value in values} == {label}


@pytest.mark.parametrize("value", ["garbage", 3, -1, 1.5, True, False, [1], {"a": 1}, math.inf])
def test_what_is_no_label_is_never_taken_for_one(value):
    with pytest.raises(ValueError, match="is no label"):
        decode_label(value)


def test_an_unreadable_label_is_counted_and_is_neither_a_tie_nor_a_choice(tmp_path):
    rows = [{**ROWS[0], "h": value} for value in ("garbage", "1", None)]
    pairs = list(read_pairs(written(tmp_path / "p.jsonl", rows), COLUMNS))
    assert [p.human["h"] for p in pairs] == [None, "first", None]
    report = measured(pairs, [looked(p, 1, 0) for p in pairs])
    (against,) = report.against
    assert against.unreadable == 1 and against.labels == {"first": 1}
    assert against.final is not None and against.final.n == 1


def test_several_prompt_columns_are_joined_by_a_blank_line_and_empty_ones_left_out(tmp_path):
    rows = [{**ROWS[0], "input": text} for text in ("given this", "", None)]
    columns = Columns(prompt=("q", "input"), first="a", second="b", human=("h",))
    pairs = list(read_pairs(written(tmp_path / "p.jsonl", rows), columns))
    assert [p.prompt for p in pairs] == ["Q0\n\ngiven this", "Q0", "Q0"]
    assert pairs[0].messages == (Message(role="user", content="Q0\n\ngiven this"),)


def test_a_prompt_may_be_a_conversation(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    path = written(tmp_path / "p.jsonl", [{**ROWS[0], "q": turns}])
    (read,) = read_pairs(path, COLUMNS)
    assert read.prompt == read.messages == (Message(role="user", content="hi"),)


def test_an_answer_that_lost_its_quotes_is_text_again(tmp_path):
    path = written(tmp_path / "p.jsonl", [{**ROWS[0], "a": True, "b": 12}])
    (read,) = read_pairs(path, COLUMNS)
    assert (read.first, read.second) == ("true", "12")


def test_bad_rows_are_told_and_the_others_are_read(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    good = json.dumps({**ROWS[0], "key": 7.0})
    bad = ['{"q": 1', "[]", '{"q": "x", "a": "y", "h": 1, "key": 8}', '{"n": 1e999}']
    path.write_text("\n".join([good, *bad, *["nonsense"] * 12, good]) + "\n")
    columns = Columns(prompt="q", first="a", second="b", human=("h",), id="key")
    assert [p.id for p in read_pairs(path, columns)] == ["7", "7"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 11 and told[-1] == "… and 6 more rows left out"
    assert told[0].startswith(f"{path}:2: left out: not a line of JSON")
    assert told[2] == f"{path}:4: left out: no column 'b'"


def test_a_bad_row_of_csv_ends_only_itself(tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("q,a,b,h\nx,y,z,1\nx,y,z\nx,y,z,1,2\nx,y,z,2\n")
    assert [p.human["h"] for p in read_pairs(path, COLUMNS)] == ["first", "second"]
    assert capsys.readouterr().err.count("another number of fields") == 2


def test_without_a_readable_row_one_line_says_what_is_there_and_what_to_type(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"q": "x", "output_1": "y", "output_2": "z", "h": 1}])
    with pytest.raises(DataError) as error:
        list(read_pairs(path, COLUMNS))
    assert str(error.value) == (
        f"{path}: none of 1 rows has the columns 'a', 'b'; found are 'q', 'output_1', "
        "'output_2', 'h'; type columns.first=NAME columns.second=NAME"
    )


def test_a_misspelt_column_of_labels_is_no_column_of_gaps(tmp_path):
    path = written(tmp_path / "p.jsonl", ROWS)
    columns = Columns(prompt="q", first="a", second="b", human=("h", "annotatr"))
    with pytest.raises(DataError, match=r"'annotatr'; found are .*columns\.human=\[NAME\]"):
        list(read_pairs(path, columns))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "x", "none of .csv, .json"),
        ("p.json", "[{", "not a list of JSON objects"),
        ("p.jsonl", "", "no rows"),
        ("p.jsonl", '{"q": 1, "a": null, "b": "x", "h": 1}', "column 'a' holds nothing"),
        ("p.parquet", "x", "not a parquet file"),
        ("p.csv", "q,a,b,h\n", "no rows"),
    ],
)
def test_a_file_that_gives_nothing_is_an_error_of_one_line(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(told)) as error:
        list(read_pairs(path, COLUMNS))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_missing_columns_are_told(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_pairs(tmp_path / "p.json", COLUMNS))
    with pytest.raises(ConfigError, match=r"columns\.human=\[\]"):
        Columns(prompt="q", first="a", second="b", human=())
    with pytest.raises(ConfigError, match="twice"):
        Columns(prompt="q", first="a", second="b", human=("h", "h"))


# A judge's labels from a file


def test_labels_are_joined_by_id_whatever_its_type_and_gaps_are_told(tmp_path, capsys):
    rows = [{"idx": 1.0, "said": "2"}, {"idx": "0", "said": "bad"}, {"idx": 9, "said": 1}]
    path = written(tmp_path / "j.jsonl", rows)
    pairs = [pair(0), pair(1), pair(2)]
    labels = join(pairs, path, id_column="idx", label_column="said")
    assert labels == ["bad", "2", None]
    told = capsys.readouterr().err
    assert "1 pairs without a row there" in told and "1 rows there without a pair" in told
    verdicts = verdicts_from_labels(pairs, labels, judge="j")
    assert [v and (v.status, v.p_first, v.looks) for v in verdicts] == [
        ("malformed", None, ()), ("ok", 0.0, ()), None
    ]  # fmt: skip


def test_a_join_that_could_mix_labels_up_is_refused(tmp_path):
    path = written(tmp_path / "j.jsonl", [{"idx": 0, "said": 1}, {"idx": 0, "said": 2}])
    with pytest.raises(DataError, match="'0' stands twice"):
        join([pair(0)], path, id_column="idx", label_column="said")
    with pytest.raises(DataError, match="same id"):
        join([pair(0), pair(0)], path, id_column="idx", label_column="said")
    with pytest.raises(DataError, match="columns found: 'idx', 'said'"):
        join([pair(0)], path, id_column="idx", label_column="verdict")


# What is measured


def test_one_order_takes_the_first_look_and_the_verdict_both() -> None:
    # Human: always first. Looks: right both times; first place twice; second place twice.
    rows = [pair(i) for i in range(3)]
    looks = [(1, 0), (1, 1), (0, 0)]
    report = measured(rows, [looked(r, *p) for r, p in zip(rows, looks, strict=True)])
    (found,) = report.against
    assert found.one_order and found.both_alike and found.final
    assert found.one_order.agreement.mean == pytest.approx(2 / 3)
    assert (found.both_alike.n, found.both_alike.agreement.mean) == (1, 1)
    assert found.final.agreement.mean == pytest.approx(1 / 3)
    assert found.final.classes == ("first", "second", "tie")  # two verdicts are ties
    assert found.one_order.classes == ("first", "second")


def test_what_is_not_usable_is_counted_and_never_a_label() -> None:
    rows = [pair(i, human="second") for i in range(5)]
    verdicts = [looked(rows[0], 0, 1), lost("refusal"), lost("malformed", (1.0,)),
                lost("disagreement", (0.0, 0.0)), None]  # fmt: skip
    report = measured(rows, verdicts)
    assert report.statuses == {"ok": 1, "refusal": 1, "malformed": 1, "disagreement": 1}
    (found,) = report.against
    assert found.final and found.one_order and found.both_alike and report.position
    assert found.final.n == found.both_alike.n == 1
    # A disagreement was decided in each order; asking in one order alone would have taken it.
    assert found.one_order.n == report.position.n == 2
    assert report.usable == 1


def test_ties_on_one_side_make_three_classes() -> None:
    rows = [pair(0), pair(1, human="tie")]
    report = measured(rows, [looked(row, 1, 0) for row in rows])
    assert report.against[0].final and report.against[0].final.classes[-1] == "tie"


def test_people_are_compared_with_each_other_where_both_have_a_label() -> None:
    rows = [
        pair(0, human={"x": x, "y": y})
        for x, y in [("first", "first"), ("first", "second"), (None, "first"), ("tie", None)]
    ]
    (found,) = measured(rows, [None] * 4).between
    assert found.columns == ("x", "y") and found.agreement is not None
    assert found.agreement.n == 2 and found.agreement.agreement.mean == 0.5


def test_bias_is_measured_for_the_judge_and_for_people() -> None:
    rows = [pair(i, human="second") for i in range(4)]  # the second answer is the longer one
    report = measured(rows, [looked(row, 1, 0) for row in rows])
    assert report.bias.longer and report.bias.longer.mean == 0
    (found,) = report.against
    assert found.bias.longer and found.bias.longer.mean == 1
    assert found.bias.first and found.bias.first.mean == 0


def test_the_surest_contradictions_come_first_and_then_those_of_most_people() -> None:
    both, one = {"x": "second", "y": "second"}, {"x": "second", "y": "first"}
    rows = [pair(i, human=h) for i, h in enumerate([one, one, both, one])]
    rows.append(pair(4, human={"x": "first", "y": None}))
    looks = [(0.6, 0.4), (0.9, 0.1), (0.9, 0.1), (0.5, 0.5), (1, 0)]
    report = measured(rows, [looked(r, *p) for r, p in zip(rows, looks, strict=True)])
    assert [row.id for row in report.differing] == ["2", "1", "0", "3"]
    assert report.differing[-1].judge == "tie"


def test_a_judge_that_the_order_always_turns_is_told_so() -> None:
    rows = [pair(0), pair(1)]
    told = sentence(measured(rows, [looked(row, 1, 1) for row in rows]))
    assert told.endswith("It decides 0.0% of pairs alike in both orders.")


def test_a_range_goes_from_the_lowest_to_the_highest() -> None:
    humans = [{"x": "first", "y": "first", "z": "second"}] * 19
    humans.append({"x": "first", "y": "second", "z": "second"})
    rows = [pair(i, human=human) for i, human in enumerate(humans)]
    told = sentence(measured(rows, [looked(row, 1, 0) for row in rows]))
    assert "on 0.0–100.0% of 20 pairs" in told


def test_columns_that_nobody_named_are_the_prompts_meta(tmp_path) -> None:
    row = {**ROWS[0], "reference": "the answer", "meta": {"level": 3}}
    (found,) = read_pairs(written(tmp_path / "p.jsonl", [row]), COLUMNS)
    assert found.meta == {"reference": "the answer", "level": 3}
    assert comparison(found).prompt.meta["reference"] == "the answer"


def test_no_pairs_are_an_error_and_pairs_without_verdicts_are_none(tmp_path) -> None:
    with pytest.raises(DataError, match="no pairs"):
        measure([], judge_name="fake", seed=0, resamples=10)
    report = measured([pair(0), pair(1, human=None)], [None, None])
    assert "was not measured" in sentence(report)
    write_report(report, tmp_path)


def test_kappa_is_written_as_papers_write_it() -> None:
    told = [kappa(value) for value in (0.594, -0.051, 1.0, 0.0, -0.001, -1.0)]
    assert told == [".59", "−.05", "1.00", ".00", ".00", "−1.00"]


# The page


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read_report(report: AgreementReport, out: Path) -> tuple[str, dict[str, Any]]:
    write_report(report, out)
    return (out / "agreement.html").read_text("utf-8"), json.loads(
        (out / "agreement.json").read_text("utf-8"), parse_constant=pytest.fail
    )


HOSTILE = (
    '<script>alert("1")</script><img src=x onerror=alert(1)> \u202edlrow\u202c & </details></div>'
    "\x1b[31m\x00\ud800\uffff {{ 7*7 }} $x$ </style></title>"
)


def test_texts_of_others_are_shown_and_never_obeyed(tmp_path) -> None:
    bad = {HOSTILE: "second", "日本語": "second"}
    rows = [
        pair(0, id=HOSTILE, prompt=HOSTILE, first=HOSTILE, second=HOSTILE + "y" * 2_000_000,
             human=bad, unreadable=(HOSTILE,)),
        pair(1, prompt=(Message(role="user", content=HOSTILE),) * 2, human=bad),
    ]  # fmt: skip
    report = measure(
        with_verdicts(rows, [looked(row, 1, 0) for row in rows]),
        judge_name=HOSTILE, seed=0, resamples=50,
    )  # fmt: skip
    html, data = read_report(report, tmp_path)
    for tag, attributes in Page(html).elements:
        assert tag not in ("script", "img", "link", "iframe", "object", "form"), tag
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert str(attributes.get(name, "#")).startswith("#")
    assert "\u202e" not in html and "\x1b" not in html and "\x00" not in html
    assert "U+202E" in html and "U+D800" in html and "{{ 7*7 }}" in html
    assert html.count("</style>") == 1 and "default-src 'none'" in html
    assert len(html) < 300_000  # 2 MB are in the other file
    assert data["differing"][0]["second"].endswith("y" * 1_000_000)
    assert data["differing"][0]["first"] == HOSTILE


def test_a_page_needs_nothing_from_elsewhere_and_says_the_finding_first(tmp_path) -> None:
    rows = [pair(i, human="first" if i % 3 else "second") for i in range(70)]
    report = measured(rows, [looked(row, 1, i % 2) for i, row in enumerate(rows)])
    html, data = read_report(report, tmp_path)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    heading = re.search(r"<h1>(.*?)</h1>", html)
    assert heading and heading[1].replace("\xa0", " ") == sentence(report)
    assert data["against"][0]["final"]["n"] == 70 and data["v"] == 1
    assert html.count('<article class="sample">') == 40 < len(data["differing"])
    assert "var(--after)" in html and html.count("<svg") == 1
    once = (tmp_path / "agreement.html").read_bytes()
    write_report(report, tmp_path)
    assert (tmp_path / "agreement.html").read_bytes() == once


def test_an_undefined_kappa_is_null_with_its_reason_and_the_page_lives(tmp_path) -> None:
    rows = [pair(i) for i in range(3)]
    report = measured(rows, [looked(row, 1, 0) for row in rows])
    html, data = read_report(report, tmp_path)
    found = data["against"][0]["one_order"]
    assert found["kappa"] is None and "chance" in found["undefined"]
    assert "κ not defined" in sentence(report) and "<svg" not in html


# Real data


def figures(labels: list[str], others: list[str]) -> tuple[int, float, float]:
    """n, share of equal labels and kappa, by plain counting."""
    n = len(labels)
    same = sum(x == y for x, y in zip(labels, others, strict=True)) / n
    ours, theirs = Counter(labels), Counter(others)
    chance = sum(ours[label] * theirs[label] for label in ours) / n**2
    return n, same, (same - chance) / (1 - chance)


def same(found: Agreement | None, expected: tuple[int, float, float]) -> bool:
    assert found is not None and found.kappa is not None
    assert found.kappa.low < found.kappa.mean < found.kappa.high
    return (found.n, found.agreement.mean, found.kappa.mean) == pytest.approx(expected)


def llmbar(split: str, judge: str) -> tuple[AgreementReport, list[dict[str, Any]]]:
    folder = DATA / "llmbar" / split
    columns = Columns(prompt="input", first="output_1", second="output_2", human=("label",))
    pairs = list(read_pairs(folder / "dataset.json", columns))
    judged = json.loads((folder / f"{judge}.json").read_text())
    assert [p.first for p in pairs] == [row["output_1"] for row in judged]
    verdicts: list[Verdict | None] = []
    for row, line in zip(pairs, judged, strict=True):
        said = [line["results"][0][f"swap = {swap}"]["completion"][0] for swap in (False, True)]
        assert set(said) <= {"Output (a)", "Output (b)"}
        verdicts.append(looked(row, *(float(word == "Output (a)") for word in said)))
    report = measure(with_verdicts(pairs, verdicts), judge_name=judge, seed=0, resamples=500)
    return report, judged


@real
@pytest.mark.parametrize("split", ["mtbench", "natural"])
@pytest.mark.parametrize("judge", ["gpt-4", "chatgpt"])
def test_llmbar_gives_what_plain_counting_of_its_winners_gives(split, judge):
    report, judged = llmbar(split, judge)
    label = [str(row["label"]) for row in judged]
    # `winner` was mapped back to output 1 or 2 by the authors, apart from the completions.
    given, swapped = (
        [row["results"][0][f"swap = {swap}"]["winner"] for row in judged] for swap in (False, True)
    )
    alike = [i for i, winner in enumerate(given) if winner == swapped[i]]
    (found,) = report.against
    assert same(found.one_order, figures(given, label))
    assert same(found.both_alike, figures([given[i] for i in alike], [label[i] for i in alike]))
    final = [w if w == swapped[i] else "tie" for i, w in enumerate(given)]
    assert same(found.final, figures(final, label))
    assert report.position is not None
    assert report.position.consistent.mean == pytest.approx(len(alike) / len(judged))
    firsts = sum(w == "1" for w in given) + sum(w == "2" for w in swapped)
    assert report.position.first_pick_rate.mean == pytest.approx(firsts / 2 / len(judged))
    for rater, said in ((report.bias, final), (found.bias, label)):
        longer = [
            (len(row["output_1"]) > len(row["output_2"])) == (w == "1")
            for w, row in zip(said, judged, strict=True)
            if w != "tie" and len(row["output_1"]) != len(row["output_2"])
        ]
        assert rater.longer and rater.longer.n == len(longer)
        assert rater.longer.mean == pytest.approx(sum(longer) / len(longer))
    assert len(report.differing) == sum(w != label[i] for i, w in enumerate(final))


@real
def test_gpt_4_on_mtbench_gives_the_published_figures(tmp_path):
    report, _ = llmbar("mtbench", "gpt-4")
    (found,) = report.against
    assert found.one_order and found.one_order.kappa and found.both_alike and report.position
    assert found.both_alike.kappa
    assert found.one_order.agreement.mean == 0.795 and kappa(found.one_order.kappa.mean) == ".59"
    assert report.position.consistent.mean == 0.87 and found.both_alike.n == 174
    assert round(found.both_alike.agreement.mean, 3) == 0.856
    assert kappa(found.both_alike.kappa.mean) == ".71"
    html, _ = read_report(report, tmp_path)
    assert "79.5%" in html and "87.0%" in html and "85.6%" in html


@real
def test_pandalm_gives_what_plain_counting_gives(tmp_path, capsys):
    names = ("annotator1", "annotator2", "annotator3")
    path, other = (
        DATA / "pandalm" / f"{name}testset-v1.json" for name in ("", "gpt-3.5-turbo-")
    )  # fmt: skip
    columns = Columns(
        prompt=("instruction", "input"), first="response1", second="response2", human=names,
        id="idx",
    )  # fmt: skip
    pairs = list(read_pairs(path, columns))
    labels = join(pairs, other, id_column="idx", label_column="gpt_result")
    judged = with_verdicts(pairs, verdicts_from_labels(pairs, labels, judge="gpt-3.5-turbo"))
    report = measure(judged, judge_name="gpt-3.5-turbo", seed=0, resamples=500)
    assert capsys.readouterr().err == ""

    people = {row["idx"]: row for row in json.loads(path.read_text())}
    words = {"1": 1, "2": 2, "Tie": 0}
    said = {row["idx"]: words.get(row["gpt_result"]) for row in json.loads(other.read_text())}
    readable = [idx for idx in people if said[idx] is not None]
    assert report.statuses == {"ok": 936, "tie": 38, "malformed": 25} and len(readable) == 974
    for found in report.against:
        theirs = [str(people[idx][found.column]) for idx in readable]
        assert same(found.final, figures([str(said[idx]) for idx in readable], theirs))
        assert found.one_order == found.final and found.both_alike is None
    assert [found.columns for found in report.between] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2])
    ]  # fmt: skip
    for between in report.between:
        one, two = ([str(row[name]) for row in people.values()] for name in between.columns)
        assert same(between.agreement, figures(one, two)) and len(one) == 999
    assert report.position is None and people_apart(report)
    assert "70.1–70.9% of 974 pairs" in sentence(report)
    html, _ = read_report(report, tmp_path)
    assert "25 malformed" in html and "in both orders" in html
