from __future__ import annotations

import pytest
from example_run import make_run


@pytest.fixture(scope="session")
def run_of_sixty():
    return make_run()


@pytest.fixture
def document(run_of_sixty):
    return run_of_sixty[0]


@pytest.fixture
def trials(run_of_sixty):
    return run_of_sixty[1]


@pytest.fixture
def provenance(run_of_sixty):
    return run_of_sixty[2]
