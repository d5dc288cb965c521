"""The door from the shell: commands, exit codes, and errors without tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from mpsearch import __version__
from mpsearch.cli import (
    bundle,
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
)
from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.logs import quiet

#: Command -> the heading that the help lists it under; the headings come in this order.
_GROUPS = {
    name: heading
    for heading, names in {
        "Studies": "demo run resume submit watch pause cancel logs search",
        "Results": "show solve export measure plan",
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
    serve.serve,
    service.worker,
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

    0 done; 2 usage; 3 bad input; 4 infeasible; 5 done with gaps; 6 storage; 7 resources; 8 refused for safety;
    130 interrupted.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    quiet()
    try:
        app(args=None if arguments is None else list(arguments))
    except MpsearchError as error:
        if options.DEBUG.get():
            raise
        sys.stderr.write(f"{options.plain(str(error))}\n")
        return error.exit_code
    except ModuleNotFoundError as error:
        if options.DEBUG.get() or (error.name or "mpsearch").partition(".")[0] == "mpsearch":
            raise
        missing = ResourceError(
            "E702",
            f"the package '{error.name}' is not installed, and this command needs it",
            advice="pip install mpsearch; to time kernels alone, give a list of layers: mpsearch layers MODEL --json",
        )
        sys.stderr.write(f"{missing}\n")
        return missing.exit_code
    except OSError as error:
        # A path that is too long, or that may not be looked at, can be met anywhere.
        if options.DEBUG.get() or error.filename is None:
            raise
        wrong = InputError("E101", f"'{error.filename}' cannot be used: {error.strerror}", advice="name another path")
        sys.stderr.write(f"{options.plain(str(wrong))}\n")
        return wrong.exit_code
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            # No command was there yet, or none that has more to say.
            sys.stderr.write("stopped; go on with: the same command\n")
        return end.code if isinstance(end.code, int) else 0
    return 0


if __name__ == "__main__":
    main()
