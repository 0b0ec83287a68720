import json
from pathlib import Path

import pytest
from tiny_chat import write_lines

from bvpo_kernels.types import EMPTY, TRACE, TokenPair, Unit
from train.preferences.pairs import (
    data_fingerprint,
    load_pairs,
    meta_path,
    split_holdout,
    write_pairs,
)


def pair(prompt=(5, 6), chosen=(7, 2), rejected=(8, 9, 2), rewards=(1.0, 0.0)):
    return {
        "prompt_ids": list(prompt),
        "chosen_ids": list(chosen),
        "rejected_ids": list(rejected),
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
    }


def unit(name="u0", **pairs):
    return {"unit_id": name, "prompt_id": name, "pairs": pairs or {TRACE: [pair()]}}


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        unit("a", trace=[pair(), pair(chosen=(3,))], empty=[pair(prompt=(5, 6, 1))]),
        unit("b", empty=[pair()]),
    ]
    write_pairs(path, records, {"seed": 3})
    loaded = load_pairs(path)
    assert loaded.units == (
        Unit(
            "a",
            {
                TRACE: (TokenPair((5, 6), (7, 2), (8, 9, 2)), TokenPair((5, 6), (3,), (8, 9, 2))),
                EMPTY: (TokenPair((5, 6, 1), (7, 2), (8, 9, 2)),),
            },
        ),
        Unit("b", {EMPTY: (TokenPair((5, 6), (7, 2), (8, 9, 2)),)}),
    )
    assert loaded.meta == {"seed": 3, "fingerprint": data_fingerprint(loaded.units)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.meta.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [unit()], {})
    before = path.read_bytes()

    def broken():
        yield unit("other")
        raise RuntimeError("out of tokens")

    with pytest.raises(RuntimeError, match="out of tokens"):
        write_pairs(path, broken(), {})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def with_pair(**changes):
    return unit(trace=[{**pair(), **changes}])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"pairs": {TRACE: [pair()]}}, "unit_id: expected a text, got None"),
        (unit("u0"), "unit_id: expected a new one, got 'u0' again"),
        ({"unit_id": "x", "pairs": []}, "pairs: expected an object .* got list"),
        (unit("x", other=[pair()]), r"pairs: expected .* got \['other'\]"),
        (unit("x", trace={}), r"pairs\.trace: expected a list"),
        (unit("x", trace=[], empty=[]), "expected at least one pair"),
        (unit("x", trace=[pair(), 3]), r"pairs\.trace\[1\]: expected an object"),
        (with_pair(prompt_ids=[]), r"pairs\.trace\[0\]\.prompt_ids: expected a non-empty list"),
        (with_pair(chosen_ids=None), r"chosen_ids: expected a non-empty list"),
        (with_pair(chosen_ids=[1, -2]), r"chosen_ids: expected .* token ids"),
        (with_pair(rejected_ids=[1, 2.0]), r"rejected_ids: expected .* token ids"),
        (with_pair(rejected_ids=[True]), r"rejected_ids: expected .* token ids"),
        (with_pair(rejected_ids=[7, 2]), "expected different responses"),
        (with_pair(chosen_reward=float("nan")), "chosen_reward: expected a finite number"),
        (with_pair(chosen_reward=10**400), "chosen_reward: expected a finite number"),
        (with_pair(rejected_reward=True), "rejected_reward: expected a finite number, got True"),
        (with_pair(rejected_reward="1"), "rejected_reward: expected a finite number, got '1'"),
        (unit("\ud800"), r"'unit_id': expected Unicode text, got half of a surrogate"),
        ({"unit_id": None, "pairs": {}}, "unit_id: expected a text, got None"),
        ({"unit_id": "x", "pairs": None}, "pairs: expected an object .* got NoneType"),
        (unit("x", trace=None, empty=None), "expected at least one pair"),
        (unit("x", trace=[None]), r"pairs\.trace\[0\]: expected an object, got NoneType"),
    ],
)
def test_malformed_units_name_file_and_line(tmp_path, record, message):
    path = write_lines(tmp_path / "bad.jsonl", [unit("u0"), unit("u1"), record])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: .*{message}"):
        load_pairs(path)


def test_null_is_absent_where_a_field_may_be(tmp_path):
    """As a table with a column per field is written: kinds and rewards of some rows."""
    bare = {name: pair()[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    row = {**bare, "chosen_reward": None, "rejected_reward": None}
    path = write_lines(tmp_path / "pairs.jsonl", [unit(trace=[row], empty=None, marginal=None)])
    ids = (tuple(value) for value in bare.values())
    assert load_pairs(path).units == (Unit("u0", {TRACE: (TokenPair(*ids),)}),)


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = ["", json.dumps(unit("a")), "  ", "\t", json.dumps(unit("b")), ""]
    path.write_text("\n".join(lines))
    assert load_pairs(path).lines == {"a": f"{path}:2", "b": f"{path}:5"}
    path.write_text("\n".join([*lines, json.dumps(unit("a"))]))
    message = rf"{path}:7: unit_id: .*'a' again, which {path}:2 has; put all pairs of a prompt into"
    with pytest.raises(ValueError, match=message):
        load_pairs(path)
    for text in ("\n \n", "[" * 10**5, "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{path}"):
            load_pairs(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object"),
        ("", "expected a JSON object"),
        ("[" * 10**5, "expected a JSON object"),
        ("3", "expected a JSON object, got int"),
        ('{"settings": null}', "settings: expected an object, got NoneType"),
        ('{"settings": []}', "settings: expected an object, got list"),
        ('{"fingerprint": null}', "fingerprint: expected .*, got None"),
        ('{"fingerprint": [1]}', "fingerprint: expected .*, got \\[1\\]"),
    ],
)
def test_damaged_sidecars(tmp_path, text, message):
    path = write_lines(tmp_path / "pairs.jsonl", [unit()])
    meta_path(path).write_text(text)
    advice = "rank again, or remove the sidecar"
    with pytest.raises(ValueError, match=rf"pairs\.meta\.json.*{message}.*; {advice}"):
        load_pairs(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one unit"):
        load_pairs(tmp_path / "empty.jsonl")
    path = write_lines(tmp_path / "cut.jsonl", [unit()])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"cut\.jsonl:1"):
        load_pairs(path)


def test_nothing_is_written_for_a_malformed_unit(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: .*expected different responses"):
        write_pairs(path, [unit("a"), {**with_pair(rejected_ids=[7, 2]), "unit_id": "b"}], {})
    assert list(tmp_path.iterdir()) == []


def test_a_sidecar_of_other_units_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [unit("a"), unit("b")], {})
    write_lines(path, [unit("a")])
    with pytest.raises(ValueError, match=r"pairs\.meta\.json: fingerprint: expected"):
        load_pairs(path)
    meta_path(path).unlink()
    assert len(load_pairs(path).units) == 1


def test_the_shipped_pairs():
    path = Path("train/bundled/smollm2_pairs.jsonl")
    loaded = load_pairs(path)
    assert 64 <= len(loaded.units) <= 120
    assert all(set(u.pairs) == {TRACE, EMPTY} for u in loaded.units)
    assert path.stat().st_size < 2_000_000
    assert "runs/" not in loaded.meta["command"]
    for u in loaded.units:
        (trace,), (empty,) = u.pairs[TRACE], u.pairs[EMPTY]
        # Ended by SmolLM2's <|im_end|>, id 2, and by nothing before.
        responses = (trace.chosen, trace.rejected, empty.chosen, empty.rejected)
        assert all(ids.index(2) == len(ids) - 1 for ids in responses)
        # Each prompt ends with "<think>\n" or "<think>\n\n</think>\n\n" in SmolLM2's ids.
        assert trace.prompt[-4:] == (44, 17400, 46, 198)
        assert empty.prompt[-9:] == (44, 17400, 46, 198, 198, 9617, 17400, 46, 1116)


def make_units(count):
    return [Unit(f"u{i}", {TRACE: (TokenPair((1,), (i, 1), (i, 2)),)}) for i in range(count)]


def test_holdout_is_a_partition_that_ignores_the_order_of_the_file():
    units = make_units(50)
    training, held = split_holdout(units, 0.2, seed=1)
    assert len(held) == 10
    assert {u.unit_id for u in training} | {u.unit_id for u in held} == {f"u{i}" for i in range(50)}
    assert len(training) == 40
    shuffled = split_holdout(units[::-1], 0.2, seed=1)
    assert {u.unit_id for u in shuffled[1]} == {u.unit_id for u in held}
    # Fixed for good: a resumed run, on any machine, must hold out the same units.
    assert sorted(u.unit_id for u in split_holdout(make_units(8), 0.25, seed=0)[1]) == ["u0", "u6"]
    assert {u.unit_id for u in split_holdout(units, 0.2, seed=2)[1]} != {u.unit_id for u in held}


def test_holdout_shares():
    assert split_holdout(make_units(5), 0.0, 0)[1] == []
    assert len(split_holdout(make_units(5), 0.01, 0)[1]) == 1
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"train\.holdout: expected .*, got {share}"):
            split_holdout(make_units(5), share, 0)
    with pytest.raises(ValueError, match=r"train\.holdout: expected units to train on"):
        split_holdout(make_units(1), 0.5, 0)


def test_fingerprint_covers_every_id():
    base = Unit("u", {TRACE: (TokenPair((1, 2), (3,), (4,)),)})
    others = [
        Unit("v", base.pairs),
        Unit("u", {EMPTY: base.pairs[TRACE]}),
        *(
            Unit("u", {TRACE: (TokenPair(*ids),)})
            # The last one holds the same ids in the same order with another boundary.
            for ids in [
                ((9, 2), (3,), (4,)),
                ((1, 2), (9,), (4,)),
                ((1, 2), (3,), (9,)),
                ((1,), (2, 3), (4,)),
            ]
        ),
    ]
    prints = {data_fingerprint([u]) for u in [base, *others]}
    assert len(prints) == 1 + len(others)
    assert data_fingerprint([base]) == data_fingerprint([Unit("u", dict(base.pairs))])
