"""Which files a prompt's template is made of: itself and what it extends, includes or imports."""

from collections.abc import Iterator
from pathlib import Path

from jinja2 import TemplateError, TemplateNotFound, meta

from align.judge.prompts import Sandbox, environment


def template_files(path: Path, shipped: Path) -> dict[str, Path | None]:
    """The files by the names under which they are reached; None for one that is not there.

    All of them are looked for beside the template first, then in the shipped folder, as when it is
    rendered. The name `*` stands for the whole folder of the template, where a name is only known
    when it is rendered.
    """
    sandbox = environment((str(path.parent), str(shipped)))
    found: dict[str, Path | None] = {}
    waiting = [path.name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name == "*":
            found[name] = path.parent
            continue
        found[name] = file = place(sandbox, name)
        if file is not None:
            waiting.extend(named(sandbox, file))
    return found


def place(sandbox: Sandbox, name: str) -> Path | None:
    """Where the loader finds a template, None where it finds none."""
    assert sandbox.loader is not None
    try:
        return Path(str(sandbox.loader.get_source(sandbox, name)[1]))
    except TemplateNotFound:
        return None
    except UnicodeDecodeError:  # it is there; who renders it says what is wrong
        folders = getattr(sandbox.loader, "searchpath", ())
        return next(p for folder in folders if (p := Path(folder) / name).is_file())


def named(sandbox: Sandbox, file: Path) -> Iterator[str]:
    """The names that a file refers to, `*` for one that is worked out; none where it is wrong."""
    try:
        tree = sandbox.parse(file.read_text(encoding="utf-8"))
    except (TemplateError, UnicodeDecodeError):
        return
    for name in meta.find_referenced_templates(tree):
        yield "*" if name is None else name


def shows_responses(path: Path, shipped: Path) -> bool:
    """Whether a prompt names the responses anywhere; True where nobody can tell."""
    files = template_files(path, shipped)
    if "*" in files:
        return True
    sandbox = environment((str(path.parent), str(shipped)))
    for file in files.values():
        try:
            tree = sandbox.parse(file.read_text(encoding="utf-8")) if file is not None else None
        except (TemplateError, UnicodeDecodeError):  # who renders it says what is wrong
            return True
        if tree is not None and "responses" in meta.find_undeclared_variables(tree):
            return True
    return False
