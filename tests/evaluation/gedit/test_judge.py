"""The judge of edits: marks out of answers, a real server that behaves well and badly, a cache, a local model."""

import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen_image
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Server, answer, edits, good, picture, send
from PIL import Image

from danceopd.evaluation.gedit import judge as judge_module
from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE, EndpointJudge, _retry_after
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
from danceopd.evaluation.gedit.local_judge import LocalJudge
from danceopd.support.errors import UserError

KEY = "sk-very-secret-0123456789"


def judge_of(server: Server, **options) -> EndpointJudge:
    return EndpointJudge(server.url, "tiny", **{"parallel": 2, "timeout": 2.0, "backoff": 0.01, **options})


# ------------------------------------------------------------------------------------------------- reading answers


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


# ------------------------------------------------------------------------------------------------- a good server


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


# ------------------------------------------------------------------------------------------------- a bad one


def first_badly(*ways):
    """Each of the first requests gets its own bad answer, and all later ones good ones."""

    def behave(handler, body, count):
        ways[count](handler) if count < len(ways) else good(handler, body, count)

    return behave


def hang(handler):
    time.sleep(1.5)


def drip(handler):
    """A body that never ends, a byte at a time: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def truncated(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def huge(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(4096):  # 256 MiB, if anybody reads them
        handler.wfile.write(b"x" * 2**16)
    handler.close_connection = True


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda h: send(h, 500, {"error": {"message": "oops"}}), id="500"),
        pytest.param(lambda h: send(h, 503, b"<html>busy</html>"), id="503"),
        pytest.param(lambda h: send(h, 429, {"error": "slow down"}), id="429"),
        pytest.param(lambda h: send(h, 200, b"<html>not JSON</html>"), id="not-json"),
        pytest.param(lambda h: send(h, 200, {"choices": []}), id="no-choice"),
        pytest.param(lambda h: send(h, 200, [1, 2]), id="a-list"),
        pytest.param(hang, id="hang"),
        pytest.param(drip, id="drip"),
        pytest.param(truncated, id="truncated"),
        pytest.param(huge, id="huge"),
        pytest.param(lambda h: h.connection.close(), id="closed"),
        pytest.param(lambda h: answer(h, "I like it."), id="no-marks"),
        pytest.param(lambda h: answer(h, '{"score": [12, 3]}'), id="out-of-range"),
        pytest.param(lambda h: answer(h, None), id="no-content"),
    ],
)
def test_what_may_pass_is_tried_again(serve, tmp_path, bad):
    wanted = judge_edits(edits(1), judge_of(serve(good)), tmp_path / "good")
    server = serve(first_badly(bad, bad))
    began = time.monotonic()
    assert judge_edits(edits(1), judge_of(server, timeout=0.3, parallel=1), tmp_path / "bad")[0].pq == wanted[0].pq
    assert 4 <= len(server.requests) <= 5
    assert time.monotonic() - began < 5


def test_an_unreadable_answer_is_asked_for_again_in_other_words(serve, tmp_path):
    server = serve(first_badly(lambda h: answer(h, "Nice."), lambda h: answer(h, "Nice.")))
    judge_edits(edits(1), judge_of(server, parallel=1), tmp_path)
    texts = [body["messages"][0]["content"][-1]["text"] for _, _, body, _ in server.requests]
    assert [text.endswith("from 0 to 10.") for text in texts] == [False, False, True, True]
    judge_edits(edits(1), judge_of(server), tmp_path)
    assert len(server.requests) == 4  # kept under the question as it is asked first


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_waited_for(serve, tmp_path, dated):
    value = (lambda: formatdate(time.time() + 2, usegmt=True)) if dated else (lambda: "0.4")
    server = serve(first_badly(lambda h: send(h, 429, {}, [("Retry-After", value())])))
    judge_edits(edits(1), judge_of(server, parallel=1), tmp_path)
    times = [when for *_, when in server.requests]
    assert 0.35 < times[1] - times[0] < 3


def test_retry_after_is_a_number_of_seconds_or_a_date():
    assert _retry_after("1.5") == 1.5
    assert 50 < _retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    assert [_retry_after(value) for value in (None, "", "soon", "nan")] == [None] * 4


def test_a_wait_that_is_too_long_ends_it_and_says_so(serve, tmp_path):
    server = serve(lambda h, body, count: send(h, 429, {}, [("Retry-After", "3600")]))
    with pytest.raises(UserError, match="asks to wait 3600 s"):
        judge_edits(edits(4), judge_of(server), tmp_path)


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


def test_a_server_that_only_fails_is_given_up(serve, tmp_path):
    server = serve(lambda h, body, count: send(h, 500, {"error": {"message": "CUDA out of memory"}}))
    with pytest.raises(UserError, match="HTTP 500: CUDA out of memory"):
        judge_edits(edits(2), judge_of(server, tries=2), tmp_path)


@pytest.mark.parametrize(
    ("status", "said", "match"),
    [
        (401, "Incorrect API key provided", f"wants a key, and {KEY_VARIABLE} is not set"),
        (404, "The model `tiny` does not exist.", r"no model 'tiny', or is not the base address.*does not exist"),
        (301, "", "redirects elsewhere"),
    ],
)
def test_what_no_repetition_mends_ends_it_at_once(serve, tmp_path, status, said, match):
    other = serve(good)
    location = [("Location", other.url + "/chat/completions")]
    server = serve(lambda h, body, count: send(h, status, {"error": {"message": said}}, location))
    with pytest.raises(UserError, match=match):
        judge_edits(edits(50), judge_of(server), tmp_path)
    assert len(server.requests) <= 4
    assert not other.requests  # a key goes to no other place
    with pytest.raises(UserError, match=match):
        judge_of(server).check()


def test_an_address_that_is_none(serve):
    for url in ("localhost:8000/v1", "ftp://host/v1", "http:///v1", "file:///etc/passwd", "http://host/v1?key=1"):
        with pytest.raises(UserError, match="is not like http://localhost:8000/v1"):
            EndpointJudge(url, "tiny")
    with pytest.raises(UserError, match="no password") as caught:
        EndpointJudge(f"https://me:{KEY}@host/v1", "tiny")
    assert KEY not in str(caught.value)
    server = serve(good)
    server.close()
    with pytest.raises(UserError, match=r"no judge at .*is it running"):
        EndpointJudge(server.url, "tiny").check()


def test_the_key_is_in_no_error_and_no_file(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    said = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    for status in (401, 400, 500):
        server = serve(lambda h, body, count, status=status: send(h, status, said))
        with pytest.raises(UserError) as caught:
            judge_edits(edits(1), judge_of(server, tries=1), tmp_path)
        assert "***" in str(caught.value)
        assert KEY not in repr(caught.getrepr())
    echo = serve(lambda h, body, count: answer(h, json.dumps({"score": [1, 2], "reasoning": h.headers["User-Agent"]})))
    judge_edits(edits(1), judge_of(echo), tmp_path)
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*.json"))
    assert KEY not in repr(judge_of(echo)) + "".join(capfd.readouterr())
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\r\nX-Other: 1")
    with pytest.raises(UserError, match="holds a space") as caught:
        judge_of(echo)
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------------------------- limits


def test_the_budget_of_calls_ends_it_and_the_next_call_goes_on(serve, tmp_path):
    server = serve(good)
    with pytest.raises(UserError, match="budget is used up after 5 calls"):
        judge_edits(edits(6), judge_of(server, max_calls=5), tmp_path)
    assert len(server.requests) == 5
    with pytest.raises(UserError, match="budget"):
        judge_edits(edits(6), judge_of(server, max_calls=5), tmp_path)
    verdicts = judge_edits(edits(6), judge_of(server, max_calls=5), tmp_path)
    assert len(server.requests) == 12  # nothing was asked twice
    assert verdicts == judge_edits(edits(6), judge_of(serve(good)), tmp_path / "other")


def test_the_budget_of_tokens(serve, tmp_path):
    server = serve(good)
    with pytest.raises(UserError, match="budget is used up after 300 tokens"):
        judge_edits(edits(6), judge_of(server, max_tokens=300, parallel=1), tmp_path)
    assert len(server.requests) == 3


def test_the_rate_is_kept(serve, tmp_path):
    server = serve(good)
    judge_edits(edits(3), judge_of(server, per_minute=600, parallel=4), tmp_path)
    times = sorted(when for *_, when in server.requests)
    assert times[-1] - times[0] > 0.45  # five gaps of 0.1 s
    assert all(times[i + 3] - times[i] > 0.2 for i in range(3))


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
from danceopd.evaluation.gedit.endpoint import EndpointJudge, _retry_after
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


# ------------------------------------------------------------------------------------------------- a local model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERED = "score=[7,6]"


def save_judge(path, answering: bool) -> Path:
    """A tiny random Qwen2.5-VL of the real classes; answering: whatever it is asked, it gives one answer and ends."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # as in tiny_qwen_image: no picture needs the part that reads films
        Qwen2_5_VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    torch.manual_seed(0)
    tokenizer = tiny_qwen_image.tiny_tokenizer()
    model = tiny_qwen_image.tiny_text_encoder(tokenizer)
    if answering:  # each token is followed by the one that its own embedding, which nothing is added to, points at
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        said = tokenizer("\n" + ANSWERED + "<|im_end|>")["input_ids"]
        embeds = model.get_input_embeddings().weight.data
        head = torch.zeros_like(embeds)
        for token, following in pairwise(said):
            head[following] = 10 * torch.nn.functional.normalize(embeds[token], dim=0)
        model.lm_head.weight.data = head
    readers = {"image_processor": Qwen2VLImageProcessor(max_pixels=56 * 56), "tokenizer": tokenizer}
    if is_torchvision_available():
        readers["video_processor"] = Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(**readers, chat_template=TEMPLATE).save_pretrained(path)
    model.save_pretrained(path)
    return path


def test_a_local_model_judges_and_is_not_asked_twice(tmp_path):
    judge = LocalJudge(save_judge(tmp_path / "judge", answering=True), batch_size=2)
    assert [verdict.sc_marks for verdict in judge_edits(edits(3), judge, tmp_path / "cache")] == [(7, 6)] * 3
    again = LocalJudge(tmp_path / "judge")
    assert [verdict.pq for verdict in judge_edits(edits(3), again, tmp_path / "cache")] == [6] * 3
    assert "_model" not in vars(again)  # not even loaded


def test_a_local_model_answers_a_batch_as_it_answers_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "ANSWER_TOKENS", 8)
    judge = LocalJudge(save_judge(tmp_path, answering=False))
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((30, 60), (60, 30), (40, 40))
    ]
    questions = [
        Question("Is it good?", (noisy[0],)),
        Question("Is it good?", (noisy[1],)),
        Question("What is changed, and what is not?", (noisy[2], noisy[0])),
    ]
    together = judge(questions)
    assert together == [judge([question])[0] for question in questions]
    assert len(set(together)) == 3


def test_a_local_folder_of_no_use(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        LocalJudge(tmp_path / "nowhere")
    folder = save_judge(tmp_path / "judge", answering=False)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no safetensors"):
        LocalJudge(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        LocalJudge(folder)
