"""Launches that did not happen, run on a GPU after all: the same kernel, grid, shapes and strides, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .aot import Launch


def _kept(x: Any) -> Any:
    """An argument as it is now. Integers decide what a kernel does, and later launches overwrite them."""
    if not isinstance(x, Tensor) or x.is_floating_point():
        return x
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload]


class Replay:
    """A launch of `compiled_kernels`, kept to be run on a GPU."""

    def __init__(self, launch: Launch) -> None:
        self._function, self._grid = launch.function, launch.grid
        self._arguments = {name: _kept(x) for name, x in launch.arguments.items()}

    @property
    def bytes(self) -> int:
        """Of all its tensors; views of one storage count once."""
        tensors = [x for x in self._arguments.values() if isinstance(x, Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def on(self, device: torch.device) -> Callable[[], None]:
        """A call that launches the kernel on tensors of its own: random numbers, but integers as they were.

        Views of one storage (q, k and v within qkv) are views of one storage again.
        """
        storages: dict[int, torch.UntypedStorage] = {}

        def there(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            old = x.untyped_storage()
            if old.data_ptr() not in storages:
                flat = torch.empty(old.nbytes() // x.element_size(), dtype=x.dtype, device=device)
                if x.is_floating_point():
                    flat.normal_()
                else:
                    flat.copy_(torch.empty(0, dtype=x.dtype).set_(old))  # type: ignore[call-overload]
                storages[old.data_ptr()] = flat.untyped_storage()
            new = torch.empty(0, dtype=x.dtype, device=device)
            return new.set_(storages[old.data_ptr()], x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload]

        arguments = {name: there(x) for name, x in self._arguments.items()}
        launch = self._function[self._grid]
        return lambda: launch(**arguments)
