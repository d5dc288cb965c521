"""``mpsearch view``: a database file as a page, for looking only."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mpsearch.cli.serve import run_until_stopped
from mpsearch.errors import InputError, UsageError


def view(
    database: Annotated[str, typer.Argument(help="A results database: the path of its file, or its address.")],
    study: Annotated[str, typer.Option(help="Open this study, not the list.")] = "",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the browser, where there is one.")] = True,
) -> None:
    """Look at the studies of a database in the browser; nothing is written, and nobody else gets in.

    mpsearch view results.db

    mpsearch view results.db --study tiny-llama --no-browser
    """
    from mpsearch import registry
    from mpsearch.logs import without_password

    try:
        from mpsearch.web.server.app import make_app
        from mpsearch.web.server.running import listen, make_server
    except ModuleNotFoundError as error:
        if (error.name or "mpsearch").partition(".")[0] == "mpsearch":
            raise
        raise InputError("E118", f"the page needs {error.name}", advice="pip install 'mpsearch[web]'") from None
    from mpsearch.web.server.tokens import Tokens

    settings = {"url": database, "create": False, "read_only": True, "busy_timeout": 20.0}
    with registry.make("stores", "sql", **settings) as store, listen("127.0.0.1", port) as door:
        if study and study not in {row.name for row in store.studies()}:
            raise UsageError("E115", f"--study: '{study}' is not in this database", advice="leave it out for the list")
        taken = int(door.getsockname()[1])
        tokens = Tokens(read_only=True)
        app = make_app(store, tokens, taken, place=without_password(database), told=True)
        link = f"http://127.0.0.1:{taken}/?token={tokens.read}{_fragment(study)}"
        sys.stdout.write(f"open  {link}\n      Ctrl+C ends it; nothing is written\n")
        sys.stdout.flush()
        if browser and _can_open():
            import threading
            import webbrowser

            # The page is asked for once the server answers: the socket is open already.
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
        run_until_stopped(make_server(app), door)


def _fragment(study: str) -> str:
    """What the page reads behind the address.

    >>> _fragment("a & b")
    '#study=a+%26+b'
    """
    from urllib.parse import urlencode

    return f"#{urlencode({'study': study})}" if study else ""


def _can_open() -> bool:
    """Whether a browser with a window can be expected: one in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
