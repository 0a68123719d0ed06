"""Prompt-Distiller for generation: each term against numpy, the lens, the draws of negatives, identities."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from method_kit import (
    EOS,
    Array,
    FakeStep,
    V,
    kl,
    log_softmax,
    make_rows,
    nll,
    ragged_rows,
    tiny_gpt2,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
)

from kdbench import checks, losses
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch
from kdbench.distillers import prompt_distiller_lm as module
from kdbench.distillers.prompt_distiller_lm import (
    PromptDistillerLM,
    draw_negatives,
    find_lens,
    infonce,
    lens_mean,
    read,
)
from kdbench.distillers.sft import SFT
from kdbench.errors import UserError
from kdbench.harness import BatchSource, SourceData, Trainer
from kdbench.registry import load_distiller
from kdbench.rollout import rollout
from kdbench.streams import stream_seed, uniform


class Visit(FakeStep):
    """A visit of a board with the extra set `unlabeled`, whose next batch is all of it."""

    def __init__(self, unlabeled: Batch | None = None, visit: int = 0) -> None:
        super().__init__(visit=visit)
        self.unlabeled = unlabeled
        self.asked = 0

    def extra(self, name: str) -> Batch | None:
        assert name == "unlabeled"
        self.asked += 1
        return self.unlabeled


class Data:
    """The rows of a board, in parts of `size`."""

    def __init__(self, size: int = 2, **sets: Batch) -> None:
        self.data = SourceData({k: BatchSource(v) for k, v in sets.items()}, size, torch.device("cpu"))

    def batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        return self.data.batches(split, batch_size)


def made(**settings: Any) -> PromptDistillerLM:
    models = [tiny_gpt2(1, layers=3), tiny_gpt2(2, width=16, layers=4), tiny_gpt2(3, width=16, layers=4)]
    return PromptDistillerLM(PromptDistillerLM.Config(**{"max_new_tokens": 5, **settings}), *models)


def unlabeled_rows() -> Batch:
    """Prompts of 1 to 3 tokens; some ids are those of labelled rows, and responses are to be overwritten."""
    prompts = [[9], [8, 7], [1, 2, 3], [12], [5, 5], [6], [10, 4]]
    return make_rows(prompts, [[11] * 3] * len(prompts), first_id=102)


def prepared(size: int = 2, **settings: Any) -> tuple[PromptDistillerLM, dict[str, Batch]]:
    """The method and the rows of both parts, prepared where it asks for it."""
    distiller, sets = made(**settings), {"labeled": ragged_rows(), "unlabeled": unlabeled_rows()}
    found = distiller.prepare(Data(size, train=sets["labeled"], unlabeled=sets["unlabeled"]), FakeStep())
    sets |= {"labeled" if name == "train" else name: rows for name, rows in found.items()}
    return distiller, sets


# ------------------------------------------------------------------------------------ oracles
def lens_oracle(model: Any, batch: Batch) -> Array:
    """pbar [B, V] from the model's own list of states, one unpadded row and one position at a time."""
    norm, table = model.transformer.ln_f, model.lm_head.weight.detach().numpy()
    found = np.zeros((batch.size, table.shape[0]))
    for row, (ids, start, stop) in enumerate(
        zip(batch["input_ids"], batch["prompt_length"], batch["length"], strict=True)
    ):
        with torch.no_grad():
            states = model(input_ids=ids[None, :stop], output_hidden_states=True).hidden_states
        places = range(int(start) - 1, int(stop) - 1)
        for layer in states[1:-1]:
            for place in places:
                x = layer[0, place].numpy()
                x = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
                x = x * norm.weight.detach().numpy() + norm.bias.detach().numpy()
                found[row] += np.exp(log_softmax(table @ x)) / len(places) / (len(states) - 2)
    return found


def negatives_oracle(name: str, anchor: int, pool: list[int], count: int, visit: int = 0) -> list[int]:
    """Places in the pool of one anchor's negatives."""
    seed = stream_seed(FakeStep().seed, f"negatives/{name}")
    keys = [(float(uniform(seed, torch.tensor([anchor]), visit, m)[0]), i) for i, m in enumerate(pool)]
    return [i for _, i in sorted(keys) if pool[i] != anchor][:count]


def cpd_oracle(
    distiller: PromptDistillerLM,
    name: str,
    part: Batch,
    pool_rows: Batch,
    live: Batch | None = None,
    visit: int = 0,
) -> float:
    """CPD of one part; `live`: rows on which the anchors' teacher vectors are computed in full precision."""
    teacher = distiller.tuned if name == "labeled" else distiller.pretrained
    pool, ids = lens_oracle(teacher, pool_rows).astype(np.float16).astype(float), pool_rows["example_id"]
    student, values = lens_oracle(distiller.student, part), []
    for i, anchor in enumerate(part["example_id"].tolist()):
        own = pool[ids.tolist().index(anchor)] if live is None else lens_oracle(teacher, live)[i]
        others = negatives_oracle(name, anchor, ids.tolist(), distiller.cfg.negatives, visit)
        scores = np.exp([own @ student[i], *(pool[m] @ student[i] for m in others)])
        values.append(-math.log(scores[0] / scores.sum()))
    return float(np.mean(values))


# --------------------------------------------------------------------------------- the whole loss
def test_it_is_registered_with_its_settings() -> None:
    assert load_distiller("prompt_distiller_lm") is PromptDistillerLM
    cfg = PromptDistillerLM.Config()
    assert (cfg.lam1, cfg.lam2, cfg.alpha, cfg.kd_form, cfg.probe) == (0.2, 0.2, 1.0, "hinton_t2", "lens")
    assert list(PromptDistillerLM.__init__.__annotations__)[1:-1] == ["student", "tuned", "pretrained"]
    assert {f.name for f in dataclasses.fields(cfg)} >= set(PromptDistillerLM.prepare_reads)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 1.0),
        ({"lam1": 0.7, "lam2": 0.3, "negatives": 2}, 1.0),
        ({"alpha": 2.5}, 6.25),
        ({"alpha": 2.5, "kd_form": "hinton"}, 1.0),
    ],
)
def test_each_term_is_its_formula(settings: dict[str, Any], factor: float) -> None:
    distiller, parts = prepared(**settings)
    step, cfg = FakeStep(), distiller.cfg
    value = distiller.student_loss(parts, step).item()
    teachers = {"labeled": distiller.tuned, "unlabeled": distiller.pretrained}
    expected = {"ce": nll(distiller.student, parts["labeled"])}
    for name, part in parts.items():
        kd = kl(teachers[name], distiller.student, part, cfg.alpha)
        expected[f"kd_{name}"] = cfg.lam1 * factor * kd
        expected[f"cpd_{name}"] = cfg.lam2 * cpd_oracle(distiller, name, part, part)
    assert step.terms == {name: pytest.approx(term, abs=1e-10) for name, term in expected.items()}
    assert value == pytest.approx(sum(expected.values()), abs=1e-10)
    assert len({round(term, 6) for term in expected.values()}) == 5


def test_means_are_over_the_whole_update() -> None:
    distiller, parts = prepared()
    whole = distiller.student_loss(parts, FakeStep()).item()
    cuts = {"labeled": ([3, 1], [0, 4, 2]), "unlabeled": ([6, 0, 2], [1, 3, 4, 5])}
    pieces = [{n: p.with_totals(p.totals).rows(cuts[n][i]) for n, p in parts.items()} for i in (0, 1)]
    assert sum(distiller.student_loss(piece, FakeStep()).item() for piece in pieces) == pytest.approx(
        whole, abs=1e-12
    )


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    distiller, parts = prepared(lam2=5.0)
    distiller.student_loss(parts, FakeStep()).backward()
    weight = distiller.student.get_parameter(name)
    assert weight.grad is not None
    found, flat = weight.grad.flatten(), weight.data.view(-1)
    for entry in (1, 9, 30):
        kept, values = flat[entry].item(), []
        for sign in (1, -1):
            flat[entry] = kept + sign * 1e-5
            values.append(distiller.student_loss(parts, FakeStep()).item())
        flat[entry] = kept
        slope = (values[0] - values[1]) / 2e-5
        assert float(found[entry]) == pytest.approx(slope, abs=1e-8, rel=1e-6)


def test_equal_models_have_no_distillation_term() -> None:
    for form in ("hinton", "hinton_t2"):
        same = [tiny_gpt2(1, layers=3) for _ in range(3)]
        distiller = PromptDistillerLM(PromptDistillerLM.Config(lam2=0.0, alpha=3.0, kd_form=form), *same)
        step = FakeStep()
        distiller.student_loss({"labeled": ragged_rows(), "unlabeled": unlabeled_rows()}, step)
        assert step.terms["kd_labeled"] == step.terms["kd_unlabeled"] == 0
        assert step.terms["ce"] > 0


# ---------------------------------------------------------------------------------- the contrast
def test_infonce_by_hand() -> None:
    student = torch.tensor([0.7, 0.3], dtype=torch.float64)
    teachers = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)
    g = teachers @ student
    value = infonce(g[:1], g[None, 1:], torch.ones(1, 2, dtype=torch.bool))
    assert value.item() == pytest.approx(0.945661, abs=1e-6)
    one = infonce(g[:1], g[None, 1:], torch.tensor([[True, False]]))
    assert one.item() == pytest.approx(math.log1p(math.exp(0.34 - 0.62)), abs=1e-12)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_bounds_of_infonce_and_its_value_for_equal_products(count: int) -> None:
    valid = torch.ones(3, count, dtype=torch.bool)
    g = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    equal = infonce(g, g[:, None].expand(-1, count), valid)
    assert equal.tolist() == pytest.approx([math.log(1 + count)] * 3, abs=1e-12)
    extreme = infonce(g[[0, 2]], (1 - g[[0, 2]])[:, None].expand(-1, count), valid[:2])
    bounds = [math.log(1 + count * math.e), math.log(1 + count / math.e)]
    assert extreme.tolist() == pytest.approx(bounds, abs=1e-12)


def test_an_anchor_without_negatives_adds_nothing() -> None:
    g = torch.tensor([0.3], requires_grad=True)
    value = infonce(g, torch.tensor([[0.9]]), torch.tensor([[False]]))
    value.sum().backward()
    assert value.item() == 0
    assert g.grad is not None
    assert g.grad.item() == 0


def drawn(anchors: Tensor, pool: Tensor, count: int = 3, visit: int = 0, seed: int = 5) -> list[set[int]]:
    index, valid = draw_negatives(seed, visit, anchors, pool, count)
    return [set(row[ok].tolist()) for row, ok in zip(index, valid, strict=True)]


def test_negatives_are_other_examples_without_replacement() -> None:
    pool = torch.tensor([7, 3, 9, 3, 4, 8, 1])
    for visit in range(50):
        for anchor, rows in zip(pool.tolist(), drawn(pool, pool, visit=visit), strict=True):
            assert len(rows) == 3
            assert anchor not in pool[list(rows)].tolist()
    assert drawn(torch.tensor([3]), pool, count=9) == [{0, 2, 4, 5, 6}]
    assert drawn(torch.tensor([2]), torch.tensor([2])) == [set()]


def test_draws_depend_on_their_keys_alone() -> None:
    pool = torch.arange(40)
    whole = drawn(torch.arange(20), pool)
    assert drawn(torch.tensor([11, 4]), pool) == [whole[11], whole[4]]
    turned = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert [{int(turned[i]) for i in row} for row in drawn(torch.arange(20), turned)] == whole
    assert drawn(torch.arange(20), pool, visit=1) != whole
    assert drawn(torch.arange(20), pool, seed=6) != whole
    counts = np.zeros(40)
    for visit in range(400):
        (rows,) = drawn(torch.tensor([13]), pool, visit=visit)
        counts[list(rows)] += 1
    assert counts[13] == 0
    assert counts.sum() == 1200
    others: npt.NDArray[np.float64] = np.delete(counts, 13)
    assert ((others - 1200 / 39) ** 2).sum() / (1200 / 39) < 75  # chi-square, 38 degrees of freedom: p < 1e-3


# --------------------------------------------------------------------------------------- the lens
def test_the_lens_reads_the_inner_layers_at_the_response() -> None:
    model, rows = tiny_gpt2(2, width=16, layers=4), ragged_rows()
    lens = find_lens(model)
    assert lens.layers == tuple(f"transformer.h.{i}" for i in range(3))
    assert lens.norm == "transformer.ln_f"
    q, states = read(model, rows, lens)
    assert states.shape == (3, len(q), 16)
    np.testing.assert_allclose(
        lens_mean(model, lens, states, rows).detach(), lens_oracle(model, rows), atol=1e-12
    )
    ids = torch.tensor([[6, 7, 8, 9]])
    last = {}
    model.transformer.h[3].register_forward_hook(lambda *call: last.setdefault("states", call[2]))
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(module.lens_logits(model, lens, last["states"]), wanted, rtol=0, atol=1e-12)


def test_a_row_without_response_reads_nothing() -> None:
    model, rows = tiny_gpt2(1, layers=2), make_rows([[3, 4], [5]], [[], [6, EOS]])
    lens = find_lens(model)
    pbar = lens_mean(model, lens, read(model, rows, lens)[1], rows)
    assert pbar.sum(1).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


def untied() -> Any:
    torch.manual_seed(4)
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 8, "n_layer": 3, "n_head": 2}
    config = GPT2Config(**sizes, eos_token_id=EOS, bos_token_id=EOS, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config).double().eval()


def test_the_contrast_moves_the_layers_below_and_nothing_of_the_lens() -> None:
    distiller, parts = prepared(lam1=0.0)
    student = untied()
    distiller.student = student
    lens, part = find_lens(student), parts["labeled"]
    q, states = read(student, part, lens)
    terms = distiller._of_teacher("labeled", part, q, states, FakeStep())
    assert list(terms) == ["cpd_labeled"]
    terms["cpd_labeled"].backward()
    for name, param in student.named_parameters():
        still = name.startswith(("transformer.h.2.", "transformer.ln_f.", "lm_head."))
        moved = param.grad is not None and bool(param.grad.any())
        assert moved != still or name.endswith("attn.c_attn.bias"), name


@pytest.mark.parametrize("chunk", [1, 4 * V, 7 * V + 3])
def test_chunks_give_the_same_and_hold_no_more(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller, parts = prepared()

    def result() -> tuple[dict[str, float], dict[str, Tensor]]:
        distiller.zero_grad()
        step = FakeStep()
        distiller.student_loss(parts, step).backward()
        named = distiller.student.named_parameters()
        return step.terms, {name: p.grad.clone() for name, p in named if p.grad is not None}

    terms, gradients = result()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    seen = []

    def counted(*args: Any) -> Tensor:
        seen.append(logits(*args))
        return seen[-1]

    logits = module.lens_logits
    monkeypatch.setattr(module, "lens_logits", counted)
    cut, cut_gradients = result()
    assert cut == {name: pytest.approx(value, abs=1e-13) for name, value in terms.items()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=0, atol=1e-13)
    assert len(seen) > 8
    assert max(len(part) for part in seen) == max(1, chunk // V)


def test_chunks_leave_no_distributions_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_gpt2(2, layers=3), ragged_rows()
    lens, kept = find_lens(model), list[Tensor]()
    _, states = read(model, rows, lens)

    def most(chunk: int) -> int:
        """The rows of the largest [.., V] that is kept."""
        kept.clear()
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lens_mean(model, lens, states, rows)
        return max((t.numel() // V for t in kept if t.shape[-1:] == (V,)), default=0)

    assert most(2**22) == len(states[0]) * len(states)
    assert most(3 * V) == 0


SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        (LlamaConfig(**WIDE, **SPECIAL), "model.norm"),
        (OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, **SPECIAL), "model.decoder.final_layer_norm"),
    ],
    ids=["llama", "opt"],
)
def test_other_architectures(config: Any, norm: str) -> None:
    torch.manual_seed(0)
    model, rows = AutoModelForCausalLM.from_config(config).double().eval(), ragged_rows()
    lens = find_lens(model)
    assert lens.norm == norm
    assert len(lens.layers) == 2
    _, states = read(model, rows, lens)
    width = int(rows["length"].max())
    every = model(input_ids=rows["input_ids"][:, : width - 1], output_hidden_states=True).hidden_states
    mask = module.target_mask(rows)[:, : width - 1]
    for found, wanted in zip(states, every[1:-1], strict=True):
        torch.testing.assert_close(found, wanted[mask], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        OpenAIGPTConfig(vocab_size=V, n_embd=16, n_layer=3, n_head=2),  # norms inside the layers alone
        Gemma2Config(**WIDE, head_dim=8, **SPECIAL),  # logits are capped after the head
    ],
    ids=["gpt1", "gemma2"],
)
def test_models_without_a_lens_are_refused_unless_there_is_no_contrast(config: Any) -> None:
    def build(**settings: Any) -> PromptDistillerLM:
        other = AutoModelForCausalLM.from_config(config)
        models = tiny_gpt2(1, layers=2), other, tiny_gpt2(3, layers=2)
        return PromptDistillerLM(PromptDistillerLM.Config(**settings), *models)

    with pytest.raises(ValueError, match=r"\(tuned\) has no norm .* lam2 = 0"):
        build()
    assert build(lam2=0.0).lenses == {}


class Doubled(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return 2 * states


@pytest.mark.parametrize(
    ("before", "after", "norm"), [([nn.Dropout()], [], "ln_f.1"), ([], [Doubled()], "ln_f")], ids=str
)
def test_the_norm_is_what_explains_the_logits(
    before: list[nn.Module], after: list[nn.Module], norm: str
) -> None:
    model = tiny_gpt2(1, layers=2)
    model.transformer.ln_f = nn.Sequential(*before, model.transformer.ln_f, *after)
    assert find_lens(model).norm == f"transformer.{norm}"


def test_the_shared_vocabulary_alone_is_read() -> None:
    model, rows = tiny_gpt2(1, layers=2), ragged_rows()
    model.config.kdbench_vocab = V - 1  # the last id is padding of the table
    lens = find_lens(model)
    pbar = lens_mean(model, lens, read(model, rows, lens)[1], rows)
    assert pbar.shape == (5, V - 1)
    assert pbar.sum(1).tolist() == pytest.approx([1.0] * 5, abs=1e-12)


# ------------------------------------------------------------------------------ what is prepared
def test_the_pretrained_teacher_answers_the_prompts_once() -> None:
    distiller, sets = prepared()
    rows, prompts = sets["unlabeled"], unlabeled_rows()
    expected = rollout(distiller.pretrained, prompts, FakeStep(), 5)
    for name in ("example_id", "prompt_length", "length", "input_ids"):
        assert torch.equal(rows[name], expected[name]), name
    scrambled = prompts.replace(input_ids=prompts["input_ids"].clone())
    for row, start in enumerate(prompts["prompt_length"]):
        scrambled["input_ids"][row, start:] = 1
    other = made().prepare(Data(3, train=ragged_rows(), unlabeled=scrambled), FakeStep())["unlabeled"]
    assert torch.equal(other["input_ids"], rows["input_ids"])


@pytest.mark.parametrize("size", [2, 7])
def test_pools_hold_the_teachers_vectors_in_half_precision(size: int) -> None:
    distiller, sets = prepared(size)
    for name, teacher in (("labeled", distiller.tuned), ("unlabeled", distiller.pretrained)):
        (pool,) = distiller._pool(name).batches()
        exact = lens_oracle(teacher, sets[name])
        assert pool["mean"].dtype == torch.float16
        assert torch.equal(pool["example_id"][sets[name]["pool_row"]], sets[name]["example_id"])
        apart = np.abs(pool["mean"].double().numpy() - exact)
        assert 0 < apart.max() <= 2**-11 * exact.max()
    plain = ragged_rows()
    for field, value in plain.items():
        assert torch.equal(sets["labeled"][field][:, : value.shape[1]] if value.dim() > 1 else value, value)


def test_without_the_terms_nothing_is_prepared() -> None:
    sets = {"train": ragged_rows(), "unlabeled": unlabeled_rows()}

    def of(**settings: Any) -> set[str]:
        return set(made(**settings).prepare(Data(**sets), FakeStep()))

    assert of() == {"train", "unlabeled"}
    assert of(lam2=0.0) == {"unlabeled"}
    assert of(unlabeled=False) == {"train"}
    assert of(lam1=0.0, lam2=0.0) == of(lam2=0.0, unlabeled=False) == set()
    assert of(lam2=0.0, unlabeled_response="student") == set()
    assert of(unlabeled_response="student") == {"train", "unlabeled"}


def test_the_lack_of_unlabelled_prompts_is_told() -> None:
    for settings in ({}, {"lam2": 0.0}):
        with pytest.raises(UserError, match="there are no rows 'unlabeled'; known: train"):
            made(**settings).prepare(Data(train=ragged_rows()), FakeStep())
    with pytest.raises(ValueError, match="no extra set 'unlabeled'"):
        made(lam2=0.0, unlabeled_response="student").train_step(ragged_rows(), Visit())
    made(unlabeled=False).prepare(Data(train=ragged_rows()), FakeStep())


# --------------------------------------------------------------------------------------- training
def test_a_visit_takes_one_batch_of_each_set() -> None:
    distiller, sets = prepared()
    step = Visit(sets["unlabeled"])
    distiller.train_step(sets["labeled"], step)
    ((group, parts),) = step.updated
    assert group == "student"
    assert dict(parts) == sets
    assert list(parts) == ["labeled", "unlabeled"]


def test_on_policy_responses_are_the_students_at_each_visit() -> None:
    distiller, sets = prepared(unlabeled_response="student", negatives=3)
    written = []
    for visit in (0, 3):
        step = Visit(sets["unlabeled"], visit)
        distiller.train_step(sets["labeled"], step)
        part = step.updated[0][1]["unlabeled"]
        expected = rollout(distiller.student, unlabeled_rows(), FakeStep(visit=visit), 5)
        assert torch.equal(part["input_ids"], expected["input_ids"])
        kd = kl(distiller.pretrained, distiller.student, part)
        cpd = cpd_oracle(distiller, "unlabeled", part, sets["unlabeled"], live=part, visit=visit)
        assert step.terms["kd_unlabeled"] == pytest.approx(0.2 * kd, abs=1e-10)
        assert step.terms["cpd_unlabeled"] == pytest.approx(0.2 * cpd, abs=1e-10)
        written.append(part["input_ids"].tolist())
    assert written[0] != written[1]


def fails(model: nn.Module) -> None:
    for part in (model, model.base_model):
        part.register_forward_pre_hook(lambda *_: pytest.fail("a model was run that no term asks for"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "silent"),
    [
        ({"lam1": 0.0}, ["tuned", "pretrained"]),
        ({"lam1": 0.0, "lam2": 0.0}, ["tuned", "pretrained"]),
        ({"unlabeled": False}, ["pretrained"]),
        ({"lam1": 0.0, "unlabeled_response": "student"}, ["tuned"]),
    ],
)
def test_teachers_run_in_training_only_where_a_term_needs_them(
    settings: dict[str, Any], silent: list[str]
) -> None:
    distiller, sets = prepared(**settings)
    for role in silent:
        fails(getattr(distiller, role))
    step = Visit(sets["unlabeled"])
    distiller.train_step(sets["labeled"], step)
    reads = settings.get("unlabeled", True) and (distiller.cfg.lam1 > 0 or distiller.contrasts)
    assert step.asked == int(reads)


def test_lam2_0_uses_no_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_lens", lambda *_: pytest.fail("a lens was looked for"))
    distiller, sets = prepared(lam2=0.0)
    step = FakeStep()
    distiller.student_loss(sets, step)
    assert set(step.terms) == {"ce", "kd_labeled", "kd_unlabeled"}


def test_one_layer_is_no_layer_to_probe() -> None:
    models = tiny_gpt2(1), tiny_gpt2(2, layers=2), tiny_gpt2(3, layers=2)
    with pytest.warns(UserWarning, match="one layer in student is none to probe"):
        distiller = PromptDistillerLM(PromptDistillerLM.Config(), *models)
    step = FakeStep()
    distiller.student_loss({"labeled": ragged_rows(), "unlabeled": unlabeled_rows()}, step)
    assert set(step.terms) == {"ce", "kd_labeled", "kd_unlabeled"}


# ------------------------------------------------------------------------------- with the harness
def trained(method: Callable[[], Any] = made, unlabeled: bool = True, seed: int = 1) -> Trainer:
    training = TrainingConfig(
        optimizer_steps=4, batch_size=4, micro_batch=3, rollout_batch=3, lr=1e-2, checkpoint_every=0
    )
    prompts = [[1 + i % (V - 1), 2 + i % 7][: 1 + i % 2] for i in range(12)]
    rows = make_rows(prompts, [[3 + i % 5, EOS][: 1 + i % 2] for i in range(12)])
    sets = {"unlabeled": BatchSource(unlabeled_rows())} if unlabeled else {}
    one = Trainer(method(), BatchSource(rows), training, seed, extras=sets)
    data = SourceData({"train": one.source, **one.extras}, 3, torch.device("cpu"))
    for name, found in (one.prepare(data) or {}).items():
        one.replace_rows(name, found)
    one.fit()
    return one


def weights(one: Trainer) -> list[Tensor]:
    return [param.detach() for param in one.distiller.student.parameters()]


@pytest.mark.parametrize("unlabeled", [True, False])
def test_without_both_weights_it_is_sft_bit_for_bit(unlabeled: bool) -> None:
    plain = trained(lambda: SFT(SFT.Config(), tiny_gpt2(1, layers=3)), unlabeled)
    ours = trained(lambda: made(lam1=0.0, lam2=0.0), unlabeled)
    assert ours.counters == plain.counters
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(plain), strict=True))


def test_teachers_stay_and_pools_are_kept() -> None:
    first = made()
    one = trained(lambda: first)
    assert set(one.stores()) == {"labeled_pool", "unlabeled_pool"}
    assert one.own_tensors()["labeled_pool/0/mean"].shape == (12, V)
    fresh = made()
    for role in ("tuned", "pretrained"):
        before = getattr(fresh, role).state_dict()
        assert all(torch.equal(v, before[n]) for n, v in getattr(first, role).state_dict().items())
        assert all(param.grad is None for param in getattr(first, role).parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"lam1": 0.5},
        {"lam2": 0.9},
        {"lam2": 0.0},
        {"alpha": 2.0},
        {"alpha": 2.0, "kd_form": "hinton"},
        {"negatives": 2},
        {"unlabeled": False},
        {"unlabeled_response": "student"},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_each_setting_changes_the_student(changes: dict[str, Any]) -> None:
    base = {"alpha": 2.0} if "kd_form" in changes else {}
    pairs = zip(
        weights(trained(lambda: made(**base))), weights(trained(lambda: made(**changes))), strict=True
    )
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "settings", [{"unlabeled_response": "student"}, {"lam1": 0.0}, {"unlabeled": False}], ids=str
)
def test_laws_hold_in_every_variant(settings: dict[str, Any]) -> None:
    names = ["targets", "micro_batch", "order", "padding", "rollouts", "resume"]
    told = checks.check("prompt_distiller_lm", settings, only=names)
    assert all(law.status == "pass" for law in told), checks.render(told)


def test_a_copy_reads_as_the_first() -> None:
    distiller, parts = prepared()
    again = copy.deepcopy(distiller)
    assert again.student_loss(parts, FakeStep()).item() == distiller.student_loss(parts, FakeStep()).item()


@pytest.mark.parametrize(
    "wrong",
    [{"lam1": -0.1}, {"lam2": -1.0}, {"alpha": 0.0}, {"negatives": 0}, {"max_new_tokens": 0}],
    ids=str,
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        PromptDistillerLM.Config(**wrong)
