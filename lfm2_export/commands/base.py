"""What every verb is, and arguments that several of them share."""

from __future__ import annotations

import argparse
import platform
from typing import Any, Protocol

from lfm2_export import __version__
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.base import Kernels, KvCache, RunnerOptions
from lfm2_export.kernels import build, targets
from lfm2_export.packages import listed_versions
from lfm2_export.resources import processor_name


class Command(Protocol):
    """One verb: its arguments, and what it does with them."""

    name: str
    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int:
        """Returns the exit code."""


def given(text: str) -> str:
    """An argument that names something. An empty one would be taken for the folder that the command runs in, as where
    a script's variable is not set.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give a name, or . for this folder")
    return text


def add_artifact(parser: argparse.ArgumentParser, *, on_hub: bool = True) -> None:
    """``on_hub``: what is given may also be a repository (``hub_artifacts``)."""
    more = ", or organization/name[@revision] on the Hub" if on_hub else ""
    what = f"a folder that `lfm2-export export` wrote, or a program in it{more}"
    parser.add_argument("artifact", metavar="DIR", type=given, help=what)
    add_program_choice(parser)


def add_program_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", help="which backend's program (default: onnx where the folder has it)")
    parser.add_argument("--scheme", "-s", help="which scheme's program (default: the preferred one in the folder)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", "-t", type=int, metavar="N", help="CPU threads (default: every core)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """How a program is run here."""
    add_threads(parser)
    parser.add_argument(
        "--kernels",
        choices=[str(kernels) for kernels in Kernels],
        help="lfm2: our operators; stock: the runtime's own (default, auto: ours where they can be had)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=[str(kept) for kept in KvCache],
        help="int8: keys and values in a quarter of the memory, for onnx's q4 and q8 on our operators (default: float)",
    )


def runner_options(options: argparse.Namespace) -> RunnerOptions:
    """What ``add_machine`` asked for."""
    return RunnerOptions.parse(threads=options.threads, kernels=options.kernels, kv_cache=options.kv_cache)


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", type=given, help="branch, tag or commit of a Hub checkpoint")
    parser.add_argument(
        "--config-from",
        metavar="CHECKPOINT",
        type=given,
        help="of a GGUF file: take config, tokenizer and chat template from this folder or Hub id instead",
    )
    parser.add_argument(
        "--lora",
        metavar="DIR",
        type=given,
        help="merge this LoRA adapter, as peft saves it, into the checkpoint's weights",
    )
    parser.add_argument("--offline", action="store_true", help="take Hub checkpoints from the local cache only")


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """What ``add_source`` asked for, as arguments of the functions that open a checkpoint."""
    return {name: getattr(options, name) for name in ("revision", "offline", "config_from", "lora")}


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def version_text() -> str:
    """Our version and that of every runtime found, a line each."""
    lines = [f"lfm2-export {__version__}", f"python {platform.python_version()}"]
    lines += [f"{name} {version or 'not installed'}" for name, version in listed_versions().items()]
    lines.append(f"processor: {processor_name()}, threads: {check_threads(None)}")
    return "\n".join([*lines, f"our kernels: {_kernels()}"])


def _kernels() -> str:
    """For which instructions our operators in ONNX Runtime run; they are built at first use, not to be asked for it."""
    library = build.built_onnx_library()
    if library is None:
        return "not built yet"
    try:
        return targets.chosen(targets.runnable(library))
    except OSError as error:
        return f"{library} cannot be loaded ({error})"
