"""Counted operations against a hand count, and against what torch executes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kdbench.clock import Clock, phase, running
from kdbench.distiller import Batch
from kdbench.flops import (
    FlopCounter,
    Shape,
    backward_flops,
    copy_rate,
    decode_bytes,
    decode_flops,
    forward_flops,
    matmul_rate,
    shape_of,
)
from kdbench.losses import reverse_kl
from kdbench.predict import predict
from kdbench.prompts import PromptedModel, SoftPrompt
from kdbench.rollout import Draw, rollout

GIGA = 1e9


def gpt2(layers: int, width: int, heads: int, vocab: int) -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=128)
    config.eos_token_id = None
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


def test_shape_is_that_of_the_matrix_products() -> None:
    shape = shape_of(gpt2(6, 512, 8, 8192))
    # per layer: queries, keys, values 3 d², output d², two of 4 d² each
    assert shape == Shape(trunk=6 * 12 * 512**2, head=8192 * 512, layers=6, width=512, kv_width=512)


def test_shape_with_shared_keys_and_through_a_soft_prompt() -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=96, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    trunk = 2 * (64 * 32 + 2 * 64 * 16 + 32 * 64 + 3 * 64 * 96)
    want = Shape(trunk, head=50 * 64, layers=2, width=32, kv_width=16)
    assert shape_of(model) == want
    assert shape_of(PromptedModel(model, SoftPrompt(torch.zeros(3, 64)))) == want


@pytest.mark.parametrize(("vocab", "due"), [(8192, 44.5), (50257, 66.5)])
def test_a_hand_count_of_the_teachers_forward(vocab: int, due: float) -> None:
    """GPT-2 of 6 layers x 512, 8 rows of 64 + 64 tokens, logits at the 512 response positions, in GFLOP."""
    counted = forward_flops(shape_of(gpt2(6, 512, 8, vocab)), 8, 128, 512) / GIGA
    products = 2 * 18.87e6 * 8 * 128  # the trunk
    attention = 6 * 8 * 2 * (2 * 128 * 128 * 512)  # layers x rows x (scores and sums) of all heads
    head = 2 * vocab * 512 * 512
    assert counted == pytest.approx((products + attention + head) / GIGA, rel=1e-3)
    assert counted == pytest.approx(due, rel=0.005)


@pytest.mark.parametrize(("vocab", "prefill_and_decode"), [(8192, 6.9), (50257, 17.7)])
def test_a_hand_count_of_the_students_sampling(vocab: int, prefill_and_decode: float) -> None:
    """GPT-2 of 3 layers x 256: 64 tokens to 8 prompts of 64. The count that it is held against has neither
    attention nor the prompts' heads."""
    shape = shape_of(gpt2(3, 256, 4, vocab))
    bare = Shape(shape.trunk, shape.head, shape.layers, width=0, kv_width=0)
    steps = decode_flops(bare, 8, 64, 64) - 2 * shape.head * 8
    assert steps / GIGA == pytest.approx(prefill_and_decode, rel=0.01)
    context = sum(64 + step for step in range(1, 64))  # what each step looks at
    attention = 4 * 3 * 256 * 8 * (64 * 64 + context)
    assert decode_flops(shape, 8, 64, 64) - decode_flops(bare, 8, 64, 64) == pytest.approx(attention)


def test_a_hand_count_of_the_students_passes() -> None:
    shape = shape_of(gpt2(3, 256, 4, 8192))
    bare = Shape(shape.trunk, shape.head, shape.layers, width=0, kv_width=0)
    whole = forward_flops(bare, 8, 128, 512) + backward_flops(bare, 8, 128, 512)
    assert whole / GIGA == pytest.approx(20.9, rel=0.005)
    assert backward_flops(shape, 8, 128, 512) == pytest.approx(2 * forward_flops(shape, 8, 128, 512))
    frozen = backward_flops(shape, 8, 128, 512, weights=False)
    assert frozen == pytest.approx(forward_flops(shape, 8, 128, 512) + 4 * 3 * 256 * 8 * 128**2)


def test_a_hand_count_of_decoded_bytes() -> None:
    """GPT-2 base in bfloat16, 256 tokens to 32 prompts of 256: 64 GB of weights and 115 GB of cache."""
    shape = shape_of(gpt2(12, 768, 12, 50257))
    bare = Shape(shape.trunk, shape.head, shape.layers, shape.width, kv_width=0)
    weights = decode_bytes(bare, 32, 256, 256, 2)
    assert weights / GIGA == pytest.approx(64, rel=0.02)
    assert (decode_bytes(shape, 32, 256, 256, 2) - weights) / GIGA == pytest.approx(115, rel=0.02)
    assert decode_bytes(shape, 32, 256, 256, 4) == 2 * decode_bytes(shape, 32, 256, 256, 2)
    assert decode_bytes(shape, 32, 256, 1, 2) == 0  # the prompt's pass alone


# ---- what torch executes
def test_what_is_executed_is_what_is_counted(tiny_student: Callable[..., GPT2LMHeadModel]) -> None:
    """Forward and backward pass of transformers' own model on rows of equal length."""
    rows, tokens = 4, 15
    model = tiny_student(dropout=0.0).eval()
    shape, clock = shape_of(model), Clock()
    ids = torch.arange(rows * tokens).view(rows, tokens) % 40
    with running(clock), FlopCounter(clock) as counter:
        with phase("student"):
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        with phase("backward"):
            loss.backward()
    forward = forward_flops(shape, rows, tokens, rows * tokens)
    assert counter.found["student"] == pytest.approx(forward)
    # torch counts the fused backward pass of attention with the scores, which it computes again
    again = 2.0 * shape.layers * shape.width * rows * tokens**2
    assert counter.found["backward"] == pytest.approx(
        backward_flops(shape, rows, tokens, rows * tokens) + again
    )


def test_a_backward_pass_to_the_inputs_is_seen(tiny_teacher: Callable[..., GPT2LMHeadModel]) -> None:
    rows, tokens = 3, 9
    model = tiny_teacher(dropout=0.0).eval().requires_grad_(False)
    shape, clock = shape_of(model), Clock()
    given = torch.randn(rows, tokens, model.config.n_embd, requires_grad=True)
    loss = model(inputs_embeds=given, use_cache=False).logits.sum()
    with running(clock), phase("backward"), FlopCounter(clock) as counter:
        loss.backward()
    again = 2.0 * shape.layers * shape.width * rows * tokens**2
    due = backward_flops(shape, rows, tokens, rows * tokens, weights=False) + again
    assert counter.found["backward"] == pytest.approx(due)


def test_a_step_costs_no_more_than_its_passes(
    tiny_student: Callable[..., GPT2LMHeadModel],
    tiny_teacher: Callable[..., GPT2LMHeadModel],
    causal_batch: Callable[..., Batch],
) -> None:
    """Distillation reads both models once, with heads at the response alone; the last layer may be spared
    where nobody reads it.
    """
    rows, prompt, response = 4, 6, 10
    student, teacher = tiny_student(dropout=0.0).eval(), tiny_teacher(dropout=0.0).eval()
    batch = causal_batch([(prompt, response)] * rows)
    predict(student, batch), predict(teacher, batch)  # probes of a model come once
    clock = Clock()
    with running(clock), FlopCounter(clock) as counter:
        with phase("student"):
            q = predict(student, batch)
        with phase("teacher"), torch.no_grad():
            p = predict(teacher, batch)
        with phase("divergence"):
            loss = reverse_kl(q, p).sum()
        with phase("backward"):
            loss.backward()
    found, tokens, heads = counter.found, prompt + response - 1, rows * response
    small, large = shape_of(student), shape_of(teacher)
    for role, shape in (("student", small), ("teacher", large)):
        whole = forward_flops(shape, rows, tokens, 0)
        assert (1 - 1 / shape.layers) * whole <= found[role] <= whole * (1 + 1e-9)
    # the heads of both, once or once more in chunks that are computed again, and the gradient of one
    least, most = ((times * (small.head + large.head) + 4 * small.head) * heads for times in (2, 4))
    again = 2.0 * small.layers * small.width * rows * tokens**2
    trunk = backward_flops(small, rows, tokens, 0) + again
    assert least + trunk / 2 <= found["divergence"] + found["backward"] <= most + trunk


def test_sampling_is_seen(
    tiny_student: Callable[..., GPT2LMHeadModel], causal_batch: Callable[..., Batch]
) -> None:
    rows, prompt, new = 4, 6, 8
    student = tiny_student(dropout=0.0).eval()
    student.config.eos_token_id = None
    batch = causal_batch([(prompt, 0)] * rows)
    rollout(student, batch, Draw(0), 2)
    clock = Clock(detailed=True)
    with running(clock), FlopCounter(clock) as counter:
        rollout(student, batch, Draw(0), new)
    shape = shape_of(student)
    products = Shape(shape.trunk, shape.head, 0, 0, 0)
    seen = sum(counter.found.values())
    # the prompt's last layer may be spared; attention may be laid out over more places than there are tokens
    assert (
        0.7 * decode_flops(products, rows, prompt, new)
        <= seen
        <= 1.3 * decode_flops(shape, rows, prompt, new)
    )


def test_composed_operations_are_looked_into_where_gradients_are_off() -> None:
    clock = Clock()
    a = torch.ones(2, 3)
    with torch.inference_mode(), FlopCounter(clock) as counter:
        torch.nn.functional.linear(a, torch.ones(4, 3))
        torch.matmul(torch.ones(5, 2, 3), torch.ones(3, 4))
    assert counter.found == {"": 2.0 * 2 * 3 * 4 + 2.0 * 5 * 2 * 3 * 4}


def test_products_in_place_are_seen() -> None:
    clock = Clock()
    with running(clock), phase("here"), FlopCounter(clock) as counter:
        torch.zeros(2, 4).addmm_(torch.ones(2, 3), torch.ones(3, 4))
        torch.mm(torch.ones(2, 3), torch.ones(3, 4), out=torch.zeros(2, 4))
    assert counter.found == {"here": 2 * 2.0 * 2 * 3 * 4}


def test_rates_are_those_of_a_machine() -> None:
    device = torch.device("cpu")
    assert 1e8 < matmul_rate(device, "fp32", seconds=0.02) < 1e14
    assert 1e8 < copy_rate(device, seconds=0.02) < 1e13
