from __future__ import annotations

import pytest
from front_examples import make_document, make_member


@pytest.fixture
def document():
    return make_document(
        [
            make_member("a", 10, 0.55, 9.0, 0.2),
            make_member("b", 20, 0.95, 5.0, 0.5),
            make_member("c", 30, 0.97, 4.0, 0.7),
            make_member("d", 60, 0.99, 2.0, 0.9),
            make_member("beaten", 61, 0.98, 1.9, 0.9),
        ],
        [make_member("uniform-4bit", 31, 0.96, 3.0, 0.8, is_baseline=True)],
        floor=0.9,
    )
