"""Settings of the judges; values and comments are in conf/judge/."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.checks import check_choice, check_file, check_range
from align.errors import ConfigError
from align.judge.forms import KINDS, MODES, SCALES
from align.models.settings import Model
from align.records import OK, STATUSES, TIE

CONTENT = {"fingerprint": "content"}
UNSHAPING = {"fingerprint": "ignore"}
ROOM = {"room": "align.judge"}  # the field holds another judge, or several by name
DISAGREEMENT = ("tie", "drop", "soft", "escalate")
OVERFLOW = ("truncate", "drop")
VOTES = ("mean", "logodds")
PREFERENCES = ("longest", "shortest", "first", "second", "contains", "none")
FAILURES = tuple(status for status in STATUSES if status not in (OK, TIE))


def called(settings: Any) -> str | None:
    """What a judge is called where people read it; None for no judge."""
    return getattr(settings, "judge", None) or getattr(settings, "name", None)


def in_batches(settings: Any) -> Iterator[bool]:
    """Whether a judge, or one of its members, asks through a provider's Batch API."""
    yield getattr(settings, "batch", False)
    for member in (getattr(settings, "members", None) or {}).values():
        yield from in_batches(member)


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A judge that knows the facts: rules over the prompt's `meta`."""

    name: str
    module: str | None
    path: str = field(metadata=CONTENT)

    def __post_init__(self) -> None:
        check_file("judge.path", self.path)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What judges that read a prompt share: how they are asked, what becomes of the answer."""

    name: str
    module: str | None
    identity: str | None
    prompt: str = field(metadata={"fingerprint": "template", "shipped": "prompts"})
    prompts: str = field(metadata=CONTENT)
    kind: str
    scale: str
    lowest: int
    highest: int
    criteria: list[str]
    reason: bool
    reference: str
    on_disagreement: str
    escalate: Any = field(metadata=ROOM)
    max_chars: int
    on_overflow: str

    def __post_init__(self) -> None:
        shipped = Path(self.prompts) / f"{self.prompt}.j2"
        path = shipped if shipped.is_file() else Path(self.prompt)
        if not path.is_file():
            names = sorted(p.stem for p in Path(self.prompts).glob("*.j2") if p.stem != "base")
            raise ConfigError(
                f"judge.prompt={self.prompt}: neither one of {', '.join(names)} nor a file; type "
                "judge.prompt=NAME or judge.prompt=FILE.j2"
            )
        if path.suffix != ".j2":
            raise ConfigError(
                f"judge.prompt={self.prompt}: a template's name ends in .j2; rename it"
            )
        from align.judge.template_files import shows_responses

        if not shows_responses(path.absolute(), Path(self.prompts)):
            raise ConfigError(
                f"judge.prompt={self.prompt}: names no responses, so the judge would not see any; "
                "put {{ responses }} in, as conf/judge/prompts/base.j2 does"
            )
        object.__setattr__(self, "prompt", str(path.absolute()))  # from here on it is a file
        check_choice("judge.kind", self.kind, KINDS)
        check_choice("judge.scale", self.scale, tuple(SCALES))
        check_range("judge.lowest", self.lowest, low=0)
        check_range("judge.highest", self.highest, low=self.lowest, high=100, above=True)
        check_choice("judge.on_disagreement", self.on_disagreement, DISAGREEMENT)
        check_choice("judge.on_overflow", self.on_overflow, OVERFLOW)
        check_range("judge.max_chars", self.max_chars, low=100)
        for name in self.criteria:
            if not name.isidentifier() or name in ("reason", "verdict", "score", "ranking"):
                raise ConfigError(
                    f"judge.criteria={self.criteria}: {name} must be a name of letters, digits and "
                    "_, other than reason, verdict, score and ranking"
                )
        if self.criteria and self.kind == "listwise":
            raise ConfigError(
                "judge.criteria: a ranking has none; type judge.kind=pairwise or judge.kind=scalar"
            )
        if any(in_batches(self.escalate)):
            raise ConfigError(
                "judge.escalate.batch=true: what is escalated is asked one by one, and live; type "
                "judge.escalate.batch=false"
            )
        if (self.on_disagreement == "escalate") != (self.escalate is not None):
            raise ConfigError(
                "judge.on_disagreement=escalate and judge.escalate go together; type "
                "judge.on_disagreement=escalate +judge@judge.escalate=openai "
                "judge.escalate.model=NAME"
            )


@dataclass(frozen=True, kw_only=True)
class Openai(Asking):
    """An LLM behind an OpenAI-compatible endpoint."""

    model: str
    base_url: str | None = field(metadata=UNSHAPING)
    api_key_env: str | None = field(metadata=UNSHAPING)
    samples: int
    answer: str
    logprobs: bool | str
    temperature: float | None
    max_tokens: int
    system_role: bool
    concurrency: int = field(metadata=UNSHAPING)
    timeout_s: float = field(metadata=UNSHAPING)
    max_attempts: int = field(metadata=UNSHAPING)
    max_malformed: int = field(metadata=UNSHAPING)
    give_up_after_s: float = field(metadata=UNSHAPING)
    budget_usd: float | None = field(metadata=UNSHAPING)
    max_requests: int | None = field(metadata=UNSHAPING)
    price_in: float | None = field(metadata=UNSHAPING)
    price_out: float | None = field(metadata=UNSHAPING)
    prices: str = field(metadata=UNSHAPING)
    ledger: str = field(metadata=UNSHAPING)
    batch: bool = field(metadata=UNSHAPING)
    batch_poll_s: float = field(metadata=UNSHAPING)

    def __post_init__(self) -> None:
        super().__post_init__()
        from align.judge.endpoint import check_url
        from align.judge.prices import find_price

        if self.base_url is not None:
            check_url(self.base_url)
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            raise ConfigError(
                "judge.api_key_env: is the name of an environment variable, and what was given is "
                "none (if it is the key itself, it stands in your shell's history now: change it); "
                "type export NAME=… and judge.api_key_env=NAME"
            )
        if self.answer == "choice" and (self.reason or self.criteria or self.kind == "listwise"):
            raise ConfigError(
                "judge.answer=choice: has room for one verdict, not for a reason, criteria or a "
                "ranking; type judge.answer=auto"
            )
        if not self.model.strip():
            raise ConfigError("judge.model: is empty; type judge.model=NAME")
        check_choice("judge.answer", self.answer, ("auto", *MODES))
        check_choice("judge.logprobs", str(self.logprobs).lower(), ("auto", "true", "false"))
        check_range("judge.samples", self.samples, low=1, high=100)
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"judge.samples={self.samples} with judge.temperature=0.0: every sample would be "
                "the "
                "same; type judge.temperature=0.7"
            )
        if self.temperature is not None:
            check_range("judge.temperature", self.temperature, low=0, high=2)
        check_range("judge.max_tokens", self.max_tokens, low=1)
        check_range("judge.concurrency", self.concurrency, low=1, high=4096)
        check_range("judge.timeout_s", self.timeout_s, low=0, above=True)
        check_range("judge.max_attempts", self.max_attempts, low=1)
        check_range("judge.max_malformed", self.max_malformed, low=1)
        check_range("judge.give_up_after_s", self.give_up_after_s, low=0, above=True)
        check_range("judge.batch_poll_s", self.batch_poll_s, low=0, above=True)
        for key in ("budget_usd", "max_requests", "price_in", "price_out"):
            if (value := getattr(self, key)) is not None:
                check_range(f"judge.{key}", value, low=0)
        find_price(
            self.model, price_in=self.price_in, price_out=self.price_out, batch=self.batch,
            table=Path(self.prices),
        )  # fmt: skip

    @property
    def judge(self) -> str:
        """What it is called in verdicts and in the ledger."""
        return self.identity or self.model


@dataclass(frozen=True, kw_only=True)
class Local(Asking):
    """A language model in this process, read at the token of its verdict."""

    model: Model
    batch_tokens: int = field(metadata=UNSHAPING)

    def __post_init__(self) -> None:
        check_range("judge.batch_tokens", self.batch_tokens, low=1)
        if self.kind == "listwise":
            raise ConfigError(
                "judge.kind=listwise: this judge reads one answer token, and a ranking has more; "
                "type judge.kind=pairwise or judge.kind=scalar"
            )
        if self.criteria or self.reason:
            key = f"judge.criteria={self.criteria}" if self.criteria else "judge.reason=true"
            raise ConfigError(
                f"{key}: this judge writes nothing, only its verdict is read; type "
                "judge.criteria=[] judge.reason=false, or choose judge=openai"
            )
        if self.on_disagreement == "escalate" or self.escalate is not None:
            raise ConfigError(
                "judge.on_disagreement=escalate: this judge asks no other one; type "
                "judge.on_disagreement=tie, or judge=openai with this one as its judge.escalate"
            )
        super().__post_init__()

    @property
    def judge(self) -> str:
        """What it is called where people read it; its verdicts also name the hub's commit."""
        return self.identity or self.model.name


@dataclass(frozen=True, kw_only=True)
class Jury:
    """Several judges, weighted; alike without `weights` and `agreement`."""

    name: str
    module: str | None
    members: Mapping[str, Any] = field(metadata=ROOM)
    weights: Mapping[str, float] | None
    agreement: Mapping[str, str] | None = field(metadata=CONTENT)
    vote: str
    quorum: int | None

    def __post_init__(self) -> None:
        from align.judge.jury import voters

        members = self.members if isinstance(self.members, Mapping) else {}
        if len(members) < 2:
            raise ConfigError(
                f"judge.members={sorted(members)}: a jury has at least two; type "
                "+judge@judge.members.NAME=openai judge.members.NAME.model=… for each"
            )
        for name, member in members.items():
            if member is None:
                raise ConfigError(
                    f"judge.members.{name}=none: is no judge; leave it out, or type "
                    f"judge@judge.members.{name}=NAME"
                )
        check_choice("judge.vote", self.vote, VOTES)
        weighing = len(voters(self))
        if self.quorum is not None:
            check_range("judge.quorum", self.quorum, low=1, high=weighing)

    @property
    def judge(self) -> str:
        """What it is called in verdicts."""
        return f"jury({','.join(sorted(self.members))})"


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """A judge that follows a script, for tests and dry runs."""

    name: str
    module: str | None
    prefer: str
    text: str | None
    p: float
    statuses: Mapping[str, float] | None
    noise: float
    cost_usd: float

    def __post_init__(self) -> None:
        check_choice("judge.prefer", self.prefer, PREFERENCES)
        if self.prefer == "contains" and not self.text:
            raise ConfigError(
                "judge.prefer=contains: nothing to look for; type judge.text='what to look for'"
            )
        check_range("judge.p", self.p, low=0.5, high=1)
        check_range("judge.noise", self.noise, low=0, high=1)
        check_range("judge.cost_usd", self.cost_usd, low=0)
        statuses = self.statuses or {}
        for status, share in statuses.items():
            if status not in FAILURES:
                raise ConfigError(
                    f"judge.statuses.{status}={share}: no such status; there are "
                    f"{', '.join(FAILURES)}"
                )
            check_range(f"judge.statuses.{status}", share, low=0, high=1)
        check_range("sum of judge.statuses", sum(statuses.values()), low=0, high=1 + 1e-9)

    @property
    def judge(self) -> str:
        """What it is called in verdicts."""
        return "scripted"


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A reward model in this process, which scores each answer by itself."""

    name: str
    module: str | None
    identity: str | None
    path: str = field(metadata=CONTENT)
    model: Model | None
    batch_tokens: int = field(metadata=UNSHAPING)

    def __post_init__(self) -> None:
        if not Path(self.path).is_dir():
            raise ConfigError(
                f"judge.path={self.path}: no such folder; give the adapter of a reward training "
                "(runs/reward/latest/reward_model), or a classifier in Hugging Face format"
            )
        check_range("judge.batch_tokens", self.batch_tokens, low=1)

    @property
    def judge(self) -> str:
        """What it is called in verdicts."""
        return self.identity or Path(self.path).absolute().name
