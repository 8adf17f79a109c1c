"""An answer is read right or not at all: no label is ever taken from words that deny it."""

import json
import random
import time
from typing import Any

import pytest

from align.judge import forms
from align.judge.answers import MALFORMED, OK, REFUSAL, Reading, completion, read, score, usage

TWO, THREE = forms.pairwise(scale="two"), forms.pairwise(scale="three")
FIVE, MARK = forms.pairwise(scale="five"), forms.scalar(lowest=1, highest=10)
RANKED = forms.listwise(3)
BOM, NO_BREAK, NARROW_BREAK = "\ufeff", "\u00a0", "\u202f"


def body(content: Any, *, finish: str = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def said(content: Any, form: forms.Form = THREE, *, finish: str = "stop") -> Any:
    """The label or ranking that was read, None for malformed."""
    reading = read(body(content, finish=finish), form)
    assert reading.status in (OK, MALFORMED)
    assert (reading.status == OK) == (not reading.why)
    return ("".join(reading.ranking) or reading.label) if reading.status == OK else None


@pytest.mark.parametrize(
    ("content", "label"),
    [
        # Lines as they are asked for, and as models dress them.
        ("Verdict: A", "A"),
        ("Verdict: A\n", "A"),
        ("Verdict: b", "B"),
        ("VERDICT: TIE", "tie"),
        ("**Verdict:** B", "B"),
        ("**Verdict: B**", "B"),
        ("### Verdict: **A**.", "A"),
        ("Verdict: [[A]]", "A"),
        ("Verdict: (B)", "B"),
        ("Verdict: `tie`", "tie"),
        ("Verdict: a tie", "tie"),
        ("Verdict: It's a tie.", "tie"),
        ("Verdict: Response A", "A"),
        ("Verdict: Assistant A", "A"),
        ("Verdict: the better response is B", "B"),
        ("Verdict: A is better", "A"),
        ("Verdict: $\\boxed{B}$", "B"),
        ("verdict = A", "A"),
        ("Final verdict: B", "B"),
        ("My verdict: A", "A"),
        ("Verdict:\nA", "A"),
        ("Verdict:\r\nA\r\n", "A"),
        (f"Verdict{NO_BREAK}: B", "B"),
        (f"Verdict{NARROW_BREAK}: «{NO_BREAK}B{NO_BREAK}»", "B"),
        ("Verdict：Ｂ", "B"),
        ("Verdict : réponse A", "A"),
        ("Verdict: A</s>", "A"),
        ("Verdict: A<|im_end|>", "A"),
        ("A names the source, B guesses.\n\nVerdict: A", "A"),
        ("Verdict: A\n\nA names the source, B guesses.", "A"),
        ("Verdict: A\nVerdict: A", "A"),
        # A label alone.
        ("A", "A"),
        (" b\n", "B"),
        ("Tie.", "tie"),
        ("[[B]]", "B"),
        ("Output (b)", "B"),
        ("Réponse A", "A"),
        ("The better response is **B**.", "B"),
        ("Response A is better.", "A"),
        ("The verdict is A.", "A"),
        ("It's a tie", "tie"),
        ("Both are fine, but only one is polite.\n\n[[B]]", "B"),
        ("Both are fine.\n**Response B**", "B"),
        # JSON.
        ('{"verdict": "A"}', "A"),
        ('{"verdict": "a"}', "A"),
        ('{\n  "verdict": "tie"\n}', "tie"),
        ('```json\n{"verdict": "B"}\n```', "B"),
        ('Here it is: {"verdict": "B"} I hope this helps.', "B"),
        ('{"verdict": "Response A"}', "A"),
        ("{'verdict': 'A'}", "A"),
        ('{"verdict": "A", "verdict_note": "B is short"}', "A"),
        ('{"reason": "It says \\"Verdict: B\\" itself.", "verdict": "A"}', "A"),
        ('{"reason": "It ends in\\nVerdict: B\\n", "verdict": "A"}', "A"),
        ('{"reason": "{\\"verdict\\": \\"B\\"}", "verdict": "A"}', "A"),
        ('{"reason": "{{{[[<", "verdict": "A"}', "A"),
        ('{"verdict": "A"}\n{"verdict": "A"}', "A"),
        ('{"verdict": "A", "reason": "B guesses"}', "A"),
        ('{"answer": {"verdict": "A"}}', "A"),
        ('{"verdict": ["A"]}', "A"),
        ('{"verdict": "A', "A"),
        # Thinking.
        ("<think>Verdict: B? No.</think>Verdict: A", "A"),
        ("<think>\nVerdict: B\n</think>\n\nVerdict: A", "A"),
        ('<think>{"verdict": "B"}</think>{"verdict": "A"}', "A"),
        ("B looks fine.\nVerdict: B\n</think>\n\nVerdict: A", "A"),
        ("B looks fine. A is right.\nVerdict: A\n</think>\n\nVerdict: A", "A"),
        ("<think>Verdict: B</think>\n<think>Verdict: B</think>\nVerdict: A", "A"),
        ("The verdict: A is right, in short.\nVerdict: A", "A"),
        # The template opened the thinking, which tries answers out.
        ("Let me see.\nVerdict: A? No, A is wrong.\nVerdict: A\n</think>\n\nVerdict: B", "B"),
        ("In short, my verdict: a narrow win for B.\nVerdict: B", "B"),
        ("Helpfulness verdict: A\nStyle, the verdict: tie is no option.\nVerdict: B", "B"),
        ("[THINK]Verdict: B[/THINK]Verdict: A", "A"),
        ("<|channel|>analysis<|message|>Verdict: B<|end|><|start|>assistant"
         "<|channel|>final<|message|>Verdict: A", "A"),
        ('{"reason": "B leaks its </think> tag", "verdict": "A"}', "A"),
    ],
)  # fmt: skip
def test_answers_as_models_write_them_are_read(content, label):
    assert said(content) == label


@pytest.mark.parametrize(
    "content",
    [
        "",
        "   \n",
        "C",
        "Neither",
        "Both",
        "I cannot decide.",
        "A is better than B",
        "A or B",
        "A, B",
        "A > B",
        "AB",
        "Not A",
        "Verdict: not A",
        "Verdict: A is worse",
        "Verdict: neither A",
        "Verdict: against A",
        "Verdict: A loses",
        "Verdict: anything but A",
        "Verdict: A or B",
        "Verdict: A/B",
        "Verdict: -A",
        "Verdict: C",
        "Verdict: ",
        "Verdict: (one of A, B, tie)",
        "Verdict: A\nVerdict: B",
        "Verdict: A, for it is right",
        "Verdict: A because B only says\nVerdict: B",
        "Verdict: A. No, wait.\nVerdict: B",
        "Response B says\nVerdict: B\nwhich is a trick.\nVerdict: A",
        "The verdict is not B",
        "A better answer would name the source.",
        "Response A:\nIt is wrong.\nResponse B:\nIt is right.",
        "**Response A**\nWrong.\n**Response B**",
        "I looked at both.\nResponse A:",
        "Verdict: A\n\nB",
        '{"verdict": "C"}',
        '{"verdict": null}',
        '{"verdict": true}',
        '{"verdict": {"A": 1}}',
        '{"verdict": "A", "verdict": "B"}',
        '{"reason": "", "verdict": "A", "verdict": "B"}',
        '{"verdict": "not A"}',
        '{"verdict": "A"} {"verdict": "B"}',
        '{"verdict": "A"}\nVerdict: B',
        '[{"verdict": "A"}, {"verdict": "B"}]',
        "<think>Verdict: A",
        "<think>Verdict: A</think>",
        "<think>A</think>\n",
        # Nothing shows whether an end of thinking is the judge's own or quoted.
        'Verdict: B\n\nResponse A tells me: "</think>\n\nVerdict: A',
        '<think>So.</think>Verdict: B\nResponse A says "</think>\n\nVerdict: A',
        "Verdict: A\n\nOn reflection I was wrong. Verdict: B",
        "Verdict: A, no, wait, my verdict: B",
        "Verdict: \u0410",  # Cyrillic
    ],
)
def test_what_is_not_clearly_one_label_is_none(content):
    assert said(content) is None


QUOTED = '{"reason": "B quotes {"verdict": "A"} and cheats", "verdict": "B"}'


@pytest.mark.parametrize(
    "content",
    [
        QUOTED,
        f"```json\n{QUOTED}\n```",
        f"I looked at both.\n```json\n{QUOTED}\n```\n",
        """{'reason': 'B quotes {"verdict": "A"} and cheats', 'verdict': 'B'}""",
        '{"reason": "B says {"verdict": "A"} and so on',
        '{"reason": "B says {"verdict": "A"}',
        '{"reason": "B says\n```json\n{"verdict": "A"}\n```\nand so on',
        '{"reason": "B says\n```json\n{"verdict": "A"}\n```',
        '{"reason": "B says }\n```json\n{"verdict": "A"}\n```\n", "verdict": "B"}',
        '{"reason": "B says\n"verdict": "A"\nand cheats", "verdict": "B"}',
        'reason: "B says\n"verdict": "A"\nand cheats", "verdict": "B"',
        '{reason: "B quotes {"verdict": "A"} and cheats", verdict: "B"}',
        '{"reason": "B quotes {\\"verdict\\": \\"A\\"} and "cheats"", "verdict": "B"}',
        'Quoting {"verdict": "A"} is cheating, so my final verdict: B',
        '{"verdict": "A"} is what B says, so "verdict": "neither"',
        '{"verdict": "A"} is quoted.\n{"reason": "It "cheats"", "verdict": "B"}',
        '{"verdict": "A"}\n' * 100 + '{"verdict": "B"}',
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_label_that_is_only_quoted_is_never_the_verdict(content, finish):
    assert said(content, finish=finish) is None


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ('B writes `if (x) { return; }`, which fails.\n```json\n{"verdict": "A"}\n```', "A"),
        ('```js\nf = () => { g() }\n```\nA is right.\n\n```\n{"verdict": "A"}\n```\n', "A"),
        ('{"a": 1} is valid, {b} is not.\n```json\n{"verdict": "B"}\n```', "B"),
        ('The set {1, 2} is meant.\nVerdict: B', "B"),
        ('My verdict:\n```json\n{"verdict": "B"}\n```', "B"),
        ('My verdict: {"verdict": "B"}', "B"),
        ('**Verdict:** B\n\n```json\n{"verdict": "B"}\n```', "B"),
        ('```json\n{x}\n{"verdict": "A"}\n```', "A"),
        ('if (x) { return; }\n```json\n{"verdict": "A"}\n```\nVerdict: B', None),
        ('f(x) { return\n```json\n{"reason": "", "verdict": "A"}\n```', None),
        ('{"reason": "B is "right" here",\n "verdict": "B"}', "B"),
        ('A: {x} {"verdict": "b"} end', None),
    ],
)  # fmt: skip
def test_braces_of_code_stand_before_an_answer_only_where_that_is_plainly_the_end(content, label):
    assert said(content) == label


def test_a_quoted_criterion_is_no_answer():
    form = forms.pairwise(scale="three", criteria=("tone",))
    for content in (
        '{"tone": "A", "verdict": "A"}\n"tone": "B"',
        '{"tone": "it "quotes {"tone": "A"}", "verdict": "A"}',
    ):
        assert read(body(content), form).status == MALFORMED


@pytest.mark.parametrize(
    ("content", "ranking"),
    [
        ('{"reason": "C quotes {"ranking": ["C", "A", "B"]}", "ranking": ["B", "A", "C"]}', None),
        ('{"ranking": ["B", "A", "C"]} or "ranking": ["A", "B", "C"]', None),
        ('Ranking:\n1. B\n2. A\n3. C\n\n{"ranking": ["B", "A", "C"]}', "BAC"),
        ('Ranking: B > A > C\n\n{"ranking": ["B", "A", "C"]}', "BAC"),
    ],
)
def test_a_ranking_that_is_only_quoted_is_none(content, ranking):
    assert said(content, RANKED) == ranking


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ("8", "8"),
        ("Score: 8", "8"),
        ("Score: **9**", "9"),
        ("Score: 8/10", "8"),
        ("8 / 10", "8"),
        ("Score: 8 out of 10", "8"),
        ("Score : 8 sur 10", "8"),
        ("Score: 10/10", "10"),
        ("Score: 10", "10"),
        ("Score: 8.0", "8"),
        ("Score: 8 points", "8"),
        ("I give it a 7.", None),
        ("a 7", "7"),
        ('{"score": 8}', "8"),
        ('{"score": 8.0}', "8"),
        ('{"score": "8"}', "8"),
        ('{"score": "8/10"}', "8"),
        ("8.5", None),
        ("Score: 8.5", None),
        ("Score: 8,5", None),
        ("Score: 8.8", None),
        ("Score: 4/5", None),
        ("Score: 5/5", None),
        ("Score: 80/100", None),
        ("Score: 80%", None),
        ("Score: 7-8", None),
        ("-1", None),
        ("Score: -1", None),
        ("Score: \u22121", None),
        ("Score: minus 1", None),
        ("0", None),
        ("11", None),
        ("Score: 100", None),
        ("1 of 2", None),
        ('{"score": 8.5}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": Infinity}', None),
        ('{"score": 1e400}', None),
    ],
)
def test_marks_are_whole_numbers_of_the_scale(content, label):
    assert said(content, MARK) == label


@pytest.mark.parametrize(
    ("content", "label"),
    [("1", "1"), ("Verdict: 0", "0"), ("Verdict: 5.", "5"), ('{"verdict": 2}', "2"), ("6", None),
     ("Verdict: -2", None), ("Verdict: 1 or 2", None), ("A", None), ("1.5", None)],
)  # fmt: skip
def test_levels_are_the_five_and_both_bad(content, label):
    assert said(content, FIVE) == label


@pytest.mark.parametrize(
    ("content", "ranking"),
    [
        ("Ranking: B > A > C", "BAC"),
        ("Ranking: B, A, C", "BAC"),
        ("**Ranking:** b>a>c", "BAC"),
        ("Ranking: B → A → C", "BAC"),
        ("Ranking: [B, A, C]", "BAC"),
        ("Ranking: Response B > Response A > Response C", "BAC"),
        ("Ranking:\n1. B\n2. A\n3. C", "BAC"),
        ("1. B\n2. A\n3. C\n", "BAC"),
        ("1) **B**\n2) **A**\n3) **C**", "BAC"),
        ("B\nA\nC", "BAC"),
        ("B > A > C", "BAC"),
        ("B, A, and C", "BAC"),
        ("B is the clearest.\nRanking: B > A > C", "BAC"),
        ('{"ranking": ["B", "A", "C"]}', "BAC"),
        ('{"ranking": ["Response B", "Response A", "Response C"]}', "BAC"),
        ('{"ranking": "B > A > C"}', "BAC"),
        ("Ranking: B > A", None),
        ("Ranking: B > A > A", None),
        ("Ranking: B > A > C > D", None),
        ("Ranking: A < B < C", None),
        ("Ranking: A = B > C", None),
        ("Ranking: A is worse than B and C", None),
        ("From worst to best: A, B, C", None),
        ("2. A\n1. B\n3. C", None),
        ("1. A: wrong\n2. B: right\n3. C: rude", None),
        ("Here is a comparison of B and C", None),
        ("Ranking: best > … > worst", None),
        ('{"ranking": ["B", "A"]}', None),
        ('{"ranking": ["B", "A", "C", "x"]}', None),
        ('{"ranking": ["B", "A", 3]}', None),
        ('{"ranking": {"B": 1, "A": 2, "C": 3}}', None),
        ("Ranking: B > A > C\nRanking: A > B > C", None),
    ],
)
def test_a_ranking_names_each_response_once_from_best_to_worst(content, ranking):
    assert said(content, RANKED) == ranking


@pytest.mark.parametrize(
    ("content", "form", "label"),
    [
        ("Score: 1", MARK, None),  # of 10, perhaps
        ("1", MARK, None),
        ("Verdict: A", TWO, None),  # is worse, perhaps
        ("A", TWO, "A"),  # the one token that was asked for
        ("t", THREE, None),
        ("Verdict: A\nIt is the one that", TWO, "A"),
        ('{"verdict": "A"}\n\n\n\n', TWO, "A"),
        ('{"verdict": "A', TWO, None),
        ("Ranking: A > B", forms.listwise(2), None),
    ],
)
def test_what_was_cut_off_is_not_taken_for_its_beginning(content, form, label):
    assert said(content, form, finish="length") == label


def test_a_criterion_that_was_cut_off_is_not_taken_for_its_beginning():
    form = forms.scalar(lowest=1, highest=10, criteria=("tone",))
    assert read(body("Score: 8\ntone: 1", finish="length"), form).status == MALFORMED
    assert read(body("Score: 8\ntone: 1\n", finish="length"), form).criteria == {"tone": "1"}


def test_a_text_that_was_cut_off_is_told():
    assert "cut off at max_tokens" in read(body("Well, the", finish="length"), TWO).why


def test_criteria_are_read_beside_the_verdict():
    form = forms.pairwise(scale="three", criteria=("honesty", "tone"))
    for content in (
        '{"honesty": "B", "tone": "tie", "verdict": "A"}',
        "honesty: B\ntone: tie\nVerdict: A",
        "**Honesty**: B\n**Tone**: tie\n\n**Verdict**: A",
    ):
        reading = read(body(content), form)
        assert reading.label == "A" and reading.criteria == {"honesty": "B", "tone": "tie"}
    for content in ('{"honesty": "B", "verdict": "A"}', "tone: A\ntone: B\nhonesty: A\nVerdict: A"):
        assert read(body(content), form).status == MALFORMED


@pytest.mark.parametrize(
    "sent",
    [
        body(None, refusal="I cannot help with that."),
        body("Verdict: A", refusal="No."),
        body("Verdict: A", finish="content_filter"),
    ],
)
def test_a_refusal_is_no_verdict(sent):
    assert read(sent, THREE).status == REFUSAL


@pytest.mark.parametrize("content", [None, 1, True, ["A"], {"verdict": "A"}, [{"text": "A"}]])
def test_content_that_is_no_text_says_nothing(content):
    assert said(content) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b"1", b'"choices"', b"<html>", b"\xff\xfe", b"\x00" * 10,
        b'{"choices": null}', b'{"choices": []}', b'{"choices": {}}', b'{"choices": "abc"}',
        b'{"choices": [null]}', b'{"choices": [{"message": null}]}', b'{"choices": [[]]}',
        b'{"choices": [{"message": []}]}', b'{"choices": [{"text": "A"}]}', b"[" * 10**6,
        b'{"a":' * 10**5, b'{"choices": [{"message": {"content": "A"}}', b"1" * 5000,
        b'{"choices": [{"message": {"content": ' + b"[" * 10**5,
    ],
)  # fmt: skip
def test_bytes_that_hold_no_completion_are_none(raw):
    assert completion(raw) is None


HOSTILE = (None, True, 0, -1, 10**400, 1.5, "", "A", [], {}, [[]], [None], {"token": 1}, "\ud800")


def mangled(value: Any, rng: random.Random) -> Any:
    """The value with some of its parts replaced."""
    if rng.random() < 0.15:
        return rng.choice(HOSTILE)
    if isinstance(value, dict):
        return {key: mangled(part, rng) for key, part in value.items() if rng.random() > 0.05}
    if isinstance(value, list):
        return [mangled(part, rng) for part in value for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    return value


def test_whatever_is_sent_nothing_is_raised():
    rng = random.Random(7)
    top = [{"token": "A", "logprob": -0.1, "bytes": [65]}, {"token": "B", "logprob": -3}]
    entries = [
        {"token": "Verdict:", "logprob": 0.0},
        {"token": " A", "logprob": -0.1, "bytes": [32, 65], "top_logprobs": top},
    ]
    good = body("Verdict: A") | {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    good["choices"][0]["logprobs"] = {"content": entries}
    forms_ = (TWO, MARK, RANKED, forms.pairwise(scale="two", criteria=("tone",)))
    understood = 0
    for _ in range(4000):
        found = completion(json.dumps(mangled(good, rng)).encode())
        if found is not None:
            understood += 1
            usage(found)
            for form in forms_:
                reading = read(found, form)
                assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading
    assert understood > 1000


def test_random_text_is_never_a_crash():
    rng = random.Random(8)
    bits = [
        "Verdict",
        ":",
        " ",
        "\n",
        "A",
        "B",
        "tie",
        "{",
        "}",
        '"',
        "verdict",
        "[",
        "]",
        "<think>",
        "</think>",
        "8",
        ".",
        "/10",
        ">",
        ",",
        "é",
        "\ud83d",
        "</s>",
        "1.",
        "*",
        "\\",
        "not ",
    ]
    for _ in range(5000):
        content = "".join(rng.choices(bits, k=rng.randrange(20)))
        for form in (TWO, MARK, RANKED):
            read(body(content, finish=rng.choice(("stop", "length"))), form)


@pytest.mark.parametrize(
    "text",
    [
        "\n", " ", "*", "Verdict", "Verdict: ", "Verdict:\n", "{", '{"verdict": ', '{"a', "A\n",
        "A ", "the ", "<think>", "</think>", "</s>", "1. A\n", "A > ", "[[", "\u00a0", "\\",
        "verdict*", '{"verdict": "A"}', '{"verdict": "A} ', '"verdict": "A", ', "```{",
        "{ verdict: A ", '\\"verdict', "verdict : ", "(", '"verdict":', "<",
        "the the the verdict ",
    ],
)  # fmt: skip
def test_hostile_length_is_read_in_a_moment(text):
    for size in (90_000, 2_000_000):
        content = text * (size // len(text))
        for form in (TWO, MARK, RANKED):
            started = time.process_time()
            read(body(content), form)
            assert time.process_time() - started < 2, "quadratic"


def test_ten_megabytes_of_answer_and_of_logprobs_are_read_in_a_moment():
    entries = [{"token": "A", "logprob": -1.0, "top_logprobs": []}] * 100_000
    sent = body("<think>" + "x" * 10**7 + "</think>Verdict: A")
    sent["choices"][0]["logprobs"] = {"content": entries}
    started = time.process_time()
    assert read(sent, TWO).label == "A" and time.process_time() - started < 2


@pytest.mark.parametrize(
    ("told", "counted"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}, (12, 3)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 3}, None),
        ({"prompt_tokens": 1.5, "completion_tokens": 3}, None),
        ({"prompt_tokens": "12", "completion_tokens": 3}, None),
        ({"prompt_tokens": 12}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": 3}, None),
        ({"prompt_tokens": True, "completion_tokens": 3}, None),
        (None, None),
        ([], None),
    ],
)
def test_usage_is_two_counts_or_nothing(told, counted):
    found = usage({"usage": told})
    assert (None if found is None else (found.prompt, found.completion)) == counted


def test_a_mark_with_probabilities_is_their_expectation():
    hard = Reading(status=OK, label="3")
    soft = Reading(status=OK, label="3", probabilities={"1": 0.25, "2": 0.25, "3": 0.5})
    assert score(hard) == 3.0 and score(soft) == 2.25
