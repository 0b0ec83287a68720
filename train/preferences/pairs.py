"""Pairs on disk: one unit per line of JSONL, ids as generated, and a sidecar of provenance.

A line: {"unit_id", "prompt_id", "pairs": {"trace": [pair, ...], "empty": [pair, ...]}}, a pair:
{"prompt_ids", "chosen_ids", "rejected_ids", "chosen_reward", "rejected_reward"}. Rewards are for
the reader; training uses the ids. "marginal", where present, holds further traces of one chosen and
one rejected answer: they measure a* and are not trained on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import KINDS, TokenPair, Unit
from train.config import RunConfig
from train.preferences.prompts import parse_object, read_jsonl
from train.runtime.files import replace_file

_PACKAGES = ("bvpo_kernels", "torch", "transformers", "tokenizers", "reasoning_gym")


@dataclass(frozen=True)
class PairSet:
    """Units in the order of the file, and the sidecar's content ({} without one).

    lines: unit id -> "file:line", for what is wrong with a unit in some run.
    """

    units: tuple[Unit, ...]
    meta: Mapping[str, Any]
    path: Path
    lines: Mapping[str, str]


def output_path(cfg: RunConfig) -> Path:
    """Where `rank` writes, and `train` reads unless it is told otherwise."""
    return Path(cfg.rank.output or Path(cfg.run_dir) / "pairs.jsonl")


def provenance() -> dict[str, Any]:
    """The command and the versions that made a file."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    command = " ".join(["python", "-m", "train", *sys.argv[1:]])
    return {"command": command, "versions": versions}


def meta_path(path: Path) -> Path:
    """The sidecar of a JSONL file: x.jsonl -> x.meta.json."""
    return path.with_suffix(".meta.json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_pairs(path: Path, records: Iterable[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Check the units, write them, then the sidecar with their fingerprint; both atomic.

    Raises:
        ValueError: for a malformed unit, as `load_pairs`; nothing is written then.
    """
    lines = [json.dumps(record) + "\n" for record in records]
    units, _ = _units((f"{path}:{n}", json.loads(line)) for n, line in enumerate(lines, start=1))
    text = "".join(lines)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_json(meta_path(path), {**meta, "fingerprint": data_fingerprint(units)})


def load_pairs(path: str | Path) -> PairSet:
    """Read and check a file of pairs.

    Raises:
        ValueError: naming file and line, for what is not a unit of at least one pair, an id that is
            no token id, an empty sequence, equal responses, or a unit_id that occurs twice; for a
            file without units; for a sidecar whose fingerprint is that of other units.
        FileNotFoundError: for a missing file.
    """
    path = Path(path)
    units, lines = _units(read_jsonl(path))
    if not units:
        raise ValueError(f"{path}: expected at least one unit, got an empty file")
    sidecar = meta_path(path)
    try:
        meta = parse_object(sidecar.read_bytes(), str(sidecar)) if sidecar.is_file() else {}
        if not isinstance(settings := meta.get("settings", {}), dict):
            got = type(settings).__name__
            raise ValueError(f"{sidecar}: settings: expected an object, got {got}")
        if meta.get("fingerprint", fingerprint := data_fingerprint(units)) != fingerprint:
            raise ValueError(
                f"{sidecar}: fingerprint: expected {fingerprint}, that of {path.name}, got "
                f"{meta['fingerprint']}"
            )
    except ValueError as error:
        raise ValueError(f"{error}; rank again, or remove the sidecar") from None
    return PairSet(units, meta, path, lines)


def _units(
    records: Iterable[tuple[str, Mapping[str, Any]]],
) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """The units, and where each is."""
    units: dict[str, Unit] = {}
    lines: dict[str, str] = {}
    for where, record in records:
        unit = _unit(record, where)
        if first := lines.get(unit.unit_id):
            raise ValueError(
                f"{where}: unit_id: expected a new one, got {unit.unit_id!r} again, which {first} "
                f"has; put all pairs of a prompt into one line"
            )
        units[unit.unit_id], lines[unit.unit_id] = unit, where
    return tuple(units.values()), lines


def _unit(record: Mapping[str, Any], where: str) -> Unit:
    unit_id, by_kind = record.get("unit_id"), record.get("pairs")
    if not isinstance(unit_id, str) or not unit_id:
        raise ValueError(f"{where}: unit_id: expected a text, got {unit_id!r}")
    kinds = (*KINDS, MARGINAL)
    if not isinstance(by_kind, dict) or not set(by_kind) <= set(kinds):
        got = sorted(by_kind) if isinstance(by_kind, dict) else type(by_kind).__name__
        raise ValueError(f"{where}: pairs: expected an object with keys of {kinds}, got {got}")
    pairs = {}
    for kind, items in by_kind.items():
        if items is None:  # how tables with a column per kind write one that is absent
            continue
        if not isinstance(items, list):
            raise ValueError(f"{where}: pairs.{kind}: expected a list, got {type(items).__name__}")
        if items:
            pairs[kind] = tuple(
                _pair(item, f"{where}: pairs.{kind}[{number}]") for number, item in enumerate(items)
            )
    if not pairs:
        raise ValueError(f"{where}: pairs: expected at least one pair, got none")
    return Unit(unit_id, pairs)


def _pair(item: Any, where: str) -> TokenPair:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: expected an object, got {type(item).__name__}")
    ids = [_ids(item.get(name), f"{where}.{name}") for name in _ID_FIELDS]
    if ids[1] == ids[2]:
        raise ValueError(f"{where}: expected different responses, got chosen_ids = rejected_ids")
    for name in ("chosen_reward", "rejected_reward"):
        reward = item.get(name)
        if reward is not None and not _is_finite(reward):
            got = repr(reward)[:60]
            raise ValueError(f"{where}.{name}: expected a finite number, got {got}")
    return TokenPair(*ids)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


_ID_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def _ids(value: Any, where: str) -> tuple[int, ...]:
    # type(), not isinstance(): True is an int.
    if not isinstance(value, list) or not value or any(type(i) is not int or i < 0 for i in value):
        raise ValueError(f"{where}: expected a non-empty list of token ids, got {str(value)[:60]}")
    return tuple(value)


def data_fingerprint(units: Iterable[Unit]) -> str:
    """sha256 over unit ids, kinds and token ids, in the order of the units."""
    digest = hashlib.sha256()
    for unit in units:
        content = [
            unit.unit_id,
            [
                [kind, [[*map(list, (pair.prompt, pair.chosen, pair.rejected))] for pair in pairs]]
                for kind, pairs in sorted(unit.pairs.items())
            ],
        ]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def split_holdout(units: Sequence[Unit], share: float, seed: int) -> tuple[list[Unit], list[Unit]]:
    """(training, held-out) units: round(share * len(units)) of them held out, at least one if
    share > 0, by the order of a hash of (seed, unit id).

    Raises:
        ValueError: for a share outside [0, 1), or one that leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"train.holdout: expected a share in [0, 1), got {share}")

    def digest(unit: Unit) -> bytes:
        return hashlib.sha256(f"holdout\0{seed}\0{unit.unit_id}".encode()).digest()

    count = max(round(share * len(units)), 1 if share > 0 else 0)
    if count >= len(units):
        raise ValueError(
            f"train.holdout: expected units to train on, got {len(units)} units in all"
        )
    held = {unit.unit_id for unit in sorted(units, key=digest)[:count]}
    training = [unit for unit in units if unit.unit_id not in held]
    return training, [unit for unit in units if unit.unit_id in held]
