"""`patch_model`: a causal LM of transformers that returns log-probabilities, never logits.

Source of the contract, `model(..., labels=labels, fused_lm_head=True).log_probs`: TRL's
`add_fused_lm_head` (1.15 and later).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bvpo_kernels.head import linear_logprobs
from bvpo_kernels.integrations.lm_head import LinearHead, call_with_hooks, read_head
from bvpo_kernels.integrations.logit_transform import (
    LogitTransform,
    backbone,
    check_logits,
    evaluation,
    logit_transform,
    probe_ids,
    rounding,
)
from bvpo_kernels.types import IGNORE_INDEX, BVPOLoss

OUTPUTS = ("log_probs", "entropy", "mean_logits")


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a patched model returns. Values per token are 0 where the label is -100.

    loss: minus the sum of `log_probs`, divided by `num_items_in_batch` or by the number of scored
        tokens. log_probs, entropy, mean_logits: fp32, [B, L - 1], or [B, L] with `shift_labels`;
        the last two without a gradient and only if they were asked for. label_mask: where a label
        is not -100, same shape. pair_loss: of a call that was given one, and then alone with its
        `loss`.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    label_mask: Tensor | None = None
    pair_loss: BVPOLoss | None = None


class PatchedModel:
    """Handle of a patch: `remove()` brings the model's own forward back. A context manager, too."""

    def __init__(self, model: nn.Module, level: int) -> None:
        self.model, self._level, self._patched = model, level, True

    def remove(self) -> None:
        """Undo the patch; nothing to do a second time. Copies of the model keep theirs.

        Raises:
            RuntimeError: somebody else replaced `forward` since; undo that first.
        """
        if not self._patched:
            return
        patches = dict(getattr(self.model, _PATCHES))  # a shallow copy shares the original's
        if "forward" in self.model.__dict__ or max(patches) != self._level:
            raise RuntimeError(
                "remove: expected the forward of patch_model, got one that was put over it; undo "
                "patches in the opposite order"
            )
        previous = patches.pop(self._level).instance_forward
        if previous is not None:
            self.model.forward = previous
        if patches:
            setattr(self.model, _PATCHES, patches)
        else:
            delattr(self.model, _PATCHES)
        # A class that was put over ours since (FSDP2's) stays; ours under it then does nothing.
        if type(self.model).__dict__.get(_LEVEL) == self._level:
            self.model.__class__ = type(self.model).__mro__[1]
        self._patched = False

    def __enter__(self) -> PatchedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Options(NamedTuple):
    transform: LogitTransform
    temperature: float
    outputs: tuple[str, ...]
    impl: str
    workspace_bytes: int | None
    max_scored: int | None = None  # of a call


@dataclass
class _Patch:
    """What a patched model keeps in its own __dict__, so that its copies have copies of it."""

    options: _Options
    always: bool
    instance_forward: Any  # one that was in the model's __dict__, over that of its class


_PATCHES = "_fused_head_patches"  # of a model: its patches by level, 0 the first
_LEVEL = "_fused_head_level"  # of a class made here


def patch_model(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = ("log_probs",),
    always: bool = False,
    check: bool = True,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> PatchedModel:
    """Give `model` a head that scores labels without [tokens, vocab] logits.

        patch_model(model)
        logp = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs     # [B, L - 1]

    A call may say how many labels are scored at most, `max_scored` of `linear_logprobs`. Or, in the
    place of labels, what is made of the head and its input: `pair_loss`, a function that takes the
    arguments of `linear_bvpo_loss` that these are, by name (`integrations.scoring.loss_batch`).

    Without `fused_lm_head=True` the model's own forward runs, so generation is as before. Head and
    backbone are looked up at every call: LoRA on the head (peft, `LinearHead`), weights that FSDP2
    shards, and a head that is replaced later are served. Patch before wrapping in DDP, FSDP2 or
    torch.compile; a model of peft may be patched before or after.

    Args:
        model: a causal LM of transformers, or a peft model around one.
        temperature: divides the logits, after what the model itself does to them.
        outputs: fields of `FusedHeadOutput` to compute, among "log_probs", "entropy" (a little more
            work per logit) and "mean_logits" (not with a softcap).
        always: fuse every call with labels, as a plain `transformers.Trainer` makes them in
            training and in evaluation: same loss, no logits. A `compute_metrics` is then given
            (log_probs, label_mask) as predictions.
        check: try the head on the model's own logits, once, now, in fp32; then eight tokens with
            the weights as they are. Skipped where these are not there yet (meta device, sharded).
        impl, workspace_bytes: of `linear_logprobs`.

    Raises:
        TypeError, ValueError: naming what cannot be served: a model that is no causal LM, a head
            that is not linear, logits scaled in a way not known here, quantized or offloaded heads,
            a tensor-parallel head, experts whose router loss is asked for; with `always`, a loss
            of its own that is not the mean over the next tokens.
    """
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown:
        raise ValueError(f"outputs: expected names of {OUTPUTS}, got {unknown}")
    _require_servable(base)
    options = _Options(
        logit_transform(base.config), temperature, tuple(outputs), impl, workspace_bytes
    )
    if "mean_logits" in outputs and options.transform.softcap is not None:
        raise ValueError(f"outputs: mean_logits is not linear in {type(base).__name__}'s logits")
    level = _put_over(base, _Patch(options, always, base.__dict__.get("forward")))
    handle = PatchedModel(base, level)
    if check:
        try:
            _check(base, options, always)
        except BaseException:
            handle.remove()
            raise
    return handle


def _put_over(model: Any, patch: _Patch) -> int:
    """Give `model` the class under which `patch` acts; returns the level of the patch."""
    vars(model).pop("forward", None)
    cls: Any = type(model)
    model.__class__ = _patched_class(cls)
    level = getattr(model, _LEVEL)
    setattr(model, _PATCHES, getattr(model, _PATCHES, {}) | {level: patch})
    return level


@functools.cache
def _patched_class(cls: Any) -> Any:
    """`cls` with a forward that looks for patches in the instance that it is called on.

    A class, and no bound method in the instance, because copies of a model share such a method:
    copy.deepcopy, pickle and nn.DataParallel would go on with the weights of the original. It has
    the name of `cls`: transformers writes that into config.json, and goes by it here and there.
    """
    level = getattr(cls, _LEVEL, -1) + 1

    # The signature of the model's own forward: `generate` and `Trainer` ask for it.
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = getattr(self, _PATCHES, {}).get(level)
        if patch is None:  # removed, or an instance made anew
            return cls.forward(self, *args, **kwargs)
        own = patch.instance_forward or functools.partial(cls.forward, self)
        if patch.instance_forward is None and level > 0 and kwargs.get("fused_lm_head") is False:
            own = functools.partial(own, fused_lm_head=False)  # nor by a patch below
        return _call(self, patch, own, *args, **kwargs)

    def __reduce_ex__(self: Any, _protocol: Any) -> Any:
        # Pickle finds a class by its name, and there it would find the one that is not patched.
        plain = next(base for base in made.__mro__ if not hasattr(base, _LEVEL))
        return _new_instance, (plain, level + 1), self.__getstate__()

    namespace = {"forward": forward, "__reduce_ex__": __reduce_ex__, _LEVEL: level}
    names = ("__module__", "__qualname__", "__doc__")
    made = type(cls.__name__, (cls,), namespace | {name: getattr(cls, name) for name in names})
    return made


def _new_instance(cls: Any, levels: int) -> Any:
    for _ in range(levels):
        cls = _patched_class(cls)
    return cls.__new__(cls)


def _require_servable(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel of transformers, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only causal LM, got {name}")
    if backbone(model) is model:
        raise ValueError(f"model: expected a model with a backbone under it, got {name}")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: expected an LM head, got {name} without output embeddings")
    read_head(head, name, materialised=False)


def _call(
    model: Any,
    patch: _Patch,
    own: Callable[..., Any],
    *args: Any,
    fused_lm_head: bool | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Any = None,
    max_scored: int | None = None,
    pair_loss: Callable[..., BVPOLoss] | None = None,
    **kwargs: Any,
) -> Any:
    labelled = labels is not None or shift_labels is not None or pair_loss is not None
    if not (patch.always and labelled if fused_lm_head is None else fused_lm_head):
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return own(*args, **kwargs)
    if not labelled:
        raise ValueError("labels: fused_lm_head=True expects labels or shift_labels, got none")
    _refuse_router_loss(model, kwargs)
    kwargs["use_cache"] = False
    hidden = backbone(model)(*args, **kwargs).last_hidden_state
    if pair_loss is not None:
        return _pair_loss(model, hidden, pair_loss, patch.options)
    call = patch.options._replace(max_scored=max_scored)
    return _score(model, hidden, labels, shift_labels, num_items_in_batch, call)


def _refuse_router_loss(model: Any, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("output_router_logits") or _routes(model.config):
        raise ValueError(
            f"output_router_logits: the fused head of {type(model).__name__} computes no loss "
            f"of its router; set it to False"
        )


def _routes(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _pair_loss(
    model: Any, hidden_BTD: Tensor, loss: Callable[..., BVPOLoss], options: _Options
) -> FusedHeadOutput:
    name = type(model).__name__

    def call(hidden_BTD: Tensor) -> BVPOLoss:
        head = read_head(model.get_output_embeddings(), name)
        return loss(**_head_call(head.first_rows(options.transform.vocab), hidden_BTD, options))

    result = call_with_hooks(model.get_output_embeddings(), call, hidden_BTD)
    return FusedHeadOutput(loss=result.loss, pair_loss=result)


def _head_call(head: LinearHead, hidden_BLD: Tensor, options: _Options) -> dict[str, Any]:
    """The head and what it is asked for, by the names of the head functions' arguments."""
    return {
        **head.inputs(hidden_BLD.flatten(0, 1)),
        "temperature": options.transform.temperature * options.temperature,
        "softcap": options.transform.softcap,
        "workspace_bytes": options.workspace_bytes,
        "impl": options.impl,
    }


def _score(
    model: Any,
    hidden_BLD: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items: Any,
    options: _Options,
) -> FusedHeadOutput:
    """The head on every row; rows without a label cost nothing on a CPU, and are 0."""
    if shift_labels is None:
        assert labels is not None
        # The last row predicts nothing: ignored, so that hidden states need not be copied.
        target_BL = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        scored = slice(None, -1)
    else:
        target_BL, scored = shift_labels, slice(None)
    name = type(model).__name__

    def score(hidden_BLD: Tensor) -> dict[str, Tensor]:
        # Read here, under the head's own hooks: only now are sharded weights whole. One argument,
        # as the head's forward has: the hooks of a tensor-parallel head would drop a second.
        head = read_head(model.get_output_embeddings(), name)
        head = head.first_rows(options.transform.vocab)
        return _fields(head, hidden_BLD, target_BL, options)

    values = call_with_hooks(model.get_output_embeddings(), score, hidden_BLD)
    mask_BL = target_BL != IGNORE_INDEX
    count = mask_BL.sum().clamp(min=1) if num_items is None else num_items
    return FusedHeadOutput(
        loss=-values["log_probs"].sum() / count,
        label_mask=mask_BL[:, scored],
        **{field: value[:, scored] for field, value in values.items()},
    )


def _fields(
    head: LinearHead, hidden_BLD: Tensor, target_BL: Tensor, options: _Options
) -> dict[str, Tensor]:
    hidden_TD, target_T = hidden_BLD.flatten(0, 1), target_BL.flatten().to(hidden_BLD.device)
    entropy = "entropy" in options.outputs
    call = _head_call(head, hidden_BLD, options) | {"return_entropy": entropy}
    result = linear_logprobs(target=target_T, max_scored=options.max_scored, **call)
    names = ("log_probs", "entropy")
    fields = dict(zip(names, result if entropy else (result,), strict=False))
    if "mean_logits" in options.outputs:
        mean_T = head.mean_logits(hidden_TD) / call["temperature"]
        fields["mean_logits"] = mean_T.masked_fill(target_T == IGNORE_INDEX, 0)
    return {name: value_T.view(target_BL.shape) for name, value_T in fields.items()}


@torch.no_grad()
def _check(model: Any, options: _Options, always: bool) -> None:
    """The model's logits in fp32, then a few tokens through both heads as they are.

    Raises:
        ValueError: naming the model's class and the difference found.
    """
    parameters = list(model.parameters())
    if any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in parameters):
        return
    device = parameters[0].device
    own = functools.partial(model.forward, fused_lm_head=False)
    check_logits(model, options.transform, device, own)
    ids_1L = torch.tensor([probe_ids(model.config)], device=device)
    with evaluation(model):
        fused = model.forward(input_ids=ids_1L, labels=ids_1L, fused_lm_head=True)
        result = own(input_ids=ids_1L, use_cache=False, **({"labels": ids_1L} if always else {}))
    ours_T, logits_TV = fused.log_probs[0], result.logits[0, :-1]
    logp_TV = (logits_TV.to(ours_T.dtype) / options.temperature).log_softmax(-1)
    wrong = (ours_T - logp_TV.gather(1, ids_1L[0, 1:, None])[:, 0]).abs().max()
    tolerance = rounding(logits_TV, model.get_output_embeddings().weight.dtype)
    name = type(model).__name__
    if not bool(wrong <= tolerance):
        raise ValueError(
            f"model: {name} scores tokens differently from its own logits (by {wrong.item():.3g} "
            f"nats, expected <= {tolerance:.2g}): its head is not linear in a known way"
        )
    # A model without a loss of its own is given ours.
    if always and options.temperature == 1 and result.loss is not None:
        _compare_losses(name, fused.loss.item(), result.loss.item(), tolerance)


def _compare_losses(name: str, fused: float, own: float, tolerance: float) -> None:
    if not abs(fused - own) <= tolerance:
        raise ValueError(
            f"always: expected a model whose loss is the mean over the next tokens, that of {name} "
            f"is {own:.4g}, not {fused:.4g}; pass fused_lm_head=True to calls instead"
        )
