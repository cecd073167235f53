"""GEdit by one command: averages by hand, comparisons, and runs that are killed."""

import base64
import csv
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gedit_runs import EDITING, SIZE
from hypothesis import given
from hypothesis import strategies as st
from judge_server import answer, good, send
from PIL import Image

from danceopd.cli.parser import main
from danceopd.evaluation.compare import compare, read_run
from danceopd.evaluation.gedit.benchmark import PAPER_KINDS, Row, read_benchmark
from danceopd.evaluation.gedit.draw import picture_file
from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE, EndpointJudge
from danceopd.evaluation.gedit.judge import Verdict
from danceopd.evaluation.gedit.score import evaluate_gedit, summarize


def test_averages_by_hand():
    marks = [("subject-add", True, 9, 4), ("subject-add", False, 4, 4), ("color_alter", True, 1, 9)]
    rows = [Row(str(i), kind, "en", "", inside, i) for i, (kind, inside, _, _) in enumerate(marks)]
    verdicts = [Verdict((sc, 10), (10, pq)) for _, _, sc, pq in marks]
    summary = summarize(rows, verdicts, ["subject-add", "color_alter"])["en"]
    assert summary["fullset"]["kinds"]["subject-add"] == {"n": 2, "sc": 6.5, "pq": 4, "o": 5}
    average = summary["fullset"]["average"]
    assert (average["n"], average["sc"], average["pq"], average["o"]) == (3, 3.75, 6.5, 4)
    assert average["standard_error"] == pytest.approx(0.5 * math.sqrt(2 / 2))
    assert summary["intersection"]["kinds"]["subject-add"] == {"n": 1, "sc": 9, "pq": 4, "o": 6}
    assert summary["intersection"]["average"]["o"] == 4.5
    without = summarize(rows, [*verdicts[:2], Verdict(problem="?")], ["subject-add", "color_alter"])["en"]["fullset"]
    assert without["average"] is None  # not an average of fewer kinds
    assert without["kinds"]["color_alter"] == {"n": 0, "sc": None, "pq": None, "o": None}


@given(st.lists(st.tuples(st.sampled_from(PAPER_KINDS), st.integers(0, 10), st.integers(0, 10)), min_size=1), st.data())
def test_averages_do_not_depend_on_the_order_and_each_kind_counts_once(marks, data):
    marks = [*marks, *((kind, 5, 5) for kind in PAPER_KINDS)]
    rows = [Row(str(i), kind, "en", "", True, i) for i, (kind, _, _) in enumerate(marks)]
    verdicts = [Verdict((sc, 10), (pq, 10)) for _, sc, pq in marks]
    one = summarize(rows, verdicts)["en"]
    order = data.draw(st.permutations(range(len(rows))))
    two = summarize([rows[i] for i in order], [verdicts[i] for i in order])["en"]
    assert one["fullset"] == one["intersection"]
    for part in ("sc", "pq", "o"):
        mean = statistics.fmean(one["fullset"]["kinds"][kind][part] for kind in PAPER_KINDS)
        assert one["fullset"]["average"][part] == pytest.approx(mean)
        assert two["fullset"]["average"][part] == pytest.approx(mean)
        assert 0 <= mean <= 10


@pytest.fixture
def drawn(root, tmp_path) -> Path:
    """A results folder where another tool drew `theirs`, every edit of English."""
    for row in read_benchmark(root / "benchmark").rows:
        path = tmp_path / "results" / "theirs" / "fullset" / row.kind / row.language / f"{row.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (row.index * 20, 0, 0)).save(path)
    return tmp_path / "results"


def command(root, output, *more) -> list[str]:
    return ["evaluate", "gedit", str(root / "benchmark"), "-o", str(output), "--device", "cpu", *more]


def test_one_command_edits_and_scores(root, tmp_path, serve, capsys):
    server = serve(good)
    model = ["--model", str(root / "model"), "--lora", str(root / "run" / "student"), "--dtype", "float32"]
    size = ["--resolution", str(SIZE), "--num-inference-steps", "1"]
    judge = ["--judge-url", server.url, "--judge-model", "some/judge"]
    assert main(command(root, tmp_path, *model, *size, *judge)) == 0
    assert "average" in capsys.readouterr().out
    assert len(server.requests) == 13  # one to see that the judge is there
    place = tmp_path / "scores" / "run" / "some_judge"
    results = json.loads((place / "results.json").read_text())
    assert results["scores"]["en"]["fullset"]["average"]["n"] == 6
    assert set(results["scores"]["en"]["fullset"]["kinds"]) == set(PAPER_KINDS)
    assert results["unscored"] == []
    # What the official script makes of the files that it reads: means of each kind's, then of the kinds.
    for subset, only in (("fullset", ("True", "False")), ("intersection", ("True",))):
        overall = []
        for kind in PAPER_KINDS:
            with open(place / f"run_{kind}_all_vie_score.csv") as file:
                rows = [row for row in csv.DictReader(file) if row["intersection_exist"] in only]
            scores = [(float(row["sementics_score"]), float(row["quality_score"])) for row in rows]
            if scores:
                overall.append(np.mean([math.sqrt(sc * pq) for sc, pq in scores]))
        average = results["scores"]["en"][subset]["average"]
        assert average is None or average["o"] == pytest.approx(np.mean(overall))
        assert (average is None) == (len(overall) < 6)
    # Again: nothing is drawn or asked.
    assert main(command(root, tmp_path, *model, *size, *judge)) == 0
    assert len(server.requests) == 13
    assert json.loads((place / "results.json").read_text()) == results
    # Other settings under the same name are refused, before anything is drawn.
    assert main(command(root, tmp_path, *model, *size, "--seed", "1")) == 2
    assert "made with other settings (seed)" in capsys.readouterr().err
    assert main(command(root, tmp_path, "--method", "run", *model[:2], *size)) == 2
    assert "(lora, dtype)" in capsys.readouterr().err


def test_pictures_of_another_tool_are_scored(root, drawn, serve, capsys):
    server = serve(good)
    judge = ["--method", "theirs", "--judge-url", server.url, "--judge-model", "j"]
    assert main(command(root, drawn, *judge)) == 0
    assert len(server.requests) == 12
    assert main(command(root, drawn, *judge, "--model", str(root / "model"))) == 2
    assert "made by another tool" in capsys.readouterr().err


def test_an_edit_without_a_score_is_said_and_left_out(root, drawn, serve, capsys):
    def behave(handler, body, count):
        if "make it red 4" in body["messages"][0]["content"][-1]["text"]:
            send(handler, 400, {"error": {"message": "not this one"}})
        else:
            good(handler, body, count)

    judge = ["--method", "theirs", "--judge-url", serve(behave).url, "--judge-model", "j"]
    assert main(command(root, drawn, *judge)) == 1
    said = capsys.readouterr()
    assert "no score: background_change/en/0004" in said.err
    assert "not this one" in said.err
    results = json.loads((drawn / "scores" / "theirs" / "j" / "results.json").read_text())
    assert [row["key"] for row in results["unscored"]] == ["0004"]
    assert results["scores"]["en"]["fullset"]["average"] is None


def test_two_methods_are_compared_by_their_keys(root, drawn, serve, capsys):
    """The darker an edit is, the higher are its marks; theirs grow brighter from row to row, ours are the other way."""

    def behave(handler, body, count):
        with Image.open(io.BytesIO(base64.b64decode(body["messages"][0]["content"][-2]["image_url"]["url"][22:]))) as p:
            mark = 10 - p.getpixel((0, 0))[0] / 25.5
        answer(handler, json.dumps({"score": [mark, 9]}))

    rows = read_benchmark(root / "benchmark").rows
    for row, other in zip(rows, reversed(rows), strict=True):
        place = picture_file(drawn / "ours", row)
        place.parent.mkdir(parents=True)
        shutil.copyfile(picture_file(drawn / "theirs", other), place)
    picture_file(drawn / "ours", rows[0]).rename(picture_file(drawn / "ours", rows[0]).with_suffix(".webp"))
    url = serve(behave).url
    for method in ("theirs", "ours"):
        assert main(command(root, drawn, "--method", method, "--judge-url", url, "--judge-model", "j")) == 0
    capsys.readouterr()
    page = drawn / "page.html"
    by_method = [str(drawn / "theirs"), str(drawn / "ours")]
    assert main(["compare", *by_method, "-o", str(page)]) == 0
    printed = capsys.readouterr().out
    first, second = (read_run(Path(name)) for name in by_method)
    assert [key for key, _ in first.pictures] == [f"{row.kind}/en/{row.key}" for row in rows]
    scores = json.loads((drawn / "scores" / "theirs" / "j" / "results.json").read_text())["scores"]["en"]["fullset"]
    assert first.scores()[0] == pytest.approx(scores["average"]["o"])
    compared = compare(first, second)
    assert compared.overall.mean == pytest.approx(0, abs=1e-9)  # the same pictures, at other places
    assert compared.prompts[0][1] == [("subject-add/en/0000", 0)]
    assert compared.prompts[0][0] == pytest.approx((10 - 200 / 25.5) - 9)
    assert "ours - theirs" in printed
    text = page.read_text()
    worse, better = text.index("Where ours is worse"), text.index("Where ours is better")
    assert worse < text.index("make it red 0", worse) < better
    assert text.count("<article>") == 6
    assert text.count("<img ") == 18  # with the sources
    assert "is not there" not in text
    assert "mean O" in text
    # By the judge's folder or its file; without the data set, without the sources.
    file = drawn / "scores" / "ours" / "j" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"judge": "another", "dataset": str(drawn / "gone")}))
    assert main(["compare", str(file.parent), by_method[0], "-o", str(page)]) == 0
    assert "warning: scored by different judges (ours another, theirs http" in capsys.readouterr().out
    assert page.read_text().count("<img ") == 12
    for change, said in (
        ({"benchmark": None}, "holds no scores of single pictures"),
        ({"rows": [{"key": "a"}]}, "lacks what is compared"),
        ({"rows": []}, "scores no edit"),
    ):
        file.write_text(json.dumps(results | change))
        assert main(["compare", by_method[0], str(file), "-o", str(page)]) == 2
        assert said in capsys.readouterr().err
    file.write_text(json.dumps(results)[:-9])
    assert main(["compare", *by_method, "-o", str(page)]) == 2
    assert "is damaged" in capsys.readouterr().err
    shutil.copytree(file.parent, file.parents[1] / "k")
    assert main(["compare", *by_method, "-o", str(page)]) == 2
    assert "several judges scored" in capsys.readouterr().err


def test_what_a_user_gets_wrong(root, drawn, serve, capsys, monkeypatch):
    server = serve(lambda h, body, count: send(h, 404, {"error": {"message": "no such model"}}))
    wants_key = serve(lambda h, body, count: send(h, 401, {"error": {"message": "who are you"}}))
    judge = ["--judge-url", server.url, "--judge-model", "j"]
    theirs = ["--method", "theirs", *judge]
    cases = [
        ([], "nothing to do"),
        (["--judge-url", server.url], "go together"),
        ([*judge, "--judge", "x", "--method", "theirs"], "give one judge"),
        (judge, "give --method"),
        ([*theirs, "--kinds", "colour"], "no kind 'colour'"),
        ([*theirs, "--kinds", "all"], "has no rows of material_alter"),
        ([*theirs, "--language", "cn"], "lacks 6 of 6 pictures, such as fullset/subject-add/cn/0001.png"),
        (["--model", str(root / "model"), "--max-sequence-length", "9999"], "max_sequence_length must be from 1 to"),
        ([*theirs[2:], "--method", "../theirs"], "is no name of a folder"),
        ([*theirs[2:], "--method", "scores"], "is no name of a folder"),
        ([*theirs, "--lora", "x"], "belong to a --model"),
        (["--model", str(root / "nowhere")], "there is no folder"),
        (["--model", str(root / "model"), "--lora", str(root / "benchmark")], "a LoRA folder holds one"),
        (["--model", str(root / "model"), "--judge", str(root / "nowhere")], "there is no folder"),
        (theirs, "no model 'j'"),
        (["--model", str(root / "model"), *judge], "no model 'j'"),  # before anything is drawn
        (["--method", "theirs", "--judge-url", wants_key.url, "--judge-model", "j"], f"{KEY_VARIABLE} is not set"),
    ]
    for more, said in cases:
        assert main(command(root, drawn, *more)) == 2
        assert said in capsys.readouterr().err
    assert not (drawn / "model" / "fullset").exists()
    (drawn / "dev").mkdir()
    (drawn / "dev" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert main(command(root, drawn, "--model", str(drawn / "dev"))) == 2
    assert "draws from text alone" in capsys.readouterr().err
    picture = picture_file(drawn / "theirs", read_benchmark(root / "benchmark").rows[2])
    picture.write_bytes(b"\x89PNG cut")
    fine = serve(good)
    assert main(command(root, drawn, "--method", "theirs", "--judge-url", fine.url, "--judge-model", "j")) == 1
    said = capsys.readouterr().err
    assert f"{picture}: " in said
    assert "left out 1 edit without a score; the same command asks again" in said


def test_evaluate_still_takes_a_checkpoint(capsys):
    assert main(["evaluate", "nowhere"]) == 2
    assert "nor an embedded network" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes(root, tmp_path, serve):
    """The command is killed while it draws, and torchrun's two ranks draw and ask the rest."""
    server = serve(good)
    model = ["--model", str(root / "model"), "--resolution", str(SIZE), "--num-inference-steps", "1"]
    judge = ["--judge-url", server.url, "--judge-model", "j", "--language", "en", "cn"]
    whole = evaluate_gedit(
        root / "benchmark",
        tmp_path / "whole",
        "model",
        model=root / "model",
        editing=EDITING,
        make_judge=lambda: EndpointJudge(server.url, "j"),
        languages=("en", "cn"),
        dtype=torch.bfloat16,
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = command(root, tmp_path / "parts", *model, *judge)
    process = subprocess.Popen([sys.executable, "-m", "danceopd", *arguments], env=environment)
    while len(list((tmp_path / "parts").rglob("*.png"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "parts").rglob("*.png"))) < 12
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, "-m", "danceopd", *arguments], env=environment, check=True, timeout=400)
    results = json.loads((tmp_path / "parts" / "scores" / "model" / "j" / "results.json").read_text())
    assert results["scores"] == whole["scores"]
    assert results["rows"] == whole["rows"]
