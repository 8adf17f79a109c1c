"""A price is exact to the nano-dollar and never too low."""

from pathlib import Path

import pytest

from align.errors import ConfigError
from align.judge.prices import Price, find_price, nano, usd

LISTED = Path(__file__).parents[2] / "conf" / "prices.yaml"
MINI = Price(read=0.15, written=0.6)


def found(model: str, *, table: Path = LISTED, **changes: object) -> Price:
    usual = {"price_in": None, "price_out": None, "batch": False}
    return find_price(model, table=table, **{**usual, **changes})


@pytest.mark.parametrize(
    ("price", "prompt", "completion", "cost"),
    [
        (MINI, 0, 0, 0),
        (MINI, 1, 0, 150),
        (MINI, 0, 1, 600),
        (MINI, 3, 7, 4_650),  # 3 x 0.15 is not 0.45 in floating point
        (MINI, 1_000_000, 1_000_000, 750_000_000),
        (Price(read=1.1, written=4.4), 999_999_999_999, 0, 1_099_999_999_998_900),
        (Price(read=0.0001, written=0.0), 1, 0, 1),  # a tenth of a nano-dollar
        (Price(read=0.0001, written=0.0), 10, 0, 1),
        (Price(read=0.0001, written=0.0), 11, 0, 2),
        (Price(read=1e-12, written=0.0), 1, 0, 1),
        (Price(read=0.0, written=0.0), 10**9, 10**9, 0),
        (Price(read=2, written=8), 5, 5, 50_000),
    ],
)
def test_a_cost_is_exact_and_rounded_up(price, prompt, completion, cost):
    assert price.cost(prompt=prompt, completion=completion) == cost


def test_many_small_costs_add_up_to_the_large_one():
    assert sum(MINI.cost(prompt=i, completion=1) for i in range(1000)) == 499_500 * 150 + 600_000


def test_dollars_and_nano_dollars():
    assert usd(1_500_000_000) == 1.5 and nano(0.1) == 100_000_000 and nano(None) is None


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("gpt-4o-mini", MINI),
        ("gpt-4o-mini-2024-07-18", MINI),
        ("gpt-4o-2024-08-06", Price(read=2.5, written=10.0)),
        ("gpt-4o-2024-05-13", Price(read=5.0, written=15.0)),  # listed itself
        ("gpt-4.1-2025-04-14", Price(read=2.0, written=8.0)),
    ],
)
def test_a_dated_snapshot_costs_what_its_model_costs_unless_it_is_listed(model, price):
    assert found(model) == price


@pytest.mark.parametrize(
    "model", ["gpt-4", "gpt-4o-mini-2024", "ft:gpt-4o-mini:me", "gpt-4o-2024-08-06\n", "", "as_of"]
)
def test_a_model_without_a_price_is_one_line_that_says_what_to_type(model):
    with pytest.raises(ConfigError) as caught:
        found(model)
    assert "its price is not in conf/prices.yaml (of 2026-06-21)" in str(caught.value)
    assert "type judge.price_in=USD judge.price_out=USD per million tokens" in str(caught.value)


def test_a_batch_takes_half():
    assert found("gpt-4o-mini", batch=True) == Price(read=0.075, written=0.3)
    assert found("gpt-4o-mini", batch=True).cost(prompt=1, completion=0) == 75


def test_the_users_own_price_goes_before_the_list_each_half_of_it():
    assert found("mine", price_in=1, price_out=0.0) == Price(read=1, written=0.0)
    assert found("mine", price_in=1.0, price_out=2.0, batch=True) == Price(read=1.0, written=2.0)
    assert found("gpt-4o-mini", price_in=9.0) == Price(read=9.0, written=0.6)
    assert found("gpt-4o-mini", price_out=0.0, batch=True) == Price(read=0.075, written=0.0)
    with pytest.raises(ConfigError):
        found("mine", price_in=1.0)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "models: 3", "models: {a: 3}", "models: {a: {in: 1}}", "a: [", "models: {}",
     "models: {a: {in: x, out: 1}}\nas_of: 1\nbatch_discount: 1"],
)  # fmt: skip
def test_a_file_that_is_no_price_list_is_one_line(tmp_path, text):
    table = tmp_path / "prices.yaml"
    table.write_text(text)
    for file in (table, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match=r"\Ajudge.prices=[^\n]*is no price list[^\n]*\Z"):
            found("a", table=file)
