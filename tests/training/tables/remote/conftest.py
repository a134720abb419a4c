import datasets
import pytest

from tests.support.web_server import WebServer
from training.tables.remote import fetching, pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own, and nothing known of hosts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    pictures._failed.clear()
    fetching._unanswered.clear()
    return tmp_path / "cache"


@pytest.fixture
def web():
    with WebServer() as server:
        yield server
