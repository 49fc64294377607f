"""Run the Python blocks of the docs, each in a process of its own.

    python scripts/check_snippets.py [FILE.md ...]      default: README.md and docs/*.md

The info string of a fenced block says what to do with it:

    python              run it
    python continued    run it as the end of the block before it in this file
    python no-run       compile it only

A block runs in an empty directory with links to the repository's folders, so that it can read `configs/` and
`examples/` and leaves nothing behind. Line numbers in tracebacks are those of the Markdown file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 600
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")
# The block arrives on standard input, under the name and at the lines of the file it is from.
RUNNER = "import sys; exec(compile(sys.stdin.read(), sys.argv.pop(1), 'exec'))"


class SnippetError(Exception):
    """A Markdown file that can't be understood."""


@dataclass
class Block:
    """One program: the block at `line`, with those that continue it."""

    path: Path
    line: int
    source: str  # blank lines before the code: its line numbers are the file's
    run: bool

    @property
    def place(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """Return the Python programs of a Markdown file.

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
        language, *words = fence["info"].split() or [""]
        if language != "python":
            continue
        if words not in ([], ["no-run"], ["continued"]):
            raise SnippetError(f"{path}:{opened}: '{fence['info'].strip()}': expected python [no-run|continued]")
        code = "\n".join(body) + "\n"
        if words == ["continued"]:
            if not blocks:
                raise SnippetError(f"{path}:{opened}: no block before this one to continue")
            before = blocks[-1]
            before.source += "\n" * (opened - before.source.count("\n")) + code
        else:
            blocks.append(Block(path, opened, "\n" * opened + code, run=not words))
    return blocks


def check(block: Block) -> str | None:
    """Return what is wrong with a block, or None."""
    try:
        compile(block.source, str(block.path), "exec")
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    if not block.run:
        return None
    with tempfile.TemporaryDirectory() as directory:
        for folder in ROOT.iterdir():
            if folder.is_dir() and not folder.name.startswith("."):
                (Path(directory) / folder.name).symlink_to(folder, target_is_directory=True)
        command = [sys.executable, "-c", RUNNER, str(block.path)]
        try:
            done = subprocess.run(
                command, cwd=directory, input=block.source, text=True, check=False, timeout=TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"still running after {TIMEOUT_SECONDS} s"
    return f"exit code {done.returncode}" if done.returncode else None


def main(arguments: list[str]) -> int:
    paths = [Path(a).resolve() for a in arguments] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    try:
        blocks = [block for path in paths for block in read_blocks(path)]
    except (OSError, SnippetError) as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for block in blocks:
        started = time.perf_counter()
        problem = check(block)
        seconds = time.perf_counter() - started
        sys.stdout.flush()
        if problem is not None:
            failed += 1
            print(f"{block.place}: this block fails: {problem}", file=sys.stderr, flush=True)
        else:
            print(f"{block.place}: {'ok' if block.run else 'compiled'}, {seconds:.1f} s", flush=True)
    print(f"{len(blocks)} blocks in {len(paths)} files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
