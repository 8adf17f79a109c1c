"""What labelling would take: requests, tokens, price and time, without sending anything."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from align.judge.ledger import Ledger
from align.judge.prices import Price, price_of
from align.judge.request import Capability, able_of, request
from align.judge.settings import Openai
from align.judge.verdicts import fitting, groups, questions
from align.records import Comparison

CHARACTERS_PER_TOKEN = 4  # of English prose; other languages have fewer
ANSWER_TOKENS = 12  # of a verdict without a reason
REASON_TOKENS = 60
ASSUMED_S = 2.0  # a request, where nobody has asked this judge before


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs in nano-dollars; `worst` if every byte were a token and every answer as long as
    allowed. `basis` says where the latency comes from.
    """

    comparisons: int
    requests: int
    known: int
    tokens_in: int
    tokens_out: int
    cost: int
    worst: int
    price: Price
    latency: float
    basis: str
    seconds: float


def estimate(comparisons: Iterable[Comparison], *, settings: Openai) -> Estimate:
    """Renders every question as it would be sent, and looks up which are answered already."""
    price = price_of(settings)
    path = Path(settings.ledger)
    ledger = Ledger.open(path) if path.exists() else None
    try:
        able = Capability.assumed(settings)
        known = ledger.capability(settings.judge) if ledger else None
        if known is not None:
            able = Capability.believed(known, ledger=path, identity=settings.judge)
        able = able_of(settings, able)
        measured = ledger.seconds_per_request(settings.judge) if ledger else None
        count = requests = answered = read = worst = 0
        for group in groups(comparisons, settings=settings):
            count += len(group.comparisons)
            kept = fitting(group, settings=settings)
            if not kept.comparisons:
                continue
            for question in questions(kept, settings=settings, samples=settings.samples):
                wanted = request(question, settings=settings, able=able, limit=settings.max_chars)
                requests += 1
                if ledger and ledger.judgment(wanted.key) is not None:
                    answered += 1
                    continue
                read += wanted.characters // CHARACTERS_PER_TOKEN
                worst += wanted.worst(price, settings.max_tokens)
    finally:
        if ledger:
            ledger.close()
    left = requests - answered
    written = left * (ANSWER_TOKENS + REASON_TOKENS * settings.reason)
    latency = measured or ASSUMED_S
    return Estimate(
        comparisons=count,
        requests=requests,
        known=answered,
        tokens_in=read,
        tokens_out=written,
        cost=price.cost(prompt=read, completion=written),
        worst=worst,
        price=price,
        latency=latency,
        basis="as measured" if measured else "assumed",
        seconds=-(-left // settings.concurrency) * latency,
    )
