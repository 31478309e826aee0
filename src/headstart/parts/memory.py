"""What a phase measured on entering: named tensors that travel with the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Memory(nn.Module):
    """A dictionary of tensors that are saved, moved and made equal on all ranks like buffers.

    Unlike plain buffers, entries may be added at any time, and loading a state creates those that are not
    here yet: what a method measures is not known when it is built.
    """

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._buffers:
            raise KeyError(
                f"Nothing called '{name}' was measured yet. Measured: {', '.join(self) or 'nothing'}."
            )
        return self.get_buffer(name)

    def get(self, name: str) -> Tensor | None:
        """What was measured under this name; None where nothing was."""
        return self._buffers.get(name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._buffers.pop(name, None)
        self.register_buffer(name, value.detach().clone())

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The saved entries replace ours whole: shapes may differ, and what was not saved was not measured.
        self._buffers.clear()
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self[key.removeprefix(prefix)] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
