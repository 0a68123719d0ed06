"""Answers, and so every published score, do not depend on how many prompts are sampled at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from analyses.instruction_following import score_rows
from kdbench import commands, config
from kdbench.stages import Materials, Places

SIZES = (1, 7, 64)


def materials(size: str, tmp_path: Path) -> Materials:
    """Those of the run of the student before distillation on the tiny board."""
    board = config.load_board("tiny-instruct/v1")
    run = config.resolve(board, size, "student-init", 1, [])
    return Materials(run, Places(tmp_path / "runs", tmp_path / "cache", None, progress=False))


def answers(found: Materials, model: Any, batch_size: int, split: str, limit: int | None) -> list[Any]:
    task = found.task()
    decode, encoder = config.DecodeConfig(max_new_tokens=40), found.encoders(task)["student"]
    return task.outputs(model, split, encoder, decode, [10], batch_size, limit)


def test_a_random_student_answers_alike_in_float64(tmp_path: Path) -> None:
    found = materials("debug", tmp_path)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    vocab = len(found.tokenizer("student"))
    shape |= {"vocab_size": vocab, "eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**shape)).double().eval()
    one, seven, many = (answers(found, model, size, "dev", 8) for size in SIZES)
    assert one == seven == many
    assert len({row["response"] for row in one}) > 4
    assert len({row["tokens"] for row in one}) > 1, "rows that end leave the batch"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_boards_student_answers_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    """Identical responses in float64, and the same ROUGE-L in float32, of every test set."""
    commands.quiet(1)
    found = materials("full", tmp_path)
    model = found.model("student").to(dtype)
    for split in [name for name in found.task().splits() if name.startswith("test/")]:
        rows = [answers(found, model, size, split, None) for size in SIZES]
        if dtype == torch.float64:
            assert rows[0] == rows[1] == rows[2]
        first, *others = (score_rows(one) for one in rows)
        assert others == [first, first], split
