"""The code blocks of a Markdown file: see scripts/check_snippets.py for what may stand after a fence."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")
WORDS = {"python": ([], ["no-run"], ["continued"]), "console": ([], ["no-run"])}
TEXT = {"text", "yaml", "json", "toml", ""}  # what is not run


class SnippetError(Exception):
    """A Markdown file that can't be understood."""


@dataclass
class Block:
    """One program: the block at `line`, with those that continue it, or the commands of one block."""

    path: Path
    line: int
    language: str  # python, console or text
    source: str = ""  # blank lines before the code: its line numbers are the file's
    run: bool = True
    output: str | None = None  # what the Python program prints
    commands: list[tuple[str, str | None]] = field(default_factory=list)  # with what each prints
    lines_of_ours: list[str] = field(default_factory=list)  # commands of ullage, run or not

    @property
    def place(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """Return the programs of a Markdown file, and its other blocks that have commands of ours.

    Raises:
        SnippetError: a fence is not closed, or an info string is not known.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks: list[Block] = []
    index = 0
    while index < len(lines):
        fence = FENCE.match(lines[index])
        index += 1
        if fence is None:
            if lines[index - 1].startswith("    ullage "):  # an indented block
                blocks.append(_text(path, index, [lines[index - 1].strip()]))
            continue
        opened = index  # the line of the fence, counted from 1
        body: list[str] = []
        while index < len(lines) and lines[index].strip() != fence["ticks"]:
            # a block inside a list is indented with it
            body.append(re.sub(rf"^ {{0,{len(fence['indent'])}}}", "", lines[index]))
            index += 1
        if index == len(lines):
            raise SnippetError(f"{path}:{opened}: this block is not closed")
        index += 1
        _add(blocks, path, opened, fence["info"].strip(), body)
    return [block for block in blocks if block.language != "text" or block.lines_of_ours]


def _add(blocks: list[Block], path: Path, opened: int, info: str, body: list[str]) -> None:
    language, *words = info.split() or [""]
    if info == "text output":
        if not blocks or blocks[-1].language != "python":
            raise SnippetError(f"{path}:{opened}: no Python block before this one that could print it")
        blocks[-1].output = (blocks[-1].output or "") + "\n".join(body) + "\n"
    elif language in TEXT and not words:
        blocks.append(_text(path, opened, body))
    elif words not in WORDS.get(language, ()):
        known = ", ".join(" ".join([name, *said]) for name, all_said in WORDS.items() for said in all_said)
        raise SnippetError(
            f"{path}:{opened}: '{info}': expected {known}, text output, {', '.join(sorted(TEXT - {''}))}"
        )
    elif language == "console":
        commands = _commands(body)
        if not commands:
            raise SnippetError(f"{path}:{opened}: a console block with no line that starts with '$ '")
        ours = [line for line, _ in commands if line.startswith("ullage ")]
        blocks.append(Block(path, opened, "console", run=not words, commands=commands, lines_of_ours=ours))
    elif words == ["continued"]:
        before = next((block for block in reversed(blocks) if block.language == "python"), None)
        if before is None:
            raise SnippetError(f"{path}:{opened}: no block before this one to continue")
        before.source += "\n" * (opened - before.source.count("\n")) + "\n".join(body) + "\n"
        blocks.append(blocks.pop(blocks.index(before)))  # what comes next is its output
    else:
        source = "\n" * opened + "\n".join(body) + "\n"
        blocks.append(Block(path, opened, "python", source, run=not words))


def _commands(body: list[str]) -> list[tuple[str, str | None]]:
    """Return each command with what it prints; None where nothing is shown."""
    found: list[tuple[str, list[str]]] = []
    for line in body:
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0][:-1] + line.strip(), [])
        elif found:
            found[-1][1].append(line)
    return [(line, "\n".join(shown) if "".join(shown).strip() else None) for line, shown in found]


def _text(path: Path, line: int, body: list[str]) -> Block:
    ours = [re.sub(r"^(\$ |- run: )", "", text.strip()) for text in body]
    return Block(path, line, "text", run=False, lines_of_ours=[text for text in ours if text.startswith("ullage ")])
