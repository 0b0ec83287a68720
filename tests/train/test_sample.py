import json
from pathlib import Path

import pytest
import torch
from tiny_chat import (
    CHAT_TEMPLATE,
    make_sample_cfg,
    make_tokenizer,
    save_causal_lm,
    write_lines,
)

from train.config import ModelConfig, RunConfig
from train.model.models import load_model
from train.preferences import sample
from train.preferences.modes import NO_THINKING, THINKING
from train.preferences.responses import read_responses, responses_path

# Prompts of unequal lengths, so that batches need padding; five of them in batches of two.
TEXTS = ["Hi", "What is 2 + 3?", "Name a colour that is not red, please.", "1 + 1 =", "Why?"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    records = [{"prompt": text, "id": f"p{i}", "answer": "5"} for i, text in enumerate(TEXTS)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def finished_run(model_folder, prompts_file, tmp_path_factory) -> RunConfig:
    cfg = make_sample_cfg(model_folder, prompts_file, tmp_path_factory.mktemp("run"))
    sample.run(cfg)
    return cfg


@pytest.fixture
def cfg(finished_run, tmp_path) -> RunConfig:
    """The finished run, copied to a folder of the test's own."""
    for name in ("responses.jsonl", "responses.meta.json"):
        (tmp_path / name).write_bytes((Path(finished_run.run_dir) / name).read_bytes())
    model, prompts = Path(finished_run.model.name), Path(str(finished_run.prompts.path))
    return make_sample_cfg(model, prompts, tmp_path)


def responses(cfg: RunConfig) -> bytes:
    return responses_path(cfg).read_bytes()


def naive_draw(model, prompts, cfg, max_new_tokens, seed, ends):
    """Ancestral sampling without cache, padding or generate: one sequence at a time, one draw."""
    rows = [list(ids) for ids in prompts for _ in range(cfg.num_responses)]
    done = [False] * len(rows)
    torch.manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        drawn = torch.multinomial((logits / cfg.temperature).softmax(-1), 1)[:, 0].tolist()
        for index, token in enumerate(drawn):
            if not done[index]:
                rows[index].append(token)
                done[index] = token in ends
        if all(done):
            break
    n = cfg.num_responses
    lengths = [len(ids) for ids in prompts for _ in range(n)]
    flat = [row[length:] for row, length in zip(rows, lengths, strict=True)]
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def test_draw_equals_naive_ancestral_sampling(model_folder):
    """Neither padding, nor the cache, nor the checkpoint's sampling defaults change the samples."""
    cfg = make_sample_cfg(model_folder, Path("unused"), Path("unused")).sample
    model, tokenizer = load_model(ModelConfig(name=str(model_folder), compute_dtype="float32"))
    ends = set(model.generation_config.eos_token_id)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with torch.no_grad():
        expected = naive_draw(model, prompts, cfg, 12, 7, ends)
    sampler = sample.Sampler(model, tokenizer, cfg)
    torch.manual_seed(123)  # not the state that the naive loop, with the same draws, has left
    before = torch.get_rng_state()
    drawn = sampler.draw(prompts, 12, 7)
    assert drawn == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler.draw(prompts, 12, 8) != drawn
    # Both kinds of ending occur, and an end id only ever comes last.
    flat = [ids for group in drawn for ids in group]
    finished = [ids[-1] in ends for ids in flat]
    assert {True, False} == set(finished)
    assert all(not (set(ids[:-1]) & ends) for ids in flat)
    assert all(len(ids) == 12 for ids, end in zip(flat, finished, strict=True) if not end)


def test_each_batch_and_mode_has_a_seed_of_its_own():
    keys = [
        (seed, mode, b) for seed in (0, 1) for mode in (THINKING, NO_THINKING) for b in range(9)
    ]
    seeds = {sample.batch_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed takes


def test_records_hold_ids_as_generated(finished_run):
    _, tokenizer = load_model(finished_run.model)
    records = [record for _, record in read_responses(responses_path(finished_run))]
    assert [record["prompt_id"] for record in records] == [f"p{i}" for i in range(5)]
    assert [record["messages"][-1]["content"] for record in records] == TEXTS
    assert records[0]["task"]["entry"]["answer"] == "5"
    opening = {THINKING: "<think>\n", NO_THINKING: "<think>\n\n</think>\n\n"}
    for record in records:
        for mode, limit in ((THINKING, 12), (NO_THINKING, 6)):
            part = record["modes"][mode]
            prompt = tokenizer.decode(part["prompt_ids"])
            assert prompt.endswith(
                f"{record['messages'][-1]['content']}<|im_end|>\n"
                f"<|im_start|>assistant\n{opening[mode]}"
            )
            assert len(part["responses"]) == 3
            for response in part["responses"]:
                assert 1 <= len(response["ids"]) <= limit
                kept = response["ids"][: -1 if response["finished"] else None]
                assert response["text"] == tokenizer.decode(kept)
                assert response["finished"] or len(response["ids"]) == limit


def test_sidecar_records_what_made_the_file(finished_run):
    meta = json.loads((Path(finished_run.run_dir) / "responses.meta.json").read_text())
    assert meta["settings"]["sample.temperature"] == 0.8
    assert meta["settings"]["model.empty_trace"] == "<think>\n\n</think>\n\n"
    assert len(meta["settings"]["tokenizer"]) == 64
    assert meta["versions"]["torch"] == torch.__version__


# Within the last line, within a line in the middle of a batch, within the first, at a line's end.
@pytest.mark.parametrize("share", [0.97, 0.7, 0.1])
def test_a_killed_run_resumes_to_the_same_bytes(cfg, share, capsys):
    whole = responses(cfg)
    responses_path(cfg).write_bytes(whole[: int(share * len(whole))])
    sample.run(cfg)
    assert responses(cfg) == whole
    assert "incomplete" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [0, 1, 3, 5])
def test_only_missing_prompts_are_appended(cfg, lines, monkeypatch):
    whole = responses(cfg)
    kept = b"".join(whole.splitlines(keepends=True)[:lines])
    responses_path(cfg).write_bytes(kept)
    batches = []
    real = sample.sample_batch
    monkeypatch.setattr(
        sample, "sample_batch", lambda *args: batches.append(args[2]) or real(*args)
    )
    sample.run(cfg)
    assert responses(cfg) == whole
    assert batches == {0: [0, 1, 2], 1: [0, 1, 2], 3: [1, 2], 5: []}[lines]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("sample", "temperature", 0.9),
        ("sample", "prompts_per_batch", 3),
        ("model", "trace_close", "</thought>"),
        ("model", "empty_trace", "<think></think>"),
    ],
)
def test_other_settings_are_refused_by_name(cfg, section, name, value):
    whole = responses(cfg)
    setattr(getattr(cfg, section), name, value)
    with pytest.raises(ValueError, match=rf"{section}\.{name}: expected .*, got "):
        sample.run(cfg)
    assert responses(cfg) == whole


def test_another_tokenizer_is_refused(cfg, model_folder, tmp_path):
    other = tmp_path / "other"
    save_causal_lm(other)
    (other / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    cfg.model.name = str(other)
    with pytest.raises(ValueError, match=r"model\.name: .*tokenizer: expected"):
        sample.run(cfg)


def test_a_missing_sidecar_is_refused(cfg):
    (Path(cfg.run_dir) / "responses.meta.json").unlink()
    with pytest.raises(ValueError, match=r"responses\.meta\.json"):
        sample.run(cfg)


def test_a_malformed_line_names_file_and_line(cfg):
    lines = responses(cfg).splitlines(keepends=True)
    lines[1] = b'{"prompt_id": "p1", \n'
    responses_path(cfg).write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"responses\.jsonl:2: expected a JSON object"):
        sample.run(cfg)


def test_a_foreign_line_names_file_and_line(cfg):
    with responses_path(cfg).open("a") as file:
        file.write('{"unit_id": "x"}\n')
    with pytest.raises(ValueError, match=r"responses\.jsonl:6: expected a line of responses"):
        sample.run(cfg)


def test_a_prompt_that_comes_twice_names_file_and_line(cfg):
    lines = responses(cfg).splitlines(keepends=True)
    responses_path(cfg).write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match=r"responses\.jsonl:6: expected a new prompt, got 'p1'"):
        sample.run(cfg)


def test_a_changed_prompt_under_the_same_id_is_refused(cfg, tmp_path):
    changed = [{"prompt": "Else", "id": "p0", "answer": "5"}]
    path = Path(str(cfg.prompts.path))
    text = path.read_text()
    try:
        write_lines(path, changed)
        with pytest.raises(ValueError, match=r"responses\.jsonl:1: .* prompt 'p0'"):
            sample.run(cfg)
    finally:
        path.write_text(text)


def test_what_rank_cannot_judge_is_refused_before_the_model_is_loaded(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_sampler", None)
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "Hi", "answer": "5"}, {"prompt": "Ho"}])
    cfg.prompts.path = str(path)
    with pytest.raises(ValueError, match=r"rank\.judge: .* got none for 1 of 2, the first"):
        sample.run(cfg)


def test_every_prompt_is_rendered_before_the_first_is_sampled(cfg, tmp_path, monkeypatch, capsys):
    turns = [{"role": "user", "content": "Hi"}]
    records = [{"messages": turns, "answer": "5"}, {"messages": turns, "tools": [{}], "answer": 5}]
    cfg.prompts.path = str(write_lines(tmp_path / "p.jsonl", records))
    cfg.run_dir = str(tmp_path / "run")
    monkeypatch.setattr(sample, "sample_batch", None)
    with pytest.raises(ValueError, match=r"prompt '.*': tools: expected a chat template"):
        sample.run(cfg)
    assert not responses_path(cfg).exists()
    printed = capsys.readouterr().out
    assert r"thinking: a prompt ends in" in printed
    assert r"assistant\n<think>\n'" in printed


def test_tools_are_stored_with_their_prompt(cfg, tmp_path):
    """A run that goes on refuses other tools; prompts without any are stored as ever."""
    cfg.run_dir = str(tmp_path / "run")
    template = "{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE
    folder = save_causal_lm(tmp_path / "tools")
    make_tokenizer(template).save_pretrained(folder)
    cfg.model.name = str(folder)
    records = [
        {"prompt": "Hi", "id": "a", "answer": "5", "tools": [{"name": "add"}]},
        {"prompt": "Ho", "id": "b", "answer": "5"},
    ]
    path = tmp_path / "p.jsonl"
    cfg.prompts.path = str(write_lines(path, records))
    sample.run(cfg)
    first, second = (record for _, record in read_responses(responses_path(cfg)))
    assert first["tools"] == [{"name": "add"}]
    assert "tools" not in second
    sample.run(cfg)
    records[0]["tools"] = [{"name": "subtract"}]
    write_lines(path, records)
    with pytest.raises(ValueError, match=r"jsonl:1: expected the messages and tools of prompt 'a'"):
        sample.run(cfg)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("top_p", 0.0), ("num_responses", 1), ("max_new_tokens", 0)],
)
def test_options_out_of_range_are_named(cfg, name, value):
    setattr(cfg.sample, name, value)
    with pytest.raises(ValueError, match=rf"sample\.{name}: expected .*, got {value}"):
        sample.run(cfg)
