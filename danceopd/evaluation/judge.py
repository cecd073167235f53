"""A vision-language model as the judge of edits, after VIEScore (arXiv 2312.14867).

SC (was the instruction followed, was the rest kept) and PQ (is the picture natural and free of flaws) are each the
smaller of two marks from 0 to 10, and O = sqrt(SC * PQ). The judge answers behind an OpenAI-compatible endpoint, or is
a model of transformers on this machine.
"""

import base64
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path

from PIL import Image

from danceopd.checkpoint import write_atomic
from danceopd.errors import UserError

KEY_VARIABLE = "DANCEOPD_JUDGE_KEY"  # the environment variable of an endpoint's key: on no command line, in no file
ANSWER_TOKENS = 1024  # most of an answer
MAX_BODY = 2**20  # bytes read of an answer
LAST = 20_000  # characters of it that are looked through for marks
SHOWN_AREA = 512 * 512  # pixels of a picture as the judge sees it: what GEdit-Bench's script shows
ASKED = 3  # times for an answer that can be read
IN_A_ROW = 5  # edits without a score, one after another, that end an evaluation

SC_QUESTION = """\
You are judging how well a picture was edited. The first picture is the original. The second is what came back when
this was asked for:

<instruction>

Give two marks from 0 to 10.
1. Instruction: how completely the second picture shows what was asked for. 0 is not at all, 10 is fully and exactly.
2. Preservation: how much of everything else is as it was in the original. 0 is another picture altogether, 10 is no
change beyond the request.
If both pictures look alike, the request was not carried out, and the first mark is 0.

Answer with one JSON object and nothing else, the marks first:
{"score": [instruction, preservation], "reasoning": "one short sentence"}"""

PQ_QUESTION = """\
You are judging the quality of a picture that a computer made, whatever it is meant to show.

Give two marks from 0 to 10.
1. Naturalness: whether light, shadows, proportions and distances fit together. 0 is impossible at first sight, 10 is
fully convincing.
2. Cleanness: whether it is free of flaws such as warped shapes, smeared faces, wrong hands or limbs, seams, noise and
watermarks. 0 is ruined by them, 10 has none.

Answer with one JSON object and nothing else, the marks first:
{"score": [naturalness, cleanness], "reasoning": "one short sentence"}"""

AGAIN = "\n\nYour last answer could not be read. Give the JSON object alone, with two marks from 0 to 10."
MARKS = 2  # that each question asks for


@dataclass(frozen=True)
class Question:
    """What a judge is asked: pictures (RGB), then a text."""

    text: str
    pictures: tuple[Image.Image, ...]


class Unanswered(Exception):
    """A judge gave no answer to one question; others may have theirs."""


@dataclass(frozen=True)
class Verdict:
    """The marks of one edit, or why it has none."""

    sc_marks: tuple[float, ...] = ()
    pq_marks: tuple[float, ...] = ()
    problem: str | None = None

    @property
    def sc(self) -> float:
        return min(self.sc_marks)

    @property
    def pq(self) -> float:
        return min(self.pq_marks)


def overall(sc: float, pq: float) -> float:
    """O of one edit: the geometric mean of SC and PQ."""
    return math.sqrt(sc * pq)


def as_shown(picture: Image.Image) -> Image.Image:
    """A picture as the judge sees it: RGB, of the same shape with about 512 x 512 pixels."""
    width = math.sqrt(SHOWN_AREA * picture.width / picture.height)
    height = width * picture.height / picture.width
    return picture.convert("RGB").resize((max(1, int(width)), max(1, int(height))))


def questions_of(instruction: str, source: Image.Image, edited: Image.Image) -> tuple[Question, Question]:
    """(SC's, PQ's) of an edit: the first sees both pictures, the second the edited one alone."""
    source, edited = as_shown(source), as_shown(edited)
    return Question(SC_QUESTION.replace("<instruction>", instruction), (source, edited)), Question(
        PQ_QUESTION, (edited,)
    )


def read_marks(answer: str) -> tuple[float, ...] | None:
    """The two marks of an answer, or None where they are missing, not two, or not from 0 to 10.

    The last whole JSON object with a "score" counts, wherever it stands; without one, the last list after the word.
    """
    answer, decoder, found = answer[-LAST:], json.JSONDecoder(), None
    at = answer.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value["score"] if isinstance(value, dict) and "score" in value else found
        at = answer.find("{", end)
    if found is None:
        lists = re.findall(r"""score["']?\s*[:=]\s*\[([^\[\]]{0,200})\]""", answer, re.IGNORECASE)
        found = lists[-1].split(",") if lists else None
    if not isinstance(found, list) or len(found) != MARKS:
        return None
    try:
        marks = tuple(float(str(mark).strip().strip("\"'").removesuffix("/10")) for mark in found)
    except ValueError:
        return None
    return marks if all(0 <= mark <= 10 for mark in marks) else None


# ------------------------------------------------------------------------------------------------- asking, with a cache


def cache_file(folder: Path, judge: str, question: Question) -> Path:
    """Where the answer to a question lies: a digest of the judge, the text and the pictures' pixels."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (judge, question.text):
        digest.update(f"{len(part.encode())} ".encode() + part.encode())
    for picture in question.pictures:
        digest.update(f"{picture.width} {picture.height} ".encode() + picture.tobytes())
    name = digest.hexdigest()
    return folder / name[:2] / f"{name}.json"


def read_cached(path: Path) -> tuple[float, ...] | None:
    """The marks of an answer that was kept; None where there is none, or only a damaged one."""
    try:
        return read_marks(json.loads(path.read_text(encoding="utf-8"))["answer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Edit:
    """What is judged: load() -> (source, edited), called when its turn comes."""

    instruction: str
    load: Callable[[], tuple[Image.Image, Image.Image]]


def judge_edits(
    edits: Sequence[Edit], judge, cache: Path, progress: Callable = lambda items, total: items
) -> list[Verdict]:
    """One verdict for each edit, in their order; answers that can be read are kept in the folder `cache`.

    judge: an EndpointJudge or LocalJudge. progress(items, total) wraps the verdicts as they come. Raises UserError
    where the judge cannot be asked at all, its budget is used up, or several edits in a row get no score: what was
    answered is kept, and the same call goes on from there.
    """
    writing, verdicts = threading.Lock(), [Verdict(problem="not asked")] * len(edits)
    refused: list[UserError] = []

    def work(places: Sequence[int]) -> list[Verdict]:
        if refused:  # what is still in the queue is not asked
            raise refused[0]
        questions = [q for i in places for q in questions_of(edits[i].instruction, *edits[i].load())]
        try:
            marks = _ask(questions, judge, cache, writing)
        except UserError as error:
            refused.append(error)
            raise
        return [_verdict(*marks[2 * n : 2 * n + 2]) for n in range(len(places))]

    batches = [range(i, min(i + judge.batch_size, len(edits))) for i in range(0, len(edits), judge.batch_size)]
    pool, in_a_row = ThreadPoolExecutor(judge.parallel), 0
    try:
        asked = {pool.submit(work, places): places for places in batches}
        for done in progress(as_completed(asked), len(batches)):
            for i, verdict in zip(asked[done], done.result(), strict=True):
                verdicts[i] = verdict
                in_a_row = in_a_row + 1 if verdict.problem else 0
                if in_a_row == IN_A_ROW:
                    raise UserError(f"the judge gave no score for {IN_A_ROW} edits in a row: {verdict.problem}")
    finally:
        judge.stop.set()  # nobody waits to try again
        pool.shutdown(cancel_futures=True)
        judge.stop.clear()
    if edits and all(verdict.problem for verdict in verdicts):
        raise UserError(f"the judge scored none of {len(edits)} edits: {verdicts[-1].problem}")
    return verdicts


def _verdict(sc: tuple[float, ...] | str, pq: tuple[float, ...] | str) -> Verdict:
    problems = [marks for marks in (sc, pq) if isinstance(marks, str)]
    return Verdict(problem=problems[0]) if problems else Verdict(sc, pq)


def _ask(questions: list[Question], judge, cache: Path, writing: threading.Lock) -> list[tuple[float, ...] | str]:
    """The marks for each question, or why there are none."""
    files = [cache_file(cache, judge.name, question) for question in questions]
    marks: list = [read_cached(file) for file in files]
    for attempt in range(ASKED):
        left = [i for i, found in enumerate(marks) if not isinstance(found, tuple)]
        if not left:
            break
        reminder, refused = AGAIN if attempt else "", False
        answers = judge([Question(questions[i].text + reminder, questions[i].pictures) for i in left])
        for i, answer in zip(left, answers, strict=True):
            if isinstance(answer, Unanswered):
                marks[i], refused = str(answer), True
                continue
            marks[i] = read_marks(answer) or f"its answer cannot be read: {answer[:200]!r}"
            if isinstance(marks[i], tuple):
                kept = {"judge": judge.name, "question": questions[i].text, "answer": answer}
                with writing:  # equal questions of two threads have one file
                    write_atomic(files[i], (json.dumps(kept, ensure_ascii=False, indent=1) + "\n").encode())
        if refused:
            break
    return marks


# ------------------------------------------------------------------------------------------------- behind an endpoint


class _Again(Exception):
    """A request failed in a way that may pass; wait: the seconds that the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is sent to the address that was given, and to no other."""

    def redirect_request(self, *args, **kwargs):
        return None


class EndpointJudge:
    """judge(questions) -> answers: a model behind an OpenAI-compatible endpoint, such as vLLM's.

    url: what clients call the base URL, usually ending in /v1. The key, where one is needed, is read from the
    environment variable DANCEOPD_JUDGE_KEY. parallel: requests at a time; timeout: seconds for a whole answer; tries:
    of a request that fails in a way that may pass, after backoff * 1, 2, 4, ... seconds or what the server says, up to
    max_wait; per_minute: most requests; max_calls, max_tokens: the budget, UserError once it is used up. Raises
    UserError for a bad address or key.
    """

    batch_size = 1

    def __init__(
        self,
        url: str,
        model: str,
        *,
        parallel: int = 8,
        timeout: float = 120.0,
        tries: int = 6,
        backoff: float = 1.0,
        max_wait: float = 120.0,
        per_minute: float | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"the judge's address {_without_user(url)!r} is not like http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise UserError(f"no password belongs into the judge's address; give a key by {KEY_VARIABLE}")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.name = model, f"{self.url} {model}"
        self.parallel, self.timeout, self.tries = parallel, timeout, tries
        self.backoff, self.max_wait, self.per_minute = backoff, max_wait, per_minute
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.calls = self.tokens = 0
        self.stop = threading.Event()
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not all("!" <= character <= "~" for character in self._key):
            raise UserError(f"{KEY_VARIABLE} holds a space or a character that no key has; set it again")
        self._lock, self._next, self._reached = threading.Lock(), 0.0, False
        self._open = urllib.request.build_opener(_NoRedirect).open

    def __call__(self, questions: Sequence[Question]) -> Iterator[str | Unanswered]:
        for question in questions:  # each answer is kept before the next is paid for
            try:
                yield self._answer(_content(question))
            except Unanswered as error:
                yield error

    def check(self) -> None:
        """Ask for one word. Raises UserError if the address, the model's name or the key is wrong."""
        try:
            self._answer([{"type": "text", "text": "Answer with the word ready."}])
        except Unanswered as error:
            raise UserError(f"the judge cannot be asked: {error}") from None

    def _answer(self, content: list[dict]) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        data, reason = json.dumps(body).encode(), ""
        for attempt in range(self.tries):
            try:
                return self._post(data)
            except _Again as error:
                reason, wait = str(error), error.wait
            if wait is None:
                wait = min(self.max_wait, self.backoff * 2**attempt * random.uniform(0.5, 1))
            elif wait > self.max_wait:
                raise UserError(f"{self.url} asks to wait {wait:.0f} s; run again then, to go on from here ({reason})")
            if attempt + 1 < self.tries and self.stop.wait(wait):
                break
        raise Unanswered(f"{self.url}: {reason}")

    def _post(self, data: bytes) -> str:
        self._take_turn()
        headers = {"Content-Type": "application/json", "User-Agent": "danceopd"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._open(request, timeout=self.timeout) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error, deadline)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            never = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
            if isinstance(reason, never) and not self._reached:
                raise UserError(f"no judge at {self.url} ({reason}); is it running, and the address right?") from None
            said = "no answer in time" if isinstance(reason, TimeoutError) else repr(reason)
            raise _Again(self._without_key(said)) from None
        self._reached = True
        try:
            answer = json.loads(body)
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Again(f"no chat completion: {self._without_key(body[:200].decode(errors='replace'))!r}") from None
        usage = answer.get("usage")
        spent = usage.get("total_tokens") if isinstance(usage, dict) else None
        with self._lock:
            self.tokens += spent if isinstance(spent, int) else 0
        if isinstance(text, list):  # of parts
            text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
        return text if isinstance(text, str) else ""

    def _take_turn(self) -> None:
        """Count a call, and wait until the rate allows it."""
        with self._lock:
            used = [
                f"{spent} {what}"
                for spent, most, what in (
                    (self.calls, self.max_calls, "calls"),
                    (self.tokens, self.max_tokens, "tokens"),
                )
                if most is not None and spent >= most
            ]
            if used:
                raise UserError(
                    f"the judge's budget is used up after {used[0]}; run again to go on with as much: answers are kept"
                )
            self.calls += 1
            now = time.monotonic()
            turn = max(now, self._next)
            if self.per_minute:
                self._next = turn + 60 / self.per_minute
        if turn > now and self.stop.wait(turn - now):
            raise Unanswered("stopped")

    def _refuse(self, error: urllib.error.HTTPError, deadline: float) -> None:
        """Raise what an HTTP error means: wait and try again, give this question up, or stop."""
        try:
            said = self._without_key(_message(_read(error, deadline)))
        except (_Again, OSError, http.client.HTTPException):
            said = ""
        reason = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise _Again(reason, _retry_after(error.headers.get("Retry-After"))) from None
        self._reached = True
        if error.code in (401, 403):
            state = "was refused" if self._key else "is not set"
            raise UserError(f"{self.url} wants a key, and {KEY_VARIABLE} {state} ({reason})") from None
        if error.code == 404:
            raise UserError(
                f"{self.url} has no model {self.model!r}, or is not the base address, usually one in /v1 ({reason})"
            ) from None
        if error.code < 400:
            raise UserError(f"{self.url} redirects elsewhere; give that address itself ({reason})") from None
        raise Unanswered(f"{self.url}: {reason}") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def _content(question: Question) -> list[dict]:
    """The parts of an OpenAI message: pictures as PNGs in data URLs, then the text."""
    parts = []
    for picture in question.pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [*parts, {"type": "text", "text": question.text}]


def _read(response, deadline: float) -> bytes:
    """A body of at most MAX_BODY bytes, whole before the deadline: a socket's own timeout is for each piece of it."""
    parts, size = [], 0
    while part := response.read1(2**16):
        size += len(part)
        if size > MAX_BODY:
            raise _Again(f"an answer of more than {MAX_BODY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
        parts.append(part)
    return b"".join(parts)


def _message(body: bytes) -> str:
    """What an error's body says, in one short line."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# ------------------------------------------------------------------------------------------------- on this machine


class LocalJudge:
    """judge(questions) -> answers: a vision-language model of transformers from its folder, such as Qwen2.5-VL.

    The most likely answer, without sampling. It is loaded when it is asked first, since the model that edits may need
    the memory before. batch_size: edits at a time, each of two questions; dtype: of the weights. Raises UserError for a
    folder that is missing or incomplete.
    """

    parallel = 1

    def __init__(self, folder: Path, device="cpu", dtype=None, batch_size: int = 4) -> None:
        from transformers import AutoProcessor
        from transformers.utils import is_torchvision_available

        from danceopd.backbones import loading
        from danceopd.data.prepare import fingerprint

        self._folder, self._device, self._dtype = Path(folder), device, dtype
        try:
            self._processor = loading.load(AutoProcessor, folder)
        except UserError as error:
            if self._folder.is_dir() and not is_torchvision_available():  # transformers names a missing file instead
                raise UserError(f"{error}; Qwen2.5-VL's processor needs torchvision: pip install torchvision") from None
            raise
        self._processor.tokenizer.padding_side = "left"  # such that all answers of a batch begin at one place
        if not any(self._folder.glob("*.safetensors")):
            raise UserError(f"no safetensors in {folder}; give the folder of a whole vision-language model")
        self.name, self.batch_size, self.stop = fingerprint(self._folder), batch_size, threading.Event()

    @cached_property
    def _model(self):
        import torch
        from transformers import AutoModelForImageTextToText

        from danceopd.backbones import loading

        return loading.load_model(AutoModelForImageTextToText, self._folder, self._dtype or torch.float32).to(
            self._device
        )

    def check(self) -> None:
        """What there was to check, its making has."""

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        import torch

        texts, pictures = [], [list(question.pictures) for question in questions]
        for question in questions:
            content = [{"type": "image"} for _ in question.pictures] + [{"type": "text", "text": question.text}]
            message = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        inputs = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            output = self._model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return self._processor.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
