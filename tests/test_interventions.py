"""Interventions: what is replaced by what, twins that stay together, files, and curves worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import EOS, V, make_rows, tiny_gpt2
from torch import Tensor, nn

from kdbench import interventions
from kdbench.collect import Plan
from kdbench.counterfactuals import (
    CLEAN,
    KINDS,
    NAMES,
    Intervention,
    InterventionConfig,
    conditions,
    corruption_area_nats,
    corruption_arrays,
    corruption_curve,
    excess_alive_curve,
    excess_area_nats,
    excess_arrays,
    excess_curve,
    half_life_tokens,
    hand_over_arrays,
    hand_over_gain,
    hand_over_log_prob_curve,
    hand_over_score_curve,
    read_intervention,
)
from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.interventions import _Lab, _nucleus, collect_interventions, scoring
from kdbench.record import RecordError
from kdbench.rollout import Draw, rollout
from kdbench.streams import uniform

PROMPTS = [[3, 4], [5], [6, 7, 8, 9, 10, 11, 12], [1, 2, 3], [4, 4], [9, 8, 7, 6], [2], [12, 1, 5]]
CONFIG = InterventionConfig(
    hand_over_tokens=(0, 2, 5), rates=(0.2, 0.6), places=(0.0, 0.5), recovery_positions=(1, 4)
)
MODELS = {"student": "s", "teacher": "t"}
TOKENS = 12
ONES = np.ones((1, len(PROMPTS)))


def student() -> Any:
    return tiny_gpt2(1, width=16, layers=2)


def teacher() -> Any:
    return tiny_gpt2(2, width=16, layers=2)


def plan(rows: list[list[int]] = PROMPTS, batch_size: int = 3) -> Plan:
    return Plan(make_rows(rows, [[] for _ in rows]), 2, TOKENS, "plain", batch_size)


def score(example: int, tokens: list[int]) -> float:
    return example + sum(tokens) / 8


def lab(config: InterventionConfig = CONFIG, special: tuple[int, ...] = (EOS, 1)) -> _Lab:
    return _Lab(student(), teacher(), replace(plan(), samples=1), config, list(special))


def made(folder: Path, one: nn.Module | None = None, **options: Any) -> dict[str, Intervention]:
    options = {"plan": plan(), "config": CONFIG, "score": score, "special": (1,), **options}
    collect_interventions(one or student(), teacher(), options.pop("plan"), folder, MODELS, **options)
    return {name: read_intervention(folder / f"{name}.parquet") for name in NAMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interventions")
    made(folder)
    return folder


@pytest.fixture
def data(files: Path) -> dict[str, Intervention]:
    return {name: read_intervention(files / f"{name}.parquet") for name in NAMES}


def responses(batch: Batch) -> dict[int, list[int]]:
    rows = zip(batch["example_id"], batch["input_ids"], batch["prompt_length"], batch["length"], strict=True)
    return {int(example): ids[start:stop].tolist() for example, ids, start, stop in rows}


# ---------------------------------------------------------------------------------------------- going on
@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram": 2}, {"temperature": 1.5}])
def test_a_cut_response_is_continued_to_itself(options: dict[str, Any]) -> None:
    model, draw = student(), Draw(1, 4, 3)
    whole = rollout(model, plan().gold, draw, TOKENS, **options)
    length = whole["length"] - whole["prompt_length"]
    assert bool(whole["finished"].any())
    assert not bool(whole["finished"].all())
    for cut in (
        torch.zeros_like(length),
        length - 1,
        length // 2,
        torch.minimum(length - 1, torch.arange(8)),
    ):
        grown = whole.replace(prompt_length=whole["prompt_length"] + cut, response_offset=cut)
        again = rollout(model, grown, draw, TOKENS, **options)
        assert torch.equal(again["finished"], whole["finished"])
        assert responses(again.replace(prompt_length=whole["prompt_length"])) == responses(whole)


def test_a_full_response_gets_no_token_and_offsets_out_of_range_are_refused() -> None:
    whole = rollout(student(), plan().gold, Draw(1), 4)
    cut = whole.rows((~whole["finished"]).nonzero()[:, 0])
    full = cut.replace(prompt_length=cut["length"], response_offset=torch.full_like(cut["length"], 4))
    again = rollout(student(), full, Draw(1), 4)
    assert torch.equal(again["length"], cut["length"])
    assert not bool(again["finished"].any())
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="response_offset"):
            rollout(student(), full.replace(response_offset=cut["length"] * 0 + wrong), Draw(1), 4)


def test_positions_are_counted_from_the_prompt_without_the_response() -> None:
    batch = make_rows([[3] * 30], [[]])
    with pytest.raises(ValueError, match="positions"):
        rollout(student(), batch, Draw(1), 6)
    rollout(student(), batch.replace(response_offset=torch.tensor([4])), Draw(1), 6)


# ---------------------------------------------------------------------------------------------- replacing
def test_only_chosen_tokens_are_replaced_and_never_by_themselves_or_a_special_token() -> None:
    made = lab()
    clean = responses(made.own("teacher"))
    changed_at: dict[tuple[str, float], set[tuple[int, int]]] = {}
    for kind in KINDS:
        for rate in (0.2, 0.6, 1.0):
            changed = responses(made.corruption(kind, rate=rate))
            where = changed_at[kind, rate] = set()
            for example, tokens in clean.items():
                assert len(changed[example]) == len(tokens)
                for position, (old, new) in enumerate(zip(tokens, changed[example], strict=True)):
                    if old != new:
                        where.add((example, position))
                        assert new not in (EOS, 1)
                    if old == EOS:
                        assert new == EOS
        ordinary = {(e, t) for e, tokens in clean.items() for t, token in enumerate(tokens) if token != EOS}
        assert changed_at[kind, 0.2] < changed_at[kind, 0.6] < changed_at[kind, 1.0] == ordinary
        assert 0.05 < len(changed_at[kind, 0.2]) / len(ordinary) < 0.4
    assert changed_at["random", 0.2] == changed_at["student", 0.2]
    for place in (0.0, 0.5):
        changed = responses(made.corruption("random", place=place))
        for example, tokens in clean.items():
            n = len(tokens) - (tokens[-1] == EOS)
            differ = [t for t, token in enumerate(tokens) if token != changed[example][t]]
            assert differ == ([int(n * place)] if n else [])


def test_replacements_follow_their_distributions() -> None:
    """Worked out again from the models' own forwards of single rows, in numpy."""
    made = lab()
    clean = made.own("teacher")
    found = {kind: responses(made.corruption(kind, rate=1.0)) for kind in KINDS}
    stream = interventions.stream_seed(0, "interventions/replacement")
    for row, (example, tokens) in enumerate(responses(clean).items()):
        for position, token in enumerate(tokens):
            if token == EOS:
                continue
            u = float(uniform(stream, torch.tensor([example]), 0, position))
            ids = torch.tensor([PROMPTS[row] + tokens[:position]])
            with torch.no_grad():
                q, p = (
                    torch.softmax(model(ids).logits[0, -1], -1).numpy() for model in (student(), teacher())
                )
            order = np.argsort(-p)
            inside = order[: int(np.searchsorted(p[order].cumsum(), 0.9)) + 1]
            allowed = np.ones(V)
            allowed[[EOS, 1, token]] = 0
            outside = allowed.copy()
            outside[inside] = 0
            for kind, mass in (
                ("random", allowed),
                ("student", q * allowed),
                ("teacher_unlikely", p * outside if outside.any() else p * allowed),
            ):
                cdf = (mass / mass.sum()).cumsum()
                assert found[kind][example][position] == int(np.searchsorted(cdf, u, side="right")), kind


def test_nucleus_is_the_fewest_tokens_that_hold_the_mass() -> None:
    p = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]]).double()
    assert _nucleus(p.log(), 0.75).tolist() == [[False, True, True, False], [True, False, False, False]]


class Sure(nn.Module):
    """A model that knows its next token: 1 + the last; with `spare` mass on token 2 alone."""

    def __init__(self, spare: float = 0.0) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 5, "eos_token_id": 0})()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.spare = spare

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        p = nn.functional.one_hot((input_ids % 4) + 1, 5).double() * (1 - self.spare)
        p[..., 2] += self.spare
        return type("Out", (), {"logits": p.log(), "past_key_values": None})()


def test_without_mass_outside_the_replacement_is_uniform_over_what_is_left() -> None:
    made = _Lab(Sure(), Sure(), replace(plan([[1], [2], [3]]), samples=1), CONFIG, [EOS])
    batch = make_rows([[1]] * 300, [[2, 3, 4]] * 300)
    for kind in ("student", "teacher_unlikely"):
        drawn = made._drawn(batch, kind)[:, 1]
        assert set(drawn.tolist()) == {1, 3, 4}
    with pytest.raises(ValueError, match="nothing to replace"):
        _Lab(Sure(), Sure(), made.plan, CONFIG, [0, 1, 2, 3])._drawn(batch, "random")


# ------------------------------------------------------------------------------------------------- twins
def test_twins_are_equal_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Lab, "replaced", lambda self, batch, role, kind, chosen: batch)
    made = lab()
    clean = responses(made.own("student"))
    for place in (0, 1, 4):
        twins = responses(made.recovery("random", place))
        assert twins == {e: t for e, t in clean.items() if len(t) - (t[-1] == EOS) > place}


def test_twins_share_everything_before_the_replaced_token_and_part_there() -> None:
    made = lab()
    clean, twins = responses(made.own("student")), responses(made.recovery("student", 4))
    assert twins
    for example, tokens in twins.items():
        assert tokens[:4] == clean[example][:4]
        assert tokens[4] != clean[example][4]
        assert len(tokens) > 5 or len(tokens) == TOKENS or tokens[-1] == EOS


def test_hand_over_ends_meet(data: dict[str, Intervention]) -> None:
    m, arrays = hand_over_arrays(data["hand_over"])
    assert m == [0, 2, 5, TOKENS]
    for one, other in (("student", "teacher"), ("teacher", "student")):
        here, there = (
            [data["hand_over"].matrix(name, column) for column in ("token", "teacher_log_prob")]
            for name in (f"{one}-first-0", f"{other}-first-{TOKENS}")
        )
        for mine, theirs in zip(here, there, strict=True):
            np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-6)
            assert np.array_equal(mine[1], theirs[1])
        curves = hand_over_score_curve(arrays, ONES, 4, one), hand_over_score_curve(arrays, ONES, 4, other)
        assert curves[0][0, 0] == curves[1][0, 3]


def test_hand_over_prefixes_are_the_first_models(data: dict[str, Intervention]) -> None:
    """And the rest is scored as the whole: checked against log-probabilities from single rows."""
    whole, alive = data["hand_over"].matrix(f"student-first-{TOKENS}", "token")
    mixed, also = data["hand_over"].matrix("student-first-5", "token")
    assert np.array_equal(np.where(alive, whole, -1)[:, :5], np.where(also, mixed, -1)[:, :5])
    assert not np.array_equal(whole, mixed)
    log_prob, _ = data["hand_over"].matrix("student-first-5", "teacher_log_prob")
    scores = data["hand_over"].matrix("student-first-5", "score")[0]
    _, arrays = hand_over_arrays(data["hand_over"])
    for row, prompt in enumerate(PROMPTS):
        tokens = mixed[row][also[row]].tolist()
        with torch.no_grad():
            logits = teacher()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(log_prob[row][also[row]], expected, rtol=1e-5)
        assert arrays["student_whole_count"][row, 2] == len(tokens)
        assert arrays["student_finished_count"][row, 2] == max(len(tokens) - 5, 0)
        np.testing.assert_allclose(arrays["student_whole_log_prob"][row, 2], expected.sum(), rtol=1e-5)
        np.testing.assert_allclose(arrays["student_finished_log_prob"][row, 2], expected[5:].sum(), rtol=1e-5)
        assert set(scores[row][also[row]]) == {np.float32(score(100 + row, tokens))}
    per_token = hand_over_log_prob_curve(arrays, ONES, 4, "student")
    total = arrays["student_whole_log_prob"].sum(0) / arrays["student_whole_count"].sum(0)
    np.testing.assert_allclose(per_token[0], total)
    assert np.isnan(hand_over_log_prob_curve(arrays, ONES, 4, part="finished")[0, 3])


def test_equal_models_differ_nowhere(tmp_path: Path) -> None:
    same = made(tmp_path, teacher())
    for one in same.values():
        assert not one.columns["forward_kl"].any()
        assert not one.columns["total_variation"].any()
    rates, arrays = corruption_arrays(same["corruption"])
    assert corruption_area_nats(arrays, ONES, tuple(rates)).tolist() == [0]
    behind = excess_arrays(same["recovery"])
    assert excess_area_nats(behind, ONES, 2).tolist() == [0]
    assert np.isnan(half_life_tokens(behind, ONES, 5)).all()
    arrays = hand_over_arrays(same["hand_over"])[1]
    assert (arrays["student_score"] == arrays["student_score"][:, :1]).all()
    assert [hand_over_gain(arrays, ONES, at)[0] for at in range(4)] == [0] * 4


def test_clean_responses_are_those_of_the_evidence(data: dict[str, Intervention]) -> None:
    for name, model in (("corruption", teacher()), ("recovery", student())):
        draw = Draw(interventions.stream_seed(0, "evidence"), 0, 8)
        expected = responses(rollout(model, plan().gold, draw, TOKENS))
        tokens, alive = data[name].matrix(CLEAN, "token")
        assert {100 + i: tokens[i][alive[i]].tolist() for i in range(8)} == expected


# ------------------------------------------------------------------------------------- files and resuming
def test_batch_size_prompt_order_and_padding_do_not_matter(
    tmp_path: Path, data: dict[str, Intervention]
) -> None:
    gold = plan().gold.rows([5, 2, 7, 0, 1, 3, 6, 4])
    gold = gold.replace(input_ids=torch.nn.functional.pad(gold["input_ids"], (0, 3), value=7))
    for name, one in made(tmp_path, plan=replace(plan(), gold=gold, batch_size=8)).items():
        for column, values in one.columns.items():
            np.testing.assert_allclose(values, data[name].columns[column], rtol=1e-5, atol=1e-7)


def test_a_killed_collection_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, count = _Lab.measured, [0]

    def dying(self: _Lab, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return measured(self, *args)

    monkeypatch.setattr(_Lab, "measured", dying)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    parts = sorted(tmp_path.glob("*.parts/*"))
    assert len(parts) == 6
    parts[0].write_bytes(b"torn")
    made(tmp_path)
    total = sum(len(conditions(name, CONFIG, TOKENS)) for name in NAMES)
    assert count[0] == 7 + total - 5, "what was finished was made again"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.iterdir())
    for path in files.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    made(tmp_path)
    assert count[0] == 7 + total - 5, "what was complete was made again"
    made(tmp_path, config=replace(CONFIG, rates=(0.3,)))
    assert count[0] > 7 + total - 5, "other settings, yet nothing was made"


def test_altered_files_are_refused_and_made_anew(tmp_path: Path) -> None:
    one = InterventionConfig(kinds=("random",), rates=(0.5,), places=(), recovery_positions=())
    path = tmp_path / "corruption.parquet"

    def make() -> None:
        collect_interventions(student(), teacher(), plan(), tmp_path, MODELS, one, ["corruption"], run="r")

    make()
    good, manifest = path.read_bytes(), path.with_suffix(".json")
    for wrong in (good[:-9], good[:50] + bytes([good[50] ^ 1]) + good[51:]):
        path.write_bytes(wrong)
        with pytest.raises(RecordError, match="corruption.parquet: was cut or altered"):
            read_intervention(path)
    make()
    assert path.read_bytes() == good
    content = json.loads(manifest.read_text())
    assert content["rows"] == len(read_intervention(path).columns["token"])
    assert (content["models"], content["run"]) == (MODELS, "r")
    found = read_intervention(path).made_under
    assert (found["teacher"], found["settings"]) == ("t", content["settings"])
    assert content["settings"]["special"] == [EOS]
    for change in ({"schema": 0}, {"conditions": {}}):
        manifest.write_text(json.dumps(content | change))
        with pytest.raises(RecordError, match="corruption"):
            read_intervention(path)
    manifest.unlink()
    with pytest.raises(RecordError, match="corruption.json"):
        read_intervention(path)


def test_responses_without_a_token_to_replace(tmp_path: Path) -> None:
    """Models that end at once: nothing to replace, nothing to finish, nobody alive behind."""

    class Ending(Sure):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            p = torch.full((*input_ids.shape, 5), -50.0, dtype=torch.float64)
            p[..., 0] = 0
            return type("Out", (), {"logits": p, "past_key_values": None})()

    options = {"plan": plan([[1], [2, 3]]), "config": CONFIG, "score": score}
    collect_interventions(Ending(), Ending(), folder=tmp_path, models=MODELS, **options)  # type: ignore[arg-type]
    found = {name: read_intervention(tmp_path / f"{name}.parquet") for name in NAMES}
    ones = np.ones((1, 2))
    _, arrays = corruption_arrays(found["corruption"])
    assert corruption_curve(arrays, ones, 3).tolist() == [[0, 0, 0]]
    for behind in (arrays, excess_arrays(found["recovery"])):
        assert np.isnan(excess_curve(behind, ones, 3)).all()
        assert np.isnan(half_life_tokens(behind, ones, 3)).all()
    assert hand_over_score_curve(hand_over_arrays(found["hand_over"])[1], ones, 4).tolist() == [[100.5] * 4]


def test_what_is_wrong_is_said() -> None:
    for wrong in (
        {"rates": (0.0,)},
        {"kinds": ("worst",)},
        {"nucleus": 1.0},
        {"prompts": 0},
        {"places": (1.0,)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            InterventionConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="recovery"):
        conditions("recover", CONFIG, 9)
    with pytest.raises(UserError, match="references"):
        collect_interventions(student(), teacher(), plan(), Path("nowhere"), MODELS, CONFIG)
    assert list(conditions("hand_over", InterventionConfig(), 4)) == [
        f"{first}-first-{m}" for first in ("student", "teacher") for m in (0, 1, 2, 4)
    ]
    assert not any("at-16" in name for name in conditions("recovery", InterventionConfig(), 17))


def test_scoring_is_rouge_l_against_all_references() -> None:
    from kdbench.tasks.tiny_instruct import TinyInstruct

    task = TinyInstruct(TinyInstruct.Settings(dev=3))
    tokenizer: Any = task.tokenizer()
    found = scoring(task, tokenizer, "dev")
    row = task.rows("dev")[1]
    ids = tokenizer(row["output"])["input_ids"]
    assert found["score"](row["example_id"], [*ids, tokenizer.eos_token_id]) == 100
    assert 0 < found["score"](row["example_id"], ids[: len(ids) // 2]) < 100
    assert tokenizer.eos_token_id in found["special"]


# ------------------------------------------------------------------------------------------------- curves
def intervention(
    name: str, settings: dict[str, Any], rows: list[tuple[str, int, list[int], list[float]]]
) -> Intervention:
    """From (condition, example, tokens, KL at each token)."""
    flat = [
        (c, e, t, token, kl)
        for c, e, ids, kls in rows
        for t, (token, kl) in enumerate(zip(ids, kls, strict=True))
    ]
    columns = {
        "example_id": [r[1] for r in flat],
        "position": [r[2] for r in flat],
        "token": [r[3] for r in flat],
    }
    columns |= {one: [r[4] for r in flat] for one in ("forward_kl", "total_variation", "teacher_entropy")}  # type: ignore[misc]
    condition = np.array([list(settings).index(r[0]) for r in flat])
    return Intervention({"conditions": settings}, {k: np.array(v) for k, v in columns.items()}, condition)


def test_excess_half_life_and_area_by_hand() -> None:
    settings = {CLEAN: {}, "random-at-1": {"kind": "random", "place": 1}}
    data = intervention(
        "recovery",
        settings,
        [
            (CLEAN, 7, [5, 6, 7, 8, 9, 4], [1, 1, 1, 1, 1, 1]),
            ("random-at-1", 7, [5, 9, 7, 7, 7], [1, 1, 9, 7, 2]),  # excess 8, 6, 1
            (CLEAN, 8, [5, 6, 7, 8], [0, 0, 1, 1]),
            ("random-at-1", 8, [5, 3, 1, 1, 1, 1], [0, 0, 5, 5, 5, 5]),  # excess 4, 4
            (CLEAN, 9, [0], [2]),  # takes no part
        ],
    )
    arrays = excess_arrays(data)
    ones = np.ones((1, 3))
    assert arrays["prompt"].tolist() == [7, 8, 9]
    for place in (None, 1):
        assert excess_curve(arrays, ones, 3, place=place).tolist() == [[6, 5, 1]]
        # half of 6 is crossed between 5 (at 2) and 1 (at 3)
        assert half_life_tokens(arrays, ones, 3, place=place).tolist() == [2.5]
        assert excess_area_nats(arrays, ones, 3, place=place).tolist() == [12]
    assert excess_alive_curve(arrays, ones, 3).tolist() == [[1, 1, 0.5]]
    weights = np.array([[1, 0, 1], [0, 1, 5], [0, 0, 1], [2, 1, 0]])
    curves = excess_curve(arrays, weights, 3)
    np.testing.assert_allclose(curves[[0, 3]], [[8, 6, 1], [20 / 3, 16 / 3, 1]])
    np.testing.assert_array_equal(curves[[1, 2]], [[4, 4, np.nan], [np.nan] * 3])
    np.testing.assert_allclose(half_life_tokens(arrays, weights, 3), [2.4, np.nan, np.nan, 2 + 6 / 13])
    assert np.isnan(half_life_tokens(arrays, ones, 2)).all()
    assert np.isnan(half_life_tokens(arrays, ones, 1)).all()
    assert np.isnan(excess_curve(arrays, ones, 9)[0, 3:]).all()


def test_half_life_needs_an_excess() -> None:
    settings = {CLEAN: {}, "x": {"kind": "random", "place": 0}}
    rows = [(CLEAN, 1, [5, 6, 7], [0.0, 2.0, 2.0]), ("x", 1, [4, 6, 7], [0.0, 1.0, 0.0])]
    arrays = excess_arrays(intervention("recovery", settings, rows))
    assert excess_curve(arrays, np.ones((1, 1)), 2).tolist() == [[-1, -2]]
    assert np.isnan(half_life_tokens(arrays, np.ones((1, 1)), 2)).all()


def test_corruption_curve_and_area_by_hand() -> None:
    settings = {
        CLEAN: {},
        "random-rate-0.5": {"kind": "random", "rate": 0.5},
        "random-rate-0.1": {"kind": "random", "rate": 0.1},
        "random-place-0.0": {"kind": "random", "place": 0.0},
    }
    data = intervention(
        "corruption",
        settings,
        [
            (CLEAN, 1, [5, 6, 7], [1, 1, 1]),
            ("random-rate-0.5", 1, [4, 4, 7], [1, 3, 8]),
            ("random-rate-0.1", 1, [5, 4, 7], [1, 1, 4]),
            ("random-place-0.0", 1, [4, 6, 7], [1, 4, 2]),
            (CLEAN, 2, [0], [1]),
            ("random-rate-0.5", 2, [0], [1]),
            ("random-rate-0.1", 2, [0], [1]),
            ("random-place-0.0", 2, [0], [1]),
        ],
    )
    rates, arrays = corruption_arrays(data)
    assert rates == [0, 0.1, 0.5]
    weights = np.array([[1.0, 1.0], [1, 0], [0, 1]])
    curve = corruption_curve(arrays, weights, 3)
    np.testing.assert_allclose(curve, [[1, 7 / 4, 13 / 4], [1, 2, 4], [1, 1, 1]])
    # trapezoids: 0.1 x (0 + 1)/2 + 0.4 x (1 + 3)/2
    area = corruption_area_nats(arrays, weights, tuple(rates))
    np.testing.assert_allclose(area, [0.1 * 0.75 / 2 + 0.4 * (0.75 + 2.25) / 2, 0.85, 0], atol=1e-12)
    np.testing.assert_allclose(excess_curve(arrays, weights, 2, place=0.0)[:2], [[3, 1], [3, 1]])
    assert excess_alive_curve(arrays, weights, 2)[0].tolist() == [1, 1]


def test_replacement_costs_more_the_more_there_is(data: dict[str, Intervention]) -> None:
    """Arrays of real files: finite, one row a prompt, and the clean rate is the clean file."""
    rates, arrays = corruption_arrays(data["corruption"])
    assert rates == [0, 0.2, 0.6]
    clean = data["corruption"].matrix(CLEAN, "forward_kl")[0].sum()
    for kind in KINDS:
        np.testing.assert_allclose(arrays[f"{kind}_forward_kl"][:, 0].sum(), clean, rtol=1e-6)
        assert np.isfinite(corruption_area_nats(arrays, ONES, tuple(rates), kind)).all()
    behind = excess_arrays(data["recovery"])
    assert all(len(values) == len(PROMPTS) for values in [*arrays.values(), *behind.values()])
    assert behind["random_alive"].max() == 2  # two places
    assert np.array_equal(behind["random_alive"], behind["random@1_alive"] + behind["random@4_alive"])


def test_curves_do_not_import_torch() -> None:
    code = "import sys, kdbench.counterfactuals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
