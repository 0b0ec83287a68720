"""Bits of over a hundred calls of the LM head: what a change that only moves code must leave alone.

    python tests/head_digests.py record    # before the change: tests/head_digests.json
    python tests/head_digests.py compare   # after it; exits 1 and names the calls that differ

Digests are of results and gradients, and hold for one processor path and torch version, by which
the file keeps them apart; `test_head_digests.py` compares those of the paths that it knows.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bvpo_kernels import GradStats, TokenPair, Unit, linear_logprobs, pack

FILE = Path(__file__).with_suffix(".json")
TOKENS, DIM, VOCAB, RANK = 37, 24, 301, 3
# No tile of the largest fits: vocabularies and tokens are cut, and dH takes a sweep of its own.
SMALL = 6000
NEEDS = {
    "scores": (False, False),
    "frozen": (True, False),
    "trained": (True, True),
    "head": (False, True),
}
OPTIONS = {
    "plain": {},
    "small": {"workspace_bytes": SMALL},
    "bias": {"bias": True},
    "cap": {"softcap": 5.0, "temperature": 0.7, "bias": True, "workspace_bytes": SMALL},
    "entropy": {"return_entropy": True, "workspace_bytes": SMALL},
    "bound": {"max_scored": 30},
    "sparse": {"tail_tolerance": 2.0**-4},
    "sparse cap": {"tail_tolerance": 2.0**-4, "softcap": 5.0, "bias": True},
}


def path():
    """What decides the bits: the processor's instructions, and torch."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {torch.ops.bvpo.cpu_path(torch.bfloat16)}"


def _tensors(dtype, need):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    hidden, weight = draw(TOKENS, DIM), draw(VOCAB, DIM, scale=0.6)
    bias = draw(VOCAB, scale=0.5)
    low, lora_b = draw(TOKENS, RANK), draw(VOCAB, RANK, scale=0.3)
    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    target[torch.arange(TOKENS) % 5 == 2] = -100
    need_hidden, need_weight = NEEDS[need]
    for tensor in (hidden, low):
        tensor.requires_grad_(need_hidden)
    for tensor in (weight, bias):
        tensor.requires_grad_(need_weight)
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden, weight, bias, low, lora_b.requires_grad_(need_hidden), target, upstream


def _digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.detach().contiguous()
            sha.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            sha.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()[:16]


def dense(impl, dtype, need, option):
    hidden, weight, bias, _, _, target, upstream = _tensors(dtype, need)
    options = dict(OPTIONS[option])
    options["bias"] = bias if options.pop("bias", False) else None
    result = linear_logprobs(hidden, weight, target, impl=impl, **options)
    logprobs = result[0] if isinstance(result, tuple) else result
    if logprobs.requires_grad:
        logprobs.backward(upstream.to(logprobs.dtype))
    extra = result[1] if isinstance(result, tuple) else None
    return _digest([logprobs, extra, hidden.grad, weight.grad, bias.grad])


def lora(dtype, need, workspace):
    hidden, weight, bias, low, lora_b, target, upstream = _tensors(dtype, need)
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        target,
        lora=(low, lora_b),
        bias=bias,
        return_entropy=True,
        workspace_bytes=workspace,
    )
    logprobs.backward(upstream)
    return _digest([logprobs, entropy, hidden.grad, low.grad, lora_b.grad, weight.grad, bias.grad])


def sharded(impl, need):
    mesh = init_device_mesh("cpu", (1,))
    hidden, weight, bias, _, _, target, upstream = _tensors(torch.float32, need)
    spread = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    spread.requires_grad_(weight.requires_grad)
    logprobs, entropy = linear_logprobs(
        hidden, spread, target, bias=bias, return_entropy=True, impl=impl, workspace_bytes=SMALL
    )
    if logprobs.requires_grad:
        logprobs.backward(upstream)
    gradient = None if spread.grad is None else spread.grad.to_local()
    return _digest([logprobs, entropy, hidden.grad, gradient, bias.grad])


def statistics(impl, dtype, mode, cross, tied):
    """Two units through embedding, a hidden layer, and the head."""
    torch.manual_seed(3)
    embed = torch.nn.Embedding(VOCAB, DIM, dtype=dtype)
    layer = torch.nn.Linear(DIM, DIM, dtype=dtype)
    head = torch.nn.Linear(DIM, VOCAB, bias=not tied, dtype=dtype)
    if tied:
        head.weight = embed.weight
    model = torch.nn.ModuleList([embed, layer, head])
    units = [
        Unit(
            name,
            {
                "trace": [TokenPair([5, 9], list(range(k, k + 9)), [7, k])],
                "empty": [TokenPair([5], [k, 8], [3, 1, 2])],
            },
        )
        for name, k in (("a", 20), ("b", 90))
    ]
    batch = pack(units)
    stats = GradStats(model, mode, cross=cross, head=head, seed=5)
    with stats.collect(batch, {"trace": 0.3, "empty": 0.2}):
        hidden = layer(embed(batch.tokens_T)).tanh()
        logprobs = linear_logprobs(
            hidden,
            head.weight,
            batch.target_T,
            bias=head.bias,
            impl=impl,
            workspace_bytes=60 * SMALL,
        )
        logprobs.backward(torch.sin(torch.arange(len(logprobs), dtype=logprobs.dtype)))
    found = stats.result()
    return _digest([found.gram_BKK, found.sums_KK, *(p.grad for p in model.parameters())])


def calls():
    """name -> call."""
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    table = {}

    def add(function, *arguments):
        name = " ".join(str(a).removeprefix("torch.") for a in (function.__name__, *arguments))
        table[name] = lambda: function(*arguments)

    for impl, dtypes in (("eager", (f32, bf16, f64)), ("cpp", (f32, bf16)), ("triton", (f32,))):
        for dtype in dtypes:
            for need in NEEDS:
                for option in OPTIONS:
                    thin = dtype != f32 and option in ("bias", "entropy", "sparse cap")
                    # `eager` is exact whatever the tolerance.
                    sparse = option.startswith("sparse")
                    pointless = sparse and (need == "scores" or impl == "eager")
                    slow = impl == "triton" and option in ("bias", "entropy", "bound")
                    if not thin and not pointless and not slow:
                        add(dense, impl, dtype, need, option)
    for dtype in (f32, bf16):
        for need in ("frozen", "trained"):
            for workspace in (None, SMALL):
                add(lora, dtype, need, workspace)
    for impl in ("eager", "cpp"):
        for need in NEEDS:
            add(sharded, impl, need)
        for dtype in (f32, bf16):
            for mode, cross in (("exact", "sketch"), ("exact", "exact"), ("sketch", "sketch")):
                add(statistics, impl, dtype, mode, cross, False)
        add(statistics, impl, f32, "exact", "sketch", True)
    add(statistics, "eager", f64, "exact", "exact", True)
    add(statistics, "triton", f32, "exact", "sketch", False)
    return table


def digests():
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {name: call() for name, call in calls().items()}


def recorded():
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main(command):
    found, known = digests(), recorded()
    if command == "record":
        FILE.write_text(json.dumps(known | {path(): found}, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} calls under {path()!r} -> {FILE}")
        return 0
    before = known[path()]
    differ = [name for name in before if found.get(name) != before[name]]
    print("\n".join(differ))
    print(f"{len(before) - len(differ)} of {len(before)} calls as recorded")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
