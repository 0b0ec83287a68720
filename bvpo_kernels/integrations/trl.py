"""`BVPOTrainer`: TRL's DPOTrainer on trace and empty-trace pairs, packed, with a* measured.

    from bvpo_kernels.integrations.trl import BVPOConfig, BVPOTrainer
    trainer = BVPOTrainer(model, ref_model, BVPOConfig("out", estimate_alpha=True),
                          train_dataset=rows, processing_class=tokenizer)
    trainer.train()

Serves trl 1.15 and 1.16. Losses, metrics, reference handling and the training loop are TRL's own:
it is handed per-token log-probabilities in the layout that it expects, which come from one packed
row for both kinds and a head that forms no logits.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, DPOTrainer

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.integrations import trl_checks, trl_data
from bvpo_kernels.integrations.dropout import disable_dropout
from bvpo_kernels.integrations.logit_transform import logit_transform
from bvpo_kernels.integrations.render import RowEncoder
from bvpo_kernels.integrations.transformers import patch_model
from bvpo_kernels.integrations.trl_head import PackedPass, in_place_of_trls
from bvpo_kernels.mixing import AlphaEstimator
from bvpo_kernels.mixing.moments import MIN_UNITS
from bvpo_kernels.types import EMPTY, KINDS, TRACE, PackedBatch

ALPHA_FILE = "alpha.json"
_STATS = "stats"  # beside the estimator's own keys
# TRL's metrics that need more of the logits than the fused head forms.
_NOT_SERVED = ("mean_token_accuracy",)


@dataclass
class BVPOConfig(DPOConfig):
    """DPOConfig, and where the weight a of L_c = a L_trace + (1 - a) L_empty comes from.

    alpha: the weight, in [0, 1]; with `estimate_alpha` the one of the warm-up, in (0, 1).
    estimate_alpha: measure a* during the backward (`GradStats`) and use it from the next step on
        (`AlphaEstimator`, reference "trace").
    alpha_warmup, alpha_halflife, alpha_low, alpha_high: steps of statistics before the first
        estimate is used, halflife of its averages in steps, bounds of the weight.
    stats_mode, stats_cross, sketch_size, stats_strict: of `GradStats`.
    empty_trace: what an empty prompt ends with, where the data has no `empty_prompt`.
    max_length: None, or the tokens of the longest sequence to train on: rows with a longer one are
        dropped and counted. Nothing is cut.
    head_impl, head_workspace_mib: of `linear_logprobs`.
    """

    alpha: float = field(default=0.5, metadata={"help": "Weight of the trace loss, in [0, 1]."})
    estimate_alpha: bool = field(default=False, metadata={"help": "Measure a* and train with it."})
    alpha_warmup: int = field(default=8, metadata={"help": "Steps with `alpha` before a*."})
    alpha_halflife: float = field(default=16.0, metadata={"help": "Of a*'s averages, in steps."})
    alpha_low: float = field(default=0.02, metadata={"help": "Least weight of the trace loss."})
    alpha_high: float = field(default=0.98, metadata={"help": "Largest weight."})
    stats_mode: str = field(default="exact", metadata={"help": "exact, sketch or norm."})
    stats_cross: str = field(default="sketch", metadata={"help": "sketch, exact or none."})
    sketch_size: int = field(default=32, metadata={"help": "Rows of a sketch."})
    stats_strict: bool = field(
        default=True, metadata={"help": "Refuse trained parameters that cannot be measured."}
    )
    empty_trace: str = field(
        default="<think>\n\n</think>\n\n", metadata={"help": "The literal of an empty trace."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Rows with more tokens are dropped; None: no limit."}
    )
    head_impl: str = field(default="auto", metadata={"help": "Backend of the LM head."})
    head_workspace_mib: int | None = field(
        default=None, metadata={"help": "Bound on the LM head's temporary memory."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {self.alpha}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: expected None or a number > 1, got {self.max_length}")
        refused = {
            "use_weighting": (self.use_weighting, "it needs sum_v p_v^2 of every token"),
            "truncation_mode": (self.truncation_mode != "keep_start", "expected keep_start"),
            "disable_dropout": (
                not self.disable_dropout,
                "policy and reference differ in their weights only",
            ),
        }
        if self.estimate_alpha:
            sorts = {"aot", "aot_unpaired"} & set(self.loss_type)
            options: Any = self.gradient_checkpointing_kwargs or {}
            reentrant = options.get("use_reentrant", False)
            refused |= {
                "fp16": (self.fp16, "loss scaling changes every step; use bf16"),
                "loss_type": (bool(sorts), "aot sorts pairs, so that units are not independent"),
                "gradient_checkpointing_kwargs": (reentrant, "use_reentrant must be False"),
            }
        for name, (value, reason) in refused.items():
            if value:
                raise ValueError(f"{name}: {getattr(self, name)!r} cannot be served: {reason}")
        if self.estimate_alpha:
            trl_checks.check_estimate(self)


class BVPOTrainer(DPOTrainer):
    """DPOTrainer whose rows also have an empty-trace pair.

    Columns: prompt, chosen, rejected, empty_chosen, empty_rejected and optionally empty_prompt, as
    texts, messages (answers: texts or messages) or token ids; ids are taken as they are and end
    with the end-of-sequence id. Messages may have tools and chat_template_kwargs beside them, which
    reach both kinds, and empty_tools, empty_chat_template_kwargs. Or two datasets whose rows
    correspond: `empty_dataset` has prompt, chosen, rejected of the empty kind, its prompts ending
    in the empty trace, which messages get here. What is scored is what was given: see `RowEncoder`.

    Metrics: TRL's names are those of the traces; "empty/..." are the same of the empties;
    "trace/loss", "empty/loss", "alpha", and with an estimate `AlphaEstimator.log`. Checkpoints hold
    the estimator and the step of the sketches in alpha.json. The last step of an epoch is not
    measured where it has fewer than two units, or rows that are repeated to serve all ranks.

    Args:
        model, ref_model, args, train_dataset, eval_dataset, kwargs: of DPOTrainer.
        empty_dataset: see above.
        eval_empty_dataset: the same for eval_dataset; a mapping where that is one.

    Raises:
        TypeError, ValueError: naming what cannot be served: streaming or vision data,
            `compute_metrics`, experts with a router loss, prompt-learning adapters, a model whose
            attention does not keep packed segments apart, and what `patch_model` refuses; naming
            row and column, for data that cannot be served.
    """

    _tag_names = ["trl", "bvpo"]  # noqa: RUF012  (TRL's attribute)
    _name = "BVPO"
    args: Any
    model: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BVPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        *,
        empty_dataset: Dataset | None = None,
        eval_empty_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **kwargs: Any,
    ) -> None:
        args = BVPOConfig("bvpo") if args is None else args
        if not isinstance(args, BVPOConfig):
            raise TypeError(f"args: expected a BVPOConfig, got {type(args).__name__}")
        for name in ("compute_metrics", "data_collator"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None, BVPOTrainer makes no logits to give it")
        self._empty_datasets = trl_data.by_name(
            train_dataset, eval_dataset, empty_dataset, eval_empty_dataset
        )
        self._patched: list[Any] = []
        self._reference_given = ref_model is not None
        self._alpha: AlphaEstimator | None = None
        self._stats: GradStats | None = None
        self._micro_batch = 0
        with in_place_of_trls(self._patch):
            super().__init__(
                model, ref_model, args, trl_data.BVPOCollator(), train_dataset, eval_dataset,
                **kwargs,
            )  # fmt: skip

    @property
    def alpha(self) -> float:
        """The weight of the trace loss in the coming step."""
        return self.args.alpha if self._alpha is None else self._alpha.value()

    def _patch(self, model: Any, *_: Any, **__: Any) -> None:
        """Stands for `add_fused_lm_head(model, ...)`: TRL calls it for the policy, then for the
        reference if there is one."""
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("router_aux_loss_coef: expected 0.0, the fused head routes no experts")
        adapters = getattr(self.model, "peft_config", {}).values()
        if any(getattr(config, "is_prompt_learning", False) for config in adapters):
            raise ValueError("peft_config: expected LoRA or the like, got prompt learning")
        policy = self._patched[0] if self._patched else None
        if policy is None:
            self._check_fits()
        else:
            trl_checks.align_reference(policy, model, self._reference_given)
        disable_dropout(model)
        check = policy is None or not trl_checks.computes_alike(model, policy)
        softcap = logit_transform(model.config).softcap
        workspace = self.args.head_workspace_mib
        with trl_checks.probing(model):
            patch_model(
                model,
                outputs=("log_probs", "entropy", *(() if softcap else ("mean_logits",))),
                impl=self.args.head_impl,
                check=check,
                workspace_bytes=None if workspace is None else workspace * 2**20,
            )
            if check:
                trl_checks.require_trainable(model)
            if policy is None and self.args.estimate_alpha:
                self._start_estimate()
        self._patched.append(model)

    def _start_estimate(self) -> None:
        """The estimator and what it measures; before anything is scored, which may take hours."""
        args, rows = self.args, self.train_dataset
        trl_checks.check_units(args, args.per_device_train_batch_size, len(rows))  # type: ignore
        self._alpha = AlphaEstimator(
            ema_halflife=args.alpha_halflife,
            clip=(args.alpha_low, args.alpha_high),
            warmup=args.alpha_warmup,
            initial=args.alpha,
        )
        mode: Any = args.stats_mode
        cross: Any = args.stats_cross
        self._stats = GradStats(
            self.model, mode, cross=cross, strict=args.stats_strict, seed=args.seed,
            sketch_size=args.sketch_size, head=self.model.get_output_embeddings(),
        )  # fmt: skip
        coverage = self._stats.coverage
        if coverage.uncovered and mode != "norm":
            warnings.warn(
                f"stats_strict: a* is measured over {coverage.covered} of {coverage.trained} "
                f"trained parameters ({100 * coverage.share:.3g} %), without "
                f"{list(coverage.uncovered)}",
                stacklevel=2,
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        dataset = trl_data.join(dataset, self._empty_datasets.pop(dataset_name, None))
        encode = RowEncoder(processing_class, args.empty_trace, dataset_name)
        return trl_data.prepare(dataset, encode, args.max_length, args.dataset_num_proc)

    def _check_fits(self) -> None:
        evals = (
            self.eval_dataset
            if isinstance(self.eval_dataset, dict)
            else {"eval": self.eval_dataset}
        )
        for name, dataset in {"train": self.train_dataset, **evals}.items():
            if dataset is not None:
                trl_data.check_fits(dataset, name, self.model)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(trl_data.COLUMNS)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Scores under the reference, chosen and rejected, [P, 2]: a column per kind."""
        run = PackedPass(model, inputs, self.accelerator.autocast)
        chosen, rejected = [], []
        for kind in KINDS:
            scores = super().compute_ref_log_probs(functools.partial(run, kind), inputs[kind])
            chosen.append(scores[0])
            rejected.append(scores[1])
        return torch.stack(chosen, 1), torch.stack(rejected, 1)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL keeps scores by rows and weights; they also depend on how they were computed."""
        trl_data.check_fits(dataset, name, self.model)
        known, args = getattr(self, "_precompute_model_hash", None), self.args
        how = (
            self.accelerator.mixed_precision,
            self.model.config._attn_implementation,
            args.head_impl,
            args.max_length,
            args.ld_alpha,
        )
        self._precompute_model_hash = Hasher.hash((known, how))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = known

    def _with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with the reference scores of both kinds, computed unless they are there."""
        if trl_data.REFERENCE[0] in inputs[TRACE]:
            return inputs
        model = self.model if self.ref_model is None else self.ref_model
        scores = self.compute_ref_log_probs(model, inputs)
        return inputs | {
            kind: inputs[kind]
            | {name: s[:, n] for name, s in zip(trl_data.REFERENCE, scores, strict=True)}
            for n, kind in enumerate(KINDS)
        }

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Tensor:
        if return_outputs:
            raise ValueError("return_outputs: expected False, the fused head makes no logits")
        inputs = self._with_reference(inputs)
        run, alpha = PackedPass(model, inputs, self.accelerator.autocast), self.alpha
        losses = {
            kind: self._kind_loss(kind, functools.partial(run, kind), inputs[kind])
            for kind in KINDS
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["alpha"].append(alpha)
        # A weight of 0 selects the other loss: an infinite one times 0 would be NaN.
        if alpha in (0.0, 1.0):
            return losses[TRACE if alpha == 1.0 else EMPTY]
        return alpha * losses[TRACE] + (1 - alpha) * losses[EMPTY]

    def _kind_loss(self, kind: str, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of one kind; its metrics, renamed, go among the others."""
        mode = "train" if self.model.training else "eval"
        kept, precomputed = self._metrics, self.precompute_ref_logps
        self._metrics, self.precompute_ref_logps = {mode: defaultdict(list)}, True
        try:
            loss = super()._compute_loss(model, inputs, False)
        finally:
            found, self._metrics = self._metrics[mode], kept
            self.precompute_ref_logps = precomputed
        metrics = kept[mode]
        for name, values in found.items():
            if name == "num_tokens":  # a running total over both kinds
                metrics[name] = values
            elif name not in _NOT_SERVED:
                metrics[name if kind == TRACE else f"{kind}/{name}"].extend(values)
        metrics[f"{kind}/loss"].append(self.accelerator.gather(loss.detach()).mean().item())
        return loss

    def get_train_dataloader(self) -> Any:
        """TRL's; `auto_find_batch_size` comes here again with a smaller batch."""
        if self._stats is not None:
            size = getattr(self, "_train_batch_size", self.args.per_device_train_batch_size)
            trl_checks.check_units(self.args, size, len(self.train_dataset))  # type: ignore
        return super().get_train_dataloader()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; measured if alpha is estimated."""
        if self._stats is None:
            return super().training_step(model, inputs, *args, **kwargs)
        # The reference's pass is none of the measured ones, also where it is the same model's.
        inputs = self._with_reference(self._prepare_inputs(inputs))
        batch: PackedBatch = inputs["packed"]
        names = [
            f"{self.accelerator.process_index}.{self._micro_batch}.{name}"
            for name in batch.unit_ids
        ]
        inputs["packed"] = replace(batch, unit_ids=tuple(names))
        pairs = len(names) * self.current_gradient_accumulation_steps
        weights = {TRACE: self.alpha, EMPTY: 1 - self.alpha}
        scale = {kind: weight / pairs for kind, weight in weights.items()}
        try:
            with self._stats.collect(inputs["packed"], scale):
                loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:  # the step is given up, but another may be tried
            self._stats.reset()
            self._micro_batch = 0
            raise
        self._micro_batch += 1
        if self.accelerator.sync_gradients:
            self._update_alpha()
        return loss

    def _update_alpha(self) -> None:
        assert self._alpha is not None
        assert self._stats is not None
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        found, self._micro_batch = self._stats.result(group), 0
        if found.num_units >= MIN_UNITS and not self._repeats_rows():
            self._alpha.update(found)
        for name, value in self._alpha.log().items():
            self._metrics["train"][name].append(value)

    def _repeats_rows(self) -> bool:
        """Whether accelerate filled up the last batches of an epoch with rows of its start, so that
        all ranks have as many: such rows are no units of their own."""
        state = self.accelerator.gradient_state
        several = self.accelerator.num_processes > 1
        return several and state.end_of_dataloader and state.remainder > 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._alpha is not None and self._stats is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            path = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / ALPHA_FILE
            state = self._alpha.state_dict() | {_STATS: self._stats.state_dict()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(state), encoding="utf-8")
            os.replace(part, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._alpha is None or self._stats is None:
            return
        path = Path(checkpoint) / ALPHA_FILE
        if not path.exists():
            raise ValueError(f"resume_from_checkpoint: expected {ALPHA_FILE} in {checkpoint}")
        state = json.loads(path.read_text(encoding="utf-8"))
        stats = state.pop(_STATS, None)
        self._alpha.load_state_dict(state)
        if stats is not None:
            self._stats.load_state_dict(stats)
        elif self._stats.sketch_size:
            warnings.warn(
                f"resume_from_checkpoint: {path} is of a version that left out the step of the "
                f"sketches; a* goes on with others than an uninterrupted run has",
                stacklevel=2,
            )
