"""Keyed sampling: the stream of uniform numbers, and responses that depend on their keys only."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import EOS, Array, V, make_rows, ragged_rows, tiny_gpt2
from scipy import stats
from torch import Tensor, nn
from transformers import NoRepeatNGramLogitsProcessor

from kdbench.decoding import CachedStream, GPT2Stream
from kdbench.distiller import Batch
from kdbench.predict import CausalLM
from kdbench.prompts import PromptedModel, SoftPrompt
from kdbench.rollout import (
    Draw,
    _NgramBan,
    evaluating,
    inverse_cdf,
    inverse_cdf_in_blocks,
    rollout,
)
from kdbench.streams import generator, stream_seed, uniform

PROMPTS = [[3, 4], [5], [6, 7, 8, 9, 10, 11, 12], [1, 2, 3], [4, 4], [9, 8, 7, 6], [2], [12, 1, 5]]


def prompts(rows: list[list[int]] = PROMPTS) -> Batch:
    """Prompts without responses; the padding is EOS, and so is a token inside the third prompt."""
    return make_rows(rows, [[] for _ in rows])


def prompted(model: nn.Module, length: int = 3) -> PromptedModel:
    torch.manual_seed(5)
    return PromptedModel(model, SoftPrompt.random(model, length).double())


def response(batch: Batch, row: int) -> list[int]:
    start, stop = int(batch["prompt_length"][row]), int(batch["length"][row])
    found: list[int] = batch["input_ids"][row, start:stop].tolist()
    return found


def responses(batch: Batch) -> list[list[int]]:
    return [response(batch, row) for row in range(batch.size)]


def next_probabilities(model: nn.Module, ids: list[int], temperature: float = 1.0) -> Array:
    """Softmax [V] after `ids`, from one row without padding or cache, behind the soft prompt if any."""
    inner: Any = model.model if isinstance(model, PromptedModel) else model
    with torch.no_grad():
        embedded = inner.get_input_embeddings()(torch.tensor([ids]))
        if isinstance(model, PromptedModel):
            embedded = torch.cat([model.prompt.vectors[None], embedded], dim=1)
        logits = inner(inputs_embeds=embedded).logits[0, -1].numpy() / temperature
    weights = np.exp(logits - logits.max())
    found: Array = weights / weights.sum()
    return found


# ------------------------------------------------------------------------------ the stream of uniforms
def mix(x: int) -> int:
    """SplitMix64 in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, 10, 2**40])
def test_uniform_is_splitmix_of_its_keys(seed: int) -> None:
    examples = [0, 1, 7, 12_345, 2**62, -1]
    for draw, position in [(0, 0), (3, 17), (1000, 255)]:
        found = uniform(seed, torch.tensor(examples), draw, position)
        start = stream_seed(seed, "sampling")
        expected = [mix(mix(mix(mix(start) ^ (e % 2**64)) ^ draw) ^ position) >> 11 for e in examples]
        assert found.tolist() == [one / 2**53 for one in expected]


def test_uniform_golden_values() -> None:
    """These numbers may never change: published records hang on them."""
    assert stream_seed(1, "sampling") == 4_444_209_098_998_083_816
    assert uniform(1, torch.tensor([0, 1, 99]), 2, 3).tolist() == [
        0.43783450266958135,
        0.3795770809094098,
        0.7697301205165187,
    ]


def test_uniform_is_uniform_and_independent_over_each_key() -> None:
    n = 20_000
    ids = torch.arange(n)
    base = uniform(1, ids, 0, 0).numpy()
    assert base.min() >= 0
    assert base.max() < 1
    assert stats.kstest(base, "uniform").pvalue > 1e-3
    positions = np.array([float(uniform(1, torch.tensor([5]), 0, t)) for t in range(2000)])
    assert stats.kstest(positions, "uniform").pvalue > 1e-3
    others = {
        "seed": uniform(2, ids, 0, 0),
        "example": uniform(1, ids + 1, 0, 0),
        "draw": uniform(1, ids, 1, 0),
        "position": uniform(1, ids, 0, 1),
        "draw and position": uniform(1, ids, 1, 1),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other.numpy())[0, 1]) < 4 / math.sqrt(n), name
        cells = np.histogram2d(base, other.numpy(), bins=8, range=[[0, 1], [0, 1]])[0].ravel()
        assert stats.chisquare(cells).pvalue > 1e-4, name


def test_draw_and_position_do_not_trade_places() -> None:
    ids = torch.arange(50)
    assert not torch.equal(uniform(1, ids, 2, 3), uniform(1, ids, 3, 2))
    assert not torch.equal(uniform(1, ids, 0, 1), uniform(1, ids, 1, 0))


def test_generators_differ_by_name_and_counters_and_repeat() -> None:
    def first(*keys: Any) -> float:
        return float(torch.rand((), generator=generator(*keys)))

    assert first(1, "order", 2) == first(1, "order", 2)
    assert len({first(1, "order", 2), first(1, "order", 3), first(2, "order", 2), first(1, "orde", 2)}) == 4
    assert stream_seed(1, "a", 23) != stream_seed(1, "a", 2, 3)
    assert 0 <= stream_seed(1, "a") < 2**63


# ------------------------------------------------------------------------- independence of composition
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"mix": True}, {"top_k": 4, "top_p": 0.9, "no_repeat_ngram": 2}])
def test_response_depends_on_its_keys_alone(soft: bool, options: dict[str, Any]) -> None:
    model: nn.Module = tiny_gpt2(1, width=16, layers=2)
    options = dict(options)
    if options.pop("mix", False):
        options["mix"] = (tiny_gpt2(2, width=8), 0.3)
    if soft:
        model = prompted(model)
    batch = prompts()
    whole = rollout(model, batch, Draw(1, 4, rollout_batch=8), 20, **options)
    lengths = (whole["length"] - whole["prompt_length"]).tolist()
    assert len(set(lengths)) > 1, "the example is too tame"
    assert not bool(whole["finished"].all()), "the example is too tame"
    for size in (1, 3, 100):
        assert responses(rollout(model, batch, Draw(1, 4, size), 20, **options)) == responses(whole)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    mixed = rollout(model, batch.rows(order), Draw(1, 4, 3), 20, **options)
    assert responses(mixed) == [responses(whole)[row] for row in order]
    assert mixed["finished"].tolist() == [whole["finished"].tolist()[row] for row in order]
    ids = torch.cat(
        [batch["input_ids"], torch.full((batch.size, 5), 7)], dim=1
    )  # padding of another id and width
    ids = torch.where(torch.arange(ids.shape[1]) < batch["prompt_length"][:, None], ids, 7)
    assert responses(rollout(model, batch.replace(input_ids=ids), Draw(1, 4), 20, **options)) == responses(
        whole
    )
    shorter = rollout(model, batch, Draw(1, 4, 3), 9, **options)  # a lower limit cuts, no more
    assert responses(shorter) == [one[:9] for one in responses(whole)]


def test_other_keys_give_other_responses() -> None:
    model, batch = tiny_gpt2(1), prompts()
    base = responses(rollout(model, batch, Draw(1, 0), 12))
    assert responses(rollout(model, batch, Draw(1, 0), 12)) == base
    assert responses(rollout(model, batch, Draw(2, 0), 12)) != base
    assert responses(rollout(model, batch, Draw(1, 1), 12)) != base
    renamed = batch.replace(example_id=batch["example_id"] + 1)
    assert responses(rollout(model, renamed, Draw(1, 0), 12)) != base


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
def test_tokens_are_the_inverse_cdf_of_the_models_distribution(
    soft: bool, temperature: float, alpha: float | None
) -> None:
    """Every token is worked out again from the model's own forward of one unpadded row, in numpy."""
    model: nn.Module = tiny_gpt2(1)
    teacher: nn.Module = tiny_gpt2(2, width=16, layers=2)
    if soft:
        model, teacher = prompted(model), prompted(teacher, 2)
    batch = prompts()
    mixed = None if alpha is None else (teacher, alpha)
    sampled = rollout(model, batch, Draw(3, 1, 3), 8, temperature=temperature, mix=mixed)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for position, token in enumerate(response(sampled, row)):
            mass = next_probabilities(model, ids, temperature)
            if alpha is not None:
                mass = (1 - alpha) * mass + alpha * next_probabilities(teacher, ids, temperature)
            u = float(uniform(3, batch["example_id"][row : row + 1], 1, position))
            assert token == int(np.searchsorted(mass.cumsum(), u, side="right"))
            ids.append(token)


def test_samples_follow_the_distribution() -> None:
    model = tiny_gpt2(1)
    n = 4000
    batch = prompts([[3, 4]] * n)
    first = np.array([one[0] for one in responses(rollout(model, batch, Draw(1, 0, 1000), 1))])
    assert (
        stats.chisquare(np.bincount(first, minlength=V), n * next_probabilities(model, [3, 4])).pvalue > 1e-3
    )


# ----------------------------------------------------------------------------------- decoding settings
def test_top_k_and_top_p_cut_and_keep_proportions() -> None:
    model = tiny_gpt2(1)
    mass = next_probabilities(model, [3, 4])
    order = np.argsort(-mass)
    n = 3000
    batch = prompts([[3, 4]] * n)
    nucleus = int(np.searchsorted(mass[order].cumsum(), 0.8)) + 1  # the fewest tokens that hold 0.8
    assert 1 < nucleus < V - 1
    for options, kept in [
        ({"top_k": 3}, 3),
        ({"top_p": 0.8}, nucleus),
        ({"top_k": 1}, 1),
        ({"top_p": 1e-9}, 1),
    ]:
        sampled = rollout(model, batch, Draw(2, 0, 1000), 1, **options)
        first = np.array([one[0] for one in responses(sampled)])
        counts = np.bincount(first, minlength=V)
        expected = np.zeros(V)
        expected[order[:kept]] = mass[order[:kept]] / mass[order[:kept]].sum()
        assert counts[expected == 0].sum() == 0
        if kept > 1:
            live = expected > 0
            assert stats.chisquare(counts[live], n * expected[live]).pvalue > 1e-3


def test_no_token_without_mass_is_drawn_at_either_end() -> None:
    mass = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.25, 0.25, 0.25, 0.25, 0.0]])
    assert inverse_cdf(mass, torch.zeros(2, dtype=torch.float64)).tolist() == [2, 1]
    top = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    assert inverse_cdf(mass, top).tolist() == [4, 4]
    assert inverse_cdf(mass, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [4, 3]
    skewed = (
        torch.rand(1000, 50, generator=torch.Generator().manual_seed(0)) ** 40
    )  # float32, many tiny, some 0
    skewed[:, 40:] = 0
    drawn = inverse_cdf(skewed, top[:1].expand(1000))
    assert bool((skewed.gather(1, drawn[:, None]) > 0).all())


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_ngram_ban_is_that_of_transformers(n: int) -> None:
    processor = NoRepeatNGramLogitsProcessor(n)
    rng = torch.Generator().manual_seed(n)
    for _ in range(20):
        ids = torch.randint(0, 3, (25,), generator=rng).tolist()
        ban = _NgramBan(n, ids[:4])
        for end in range(4, 26):
            scores = processor(torch.tensor([ids[:end]]), torch.zeros(1, 5))
            assert ban.banned() == set((scores[0] == -math.inf).nonzero()[:, 0].tolist())
            if end < 25:
                ban.push(ids[end])


@pytest.mark.parametrize("ngram", [0, 1, 2, 4])
def test_greedy_tokens_are_those_of_generate(ngram: int) -> None:
    """With pad == eos, and left padding in both."""
    model: Any = tiny_gpt2(1, width=16, layers=2)
    batch = prompts()
    found = responses(rollout(model, batch, Draw(1), 10, temperature=0, no_repeat_ngram=ngram))
    width = int(batch["prompt_length"].max())
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    for row in range(len(PROMPTS)):  # a row at a time where padding would count as repeated text
        keep = slice(width - len(PROMPTS[row]) if ngram else 0, None)
        out = model.generate(
            ids[row : row + 1, keep],
            attention_mask=mask[row : row + 1, keep],
            max_new_tokens=10,
            do_sample=False,
            no_repeat_ngram_size=ngram,
            pad_token_id=EOS,
        )
        expected = out[0, ids[row, keep].shape[0] :].tolist()
        assert found[row] == (expected[: expected.index(EOS) + 1] if EOS in expected else expected)
    assert len({tuple(one) for one in found}) > 3


def test_forbidden_bigrams_do_not_occur() -> None:
    sampled = rollout(tiny_gpt2(1), prompts(), Draw(1), 20, no_repeat_ngram=2)
    for row, prompt in enumerate(PROMPTS):
        text = prompt + response(sampled, row)
        pairs = list(pairwise(text))
        assert len(pairs) == len(set(pairs))


# -------------------------------------------------------------------------------------- ends and masks
def test_eos_is_kept_once_and_padding_may_be_eos() -> None:
    batch = prompts([[3, EOS, 4], [5], [EOS], [6, 7, 8, EOS]])  # EOS inside and at the end of prompts is text
    sampled = rollout(tiny_gpt2(1), batch, Draw(2, 0, 3), 12)
    assert 0 < int(sampled["finished"].sum()) < 4
    for row in range(4):
        tokens = response(sampled, row)
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == bool(sampled["finished"][row])
        assert len(tokens) == 12 or tokens[-1] == EOS
        prompt = int(batch["prompt_length"][row])
        assert torch.equal(sampled["input_ids"][row, :prompt], batch["input_ids"][row, :prompt])
    assert sampled["input_ids"].shape[1] == int(sampled["length"].max())


def test_any_of_several_end_tokens_ends_a_response() -> None:
    model = tiny_gpt2(1)
    model.config.eos_token_id = [EOS, 7]  # type: ignore[assignment]
    sampled = rollout(model, prompts(), Draw(1), 25)
    assert {tokens[-1] for tokens in responses(sampled)} >= {7}
    for tokens in responses(sampled):
        assert not {EOS, 7} & set(tokens[:-1])


def test_other_fields_stay_totals_go_and_tokens_are_counted() -> None:
    counted: dict[str, float] = {}

    class Counting(Draw):
        def count(self, name: str, amount: float) -> None:
            counted[name] = counted.get(name, 0.0) + amount

    batch = prompts().replace(row=torch.arange(8)).with_totals(ragged_rows().counts())
    sampled = rollout(tiny_gpt2(1), batch, Counting(1), 6)
    assert sampled["row"].tolist() == list(range(8))
    assert counted == {"tokens_sampled": sum(len(one) for one in responses(sampled))}
    assert sampled.totals == sampled.counts()


def test_no_rows_give_no_rows() -> None:
    sampled = rollout(tiny_gpt2(1), prompts().rows([]), Draw(1), 6)
    assert sampled.size == 0
    assert sampled["finished"].dtype == torch.bool
    assert sampled["input_ids"].dim() == 2


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = tiny_gpt2(1)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    batch = prompts()
    first = rollout(model, batch, Draw(1), 6)
    assert [module.training for module in model.modules()] == before
    assert responses(first) == responses(rollout(model.eval(), batch, Draw(1), 6)), "dropout was on"
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError("inside")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"no_repeat_ngram": -1}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rollout(tiny_gpt2(1), prompts(), Draw(1), 6, **wrong)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        rollout(tiny_gpt2(1), prompts(), Draw(1), 0)


# --------------------------------------------------------------------------- models that are not plain
class Capped(type(tiny_gpt2(0))):  # type: ignore[misc]
    """A GPT-2 that scales its logits after the head, as Granite and Cohere do; some others cap them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 4 * torch.tanh(out.logits / 2)
        return out


def test_logits_changed_after_the_head_are_respected() -> None:
    plain = tiny_gpt2(1)
    model = Capped(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    found = responses(rollout(model, prompts(), Draw(3, 1), 8))
    assert found != responses(rollout(plain, prompts(), Draw(3, 1), 8))
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for position, token in enumerate(found[row]):
            u = float(uniform(3, torch.tensor([100 + row]), 1, position))
            assert token == int(np.searchsorted(next_probabilities(model, ids).cumsum(), u, side="right"))
            ids.append(token)


def test_ids_beyond_the_usable_vocabulary_are_never_drawn() -> None:
    model = tiny_gpt2(1)
    free = {token for one in responses(rollout(model, prompts(), Draw(1), 20)) for token in one}
    model.config.kdbench_vocab = 8
    cut = {token for one in responses(rollout(model, prompts(), Draw(1), 20)) for token in one}
    assert max(free) >= 8 > max(cut)
    ids = [3, 4]
    mass = next_probabilities(model, ids)[:8]
    u = float(uniform(1, torch.tensor([100]), 0, 0))
    first = rollout(model, prompts([ids]), Draw(1), 1)
    assert response(first, 0) == [int(np.searchsorted((mass / mass.sum()).cumsum(), u, side="right"))]


def test_a_mixture_of_different_vocabularies_is_over_the_shared_ids() -> None:
    model, teacher = tiny_gpt2(1), tiny_gpt2(2)
    model.config.kdbench_vocab = teacher.config.kdbench_vocab = 9
    sampled = rollout(model, prompts(), Draw(1), 20, mix=(teacher, 0.5))
    assert max(token for one in responses(sampled) for token in one) < 9


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", [GPT2Stream, CachedStream])
def test_logits_of_a_stream_equal_those_of_single_rows(kind: Any, soft: bool) -> None:
    """The soft prompt stands between padding and text, at positions 0..k-1."""
    model: nn.Module = tiny_gpt2(1, width=16, layers=2)
    if soft:
        model = prompted(model)
    width = max(len(p) for p in PROMPTS)
    ids = torch.tensor([p + [7] * (width - len(p)) for p in PROMPTS])
    lengths, more = torch.tensor([len(p) for p in PROMPTS]), () if kind is CachedStream else (2,)
    with torch.no_grad():
        stream = kind(CausalLM(model), ids, lengths, *more)
        check_logits(stream.logits, model, PROMPTS)
        stream.push(torch.arange(len(PROMPTS)))
        grown = [[*p, i] for i, p in enumerate(PROMPTS)]
        check_logits(stream.logits, model, grown)
        stream.keep(torch.tensor([6, 1, 2]))
        stream.push(torch.tensor([1, 2, 3]))
    check_logits(stream.logits, model, [[*grown[6], 1], [*grown[1], 2], [*grown[2], 3]])


def check_logits(logits: Tensor, model: nn.Module, rows: list[list[int]]) -> None:
    expected = np.stack([next_probabilities(model, row) for row in rows])
    np.testing.assert_allclose(torch.softmax(logits, -1).numpy(), expected, rtol=1e-12, atol=1e-14)


def test_the_inverse_in_blocks_of_float32_is_that_of_its_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.rand(300, 1001, generator=draw) ** 6 * (torch.rand(300, 1001, generator=draw) < 0.3)
    u = torch.rand(300, dtype=torch.float64, generator=draw)
    drawn = inverse_cdf_in_blocks(p, u)
    assert torch.equal(drawn, inverse_cdf(p.double(), u)), "no random share is within rounding of a step"
    assert bool((p.gather(1, drawn[:, None]) > 0).all())


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 64, 501])
def test_the_inverse_in_blocks_is_the_inverse(vocab: int) -> None:
    """With tokens and blocks of no mass, both ends of [0, 1), and a distribution that is not finite."""
    draw = torch.Generator().manual_seed(vocab)
    p = torch.rand(400, vocab, dtype=torch.float64, generator=draw) ** 6
    p = p * (torch.rand(400, vocab, generator=draw) < 0.3)
    p[:, -1] += (p.sum(-1) == 0).double()
    p[:50, : vocab // 2] = 0
    p[50:100, vocab // 2 :] = 0
    p[50:100, 0] += 1
    p[:50, -1] += 1
    u = torch.rand(400, dtype=torch.float64, generator=draw)
    plain = inverse_cdf_in_blocks(p, u, block=8)
    assert torch.equal(plain, inverse_cdf(p, u)), "no random share is within rounding of a step"
    u[::2], u[1::2] = 0.0, 1 - 2.0**-53
    ends = inverse_cdf_in_blocks(p, u, block=8)
    assert bool((p.gather(1, ends[:, None]) > 0).all())
    assert torch.equal(ends[::2], (p[::2] > 0).int().argmax(-1)), "the first of any mass"
    cdf = p.cumsum(-1)
    reached = cdf.gather(1, ends[:, None])[1::2, 0]
    assert bool((reached >= (1 - 1e-12) * cdf[1::2, -1]).all()), "the last of any mass, up to rounding"
    p[0] = torch.nan
    assert int(inverse_cdf_in_blocks(p, u, block=8)[0]) == vocab
