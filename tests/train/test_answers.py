"""Where an answer stands in a text, and whether it is the gold one."""

import sys
import time

import pytest
from judged_answers import ROWS

from train.preferences.answers import MathVerify, find_answer, last_box, normalize


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("math_verify")
    return MathVerify()


@pytest.mark.parametrize("name", ROWS)
def test_right_answers_score_one_and_wrong_ones_zero(judge, name):
    wrong = [
        (gold, response, f"expected {right}")
        for gold, response, right in ROWS[name]
        if judge.is_right(gold, response) != right
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "gold", sorted({gold for rows in ROWS.values() for gold, _, right in rows if right})
)
def test_a_gold_answer_is_right_however_it_is_wrapped(judge, gold):
    for text in (gold, rf"So \boxed{{{gold.strip('$')}}}.", f"<answer>{gold}</answer>"):
        assert judge.is_right(gold, text), text
    assert judge({"task": {"entry": {"answer": gold}}}, f"**Answer:** {gold}") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"a \boxed{1} b \boxed{ {2} } c", "{2}"),
        (r"\boxed{\{1, 2\}} then }", r"\{1, 2\}"),
        (r"\fbox{3}", "3"),
        (r"\boxed 4", "4"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{6", "6"),
        (r"\boxed{", ""),
        ("none", None),
    ],
)
def test_last_box(text, expected):
    assert last_box(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} <answer> 2 </answer>", ("2", "tag")),
        (r"<answer>so \boxed{2}</answer>", ("2", "tag")),
        (r"Answer: 1, hence \boxed{2}", ("2", "box")),
        ("Answer: 1\n**Answer:** 2\n", ("2", "label")),
        ("The answer to part 3 is: 2", ("2", "label")),
        ("#### 2", ("2", "label")),
        ("## Final answer\n\n2", ("2", "label")),
        ("Nothing here answers it.", ("Nothing here answers it.", "text")),
        ("Answer:", ("Answer:", "text")),
    ],
)
def test_where_an_answer_stands(text, expected):
    assert find_answer(text) == expected


def test_normalize():
    assert normalize("1e3, 2.5E-2 and 1.5 \u00d7 10^{3}") == "1000, 0.025 and 1500"
    assert normalize("3 \u2212 \u00bd") == r"3 - \frac{1}{2}"
    assert normalize(r"1{,}000 and 12\,345 and 1 000 000") == "1000 and 12345 and 1000000"
    assert normalize("x2e3 and 2e3x") == "x2e3 and 2e3x"  # no number in them
    assert normalize("1e99") == r"1 \times 10^{99}"


def test_the_missing_package_is_named_with_the_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        ValueError, match=r"^rank\.judge: judging free answers .*'train'\), got none"
    ):
        MathVerify()
    with pytest.raises(ValueError, match=r"^benchmark: judging free .* math-verify"):
        MathVerify("benchmark")


@pytest.mark.parametrize("gold", ["Paris", "12 days"])
def test_a_loop_of_tokens_is_judged_in_no_time(judge, gold):
    start = time.monotonic()
    for loop in ("**a ", "1", "<answer>", "_", "answer ", "\\boxed{"):
        assert not judge.is_right(gold, loop * 5000)
    assert time.monotonic() - start < 10  # a search from every character would take minutes
