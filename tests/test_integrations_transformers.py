"""`patch_model` against the models' own logits: every head it serves, every wrapper, every refusal.

Lengths are ragged and labels are ignored at both ends; the vocabulary is no multiple of a tile.
"""

import os
import socket
import types
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
import transformers as hf
from causal_lms import IDS, LABELS, make, own_logprobs
from torch import nn

from bvpo_kernels.integrations.transformers import patch_model
from bvpo_kernels.oracles.testing import assert_accurate


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(model, logp):
    """Of every trained parameter, for an upstream gradient that differs by token."""
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.linspace(-1, 2, logp.numel()).view(logp.shape).to(logp)
    return torch.autograd.grad(logp, trained, upstream, allow_unused=True)


def assert_same(model, rtol=1e-9):
    """Log-probabilities and all gradients, in fp64."""
    model.double()
    expected = own_logprobs(model)
    want = gradients(model, expected)
    with patch_model(model):
        got_logp = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
        got = gradients(model, got_logp)
    torch.testing.assert_close(got_logp, expected, rtol=rtol, atol=1e-10)
    assert len(got) > 0
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen3", {}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 6}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_scores_and_gradients_are_those_of_the_own_logits(name, options):
    assert_same(make(name, **options))


def test_output_has_the_fields_of_the_contract():
    model = make()
    with patch_model(model, outputs=("log_probs", "entropy", "mean_logits")):
        out = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
        shifted = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
        pre = model(input_ids=IDS, shift_labels=shifted, fused_lm_head=True)
        summed = model(input_ids=IDS, labels=LABELS, fused_lm_head=True, num_items_in_batch=4)
        own = model(input_ids=IDS, labels=LABELS)
    mask = LABELS[:, 1:] != -100
    assert out.log_probs.shape == (2, 6)
    assert torch.equal(out.label_mask, mask)
    torch.testing.assert_close(out.loss, own.loss)
    torch.testing.assert_close(summed.loss, own.loss * mask.sum() / 4)
    torch.testing.assert_close(pre.log_probs[:, :-1], out.log_probs)
    logp = own.logits[:, :-1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).masked_fill(~mask, 0)
    torch.testing.assert_close(out.entropy, entropy)
    torch.testing.assert_close(
        out.mean_logits, own.logits[:, :-1].mean(-1).masked_fill(~mask, 0), rtol=1e-4, atol=1e-5
    )
    assert not out.entropy.requires_grad
    assert not out.mean_logits.requires_grad
    assert next(iter(out.keys())) == "loss"


def test_without_the_flag_and_after_removal_the_model_is_its_own():
    model = make()
    before = model(input_ids=IDS, labels=LABELS)
    handle = patch_model(model)
    patched = model(input_ids=IDS, labels=LABELS)
    assert torch.equal(before.logits, patched.logits)
    assert torch.equal(before.loss, patched.loss)
    generated = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    handle.remove()
    handle.remove()
    assert "forward" not in model.__dict__
    assert torch.equal(
        generated, model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    )
    assert model(input_ids=IDS, labels=LABELS, fused_lm_head=True).logits is not None


def test_patches_are_undone_in_order():
    model = make()
    first, second = patch_model(model), patch_model(model, temperature=2.0)
    with pytest.raises(RuntimeError, match="opposite order"):
        first.remove()
    second.remove()
    first.remove()


def test_a_patch_over_another_takes_its_calls():
    model = make()
    first, second = patch_model(model, always=True), patch_model(model, temperature=2.0)
    call = {"input_ids": IDS, "labels": LABELS}
    assert "logits" in model(**call, fused_lm_head=False)
    by_first = model(**call).log_probs
    by_second = model(**call, fused_lm_head=True).log_probs
    second.remove()
    torch.testing.assert_close(model(**call, fused_lm_head=True).log_probs, by_first)
    assert not torch.allclose(by_first, by_second)
    first.remove()
    assert "logits" in model(**call)


def test_always_serves_a_plain_trainer_and_temperature_divides():
    model = make()
    own = model(input_ids=IDS, labels=LABELS).loss
    with patch_model(model, always=True):
        out = model(input_ids=IDS, labels=LABELS)
        assert "logits" not in out
        torch.testing.assert_close(out["loss"], own)
        assert model(input_ids=IDS).logits.shape == (2, 7, 97)
    with patch_model(model, temperature=3.0):
        got = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
    logp = (model(input_ids=IDS).logits[:, :-1] / 3).log_softmax(-1)
    want = logp.gather(2, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(got, want.masked_fill(LABELS[:, 1:] == -100, 0))


def test_the_head_is_looked_up_at_each_call():
    model = make().double()
    patch_model(model)
    model.set_output_embeddings(nn.Linear(24, 97).double())
    got = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, own_logprobs(model))


def test_bf16_is_as_accurate_as_the_models_own_logits():
    model = make().bfloat16()
    eager, exact = own_logprobs(model), own_logprobs(make().bfloat16().double())
    patch_model(model)
    got = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
    assert_accurate("log_probs", got, eager, exact)


def test_autocast_and_checkpointing():
    model = make()
    patch_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
        own = own_logprobs(model)
    torch.testing.assert_close(mixed, own, rtol=0.1, atol=0.2)
    plain = gradients(model, model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    for a, b in zip(gradients(model, out.log_probs), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile():
    model = make()
    patch_model(model)
    expected = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected.log_probs)
    for a, b in zip(
        gradients(model, out.log_probs), gradients(model, expected.log_probs), strict=True
    ):
        torch.testing.assert_close(a, b)


REFUSED = {
    "no language model": (lambda: nn.Linear(3, 3), TypeError, "PreTrainedModel"),
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        ValueError,
        "decoder-only",
    ),
    "no head": (lambda: make().model, ValueError, "LlamaModel"),
    "scale and softcap": (
        lambda: make("Gemma2", final_logit_softcapping=2.0, logit_scale=0.5),
        ValueError,
        "both",
    ),
    "unknown scale": (lambda: _scaled(make()), ValueError, "nats"),
    "experts": (
        lambda: make("Mixtral", num_local_experts=2, output_router_logits=True),
        ValueError,
        "output_router_logits",
    ),
    "a head of its own": (
        lambda: _with_head(nn.Sequential(nn.Linear(24, 97))),
        TypeError,
        "expected an nn.Linear",
    ),
    "quantized": (
        lambda: _with_weight(torch.zeros(97, 24, dtype=torch.int8)),
        TypeError,
        r"floating-point LM head, got torch\.int8 in LlamaForCausalLM",
    ),
    "offloaded": (
        lambda: _with_hook(types.SimpleNamespace(offload=True)),
        ValueError,
        "that of LlamaForCausalLM is offloaded",
    ),
}


def _scaled(model):
    """A model whose forward does what no field of its configuration says."""
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = 3 * out.logits
        return out

    model.forward = forward
    return model


def _with_head(head):
    model = make()
    model.lm_head = head
    return model


def _with_weight(weight):
    """As bitsandbytes and torchao leave it: a linear layer whose weight is no float."""
    model = make()
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _with_hook(hook):
    """As accelerate leaves it: weights come to the device when the module is called."""
    model = make()
    model.lm_head._hf_hook = hook
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    build, error, text = REFUSED[case]
    model = build()
    previous = model.__dict__.get("forward")
    with pytest.raises(error, match=text):
        patch_model(model)
    assert model.__dict__.get("forward") is previous


def test_flattened_weights_are_refused_at_the_call():
    """Of FSDP1 and ZeRO-3, which wrap a model that is patched already."""
    model = make()
    patch_model(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"shape \[V, D\], got \[0\] in LlamaForCausalLM"):
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True)


def test_arguments():
    model = make()
    with pytest.raises(ValueError, match="outputs: expected names of"):
        patch_model(model, outputs=("logits",))
    with pytest.raises(ValueError, match="mean_logits"):
        patch_model(make("Gemma2", final_logit_softcapping=2.0), outputs=("mean_logits",))
    patch_model(model)
    with pytest.raises(ValueError, match="labels: fused_lm_head=True expects"):
        model(input_ids=IDS, fused_lm_head=True)


def lora(model, **options):
    import peft

    config = peft.LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 6,
            "lora_dropout": 0.0,
            "init_lora_weights": False,
            "target_modules": ["q_proj", "lm_head"],
            **options,
        }
    )
    torch.manual_seed(2)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("trained_head", [False, True])
def test_lora_on_the_head(trained_head):
    model = lora(make())
    model.base_model.model.lm_head.base_layer.weight.requires_grad_(trained_head)
    assert_same(model)


def test_peft_around_and_under_the_patch():
    base = make().double()
    patch_model(base)
    model = lora(base).double()
    call = {"input_ids": IDS, "labels": LABELS, "fused_lm_head": True}
    torch.testing.assert_close(model(**call).log_probs, own_logprobs(model))
    with model.disable_adapter():
        torch.testing.assert_close(model(**call).log_probs, own_logprobs(model))
    model.merge_adapter()
    torch.testing.assert_close(model(**call).log_probs, own_logprobs(model))
    model.unmerge_adapter()
    copied = lora(make(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        copied.get_output_embeddings().modules_to_save["default"].weight.mul_(2.0)
    assert_same(copied)


def test_lora_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="plain LoRA on the LM head"):
        patch_model(lora(make(), use_dora=True))
    with pytest.raises(ValueError, match="without a bias"):
        patch_model(lora(make(), lora_bias=True))


WRAPPERS = ("ddp", "root", "tied", "own group", "norm and head")


def _wrap(model, how):
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if how == "own group":
        fully_shard(model.lm_head)
    if how == "norm and head":
        fully_shard([model.model.norm, model.lm_head])
    return fully_shard(model)


def _refusal_of_a_tensor_parallel_head():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = make()
    patch_model(model)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"lm_head": ColwiseParallel()})
    try:
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    except ValueError as error:
        return str(error)


def _distributed(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found, row = {}, slice(rank, rank + 1)
    for how in WRAPPERS:
        model = make(tie_word_embeddings=how == "tied")
        patch_model(model)
        wrapped = _wrap(model, how)
        wrapped(
            input_ids=IDS[row], labels=LABELS[row], fused_lm_head=True
        ).log_probs.sum().backward()
        found[how] = {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in model.named_parameters()
        }
    found["tensor-parallel"] = _refusal_of_a_tensor_parallel_head()
    if rank == 0:
        torch.save(found, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Each rank has one row; DDP and FSDP2 average gradients over ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "gradients.pt"
    mp.start_processes(_distributed, (port, path), nprocs=2, start_method="spawn")
    found = torch.load(path, weights_only=True)
    assert "the LM head of LlamaForCausalLM is a DTensor" in found["tensor-parallel"]
    for how in WRAPPERS:
        model = make(tie_word_embeddings=how == "tied")
        (own_logprobs(model).sum() / 2).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert found[how].keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(
                found[how][name], grad, rtol=1e-4, atol=1e-5, msg=f"{how}: {name}"
            )
