import socket

import pytest

from autocompress.models import sources


@pytest.fixture
def _plain_network(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "getproxies", dict)


def unreachable(*_):
    raise socket.gaierror("no such host")


@pytest.mark.usefixtures("_plain_network")
def test_the_hub_is_offline_if_its_name_does_not_resolve(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    assert sources.hub_is_offline()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not sources.hub_is_offline()


@pytest.mark.usefixtures("_plain_network")
def test_a_proxy_or_a_mirror_is_taken_to_reach_the_hub(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert not sources.hub_is_offline()
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(sources, "getproxies", lambda: {"https": "http://proxy.example"})
    assert not sources.hub_is_offline()


@pytest.mark.usefixtures("_plain_network")
def test_the_users_offline_switch_is_obeyed(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.hub_is_offline()


def test_a_home_relative_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert sources.resolve_source("~/model") == str(tmp_path / "model")


def test_a_hub_id_is_left_alone():
    assert sources.resolve_source("owner/some-model") == "owner/some-model"
