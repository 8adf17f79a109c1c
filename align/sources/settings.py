"""Settings of the sources; values and comments are in conf/data/."""

from dataclasses import dataclass, field

from align.checks import check_file, check_range
from align.errors import ConfigError

CONTENT = {"fingerprint": "content"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources share: files by path, a limit, and the window for training rows."""

    name: str
    module: str | None
    path: str | None = field(metadata=CONTENT)
    test_path: str | None = field(metadata=CONTENT)
    limit: int | None
    max_length: int | None

    def __post_init__(self) -> None:
        if self.path is None:
            raise ConfigError(
                f"data={self.name}: no file to read; type data.path=FILE (.jsonl or .parquet)"
            )
        check_file("data.path", self.path)
        check_file("data.test_path", self.test_path)
        if self.limit is not None:
            check_range("data.limit", self.limit, low=1)
        if self.max_length is not None:
            check_range("data.max_length", self.max_length, low=16)


@dataclass(frozen=True, kw_only=True)
class Prompts(Source):
    """Prompts from a local file; candidates are generated for them."""


@dataclass(frozen=True, kw_only=True)
class Preferences(Source):
    """Pairs that were labelled already, from a local file."""


@dataclass(frozen=True, kw_only=True)
class QaFeedback(Source):
    """Human comparisons of the QA-Feedback release."""
