"""`evaluate`: questions, answer files and scores, against their readers and by hand."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_chat import save_causal_lm, write_lines

from train import cli
from train.config import ModelConfig, RunConfig, SampleConfig
from train.evaluation import engines, run, writers
from train.evaluation.config import EvaluateConfig
from train.evaluation.intervals import pass_at, proportion, summarize
from train.evaluation.questions import load_questions
from train.evaluation.scores import score_responses
from train.preferences import sample
from train.preferences.judges import Verifier

TEXT = "# Title\n\nA **bold** word, `x`.\n\n- one\n- two\n1. first\n```\n# not a header\n```\n"


def answers(*records) -> list[writers.Answer]:
    return [writers.Answer(record, TEXT, 12) for record in records]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("model"))


def make_cfg(tmp_path, model_folder="unused", **options) -> EvaluateConfig:
    sizes = {"max_new_tokens": 6, "batch": 2, "engine": "transformers"}
    model = ModelConfig(name=str(model_folder), compute_dtype="float32")
    return EvaluateConfig(run_dir=str(tmp_path / "run"), model=model, **{**sizes, **options})


ALPACA = [
    {"instruction": f"Say {n}.", "dataset": "selfinstruct", "output": "o", "generator": "g"}
    for n in range(3)
]


def read_alpaca(path: Path) -> pd.DataFrame:
    """What alpaca_eval's `load_or_convert_to_dataframe` does with a path that ends in .json."""
    assert path.suffix == ".json"
    return pd.read_json(path)


def test_alpaca_eval_file(tmp_path):
    path = writers.write_answers("alpaca_eval_2", answers(*ALPACA), "tiny-thinking", tmp_path)
    frame = read_alpaca(path)
    assert list(frame.columns) == ["instruction", "output", "generator", "dataset"]
    assert frame["instruction"].tolist() == [record["instruction"] for record in ALPACA]
    assert frame["output"].tolist() == [TEXT] * 3
    # alpaca_eval takes the model's name from the one value of this column.
    assert frame["generator"].unique().tolist() == ["tiny-thinking"]
    assert set(frame["dataset"]) == {"selfinstruct"}


def test_arena_hard_v01_file(tmp_path):
    questions = [{"question_id": f"q{n}", "turns": [{"content": "?"}]} for n in range(2)]
    path = writers.write_answers("arena_hard_v0.1", answers(*questions), "tiny", tmp_path)
    # The reader's loop: file name -> model, question_id -> line, the first choice's turns.
    by_question = {line["question_id"]: line for line in map(json.loads, path.open())}
    assert path.stem == "tiny"
    assert set(by_question) == {"q0", "q1"}
    line = by_question["q0"]
    assert line["model_id"] == "tiny"
    assert [turn["content"] for turn in line["choices"][0]["turns"]] == [TEXT]
    assert line["choices"][0]["index"] == 0
    assert by_question["q1"]["answer_id"] != line["answer_id"]
    assert_style(line["conv_metadata"])


def test_arena_hard_v2_file(tmp_path):
    questions = [{"uid": f"u{n}", "prompt": "?", "category": "hard_prompt"} for n in range(2)]
    path = writers.write_answers("arena_hard_v2", answers(*questions), "tiny", tmp_path)
    frame = pd.read_json(path, lines=True)  # as show_result.py reads it
    assert frame.iloc[0]["model"] == "tiny"
    assert set(frame.set_index("uid")["metadata"].to_dict()) == {"u0", "u1"}
    line = json.loads(path.read_text().splitlines()[1])
    assert line["uid"] == "u1"
    assert line["messages"][0] == {"role": "user", "content": "?"}
    assert line["messages"][-1]["content"]["answer"] == TEXT
    assert_style(line["metadata"])


def assert_style(metadata: dict) -> None:
    """Style control reads the values by position: a length, then three sums."""
    values = [v if isinstance(v, int) else sum(v.values()) for v in metadata.values()]
    assert next(iter(metadata)) == "token_len"
    assert values == [12, 1, 3, 1]
    assert metadata["list_count"] == {"ordered": 1, "unordered": 2}


def test_arena_hard_needs_ids():
    with pytest.raises(ValueError, match=r"data: expected questions with one of .*uid"):
        writers.arena_hard_v2(answers({"prompt": "?"}), "tiny")


@pytest.mark.parametrize(
    ("name", "record", "question", "answer"),
    [
        ("alpaca_eval_2", ALPACA[0], "Say 0.", None),
        ("arena_hard_v0.1", {"question_id": "q", "turns": [{"content": "Do."}]}, "Do.", None),
        ("arena_hard_v2", {"uid": "u", "prompt": "Do."}, "Do.", None),
        ("aime_2024", {"id": 60, "problem": "1+1?", "answer": "2"}, "1+1?\n\nBox.", "2"),
        ("aime_2024", {"ID": "2024-I-1", "Problem": "1?", "Answer": 2}, "1?\n\nBox.", "2"),
        (
            "olympiad_bench",
            {"id": 1, "question": "x?", "final_answer": ["1", "2"]},
            "x?\n\nBox.",
            "1, 2",
        ),
        (
            "math_500",
            {"unique_id": "t/1", "problem": "y?", "answer": "\\frac12"},
            "y?\n\nBox.",
            "\\frac12",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_questions(tmp_path, name, record, question, answer, suffix):
    path = tmp_path / f"q{suffix}"
    path.write_text(json.dumps(record if suffix == ".jsonl" else [record]) + "\n")
    cfg = make_cfg(tmp_path, benchmark=name, data=str(path), instruction="Box.")
    (prompt,) = load_questions(cfg)
    assert prompt.messages == [{"role": "user", "content": question}]
    assert prompt.task["entry"]["answer"] == answer
    assert prompt.task["entry"]["metadata"] == record


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("math_500", {"problem": "y?"}, r"q\.jsonl:1: expected an answer in one of"),
        ("math_500", {"answer": "1"}, r"q\.jsonl:1: expected a question in one of"),
        ("math_500", {"problem": None}, r"q\.jsonl:1: expected a question .*'problem': None"),
        ("math_500", {"problem": "y?", "answer": None}, r"q\.jsonl:1: .*, got {'answer': None}"),
        ("math_500", {"problem": "y?", "answer": {}}, r"q\.jsonl:1: answer: expected a text or a"),
        ("math_500", {"problem": "y?", "answer": [None]}, r"q\.jsonl:1: answer: expected a text"),
        (
            "aime_2024",
            {"id": [1], "problem": "y?", "answer": 1},
            r"q\.jsonl:1: id: expected a text",
        ),
        ("math_500", {"problem": "\ud800", "answer": 1}, r"q\.jsonl:1: 'problem': expected Unic"),
        ("arena_hard_v0.1", {"turns": [None]}, r"q\.jsonl:1: expected a question"),
        ("arena_hard_v0.1", {"turns": [{"content": "a"}, {"content": "b"}]}, "expected a question"),
        ("alpaca_eval_2", {"prompt": "x"}, r"expected a question in one of \('instruction',\)"),
    ],
)
def test_malformed_questions(tmp_path, name, record, message):
    path = write_lines(tmp_path / "q.jsonl", [record])
    with pytest.raises(ValueError, match=message):
        load_questions(make_cfg(tmp_path, benchmark=name, data=str(path)))


def test_what_the_answers_need_is_checked_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fill", None)
    path = write_lines(tmp_path / "q.jsonl", [{"prompt": "Do."}])
    with pytest.raises(ValueError, match=r"data: expected questions with one of .*uid"):
        run.run(make_cfg(tmp_path, benchmark="arena_hard_v2", data=str(path)))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    path = write_lines(tmp_path / "m.jsonl", [{"problem": "1?", "answer": "1"}])
    with pytest.raises(ValueError, match=r"benchmark: judging free .* math-verify"):
        run.run(make_cfg(tmp_path, benchmark="math", data=str(path)))


def test_questions_that_no_hub_dataset_holds(tmp_path):
    with pytest.raises(ValueError, match="data: expected the file of alpaca_eval_2's questions"):
        load_questions(make_cfg(tmp_path, benchmark="alpaca_eval_2"))


def test_only_what_follows_the_trace_is_judged():
    def response(text, finished=True):
        return {"ids": [5, 6], "finished": finished, "text": text}

    entry = {"question": "?", "answer": "7", "metadata": {}}
    texts = ["it is 8</think>7", "7</think>8", "7", "a</think>7"]
    drawn = [response(t, finished=n != 3) for n, t in enumerate(texts)]
    modes = {mode: {"responses": drawn} for mode in ("thinking", "no_thinking")}
    record = {"prompt_id": "p", "task": {"name": "free_text", "entry": entry}, "modes": modes}
    scores, counts = score_responses([record], "thinking", Verifier(), EvaluateConfig())
    assert scores == [[1.0, 0.0, 0.0, 0.0]]
    assert counts == {
        "responses": 4,
        "unjudged": 2,
        "missing_close": 1,
        "unfinished": 1,
        "empty_answer": 0,
    }
    scores, _ = score_responses([record], "no_thinking", Verifier(), EvaluateConfig())
    assert scores == [[1.0, 0.0, 1.0, 0.0]]


def test_pass_at_k_is_the_share_of_draws_without_replacement():
    import itertools

    samples = [1, 1, 0, 0, 0]
    for k in range(1, 6):
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert pass_at(2, 5, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="pass@k: expected"):
        pass_at(2, 5, 6)


def test_summary_and_its_intervals():
    scores = [[1.0, 0.0, 0.0, 1.0]] * 30 + [[0.0, 0.0, 0.0, 0.5]] * 70
    summary = summarize(scores)
    assert list(summary) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    assert summary["avg@4"].mean == pytest.approx(0.3 * 0.5 + 0.7 * 0.125)
    assert summary["pass@1"].mean == pytest.approx(0.15)  # half credit is no pass
    assert summary["pass@4"].mean == pytest.approx(0.3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert summary["pass@4"].low == pytest.approx(0.3 - half, abs=0.02)
    assert summary["pass@4"].high == pytest.approx(0.3 + half, abs=0.02)
    with pytest.raises(ValueError, match="same number of samples"):
        summarize([[1.0], [1.0, 0.0]])


@pytest.mark.parametrize(("right", "questions"), [(0, 4), (4, 4), (1, 2), (3, 10), (99, 100)])
def test_zeros_and_ones_have_the_interval_of_the_score_test(right, questions):
    """Wilson's ends are where |p - mean| is 1.96 standard errors of p, not of the mean."""
    found = proportion([1.0] * right + [0.0] * (questions - right))
    assert found.mean == right / questions
    for end in (found.low, found.high):
        if end not in (0.0, 1.0):
            error = math.sqrt(end * (1 - end) / questions)
            assert abs(end - found.mean) / error == pytest.approx(1.959964, rel=1e-5)
    assert found.low < found.high
    assert (found.low == 0.0) == (right == 0)
    assert (found.high == 1.0) == (right == questions)


def test_nothing_right_is_no_proof_of_zero():
    none, all_right = summarize([[0.0] * 4] * 4), summarize([[1.0] * 4] * 4)
    for name in ("avg@4", "pass@1", "pass@4"):
        assert none[name].low == none[name].mean == 0.0
        assert none[name].high == pytest.approx(0.4899, abs=1e-4)  # of 4 questions, not 16
        assert all_right[name].low == pytest.approx(0.5101, abs=1e-4)
    alike = proportion([0.5] * 4, samples=4)
    assert alike.low < 0.2 < 0.8 < alike.high
    with pytest.raises(ValueError, match=r"values: expected numbers in \[0, 1\]"):
        proportion([])
    with pytest.raises(ValueError, match=r"values: expected numbers in \[0, 1\]"):
        proportion([1.5])


@pytest.mark.parametrize(("questions", "samples"), [(4, 1), (5, 4), (30, 4), (10, 16)])
def test_intervals_hold_the_truth_as_often_as_they_say(questions, samples):
    """Questions of unequal difficulty, in beta distributions with known means."""
    rng = np.random.default_rng(0)
    covered = []
    for a, b in ((0.5, 2.0), (2.0, 2.0), (5.0, 0.5)):
        for _ in range(300):
            right = rng.binomial(samples, rng.beta(a, b, questions)) / samples
            found = proportion(right, samples)
            covered.append(found.low <= a / (a + b) <= found.high)
    assert np.mean(covered) > 0.92  # a bootstrap holds it in 59 % of the first case


def test_evaluate_writes_answers_and_resumes(tmp_path, model_folder, capsys, monkeypatch):
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps(ALPACA))
    cfg = make_cfg(tmp_path, model_folder, benchmark="alpaca_eval_2", data=str(data))
    run.run(cfg)
    files = {p.name: p.read_bytes() for p in (tmp_path / "run/alpaca_eval_2").iterdir()}
    name = model_folder.name
    assert set(files) == {f"{name}-thinking.json", f"{name}-no_thinking.json"}
    rows = json.loads(files[f"{name}-no_thinking.json"])
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ALPACA]
    assert "</think>" not in "".join(row["output"] for row in rows)
    responses = tmp_path / "run/responses.jsonl"
    whole = responses.read_bytes()
    responses.write_bytes(whole[: len(whole) // 2])
    run.run(cfg)
    assert responses.read_bytes() == whole
    monkeypatch.setattr(sample, "sample_batch", None)  # nothing is left to sample
    run.run(cfg)
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "run/alpaca_eval_2").iterdir()}
    cfg.temperature = 0.9
    with pytest.raises(
        ValueError, match=r"sample\.temperature: expected 0\.6 \(the samples\), got 0\.9"
    ):
        run.run(cfg)


def test_evaluate_judges_reasoning_gym(tmp_path, model_folder, capsys):
    cfg = make_cfg(
        tmp_path, model_folder, benchmark="reasoning_gym", limit=3, samples=2, modes=["no_thinking"]
    )
    run.run(cfg)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["results"]) == {"no_thinking"}
    judged = results["results"]["no_thinking"]
    assert set(judged["summary"]) == {"avg@2", "pass@1", "pass@2"}
    assert [len(row) for row in judged["scores"].values()] == [2, 2, 2]
    assert judged["counts"]["responses"] == 6
    printed = capsys.readouterr().out
    assert "avg@2, %" in printed
    rows = dict(line.split() for line in printed.splitlines() if len(line.split()) == 2)
    for name in ("responses", "unjudged", "missing_close", "unfinished", "empty_answer"):
        assert int(rows[name]) == judged["counts"][name]


def test_temperature_zero_takes_the_likeliest_token(model_folder):
    cfg = RunConfig(
        model=ModelConfig(name=str(model_folder), compute_dtype="float32"),
        sample=SampleConfig(num_responses=1, temperature=0.0),
    )
    sampler = sample.load_sampler(cfg)
    ids = [5, 6, 7]
    ((drawn,),) = sampler.draw([ids], 4, seed=0)
    import torch

    expected = list(ids)
    for _ in drawn:
        logits = sampler.model(torch.tensor([expected])).logits[0, -1]
        expected.append(int(logits.argmax()))
    assert drawn == expected[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1"),
        ({"temperature": 0.0, "samples": 2}, "samples: expected 1 at temperature 0"),
        ({"top_p": 0.0}, "temperature, top_p"),
        ({"modes": []}, "modes: expected"),
        ({"limit": 0}, "limit: expected"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run.run(make_cfg(tmp_path, **options))


def fake_vllm(calls: list) -> types.ModuleType:
    """The part of vLLM's interface that is used; its stop id is left out of the second response."""
    module = types.ModuleType("vllm")

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def get_default_sampling_params(self):
            return types.SimpleNamespace(stop_token_ids=[40])

        def generate(self, requests, params, use_tqdm):
            calls.append((requests, params))
            made = [([9, 40], "stop", 40), ([9, 8], "stop", None), ([9, 8], "length", None)]
            outputs = [
                types.SimpleNamespace(token_ids=ids, finish_reason=reason, stop_reason=stop)
                for ids, reason, stop in made
            ]
            return [types.SimpleNamespace(outputs=outputs) for _ in requests]

    module.LLM = LLM
    module.SamplingParams = lambda **options: options
    module.TokensPrompt = lambda **options: options
    return module


def test_vllm_serves_the_same_calls(model_folder, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(calls))
    cfg = RunConfig(model=ModelConfig(name=str(model_folder)), sample=SampleConfig(num_responses=3))
    sampler = engines.VLLMSampler(cfg)
    assert sampler.ends == [1, 40]
    drawn = sampler.draw([[5, 6], [7]], 11, seed=2**40 + 3)
    assert drawn == [[[9, 40], [9, 8, 1], [9, 8]]] * 2
    requests, params = calls[1]
    assert requests == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    assert params["n"] == 3
    assert params["max_tokens"] == 11
    assert params["stop_token_ids"] == [1, 40]
    assert [sample.describe(sampler, ids)["finished"] for ids in drawn[0]] == [True, True, False]


def test_engine_choice(monkeypatch):
    # Not `find_spec` itself: pytest needs it.
    nothing = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(engines, "importlib", types.SimpleNamespace(util=nothing))
    assert engines.choose("auto") == "transformers"
    with pytest.raises(ValueError, match="engine: expected an installed vllm"):
        engines.choose("vllm")


def test_command_line():
    command, cfg = cli.parse(["evaluate", "--benchmark", "aime_2024", "--samples", "4"])
    assert command == "evaluate"
    assert isinstance(cfg, EvaluateConfig)
    assert (cfg.benchmark, cfg.samples, cfg.max_new_tokens) == ("aime_2024", 4, 8192)


@pytest.mark.parametrize("name", ["pairs", "bvpo", "dpo", "simpo", "evaluate"])
def test_paper_presets_parse_and_mark_every_value(name):
    path = Path("train/presets/paper") / f"{name}.yaml"
    _, cfg = cli.parse(["evaluate" if name == "evaluate" else "train", "--config", str(path)])
    assert cfg.model.empty_trace == "<think></think>"
    values = [
        line
        for line in path.read_text().splitlines()
        if ":" in line and not line.strip().startswith("#") and not line.rstrip().endswith(":")
    ]
    assert values
    for line in values:
        mark = line.partition("# ")[2]
        assert mark.startswith(("paper", "public review", "ours")), line
