"""Products through oneDNN against float64, and where torch's own take their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_kit import make_rows
from test_captured import many
from test_packing import make
from test_rollout import responses
from torch import Tensor

from kdbench import products, rollout
from kdbench.clock import Clock
from kdbench.decoding import GPT2Stream, stream
from kdbench.flops import FlopCounter
from kdbench.predict import CausalLM, predict
from kdbench.processes import matmul_precision
from kdbench.products import Layer, product
from kdbench.rollout import Draw


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["onednn", "without"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products through oneDNN, where this machine has it, and without."""
    if request.param == "without":
        monkeypatch.setattr(products, "_onednn", lambda: None)
    elif products._onednn() is None:
        pytest.skip("this build of torch has no oneDNN")
    return str(request.param)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "product": (lambda layer, x, other: layer(x), lambda y, other: y),
    "gelu": (lambda layer, x, other: layer.gelu(x), lambda y, other: gelu(y)),
    "added": (lambda layer, x, other: layer.added(x, other), lambda y, other: y + other),
}
NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_any_precision_of_products_is_taken(way: str, precision: str) -> None:
    """What is allowed to be rounded is to bfloat16 at most."""
    x, weight, bias = normal(3, 64, seed=1), normal(50, 64, seed=2), normal(50, seed=3)
    exact = x.double() @ weight.double().t() + bias
    with matmul_precision(precision), torch.no_grad():
        for found in (Layer(weight, bias)(x), product(x, weight, bias)):
            near = 2e-5 if precision == "highest" else 0.2
            torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 65])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", NEAR)
def test_a_layers_products_are_those_in_float64(
    way: str, kind: str, rows: int, with_bias: bool, dtype: torch.dtype
) -> None:
    """Of a weight that lies as it is, and of one that lies transposed."""
    x, other = normal(rows, 37, seed=1, dtype=dtype), normal(rows, 51, seed=2, dtype=dtype)
    bias = normal(51, seed=3, dtype=dtype) if with_bias else None
    for weight in (normal(51, 37, seed=4, dtype=dtype), normal(37, 51, seed=4, dtype=dtype).t()):
        exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
        run, wanted = KINDS[kind]
        with torch.no_grad():
            found = run(Layer(weight, bias), x, other)
            plain = product(x, weight, bias)
        assert found.dtype == plain.dtype == dtype
        assert found.shape == plain.shape == (rows, 51)
        size = 1 + float(exact.abs().max()) if rows else 1.0
        assert (found.double() - wanted(exact, other.double())).abs().le(NEAR[dtype] * size).all()
        assert (plain.double() - exact).abs().le(NEAR[dtype] * size).all()


def test_float32_is_not_rounded_to_less() -> None:
    """Numbers that bfloat16 and TF32 lose: 1 + 2^-16 times 1, minus 1."""
    x, weight = torch.tensor([[1 + 2.0**-16, 1.0]]), torch.tensor([[1.0, -1.0]])
    with torch.no_grad():
        assert float(product(x, weight)) == float(Layer(weight, None)(x)) == 2.0**-16


def test_a_gradient_goes_through_torchs_own_product() -> None:
    x, weight, bias = normal(3, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_(), normal(5, seed=2)
    product(x, weight, bias).square().sum().backward()
    twice = 2 * (x.detach() @ weight.detach().t() + bias)
    torch.testing.assert_close(x.grad, twice @ weight.detach())
    torch.testing.assert_close(weight.grad, twice.t() @ x.detach())


def test_autocast_rounds_as_it_does_everywhere() -> None:
    x, weight = normal(3, 40), normal(5, 40, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == Layer(weight, None)(x).dtype == torch.bfloat16


def test_a_layer_keeps_the_weight_that_it_was_made_of() -> None:
    if products._onednn() is None:
        pytest.skip("this build of torch has no oneDNN")
    weight, x = normal(5, 4), normal(3, 4, seed=1)
    before = x @ weight.t()
    with torch.no_grad():
        layer = Layer(weight, None)
        weight.zero_()
        torch.testing.assert_close(layer(x), before)


def test_operations_are_counted(way: str) -> None:
    """Two for each weight and row, whichever library multiplies."""
    x, weight, bias = normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2)
    with torch.no_grad():
        layer = Layer(weight, bias)
        for run in (
            layer,
            layer.gelu,
            lambda x: layer.added(x, torch.ones(3, 5)),
            lambda x: product(x, weight),
        ):
            with FlopCounter(Clock()) as counter:
                run(x)
            assert counter.found == {"": 2.0 * 3 * 4 * 5}


def test_a_head_with_a_hook_is_called() -> None:
    """Of which the weight alone does not tell the logits."""
    model: Any = make("gpt2").float()
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    batch = make_rows([[1, 2, 3]], [[4, 5]])
    with torch.no_grad():
        whole = model(batch["input_ids"]).logits[0, 2:4]
        torch.testing.assert_close(predict(model, batch).logits(), whole, rtol=1e-5, atol=1e-5)


def test_decoding_in_float32_is_the_models_own(way: str) -> None:
    """The written-out decoder, which multiplies through `Layer`, against the model's forward pass."""
    model: Any = make("gpt2").float()
    batch = many(9)
    ids, lengths = batch["input_ids"], batch["prompt_length"]
    texts = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    with torch.no_grad():
        made = stream(CausalLM(model), ids, lengths, 8)
        assert type(made) is GPT2Stream
        assert made.head.fast == (way == "onednn")
        for step in range(4):
            wanted = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
            torch.testing.assert_close(made.logits, wanted, rtol=1e-4, atol=1e-5)
            tokens = torch.arange(9) + step
            made.push(tokens)
            texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]


def test_responses_are_the_same_through_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("gpt2").float()
    batch, draw = many(9), Draw(1, 4, 64)
    through = responses(rollout.rollout(model, batch, draw, 11))
    monkeypatch.setattr(products, "_onednn", lambda: None)
    assert responses(rollout.rollout(model, batch, draw, 11)) == through
