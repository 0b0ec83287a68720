"""`evaluate` beside alpaca-eval, lm-eval and lighteval: their code on our files, models, questions.

Their dependencies outnumber the package's own, so `make consumers` installs them apart and runs
this file; elsewhere each test is skipped by the name of what is missing.
"""

import json
from pathlib import Path

import pytest
from tiny_chat import QWEN3_TEMPLATE, make_tokenizer, save_causal_lm, write_lines
from transformers import GenerationConfig

from train.config import ModelConfig
from train.evaluation import run, writers
from train.evaluation.config import EvaluateConfig
from train.evaluation.intervals import pass_at, summarize
from train.evaluation.questions import SOURCES, load_questions
from train.preferences.answers import MathVerify

INSTRUCTIONS = [{"instruction": f"Say {n}.", "dataset": "helpful_base"} for n in range(5)]
PROBLEMS = [{"id": n, "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]


def consumer(name: str):
    """A module of another package; pkg_resources and the like fail as other import errors do."""
    return pytest.importorskip(name, exc_type=ImportError)


def answer_file(folder: Path, generator: str, texts: list[str]) -> Path:
    answers = [writers.Answer(r, t, 1) for r, t in zip(INSTRUCTIONS, texts, strict=True)]
    return writers.write_answers("alpaca_eval_2", answers, generator, folder)


def test_alpaca_eval_puts_our_files_on_its_leaderboard(tmp_path):
    """Its own `evaluate`, which loads, merges and ranks; only the judge is not GPT-4."""
    evaluate = consumer("alpaca_eval.main").evaluate
    annotators = consumer("alpaca_eval.annotators.pairwise_evaluator")

    class LongerWins(annotators.PairwiseAnnotatorLocal):
        def __init__(self, annotators_config):
            self.input_keys = ("instruction",)

        def __call__(self, pairs):
            longer = pairs["output_2"].str.len() > pairs["output_1"].str.len()
            return pairs.assign(preference=1.0 + longer).to_dict("records")

    # Of five answers three are longer than the reference's; one never closed its trace.
    ours = answer_file(tmp_path, "tiny-thinking", ["long answer"] * 3 + ["x", ""])
    theirs = answer_file(tmp_path, "reference", ["answer"] * 5)
    board, annotations = evaluate(
        str(ours),
        str(theirs),
        annotators_config=None,
        Annotator=LongerWins,
        output_path=None,
        precomputed_leaderboard=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
        is_return_instead_of_print=True,
    )
    assert list(board.index) == ["tiny-thinking"]
    assert board.loc["tiny-thinking", "win_rate"] == pytest.approx(60.0)
    assert board.loc["tiny-thinking", "n_total"] == 5
    assert board.loc["tiny-thinking", "avg_length"] == (3 * len("long answer") + 1) // 5
    assert {row["dataset"] for row in annotations} == {"helpful_base"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = save_causal_lm(tmp_path_factory.mktemp("model"))
    GenerationConfig(eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    make_tokenizer(QWEN3_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["thinking", "no_thinking"])
def test_lm_eval_runs_the_model_and_gets_our_prompts_and_answers(tmp_path, model_folder, mode):
    """Greedy, so that the same prompt ids give the same response."""
    simple_evaluate = consumer("lm_eval").simple_evaluate
    data = write_lines(tmp_path / "q.jsonl", PROBLEMS)
    cfg = EvaluateConfig(
        run_dir=str(tmp_path / "run"),
        benchmark="math",
        data=str(data),
        modes=[mode],
        model=ModelConfig(name=str(model_folder), compute_dtype="float32"),
        temperature=0.0,
        max_new_tokens=8,
        batch=3,
        engine="transformers",
    )
    run.run(cfg)
    lines = map(json.loads, (tmp_path / "run" / "responses.jsonl").open())
    ours = {line["prompt_id"]: line["modes"][mode]["responses"][0]["text"] for line in lines}
    task = {
        "task": "sums",
        "dataset_path": "json",
        "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{problem}}\n\n" + cfg.instruction,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = simple_evaluate(
        "hf",
        {
            "pretrained": str(model_folder),
            "device": "cpu",
            "dtype": "float32",
            "enable_thinking": mode == "thinking",
            "think_end_token": "</think>",
        },
        [task],
        batch_size=1,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = found["samples"]["sums"]
    tokenizer = make_tokenizer(QWEN3_TEMPLATE)
    for sample in samples:
        (prompt, _), *_ = (instance for instance in sample["arguments"])
        question = {"role": "user", "content": sample["doc"]["problem"] + "\n\n" + cfg.instruction}
        assert prompt == tokenizer.apply_chat_template(
            [question],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=mode == "thinking",
        )
        assert sample["resps"][0][0].strip() == ours[str(sample["doc"]["id"])].strip()
    assert len(samples) == len(ours) == len(PROBLEMS)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("25", "so $25$"),
        ("025", "\\boxed{25}"),
        ("25", "\\boxed{24}"),
        ("7", "First 7, \\boxed{8}"),
        ("204", "The answer is \\boxed{204}."),
        ("204", "no idea"),
    ],
)
def test_lm_eval_judges_aime_answers_as_we_do(answer, text):
    """It compares strings, so a leading zero is the one thing to take out first."""
    judge = consumer("lm_eval.tasks.aime.utils").process_results
    consumer("math_verify")
    record = {"problem": "?", "answer": answer.lstrip("0")}
    ours = MathVerify()({"task": {"entry": {"answer": answer}}}, text)
    assert judge(record, [text])["exact_match"] == ours


def prompts_of(tmp_path, benchmark, records):
    data = write_lines(tmp_path / "q.jsonl", records)
    return load_questions(EvaluateConfig(benchmark=benchmark, data=str(data)))


def test_lm_eval_and_we_read_the_same_columns(tmp_path):
    """The data set, the split, the question and the gold answer of its own task files."""
    tasks = Path(consumer("lm_eval.tasks").__file__).parent
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        """Functions that a task names stay names."""

    Loader.add_multi_constructor("!function", lambda loader, _, node: node.value)
    spelled = {"id": 1, "problem": "1+1?", "answer": "2", "solution": "2"}
    for name, file in (
        ("aime_2025", "aime/aime25.yaml"),
        ("math_500", "minerva_math/minerva_math500.yaml"),
    ):
        theirs = yaml.load((tasks / file).read_text(), Loader)
        source = SOURCES[name]
        assert (source.path, source.split) == (theirs["dataset_path"], theirs["test_split"])
    theirs = yaml.load((tasks / "aime" / "aime24.yaml").read_text(), Loader)
    for column, field in (("doc_to_text", "Problem"), ("doc_to_target", "Answer")):
        assert field in theirs[column]
    copy = {"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2}  # the copy that its aime24 reads
    for record in (spelled, copy):
        (prompt,) = prompts_of(tmp_path, "aime_2024", [record])
        assert prompt.messages[0]["content"].startswith("1+1?")
        assert prompt.task["entry"]["answer"] == "2"


def test_lighteval_and_we_read_the_same_columns(tmp_path):
    aime = consumer("lighteval.tasks.tasks.aime")
    math_500 = consumer("lighteval.tasks.tasks.math_500")
    olympiad = consumer("lighteval.tasks.tasks.olympiade_bench")
    record = {
        "id": 1,
        "unique_id": "t/1",
        "problem": "1+1?",
        "question": "1+1?",
        "answer": "2",
        "final_answer": ["2", "3"],
        "subject": "Math",
        "language": "English",
        "unit": None,
        "answer_type": "Numerical",
        "is_multiple_answer": True,
    }
    subset = SOURCES["olympiad_bench"].subset
    readers = {
        "aime_2024": (aime.aime24, aime.record_to_sample),
        "math_500": (math_500.math_500, math_500.record_to_sample),
        "olympiad_bench": (None, olympiad.create_record_to_sample(subset)),
    }
    for name, (config, read) in readers.items():
        (prompt,) = prompts_of(tmp_path, name, [record])
        sample, source = read(record), SOURCES[name]
        assert "1+1?" in sample.input
        assert prompt.messages[0]["content"].startswith("1+1?")
        gold = sample.target if isinstance(sample.target, str) else ", ".join(sample.target)
        assert prompt.task["entry"]["answer"] == gold
        if config is not None:
            assert (source.path, source.split) == (config.hf_repo, config.evaluation_splits[0])
    (table,) = (task for task in olympiad.TASKS_TABLE if task.hf_subset == subset)
    assert table.hf_repo == SOURCES["olympiad_bench"].path


def test_lighteval_estimates_pass_at_k_as_we_do():
    metrics = consumer("lighteval.metrics.metrics_sample")
    for samples in (1, 3, 8):
        for correct in range(samples + 1):
            scores = [1] * correct + [0] * (samples - correct)
            for k in range(1, samples + 1):
                theirs = metrics.PassAtK(k=k, n=samples).pass_at_k(scores)
                assert pass_at(correct, samples, k) == pytest.approx(float(theirs))
            (name, mean), *_ = summarize([scores]).items()
            assert name == f"avg@{samples}"
            assert mean.mean == pytest.approx(correct / samples)
