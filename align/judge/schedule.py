"""When a request may go: rates that follow the endpoint, and a breaker for when it is down.

Everything here is arithmetic over a clock that is passed in; nobody sleeps here.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ns|us|µs|μs|ms|s|m|h|d)")
SECONDS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
    "d": 86400.0,
}  # fmt: skip
LONGEST_BACKOFF_S = 30.0
FIRST_BACKOFF_S = 0.5
ADAPT_S = 1.0  # of replies between two changes of the rate


def duration(text: str | None) -> float | None:
    """Seconds from "1.5", "20ms" or "6m0s"; None from anything else, dates included."""
    if text is None:
        return None
    text = text.strip().lower()
    if re.fullmatch(r"\d{1,15}(?:\.\d{1,15})?", text):
        return float(text)
    if re.fullmatch(rf"(?:{PARTS.pattern})+", text):
        return sum(float(number) * SECONDS[unit] for number, unit in PARTS.findall(text))
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """How long the endpoint asks to be left alone, in seconds."""
    milliseconds = duration(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    return duration(headers.get("retry-after"))


def full_jitter(attempt: int, rng: random.Random) -> float:
    """Seconds before attempt number `attempt` (1 is the first repetition): anything from nothing to
    a bound that doubles.

    Source: Brooker 2015, Exponential Backoff and Jitter ("full jitter").
    """
    return rng.uniform(0, doubled(FIRST_BACKOFF_S, attempt - 1, most=LONGEST_BACKOFF_S))


def doubled(first: float, times: int, *, most: float) -> float:
    """`first`, doubled so often, `most` at most."""
    return min(most, first * 2.0 ** min(times, 60))


@dataclass
class Bucket:
    """A token bucket: `rate` units a second flow in, `burst` seconds' worth can be saved up.

    Kept as the time at which everything taken so far will have flowed in (the generic cell rate
    algorithm), so that taking is one sum and needs no timer.
    """

    rate: float | None = None
    burst: float = 1.0
    due: float = float("-inf")

    def take(self, units: float, now: float) -> float:
        """Takes them, and tells the seconds to wait until they are there."""
        if self.rate is None:
            return 0.0
        self.due = max(self.due, now - self.burst) + units / self.rate
        return max(0.0, self.due - now)


@dataclass
class Pace:
    """How fast requests go to one endpoint: what its headers allow, less while it refuses some.

        f = share of the last second's replies that were refusals (429)
        rate <- rate (1 - f / 2) + max(1, rate / 20)    once a second

    A few refusals among many answers hardly slow it down, nothing but refusals halves it. Without a
    refusal and without headers there is no limit but the number of workers.

    Source: the cut by the share of refusals is that of DCTCP (Alizadeh et al. 2010, eq. 2).
    """

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    allowed: float | None = None  # requests a second, by the endpoint's headers
    paused_until: float = 0.0
    since: float | None = None  # when the counting of replies began
    answers: int = 0
    refusals: int = 0

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until a request of so many tokens may go; its place is taken. After a pause they
        go at the usual rate, not all at once.
        """
        start = max(now, self.paused_until)
        waits = self.requests.take(1, start), self.tokens.take(tokens, start)
        return start - now + max(waits)

    def headers(self, headers: Mapping[str, str], now: float) -> None:
        """Seeds both buckets from `x-ratelimit-limit-*`, and pauses where nothing remains."""
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            limit = duration(headers.get(f"x-ratelimit-limit-{kind}"))
            if not limit:
                continue
            if kind == "requests":
                self.allowed = limit / 60
                bucket.rate = min(bucket.rate or self.allowed, self.allowed)
            else:
                bucket.rate = limit / 60
            remaining = duration(headers.get(f"x-ratelimit-remaining-{kind}"))
            reset = duration(headers.get(f"x-ratelimit-reset-{kind}"))
            if remaining == 0 and reset:
                self.pause(min(reset, 60.0), now)

    def pause(self, seconds: float, now: float) -> None:
        self.paused_until = max(self.paused_until, now + seconds)

    def good(self, now: float) -> None:
        """An answer."""
        self.answers += 1
        self.adapt(now)

    def refused(self, wait: float | None, now: float) -> None:
        """A 429, and how long the endpoint then asks to be left alone."""
        self.refusals += 1
        if wait is not None:
            self.pause(wait, now)
        self.adapt(now)

    def adapt(self, now: float) -> None:
        """Sets the rate anew when a second of replies has been counted."""
        if self.since is None:
            self.since = now
        elapsed = now - self.since
        if elapsed < ADAPT_S:
            return
        replies = self.answers + self.refusals
        rate = self.requests.rate
        if rate is None and self.refusals:
            rate = replies / elapsed  # what went through without a limit
        if rate is not None:
            cut = 1 - self.refusals / replies / 2
            risen = rate * cut + max(1.0, rate / 20)
            self.requests.rate = min(risen, self.allowed or float("inf"))
        self.since, self.answers, self.refusals = now, 0, 0


@dataclass
class Breaker:
    """Stops asking an endpoint that is down: after `failures` in a row it opens, for longer each
    time, and then lets one request a second through to see, until one of them has told.

    Source: Nygard 2007, Release It!, "Circuit Breaker".
    """

    failures: int = 8
    first_s: float = 1.0
    longest_s: float = 60.0
    in_a_row: int = 0
    opened: int = 0
    open_until: float = 0.0
    trial_until: float = 0.0
    failing_since: float | None = None

    def wait(self, now: float) -> float:
        """Seconds until one may try; 0 lets this one through."""
        if self.open_until <= now and self.opened:
            if now < self.trial_until:
                return self.trial_until - now
            self.trial_until = now + 1.0
        return max(0.0, self.open_until - now)

    def good(self) -> None:
        self.in_a_row, self.opened, self.open_until, self.failing_since = 0, 0, 0.0, None

    def bad(self, now: float) -> bool:
        """Notes a failure; True when it opened the breaker."""
        self.in_a_row += 1
        self.failing_since = self.failing_since if self.failing_since is not None else now
        if self.in_a_row < self.failures and not self.opened:
            return False
        if now < self.open_until:
            return False
        self.open_until = now + doubled(self.first_s, self.opened, most=self.longest_s)
        self.opened += 1
        return True

    def down_for(self, now: float) -> float:
        """Seconds since the first failure that no answer has followed."""
        return 0.0 if self.failing_since is None else now - self.failing_since
