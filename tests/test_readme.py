"""The README's examples are run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.config import CONF
from align.models.scorer import open_scorer
from align.records import Message
from tests.conftest import model_settings, save_tiny
from tests.stages.test_reward import trained
from tests.test_pipeline import ENVIRONMENT, SMALL

README = (Path(__file__).parent.parent / "README.md").read_text()


def example(title: str) -> str:
    """The first Python block behind a bold title."""
    block = re.search(r"```python\n(.*?)```", README[README.index(f"**{title}**") :], re.DOTALL)
    assert block is not None
    return block.group(1)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "align.run", "--config-dir", str(folder / "conf"), *words],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": paths},
        timeout=300,
    )


@pytest.fixture
def mine(tmp_path) -> Path:
    for room in ("judge", "data", "algorithm"):
        (tmp_path / "conf" / room).mkdir(parents=True)
    (tmp_path / "my_judge.py").write_text(example("A judge"))
    (tmp_path / "my_source.py").write_text(example("A source"))
    (tmp_path / "my_algorithm.py").write_text(example("An algorithm"))
    body = yaml.safe_load((CONF / "algorithm" / "dpo.yaml").read_text())
    for key in ("beta", "loss", "label_smoothing", "soft_labels", "offset"):
        del body[key]
    own = body | {"name": "mine", "module": "my_algorithm"}
    (tmp_path / "conf" / "algorithm" / "mine.yaml").write_text(yaml.safe_dump(own))
    return tmp_path


def test_own_judge_and_own_algorithm_go_the_whole_way(mine):
    judge = ("judge=none", "judge.name=mine", "judge.module=my_judge")
    answer = run(mine, *SMALL, f"workspace={mine}", *judge, "algorithm=mine")
    assert answer.returncode == 0, answer.stderr[-3000:]
    latest = mine / "dpo" / "latest"
    rows = [json.loads(line) for line in (latest / "preferences.jsonl").read_text().splitlines()]
    assert {row["judge"] for row in rows} == {"shorter"}
    assert all(len(row["chosen"]) <= len(row["rejected"]) for row in rows)
    assert (latest / "report.html").is_file()


def test_own_source_is_read(mine):
    pairs = "".join(f"q{i}\tgood {i}\tbad {i}\n" for i in range(40))
    (mine / "pairs.tsv").write_text(pairs)
    words = ["data=preferences", "data.name=mine", "data.module=my_source"]
    answer = run(
        mine, *SMALL, *words, f"data.path={mine / 'pairs.tsv'}", f"workspace={mine}",
        "stages=[train]",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert len((mine / "dpo" / "latest" / "preferences.jsonl").read_text().splitlines()) == 40


def test_plain_transformers_and_peft_score_as_ours_do(tmp_path):
    """A base whose padding is the end of turn, and whose template goes on behind it."""
    base = save_tiny(tmp_path / "base", pad_token_id=1)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    folder = trained(model_settings(base), tmp_path) / "adapter"
    code = example("With plain transformers and PEFT")
    code = code.replace("runs/reward/latest/reward_model", str(folder))
    asked = Message(role="user", content="How many days?")
    answer = {"role": "assistant", "content": "Three days."}
    given = {"base": str(base), "messages": [asked.to_json(), answer]}
    exec(code, given)
    assert given["tokenizer"].apply_chat_template(given["messages"], tokenize=False)[-1] == "\n"
    found = open_scorer(folder, base=None).scores([((asked,), answer["content"])])
    assert given["score"] == pytest.approx(found[0], abs=1e-5)


def test_the_files_that_the_readme_names_are_there():
    root = Path(__file__).parent.parent
    assert (root / "docs" / "report.png").is_file()
    for recipe in ("starter-dpo", "starter-ppo"):
        assert (root / "recipes" / recipe / "README.md").is_file()
    assert "@@" not in README
