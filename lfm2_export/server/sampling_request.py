"""What chat and completion requests have in common: how tokens are chosen, when they end, how they are given out.

In: a body's fields. Out: settings over the artifact's own. A field that would change the answer and that nothing here
does is refused by name; one that nobody knows is ignored, as OpenAI's servers do.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import shown
from lfm2_export.server.errors import ApiError, invalid
from lfm2_export.server.fields import Body, flag, integer, number, refuse_unless

_MOST_STOPS, _LONGEST_STOP = 16, 256
_LEAVE_OUT = "leave it out"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``max_tokens`` None: as many as there is room for. ``stops``: texts that end the answer."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    def config(self, settings: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
        """``settings`` with what was asked for. A seed alone does not ask for sampling."""
        asked = any(value is not None for value in (self.temperature, self.top_p, self.top_k, self.min_p))
        try:
            return settings.override(
                do_sample=settings.do_sample if not asked else self.temperature != 0,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
                max_new_tokens=max_new_tokens,
            )
        except GenerationError as error:
            raise ApiError(400, str(error)) from error


def parse_sampling(body: Body) -> Sampling:
    """Raises: ApiError."""
    _refuse_unsupported(body)
    stream = flag(body, "stream", False)
    limit = integer(body, "max_completion_tokens", 1)
    return Sampling(
        temperature=number(body, "temperature", 0, 2),
        top_p=number(body, "top_p", 0, 1),
        top_k=integer(body, "top_k", 0),
        min_p=number(body, "min_p", 0, 1),
        repetition_penalty=number(body, "repetition_penalty", 0.01, 100),
        seed=_seed(body),
        max_tokens=limit if limit is not None else integer(body, "max_tokens", 1),
        stops=_stops(body),
        stream=stream,
        include_usage=stream and _include_usage(body),
    )


def _refuse_unsupported(body: Body) -> None:
    refuse_unless(body, "n", (1,), "one answer a request is given: send it several times")
    for name in ("frequency_penalty", "presence_penalty"):
        refuse_unless(body, name, (0,), "use repetition_penalty")
    refuse_unless(body, "logit_bias", ({},), _LEAVE_OUT)


def _seed(body: Body) -> int | None:
    """A negative one is a seed, too, for some clients."""
    seed = integer(body, "seed", -(2**63), 2**64)
    return None if seed is None else seed % 2**64


def _stops(body: Body) -> tuple[str, ...]:
    given = body.get("stop")
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"{shown(given, 40)} is not usable; give a string or a list of strings")
    if len(stops) > _MOST_STOPS or any(not 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise invalid("stop", f"give at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
    return tuple(stops)


def _include_usage(body: Body) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("stream_options", f"{shown(options, 40)} is not usable; give an object")
    return flag(options, "include_usage", False)
