"""What is wrong with a request, as OpenAI's servers say it."""

from __future__ import annotations

from typing import Any

from lfm2_export.errors import ContextLimitError, Lfm2ExportError, ResourceError


class ApiError(Exception):
    """An HTTP status and its JSON; ``param`` names the field of the request."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str, problem: str, *, code: str | None = None) -> ApiError:
    """A 400 that names the field, what is wrong with it and what to give."""
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


def about_to_end() -> ApiError:
    return ApiError(503, "the server is about to end; ask another one")


def translated(error: Exception) -> ApiError:
    """One of ours as what the client is told; of a bug, only that it is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLimitError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ResourceError):
        return ApiError(503, str(error))
    if isinstance(error, Lfm2ExportError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error; the server's log has it")
