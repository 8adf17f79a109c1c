"""What a request costs: exact, in nano-dollars, so that a cap is a cap."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from align.errors import ConfigError

NANO = 1e9
DATED = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens read and written."""

    read: float
    written: float

    def cost(self, *, prompt: int, completion: int) -> int:
        """Nano-dollars, rounded up."""
        return math.ceil(round(prompt * self.read * 1e3 + completion * self.written * 1e3, 6))

    def halved(self, discount: float) -> "Price":
        return Price(read=self.read * discount, written=self.written * discount)


def usd(nano: int) -> float:
    return nano / NANO


def nano(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * NANO)


def find_price(
    model: str, *, price_in: float | None, price_out: float | None, batch: bool, table: Path
) -> Price:
    """The user's own price, else that of the list; a dated snapshot (MODEL-2026-01-31) costs what
    its model costs.

    Raises:
        ConfigError: neither is there.
    """
    if price_in is not None and price_out is not None:
        return Price(read=price_in, written=price_out)
    listed = yaml.safe_load(table.read_text(encoding="utf-8"))
    found = listed["models"].get(model) or listed["models"].get(DATED.sub("", model))
    if found is None:
        raise ConfigError(
            f"judge.model={model}: its price is not in conf/prices.yaml (of {listed['as_of']}); type "
            "judge.price_in=USD judge.price_out=USD per million tokens, 0 for a server of your own"
        )
    price = Price(read=float(found["in"]), written=float(found["out"]))
    return price.halved(float(listed["batch_discount"])) if batch else price
