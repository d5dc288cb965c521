"""``mpsearch serve``: the HTTP interface of a results database."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Storage
from mpsearch.errors import InputError, Notice
from mpsearch.logs import without_password


def serve(
    storage: Storage = DEFAULT_STORAGE,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8765,
    read_only: Annotated[bool, typer.Option("--read-only", help="Make only the token for reading.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER that studies may name; again for more.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=FILE that studies may name; again for more.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that the server is reached by.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Where to write the tokens, for programs.")] = None,
) -> None:
    """Serve the studies of a database as a page and over HTTP, with a token; programs use mpsearch.connect.

    mpsearch serve

    mpsearch serve --storage results.db --model llama=./llama --data wiki=./wiki.txt --port 0
    """
    from mpsearch import registry

    try:
        from mpsearch.web.server.app import make_app
        from mpsearch.web.server.running import is_loopback, listen, make_server
    except ModuleNotFoundError as error:
        if (error.name or "mpsearch").partition(".")[0] == "mpsearch":
            raise
        raise InputError("E118", f"serving needs {error.name}", advice="pip install 'mpsearch[web]'") from None
    from mpsearch.web.server.submitting import Registered
    from mpsearch.web.server.tokens import Tokens, write_tokens
    from mpsearch.web.server.tokens import token_file as usual

    known = Registered.of(model or [], data or [])
    settings = {"url": storage, "create": False, "read_only": read_only, "busy_timeout": 20.0}
    with registry.make("stores", "sql", **settings) as store, listen(host, port) as door:
        taken = int(door.getsockname()[1])
        tokens = Tokens(read_only=read_only)
        place = without_password(storage)
        given = [] if host in ("0.0.0.0", "::") else [host]
        app = make_app(store, tokens, taken, names=[*given, *(allow_host or [])], known=known, place=place)
        shown = (given or ["127.0.0.1"])[0]
        address = f"http://[{shown}]:{taken}" if ":" in shown else f"http://{shown}:{taken}"
        file = token_file or usual(taken)
        write_tokens(file, address, tokens)
        if not is_loopback(host):
            text = f"{host} is reached from other machines, and what is said is not encrypted: use a proxy with TLS"
            warning = Notice("W901", text)
            sys.stderr.write(f"{warning}\n")
        _say(address, tokens, file)
        try:
            run_until_stopped(make_server(app), door)
        finally:
            file.unlink(missing_ok=True)


def _say(address: str, tokens: Any, file: Path) -> None:
    if tokens.link is not None:
        sys.stdout.write(f"open       {address}/?token={tokens.link}  (good once)\n")
    sys.stdout.write(f"read only  {address}/?token={tokens.read}\n")
    sys.stdout.write(f"tokens     {file}  (for programs: mpsearch.connect('{address}'))\n")
    sys.stdout.flush()


def run_until_stopped(server: Any, door: Any) -> None:
    """Serve until a signal comes; Ctrl+C and SIGTERM end it alike."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # The server ends by a signal, gives it back when it is done, and the token file must still go.
    before = signal.signal(signal.SIGTERM, end)
    try:
        server.run(sockets=[door])
    except KeyboardInterrupt:
        sys.stdout.write("ended\n")
    finally:
        signal.signal(signal.SIGTERM, before)
