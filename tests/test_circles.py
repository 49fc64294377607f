"""No file of ullage imports, for types or in a function, what leads back to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "circles.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("circles", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_none() -> None:
    script = _script()
    graph = script.imports(script.SOURCE)
    assert len(graph) > 200 and "ullage.planner.study._study" in graph["ullage.planner.decide._confirm"]
    assert script.circles(graph) == script.circles(script.by_folder(graph, script.SOURCE)) == []


def test_types_and_functions_count(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from box.a._one import One",
        "a/__init__.py": "from box.a._one import One",
        "a/_one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from box.b import Two\nclass One: ...",
        "b/__init__.py": "from box.b._two import Two",
        "b/_two.py": "class Two:\n    def make(self):\n        from box import One\n        return One()",
        "b/_three.py": "import box.b._two",
    }
    for name, text in files.items():
        path = tmp_path / "box" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = _script()
    graph = script.imports(tmp_path / "box")
    assert script.circles(graph) == [["box.a._one", "box.b._two"]]
    assert script.circles(script.by_folder(graph, tmp_path / "box")) == [["box.a", "box.b"]]
    (tmp_path / "box/b/_two.py").write_text("class Two: ...")
    assert script.circles(script.imports(tmp_path / "box")) == []
