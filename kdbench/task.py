"""What a task is: rows of named splits, their batches, and the responses a model gives to them.

Source: template, tokenisation, truncation and test-time prompts as in MiniLLM (Gu et al. 2024,
https://arxiv.org/abs/2306.08543) and PromptKD (Kim et al. 2024, https://arxiv.org/abs/2402.12842),
read in their public data processing code.
Differs: a response that merges with the end of its prompt is encoded apart, where that code splits at the
wrong token; test prompts never get a BOS, as in training; masks come from lengths, so that pad == eos costs
no target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.rollout import Draw, rollout
from kdbench.streams import stream_seed

Row = dict[str, Any]
_T = TypeVar("_T")
Ids = npt.NDArray[np.int64]

CAUSAL_LM_FIELDS = ("example_id", "input_ids", "prompt_length", "length")

_RESPONSE = "\n\n### Response:\n"
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}"
) + _RESPONSE
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}"
) + _RESPONSE


class Decode(Protocol):
    """How responses are generated: `kdbench.config.DecodeConfig`."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def no_repeat_ngram(self) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    `prompt` and `response` are int64 arrays; `response` ends in EOS unless `response_cut`. `prompt_tokens`
    counts the prompt before it was cut, `apart` says that the response was encoded apart from its prompt.
    """

    prompt: Ids
    response: Ids
    prompt_tokens: int
    response_cut: bool
    apart: bool


class Encoder:
    """Turns prompts and responses into token ids with one tokenizer and the task's length limits.

    `max_prompt` and `max_length` (prompt + response + EOS) are in tokens. `key` names the tokenizer's content
    and the limits, so that equal encoders share a cache.

    Raises: UserError when the tokenizer has no end-of-text token or the limits leave no room for a response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt: int = 256, max_length: int = 512
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer: it has no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        if not 0 < max_prompt < max_length:
            raise UserError(
                f"task: max_prompt = {max_prompt} must lie between 0 and max_length = {max_length}"
            )
        self.tokenizer = tokenizer
        self.max_prompt = max_prompt
        self.max_length = max_length
        self.eos = int(tokenizer.eos_token_id)
        self.key = f"{tokenizer_hash(tokenizer)[:16]}-{max_prompt}-{max_length}"

    def longest(self, new_tokens: int) -> int:
        """The longest sequence in tokens that a model reads, where it writes so many to a prompt."""
        return max(self.max_length, self.max_prompt + new_tokens) - 1  # the last is no input

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encodes (prompt, response) pairs without special tokens.

        The response is what encode(prompt + response) has after the prompt's ids, plus EOS. Where the
        prompt's ids are not a prefix (the response merges with the prompt's last characters), it is encoded
        apart. A prompt over `max_prompt` keeps its head; prompt and response together keep their first
        `max_length` tokens, which can cost the EOS.

        Source: MiniLLM's `process_data_dolly.py`; the part that is encoded apart differs.
        """
        prompts = self._ids([prompt for prompt, _ in pairs])
        fulls = self._ids([prompt + response for prompt, response in pairs])
        out = []
        for (_, response), prompt, full in zip(pairs, prompts, fulls, strict=True):
            apart = full[: len(prompt)] != prompt
            ids = (self._ids([response])[0] if apart else full[len(prompt) :]) + [self.eos]
            head = prompt[: self.max_prompt]
            kept = ids[: self.max_length - len(head)]
            out.append(
                Encoded(
                    np.asarray(head, dtype=np.int64),
                    np.asarray(kept, dtype=np.int64),
                    len(prompt),
                    len(kept) < len(ids),
                    apart,
                )
            )
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens and uncut."""
        return self._ids(texts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


class Task:
    """Data plus what is generated for its score; scoring itself is an analysis over `outputs`.

    A subclass sets `name`, `Settings`, and defines `splits` and `load`. Splits are "train", "dev" and
    "test/<set>". Every row of a split is a dict with `example_id`, unique within its split.
    """

    name: ClassVar[str] = ""
    fields: ClassVar[tuple[str, ...]] = CAUSAL_LM_FIELDS
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)
    whole_words: Sequence[str] = ()  # words that a tokenizer trained on the task's text must know whole

    @dataclass
    class Settings:
        """Settings of the task; a board's [task] table fills them."""

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings
        self.data_root = data_root
        # per split: what was read, dropped and cut; goes into the record
        self.counts: dict[str, dict[str, int]] = {}
        # per split: where its rows were read and the sha256 of what was read; goes into the record
        self.origins: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, list[Row]] = {}

    def splits(self) -> list[str]:
        """Names of the splits: "train", "dev", "test/<set>", ..."""
        raise NotImplementedError

    def load(self, split: str) -> list[Row]:
        """Reads or makes the rows of one split; called once.

        Raises: UserError for data that is missing or malformed.
        """
        raise NotImplementedError

    @property
    def revision(self) -> str:
        """Content identity of the data as read and of the rules applied to it: 16 hexadecimal digits.

        Raises: UserError as `load`, for every split is read.
        """
        digest = hashlib.sha256(json.dumps([self.name, *self.rules()]).encode())
        for split in self.splits():
            rows = self.rows(split)
            digest.update(f"\n{split} {self.origins.get(split, {}).get('sha256', '')}\n".encode())
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def rules(self) -> list[Any]:
        """What else determines the batches, as JSON: part of the revision."""
        return []

    def rows(self, split: str, encoder: Encoder | None = None) -> list[Row]:
        """The rows of a split; with an encoder, those that its limits keep (counted in `counts`).

        Raises: UserError for an unknown split, or when nothing is left.
        """
        if split not in self._loaded:
            if split not in self.splits():
                raise UserError(f"task {self.name}: no split '{split}'. Known: {', '.join(self.splits())}.")
            rows = self.load(split)
            if not rows:
                raise UserError(f"task {self.name}: split '{split}' is empty")
            self._loaded[split] = [
                {"example_id": index, **row, "split": split} for index, row in enumerate(rows)
            ]
        return self._loaded[split] if encoder is None else self.select(split, encoder)

    def select(self, split: str, encoder: Encoder) -> list[Row]:
        """Rows that remain under an encoder's limits; all of them unless a subclass has such a rule."""
        rows = self.rows(split)
        self.counts[split] = {"records": len(rows)}
        return rows

    def texts(self, split: str) -> Iterator[str]:
        """The split as plain text, one string per row: what a new tokenizer is trained on."""
        raise NotImplementedError

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerBase | None:
        """The task's own tokenizer, or that of its own with this name; None when the models bring theirs."""
        return None

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "causal_lm") -> Encoder:
        """An encoder for models with this head, with the task's length limits."""
        return Encoder(tokenizer)

    def fields_of(self, head: str) -> tuple[str, ...]:
        """The fields of a batch for methods with this head; another role's are named `<role>.<field>`."""
        return self.fields

    def model_settings(self) -> dict[str, Any]:
        """What the task puts into the configuration of every model, such as the number of classes."""
        return {}

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Encoder]) -> Batch:
        """The rows as a Batch with `fields`; `encoders` holds one encoder per role, "student" makes
        `input_ids`.
        """
        raise NotImplementedError

    def outputs(
        self,
        model: nn.Module,
        split: str,
        encoder: Encoder,
        decode: Decode,
        seeds: Sequence[int],
        batch_size: int,
        limit: int | None = None,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """What the model gives for every example of a split: one JSON-able row per generation seed and
        example.
        """
        raise NotImplementedError


class InstructionTask(Task):
    """Instructions answered in text: rows with `instruction`, `input`, `output` (text or a list of
    references).

    A subclass defines `splits` and `load`. A row may have `prefix`, text put before the template. Training
    uses the first reference. Train and dev rows whose prompt is over `max_prompt` are dropped, test prompts
    are cut.
    """

    RULES: ClassVar[int] = 1  # raised when template, tokenisation or truncation change

    @dataclass
    class Settings:
        """Length limits, in tokens."""

        max_prompt: int = 256  # train and dev rows above are dropped, test prompts cut
        max_length: int = 512  # prompt, response and EOS together; the head is kept

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        self._encoded: dict[tuple[str, str], dict[int, tuple[Row, Encoded]]] = {}

    def rules(self) -> list[Any]:
        return [self.RULES, _WITHOUT_INPUT, _WITH_INPUT, self.settings.max_prompt, self.settings.max_length]

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "causal_lm") -> Encoder:
        return Encoder(tokenizer, self.settings.max_prompt, self.settings.max_length)

    def prompt(self, row: Row) -> str:
        """The row's prompt text: its prefix if it has one, then the template filled in."""
        return template(row)

    def references(self, row: Row) -> list[str]:
        """All reference responses of a row; training uses the first."""
        output = row["output"]
        return [output] if isinstance(output, str) else list(output)

    def scored_by(self, split: str) -> str | None:
        """The score that a set is meant for when it is not ROUGE-L: "exact_match" for short answers."""
        return None

    def texts(self, split: str) -> Iterator[str]:
        for row in self.rows(split):
            yield self.prompt(row) + self.references(row)[0]

    def select(self, split: str, encoder: Encoder) -> list[Row]:
        """Train and dev rows with a prompt of at most `max_prompt` tokens, test rows all; both counted.

        `counts[split]`: records read, long_prompts_dropped, long_prompts_cut, responses_cut (EOS lost) and
        responses_apart (encoded apart from their prompt), the last two over the rows that remain.
        """
        rows = self.rows(split)
        encoded = self._split_encoded(split, encoder)
        drop = not split.startswith("test")
        long = [
            row["example_id"]
            for row in rows
            if encoded[row["example_id"]][1].prompt_tokens > encoder.max_prompt
        ]
        dropped = set(long) if drop else set()
        kept = [row for row in rows if row["example_id"] not in dropped]
        if not kept:
            raise UserError(
                f"task {self.name}: all prompts of '{split}' are over max_prompt = {encoder.max_prompt}"
            )
        left = [encoded[row["example_id"]][1] for row in kept]
        self.counts[split] = {
            "records": len(rows),
            "long_prompts_dropped": len(dropped),
            "long_prompts_cut": len(long) - len(dropped),
            "responses_cut": sum(item.response_cut for item in left),
            "responses_apart": sum(item.apart for item in left),
        }
        return kept

    def encoded(self, rows: Sequence[Row], encoder: Encoder) -> list[Encoded]:
        """Token ids of rows; those of a split come from a cache, changed or foreign rows are encoded anew."""
        out: list[Encoded | None] = []
        for row in rows:
            split = row.get("split")
            known = (
                self._split_encoded(split, encoder).get(row["example_id"])
                if isinstance(split, str) and split in self._loaded
                else None
            )
            out.append(known[1] if known is not None and known[0] is row else None)
        new = iter(
            encoder.encode([self._pair(row) for row, item in zip(rows, out, strict=True) if item is None])
        )
        return [next(new) if item is None else item for item in out]

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Encoder]) -> Batch:
        """Prompt, then the first reference and EOS, right-padded with EOS to the longest row.

        `example_id`, `prompt_length`, `length` are [B] int64, `input_ids` [B, T] int64.
        """
        encoder = encoders["student"]
        items = self.encoded(rows, encoder)
        ids = [np.concatenate([item.prompt, item.response]) for item in items]
        return causal_lm_batch(
            [row["example_id"] for row in rows], ids, [len(e.prompt) for e in items], encoder.eos
        )

    def outputs(
        self,
        model: nn.Module,
        split: str,
        encoder: Encoder,
        decode: Decode,
        seeds: Sequence[int],
        batch_size: int,
        limit: int | None = None,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """One sampled response per example and generation seed, rows ordered by seed, then as in the split.

        Each row: example_id, set ("dev", or the name after "test/"), seed, prompt (as the model saw it),
        response (special tokens left out), references, tokens (their number, EOS included when produced),
        finished (EOS produced), and scored_by where the set is not scored by ROUGE-L. `limit` takes that many
        examples spread evenly over the split. A response depends on the seed, the set, the example and the
        model, not on the batch it was in; prompts of like length share one to save padding.
        """
        rows = spread(self.rows(split, encoder), limit)
        items = self.encoded(rows, encoder)
        order = sorted(range(len(rows)), key=lambda i: (-len(items[i].prompt), i))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        label = split.removeprefix("test/")
        scored_by = self.scored_by(split)
        device = next(model.parameters()).device
        out: list[dict[str, Any]] = []
        with tqdm(total=len(seeds) * len(rows), desc=f"generate {label}", disable=not progress) as bar:
            for seed in seeds:
                draw = Draw(stream_seed(seed, f"outputs/{split}"), rollout_batch=batch_size)
                made: dict[int, dict[str, Any]] = {}
                for chunk in chunks:
                    prompts = [items[i].prompt for i in chunk]
                    ids = [rows[i]["example_id"] for i in chunk]
                    batch = causal_lm_batch(ids, prompts, [len(p) for p in prompts], encoder.eos).to(device)
                    with torch.no_grad():
                        result = rollout(
                            model,
                            batch,
                            draw,
                            decode.max_new_tokens,
                            temperature=decode.temperature,
                            top_k=decode.top_k,
                            top_p=decode.top_p,
                            no_repeat_ngram=decode.no_repeat_ngram,
                        ).to("cpu")
                    for j, i in enumerate(chunk):
                        start, end = int(result["prompt_length"][j]), int(result["length"][j])
                        tokens: list[int] = result["input_ids"][j, start:end].tolist()
                        made[i] = {
                            "example_id": rows[i]["example_id"],
                            "set": label,
                            "seed": int(seed),
                            "prompt": encoder.decode(prompts[j].tolist()),
                            "response": encoder.decode(tokens),
                            "references": self.references(rows[i]),
                            "tokens": len(tokens),
                            "finished": bool(result["finished"][j]),
                        }
                        if scored_by is not None:
                            made[i]["scored_by"] = scored_by
                    bar.update(len(chunk))
                out += [made[i] for i in range(len(rows))]
        return out

    def _pair(self, row: Row) -> tuple[str, str]:
        return self.prompt(row), self.references(row)[0]

    def _split_encoded(self, split: str, encoder: Encoder) -> dict[int, tuple[Row, Encoded]]:
        key = (split, encoder.key)
        if key not in self._encoded:
            rows = self.rows(split)
            items = encoder.encode([self._pair(row) for row in rows])
            self._encoded[key] = {
                row["example_id"]: (row, item) for row, item in zip(rows, items, strict=True)
            }
        return self._encoded[key]


def template(row: Row) -> str:
    """The prompt of an instruction row: `prefix` if there is one, then the template with `instruction` and
    `input`.

    Source: MiniLLM's and PromptKD's `process_data_dolly.py`, byte for byte; a missing or empty input has its
    own form.
    """
    form = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    return str(row.get("prefix", "")) + form.format(
        instruction=row["instruction"], input=row.get("input", "")
    )


def causal_lm_batch(
    example_ids: Sequence[int], ids: Sequence[Ids], prompt_lengths: Sequence[int], pad: int
) -> Batch:
    """Token ids of each example as a right-padded Batch; `length` is each row's own, whatever `pad` is."""
    lengths = [len(row) for row in ids]
    table = np.full((len(ids), max(lengths)), pad, dtype=np.int64)
    for i, row in enumerate(ids):
        table[i, : len(row)] = row
    return Batch(
        {
            "example_id": torch.tensor(list(example_ids), dtype=torch.int64),
            "input_ids": torch.from_numpy(table),
            "prompt_length": torch.tensor(list(prompt_lengths), dtype=torch.int64),
            "length": torch.tensor(lengths, dtype=torch.int64),
        }
    )


def spread(items: Sequence[_T], limit: int | None) -> list[_T]:
    """`limit` items at even distances, in order; all when there are no more, or for None or 0."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does: its whole definition, or the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    to_str: Callable[[], str] | None = getattr(backend, "to_str", None)
    text = to_str() if to_str is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{tokenizer.eos_token_id}\n{text}".encode()).hexdigest()
