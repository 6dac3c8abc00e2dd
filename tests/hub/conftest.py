"""A loopback Hub for a test, and processes that talk to it: see tests/hub_server.py for what it speaks."""

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils
import pytest
from huggingface_hub import HfApi

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
TOKEN = "hf_of_the_loopback_hub"
SECONDS = 240  # of one process

# The client waits a second and more before it repeats a request: here it does not.
PROLOGUE = """
import sys, types
import huggingface_hub.file_download, huggingface_hub.utils._http
for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
    module.time = types.SimpleNamespace(sleep=lambda seconds: None)
"""
BLOCK = (TESTS / "block_package.py").read_text(encoding="utf-8")


def _import_server() -> Any:
    sys.path.insert(0, str(TESTS))
    try:
        return importlib.import_module("hub_server")
    finally:
        sys.path.remove(str(TESTS))


server = _import_server()


class Hub(server.HubServer):
    """The server (`url`, `requests`, `unknown`, `fail`, `heal`, `files`, `commits`), and its clients.

    Args:
        home: Folder for the caches of the clients.
    """

    def __init__(self, home: Path) -> None:
        super().__init__(TOKEN)
        self.home = home

    @property
    def environment(self) -> dict[str, str]:
        """Return a whole environment for a client: of the caller's, nothing that concerns the Hub or a proxy."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "DATASETS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}
        return {**kept, **threads, **server.environment(self.url, TOKEN, str(self.home))}

    def run(
        self, code: str, *arguments: object, with_package: bool = True, with_token: bool = True, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a process of its own that knows this Hub.

        Args:
            code: Python; it is dedented.
            arguments: What `sys.argv[1:]` holds.
            with_package: Whether hf_opentrans can be imported.
            with_token: Whether the process has the owner's token.
            check: Whether to fail where the process does.
        """
        environment = self.environment if with_token else {**self.environment, "HF_TOKEN": ""}
        options = [] if with_package else ["-I"]
        whole = PROLOGUE + ("" if with_package else BLOCK) + textwrap.dedent(code)
        command = [sys.executable, *options, "-c", whole, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, cwd=self.home, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    def paths(self, method: str) -> list[str]:
        """Return the paths of all requests of one method, oldest first."""
        return [request.path for request in self.requests if request.method == method]


@contextmanager
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
    assert hub.errors == []


def pytest_itemcollected(item: Any) -> None:
    if "api" in getattr(item, "fixturenames", ()):
        # huggingface_hub 2.4 uploads large files by an argument that httpx2 has renamed.
        item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return an empty Hub."""
    with _served(tmp_path_factory) as started:
        yield started


@pytest.fixture(scope="module")
def module_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return an empty Hub for all tests of a file."""
    with _served(tmp_path_factory) as started:
        yield started


@pytest.fixture(scope="session")
def _client() -> Iterator[None]:
    """Close the client's connections at the end; it is shared, because each reads all certificates."""
    yield
    huggingface_hub.utils.close_session()


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch, _client: None) -> HfApi:
    """Return the real client of the Hub in this process, with the owner's token; it repeats without waiting.

    Functions of `huggingface_hub` and transformers that take no endpoint reach this Hub too, so that small tests need
    no process of their own. What is set before the first import in real life is set afterwards here.
    """
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.home / "cache"))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    no_waiting = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_waiting)
    monkeypatch.setattr("huggingface_hub.file_download.time", no_waiting)
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def online(hub, api, monkeypatch):
    """Let this process talk to the loopback Hub, as its owner."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", api.token)
    return hub
