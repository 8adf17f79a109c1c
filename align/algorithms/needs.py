"""What an algorithm asks of the pipeline; torch-free, because a plan is checked before torch is
imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Needs:
    """`records`: the record class it trains on; `reference`: whether its loss needs the base's
    log-probabilities; `reward`: whether it learns from rewards for its own answers.
    """

    records: type
    reference: bool
    reward: bool = False
