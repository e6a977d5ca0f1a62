"""The models that a server has, by name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from lfm2_export.backends.base import Runner
from lfm2_export.constraints import Grammars
from lfm2_export.errors import ConfigError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.manifest import DECODER
from lfm2_export.messages import listed, shown
from lfm2_export.server.embeddings import EncoderQueue
from lfm2_export.server.engine import Engine
from lfm2_export.server.errors import ApiError
from lfm2_export.server.limits import Limits
from lfm2_export.server.metrics import Metrics
from lfm2_export.speculation import Report, SpeculativeRunner
from lfm2_export.text import Tokenizer

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be served: ``settings`` are those that came with the checkpoint. ``grammars`` are made of the rest."""

    name: str
    runner: Runner
    tokenizer: Tokenizer
    settings: GenerationConfig

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.runner.vocab_size, self.settings.stop_token_ids)


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
            "kind": DECODER,
        }


class Models:
    """Starts an engine for each model, and knows the encoders.

    Raises:
        ConfigError: two have the same name, or there is none.
    """

    def __init__(self, models: Iterable[Model], limits: Limits, encoders: Iterable[EncoderQueue] = ()):
        models, encoders = list(models), list(encoders)
        names = [model.name for model in models] + [encoder.name for encoder in encoders]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"models {listed(names)}: each needs a name of its own; rename a folder")
        self.metrics = Metrics([model.name for model in models])
        self._served = {model.name: Served(model=model, engine=self._engine(model, limits)) for model in models}
        self._encoders = {encoder.name: encoder for encoder in encoders}

    def _engine(self, model: Model, limits: Limits) -> Engine:
        return Engine(
            model.name,
            model.runner,
            model.tokenizer,
            self.metrics,
            parallel=limits.parallel,
            queue_limit=limits.queue,
            cache_bytes=limits.cache_bytes,
        )

    def all(self) -> list[Served]:
        """Those that generate text."""
        return list(self._served.values())

    def reports(self) -> dict[str, Report]:
        """What speculation did so far, of the models that have it."""
        runners = {name: served.model.runner for name, served in self._served.items()}
        return {name: one.report_so_far for name, one in runners.items() if isinstance(one, SpeculativeRunner)}

    def to_json(self) -> list[dict[str, Any]]:
        served = [served.to_json() for served in self._served.values()]
        return served + [encoder.to_json() for encoder in self._encoders.values()]

    def show(self, name: str) -> dict[str, Any]:
        """Raises: ApiError."""
        if name in self._encoders:
            return self._encoders[name].to_json()
        return _found(name, self._served, self._encoders, "").to_json()

    def find(self, name: str | None) -> Served:
        """The one of that name; without one the only model that generates text.

        Raises: ApiError.
        """
        return _found(name, self._served, self._encoders, "is an encoder; use /v1/embeddings")

    def find_encoder(self, name: str | None) -> EncoderQueue:
        """Likewise. Raises: ApiError."""
        return _found(name, self._encoders, self._served, "gives no embeddings; use /v1/chat/completions")

    def stop(self) -> None:
        """Ends every answer that is under way or waits, without waiting for it."""
        for served in self._served.values():
            served.engine.stop()
        for encoder in self._encoders.values():
            encoder.stop()

    def close(self) -> None:
        """``stop``, and waits."""
        self.stop()
        for served in self._served.values():
            served.engine.close()
        for encoder in self._encoders.values():
            encoder.close()


def _found(name: str | None, kind: Mapping[str, Kind], others: Mapping[str, object], why_not: str) -> Kind:
    if name is None and len(kind) == 1:
        return next(iter(kind.values()))
    if name is None and kind:
        raise ApiError(400, f"model: is missing; give one of {listed(kind)}", param="model")
    if name is None or name in others:
        raise ApiError(400, f"model: {listed([name] if name else others)} {why_not}", param="model")
    if name not in kind:
        message = f"model: there is no {shown(name)}, only {listed({**kind, **others})}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return kind[name]
