"""The rooms of the package: what each may import, lowest first, and that no import goes against it.

Every import counts, also one inside a function, under TYPE_CHECKING or by import_module.
"""

import ast
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS, FACE, BENCHMARKS = "kernels", "face", "benchmarks"  # danceopd_kernels; danceopd/__init__.py and api.py

# Each room and what it may import beside itself.
ROOMS = {"support": set(), KERNELS: set()}
ROOMS |= {"core": {KERNELS}, "report": {"support"}, "watch": {"support"}}
ROOMS |= {"models": {"core", KERNELS, "support"}, "config": {"core", "support"}}
ROOMS |= {"data": {"core", "models", "support"}, "evaluation": {"models", "support"}}
ROOMS["training"] = {"config", "core", "data", "models", KERNELS, "support"}
ROOMS["planning"] = {"training"} | ROOMS["training"]
ROOMS["tools"] = {"planning", "report", "training"} | ROOMS["training"]
ROOMS["world"] = {"planning", "report", "evaluation", "training"} | ROOMS["training"]
ROOMS["miniature"] = {"world"} | ROOMS["world"]
ROOMS["reproduce"] = {
    "miniature",
    "world",
    "report",
    "tools",
    "training",
    "config",
    "core",
    "data",
    "models",
    "support",
}
ROOMS[FACE] = {"miniature", "world", "planning", "training", "config", "core", "support"}
ROOMS["cli"] = set(ROOMS) - {"core", "models", KERNELS}
ROOMS[BENCHMARKS] = set(ROOMS) - {"cli"}
ROOMS |= {"__main__": {"cli"}, "train": {"cli"}}

CORE_MAY_USE = {"torch", "danceopd", "danceopd_kernels"} | sys.stdlib_module_names
LONGEST = 60  # lines of a function that gives no reason for more


@dataclass(frozen=True)
class Import:
    """One import of a file: the module that it is in, the module that it names, its line."""

    file: str
    line: int
    importer: str
    imported: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.importer} imports {self.imported}"


def sources(root: Path) -> dict[str, Path]:
    """{module: file} of the package, its kernels and benchmarks, and train.py; a package by its own name."""
    kernels = root / "kernels"
    files = [*(root / "danceopd").rglob("*.py"), *(root / "benchmarks").rglob("*.py"), *root.glob("train.py")]
    named = {file.relative_to(root): file for file in files}
    named |= {file.relative_to(kernels): file for file in (kernels / "danceopd_kernels").rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): file for name, file in named.items()}


def imports(root: Path) -> list[Import]:
    """Every import of every file, of whatever package."""
    modules, found = sources(root), []
    for importer, file in modules.items():
        package = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in _names(node, package, modules):
                found.append(Import(str(file.relative_to(root)), node.lineno, importer, name))
    return list(dict.fromkeys(found))


def _names(node: ast.AST, package: str, modules: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [inner if (inner := f"{base}.{alias.name}") in modules else base for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__"):
            named = node.args[0]
            if isinstance(named, ast.Constant):
                return [named.value]
            if isinstance(named, ast.JoinedStr) and isinstance(named.values[0], ast.Constant):
                return [f"{named.values[0].value}*"]  # some module of that package
    return []


def room(module: str) -> str | None:
    """The room of a module; None if it is none of ours."""
    top, *rest = module.split(".")
    if top == "danceopd":
        return rest[0] if rest and rest[0] != "api" else FACE
    return {"danceopd_kernels": KERNELS, "benchmarks": BENCHMARKS, "train": "train"}.get(top)


def against_the_table(found: list[Import]) -> list[str]:
    """The imports that go to a room where they may not."""
    wrong = []
    for entry in found:
        here, there = room(entry.importer), room(entry.imported)
        if there is not None and there != here and there not in ROOMS.get(here, set()):
            wrong.append(f"{entry} ({here} may import {', '.join(sorted(ROOMS.get(here, set()))) or 'no other room'})")
    return wrong


def circles(found: list[Import]) -> list[str]:
    """One circle for each module that reaches itself, as short as can be; none of its modules is named again."""
    after = defaultdict(dict)
    for entry in found:
        if room(entry.imported) is not None and entry.imported != entry.importer:
            after[entry.importer].setdefault(entry.imported, entry)
    wrong, told = [], set()
    for start in sorted(after):
        ways = {module: [entry] for module, entry in after[start].items()}  # the imports from start to a module
        waiting = list(ways)
        for module in waiting:
            for further, entry in after[module].items():
                if further not in ways:
                    ways[further] = [*ways[module], entry]
                    waiting.append(further)
        if start in ways and not told & {entry.importer for entry in ways[start]}:
            told |= {entry.importer for entry in ways[start]}
            wrong.append("\n  ".join(map(str, ways[start])))
    return wrong


def long_functions(file: Path) -> list[str]:
    """The functions of a file that are too long and do not say why."""
    text, found = file.read_text(encoding="utf-8"), []
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min(part.lineno for part in (node, *node.decorator_list))
        length = node.end_lineno - first + 1
        reasons = [line for line in lines[max(0, first - 2) : node.end_lineno] if re.match(r"\s*# Long: \S", line)]
        if length > LONGEST and not reasons:
            found.append(f"{file}:{node.lineno}: {node.name} has {length} lines")
    return found


# ------------------------------------------------------------------------------------------------------- the tree


@pytest.fixture(scope="module")
def found():
    return imports(ROOT)


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in (ROOT / "danceopd").glob("*/__init__.py")}
    assert folders <= ROOMS.keys()


def test_imports_only_go_where_the_table_lets_them(found):
    wrong = against_the_table(found)
    assert not wrong, "\n".join([f"{len(wrong)} imports against the table of rooms:", *wrong])


def test_no_modules_import_each_other_in_a_circle(found):
    wrong = circles(found)
    assert not wrong, "\n".join(["modules that import each other:", *wrong])


def test_the_core_needs_torch_and_the_kernels_alone(found):
    wrong = [str(x) for x in found if room(x.importer) == "core" and x.imported.split(".")[0] not in CORE_MAY_USE]
    assert not wrong, "\n".join(["imports of the core from outside:", *wrong])


def test_no_mock_outside_tests(found):
    wrong = [str(entry) for entry in found if entry.imported.startswith("unittest")]
    assert not wrong, "\n".join(["unittest.mock is for tests:", *wrong])


def test_long_functions_say_why():
    files = [*sources(ROOT).values(), *(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "examples").glob("*.py")]
    wrong = [function.removeprefix(f"{ROOT}/") for file in sorted(files) for function in long_functions(file)]
    assert not wrong, "\n".join([f"over {LONGEST} lines without a comment '# Long: why':", *wrong])


# -------------------------------------------------------------------------------------------- that it would be seen


@pytest.mark.parametrize(
    "line",
    [
        "import danceopd.world.dit",
        "from danceopd.world.dit import DiT",
        "from danceopd.world import dit",
        "from ..world.dit import DiT",
        "def late():\n    from danceopd.world.dit import DiT",
        "import importlib\nimportlib.import_module('danceopd.world.dit')",
        "from importlib import import_module\nimport_module(f'danceopd.world.{name}')",
    ],
)
def test_an_import_against_the_table_is_named_with_its_line(tmp_path, line):
    for name, text in (("core/fields", line), ("world/dit", ""), ("world/__init__", ""), ("core/__init__", "")):
        file = tmp_path / "danceopd" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (wrong,) = against_the_table(imports(tmp_path))
    number = line.count("\n") + 1
    assert wrong.startswith(f"danceopd/core/fields.py:{number}: danceopd.core.fields imports danceopd.world")


def test_a_circle_and_a_long_function_are_named(tmp_path):
    folder = tmp_path / "danceopd" / "core"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from danceopd.core import b\n")
    (folder / "b.py").write_text("def late():\n    from danceopd.core.c import x\n")
    (folder / "c.py").write_text("import danceopd.core.a\n\nimport danceopd.core.d\n")
    (folder / "d.py").write_text("")
    (circle,) = circles(imports(tmp_path))
    assert re.findall(r"(\w\.py:\d)", circle) == ["a.py:1", "b.py:2", "c.py:1"]
    body = "    pass\n" * LONGEST
    (folder / "d.py").write_text(f"def f():\n{body}\n\n# Long: a table.\ndef g():\n{body}\n\ndef h():\n    pass\n")
    (said,) = long_functions(folder / "d.py")
    assert said.endswith(f"d.py:1: f has {LONGEST + 1} lines")
