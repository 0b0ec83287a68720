"""Statistics against other people's per-sample gradients, LoRA of peft, and two ranks."""

import copy
import os

import grad_stats_cases as cases
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bvpo_kernels import TokenPair, Unit, pack
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import EMPTY, TRACE
from train.model.head import FusedHeadLM

LENGTH, SAMPLES = 11, 6
CROSS = ("sketch", "exact")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TokenNet(nn.Module):
    """[N, L] token ids -> [N, L] values, token by token: each sample has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.rms = nn.RMSNorm(20, eps=1e-6)
        self.down = nn.Linear(20, 1, bias=False)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.rms(self.up(self.norm(self.tokens(ids))).tanh()))[..., 0]


def samples() -> tuple[TokenNet, Tensor, Tensor]:
    """A network, ids [6, L] of groups (3 units of 2 kinds), and a weight of each token's value."""
    torch.manual_seed(3)
    net = TokenNet()
    ids_NL = torch.randint(0, 31, (SAMPLES, LENGTH))
    return net, ids_NL, torch.randn(SAMPLES, LENGTH, dtype=torch.float64)


def loss(values: Tensor, weights: Tensor) -> Tensor:
    return (values.square() * weights).sum()


def ours(net: TokenNet, ids_NL: Tensor, weights_NL: Tensor) -> Tensor:
    """[B, K, K]; a sample is a pair without rejected tokens to speak of: its tokens are a group."""
    rows = [row.tolist() for row in ids_NL]
    pairs = [TokenPair(row[:3], row[3:6], row[6:8]) for row in rows]
    units = [Unit(str(n), {TRACE: [pairs[2 * n]], EMPTY: [pairs[2 * n + 1]]}) for n in range(3)]
    batch = pack(units)
    assert batch.num_tokens == SAMPLES * LENGTH
    stats = GradStats(net)
    with stats.collect(batch):
        # The order of the tokens within a group does not matter to these layers: use the samples'.
        batch.tokens_T.copy_(ids_NL.flatten())
        loss(net(ids_NL.reshape(1, -1)), weights_NL.reshape(1, -1)).backward()
    return stats.result().gram_BKK


def gram_of_samples(per_sample: list[Tensor]) -> Tensor:
    """[B, K, K] from gradients [N, ...] of each parameter."""
    flat_BKP = torch.cat([g.flatten(1) for g in per_sample], 1).unflatten(0, (3, 2))
    return flat_BKP @ flat_BKP.mT


def test_vmap():
    net, ids_NL, weights_NL = samples()

    def one(parameters, ids_L, weights_L):
        return loss(functional_call(net, parameters, (ids_L[None],)), weights_L[None])

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    per_sample = vmap(grad(one), in_dims=(None, 0, 0))(parameters, ids_NL, weights_NL)
    torch.testing.assert_close(
        ours(net, ids_NL, weights_NL),
        gram_of_samples(list(per_sample.values())),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_vmap_of_a_transformer(family, tied):
    """Logits, DPO and all under vmap(grad); pairs of equal lengths, which is what vmap stacks.

    transformers' eager attention, which vmap can batch, takes its softmax in fp32: hence not 1e-10.
    """
    model, prompt, length = cases.model(family, tied=tied), 3, 9
    generator = torch.Generator().manual_seed(4)
    ids_N2L = torch.randint(0, cases.VOCAB, (SAMPLES, 2, length), generator=generator)
    ids_N2L[:, 1, :prompt] = ids_N2L[:, 0, :prompt]
    plain = copy.deepcopy(model)
    plain.config._attn_implementation = "eager"
    low = torch.finfo(torch.float64).min
    mask = torch.full((1, 1, length, length), low, dtype=torch.float64).triu(1)
    common = {
        "attention_mask": mask,
        "position_ids": torch.arange(length)[None],
        "use_cache": False,
    }

    def one(parameters, ids_2L):
        logits = functional_call(plain, parameters, (), {"input_ids": ids_2L, **common}).logits
        logp = logits[:, prompt - 1 : -1].log_softmax(-1).gather(2, ids_2L[:, prompt:, None])
        score_2 = logp.sum((1, 2))
        ratio_2 = score_2 - 0.9 * score_2.detach()
        return -nn.functional.logsigmoid(0.7 * (ratio_2[0] - ratio_2[1]))

    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    per_sample = vmap(grad(one), in_dims=(None, 0))(parameters, ids_N2L)
    pairs = [
        TokenPair(*(ids.tolist() for ids in (one[:prompt], one[prompt:], other[prompt:])))
        for one, other in ids_N2L
    ]
    units = [Unit(str(n), {TRACE: [pairs[2 * n]], EMPTY: [pairs[2 * n + 1]]}) for n in range(3)]
    measured = cases.measure(FusedHeadLM(model), [units]).gram_BKK
    expected = gram_of_samples(list(per_sample.values()))
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-7 * expected.max().item())


def test_opacus():
    pytest.importorskip("opacus", reason="opacus is not installed")
    from opacus.grad_sample import GradSampleModule

    net, ids_NL, weights_NL = samples()
    expected = ours(net, ids_NL, weights_NL)
    net.zero_grad()
    wrapped = GradSampleModule(net, batch_first=True, loss_reduction="sum")
    loss(wrapped(ids_NL), weights_NL).backward()
    per_sample = [p.grad_sample for p in net.parameters()]
    torch.testing.assert_close(gram_of_samples(per_sample), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cross", CROSS)
def test_lora(cross):
    """Adapters of the attention and the MLP, a trained bias and a trained norm (peft 0.21)."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.0,
        modules_to_save=["norm"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(cases.model("qwen3", tied=True), config).double()
    policy, units = FusedHeadLM(model), cases.units()
    stats = GradStats(policy, cross=cross)
    assert stats.coverage.share == 1.0
    assert 0 < stats.coverage.trained < 10_000
    result = cases.run_step(stats, policy, [units])
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)


def _rank(rank: int, port: int, results) -> None:
    """Rank 0 has two units in two micro-batches, rank 1 one unit, and twice the pairs in the
    denominator of its losses; FSDP2 on gloo."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    cases.exact_norms(pytest.MonkeyPatch())
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    policy = FusedHeadLM(cases.model("llama", tied=True))
    for block in policy.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    units = cases.units(3)
    # Every rank must call the model as often as the others.
    split = [[units[0]], [units[1]]] if rank == 0 else [[units[2]], []]
    counts = {kind: (1 + rank) * count for kind, count in cases.COUNTS.items()}
    scale = {kind: cases.ALPHA[kind] / count for kind, count in counts.items()}
    for cross in CROSS:
        stats = GradStats(policy, cross=cross, sketch_size=cases.VOCAB)
        for part in split:
            if part:
                batch = pack(part)
                with stats.collect(batch, scale):
                    cases.dpo(policy, batch, counts=counts).backward()
            else:
                (0.0 * cases.dpo(policy, pack(units[:1]))).backward()
        result = stats.result(dist.group.WORLD).to_dict()
        lists = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in result.items()}
        results.put((rank, cross, lists))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks():
    """Sharded parameters and units on two ranks give what one process gives.

    With k >= every dimension a sketch is the matrix itself, so the test is of the reduction.
    """
    from bvpo_kernels.mixing import StepStats

    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    port = 29_500 + os.getpid() % 1000
    workers = mp.start_processes(_rank, (port, results), nprocs=2, join=False, start_method="spawn")
    got = [results.get() for _ in range(2 * len(CROSS))]
    while not workers.join():
        pass
    policy, units = FusedHeadLM(cases.model("llama", tied=True)), cases.units(3)
    gram = cases.oracle_gram(policy, units)
    assert {(rank, cross) for rank, cross, _ in got} == {(r, c) for r in range(2) for c in CROSS}
    for _, cross, lists in got:
        tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in lists.items() if "_" in n}
        stats = StepStats.from_dict({**lists, **tensors})
        assert (stats.rows_BKK is None) == (cross == "exact")
        cases.assert_matches(stats, gram, 1e-10)
