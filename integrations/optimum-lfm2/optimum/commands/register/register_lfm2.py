"""Read by optimum-cli when it starts."""

from optimum.commands.export.base import ExportCommand
from optimum_lfm2 import Lfm2ExportCommand

REGISTER_COMMANDS = [(Lfm2ExportCommand, ExportCommand)]
