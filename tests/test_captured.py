"""Sampling on fast paths: decoders against the model's own forward pass, and the step that a GPU captures,
here without its graph, against sampling token by token.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from method_kit import EOS, V, make_rows, tiny_gpt2
from test_packing import make
from test_rollout import check_logits, prompted, prompts, responses
from torch import Tensor, nn

from kdbench import captured, rollout
from kdbench.captured import Bucket, rows_of
from kdbench.decoding import CachedStream, GPT2Stream, stream
from kdbench.distiller import Batch, gather_targets
from kdbench.errors import Diverged
from kdbench.losses import token_log_prob
from kdbench.predict import CausalLM, predict
from kdbench.prompts import PromptedModel
from kdbench.rollout import Draw, _Sampler
from kdbench.streams import uniform

Roll = Callable[..., Batch]
ENDS: Any = [EOS, 2, 3, 7]
LENGTHS = [1, 1, 2, 3, 3, 5, 7, 7, 7, 9, 12, 14, 1, 4, 6, 8, 2, 10, 11, 13]


def many(rows: int, level: int = 0) -> Batch:
    """Prompts of 1 to 14 tokens (of `level` tokens each, if given) with EOS inside, padded with EOS."""
    generator = torch.Generator().manual_seed(rows)
    sizes = [level or LENGTHS[i % len(LENGTHS)] for i in range(rows)]
    made = [torch.randint(0, V, (n,), generator=generator).tolist() for n in sizes]
    return make_rows(made, [[] for _ in made])


@pytest.fixture
def by_captured(monkeypatch: pytest.MonkeyPatch) -> Roll:
    """`rollout` by the step that a GPU captures, run as it is; the host looks often."""
    monkeypatch.setattr(captured, "CHECK_EVERY", 3)
    monkeypatch.setattr(captured, "WIDTH", 8)

    def run(model: nn.Module, batch: Batch, step: Any, *args: Any, **options: Any) -> Batch:
        with monkeypatch.context() as patch:

            def instead(
                self: _Sampler, ids: Tensor, lengths: Tensor, shares: Tensor, room: Tensor, say: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                assert captured.fits(self.views, lengths)
                return self._captured(ids, lengths, shares, room)

            patch.setattr(_Sampler, "_stepwise", instead)
            return rollout.rollout(model, batch, step, *args, **options)

    return run


def buckets(model: nn.Module) -> dict[Any, Bucket]:
    return captured._buckets.get(CausalLM(model).inner, {})


def assert_same(one: Batch, other: Batch, near: float = 1e-5) -> None:
    assert responses(one) == responses(other)
    assert one["length"].tolist() == other["length"].tolist()
    assert one["finished"].tolist() == other["finished"].tolist()
    if "sampled_log_prob" in other:
        torch.testing.assert_close(one["sampled_log_prob"], other["sampled_log_prob"], rtol=near, atol=near)


# ------------------------------------------------------------------------------ decoders, token by token
@pytest.mark.parametrize(
    ("kind", "rows", "level"),
    [
        ("gpt2", 1, 0),
        *[("gpt2", rows, level) for rows in (8, 9, 20) for level in (0, 4)],
        ("gpt2_untied", 9, 0),
        ("llama_gqa", 9, 0),
        ("opt", 9, 0),
    ],
)
@pytest.mark.parametrize("soft", [0, 3])
def test_a_streams_logits_are_the_models_own(kind: str, rows: int, level: int, soft: int) -> None:
    """Over many tokens, while rows leave in any order."""
    model = make(kind)
    reference: nn.Module = copy.deepcopy(model)
    if soft:
        reference, model = prompted(reference, soft), prompted(model, soft)
    batch = many(rows, level)
    ids, lengths = batch["input_ids"], batch["prompt_length"]
    texts = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made = stream(CausalLM(model), ids, lengths, 8)
        assert type(made) is (GPT2Stream if kind.startswith("gpt2") else CachedStream)
        for step in range(6):
            assert len(made.logits) == len(texts)
            if step in (0, 3, 5):
                expected = torch.stack([own_logits(reference, text) for text in texts])
                torch.testing.assert_close(made.logits, expected, rtol=1e-11, atol=1e-11)
            if len(texts) > 2 and step % 2:
                kept = torch.randperm(len(texts), generator=generator)[: len(texts) * 2 // 3]
                made.keep(kept)
                texts = [texts[i] for i in kept.tolist()]
            tokens = torch.randint(0, V, (len(texts),), generator=generator)
            made.push(tokens)
            texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]


def own_logits(model: Any, ids: list[int]) -> Tensor:
    """Next-token logits [V] of one row by the model's own forward pass."""
    inner: Any = model.model if isinstance(model, PromptedModel) else model
    embedded = inner.get_input_embeddings()(torch.tensor([ids]))
    if isinstance(model, PromptedModel):
        embedded = torch.cat([model.prompt.vectors[None], embedded], dim=1)
    found: Tensor = inner(inputs_embeds=embedded).logits[0, -1]
    return found


def test_models_that_are_watched_or_are_no_plain_gpt2_are_not_written_out() -> None:
    batch = many(3)
    for change in ("hook", "head", "eager"):
        model: Any = make("gpt2")
        seen: list[int] = []
        if change == "hook":
            model.transformer.h[0].mlp.register_forward_hook(lambda *call, seen=seen: seen.append(1))
        elif change == "head":
            model.set_output_embeddings(nn.Sequential(nn.Linear(16, V)).double())
        else:
            model.set_attn_implementation("eager")
        assert not captured.fits([CausalLM(model)], batch["prompt_length"])
        seen.clear()
        with torch.no_grad():
            made = stream(CausalLM(model), batch["input_ids"], batch["prompt_length"], 4)
            assert type(made) is CachedStream
            made.push(torch.tensor([1, 2, 3]))
        prompts = zip(batch["input_ids"].tolist(), batch["prompt_length"].tolist(), strict=True)
        texts = [[*ids[:n], i + 1] for i, (ids, n) in enumerate(prompts)]
        check_logits(made.logits, model, texts)
        assert bool(seen) == (change == "hook")


# --------------------------------------------------------------------------- independence of the batch
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mix": {"mix": 0.3},
    "cut": {"top_k": 5, "top_p": 0.9, "temperature": 1.5},
    "greedy": {"temperature": 0.0},
    "greedy mix": {"temperature": 0.0, "mix": 0.5},
}


def resolved(options: dict[str, Any], soft: bool = False) -> dict[str, Any]:
    options = dict(options)
    if "mix" in options:
        teacher: nn.Module = tiny_gpt2(2, width=8)
        options["mix"] = (prompted(teacher, 2) if soft else teacher, options["mix"])
    return options


@pytest.mark.parametrize("path", ["gpt2", "gpt2, in blocks", "llama_gqa", "captured"])
@pytest.mark.parametrize("name", ["plain", "mix", "cut"])
def test_responses_do_not_depend_on_the_batch(
    path: str, name: str, by_captured: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of size 1, 7 and 64, permuted, and with rows twice in it; in float64, where no rounding shows."""
    if "blocks" in path:
        monkeypatch.setattr(rollout, "IN_BLOCKS", 0)
        small = partial(rollout.inverse_cdf_in_blocks, block=5)  # the vocabulary is some blocks and a rest
        monkeypatch.setattr(rollout, "inverse_cdf_in_blocks", small)
    roll = by_captured if path == "captured" else rollout.rollout
    model = make("llama_gqa") if path == "llama_gqa" else tiny_gpt2(1, width=16, layers=2)
    model.config.eos_token_id = [EOS, 3] if path == "llama_gqa" else ENDS
    options = resolved(OPTIONS[name])
    batch = many(13)
    whole = roll(model, batch, Draw(1, 4, 64), 11, **options, log_probs=True)
    assert len({len(one) for one in responses(whole)}) > 3, "the example is too tame"
    assert bool(whole["finished"].any()), "the example is too tame"
    for size in (1, 7):
        assert_same(roll(model, batch, Draw(1, 4, size), 11, **options, log_probs=True), whole)
    order = [7, 0, 12, 3, 5, 1, 11, 3, 9, 3, 8, 4]  # some rows twice, some not at all
    mixed = roll(model, batch.rows(order), Draw(1, 4, 7), 11, **options)
    assert responses(mixed) == [responses(whole)[row] for row in order]
    assert mixed["finished"].tolist() == [bool(whole["finished"][row]) for row in order]


@pytest.mark.parametrize("path", ["stepwise", "captured"])
def test_tokens_are_drawn_from_the_models_distribution_by_their_key(path: str, by_captured: Roll) -> None:
    """Each worked out again from the model's own forward pass of one row, in float64."""
    roll = by_captured if path == "captured" else rollout.rollout
    model = tiny_gpt2(1, width=16, layers=2)
    reference, batch = copy.deepcopy(model), many(12)
    sampled = roll(model, batch, Draw(3, 1, 5), 9)
    for row, response in enumerate(responses(sampled)):
        ids = batch["input_ids"][row, : int(batch["prompt_length"][row])].tolist()
        for place, token in enumerate(response):
            with torch.no_grad():
                mass = own_logits(reference, ids).softmax(-1).cumsum(-1)
            u = uniform(3, batch["example_id"][row : row + 1], 1, place)
            assert token == int(torch.searchsorted(mass, u, right=True))
            ids.append(token)
        assert (EOS in response) == bool(sampled["finished"][row])


@pytest.mark.parametrize("path", ["stepwise", "captured", "llama_gqa"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["mix", "cut", "greedy"])
def test_log_probabilities_are_those_that_training_sees(
    path: str, soft: bool, name: str, by_captured: Roll
) -> None:
    """Of the model alone, at temperature 1 and with nothing cut, whatever the tokens were drawn from."""
    roll = by_captured if path == "captured" else rollout.rollout
    model: nn.Module = make("llama_gqa") if path == "llama_gqa" else tiny_gpt2(1, width=16, layers=2)
    model = prompted(model) if soft else model
    sampled = roll(model, many(9), Draw(1, 4, 5), 6, **resolved(OPTIONS[name], soft), log_probs=True)
    found = sampled["sampled_log_prob"]
    assert found.shape == (9, sampled["input_ids"].shape[1] - 1)
    with torch.no_grad():
        seen = token_log_prob(predict(model, sampled))
    torch.testing.assert_close(gather_targets(found, sampled).double(), seen, rtol=1e-6, atol=1e-6)
    assert int((found != 0).sum()) == len(seen)


# ------------------------------------------------------------------------------------ the captured step
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("eos", ["one", "several", "none"])
def test_captured_steps_give_what_single_steps_give(
    soft: bool, name: str, eos: str, by_captured: Roll
) -> None:
    """In buckets that shrink as rows end, with more rows in them than there are."""
    model: Any = tiny_gpt2(1, width=16, layers=2)
    model.config.eos_token_id = {"one": EOS, "several": ENDS, "none": None}[eos]
    options, behind = resolved(OPTIONS[name], soft), prompted(model) if soft else model
    batch = many(19)
    one = rollout.rollout(behind, batch, Draw(5, 2, 64), 16, **options, log_probs=True)
    assert_same(by_captured(behind, batch, Draw(5, 2, 64), 16, **options, log_probs=True), one)
    sizes = {key[0] for key in buckets(model)}
    assert max(sizes) == rows_of(19) == 24
    if eos == "several" and "greedy" not in name:
        assert len(sizes) > 1, "the example is too tame"
    assert eos != "none" or not bool(one["finished"].any())


def test_responses_that_go_on(by_captured: Roll) -> None:
    """Each row has room for the rest of its response alone, and the keys of its places in the whole one."""
    model = tiny_gpt2(1, width=16, layers=2)
    model.config.eos_token_id = None
    batch = many(10)
    whole = rollout.rollout(model, batch, Draw(1, 0, 64), 11)
    done = torch.tensor([0, 3, 11, 1, 0, 10, 5, 11, 2, 7])
    text = [
        row[: int(p + d)].tolist()
        for row, p, d in zip(whole["input_ids"], whole["prompt_length"], done, strict=True)
    ]
    going = make_rows(text, [[] for _ in text]).replace(response_offset=done)
    for roll in (rollout.rollout, by_captured):
        more = roll(model, going, Draw(1, 0, 64), 11, log_probs=True)
        assert [t + r for t, r in zip(text, responses(more), strict=True)] == [
            row[: int(n)].tolist() for row, n in zip(whole["input_ids"], whole["length"], strict=True)
        ]


def test_a_row_without_room_does_not_end_later(by_captured: Roll) -> None:
    """What the bucket draws for it while other rows go on is no part of its response."""
    model = tiny_gpt2(1, width=16, layers=2)
    model.config.eos_token_id = ENDS
    batch = many(10).replace(response_offset=torch.tensor([0, 3, 11, 1, 0, 10, 5, 11, 2, 7]))
    for visit in range(3):
        one = rollout.rollout(model, batch, Draw(1, visit, 64), 11)
        assert not bool(one["finished"][[2, 7]].any())
        assert_same(by_captured(model, batch, Draw(1, visit, 64), 11), one)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 17])
def test_rows_of_a_bucket(rows: int) -> None:
    size = rows_of(rows)
    assert rows <= size < max(2 * rows, 3)
    assert rows_of(size) == size
    assert size % 8 == 0 or size in (1, 2, 4)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 20])
def test_any_number_of_tokens(new: int, by_captured: Roll) -> None:
    """Around the number after which the host looks; prompts of one token, and one that fills a bucket."""
    model = tiny_gpt2(1, width=16, layers=2)
    for batch in (prompts(), many(3, level=1), many(2, level=12)):
        one = rollout.rollout(model, batch, Draw(5), new, log_probs=True)
        assert_same(by_captured(model, batch, Draw(5), new, log_probs=True), one)


def test_a_bucket_reads_the_weights_as_they_are(by_captured: Roll) -> None:
    """Also the biases, norms, embeddings and positions, which it may read in place."""
    model, batch = tiny_gpt2(1, width=16, layers=2), many(9)
    before = by_captured(model, batch, Draw(5), 9)
    kept = dict(buckets(model))
    assert kept
    for name, parameter in list(model.named_parameters()):
        with torch.no_grad():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
        after = by_captured(model, batch, Draw(5), 9, log_probs=True)
        assert_same(after, rollout.rollout(model, batch, Draw(5), 9, log_probs=True))
    assert responses(after) != responses(before)
    now = buckets(model)
    assert all(now[key] is one for key, one in kept.items())


def test_buckets_of_a_model_share_its_weights_and_few_are_kept(
    by_captured: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt2(1, width=16, layers=2)
    monkeypatch.setattr(captured, "KEPT", 3)
    for rows in (20, 12, 3, 1, 20):
        for new in (3, 14):
            one = rollout.rollout(model, many(rows), Draw(5), new)
            assert_same(by_captured(model, many(rows), Draw(5), new), one)
            assert len(buckets(model)) <= 3
    assert len({id(bucket.models[0].weights) for bucket in buckets(model).values()}) == 1


def test_a_bucket_follows_weights_that_are_exchanged_or_cast(by_captured: Roll) -> None:
    model, batch = tiny_gpt2(1, width=16, layers=2), many(9)
    by_captured(model, batch, Draw(5), 9)
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data
    one = rollout.rollout(model, batch, Draw(5), 9, log_probs=True)
    assert_same(by_captured(model, batch, Draw(5), 9, log_probs=True), one)
    other = tiny_gpt2(7, width=16, layers=2)
    model.load_state_dict(other.state_dict(), assign=True)
    one = rollout.rollout(other, batch, Draw(5), 9, log_probs=True)
    assert_same(by_captured(model, batch, Draw(5), 9, log_probs=True), one)
    model.float()
    one = rollout.rollout(model, batch, Draw(5), 9, temperature=0.0, log_probs=True)
    assert_same(by_captured(model, batch, Draw(5), 9, temperature=0.0, log_probs=True), one)


def test_a_cut_of_the_vocabulary_is_followed(by_captured: Roll) -> None:
    model, batch = tiny_gpt2(1, width=16, layers=2), many(9)
    for vocab in (None, 9, 7, None):
        model.config.kdbench_vocab = vocab  # type: ignore[assignment]
        one = rollout.rollout(model, batch, Draw(5), 9, log_probs=True)
        assert_same(by_captured(model, batch, Draw(5), 9, log_probs=True), one)


def test_models_share_no_bucket(by_captured: Roll) -> None:
    batch = many(5)
    students = [tiny_gpt2(seed, width=16, layers=2) for seed in (1, 2)]
    for _ in range(2):
        for model in students:
            assert_same(by_captured(model, batch, Draw(5), 9), rollout.rollout(model, batch, Draw(5), 9))
    assert not set(buckets(students[0]).values()) & set(buckets(students[1]).values())
    student = students[0]
    for seed in range(3, 7):  # teachers of one student, each gone before the next, which may take its place
        mix = (tiny_gpt2(seed, width=16, layers=2), 0.8)
        one = rollout.rollout(student, batch, Draw(5), 9, mix=mix)
        assert_same(by_captured(student, batch, Draw(5), 9, mix=mix), one)


def test_settings_of_the_draw_share_no_bucket(by_captured: Roll) -> None:
    model, batch = tiny_gpt2(1, width=16, layers=2), many(5)
    for options in [*OPTIONS.values(), {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.5}, {}]:
        told = resolved(options)
        one = rollout.rollout(model, batch, Draw(5), 9, **told)
        assert_same(by_captured(model, batch, Draw(5), 9, **told), one)
    model.config.eos_token_id = 5
    one = rollout.rollout(model, batch, Draw(5), 9)
    assert_same(by_captured(model, batch, Draw(5), 9), one)


def test_buckets_go_with_their_model(by_captured: Roll) -> None:
    model = tiny_gpt2(1, width=16, layers=2)
    teacher = tiny_gpt2(2, width=8)
    by_captured(model, many(5), Draw(5), 9, mix=(teacher, 0.5))
    bucket = weakref.ref(next(iter(buckets(model).values())))
    student = weakref.ref(model)
    del model
    gc.collect()
    assert student() is None
    assert bucket() is None


@pytest.mark.parametrize("path", ["stepwise", "captured"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_distribution_that_is_not_finite_ends_the_run(
    path: str, temperature: float, by_captured: Roll
) -> None:
    roll = by_captured if path == "captured" else rollout.rollout
    model = tiny_gpt2(1, width=16, layers=2)
    assert CausalLM(model).split
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(Diverged, match="not finite"):
        roll(model, many(5), Draw(5), 9, temperature=temperature)


# ------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("path", ["stepwise", "captured"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(path: str, soft: bool, how: str, by_captured: Roll) -> None:
    """Queries, keys and the mask have one type; log-probabilities are near those that training sees."""
    roll = by_captured if path == "captured" else rollout.rollout
    model: nn.Module = tiny_gpt2(1, width=16, layers=2).float()
    model = model.bfloat16() if how == "weights" else model
    model = prompted(model).float() if soft and how == "autocast" else prompted(model) if soft else model
    for batch in (many(9), many(9, level=3)):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
            sampled = roll(model, batch, Draw(5), 9, log_probs=True)
            seen = token_log_prob(predict(model, sampled))
        told = gather_targets(sampled["sampled_log_prob"], sampled)
        assert float((told - seen).abs().median()) < 0.05
        assert len(seen) == sum(len(one) for one in responses(sampled)) > 20


def test_padding_of_a_bucket_is_not_read(by_captured: Roll, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the rows and slots of a bucket that nobody uses."""
    model, batch = tiny_gpt2(1, width=16, layers=2), many(5)
    one = rollout.rollout(model, batch, Draw(5), 9, log_probs=True)
    start = Bucket.start

    def spoilt(self: Bucket, *args: Any) -> None:
        start(self, *args)
        self.tokens.fill_(3)
        self.said.fill_(torch.nan)
        self.models[0].logits[5:] = torch.nan
        for space in self.models[0].cache:
            for states in space:
                states[5:] = 1e30
                states[:5, :, 14:] = 1e30

    monkeypatch.setattr(Bucket, "start", spoilt)
    assert_same(by_captured(model, batch, Draw(5), 9, log_probs=True), one)
