"""`python -m align.chat run=NAME`: asks the model before and after its training the same thing,
side by side.
"""

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from align.config import did_you_mean
from align.errors import AlignError, ConfigError, DataError
from align.jsonl import IndexedRecords
from align.models.settings import Model
from align.notice import notice
from align.records import Message, Prompt
from align.samplers.settings import Hf

HELP = (
    "Type a question. /example: a held-out prompt. /reset: forget the conversation. /quit (or "
    "Ctrl-D): leave."
)
DEFAULTS: Mapping[str, Any] = {
    "run": None,
    "workspace": "runs",
    "prompt": None,
    "seed": 0,
    "temperature": 1.0,
    "max_new_tokens": 256,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says: `run` is a run's name, `prompt` asks once and leaves."""

    run: str
    workspace: str
    prompt: str | None
    seed: int
    temperature: float
    max_new_tokens: int

    @property
    def folder(self) -> Path:
        return Path(self.workspace) / self.run / "latest"


def parse(words: list[str]) -> Settings:
    """Reads key=value words.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or no such run.
    """
    values = dict(DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in DEFAULTS:
            raise ConfigError(
                f"{word}: no such setting{did_you_mean(key, DEFAULTS)} ({', '.join(DEFAULTS)})"
            )
        kind = type(DEFAULTS[key]) if DEFAULTS[key] is not None else str
        try:
            values[key] = kind(value)
        except ValueError as error:
            raise ConfigError(f"{word}: must be of type {kind.__name__}") from error
    if values["run"] is None:
        raise ConfigError("no run given; type python -m align.chat run=NAME")
    settings = Settings(**values)
    if not (settings.folder / "adapter").is_dir():
        known = [path.parent.name for path in Path(settings.workspace).glob("*/latest")]
        raise ConfigError(
            f"run={settings.run}: no trained adapter in "
            f"{settings.folder}{did_you_mean(settings.run, known)}"
            f" (runs there: {', '.join(sorted(known)) or 'none'})"
        )
    return settings


class Chat:
    """Two conversations that share their questions: one with the adapter, one without."""

    def __init__(self, settings: Settings, console: Console) -> None:
        from align.models.adapters import load_adapter
        from align.models.load import load_model, load_tokenizer

        config = yaml.safe_load((settings.folder / "config.yaml").read_text(encoding="utf-8"))
        model_settings = Model(**config["model"])
        self.settings, self.console, self.config = settings, console, config
        self.tokenizer = load_tokenizer(model_settings)
        self.base = load_model(model_settings)
        self.model = load_adapter(self.base, settings.folder / "adapter")
        self.sampler = Hf(
            name="hf",
            module=None,
            n=1,
            temperature=settings.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=settings.max_new_tokens,
            batch_size=1,
        )
        self.reset()

    def reset(self) -> None:
        self.before: list[Message] = []
        self.after: list[Message] = []
        self.turn = 0

    def ask(self, question: str) -> None:
        """Puts the question to both and shows the answers."""
        from align.models.adapters import without_adapter

        said = Message(role="user", content=question)
        self.before.append(said)
        self.after.append(said)
        with without_adapter(self.model, self.base) as base:
            old = self.answer(base, self.before)
        new = self.answer(self.model, self.after)
        self.turn += 1
        # Text, not markup: what a model says must not be read as instructions to the terminal's
        # formatter.
        width = max(20, min(72, self.console.width // 2 - 1))
        panels = [
            Panel(Text(visible(text)), title=title, width=width)
            for title, text in (("before", old), ("after", new))
        ]
        self.console.print(Columns(panels))

    def answer(self, model: Any, messages: list[Message]) -> str:
        from align.samplers.hf import lay_out, sample

        prompt = Prompt(id=f"chat-{self.turn}", messages=tuple(messages))
        layout = lay_out(model, self.tokenizer, [prompt], settings=self.sampler)
        batches = sample(
            model,
            self.tokenizer,
            [prompt],
            layout=layout,
            settings=self.sampler,
            seed=self.settings.seed,
        )
        text = next(iter(batches))[0].responses[0].text
        messages.append(Message(role="assistant", content=text))
        return text

    def example(self) -> str:
        """The question of one of the run's held-out prompts."""
        path = self.config["data"].get("test_path")
        if path is None or not Path(path).is_file():
            raise DataError(
                "the run has no file of held-out prompts (data.test_path); type a question of "
                "your own"
            )
        prompts = IndexedRecords(Path(path), Prompt.from_json)
        return str(random.choice(prompts).messages[-1].content)


def visible(text: str) -> str:
    """Control characters as their escapes, so that no answer can move the cursor or set the
    window's title.
    """
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def converse(chat: Chat, console: Console) -> None:
    console.print(HELP, style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line == "/example":
            chat.reset()
            try:
                question = chat.example()
            except DataError as error:
                console.print(str(error), style="red")
                continue
            console.print(Text(visible(question)))
            chat.ask(question)
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            chat.ask(line)


def main() -> None:
    console = Console(highlight=False)
    if {"-h", "--help"} & set(sys.argv[1:]):
        given = " ".join(f"{key}={value}" for key, value in DEFAULTS.items() if value is not None)
        console.print(f"{__doc__}\n\nSettings: run=NAME prompt=TEXT {given}\n{HELP}", markup=False)
        return
    try:
        settings = parse(sys.argv[1:])
        chat = Chat(settings, console)
        if settings.prompt is not None:
            chat.ask(settings.prompt)
        else:
            converse(chat, console)
    except AlignError as error:
        notice(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
