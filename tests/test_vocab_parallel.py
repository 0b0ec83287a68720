"""A head whose vocabulary is spread over two ranks (gloo) against the whole one, and fp64."""

import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from logprob_cases import Case, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bvpo_kernels import backends, linear_logprobs
from bvpo_kernels.oracles.testing import assert_accurate

RANKS = 2
ALL = ("hidden", "weight", "bias")
# 301 columns are 151 and 150; logits of a tile of 2048 cut both shards and the tokens raggedly.
BASE = Case(bias=True)
TILES = {"workspace_bytes": 16 * 2048}
# name -> (case, impl, gradients, whole bias on every rank, options of the call)
CASES = {
    "fp32": (BASE, "eager", ALL, False, TILES),
    "fp32_whole_bias": (BASE, "eager", ALL, True, {}),
    "fp32_cpp": (BASE, "cpp", ALL, False, TILES),
    "fp32_triton": (replace(BASE, num_tokens=9, vocab=67), "triton", ALL, False, {}),
    "bf16": (replace(BASE, dtype=torch.bfloat16), "eager", ALL, False, {}),
    "bf16_cpp": (replace(BASE, dtype=torch.bfloat16, num_tokens=130), "cpp", ALL, False, TILES),
    "fp16_cpp": (replace(BASE, dtype=torch.float16, bias=False), "cpp", ALL, False, {}),
    "fp64": (replace(BASE, dtype=torch.float64), "eager", ALL, False, {}),
    "softcap_and_temperature": (
        replace(BASE, options={"softcap": 3.0, "temperature": 1.3}),
        "cpp",
        ALL,
        False,
        {},
    ),
    # p_y near 1 and near 0, in either shard; an offset that eats fp32's fraction of lse.
    "peaked": (replace(BASE, scale=30.0), "eager", ALL, False, {}),
    "peaked_cpp": (replace(BASE, scale=30.0, dtype=torch.bfloat16), "cpp", ALL, False, {}),
    "offset": (replace(BASE, offset=1e4), "eager", ALL, False, {}),
    "scores_only": (BASE, "cpp", (), False, {}),
    "frozen_weight": (BASE, "cpp", ("hidden",), False, {}),
    "weight_alone": (BASE, "eager", ("weight",), False, {}),
    "no_bias": (replace(BASE, bias=False), "cpp", ALL, False, {}),
    # The second shard is empty, or holds one column.
    "one_column": (replace(BASE, vocab=1), "eager", ALL, False, {}),
    "two_columns": (replace(BASE, vocab=2), "eager", ALL, True, {}),
    "three_columns": (replace(BASE, vocab=3), "cpp", ALL, False, {}),
    "no_tokens": (replace(BASE, num_tokens=0), "cpp", ALL, False, {}),
    "nothing_scored": (replace(BASE, ignored=1.0), "cpp", ALL, False, {}),
    # A class of the second shard as ignore_index, whose remainder is a column of the first.
    "ignored_class": (
        replace(BASE, ignored=0.0, options={"ignore_index": 300}),
        "cpp",
        ALL,
        False,
        {},
    ),
}


def _sharded_run(inputs, mesh, impl, need, whole_bias, **options):
    """`logprob_cases.run` with the weight, and maybe the bias, spread over the ranks."""
    leaves = {name: inputs[name].clone() for name in ALL if name in inputs}
    leaves["weight"] = distribute_tensor(leaves["weight"], mesh, [Shard(0)])
    if "bias" in leaves and not whole_bias:
        leaves["bias"] = distribute_tensor(leaves["bias"], mesh, [Shard(0)])
    leaves = {name: leaf.detach().requires_grad_(name in need) for name, leaf in leaves.items()}
    logprobs, entropy = linear_logprobs(
        leaves["hidden"],
        leaves["weight"],
        inputs["target"],
        bias=leaves.get("bias"),
        return_entropy=True,
        impl=impl,
        **options,
    )
    results = {"logprobs": logprobs.detach(), "entropy": entropy}
    if logprobs.requires_grad:
        logprobs.backward(inputs["upstream"].to(logprobs.dtype))
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert type(leaf.grad) is type(leaf.data)
                assert leaf.grad.dtype == leaf.dtype
                results[f"d{name}"] = leaf.grad
    for name, value in results.items():
        if isinstance(value, DTensor):
            assert value.placements == (Shard(0),)
            results[name] = value.full_tensor()
        else:  # the same bits on both ranks
            both = [torch.empty_like(value) for _ in range(RANKS)]
            dist.all_gather(both, value)
            assert torch.equal(both[0], both[1]), name
    return results


def _judge(mesh, case, impl, need, whole_bias, options):
    inputs = case.inputs()
    oracle = run(inputs, "reference", need, torch.float64, **case.options)
    naive = run(inputs, "reference", need, **case.options)
    actual = _sharded_run(inputs, mesh, impl, need, whole_bias, **case.options, **options)
    assert actual.keys() == oracle.keys()
    for name, value in oracle.items():
        if case.dtype == torch.float64:  # the oracle rounds as much
            atol = 64 * torch.finfo(torch.float64).eps * float(value.abs().max())
            torch.testing.assert_close(actual[name], value, rtol=0, atol=atol)
        else:
            assert_accurate(name, actual[name], naive[name], value)


def _judge_all(mesh):
    for name, (case, impl, *rest) in CASES.items():
        if not backends.MISSING[impl]:
            yield name, lambda case=case, impl=impl, rest=rest: _judge(mesh, case, impl, *rest)


def _certain(mesh):
    """1 - p_y = 2e-9 keeps its digits, with the target and its rivals in either shard."""
    logits_V = torch.tensor([0.0, -1.0, 20.0, 0.5])
    for target in range(4):
        values_V = logits_V.roll(target - 2)
        inputs = {
            "hidden": torch.ones(1, 1),
            "weight": values_V[:, None].clone(),
            "target": torch.tensor([target]),
            "upstream": torch.ones(1),
        }
        oracle = run(inputs, "reference", dtype=torch.float64)
        for impl in ("eager", "cpp"):
            if not backends.MISSING[impl]:
                actual = _sharded_run(inputs, mesh, impl, ALL, False)
                for name, value in oracle.items():
                    torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=0)


def _replicated(mesh):
    """A weight that every rank holds takes the ordinary path, bitwise."""
    inputs = Case().inputs()
    plain = run(inputs, "eager")
    leaves = {n: distribute_tensor(inputs[n], mesh, [Replicate()]) for n in ("hidden", "weight")}
    hidden, weight = (leaf.detach().requires_grad_() for leaf in leaves.values())
    logprobs = linear_logprobs(hidden, weight, inputs["target"], impl="eager")
    logprobs.backward(inputs["upstream"])
    assert torch.equal(logprobs, plain["logprobs"])
    assert torch.equal(hidden.grad.to_local(), plain["dhidden"])
    assert torch.equal(weight.grad.to_local(), plain["dweight"])


def _refusals(mesh):
    inputs = Case().inputs()
    hidden, whole, target = inputs["hidden"], inputs["weight"], inputs["target"]
    weight = distribute_tensor(whole, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight: expected placements Shard\(0\).*Shard\(dim=1"):
        linear_logprobs(hidden, distribute_tensor(whole, mesh, [Shard(1)]), target)
    with pytest.raises(ValueError, match=r"hidden: expected a plain Tensor or .*Replicate"):
        linear_logprobs(distribute_tensor(hidden, mesh, [Shard(0)]), weight, target)
    with pytest.raises(ValueError, match="'reference' cannot serve this call: it needs the whole"):
        linear_logprobs(hidden, weight, target, impl="reference")
    with pytest.raises(ValueError, match="tail_tolerance: expected 0 for a sharded weight"):
        linear_logprobs(hidden.requires_grad_(), weight, target, tail_tolerance=0.1)
    with pytest.raises(ValueError, match=r"target: expected values in \[0, 301\).* got 301"):
        linear_logprobs(hidden, weight, target.masked_fill(target == 0, 301))
    # Shifted by half the vocabulary on one rank: a token that both or none of them claim.
    other = torch.where(target >= 0, (target + 151 * dist.get_rank()) % 301, target)
    with pytest.raises(ValueError, match="the same on every rank that shares the vocabulary"):
        linear_logprobs(hidden, weight, other)


def _checks(mesh):
    yield from _judge_all(mesh)
    yield "certain", lambda: _certain(mesh)
    yield "replicated", lambda: _replicated(mesh)
    yield "refusals", lambda: _refusals(mesh)


def worker(rank, folder):
    """Runs every check on one of the ranks; rank 0's complaints go to the folder."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    complaints = {}
    for name, check in _checks(init_device_mesh("cpu", (RANKS,))):
        try:
            check()
            complaints[name] = ""
        except Exception as error:
            complaints[name] = f"rank {rank}: {type(error).__name__}: {error}"
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(complaints, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """Check -> what each rank says of it. One pair of processes for all: they take seconds."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        torch.multiprocessing.spawn(worker, (folder,), RANKS)
    said = []
    for rank in range(RANKS):
        with open(f"{folder}/{rank}.json", encoding="utf-8") as file:
            said.append(json.load(file))
    return said


@pytest.mark.parametrize("name", [*CASES, "certain", "replicated", "refusals"])
def test_two_ranks(complaints, name):
    if name in CASES and backends.MISSING[CASES[name][1]]:
        pytest.skip(backends.MISSING[CASES[name][1]])
    if name in CASES and CASES[name][1] == "triton" and not backends.INTERPRETED:
        pytest.skip("the ranks are on the CPU")
    for said in complaints:
        assert said[name] == ""
