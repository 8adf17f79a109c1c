"""Settings of the samplers; values and comments are in conf/sampler/."""

from dataclasses import dataclass

from align.checks import check_range


@dataclass(frozen=True, kw_only=True)
class Hf:
    """In-process sampling with transformers."""

    name: str
    module: str | None
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        check_range("sampler.n", self.n, low=1)
        check_range("sampler.temperature", self.temperature, low=0)
        check_range("sampler.top_p", self.top_p, low=0, high=1, above=True)
        check_range("sampler.top_k", self.top_k, low=0)
        check_range("sampler.max_new_tokens", self.max_new_tokens, low=1)
        check_range("sampler.batch_size", self.batch_size, low=1)
