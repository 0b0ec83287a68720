"""What a micro-batch allocates: its forward and backward on fake tensors, which have no memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import AttentionInterface

from train.config import ModelConfig, RunConfig
from train.model.adapters import is_adapter, wrapped
from train.model.head import FusedHeadLM, workspace_bytes
from train.model.models import readable_errors, resolve
from train.runtime.parallel import checkpoint_activations, decoder_layers
from train.sizing.head_schedule import HeadSchedule

# Configurations that need neither a download nor a folder; each file says where it is from.
ARCHITECTURES: Mapping[str, str] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "r1-distill-qwen-1.5b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "r1-distill-qwen-7b",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "r1-0528-qwen3-8b",
}
_FOLDER = Path(__file__).parent.parent / "presets" / "models"
# transformers' own attentions over a packed row, which are traced as they are. Every other one is
# taken for a flash attention with variable lengths.
QUADRATIC = ("eager", "sdpa")
_FLASH = "estimate_varlen"  # not "flash": transformers would look for a kernel of that name
DECODER, HEAD, REDUCTION = "decoder layer", "LM head", "gradient reduction"


def load_config(cfg: ModelConfig) -> PretrainedConfig:
    """The configuration of `cfg.name`: built in, of a folder, or of a hub id.

    Raises:
        FileNotFoundError, ValueError: if it cannot be loaded; the message names model.name.
    """
    if cfg.name in ARCHITECTURES and not Path(cfg.name).exists():
        text = (_FOLDER / f"{ARCHITECTURES[cfg.name]}.json").read_text(encoding="utf-8")
        fields = {k: v for k, v in json.loads(text).items() if k != "source"}
        return AutoConfig.for_model(**fields)
    path, gguf_file = resolve(cfg)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with readable_errors("model.name", cfg.name):
        return AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code, **options)


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of a model.

    parameters, trained: all, and those that get a gradient; adapters are among both. matrices,
    trained_matrices: weights of the decoder layers that every token is multiplied with. closing: of
    a layer's last matrix, which a recomputation does not reach: it stops at the last tensor that
    the backward needs. layer: of the largest decoder layer. last: of the group that holds the LM
    head, with the embedding where it is tied. head: [V, D]. head_rank: of the LoRA on it, 0 for
    none. attention: heads times head size, over all layers. layers, recomputed: decoder layers, and
    those under checkpointing.
    """

    parameters: int
    trained: int
    matrices: int
    trained_matrices: int
    closing: int
    layer: int
    last: int
    head: tuple[int, int]
    head_trained: bool
    head_rank: int
    attention: int
    layers: int
    recomputed: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch takes besides parameters and gradients that are kept.

    kept: held from the forward for the backward. peak: the most at any time, `kept` included, with
    the LM head's workspace and the buffers that gradients pass through. where: what ran then.
    """

    kept: int
    peak: int
    where: str


class _Watch(TorchDispatchMode):
    """Adds up the storages that operators return until they are freed."""

    def __init__(self, known: Sequence[Tensor], head: HeadSchedule) -> None:
        super().__init__()
        self.live, self.peak, self.where = 0, 0, DECODER
        self._head = head
        self._storages: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._storages[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        # The fakes of the head's operators make the results alone.
        head = func.namespace == "bvpo" and "logprobs" in func._opname
        backward = head and "backward" in func._opname
        workspace = self._head.backward if backward else self._head.forward
        self.note(workspace if head else 0, HEAD if head else DECODER)
        return result

    def note(self, extra: int, where: str) -> None:
        """Bytes beside the live ones, for this moment."""
        if self.live + extra > self.peak:
            self.peak, self.where = self.live + extra, where

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            size = storage.nbytes()
            self._storages[storage] = None
            self.live += size
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _FlashAttention(torch.autograd.Function):
    """The allocations of flash-attn with variable lengths: out and one number per row and head are
    kept; the backward sums dQ in fp32."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx, dout):
        query, key, value, _, _ = ctx.saved_tensors
        dquery = torch.empty_like(query, dtype=torch.float32)
        dkey, dvalue = torch.empty_like(key), torch.empty_like(value)
        return dquery.to(query.dtype), dkey, dvalue


def _flash_attention(module, query, key, value, attention_mask, **options):
    return _FlashAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(_FLASH, _flash_attention)


@contextmanager
def fake_policy(config: PretrainedConfig, cfg: RunConfig, sharded: bool) -> Iterator[FusedHeadLM]:
    """The policy of a run on fake tensors; fake tensors can be used inside only.

    Args:
        sharded: under FSDP2, whose weights have the compute dtype while they are used; else they
            have their own and autocast converts.
    """
    compute = getattr(torch, cfg.model.compute_dtype)
    dtype = compute if sharded else getattr(torch, cfg.model.param_dtype)
    attention = cfg.model.attention if cfg.model.attention in QUADRATIC else _FLASH
    # Adapters go on while the tensors are meta ones: peft converts parameters, which fakes refuse.
    mode = FakeTensorMode()
    with mode if cfg.adapter is None else torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=cfg.model.trust_remote_code,
        )
        if cfg.adapter is not None:
            model = wrapped(model, cfg.adapter)
            if sharded:
                model.to(compute)
    with mode:
        if cfg.adapter is not None:
            _fake_in_place(model)
        policy = FusedHeadLM(
            model,
            compute_dtype=compute,
            impl="eager",
            workspace_bytes=workspace_bytes(cfg),
            tail_tolerance=cfg.train.tail_tolerance,
        )
        policy.train()
        checkpoint_activations(model, cfg.train.checkpoint_layers)
        yield policy


def _fake_in_place(model: nn.Module) -> None:
    """Fake tensors of the host instead of meta ones; what is tied stays tied."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


def _numel(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def sizes(policy: FusedHeadLM, checkpoint_layers: int | None) -> Sizes:
    """See `Sizes`; all experts of a sparse model count as if every token went through them."""
    model: Any = policy.model
    layers, head = decoder_layers(model), model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    within = _numel([p for layer in layers for p in layer.parameters()])
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
    on_head = _numel([p for n, p in head.named_parameters("head") if is_adapter(n)])
    outside = _numel(model.parameters()) - within
    tied = embedding is head.weight
    return Sizes(
        parameters=_numel(model.parameters()),
        trained=_numel([p for p in model.parameters() if p.requires_grad]),
        matrices=_numel(matrices),
        trained_matrices=_numel([p for p in matrices if p.requires_grad]),
        closing=[p.numel() for p in layers[0].parameters() if p.ndim > 1][-1],
        layer=max(_numel(layer.parameters()) for layer in layers),
        last=outside if tied else outside - embedding.numel(),
        head=tuple(head.weight.shape),  # type: ignore[arg-type]
        head_trained=head.weight.requires_grad,
        head_rank=on_head // sum(head.weight.shape),
        attention=heads * head_dim * len(layers),
        layers=len(layers),
        recomputed=0 if checkpoint_layers is None else -(-len(layers) // checkpoint_layers),
    )


def _drop_gradients(
    policy: FusedHeadLM, sharded: bool, reduce_itemsize: int, watch: _Watch
) -> None:
    """Gradients leave what is watched: at once, or, sharded, when those of an FSDP group are there
    and have passed through the buffer of their reduction."""
    model: Any = policy.model
    groups: list[list[nn.Parameter]] = [[p] for p in model.parameters()]
    if sharded:
        groups = [list(layer.parameters()) for layer in decoder_layers(model)]
        inside = {id(p) for group in groups for p in group}
        others = [p for p in model.parameters() if id(p) not in inside]
        embedding = model.get_input_embeddings().weight
        if embedding is not model.get_output_embeddings().weight:
            groups.append([embedding])
            others = [p for p in others if p is not embedding]
        groups.append(others)
    for group in groups:
        trained = [parameter for parameter in group if parameter.requires_grad]
        arrived: list[nn.Parameter] = []

        def take(parameter: nn.Parameter, trained: Any = trained, arrived: Any = arrived) -> None:
            arrived.append(parameter)
            if len(arrived) == len(trained):
                watch.note(reduce_itemsize * _numel(trained) if sharded else 0, REDUCTION)
                for parameter in arrived:
                    parameter.grad = None
                arrived.clear()

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(take)


def trace(policy: FusedHeadLM, cfg: RunConfig, sharded: bool, head: HeadSchedule) -> Activations:
    """Run a micro-batch of `train.tokens_per_micro_batch` tokens; inside `fake_policy`.

    The head is traced as `linear_logprobs`: one pass has its results, but earlier.

    Raises:
        ValueError: for a model whose control flow depends on values.
    """
    tokens = cfg.train.tokens_per_micro_batch
    watch = _Watch([*policy.parameters(), *policy.buffers()], head)
    reduce_dtype = getattr(torch, cfg.parallel.reduce_dtype)
    _drop_gradients(policy, sharded, reduce_dtype.itemsize, watch)
    ids_T = torch.zeros(tokens, dtype=torch.long)
    batch: Any = SimpleNamespace(
        tokens_T=ids_T, target_T=ids_T, position_ids_T=ids_T, num_scored=tokens
    )
    try:
        with watch:
            total = policy(batch).sum()
            kept = watch.live
            total.backward()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"model.name: expected a decoder whose operators depend on shapes only, got "
            f"{type(policy.model).__name__}: {error}"
        ) from error
    return Activations(kept, watch.peak, watch.where)
