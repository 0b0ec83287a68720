"""Preference rows of TRL, with their empty-trace twins, as one packed batch per micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bvpo_kernels.packing import pack
from bvpo_kernels.types import EMPTY, KINDS, TRACE, PackedBatch, TokenPair, Unit

FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
PREFIX: Mapping[str, str] = {TRACE: "", EMPTY: "empty_"}
COLUMNS = (*(PREFIX[kind] + name for kind in KINDS for name in FIELDS), *REFERENCE)
_TEXTS = ("prompt", "chosen", "rejected")
_OPTIONS = ("tools", "chat_template_kwargs")


@dataclass
class BVPOCollator:
    """Rows of token ids -> {"trace": ..., "empty": ..., "packed": PackedBatch}.

    The first two are what TRL's own collator makes, with its truncation, and a "packed_index": the
    rows of the packed batch in the order in which `completion_mask` has its ones. Only the packed
    batch goes through the model; the padded ids and masks are what TRL's losses are written for.
    """

    max_length: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # Padding ids never reach a model, so any id will do.
        collate = DataCollatorForPreference(pad_token_id=0, max_length=self.max_length)
        padded: dict[str, Any] = {}
        for column, kind in enumerate(KINDS):
            rows = [self._row(example, kind, column) for example in examples]
            padded[kind] = collate.torch_call(rows)
        units = [
            Unit(str(number), {kind: [self._pair(example, kind)] for kind in KINDS})
            for number, example in enumerate(examples)
        ]
        batch = pack(units)
        for column, kind in enumerate(KINDS):
            padded[kind]["packed_index"] = _packed_index(batch, column)
        return {**padded, "packed": batch}

    @staticmethod
    def _row(example: Mapping[str, Any], kind: str, column: int) -> dict[str, Any]:
        row = {name: list(example[PREFIX[kind] + name]) for name in FIELDS}
        return row | {name: example[name][column] for name in REFERENCE if name in example}

    def _pair(self, example: Mapping[str, Any], kind: str) -> TokenPair:
        prompt, chosen, rejected = (example[PREFIX[kind] + name] for name in FIELDS)
        room = None if self.max_length is None else self.max_length - len(prompt)
        return TokenPair(prompt, chosen[:room], rejected[:room])


def _packed_index(batch: PackedBatch, column: int) -> Tensor:
    """Scored rows of a kind: the chosen responses of all units, then the rejected ones."""
    units, segments = len(batch.unit_ids), 2 * len(KINDS)
    ends = batch.cu_seqlens[1:].view(units, segments).long()
    lengths = batch.scored_lengths_S.view(units, segments)
    parts = [
        torch.arange(end - 1 - length, end - 1)
        for side in (0, 1)
        for end, length in zip(
            ends[:, 2 * column + side].tolist(), lengths[:, 2 * column + side].tolist(), strict=True
        )
    ]
    return torch.cat(parts)


def to_padded(values_T: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Values of packed rows in TRL's layout, [2 P, L - 1], 0 elsewhere; differentiable."""
    mask = inputs["completion_mask"][:, 1:].bool()
    picked = values_T[inputs["packed_index"]]
    return picked.new_zeros(mask.shape).masked_scatter(mask, picked)


def join(dataset: Dataset, empty: Dataset | None) -> Dataset:
    """The rows of a second dataset, prompt/chosen/rejected, as empty_* columns of the first.

    Raises:
        ValueError: for another number of rows, or columns that both have.
    """
    if empty is None:
        return dataset
    if len(empty) != len(dataset):
        raise ValueError(f"empty_dataset: expected {len(dataset)} rows, got {len(empty)}")
    renamed = empty.select_columns([name for name in _TEXTS if name in empty.column_names])
    renamed = renamed.rename_columns({name: f"empty_{name}" for name in renamed.column_names})
    return concatenate_datasets([dataset, renamed], axis=1)


def tokenize(
    dataset: Dataset, tokenizer: Any, empty_trace: str, tokenize_texts: Callable[[Dataset], Dataset]
) -> Dataset:
    """The *_ids columns of both kinds, from texts, messages or token ids.

    Args:
        dataset: prompt, chosen, rejected, empty_chosen, empty_rejected, and empty_prompt unless it
            is the prompt with `empty_trace` after it. Token ids are taken as they are.
        tokenizer: for the empty trace, and for messages.
        empty_trace: what an empty prompt ends with.
        tokenize_texts: TRL's own preparation of prompt, chosen, rejected.

    Raises:
        ValueError: for a missing column, naming it.
    """
    needed = (*_TEXTS, "empty_chosen", "empty_rejected")
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(f"dataset: expected the columns {list(needed)}, got none of {missing}")
    first = dataset[0]
    options = [name for name in _OPTIONS if name in dataset.column_names]
    traces = dataset.select_columns([*_TEXTS, *options])
    if "empty_prompt" not in dataset.column_names:
        add = _add_ids if _are_ids(first["prompt"]) else _add_text
        if is_conversational({"prompt": first["prompt"]}):
            add = _add_rendered
        fn_kwargs = {"tokenizer": tokenizer, "empty_trace": empty_trace}
        dataset = dataset.map(add, fn_kwargs=fn_kwargs, desc="Adding the empty trace")
    names = {f"empty_{name}": name for name in _TEXTS}
    empties = dataset.select_columns([*names, *options]).rename_columns(names)
    kinds = []
    for kind, rows in ((TRACE, traces), (EMPTY, empties)):
        if _are_ids(rows[0]["prompt"]):
            rows = rows.rename_columns({name: f"{name}_ids" for name in _TEXTS})
        else:
            rows = tokenize_texts(rows)
        rows = rows.select_columns(FIELDS)
        kinds.append(rows.rename_columns({name: PREFIX[kind] + name for name in FIELDS}))
    return concatenate_datasets(kinds, axis=1)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], int)


def _add_text(row: dict[str, Any], tokenizer: Any, empty_trace: str) -> dict[str, Any]:
    return {"empty_prompt": _end_with(row["prompt"], empty_trace)}


def _add_ids(row: dict[str, Any], tokenizer: Any, empty_trace: str) -> dict[str, Any]:
    return {"empty_prompt": row["prompt"] + _ids(tokenizer, empty_trace)}


def _add_rendered(row: dict[str, Any], tokenizer: Any, empty_trace: str) -> dict[str, Any]:
    """Messages as ids: a template would put its own text between prompt, literal and answer."""
    options = row.get("chat_template_kwargs") or {}
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True, **options
    )
    answers = {
        name: _ids(tokenizer, _content(row[name]) + tokenizer.eos_token)
        for name in ("empty_chosen", "empty_rejected")
    }
    return {"empty_prompt": _ids(tokenizer, _end_with(prompt, empty_trace)), **answers}


def _end_with(prompt: str, empty_trace: str) -> str:
    """The prompt and the literal, which replaces an open marker that a template has forced."""
    marker = empty_trace.split()[0] if empty_trace.split() else ""
    if marker and prompt.rstrip().endswith(marker):
        prompt = prompt.rstrip().removesuffix(marker)
    return prompt + empty_trace


def _content(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
