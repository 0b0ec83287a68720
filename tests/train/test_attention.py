"""Which attention is chosen, and torch's varlen kernel as transformers' models call it.

The kernel runs on CUDA only: here a loop over segments through sdpa stands in for it, so that what
is checked is what it is given. The tests marked gpu run the kernels themselves. The loop over
segments that a CPU takes is compared as it is.
"""

import pytest
import torch
from tiny_runs import make_units, tiny_model
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from bvpo_kernels.packing import pack
from train.model import attention
from train.model.attention import FLASH, SDPA, SEGMENTS, VARLEN, resolve_attention, segment_options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def segments_through_sdpa(query, key, value, ends, scale, window):
    """[N, heads, D] -> the same; each segment alone, with a mask made of positions."""
    out = []
    for start, end in zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window
        mask = distance >= -right
        if left >= 0:
            mask &= distance <= left
        part = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
        )
        out.append(part.transpose(0, 1))
    return torch.cat(out)


class Kernel:
    """Stands in for `varlen_attn`, of a torch with or without `enable_gqa`; keeps its calls."""

    def __init__(self, monkeypatch, gqa):
        self.calls = []

        def newer(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            *,
            scale=None,
            window_size=(-1, -1),
            enable_gqa=False,
        ):
            assert enable_gqa or query.shape[1] == key.shape[1]
            self.calls.append((query.dtype, query.shape, key.shape, max_q))
            assert torch.equal(cu_seq_q, cu_seq_k)
            assert cu_seq_q.dtype == torch.int32
            assert max_q == max_k == int(cu_seq_q.diff().max())
            return segments_through_sdpa(query, key, value, cu_seq_q, scale, window_size)

        def older(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            *,
            scale=None,
            window_size=(-1, -1),
        ):
            return newer(
                query,
                key,
                value,
                cu_seq_q,
                cu_seq_k,
                max_q,
                max_k,
                scale=scale,
                window_size=window_size,
            )

        monkeypatch.setattr(attention, "varlen_attn", newer if gqa else older)


def have(monkeypatch, flash=False, capability=(9, 0)):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_auto_on_a_cpu(monkeypatch):
    have(monkeypatch, flash=True)
    for name in ("auto", SEGMENTS):
        assert resolve_attention(name, CPU, torch.bfloat16) == SEGMENTS
        assert resolve_attention(name, CPU, torch.float32, packed=False) == SDPA


@pytest.mark.parametrize(
    ("flash", "capability", "dtype", "packed", "expected"),
    [
        (True, (9, 0), torch.bfloat16, True, FLASH),
        (True, (9, 0), torch.bfloat16, False, FLASH),
        (True, (9, 0), torch.float32, True, SDPA),
        (False, (8, 0), torch.bfloat16, True, VARLEN),
        (False, (8, 0), torch.bfloat16, False, SDPA),
        (False, (7, 5), torch.bfloat16, True, SDPA),
        (False, (9, 0), torch.float32, True, SDPA),
    ],
)
def test_auto_on_a_gpu(monkeypatch, flash, capability, dtype, packed, expected):
    have(monkeypatch, flash, capability)
    assert resolve_attention("auto", CUDA, dtype, packed=packed) == expected


def test_auto_without_the_kernel_or_its_window(monkeypatch):
    have(monkeypatch)
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert resolve_attention("auto", CUDA, torch.bfloat16) == SDPA
    monkeypatch.setattr(attention, "varlen_attn", lambda query, is_causal=False: query)
    assert resolve_attention("auto", CUDA, torch.bfloat16) == SDPA


def test_a_name_is_taken_at_its_word_or_refused(monkeypatch):
    have(monkeypatch, flash=True)
    assert resolve_attention("eager", CUDA, torch.bfloat16) == "eager"
    assert resolve_attention(VARLEN, CUDA, torch.bfloat16) == VARLEN
    assert resolve_attention(VARLEN, CUDA, torch.bfloat16, packed=False) == FLASH
    for device, dtype in ((CPU, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(ValueError, match=r"model.attention: 'torch_varlen' expects .*, got"):
            resolve_attention(VARLEN, device, dtype)


MODELS = {
    "llama": (LlamaConfig, {}),
    "llama-one-kv-head": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama-no-gqa": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, {}),
    # A window shorter than most segments: each token sees itself and four before it.
    "mistral-window": (MistralConfig, {"sliding_window": 5}),
}


def hidden_states(model, batch):
    return model.get_decoder()(
        input_ids=batch.tokens_T[None],
        position_ids=batch.position_ids_T[None],
        attention_mask=None,
        use_cache=False,
        **segment_options(model, batch),
    ).last_hidden_state[0]


@pytest.mark.parametrize("gqa", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_sdpa(monkeypatch, name, gqa):
    kernel = Kernel(monkeypatch, gqa)
    batch = pack(make_units(3))
    compare_with_sdpa(VARLEN, name, batch)
    assert len(kernel.calls) == 2
    assert kernel.calls[0][3] == batch.max_seqlen < batch.num_tokens


@pytest.mark.parametrize("name", MODELS)
def test_segments_one_by_one_equal_sdpa(monkeypatch, name):
    """And no call goes through more than a segment."""
    sizes = []
    batch = pack(make_units(3))

    def counting(query, *args, **options):
        sizes.append(query.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, *args, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counting)
    compare_with_sdpa(SEGMENTS, name, batch)
    assert sizes == 2 * batch.cu_seqlens.diff().tolist()


def compare_with_sdpa(found_name, name, batch):
    """Hidden states and gradients of a packed row, against transformers' own sdpa and mask."""
    config_class, options = MODELS[name]
    results = []
    for implementation in (SDPA, found_name):
        model = tiny_model(config_class, attention=implementation, **options)
        hidden_TD = hidden_states(model, batch)
        weights_TD = torch.linspace(-1, 1, hidden_TD.numel()).view_as(hidden_TD)
        (hidden_TD * weights_TD).sum().backward()
        results.append((hidden_TD.detach(), model))
    (expected_TD, expected), (found_TD, found) = results
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-5, atol=1e-5)
    for (key, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        if a.grad is not None:
            scale = a.grad.abs().max().item()
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("implementation", [VARLEN, SEGMENTS])
def test_rows_without_segments_are_segments(monkeypatch, implementation):
    """A batch of two rows, as a model is called without `segment_options`."""
    Kernel(monkeypatch, gqa=True)
    ids_BL = torch.arange(3, 25).reshape(2, 11)
    expected = tiny_model()(input_ids=ids_BL, use_cache=False).logits
    found = tiny_model(attention=implementation)(input_ids=ids_BL, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_autocast_decides_the_dtype(monkeypatch):
    """Qwen3's norms of queries and keys have fp32 weights, and make fp32 of bf16."""
    kernel = Kernel(monkeypatch, gqa=True)
    model = tiny_model(Qwen3Config, attention=VARLEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_states(model, pack(make_units(2)))
    assert {call[0] for call in kernel.calls} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", [VARLEN, SEGMENTS])
def test_what_is_not_served_is_refused(monkeypatch, implementation):
    Kernel(monkeypatch, gqa=True)
    model = tiny_model(attention=implementation)
    function = {VARLEN: attention.varlen_attention, SEGMENTS: attention.segments_attention}[
        implementation
    ]
    layer = model.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    for options, what in [
        ({"softcap": 30.0}, "a softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"is_causal": False}, "attention that is not causal"),
    ]:
        with pytest.raises(ValueError, match=f"{what.split()[-1]} of LlamaAttention"):
            function(layer, q, kv, kv, None, **options)
    with pytest.raises(ValueError, match="a cache of LlamaAttention"):
        function(layer, q[:, :, -1:], kv, kv, None)
    ids_BL = torch.arange(3, 25).reshape(2, 11)
    model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False)
    padded = torch.ones_like(ids_BL)
    padded[0, :3] = 0
    with pytest.raises(ValueError, match=rf"attention_mask: '{implementation}' expects rows with"):
        model(input_ids=ids_BL, attention_mask=padded, use_cache=False)


def test_sdpa_is_given_nothing_new():
    batch = pack(make_units(2))
    assert segment_options(tiny_model(), batch) == {}
    options = segment_options(tiny_model(attention=VARLEN), batch)
    assert options["cu_seq_lens_q"] is options["cu_seq_lens_k"] is batch.cu_seqlens
    assert options["max_length_q"] == options["max_length_k"] == batch.max_seqlen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", [VARLEN, FLASH])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_kernels_equal_sdpa_on_a_gpu(implementation, name):
    """bf16, heads of 64: packed rows through the kernels, and through sdpa in fp32."""
    if implementation == FLASH and not attention.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    config_class, options = MODELS[name]
    batch = pack(make_units(3)).to("cuda")
    sizes = {"head_dim": 64, "initializer_range": 0.05, **options}
    exact = tiny_model(config_class, **sizes).to("cuda")
    half = tiny_model(config_class, torch.bfloat16, implementation, **sizes).to("cuda")
    plain = tiny_model(config_class, torch.bfloat16, **sizes).to("cuda")
    expected_TD = hidden_states(exact, batch)
    error = (hidden_states(half, batch).float() - expected_TD).abs().max()
    allowed = (hidden_states(plain, batch).float() - expected_TD).abs().max()
    assert error <= 2 * allowed + 0.01
