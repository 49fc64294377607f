"""Run every ```python block of the given Markdown files; fail with file and line of the one that fails.

A block whose info string is `python no-run` is only compiled; `python continued` is appended to the block before it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def blocks(path: Path) -> list[tuple[int, str, bool]]:
    """Return (line, source, run) of each block."""
    found: list[tuple[int, str, bool]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        info = lines[index].strip()
        index += 1
        if not info.startswith("```python"):
            if info.startswith("```"):
                while lines[index].strip() != "```":
                    index += 1
                index += 1
            continue
        start, source = index, []
        while lines[index].strip() != "```":
            source.append(lines[index])
            index += 1
        index += 1
        text = "\n".join(source) + "\n"
        if "continued" in info:
            line, before, run = found.pop()
            found.append((line, before + text, run))
        else:
            found.append((start + 1, text, "no-run" not in info))
    return found


def main(paths: list[str]) -> int:
    failed = 0
    for name in paths:
        for line, source, run in blocks(Path(name)):
            compile(source, f"{name}:{line}", "exec")
            if run and subprocess.run([sys.executable, "-W", "ignore", "-c", source], check=False).returncode:
                print(f"{name}:{line}: this block fails", file=sys.stderr)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
