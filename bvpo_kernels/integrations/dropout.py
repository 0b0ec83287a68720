"""`disable_dropout`: no random number is drawn in a forward of training mode.

Policy and reference must differ in their weights only: with dropout the margin of a pair,
log pi(y) - log pi_ref(y), has noise that is no part of the loss.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Numbers that models keep on a module instead of an nn.Dropout: dropout, attn_pdrop, drop_prob,
# dropout_rate, layerdrop, drop_path_rate, attn_drop.
_PROBABILITY = re.compile(r"dropout|pdrop|layer_?drop|drop_(prob|rate|path|connect)|(^|_)drop$")
# Noise on what is routed to experts. Not PhiMoE's `router_jitter_noise`: a threshold of its router,
# in evaluation too.
_JITTER = frozenset({"jitter_noise", "input_jitter_noise", "moe_jitter_eps"})


def disable_dropout(model: nn.Module) -> None:
    """Set every probability of dropout in `model` to 0, in place, whatever form it has.

    Served are torch's dropout layers, numbers on modules (functional dropout, stochastic depth,
    noise of routers), and fields that a module's forward reads from its configuration. Its other
    fields stay: a saved model keeps its `attention_dropout`. What else is random (code without such
    a name) is left; two forwards in training mode find it.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        numbers = _probabilities(vars(module)) | (_JITTER & _numbers(vars(module)))
        for name in numbers:
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            kind: Any = type(module)
            for name in _probabilities(vars(config)) & _read_from_config(kind):
                setattr(config, name, 0.0)


def dropout_fields(config: Any) -> dict[str, float]:
    """Probabilities of dropout that are not 0 in a model's configuration, by their field."""
    return {name: getattr(config, name) for name in sorted(_probabilities(vars(config)))}


def _numbers(values: Mapping[str, Any]) -> set[str]:
    return {
        name
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0
    }


def _probabilities(values: Mapping[str, Any]) -> set[str]:
    return {name for name in _numbers(values) if _PROBABILITY.search(name)}


@cache
def _read_from_config(kind: type) -> frozenset[str]:
    """Names N that the forward of a module's class reads as `<anything>.config.N`."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code = dis.get_instructions(forward) if inspect.isfunction(forward) else ()
    return frozenset(
        str(field.argval)
        for config, field in pairwise(code)
        if config.argval == "config" and config.opname == field.opname == "LOAD_ATTR"
    )
