import pytest

from autocompress.testing.tiny_models import FAMILIES, save_tiny, tiny_model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of a saved tiny model of a family; do not write into it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(family):
        path = root / family
        return path if path.exists() else save_tiny(family, path)

    return folder
