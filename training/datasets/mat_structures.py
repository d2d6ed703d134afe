"""Arrays of structures in a MATLAB v5 file, one structure at a time, without an array for every field.

scipy.io.loadmat makes an array of each field of each structure. CUHK-SYSU's gallery file for 4,000 images has 35
million fields, 40 times those of its file for 100 images, which costs loadmat 3 s and 310 MB already. Most are
empty or repeat: here a field stays bytes until it is asked for, and equal bytes are read once.
Source: MathWorks, "MAT-File Format", level 5: an element is a tag (type, number of bytes), its bytes, and padding
to 8 bytes; one of up to 4 bytes may share the 8 bytes with its tag.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Views where a copy would double the gigabytes of the largest file.
Bytes = bytes | memoryview

_HEADER_BYTES = 128
_TAG = Struct("<II")
_COMPRESSED = 15
# Classes of a matrix.
_STRUCTURE, _TEXT, _NUMBERS = 2, 4, range(6, 16)

# Type of an element -> how its bytes are read as numbers, or as text.
_DTYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_ENCODINGS = {2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


def read_structures(path: Path, key: str) -> Iterator[dict[str, bytes]]:
    """Structures of the array that the variable `key` holds: field name -> the bytes of its value.

    Values are for nested_structures, text or numbers. Raises ValueError, also while iterating, if the file is not
    a little-endian MATLAB v5 file, is cut off, or holds no such array; the message says what it holds instead.
    """
    content = memoryview(path.read_bytes())
    if content[126:128] != b"IM":
        raise ValueError("no little-endian MATLAB v5 file")
    found = []
    for matrix in _variables(content):
        name = _head(matrix)[2]
        if name == key:
            return nested_structures(matrix)
        found.append(name)
    raise ValueError(f"the variables {found} and no {key}")


def nested_structures(matrix: Bytes) -> Iterator[dict[str, bytes]]:
    """Structures of an array of structures, in the order of its columns."""
    kind, shape, _, position = _head(matrix)
    if kind != _STRUCTURE:
        raise ValueError(f"a matrix of class {kind} in place of structures")
    width, position = _element(matrix, position)
    listed, position = _element(matrix, position)
    names, size = bytes(listed), int.from_bytes(width, "little")
    fields = [names[i : i + size].rstrip(b"\0").decode() for i in range(0, len(names), size)]
    for _ in range(math.prod(shape)):
        structure = {}
        for field in fields:
            start = position + 8
            position = start + _TAG.unpack_from(matrix, position)[1]
            structure[field] = bytes(matrix[start:position])
        yield structure


@lru_cache(maxsize=1 << 16)
def text(matrix: bytes) -> str:
    """The text of a matrix of characters."""
    kind, _, _, position = _head(matrix)
    encoding = _ENCODINGS.get(_bounds(matrix, position)[0])
    if kind != _TEXT or encoding is None:
        raise ValueError(f"a matrix of class {kind} in place of text")
    return bytes(_element(matrix, position)[0]).decode(encoding)


@lru_cache(maxsize=1 << 16)
def numbers(matrix: bytes) -> NDArray[Any]:
    """The numbers of a matrix in the order of its columns, (n,) read-only; (0,) of an empty one."""
    kind, shape, _, position = _head(matrix)
    if 0 in shape:
        return np.zeros(0)
    dtype = _DTYPES.get(_bounds(matrix, position)[0])
    if kind not in _NUMBERS or dtype is None:
        raise ValueError(f"a matrix of class {kind} in place of numbers")
    return np.frombuffer(_element(matrix, position)[0], dtype)


def _variables(content: Bytes) -> Iterator[Bytes]:
    position = _HEADER_BYTES
    while position < len(content):
        kind = _bounds(content, position)[0]
        value, position = _element(content, position)
        if kind == _COMPRESSED:
            try:
                value = _element(memoryview(zlib.decompress(value)), 0)[0]
            except zlib.error as error:
                raise ValueError(f"damaged bytes ({error})") from error
        yield value


def _head(matrix: Bytes) -> tuple[int, tuple[int, ...], str, int]:
    """Class, shape and name of a matrix, and where its content begins. An empty one may have no bytes at all."""
    if not matrix:
        return 0, (0, 0), "", 0
    flags, position = _element(matrix, 0)
    shape, position = _element(matrix, position)
    name, position = _element(matrix, position)
    return flags[0], tuple(np.frombuffer(shape, "<i4").tolist()), bytes(name).decode("latin-1"), position


def _element(content: Bytes, position: int) -> tuple[Bytes, int]:
    """Bytes of the element at a position, and where the next one begins."""
    _, start, num_bytes, end = _bounds(content, position)
    if start + num_bytes > len(content):
        raise ValueError("a file that is cut off")
    return content[start : start + num_bytes], end


def _bounds(content: Bytes, position: int) -> tuple[int, int, int, int]:
    """Type, start and number of bytes of the element at a position, and where the next one begins."""
    if position + 8 > len(content):
        raise ValueError("a file that is cut off")
    kind, num_bytes = _TAG.unpack_from(content, position)
    if kind >> 16:  # a small element: its bytes are the second half of the tag
        return kind & 0xFFFF, position + 4, kind >> 16, position + 8
    padding = 0 if kind == _COMPRESSED else -num_bytes % 8
    return kind, position + 8, num_bytes, position + 8 + num_bytes + padding
