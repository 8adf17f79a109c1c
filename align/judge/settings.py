"""Settings of the judges; values and comments are in conf/judge/."""

from dataclasses import dataclass, field

from align.checks import check_file


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A judge that knows the facts: rules over the prompt's `meta`."""

    name: str
    module: str | None
    path: str = field(metadata={"fingerprint": "content"})

    def __post_init__(self) -> None:
        check_file("judge.path", self.path)
