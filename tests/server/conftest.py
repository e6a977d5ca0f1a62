"""Servers in a thread of the test process, on a port that is free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import uvicorn

from lfm2_export import load_runner
from lfm2_export.backends.base import Runner
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.server.access import Access
from lfm2_export.server.app import create_app
from lfm2_export.server.embeddings import EncoderQueue
from lfm2_export.server.limits import Limits
from lfm2_export.server.listening import bind, url_of
from lfm2_export.server.served import Model, Models
from lfm2_export.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers at ``url``."""

    url: str
    models: Models

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def count(self, name: str) -> float:
        """A counter or gauge without its model."""
        lines = self.http().get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """``serve(model, limits=..., access=...)``."""
    with ExitStack() as stack:

        def started(
            *models: Model,
            limits: Limits = Limits(),  # noqa: B008 (frozen)
            access: Access = Access(),  # noqa: B008 (frozen)
            encoders: Sequence[EncoderQueue] = (),
        ) -> Running:
            return stack.enter_context(_running(Models(models, limits, encoders), limits, access))

        yield started


@contextmanager
def _running(models: Models, limits: Limits, access: Access) -> Iterator[Running]:
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(models, limits, access), log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield Running(url=url_of(bound), models=models)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def folder(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


def opened(folder: Path, name: str = "tiny-dense", **options: object) -> Model:
    """A bundled model as ``lfm2-export serve`` opens it."""
    runner: Runner = load_runner(folder, scheme="q4", threads=1, **options)  # type: ignore[arg-type]
    settings = GenerationConfig.from_file(folder / "generation_config.json")
    return Model(name=name, runner=runner, tokenizer=Tokenizer.from_dir(folder), settings=settings)


@pytest.fixture(scope="module")
def server(serve: Serve, folder: Path) -> Running:
    """q4 of tiny-dense, on our kernels where they can be had."""
    return serve(opened(folder))
