"""Writes a safetensors file a block at a time; the library's writer wants all tensors in memory.

The bytes are those of ``safetensors.torch.save_file``: a header in JSON, filled up with spaces to a
multiple of 8 bytes, and the tensors by the width of their dtype, the widest first, then by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megamask.weights.file_stream import FileStream, Streamed

# The dtypes in the order of the library, and what a header calls them.
NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
ORDER = {dtype: place for place, dtype in enumerate(NAMES)}


def write_safetensors(path: Path, tensors: Mapping[str, Streamed]) -> None:
    """Write a file of tensors, by name."""
    names = sorted(tensors, key=lambda name: (-ORDER[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        one = tensors[name]
        start, end = end, end + one.nbytes
        about = {"dtype": NAMES[one.dtype], "shape": one.shape, "data_offsets": [start, end]}
        header[name] = about
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with FileStream(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            begin = file.tell()
            for block in tensors[name].blocks():
                file.put(block, tensors[name].dtype)
            written = file.tell() - begin
            assert written == tensors[name].nbytes, f"{name} has other rows than its shape says"
