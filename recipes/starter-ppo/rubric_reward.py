"""The starter's rubric as a reward: align.run recipe=ppo algorithm.reward=rubric_reward:reward."""

from align.config import STARTER
from align.judge.rubric import load_lexicon, score

LEXICON = load_lexicon(STARTER / "rubric.yaml")


def reward(prompts, responses):
    return [
        score(prompt, response, lexicon=LEXICON).total
        for prompt, response in zip(prompts, responses, strict=True)
    ]
