"""What README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu_readme, records

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_example_runs():
    example, _trl = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0.6931 ")


def test_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_gpu_section_is_of_the_results():
    page = (Path(__file__).parent.parent / "benchmarks" / "README.md").read_text()
    assert gpu_readme.section(records.RESULTS / "h200") in page
