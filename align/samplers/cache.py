"""A key-value cache that grows in blocks: appending a token copies one column, not the whole
past.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 32  # positions allocated ahead


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' DynamicLayer with spare room behind the past, so that most updates allocate
    nothing.

    On a CPU the concatenation of every layer's past at every token is the largest cost of decoding
    a small model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.rooms: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [rows, heads, new, D] and returns the whole past."""
        past, new = self.get_seq_length(), key_states.shape[-2]
        if past == 0:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.rooms or self.rooms[0].shape[-2] < past + new:
            self.rooms = [
                roomier(held, past + new + SPARE)
                for held in (self.keys, self.values)
                if held is not None
            ]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, past : past + new] = states
        self.keys, self.values = (room[:, :, : past + new] for room in self.rooms)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rooms = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rooms = []
        super().batch_select_indices(indices)


def roomier(held: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of [rows, heads, T, D] at the head of a block of `length` positions."""
    rows, heads, past, size = held.shape
    room = held.new_empty(rows, heads, length, size)
    room[:, :, :past] = held
    return room


def roomy_cache(config: Any) -> DynamicCache:
    """The cache that the model's configuration asks for, its plain layers replaced by roomy
    ones.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
