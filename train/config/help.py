"""`--help` from the docstrings of the configuration: one place says what a field is.

A docstring's sentence that begins with the names of fields and a colon explains them, up to the
next one: "lr: of AdamW. betas, weight_decay: the same." The first sentence is the section's title.
"""

from __future__ import annotations

import inspect
import re
from argparse import Action
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser


def summary(kind: type) -> str:
    """The first sentence of a configuration's docstring."""
    return _docstring(kind).partition(". ")[0].removesuffix(".")


def field_texts(kind: type) -> dict[str, str]:
    """Field -> what the docstring of its class says about it."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if is_dataclass(owner):
            names = "|".join(sorted((f.name for f in fields(owner)), key=len, reverse=True))
            sentence = re.compile(rf"(?:^|(?<=[.;:)] ))((?:{names})(?:, (?:{names}))*): ")
            parts = sentence.split(_docstring(owner))
            for found, text in zip(parts[1::2], parts[2::2], strict=True):
                texts |= dict.fromkeys(found.split(", "), text.strip().rstrip(".;"))
    return texts


def option_texts(kind: type, prefix: str = "") -> dict[str, str]:
    """Option -> its text, sections and those that are off by default (null) included."""
    texts: dict[str, str] = {}
    own = field_texts(kind)
    for name, hint in get_type_hints(kind).items():
        inner = _section(hint)
        if inner is None:
            texts[prefix + name] = own.get(name, "")
            continue
        texts |= option_texts(inner, f"{prefix}{name}.")
        if not is_dataclass(hint):
            texts[prefix + name] = _switched_on(prefix + name, inner, own.get(name, ""))
    return texts


def _switched_on(option: str, kind: type, text: str) -> str:
    """Help of a section that is null by default; the parser lists none of its options."""
    listed = "; ".join(f"{name}: {text}" for name, text in field_texts(kind).items())
    return f"{text or summary(kind)}. Off by default; --{option}={{}} switches it on. {listed}"


def _section(hint: Any) -> type | None:
    """The dataclass of a field that has options of its own; no list of them."""
    kinds = [hint] if is_dataclass(hint) else get_args(hint)
    if isinstance(hint, type) or type(None) in kinds:
        return next((kind for kind in kinds if is_dataclass(kind)), None)  # type: ignore[return-value]
    return None


def _docstring(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def explain(parser: ArgumentParser, kind: type) -> None:
    """Give every option of `kind` its text, and every section its title."""
    texts = option_texts(kind)
    actions: list[Action] = parser._actions
    for action in actions:
        if texts.get(action.dest):
            action.help = texts[action.dest]
    titles = {str(hint): (name, hint) for name, hint in get_type_hints(kind).items()}
    for group in parser._action_groups:
        name, hint = titles.get(group.title or "", ("", kind))
        if name:
            group.title = f"{name}: {summary(hint)}"
        elif group.title == str(kind):
            group.title = "the run"
