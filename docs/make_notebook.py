"""Writes the notebooks of examples from the scripts beside them and runs them: python docs/make_notebook.py.

One whose script is as it was is left as it is.
"""

import base64
import contextlib
import io
import json
import os
import re
from pathlib import Path

from matplotlib import pyplot

SCRIPTS = [Path(__file__).parents[1] / "examples" / f"{name}.py" for name in ("two_moons", "merge_two_loras")]


def cells(script: str) -> list[tuple[str, str]]:
    """Cuts a script at its lines `# %%`: (kind, text), kind markdown or code."""
    parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    kinds = ["markdown" if "markdown" in mark else "code" for mark in parts[::2]]
    texts = [text.strip("\n") for text in parts[1::2]]
    return [
        (kind, re.sub(r"^# ?", "", text, flags=re.MULTILINE) if kind == "markdown" else text)
        for kind, text in zip(kinds, texts, strict=True)
    ]


def run(text: str, names: dict) -> list[dict]:
    """Runs a cell and returns its outputs: what it prints, and the picture that it leaves open."""
    printed, outputs = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "cell", "exec"), names)  # Safe: it is the repository's own script.
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=80)
        pyplot.close(number)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def notebook(script: str) -> dict:
    """Makes the notebook of a script, and runs it in this folder."""
    written, names = [], {"__name__": "__main__"}
    for number, (kind, text) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines(text)}
        if kind == "code":
            cell |= {"execution_count": number, "outputs": run(text, names)}
        written.append(cell)
    language = {"language_info": {"name": "python"}}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": written, "metadata": kernel | language, "nbformat": 4, "nbformat_minor": 5}


def is_new(script: Path) -> bool:
    """Tells whether a script has changed since its notebook was written."""
    path = script.with_suffix(".ipynb")
    if not path.exists():
        return True
    written = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in written] != cells(
        script.read_text(encoding="utf-8")
    )


if __name__ == "__main__":
    pyplot.switch_backend("agg")
    os.chdir(SCRIPTS[0].parent)
    for script in filter(is_new, SCRIPTS):
        made = json.dumps(notebook(script.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
        script.with_suffix(".ipynb").write_text(made + "\n", encoding="utf-8")
