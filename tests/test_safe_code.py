"""That the code does nothing that turns what it reads into code, or names files in a way that another can guess.

A line that looks like it and is safe says why, by a comment "# Safe: why" on it or on the line before.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OBJECTS = "turns bytes into objects of any kind"
IMPORTS = dict.fromkeys(("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"), OBJECTS)

CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "subprocess.getstatusoutput": "goes through a shell",
    "tempfile.mktemp": "names a file that another may put there",
    "yaml.load": "may build objects of any kind; take safe_load",
    "yaml.unsafe_load": "builds objects of any kind",
    "yaml.full_load": "builds more than plain values",
    "shutil.unpack_archive": "writes where an archive says",
    "Markup": "is not escaped in a page",
    "ssl._create_unverified_context": "asks anybody",
}

METHODS = {"extractall": "writes where an archive says", "extract": "writes where an archive says"}

KEYWORDS = {  # of any call
    ("shell", True): "goes through a shell",
    ("trust_remote_code", True): "runs code that comes with a model",
    ("allow_pickle", True): OBJECTS,
    ("weights_only", False): OBJECTS,
    ("use_safetensors", False): "reads weights that are pickles",
    ("autoescape", False): "leaves a page's texts as they are",
    ("verify", False): "asks anybody",
}


def unsafe(text: str) -> list[tuple[int, str]]:
    """Lists (line, what is unsafe there and why) of a module's text, without what says why it is safe."""
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, n, IMPORTS[n.split(".")[0]]) for n in names if n.split(".")[0] in IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name in CALLS:
            found.append((node.lineno, name, CALLS[name]))
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            found.append((node.lineno, name, METHODS[node.func.attr]))
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append((node.lineno, name, "turns bytes into objects of any kind without weights_only=True"))
        found += [(node.lineno, f"{k}={v}", why) for (k, v), why in KEYWORDS.items() if given.get(k, "") is v]
    said = {n for n, line in enumerate(lines, 1) if re.search(r"# Safe: \S", line)}
    return [(line, f"{what} {why}") for line, what, why in sorted(found) if not said & {line, line - 1}]


def modules() -> list[Path]:
    folders = ("danceopd", "kernels", "benchmarks", "docs", "examples")
    return [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


def test_nothing_that_is_read_becomes_code():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in modules()
        for line, what in unsafe(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(["unsafe, unless a comment '# Safe: why' says otherwise:", *wrong])


def test_pages_escape_everything():
    templates = list((ROOT / "danceopd").rglob("*.j2"))
    assert templates
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape|<script|https?://", text), path
        assert "default-src 'none'" in text, path


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "found = eval(x)",
        "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x, Loader)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "tarfile.open(x).extractall(y)",
        "Environment(autoescape=False)",
    ],
)
def test_what_is_unsafe_is_seen(line):
    assert unsafe(line)
    assert not unsafe("# Safe: a test's own text.\n" + line.splitlines()[-1])


def test_what_is_safe_is_let_alone():
    assert not unsafe("torch.load(x, weights_only=True)\nmodel.eval()\nsubprocess.run([x])\nyaml.safe_load(x)")
