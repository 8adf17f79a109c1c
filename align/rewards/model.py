"""Rewards from a reward model of its own, whatever its base and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from align.errors import ConfigError, StageError
from align.rewards.source import Sample


class ModelReward:
    """Reads prompts and texts, which it tokenizes itself: a folder that `recipe=reward` left, or a
    classifier that others trained, in a folder or on the hub.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            ConfigError, StageError: there is no reward model.
        """
        from align.models.scorer import open_scorer

        self.name = Path(path).name
        try:
            self.scorer = open_scorer(local(path), base=None)
        except StageError as error:
            raise StageError(f"algorithm.reward={error}") from error

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """
        Raises:
            DataError: its template does not take a conversation.
        """
        asked = [(sample.prompt.messages, sample.text) for sample in samples]
        return list(self.scorer.scores(asked))


def local(path: str) -> Path:
    """The folder, of a hub id its copy in the hub's cache.

    Raises:
        ConfigError: the hub does not give it.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=["*.bin", "*.pt", "*.pth"]))
    except Exception as error:  # the hub's client raises its HTTP library's errors
        raise ConfigError(
            f"algorithm.reward={path}: no such folder, and the hub did not give it "
            f"({type(error).__name__}); check the spelling or give an existing folder"
        ) from error
