import json

import pytest
from datasets import Dataset
from tiny_chat import write_lines

from train.config import PromptsConfig
from train.preferences.judges import Verifier
from train.preferences.prompts import load_prompts


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
        ('{"prompt": null}', "expected a text `prompt` or .*, got prompt None"),
        ('{"prompt": 3}', "expected a text `prompt` or .*, got prompt 3"),
        ('{"prompt": ["x"]}', r"expected a text `prompt` or .*, got prompt \['x'\]"),
        ('{"messages": "x"}', "expected `messages` as a list of .*, got 'x'"),
        ('{"messages": [null]}', "expected `messages` as a list of .*, got None"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages` as .*'content': None"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "expected `messages` as .*'role': 1"),
        ('{"messages": [{"role": "user", "content": " "}]}', "that end with a text"),
        ('{"prompt": "y", "answer": {"a": 1}}', "answer: expected a text or a number, got {'a': 1"),
        ('{"prompt": "y", "answer": true}', "answer: expected a text or a number, got True"),
        ('{"prompt": "y", "answer": NaN}', "answer: expected a text or a number, got nan"),
        ('{"prompt": "y", "answer": " "}', "answer: expected a text, got ' '"),
        ('{"prompt": "y", "id": ["a"]}', r"id: expected a text or a number, got \['a'\]"),
        ('{"prompt": "y", "tools": "add"}', "tools: expected a list of JSON schemas, got 'add'"),
        (r'{"prompt": "y \ud83d"}', r"'prompt': expected Unicode .* half .*, '.ud83d'"),
        (r'{"prompt": "y", "metadata": ["\udc00"]}', "'metadata': expected Unicode text"),
        (r'{"messages": [{"role": "user", "content": "\uD800"}]}', "'messages': expected Unicode"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "id": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{message}"):
        from_jsonl(path)


def test_whole_pairs_of_surrogates_nulls_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '\n  \n{"prompt": "\\ud83d\\ude00", "id": null, "answer": null}\n\r\n'
        '{"prompt": "y", "id": null, "answer": 0, "tools": null}\n'
    )
    first, second = from_jsonl(path)
    assert first.messages == [{"role": "user", "content": "\N{GRINNING FACE}"}]
    assert first.task["entry"]["answer"] is None
    assert second.task["entry"]["answer"] == "0"
    assert second.tools is None
    assert len({first.prompt_id, second.prompt_id, "None"}) == 3


def test_what_a_template_may_read_is_kept(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1+1?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    records = [{"messages": turns, "tools": tools}, {"messages": turns}]
    first, second = from_jsonl(write_lines(tmp_path / "p.jsonl", records))
    assert (
        first.messages
        == second.messages
        == [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "c"},
        ]
    )
    assert (first.tools, second.tools) == (tools, None)
    assert first.prompt_id != second.prompt_id


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
    with pytest.raises(ValueError, match=r"prompts\.path: .*empty\.jsonl: expected at least one"):
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
