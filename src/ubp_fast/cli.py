"""`ubp-fast COMMAND`: the command line of the package."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubp_fast import __version__
from ubp_fast.interruption import run_interruptibly

# Group -> what it is for, and its commands with what each does.
COMMANDS = {
    "vectors": (
        "From event logs to one vector per client, today and tomorrow.",
        {
            "inspect": "says what the columns of a file may be, and the command that reads it",
            "run": "from event logs to evaluated profiles; settings as name=value",
            "embed": "vectors of any moment from the model of a run",
        },
    ),
    "scores": (
        "How good vectors are, ours or somebody else's.",
        {
            "evaluate": "scores the vectors of a directory; further arguments as of run",
            "leaderboard": "compares the scores of runs",
            "validate": "checks vectors by the organisers' rules",
        },
    ),
    "upkeep": (
        "What is installed, what can be set, what lies on the disk, who is to be forgotten.",
        {
            "doctor": "versions, the machine, a self-test of every kernel: what a report needs",
            "settings": "every setting of run with default, type and meaning",
            "cache": "what the stages of runs have left on disk",
            "forget": "removes clients from a run, and searches its files for them",
            "completion": "prints what makes a shell complete commands, options and settings",
        },
    ),
}
SHELLS = ("bash", "zsh", "fish")
HELP = {name: text for _, commands in COMMANDS.values() for name, text in commands.items()}
EPILOG = """examples:
  ubp-fast inspect events.csv
  ubp-fast run data=table data.path=events.parquet directory=runs/shop profiles.at=end
  ubp-fast embed runs/shop --events new.parquet --at 2026-11-28 --output today.parquet
  ubp-fast embed runs/shop --append --events saturday.parquet
  ubp-fast evaluate VECTORS data=table data.path=events.parquet
  ubp-fast leaderboard runs/a runs/b
  ubp-fast settings data=table price
  ubp-fast cache why runs/shop
  eval "$(ubp-fast completion bash)"

ubp-fast COMMAND --help tells of one command.
"""


# A name with `=` is one word here, and no blank follows what goes on.
_BASH = r"""BEFORE_ubp_fast() {
  local current="${COMP_LINE:0:$COMP_POINT}" words
  current="${current##* }"
  case "${COMP_WORDS[1]}" in
CASES
  esac
  [[ $COMP_CWORD -le 1 ]] && words='COMMANDS'
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [[ $COMP_CWORD -gt 1 && "$current" != *=* ]] && COMPREPLY+=($(compgen -f -- "$current"))
  [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace 2>/dev/null
  if [[ "$current" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
  fi
}
complete -F _ubp_fast ubp-fast
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
        if {"-h", "--help"} & set(given):
            print(_run_help(), end="")
            return 0
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
    if options.command == "settings":
        from ubp_fast.options import markdown, shown

        print(markdown() if options.markdown else shown(options.words), end="" if options.markdown else "\n")
        return 0
    if options.command == "completion":
        print(_completion(options.shell), end="")
        return 0
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
    groups = "".join(
        f"\n{group}: {what}\n" + "".join(f"  {name:<13}{text}\n" for name, text in commands.items())
        for group, (what, commands) in COMMANDS.items()
    )
    made = argparse.ArgumentParser(
        "ubp-fast",
        usage="ubp-fast COMMAND ...",
        description=f"Event logs in, one vector per client out.\n{groups}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ubp_fast {__version__}")
    added = made.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog="ubp-fast"
    )
    commands = {
        name: added.add_parser(name, description=text[0].upper() + text[1:] + ".") for name, text in HELP.items()
    }
    look = commands["inspect"]
    look.add_argument("files", nargs="+", help="a file, a pattern, a directory of parts, or several")
    embed = commands["embed"]
    embed.add_argument("run", type=Path, help="directory of the run, or its folder model")
    embed.add_argument("--events", required=True, help="a table like that of the run, or a directory of tables")
    embed.add_argument("--output", help="a new directory, a table: NAME.parquet, or a folder in a bucket: s3://...")
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
    embed.add_argument(
        "--log", nargs="?", const="lines", default="auto", choices=("lines", "json"), help="a line a minute, or JSON"
    )
    evaluate = commands["evaluate"]
    evaluate.add_argument("profiles", type=Path, help="directory with client_ids.npy and embeddings.npy")
    validate = commands["validate"]
    validate.add_argument("profiles", type=Path, help="directory with client_ids.npy and embeddings.npy")
    validate.add_argument("--clients", type=Path, help="relevant clients, .npy")
    board = commands["leaderboard"]
    board.add_argument("runs", nargs="+", type=Path, help="run directories, or scores.json files")
    board.add_argument("--reader", default="network", help="by whose scores; network: the challenge's")
    leave = commands["forget"]
    leave.add_argument("run", type=Path, help="directory of the run")
    leave.add_argument("--clients", type=Path, required=True, help="their ids: a text file with one per line, or .npy")
    store = commands["cache"]
    store.add_argument("what", choices=("list", "why", "prune"), help="size, age and runs of every output; why a run"
        " makes stages again; deletes what no run shows")  # fmt: skip
    store.add_argument("run", nargs="?", type=Path, help="why: directory of the run")
    store.add_argument("--cache", type=Path, default=Path("runs/cache"), help="its directory, runs/cache by default")
    store.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="prune: only what is as old")
    listed = commands["settings"]
    listed.add_argument("words", nargs="*", help="what the name or the group of a setting must hold; all by default")
    listed.add_argument("--markdown", action="store_true", help="all, as a page of the documentation")
    commands["completion"].add_argument("shell", choices=SHELLS)
    return made


def _run_help() -> str:
    """What `run` takes."""
    from ubp_fast.pipeline.command import groups

    chosen = "".join(f"  {name:<32}{', '.join(choices)}\n" for name, choices in groups().items())
    return f"""usage: ubp-fast run [name=value ...] [--log[=json]]

From event logs to evaluated profiles; what is there already is not made again, and a run that was stopped goes on.

  ubp-fast run                                    the demo, 1.4 million purchases
  ubp-fast run data=table data.path=events.csv    your own; `ubp-fast inspect events.csv` writes the whole command
  ubp-fast run ... stages=[profiles]              no scores
  ubp-fast run ... --cfg job                      prints the whole configuration and makes nothing

Groups of settings, and what can be chosen in each:
{chosen}
Every setting with default, type and meaning: ubp-fast settings [WORD ...]

--log          a line a minute instead of bars
--log=json     a JSON object a line on stdout, all else on stderr
"""


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
    notes: list[str] = []
    if options.append:
        if options.output or options.clients or options.blocks or options.everybody:
            raise UserError(
                "embed --append: all vectors of everybody go to latest/ of the run; leave out --output, --clients,"
                " --blocks, --everybody"
            )
        progress = RunProgress(Console(), [("append", 1.0)], options.log)
        with progress.display(), progress.stage("append") as update:
            made = profiler.append(options.events, options.at, update, notes.append)
        _tell_notes(notes, options.log)
        _tell_profiles(made.num_clients, profiler.directory.parent / LATEST, options.log)
        return 0
    if options.output is None:
        raise UserError("embed: --output must name a new directory, a table or a folder in a bucket, got none")
    clients = None if options.clients is None else _clients(options.clients)
    blocks = None if options.blocks is None else options.blocks.split(",")
    progress = RunProgress(Console(), [("embed", 1.0)], options.log)
    with progress.display(), progress.stage("embed") as update:
        given = (options.output, options.events, options.at, clients, blocks, options.column_per_block)
        number = profiler.embed_to(*given, update, options.everybody, notes.append)
    _tell_notes(notes, options.log)
    _tell_profiles(number, options.output, options.log)
    return 0


def _tell_notes(notes: Sequence[str], log: str) -> None:
    from rich.console import Console

    from ubp_fast.progress import print_json

    for text in notes:
        if log == "json":
            print_json(Console(), "note", text=text)
        else:
            print(f"note  {text}")


def _tell_profiles(number: int, place: Path | str, log: str) -> None:
    from rich.console import Console

    from ubp_fast.progress import print_json

    if log == "json":
        print_json(Console(), "embed_finished", clients=number, output=str(place))
    else:
        print(f"profiles of {number} clients  {place}")


def _clients(path: Path) -> Any:
    """Ids of a file; lines become integers where the events have integers."""
    from ubp_fast.events.read import read_id_list
    from ubp_fast.events.schema import UserError
    from ubp_fast.files import why

    if path.suffix == ".npy":
        return read_id_list(path, unique=True)
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: file must hold one client id per line, got '{why(error)}'") from error


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
    if not options.cache.is_dir() or not StageCache(options.cache).is_used:
        what = "holds no output of a stage" if options.cache.is_dir() else "is no directory"
        inside = options.cache / "cache"
        remedy = f"did you mean {inside}?" if inside.is_dir() else "check the path"
        raise UserError(f"cache: --cache must name the cache of runs, got {options.cache}, which {what}; {remedy}")
    cache = StageCache(options.cache)
    outputs = cache.outputs()
    if options.what == "prune":
        doomed = cache.prune(time.time() - options.older_than * 86_400)
        print(f"removed {len(doomed)} of {len(outputs)} outputs, {_megabytes(sum(one.size for one in doomed))}")
        return 0
    table = Table("output", "size", "age", "runs", title=f"{options.cache}", title_justify="left")
    table.columns[0].overflow = table.columns[3].overflow = "fold"  # names are for looking them up
    for output in outputs:
        age = f"{(time.time() - output.used_s) / 86_400:.1f} days"
        table.add_row(output.path.name, _megabytes(output.size), age, "\n".join(map(str, output.runs)) or "-")
    Console().print(table)
    print(f"{len(outputs)} outputs, {_megabytes(sum(output.size for output in outputs))}")
    return 0


def _completion(shell: str) -> str:
    """What a shell reads to complete commands, their options and the settings of `run` and `evaluate`."""
    from ubp_fast.options import options
    from ubp_fast.pipeline.command import groups

    actions = parser()._subparsers
    assert actions is not None
    subparsers: Any = actions._group_actions[0]
    words = {
        name: [text for action in one._actions for text in (*action.option_strings, *(action.choices or ()))]
        for name, one in subparsers.choices.items()
    }
    settings = [f"{group}={choice}" for group, choices in groups().items() for choice in choices]
    settings += [f"{one.name}=" for found in options().values() for one in found]
    for name in ("run", "evaluate"):
        words[name] += ["--log", "--log=json", *dict.fromkeys(settings)]
    if shell == "fish":
        lines = [
            f"complete -c ubp-fast -n __fish_use_subcommand -a '{name}' -d {shlex.quote(HELP[name])}" for name in words
        ]
        lines += [
            f"complete -c ubp-fast -n '__fish_seen_subcommand_from {name}' -a '{' '.join(found)}'"
            for name, found in words.items()
        ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f"    {name}) words='{' '.join(found)}' ;;" for name, found in words.items())
    return (
        _BASH.replace("COMMANDS", " ".join(words))
        .replace("CASES", cases)
        .replace("BEFORE", "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "")
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _validate(options: argparse.Namespace) -> int:
    from ubp_fast.events.read import read_id_list
    from ubp_fast.profiles import validate
    from ubp_fast.profiles.validator import require_vectors

    require_vectors(options.profiles)
    relevant = None if options.clients is None else read_id_list(options.clients, unique=True)
    profiles = validate(options.profiles, relevant).require()
    print(f"valid: {profiles.num_clients} clients, {profiles.dim} columns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
