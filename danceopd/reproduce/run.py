"""Makes the runs of a table, several at once, each in a process of its own, and gathers them into results/<table>.json.

A run's folder holds its checkpoints while it goes and result.json once it is measured; a run that has one, there or
in the results file, is not made again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.reproduce.matrix import (
    ABLATIONS,
    DRAWN_EVALUATIONS,
    MINIATURE,
    SETTINGS,
    UNTRAINED,
    Budget,
    Run,
    override_lines,
    runs,
)
from danceopd.reproduce.measure import VALIDATION_SEED, measure, student, untrained
from danceopd.reproduce.report import write_report
from danceopd.reproduce.results import mean_error
from danceopd.support.bars import bar
from danceopd.support.devices import machine
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.paths import shipped_config
from danceopd.support.run_log import read_log
from danceopd.support.texts import parse_object, read_object
from danceopd.support.versions import commit
from danceopd.training.checkpoints import checkpoints
from danceopd.training.loop import Build, train
from danceopd.world.build import build

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Folders:
    """Where a reproduction reads and writes.

    Attributes:
        configs: Folder of the settings' files.
        work: Folder of the runs.
        results: Folder of what is kept.
    """

    configs: Path
    work: Path
    results: Path


def raw_config(run: Run, folders: Folders) -> tuple[dict, list[str]]:
    """Returns a run's configuration as plain values, and the overrides that make it the run's own.

    Raises UserError if the settings' files are not there.
    """
    path = shipped_config(folders.configs / run.config)
    if not path.is_file():
        raise UserError(f"no configuration at {path}; --configs FOLDER is the one with the settings' files")
    overrides = dict(run.overrides)
    if run.after:
        weights = str(folders.work / run.after / "student.safetensors")
        overrides |= {"student.init_from": weights, "sources.self.weights": weights}
    return yaml.safe_load(path.read_text(encoding="utf-8")), override_lines(overrides)


def config_of(run: Run, folders: Folders, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked configuration of a run, with more overrides."""
    raw, own = raw_config(run, folders)
    if run.overrides.get("method") == "joint":
        del raw["rollout"]["num_inference_steps"]  # the setting's, of which joint training reads nothing
    return parse_config(raw, [*own, *overrides], run.config)


def digest(run: Run, folders: Folders) -> str:
    """Names what a run computes: equal for equal configurations, wherever they lie."""
    raw, _ = raw_config(run, folders)
    text = json.dumps([raw, asdict(run)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_run(run: Run, folders: Folders) -> dict:
    """Trains and measures one run, going on where it stopped.

    Returns:
        {"seed", "digest", metrics, cost, "curve", "commit"}.
    """
    folder = folders.work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker of a killed parent may still be at it
        result = finished(run, folders)
        if result:
            return result
        if run.setting == "merge":
            from danceopd.reproduce import merging  # imports diffusers, which the other tables do without

            result = {"seed": run.seed, "digest": digest(run, folders), **merging.make(run, folder, folders.work)}
            result["commit"] = commit()
            write_atomic(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
            return result
        config = _with_data(run, config_of(run, folders, [f"training.output_dir={json.dumps(str(folder))}"]), folders)
        if run.row == UNTRAINED:
            result = {"digest": digest(run, folders), "rows": _untrained_rows(run.setting, config, folder)}
            write_atomic(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
            return result
        ours = digest(run, folders)
        other = _begun(folder) != ours  # what an earlier version or budget left there is not gone on with
        write_atomic(folder / "digest", ours.encode())
        train(config, _builder(run), overwrite=other)
        before = DRAWN_EVALUATIONS if run.row == "joint_samples" else 0
        log = read_log(folder / "log.jsonl")
        curve = [  # which begins where the pictures that a training draws itself have been paid for
            [before + r["network_evaluations"], r["evaluation"]["geneval_overall"], r["evaluation"]["gedit_average"]]
            for r in log.evaluations
        ]
        result = {
            "seed": run.seed,
            "digest": ours,
            **_measured(run, folder, config),
            "network_evaluations": log.training[-1]["network_evaluations"] + before,
            "updates": log.training[-1]["step"],
            "seconds": log.training[-1]["seconds"],
            "curve": curve,
            "commit": commit(),
        }
        write_atomic(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        for path in checkpoints(folder / "checkpoints"):
            shutil.rmtree(path)
    return result


def _with_data(run: Run, config: Config, folders: Folders) -> Config:
    """Names the prepared rows of a training on the miniature, which are made where they are not there."""
    if not run.on_miniature or (run.row == UNTRAINED and run.setting == "miniature"):
        return config
    from danceopd.reproduce import miniature, unseen  # import diffusers, which the other tables do without

    if run.setting == "unseen":
        return parse_config(config.to_dict(), unseen.overrides(folders.work, config), run.config)
    folder = folders.work / "miniature"
    drawn = run.row == "joint_samples"
    rows = miniature.drawn(folder, config) if drawn else miniature.prepared(folder, config.model)
    own = [f"capabilities.{name}.data.prepared={json.dumps(str(rows))}" for name in config.capabilities]
    return parse_config(config.to_dict(), own, run.config)


def _builder(run: Run) -> Build:
    """Returns what puts a training together."""
    if run.on_miniature:
        from danceopd.miniature.build import build as build_miniature

        return build_miniature
    return build


def _measured(run: Run, folder: Path, config: Config) -> dict[str, float]:
    """Measures the student of a finished run by its table's metrics."""
    seed = VALIDATION_SEED if run.setting.endswith("grid") else None
    if run.setting == "operators":
        from danceopd.reproduce import absorbing

        return absorbing.measure_run(folder, config, run.row)
    if run.setting == "unseen":
        from danceopd.reproduce import unseen

        return unseen.measure_run(folder, config)
    if run.on_miniature:
        from danceopd.reproduce import miniature

        return miniature.measure_run(folder, config, seed)
    return measure(run.setting, student(folder), config, seed)


def _begun(folder: Path) -> str | None:
    """Returns the digest of the run whose checkpoints a folder holds."""
    return (folder / "digest").read_text() if (folder / "digest").is_file() else None


def finished(run: Run, folders: Folders) -> dict | None:
    """Reads the result of a run made before, from its folder.

    None if there is none, or it was of another configuration.
    """
    try:
        result = parse_object((folders.work / run.name / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("digest") == digest(run, folders) else None


# Long: a third of it says what its arguments are.
def reproduce(settings: list[str], budget: Budget, folders: Folders, seeds: int, workers: int) -> list[Path]:
    """Makes every run of the tables that is not made yet, and writes the results after each.

    Args:
        settings: The tables.
        budget: Network evaluations of each run.
        folders: Where to.
        seeds: Trainings of each row.
        workers: Runs at a time.

    Returns:
        The files written.

    Raises:
        UserError: A run failed; its log is named.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint of each run at hand.
    """
    todo = [run for setting in settings for run in (*untrained_run(setting), *runs(setting, budget, seeds))]
    for needed in [run.after for run in todo if run.after]:
        if all(run.name != needed for run in todo):
            todo = [*[run for run in runs("A", budget, seeds) if run.name == needed], *todo]
    adopt(todo, folders)
    waiting = [run for run in todo if finished(run, folders) is None]
    for run in todo:
        student_is_needed = run.name in {r.after for r in waiting} and run not in waiting
        if student_is_needed and not (folders.work / run.name / "student.safetensors").exists():
            (folders.work / run.name / "result.json").unlink()
            waiting.insert(0, run)
    total = sum(run.evaluations for run in todo)
    done = total - sum(run.evaluations for run in waiting)
    shown = bar(total=total, initial=done, unit="evaluation", unit_scale=True, smoothing=0.02)
    if not waiting:
        print("every run is finished already; --again makes them anew", file=sys.stderr)
    for setting in settings:
        gather(setting, budget, folders, seeds)
    active: list[tuple[Run, subprocess.Popen]] = []
    try:
        while waiting or active:
            for run in [r for r in waiting if not r.after or (folders.work / r.after / "result.json").exists()]:
                if len(active) < workers:
                    waiting.remove(run)
                    active.append((run, _start(run, folders, workers)))
            time.sleep(POLL_SECONDS)
            shown.n = done + sum(_evaluations(run, folders) for run, _ in active)
            shown.set_postfix_str(", ".join(run.name for run, _ in active))
            for run, process in list(active):
                if process.poll() is None:
                    continue
                active.remove((run, process))
                if process.returncode:
                    raise UserError(f"the run {run.name} failed; its log is {folders.work / run.name / 'output.txt'}")
                done += run.evaluations
                if run.setting in settings:
                    gather(run.setting, budget, folders, seeds)
    finally:
        shown.close()
        for _, process in active:
            process.terminate()  # it ends after its update, with a checkpoint
        for _, process in active:
            process.wait()
    return write_report(folders.results)


def _start(run: Run, folders: Folders, workers: int) -> subprocess.Popen:
    folder = folders.work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}  # what the caller sets goes before
    order = {"run": asdict(run), "folders": {key: str(value) for key, value in asdict(folders).items()}}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "danceopd.reproduce.worker", json.dumps(order)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its workers
        )


def _evaluations(run: Run, folders: Folders) -> int:
    log = read_log(folders.work / run.name / "log.jsonl").training
    return min(log[-1]["network_evaluations"], run.evaluations) if log else 0


def adopt(todo: list[Run], folders: Folders) -> None:
    """Takes over results that the results files hold already, so that a finished run needs no folder."""
    for setting in {run.setting for run in todo}:
        table = _table(setting, folders)
        by_digest: dict[str, dict] = {}
        for row in table.get("rows", ()):
            for result in row.get("runs", ()):
                if "loras" in row and row["kind"] == "merge":  # one run made a line of each method
                    of_run = by_digest.setdefault(result["digest"], {"seed": result["seed"], "methods": {}})
                    of_run["digest"], of_run["methods"][row["method"]] = result["digest"], result
                else:
                    by_digest[result["digest"]] = result
        if "untrained" in table:
            rows = [row for row in table["rows"] if row["kind"] != "trained" and row["method"] != "before"]
            by_digest[table["untrained"]] = {"digest": table["untrained"], "rows": rows}
        for run in todo:
            if run.setting == setting and finished(run, folders) is None and digest(run, folders) in by_digest:
                target = folders.work / run.name / "result.json"
                write_atomic(target, (json.dumps(by_digest[digest(run, folders)], indent=1) + "\n").encode())


def _table(setting: str, folders: Folders) -> dict:
    """Returns the results file as it is, empty if there is none."""
    path = folders.results / f"{setting}.json"
    return read_object(path, "restore it, or remove it to gather it again") if path.exists() else {}


def gather(setting: str, budget: Budget, folders: Folders, seeds: int) -> None:
    """Writes results/<setting>.json from the runs that are finished."""
    without = [finished(run, folders) for run in untrained_run(setting)]
    rows = [row for result in without if result for row in result["rows"]]
    grouped: dict[str, list[tuple[Run, dict]]] = {}
    for run in runs(setting, budget, seeds):
        result = finished(run, folders)
        if result:
            grouped.setdefault(run.row, []).append((run, result))
    if setting == "F":
        before = [run for run in runs("A", budget, seeds) if run.row == "danceopd"]
        rows += _before_rows(before, folders)
    axes = {
        "ablations": {row: axis for axis, members in ABLATIONS.items() for row in members},
        "miniature_ablations": {"danceopd": "default"},
    }.get(setting, {})
    for row, members in grouped.items():
        if setting == "merge":
            rows += _merge_rows(members)
            continue
        made = _row(row, "trained", [result for _, result in members], members[0][0], axes.get(row))
        conditions = MINIATURE[row][0] if setting == "miniature" else ()
        rows += [{"method": row, "condition": condition, **made} for condition in conditions] or [made]
    table = {
        "setting": setting,
        "budget": {
            "name": budget.name,
            "network_evaluations": max(run.evaluations for run in runs(setting, budget, seeds)),
            "seeds": seeds,
        },
        "machine": machine(),
        "rows": rows,
    }
    if without and without[0]:
        table["untrained"] = without[0]["digest"]
    write_atomic(folders.results / f"{setting}.json", (json.dumps(table, indent=1) + "\n").encode())


def _merge_rows(members: list[tuple[Run, dict]]) -> list[dict]:
    """Makes the lines of one run of the merge benchmark: of a training, or of all merges that need none."""
    run, results = members[0][0], [result for _, result in members]
    method, loras = run.overrides["method"], {"loras": run.overrides["loras"]}
    if method != UNTRAINED:
        return [{**_row(run.row, "trained", results, run), "method": method, **loras}]
    rows = []
    for name in results[0]["methods"]:
        own = [result["methods"][name] for result in results]
        rows.append({**_row(name, "merge", own, None), **loras, "seeds": [result["seed"] for result in results]})
        named = [{key: result[key] for key in ("seed", "digest")} for result in results]
        rows[-1]["runs"] = [one | name for name, one in zip(named, own, strict=True)]
    return rows


def _row(name: str, kind: str, results: list[dict], run: Run | None, axis: str | None = None) -> dict:
    """Makes one line of a table: each metric's mean, standard error over the seeds (else over pictures) and values."""
    row = {"method": name, "kind": kind} | ({"axis": axis} if axis else {})
    row["seeds"] = [result["seed"] for result in results] if run else []
    plain = {
        "seed",
        "digest",
        "network_evaluations",
        "updates",
        "seconds",
        "curve",
        "commit",
        "chosen",
        "rank",
        "shares",
    }
    for metric in results[0]:
        if metric in plain or metric.endswith("_error"):
            continue
        values = [result[metric] for result in results]
        mean, error = mean_error(values)
        if error is None and not run:
            error = results[0].get(f"{metric}_error")
        row[metric] = {"mean": mean, "standard_error": error, "values": values}
    row |= {key: results[0][key] for key in ("chosen", "rank") if key in results[0]}
    if run:
        for key in ("network_evaluations", "updates", "seconds"):
            row[key] = statistics.fmean(result[key] for result in results)
        row["learning_rate"] = run.overrides["training.learning_rate"]
        row["overrides"] = run.overrides
        curves = [result["curve"] for result in results if result.get("curve")]
        if curves and len({len(curve) for curve in curves}) == 1:
            row["curve"] = torch.tensor(curves, dtype=torch.float64).mean(0).tolist()
        row["commit"] = ", ".join(sorted({result["commit"] for result in results}))
        row["runs"] = results
    return row


def untrained_run(setting: str) -> list[Run]:
    """Returns the one run that measures a table's base, sources and merges; none for tables without."""
    if setting in ("ablations", "grid", "miniature_grid", "miniature_ablations", "merge"):
        return []
    own = {"miniature": "miniature", "operators": "miniature_operators", "unseen": "miniature_unseen"}
    return [Run(setting, UNTRAINED, 0, f"{own.get(setting, f'setting_{setting.lower()}')}.yaml")]


def _untrained_rows(setting: str, config: Config, folder: Path) -> list[dict]:
    cost = {"network_evaluations": 0, "seconds": 0, "commit": commit()}
    if setting == "miniature":
        from danceopd.reproduce import miniature

        measured = miniature.untrained(config, VALIDATION_SEED, folder / "measured")
    elif setting == "operators":
        from danceopd.reproduce import absorbing

        measured = absorbing.untrained(config, folder / "measured")
    elif setting == "unseen":
        from danceopd.reproduce import unseen

        measured = unseen.untrained(config, folder / "measured")
    else:
        measured = untrained(setting, config)
    return [_row(name, kind, [metrics], None) | cost for name, kind, metrics in measured]


def _before_rows(before: list[Run], folders: Folders) -> list[dict]:
    """Measures setting A's students by setting F's metrics: what there was before the new capability."""
    results = []
    for run in before:
        path = folders.work / "F" / "before" / f"seed{run.seed}.json"
        if finished(run, folders) is None or not (folders.work / run.name / "student.safetensors").exists():
            continue
        if not path.exists():
            raw, overrides = raw_config(run, folders)
            metrics = measure("F", student(folders.work / run.name), parse_config(raw, overrides, run.config))
            write_atomic(path, json.dumps({"seed": run.seed, **metrics}).encode())
        results.append(read_object(path, "remove it, and it is made again"))
    if not results:
        return []
    row = _row("before", "source", results, None)
    return [row | {"seeds": [result["seed"] for result in results], "network_evaluations": 0, "seconds": 0}]


def chosen(settings: str) -> list[str]:
    """Returns the tables that an argument names; a UserError for an unknown one."""
    if settings == "all":
        return list(SETTINGS)
    if settings not in SETTINGS:
        raise UserError(f"no setting {settings!r}; there are {', '.join(SETTINGS)} and all")
    return [settings]
