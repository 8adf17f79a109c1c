"""Which prompts a training on sampled answers is given; what it cannot begin with is one line."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.online import Online
from align.errors import ConfigError, DataError, StageError
from align.models.chat import encode_prompt
from align.models.settings import Model
from align.records import Message, Prompt
from align.split import is_held_out, prompt_key
from align.stages import hold_out, online
from align.stages.settings import OnlineStage
from tests.algorithms.ppo.running import LORA, settings
from tests.stages.pairs import write_preferences

HERE = "tests.stages.test_online"
WINDOW = 256
GIVEN: list[Online] = []


def train(given: Online, *, settings: Any, out: Path) -> None:
    """An algorithm as a user may bring it along, which only keeps what it is given."""
    GIVEN.append(given)


@pytest.fixture(autouse=True)
def nothing_given() -> None:
    GIVEN.clear()


def stage(model: Model, *, max_length: int | None = None, **changes: Any) -> OnlineStage:
    algorithm = settings(**{"module": HERE, **changes})
    return OnlineStage(
        model=model, adapter=LORA, algorithm=algorithm, judge=None, monitor=None,
        max_length=max_length, seed=0,
    )  # fmt: skip


def asked(*texts: str) -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", messages=(Message(role="user", content=text),))
        for i, text in enumerate(texts)
    ]


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(prompt.to_json()) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def numbered(folder: Path) -> Path:
    """Preferences whose lines all have an id of their own."""
    path = write_preferences(folder) / "preferences.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, "id": str(i)}) for i, line in enumerate(lines)))
    return folder


def texts(questions: Sequence[Any]) -> list[str]:
    return [question.prompt.messages[-1].content for question in questions]


@pytest.mark.parametrize(("max_length", "most"), [(None, WINDOW), (512, WINDOW), (100, 100)])
def test_a_prompt_longer_than_the_window_keeps_its_end_and_is_counted(
    tiny: Model, tmp_path: Path, tokenizer: Any, capsys: Any, max_length: int | None, most: int
) -> None:
    """The room is what the longest answer leaves of the window; who just fits keeps all."""
    long = "The agreement says much. " * 60
    prompts = asked("Short?", f"{long}And abroad?", "Who may do so on Fridays?", f"{long}Why?")
    room = len(encode_prompt(tokenizer, prompts[2].messages).ids)
    inputs = {"prompts": write_prompts(tmp_path / "prompts", prompts)}
    online.run(stage(tiny, max_length=max_length, max_new_tokens=most - room), inputs, tmp_path)
    found = {q.prompt.id: q.ids for q in (*GIVEN[0].questions, *GIVEN[0].held_out)}
    for whole in (prompts[0], prompts[2]):
        assert found[whole.id] == encode_prompt(tokenizer, whole.messages).ids
    for cut, end in ((prompts[1], "And abroad?"), (prompts[3], "Why?")):
        told = tokenizer.decode(found[cut.id])
        assert told.startswith("<|user|>") and told.endswith(f"{end}<|end|><|assistant|>")
        assert room - 4 <= len(found[cut.id]) <= room
    assert capsys.readouterr().err == (
        f"2 prompts of more than {room} tokens lose text from their left\n"
    )


@pytest.mark.parametrize(("max_length", "most"), [(None, WINDOW), (64, 64)])
def test_answers_that_leave_no_room_for_a_prompt_are_one_line(
    tiny: Model, tmp_path: Path, max_length: int | None, most: int
) -> None:
    inputs = {"prompts": write_prompts(tmp_path / "prompts", asked("How many days?"))}
    with pytest.raises(StageError, match=f"max_new_tokens={most}: the window is {most} ") as raised:
        online.run(stage(tiny, max_length=max_length, max_new_tokens=most), inputs, tmp_path)
    assert "\n" not in str(raised.value) and not GIVEN


@pytest.mark.parametrize("kind", ["prompts", "preferences"])
def test_a_prompt_that_the_template_refuses_is_named_by_file_and_id(
    tiny: Model, tmp_path: Path, kind: str
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no systems') }}"
        "{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    )
    pair = {"chosen": "Yes.", "rejected": "No."}
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows = [{"id": "calm", "prompt": "How?", **pair}, {"id": "odd", "messages": system, **pair}]
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match="no systems") as raised:
        online.run(stage(replace(tiny, chat_template=str(template))), {kind: tmp_path}, tmp_path)
    assert str(raised.value).startswith(f"{path}: id 'odd': the chat template refuses")
    assert "\n" not in str(raised.value) and not GIVEN


def test_a_prompt_whose_template_alone_does_not_fit_says_what_to_lower(
    tiny: Model, tmp_path: Path
) -> None:
    inputs = {"prompts": write_prompts(tmp_path / "prompts", asked("How many days?"))}
    with pytest.raises(DataError, match=r"id 'p0': .* does not fit into 2: .*max_new_tokens"):
        online.run(stage(tiny, max_new_tokens=WINDOW - 2), inputs, tmp_path)


def test_a_share_that_holds_every_prompt_out_is_one_line(tiny: Model, tmp_path: Path) -> None:
    prompts = asked(*(f"Question {i}?" for i in range(20)))
    watched = [p for p in prompts if is_held_out(prompt_key(p.messages), 0.5)]
    inputs = {"prompts": write_prompts(tmp_path / "prompts", watched)}
    with pytest.raises(StageError, match=r"algorithm\.held_out=0\.5: leaves no prompt") as raised:
        online.run(stage(tiny, held_out=0.5), inputs, tmp_path)
    assert "\n" not in str(raised.value) and not GIVEN


def test_equal_prompts_are_on_one_side_whatever_they_are_called(
    tiny: Model, tmp_path: Path
) -> None:
    contents = [f"Question {i}?" for i in range(20)]
    prompts = asked(*contents, *contents)
    inputs = {"prompts": write_prompts(tmp_path / "prompts", prompts)}
    online.run(stage(tiny, held_out=0.3), inputs, tmp_path)
    trained, watched = texts(GIVEN[0].questions), texts(GIVEN[0].held_out)
    assert not set(trained) & set(watched)
    for side, held_out in ((trained, False), (watched, True)):
        mine = [p for p in prompts if is_held_out(prompt_key(p.messages), 0.3) == held_out]
        assert side and side == [p.messages[-1].content for p in mine]  # all, in the file's order


def test_of_preferences_each_prompt_is_asked_once_and_none_that_is_evaluated_on(
    tiny: Model, tmp_path: Path
) -> None:
    folder = numbered(tmp_path / "preferences")
    online.run(stage(tiny, held_out=0.3), {"preferences": folder}, tmp_path)
    trained, watched = texts(GIVEN[0].questions), texts(GIVEN[0].held_out)
    assert len(trained) + len(watched) == len({*trained, *watched}) == 16
    evaluated = hold_out.held_out_prompts(folder / "preferences.jsonl", 0.3)
    assert watched and watched == [prompt.messages[-1].content for prompt in evaluated]


@pytest.mark.parametrize("rewarded", [True, False])
def test_the_reward_model_is_the_one_that_the_reward_stage_left(
    tiny: Model, tmp_path: Path, rewarded: bool
) -> None:
    inputs = {"prompts": write_prompts(tmp_path / "prompts", asked("Days?", "Weeks?", "Why?"))}
    if rewarded:
        inputs["reward"] = tmp_path / "reward"
    online.run(stage(tiny, held_out=0.01), inputs, tmp_path)
    assert GIVEN[0].reward_model == (tmp_path / "reward" / "adapter" if rewarded else None)


def rewards(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    raise AssertionError("there was nothing to score")


def test_a_model_whose_turns_never_end_is_one_line_before_anything_is_sampled(
    tiny_folder: Path, tiny: Model, tokenizer: Any, tmp_path: Path
) -> None:
    """No forward pass runs, of a model that may be large."""
    endless = tmp_path / "endless"
    endless.mkdir()
    for file in tiny_folder.iterdir():
        (endless / file.name).write_bytes(file.read_bytes())
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(endless)
    out, inputs = tmp_path / "out", {"prompts": write_prompts(tmp_path / "prompts", asked(*"abcd"))}
    out.mkdir()
    passes: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: passes.append(type(module).__name__)
    )
    asking = stage(
        replace(tiny, name=str(endless)), module=None, reward=f"{HERE}:rewards", iterations=1,
        prompts=1, minibatches=1, held_out=0.01,
    )  # fmt: skip
    try:
        with pytest.raises(ConfigError, match="answers would never stop") as raised:
            online.run(asking, inputs, out)
    finally:
        hook.remove()
    assert "\n" not in str(raised.value) and "model.chat_template=FILE" in str(raised.value)
    assert not passes and not list(out.iterdir())
