"""Settings of the base model and of the adapter that is trained on it; values and comments are in
conf/.
"""

from dataclasses import dataclass

from align.checks import check_choice, check_file, check_range

QUANTIZATIONS = ("nf4", "int8", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Model:
    """`dtype` "auto" is float32 on CPU, bfloat16 on a GPU; it is the compute dtype of a quantized
    base.
    """

    name: str
    revision: str | None
    quantization: str
    dtype: str
    chat_template: str | None

    def __post_init__(self) -> None:
        check_choice("model.quantization", self.quantization, QUANTIZATIONS)
        check_choice("model.dtype", self.dtype, DTYPES)
        check_file("model.chat_template", self.chat_template)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter, "lora" or "dora" by name; on an NF4 base this is QLoRA."""

    name: str
    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]

    def __post_init__(self) -> None:
        check_choice("adapter.name", self.name, ("lora", "dora"))
        check_range("adapter.rank", self.rank, low=1)
        check_range("adapter.alpha", self.alpha, low=0, above=True)
        check_range("adapter.dropout", self.dropout, low=0, high=0.99)


@dataclass(frozen=True, kw_only=True)
class Full:
    """No adapter: all of the policy's weights are trained, on a copy of the base."""

    name: str
