"""Where a database lives: what the user wrote, read once, and shown without its password."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from mpsearch.errors import InputError
from mpsearch.logs import address, hidden, remember

#: Put stars in place of every password and token that a text holds.
hide = hidden


@dataclass(frozen=True)
class Place:
    """The address of a database.

    Attributes:
        shown: the address without secrets, for messages.
        name: the short name for messages.
        path: the file of an SQLite database; None in memory and on a server.
        server: the address of a server; None for SQLite.
        password: never shown.
    """

    shown: str
    name: str
    path: Path | None = None
    server: URL | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str) -> Place:
        """Read ``sqlite:///file.db``, ``postgresql://…`` or the path of a file.

        Raises:
            InputError: not such an address (E107).

        >>> Place.of("postgresql://ann:secret@db.lan/mp").shown
        'postgresql://ann:***@db.lan/mp'
        """
        if not text or "\0" in text:
            raise InputError("E107", f"storage: {text!a} is not an address", advice=_EXAMPLES)
        if text == ":memory:" or "://" not in text:
            return cls._file(text)
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            # The cause holds the address, with its password.
            raise InputError("E107", f"storage: cannot read '{address(text)}'", advice=_EXAMPLES) from None
        family = url.drivername.partition("+")[0]
        if family == "sqlite":
            if url.query:
                raise InputError("E107", f"storage: '{address(text)}' has options; an SQLite address has none")
            return cls._file(url.database or ":memory:")
        if family in ("postgresql", "postgres"):
            return cls._server(url)
        raise InputError("E107", f"storage: '{family[:40]}' is not a database mpsearch knows", advice=_EXAMPLES)

    @classmethod
    def _file(cls, database: str) -> Place:
        if database == ":memory:":
            return cls(shown="sqlite://", name="memory")
        # Later connections must find the same file after a change of folder, and SQLite puts its log beside the
        # file that a link leads to.
        path = Path(os.path.realpath(os.path.expanduser(database)))
        return cls(shown=f"sqlite:///{database}", name=database, path=path)

    @classmethod
    def _server(cls, url: URL) -> Place:
        secret = url.password or url.query.get("password") or ""
        secret = secret if isinstance(secret, str) else "".join(secret)
        remember(secret)
        shown = url.set(query={}, drivername="postgresql").render_as_string(hide_password=True)
        return cls(
            shown=shown,
            name=shown,
            server=url.set(drivername="postgresql+psycopg"),
            password=secret,
        )


def same(place: Place, text: str) -> bool:
    """Whether an address is that of a place, however it is written.

    >>> same(Place.of("sqlite:///a.db"), "./a.db"), same(Place.of("a.db"), "postgresql://ann@db.lan/a.db")
    (True, False)
    """
    other = Place.of(text)
    if place.server is None or other.server is None:
        return place.path is not None and place.path == other.path
    return _whose(place.server) == _whose(other.server)


def _whose(url: URL) -> tuple[str, int, str]:
    host = (url.host or "localhost").lower()
    return ("localhost" if host in ("127.0.0.1", "::1") else host, url.port or 5432, url.database or url.username or "")


_EXAMPLES = "sqlite:///mpsearch.db, the path of a file, or postgresql://user@host/database"
