"""Peak memory of the fused LM head beside the naive one, on the rows of a real batch.

Each runs in a process of its own: memory that one leaves behind must not hide what the other needs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bvpo_kernels.head.api import linear_logprobs
from bvpo_kernels.types import IGNORE_INDEX, PackedBatch

if TYPE_CHECKING:  # the measured process needs neither the model nor transformers
    from train.model.head import FusedHeadLM

HEADS = ("naive", "fused")
MIB = 2**20
_WARM_UP_ROWS = 8


def status_bytes(field: str) -> int:
    """A memory field of this process: VmRSS is what it holds, VmHWM the most it ever held."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: expected a field {field}, got none")


def _step(head: str, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> None:
    """Forward and backward of the sum of the rows' log-probabilities."""
    if head == "naive":
        logits_TV = hidden_TD @ weight_VD.T
        logprobs_T = logits_TV.float().log_softmax(-1).gather(1, target_T[:, None])[:, 0]
    else:
        logprobs_T = linear_logprobs(hidden_TD, weight_VD, target_T)
    logprobs_T.sum().backward()


def measure(head: str, inputs: Path) -> int:
    """Peak resident bytes above the inputs, in this process (Linux)."""
    tensors = {name: tensor.clone() for name, tensor in load_file(inputs).items()}
    hidden_TD, weight_VD = tensors["hidden"], tensors["weight"]
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    rows = slice(_WARM_UP_ROWS)  # a first call loads libraries, which are not the head's memory
    _step(head, hidden_TD[rows], weight_VD, tensors["target"][rows])
    hidden_TD.grad = weight_VD.grad = None
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = status_bytes("VmRSS")
    _step(head, hidden_TD, weight_VD, tensors["target"])
    return status_bytes("VmHWM") - before


@torch.no_grad()
def compare(policy: FusedHeadLM, batch: PackedBatch) -> str:
    """One line: peak memory of each head on the scored rows of `batch`, gradients included.

    Both get the scored rows only, so the difference is the logits and nothing else.
    """
    head = policy.model.get_output_embeddings()
    scored_T = batch.target_T != IGNORE_INDEX
    hidden_TD = policy.hidden(batch.to(policy.device))[scored_T.to(policy.device)]
    tensors = {
        "hidden": hidden_TD.to(policy.compute_dtype).cpu().contiguous(),
        "weight": head.weight.detach().to(policy.compute_dtype).cpu().contiguous(),
        "target": batch.target_T[scored_T].cpu(),
    }
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "head.safetensors"
        save_file(tensors, inputs)
        peaks = {name: _measure_apart(name, inputs) for name in HEADS}
    rows, dim = tensors["hidden"].shape
    naive, fused = (peaks[name] / MIB for name in HEADS)
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    return (
        f"LM head, forward + backward of {rows} rows (D={dim}, V={tensors['weight'].shape[0]}, "
        f"{dtype}): peak memory above the inputs naive {naive:.0f} MiB, fused {fused:.0f} MiB "
        f"({naive / fused:.1f}x less)"
    )


def _measure_apart(head: str, inputs: Path) -> int:
    command = [sys.executable, "-m", "train.sizing.head_memory", head, str(inputs)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


if __name__ == "__main__":
    print(measure(sys.argv[1], Path(sys.argv[2])))
