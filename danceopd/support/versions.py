"""Says which version of the package runs."""

import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path


def commit() -> str:
    """Returns the commit of the code that runs, with "+" where files differ from it, or "unknown".

    An installed package has it in a file that its build wrote.
    """
    here = Path(__file__).parents[1]
    if (here / "COMMIT").is_file():
        return (here / "COMMIT").read_text().strip()
    try:
        git = ["git", "-C", str(here)]
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True)
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # also where the package lies in another project's repository
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def number() -> str:
    """Returns the installed package's version; "0+sources" where it runs from its sources alone."""
    try:
        return installed_version("danceopd")
    except PackageNotFoundError:
        return "0+sources"


def version() -> str:
    """Returns "0.1.0 (1a2b3c4d5e)", without the commit where it is unknown."""
    made_of = commit()
    return number() if made_of == "unknown" else f"{number()} ({made_of})"
