"""Runs the stages that are not there yet, in order, and writes the run directory."""

from __future__ import annotations

import io
import os
import resource
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ubp_fast.evaluation import READERS, Scores
from ubp_fast.evaluation.leaderboard import SCORES_FILE, WARNINGS, Difference, compare
from ubp_fast.evaluation.readers import reader_named
from ubp_fast.evaluation.scores import Spread
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import (
    ObjectError,
    OutputDirectoryError,
    copy_directory,
    file_digest,
    load_json,
    replace_by_copy,
    restore,
    why,
    write_json,
    write_text,
    writing_to,
)
from ubp_fast.interruption import run_interruptibly
from ubp_fast.kernels import BackendUnavailable
from ubp_fast.models.training import LOSSES_FILE
from ubp_fast.pipeline.cache import StageCache, differences, digest, made_of
from ubp_fast.pipeline.identity import made_by
from ubp_fast.pipeline.model_stages import PROFILE_TABLE, TRAINING, take_part
from ubp_fast.pipeline.needs import Need, needs_of_models, needs_of_store, told
from ubp_fast.pipeline.run_directory import RunDirectory, environment, facts_of, facts_table, warnings_of
from ubp_fast.pipeline.settings import Settings, read_settings
from ubp_fast.pipeline.stages import (
    ALIGNMENT,
    DIAGNOSIS,
    DRIFT,
    FACTS_FILE,
    KEPT_FILE,
    LATEST,
    PORTRAIT,
    Stage,
    plan,
)
from ubp_fast.profiler.bundle import BUNDLE_FILE, MODEL_FOLDER
from ubp_fast.profiles.matrix import LAYOUT_FILE
from ubp_fast.profiles.publishing import objects_there, publish
from ubp_fast.progress import RunProgress, duration, print_json
from ubp_fast.ranks.company import Company, company_here, joined
from ubp_fast.report import RunSummary, Timing, data_read, render_report
from ubp_fast.store.event_store import EventStore

# What a message alone explains. Anything else is a mistake of ours and keeps its traceback.
USER_ERRORS = (UserError, OutputDirectoryError, ObjectError, BackendUnavailable)
USER_ERROR, OUR_ERROR = 2, 1
# Of a shell's command that writes into a pipe whose reader has gone: 128 + SIGPIPE.
NOBODY_READS = 141
PLEA = "This is a mistake of ubp_fast. Please report it, with the lines above and what `ubp-fast doctor` prints."
# Stage whose vectors a run shows -> folder of the run.
PROFILE_FOLDERS = {"stacking": "profiles", f"{LATEST}stacking": "latest"}
STORES = {"store", f"{LATEST}store"}
ScoreTable = dict[tuple[str, ...], dict[str, Spread]]


def execute(config: DictConfig, console: Console | None = None) -> int:
    """Runs a composed configuration to its end.

    Returns:
        Exit code: 0; 2 when the input or the configuration is at fault (one line on stderr says what); 1 when we are;
        130 after Ctrl-C, 143 after SIGTERM. Whatever was finished is found again by the next run.
    """

    def work() -> int:
        settings = read_settings(config)
        # Of JSON lines nothing else may stand in the way.
        run_stages(settings, console or Console(stderr=settings.progress == "json"))
        return 0

    return run_interruptibly(lambda: explained(work))


def explained(work: Callable[[], int]) -> int:
    """The exit code of `work()`; errors are said on stderr: those of users in one line, ours as they are.

    Where the reader of the output has gone (`ubp-fast settings | head`), there is nobody to say anything to. Letters
    that a terminal does not have are spelled: a name with an umlaut was an error there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        sys.stdout.flush()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except PermissionError as error:
        place = error.filename or "files"
        print(f"error: {place}: this user must have access, got '{why(error)}'; change permissions", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NOBODY_READS
        traceback.print_exc()
        print(PLEA, file=sys.stderr)
        return OUR_ERROR
    return code


def _nobody_reads() -> bool:
    """Whether the reader of the output has gone; what Python still holds of it goes nowhere then."""
    output, poll = sys.__stdout__, select.poll()
    if output is None:
        return False
    poll.register(output.fileno(), 0)  # without a wish it tells errors alone
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output.fileno())
    os.close(nowhere)
    return True


def run_stages(settings: Settings, console: Console) -> Path:
    """Makes what is missing, then profiles, scores and report; returns the run directory."""
    with joined(settings.wait_s) as company:
        _check_processes(settings, company)
        with (
            writing_to(settings.cache, "the cache directory"),
            writing_to(settings.directory, "the run directory"),
        ):
            if company is not None and company.launch.rank:
                take_part(settings, company, _what_is_needed(settings))
                return settings.directory
            return _run_stages(settings, console)


def _check_processes(settings: Settings, company: Company | None) -> None:
    """Whether as many processes are here as the settings say; without a word in them torchrun decides."""
    asked, nodes = settings.devices, settings.nodes
    if company is None:
        if nodes > 1:
            raise UserError(
                f"run: compute.nodes={nodes} needs torchrun on every host: torchrun --nnodes={nodes} --nproc-per-node="
                f"{asked} --node-rank=0 --master-addr=HOST --master-port=29500 -m ubp_fast.run ...; docs/machines.md"
            )
        return
    launch = company.launch
    if (asked, nodes) not in ((1, 1), (launch.local_world, launch.world // launch.local_world)):
        raise UserError(
            f"run: compute.devices and compute.nodes must be what torchrun has started, {launch.local_world} on each of"
            f" {launch.world // launch.local_world} hosts, got {asked} and {nodes}; leave them out"
        )
    if settings.device == "cpu":
        torch.set_num_threads(max(1, (settings.threads or os.cpu_count() or 1) // launch.local_world))


def _what_is_needed(settings: Settings) -> Callable[[str], tuple[str, Mapping[str, Path], Path]]:
    """A function that makes what a training needs and gives network, inputs and folder of the stage with a key."""
    stages, cache = plan(settings), StageCache(settings.cache)
    keys = {name: digest(parts) for name, parts in identified(stages).items()}

    def needed(key: str) -> tuple[str, Mapping[str, Path], Path]:
        stage = next((one for one in stages if keys[one.name] == key), None)
        if stage is None:
            raise UserError(
                "run: all processes must have the same settings, data and version of ubp_fast, got a training of the"
                " first that this one does not know"
            )
        paths = {name: cache.path(name, keys[name]) for name in keys}
        inputs: set[str] = {*stage.inputs}
        for one in reversed(stages):
            if one.name in inputs:
                inputs |= set(one.inputs)
        for one in stages:
            if one.name in inputs:
                make = partial(one.make, settings, {name: paths[name] for name in one.inputs})
                cache.build(one.name, keys[one.name], lambda folder: make(folder, lambda *_: None), one.keep)  # noqa: B023
        folder = paths[stage.name].with_name(f"{paths[stage.name].name}.partial")
        return (
            stage.name.removeprefix(LATEST),
            {name.removeprefix(LATEST): paths[name] for name in stage.inputs},
            folder,
        )

    return needed


def _run_stages(settings: Settings, console: Console) -> Path:
    if settings.threads is not None and company_here() is None:
        torch.set_num_threads(settings.threads)
    run = RunDirectory(settings.directory, settings.plain)
    with run.alone():
        write_json(run.path / "environment.json", environment(torch.get_num_threads()))
    cache = StageCache(settings.cache)
    stages = plan(settings)
    wanted = _wanted(stages, settings.stages)
    made = identified(stages)
    keys = {name: digest(parts) for name, parts in made.items()}
    if settings.publish is not None:
        if not _published(wanted):
            raise UserError("run: publish must come with profiles, got stages that make none; add profiles to stages")
        objects_there(settings.publish)  # what is refused there is said before the work, too
    lacking = cache.claim(run.path, {stage.name: made[stage.name] for stage in wanted})
    missing = [stage for stage in wanted if stage.name in lacking]
    for name, reasons in again(run.path, cache, {stage.name: made[stage.name] for stage in missing}).items():
        console.print(f"{name} again: {'; '.join(reasons)}", soft_wrap=True, highlight=False, markup=False)
    for reader in settings.evaluation.readers:
        if any(stage.name.endswith(f"-{reader}") for stage in missing):
            reader_named(reader)  # what is not installed is said before the work, not after it
    lines = Console(quiet=console.quiet) if settings.progress == "json" else console
    progress = RunProgress(lines, [(stage.name, stage.cost) for stage in missing], settings.progress)
    timings: list[Timing] = []
    first = "store" if any(stage.name == "store" for stage in wanted) else "events"
    has_told = False
    with progress.display():
        for stage in wanted:
            if stage not in missing:
                timings.append(Timing(stage.name, None))
            else:
                started_s = time.monotonic()
                folders = {name: cache.path(name, keys[name]) for name in stage.inputs}
                with progress.stage(stage.name) as update:
                    cache.build(
                        stage.name,
                        keys[stage.name],
                        lambda folder: stage.make(settings, folders, folder, update),  # noqa: B023
                        stage.keep,
                        lambda: console.print(f"{stage.name}: another run makes it; waiting for that one"),  # noqa: B023
                    )
                timings.append(Timing(stage.name, time.monotonic() - started_s, _peak_bytes()))
            run.link_stage(stage.name, cache.path(stage.name, keys[stage.name]))
            if stage.name == "events" and (stores := STORES & {one.name for one in missing}):
                events = EventDirectory.open(run.path / "stages" / "events")
                need = needs_of_store(events, settings.plain["store"], settings.shards)
                _tell([need] * len(stores), settings, console)
            if stage.name in STORES and not has_told:
                has_told = True
                store = EventStore.open(run.path / "stages" / stage.name)
                _tell(needs_of_models(store, settings, [one.name for one in missing]), settings, console)
            if stage.name == first:
                console.print(facts_table(facts_of(run.path, settings)), highlight=False)
    with run.alone():
        scores = _publish(settings, run, wanted, timings, console)
        if settings.publish is not None:
            _put(settings.publish, run, _published(wanted), progress, console)
    if settings.progress == "json":
        print_json(lines, "run_finished", directory=str(run.path), auroc=scores)
    return run.path


def _tell(needs: list[Need], settings: Settings, console: Console) -> None:
    if needs:
        console.print(told(needs, settings.cache, settings), highlight=False)


def _wanted(stages: Sequence[Stage], asked: Sequence[str] | None) -> list[Stage]:
    """The stages asked for and everything they need, in order; `evaluate` stands for all scores."""
    if asked is None:
        return list(stages)
    names = {stage.name for stage in stages}
    groups = {
        "evaluate": {name for name in names if name.startswith("evaluate-") or name in (ALIGNMENT, DIAGNOSIS)},
        "profiles": {"stacking", f"{LATEST}stacking"} & names,
        "report": names,
    }
    needed: set[str] = set()
    for name in asked:
        chosen = groups.get(name, {name, LATEST + name} & names)
        if not chosen:
            raise UserError(f"run: stages must be among {sorted({*names, *groups})}, got '{name}'")
        needed |= chosen
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return [stage for stage in stages if stage.name in needed]


def identified(stages: Sequence[Stage]) -> dict[str, dict[str, object]]:
    """Stage -> what its output follows from; the digest of that is its key."""
    made: dict[str, dict[str, object]] = {}
    for stage in stages:
        inputs = {name: digest(made[name]) for name in stage.inputs}
        made[stage.name] = made_of(stage.name, stage.config, inputs, made_by(stage.begins))
    return made


def again(run: Path, cache: StageCache, made: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """Why stages that a run shows already are made again; those of which nothing is known are left out."""
    found = {}
    for name, now in made.items():
        shown = run / "stages" / name
        before = cache.recorded(shown.resolve()) if shown.is_symlink() else None
        if before is not None and (reasons := differences(before, now)):
            found[name] = reasons
    return found


def _published(stages: Sequence[Stage]) -> dict[str, str]:
    """Stage -> folder of the run, of the vectors that a run shows; the newest are the last."""
    names = {stage.name for stage in stages}
    return {name: folder for name, folder in PROFILE_FOLDERS.items() if name in names}


def _put(url: str, run: RunDirectory, published: Mapping[str, str], progress: RunProgress, console: Console) -> None:
    """The newest vectors into a bucket."""
    folder = list(published.values())[-1]
    with progress.display(), progress.stage("publish") as update:
        put = publish(run.path / f"{folder}.parquet", run.path / folder / LAYOUT_FILE, url, update)
    console.print(f"{put['clients']:,} vectors are in {url}", soft_wrap=True, highlight=False, markup=False)


def _publish(
    settings: Settings,
    run: RunDirectory,
    stages: Sequence[Stage],
    timings: list[Timing],
    console: Console,
) -> dict[str, dict[str, dict[str, Spread]]]:
    """Profiles, scores and report as plain files of the run directory, then a table on the screen.

    Returns:
        Component -> reader -> task -> AUROC and its error.
    """
    names, published = {stage.name for stage in stages}, _published(stages)
    for name, folder in published.items():
        made = run.path / "stages" / name
        replace_by_copy(made / "stacked", run.path / folder)
        replace_by_copy(made / PROFILE_TABLE, run.path / f"{folder}.parquet")
    if published:  # the model of the newest
        model, shown = run.path / "stages" / list(published)[-1] / MODEL_FOLDER, run.path / MODEL_FOLDER
        restore(shown)
        if (shown / BUNDLE_FILE).exists() and file_digest(shown / BUNDLE_FILE) == file_digest(model / BUNDLE_FILE):
            copy_directory(model, shown)  # days that were added since are of this model
        else:
            replace_by_copy(model, shown)
    found = _score_files(run, stages)
    if ALIGNMENT in names and "stacked" in found:
        remarks = {**found["stacked"].remarks, ALIGNMENT: _kept(run)}
        found["stacked"] = replace(found["stacked"], remarks=remarks)
    warnings = warnings_of(run.path, settings, found)
    if found:
        stored = {component: scores.to_json() for component, scores in found.items()}
        write_json(run.path / SCORES_FILE, {**stored, WARNINGS: warnings})
    scores = {component: one.summary() for component, one in found.items() if one.tasks}
    readers = {component: one.aurocs() for component, one in found.items()}
    paired, notes = _paired(found)
    summary = RunSummary(
        title=settings.name,
        scores=scores,
        readers=readers,
        paired=paired,
        paired_notes=notes,
        diagnosis=_facts(run, names, DIAGNOSIS),
        portrait=_facts(run, names, PORTRAIT),
        drift=_facts(run, names, DRIFT),
        data=data_read(EventDirectory.open(run.path / "stages" / "events")) if "events" in names else {},
        losses=_losses(run, names),
        timings=timings,
        facts=facts_of(run.path, settings),
        environment=environment(torch.get_num_threads()),
        config_text=yaml.safe_dump(dict(settings.plain), sort_keys=False, allow_unicode=True),
        warnings=warnings,
    )
    write_text(run.path / "report.html", render_report(summary))
    if scores:
        by_profile: ScoreTable = {(component,): tasks for component, tasks in scores.items()}
        console.print(_table("scores of the challenge", ("profile",), by_profile))
    if readers:
        rows = [(reader, component) for reader in READERS for component in readers if reader in readers[component]]
        by_reader: ScoreTable = {(reader, component): readers[component][reader] for reader, component in rows}
        console.print(_table("AUROC by reader", ("reader", "profile"), by_reader))
    for text in warnings:
        console.print(f"note      {text}", soft_wrap=True, highlight=False, markup=False)
    for folder in published.values():
        console.print(f"{folder:9} {run.path / folder}", soft_wrap=True, highlight=False)
    console.print(f"report    {run.path / 'report.html'}", soft_wrap=True, highlight=False)
    spent_s = sum(one.seconds or 0.0 for one in timings)
    console.print(f"{len(timings)} stages, {duration(spent_s)}", highlight=False)
    return readers


def _kept(run: RunDirectory) -> str:
    """What models of the earlier run's vectors keep on the new ones, in one sentence."""
    kept = load_json(run.path / "stages" / ALIGNMENT / KEPT_FILE)["kept"]
    by_reader = [f"{one}: {share['aligned']:.1%} (unaligned {share['unaligned']:.1%})" for one, share in kept.items()]
    return (
        "models that learned from the earlier run's vectors keep of their AUROC above .5 on the new ones"
        f" {', '.join(by_reader) or 'what cannot be said: they have none'}"
    )


def _score_files(run: RunDirectory, stages: Sequence[Stage]) -> dict[str, Scores]:
    """Component -> its scores by all readers, in the order of the stages."""
    parts: dict[str, list[Scores]] = {}
    for stage in stages:
        if stage.name.startswith("evaluate-"):
            component = stage.name.removeprefix("evaluate-").rsplit("-", 1)[0]
            stored = load_json(run.path / "stages" / stage.name / "scores.json")
            parts.setdefault(component, []).append(Scores.from_json(stored))
    return {component: Scores.join(found) for component, found in parts.items()}


def _paired(scores: Mapping[str, Scores]) -> tuple[dict[str, dict[str, Difference]], list[str]]:
    """By every reader the first component less the baseline, or the next; and why some cannot be paired."""
    if len(scores) < 2:
        return {}, []
    first, *others = scores.values()
    second = scores.get("baseline_log1p", others[0])
    paired, notes = {}, []
    for reader in first.config.readers:
        try:
            paired[reader] = compare(first, others[0] if second is first else second, reader)
        except DataError as error:
            notes.append(f"{reader} is not paired: {error}")
    return paired, notes


def _facts(run: RunDirectory, names: set[str], stage: str) -> dict[str, Any]:
    """What a stage has found for the report; nothing where it was not asked for."""
    found = next((name for name in (stage, LATEST + stage) if name in names), None)
    return {} if found is None else load_json(run.path / "stages" / found / FACTS_FILE)


def _peak_bytes() -> int:
    """The largest resident set since the process began its program."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # another system; its figure may be that of the process that started this one
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _losses(run: RunDirectory, names: set[str]) -> dict[str, list[dict[str, float]]]:
    losses: dict[str, list[dict[str, float]]] = {}
    for name in ("contrastive", "multitask", "stacking"):
        if name in names:
            path = run.path / "stages" / name / TRAINING / LOSSES_FILE
            if path.exists():  # a model in closed form has no losses
                losses[name] = load_json(path)["curve"]
    return losses


def _table(title: str, names: tuple[str, ...], scores: ScoreTable) -> Table:
    tasks = list(dict.fromkeys(task for values in scores.values() for task in values))
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    for task in tasks:
        table.add_column(task.removeprefix("propensity_"), justify="right")
    for row, values in scores.items():
        cells = []
        for task in tasks:
            score, error = values.get(task, (None, None))
            cells.append("-" if score is None else f"{score:.4f}" + ("" if error is None else f"±{error:.4f}"))
        table.add_row(*row, *cells)
    return table
