"""Tiny models, tokenizers and batches that many tests share; one torch thread, nothing from the network."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kdbench.distiller import Batch

WORDS = (
    "a an the and to of Below is instruction that describes task Write response appropriately completes "
    "request Suppose you are student one two three four five red blue green cat dog list name count say again"
).split()
VOCABULARY = 2 + 2 + len(WORDS)  # eos, unknown, two signs, words


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Several threads change sums, and slow down a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of about 50 words; the padding token is the end-of-text token, as with GPT-2."""
    words = ["<eos>", "<unk>", ".", ":", *WORDS]
    assert len(words) == VOCABULARY
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    core.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


def _gpt2(width: int, layers: int, seed: int, vocabulary: int, dropout: float) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,  # so that random models differ and their distributions are far from uniform
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@pytest.fixture
def tiny_student() -> Callable[..., GPT2LMHeadModel]:
    """Makes a random GPT-2 of 2 layers x 16, in train mode, with dropout in its config; `seed` fixes it."""

    def make(seed: int = 1, vocabulary: int = VOCABULARY, dropout: float = 0.1) -> GPT2LMHeadModel:
        return _gpt2(16, 2, seed, vocabulary, dropout)

    return make


@pytest.fixture
def tiny_teacher() -> Callable[..., GPT2LMHeadModel]:
    """Makes a random GPT-2 of 2 layers x 32, in train mode, with dropout in its config; `seed` fixes it."""

    def make(seed: int = 0, vocabulary: int = VOCABULARY, dropout: float = 0.1) -> GPT2LMHeadModel:
        return _gpt2(32, 2, seed, vocabulary, dropout)

    return make


@pytest.fixture
def causal_batch() -> Callable[..., Batch]:
    """Makes a Batch of random ids from `sizes`, one (prompt length, response length) per row.

    Each response ends in EOS (id 0), and the padding is EOS too, unless `pad` says otherwise: masks that
    come from ids rather than from lengths are wrong here. `first_id` numbers the examples, `width` pads
    further.
    """

    def make(
        sizes: Sequence[tuple[int, int]] = ((3, 4), (5, 2), (2, 6), (4, 1)),
        seed: int = 0,
        vocabulary: int = VOCABULARY,
        pad: int = 0,
        first_id: int = 0,
        width: int | None = None,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        lengths = [prompt + response for prompt, response in sizes]
        ids = torch.full((len(sizes), width or max(lengths)), pad, dtype=torch.int64)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(1, vocabulary, (length,), generator=generator)
            if sizes[row][1]:
                ids[row, length - 1] = 0
        return Batch(
            {
                "example_id": torch.arange(first_id, first_id + len(sizes)),
                "input_ids": ids,
                "prompt_length": torch.tensor([prompt for prompt, _ in sizes]),
                "length": torch.tensor(lengths),
            }
        )

    return make


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; tests that need it are skipped where KDBENCH_DATA_ROOT is not set."""
    given = os.environ.get("KDBENCH_DATA_ROOT")
    if not given:
        pytest.skip("needs real data: set KDBENCH_DATA_ROOT to its folder")
    path = Path(given)
    if not path.is_dir():
        pytest.fail(f"KDBENCH_DATA_ROOT is {path}, which is no folder")
    return path


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have bit-identical parameters and buffers."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
