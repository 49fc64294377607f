"""What the docs owe their reader, apart from running (scripts/check_snippets.py) and linking (`mkdocs build --strict`).

    python scripts/check_docs.py

- Every name in `ullage.__all__` and each of its public methods has a docstring, and the name stands in the reference.
- Pages, docstrings and comments use the words of docs/glossary.md, and none of those that it replaces.
- Every page has a place in the site's navigation, and links of README.md lead somewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"^::: ullage\.(\w+)$", re.M)
ENTRY = re.compile(r"^ {4}([\w, ]+?):", re.M)  # of a docstring's "Args:" or "Attributes:"
# words that docs/glossary.md replaces: one concept has one word
REPLACED = {
    r"\blet(?:s|ting)? go of\b": "free, release, drop",
    r"\b(?:leaves?|leaving|left) memory\b|\btensors? leaves?\b": "offload",
    r"\b(?:spill|evict)\b": "offload",
    r"\b(?:rebuilt|built|done|made) again\b": "replay, recompute",
    r"\bremateriali[sz]\w+": "recompute",
    r"\bhigh.?water\b|\bmemory footprint\b": "peak",
    r"\bof before\b": "older, earlier",
    r"\bto be had\b|\bis had\b": "name who has what",
    r"\brebuilt together\b": "recomputed together",
    r"\bhangs? on\b": "depend on, attached to",
    r"\b(?:for|to) who\b|\b(?:of|to|for) whom\b": "name the actor",
    r"\bwhat (?:has|leaves|left|goes|comes)\b": "name the thing",
    r"\bwhat a (?:person|user) should\b": "sentences for the reader",
}
LINK = re.compile(r"(?:\]\(|src=\")([^)\"#]+)")


def _package() -> ModuleType:
    import ullage

    return ullage


def defined_in(name: str) -> str:
    """Return the full name, with its module, of what a public name stands for."""
    thing = inspect.unwrap(getattr(_package(), name))
    return f"{thing.__module__}.{thing.__qualname__}"


def _members(thing: Any) -> dict[str, Any]:
    """Return the public methods and properties of a class that its own package defines, with those that it inherits."""
    found: dict[str, Any] = {}
    for base in reversed(inspect.getmro(thing)):
        if base.__module__.partition(".")[0] == thing.__module__.partition(".")[0]:
            found.update({k: v for k, v in vars(base).items() if not k.startswith("_")})
    kinds = (property, staticmethod, classmethod)
    return {k: v for k, v in found.items() if isinstance(v, kinds) or inspect.isfunction(v)}


def _documented(thing: Any) -> bool:
    inner = getattr(thing, "__func__", thing)
    text = (inner.fget if isinstance(inner, property) else inner).__doc__
    # dataclasses and structs without a docstring get their signature as one
    return bool(text and text.strip() and not text.startswith(f"{getattr(thing, '__name__', '')}("))


def _fields(thing: Any) -> list[str]:
    """Return what a docstring must name: a class's public fields, a function's parameters."""
    if not inspect.isclass(thing):
        return [name for name in inspect.signature(thing).parameters if not name.startswith("_")]
    fields = getattr(thing, "__struct_fields__", None)
    if fields is None:
        fields = [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
    return [name for name in fields if not name.startswith("_")]


def _unnamed(thing: Any) -> list[str]:
    """Return the fields or parameters that have no entry under "Args:" or "Attributes:"."""
    named = {name for entry in ENTRY.findall(inspect.getdoc(thing) or "") for name in re.split(r",\s*", entry)}
    return [name for name in _fields(thing) if name not in named]


def undocumented(package: ModuleType | None = None, pages: list[Path] | None = None) -> list[str]:
    """Return a sentence for each public name that lacks a docstring or a place in the reference."""
    package = package or _package()
    pages = sorted((ROOT / "docs").glob("**/*.md")) if pages is None else pages
    listed = [name for page in pages for name in REFERENCE.findall(page.read_text(encoding="utf-8"))]
    problems = [
        f"docs: `::: ullage.{name}` stands in the reference twice" for name in {*listed} if listed.count(name) > 1
    ]
    problems += [f"docs: `::: ullage.{name}` is no public name" for name in listed if name not in package.__all__]
    shown = {id(getattr(package, name)) for name in listed if hasattr(package, name)}  # an alias needs no second entry
    for name in package.__all__:
        thing = getattr(package, name)
        if id(thing) not in shown:
            problems.append(f"ullage.{name} is public, but no page of docs/ has `::: ullage.{name}`")
        if not _documented(thing):
            problems.append(f"ullage.{name} has no docstring")
        else:
            problems += [f"ullage.{name}: its docstring has no entry for {field!r}" for field in _unnamed(thing)]
        if inspect.isclass(thing):
            problems += [
                f"ullage.{name}.{k} has no docstring" for k, v in _members(thing).items() if not _documented(v)
            ]
    return problems


def broken_links(page: Path) -> list[str]:
    """Return a sentence for each relative link of a page outside docs/ that leads nowhere."""
    links = [found for found in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in found]
    return [f"{page.name}: no {link}" for link in links if not (page.parent / link).exists()]


def replaced_words(path: Path) -> list[str]:
    """Return a sentence for each word in a page, comment, docstring or message that the glossary replaces."""
    # over the ends of lines too; the words of comments and docstrings are not told apart from code
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return [
        f"{where}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]!r}: say {better}"
        for word, better in REPLACED.items()
        for found in re.finditer(word.replace(" ", r"\s+(?:# )?"), text, re.I)
    ]


def pages_without_a_place() -> list[str]:
    """Return a sentence for each page that the site's navigation leaves out."""
    said = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in sorted((ROOT / "docs").glob("**/*.md"))]
    return [f"docs/{page} has no place under `nav` in mkdocs.yml" for page in pages if f": {page}\n" not in said]


def main() -> int:
    problems = [*undocumented(), *pages_without_a_place()]
    for path in [*(ROOT / "docs").glob("**/*.md"), *(ROOT / "src").glob("**/*.py"), ROOT / "README.md"]:
        problems += replaced_words(path)
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        problems += broken_links(ROOT / page)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
