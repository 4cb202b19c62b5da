from __future__ import annotations

import subprocess
import sys

HEAVY = ("transformers", "datasets", "pandas", "pyarrow", "sklearn", "optuna", "ray")


def test_importing_the_package_imports_nothing_heavier_than_torch():
    script = (
        "import sys, autocompress.evaluate\n"
        "autocompress.evaluate.load_corpus('python-docs')\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
