"""Writes the page of a report."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from danceopd.report.charts import (
    _curve,
    _effort_chart,
    _error_charts,
    _health_chart,
    _loss_chart,
    _score_chart,
    tensor_uri,
)
from danceopd.report.names import _number, duration, label
from danceopd.report.tables import (
    _bar_title,
    _bars,
    _error_cells,
    _held_out_columns,
    _kind_columns,
    _main_columns,
    _table,
    _task_columns,
)
from danceopd.report.words import _warnings, headline, summary
from danceopd.support.files import write_atomic
from danceopd.support.pages import render
from danceopd.support.run_log import Log, read_log


def _uris(what: str, pictures: torch.Tensor, n: int) -> list[str]:
    """Returns n pictures [n, 3, H, W] uint8 as data URIs; a ValueError where there are not n."""
    if len(pictures) != n:
        raise ValueError(f"{what}: expected {n} pictures, got {len(pictures)}")
    return [tensor_uri(picture) for picture in pictures]


def _marks(what: str, marks: Sequence | None, n: int) -> list:
    """Returns n marks as a list, n times None where there are none; a ValueError for another number."""
    marks = [None] * n if marks is None else [m.item() if hasattr(m, "item") else m for m in marks]
    if len(marks) != n:
        raise ValueError(f"{what}: expected {n} marks, got {len(marks)}")
    return marks


def _grid(section: dict, texts: str, marks: str) -> dict | None:
    """Lays out a picture grid: section[texts] [N] down, the models of section["rows"] across.

    Raises ValueError where a model's pictures or section[marks] are not N.
    """
    lines, models = list(section.get(texts, ())), section.get("rows", {})
    n = len(lines)
    if not n or not models:
        return None
    uris = {name: _uris(name, pictures, n) for name, pictures in models.items()}
    marked = {name: _marks(name, section.get(marks, {}).get(name), n) for name in models}
    sources = _uris("sources", section["sources"], n) if section.get("sources") is not None else [None] * n
    rows = []
    for i in range(n):
        best = max((m[i] for m in marked.values() if m[i] is not None), default=None)
        cells = [
            {
                "uri": uris[name][i],
                "mark": marked[name][i],
                "best": marked[name][i] == best,
                "model": label(name),
            }
            for name in models
        ]
        rows.append({"text": lines[i], "source": sources[i], "cells": cells})
    return {"models": [label(name) for name in models], "rows": rows, "has_source": sources[0] is not None}


def _filmstrip(strips: list[dict]) -> list[dict]:
    """Lays out the frames of each rollout; a ValueError where states and sigmas differ in number."""
    return [
        {
            "prompt": strip["prompt"],
            "source": None if strip.get("source") is None else tensor_uri(strip["source"]),
            "frames": [
                {"uri": uri, "sigma": f"{float(sigma):.2f}", "queried": i == strip.get("queried")}
                for i, (uri, sigma) in enumerate(
                    zip(
                        _uris("filmstrip", strip["states"], len(strip["sigmas"])),
                        strip["sigmas"],
                        strict=True,
                    )
                )
            ],
        }
        for strip in strips
    ]


def _yaml(config: dict) -> str:
    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _run_facts(results: dict, log: Log) -> list[tuple[str, str]]:
    """Lists name and value of what the run cost and where it ran, the machine's own entries last."""
    facts = []
    if results.get("seed") is not None:
        facts.append(("Seed", str(results["seed"])))
    if log.training:
        facts.append(("Updates", f"{log.training[-1]['step']:,}"))
    if (seconds := _number(results, "seconds")) is not None:
        facts.append(("Training time", duration(seconds)))
    if (evaluations := _number(results, "network_evaluations")) is not None:
        facts.append(("Network evaluations", f"{evaluations:,.0f}"))
    _, speed = _curve(log.training, "samples_per_second")
    if len(speed):
        facts.append(("Samples per second, median", f"{np.median(speed):.3g}"))
    for key, value in results.get("machine", {}).items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        facts.append((label(key), text))
    return facts


def render_report(run_name: str, results: dict, log: Log, pictures: dict) -> str:
    """Renders the page's HTML; a ValueError for pictures that do not match their prompts or are not uint8."""
    bars = _bars(results)
    return render(
        Path(__file__).with_name("report.html.j2"),
        run_name=run_name,
        headline=headline(results),
        summary=summary(results),
        student=label(results.get("student", "danceopd")),
        warnings=_warnings(results, log),
        main=_table(results, _main_columns(results)),
        bar_title=_bar_title(results),
        bar_text=" and ".join(dict.fromkeys(f"{100 * bar:g} %" for bar in bars.values())),
        tasks=_table(results, _task_columns()),
        kinds=_table(results, _kind_columns()),
        held_out=_table(results, _held_out_columns()),
        losses=_loss_chart(log),
        scores=_score_chart(log, results),
        effort=_effort_chart(log),
        health=_health_chart(log),
        errors=_error_cells(results),
        error_charts=_error_charts(results),
        error_samples=max((error["samples"] for error in (results.get("velocity_errors") or {}).values()), default=0),
        samples=pictures.get("samples"),
        t2i=_grid(pictures.get("t2i") or {}, "prompts", "correct"),
        edit=_grid(pictures.get("edit") or {}, "instructions", "scores"),
        filmstrip=_filmstrip(pictures.get("filmstrip") or []),
        config=_yaml(results["config"]) if results.get("config") else None,
        facts=_run_facts(results, log),
        next_table=itertools.count(1).__next__,
        next_figure=itertools.count(1).__next__,
    )


def write_report(run_dir: Path, results: dict, pictures: dict) -> Path:
    """Writes run_dir/report.html atomically; what is absent is left out of the page.

    Args:
        run_dir: The run's folder; the curves come from its log.jsonl, where there is one.
        results: The scored rows, the run's cost, machine, configuration and warnings.
        pictures: Uint8 tensors: "t2i" and "edit", grids of [N, 3, H, W] for each model; "filmstrip", a list of rollouts
            with states [S, 3, H, W]; of a model's run "samples", its newest grid as {"step", "uri", "width"}.

    Returns:
        The page's path.

    Raises:
        ValueError: Pictures do not match their prompts or are not uint8.
    """
    run_dir = Path(run_dir)
    html = render_report(run_dir.resolve().name, results, read_log(run_dir / "log.jsonl"), pictures)
    path = run_dir / "report.html"
    write_atomic(path, html.encode("utf-8"))
    return path
