"""A patched model is an ordinary model: whatever copies it gets one that runs its own weights."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
import torch.multiprocessing as mp
import transformers as hf
from causal_lms import IDS, LABELS, make, own_logprobs
from torch.optim.swa_utils import AveragedModel

from bvpo_kernels.integrations.transformers import patch_model

FUSED = {"input_ids": IDS, "labels": LABELS, "fused_lm_head": True}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "an average": lambda model: AveragedModel(model).module,
    "a copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)


def assert_runs_as(model, twin):
    """Plain, fused and in generate, as `twin`, which was never patched."""
    assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    torch.testing.assert_close(model(**FUSED).log_probs, own_logprobs(twin))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **options), twin.generate(IDS[:1], **options))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("twice", [False, True])
def test_a_copy_and_its_original_run_their_own_weights(how, twice):
    model, twin = make(), make()
    handles = [patch_model(model) for _ in range(1 + twice)]
    kept = COPIES[how](model)
    move(model)
    assert_runs_as(kept, twin)
    moved = make()
    move(moved)
    assert_runs_as(model, moved)
    # Nor do removals reach each other.
    for handle in reversed(handles):
        handle.remove()
    assert type(model) is hf.LlamaForCausalLM
    assert vars(model).keys() == vars(twin).keys()
    assert_runs_as(kept, twin)
    kept(**FUSED).loss.backward()
    assert all(p.grad is not None for p in kept.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_copied_peft_model():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make(), config)
    twin = copy.deepcopy(model)
    patch_model(model)
    kept = copy.deepcopy(model)
    move(model)
    assert torch.equal(kept(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    torch.testing.assert_close(kept(**FUSED).log_probs, own_logprobs(twin))


def test_replicas_of_data_parallel_are_called_themselves():
    """nn.DataParallel, which Trainer puts around a model on two GPUs, copies __dict__."""
    model = make()
    patch_model(model)
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    shallow = copy.copy(model)
    assert shallow.forward.__self__ is shallow


@pytest.mark.parametrize("bind", [types.MethodType, functools.partial])
def test_a_forward_in_the_instance_is_copied_with_it(bind):
    """Where accelerate puts its hooks."""
    model = make()
    seen = []

    def forward(self, *args, **kwargs):
        seen.append(self)
        return hf.LlamaForCausalLM.forward(self, *args, **kwargs)

    model.forward = previous = bind(forward, model)
    handle = patch_model(model)
    kept = copy.deepcopy(model)
    seen.clear()
    kept(input_ids=IDS)
    model(input_ids=IDS)
    assert seen == [kept, model]
    handle.remove()
    assert model.forward is previous


def test_the_class_keeps_its_name_for_files_and_new_instances(tmp_path):
    model = make()
    patch_model(model, always=True)
    assert isinstance(model, hf.LlamaForCausalLM)
    assert repr(type(model)) == repr(hf.LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    # A model made anew from the class of a patched one is not patched.
    for other in (type(model).from_pretrained(tmp_path), type(model)(model.config)):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(input_ids=IDS, labels=LABELS).logits, model(input_ids=IDS).logits)
        with patch_model(other):
            torch.testing.assert_close(other(**FUSED).log_probs, own_logprobs(make()))


def test_removal_under_a_class_that_was_put_over_it():
    """As fully_shard does."""
    model = make()
    handle = patch_model(model, always=True)
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    assert "log_probs" in model(input_ids=IDS, labels=LABELS)
    handle.remove()
    assert "logits" in model(input_ids=IDS, labels=LABELS)
    with patch_model(model):
        torch.testing.assert_close(model(**FUSED).log_probs, own_logprobs(make()))
    assert type(model).__name__ == "FSDPLlamaForCausalLM"


def _send_scores(model, queue):
    queue.put((model(input_ids=IDS).logits.tolist(), model(**FUSED).log_probs.tolist()))


@pytest.mark.slow
def test_a_new_process_is_handed_a_patched_model():
    model = make()
    patch_model(model)
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_send_scores, args=(model, queue))
    process.start()
    logits, logp = (torch.tensor(values) for values in queue.get())
    process.join()
    torch.testing.assert_close(logits, model(input_ids=IDS).logits)
    torch.testing.assert_close(logp, own_logprobs(model))
