"""The verbs of the command line, one class each, in the order in which the help lists them."""

from __future__ import annotations

from lfm2_export.commands.adopt import AdoptCommand
from lfm2_export.commands.base import Command, version_text
from lfm2_export.commands.chat import ChatCommand
from lfm2_export.commands.check import BenchCommand, ParityCommand
from lfm2_export.commands.completion import CompletionCommand
from lfm2_export.commands.demo import DemoCommand
from lfm2_export.commands.embed import EmbedCommand
from lfm2_export.commands.export import ExportCommand
from lfm2_export.commands.push import PushCommand
from lfm2_export.commands.quality import QualityCommand
from lfm2_export.commands.run import RunCommand
from lfm2_export.commands.serve import ServeCommand
from lfm2_export.commands.show import InspectCommand, SupportCommand
from lfm2_export.commands.sweep import SweepCommand

COMMANDS: tuple[Command, ...] = (
    ExportCommand(),
    RunCommand(),
    ChatCommand(),
    EmbedCommand(),
    ServeCommand(),
    ParityCommand(),
    QualityCommand(),
    SweepCommand(),
    BenchCommand(),
    AdoptCommand(),
    PushCommand(),
    InspectCommand(),
    SupportCommand(),
    DemoCommand(),
    CompletionCommand(),
)

__all__ = ["COMMANDS", "version_text"]
