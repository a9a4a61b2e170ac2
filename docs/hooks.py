"""What MkDocs does beside the pages in docs/: it adds those that are made from the code and from files elsewhere.

- README.md, CONTRIBUTING.md, CHANGELOG.md and experiments/results/ become pages. Their links, and those of all pages
  to files of the repository, are made to fit.
- `reference/commands.md` and `reference/settings.md` are written from the parsers of the commands.
- A public name without a docstring, or without a place in the reference, is a warning; `make docs` allows none.
"""

from __future__ import annotations

import argparse
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.cads")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "experiments/results"
REFERENCE = ("reference/python.md", "reference/extending.md")
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    f"{RESULTS}/README.md": "results/index.md",
}
"""Files of the repository that are pages, and where."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
RESULT_FILE = re.compile(r"`(?P<name>[\w-]+\.md)`")
DIRECTIVE = re.compile(r"^::: (?P<name>[\w.]+)", re.MULTILINE)
Rows = list[tuple[str, str, str, str]]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures that are not in docs/."""
    for source, page in _moved_files():
        if source.endswith(".md"):
            files.append(File.generated(config, page, content=_fit_links((ROOT / source).read_text(), source, page)))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    for problem in undocumented((ROOT / "docs" / page).read_text() for page in REFERENCE):
        log.warning(problem)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files outside docs/ fit."""
    if page.file.generated_by is not None:
        return markdown
    return _fit_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _moved_files() -> Iterator[tuple[str, str]]:
    """Each file of the repository that is a page or a figure of one, and its place in the site."""
    yield from MOVED.items()
    for file in sorted((ROOT / RESULTS).iterdir()):
        if file.suffix in (".md", ".png") and file.name != "README.md":
            yield f"{RESULTS}/{file.name}", f"results/{file.name}"


def _fit_links(text: str, source: str, page: str) -> str:
    """Links of a file of the repository, as links of its page. What is no page becomes the path as text.

    Args:
        source: path of the file in the repository. page: of the page in the site.
    """
    places = dict(_moved_files())

    def fitted(match: re.Match[str]) -> str:
        target = match["target"]
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = places.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            if not (ROOT / path).exists():
                log.warning("%s links to %s, which does not exist", source, target)
            return match["text"] if match["text"] == f"`{path}`" else f"{match['text']} (`{path}`)"
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"

    if source.startswith(RESULTS):
        here = {Path(name).name for name in places if name.startswith(RESULTS)}
        text = RESULT_FILE.sub(lambda m: f"[{m[0]}]({m['name']})" if m["name"] in here else m[0], text)
    return LINK.sub(fitted, text)


def commands_page() -> str:
    """Each command: what it does, and the settings that are its own."""
    from cads.cli.config import command_parser, export_parser, grid_parser, init_parser, report_parser
    from cads.cli.main import COMMANDS, USAGE
    from cads.cli.settings import CheckSettings, PlanSettings, SelectSettings, TrainSettings

    settings = {s.command: s for s in (CheckSettings, PlanSettings, SelectSettings, TrainSettings)}
    parsers = {name: command_parser(of, "vision", "cads") for name, of in settings.items()}
    parsers |= {"init": init_parser(), "export": export_parser(), "report": report_parser()}
    parsers["compare"] = grid_parser("vision")
    parts = ["# Commands", f"```text\n{USAGE}\n```", "Made from the code. Settings that commands share are in"]
    parts[-1] += " [Settings](settings.md)."
    for name in COMMANDS:
        parser = parsers[name]
        parts += [f"## cads {name}", str(parser.description), f"```text\n{parser.usage}\n```"]
        parts.append(_table(_rows(parser)))
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """The sections of a configuration file: recipe, checkpoints, the task of each kind, the options of each method."""
    from cads.cli.config import command_parser
    from cads.cli.settings import TrainSettings
    from cads.registry import SELECTORS, TASKS, names

    parts = [
        "# Settings",
        "Made from the code. Each is a key of its section in a file, and a flag: `--train.batch_size 64`.",
    ]
    base = command_parser(TrainSettings, "vision", "cads")
    for section, title in (("train", "The recipe"), ("checkpoint", "Checkpoints")):
        parts += [f"## {title}: `{section}`", _table(_rows(base, section))]
    for kind in names(TASKS):
        parser = command_parser(TrainSettings, kind, "cads")
        parts += [f"## The task of kind `{kind}`: `task`", _table(_rows(parser, "task"))]
    parts += ["## The options of each method: `options`", "What each does is in [Methods](../methods.md)."]
    for method in names(SELECTORS):
        parser = command_parser(TrainSettings, "vision", method)
        rows = _rows(parser, "options")
        parts += [f"### `{method}`", _table(rows) if rows else "None."]
    return "\n\n".join(parts) + "\n"


def _rows(parser: Any, section: str = "") -> Rows:
    """Name, kind of value, default and help of the settings of a section, or of those in none: all that help lists."""
    from cads.cli.config import SECTIONS

    rows = []
    for action in parser._actions:
        if (
            action.help in (None, argparse.SUPPRESS)
            or action.dest.rpartition(".")[0] != section
            or action.dest == "help"
        ):
            continue
        if "--print_config" in action.option_strings or action.dest in SECTIONS:
            continue
        flag = next((f for f in action.option_strings if f.startswith("--")), action.metavar or action.dest)
        hint = getattr(action, "_typehint", None) or action.type
        default = "" if action.default is argparse.SUPPRESS else str(_default(action))
        text = " ".join(str(action.help).split()).replace("%%", "%")
        name = flag.removeprefix(f"--{section}.") if section else flag
        rows.append((f"`{name}`", _kind(hint) if hint else "", default and f"`{default}`", text))
    return rows


def _default(action: Any) -> Any:
    value = action.default
    if value is None:
        return "" if getattr(action, "required", False) else "null"
    return str(value).lower() if isinstance(value, bool) else value


def _kind(hint: Any) -> str:
    """What a setting takes, in words."""
    from cads.cli.parser import KINDS

    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(map(str, arguments))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(argument) for argument in arguments if argument is not NoneType))
    name = getattr(get_origin(hint) or hint, "__name__", "")
    return KINDS.get(name, name)


def _table(rows: Rows) -> str:
    lines = ["| setting | takes | default | what it is |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(part) for part in row) + " |" for row in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|") if "`" in text else text.replace("|", "\\|").replace("<", "&lt;")


def undocumented(pages: Iterable[str]) -> list[str]:
    """What is wrong with the reference: public names that are on no page, and members without a docstring."""
    import griffe

    import cads

    listed = [name for page in pages for name in DIRECTIVE.findall(page)]
    public = [f"cads.{name}" for name in cads.__all__ if name != "__version__"]
    problems = [f"{name} is public and is not in the reference" for name in public if name not in listed]
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    package = loader.load("cads")
    loader.resolve_aliases()
    for name in listed:
        documented = package[name.removeprefix("cads.")]
        documented = documented.final_target if documented.is_alias else documented
        problems += [f"{name} has no docstring"] if documented.docstring is None else []
        if documented.is_class:
            problems += [
                f"{name}.{member.name} has no docstring"
                for member in documented.members.values()
                if not member.name.startswith("_") and _needs_docstring(member, documented)
            ]
    return problems


def _needs_docstring(member: Any, owner: Any) -> bool:
    """Whether nothing says what a public member is: no docstring, and no entry in that of its class."""
    if member.is_alias or member.docstring is not None:
        return False
    entry = re.compile(rf"^\s*(?:\w+, |\S.*\. )*{member.name}(?:, \w+)*: ", re.MULTILINE)
    return not (member.is_attribute and owner.docstring is not None and entry.search(owner.docstring.value))
