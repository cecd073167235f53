"""Judging edits: the questions, the marks read from answers, and answers that are kept."""

import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import KEY, answer, edits, first_badly, good, judge_of, picture, send
from PIL import Image

from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE, EndpointJudge
from danceopd.evaluation.gedit.judge import (
    Edit,
    Question,
    as_shown,
    cache_file,
    judge_edits,
    overall,
    questions_of,
    read_marks,
)
from danceopd.support.errors import UserError


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ('{"score": [7, 9], "reasoning": "fine"}', (7, 9)),
        ('```json\n{"score": [7.5, 9], "reasoning": "fine"}\n```', (7.5, 9)),
        ('Sure! {"a": {"b": 1}} and so:\n{"reasoning": "x", "score": [0, 10]} Done.', (0, 10)),
        ('{"score": [1, 2]}\nNo, I correct this: {"score": [3, 4]}', (3, 4)),
        ('{"score": [3, 4], "reasoning": "I would not say \\"score\\": [1, 2]"}', (3, 4)),
        ("{'score': ['7', \"9/10\"], 'reasoning': 'it is fine'}", (7, 9)),
        ('{"score": [7, 9], "reasoning": "cut off in the mid', (7, 9)),
        ("Score: [4, 5]", (4, 5)),
        ('{"score": [7, 9', None),
        ('{"score": [7]}', None),
        ('{"score": [7, 8, 9]}', None),
        ('{"score": 7}', None),
        ('{"score": [7, 11]}', None),
        ('{"score": [-1, 5]}', None),
        ('{"score": [NaN, 5]}', None),
        ('{"score": [true, 5]}', None),
        ('{"score": ["good", "bad"]}', None),
        ("I cannot judge pictures of people.", None),
        ("", None),
        ("[[" * 50_000 + '{"a":' * 50_000, None),
    ],
)
def test_marks_are_read_or_refused(text, marks):
    assert read_marks(text) == marks


@given(
    st.lists(st.integers(0, 100).map(lambda tenths: tenths / 10), min_size=2, max_size=2),
    st.text(max_size=40),
    st.text(alphabet="abc \n`}", max_size=20),
)
def test_any_whole_object_is_read_whatever_is_around_it(marks, reasoning, around):
    text = around + json.dumps({"score": marks, "reasoning": reasoning}) + around
    assert read_marks(text) == tuple(marks)


@given(st.floats(0, 10), st.floats(0, 10))
def test_overall_is_the_geometric_mean(sc, pq):
    assert min(sc, pq) - 1e-9 <= overall(sc, pq) <= max(sc, pq) + 1e-9
    assert overall(sc, pq) == overall(pq, sc) == math.sqrt(sc * pq)


@pytest.mark.parametrize("size", [(1024, 1024), (1600, 900), (300, 700), (5000, 10)])
def test_the_judge_sees_pictures_of_one_area_and_their_own_shape(size):
    shown = as_shown(Image.new("RGBA", size))
    assert shown.mode == "RGB"
    assert shown.width * shown.height == pytest.approx(512 * 512, rel=0.1)
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.1)


def test_every_edit_gets_both_questions_and_the_smaller_of_two_marks(serve, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = serve(good)
    verdicts = judge_edits(edits(3), judge_of(server), tmp_path)
    assert len(server.requests) == 6
    for verdict in verdicts:
        assert verdict.problem is None
        assert (verdict.sc, verdict.pq) == (min(verdict.sc_marks), min(verdict.pq_marks))
        assert (verdict.sc_marks[1], verdict.pq_marks[1]) == (8, 9)  # two pictures for SC, one for PQ
    path, headers, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("tiny", 0)
    shown = {}
    for _, _, body, _ in server.requests:
        *parts, text = body["messages"][0]["content"]
        pictures = [part["image_url"]["url"].removeprefix("data:image/png;base64,") for part in parts]
        shown[text["text"]] = [Image.open(io.BytesIO(base64.b64decode(data))) for data in pictures]
    sc, pq = questions_of("instruction 1", picture(1), picture(1001))
    for question in (sc, pq):
        assert len(shown[question.text]) == len(question.pictures)
    for sent, meant in zip(shown[sc.text], sc.pictures, strict=True):
        assert np.array_equal(sent, meant)


def test_a_rerun_costs_nothing_and_another_picture_question_or_judge_is_asked(serve, tmp_path):
    server = serve(good)
    first = judge_edits(edits(3), judge_of(server), tmp_path)
    again = judge_edits(edits(3), judge_of(server, max_calls=1), tmp_path)
    assert again == first
    assert len(server.requests) == 6
    more = [*edits(3), Edit("instruction 0", lambda: (picture(5), picture(1000)))]  # another source, the same edit
    judge_edits(more, judge_of(server), tmp_path)
    assert len(server.requests) == 7  # PQ does not see the source
    judge_edits(edits(1), EndpointJudge(server.url, "other"), tmp_path)
    assert len(server.requests) == 9


def test_a_damaged_answer_in_the_cache_is_asked_again(serve, tmp_path):
    server = serve(good)
    first = judge_edits(edits(1), judge_of(server), tmp_path)
    for file, data in zip(sorted(tmp_path.glob("*/*.json")), (b"", b'{"answer": [1]}'), strict=True):
        file.write_bytes(data)
    assert judge_edits(edits(1), judge_of(server), tmp_path) == first
    assert len(server.requests) == 4


@given(st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_files_of_the_cache_are_of_the_pixels_and_the_shape(a, b, turned):
    one = Question("text", (picture(a, (4, 6)),))
    two = Question("text", (picture(b, (6, 4) if turned else (4, 6)),))
    folder = Path("cache")
    assert (cache_file(folder, "j", one) == cache_file(folder, "j", two)) == (a == b and not turned)
    assert cache_file(folder, "j", one) != cache_file(folder, "jt", Question("ext", one.pictures))


def test_an_unreadable_answer_is_asked_for_again_in_other_words(serve, tmp_path):
    server = serve(first_badly(lambda h: answer(h, "Nice."), lambda h: answer(h, "Nice.")))
    judge_edits(edits(1), judge_of(server, parallel=1), tmp_path)
    texts = [body["messages"][0]["content"][-1]["text"] for _, _, body, _ in server.requests]
    assert [text.endswith("from 0 to 10.") for text in texts] == [False, False, True, True]
    judge_edits(edits(1), judge_of(server), tmp_path)
    assert len(server.requests) == 4  # kept under the question as it is asked first


def test_one_edit_that_is_refused_leaves_the_others_their_scores(serve, tmp_path):
    def behave(handler, body, count):
        if "instruction 1" in body["messages"][0]["content"][-1]["text"]:
            send(handler, 400, {"error": {"message": "content policy"}})
        else:
            good(handler, body, count)

    server = serve(behave)
    verdicts = judge_edits(edits(3), judge_of(server), tmp_path)
    assert [bool(verdict.problem) for verdict in verdicts] == [False, True, False]
    assert "400" in verdicts[1].problem
    assert "content policy" in verdicts[1].problem


def test_a_judge_that_never_gives_marks_is_given_up_soon(serve, tmp_path):
    server = serve(lambda h, body, count: answer(h, "Lovely!"))
    with pytest.raises(UserError, match=r"5 edits in a row.*cannot be read: 'Lovely!'"):
        judge_edits(edits(200), judge_of(server), tmp_path)
    assert len(server.requests) < 100
    with pytest.raises(UserError, match="none of 2 edits"):
        judge_edits(edits(2), judge_of(server), tmp_path)


def test_many_questions_are_asked_at_a_time(serve, tmp_path):
    waiting, most, lock = 0, 0, threading.Lock()

    def behave(handler, body, count):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        time.sleep(0.05)
        with lock:
            waiting -= 1
        good(handler, body, count)

    judge_edits(edits(6), judge_of(serve(behave), parallel=3), tmp_path)
    assert most == 3


KILLED = """
import sys
from pathlib import Path
from judge_server import SMALL, edits
from danceopd.evaluation.gedit import judge
from danceopd.evaluation.gedit.endpoint import EndpointJudge
from danceopd.evaluation.gedit.judge import judge_edits
judge.SHOWN_AREA = SMALL
judge_edits(edits(8), EndpointJudge(sys.argv[1], "tiny", parallel=2), Path(sys.argv[2]))
"""


def test_an_evaluation_that_is_killed_goes_on_from_its_answers(serve, tmp_path):
    enough = threading.Event()

    def behave(handler, body, count):
        if count >= 7:
            enough.set()
            time.sleep(1)
        good(handler, body, count)

    server = serve(behave)
    paths = [str(Path(__file__).parents[2] / "making"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(tmp_path)], env=environment)
    assert enough.wait(120)
    process.kill()
    process.wait()
    kept = len(list(tmp_path.glob("*/*.json")))
    assert 5 <= kept <= 7
    asked = len(server.requests)
    other = serve(good)
    same_judge = judge_of(other)
    same_judge.name = judge_of(server).name  # the address is a part of it
    verdicts = judge_edits(edits(8), same_judge, tmp_path)
    assert len(other.requests) == 16 - kept
    assert asked - kept <= 2  # what was on its way
    assert verdicts == judge_edits(edits(8), judge_of(serve(good)), tmp_path / "whole")
