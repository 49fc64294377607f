"""The checks of the docs find what they are for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import check_docs  # noqa: E402
import check_snippets  # noqa: E402
import snippet_blocks  # noqa: E402

sys.path.remove(str(ROOT / "scripts"))


def test_every_public_name_is_documented_and_every_page_has_its_place() -> None:
    assert check_docs.undocumented() == []
    assert check_docs.pages_without_a_place() == []


def _package() -> ModuleType:
    class Told:
        """It has one."""

        @property
        def bare(self) -> int:
            return 1

        @classmethod
        def said(cls) -> None:
            """It has one."""

    def silent() -> None: ...

    def short(told: int, untold: int) -> None:
        """Have arguments.

        Args:
            told: it is.
        """

    package = ModuleType("toy")
    Told.__module__ = silent.__module__ = short.__module__ = "toy._inner"
    package.__dict__.update(
        Told=Told, Alias=Told, silent=silent, short=short, __all__=["Told", "Alias", "silent", "short"]
    )
    return package


def test_a_name_that_is_not_documented_is_named(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    page.write_text("# Names\n\n::: ullage.Told\n::: ullage.short\n::: ullage.gone\n")
    assert check_docs.undocumented(_package(), [page]) == [
        "docs: `::: ullage.gone` is no public name",
        "ullage.Told.bare has no docstring",
        "ullage.Alias.bare has no docstring",
        "ullage.silent is public, but no page of docs/ has `::: ullage.silent`",
        "ullage.silent has no docstring",
        "ullage.short: its docstring has no entry for 'untold'",
    ]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("[here](README.md#top) [there](docs/there.md) [web](https://example.org/x)")
    assert check_docs.broken_links(page) == ["README.md: no docs/there.md"]


def test_words_that_the_glossary_replaces_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(
        'x = 1  # its tensors\n# leave and are\n"""Made again; let go of\n    afterwards, as the plans of\n    before."""\n'
    )
    assert check_docs.replaced_words(page) == [
        "page.py:3: 'let go of': say free, release, drop",
        "page.py:1: 'tensors\\n# leave': say offload",
        "page.py:3: 'Made again': say replay, recompute",
        "page.py:4: 'of\\n    before': say older, earlier",
    ]


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a 1\nb 2\n", "a 1\nb 2\n", True),
        ("a 1\nb 2\n", "a 1\n", False),
        ("a 1\nb 2\nc\n", "a 1\n...\n", True),
        ("a 1\nb 2\nc\n", "...\nc\n", True),
        ("a 1\n", "a 2\n", False),
        ("peak 4.5 MiB in 12.5 ms\n", "peak 4.5 MiB in 9 ms\n", True),
        ("peak 4.5 MiB in 12.5 ms\n", "peak 4.6 MiB in 12.5 ms\n", False),
        ("at (tests/x.py:3), [0]  \n", "at (...), [0]\n", True),
    ],
)
def test_what_is_printed_is_compared(printed: str, expected: str, same: bool) -> None:
    assert (check_snippets.differs(printed, expected) is None) is same


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('ullage plan TARGET --budget "6GiB" -o plan.json', None),
        ("ullage report TARGET [--plan plan.json | --budget 6GiB] -o r.html", None),
        ("ullage profile|plan|bounds TARGET", None),
        ("ullage plan TARGET --budged 6GiB", "`ullage plan` has no option --budged"),
        ("ullage plane TARGET", "no command 'plane'"),
    ],
)
def test_commands_in_pages_are_compared_with_ours(line: str, wrong: str | None) -> None:
    assert check_snippets.unknown_words(line) == wrong


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n```text output\n1\n```\nand\n\n```python continued\nprint(2)\n```\n```text output\n2\n```\n"
        "```console\n$ ullage plan x \\\n  --json\nplan\n$ python y\n```\n\n    ullage devices\n```text\nullage fit x\n```\n"
    )
    first, command, indented, text = snippet_blocks.read_blocks(page)
    assert (first.output, first.source.split()) == ("1\n2\n", ["print(1)", "print(2)"])
    assert first.source.splitlines()[9] == "print(2)"  # at its line of the page
    assert command.commands == [("ullage plan x --json", "plan"), ("python y", None)]
    assert (indented.lines_of_ours, text.lines_of_ours) == (["ullage devices"], ["ullage fit x"])
    page.write_text("```pyhton\n```\n")
    with pytest.raises(snippet_blocks.SnippetError, match=r"page\.md:1: 'pyhton': expected python"):
        snippet_blocks.read_blocks(page)


def test_a_block_that_fails_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text output\n2\n```\n\n```python\nraise SystemExit(3)\n```\n")
    printed, left = map(check_snippets.check, snippet_blocks.read_blocks(page))
    assert printed is not None and printed.startswith("it does not print '2'; it prints:\n1")
    assert left == "exit code 3\n"
