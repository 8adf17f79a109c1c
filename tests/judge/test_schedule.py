"""Waiting times worked by hand, on a clock that only the test moves."""

import random

import pytest

from align.judge.schedule import Breaker, Bucket, Pace, duration, full_jitter, retry_after


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 1.0), ("1.5", 1.5), (" 2 ", 2.0), ("0", 0.0), ("20ms", 0.02), ("6m0s", 360.0),
        ("1m26.4s", 86.4), ("1h2m3s", 3723.0), ("2d", 172800.0), ("150us", 0.00015),
        ("150µs", 0.00015), ("7ns", 7e-9), ("1S", 1.0), ("1m30s", 90.0), ("1m30ms", 60.03),
        (None, None), ("", None), ("-1", None), ("1e3", None), ("s", None), ("5 s", None),
        ("1.s", None), ("nan", None), ("inf", None), ("9" * 400, None), ("1x", None),
        ("10, 10;w=60", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("1m" * 50_000 + "x", None),
    ],
)  # fmt: skip
def test_durations_as_headers_write_them(text, seconds):
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_the_milliseconds_go_before_the_seconds(headers, seconds):
    assert retry_after(headers) == seconds


def test_jitter_is_anything_below_a_bound_that_doubles():
    rng = random.Random(1)
    for attempt, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (10**6, 30.0)):
        drawn = [full_jitter(attempt, rng) for _ in range(2000)]
        assert 0 <= min(drawn) < 0.02 * bound and 0.98 * bound < max(drawn) <= bound
        assert sum(drawn) / 2000 == pytest.approx(bound / 2, rel=0.05)


@pytest.mark.parametrize("start", [0.0, 1e6])
def test_a_bucket_lets_a_seconds_worth_go_and_then_one_after_the_other(start):
    bucket = Bucket(rate=4.0)
    waits = [bucket.take(1, start) for _ in range(6)]
    assert waits == [0, 0, 0, 0, 0.25, 0.5], "four at once, then one each quarter"
    # Half a second later six of four a second are owed: the next is due at 0.75 s.
    assert bucket.take(1, start + 0.5) == 0.25
    # After a long silence no more than a second's worth has been saved up.
    assert [bucket.take(1, start + 100) for _ in range(5)] == [0, 0, 0, 0, 0.25]


def test_a_request_that_is_larger_than_the_bucket_waits_for_all_of_it():
    bucket = Bucket(rate=100.0)
    assert bucket.take(350, 10.0) == 2.5
    assert bucket.take(50, 10.0) == 3.0


def test_without_a_rate_nothing_waits():
    assert Bucket().take(10**9, 0.0) == 0.0 and Pace().wait(10**9, 5.0) == 0.0


def limits(**given: str) -> dict[str, str]:
    return {f"x-ratelimit-{key.replace('_', '-')}": value for key, value in given.items()}


def test_headers_seed_both_buckets_by_the_minute():
    pace = Pace()
    pace.headers(limits(limit_requests="120", limit_tokens="6000"), 0.0)
    assert (pace.requests.rate, pace.tokens.rate, pace.allowed) == (2.0, 100.0, 2.0)
    # Tokens are the narrower of the two: 150 of 100 a second.
    assert pace.wait(150, 0.0) == 0.5
    assert pace.wait(100, 0.0) == 1.5


@pytest.mark.parametrize(
    "headers",
    [{}, limits(limit_requests="0"), limits(limit_requests="many"), limits(limit_tokens="-1"),
     limits(remaining_requests="0", reset_requests="30s")],
)  # fmt: skip
def test_headers_that_say_nothing_change_nothing(headers):
    pace = Pace()
    pace.headers(headers, 0.0)
    assert pace.requests.rate is pace.tokens.rate is None and pace.wait(1, 0.0) == 0.0


def test_where_nothing_remains_it_pauses_until_the_reset_a_minute_at_most():
    pace = Pace()
    told = limits(limit_requests="600", remaining_requests="0", reset_requests="6m0s")
    pace.headers(told, 100.0)
    assert pace.wait(1, 100.0) == 60.0
    pace = Pace()
    pace.headers({**told, "x-ratelimit-reset-requests": "2s"}, 100.0)
    assert pace.wait(1, 101.5) == 0.5


def told(pace: Pace, *, good: int, refused: int, second: int) -> float:
    """A second of replies; the rate after it."""
    start = float(second)
    pace.since = pace.since if pace.since is not None else start
    for number in range(refused):
        pace.refused(None, start + number / 10_000)
    for number in range(good):
        pace.good(start + 0.5 + number / 10_000)
    pace.adapt(start + 1.0)
    assert pace.requests.rate is not None
    return pace.requests.rate


def test_a_second_of_nothing_but_refusals_halves_the_rate_once():
    pace = Pace()
    pace.headers(limits(limit_requests="2400"), 0.0)  # forty a second
    assert told(pace, good=0, refused=64, second=10) == 22.0  # half, and a twentieth
    assert told(pace, good=0, refused=64, second=11) == pytest.approx(12.1)


def test_a_few_refusals_among_many_answers_do_not_slow_it_down():
    pace = Pace()
    pace.headers(limits(limit_requests="2400"), 0.0)
    for second in range(60):
        found = told(pace, good=38, refused=2, second=second)
    assert found == 40.0


def test_without_headers_a_limit_is_found_from_what_went_through():
    pace = Pace()
    assert told(pace, good=20, refused=60, second=0) == pytest.approx(54.0)  # 80 x 0.625 + 4
    for second in range(1, 60):  # an endpoint that answers twenty a second and refuses the rest
        asked = round(pace.requests.rate)
        found = told(pace, good=min(asked, 20), refused=max(asked - 20, 0), second=second)
    assert 20 <= found < 25


def test_it_never_stands_still_and_recovers():
    pace = Pace()
    for second in range(50):
        told(pace, good=0, refused=5, second=second)
    assert 1.0 <= pace.requests.rate <= 2.1
    for second in range(50, 150):
        told(pace, good=5, refused=0, second=second)
    assert pace.requests.rate > 40


def test_answers_alone_set_no_limit():
    pace = Pace()
    for number in range(10_000):
        pace.good(number / 100)
    assert pace.requests.rate is None and pace.wait(1, 100.0) == 0.0


def test_the_headers_of_later_answers_do_not_undo_a_refusal():
    pace = Pace()
    pace.headers(limits(limit_requests="600"), 0.0)
    slowed = told(pace, good=0, refused=9, second=0)
    pace.headers(limits(limit_requests="600"), 2.0)
    assert pace.requests.rate == slowed < 10


def test_a_retry_after_pauses_all_and_they_do_not_come_back_all_at_once():
    pace = Pace()
    pace.headers(limits(limit_requests="120"), 0.0)  # two a second
    pace.refused(30.0, 0.0)
    pace.refused(5.0, 0.5)  # a shorter one does not shorten it
    assert [pace.wait(1, 10.0) for _ in range(4)] == [20.0, 20.0, 20.5, 21.0]


def test_a_breaker_opens_after_so_many_failures_in_a_row():
    breaker = Breaker(failures=3)
    assert [breaker.bad(0.0), breaker.bad(0.0)] == [False, False] and breaker.wait(0.0) == 0.0
    breaker.good()
    assert [breaker.bad(1.0) for _ in range(3)] == [False, False, True]
    assert breaker.wait(1.0) == 1.0 and breaker.wait(1.75) == 0.25


def test_an_open_breaker_tries_one_at_a_time_after_longer_and_longer():
    breaker = Breaker(failures=1, first_s=1.0, longest_s=5.0)
    now = 100.0
    for pause in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert breaker.bad(now) and breaker.wait(now) == pause
        assert not breaker.bad(now + 0.5), "what was under way opens nothing anew"
        now += pause
        assert breaker.wait(now) == 0.0, "one may try"
        assert breaker.wait(now) == 1.0 and breaker.wait(now + 0.25) == 0.75, "and no other"
        now += 0.5
    for _ in range(3000):  # for as long as one likes
        now += 5.0
        breaker.bad(now)
    assert breaker.wait(now) == 5.0


def test_a_trial_that_tells_nothing_makes_room_for_another_a_second_later():
    breaker = Breaker(failures=1)
    breaker.bad(0.0)
    assert [breaker.wait(t) for t in (1.0, 1.5, 2.0, 2.0)] == [0.0, 0.5, 0.0, 1.0]


def test_an_answer_closes_it():
    breaker = Breaker(failures=2)
    breaker.bad(3.0)
    breaker.bad(4.0)
    assert breaker.down_for(9.0) == 6.0
    breaker.good()
    assert breaker.wait(4.0) == 0.0 and breaker.down_for(9.0) == 0.0
    assert not breaker.bad(10.0) and breaker.wait(10.0) == 0.0
    assert breaker.bad(11.0) and breaker.wait(11.0) == 1.0, "as short as the first time"
