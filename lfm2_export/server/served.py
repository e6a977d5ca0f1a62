"""The models that a server has, by name."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lfm2_export.backends.base import Runner
from lfm2_export.errors import ConfigError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import listed, shown
from lfm2_export.server.engine import Engine
from lfm2_export.server.errors import ApiError
from lfm2_export.server.limits import Limits
from lfm2_export.server.metrics import Metrics
from lfm2_export.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be served: ``settings`` are those that came with the checkpoint."""

    name: str
    runner: Runner
    tokenizer: Tokenizer
    settings: GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model with its queue."""

    model: Model
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lfm2-export",
            "max_model_len": self.model.runner.context_length,
        }


class Models:
    """Starts an engine for each model.

    Raises:
        ConfigError: two have the same name, or there is none.
    """

    def __init__(self, models: Iterable[Model], limits: Limits):
        models = list(models)
        names = [model.name for model in models]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"models {listed(names)}: each needs a name of its own; rename a folder")
        self.metrics = Metrics(names)
        self._served = {model.name: Served(model=model, engine=self._engine(model, limits)) for model in models}

    def _engine(self, model: Model, limits: Limits) -> Engine:
        return Engine(
            model.name,
            model.runner,
            model.tokenizer,
            self.metrics,
            queue_limit=limits.queue,
            cache_bytes=limits.cache_bytes,
        )

    def all(self) -> list[Served]:
        return list(self._served.values())

    def find(self, name: str | None) -> Served:
        """The one of that name; without one the only model.

        Raises: ApiError.
        """
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None:
            raise ApiError(400, f"model: is missing; give one of {listed(self._served)}", param="model")
        if name not in self._served:
            message = f"model: there is no {shown(name)}, only {listed(self._served)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._served[name]

    def stop(self) -> None:
        """Ends every answer that is under way or waits, without waiting for it."""
        for served in self._served.values():
            served.engine.stop()

    def close(self) -> None:
        """``stop``, and waits."""
        for served in self._served.values():
            served.engine.close()
