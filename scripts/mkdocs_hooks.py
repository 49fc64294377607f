"""MkDocs hooks: what the site needs beside `mkdocs.yml`.

- `benchmarks/results/*.md` are pages, though they lie outside `docs/`.
- `::: ullage.NAME` names a public name; mkdocstrings is given the module that defines it, because a name such as
  `ullage.report` is a function for the user and a package for whoever reads the sources.
- A public name without a docstring, or without a place in the reference, fails the build; so does a page that would load
  something from the network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_docs  # noqa: E402

REFERENCE = re.compile(r"^::: ullage\.(\w+)$", re.M)
# superfences takes no words after the language: those are for scripts/check_snippets.py
FENCE_WORDS = re.compile(r"^( *```)(\w+)[^\S\n]+[\w -]+$", re.M)
# Material's polyfill for search on pages opened from a file comes from the network: docs/javascripts/worker.js stands in
SHIM = re.compile(r'<script src="?https://unpkg\.com/iframe-worker/shim"?></script>')
LOADED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def on_pre_build(config: Any) -> None:
    """Refuse to build a reference that lacks a name."""
    problems = check_docs.undocumented()
    if problems:
        raise PluginError("\n".join(problems))


def on_files(files: Files, config: Any) -> Files:
    """Add the benchmarks' results."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.md")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Name the module of each public name, drop fences' further words, and point links at pages of the site."""
    markdown = REFERENCE.sub(lambda found: _reference(found[1]), markdown)
    markdown = FENCE_WORDS.sub(r"\1\2", markdown)
    if not page.file.src_uri.startswith("benchmarks/"):
        # on GitHub the results lie beside docs/, here below it
        markdown = markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
    return markdown


def _reference(name: str) -> str:
    return f"::: {check_docs.defined_in(name)}\n    options:\n      heading: ullage.{name}\n      toc_label: {name}\n"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that loads something from the network."""
    script = get_relative_url("javascripts/worker.js", page.url)
    output = SHIM.sub(f'<script src="{script}"></script>', output)
    loaded = LOADED.findall(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri}: the page loads {loaded[0]}; the site must open offline")
    return output
