"""Scores of the reference model: computed once, kept on disk, refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import KINDS, TokenPair, Unit
from train.config import ModelConfig, RunConfig
from train.inputs import load_inputs, plan_of
from train.model.head import FusedHeadLM, build_policy
from train.preferences.prompts import parse_object
from train.runtime import parallel
from train.runtime.files import replace_file, sha256
from train.runtime.parallel import ALONE, World, whole
from train.runtime.settings import differences
from train.steps import MicroBatch, StepPlan

FORMAT = 1


def response_key(prompt: Sequence[int], response: Sequence[int]) -> str:
    """sha256 of (prompt ids, response ids); the prompt's length keeps the border between them."""
    ids = np.asarray([len(prompt), *prompt, *response], dtype="<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _segment_keys(units: Sequence[Unit]) -> Iterator[str]:
    """The key of every segment, in the order in which `pack` lays them out."""
    for unit in units:
        for kind in (*KINDS, MARGINAL):
            for pair in unit.pairs.get(kind, ()):
                for response in (pair.chosen, pair.rejected):
                    yield response_key(pair.prompt, response)


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer that is saved."""

    def digest(name: str, tensor: Tensor) -> str:
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(head + hashlib.sha256(content.data).digest()).hexdigest()

    digests = []
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for name, tensor in sorted(model.state_dict().items()):
            # A sharded tensor is whole for a moment, here only: a collective of all ranks.
            digests.append(pool.submit(digest, name, whole(tensor)))
            if isinstance(tensor, DTensor):
                digests[-1].result()
        return hashlib.sha256("".join(d.result() for d in digests).encode()).hexdigest()


def fingerprint(policy: FusedHeadLM, cfg: ModelConfig) -> dict[str, str]:
    """Everything besides the token ids that the scores depend on, whatever the libraries."""
    return {
        "casts": "fsdp" if isinstance(policy, FSDPModule) else "autocast",
        "format": str(FORMAT),
        "weights": weights_digest(policy.model),
        "param_dtype": cfg.param_dtype,
        "compute_dtype": cfg.compute_dtype,
        "attention": policy.model.config._attn_implementation,
        "temperature": repr(policy.transform.temperature),
        "softcap": repr(policy.transform.softcap),
        "trace_open": cfg.trace_open,
        "trace_close": cfg.trace_close,
        "empty_trace": cfg.empty_trace,
    }


@dataclass(frozen=True)
class ReferenceCache:
    """log pi_ref(y|x) in nats by `response_key`, and what they were computed with."""

    fingerprint: Mapping[str, str]
    keys: tuple[str, ...]
    scores_S: Tensor

    @cached_property
    def _index(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys)}

    def check_fingerprint(self, expected: Mapping[str, str], where: str | Path) -> None:
        """Refuse a cache made by another model or in another way.

        Raises:
            ValueError: naming each key that differs, what was expected and what was found.
        """
        wrong = differences(expected, self.fingerprint, "this command", "the scores")
        if wrong:
            # Weights that FSDP2 casts are not those that autocast casts.
            how = "under" if expected.get("casts") == "fsdp" else "without"
            raise ValueError(
                f"{where}: the reference scores belong to another run ({'; '.join(wrong)}); "
                f"rebuild them by cache-ref with the options of this command, {how} torchrun"
            )

    def without_scores(self, units: Sequence[Unit]) -> list[Unit]:
        """The pairs of `units` that lack a score, each as a unit of its own."""
        return [
            Unit(unit.unit_id, {kind: (pair,)})
            for unit in units
            for kind, pairs in unit.pairs.items()
            for pair in pairs
            if not self._has(pair)
        ]

    def _has(self, pair: TokenPair) -> bool:
        sides = (pair.chosen, pair.rejected)
        return all(response_key(pair.prompt, side) in self._index for side in sides)

    def with_scores(self, keys: Sequence[str], scores_S: Tensor) -> ReferenceCache:
        """This cache and more scores."""
        joined_S = torch.cat([self.scores_S, scores_S])
        return ReferenceCache(self.fingerprint, (*self.keys, *keys), joined_S)

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Nothing: the scores are there."""

    def of(self, micro: MicroBatch) -> Tensor:
        """Scores [S] of a micro-batch, on the CPU."""
        return self.scores(micro.units)

    def scores(self, units: Sequence[Unit]) -> Tensor:
        """Scores [S] of the segments of `pack(units)`, in its order, on the CPU."""
        index = [self._index[key] for key in _segment_keys(units)]
        return self.scores_S[index]


def build(
    policy: FusedHeadLM, micro_batches: Sequence[MicroBatch], cfg: ModelConfig, world: World = ALONE
) -> ReferenceCache:
    """Score every micro-batch without gradients; all ranks call, and all get the scores of all.

    The micro-batches are those that training will use first: a half-precision GEMM may round a row
    differently in another pack, and the first loss is log 2 exactly only in the same packs.
    """
    keys, scores_S = _score(policy, micro_batches, world)
    return ReferenceCache(fingerprint(policy, cfg), keys, scores_S)


def _score(
    policy: FusedHeadLM, micro_batches: Sequence[MicroBatch], world: World
) -> tuple[tuple[str, ...], Tensor]:
    """Keys and scores [S] of the responses of all ranks' micro-batches.

    Raises:
        FloatingPointError: naming the units of a score that is NaN or infinite.
    """
    keys: list[str] = []
    scores: list[Tensor] = []
    failed: list[str] = []
    total = sum(micro.batch.num_tokens for micro in micro_batches)
    bar = tqdm(
        total=total, desc="reference", unit="tok", unit_scale=True, disable=not world.is_main
    )
    with torch.no_grad(), bar:
        for micro in micro_batches:
            batch = micro.batch.to(policy.device)
            scores_S = segment_sum(policy(batch), batch.cu_seqlens).cpu()
            bar.update(batch.num_tokens)
            if micro.is_filler:
                continue
            if not bool(scores_S.isfinite().all()):
                failed += [unit.unit_id for unit in micro.units]
            scores.append(scores_S)
            keys += _segment_keys(micro.units)
    joined = torch.cat(scores) if scores else torch.empty(0)
    parts = world.gather_objects((keys, joined, failed))
    if failed := [name for part in parts for name in part[2]]:
        raise FloatingPointError(f"reference: non-finite score in one of the units {failed}")
    all_keys = tuple(key for part in parts for key in part[0])
    return all_keys, torch.cat([part[1] for part in parts])


def save(cache: ReferenceCache, path: Path) -> None:
    """Write `path` (safetensors: `scores` [S]) and its sidecar `path` + ".json".

    The sidecar holds the fingerprint, the keys in the order of the scores, and the digest of the
    scores, so that two halves of different caches are told apart.
    """
    replace_file(path, lambda name: save_file({"scores": cache.scores_S}, name))
    sidecar = {
        "fingerprint": dict(cache.fingerprint),
        "scores_sha256": sha256(path),
        "keys": list(cache.keys),
    }
    text = json.dumps(sidecar, indent=1)
    replace_file(_sidecar(path), lambda name: name.write_text(text, encoding="utf-8"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def load(path: Path) -> ReferenceCache:
    """What `save` wrote.

    Raises:
        ValueError: if the file or its sidecar is missing, damaged, or not the other's.
    """
    sidecar = _sidecar(path)
    try:
        content = parse_object(sidecar.read_bytes(), str(sidecar))
        keys, made_with = content.get("keys"), content.get("fingerprint")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"{sidecar}: keys: expected a list of texts")
        if not isinstance(made_with, dict):
            raise ValueError(f"{sidecar}: fingerprint: expected an object, got {made_with!r}")
        found, expected = sha256(path), content.get("scores_sha256")
        if found != expected:
            raise ValueError(
                f"{path}: expected scores with sha256 {expected}, as {sidecar} says, got {found}"
            )
        scores_S = load_file(path)["scores"]
        if scores_S.shape != (len(keys),):
            raise ValueError(f"{sidecar}: keys: expected {len(scores_S)}, got {len(keys)}")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: expected the reference scores and their sidecar {sidecar.name}, got "
            f"{error.strerror}: {error.filename}; rebuild them with cache-ref"
        ) from None
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{error}; the reference scores are damaged: rebuild them with cache-ref"
        ) from None
    return ReferenceCache(made_with, tuple(keys), scores_S)


def cache_path(cfg: RunConfig) -> Path:
    return Path(cfg.run_dir) / "reference.safetensors"


def first_packs(plan: StepPlan, held_out: Sequence[Unit]) -> list[MicroBatch]:
    """This rank's packs in which the run first meets each unit, the held-out ones included."""
    evaluated = plan.step_of(held_out).micro_batches if held_out else ()
    return [*plan.first_packs(), *evaluated]


def load_or_build(
    policy: FusedHeadLM,
    plan: StepPlan,
    held_out: Sequence[Unit],
    cfg: RunConfig,
    world: World = ALONE,
) -> ReferenceCache:
    """The cache of the run's folder, checked; built and stored there if there is none, and what it
    lacks (a longer run, other pairs) added.

    Raises:
        ValueError: if the cache was made with other weights or settings, or is damaged.
    """
    path = cache_path(cfg)
    if world.broadcast_object(path.exists()):
        known = load(path)
        known.check_fingerprint(fingerprint(policy, cfg.model), path)
    else:
        known = build(policy, first_packs(plan, held_out), cfg.model, world)
        _store(known, path, world)
    cache = _complete(known, policy, plan, [*plan.units_used, *held_out], world)
    if cache is not known:
        _store(cache, path, world)
        if world.is_main:
            print(f"reference scores of {len(cache.keys) - len(known.keys)} more responses: {path}")
    return cache


def _complete(
    cache: ReferenceCache, policy: FusedHeadLM, plan: StepPlan, units: Sequence[Unit], world: World
) -> ReferenceCache:
    """The cache with the scores of `units` that it lacks.

    Pairs that are longer than the plan's packs have no place in its runs and are left out.
    """
    lacking = [u for u in cache.without_scores(units) if u.num_tokens <= plan.token_budget]
    if not lacking:
        return cache
    return cache.with_scores(*_score(policy, plan.step_of(lacking).micro_batches, world))


def _store(cache: ReferenceCache, path: Path, world: World) -> None:
    world.barrier()  # the others have read what is replaced
    if world.is_main:
        save(cache, path)
    world.barrier()


def run(cfg: RunConfig) -> None:
    """`cache-ref`: compute the scores of all pairs and store them in `run_dir`, replacing older.

    Of all pairs of the file, whatever this run would reach: first in the packs of the run, then
    what these leave out.
    """
    with parallel.start(cfg.parallel) as world:
        inputs = load_inputs(cfg)
        if world.is_main:
            print(inputs.describe(cfg))
        policy, tokenizer = build_policy(cfg, world)
        inputs.check_model(policy.model.config, tokenizer, cfg, world)
        policy.self_check()
        plan = plan_of(cfg, inputs.training, world)
        path = cache_path(cfg)
        cache = build(policy, first_packs(plan, inputs.held_out), cfg.model, world)
        cache = _complete(cache, policy, plan, inputs.pairs.units, world)
        _store(cache, path, world)
        if world.is_main:
            print(f"reference scores of {len(cache.keys)} responses: {path}")
