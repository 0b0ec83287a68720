"""Coverage is what is measured: layers as other models call them, against a loop over units."""

import copy

import grad_stats_cases as cases
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from bvpo_kernels import IGNORE_INDEX, linear_logprobs, pack
from bvpo_kernels.grad_stats import GradStats, UncoveredError
from bvpo_kernels.grad_stats.forms import form
from train.model.head import FusedHeadLM

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Options of the configuration, and what cannot be measured, as a part of its name.
FAMILIES = {
    "Gemma": ({}, ()),  # a scaled embedding, tied to the head
    "Gemma3Text": ({}, ()),  # and norms of queries and keys by head
    "Exaone4": ({}, ()),
    "GPT2": (GPT2, ()),  # weights [D, P]
    "DeepseekV3": ({**LATENT, "first_k_dense_replace": 2}, ()),
    "Mixtral": ({"num_local_experts": 4, "experts_implementation": "eager"}, ("experts", "gate")),
    "Cohere": ({}, ()),  # LayerNorms of its own
    "Apertus": ({}, ("act_fn",)),
}


class KeepDouble(TorchFunctionMode):
    """Norms and rotations of transformers compute in fp32; here in fp64 where they are given it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        double = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        to_single = func is torch.Tensor.float or torch.float32 in (*args[1:], *kwargs.values())
        if double and to_single and func in (torch.Tensor.float, torch.Tensor.to):
            return args[0]
        return func(*args, **kwargs)


def make(family: str, **options) -> nn.Module:
    """A tiny causal LM of the family, in fp64, its weights spread."""
    causal = f"{family.removesuffix('Text')}LMHeadModel"
    if not hasattr(transformers, causal):
        causal = f"{family.removesuffix('Text')}ForCausalLM"
    config = getattr(transformers, f"{family}Config")
    common = {**cases.COMMON, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(1)
    model = getattr(transformers, causal)(config(**{**common, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def freeze(policy: nn.Module, names) -> None:
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name not in names)


def assert_measured(policy, options, split=None) -> None:
    """What is left out is in none of the products; gradients are as without statistics."""
    split = split or [cases.units()]
    units = [unit for part in split for unit in part]
    plain = [torch.zeros_like(p) for p in policy.parameters()]
    for part in split:
        policy.zero_grad()
        cases.dpo(policy, pack(part)).backward()
        for total, p in zip(plain, policy.parameters(), strict=True):
            total += 0 if p.grad is None else p.grad
    stats = GradStats(policy, strict=False, **options)
    left = stats.coverage.uncovered
    result = cases.run_step(stats, policy, split)
    assert stats.coverage.uncovered == left
    for p, expected in zip(policy.parameters(), plain, strict=True):
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        assert (ours - expected).norm() <= 1e-12 * expected.norm()
    freeze(policy, left)
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    options, left = FAMILIES[family]
    policy = FusedHeadLM(make(family, **options))
    uncovered = GradStats(policy, strict=False).coverage.uncovered
    assert {part for name in uncovered for part in left if part in name} == set(left)
    assert all(any(part in name for part in left) for name in uncovered)
    with KeepDouble():
        assert_measured(policy, {})


@pytest.mark.parametrize("family", ["Gemma3Text", "GPT2"])
@pytest.mark.parametrize("cross", ["sketch", "exact"])
def test_families_over_micro_batches(family, cross):
    """What is kept of a transposed weight is transposed, and heads are not taken for tokens."""
    policy, units = FusedHeadLM(make(family, **FAMILIES[family][0])), cases.units()
    with KeepDouble():
        assert_measured(policy, {"cross": cross, "sketch_size": 128}, [units[:1], units[1:]])


@pytest.mark.parametrize("family", ["Gemma3Text", "GPT2"])
def test_families_under_checkpointing(family):
    policy, units = FusedHeadLM(make(family, **FAMILIES[family][0])), cases.units()
    plain = cases.measure(policy, [units])
    policy.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(cases.measure(policy, [units]).gram_BKK, plain.gram_BKK)


class Unusual(nn.Module):
    """Token by token: a scaled embedding, a norm on [1, H, T, D] and a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = GemmaTextScaledWordEmbedding(cases.VOCAB, 24, None, embed_scale=1.7)
        self.norm, self.last = nn.RMSNorm(6, eps=1e-6), Conv1D(16, 24)
        self.head = nn.Linear(16, cases.VOCAB, bias=False)
        self.double()

    def forward(self, batch):
        x = self.tokens(batch.tokens_T[None]).unflatten(-1, (4, 6)).transpose(1, 2)
        x = self.last(self.norm(x).transpose(1, 2).flatten(2).sin())[0]
        return linear_logprobs(x, self.head.weight, batch.target_T)


@pytest.mark.slow
def test_unusual_layers_compiled():
    """One graph for units of all lengths, and what the layers measure without it."""
    torch._dynamo.reset()
    policy = Unusual()
    stats = GradStats(policy, head=policy.head)
    assert stats.coverage.share == 1
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(2):
        units = cases.units(seed=seed)
        traced = cases.run_step(stats, compiled, [units])
        cases.assert_matches(traced, cases.oracle_gram(policy, units), 1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch._dynamo.reset()


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["Gemma3Text", "GPT2"])
def test_sharded(family, mesh):
    """FSDP2's parameters are read in its hooks alone, so that no probe is run."""
    policy, units = FusedHeadLM(make(family, **FAMILIES[family][0])), cases.units()
    with KeepDouble():
        expected = cases.oracle_gram(policy, units)
        decoder = policy.model.get_decoder()
        for block in decoder.layers if hasattr(decoder, "layers") else decoder.h:
            fully_shard(block, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        cases.assert_matches(cases.measure(policy, [units]), expected, 1e-10)


class OddEmbedding(nn.Embedding):
    """Its rows enter squared: no layer measures that."""

    def forward(self, ids):
        return super().forward(ids).square()


def llama(**options):
    return cases.model(num_hidden_layers=1, **options)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weight_is_left_out_as_a_whole(tied, monkeypatch):
    """The head's half of the weight is not in the Gram matrix without the embedding's."""
    cases.exact_norms(monkeypatch)
    model = llama(tied=tied)
    odd = OddEmbedding(cases.VOCAB, 32).double()
    odd.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = odd
    policy = FusedHeadLM(model)
    stats = GradStats(policy, strict=False)
    assert stats.coverage.uncovered == ("model.model.embed_tokens.weight",)
    size = sum(p.numel() for p in policy.parameters()) - odd.weight.numel()
    assert stats.coverage.covered == size
    assert_measured(policy, {})


def test_half_of_a_tied_weight_that_goes_another_way():
    """The head reads the weight itself: also with strict=False nothing is said to be covered."""
    policy = FusedHeadLM(llama(tied=True))
    stats, batch = GradStats(policy, strict=False), pack(cases.units())

    def score(batch):
        logits_TV = policy.hidden(batch) @ policy.model.lm_head.weight.T
        target_T1 = batch.target_T.clamp_min(0)[:, None]
        scored_T = batch.target_T != IGNORE_INDEX
        return logits_TV.log_softmax(-1).gather(1, target_T1)[:, 0] * scored_T

    with stats.collect(batch, cases.SCALE):
        cases.dpo(score, batch).backward()
    with pytest.raises(RuntimeError, match=r"both uses of the tied \['model.model.embed_tokens"):
        stats.result()


def test_bypassed_weight_leaves_the_coverage():
    policy = FusedHeadLM(llama())
    stats, batch = GradStats(policy, strict=False), pack(cases.units())
    projection = policy.model.model.layers[0].mlp.down_proj
    bypass = lambda x: x @ projection.weight.T  # noqa: E731
    assert stats.coverage.share == 1
    with stats.collect(batch):
        projection.forward = bypass
        cases.dpo(policy, batch).backward()
    stats.result()
    assert stats.coverage.uncovered == ("model.model.layers.0.mlp.down_proj.weight",)


class GatedNorm(LlamaRMSNorm):
    """As state-space models have it: a second input, which the weight's gradient depends on."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * torch.nn.functional.silu(gate))


class Caller(nn.Module):
    """Stands for an MLP whose layers are called in ways that cannot be measured."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.norm = GatedNorm(32)
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(40))

    def forward(self, x):
        if self.case == "gated":
            return self.norm(x, gate=x)
        if self.case == "twice":
            return self.experts[0](self.experts[0](self.norm(x)))
        if self.case == "longer":
            return self.experts[0](torch.cat([self.norm(x), x], 1))[:, : x.shape[1]]
        rows = self.norm(x)[0]
        chosen = rows[:, 0].abs().mul(1000).long() % len(self.experts)
        out = torch.zeros_like(rows)
        for index in chosen.unique().tolist():
            taken = chosen == index
            out[taken] = self.experts[index](rows[taken])
        return out[None]


@pytest.mark.parametrize(
    ("case", "left"),
    [("gated", {"norm"}), ("twice", {"experts.0"}), ("longer", {"experts.0"}), ("experts", None)],
)
def test_what_a_forward_shows(case, left, monkeypatch):
    """Found when the statistics are made: a gate, a second use, rows that are not the tokens', and
    experts, those that saw no token of the probe as well."""
    cases.exact_norms(monkeypatch)
    model = llama()
    model.model.layers[0].mlp = Caller(case).double()
    policy = FusedHeadLM(model)
    prefix = "model.model.layers.0.mlp."
    left = {f"experts.{n}" for n in range(40)} if left is None else left
    if case != "experts":  # layers whose names differ by numbers share a verdict
        model.model.layers[0].mlp.experts = model.model.layers[0].mlp.experts[:1]
        left = {f"{name}" for name in left}
    with pytest.raises(
        UncoveredError, match=r"freeze them, or leave them out .* with strict=False"
    ):
        GradStats(policy)
    found = set(GradStats(policy, strict=False).coverage.uncovered)
    assert found == {f"{prefix}{name}.weight" for name in left}
    assert_measured(policy, {})


def test_probe_leaves_the_model_as_it_was():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].mlp.eval()  # a frozen part, say
    modes = [module.training for module in model.modules()]
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    GradStats(model)
    assert [module.training for module in model.modules()] == modes
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_that_cannot_be_run(monkeypatch):
    """On the meta device nothing can be seen; the first collection then tells by the shapes."""
    with torch.device("meta"):
        assert GradStats(llama()).coverage.share == 1
    monkeypatch.setattr("bvpo_kernels.grad_stats.probe.causal_models", lambda model: [])
    policy = FusedHeadLM(make("Exaone4"))
    with KeepDouble():
        assert_measured(policy, {})
    gated = llama()
    gated.model.layers[0].mlp = Caller("gated").double()
    stats, batch = GradStats(gated, strict=False), pack(cases.units())
    with (
        pytest.raises(ValueError, match=r"layers\.0\.mlp\.norm: expected one input, got 2"),
        stats.collect(batch),
    ):
        cases.dpo(FusedHeadLM(gated), batch).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_of_a_scaled_embedding_to_the_bit(dtype):
    policy, batch = FusedHeadLM(make("Gemma").to(dtype)), pack(cases.units())
    expected, stats = policy(batch), GradStats(policy)
    with stats.collect(batch, cases.SCALE):
        cases.dpo(policy, batch).backward()
        assert torch.equal(policy(batch), expected)


class TimesNumber(nn.Embedding):
    """A number of Python is not rounded to bf16, as a tensor is."""

    def forward(self, ids):
        return super().forward(ids) * 5.65


@pytest.mark.parametrize("cls", [TimesNumber, OddEmbedding])
def test_other_embeddings(cls):
    found = form(cls(9, 8, padding_idx=0))
    assert (found is None) == (cls is OddEmbedding)
    if found is not None:
        assert (found.scale, found.scale_rounded) == (5.65, False)
