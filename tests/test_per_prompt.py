"""Arrays per prompt against loops over responses, hand-worked cases, and Arora's code transcribed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from record_kit import make_manifest, response_rows, write_rows

from kdbench.estimators import ESTIMATORS
from kdbench.evidence import COLUMNS, DIVERGENCES, ROLL_INS, Evidence, read_evidence
from kdbench.per_prompt import _loop_onset, _previous, _seq_rep, arrays
from kdbench.record import RecordError

Array = NDArray[Any]
Rows = list[dict[str, Any]]
VALUES = [*DIVERGENCES, "student_entropy", "teacher_entropy"]


def in_memory(rows: Rows) -> Evidence:
    """Evidence of rows in any order, sorted as `write_evidence` does."""
    order = ("example_id", "draw", "position")
    rows = sorted(rows, key=lambda row: (ROLL_INS.index(row["roll_in"]), *(row[name] for name in order)))
    columns = {name: np.array([row[name] for row in rows], dtype=kind) for name, kind in COLUMNS.items()}
    codes = np.array([ROLL_INS.index(row["roll_in"]) for row in rows], dtype=np.int8)
    return Evidence(columns, codes, make_manifest())


def random_rows(
    rng: np.random.Generator, roll_ins: dict[str, int], prompts: int = 4, longest: int = 9, tokens: int = 3
) -> Rows:
    """Random responses of 1 to `longest` tokens of `tokens` kinds and the end token; draws by roll-in."""
    rows: Rows = []
    for roll_in, draws in roll_ins.items():
        for prompt in range(prompts):
            for draw in range(draws):
                n, finished = int(rng.integers(1, longest + 1)), bool(rng.random() < 0.6)
                token = [int(t) for t in rng.integers(1, tokens + 1, n)]
                token[-1] = 0 if finished else token[-1]
                rows += random_response(rng, roll_in, 7 * prompt + 1, draw, token, finished)
    return rows


def random_response(
    rng: np.random.Generator, roll_in: str, prompt: int, draw: int, token: list[int], finished: bool
) -> Rows:
    """Rows of one response with random measurements, and two context rows with draw 0."""
    count = len(token) + (not finished)
    more: dict[str, Any] = {name: rng.random(count) for name in VALUES}
    more |= {name: -rng.random(count) for name in ("student_log_prob", "teacher_log_prob")}
    more["top1_agree"] = rng.random(count) < 0.5
    if not finished:  # as a collector leaves it
        more["student_log_prob"][-1] = more["teacher_log_prob"][-1] = np.nan
    rows = response_rows(roll_in, prompt, draw, [0.0] * count, finished, [*token, -1], **more)
    for position in (-2, -1) if draw == 0 else ():
        rows.append({**rows[0], "position": position, "token": 5, "alive": False, "context": True})
        rows[-1] |= {name: float(rng.random()) for name in VALUES}
    return rows


def by_hand(rows: Rows, roll_in: str, divergence: str, width: int) -> dict[str, Array]:
    """The arrays of one roll-in, response by response and token by token."""
    rows = [row for row in rows if row["roll_in"] == roll_in]
    prompts = sorted({row["example_id"] for row in rows})
    out: dict[str, Array] = {}

    def add(name: str, prompt: int, value: float, t: int | None = None) -> None:
        shape = (len(prompts),) if t is None else (len(prompts), width)
        out.setdefault(name, np.zeros(shape))[prompts.index(prompt), *(() if t is None else (t,))] += value

    names = "count ended sum running surprise student_surprise agree loop rep_16 rep_32 rep_128".split()
    for name in [*names, *(v for v in VALUES if v != "jsd")]:
        add(name, prompts[0], 0, 0)
    for n in (2, 3, 4):
        add(f"seq_rep_{n}", prompts[0], 0)
        add(f"seq_rep_{n}_count", prompts[0], 0)
    for prompt, draw in {(row["example_id"], row["draw"]) for row in rows}:
        mine = [row for row in rows if (row["example_id"], row["draw"]) == (prompt, draw)]
        mine.sort(key=lambda row: row["position"])
        for row in mine:
            if row["context"]:
                add("context", prompt, row[divergence])
        live = [row for row in mine if row["alive"]]
        cut = any(row["token"] == -1 and not row["context"] for row in mine)
        running, token = 0.0, [row["token"] for row in live]
        for t, row in enumerate(live):
            running += row[divergence]
            add("count", prompt, 1, t)
            add("sum", prompt, row[divergence], t)
            add("running", prompt, running, t)
            add("surprise", prompt, -row["teacher_log_prob"], t)
            add("student_surprise", prompt, -row["student_log_prob"], t)
            add("agree", prompt, row["top1_agree"], t)
            for name in (v for v in VALUES if v != "jsd"):
                add(name, prompt, row[name], t)
            for window in (16, 32, 128):
                add(f"rep_{window}", prompt, token[t] in token[max(0, t - window) : t], t)
        if not cut:
            add("ended", prompt, 1, len(live) - 1)
        for n in (2, 3, 4):
            grams = [tuple(token[i : i + n]) for i in range(len(token) - n + 1)]
            if grams:
                add(f"seq_rep_{n}", prompt, 1 - len(set(grams)) / len(grams))
                add(f"seq_rep_{n}_count", prompt, 1)
        onset = loop_onset(token if cut else token[:-1])
        if onset is not None:
            add("loop", prompt, 1, onset)
    return out


def loop_onset(body: list[int]) -> int | None:
    """The definition, tried at every start and period."""
    for t in range(len(body)):
        rest = body[t:]
        for k in range(1, 9):
            if len(rest) >= 3 * k and all(rest[i] == rest[i - k] for i in range(k, len(rest))):
                return t
    return None


@pytest.mark.parametrize("seed", range(6))
def test_arrays_equal_loops_over_responses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    longest = (1, 3, 9, 20, 40, 9)[seed]
    draws = [{"student": 2, "teacher": 3, "reference": 1}, {"student": 1, "teacher": 1}][seed % 2]
    tokens = 30 if longest == 40 else 3  # with 30 kinds some repeats are just at the edge of a window
    rows, divergence = random_rows(rng, draws, longest=longest, tokens=tokens), DIVERGENCES[seed % 4]
    found = arrays(in_memory(rows), divergence)
    width = found["student_count"].shape[1]
    assert width == max(row["position"] for row in rows if row["alive"]) + 1
    np.testing.assert_array_equal(found["prompt"], [1, 8, 15, 22])
    expected = {"prompt", "matched_count", "matched_student_sum", "matched_teacher_sum"}
    for roll_in in draws:
        for name, values in by_hand(rows, roll_in, divergence, width).items():
            key = f"{roll_in}_{name}"
            np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-6, err_msg=key)
            assert found[key].dtype in (np.float32, np.int32)
            expected.add(key)
        expected.add(f"{roll_in}_step")
    assert set(found) == expected
    matched = {name: np.zeros((4, width)) for name in ("count", "student_sum", "teacher_sum")}
    for p, prompt in enumerate(found["prompt"]):
        for draw in range(min(draws["student"], draws["teacher"])):
            pair = {
                g: [r[divergence] for r in sorted(rows, key=lambda r: r["position"]) if r["alive"]
                    and (r["roll_in"], r["example_id"], r["draw"]) == (g, prompt, draw)]
                for g in ("student", "teacher")
            }  # fmt: skip
            for t, values in enumerate(zip(pair["student"], pair["teacher"], strict=False)):
                matched["count"][p, t] += 1
                matched["student_sum"][p, t] += values[0]
                matched["teacher_sum"][p, t] += values[1]
    for name, values in matched.items():
        np.testing.assert_allclose(found[f"matched_{name}"], values, rtol=1e-5, err_msg=name)


def test_arrays_by_hand() -> None:
    """The student says 5 6 5 5 and stops, or 5 and is cut; the teacher stops at once, or says 5 6."""
    rows = response_rows("student", 4, 0, [1.0, 2.0, 3.0, 4.0, 5.0], True, [5, 6, 5, 5, 0])
    rows += response_rows("student", 4, 1, [10.0, 20.0], False, [5])
    rows += response_rows("teacher", 4, 0, [0.5], True, [0])
    rows += response_rows("teacher", 4, 1, [0.25, 0.5, 1.0], False, [5, 6])
    found = arrays(in_memory(rows))
    expected: dict[str, Any] = {
        "prompt": [4],
        "student_count": [[2, 1, 1, 1, 1]],
        "student_ended": [[0, 0, 0, 0, 1]],
        "student_sum": [[11, 2, 3, 4, 5]],
        "student_running": [[11, 3, 6, 10, 15]],
        "student_surprise": [[2, 1, 1, 1, 1]],
        "student_step": [[22 / 2.001, 3 / 1.001, 4 / 1.001, 5 / 1.001]],
        "student_rep_16": [[0, 0, 1, 1, 0]],
        "student_seq_rep_2": [0],
        "student_seq_rep_2_count": [1],
        "student_loop": [[0] * 5],
        "teacher_count": [[2, 1, 0, 0, 0]],
        "teacher_ended": [[1, 0, 0, 0, 0]],
        "matched_count": [[2, 0, 0, 0, 0]],
        "matched_student_sum": [[11, 0, 0, 0, 0]],
        "matched_teacher_sum": [[0.75, 0, 0, 0, 0]],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    assert not any(name.endswith("_context") or name.startswith("reference") for name in found)


@pytest.mark.parametrize(
    ("body", "onset"),
    [
        ([1, 1, 1], 0),
        ([1, 1], None),
        ([5, 1, 2, 1, 2, 1, 2], 1),
        ([5, 1, 2, 1, 2, 1], None),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 0),
        ([2, 1, 1, 1], 1),
        ([1, 1, 1, 2], None),  # left the loop
        ([*range(8)] * 3, 0),
        ([*range(9)] * 3, None),  # a period of 9
        ([1, 2, 1, 2, 1, 2, 2, 2], 5),
    ],
)
def test_loop_onset_by_hand(body: list[int], onset: int | None) -> None:
    assert loop_onset(body) == onset
    for extra in ([], [0], [0, 0, 0]):  # what follows the body is not looked at
        found = _loop_onset(np.array([body + extra]), np.array([len(body)]))
        assert found.tolist() == [-1 if onset is None else onset]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4))
def test_repetition_equals_its_definition(responses: list[list[int]]) -> None:
    width = max(map(len, responses))
    token = np.array([response + [3] * (width - len(response)) for response in responses])
    tokens = np.array([len(response) for response in responses])
    back, code = _previous(token, np.arange(width) < tokens[:, None])
    for k, response in enumerate(responses):
        for t, one in enumerate(response):
            before = [t - i for i in range(t) if response[i] == one]
            assert back[k, t] == (min(before) if before else 0)
    for n in (2, 3, 4):
        for k, response in enumerate(responses):
            grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
            rate = 1 - len(set(grams)) / len(grams) if grams else 0
            assert _seq_rep(code, tokens, n)[k] == pytest.approx(rate)
    onset = _loop_onset(token, tokens)
    assert onset.tolist() == [-1 if (o := loop_onset(r)) is None else o for r in responses]


def test_neither_order_of_rows_nor_of_draws_nor_other_roll_ins_change_the_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = random_rows(rng, {"student": 3, "teacher": 3})
    found = arrays(in_memory(rows))
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    write_rows(tmp_path / "final.parquet", shuffled)
    for name, values in arrays(read_evidence(tmp_path / "final.parquet")).items():
        np.testing.assert_array_equal(values, found[name], err_msg=name)
    other = [{**row, "draw": 2 - row["draw"]} for row in rows if not row["context"]]
    other += [row for row in rows if row["context"]]
    for name, values in arrays(in_memory(other)).items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, err_msg=name)
    # prompts under other numbers: the same rows elsewhere
    renamed = [{**row, "example_id": 100 - row["example_id"]} for row in rows]
    for name, values in arrays(in_memory(renamed)).items():
        expected = 100 - found[name][::-1] if name == "prompt" else found[name][::-1]
        np.testing.assert_array_equal(values, expected, err_msg=name)
    # a longer response elsewhere widens all arrays by zeros
    longer = [row for prompt in (1, 8, 15, 22)
              for row in random_response(rng, "reference", prompt, 0, [1, 2, 3, 1] * 5, False)]  # fmt: skip
    width, wide = found["student_count"].shape[1], arrays(in_memory(rows + longer))
    assert wide["student_count"].shape == wide["reference_sum"].shape == (4, 20)
    for name, values in found.items():
        trimmed = wide[name][:, :width] if values.ndim == 2 else wide[name]
        np.testing.assert_array_equal(trimmed, values, err_msg=name)
        assert not wide[name][:, width:].any() if values.ndim == 2 else True


def test_responses_of_one_token_and_students_that_never_stop_are_defined() -> None:
    rows: Rows = []
    for prompt in (0, 1):
        rows += response_rows("student", prompt, 0, [1.0], True, [0])
        rows += response_rows("teacher", prompt, 0, [1.0] * 5, False, [1] * 4)
    found = arrays(in_memory(rows))
    assert found["student_count"].tolist() == [[1, 0, 0, 0]] * 2
    assert found["student_step"].shape == (2, 0)
    assert found["teacher_loop"].tolist() == [[1, 0, 0, 0]] * 2
    assert found["matched_count"].tolist() == [[1, 0, 0, 0]] * 2
    ones = np.ones((1, 2))
    assert ESTIMATORS["stop_rate"](found, ones, length=4) == [1]
    assert ESTIMATORS["truncation_rate"](found, ones, length=4, roll_in="teacher") == [1]
    assert ESTIMATORS["ex_acc_err_alive"](found, ones, length=1) == [0]
    assert np.isnan(ESTIMATORS["ex_acc_err_alive"](found, ones, length=2))
    assert ESTIMATORS["ex_acc_err_arora_paper"](found, ones, length=4) == [-75]
    assert np.isnan(ESTIMATORS["eos_hazard_ratio"](found, ones, length=4))
    single = arrays(in_memory(response_rows("student", 0, 0, [2.0], True, [0])))
    assert single["student_sum"].tolist() == [[2]]
    assert not any(name.startswith(("matched", "teacher")) for name in single)


def test_what_cannot_be_read_is_refused() -> None:
    rows = random_rows(np.random.default_rng(0), {"student": 1})
    with pytest.raises(RecordError, match="no divergence 'kl'. Known: forward_kl, reverse_kl"):
        arrays(in_memory(rows), "kl")
    rows += response_rows("teacher", 5, 0, [1.0], True)
    with pytest.raises(RecordError, match="other prompts under teacher than under student roll-in"):
        arrays(in_memory(rows))


# ---------------------------------------------------------------------------------- Arora's code, transcribed
def test_arora_code_variant_equals_a_transcription_from_token_ids_and_logits() -> None:
    """KL at every index from the second token on, the prompt included, accumulated, averaged over the
    sequences that reach the index; model prefixes over human prefixes.
    """
    rng, context, longest, vocabulary = np.random.default_rng(11), 4, 6, 8
    tables = rng.normal(size=(2, vocabulary, vocabulary, vocabulary))  # logits given the last two tokens
    prompts = rng.integers(1, vocabulary, (30, context))
    accumulated: dict[str, list[Array]] = {"student": [], "reference": []}
    rows: Rows = []
    for roll_in in accumulated:
        for k, prompt in enumerate(prompts):
            ids, n = [int(t) for t in prompt], 0
            while n < longest and (n == 0 or ids[-1] != 0):
                ids.append(int(rng.choice(vocabulary, p=[0.2, *[0.8 / 7] * 7])))
                n += 1
            before = [(0, ids[0]), *pairwise(ids)]  # of the token at index 1, 2, ...
            logits = np.array([[table[pair] for pair in before] for table in tables])
            log_q, log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)  # [index of the predicted token - 1]
            line = np.full(context + longest - 1, np.nan)
            line[: len(ids) - 1] = np.cumsum(kl[: len(ids) - 1])
            accumulated[roll_in].append(line)
            finished = ids[-1] == 0
            values = [float(v) for v in kl[context - 1 : len(ids) - finished]]
            response = response_rows(roll_in, k, 0, values, finished, ids[context:])
            rows += response
            rows += [
                {**response[0], "position": i - context, "token": ids[i], "alive": False, "context": True,
                 "forward_kl": float(kl[i - 1])}
                for i in range(1, context)
            ]  # fmt: skip
    found, ones = arrays(in_memory(rows)), np.ones((1, len(prompts)))
    mean = {roll_in: np.nanmean(lines, axis=0) for roll_in, lines in accumulated.items()}
    for length in range(1, longest + 1):
        j = context + length - 2  # the index of the last response token, among the predicted
        ratio = mean["student"][j] / mean["reference"][j]
        got = ESTIMATORS["ex_acc_err_arora_code"](found, ones, length=length)
        assert got == pytest.approx(100 * (ratio - 1), abs=1e-5, rel=1e-5)
