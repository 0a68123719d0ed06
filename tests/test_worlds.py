"""Worlds: the models against their tables, the truths against all responses written out, and by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kdbench import estimators
from kdbench.collect import measure
from kdbench.evidence import DIVERGENCES
from kdbench.rollout import Draw, rollout
from kdbench.worlds.automaton import AutomatonLM, prompt_batch
from kdbench.worlds.catalogue import TEACHER_STOP, WORLDS, stop_rate, world
from kdbench.worlds.tables import Automaton, World
from kdbench.worlds.truth import Truth

Array = NDArray[Any]
Response = tuple[int, ...]
CUT = 3  # tokens of the small world's responses
ROLL_INS = ("student", "teacher", "reference")


def random_automaton(rng: np.random.Generator, states: int, vocab: int = 3) -> Automaton:
    prob = rng.uniform(0.2, 1.0, (states, vocab))
    return Automaton(rng.integers(0, states, (states, vocab)), np.log(prob / prob.sum(1, keepdims=True)))


@pytest.fixture(scope="module")
def small() -> World:
    """Three writers with different states over two tokens and the end."""
    rng = np.random.default_rng(0)
    teacher, student, writer = (random_automaton(rng, n) for n in (4, 3, 2))
    weights = np.array([0.5, 0.3, 0.2])
    return World("small", "", teacher, student, ((1,), (2, 1), (2,)), weights, CUT, writer)


# ------------------------------------------------------------- all responses of the small world, written out
def row(model: Automaton, prefix: Response) -> Array:
    state = 0
    for token in prefix:
        state = int(model.next_state[state, token])
    return np.exp(model.log_prob[state])


@cache
def divergence(world: World, prefix: Response, name: str) -> float:
    q, p = row(world.student, prefix), row(world.teacher, prefix)
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "total_variation":
        return sum(abs(q - p)) / 2
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def ended(response: Response) -> bool:
    return bool(response) and response[-1] == 0


def singly(model: Automaton, prompt: Response, response: Response = ()) -> Iterator[tuple[float, Response]]:
    """(probability, response) of one writer."""
    if ended(response) or len(response) == CUT:
        yield 1.0, response
        return
    for token, chance in enumerate(row(model, prompt + response)):
        for rest, whole in singly(model, prompt, (*response, token)):
            yield chance * rest, whole


def coupled(
    world: World, prompt: Response, q: Response = (), p: Response = ()
) -> Iterator[tuple[float, Response, Response]]:
    """(probability, student's response, teacher's) when both draw from the same uniform numbers."""
    step = max(len(q), len(p))
    going = [not ended(text) and step < CUT for text in (q, p)]
    if not any(going):
        yield 1.0, q, p
        return
    rows = row(world.student, prompt + q), row(world.teacher, prompt + p)
    cdf = [np.array([*np.cumsum(one)[:-1], 1.0]) for one in rows]
    edges = np.unique(np.concatenate([[0.0], *(c for c, go in zip(cdf, going, strict=True) if go)]))
    for low, high in itertools.pairwise(edges):
        tokens = [int(np.sum(c <= (low + high) / 2)) for c in cdf]
        longer = [
            (*text, token) if go else text for text, token, go in zip((q, p), tokens, going, strict=True)
        ]
        for rest, *whole in coupled(world, prompt, *longer):
            yield (high - low) * rest, whole[0], whole[1]


def written_out(world: World, name: str) -> tuple[dict[str, Array], Array]:
    """The estimators' arrays, a row per (prompt, student's and teacher's response, reference); weights."""
    rows: list[dict[str, Array]] = []
    weights = []
    for prompt, weight in zip(world.prompts, world.weights, strict=True):
        references = list(singly(world.reference, prompt))
        for chance, q, p in coupled(world, prompt):
            for other, text in references:
                weights.append(weight * chance * other)
                texts = {"student": q, "teacher": p, "reference": text}
                rows.append(arrays_of(world, prompt, texts, name))
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}, np.array([weights])


def arrays_of(world: World, prompt: Response, texts: dict[str, Response], name: str) -> dict[str, Array]:
    out: dict[str, Array] = {}
    d = {}
    for g, text in texts.items():
        n = len(text)
        prefixes = [prompt + text[:t] for t in range(n)]
        padded = lambda values, n=n: np.array([*values, *[0.0] * (CUT - n)])
        d[g] = [divergence(world, prefix, name) for prefix in prefixes]
        q = [row(world.student, prefix) for prefix in prefixes]
        p = [row(world.teacher, prefix) for prefix in prefixes]
        after = [prompt + text[:t] for t in range(1, n + (not ended(text)))]
        step = [divergence(world, prefix, name) / 1.001 for prefix in after]
        out |= {
            f"{g}_count": padded([1] * n),
            f"{g}_ended": padded([0] * (n - 1) + [ended(text)]),
            f"{g}_sum": padded(d[g]),
            f"{g}_running": padded(np.cumsum(d[g])),
            f"{g}_context": np.array(sum(divergence(world, prompt[:i], name) for i in range(1, len(prompt)))),
            f"{g}_step": np.array([*step, *[0.0] * (CUT - len(step))]),
            f"{g}_surprise": padded([-math.log(p[t][text[t]]) for t in range(n)]),
            f"{g}_agree": padded([q[t].argmax() == p[t].argmax() for t in range(n)]),
            f"{g}_student_entropy": padded([-sum(x * np.log(x)) for x in q]),
            f"{g}_teacher_entropy": padded([-sum(x * np.log(x)) for x in p]),
        }
        for column in ("forward_kl", "reverse_kl", "total_variation"):
            out[f"{g}_{column}"] = padded([divergence(world, prefix, column) for prefix in prefixes])
    n = min(len(texts["student"]), len(texts["teacher"]))
    out["matched_count"] = np.array([float(t < n) for t in range(CUT)])
    for g in ("student", "teacher"):
        out[f"matched_{g}_sum"] = np.array([*d[g][:n], *[0.0] * (CUT - n)])
    return out


PER_ROLL_IN = (
    "accumulated_error_nats arora_paper_error_nats arora_code_error_nats minillm_error_nats "
    "matched_error_nats survival stop_rate truncation_rate eos_hazard growth_exponent acceptance "
    "agreement teacher_entropy teacher_surprise entropy_drift"
).split()
PER_LENGTH = (
    "ex_acc_err_alive ex_acc_err_arora_paper ex_acc_err_arora_code ex_acc_err_minillm ex_acc_err_matched "
    "excess_nats length_term_nats state_term_nats eb_c state_shift_nats state_shift_reverse_nats "
    "acceptance_drop teacher_entropy_rise teacher_surprise_rise eos_hazard_ratio"
).split()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_truth_is_every_estimator_on_all_responses(small: World, name: str) -> None:
    arrays, weights = written_out(small, name)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    truth = Truth(small, name)
    calls: list[tuple[str, dict[str, Any]]] = []
    for length in range(1, CUT + 1):
        calls += [(key, {"length": length}) for key in PER_LENGTH]
        for key in PER_ROLL_IN:
            roll_ins = ROLL_INS[:2] if key == "matched_error_nats" else ROLL_INS
            calls += [(key, {"length": length, "roll_in": g}) for g in roll_ins]
    for g in ROLL_INS:
        calls.append(("mean_length_tokens", {"roll_in": g}))
        calls += [("length_quantile_tokens", {"level": level, "roll_in": g}) for level in (0.1, 0.5, 0.9)]
    for key, args in calls:
        found = estimators.ESTIMATORS[key](arrays, weights, **args)[0]
        np.testing.assert_allclose(
            truth.value(key, **args), found, rtol=1e-9, atol=1e-12, err_msg=f"{key} {args}"
        )


def test_every_estimator_but_repetition_has_a_truth() -> None:
    plain = {"mean", "ratio", "stratified_mean", "stratum_mean"}
    plain |= {"f1", "macro_f1", "matthews", "pearson", "spearman", "pearson_spearman"}  # of classes, numbers
    repetition = {"seq_rep", "rep", "loop_rate", "loop_onset_tokens"}
    here = {n for n, one in estimators.ESTIMATORS.items() if one.__module__ == estimators.__name__}
    assert {n for n in here if not Truth.knows(n)} == plain | repetition
    with pytest.raises(ValueError, match="no truth of estimator 'rep'"):
        Truth(world("equal")).value("rep", length=3)


def test_minillm_with_two_draws(small: World) -> None:
    total = np.zeros(CUT)
    for prompt, weight in zip(small.prompts, small.weights, strict=True):
        for (a, x), (b, y) in itertools.product(list(singly(small.student, prompt)), repeat=2):
            for j in range(CUT):
                live = [text for text in (x, y) if len(text) > j and text[j] != 0]
                d = sum(divergence(small, prompt + text[: j + 1], "forward_kl") for text in live)
                total[j] += weight * a * b * d / (len(live) + 1e-3)
    np.testing.assert_allclose(Truth(small, samples=2).minillm_error_curve(), np.cumsum(total), rtol=1e-12)


def test_two_states_by_hand() -> None:
    """Token 1 leads to state A, where the responses begin, and token 2 to B."""
    after = np.array([[0, 1, 2]] * 3)
    in_a, in_b = ([2, 2, 4], [2, 4, 2]), ([2, 4, 2], [1, 2, 5])  # (teacher, student), in eighths
    teacher, student = (
        Automaton(after, np.log(np.array([a, a, b]) / 8)) for a, b in zip(in_a, in_b, strict=True)
    )
    truth = Truth(World("two", "", teacher, student, ((1,),), np.ones(1), 2))
    a = math.log(2) / 4
    b = math.log(2) * 3 / 4 + math.log(2 / 5) / 4
    # given that it goes on, the student is in A : B = 2 : 1, the teacher in 1 : 2
    assert truth.value("accumulated_error_nats", length=2) == pytest.approx(a + (2 * a + b) / 3)
    bias = 100 * ((2 * a + b) - (a + 2 * b)) / (3 * a + a + 2 * b)
    assert truth.value("ex_acc_err_alive", length=2) == pytest.approx(bias)
    assert truth.value("eb_c", length=2) == pytest.approx((2 * a + b) / (a + 2 * b))
    assert truth.value("survival", length=2) == pytest.approx(3 / 4)
    assert truth.value("mean_length_tokens") == pytest.approx(7 / 4)
    assert truth.value("stop_rate", length=2) == pytest.approx(1 / 4 + 1 / 2 * 1 / 4 + 1 / 4 * 1 / 8)
    assert truth.value("eos_hazard", length=2, roll_in="teacher") == pytest.approx(1 / 4)
    rejected = 1 / 4 + 1 / 2 * 1 / 4 + 1 / 4 * 3 / 8
    assert truth.value("acceptance", length=2) == pytest.approx(1 - rejected / (7 / 4))
    # u in [1/4, 1/2): both write 1; in [1/2, 3/4): the student 1, the teacher 2; above: both 2
    student_at, teacher_at, both = truth.paths.coupled
    found = sorted(zip(student_at, teacher_at, both[1].tolist(), strict=True))
    in_order = [(0, 0, 1 / 4), (0, 1, 1 / 4), (1, 1, 1 / 4)]
    np.testing.assert_allclose([pair for pair in found if pair[2]], in_order, rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_have_no_bias_at_all(name: str) -> None:
    truth = Truth(world("equal"), name)
    zero = [key for key in PER_LENGTH if key not in ("eb_c", "eos_hazard_ratio")]
    for key in [*zero, "accumulated_error_nats", "matched_error_nats", "arora_code_error_nats"]:
        assert not truth.curve(key).any(), key
    assert (truth.curve("eb_c") == 1).all()
    assert (truth.curve("eos_hazard_ratio") == 1).all()
    assert np.isnan(truth.value("growth_exponent", length=30))


# --------------------------------------------------------------------------------------------- the catalogue
@pytest.mark.parametrize("name", [n for n in WORLDS if n != "equal"])
def test_worlds_are_realistic_and_their_excess_adds_up(name: str) -> None:
    one = world(name)
    truth = Truth(one)
    for model in (one.teacher, one.student, one.reference):
        assert model.log_prob.shape[1] <= 12
        assert model.prob.min() > 1e-6
    assert {len(prompt) for prompt in one.prompts} == {1, 2}
    per_token = truth.value("accumulated_error_nats", length=30) / 30
    assert 0.05 < per_token < 0.6
    for length in (1, 15, 30):
        terms = truth.value("length_term_nats", length=length) + truth.value("state_term_nats", length=length)
        student = truth.value("arora_paper_error_nats", length=length)
        teacher = truth.value("arora_paper_error_nats", length=length, roll_in="teacher")
        assert terms == pytest.approx(student - teacher, abs=1e-12)


def test_worlds_differ_in_what_they_are_made_for() -> None:
    truths = {name: Truth(world(name)) for name in WORLDS}
    survival = {name: truth.value("survival", length=30) for name, truth in truths.items()}
    assert sum(value > 0.3 for value in survival.values()) >= 6
    assert survival["stops_earlier"] < 0.1
    assert survival["unreliable"] < 0.2
    growing, staying = (truths[n].curve("eb_c") for n in ("accumulates", "recovers"))
    assert growing[29] > growing[9] > growing[4] > 1.2
    assert abs(staying[29] - staying[4]) < 0.01
    assert truths["unreliable"].value("teacher_entropy_rise", length=15) > 0.15
    assert world("markov2").reference is not world("markov2").teacher
    with pytest.raises(ValueError, match="no world 'markov3'. Known: markov1, markov2"):
        world("markov3")


def test_only_the_stop_rate_changes() -> None:
    rates = (0.01, TEACHER_STOP, 0.08)
    worlds = [stop_rate(rate) for rate in rates]
    rows = [w.student.prob[:, 1:] / w.student.prob[:, 1:].sum(axis=1, keepdims=True) for w in worlds]
    np.testing.assert_allclose(rows[0], rows[2], rtol=1e-12)
    minillm, alive = (
        [Truth(w).value(key, length=15) for w in worlds] for key in ("ex_acc_err_minillm", "ex_acc_err_alive")
    )
    assert minillm[0] > 45 > 30 > minillm[1] > 25 > -10 > minillm[2]
    assert max(alive) - min(alive) < 3  # what the divergence of stopping itself adds to the denominator
    assert Truth(worlds[1]).value("length_term_nats", length=30) == pytest.approx(0, abs=1e-12)


def test_tables_are_checked() -> None:
    after = np.zeros((2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="do not fit"):
        Automaton(after + 2, np.log(np.full((2, 3), 1 / 3)))
    with pytest.raises(ValueError, match="do not fit"), np.errstate(divide="ignore"):
        Automaton(after, np.log([[0.5, 0.5, 0.0]] * 2))
    with pytest.raises(ValueError, match="add up to 1"):
        Automaton(after, np.log(np.full((2, 3), 0.3)))
    fine = Automaton(after, np.log(np.full((2, 3), 1 / 3)))
    with pytest.raises(ValueError, match="world w: 1 prompts"):
        World("w", "", fine, fine, ((1,),), np.array([0.5]))


def test_truths_need_no_torch() -> None:
    code = (
        "import sys; from kdbench.worlds.catalogue import world; from kdbench.worlds.truth import Truth\n"
        "Truth(world('markov1')).value('survival', length=1); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------- the models
def test_forward_is_the_table_under_any_padding_and_in_steps() -> None:
    one = world("tree")
    model = AutomatonLM(one.teacher, torch.float64)
    text = (1, 2, 3, 3, 1, 2, 1)
    expected = torch.from_numpy(np.log([row(one.teacher, text[: i + 1]) for i in range(len(text))]))
    ids = torch.tensor([[*text, 0, 0], [2, *text, 0]])
    torch.testing.assert_close(model(ids).logits[0, :7], expected)
    left = torch.tensor([[3, 2, *text], [3, 2, *text]])  # padding of any id
    mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    torch.testing.assert_close(model(left, attention_mask=mask).logits[0, 2:], expected)
    cache = DynamicCache()
    start = model(left[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(start[0, 2:], expected[:2])
    cache.batch_select_indices(torch.tensor([1, 0]))
    rest = [
        model(left[[1, 0], t : t + 1], attention_mask=mask[[1, 0], : t + 1], past_key_values=cache).logits
        for t in range(4, 9)
    ]
    torch.testing.assert_close(torch.cat(rest, dim=1)[1], expected[2:])
    assert cache.get_seq_length() == 9


def test_sampled_frequencies_are_the_probabilities() -> None:
    """Every token's share at every position, within 5 standard errors."""
    one, count = world("hidden"), 20_000
    batch = prompt_batch(one, one.draw(count, 1))
    sampled = rollout(AutomatonLM(one.student), batch, Draw(3, 0, count, one.max_new_tokens))
    paths = Truth(one).paths
    share = np.einsum("tkz,zv->tv", paths.alpha["student"][:-1], paths.prob["student"])
    start = sampled["prompt_length"][:, None]
    for t in range(one.max_new_tokens):
        alive = start[:, 0] + t < sampled["length"]
        token = sampled["input_ids"][alive].gather(1, start[alive] + t)[:, 0]
        found = torch.bincount(token, minlength=share.shape[1]).numpy() / count
        assert (np.abs(found - share[t]) < 5 * np.sqrt(share[t] / count)).all(), t


def test_sampling_does_not_depend_on_the_batch() -> None:
    one = world("grammar")
    model, batch = AutomatonLM(one.teacher), prompt_batch(one, one.draw(300, 0), first_id=7)
    whole = rollout(model, batch, Draw(0, 2, 300, 30))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    parts = rollout(model, batch.rows(order), Draw(0, 2, 64, 30))
    assert torch.equal(parts["length"], whole["length"][order])
    assert torch.equal(parts["input_ids"], whole["input_ids"][order])
    assert int(whole["example_id"][0]) == 7


def test_measured_divergences_are_the_truths() -> None:
    one = world("markov2")
    student, teacher = AutomatonLM(one.student), AutomatonLM(one.teacher)
    batch = rollout(student, prompt_batch(one, one.draw(50, 0)), Draw(0, 0, 50, 30))
    found = measure(student, teacher, batch, 16, True)
    texts = {
        int(i): tuple(ids) for i, ids in zip(batch["example_id"], batch["input_ids"].tolist(), strict=True)
    }
    start = dict(zip(batch["example_id"].tolist(), batch["prompt_length"].tolist(), strict=True))
    for i in range(0, len(found["token"]), 7):
        example = int(found["example_id"][i])
        prefix = texts[example][: start[example] + int(found["position"][i])]
        for name in DIVERGENCES:
            assert found[name][i] == pytest.approx(divergence(one, prefix, name), abs=2e-6)
