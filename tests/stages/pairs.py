"""Preferences in plenty, and the settings that tiny trainings share; `python tests/stages/pairs.py`
runs one.
"""

import json
import random
import sys
from pathlib import Path

from align.algorithms.settings import Dpo
from align.models.settings import Lora, Model
from align.stages.settings import ReferenceStage, TrainStage

ALGORITHM = Dpo(
    name="dpo",
    module=None,
    epochs=2,
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-3,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    optimizer="adamw",
    gradient_checkpointing=False,
    held_out=0.3,
    evaluations=4,
    max_drop=50.0,
    loss="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    soft_labels=True,
    offset=0.0,
)
LORA = Lora(name="lora", rank=4, alpha=8, dropout=0.0, target_modules="all-linear")


def write_preferences(folder: Path, *, prompts: int = 16, pairs: int = 2) -> Path:
    """`pairs` preferences for each of `prompts` prompts, of very unequal lengths."""
    draw = random.Random(4)
    words = ["days", "weeks", "home", "office", "three", "travel", "pay", "employer", "the", "of"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(prompts):
        prompt = text(30)
        for k in range(pairs):
            record = {
                "v": 1,
                "id": f"p{i}",
                "messages": [{"role": "user", "content": prompt}],
                "chosen": f"{text(12)} {k}",
                "rejected": f"{text(12)} no",
                "p": draw.choice([0.7, 1.0]),
                "margin": None,
                "judge": "",
                "meta": {"only": i} if k else {},
            }
            lines.append(json.dumps(record))
    (folder / "preferences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def reference_stage(model: Model, *, max_length: int | None = None) -> ReferenceStage:
    return ReferenceStage(model=model, max_length=max_length, score=True)


def train_stage(model: Model, algorithm: Dpo = ALGORITHM) -> TrainStage:
    return TrainStage(model=model, adapter=LORA, algorithm=algorithm, seed=1)


if __name__ == "__main__":
    from align.stages import train

    name, quantization, reference, out = sys.argv[1:]
    model = Model(
        name=name, revision=None, quantization=quantization, dtype="auto", chat_template=None
    )
    train.run(train_stage(model), {"reference": Path(reference)}, Path(out))
