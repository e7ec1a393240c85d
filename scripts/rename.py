"""Turns this clone into a package of another name: `make rename NAME=mylm`, or `python scripts/rename.py mylm`.

The package's folder, imports, `_target_`s, environment variables (in capitals), torch operators, the cache's folder and every
mention in a text: all but LICENSE, whose copyright notice has to stay. It needs Python alone, so that it can come before an
install. Folders of runs that were made earlier name the classes of the earlier package, and can no longer be read.
"""

import keyword
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

KEPT = {"LICENSE"}
SKIPPED = {".venv", "build", "runs", "__pycache__"}  # what use of the project makes, as .gitignore has it


def package(root: Path) -> Path:
    """The folder of the package, which is the only one in `src`."""
    (found,) = (root / "src").glob("*/__init__.py")
    return found.parent


def files(root: Path) -> list[Path]:
    """The project's files: what git does not ignore; where there is no git, all that lies in none of the folders `SKIPPED`."""
    if (root / ".git").exists():
        listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")[:-1]
        paths = [root / name for name in listed]
    else:
        paths = []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if name not in SKIPPED and not name.endswith((".egg-info", "_cache"))]
            paths += [Path(folder, name) for name in names]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def rename(root: Path, name: str) -> None:
    """Give the project in the folder `root` the name `name`.

    Raises:
        SystemExit: with what is wrong with the name or with the folder, before anything is changed.
    """
    earlier = package(root)
    texts = {path: text for path in files(root) if path.name not in KEPT and (text := _text(path)) is not None}
    if problem := _problem(root, name, texts):
        sys.exit(f"error: {problem}")
    for path, text in texts.items():
        changed = _word(earlier.name).sub(lambda found: name.upper() if found[0].isupper() else name, text)
        if changed != text:
            path.write_bytes(changed.encode())
    shutil.rmtree(root / "src" / f"{earlier.name}.egg-info", ignore_errors=True)
    earlier.rename(earlier.with_name(name))
    print(f"{earlier.name} is now {name}")


def _problem(root: Path, name: str, texts: dict[Path, str]) -> str:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return f"{name!r} cannot be the name of a package: small letters, digits and _, no word of Python's own"
    if find_spec(name) or any(path.stem == name for path in texts if path.suffix == ".py"):
        return f"there is a module {name} already: take another name"
    used = [path for path in texts if root / "src" in path.parents or path.name in ("pyproject.toml", "constraints.txt")]
    for path in used:
        if _word(name).search(texts[path]):
            return f"{name} means something else in {path.relative_to(root)}: take another name"
    if (root / ".git").exists() and _git(root, "status", "--porcelain"):
        return "there are changes that are not committed: commit them first, so that `git restore .` undoes a rename"
    return ""


def _word(name: str) -> re.Pattern[str]:
    """The name in any case, also before or after an underscore, but not within another word."""
    return re.compile(f"(?<![a-z0-9]){name}(?![a-z0-9])", re.IGNORECASE)


def _text(path: Path) -> str | None:
    """What a file holds, with its own line ends; None if that is no text."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rename(Path(__file__).resolve().parents[1], sys.argv[1])
