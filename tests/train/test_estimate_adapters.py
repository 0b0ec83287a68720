"""Estimates of LoRA runs beside what small ones really allocate and compute."""

from dataclasses import replace

import pytest
import torch
from test_estimate import WIDE, assert_bounds, one_unit, plan
from tiny_runs import VOCAB, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

from bvpo_kernels.packing import pack
from train.config import AdapterConfig, AlphaConfig, EstimateConfig
from train.model.adapters import add_adapters, is_adapter
from train.model.head import FusedHeadLM, workspace_bytes
from train.online import online_reference
from train.runtime.parallel import checkpoint_activations, decoder_layers
from train.sizing.estimate import estimate
from train.sizing.throughput import StepFlops
from train.steps import MicroBatch
from train.trainer import build_optimizer

pytest.importorskip("peft", reason="peft is not installed")
TOKENS, RANK = 512, 4


def adapted(tmp_path, checkpoint=None, attention="eager", dtype="float32", **options):
    """A configuration with LoRA, and a policy that is built as it says."""
    cfg = plan(tmp_path, TOKENS, checkpoint, attention, dtype)
    cfg.model.param_dtype, cfg.adapter = dtype, AdapterConfig(rank=RANK, **options)
    base = tiny_model(
        Qwen3Config, getattr(torch, dtype), attention, tie_word_embeddings=False, **WIDE
    )
    model = add_adapters(base, cfg.adapter, seed=0)
    policy = FusedHeadLM(
        model,
        compute_dtype=getattr(torch, dtype),
        impl="eager",
        workspace_bytes=workspace_bytes(cfg),
    )
    policy.train()
    checkpoint_activations(model, checkpoint)
    return cfg, policy


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_gradients_and_optimizer_are_exact(tmp_path, dtype, head):
    cfg, policy = adapted(tmp_path, dtype=dtype, head=head)
    optimizer = build_optimizer(policy, cfg.optim)
    policy(pack([one_unit(TOKENS)])).sum().backward()
    optimizer.step()
    parameters = list(policy.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    result = estimate(cfg, 1, config=policy.model.config)
    memory = result.memory
    assert memory.parameters == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert memory.optimizer == sum(t.nbytes for t in states)
    assert result.sizes.head_rank == (RANK if head else 0)
    named = policy.named_parameters()
    assert result.sizes.trained == sum(p.numel() for name, p in named if is_adapter(name))


@pytest.mark.parametrize(
    ("checkpoint", "attention", "dtype", "options"),
    [
        (None, "eager", "float32", {}),
        (1, "eager", "float32", {}),
        (2, "sdpa", "float32", {}),
        (None, "sdpa", "bfloat16", {}),
        (None, "eager", "float32", {"head": True}),
        (1, "sdpa", "float32", {"targets": ["q_proj", "v_proj"]}),
    ],
)
def test_activations_are_those_of_a_run(tmp_path, checkpoint, attention, dtype, options):
    cfg, policy = adapted(tmp_path, checkpoint, attention, dtype, **options)
    memory = estimate(cfg, 1, config=policy.model.config).memory
    assert_bounds(memory, policy, TOKENS)


@pytest.mark.parametrize(
    ("checkpoint", "targets"),
    [(None, "all-linear"), (1, "all-linear"), (3, "all-linear"), (1, ["q_proj", "v_proj"])],
)
def test_decoder_flops_are_those_that_torch_counts(tmp_path, checkpoint, targets):
    cfg, policy = adapted(tmp_path, checkpoint, targets=targets)
    with FlopCounterMode(display=False) as counter:
        policy(pack([one_unit(TOKENS)])).sum().backward()
    compute = estimate(cfg, 1, config=policy.model.config).compute
    excess = 0
    if checkpoint is None:  # transformers asks for the gradient of the input when it checkpoints
        first = decoder_layers(policy.model)[0].self_attn
        inputs = [*first.q_proj.parameters(), *first.k_proj.parameters()]
        inputs += first.v_proj.parameters()
        read = [p for p in inputs if p.shape[1] == WIDE["hidden_size"]]
        excess = 2 * TOKENS * sum(p.numel() for p in read)
    counted = compute.total - compute.head - excess
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("head", [False, True])
def test_model_flops_are_those_of_the_log(tmp_path, head):
    cfg, policy = adapted(tmp_path, head=head)
    config, flops = policy.model.config, StepFlops(policy.model)
    expected = (flops.per_token + flops.per_scored) * TOKENS + flops.per_square * TOKENS**2 / 4
    if head:
        expected += 6 * TOKENS * RANK * (VOCAB + config.hidden_size)
    assert estimate(cfg, 1, config=config).compute.model == expected


@pytest.mark.parametrize("head", [False, True])
def test_adapters_that_are_off_cost_a_forward_of_the_base(tmp_path, head):
    cfg, policy = adapted(tmp_path, head=head)
    config = policy.model.config
    without = estimate(cfg, 1, config=config)
    cfg.reference = "adapter_off"
    reference = online_reference(cfg, policy, None)
    with FlopCounterMode(display=False) as counter:
        reference.prepare([MicroBatch((one_unit(TOKENS),), pack([one_unit(TOKENS)]))])
    result = estimate(cfg, 1, config=config)
    assert result.memory == without.memory
    # Within the head's operators nothing is counted; h A^T lies outside.
    inside = 2 * TOKENS * VOCAB * (config.hidden_size + (RANK if head else 0))
    assert result.compute.reference - inside == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert result.compute == replace(without.compute, reference=result.compute.reference)


def test_ranks_divide_what_is_sharded_and_statistics_are_those_of_adapters(tmp_path):
    cfg, policy = adapted(tmp_path, attention="sdpa", dtype="bfloat16")
    config = policy.model.config
    cfg.reference = "frozen_copy"
    alone, eight = (estimate(cfg, gpus, config=config).memory for gpus in (1, 8))
    for name in ("parameters", "reference", "gradients", "optimizer"):
        assert getattr(eight, name) == getattr(alone, name) // 8
    assert alone.reference == alone.parameters
    cfg.alpha = AlphaConfig(estimate=EstimateConfig(cross="exact"))
    adapter = estimate(cfg, 1, config=config)
    cfg.adapter, cfg.reference = None, "cache"
    whole = estimate(cfg, 1, config=config)
    assert 0 < adapter.sizes.trained_matrices == adapter.sizes.trained
    # Two fp32 gradients, one per kind, beside what does not depend on the weights.
    fewer = whole.sizes.trained - adapter.sizes.trained
    assert whole.memory.statistics - adapter.memory.statistics == 8 * fewer > 0


def test_options_that_cannot_be_combined_are_refused(tmp_path):
    cfg = plan(tmp_path)
    cfg.reference = "adapter_off"
    with pytest.raises(ValueError, match="reference: 'adapter_off' expects an adapter"):
        estimate(cfg, 1, config=tiny_model(**WIDE).config)
