"""`batchverify submit`: run any command as a job on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchverify.cli.options import together
from batchverify.cli.output import INTERRUPTED, show
from batchverify.errors import UsageError
from batchverify.progress import tell

if TYPE_CHECKING:
    from batchverify.engine.ray.submit import JobServer, JobState

_EPILOGUE = """Paths are read on the cluster: give paths that all nodes see, object stores, or --working-dir.
Values of --env are stored with the job: everyone with access to the cluster's dashboard can read them. The
exit code is that of the command."""


class _Printer:
    """Prints a job's log to stderr, and a summary of --json to stdout."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rest = ""

    def __call__(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._as_json and line.startswith("{"):
                click.echo(line)
            else:
                tell(line + "\n")

    def end(self) -> None:
        """Print a last line that has no line break."""
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
        help="The cluster's job server (dashboard), such as http://HEAD:8265.",
    ),
    click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the job until it ends."),
    click.option(
        "--env",
        multiple=True,
        metavar="NAME",
        help="Environment variable to pass to the job with its value here. Repeatable.",
    ),
    click.option(
        "--working-dir",
        type=click.Path(exists=True, file_okay=False),
        metavar="DIR",
        help="Folder to upload, without what .gitignore names; the command runs in it.",
    ),
    click.option(
        "--package/--in-image",
        default=True,
        show_default=True,
        help="Upload this batchverify, or use the one in the cluster's image.",
    ),
    click.option(
        "--pip",
        multiple=True,
        metavar="REQUIREMENT",
        help="Package that every node installs first. Repeatable.",
    ),
    click.option("--status", metavar="JOB", help="Show the status of a job. Takes no command."),
    click.option("--follow", metavar="JOB", help="Follow a running job. Takes no command."),
    click.option("--stop", metavar="JOB", help="Stop a job as Ctrl-C would. Takes no command."),
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND …")
@click.pass_context
def submit(ctx: click.Context, /, command: tuple[str, ...], **options: Any) -> None:
    """Run a batchverify command as a job on a Ray cluster.

    Example: batchverify submit --address http://HEAD:8265 -- score PAIRS -o OUT
    """
    from batchverify.engine.ray.submit import JobServer, Submission

    actions = [name for name in ("status", "follow", "stop") if options[name]]
    if len(actions) + bool(command) != 1:
        raise click.UsageError("give one of: -- COMMAND …, --status, --follow, --stop")
    if actions:
        ctx.exit(_about(actions[0], options[actions[0]], options["address"]))
    arguments = _parse(ctx, command)
    submission = Submission(command, options["env"], options["working_dir"], options["package"], options["pip"])
    local = submission.require_paths(arguments)
    # Checked before the server is asked: a variable that is not set is a usage error.
    submission.runtime_env()
    server = JobServer(options["address"])
    job = server.submit(submission)
    show(f"job {job} submitted to {server.address}", err=True)
    if not options["wait"]:
        click.echo(job)
        return
    code = _follow(server, job, as_json=bool(arguments.get("as_json")))
    existing = [path for path in local if Path(path).exists()]
    if code in (2, 3) and existing:
        tell(
            f"batchverify: paths are read on the cluster; {', '.join(existing)} exists on this machine: can the "
            "nodes see it too?\n"
        )
    ctx.exit(code)


def _parse(ctx: click.Context, command: tuple[str, ...]) -> dict[str, Any]:
    """The command's arguments by name, so that mistakes in them are found here and not on the cluster."""
    root = ctx.find_root()
    parsed: click.Command = root.command
    rest = list(command)
    while isinstance(parsed, click.Group) and not _works_alone(parsed, rest):
        name = rest.pop(0) if rest else ""
        subcommand = parsed.get_command(ctx, name)
        if subcommand is None or subcommand is submit:
            raise UsageError(f"submit: '{name}' is not a command for a cluster; example: -- score PAIRS -o OUT")
        parsed = subcommand
    name = " ".join(command[: len(command) - len(rest)])
    return parsed.make_context(name, rest, parent=root).params


def _works_alone(group: click.Group, rest: list[str]) -> bool:
    """Whether a group is called without one of its commands, and does something then."""
    return group.invoke_without_command and (not rest or rest[0].startswith("-"))


def _about(action: str, job: str, address: str) -> int:
    """Do what --status, --follow or --stop asks; the exit code."""
    from batchverify.engine.ray.submit import JobServer

    server = JobServer(address)
    if action == "follow":
        return _follow(server, job, as_json=False)
    state = server.stop(job) if action == "stop" else server.state(job)
    click.echo(_sentence(state))
    return 0 if action == "stop" else state.exit_code or 0


def _follow(server: JobServer, job: str, *, as_json: bool) -> int:
    """Show a job's log; its exit code, or that of Ctrl-C, which does not stop the job."""
    printer = _Printer(as_json)
    try:
        state = server.follow(job, printer)
    except KeyboardInterrupt:
        own = f"{Path(sys.argv[0]).name} submit --address {server.address}"
        tell(f"job {job} is still running; use {own} --follow {job} or --stop {job}\n")
        return INTERRUPTED
    printer.end()
    if state.exit_code:
        tell(f"{_sentence(state)}\n")
    return state.exit_code or 0


def _sentence(state: JobState) -> str:
    """The state of a job in one line: below its first line Ray's message repeats the log."""
    first = state.message.splitlines()[0] if state.message else ""
    return f"job {state.job}: {state.status.lower()}" + (f" ({first.rstrip(':,')})" if first else "")
