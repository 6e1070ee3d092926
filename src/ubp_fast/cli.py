"""`ubp-fast COMMAND`: the command line of the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubp_fast import __version__
from ubp_fast.interruption import run_interruptibly

EPILOG = """examples:
  ubp-fast inspect events.csv
  ubp-fast run data=table data.path=events.parquet directory=runs/shop profiles.at=end
  ubp-fast embed runs/shop --events new.parquet --at 2026-11-28 --output today.parquet
  ubp-fast embed runs/shop --append --events saturday.parquet
  ubp-fast evaluate VECTORS data=table data.path=events.parquet
  ubp-fast validate VECTORS --clients relevant_clients.npy
  ubp-fast leaderboard runs/a runs/b
  ubp-fast forget runs/shop --clients ids.txt
  ubp-fast cache list
  ubp-fast cache why runs/shop
  ubp-fast cache prune --older-than 30
  ubp-fast doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, 2 and one line when what was given is at fault, 130 or 143 when a signal ended it.

    1 with a traceback is a mistake of ours.
    """

    def work() -> int:
        from ubp_fast.pipeline.execute import explained

        return explained(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))

    return run_interruptibly(work)


def _main(given: list[str]) -> int:
    if given[:1] == ["run"]:  # Hydra reads the rest
        return _run(given[1:])
    options, rest = parser().parse_known_args(given)
    if rest and options.command != "evaluate":
        parser().error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "inspect":
        from ubp_fast.events.sources.inspect import inspect

        print(inspect(options.files if len(options.files) > 1 else options.files[0]))
        return 0
    if options.command == "doctor":
        from ubp_fast import doctor

        return doctor.run()
    if options.command == "embed":
        return _embed(options)
    if options.command == "forget":
        return _forget(options)
    if options.command == "cache":
        return _cache(options)
    if options.command == "validate":
        return _validate(options)
    if options.command == "leaderboard":
        from ubp_fast.evaluation import leaderboard

        return leaderboard.main([*map(str, options.runs), "--reader", options.reader])
    return _run(["stages=[evaluate]", f"evaluation.profiles={options.profiles}", *rest])


def parser() -> argparse.ArgumentParser:
    """Commands and their options; those of `run` are Hydra's."""
    made = argparse.ArgumentParser(
        "ubp-fast",
        description="Event logs in, one vector per client out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ubp_fast {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look = commands.add_parser("inspect", help="says what the columns of a file may be, and the command that reads it")
    look.add_argument("files", nargs="+", help="a file, a pattern, a directory of parts, or several")
    commands.add_parser("run", help="from event logs to evaluated profiles; settings as name=value, --help lists them")
    embed = commands.add_parser("embed", help="vectors of any moment from the model of a run")
    embed.add_argument("run", type=Path, help="directory of the run, or its folder model")
    embed.add_argument("--events", required=True, help="a table like that of the run, or a directory of tables")
    embed.add_argument("--output", type=Path, help="a new directory, or a table: NAME.parquet")
    embed.add_argument(
        "--append", action="store_true", help="adds new events to the run's and embeds all clients into its latest/"
    )
    embed.add_argument(
        "--everybody",
        action="store_true",
        help="the events are those of all clients: keeps means and deviations of this moment in the model",
    )
    embed.add_argument("--at", help="date or date-time (UTC); just after the newest event by default")
    embed.add_argument("--clients", type=Path, help="ids of the clients: a text file with one per line, or .npy")
    embed.add_argument("--blocks", help="names of the blocks wanted, separated by commas; all by default")
    embed.add_argument("--column-per-block", action="store_true", help="one column of the table for each block")
    evaluate = commands.add_parser("evaluate", help="scores the vectors of a directory; further arguments as of run")
    evaluate.add_argument("profiles", type=Path, help="directory with client_ids.npy and embeddings.npy")
    validate = commands.add_parser("validate", help="checks vectors by the organisers' rules")
    validate.add_argument("profiles", type=Path, help="directory with client_ids.npy and embeddings.npy")
    validate.add_argument("--clients", type=Path, help="relevant clients, .npy")
    board = commands.add_parser("leaderboard", help="compares the scores of runs")
    board.add_argument("runs", nargs="+", type=Path, help="run directories, or scores.json files")
    board.add_argument("--reader", default="network", help="by whose scores; network: the challenge's")
    leave = commands.add_parser("forget", help="removes clients from a run, and searches its files for them")
    leave.add_argument("run", type=Path, help="directory of the run")
    leave.add_argument("--clients", type=Path, required=True, help="their ids: a text file with one per line, or .npy")
    store = commands.add_parser("cache", help="what the stages of runs have left on disk")
    store.add_argument("what", choices=("list", "why", "prune"), help="size, age and runs of every output; why a run"
        " makes stages again; deletes what no run shows")  # fmt: skip
    store.add_argument("run", nargs="?", type=Path, help="why: directory of the run")
    store.add_argument("--cache", type=Path, default=Path("runs/cache"), help="its directory, runs/cache by default")
    store.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="prune: only what is as old")
    commands.add_parser("doctor", help="versions, the machine, a self-test of every kernel: what a report needs")
    return made


def _run(overrides: Sequence[str]) -> int:
    from ubp_fast.pipeline.command import main_as_typed

    before, sys.argv = sys.argv, ["ubp-fast run", *overrides]
    try:
        return main_as_typed()
    except SystemExit as stop:  # of Hydra's own options
        return int(stop.code or 0)
    finally:
        sys.argv = before


def _embed(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ubp_fast.events.schema import UserError
    from ubp_fast.profiler import Profiler
    from ubp_fast.profiler.profiler import LATEST
    from ubp_fast.progress import RunProgress

    profiler = Profiler.load(options.run)
    if options.append:
        if options.output or options.clients or options.blocks or options.everybody:
            raise UserError(
                "embed --append: all vectors of everybody go to latest/ of the run; leave out --output, --clients,"
                " --blocks, --everybody"
            )
        progress = RunProgress(Console(), [("append", 1.0)])
        with progress.display(), progress.stage("append") as update:
            made = profiler.append(options.events, options.at, update)
        print(f"profiles of {made.num_clients} clients  {profiler.directory.parent / LATEST}")
        return 0
    if options.output is None:
        raise UserError("embed: --output must name a new directory or a table, got none")
    clients = None if options.clients is None else _clients(options.clients)
    blocks = None if options.blocks is None else options.blocks.split(",")
    progress = RunProgress(Console(), [("embed", 1.0)])
    with progress.display(), progress.stage("embed") as update:
        given = (options.output, options.events, options.at, clients, blocks, options.column_per_block)
        number = profiler.embed_to(*given, update, options.everybody)
    print(f"profiles of {number} clients  {options.output}")
    return 0


def _clients(path: Path) -> Any:
    """Ids of a file; lines become integers where the events have integers."""
    from ubp_fast.events.read import read_id_list
    from ubp_fast.events.schema import UserError

    if path.suffix == ".npy":
        return read_id_list(path, unique=True)
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: file must hold one client id per line, got '{error}'") from error


def _forget(options: argparse.Namespace) -> int:
    from ubp_fast.profiler import forget

    done = forget(options.run, _clients(options.clients))
    print(f"{done.clients} clients are forgotten: no file of {options.run} holds their ids")
    if done.removed:
        print("removed, also for other runs that share the cache:", *done.removed, sep="\n  ")
    print(
        f"the model had learned from them: {', '.join(done.learned_from)}; run again without them for one that has not"
    )
    return 0


def _cache(options: argparse.Namespace) -> int:
    import time

    from rich.console import Console
    from rich.table import Table

    from ubp_fast.events.schema import UserError
    from ubp_fast.pipeline.cache import StageCache, digest
    from ubp_fast.pipeline.command import settings_of
    from ubp_fast.pipeline.execute import again, identified
    from ubp_fast.pipeline.stages import plan

    if options.what == "why":
        if options.run is None:
            raise UserError("cache why: RUN must be the directory of a run, got none")
        settings = settings_of(options.run)
        cache, made = StageCache(settings.cache), identified(plan(settings))
        missing = {name: one for name, one in made.items() if not cache.has(name, digest(one))}
        reasons = again(options.run, cache, missing)
        for name in missing:
            print(f"{name}: {'; '.join(reasons.get(name, ['was not made yet']))}")
        print(f"{len(missing)} of {len(made)} stages will be made")
        return 0
    if not options.cache.is_dir():
        raise UserError(f"cache: --cache must name the cache of runs, got {options.cache}, which is no directory")
    cache = StageCache(options.cache)
    outputs = cache.outputs()
    if options.what == "prune":
        oldest_s = time.time() - options.older_than * 86_400
        doomed = [output for output in outputs if not output.runs and output.used_s <= oldest_s]
        for output in doomed:
            cache.remove(output)
        print(f"removed {len(doomed)} of {len(outputs)} outputs, {_megabytes(sum(one.size for one in doomed))}")
        return 0
    table = Table("output", "size", "age", "runs", title=f"{options.cache}", title_justify="left")
    for output in outputs:
        age = f"{(time.time() - output.used_s) / 86_400:.1f} days"
        table.add_row(output.path.name, _megabytes(output.size), age, "\n".join(map(str, output.runs)) or "-")
    Console().print(table)
    print(f"{len(outputs)} outputs, {_megabytes(sum(output.size for output in outputs))}")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _validate(options: argparse.Namespace) -> int:
    from ubp_fast.events.read import read_id_list
    from ubp_fast.profiles import validate

    relevant = None if options.clients is None else read_id_list(options.clients, unique=True)
    profiles = validate(options.profiles, relevant).require()
    print(f"valid: {profiles.num_clients} clients, {profiles.dim} columns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
