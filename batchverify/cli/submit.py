"""`batchverify submit`: any command as a job on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchverify.cli.options import together
from batchverify.errors import UsageError

if TYPE_CHECKING:
    from batchverify.engine.ray.submit import JobServer, JobState

INTERRUPTED = 130
_EPILOGUE = """Paths are read on the cluster: give paths that all of its nodes see, object stores, or
--working-dir. Values of --env are stored with the job: who may see the cluster's dashboard may see them.
Exit codes are those of the command."""


class _Printer:
    """Where a job's log goes: to stderr, a summary that was asked for with --json to stdout."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rest = ""

    def __call__(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            click.echo(line, err=not (self._as_json and line.startswith("{")))

    def end(self) -> None:
        """Print a last line without its end."""
        if self._rest:
            self("\n")


@click.command(epilog=_EPILOGUE)
@together(
    click.option(
        "--address",
        required=True,
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=True,
        metavar="URL",
        help="The cluster's job server (dashboard), http://HEAD:8265.",
    ),
    click.option(
        "--wait/--no-wait", default=True, show_default=True, help="Follow the job until it is over."
    ),
    click.option(
        "--env",
        multiple=True,
        metavar="NAME",
        help="Variable that takes its value from here to the job; repeat for several.",
    ),
    click.option(
        "--working-dir",
        type=click.Path(exists=True, file_okay=False),
        metavar="DIR",
        help="Folder that goes along (without what .gitignore names) and in which the command runs.",
    ),
    click.option(
        "--package/--in-image",
        default=True,
        show_default=True,
        help="Ship this batchverify, or use the one that the cluster has.",
    ),
    click.option(
        "--pip", multiple=True, metavar="REQUIREMENT", help="What every node installs first; repeatable."
    ),
    click.option("--status", metavar="JOB", help="Say how a job stands; no command."),
    click.option("--follow", metavar="JOB", help="Follow a job that runs already; no command."),
    click.option("--stop", metavar="JOB", help="End a job as Ctrl-C would; no command."),
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND …")
@click.pass_context
def submit(ctx: click.Context, /, command: tuple[str, ...], **options: Any) -> None:
    """Run a batchverify command as a job on a Ray cluster: submit --address URL -- score PAIRS -o OUT."""
    from batchverify.engine.ray.submit import JobServer, Submission

    asked = [name for name in ("status", "follow", "stop") if options[name]]
    if len(asked) + bool(command) != 1:
        raise click.UsageError("give one of: -- COMMAND …, --status, --follow, --stop")
    if asked:
        ctx.exit(_about(asked[0], options[asked[0]], options["address"]))
    arguments = _parse(ctx, command)
    submission = Submission(
        command, options["env"], options["working_dir"], options["package"], options["pip"]
    )
    local = submission.require_paths(arguments)
    # Once before anybody is asked: a variable that is not set is a mistake of the command's.
    submission.runtime_env()
    server = JobServer(options["address"])
    job = server.submit(submission)
    click.echo(f"job {job} submitted to {server.address}", err=True)
    if not options["wait"]:
        click.echo(job)
        return
    code = _follow(server, job, as_json=bool(arguments.get("as_json")))
    here = [path for path in local if Path(path).exists()]
    if code in (2, 3) and here:
        click.echo(
            f"batchverify: paths are read on the cluster; {', '.join(here)} is on this machine: do its nodes see "
            "it, too?",
            err=True,
        )
    ctx.exit(code)


def _parse(ctx: click.Context, command: tuple[str, ...]) -> dict[str, Any]:
    """The command's arguments by name: a mistake in them is said here and not by the cluster."""
    root = ctx.find_root()
    group: Any = root.command
    names = list(command)
    while isinstance(group, click.Group):
        name = names.pop(0) if names else ""
        found = group.get_command(ctx, name)
        if found is None or found is submit:
            raise UsageError(
                f"submit: '{name}' is no command for a cluster; give one as in: -- score PAIRS -o OUT"
            )
        group = found
    name = " ".join(command[: len(command) - len(names)])
    arguments: dict[str, Any] = group.make_context(name, names, parent=root).params
    return arguments


def _about(what: str, job: str, address: str) -> int:
    """Answer --status, --follow and --stop: the exit code."""
    from batchverify.engine.ray.submit import JobServer

    server = JobServer(address)
    if what == "follow":
        return _follow(server, job, as_json=False)
    state = server.stop(job) if what == "stop" else server.state(job)
    click.echo(_sentence(state))
    return 0 if what == "stop" else state.exit_code or 0


def _follow(server: JobServer, job: str, *, as_json: bool) -> int:
    """Show a job's log; its exit code, or that of Ctrl-C, which leaves the job alone."""
    printer = _Printer(as_json)
    try:
        state = server.follow(job, printer)
    except KeyboardInterrupt:
        mine = f"{Path(sys.argv[0]).name} submit --address {server.address}"
        click.echo(f"job {job} goes on; {mine} --follow {job} or --stop {job}", err=True)
        return INTERRUPTED
    printer.end()
    if state.exit_code:
        click.echo(_sentence(state), err=True)
    return state.exit_code or 0


def _sentence(state: JobState) -> str:
    """How a job stands, in one line: Ray's message repeats the log below its own first line."""
    first = state.message.splitlines()[0] if state.message else ""
    return f"job {state.job}: {state.status.lower()}" + (f" ({first.rstrip(':,')})" if first else "")
