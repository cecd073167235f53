"""Asks a judge behind an HTTP endpoint."""

import base64
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
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

from danceopd.evaluation.gedit.judge import ANSWER_TOKENS, Question, Unanswered, Unreached
from danceopd.support.errors import UserError

KEY_VARIABLE = "DANCEOPD_JUDGE_KEY"  # the environment variable of an endpoint's key: on no command line, in no file

MAX_BODY = 2**20  # bytes read of an answer

LIMITS = {"max_tokens": ANSWER_TOKENS, "max_completion_tokens": 8 * ANSWER_TOKENS}  # the latter counts thoughts too

QUOTA = "insufficient_quota"  # the code of a 429 that does not pass

VERSION = "api-version"  # the query of a deployment in Azure, the one that an address may have


class _Again(Exception):
    """A request failed in a way that may pass; wait: the seconds that the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Learnt(Exception):
    """A request was refused for how it was put, and what the server takes is known now."""


@dataclass(frozen=True)
class _Accepted:
    """What a server takes, as far as is known: the name of the answer's limit, a temperature, the key's header."""

    limit: str | None = "max_tokens"
    temperature: bool = True
    key_header: str = "Authorization"
    tried_headers: int = 1

    def after(self, code: int, said: str, has_key: bool) -> "_Accepted":
        """Returns what is left to be tried after a refusal: itself where the refusal is about something else."""
        if code in (401, 403) and has_key and self.tried_headers == 1:
            other = "api-key" if self.key_header == "Authorization" else "Authorization"
            return replace(self, key_header=other, tried_headers=2)
        if code in (400, 422):
            if self.limit and self.limit in said:
                names = list(LIMITS)[list(LIMITS).index(self.limit) + 1 :]
                return replace(self, limit=names[0] if names else None)
            if self.temperature and "temperature" in said:
                return replace(self, temperature=False)
        return self


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is sent to the address that was given, and to no other."""

    def redirect_request(self, *args, **kwargs):
        return None


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, such as vLLM's: judge(questions) -> answers.

    The key, where one is needed, is read from the environment variable DANCEOPD_JUDGE_KEY. Whether a server takes
    max_tokens or max_completion_tokens, a temperature, and the key as a bearer or in an api-key header is learnt from
    its first refusal. What it refuses of one question is that question's alone.

    Args:
        url: What clients call the base URL, usually ending in /v1; for a deployment in Azure with its ?api-version=.
        model: The model's name there.
        parallel: Requests at a time.
        timeout: Seconds for a whole answer.
        tries: How often a request is sent that fails in a way that may pass, after backoff * 1, 2, 4, ... seconds or
            what the server says, up to max_wait.
        backoff, max_wait: Seconds.
        per_minute: Most requests.
        max_calls, max_tokens: The budget; a UserError once it is used up.

    Raises:
        UserError: The address or the key is of no use.
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
        version = urllib.parse.parse_qs(parts.query).get(VERSION, []) if parts.query else []
        query = urllib.parse.urlencode({VERSION: version[0]}) if len(version) == 1 else ""
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query != query or parts.fragment:
            raise UserError(f"the judge's address {_without_user(url)!r} is not like http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise UserError(f"no password belongs into the judge's address; give a key by {KEY_VARIABLE}")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self._query = f"?{query}" if query else ""
        self.model, self.name = model, f"{self.url} {model}"
        self._accepted = _Accepted(key_header="api-key" if query else "Authorization")
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
        """Asks for one word; a UserError if the address, the model's name or the key is wrong."""
        try:
            self._answer([{"type": "text", "text": "Answer with the word ready."}])
        except Unanswered as error:
            raise UserError(f"the judge cannot be asked: {error}") from None

    def _answer(self, content: list[dict]) -> str:
        reason, attempt = "", 0
        while attempt < self.tries:
            try:
                return self._post(content, self._accepted)
            except _Learnt:  # at most as often as there is something to learn
                continue
            except _Again as error:
                reason, wait = str(error), error.wait
            if wait is None:
                wait = min(self.max_wait, self.backoff * 2**attempt * random.uniform(0.5, 1))
            elif wait > self.max_wait:
                raise UserError(f"{self.url} asks to wait {wait:.0f} s; run again then, to go on from here ({reason})")
            attempt += 1
            if attempt < self.tries and self.stop.wait(wait):
                break
        raise Unreached(f"{self.url}: {reason}")

    def _post(self, content: list[dict], accepted: _Accepted) -> str:
        self._take_turn()
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0} if accepted.temperature else {}
        body |= {accepted.limit: LIMITS[accepted.limit]} if accepted.limit else {}
        headers = {"Content-Type": "application/json", "User-Agent": "danceopd"}
        if self._key:
            bearer = accepted.key_header == "Authorization"
            headers[accepted.key_header] = f"Bearer {self._key}" if bearer else self._key
        address = f"{self.url}/chat/completions{self._query}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._open(request, timeout=self.timeout) as response:
                answer = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error, deadline, accepted)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            never = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
            if isinstance(reason, never) and not self._reached:
                raise UserError(f"no judge at {self.url} ({reason}); is it running, and the address right?") from None
            said = "no answer in time" if isinstance(reason, TimeoutError) else repr(reason)
            raise _Again(self._without_key(said)) from None
        self._reached = True
        try:
            text, tokens = _text(_completion(answer), f"{self.url}: ")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = self._without_key(answer.decode(errors="replace"))[:200]
            raise _Again(f"no chat completion: {said!r}") from None
        except Unanswered as error:
            raise Unanswered(self._without_key(str(error))) from None
        with self._lock:
            self.tokens += tokens
        return self._without_key(text)

    def _take_turn(self) -> None:
        """Counts a call, and waits until the rate allows it."""
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

    def _refuse(self, error: urllib.error.HTTPError, deadline: float, accepted: _Accepted) -> None:
        """Raises what an HTTP error means: ask otherwise, wait and try again, give this question up, or stop."""
        try:
            said = self._without_key(_message(_read(error, deadline)))
        except (_Again, OSError, http.client.HTTPException):
            said = ""
        with self._lock:
            if self._accepted == accepted:  # else another request has learnt already
                self._accepted = accepted.after(error.code, said, bool(self._key))
            if self._accepted != accepted and error.code in (400, 401, 403, 422):
                raise _Learnt from None
        said = said[:300]
        reason = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code == 402 or (error.code == 429 and QUOTA in said):  # for which no wait and no other picture helps
            raise UserError(
                f"{self.url}: the account has nothing left to spend ({reason}); run again then, to go on from here"
            ) from None
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise _Again(reason, _wait(error.headers)) from None
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
    """Returns the parts of an OpenAI message: pictures as PNGs in data URLs, then the text."""
    parts = []
    for picture in question.pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [*parts, {"type": "text", "text": question.text}]


def _read(response, deadline: float) -> bytes:
    """Reads a body of at most MAX_BODY bytes, whole before the deadline: a socket's own timeout is for each piece."""
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
    """Returns what an error's body says, in one line, with the code where that is a word."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        text = f"{text} ({code})" if isinstance(code, str) and code not in str(text) else text
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())


def _completion(body: bytes) -> dict:
    """Reads a chat completion; of one that a proxy streams, whatever was asked for, the parts are put together."""
    if not body.lstrip().startswith(b"data:"):
        return json.loads(body)
    text, rest = "", {}
    for line in body.decode(errors="replace").splitlines():
        said = line.removeprefix("data:").strip()
        if not line.startswith("data:") or said in ("", "[DONE]"):
            continue
        part = json.loads(said)
        rest |= {"usage": part["usage"]} if part.get("usage") else {}
        for choice in (part.get("choices") or [])[:1]:
            piece = choice.get("delta") or choice.get("message") or {}
            text += piece.get("content") or ""
            rest |= {"finish_reason": choice["finish_reason"]} if choice.get("finish_reason") else {}
    return {"choices": [{"message": {"content": text}, "finish_reason": rest.get("finish_reason")}], **rest}


def _text(completion: dict, where: str) -> tuple[str, int]:
    """Returns what a chat completion says, and the tokens it took.

    Raises:
        Unanswered: It says that it was refused, or has no text because of its limit.
        KeyError, IndexError, TypeError, AttributeError: It is none.
    """
    choice, usage = completion["choices"][0], completion.get("usage")
    message = choice["message"]
    text, spent = message["content"], usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(text, dict):  # structured already
        text = json.dumps(text)
    if isinstance(text, list):  # of parts
        found = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in found if isinstance(part, str))
    if not isinstance(text, str) or not text.strip():
        text, ended = "", choice.get("finish_reason")
        if isinstance(message.get("refusal"), str) and message["refusal"].strip():
            raise Unanswered(f"{where}refused: {' '.join(message['refusal'].split())[:300]}")
        if ended in ("content_filter", "length"):
            raise Unanswered(f"{where}no answer, it ended by {ended}")
    return text, spent if isinstance(spent, int) and not isinstance(spent, bool) else 0


def _wait(headers) -> float | None:
    """Returns the seconds that an answer's headers ask to wait."""
    milliseconds = _retry_after(headers.get("retry-after-ms"))
    return _retry_after(headers.get("Retry-After")) if milliseconds is None else milliseconds / 1000


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, which holds them or a date."""
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
