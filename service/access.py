"""Who may ask: tokens and the clients that they stand for."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..wanvideo.errors import InputError
from .folder import CLIENT

__all__ = ["Access", "is_loopback"]

LOCAL = "local"
"""The client of a service without tokens."""

SHORTEST = 16
"""Characters of a token."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Token -> name of its client. Without tokens everybody is one client, which suits a service for this machine."""

    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path) -> Access:
        """Of a file with NAME TOKEN on each line; empty lines, and those that begin with #, are left out.

        Raises InputError for a file that cannot be read, names that are none, and tokens that are short or not unique.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The tokens cannot be read from {path}: {error}.") from error
        tokens: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, token = line.strip().partition(" ")
            token = token.strip()
            if not CLIENT.fullmatch(name) or not token.isascii() or len(token.split()) != 1 or len(token) < SHORTEST:
                raise InputError(
                    f"Line {number} of {path} names no client and its token: write a name (lower-case letters, digits, "
                    f"hyphens), a space, and at least {SHORTEST} ASCII characters."
                )
            if token in tokens:
                raise InputError(f"Line {number} of {path} has the token of a line before: each client needs its own.")
            tokens[token] = name
        if not tokens:
            raise InputError(f"There is no token in {path}: write NAME TOKEN on a line.")
        return cls(tokens)

    def client(self, token: str | None) -> str | None:
        """The client of a token; None where it is nobody's. The time that it takes says nothing of the tokens."""
        if not self.tokens:
            return LOCAL
        given, found = (token or "").encode(), None
        for known, name in self.tokens.items():
            if hmac.compare_digest(known.encode(), given):
                found = name
        return found
