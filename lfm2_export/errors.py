"""What can go wrong, as exceptions: one base class and the few kinds that a caller may want to catch.

Every message is one line that names the place, the value and the remedy. The CLI prints it and exits with
``exit_code``: 1 a check fell short, 2 the input or the request was wrong, 3 the machine could not do it.
"""

from __future__ import annotations

from collections.abc import Iterable

from lfm2_export.messages import one_line


class Lfm2ExportError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one printable line of at most ``messages.MESSAGE_LIMIT`` characters, whatever it quotes. ``details``
    are lines behind it for who asks (``--verbose``): all missing tensors where the message names the first eight.
    """

    exit_code = 2

    def __init__(self, message: str, *, details: Iterable[str] = ()):
        super().__init__(one_line(message))
        self.details = tuple(details)


class ConfigError(Lfm2ExportError):
    """A config value is unknown, out of range, or contradicts another one."""


class CheckpointError(Lfm2ExportError):
    """A checkpoint cannot be found, is not of a known family, or its files are damaged."""


class QuantizationError(Lfm2ExportError):
    """A scheme is unknown or does not fit a tensor."""


class CalibrationError(Lfm2ExportError):
    """A text or a file of statistics is not what a calibration needs."""


class ExportError(Lfm2ExportError):
    """The program could not be lowered as asked."""


class ArtifactError(Lfm2ExportError):
    """An artifact's folder is missing, incomplete, altered, or in the way of a new one."""


class RunnerError(Lfm2ExportError):
    """A runner was asked for something that its program cannot do."""


class ContextLimitError(RunnerError):
    """The prompt, or the prompt and what was generated, does not fit the program's context."""


class GenerationError(Lfm2ExportError):
    """A generation setting, prompt or chat template is not usable."""


class MissingPackageError(Lfm2ExportError, ImportError):
    """Something asks for a package that only an extra of this one brings; the message has the command."""


class ResourceError(Lfm2ExportError):
    """The machine lacks the memory or disk that the work needs."""

    exit_code = 3
