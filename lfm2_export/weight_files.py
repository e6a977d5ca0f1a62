"""Which safetensors files a checkpoint's folder holds: one, or those that its index lists.

In: the folder. Out: its ``Shard`` s, whose headers are checked and together hold what the index says. Counts are
bounded before work is done for them: an index may name a million files.
"""

from __future__ import annotations

from pathlib import Path

from lfm2_export import files, paths
from lfm2_export.config import MOST_TENSORS
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import listed, named, natural, shown
from lfm2_export.safetensors_file import Shard, read_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The largest published models have fewer than 200; opening one takes a tenth of a millisecond.
MOST_SHARDS = 2_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_weights(folder: Path) -> list[Shard]:
    """The weight files' headers, as one file or as the index lists them (one file first, as in transformers).

    Raises:
        CheckpointError: there are none, or one is missing, damaged, or not what the index says.
    """
    if paths.exists(folder / SINGLE, CheckpointError):
        return [read_shard(folder / SINGLE)]
    if paths.exists(folder / INDEX, CheckpointError):
        return _open_indexed(folder / INDEX)
    pickles = paths.names(folder, CheckpointError, lambda name: name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{paths.shown(folder)}: holds only pickled weights ({listed(pickles, room=80)}), which can run code and "
            "stay closed; save the model as safetensors"
        )
    raise CheckpointError(f"{paths.shown(folder)}: has neither {SINGLE} nor {INDEX}; download the weights")


def _open_indexed(index: Path) -> list[Shard]:
    listing = _read_index(index)
    shards = []
    for file, names in listing.items():
        shard = _open_listed(index, file)
        _check_index(index, file, names, set(shard.tensors))
        shards.append(shard)
    return shards


def _read_index(index: Path) -> dict[str, set[str]]:
    """The tensors of each file."""
    weight_map = files.read_json_object(index, index.parent, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{paths.shown(index)}: weight_map is missing or not an object; download it again")
    if len(weight_map) > MOST_TENSORS:
        raise _too_many(index, f"lists {len(weight_map)} tensors", MOST_TENSORS)
    listing: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        _check_plain_name(index, file)
        listing.setdefault(file, set()).add(name)
    if len(listing) > MOST_SHARDS:
        raise _too_many(index, f"lists {len(listing)} files", MOST_SHARDS)
    return listing


def _too_many(index: Path, found: str, most: int) -> CheckpointError:
    return CheckpointError(f"{paths.shown(index)}: {found}, more than the {most} that are opened; download it again")


def _check_plain_name(index: Path, file: object) -> None:
    """A shard's name must be a plain one. (The file itself may be a link: the Hub's cache is made of them.)"""
    if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\:") or not file.isprintable():
        raise CheckpointError(
            f"{paths.shown(index)}: names the file {shown(file)}, which is not a plain name in its folder; "
            "do not use this checkpoint"
        )


def _open_listed(index: Path, file: str) -> Shard:
    path = index.parent / file
    if not paths.exists(path, CheckpointError):
        raise CheckpointError(f"{paths.shown(path)}: is missing, but {index.name} names it; download it again")
    return read_shard(path)


def _check_index(index: Path, file: str, listing: set[str], stored: set[str]) -> None:
    """What a file holds beyond what the index says of it is taken, as by transformers, which reads whole files."""
    if names := listing - stored:
        raise CheckpointError(
            f"{paths.shown(index)}: says that {named(file)} holds {listed(names, room=120)}, which it does not; "
            "download it again",
            details=sorted(names, key=natural),
        )
