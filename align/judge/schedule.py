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
    """How fast requests go to one endpoint: what its headers allow, less after each refusal.

    Additive increase, multiplicative decrease (Chiu and Jain 1989) on requests a second. Without a
    refusal and without headers there is no limit but the number of workers.
    """

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    allowed: float | None = None  # requests a second, by the endpoint's headers
    paused_until: float = 0.0
    decreased: float = float("-inf")
    answered: list[float] = field(default_factory=list)

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
        """An answer: the rate rises by one request a second for every second of answers."""
        self.answered.append(now)
        if len(self.answered) > 400:
            del self.answered[:200]
        rate = self.requests.rate
        if rate is not None:
            self.requests.rate = min(rate + 1.0 / max(rate, 1.0), self.allowed or float("inf"))

    def refused(self, wait: float | None, now: float) -> None:
        """A 429: half the rate, once a second at most, since refusals come in flocks."""
        if wait is not None:
            self.pause(wait, now)
        if now - self.decreased < 1.0:
            return
        self.decreased = now
        current = self.requests.rate or self.observed(now)
        self.requests.rate = max(current / 2, 0.1)

    def observed(self, now: float) -> float:
        """Answers a second over the last ten seconds, at least one."""
        recent = [at for at in self.answered if now - at <= 10]
        return max(1.0, len(recent) / max(1.0, now - recent[0])) if recent else 1.0


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
