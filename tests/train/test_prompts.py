import json

import pytest
from datasets import Dataset
from tiny_chat import write_lines

from train.config import PromptsConfig
from train.judges import Verifier
from train.prompts import load_prompts


def from_jsonl(path, **options):
    return load_prompts(PromptsConfig(source="jsonl", path=str(path), **options))


def test_jsonl_records(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        [{"prompt": "1+1?", "answer": 2, "id": 7, "metadata": {"k": 1}}, {"messages": turns}],
    )
    first, second = from_jsonl(path)
    assert first.prompt_id == "7"
    assert first.messages == [{"role": "user", "content": "1+1?"}]
    assert first.task == {
        "name": "free_text",
        "entry": {"question": "1+1?", "answer": "2", "metadata": {"k": 1}},
    }
    assert second.messages == turns
    assert second.task["entry"]["answer"] is None
    # Without an id of its own a prompt has that of its text.
    alone = from_jsonl(write_lines(tmp_path / "q.jsonl", [{"messages": turns}]))
    assert alone[0].prompt_id == second.prompt_id
    assert len(from_jsonl(path, size=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "expected a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "x"}', r"expected a text `prompt` or a list `messages`, got \['text'\]"),
        ('{"prompt": "  "}', "expected a text `prompt`"),
        ('{"messages": []}', "expected `messages`"),
        ('{"messages": [{"role": "user"}]}', "expected `messages`"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "before the assistant's turn"),
        ('{"prompt": "y", "id": "a"}', "expected a prompt of its own id, got 'a' again"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "id": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{message}"):
        from_jsonl(path)


def test_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"prompts\.path: expected a path"):
        load_prompts(PromptsConfig(source="jsonl"))
    with pytest.raises(FileNotFoundError, match=r"prompts\.path: expected a dataset"):
        load_prompts(PromptsConfig(source="datasets", path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"prompts\.size"):
        load_prompts(PromptsConfig(size=0))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="expected at least one prompt"):
        from_jsonl(tmp_path / "empty.jsonl")


def test_a_dataset_on_disk(tmp_path):
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    prompts = load_prompts(PromptsConfig(source="datasets", path=str(tmp_path / "set")))
    assert [p.messages[0]["content"] for p in prompts] == ["1+1?", "2+2?"]
    assert [p.task["entry"]["answer"] for p in prompts] == ["2", "4"]


TASKS = {"chain_sum": {"max_terms": 2}, "word_sorting": {"max_words": 4}}


def test_reasoning_gym_takes_tasks_in_turn_and_only_appends():
    few = load_prompts(PromptsConfig(tasks=TASKS, size=3, seed=5))
    many = load_prompts(PromptsConfig(tasks=TASKS, size=8, seed=5))
    assert [p.prompt_id for p in few] == ["chain_sum-5-0", "word_sorting-5-0", "chain_sum-5-1"]
    assert many[:3] == few
    assert load_prompts(PromptsConfig(tasks=TASKS, size=3, seed=6)) != few


def test_stored_entries_still_satisfy_their_verifier():
    verifier = Verifier()
    for prompt in load_prompts(PromptsConfig(tasks=TASKS, size=6)):
        record = {"prompt_id": "p", "task": json.loads(json.dumps(prompt.task))}
        assert verifier(record, prompt.task["entry"]["answer"]) == 1.0
        assert verifier(record, "nonsense") < 1.0


@pytest.mark.parametrize("tasks", [{}, {"no_such_task": {}}, {"chain_sum": {"min_terms": -1}}])
def test_unknown_tasks_and_options_are_refused(tasks):
    with pytest.raises(ValueError, match=r"prompts\.tasks"):
        load_prompts(PromptsConfig(tasks=tasks))
