"""What scores an answer: a task's verifier, math-verify or a reward model. Higher is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from train.config import RankConfig
from train.model.models import readable_errors
from train.preferences.answers import MathVerify, find_answer, normalize, plain
from train.preferences.prompts import FREE_TEXT, Message, Prompt

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_QUANTITY = re.compile(rf"(?:{_NUMBER.pattern})\s+([A-Za-z]+)")
_WRAPPING = ' \t\n*`"$'


class Judge(Protocol):
    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        """The score of an answer (the text after the trace) to the prompt of a record."""


def extract_final_answer(text: str, gold: str | None) -> str:
    """The part of an answer that a task's verifier compares with the gold answer.

    It stands where `find_answer` says: in the last <answer> tag or box, on the line after the last
    "Answer:" or "answer is", or it is the text itself. In that, for a gold answer that is a number,
    the first number after such a label (and after an equals sign), elsewhere the last, without
    separators; for a number and a unit, the last number with that unit; otherwise all of it, less
    markdown, quotes and a final period.
    """
    found = find_answer(text)
    # Markdown around a label is gone; a text that is the answer is left as it is.
    text = text if found.place == "text" else found.text
    if found.place == "label" and "\n" not in (gold or "").strip():
        text = text.splitlines()[0]
    if gold is not None and _NUMBER.fullmatch(gold.strip()):
        return _last_number(text, found.place == "label")
    if gold is not None and (quantity := _QUANTITY.fullmatch(gold.strip())):
        unit = quantity[1]
        # A unit in the singular is the same one.
        amounts = re.findall(
            rf"({_NUMBER.pattern})\s*{re.escape(unit.rstrip('s'))}s?\b", plain(text)
        )
        if amounts:
            return f"{amounts[-1]} {unit}"
    if found.place in ("tag", "box") and "\\" not in (gold or ""):
        text = plain(text) if "\\" in text else text
    text = text.strip(_WRAPPING)
    keep_period = gold is not None and gold.endswith(".")
    return text if keep_period else text.removesuffix(".").strip(_WRAPPING)


def _last_number(text: str, labelled: bool) -> str:
    """The first number after a label, which reasons may follow, elsewhere the last."""
    numbers = _NUMBER.findall(normalize(text.rpartition("=")[2] if labelled else text))
    if not numbers:
        return text.strip()
    return numbers[0 if labelled else -1].replace(",", "")


class Verifier:
    """The score of reasoning-gym's verifier of the record's task; of a free answer, math-verify's.

    A prompt of a task without a verifier, "free_text", needs a gold answer.
    """

    def __init__(self) -> None:
        self._functions: dict[str, Callable[[str, Any], float]] = {}
        self._free: MathVerify | None = None

    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        task = record["task"]
        name, entry = task["name"], task["entry"]
        if name == FREE_TEXT:
            if entry.get("answer") is None:
                raise ValueError(
                    f"rank.judge: expected a gold answer for prompt {record['prompt_id']!r}, got "
                    "none; use rank.judge=reward_model"
                )
            self._free = self._free or MathVerify()
            return self._free(record, answer)
        if name not in self._functions:
            self._functions[name] = verifier_of(name)
        return float(self._functions[name](extract_final_answer(answer, entry["answer"]), entry))


def verifier_of(name: str) -> Callable[[str, Any], float]:
    """reasoning-gym's verifier of a task; ValueError for a name that it does not know."""
    import reasoning_gym

    try:
        return reasoning_gym.get_score_answer_fn(name)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"rank.judge: expected a task of reasoning-gym or {FREE_TEXT!r}, got {name!r} ({error})"
        ) from error


class RewardModel:
    """The one logit of a sequence classifier on the conversation with the answer as its reply.

    The trace is not shown to it. A model with a field `score` in its output is taken at that.
    """

    def __init__(self, name: str, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_reward_tokenizer(name, trust_remote_code)
        with readable_errors("rank.reward_model", name):
            model = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        self.name = name
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        # One at a time: no padding, hence no pad token needed and no effect of the neighbours.
        text = render_reply(self.tokenizer, record["messages"], answer, self.name)
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


def load_reward_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """The reward model's tokenizer; ValueError if it has no chat template."""
    from transformers import AutoTokenizer

    with readable_errors("rank.reward_model", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(
            f"rank.reward_model: expected a tokenizer with a chat template, got {name!r}"
        )
    return tokenizer


def render_reply(tokenizer: Any, messages: Sequence[Message], answer: str, name: str) -> str:
    """The conversation with the answer as its reply; ValueError for one the template refuses."""
    from jinja2 import TemplateError

    reply: Message = {"role": "assistant", "content": answer}
    try:
        return tokenizer.apply_chat_template([*messages, reply], tokenize=False)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"rank.reward_model: expected a chat template that takes the roles {roles}, got that "
            f"of {name!r} ({error})"
        ) from error


def build_judge(cfg: RankConfig) -> Judge:
    """The configured judge, its model loaded."""
    if cfg.judge == "verifier":
        return Verifier()
    if cfg.judge == "none":
        raise ValueError("rank.judge: expected verifier or reward_model, got none")
    if cfg.reward_model is None:
        raise ValueError("rank.reward_model: expected a path or hub id for this judge, got None")
    return RewardModel(cfg.reward_model, cfg.trust_remote_code)


def check_judge(cfg: RankConfig, prompts: Sequence[Prompt]) -> None:
    """Whether `rank` will be able to judge answers to these prompts; loads no weights.

    Raises:
        ValueError: for free prompts without a gold answer, a task without a verifier, a package
            that is not installed, a reward model that is not there or takes no such conversation.
        FileNotFoundError: for a reward model that cannot be found.
    """
    if cfg.judge == "verifier":
        free = [prompt for prompt in prompts if prompt.task["name"] == FREE_TEXT]
        bare = [prompt for prompt in free if prompt.task["entry"].get("answer") is None]
        if bare:
            raise ValueError(
                f"rank.judge: expected a gold `answer` for every prompt, got none for {len(bare)} "
                f"of {len(prompts)}, the first {bare[0].prompt_id!r}; add them, or set rank.judge "
                "to reward_model, or to none to sample without ranking"
            )
        if free:
            MathVerify()
        for name in {prompt.task["name"] for prompt in prompts} - {FREE_TEXT}:
            verifier_of(name)
    elif cfg.judge == "reward_model":
        if cfg.reward_model is None:
            build_judge(cfg)  # which says so
        _check_reward_model(str(cfg.reward_model), cfg.trust_remote_code, prompts)


def _check_reward_model(name: str, trust_remote_code: bool, prompts: Sequence[Prompt]) -> None:
    from transformers import AutoConfig

    tokenizer = load_reward_tokenizer(name, trust_remote_code)
    with readable_errors("rank.reward_model", name):
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    for prompt in prompts:
        render_reply(tokenizer, prompt.messages, "-", name)
