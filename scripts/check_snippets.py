"""Run the code blocks of the docs, each in a process of its own, and compare what they print.

    python scripts/check_snippets.py [FILE.md ...]      default: README.md and docs/**/*.md

The info string of a fenced block says what to do with it:

    python              run it
    python continued    run it as the end of the block before it in this file
    python no-run       compile it only
    text output         what the Python block before it prints
    console             commands, each after "$ ", and what they print; `ullage` and `python` are known
    console no-run      the same, not run (minutes, or a device that is not here)

In what is printed a line "..." stands for any lines, "..." within a line for any text, and a number with a unit of time for
any such number. Every command of `ullage` in any block, run or not, is compared with the verbs and options that there are.

A block runs in an empty directory with links to the repository's folders, so that it can read `configs/` and
`examples/` and leaves nothing behind. Line numbers in tracebacks are those of the Markdown file.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from snippet_blocks import ROOT, Block, SnippetError, read_blocks

TIMEOUT_SECONDS = 600
SECONDS = re.compile(r"\d[\d.,]*(?= ?(?:ns|µs|us|ms|s)\b)")


def differs(printed: str, expected: str) -> str | None:
    """Return what is wrong with what was printed, or None."""
    lines = [line.rstrip() for line in expected.strip("\n").splitlines()]
    parts = [
        "(?:.*\n)*?" if line.strip() == "..." else ".*?".join(map(_literally, line.split("..."))) + " *\n"
        for line in lines
    ]
    if re.fullmatch("".join(parts), printed.strip("\n") + "\n"):
        return None
    # the first line that no line of the output is like
    for line, part in zip(lines, parts, strict=True):
        if not re.search(f"(?m)^{part}", printed + "\n"):
            return f"it does not print {line!r}; it prints:\n{printed}"
    return f"it prints more, or in another order:\n{printed}"


def _literally(text: str) -> str:
    return r"\d[\d.,]*".join(map(re.escape, SECONDS.split(text)))


def unknown_words(line: str) -> str | None:
    """Return what is wrong with a command of ours: a verb or an option that does not exist."""
    from click import Context

    from ullage_cli._main import cli

    words = shlex.split(line.replace("|", " ").replace("[", " ").replace("]", " "), comments=True)
    if len(words) < 2 or words[0] != "ullage" or words[1].startswith("-"):
        return None
    command = cli.get_command(Context(cli), words[1])
    if command is None:
        # `ullage profile|plan|bounds` names several
        return None if "|" in line.split()[1] else f"no command {words[1]!r}"
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    wrong = [word for word in words[2:] if word.startswith("-") and word.partition("=")[0] not in known]
    return f"`ullage {words[1]}` has no option {wrong[0]}" if wrong else None


def run(work: Callable[[], object], directory: str) -> tuple[str | None, str]:
    """Run a function in a fork of this process; return what went wrong, and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_a_process(work, directory, out.fileno(), err.fileno())
        ended = time.monotonic() + TIMEOUT_SECONDS
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"still running after {TIMEOUT_SECONDS} s", ""
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return f"exit code {code}\n{err.read()}" if code else None, out.read()


def _be_a_process(work: Callable[[], object], directory: str, out: int, err: int) -> None:
    """Never return: what the caller would do next is the parent's."""
    code = 1
    try:
        os.setsid()
        os.chdir(directory)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
        sys.path[0] = ""
        work()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(line: str) -> Callable[[], object]:
    """Return a function that is a command of `ullage` or of `python`."""
    words = shlex.split(line)

    def call() -> object:
        sys.argv = words
        if words[0] == "ullage":
            from ullage_cli import main

            return main()
        if words[0] == "python":
            sys.argv = words[1:]
            return runpy.run_path(words[1], run_name="__main__")
        raise SnippetError(f"{words[0]}: expected a command of ullage or python")

    return call


def check(block: Block) -> str | None:
    """Return what is wrong with a block, or None."""
    for line in block.lines_of_ours:
        problem = unknown_words(line)
        if problem is not None:
            return f"{line}: {problem}"
    if block.language == "python":
        try:
            code = compile(block.source, str(block.path), "exec")
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        runs: list[tuple[Callable[[], object], str | None]] = [
            (lambda: exec(code, {"__name__": "__main__"}), block.output)
        ]
    else:
        runs = [(command(line), output) for line, output in block.commands]
    if not block.run:
        return None
    with tempfile.TemporaryDirectory() as directory:
        for folder in ROOT.iterdir():
            if folder.is_dir() and not folder.name.startswith("."):
                (Path(directory) / folder.name).symlink_to(folder, target_is_directory=True)
        for work, expected in runs:
            problem, printed = run(work, directory)
            if problem is None and expected is not None:
                problem = differs(printed, expected)
            if problem is not None:
                return problem
    return None


def timed_check(block: Block) -> tuple[str | None, float]:
    """Return what is wrong with a block, and the seconds that this took to find out."""
    started = time.perf_counter()
    return check(block), time.perf_counter() - started


def main(arguments: list[str]) -> int:
    paths = [Path(a).resolve() for a in arguments] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    try:
        blocks = [block for path in paths for block in read_blocks(path)]
    except (OSError, SnippetError) as error:
        print(error, file=sys.stderr)
        return 2
    import torch  # noqa: F401  imported once: the processes of the blocks are forks of this one

    import ullage  # noqa: F401

    failed = 0
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 8)) as pool:
        for block, (problem, seconds) in zip(blocks, pool.imap(timed_check, blocks), strict=True):
            if problem is not None:
                failed += 1
                print(f"{block.place}: this block fails: {problem}", file=sys.stderr, flush=True)
            else:
                print(f"{block.place}: {'ok' if block.run else 'read'}, {seconds:.1f} s", flush=True)
    print(f"{len(blocks)} blocks in {len(paths)} files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
