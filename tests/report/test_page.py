"""The report of a run: the page stands alone, escapes what users wrote, and prints the figures given."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from danceopd.report.charts import smooth
from danceopd.report.names import KINDS, TASKS, percent
from danceopd.report.page import write_report
from danceopd.report.tables import format_markdown, format_table
from danceopd.support.run_log import read_log

SCORES = {
    "base": (0.312, 1.25),
    "source_t2i": (0.880, 0.41),
    "source_edit": (0.402, 7.60),
    "weight_merge": (0.521, 2.07),
    "danceopd": (0.861, 7.48),
}


def make_row(name, overall, average):
    kinds = {kind: round(average * (0.9 + 0.03 * i), 3) for i, kind in enumerate(KINDS)}
    tasks = {task: round(min(1.0, overall * (1.08 - 0.03 * i)), 4) for i, task in enumerate(TASKS)}
    pairs = ("two_object", "colors", "position", "color_attr")
    held_t2i = {task: 0.9 * tasks[task] for task in pairs} | {
        "overall": 0.9 * overall,
        "standard_error": 0.021,
    }
    held_edit = {kind: 0.9 * value for kind, value in kinds.items()} | {"average": 0.9 * average}
    return {
        "name": name,
        "geneval": {"overall": overall, "standard_error": 0.012, "held_out": held_t2i} | tasks,
        "gedit": {"average": average, "standard_error": 0.14, "held_out": held_edit} | kinds,
    }


def make_results(**changes):
    return {
        "rows": [make_row(name, *scores) for name, scores in SCORES.items()],
        "seconds": 1234.0,
        "network_evaluations": 5_120_000,
        "machine": {"cpu": "Example CPU", "cores": 2, "memory_gib": 15.6, "torch": "2.9", "device": "cpu"},
        "config": {"seed": 0, "rollout": {"steps": 16}, "query": {"distribution": "beta", "a": 5, "b": 2}},
        "seed": 0,
        "warnings": [],
        "bars": {"t2i": 0.95, "edit": 0.95},
    } | changes


def make_records(steps=120):
    records = []
    for step in range(1, steps + 1):
        loss = 0.05 + math.exp(-step / 20) * (1 + 0.3 * math.sin(9 * step))
        records.append(
            {
                "step": step,
                "loss": loss,
                "loss_by_capability": {"t2i": 0.8 * loss, "edit": 1.2 * loss},
                "gradient_norm": 0.4,
                "learning_rate": 1e-3,
                "samples_per_second": 210.0 + step % 7,
                "network_evaluations": 4000 * step,
                "seconds": 0.5 * step,
            }
        )
        if step % 20 == 0:
            ready = 1 - math.exp(-step / 30)
            scores = {"geneval_overall": 0.87 * ready, "gedit_average": 7.5 * ready}
            records.append({"step": step, "network_evaluations": 4000 * step, "evaluation": scores})
            ratio = {str(sigma): 1 + 0.1 * sigma / step for sigma in (0.25, 0.5, 0.75)}
            health = {"velocity_norm_ratio": ratio, "state_norm_ratio": ratio}
            records.append({"step": step, "health": health})
    return records


def make_pictures(n=3, states=17, models=("base", "danceopd")):
    generator = torch.Generator().manual_seed(0)

    def pictures(count):
        return torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8)

    return {
        "t2i": {
            "prompts": [f"a red car, number {i}" for i in range(n)],
            "rows": {name: pictures(n) for name in models},
            "correct": {name: [True, False, True][:n] for name in models},
        },
        "edit": {
            "instructions": [f"remove dog {i}" for i in range(n)],
            "sources": pictures(n),
            "rows": {name: pictures(n) for name in models},
            "scores": {name: [9.5, 0.0, 4.2][:n] for name in models},
        },
        "filmstrip": [
            {
                "prompt": "two cats",
                "sigmas": [1 - i / (states - 1) for i in range(states)],
                "states": pictures(states),
                "queried": 12,
                "source": pictures(1)[0],
            }
        ],
    }


def write_log(run_dir, records, tail=""):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "log.jsonl").write_text(lines + tail, "utf-8")


def write_page(run_dir, results=None, pictures=None):
    path = write_report(run_dir, make_results() if results is None else results, pictures or {})
    assert path == run_dir / "report.html"
    return path.read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")


class Tags(HTMLParser):
    """Collects the start tags, and checks that every tag that needs closing is closed in order."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "path", "use", "rect"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_full_page_opens_offline(tmp_path):
    write_log(tmp_path, make_records())
    page = write_page(tmp_path, pictures=make_pictures())
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for _, attributes in tags if "src" in attributes]
    assert len(sources) == 3 * 2 + 3 * (1 + 2) + 17 + 1
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert "url(http" not in page
    assert "@import" not in page


def test_ids_of_the_charts_are_unique_and_their_references_resolve(tmp_path):
    write_log(tmp_path, make_records())
    page = write_page(tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert set(references) <= set(ids)


def test_user_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert('x')</script>"
    pictures = make_pictures()
    pictures["t2i"]["prompts"][0] = evil
    pictures["edit"]["instructions"][0] = evil
    pictures["filmstrip"][0]["prompt"] = evil
    results = make_results(
        config={evil: evil},
        warnings=[evil],
        machine={evil: evil},
        rows=[make_row(evil, 0.5, 5.0)],
        student=evil,
    )
    loss = {"loss": 1.0, "loss_by_capability": {evil: 1.0, "$x_y$": 2.0}}
    write_log(tmp_path, [{"step": step, **loss} for step in (1, 2)] + [{"step": 2, "warning": evil + "2"}])
    page = write_page(tmp_path, results, pictures)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "$x y$" in page


def test_summary_and_tables_hold_the_figures(tmp_path):
    page = write_page(tmp_path)
    text = re.sub(r"<[^>]+>", "", page)
    for figure in ("0.861", "97.8 %", "0.880", "7.48", "98.4 %", "7.60", "1,234 s", "20.6 min", "5,120,000"):
        assert figure in text
    assert "0.861 ± 0.012" in text
    for title in (*TASKS.values(), *KINDS.values(), "Weight merge", "held-out"):
        assert title in text
    numbers = [int(n) for n in re.findall(r"Table (\d+)\.", text)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_best_value_is_bold_and_ties_as_printed_share_it(tmp_path):
    rows = [make_row("base", 0.8004, 3.0), make_row("danceopd", 0.8001, 7.0)]
    page = write_page(tmp_path, make_results(rows=rows))
    assert page.count("<td><b>0.800</b>") == 2 * page.count("<th>Overall</th>")
    assert "<td><b>7.00</b>" in page
    assert "<b>3.00</b>" not in page


def test_only_rows_that_reach_both_bars_are_ticked(tmp_path):
    page = write_page(tmp_path)
    assert page.count('title="reached">✓') == 1
    missed = write_page(tmp_path, make_results(bars={"t2i": 0.99, "edit": 0.95}))
    assert 'title="reached">✓' not in missed
    assert "99 %" in missed


def test_a_share_below_the_bar_is_never_printed_as_the_bar():
    assert percent(0.94999) == "94.9 %"
    assert percent(0.95) == "95.0 %"
    assert percent(0.29) == "29.0 %"
    assert percent(1.0) == "100.0 %"


def test_missing_keys_print_a_dash(tmp_path):
    partial = {"name": "danceopd", "geneval": {"overall": 0.5, "colors": float("nan")}, "gedit": {}}
    page = write_page(tmp_path, make_results(rows=[make_row("source_t2i", 0.8, 0.4), partial]))
    assert "<td>–</td>" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    assert "62.5 %" in page


def test_missing_sections_are_skipped(tmp_path):
    page = write_page(tmp_path, {"rows": []})
    Tags(page)
    assert "<svg" not in page
    assert "<img" not in page
    for absent in ("<details", "Warnings", ">Results<", ">Training<", ">Pictures<", ">Run<"):
        assert absent not in page
    full = make_pictures()
    for name, prefix in (("t2i", ">Prompt<"), ("edit", ">Instruction<"), ("filmstrip", "<small>queried")):
        assert prefix in write_page(tmp_path, pictures={name: full[name]})
        assert prefix not in write_page(tmp_path, pictures={k: v for k, v in full.items() if k != name})


def test_warnings_come_from_results_and_log_and_repeats_are_one_line(tmp_path):
    write_log(tmp_path, [{"step": s, "warning": "the loss is not finite"} for s in (10, 20, 30)])
    page = write_page(tmp_path, make_results(warnings=["few prompts"]))
    assert "<li>few prompts</li>" in page
    assert "<li>Steps 10 to 30, 3 times: the loss is not finite</li>" in page


def test_cut_off_last_line_is_left_out_in_silence(tmp_path):
    write_log(tmp_path, make_records(40), tail='{"step": 41, "lo')
    assert read_log(tmp_path / "log.jsonl").training[-1]["step"] == 40
    cut_off = write_page(tmp_path)
    write_log(tmp_path, make_records(40))
    assert cut_off == write_page(tmp_path)


def test_damaged_line_in_the_middle_is_reported(tmp_path):
    write_log(tmp_path, make_records(5), tail='{"step": 6, "loss\n{"step": 7, "loss": 1.0}\n')
    log = read_log(tmp_path / "log.jsonl")
    assert (log.unreadable, [r["step"] for r in log.training]) == (1, [1, 2, 3, 4, 5, 7])
    assert "one line that cannot be read" in write_page(tmp_path)


def test_resumed_run_replaces_the_steps_it_did_again(tmp_path):
    first = [{"step": step, "loss": 1.0} for step in range(1, 9)]
    again = [{"step": step, "loss": 2.0} for step in range(5, 7)]
    write_log(tmp_path, first + again)
    training = read_log(tmp_path / "log.jsonl").training
    assert [(r["step"], r["loss"]) for r in training] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_losses_of_any_value_are_drawn(tmp_path, value):
    write_log(tmp_path, [{"step": 1, "loss": 100.0}, {"step": 2, "loss": value}, {"step": 3, "loss": 1.0}])
    assert "<svg" in write_page(tmp_path)


def test_smooth_keeps_a_constant_and_short_curves():
    torch.testing.assert_close(torch.tensor(smooth(np.full(500, 3.0))), torch.full((500,), 3.0, dtype=torch.float64))
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


@pytest.mark.parametrize("change", ["few", "float", "grey", "marks", "sigmas"])
def test_pictures_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, change):
    pictures = make_pictures()
    rows = pictures["t2i"]["rows"]
    if change == "few":
        rows["base"] = rows["base"][:2]
    elif change == "float":
        rows["base"] = rows["base"].float()
    elif change == "grey":
        rows["base"] = rows["base"][:, :1]
    elif change == "marks":
        pictures["t2i"]["correct"]["base"] = [True]
    else:
        pictures["filmstrip"][0]["sigmas"].pop()
    with pytest.raises(ValueError, match="expected"):
        write_report(tmp_path, make_results(), pictures)
    assert list(tmp_path.iterdir()) == []


def test_grid_frames_and_the_queried_state(tmp_path):
    page = write_page(tmp_path, pictures=make_pictures())
    assert page.count('class="frame right"') == 4
    assert page.count('class="frame wrong"') == 2
    assert page.count('class="queried"') == 1
    assert re.search(r'class="queried"><img[^>]*>0\.25<small>queried', page)
    assert "<b>9.5</b>" in page


def test_marks_may_be_tensors_or_absent(tmp_path):
    pictures = make_pictures()
    pictures["t2i"]["correct"] = {"base": torch.tensor([True, False, False])}
    page = write_page(tmp_path, pictures=pictures)
    assert page.count('class="frame right"') == 1
    assert page.count('class="frame"') == 3


def test_format_table_is_aligned_and_holds_the_figures():
    lines = format_table(make_results()).split("\n")
    assert len(lines) == 2 + len(SCORES)
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[-1].split()) == "danceopd 0.861 ± 0.012 97.8 % 7.48 ± 0.14 98.4 % yes"
    assert lines[2].endswith("no")


def test_format_markdown_has_one_width_and_bold_best():
    lines = format_markdown(make_results()).split("\n")
    assert {line.count("|") for line in lines} == {7}
    assert lines[-1] == "| DanceOPD | 0.861 ± 0.012 | 97.8 % | 7.48 ± 0.14 | 98.4 % | yes |"
    assert "| **0.880** ± 0.012 |" in lines[3]
    assert "**7.60** ± 0.14" in lines[4]


def test_tables_of_a_lone_row_without_sources():
    results = {"rows": [{"name": "danceopd", "geneval": {"overall": 0.5}}]}
    assert format_table(results).split("\n")[-1].split() == ["danceopd", "0.500", "–", "–", "–", "no"]
    assert format_markdown(results).split("\n")[-1] == "| DanceOPD | 0.500 | – | – | – | no |"


def test_report_is_the_same_for_the_same_run(tmp_path):
    write_log(tmp_path, make_records(40))
    assert write_page(tmp_path, pictures=make_pictures()) == write_page(tmp_path, pictures=make_pictures())
