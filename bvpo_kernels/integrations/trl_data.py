"""Preference rows of TRL, with their empty-trace twins, as one packed batch per micro-batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bvpo_kernels.integrations.cells import bad_cell, token_ids
from bvpo_kernels.integrations.render import FIELDS, PREFIX, RESPONSES, RowEncoder
from bvpo_kernels.packing import pack
from bvpo_kernels.types import KINDS, PackedBatch, TokenPair, Unit

logger = get_logger(__name__)

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
ID_COLUMNS = tuple(PREFIX[kind] + name for kind in KINDS for name in FIELDS)
COLUMNS = (*ID_COLUMNS, *REFERENCE)
_TEXTS = ("prompt", "chosen", "rejected")
_OPTIONS = ("tools", "chat_template_kwargs")


class BVPOCollator:
    """Rows of token ids -> {"trace": ..., "empty": ..., "packed": PackedBatch}.

    The first two are what TRL's own collator makes, and a "packed_index": the rows of the packed
    batch in the order in which `completion_mask` has its ones. Only the packed batch goes through
    the model; the padded ids and masks are what TRL's losses are written for. Nothing is cut.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # Padding ids never reach a model, so any id will do.
        collate = DataCollatorForPreference(pad_token_id=0)
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

    @staticmethod
    def _pair(example: Mapping[str, Any], kind: str) -> TokenPair:
        return TokenPair(*(example[PREFIX[kind] + name] for name in FIELDS))


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


def by_name(train: Any, evals: Any, empty: Any, eval_empty: Any) -> dict[str, Any]:
    """The empty datasets by the names of the datasets that they go with, "train" and "eval", or
    those of a mapping of evaluation datasets.

    Raises:
        ValueError: for no training rows, or an empty dataset that goes with no dataset.
    """
    if train is None or (isinstance(train, Dataset) and not len(train)):
        got = "None" if train is None else "no rows"
        raise ValueError(f"train_dataset: expected at least one row, got {got}")
    names = set() if evals is None else {"eval"}
    names = set(evals) if isinstance(evals, Mapping) else names
    if eval_empty is None:
        eval_empty = {}
    elif not isinstance(eval_empty, Mapping):
        eval_empty = {"eval": eval_empty}
    if not set(eval_empty) <= names or "train" in eval_empty:
        raise ValueError(
            f"eval_empty_dataset: expected datasets for {sorted(names)} of eval_dataset, got"
            f" {sorted(eval_empty)}"
        )
    return {**eval_empty, "train": empty}


def join(dataset: Dataset, empty: Dataset | None) -> Dataset:
    """The prompt, chosen, rejected, tools and chat_template_kwargs of a second dataset as empty_*
    columns of the first.

    Raises:
        ValueError: for another number of rows, or columns that both have.
    """
    if empty is None:
        return dataset
    if len(empty) != len(dataset):
        raise ValueError(f"empty_dataset: expected {len(dataset)} rows, got {len(empty)}")
    names = [name for name in (*_TEXTS, *_OPTIONS) if name in empty.column_names]
    renamed = empty.select_columns(names).rename_columns({name: f"empty_{name}" for name in names})
    both = sorted(set(renamed.column_names) & set(dataset.column_names))
    if both:
        raise ValueError(f"empty_dataset: expected none where the dataset has {both}")
    return concatenate_datasets([dataset, renamed], axis=1)


def prepare(
    dataset: Dataset, encode: RowEncoder, max_length: int | None, num_proc: int | None = None
) -> Dataset:
    """The *_ids columns of both kinds; a dataset that has them already is checked.

    Args:
        dataset: see `tokenize`.
        encode, num_proc: see `tokenize`.
        max_length: see `drop_long`.

    Raises:
        ValueError: naming column and row where there are any, see the functions below.
    """
    name = encode.name
    if not len(dataset):
        raise ValueError(f"{name}: expected at least one row, got none")
    if set(ID_COLUMNS) <= set(dataset.column_names):
        check_ids(dataset, name)
    else:
        dataset = tokenize(dataset, encode, num_proc)
    dataset = drop_long(dataset, name, max_length)
    warn_of_equal(dataset, name)
    return dataset


def tokenize(dataset: Dataset, encode: RowEncoder, num_proc: int | None = None) -> Dataset:
    """The *_ids columns of both kinds, from texts, messages or token ids.

    Args:
        dataset: prompt, chosen, rejected, empty_chosen, empty_rejected, and optionally
            empty_prompt, tools, chat_template_kwargs and the same as empty_*.
        encode: (row, number of the row) -> ids.
        num_proc: processes.

    Raises:
        ValueError: for a missing column, naming it; for a row, as `encode`.
    """
    needed = (*_TEXTS, "empty_chosen", "empty_rejected")
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(f"dataset: expected the columns {list(needed)}, got none of {missing}")
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        return dataset.with_format(None).map(
            encode,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc="Tokenizing both kinds",
        )


def check_ids(dataset: Dataset, name: str) -> None:
    """
    Raises:
        ValueError: naming row and column, for a cell that is not a list of token ids.
    """
    for start, table in _tables(dataset):
        for column in ID_COLUMNS:
            cells = table[column]
            if not pa.types.is_integer(getattr(cells.type, "value_type", pa.null())):
                raise ValueError(f"{name}, {column}: expected lists of token ids, got {cells.type}")
            ids, sizes = pc.list_flatten(cells), pc.list_value_length(cells)
            if (
                sizes.null_count
                or ids.null_count
                or pc.min(sizes).as_py() < 1
                or pc.min(ids).as_py() < 0
            ):
                for number, cell in enumerate(cells.to_pylist(), start=start):
                    token_ids(f"{name}, row {number}", column, cell)


def drop_long(dataset: Dataset, name: str, max_length: int | None) -> Dataset:
    """The rows of which no sequence is longer than `max_length` tokens; both kinds go together.

    Whole rows are dropped, and counted in a warning: a response that loses its end has no answer.

    Raises:
        ValueError: if no row is left.
    """
    if max_length is None:
        return dataset
    lengths = row_lengths(dataset)
    kept = np.flatnonzero(lengths <= max_length)
    if len(kept) == len(dataset):
        return dataset
    dropped = np.flatnonzero(lengths > max_length)
    said = (
        f"{name}: dropped {len(dropped)} of {len(dataset)} rows longer than max_length {max_length}"
        f" (the first is row {dropped[0]}, the longest has {lengths.max()} tokens)"
    )
    if not len(kept):
        raise ValueError(f"{said}; no rows are left, the shortest has {lengths.min()}")
    logger.warning(said)
    return dataset.select(kept)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of the longest of a row's four sequences, [rows]."""
    found = [np.zeros(0, dtype=np.int64)]
    for _, table in _tables(dataset):
        size = {name: pc.list_value_length(table[name]).to_numpy() for name in ID_COLUMNS}
        sequences = [
            size[f"{prefix}prompt_ids"] + size[f"{prefix}{side}_ids"]
            for prefix in PREFIX.values()
            for side in RESPONSES
        ]
        found.append(np.maximum.reduce(sequences))
    return np.concatenate(found)


def check_fits(dataset: Dataset, name: str, model: Any) -> None:
    """Ids and lengths are those of the model.

    Raises:
        ValueError: for an id outside the model's vocabulary, naming row and column; for a row
            longer than a table of learned positions. One that is longer than other models were
            made for is warned of.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    for start, table in _tables(dataset):
        for column in ID_COLUMNS:
            if pc.max(pc.list_flatten(table[column])).as_py() < vocabulary:
                continue
            largest = [max(ids) for ids in table[column].to_pylist()]
            number = next(n for n, token in enumerate(largest) if token >= vocabulary)
            expected = f"token ids below the model's vocabulary of {vocabulary}"
            where = f"{name}, row {start + number}"
            raise bad_cell(where, column, expected, str(largest[number]))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(row_lengths(dataset).max(initial=0))
    if not isinstance(limit, int) or longest <= limit:
        return
    said = f"{name}: the longest row has {longest} tokens, {type(model).__name__} has {limit}"
    said += " positions; with max_length longer rows are dropped"
    learned = (
        module.num_embeddings < longest
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and re.search(r"wpe$|position", key)
    )
    if any(learned):
        raise ValueError(said)
    logger.warning(said)


def warn_of_equal(dataset: Dataset, name: str) -> None:
    """Count the rows in which chosen and rejected are the same: such a pair teaches nothing."""
    equal: set[int] = set()
    for start, table in _tables(dataset):
        for prefix in PREFIX.values():
            pair = [table[f"{prefix}{side}_ids"] for side in RESPONSES]
            chosen, rejected = (pc.list_value_length(ids).to_numpy() for ids in pair)
            (alike,) = np.nonzero(chosen == rejected)
            texts = zip(*(ids.take(alike).to_pylist() for ids in pair), strict=True)
            equal |= {start + int(n) for n, (a, b) in zip(alike, texts, strict=True) if a == b}
    if equal:
        logger.warning(
            f"{name}: in {len(equal)} of {len(dataset)} rows chosen and rejected are the same"
            f" tokens (the first is row {min(equal)}); such a pair has no gradient"
        )


def _tables(dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of the columns of ids."""
    start = 0
    rows = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow")
    for table in rows.iter(batch_size=1000):
        yield start, table
        start += len(table)
