"""Finds what a path was meant to name."""

import unicodedata
from difflib import get_close_matches
from pathlib import Path

from danceopd.support.hints import did_you_mean

ALIKE = 0.75  # of names that one is taken for the other, as difflib counts

CONFIGS = (Path(__file__).parents[1], Path(__file__).parents[2])  # the folder of configs/ in a wheel, in a checkout

MINIATURE = Path(__file__).parents[1] / "miniature" / "assets"  # a small trained pipeline, and LoRAs for it


def shipped(path: Path) -> Path:
    """Returns what ships with the package under a name: the pipeline of "miniature", and the LoRA of "miniature/NAME".

    Any other path, and one that is there, is returned as it is.
    """
    if path.parts[:1] != ("miniature",) or len(path.parts) > 2 or path.exists():
        return path
    there = MINIATURE.joinpath("sources", *path.parts[1:]) if path.parts[1:] else MINIATURE / "pipeline"
    return there if there.exists() else path


def shipped_config(path: Path) -> Path:
    """Returns the file that ships as configs/... where there is none of that path here; else the path itself."""
    if path.exists() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    return next((file for file in (root / path for root in CONFIGS) if file.is_file()), path)


def near_config(path: Path) -> str:
    """Ends a message about a configuration that is not there by one that is, here or among those that ship."""
    names = (file.relative_to(root).as_posix() for root in CONFIGS for file in root.glob(f"configs/**/*{path.suffix}"))
    return near_path(path) or (did_you_mean(path.as_posix(), names, "") if path.parts[:1] == ("configs",) else "")


def draws_miniature(model: Path | None) -> bool:
    """Tells whether a pipeline's folder is the miniature's, shipped or trained again, or stands under its name."""
    return model is not None and (model == Path("miniature") or (model / "miniature.json").is_file())


def near_path(
    path: Path | str, root: Path | None = None, listed: dict[Path, dict[str, list[str]]] | None = None
) -> str:
    """Ends a message about a path that is not there by the one that is, where they differ in how they are written.

    Where no root is given, a name that is spelt much alike counts too, and so does one that ships.

    Args:
        path: What was given.
        root: The folder that it starts from, which is not left; the current one if not given.
        listed: What was found in folders before, kept for further calls.

    Returns:
        "; there is images/cup.png, with slashes", "; did you mean 'ink.safetensors'?", or "" where nothing is near.
    """
    written = str(path)
    start = root if root is not None else Path()
    parts = Path(written.replace("\\", "/")).expanduser().parts
    if root is not None and (".." in parts or Path(written).is_absolute()):
        return ""
    try:
        there = _walk(start, parts, {} if listed is None else listed)
        if there is None or not there.exists() or (root and not there.resolve().is_relative_to(root.resolve())):
            return _misspelt(parts) if root is None else ""  # a manifest has a million names
    except (OSError, ValueError, RuntimeError):  # too long, a null character, a ring of links, a folder that is closed
        return ""
    shown = there.relative_to(root) if root is not None else there
    found, given = str(shown), written.replace("\\", "/")
    how = ["slashes"] if "\\" in written else []
    if written.startswith("~"):
        how += ["~ as the home folder"]
    elif _composed(found) != _composed(given):
        how += ["other upper and lower case"]
    elif found != given:
        how += ["another Unicode form of its letters"]
    return f"; there is {shown}, with {' and '.join(how)}" if how else ""


def _misspelt(parts: tuple[str, ...]) -> str:
    """Ends a message by the path that differs in the letters of one part; "" where none does."""
    ship = [Path("miniature"), *(Path("miniature") / path.name for path in sorted((MINIATURE / "sources").glob("*")))]
    found = get_close_matches("/".join(parts), [path.as_posix() for path in ship], n=1, cutoff=ALIKE)
    here = Path()
    for i, part in enumerate(parts):
        if (here / part).exists():
            here /= part
            continue
        near = get_close_matches(part, [path.name for path in here.iterdir()], n=3, cutoff=ALIKE)
        found += [str(path) for name in near if (path := here.joinpath(name, *parts[i + 1 :])).exists()]
        break
    return f"; did you mean {found[0]!r}?" if found else ""


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _walk(start: Path, parts: tuple[str, ...], listed: dict[Path, dict[str, list[str]]]) -> Path | None:
    """Returns the path that has these parts but for case and Unicode form, part by part."""
    here = start
    for part in parts:
        if (here / part).exists():
            here /= part
            continue
        if here not in listed:
            listed[here] = {}
            for entry in here.iterdir():
                listed[here].setdefault(_folded(entry.name), []).append(entry.name)
        near = listed[here].get(_folded(part))
        if not near:
            return None
        here /= min(near, key=lambda name: _composed(name) != _composed(part))
    return here


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())
