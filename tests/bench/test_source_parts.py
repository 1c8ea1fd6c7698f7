"""Functions of a file are taken without what the file does when it is imported."""

from pathlib import Path

import pytest

from crosstile.bench.source_parts import load_parts

SOURCE = """
import math
from somewhere_else import helper
raise SystemExit("the file's own test")
size = 3
sizes = [size]
if helper():
    sizes = [size, size + 1]
class Unused(missing): ...
def area(radius):
    def square(x): return x * x
    return math.floor(square(radius)) * sum(sizes)
"""


def test_only_what_a_function_needs_is_run(tmp_path: Path) -> None:
    path = tmp_path / "tutorial.py"
    path.write_text(SOURCE)
    assert load_parts(path, ["area"], {"helper": lambda: True})["area"](2) == 4 * 7
    assert load_parts(path, ["area"], {"helper": lambda: True, "sizes": [1]})["area"](2) == 4, "given names go first"
    with pytest.raises(ModuleNotFoundError, match="somewhere_else"):
        load_parts(path, ["area"], {})
    with pytest.raises(ValueError, match=r"names: .*tutorial.py has no volume; it must bind every name asked for"):
        load_parts(path, ["area", "volume"], {})
