"""A judge behind an address: what passes is tried again, what does not ends it, and limits are kept."""

import json
import re
import time
from email.utils import formatdate

import pytest
from judge_server import KEY, answer, edits, first_badly, good, judge_of, send

from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE, EndpointJudge, _retry_after
from danceopd.evaluation.gedit.judge import Edit, judge_edits
from danceopd.support.errors import UserError


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
        (402, "This request requires more credits", "nothing left to spend .HTTP 402: .*more credits"),
        (
            429,
            {"message": "You exceeded your current quota", "code": "insufficient_quota"},
            "nothing left to spend .HTTP 429: You exceeded your current quota .insufficient_quota",
        ),
    ],
)
def test_what_no_repetition_mends_ends_it_at_once(serve, tmp_path, status, said, match):
    other = serve(good)
    location = [("Location", other.url + "/chat/completions")]
    error = said if isinstance(said, dict) else {"message": said}
    server = serve(lambda h, body, count: send(h, status, {"error": error}, location))
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


def refuse(handler, message, param=None):
    send(handler, 400, {"error": {"message": message, "type": "invalid_request_error", "param": param}})


def as_reasoning_models(handler, body, count):
    """Takes no max_tokens and no temperature, and names one of them at a time."""
    if "max_tokens" in body:
        refuse(handler, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens")
    elif "temperature" in body:
        refuse(handler, "'temperature' does not support 0 with this model. Only the default (1) is supported.")
    else:
        good(handler, body, count)


def without_any_limit(handler, body, count):
    for name in ("temperature", "max_completion_tokens", "max_tokens"):
        if name in body:
            return refuse(handler, f"Unknown field {name}")
    return good(handler, body, count)


@pytest.mark.parametrize(
    ("behave", "kept"), [(as_reasoning_models, {"max_completion_tokens"}), (without_any_limit, set())]
)
def test_what_a_server_takes_is_learnt_from_its_first_refusal(serve, tmp_path, behave, kept):
    server = serve(behave)
    verdicts = judge_edits(edits(3), judge_of(server, parallel=1, tries=1), tmp_path)
    assert not any(verdict.problem for verdict in verdicts)
    bodies = [body for _, _, body, _ in server.requests]
    learnt = 3 - len(kept)
    assert len(bodies) == 6 + learnt
    assert all(body.keys() - {"model", "messages"} == kept for body in bodies[learnt:])
    assert not any(verdict.problem for verdict in judge_edits(edits(9), judge_of(serve(behave), parallel=8), tmp_path))


def test_a_refusal_of_something_else_is_no_lesson(serve, tmp_path):
    server = serve(lambda h, body, count: refuse(h, "the picture is too large"))
    with pytest.raises(UserError, match=r"scored none of 1 edits.*the picture is too large"):
        judge_edits(edits(1), judge_of(server, parallel=1), tmp_path)
    assert len(server.requests) == 2


@pytest.mark.parametrize("with_version", [True, False])
def test_a_key_goes_into_the_header_that_the_server_reads(with_version, serve, tmp_path, monkeypatch):
    def behave(handler, body, count):
        if handler.headers.get("api-key") != KEY or ("api-version=2024-12-01" in handler.path) != with_version:
            send(handler, 401, {"error": {"message": "Access denied due to invalid subscription key."}})
        else:
            good(handler, body, count)

    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = serve(behave)
    url = server.url + ("?api-version=2024-12-01" if with_version else "")
    judge = EndpointJudge(url, "tiny", parallel=1, backoff=0.01)
    assert not any(verdict.problem for verdict in judge_edits(edits(2), judge, tmp_path))
    assert len(server.requests) == 4 + (not with_version)
    assert server.requests[-1][0] == "/v1/chat/completions" + ("?api-version=2024-12-01" if with_version else "")
    assert not any("Authorization" in headers and "api-key" in headers for _, headers, *_ in server.requests)


def one_of(index, way):
    """Answers well, but for the question about one instruction."""

    def behave(handler, body, count):
        asked = f"instruction {index}\n" in body["messages"][0]["content"][-1]["text"]
        way(handler) if asked else good(handler, body, count)

    return behave


def completion(message, reason="stop"):
    return {"choices": [{"message": message, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (completion({"content": None, "refusal": "I can't help with that."}), "refused: I can't help with that."),
        (completion({"content": None}, "content_filter"), "no answer, it ended by content_filter"),
        (completion({"content": ""}, "length"), "no answer, it ended by length"),
        (completion({"content": "\ud83d I cannot say"}), r"cannot be read: '\? I cannot say'"),
        (completion({"content": [{"type": "text", "text": 5}, 7, {"text": None}]}), "cannot be read: ''"),
        (completion({"content": 12}), "cannot be read: ''"),
        ({"choices": [{"message": 3}]}, "no chat completion"),
        ({"choices": {}}, "no chat completion"),
        (completion({"content": f"my key is {KEY}"}), r"cannot be read: 'my key is \*\*\*'"),
        (completion({"content": None, "refusal": f"{KEY}?"}), r"refused: \*\*\*\?"),
    ],
)
def test_an_odd_answer_is_that_question_s_alone_and_its_reason_is_kept(reply, problem, serve, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = serve(one_of(1, lambda handler: send(handler, 200, reply)))
    verdicts = judge_edits(edits(3), judge_of(server, tries=2), tmp_path)
    assert [bool(verdict.problem) for verdict in verdicts] == [False, True, False]
    assert re.search(problem, verdicts[1].problem), verdicts[1].problem
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ['\ud83d {"score": [5, 6]}', {"score": [5, 6]}, [{"text": '{"score": [5, 6]}'}]])
def test_marks_in_an_odd_answer_are_read_and_kept(content, serve, tmp_path):
    server = serve(lambda handler, body, count: send(handler, 200, completion({"content": content})))
    verdicts = [judge_edits(edits(1), judge_of(server), tmp_path) for _ in range(2)]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][0].sc_marks == (5, 6)
    assert len(server.requests) == 2


def test_an_answer_in_pieces_is_put_together(serve, tmp_path):
    pieces = [{"delta": {"role": "assistant"}}, {"delta": {"content": '{"score": [3'}}, {"delta": {"content": ", 4]}"}}]
    lines = [json.dumps({"choices": [piece]}) for piece in pieces]
    lines += [json.dumps({"choices": [], "usage": {"total_tokens": 30}}), "[DONE]"]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    judge = judge_of(serve(lambda handler, asked, count: send(handler, 200, body)))
    assert judge_edits(edits(1), judge, tmp_path)[0].sc_marks == (3, 4)
    assert judge.tokens == 60


def test_refusals_of_many_pictures_end_nothing_once_one_has_a_score(serve, tmp_path):
    def behave(handler, body, count):
        text = body["messages"][0]["content"][-1]["text"]
        if "instruction 0\n" in text or "instruction" not in text:
            good(handler, body, count)
        else:
            send(handler, 400, {"error": {"message": "content policy", "code": "content_filter"}})

    verdicts = judge_edits(edits(12), judge_of(serve(behave), parallel=1), tmp_path)
    assert [bool(verdict.problem) for verdict in verdicts] == [False] + 11 * [True]


def test_a_picture_that_cannot_be_read_ends_nothing(serve, tmp_path):
    def broken():
        raise UserError("edit.png: cut off; make it again")

    asked = edits(3)
    asked[1] = Edit("instruction 1", broken)
    verdicts = judge_edits(asked, judge_of(serve(good)), tmp_path)
    assert [verdict.problem for verdict in verdicts] == [None, "edit.png: cut off; make it again", None]


def test_milliseconds_to_wait_are_waited(serve, tmp_path):
    server = serve(first_badly(lambda h: send(h, 429, {}, [("retry-after-ms", "400"), ("Retry-After", "60")])))
    judge_edits(edits(1), judge_of(server, parallel=1), tmp_path)
    times = [when for *_, when in server.requests]
    assert 0.35 < times[1] - times[0] < 3
