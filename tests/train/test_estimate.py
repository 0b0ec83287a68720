"""Estimates beside what small runs really allocate and compute."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import VOCAB, make_cfg, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3Config

from bvpo_kernels import ops
from bvpo_kernels.call import Call, Inputs, Kept, Need
from bvpo_kernels.head import linear_bvpo_loss
from bvpo_kernels.ops import pair_loss
from bvpo_kernels.ops.head import SERVING
from bvpo_kernels.packing import pack
from bvpo_kernels.types import EMPTY, TRACE, TokenPair, Unit
from train import cli
from train.config import AlphaConfig, EstimateConfig
from train.model.head import FusedHeadLM, workspace_bytes
from train.online import online_reference
from train.runtime.parallel import checkpoint_activations
from train.sizing.estimate import GIB, advise, estimate, run, table
from train.sizing.trace import ARCHITECTURES
from train.steps import MicroBatch
from train.trainer import build_optimizer

LARGE = Path("train/presets/large")
MODELS = ("r1-distill-qwen-1.5b", "r1-distill-qwen-7b", "r1-0528-qwen3-8b")
LENGTHS = ("4k", "16k", "32k")
# Wide enough that activations are a hundred times what a step allocates beside them.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def one_unit(tokens: int) -> Unit:
    """A unit of four segments of equal length."""
    pair = TokenPair([5] * 4, [7] * (tokens // 4 - 4), [9] * (tokens // 4 - 4))
    return Unit("unit", {TRACE: (pair,), EMPTY: (pair,)})


def plan(tmp_path, tokens=512, checkpoint=None, attention="sdpa", compute="float32"):
    """A configuration whose step is one micro-batch of one unit, and whose workspace is small."""
    cfg = make_cfg(tmp_path, units_per_step=1, tokens_per_micro_batch=tokens, head_workspace_mib=1)
    cfg.train.checkpoint_layers = checkpoint
    cfg.model.attention, cfg.model.compute_dtype = attention, compute
    return cfg


def build(cfg, config_class, **options) -> FusedHeadLM:
    model = tiny_model(config_class, attention=cfg.model.attention, **WIDE, **options)
    policy = FusedHeadLM(
        model,
        compute_dtype=getattr(torch, cfg.model.compute_dtype),
        impl="eager",
        workspace_bytes=workspace_bytes(cfg),
    )
    policy.train()
    checkpoint_activations(model, cfg.train.checkpoint_layers)
    return policy


def assert_bounds(memory, policy, tokens: int) -> None:
    """The estimate is what a run takes, to a hundredth; above it is the part of the head's
    workspace that so small a vocabulary leaves unused, and a tenth at most."""
    measured, estimated = measured_peak(policy, tokens), memory.kept + memory.working
    assert 0.99 * measured <= estimated <= 1.1 * measured + policy.workspace_bytes


def measured_peak(policy, tokens: int) -> int:
    """Bytes that forward and backward allocate at most, the gradients being there already."""
    batch = pack([one_unit(tokens)])
    assert batch.num_tokens == tokens
    policy(batch).sum().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        policy(batch).sum().backward()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("checkpoint", [None, 1, 2])
def test_activations_are_those_of_a_run(tmp_path, config_class, tokens, checkpoint):
    cfg = plan(tmp_path, tokens, checkpoint)
    policy = build(cfg, config_class)
    memory = estimate(cfg, 1, config=policy.model.config).memory
    assert_bounds(memory, policy, tokens)


@pytest.mark.parametrize(("attention", "compute"), [("eager", "float32"), ("sdpa", "bfloat16")])
def test_activations_of_eager_attention_and_of_autocast(tmp_path, attention, compute):
    cfg = plan(tmp_path, 512, None, attention, compute)
    policy = build(cfg, LlamaConfig)
    memory = estimate(cfg, 1, config=policy.model.config).memory
    assert_bounds(memory, policy, 512)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_gradients_and_optimizer_are_exact(tmp_path, dtype):
    cfg = plan(tmp_path, 64)
    cfg.model.param_dtype = cfg.model.compute_dtype = dtype
    policy = build(cfg, LlamaConfig).to(getattr(torch, dtype))
    optimizer = build_optimizer(policy, cfg.optim)
    policy(pack([one_unit(64)])).sum().backward()
    optimizer.step()
    parameters = list(policy.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    memory = estimate(cfg, 1, config=policy.model.config).memory
    assert memory.parameters == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters)
    assert memory.optimizer == sum(t.nbytes for t in states)
    assert memory.gathered == memory.statistics == memory.host == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_copy_takes_its_weights_and_a_forward(tmp_path, dtype):
    cfg = plan(tmp_path, 256, attention="eager")
    cfg.model.param_dtype = cfg.model.compute_dtype = dtype
    policy = build(cfg, LlamaConfig).to(getattr(torch, dtype))
    config = policy.model.config
    without = estimate(cfg, 1, config=config)
    cfg.reference = "frozen_copy"
    frozen = online_reference(cfg, policy, build(cfg, LlamaConfig).to(getattr(torch, dtype)))
    micro = MicroBatch((one_unit(256),), pack([one_unit(256)]))
    with FlopCounterMode(display=False) as counter:
        frozen.prepare([micro])
    held = sum(p.nbytes for p in frozen.model.parameters())
    result = estimate(cfg, 1, config=config)
    assert result.memory == replace(without.memory, reference=held)
    assert result.memory.total == without.memory.total + held
    # The counter does not look into the head's operators: one product, no gradient.
    head = 2 * 256 * VOCAB * config.hidden_size
    assert result.compute.reference - head == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert result.compute == replace(without.compute, reference=result.compute.reference)
    cfg.loss.name = "simpo"  # has no reference
    assert estimate(cfg, 1, config=config) == without


def test_a_frozen_copy_is_sharded_and_offloaded_like_the_policy(tmp_path):
    cfg, config = plan(tmp_path), tiny_model(**WIDE).config
    cfg.reference = "frozen_copy"
    alone, eight = (estimate(cfg, gpus, config=config).memory for gpus in (1, 8))
    assert alone.reference == alone.parameters
    assert eight.reference == eight.parameters == alone.reference // 8
    cfg.parallel.cpu_offload = True
    offloaded = estimate(cfg, 8, config=config).memory
    states = eight.parameters + eight.gradients + eight.optimizer
    assert (offloaded.reference, offloaded.host) == (0, states + eight.reference)


def test_ranks_divide_what_is_sharded(tmp_path):
    cfg = plan(tmp_path)
    config = tiny_model(**WIDE).config
    cfg.train.units_per_step = 16
    cfg.parallel.sync_every_micro_batch = True
    alone, eight = (estimate(cfg, gpus, config=config).memory for gpus in (1, 8))
    assert [getattr(alone, n) // 8 for n in ("parameters", "gradients", "optimizer")] == [
        getattr(eight, n) for n in ("parameters", "gradients", "optimizer")
    ]
    cfg.parallel.replicate = 4
    assert estimate(cfg, 8, config=config).memory.parameters == alone.parameters // 2
    cfg.parallel.replicate = 1
    cfg.parallel.sync_every_micro_batch = False
    assert estimate(cfg, 8, config=config).memory.gradients == eight.gradients + alone.gradients
    cfg.train.units_per_step = 8  # one micro-batch: nothing is accumulated
    assert estimate(cfg, 8, config=config).memory.gradients == eight.gradients
    cfg.parallel.reshard_after_forward = False
    assert estimate(cfg, 8, config=config).memory.gathered == alone.parameters
    cfg.parallel.cpu_offload = True
    offloaded = estimate(cfg, 8, config=config).memory
    assert offloaded.parameters == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.host == eight.parameters + eight.gradients + eight.optimizer


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpoint", [None, 1, 3])
def test_decoder_flops_are_those_that_torch_counts(tmp_path, attention, checkpoint):
    cfg = plan(tmp_path, 256, checkpoint, attention)
    policy = build(cfg, LlamaConfig)
    batch = pack([one_unit(256)])
    with FlopCounterMode(display=False) as counter:
        policy(batch).sum().backward()
    compute = estimate(cfg, 1, config=policy.model.config).compute
    # The counter looks neither into the head's operators nor into the CPU's fused attention.
    counted = compute.total - compute.head - (compute.attention if attention == "sdpa" else 0)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("head_workspace_mib", [64, 1])
def test_head_flops_are_those_that_torch_counts(tmp_path, head_workspace_mib):
    """In bf16, whose dH needs an accumulator: 8 TVD, and 10 where that is beyond the workspace."""
    cfg = plan(tmp_path, 4096, None, "sdpa", "bfloat16")
    cfg.train.head_workspace_mib, cfg.loss.name = head_workspace_mib, "kto"
    config = tiny_model(**WIDE).config
    compute = estimate(cfg, 1, config=config).compute
    hidden, weight = torch.randn(4096, 64).bfloat16(), torch.randn(VOCAB, 64).bfloat16()
    call = Call(workspace_bytes=head_workspace_mib * 2**20)
    target = torch.zeros(4096, dtype=torch.long)

    def added_in_place(_, left, right, out_shape=None):
        """Where a CPU has no bf16 product, `eager` adds stretches; torch does not count these."""
        return 2 * left[0] * left[1] * right[1]

    more = {torch.ops.aten.addmm_: added_in_place}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        inputs = Inputs(hidden, weight, target)
        *kept, _, _ = SERVING["eager"].forward(inputs, call, False)
        need = Need(hidden=True, weight=True, bias=False)
        SERVING["eager"].backward(torch.ones(4096), inputs, Kept(*kept), call, need)
    assert compute.head == counter.get_total_flops()


def test_one_pass_takes_six_products(tmp_path, monkeypatch):
    """As many as torch counts, and the memory that the head says it takes."""
    cfg = plan(tmp_path, 512, None, "sdpa", "bfloat16")
    config = tiny_model(**WIDE).config
    cfg.train.head_workspace_mib = None
    result = estimate(cfg, 1, config=config)
    cfg.loss.name = "kto"
    again = estimate(cfg, 1, config=config)
    batch = pack([one_unit(512)])
    hidden = torch.randn(512, 64).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, 64).bfloat16().requires_grad_()
    all_T = torch.zeros_like(batch.target_T)  # every row scored, as the estimate has it
    lengths_S = torch.full_like(batch.scored_lengths_S, 128)
    batch = replace(batch, target_T=all_T, scored_lengths_S=lengths_S, num_scored=512)
    asked: list = []
    run = ops.linear_pair_loss
    monkeypatch.setattr(ops, "linear_pair_loss", lambda *args: asked.append(args) or run(*args))
    linear_bvpo_loss(hidden, weight, batch, torch.zeros(4), 0.5, impl="eager", one_pass=True)
    with FlopCounterMode(display=False) as counter:  # does not look into operators
        pair_loss.run_pairs(*asked[0])
    assert result.compute.head == counter.get_total_flops()
    assert again.compute.head == result.compute.head * 8 / 6


def test_checkpointing_and_flash_attention_lower_what_is_kept(tmp_path):
    config = tiny_model(**WIDE).config
    kept = {}
    for attention in ("sdpa", "flash_attention_2"):
        for checkpoint in (None, 2, 1):
            cfg = plan(tmp_path, 1024, checkpoint, attention)
            kept[attention, checkpoint] = estimate(cfg, 1, config=config).memory.kept
    for attention in ("sdpa", "flash_attention_2"):
        assert kept[attention, None] > 1.5 * kept[attention, 2] > 1.5 * kept[attention, 1]
    # sdpa keeps a mask of tokens x tokens per layer.
    assert kept["sdpa", None] - kept["flash_attention_2", None] > 4 * 4 * 1024**2


def test_gradient_statistics_count(tmp_path):
    cfg, config = plan(tmp_path), tiny_model(**WIDE).config
    numbers = []
    for options in (None, {"mode": "norm"}, {"mode": "sketch"}, {}, {"cross": "exact"}):
        estimated = None if options is None else EstimateConfig(**options)
        cfg.alpha = AlphaConfig(estimate=estimated)
        numbers.append(estimate(cfg, 1, config=config).memory.statistics)
    assert numbers[0] == numbers[1] == 0 < numbers[2] < numbers[3]
    trained = estimate(cfg, 1, config=config).sizes.trained
    assert numbers[4] > 2 * 4 * trained


def preset(name: str, length: str):
    """What `estimate` and `train` make of a preset of a model and one of a length."""
    files = [f"--config={LARGE / part}.yaml" for part in (name, length)]
    command, cfg = cli.parse(["estimate", *files, "--gpus", "8"])
    assert command == "estimate"
    assert cli.parse(["train", *files])[1].train == cfg.train
    return cfg


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_large_presets_hold_their_longest_unit(name, length):
    cfg = preset(name, length)
    assert cfg.train.checkpoint_layers == 1
    assert cfg.parallel.sync_every_micro_batch
    longest = 2 * cfg.sample.max_new_tokens + 2 * cfg.sample.max_new_tokens_empty + 4 * 1024
    assert cfg.train.tokens_per_micro_batch == longest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"), [*zip(MODELS, (1.777e9, 7.616e9, 8.191e9), strict=True)]
)
def test_large_presets_have_the_published_sizes(name, parameters):
    cfg = preset(name, "16k")
    assert cfg.model.name in ARCHITECTURES
    result = estimate(cfg, cfg.gpus)
    size = result.sizes
    assert size.parameters == pytest.approx(parameters, rel=1e-3)
    # What multiplies tokens is everything but the embedding, the head and the vectors.
    head = size.head[0] * size.head[1]
    assert size.matrices == pytest.approx(parameters - 2 * head, rel=2e-3)
    states = result.memory.parameters + result.memory.gradients + result.memory.optimizer
    assert states == pytest.approx(16 * size.parameters / 8, rel=1e-6)
    assert states < result.memory.total < 160 * GIB
    assert result.micro_batches == 16
    lines = table(result, cfg).splitlines()
    assert f"of {cfg.gpu_memory:g}" in next(line for line in lines if "total" in line)
    assert max(map(len, lines)) <= 100


def test_the_knob_that_helps_most_is_named(tmp_path):
    cfg, config = plan(tmp_path, 2048), tiny_model(**WIDE).config
    config.save_pretrained(tmp_path / "model")
    cfg.model.name = str(tmp_path / "model")
    assert "train.checkpoint_layers 1 helps most" in advise(cfg, 1, 4, GIB)
    cfg.train.checkpoint_layers = 1
    text = advise(cfg, 1, 4, 1.0)
    assert "model.attention flash_attention_2 helps most" in text
    assert "fewer train.tokens_per_micro_batch" in text


def test_the_command(tmp_path, capsys):
    tiny_model().config.save_pretrained(tmp_path / "model")
    options = ["--model.name", str(tmp_path / "model"), "--train.units_per_step", "8"]
    _, cfg = cli.parse(["estimate", *options, "--gpus", "2", "--train.tokens_per_micro_batch=128"])
    run(cfg)
    printed = capsys.readouterr().out
    assert "on 2 GPUs" in printed
    assert "4 per rank and step" in printed
    assert "does not fit" not in printed
    cfg.gpu_memory = 1e-4
    run(cfg)
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "gpus: expected a multiple"),
        (["--gpus", "6", "--parallel.replicate", "4"], "parallel.replicate, 4, got 6"),
        (["--segments", "0"], "segments: expected a number >= 1"),
        (["--tflops", "0"], "tflops: expected a number > 0"),
        (["--model.name", "no/such/folder"], "model.name"),
    ],
)
def test_errors_name_the_option(options, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = ["--model.name", next(iter(ARCHITECTURES))]
    assert cli.main(["estimate", *name, *options]) == 2
    assert message in capsys.readouterr().err
