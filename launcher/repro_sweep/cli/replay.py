"""``repro-sweep replay NAME``: checks that a search's record leads to the same suggestions again."""

from __future__ import annotations

from collections.abc import Sequence

from repro_sweep.cli.arguments import Parser
from repro_sweep.cli.main import say


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 the same, 1 something else.

    Raises:
        ReproSweepError: there is no such search, or its sampler cannot be made any more.
    """
    parser = Parser(
        prog="repro-sweep replay",
        description="Asks the sampler of a search again for all that it has suggested, in the order in which it was"
        " asked and told, and compares. Nothing is run or written.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    args = parser.parse_args(arguments)

    import os

    from repro_sweep.asker import make_suggester, rebuild
    from repro_sweep.cli.finding import find
    from repro_sweep.errors import SweepError
    from repro_sweep.ledger import Ledger
    from repro_sweep.suggesting import DifferenceError

    ledger = Ledger.open(find(args.name), readonly=True)
    try:
        search = ledger.spec.search
        if search is None:
            raise SweepError(f"sweep '{ledger.spec.name}' is a grid: only a search can be replayed")
        os.chdir(ledger.spec.task.cwd)
        compared = rebuild(make_suggester(ledger), ledger, verify=True)
    except DifferenceError as error:
        say(f"the replay differs: {error}")
        return 1
    finally:
        ledger.close()
    print(f"the same: {compared} suggestions of {search.sampler.name} (seed {search.seed})")
    return 0
