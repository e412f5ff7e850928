"""The process that a sweep's sampler and pruner run in; the coordinator's end is ``asking``.

It imports the user's task (a config needs what that registers), Hydra and Optuna, which the coordinator must not. It
reads the ledger when it starts, and never writes it. The two sides speak JSON lines, and it does what it is told in
order::

    coordinator -> asker   {"do": "ask", "id": 7, "number": 12, "new": true}
                           {"do": "tell", "seq": 31, "trial": 9, "state": "COMPLETE", "metrics": {"loss": 0.5}}
                           {"do": "report", "id": 8, "trial": 9, "step": 3, "value": 0.7}
                           {"do": "note", "trial": 9, "step": 4, "value": 0.6}, which wants no answer
                           (end of file: end)
    asker -> coordinator   {"ready": 31}, the last step that it has read; or {"error": "one line"}
                           {"id": 7, "steps": […], "trials": […], "over": null, "error": null}
                           {"id": 8, "prune": false}

What Optuna and the task's module print goes to ``search.log`` in the sweep's directory.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from repro_sweep import childio, collecting, task
from repro_sweep.asking import LOG_NAME
from repro_sweep.config.compose import Composer
from repro_sweep.config.custom_space import bind
from repro_sweep.config.grammar import Grammar
from repro_sweep.config.space import Space
from repro_sweep.config.trials import TrialMaker
from repro_sweep.errors import ReproSweepError
from repro_sweep.ledger import Ledger
from repro_sweep.provenance import source
from repro_sweep.records import Report
from repro_sweep.search import base as searchers
from repro_sweep.search.pruning import Rungs
from repro_sweep.states import TrialState
from repro_sweep.suggesting import Suggester
from repro_sweep.sweep import SweepSpec

_logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Serve the sweep in the given directory until the coordinator closes our input."""
    (directory,) = map(Path, sys.argv[1:] if argv is None else argv)
    collecting.rarely()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator
    with childio.private_stdout(directory / LOG_NAME) as out:
        try:
            _serve(directory, out)
        except ReproSweepError as error:
            _say(out, {"error": str(error)})
            return 1
        except BrokenPipeError:  # the coordinator is gone
            return 0
        except Exception as error:
            _logger.exception("a bug, or the sampler's")
            _say(out, {"error": f"the sampler failed: {type(error).__name__}: {error}".splitlines()[0]})
            return 1
    return 0


def _serve(directory: Path, out: IO[str]) -> None:
    ledger = Ledger.open(directory, readonly=True)
    try:
        os.chdir(ledger.spec.task.cwd)
        with ledger.snapshot() as now:  # the task may take long to import
            suggester = make_suggester(now)
            seen = rebuild(suggester, now)
    finally:
        ledger.close()
    _say(out, {"ready": seen})
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "ask":
            answer = suggester.ask(message["number"], new=message["new"])
            _say(out, {"id": message["id"], **asdict(answer)})
        elif message["do"] == "report":
            prune = suggester.report(message["trial"], message["step"], message["value"])
            _say(out, {"id": message["id"], "prune": prune})
        elif message["do"] == "note":
            suggester.note(message["trial"], message["step"], message["value"])
        elif message["seq"] > seen:
            suggester.tell(message["seq"], message["trial"], TrialState(message["state"]), message["metrics"])


def make_suggester(ledger: Ledger) -> Suggester:
    """The sampler and pruner of a sweep as it begins.

    Raises:
        UserError: the task cannot be imported, the space or the sampler cannot be made any more.
    """
    spec = source.frozen(ledger.spec)
    main = task.load(spec.task).__module__
    composer = Composer(spec.composition)
    search: searchers.Search | None = None
    overrides: tuple[str, ...] = ()
    if spec.search is not None:
        overrides = spec.search.space.overrides
        search = _search(spec, composer, main)
    rungs = None
    if spec.pruner is not None and (search is None or spec.repeats):
        rungs = Rungs(spec.pruner, spec.all_objectives[0].direction, spec.name)
    identities = {identity: number for identity, (number, _) in ledger.identities().items()}
    maker = TrialMaker(composer, spec.task.name, spec.repeats, overrides, spec)
    return Suggester(spec, search, rungs, maker.make, identities, ledger.withdrawn - ledger.cancelled)


def _search(spec: SweepSpec, composer: Composer, main: str) -> searchers.Search:
    assert spec.search is not None
    given = spec.search.space
    space = Space(
        params=given.params,
        zip_=given.zip,
        exclude=given.exclude,
        repeats=given.repeats,
        overrides=given.overrides,
        hydra_params=given.hydra_params,  # type: ignore[arg-type]  # as the config has them
        config_loader=composer.loader,
        search=True,
        extended=spec.search.custom_search_space is not None,
    )
    pruner = spec.search.repeats_pruner if spec.repeats else spec.pruner
    extend = None
    if spec.search.custom_search_space is not None:
        fixed = [each for each in given.overrides if not Grammar().parse(each, "").is_sweep_override()]
        extend = bind(spec.search.custom_search_space, composer.whole(fixed), main=main)
    make = searchers.load(spec.search.sampler.name).searcher
    search = make(space, spec, pruner=pruner, extend=extend)  # type: ignore[call-arg]  # what searches are made from
    assert isinstance(search, searchers.Search)
    return search


def rebuild(suggester: Suggester, ledger: Ledger, *, verify: bool = False) -> int:
    """Let a new suggester take over what the ledger records; returns the last step, or with ``verify`` the number of
    suggestions, which were all asked for again.

    Raises:
        DifferenceError: see :meth:`Suggester.rebuild`.
    """
    steps = ledger.steps()
    outcomes = ledger.ended_before_search() if ledger.spec.search is not None else {}
    ended = {number for number, state in ledger.states() if state.is_finished()}

    def reports(number: int) -> list[Report]:
        return ledger.reports(trial=number, limit=sys.maxsize)

    unfinished = sorted(ledger.report_heads().keys() - ended)
    suggestions = suggester.rebuild(steps, reports, outcomes, unfinished, verify=verify)
    return suggestions if verify else (steps[-1].seq if steps else 0)


def _say(out: IO[str], message: Mapping[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
