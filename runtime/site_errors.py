"""What is wrong with the file of a site, told with its place and the nearest thing that would be right."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError


class SiteError(Exception):
    """The file does not describe a site, or one that cannot be had."""

    def __init__(self, message: str, *, place: str = "", reason: str = "") -> None:
        """place: of the key, such as cameras[0].url; empty where it is no single one. reason: without the place."""
        super().__init__(message)
        self.place = place
        self.reason = reason or message


def site_error(error: ValidationError, root: type[BaseModel], prefix: str = "") -> SiteError:
    """The first thing that is wrong. root: what was validated. prefix: of the message."""
    first = error.errors()[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        *place, key = first["loc"]
        reason = f"must be a known key{closest(str(key), _keys_at(place, root))}"
        return SiteError(f"{prefix}{where} {reason}", place=where, reason=reason)
    # The input of a whole part may hold URLs; that of a value is what the user wrote.
    is_private = isinstance(first["input"], (dict, list, BaseModel)) or "url" in where
    got = "" if is_private else f", got {first['input']!r}"
    reason = f"{first['msg'].removeprefix('Value error, ')}{got}"
    return SiteError(f"{prefix}{where or 'site'}: {reason}", place=where, reason=reason)


def closest(key: str, known: list[str]) -> str:
    """The end of a sentence: which of the known keys may have been meant."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _keys_at(place: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    for part in place:
        if isinstance(part, str):
            kind = root.model_fields[part].annotation
            # A part itself, or what a tuple holds.
            inside = (kind, *get_args(kind))
            root = next(each for each in inside if isinstance(each, type) and issubclass(each, BaseModel))
    return list(root.model_fields)
