"""Text without logins: URLs lose user, password and query wherever they stand, and known passwords disappear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from .site_errors import SiteError
from .site_file import Site, resolved_url
from .source_address import LOGIN_FIELD

# What ends a sentence, or closes a bracket, is no part of it.
_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s'\"<>]*[^\s'\"<>.,;:)\]}])")

# A shorter password would blank half of what is said; in URLs it goes by its place.
SHORTEST_SECRET = 4


def without_logins(text: str) -> str:
    """A text whose URLs hold neither user, password, query, nor login fields in the path."""

    def shown(match: re.Match[str]) -> str:
        # Up to the last @: a password that nobody encoded may hold any other character.
        rest = match[2].rpartition("@")[2].partition("?")[0]
        return match[1] + LOGIN_FIELD.sub("", rest)

    return _URL.sub(shown, text)


class Redactor:
    """without_logins, and the passwords of a site's cameras, however they got into the text."""

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()

    def learn(self, site: Site) -> None:
        """Remember the passwords of a site's cameras, with those of the sites before."""
        self._known |= frozenset(_secrets(site))

    def learn_url(self, url: str) -> None:
        """Remember the password of a URL whose secrets are in it."""
        self._known |= frozenset(_secrets_of(url))

    def __call__(self, text: str) -> str:
        """The text as it may be shown."""
        text = without_logins(text)
        # The longest first: one may be part of another.
        for secret in sorted(self._known, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def _secrets(site: Site) -> Iterator[str]:
    for camera in site.cameras:
        # A secret that is not there cannot be shown either.
        with suppress(SiteError):
            yield from _secrets_of(resolved_url(camera))


def _secrets_of(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    found = [parts.password or ""]
    for login in LOGIN_FIELD.finditer(f"{parts.path}?{parts.query}"):
        name, _, value = login[0].rstrip("&;").replace(":", "=", 1).partition("=")
        found += [] if name.lower().startswith("user") else [value]
    for value in found:
        yield from (each for each in {value, unquote(value)} if len(each) >= SHORTEST_SECRET)
