"""The door to a server: its studies, and new ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpsearch.client.study import RemoteStudy
from mpsearch.client.wire import Wire


def connect(url: str = "http://127.0.0.1:8765", token: str | Path = "", *, seconds: float = 60.0) -> Connection:
    """Connect to a server that ``mpsearch serve`` runs.

    Args:
        url: its address.
        token: its token, or a file that holds it. Without, ``MPSEARCH_TOKEN``, or the file that a server of the same
            user on this machine has written.
        seconds: to wait for an answer.

    Raises:
        InputError: no address (E107), or no token is known (E901).
        UnsafeError: the server does not take the token (E901).
        ResourceError: it does not answer (E912).

    Example::

        server = mp.connect("http://127.0.0.1:8765", token)
        plan = server.study("tiny-llama").plan("weights <= 3.5 bits")
    """
    found = Connection(Wire(url, token, seconds))
    # A wrong address or token shows here, not at the first question.
    found._wire.get("/studies", limit=1)
    return found


class Connection:
    """A server."""

    def __init__(self, wire: Wire) -> None:
        """Set up; nothing is asked yet."""
        self._wire = wire

    def __repr__(self) -> str:
        return f"Connection({self._wire.url!r})"

    def studies(self) -> list[RemoteStudy]:
        """List the studies, newest first."""
        return [RemoteStudy(self._wire, item["name"]) for item in self._wire.rows("/studies", limit=1000)]

    def study(self, name: str) -> RemoteStudy:
        """Open a study.

        Raises:
            StorageError: no such study (E141).
            InputError: not a name (E114, E907).
        """
        self._wire.get("/study", study=name)
        return RemoteStudy(self._wire, name)

    def names(self) -> dict[str, list[str]]:
        """``models``, ``data`` and ``exporters`` that requests may name."""
        found: dict[str, list[str]] = self._wire.get("/names")
        return found

    def conflicts(self) -> list[dict[str, Any]]:
        """Second, different values that were refused, oldest first."""
        return list(self._wire.rows("/conflicts", limit=1000))

    def submit(
        self, name: str, *, model: str, calibration: str, budgets: str | Sequence[str], **settings: Any
    ) -> RemoteStudy:
        """Submit a study; some ``mpsearch worker`` that sees the same database takes it on.

        Args:
            name: name of the study.
            model: name of a model that the server was started with.
            calibration: name of a text that it was started with, or ``stdlib:calibration``.
            budgets: one budget or several.
            settings: further fields of `mpsearch.StudySpec`; ``validation`` as ``calibration``.

        Raises:
            InputError: a name that the server does not know (E913), or settings that make no sense.
            StorageError: a study of this name asks something else (E140).
            UnsafeError: the token is for reading only (E902).
        """
        wanted = [budgets] if isinstance(budgets, str) else list(budgets)
        body = {"name": name, "model": model, "calibration": calibration, "budgets": wanted, **settings}
        self._wire.post("/studies", body)
        return RemoteStudy(self._wire, name)
