"""GenEval in small: clauses of prompts, how pictures are drawn, and what is compared."""

import json

import numpy as np
import tiny_geneval as tiny
from PIL import Image

from danceopd.evaluation.geneval.rules import Found


def box(x, y, width=10, height=10):
    return (float(x), float(y), float(x + width), float(y + height))


def found(*boxes, confidence=0.95):
    """Detections, each a little less confident than the one before."""
    return [Found(one, confidence - 0.001 * place) for place, one in enumerate(boxes)]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def as_results(path, lines):
    path.write_text("".join(json.dumps(one).replace("/", "\\/") + "\n" for one in lines))  # as pandas writes them
    return path


def result(tag="colors", correct=True, prompt="p", number=0):
    return {
        "filename": f"out/00000/samples/{number:04d}.png",
        "tag": tag,
        "prompt": prompt,
        "correct": correct,
        "reason": "",
        "metadata": json.dumps({"tag": tag, "prompt": prompt}),
        "details": "{}",
    }


METADATA = [tiny.line("a photo of a dog"), tiny.line("a photo of a cat", "single_object", clause("cat"))]


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


def close(a, b, levels=1):
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= levels for name in a)
