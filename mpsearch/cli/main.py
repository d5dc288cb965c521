"""The door from the shell: commands, exit codes, and errors without tracebacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import typer

from mpsearch import __version__
from mpsearch.cli import (
    bundle,
    compare,
    compute,
    db,
    doctor,
    estimators,
    explain,
    export,
    formats,
    measure,
    options,
    plans,
    profile,
    search,
    serve,
    service,
    solvers,
    stored,
    targets,
    view,
    why,
    worker,
)
from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.logs import quiet

#: Command -> the heading that the help lists it under; the headings come in this order.
_GROUPS = {
    name: heading
    for heading, names in {
        "Studies": "demo run resume submit watch pause cancel logs search",
        "Results": "show view why compare solve export measure plan",
        "What there is": "layers formats estimators solvers targets profile",
        "Sharing and keeping": "bundle unbundle db worker serve",
        "Help": "doctor explain",
    }.items()
    for name in names.split()
}

app = typer.Typer(
    name="mpsearch",
    help="Decide how many bits each part of a neural network gets.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    compute.demo,
    compute.run,
    compute.resume,
    service.submit,
    service.watch,
    service.pause,
    service.cancel,
    service.logs,
    stored.solve,
    stored.show,
    why.why,
    compare.compare,
    export.export,
    stored.layers,
    formats.formats,
    estimators.estimators,
    solvers.solvers,
    targets.targets,
    profile.profile,
    measure.measure,
    search.search,
    bundle.bundle,
    bundle.unbundle,
    view.view,
    serve.serve,
    worker.worker,
    doctor.doctor,
    explain.explain,
):
    app.command(rich_help_panel=_GROUPS.get(command.__name__))(command)
app.add_typer(plans.app, name="plan", rich_help_panel=_GROUPS["plan"])
app.add_typer(db.app, name="db", rich_help_panel=_GROUPS["db"])


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mpsearch {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    options.DEBUG.set(debug)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and end the process with its exit code.

    0 done; 1 a fault of mpsearch itself; 2 usage; 3 bad input; 4 infeasible; 5 done with gaps; 6 storage; 7 resources;
    8 refused for safety; 130 interrupted.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    quiet()
    code = _run(arguments)
    try:
        # Else Python would do it after the end, and tell in its own words what is in the way.
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go(sys.stdout)
    except OSError as error:
        code = code or _of_the_system(error)
        _let_go(sys.stdout)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=None if arguments is None else list(arguments))
    except MpsearchError as error:
        if options.DEBUG.get():
            raise
        return _tell(error)
    except ModuleNotFoundError as error:
        if options.DEBUG.get():
            raise
        if (error.name or "mpsearch").partition(".")[0] == "mpsearch":
            return _fault(error)
        told = f"the package '{error.name}' is not installed, and this command needs it"
        advice = "pip install mpsearch; to time kernels alone, give a list of layers: mpsearch layers MODEL --json"
        return _tell(ResourceError("E702", told, advice=advice))
    except OSError as error:
        if options.DEBUG.get():
            raise
        return _of_the_system(error)
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            # No command was there yet, or none that has more to say.
            sys.stderr.write("stopped; go on with: the same command\n")
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if options.DEBUG.get():
            raise
        return _fault(error)
    return 0


def _of_the_system(error: OSError) -> int:
    from mpsearch.cli.faults import refused

    if found := refused(error):
        return _tell(found)
    if error.filename is None:
        return _fault(error)
    # A path that is too long, or that may not be looked at, can be met anywhere.
    return _tell(InputError("E101", f"'{error.filename}' cannot be used: {error.strerror}", advice="name another path"))


def _fault(error: Exception) -> int:
    from mpsearch.cli.faults import fault

    return _tell(fault(error))


def _tell(error: MpsearchError) -> int:
    try:
        sys.stderr.write(f"{options.plain(str(error))}\n")
    except OSError:
        _let_go(sys.stderr)
    return error.exit_code


def _let_go(stream: TextIO) -> None:
    """Have what cannot be written any more go nowhere, so that the process ends in peace."""
    # In a test, or in another program, it need not be that of the process.
    with suppress(OSError, ValueError):
        place = os.open(os.devnull, os.O_WRONLY)
        os.dup2(place, stream.fileno())
        os.close(place)


if __name__ == "__main__":
    main()
