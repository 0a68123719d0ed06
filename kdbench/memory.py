"""What fits into memory: errors that say that something did not, sizes that do, and two ways to need less.

Source: activation checkpointing is Chen et al. 2016, https://arxiv.org/abs/1604.06174, by
`torch.utils.checkpoint`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdbench.errors import OutOfMemory, UserError
from kdbench.record import read_json, write_json

Size = Literal["micro_batch", "rollout_batch"]
# what a RuntimeError says that is none of the two types: torch's allocator for the CPU, and cuBLAS
_SAID = ("not enough memory", "DefaultCPUAllocator", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


# ------------------------------------------------------------------------------------------------- errors
def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


@contextmanager
def telling(message: str) -> Iterator[None]:
    """Say `message` where memory runs out inside. Raises: OutOfMemory."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(message) from error
        raise


def _glibc() -> Any:
    """The C library where it is glibc, None elsewhere."""
    with suppress(OSError, TypeError):  # TypeError: Windows
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    return None


KEEPING = (2**25, 2**31 - 1)
"""Thresholds of glibc's allocator under which a process keeps what it frees, in bytes."""


@functools.cache
def keep_freed() -> None:
    """Let this process keep what it frees, for the next update: pages that come anew cost time.

    glibc otherwise gives back the end of its heap as soon as two large tensors are freed there. Blocks over
    32 MiB, its limit, still come from the system.
    """
    set_thresholds(*KEEPING)


def set_thresholds(block: int, end: int) -> None:
    """Let glibc's allocator take blocks of `block` bytes or more, at most 32 MiB, straight from the system,
    and give back the free end of its heap where that is larger than `end` bytes.

    Does nothing under another C library, or where the environment has set a threshold
    (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`).
    """
    set_by_user = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    library = _glibc()
    if library is not None and not set_by_user:
        library.mallopt(-3, block)  # M_MMAP_THRESHOLD of malloc.h
        library.mallopt(-1, end)  # M_TRIM_THRESHOLD


def give_back() -> None:
    """Give the system what this process has freed and kept, so that later peaks of memory do not hold it."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def free() -> None:
    """Give back what nothing refers to: cycles of objects, and blocks that the GPU's allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------- sizes that fit
@dataclass
class Fit:
    """Sizes that fit into the memory of one device, and where larger ones did not.

    `set` are the sizes that the settings say, from which the search began; `halved` has one entry per size
    that was too large: {"size", "was", "where", "visit"}, visits counted from 1.
    """

    micro_batch: int
    rollout_batch: int
    device: str
    memory_bytes: int
    set: dict[str, int] = field(default_factory=dict)
    halved: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, micro_batch: int, rollout_batch: int, device: torch.device) -> Fit:
        """Return the sizes that a search on this device begins with."""
        sizes = {"micro_batch": micro_batch, "rollout_batch": rollout_batch}
        return cls(micro_batch, rollout_batch, *memory_of(device), sizes)

    def known(self, path: Path) -> Fit:
        """Return what the file says; itself where there is none, or one of another device or other settings.

        Raises: UserError for a file that is damaged.
        """
        if not path.is_file():
            return self
        told = read_json(path)
        try:
            found = Fit(**told)
            sizes = [int(found.micro_batch), int(found.rollout_batch)]
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: holds no sizes ({error}); delete it") from error
        if min(sizes) < 1:
            raise UserError(f"{path}: micro_batch {sizes[0]} and rollout_batch {sizes[1]} must be at least 1")
        same = (found.device, found.memory_bytes, found.set) == (self.device, self.memory_bytes, self.set)
        return found if same else self

    def save(self, path: Path) -> None:
        """Write it, at once or not at all."""
        write_json(path, asdict(self))

    @property
    def note(self) -> str:
        """One line for a record."""
        sizes = ", ".join(f"{name} {getattr(self, name)} (set: {was})" for name, was in self.set.items())
        told = "; ".join(
            f"out of memory with {one['size']} {one['was']} {one['where']}"
            + (f", visit {one['visit']}" if one["visit"] else "")
            for one in self.halved
        )
        return f"fit: {sizes}; {told or 'these fit'}"


def check_alone(fit: bool, processes: int) -> None:
    """Refuse to look for sizes on several processes: one would wait for another that begins again.

    Raises: UserError.
    """
    if fit and processes > 1:
        raise UserError(
            f"training.fit: sizes are found by one process, there are {processes}; set training.micro_batch"
        )


def memory_of(device: torch.device) -> tuple[str, int]:
    """Return the kind of a device, as records name it, and its memory in bytes (the machine's for a CPU)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    try:
        return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not everywhere
        return "cpu", 0


# ------------------------------------------------------------------------------------------- to need less
def checkpoint_activations(model: nn.Module) -> int:
    """Let the layers of transformers' models keep their inputs alone for the backward pass, which computes
    the rest again; return how many there are.

    Loss and gradients stay the same. transformers' own switch acts in train mode only, which switches
    dropout on; this acts wherever a gradient passes through a layer.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # a method, so that a copy of the model has one of its own
        layer.forward = MethodType(_recomputed, layer)
    return len(layers)


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def _recomputed(layer: nn.Module, *args: Any, **named: Any) -> Any:
    """The layer's forward pass, checkpointed where a gradient passes through it and no cache is filled."""
    forward = functools.partial(type(layer).forward, layer)
    tensors = (one for one in (*args, *named.values()) if isinstance(one, Tensor))
    if (
        not torch.is_grad_enabled()
        or any(named.get(name) is not None for name in _CACHES)
        or not any(one.requires_grad for one in tensors)
    ):
        return forward(*args, **named)
    if not layer.training:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **named)
    modes = [(module, module.training) for module in layer.modules()]

    def again(*args: Any, **named: Any) -> Any:
        """The same with the modes of the first time, for the backward pass may come under others."""
        now = [(module, module.training) for module in layer.modules()]
        try:
            for module, training in modes:
                module.training = training
            return forward(*args, **named)
        finally:
            for module, training in now:
                module.training = training

    return checkpoint(again, *args, use_reentrant=False, **named)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the weights of transformers' models inside `model` into `dtype`, in place.

    Buffers that are computed, not stored, such as the frequencies of rotary positions, keep their type, as
    where transformers loads a model in `dtype`.
    """
    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel):
            continue
        for module in inner.modules():
            for param in module.parameters(recurse=False):
                if param.is_floating_point():
                    param.data = param.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(dtype))
