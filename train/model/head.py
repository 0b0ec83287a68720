"""A causal LM whose head returns log-probabilities of the pack's targets, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bvpo_kernels.head import linear_logprobs
from bvpo_kernels.integrations.dropout import disable_dropout, dropout_fields
from bvpo_kernels.integrations.lm_head import call_with_hooks, read_head
from bvpo_kernels.integrations.logit_transform import (
    TOLERANCE,
    check_logits,
    logit_transform,
    probe_ids,
    rounding,
    text_decoder,
)
from bvpo_kernels.packing import pack
from bvpo_kernels.types import IGNORE_INDEX, TRACE, BVPOLoss, PackedBatch, TokenPair, Unit
from train.config import ModelConfig, RunConfig
from train.model import adapters, attention, loading
from train.model.attention_choice import choose
from train.model.liger import apply_liger
from train.model.models import attention_candidates, load_model, quiet
from train.runtime import parallel
from train.runtime.parallel import World


class FusedHeadLM(nn.Module):
    """logp_t = log softmax(head(decoder(tokens)_t))[target_t] for every row of a pack.

    Args:
        model: a causal LM of transformers, or peft's LoRA around one. Its decoder must read packed
            rows, that is, keep the segments apart by `position_ids`; `self_check` finds out.
        compute_dtype: autocast dtype of the forward; None, or the dtype of the parameters, is none.
        impl: of `linear_logprobs`.
        workspace_bytes: bound on the head's temporary memory.
        tail_tolerance: that of `linear_logprobs`; 0 is the exact backward.

    The output embedding is called as a module, its forward exchanged for the length of the call:
    FSDP2 gathers its weight in the hooks around that. Dropout is disabled: policy and reference
    must differ in their weights only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype | None = None,
        impl: str = "auto",
        workspace_bytes: int | None = None,
        tail_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = model.dtype if compute_dtype is None else compute_dtype
        # Adapters of half-precision weights are fp32.
        dtypes = {p.dtype for name, p in model.named_parameters() if adapters.is_adapter(name)}
        self.mixed = {model.dtype, *dtypes} != {self.compute_dtype}
        self.impl = impl
        self.workspace_bytes = workspace_bytes
        self.tail_tolerance = tail_tolerance
        self.run_device: torch.device | None = None
        self.transform = logit_transform(model.config)
        head = model.get_output_embeddings()
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            name = type(model).__name__
            raise ValueError(f"model: expected a linear LM head, got none in {name}")
        disable_dropout(model)

    @property
    def device(self) -> torch.device:
        """Where it runs; parameters that are offloaded rest on the host."""
        return self.model.device if self.run_device is None else self.run_device

    def forward(
        self, batch: PackedBatch, autocast: bool = True, loss: Callable[..., Any] | None = None
    ) -> Any:
        """Log-probabilities [T] in nats, fp32 (fp64 for fp64 models); 0 where nothing is scored.

        With `loss`, `linear_bvpo_loss` of all arguments but the head's, its result. (A callable:
        FSDP2 casts the tensors that it finds among a forward's arguments.)
        """
        head = self._head_logprobs if loss is None else partial(self._head_loss, loss)
        with self._autocast() if autocast else nullcontext():
            return call_with_hooks(
                self.model.get_output_embeddings(), head, self.hidden(batch), batch
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.mixed)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """What the LM head reads, [T, D]."""
        # attention_mask=None and use_cache=False: only then does transformers derive the
        # block-diagonal mask from position_ids; otherwise segments see each other, silently.
        hidden_1TD = text_decoder(self.model)(
            input_ids=batch.tokens_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **attention.segment_options(self.model, batch),
        ).last_hidden_state
        return hidden_1TD[0]

    def _head_logprobs(self, hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
        return linear_logprobs(
            target=batch.target_T, max_scored=batch.num_scored, **self._head_call(hidden_TD)
        )

    def _head_loss(
        self, loss: Callable[..., BVPOLoss], hidden_TD: Tensor, batch: PackedBatch
    ) -> BVPOLoss:
        return loss(batch=batch, **self._head_call(hidden_TD))

    def _head_call(self, hidden_TD: Tensor) -> dict[str, Any]:
        """The head and what it is asked for, by the names of both functions' arguments."""
        head = read_head(self.model.get_output_embeddings(), type(self.model).__name__)
        head = head.first_rows(self.transform.vocab)
        return {
            **head.inputs(hidden_TD),
            "impl": self.impl,
            "temperature": self.transform.temperature,
            "softcap": self.transform.softcap,
            "workspace_bytes": self.workspace_bytes,
            "tail_tolerance": self.tail_tolerance,
        }

    def choose_attention(self, names: Sequence[str]) -> str:
        """`attention_choice.choose` among `names` for this model; why some were passed over."""
        batch = _probe_batch(probe_ids(self.model.config, 16)).to(self.device)
        model = adapters.base_model(self.model)
        return choose(model, names, lambda: self.hidden(batch))

    @torch.no_grad()
    def self_check(self) -> None:
        """Compare a small pack in training mode with the model's own logits, each segment alone.

        One test for three silent failures: a head that this class does not know (extra projection,
        unknown scaling), a decoder that mixes segments (state-space layers, absolute positions, an
        attention that ignores `position_ids`), and scores that are random in a step.

        Raises:
            ValueError: naming the model's class and the difference found.
        """
        batch = _probe_batch(probe_ids(self.model.config, 16)).to(self.device)
        # Without autocast, whose rounding would hide a small leak, where attention allows it.
        autocast = self.model.config._attn_implementation in attention.HALF_ONLY
        with self._autocast() if autocast else nullcontext():
            half = autocast or self.hidden(batch).dtype not in (torch.float32, torch.float64)
            packed_T = self._training_logprobs(batch, autocast)
            # bf16 rounds hidden states, too; an unknown scale or a leak is off by nats.
            alone, tolerance = [], 0.5 if half else TOLERANCE
            for start, end in pairwise(batch.cu_seqlens.tolist()):
                tokens_1T = batch.tokens_T[None, start:end]
                logits_TV = self.model(input_ids=tokens_1T, use_cache=False).logits[0]
                logp_TV = logits_TV.to(packed_T.dtype).log_softmax(-1)
                target_T1 = batch.target_T[start:end, None]
                alone.append(logp_TV.gather(1, target_T1.clamp_min(0))[:, 0])
                tolerance = max(
                    tolerance, rounding(logits_TV, self.compute_dtype if half else None)
                )
        wrong_T = (packed_T - torch.cat(alone)).masked_fill(batch.target_T == IGNORE_INDEX, 0).abs()
        if not bool(wrong_T.max() <= tolerance):
            raise ValueError(
                f"model: {type(self.model).__name__} scores a packed row differently from its own "
                f"logits (by {wrong_T.max().item():.3g} nats, expected <= {tolerance:.2g}): its "
                f"head is not linear in a known way, or its attention does not keep segments apart"
            )
        with self._autocast() if autocast else nullcontext():
            # What the rounding above may hide.
            check_logits(adapters.base_model(self.model), self.transform, self.device)

    def _training_logprobs(self, batch: PackedBatch, autocast: bool) -> Tensor:
        """`forward` in the mode of a step; the model's own mode is put back.

        Raises:
            ValueError: naming the model's class, where they are random.
        """
        training = self.model.training
        self.model.train()
        try:
            before = _generator_states(self.device)
            first_T, second_T = (self.forward(batch, autocast) for _ in range(2))
            after = _generator_states(self.device)
        finally:
            self.model.train(training)
        drew = not all(map(torch.equal, before, after))
        apart = (first_T - second_T).abs().max().item()
        # Kernels that add in no fixed order differ by rounding, and draw nothing.
        if apart > (0.0 if drew else 0.5):
            name, fields = type(self.model).__name__, dropout_fields(self.model.config)
            raise ValueError(
                f"model: two forwards of {name} in training mode differ by {apart:.3g} nats: it "
                f"draws random numbers in a form of dropout that could not be switched off, and "
                f"policy and reference must differ in their weights only; set what is random in "
                f"its configuration to 0 (it has {fields or 'no field of dropout'})"
            )
        return first_T


def _generator_states(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _probe_batch(tokens: list[int]) -> PackedBatch:
    """Two pairs, hence four segments."""
    first, second, third, *rest = tokens
    pairs = [TokenPair([first], rest[:4], rest[4:5]), TokenPair([second, third], rest[5:12], rest)]
    return pack([Unit("probe", {TRACE: pairs})])


def build_policy(cfg: RunConfig, world: World | None = None) -> tuple[FusedHeadLM, Any]:
    """The model of the configuration under its fused head, and its tokenizer.

    With a world of several ranks the parameters are spread over them; a checkpoint in safetensors
    is read shard by shard, so that no rank ever holds the whole model.

    Raises:
        ValueError: for float16, and for adapters that another option cannot be combined with.
    """
    adapters.check(cfg)
    if cfg.model.compute_dtype == "float16":
        raise ValueError(
            "model.compute_dtype: expected float32 or bfloat16, got float16, whose small gradients "
            "vanish without loss scaling"
        )
    if world is not None and world.mesh is not None:
        return _build_sharded(cfg, world)
    model, tokenizer = load_model(cfg.model, packed=True)
    liger = apply_liger(model, cfg.train.liger, (world or parallel.ALONE).device)
    policy = _fuse(model, cfg, getattr(torch, cfg.model.compute_dtype))
    if world is not None:
        policy = policy.to(world.device)
    _choose_attention(policy, cfg.model, liger, world or parallel.ALONE)
    return policy, tokenizer


def _choose_attention(policy: FusedHeadLM, cfg: ModelConfig, liger: bool, world: World) -> None:
    """Set the attention that `model.attention` means for this model, and print what was chosen.

    Raises:
        ValueError: model.attention names one that does not serve the model.
    """
    with quiet():
        reason = policy.choose_attention(attention_candidates(cfg, packed=True))
    chosen = policy.model.config._attn_implementation
    if reason and cfg.attention != attention.AUTO:
        raise ValueError(
            f"model.attention: {reason} of {type(adapters.base_model(policy.model)).__name__}; "
            f"'auto' takes {chosen!r}"
        )
    if world.is_main:
        why = f" ({reason})" if reason else ""
        print(f"attention: {chosen}{why}; liger: {'on' if liger else 'off'}")


def workspace_bytes(cfg: RunConfig) -> int | None:
    """Of the LM head; None: the library's default."""
    mib = cfg.train.head_workspace_mib
    return None if mib is None else mib * 2**20


def _fuse(model: PreTrainedModel, cfg: RunConfig, compute_dtype: torch.dtype) -> FusedHeadLM:
    if cfg.adapter is not None:
        model = adapters.add_adapters(model, cfg.adapter, cfg.seed)
    return FusedHeadLM(
        model,
        compute_dtype=compute_dtype,
        impl=cfg.train.head_impl,
        workspace_bytes=workspace_bytes(cfg),
        tail_tolerance=cfg.train.tail_tolerance,
    )


def _build_sharded(cfg: RunConfig, world: World) -> tuple[FusedHeadLM, Any]:
    model, tokenizer, weights = loading.empty_model(cfg.model)
    # FSDP2 casts the weights as it gathers them: nothing is left for autocast.
    liger = apply_liger(model, cfg.train.liger, world.device)
    policy = _fuse(model, cfg, model.dtype)
    policy.run_device = world.device
    parallel.shard(policy, cfg.parallel, world, getattr(torch, cfg.model.compute_dtype))
    if weights is not None:
        home = torch.device("cpu") if cfg.parallel.cpu_offload else world.device
        loading.fill(model, weights, home)
    _choose_attention(policy, cfg.model, liger, world)
    return policy, tokenizer
