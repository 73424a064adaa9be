"""Files of safetensors: a length, a JSON header, the bytes of the tensors.

    write_safetensors(path, {"weight": tensor})   as the safetensors package writes them
    read_header(path)            ->   {"weight": Entry(float32, (64, 56), 88, 14424)}
    read_tensor(file, entry)     ->   the tensor, read straight into its own memory

The package reads through a mapped file: every page would count towards the memory of the process,
twice the weights in all, and a file that is truncated meanwhile would end the process. So they are
read here, and the header is held against the file's size before any tensor is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from liger_fx.codec import decode, inside, shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.directory import sync
from liger_fx.storage.files import opened
from liger_fx.storage.json_file import parse
from liger_fx.storage.records import below

_MAX_HEADER = 100_000_000
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip
_Number = Annotated[int, below(2**60, "such number")]


@dataclass(frozen=True)
class _Record:
    """What the header says of one tensor."""

    dtype: str
    shape: list[_Number]
    data_offsets: tuple[_Number, _Number]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is, and from which byte to which it lies there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A new file of these tensors of any device, on the disk when this returns."""
    ready: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise SaveError(f"safetensors has no {tensor.dtype}, which {name} is.")
        ready[name] = _apart(tensor.detach().cpu().contiguous(), memory)
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)


def _apart(tensor: torch.Tensor, memory: set[int]) -> torch.Tensor:
    """The tensor, copied where it is a part of memory that another one before it has."""
    place = tensor.untyped_storage().data_ptr()
    if place in memory:
        return tensor.clone()
    memory.add(place)
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    data: Any = flat.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def read_header(path: Path) -> dict[str, Entry]:
    """What the file holds, by name; LoadError where it is damaged, cut short or too long."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise LoadError(f"has no header that fits its {size:,} bytes")
        header = parse(file.read(length))
    if type(header) is not dict:
        raise LoadError("its header is no object")
    header.pop("__metadata__", None)
    entries = {}
    for name, record in header.items():
        with inside(shown(name)):
            entries[name] = _read_entry(record, 8 + length)
    _check_extents(entries, 8 + length, size)
    return entries


def _read_entry(record: Any, data: int) -> Entry:
    found: _Record = decode(_Record, record)
    dtype, (start, end) = _DTYPES.get(found.dtype), found.data_offsets
    if dtype is None:
        raise LoadError(f"{shown(found.dtype)} is no dtype of safetensors", "dtype")
    if len(found.shape) > 16:
        raise LoadError("is no list of at most 16 sizes", "shape")
    wanted = math.prod(found.shape) * dtype.itemsize
    if end - start != wanted:
        raise LoadError(f"has {end - start:,} bytes where its shape needs {wanted:,}")
    return Entry(dtype, tuple(found.shape), data + start, data + end)


def _check_extents(entries: Mapping[str, Entry], data: int, size: int) -> None:
    """The tensors lie one behind the other and fill the file."""
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise LoadError("does not lie behind the tensor before it", shown(name))
        end = entry.end
    if end != size:
        raise LoadError(f"has {size:,} bytes where its header promises {end:,}")


def read_tensor(file: BinaryIO, entry: Entry) -> torch.Tensor:
    """The tensor on the CPU. Takes its memory and no more."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    memory = _bytes_of(tensor)
    file.seek(entry.start)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise LoadError("ended while it was read")
        done += count
    return tensor
