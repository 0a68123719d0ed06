"""Plain text cut into chunks, for pretraining models from scratch.

Documents are tokenised, joined with EOS after each, and cut into chunks of `max_length` tokens, as GPT-2
style pretraining data usually is. A chunk is a batch row with a prompt of one token, so that the ordinary
supervised loss trains on every other token. For a masked language model the same stream, with SEP between
documents, is cut two tokens shorter, and each chunk stands between CLS and SEP.

Source: chunks that cross documents, parted by a separator, are the FULL-SENTENCES of Liu et al. 2019
(RoBERTa), https://arxiv.org/abs/1907.11692, sec. 4.2. Differs: a chunk may begin or end within a sentence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdbench import data
from kdbench.distiller import Batch
from kdbench.errors import UserError, unknown
from kdbench.task import Encoder, Row, Task, causal_lm_batch, template, tokenizer_hash

MASKED_LM_FIELDS = ("example_id", "input_ids", "length", "cloze_index")
ENCODER_FIELDS = ("example_id", "input_ids", "length", "segment_ids", "cloze_index")


class MarkedEncoder(Encoder):
    """An encoder of chunks that stand between a tokenizer's CLS and SEP, both counted in `max_length`.

    With `segments` a batch numbers its tokens' segments.

    Raises: UserError when the tokenizer lacks one of them, or `max_length` leaves no room between.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, segments: bool = False) -> None:
        marks: list[int] = []
        for name in ("cls", "sep"):
            token = getattr(tokenizer, f"{name}_token_id", None)
            if token is None:
                raise UserError(
                    f"tokenizer: it has no {name} token; set {name}_token in its tokenizer_config.json"
                )
            marks.append(int(token))
        if max_length < 3:
            raise UserError(f"task text: max_length must be at least 3 tokens with marks, is {max_length}")
        pad: Any = tokenizer.pad_token_id
        self.tokenizer, self.segments = tokenizer, segments
        self.max_prompt = self.max_length = max_length
        self.cls, self.eos = marks
        self.pad = self.eos if pad is None else int(pad)
        self.key = f"{tokenizer_hash(tokenizer)[:16]}-{marks}-{max_length}"

    def longest(self, new_tokens: int) -> int:
        return self.max_length


class Text(Task):
    """Train and dev chunks of text corpora, and of instruction and classification sets written out as text.

    The last `dev_share` of each corpus is dev. `rows(split)` gives documents, `rows(split, encoder)` chunks.
    """

    name: ClassVar[str] = "text"
    heads: ClassVar[tuple[str, ...]] = ("causal_lm", "masked_lm", "encoder")

    @dataclass
    class Settings:
        """Which corpora, by name (`kdbench list data`) or as a .txt file or a folder of them, and how they
        are cut.
        """

        corpora: list[str] = field(
            default_factory=lambda: [
                "brown",
                "grimm",
                "gutenberg",
                "inaugural",
                "state-union",
                "tinyshakespeare",
                "wikitext-2",
            ]
        )
        instruct: list[str] = field(
            default_factory=list
        )  # train parts of instruction sets, such as t0; or JSONL files
        classify: list[str] = field(
            default_factory=list
        )  # train parts of classification sets, such as sst2, without their labels; or JSONL files
        max_length: int = 512  # tokens of a chunk, CLS and SEP included where it has them
        sentences: bool = False  # a chunk is (a part of) one paragraph, or line where none is blank
        whole_words: list[str] = field(
            default_factory=list
        )  # words that a tokenizer trained on this text knows as one token each
        dev_share: float = 0.01  # of each corpus, by characters, from its end
        limit: int = 0  # characters of each corpus, from its beginning; 0: all

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        cfg = self.settings
        if not 0 < cfg.dev_share < 1:
            raise UserError(f"task text: dev_share must lie between 0 and 1, is {cfg.dev_share}")
        if cfg.max_length < 2:
            raise UserError(f"task text: max_length must be at least 2 tokens, is {cfg.max_length}")
        if not cfg.corpora and not cfg.instruct and not cfg.classify:
            raise UserError(
                "task text: no data: name a corpus in 'corpora' or a set in 'instruct' or 'classify'"
            )
        for word in cfg.whole_words:
            if len(word.split()) != 1 or word != word.strip():
                raise UserError(f"task text: whole_words: '{word}' is not one word")
        self.whole_words = list(cfg.whole_words)
        named = {"text": cfg.corpora, "instruct": cfg.instruct, "classify": cfg.classify}
        self._places = {
            name: (kind, self._locate(name, kind)) for kind, names in named.items() for name in names
        }
        self._chunks: dict[tuple[str, str], list[Row]] = {}

    def rules(self) -> list[Any]:
        cfg = self.settings
        rules = [1, cfg.max_length, cfg.dev_share]
        return rules + ([cfg.sentences, cfg.whole_words] if cfg.sentences or cfg.whole_words else [])

    def splits(self) -> list[str]:
        return ["train", "dev"]

    @cached_property
    def held_out(self) -> frozenset[str]:
        """The sentences of the test sets of all sets in `classify`, as `_letters` gives them.

        The sets share sentences: those of one set's test may stand in the train part of another.
        """
        known, found, root = data.known("classify"), set[str](), self.data_root
        for name in self.settings.classify:
            for split, file in known[name].files.items() if name in known else ():
                path = data.local_file(root, file.local) if file.local and root is not None else None
                if split.startswith("test") and path is not None:
                    found |= {
                        _letters(text) for row in data.read_labelled(path)[0] for text in _sentences(row)
                    }
        return frozenset(found)

    def load(self, split: str) -> list[Row]:
        """The documents of a split: rows with `corpus` and `text`.

        Raises: UserError for files that cannot be read.
        """
        rows: list[Row] = []
        digest = hashlib.sha256()
        for corpus, (kind, files) in self._places.items():
            documents = []
            for path, parted_by in files:
                texts, sha256 = _documents(path, kind, parted_by, self.held_out)
                documents += texts
                digest.update(sha256.encode())
            if self.settings.limit:
                documents = _cut(documents, self.settings.limit)[0]
            total = sum(map(len, documents))
            train, dev = _cut(documents, total - max(1, round(total * self.settings.dev_share)))
            rows += [{"corpus": corpus, "text": text} for text in (train if split == "train" else dev)]
        self.origins[split] = {
            "corpora": list(self._places),
            "sha256": digest.hexdigest(),
            "documents": len(rows),
        }
        return rows

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "causal_lm") -> Encoder:
        """An encoder whose length limit is a chunk's; it has no use for a prompt's."""
        width = self.settings.max_length
        if head == "causal_lm":
            return Encoder(tokenizer, 1, width)
        return MarkedEncoder(tokenizer, width, segments=head == "encoder")

    def fields_of(self, head: str) -> tuple[str, ...]:
        return {"masked_lm": MASKED_LM_FIELDS, "encoder": ENCODER_FIELDS}.get(head, self.fields)

    def select(self, split: str, encoder: Encoder) -> list[Row]:
        """The chunks of a split: rows with `ids`, int64 [max_length] at most; one that holds a single token
        is left out.
        """
        key = (split, encoder.key)
        if key not in self._chunks:
            texts = [row["text"] for row in self.rows(split)]
            if self.settings.sentences:
                texts = [part for text in texts for part in _paragraphs(text)]
            parts: list[npt.NDArray[np.int64]] = []
            step = 256
            for start in tqdm(
                range(0, len(texts), step), desc=f"tokenise {split} text", disable=len(texts) < step
            ):
                for ids in encoder.ids(texts[start : start + step]):
                    parts.append(np.asarray([*ids, encoder.eos], dtype=np.int64))
            streams = parts if self.settings.sentences else [np.concatenate(parts)]
            kept = [ids for stream in streams for ids in _chunks(stream, encoder)]
            if not kept:
                raise UserError(
                    f"task text: the {split} split holds {sum(map(len, streams))} tokens, too few for a chunk"
                )
            self._chunks[key] = [{"example_id": i, "split": split, "ids": ids} for i, ids in enumerate(kept)]
        chunks = self._chunks[key]
        tokens = sum(len(row["ids"]) for row in chunks)
        self.counts[split] = {"documents": len(self.rows(split)), "chunks": len(chunks), "tokens": tokens}
        return chunks

    def texts(self, split: str) -> Iterator[str]:
        for row in self.rows(split):
            yield row["text"]

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Encoder]) -> Batch:
        """Chunks as a Batch: `length` the chunk's, and `prompt_length` 1 or, between marks, `cloze_index` -1
        (no position is masked for certain); for a bare encoder also `segment_ids` [B, T], all 0.
        """
        encoder = encoders["student"]
        ids, numbers = [row["ids"] for row in rows], [row["example_id"] for row in rows]
        if not isinstance(encoder, MarkedEncoder):
            return causal_lm_batch(numbers, ids, [1] * len(rows), encoder.eos)
        batch = causal_lm_batch(numbers, ids, [1] * len(rows), encoder.pad)
        kept = {name: value for name, value in batch.items() if name != "prompt_length"}
        if encoder.segments:
            kept["segment_ids"] = torch.zeros_like(batch["input_ids"])
        return Batch({**kept, "cloze_index": torch.full((len(rows),), -1)})

    def _locate(self, name: str, kind: str) -> list[tuple[Path, str | None]]:
        """The files of a corpus, and what parts their documents (None: nothing).

        Raises: UserError when there is no such corpus or file, and what to do about it.
        """
        known = data.known(kind)
        path = Path(name).expanduser()
        if name not in known:
            files = sorted(p for p in path.rglob("*") if _is_text(p)) if path.is_dir() else [path]
            if path.is_dir() and not files:
                raise UserError(f"{path}: holds no .txt or .txt.gz file")
            if not files[0].is_file():
                raise unknown("text corpus" if kind == "text" else "data set", name, known, "task text")
            return [(file, None) for file in files]
        one, root = known[name], self.data_root
        names = [
            file.local
            for split, file in one.files.items()
            if file.local and (kind == "text" or split == "train")
        ]
        if not names:
            raise UserError(f"task text: data set '{name}' has no local train split to take text from")
        if root is None:
            raise UserError(f"text corpus '{name}' needs a data folder: {data.ROOT_HELP}")
        if not root.is_dir():
            raise UserError(f"data root {root}: there is no such folder; {data.ROOT_HELP}")
        found = [(data.local_file(root, local), local) for local in names]
        lacking = [local for file, local in found if file is None]
        if lacking:
            raise UserError(
                f"text corpus '{name}': {root} lacks {', '.join(lacking)}; its source is {one.source}"
            )
        return [(file, one.parted_by) for file, _ in found if file is not None]


def _is_text(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".txt", ".txt.gz"))


def _chunks(stream: npt.NDArray[np.int64], encoder: Encoder) -> list[npt.NDArray[np.int64]]:
    """Token ids cut to the encoder's length; between marks, separators at the ends of a cut are left out."""
    width = encoder.max_length - 2 * isinstance(encoder, MarkedEncoder)
    cut = [stream[start : start + width] for start in range(0, len(stream), width)]
    if not isinstance(encoder, MarkedEncoder):
        return [ids for ids in cut if len(ids) >= 2]
    found = []
    for ids in cut:
        text = np.flatnonzero(ids != encoder.eos)
        if len(text):
            inner = ids[text[0] : text[-1] + 1]
            found.append(np.concatenate([[encoder.cls], inner, [encoder.eos]]))
    return found


def _paragraphs(text: str) -> list[str]:
    """The parts of a document between blank lines; its lines, where none is blank."""
    parts = re.split(r"\n\s*\n", text)
    parts = parts if len(parts) > 1 else text.split("\n")
    return [part.strip() for part in parts if part.strip()]


def _sentences(row: Row) -> list[str]:
    """The one or two sentences of a labelled row."""
    return [row["text"]] if "text" in row else [row["text_a"], row["text_b"]]


def _letters(text: str) -> str:
    """Letters and digits alone, in lower case: what copies of a sentence have in common."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _documents(
    path: Path, kind: str, parted_by: str | None, held_out: frozenset[str]
) -> tuple[list[str], str]:
    """The documents of a text or JSONL file and the sha256 of its bytes: instructions in the template,
    answered; labelled sentences without their label, a pair in one line, none that is held out.
    """
    if kind == "classify":
        labelled, digest, _ = data.read_labelled(path)
        parts = map(_sentences, labelled)
        return [" ".join(row) for row in parts if held_out.isdisjoint(map(_letters, row))], digest
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows, digest = data.read_jsonl(path)
        answers = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
        return [template(row) + answer for row, answer in zip(rows, answers, strict=True)], digest
    text, digest = data.read_text(path)
    documents = [part.strip("\n") for part in (text.split(parted_by) if parted_by else [text])]
    documents = [part for part in documents if part.strip()]
    if not documents:
        raise UserError(f"{path}: is empty")
    return documents, digest


def _cut(documents: list[str], at: int) -> tuple[list[str], list[str]]:
    """The documents before and after character `at` of them all; the document around it is cut at its last
    newline or space before it.
    """
    before = 0
    for index, document in enumerate(documents):
        if before + len(document) > at:
            place = at - before
            end = max(document.rfind("\n", 0, place), document.rfind(" ", 0, place))
            head, tail = documents[:index], documents[index + 1 :]
            if end <= 0:  # nothing to cut at: the document goes to the side that holds more of it
                whole = [document]
                return (head + whole, tail) if 2 * place >= len(document) and tail else (head, whole + tail)
            return [*head, document[:end]], [document[end + 1 :], *tail]
        before += len(document)
    return documents, []
