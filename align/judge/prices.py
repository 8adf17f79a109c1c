"""What a request costs: exact, in nano-dollars, so that a cap is a cap."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.errors import ConfigError

if TYPE_CHECKING:
    from align.judge.settings import Openai

NANO = 1e9
DATED = re.compile(r"-\d{4}-\d{2}-\d{2}\Z")


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens read and written."""

    read: float
    written: float

    def cost(self, *, prompt: int, completion: int) -> int:
        """Nano-dollars, rounded up; a price is the decimal number that it is written as."""
        read, written, parts = self.whole
        return -(-(prompt * read + completion * written) // parts)

    @cached_property
    def whole(self) -> tuple[int, int, int]:
        """Both prices a token in whole parts of a nano-dollar, and how many parts make one."""
        read, written = (1000 * Fraction(str(price)) for price in (self.read, self.written))
        parts = math.lcm(read.denominator, written.denominator)
        return int(read * parts), int(written * parts), parts

    def discounted(self, discount: float) -> "Price":
        return Price(read=self.read * discount, written=self.written * discount)


def usd(nano: int) -> float:
    return nano / NANO


def nano(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * NANO)


def find_price(
    model: str, *, price_in: float | None, price_out: float | None, batch: bool, table: Path
) -> Price:
    """The user's own price, each half of it for itself, else that of the list, which alone knows a
    discount for batches; a dated snapshot (MODEL-2026-01-31) costs what its model costs, unless it
    is listed itself.

    Raises:
        ConfigError: neither is there.
    """
    if price_in is not None and price_out is not None:
        return Price(read=price_in, written=price_out)
    as_of, discount, models = price_list(table)
    found = models.get(model) or models.get(DATED.sub("", model))
    if found is None:
        raise ConfigError(
            f"judge.model={model}: its price is not in conf/prices.yaml (of {as_of}); type "
            "judge.price_in=USD judge.price_out=USD per million tokens, 0 for a server of your own"
        )
    listed = found.discounted(discount) if batch else found
    return Price(
        read=listed.read if price_in is None else price_in,
        written=listed.written if price_out is None else price_out,
    )


def price_list(table: Path) -> tuple[Any, float, dict[str, Price]]:
    """Its date, what a batch costs of the full price, and the price of each model.

    Raises:
        ConfigError: the file is no price list.
    """
    try:
        listed = yaml.safe_load(table.read_text(encoding="utf-8"))
        models = {
            str(model): Price(read=float(price["in"]), written=float(price["out"]))
            for model, price in listed["models"].items()
        }
        return listed["as_of"], float(listed["batch_discount"]), models
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"judge.prices={table}: is no price list ({why}); type judge.prices=FILE.yaml with "
            "as_of, batch_discount and models, as in conf/prices.yaml"
        ) from error


def price_of(settings: "Openai", *, live: bool = False) -> Price:
    """What the settings' requests cost; `live` where they do not go through a batch."""
    return find_price(
        settings.model, price_in=settings.price_in, price_out=settings.price_out,
        batch=settings.batch and not live, table=Path(settings.prices),
    )  # fmt: skip
