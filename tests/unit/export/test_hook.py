import subprocess
import sys

import pytest

IS_LIGHT = """
heavy = {"torch", "transformers", "ray", "optuna", "datasets", "sklearn"} & sys.modules.keys()
assert not heavy, heavy
"""
IS_REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "autocompress" in AUTO_QUANTIZER_MAPPING
assert "autocompress" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert not [f for f in sys.meta_path if type(f).__name__ == "_RegistryFinder"]
"""
INSTALL = "from autocompress.export.hook import install; install(); install()\n"


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", f"import sys\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    run("import autocompress\n" + INSTALL + IS_LIGHT)


@pytest.mark.slow
def test_the_format_is_registered_when_transformers_loads_later() -> None:
    run(
        INSTALL
        + IS_LIGHT
        + "import transformers\n"
        + IS_LIGHT.replace(', "transformers"', "")
        + IS_REGISTERED
    )


@pytest.mark.slow
def test_the_format_is_registered_at_once_when_transformers_is_there() -> None:
    run("from transformers import AutoModel\n" + INSTALL + IS_REGISTERED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["transformers.modeling_utils", "transformers.quantizers", "transformers.models.bert"]
)
def test_whatever_part_of_transformers_is_imported_first(first: str) -> None:
    run(INSTALL + f"import {first}\nfrom transformers import BertModel\n" + IS_REGISTERED)


@pytest.mark.slow
def test_a_transformers_with_another_interface_still_imports() -> None:
    run(
        INSTALL
        + "sys.modules['autocompress.export.quantizer'] = None\n"  # makes its import fail
        + "import transformers.quantizers.auto\n"
        + "assert 'autocompress' not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING\n"
    )
