"""``repro-sweep``: a command where the first argument names one, else a Hydra application that runs a sweep."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from repro_sweep import collecting

INTERRUPTED = 130
"""The exit status of a command that was stopped."""
COMMANDS = {
    "plan": "the trials that a sweep would run, without starting anything",
    "status": "how a sweep is, running or not: what runs, waits and failed where",
    "attach": "watch a running sweep from another terminal",
    "logs": "what a trial prints",
    "cancel": "stop a sweep, or cancel some of its trials",
    "resume": "go on with a sweep, from its ledger alone",
    "sync": "bring MLflow up to date with a sweep that is not running",
    "replay": "check that a search's record leads to the same suggestions again",
    "rank": "the ranking of a sweep, from MLflow",
    "ui": "look at a sweep in MLflow, whose server is started where there is none",
    "reproduce": "run a trial again from what MLflow has of it, and say whether it came out the same",
    "export": "a trial as a folder that is complete in itself",
    "diff": "two trials side by side: config, code, environment, data and metrics",
    "card": "a reproducibility card of a sweep",
    "report": "a page with the figures of a sweep, from its ledger",
}

HELP = """\
repro-sweep: run a Hydra sweep on every slot of this machine and rank its trials in MLflow

  repro-sweep +sweep=NAME [OVERRIDE...]     run conf/sweep/NAME.yaml; overrides are Hydra's: key=value, key=a,b
  repro-sweep COMMAND [ARGUMENT...]         COMMAND --help says more

commands:
{commands}

Hydra's own options work as in any Hydra application:
  --config-dir DIR, --config-path DIR, --config-name NAME   where the configuration is (default: conf/config.yaml)
  --cfg job|hydra|all, --resolve, --package KEY             print the composed configuration
  --info, --hydra-help, --shell-completion                  more about Hydra and the configuration
  --version

exit status: 0 all trials complete; 1 some failed; 2 something to correct first; 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with ``sys.exit``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the process is ours
        collecting.rarely()
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        print(
            HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())),
            end="",
        )
        sys.exit(0)
    if first == "--version":
        from importlib.metadata import version

        print(f"repro-sweep {version('repro-sweep')}")
        sys.exit(0)
    try:
        sys.exit(_dispatch(first, arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _dispatch(first: str, arguments: list[str]) -> int:
    from repro_sweep.errors import ReproSweepError

    try:
        if "=" in first or first.startswith(("-", "~")):
            from repro_sweep.cli import sweep

            return sweep.main(arguments)
        if first not in COMMANDS:
            return fail(_no_command(first))
        code: int = importlib.import_module(f"repro_sweep.cli.{first}").main(arguments[1:])
        return code
    except ReproSweepError as error:
        return fail(str(error))


def _no_command(word: str) -> str:
    import difflib
    from pathlib import Path

    if Path("conf", "sweep", f"{word}.yaml").is_file():
        hint = f"; did you mean '+sweep={word}'?"
    else:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{word}' is not a command ({', '.join(COMMANDS)}), and an override contains '='{hint}"


def say(message: str) -> None:
    """One line to the user, beside what a command prints."""
    print(f"repro-sweep: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> int:
    """Print a mistake of the user's; returns the exit status for it."""
    for line in message.splitlines():
        say(line)
    return 2


if __name__ == "__main__":
    main()
