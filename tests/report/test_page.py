"""The report of a run: the page stands alone, escapes what users wrote, and prints the figures given."""

import re
from html.parser import HTMLParser

import pytest
import torch
from browser import sticking_out
from report_results import make_records, make_results, make_row, write_log, write_page

from danceopd.report.names import KINDS, TASKS
from danceopd.report.page import write_report
from danceopd.report.words import headline
from danceopd.support.run_log import read_log


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


def test_the_page_begins_with_a_sentence_and_pictures_come_before_tables(tmp_path):
    write_log(tmp_path, make_records())
    page = write_page(tmp_path, pictures=make_pictures())
    (title,) = re.findall(r"<h1>(.*?)</h1>", page)
    assert title == "One model with 97.8 % of its source at drawing and 98.4 % of its source at editing"
    assert page.index('id="pictures"') < page.index('class="frame right"') < page.index('id="results"')
    assert page.index('id="results"') < page.index('id="training"') < page.index('id="run"')
    errors = {"t2i": {"closed": 0.5, "samples": 8}, "edit": {"closed": 0.25, "samples": 8}}
    said = headline({"velocity_errors": errors, "student": "danceopd"})
    assert said == "DanceOPD closed 50.0 % for t2i and 25.0 % for edit of the gap to its sources"


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_the_screen(tmp_path, width):
    write_page(tmp_path, pictures=make_pictures())
    assert sticking_out(tmp_path / "report.html", width) == []


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_losses_of_any_value_are_drawn(tmp_path, value):
    write_log(tmp_path, [{"step": 1, "loss": 100.0}, {"step": 2, "loss": value}, {"step": 3, "loss": 1.0}])
    assert "<svg" in write_page(tmp_path)


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


def test_report_is_the_same_for_the_same_run(tmp_path):
    write_log(tmp_path, make_records(40))
    assert write_page(tmp_path, pictures=make_pictures()) == write_page(tmp_path, pictures=make_pictures())
