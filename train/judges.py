"""What scores an answer: a task's verifier or a reward model. Higher is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from train.config import RankConfig
from train.models import readable_errors
from train.prompts import FREE_TEXT, Message

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_QUANTITY = re.compile(rf"(?:{_NUMBER.pattern})\s+([A-Za-z]+)")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_ANSWER_LABEL = re.compile(r"answer(?: is)?\s*[:=]\s*", re.IGNORECASE)
_WRAPPING = ' \t\n*`"$'


class Judge(Protocol):
    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        """The score of an answer (the text after the trace) to the prompt of a record."""


def extract_final_answer(text: str, gold: str | None) -> str:
    """The part of an answer that a verifier compares with the gold answer.

    The first rule that applies: the last <answer>...</answer>; the last \\boxed{...}; the line
    after the last "Answer:", in any case, "answer is:" included; the text itself. In that, for a
    gold answer that is a number, the last number, without thousands separators; for a number and a
    unit, the last number with that unit; otherwise all of it, less markdown, quotes and a final
    period.
    """
    tags, boxes = _ANSWER_TAG.findall(text), _BOXED.findall(text)
    labels = list(_ANSWER_LABEL.finditer(text))
    if tags:
        text = tags[-1]
    elif boxes:
        text = boxes[-1]
    elif labels and text[labels[-1].end() :].strip(_WRAPPING):
        text = text[labels[-1].end() :].strip(_WRAPPING).splitlines()[0]
    if gold is not None and _NUMBER.fullmatch(gold.strip()):
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else text.strip()
    if gold is not None and (quantity := _QUANTITY.fullmatch(gold.strip())):
        unit = quantity[1]
        # A unit in the singular is the same one.
        found = re.findall(rf"({_NUMBER.pattern})\s*{re.escape(unit.rstrip('s'))}s?\b", text)
        if found:
            return f"{found[-1]} {unit}"
    text = text.strip(_WRAPPING)
    keep_period = gold is not None and gold.endswith(".")
    return text if keep_period else text.removesuffix(".").strip(_WRAPPING)


def _matches(answer: str, entry: Mapping[str, Any]) -> float:
    """1 for the gold answer: as a number if it is one, else up to case and white space."""
    gold = entry["answer"].strip()
    if _NUMBER.fullmatch(gold):
        try:
            return float(float(answer) == float(gold.replace(",", "")))
        except ValueError:
            return 0.0
    return float(answer.casefold().split() == gold.casefold().split())


class Verifier:
    """The score of reasoning-gym's verifier of the record's task; for free text, 1 or 0."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[[str, Any], float]] = {FREE_TEXT: _matches}

    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        task = record["task"]
        name, entry = task["name"], task["entry"]
        if entry.get("answer") is None and name == FREE_TEXT:
            raise ValueError(
                f"rank.judge: expected a gold answer for prompt {record['prompt_id']!r}, got none; "
                "use rank.judge=reward_model"
            )
        if name not in self._functions:
            import reasoning_gym

            self._functions[name] = reasoning_gym.get_score_answer_fn(name)
        return float(self._functions[name](extract_final_answer(answer, entry["answer"]), entry))


class RewardModel:
    """The one logit of a sequence classifier on the conversation with the answer as its reply.

    The trace is not shown to it. A model with a field `score` in its output is taken at that.
    """

    def __init__(self, name: str, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with readable_errors("rank.reward_model", name):
            self.tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
            model = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"rank.reward_model: expected a tokenizer with a chat template, got {name!r}"
            )
        self.name = name
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        messages: list[Message] = [
            *record["messages"], {"role": "assistant", "content": answer}
        ]  # fmt: skip
        # One at a time: no padding, hence no pad token needed and no effect of the neighbours.
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        output = self.model(input_ids=ids.to(self.model.device))
        score = getattr(output, "score", None)
        score = output.logits if score is None else score
        if score.numel() != 1:
            raise ValueError(
                f"rank.reward_model: expected one score per text, got {score.numel()} from "
                f"{self.name!r}"
            )
        return float(score)


def build_judge(cfg: RankConfig) -> Judge:
    if cfg.judge == "verifier":
        return Verifier()
    if cfg.reward_model is None:
        raise ValueError("rank.reward_model: expected a path or hub id for this judge, got None")
    return RewardModel(cfg.reward_model, cfg.trust_remote_code)
