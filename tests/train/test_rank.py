import json
from pathlib import Path

import pytest
from tiny_chat import save_reward_model, write_lines

from train.config import RankConfig, RunConfig
from train.preferences import rank
from train.preferences.modes import NO_THINKING, THINKING
from train.preferences.pairs import load_pairs

META = {"settings": {"model.trace_close": "</think>", "model.name": "tiny"}, "command": "sampled"}


def response(text, ids=None, finished=True):
    """Ids that no text gives: pairs must hold the ids that were stored."""
    response.count += 1
    return {"ids": ids or [90, response.count, 2], "finished": finished, "text": text}


response.count = 100


def make_record(prompt_id, gold, thinking, no_thinking=()):
    parts = {THINKING: ([1, 11], thinking), NO_THINKING: ([1, 22], no_thinking)}
    return {
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": "1+1?"}],
        "task": {"name": "free_text", "entry": {"question": "", "answer": gold, "metadata": None}},
        "modes": {m: {"prompt_ids": p, "responses": list(r)} for m, (p, r) in parts.items()},
    }


def run(tmp_path, records, **options):
    write_lines(tmp_path / "responses.jsonl", records)
    (tmp_path / "responses.meta.json").write_text(json.dumps(META))
    cfg = RunConfig(run_dir=str(tmp_path), rank=RankConfig(**options))
    rank.run(cfg)
    lines = Path(rank.output_path(cfg)).read_text().splitlines()
    return [json.loads(line) for line in lines], load_pairs(rank.output_path(cfg)).meta


def test_best_and_worst_answers_make_the_pairs(tmp_path):
    thinking = [
        response("trace 2</think> 3"),
        response("2 </think> wrong </think>\n\n2"),
        response("</think> The answer is 2"),
        response("</think>4"),
    ]
    no_thinking = [response("5"), response("2"), response("x</think>2")]
    records = [make_record("p0", "2", thinking, no_thinking)]
    units, meta = run(tmp_path, records)
    # The first of the best and the first of the worst; ids and prompts exactly as stored.
    assert units == [
        {
            "unit_id": "p0",
            "prompt_id": "p0",
            "pairs": {
                "trace": [
                    {
                        "prompt_ids": [1, 11],
                        "chosen_ids": thinking[1]["ids"],
                        "rejected_ids": thinking[0]["ids"],
                        "chosen_reward": 1.0,
                        "rejected_reward": 0.0,
                    }
                ],
                "empty": [
                    {
                        "prompt_ids": [1, 22],
                        "chosen_ids": no_thinking[1]["ids"],
                        "rejected_ids": no_thinking[0]["ids"],
                        "chosen_reward": 1.0,
                        "rejected_reward": 0.0,
                    }
                ],
            },
        }
    ]
    assert meta["settings"] == META["settings"]
    assert meta["sample_command"] == "sampled"
    assert meta["counts"][THINKING]["accuracy"] == 0.5
    assert meta["counts"]["units_with_both_kinds"] == 1


def test_what_is_dropped_is_counted_under_its_reason(tmp_path, capsys):
    thinking = [
        response("</think>2", finished=False),  # hit the length, whatever it holds
        response("</think>2", ids=list(range(3, 13))),  # too long
        response("The answer is 2"),  # the trace was never closed
        response("2</think> \n"),  # nothing after it
        response("</think>3"),
        response("</think>2"),
    ]
    records = [
        make_record("p0", "2", thinking, [response("2"), response(" "), response("3")]),
        make_record("p1", "2", thinking[:5], [response("2"), response("2.0")]),
    ]
    units, meta = run(tmp_path, records, max_response_tokens=9)
    counts = meta["counts"]
    assert counts[THINKING] == {
        "prompts": 2,
        "responses": 11,
        "unfinished": 2,
        "too_long": 2,
        "missing_close": 2,
        "empty_answer": 2,
        "scored": 3,
        "fewer_than_two": 1,
        "ties": 0,
        "pairs": 1,
        "mean_score": pytest.approx(1 / 3, abs=1e-4),
        "accuracy": pytest.approx(1 / 11, abs=1e-4),
    }
    assert counts[NO_THINKING] == {
        "prompts": 2,
        "responses": 5,
        "unfinished": 0,
        "too_long": 0,
        "missing_close": 0,
        "empty_answer": 1,
        "scored": 4,
        "fewer_than_two": 0,
        "ties": 1,
        "pairs": 1,
        "mean_score": 0.75,
        "accuracy": 0.6,
    }
    assert [sorted(unit["pairs"]) for unit in units] == [["empty", "trace"]]
    assert units[0]["pairs"]["trace"][0]["chosen_ids"] == thinking[5]["ids"]
    printed = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in printed if line.startswith("missing_close"))
    assert row == ["missing_close", "2", "0"]
    assert "units 1, of them with both kinds 1" in printed


def partial(prompt_id, *words):
    """A prompt of a task with partial credit: the share of letters in place."""
    record = make_record(prompt_id, "abcd", [response(f"</think>{word}") for word in words])
    record["task"]["name"] = "spell_backward"
    return record


def test_a_margin_below_the_minimum_is_a_tie(tmp_path):
    records = [partial("near", "abcx", "abxx"), partial("far", "abcd", "axxx")]
    units, meta = run(tmp_path, records, min_margin=0.5)
    assert [unit["unit_id"] for unit in units] == ["far"]
    assert units[0]["pairs"]["trace"][0]["chosen_reward"] == 1.0
    assert units[0]["pairs"]["trace"][0]["rejected_reward"] == 0.25
    assert meta["counts"][THINKING]["ties"] == 1
    assert len(run(tmp_path, records, min_margin=0.2)[0]) == 2


def test_equal_scores_are_a_tie_at_any_margin(tmp_path):
    records = [partial("equal", "abcx", "abxd"), partial("far", "abcd", "axxx")]
    assert [unit["unit_id"] for unit in run(tmp_path, records, min_margin=0.0)[0]] == ["far"]


def test_both_kinds_may_be_required(tmp_path):
    two = [response("</think>2"), response("</think>3")]
    records = [
        make_record("one", "2", two, [response("2"), response("2")]),
        make_record("both", "2", two, [response("2"), response("3")]),
    ]
    units, meta = run(tmp_path, records)
    assert [sorted(unit["pairs"]) for unit in units] == [["trace"], ["empty", "trace"]]
    assert meta["counts"]["units_with_both_kinds"] == 1
    units, _ = run(tmp_path, records, both_kinds=True)
    assert [unit["unit_id"] for unit in units] == ["both"]


def test_the_markers_are_those_of_the_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(META, "settings", {"model.trace_close": "[/T]"})
    texts = ["</think>3[/T]2", "2[/T]3", "2</think>2"]
    units, meta = run(tmp_path, [make_record("p", "2", map(response, texts))])
    assert len(units) == 1
    assert meta["counts"][THINKING]["missing_close"] == 1


def test_reward_model_sees_the_answer_and_not_the_trace(tmp_path):
    folder = save_reward_model(tmp_path / "rm")
    same = [response("one trace</think>2"), response("another</think>\n2")]
    other = [response("trace</think>2"), response("trace</think>3")]
    records = [make_record("same", None, same), make_record("other", None, other)]
    units, meta = run(tmp_path, records, judge="reward_model", reward_model=str(folder))
    assert [unit["unit_id"] for unit in units] == ["other"]
    pair = units[0]["pairs"]["trace"][0]
    assert pair["chosen_reward"] > pair["rejected_reward"]
    assert meta["counts"][THINKING]["ties"] == 1
    assert "accuracy" not in meta["counts"][THINKING]


def test_no_pair_at_all_is_an_error_with_the_counts(tmp_path, capsys):
    records = [make_record("p", "2", [response("</think>3"), response("</think>4")])]
    message = (
        r"responses\.jsonl: no prompt gave a pair: thinking 1 ties; no_thinking 1 fewer_than_two "
        r"\(ties: all answers of a prompt score the same: more or easier prompts"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, records)
    assert "ties" in capsys.readouterr().out
    assert not (tmp_path / "pairs.jsonl").exists()


def test_an_incomplete_last_line_is_left_out_with_a_message(tmp_path, capsys):
    pairs = [response("</think>2"), response("</think>3")]
    write_lines(tmp_path / "responses.jsonl", [make_record(p, "2", pairs) for p in "abc"])
    text = (tmp_path / "responses.jsonl").read_text()
    (tmp_path / "responses.jsonl").write_text(text[:-20])
    (tmp_path / "responses.meta.json").write_text(json.dumps(META))
    cfg = RunConfig(run_dir=str(tmp_path))
    rank.run(cfg)
    assert [unit.unit_id for unit in load_pairs(rank.output_path(cfg)).units] == ["a", "b"]
    assert "responses.jsonl:3: this last line is incomplete" in capsys.readouterr().out


def test_malformed_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"responses\.jsonl: no such file; run `sample`"):
        rank.run(RunConfig(run_dir=str(tmp_path)))
    (tmp_path / "responses.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl:1: expected a line of responses"):
        rank.run(RunConfig(run_dir=str(tmp_path)))
    write_lines(tmp_path / "responses.jsonl", [make_record("p", "2", [])])
    with pytest.raises(FileNotFoundError, match=r"responses\.meta\.json"):
        rank.run(RunConfig(run_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["prompt_id"], None, "prompt_id: expected a text, got None"),
        (["prompt_id"], 3, "prompt_id: expected a text, got 3"),
        (["messages"], None, "messages: expected a list, got None"),
        (["task"], None, "task: expected a name and an entry, got None"),
        (["task", "entry"], "x", "task: expected a name and an entry"),
        (["task", "entry", "answer"], 2, r"task\.entry\.answer: expected a text or null, got 2"),
        (["modes"], [], r"modes: expected an object with \['thinking', 'no_thinking'\], got \[\]"),
        (["modes"], {"slow": {}}, "modes: expected an object with"),
        (["modes", THINKING], None, r"modes\.thinking: expected an object with prompt_ids"),
        (["modes", THINKING, "responses"], None, r"modes\.thinking: expected an object with"),
        (["modes", THINKING, "prompt_ids"], [1, None], r"thinking\.prompt_ids: expected a list of"),
        (["modes", THINKING, "responses", 0], "x", r"responses\[0\]: expected an object, got 'x'"),
        (["modes", THINKING, "responses", 0, "ids"], [], r"\[0\]\.ids: expected a list of token"),
        (["modes", THINKING, "responses", 0, "ids"], None, r"\[0\]\.ids: expected a list of tok"),
        (["modes", THINKING, "responses", 0, "ids"], [True], r"\[0\]\.ids: .*got \[True\]"),
        (["modes", THINKING, "responses", 0, "ids"], [-1], r"\[0\]\.ids: .*got \[-1\]"),
        (["modes", THINKING, "responses", 0, "text"], None, r"\[0\]\.text: expected a text, got"),
        (["modes", THINKING, "responses", 0, "text"], "\ud800", "'modes': expected Unicode text"),
        (["modes", THINKING, "responses", 0, "finished"], None, r"\[0\]\.finished: expected true"),
    ],
)
def test_a_malformed_field_names_file_line_and_field(tmp_path, path, value, message):
    records = [make_record(p, "2", [response("</think>2")]) for p in "ab"]
    place = records[1]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=rf"responses\.jsonl:2: {message}|jsonl:2: .*{message}"):
        run(tmp_path, records)


def test_responses_of_one_mode_are_refused(tmp_path):
    record = make_record("p", "2", [response("</think>2")])
    del record["modes"][NO_THINKING]
    message = (
        r"responses\.jsonl:1: modes: expected \['thinking', 'no_thinking'\], got \['thinking'\]"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, [record])


def test_blank_lines_are_passed_over_and_no_line_at_all_is_an_error(tmp_path):
    pair = [response("</think>2"), response("</think>3")]
    run(tmp_path, [make_record("p", "2", pair)])
    path = tmp_path / "responses.jsonl"
    path.write_text("\n" + path.read_text() + "  \n")
    rank.run(RunConfig(run_dir=str(tmp_path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl: expected at least one prompt"):
        rank.run(RunConfig(run_dir=str(tmp_path)))


@pytest.mark.parametrize("meta", [{}, {"settings": None}, {"settings": {"model.trace_close": ""}}])
def test_a_damaged_sidecar_is_named(tmp_path, monkeypatch, meta):
    monkeypatch.setattr("test_rank.META", meta)
    with pytest.raises(ValueError, match=r"meta\.json: settings: expected model\.trace_close"):
        run(tmp_path, [make_record("p", "2", [])])


@pytest.mark.parametrize(
    ("texts", "options", "reason"),
    [
        (["x", "y"], {}, "2 missing_close"),
        (["</think>2", "</think>3"], {"max_response_tokens": 2}, "2 too_long"),
        (["</think>", "</think> "], {}, "2 empty_answer"),
    ],
)
def test_the_reason_why_there_is_no_pair_is_named(tmp_path, texts, options, reason):
    record = make_record("p", "2", [response(text) for text in texts])
    with pytest.raises(ValueError, match=rf"gave a pair: thinking {reason}, 1 fewer_than_two"):
        run(tmp_path, [record], **options)


def test_a_judge_that_gives_nan_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "build_judge", lambda cfg: lambda record, answer: float("nan"))
    with pytest.raises(ValueError, match=r"rank\.judge: expected finite scores, got nan .* p"):
        run(tmp_path, [make_record("p", "2", [response("</think>3")])])
