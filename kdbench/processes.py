"""This process among those of one run: device, sums over processes, and who writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor


class Processes:
    """The processes that share one training run; `solo` is this process alone, however it was launched."""

    def __init__(self, device: str = "cpu", precision: str = "fp32", solo: bool = False) -> None:
        self._state: Any = None
        if not solo and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._state = PartialState(cpu=device == "cpu")
        self.rank: int = self._state.process_index if self._state else 0
        self.world: int = self._state.num_processes if self._state else 1
        self.device: torch.device = self._state.device if self._state else torch.device(device)
        self.precision = precision

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over processes, with its type and device.

        It is summed in float64, whatever the type: a process without rows may have come to another one.
        """
        if self.world > 1:
            summed = value.detach().to(self.device, torch.float64, copy=True)
            torch.distributed.all_reduce(summed)
            return summed.to(value.device, value.dtype)
        return value.detach()

    def told_by_main(self, value: Any) -> Any:
        """Return the main process's `value` on every process."""
        if self.world > 1:
            box = [value]
            torch.distributed.broadcast_object_list(box, src=0)
            return box[0]
        return value

    def wait(self) -> None:
        """Return when every process has come here."""
        if self._state:
            self._state.wait_for_everyone()

    def autocast(self) -> AbstractContextManager[None]:
        """The context of forward passes: bfloat16 matrix products where the precision is `bf16`."""
        if self.precision == "bf16":
            # no cache: it would hand weights cast in a rollout, without their graph, to the loss after it
            cast: AbstractContextManager[None] = torch.autocast(
                self.device.type, torch.bfloat16, cache_enabled=False
            )
            return cast
        return nullcontext()


@contextmanager
def matmul_precision(wanted: str) -> Iterator[None]:
    """Compute float32 matrix products as torch does at this precision, and put the process's setting back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
