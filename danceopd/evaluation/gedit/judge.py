"""Has edits judged by a vision-language model, after VIEScore (arXiv 2312.14867).

SC (was the instruction followed, was the rest kept) and PQ (is the picture natural and free of flaws) are each the
smaller of two marks from 0 to 10, and O = sqrt(SC * PQ). The judge answers behind an OpenAI-compatible endpoint, or is
a model of transformers on this machine.
"""

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.texts import parse_object

ANSWER_TOKENS = 1024  # most of an answer
LAST = 20_000  # characters of it that are looked through for marks
IN_A_ROW = 5  # edits, one after another, that end an evaluation: without a score before any has one, or unreached
AGAIN = "\n\nYour last answer could not be read. Give the JSON object alone, with two marks from 0 to 10."

SHOWN_AREA = 512 * 512  # pixels of a picture as the judge sees it: what GEdit-Bench's script shows

ASKED = 3  # times for an answer that can be read

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

MARKS = 2  # that each question asks for


@dataclass(frozen=True)
class Question:
    """What a judge is asked: pictures (RGB), then a text."""

    text: str
    pictures: tuple[Image.Image, ...]


class Unanswered(Exception):
    """A judge gave no answer to one question; others may have theirs."""


class Unreached(Unanswered):
    """A judge could not be asked a question, and perhaps no other."""


@dataclass(frozen=True)
class Verdict:
    """The marks of one edit, or why it has none."""

    sc_marks: tuple[float, ...] = ()
    pq_marks: tuple[float, ...] = ()
    problem: str | None = None
    unreached: bool = False

    @property
    def sc(self) -> float:
        return min(self.sc_marks)

    @property
    def pq(self) -> float:
        return min(self.pq_marks)


def overall(sc: float, pq: float) -> float:
    """Returns O of one edit: the geometric mean of SC and PQ."""
    return math.sqrt(sc * pq)


def as_shown(picture: Image.Image) -> Image.Image:
    """Returns a picture as the judge sees it: RGB, of the same shape with about 512 x 512 pixels."""
    width = math.sqrt(SHOWN_AREA * picture.width / picture.height)
    height = width * picture.height / picture.width
    return picture.convert("RGB").resize((max(1, int(width)), max(1, int(height))))


def questions_of(instruction: str, source: Image.Image, edited: Image.Image) -> tuple[Question, Question]:
    """Returns SC's and PQ's questions about an edit: the first shows both pictures, the second the edited one alone."""
    source, edited = as_shown(source), as_shown(edited)
    return Question(SC_QUESTION.replace("<instruction>", instruction), (source, edited)), Question(
        PQ_QUESTION, (edited,)
    )


def read_marks(answer: str) -> tuple[float, ...] | None:
    """Reads the two marks of an answer.

    The last whole JSON object with a "score" counts, wherever it stands; without one, the last list after the word.

    Returns:
        The marks, or None where they are missing, not two, or not from 0 to 10.
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


def cache_file(folder: Path, judge: str, question: Question) -> Path:
    """Returns where the answer to a question lies: a digest of the judge, the text and the pictures' pixels."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (judge, question.text):
        digest.update(f"{len(part.encode())} ".encode() + part.encode())
    for picture in question.pictures:
        digest.update(f"{picture.width} {picture.height} ".encode() + picture.tobytes())
    name = digest.hexdigest()
    return folder / name[:2] / f"{name}.json"


def read_cached(path: Path) -> tuple[float, ...] | None:
    """Reads the marks of an answer that was kept; None where there is none, or only a damaged one."""
    try:
        answer = parse_object(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError):
        return None
    return read_marks(answer) if isinstance(answer, str) else None


@dataclass(frozen=True)
class Edit:
    """An edit to be judged; load() -> (picture to edit, edited picture) is called when its turn comes."""

    instruction: str
    load: Callable[[], tuple[Image.Image, Image.Image]]


@runtime_checkable
class ExactJudge(Protocol):
    """Judges edits of pictures whose every object is known, without asking a model."""

    name: str

    def check(self) -> None:
        """Does nothing: there is no endpoint to be reached."""

    def verdict(self, instruction: str, source: Image.Image, edited: Image.Image) -> Verdict:
        """Returns the marks of one edit."""
        ...


def judge_edits(
    edits: Sequence[Edit], judge, cache: Path, progress: Callable = lambda items, total: items
) -> list[Verdict]:
    """Judges edits, several at a time.

    Args:
        edits: What is judged.
        judge: An EndpointJudge or LocalJudge.
        cache: Folder in which answers that can be read are kept.
        progress: `progress(items, total)` wraps the verdicts as they come.

    Returns:
        One verdict for each edit, in their order.

    Raises:
        UserError: The judge cannot be asked at all, its budget is used up, it is not reached for several edits in a
            row, or gives none of the first a score. What was answered is kept, and the same call goes on from there.
    """
    writing, verdicts = threading.Lock(), [Verdict(problem="not asked")] * len(edits)
    refused: list[UserError] = []

    def work(places: Sequence[int]) -> list[Verdict]:
        if refused:  # what is still in the queue is not asked
            raise refused[0]
        verdicts, questions, asked = {}, [], []
        for i in places:
            try:
                questions += questions_of(edits[i].instruction, *edits[i].load())
                asked.append(i)
            except (UserError, OSError) as error:
                verdicts[i] = Verdict(problem=str(error))
        try:
            marks = _ask(questions, judge, cache, writing) if questions else []
        except UserError as error:
            refused.append(error)
            raise
        verdicts |= {i: _verdict(*marks[2 * n : 2 * n + 2]) for n, i in enumerate(asked)}
        return [verdicts[i] for i in places]

    batches = [range(i, min(i + judge.batch_size, len(edits))) for i in range(0, len(edits), judge.batch_size)]
    pool, in_a_row, scored = ThreadPoolExecutor(judge.parallel), 0, False
    try:
        asked = {pool.submit(work, places): places for places in batches}
        for done in progress(as_completed(asked), len(batches)):
            for i, verdict in zip(asked[done], done.result(), strict=True):
                verdicts[i] = verdict
                scored = scored or not verdict.problem
                in_a_row = in_a_row + 1 if verdict.unreached or (verdict.problem and not scored) else 0
                if in_a_row == IN_A_ROW:
                    raise UserError(f"the judge gave no score for {IN_A_ROW} edits in a row: {verdict.problem}")
    finally:
        judge.stop.set()  # nobody waits to try again
        pool.shutdown(cancel_futures=True)
        judge.stop.clear()
    if edits and all(verdict.problem for verdict in verdicts):
        raise UserError(f"the judge scored none of {len(edits)} edits: {verdicts[-1].problem}")
    return verdicts


def _verdict(sc: tuple[float, ...] | Unanswered, pq: tuple[float, ...] | Unanswered) -> Verdict:
    problems = [marks for marks in (sc, pq) if isinstance(marks, Unanswered)]
    if not problems:
        return Verdict(sc, pq)
    return Verdict(problem=str(problems[0]), unreached=any(isinstance(found, Unreached) for found in problems))


def _ask(
    questions: list[Question], judge, cache: Path, writing: threading.Lock
) -> list[tuple[float, ...] | Unanswered]:
    """Asks for the marks of each question; returns them, or why there are none."""
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
                marks[i], refused = answer, True
                continue
            answer = answer.encode(errors="replace").decode()  # half a surrogate goes into no file
            marks[i] = read_marks(answer) or Unanswered(f"its answer cannot be read: {answer[:200]!r}")
            if isinstance(marks[i], tuple):
                kept = {"judge": judge.name, "question": questions[i].text, "answer": answer}
                with writing:  # equal questions of two threads have one file
                    write_atomic(files[i], (json.dumps(kept, ensure_ascii=False, indent=1) + "\n").encode())
        if refused:
            break
    return marks
