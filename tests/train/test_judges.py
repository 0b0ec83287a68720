import sys

import pytest
import torch
from tiny_chat import make_tokenizer, save_reward_model
from transformers import AutoModelForSequenceClassification

from train.config import RankConfig
from train.preferences.judges import (
    RewardModel,
    Verifier,
    build_judge,
    check_judge,
    extract_final_answer,
)
from train.preferences.prompts import Prompt


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("<answer> 4 </answer> then <answer>5</answer>. 6", "5", "5"),
        (r"So \boxed{12} and not 13", "12", "12"),
        ("Answer: 7\nBut 8 is near.", "7", "7"),
        ("First answer: 3. The final Answer is: **1,234**", "1234", "1234"),
        ("It was 5, and then -2.5 more", "1", "-2.5"),
        ("no digits", "1", "no digits"),
        ("The duration is 4 days, or 96 hours.", "12 days", "4 days"),
        ("1 day", "12 days", "1 days"),
        ("a while", "12 days", "a while"),
        (' **"a, b, c"**. ', "c, b, a", "a, b, c"),
        ("He sleeps.", "She sleeps.", "He sleeps."),
        ("Yes.", "Yes", "Yes"),
        ("anything", None, "anything"),
        ("Answer:", "1 2", "Answer:"),
        (r"So \boxed{\text{12} } and not 13", "12", "12"),
        (r"\boxed{\text{abc}}", "abc", "abc"),
        ("Answer: 5. This follows from the 3 that remain.", "5", "5"),
        ("The answer is 5, as 2 and 3 make it.", "5", "5"),
        ("Answer: 2 + 3 = 5", "5", "5"),
        ("It is \u22123", "-3", "-3"),
        ("It is $12", "12", "12"),
        ("It is 1e3", "1000", "1000"),
        ("Answer:\n1 2\n3 4", "1 2\n3 4", "1 2\n3 4"),
        ("a**b**", "a**b**", "a**b"),
    ],
)
def test_final_answer(text, gold, expected):
    assert extract_final_answer(text, gold) == expected


def record(name, answer, **metadata):
    entry = {"question": "?", "answer": answer, "metadata": metadata}
    return {"prompt_id": "p9", "messages": [], "task": {"name": name, "entry": entry}}


@pytest.mark.parametrize(
    ("name", "gold", "answer", "score"),
    [
        ("free_text", "1,200", "It is 1200.0", 1.0),
        ("free_text", "1200", "It is 1201", 0.0),
        ("free_text", "New  York", "new york.", 1.0),
        ("free_text", "New York", "York", 0.0),
        ("free_text", r"\frac{1}{2}", r"so \boxed{\frac{1}{2}}", 1.0),
        ("free_text", "2", r"so \boxed{\frac{1}{2}}", 0.0),
        ("chain_sum", "7", "The sum is 7", 1.0),
        ("chain_sum", "7", "8", 0.0),
        # Two of three letters stand where they should: reasoning-gym's partial credit.
        ("spell_backward", "tac", "tab", 2 / 3),
    ],
)
def test_verifier(name, gold, answer, score):
    assert Verifier()(record(name, gold), answer) == pytest.approx(score)


def test_verifier_needs_a_gold_answer():
    with pytest.raises(ValueError, match=r"rank\.judge: expected a gold answer for prompt 'p9'"):
        Verifier()(record("free_text", None), "x")


def prompt(answer="1", name="free_text", messages=()):
    entry = {"question": "?", "answer": answer, "metadata": None}
    return Prompt("p9", list(messages), {"name": name, "entry": entry})


def test_the_judge_is_checked_before_anything_is_sampled(monkeypatch):
    check_judge(RankConfig(), [prompt(), prompt("7", "chain_sum")])
    message = r"rank\.judge: expected a gold `answer` .*, got none for 1 of 2, the first 'p9'"
    with pytest.raises(ValueError, match=message):
        check_judge(RankConfig(), [prompt(), prompt(None)])
    with pytest.raises(ValueError, match=r"rank\.judge: expected a task .*, got 'no_such_task'"):
        check_judge(RankConfig(), [prompt(name="no_such_task")])
    check_judge(RankConfig(judge="none"), [prompt(None)])
    with pytest.raises(ValueError, match=r"rank\.judge: expected verifier or .*, got none"):
        build_judge(RankConfig(judge="none"))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"rank\.judge: judging free .*math-verify"):
        check_judge(RankConfig(), [prompt()])
    check_judge(RankConfig(), [prompt("7", "chain_sum")])  # needs no such package


def test_the_reward_model_is_checked_without_its_weights(tmp_path):
    folder = save_reward_model(tmp_path / "rm")
    (folder / "model.safetensors").unlink()
    cfg = RankConfig(judge="reward_model", reward_model=str(folder))
    turn = {"role": "user", "content": "1+1?"}
    check_judge(cfg, [prompt(None, messages=[turn])])
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    check_judge(cfg, [prompt(None, messages=[turn])])
    message = r"rank\.reward_model: .* the roles \['system', 'user'\], got .* \(No system\)"
    with pytest.raises(ValueError, match=message):
        check_judge(cfg, [prompt(None, messages=[{"role": "system", "content": "x"}, turn])])
    template.unlink()
    with pytest.raises(ValueError, match=r"rank\.reward_model: .* chat template"):
        check_judge(cfg, [prompt(None)])
    with pytest.raises(ValueError, match=r"rank\.reward_model: expected a path .*, got None"):
        check_judge(RankConfig(judge="reward_model"), [prompt(None)])
    cfg.reward_model = str(tmp_path / "nothing")
    with pytest.raises((FileNotFoundError, ValueError), match=r"^rank\.reward_model: expected"):
        check_judge(cfg, [prompt(None)])


def test_reward_model_scores_prompt_and_answer(tmp_path):
    folder = save_reward_model(tmp_path)
    judge = build_judge(RankConfig(judge="reward_model", reward_model=str(folder)))
    turn = {"messages": [{"role": "user", "content": "1+1?"}]}
    text = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is 2<|im_end|>\n"
    ids = make_tokenizer()(text, return_tensors="pt").input_ids
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.item()
    assert judge(turn, "It is 2") == pytest.approx(expected, rel=1e-5)
    assert judge(turn, "It is 3") != pytest.approx(expected, rel=1e-3)


def test_reward_model_must_give_one_score(tmp_path):
    judge = RewardModel(str(save_reward_model(tmp_path, num_labels=3)))
    with pytest.raises(ValueError, match=r"rank\.reward_model: expected one score .*, got 3"):
        judge({"messages": [{"role": "user", "content": "x"}]}, "y")


def test_reward_model_errors_name_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"rank\.reward_model: expected a path .*, got None"):
        build_judge(RankConfig(judge="reward_model"))
    with pytest.raises((FileNotFoundError, ValueError), match=r"^rank\.reward_model: expected"):
        RewardModel(str(tmp_path / "nothing"))
    folder = save_reward_model(tmp_path / "mute")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"rank\.reward_model: .* chat template"):
        RewardModel(str(folder))
