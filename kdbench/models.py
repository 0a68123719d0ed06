"""Loads a student or teacher and its tokenizer: hub id, local folder, `run:<id>`, or a fresh architecture.

A method names the `head` that its models have: a causal language model, a masked one, a sequence classifier,
whose classifier (and pooler) may be new on a pretrained encoder, or the bare encoder with its pooler.
Everything that can be refused without weights is refused before any load: a folder without weights, a
tokenizer that does not fit, vocabularies of causal teacher and student that differ. Code from the hub is
never run, and weights are read from safetensors only.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from kdbench.data import ROOT_HELP
from kdbench.errors import UserError, nearest, unknown
from kdbench.paths import cache_dir, runs_dir
from kdbench.streams import stream_seed
from kdbench.task import Task

if TYPE_CHECKING:
    from kdbench.config import ModelSpec

END = "<|endoftext|>"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # left out, transformers asks the user
TRAINED = 1  # raised when tokenizers are trained in another way
WHOLE = 5000  # times that a word is shown to a tokenizer in training so that it becomes one token


@dataclass(frozen=True)
class Head:
    """What a method's models predict with: the class that loads them, and the model types that it knows.

    `one_vocabulary`: all roles share their tokenizer, since distributions over it are compared. `special`:
    the special tokens that its tokenizer must have; a fresh model's gets those that it lacks. `new_head`: a
    head may be new on pretrained weights.
    """

    what: str
    auto: Any
    types: Mapping[str, Any]
    one_vocabulary: bool = False
    special: Mapping[str, str] = field(default_factory=dict)
    new_head: bool = False


_MASKED = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
HEADS = {
    "causal_lm": Head(
        "causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, one_vocabulary=True
    ),
    "masked_lm": Head(
        "masked language model", AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, special=_MASKED
    ),
    "sequence": Head(
        "sequence classifier",
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        special=_MASKED,
        new_head=True,
    ),
    # with its pooler; the method puts its own heads on it
    "encoder": Head("encoder", AutoModel, MODEL_MAPPING_NAMES, special=_MASKED),
}


def load_tokenizer(
    spec: ModelSpec,
    task: Task,
    data_root: Path | None = None,
    runs: Path | None = None,
    head: str = "causal_lm",
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the special tokens that its head needs.

    `spec.tokenizer` is "task" or "task:<name>" (the task's own), "data:<folder below the data root>",
    "train:bpe:<size>", "train:roberta:<size>" or "train:bert:<size>" (byte-level BPE, the same with the
    special tokens of masked models, or uncased WordPiece with them, trained on the task's train text, once),
    a local folder or a hub id; None takes the model's own, or the task's for a fresh model. For a causal
    model the end-of-text token also pads where there is no padding token.

    Raises: UserError when there is no such tokenizer, or it lacks a special token.
    """
    found, name = _find_tokenizer(spec, task, data_root, runs)
    return _ready(found, name, HEADS[head], fresh=spec.architecture is not None)


def _find_tokenizer(
    spec: ModelSpec, task: Task, data_root: Path | None, runs: Path | None
) -> tuple[PreTrainedTokenizerBase, str]:
    name = spec.tokenizer
    if name is None:
        name = "task" if spec.architecture is not None else spec.model
    if name == "task" or name.startswith("task:"):
        own = task.tokenizer(name.partition(":")[2])
        if own is None:
            raise UserError(
                f"tokenizer: task {task.name} brings none; name a folder, a hub id, data:tokenizers/gpt2 or"
                " train:bpe:<size>"
            )
        return own, name
    if name.startswith("train:"):
        return _trained(name, task), name
    if name.startswith("data:"):
        if data_root is None:
            raise UserError(f"tokenizer '{name}' needs a data folder: {ROOT_HELP}")
        folder = data_root / name.removeprefix("data:")
        if not folder.is_dir():
            raise UserError(f"tokenizer '{name}': there is no folder {folder}")
        return _from_folder(folder), str(folder)
    found = _folder(name, runs)
    if found is not None:
        return _from_folder(found), str(found)
    try:
        return AutoTokenizer.from_pretrained(name, revision=_revision(spec, name), **NO_CODE), name
    except Exception as error:  # missing repository, network, unreadable files: one line for all
        raise _unavailable("tokenizer", name, error) from error


def load_model(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    vocab: int | None = None,
    runs: Path | None = None,
    head: str = "causal_lm",
    settings: Mapping[str, Any] | None = None,
    new_head: bool = True,
) -> PreTrainedModel:
    """The model in eval mode on the CPU; new weights (all, or those of a classifier) `seed` alone fixes.

    `new_head`: whether a classifier may be new on pretrained weights, which only a model to be trained may
    have.

    `vocab` is what `check_vocabularies` returned: ids from it on are left out of every distribution of a
    causal model (by `config.kdbench_vocab`), so that padded heads compare; its `config.eos_token_id` becomes
    the tokenizer's, one int. `settings` are put into the configuration, such as `num_labels`.
    `config.mask_token_id` is the tokenizer's, where it has one.

    Raises: UserError when there is no such model, it has no (or not all) weights, or too few rows for the
    tokenizer.
    """
    usable = min(vocab or vocabulary(tokenizer), vocabulary(tokenizer))
    config = load_config(spec, tokenizer, runs, head)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    if tokenizer.mask_token_id is not None:
        config.mask_token_id = int(tokenizer.mask_token_id)
    if _rows(config) < usable:
        raise UserError(
            f"model {_name(spec)}: its vocabulary of {_rows(config)} is smaller than its tokenizer's {usable}"
        )
    with _seeded(stream_seed(seed, "weights")):
        if spec.architecture is not None:
            model = HEADS[head].auto.from_config(config).to(dtype)
        else:
            model = _pretrained(spec, config, dtype, runs, HEADS[head], new_head)
    model.config.pad_token_id = int(tokenizer.pad_token_id)
    if HEADS[head].one_vocabulary:
        model.config.eos_token_id = int(tokenizer.eos_token_id)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = model.config.eos_token_id
            model.generation_config.pad_token_id = model.config.pad_token_id
        if usable < _rows(config):
            model.config.kdbench_vocab = usable
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def load_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, runs: Path | None = None, head: str = "causal_lm"
) -> PreTrainedConfig:
    """The model's configuration, without its weights; a fresh one takes vocabulary and special ids from the
    tokenizer.

    Raises: UserError for a missing model, a folder without weights, an unknown architecture or setting.
    """
    if spec.architecture is not None:
        return _fresh_config(spec, tokenizer, HEADS[head])
    folder = _folder(spec.model, runs)
    if folder is not None:
        weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder or spec.model), revision=spec.revision, **NO_CODE)
    except Exception as error:
        raise _unavailable("model", spec.model, error) from error
    if config.model_type not in HEADS[head].types:
        raise UserError(f"model {spec.model}: '{config.model_type}' is no {HEADS[head].what}")
    assert isinstance(config, PreTrainedConfig)
    return config


def check_vocabularies(
    specs: Mapping[str, ModelSpec],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    runs: Path | None = None,
) -> int:
    """The number of ids that all roles share: pass it to `load_model` as `vocab`. No weights are read.

    The tokenizers must be the same, apart from special tokens added at the end; heads may be padded to other
    sizes.

    Raises: UserError with both roles and sizes when they are not, or when a model has fewer rows than that.
    """
    roles = sorted(specs, key=lambda role: role != "student")
    if not roles:
        raise ValueError("no models to compare")
    first = roles[0]
    rows = {role: _rows(load_config(specs[role], tokenizers[role], runs)) for role in roles}
    sizes = {role: vocabulary(tokenizers[role]) for role in roles}
    for role in roles[1:]:
        if not _same(tokenizers[first], tokenizers[role]):
            raise UserError(
                f"{first} and {role} have different tokenizers: {first} has {sizes[first]} tokens"
                f" (model vocabulary {rows[first]}), {role} has {sizes[role]}"
                f" (model vocabulary {rows[role]}); give both the same one"
            )
    shared = min(sizes.values())
    for role in roles:
        if rows[role] < shared:
            raise UserError(
                f"{role}: the model's vocabulary of {rows[role]} is smaller than its tokenizer's {shared}"
            )
    return shared


def check_positions(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    runs: Path | None = None,
    head: str = "causal_lm",
) -> None:
    """Refuses, before weights are read, a model with fewer positions than the longest sequence takes.

    Raises: UserError with both numbers.
    """
    config = load_config(spec, tokenizer, runs, head).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in _POSITIONS_AFTER_PAD:
        positions -= int(tokenizer.pad_token_id) + 1
        if positions <= 0:
            raise UserError(
                f"model {_name(spec)}: numbers positions from its padding id on, which is"
                f" {tokenizer.pad_token_id} in its tokenizer; it needs one with a small padding id"
            )
    if positions is not None and positions < tokens:
        raise UserError(
            f"model {_name(spec)}: has {positions} positions, the longest sequence takes {tokens};"
            " lower max_length or the prompt's length"
        )


# models that number positions from their padding id + 1 on
_POSITIONS_AFTER_PAD = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm")


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that a tokenizer uses: its largest id plus one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model (safetensors) and tokenizer so that `from_pretrained` loads them; nothing of kdbench is in
    them.
    """
    vocab = getattr(model.config, "kdbench_vocab", None)
    if vocab is not None:
        del model.config.kdbench_vocab
    try:
        model.save_pretrained(folder)
    finally:
        if vocab is not None:
            model.config.kdbench_vocab = vocab
    tokenizer.save_pretrained(folder)


def model_revision(spec: ModelSpec, runs: Path | None = None) -> str:
    """Content identity of what `spec` names: hash of a fresh configuration, of a folder's files, or the hub's
    commit.

    Raises: UserError as `load_config`.
    """
    if spec.architecture is not None:
        told = {"model_type": spec.architecture.model_type, "config": spec.architecture.config}
        return "fresh:" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = _folder(spec.model, runs)
    if folder is not None:
        files = [folder / "config.json", *weight_files(folder)]
        return "sha256:" + hashlib.sha256("".join(map(_file_hash, files)).encode()).hexdigest()[:16]
    try:
        config = AutoConfig.from_pretrained(spec.model, revision=spec.revision, **NO_CODE)
    except Exception as error:
        raise _unavailable("model", spec.model, error) from error
    return f"hub:{getattr(config, '_commit_hash', None) or spec.revision or 'unknown'}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises: UserError when it has none, or lacks one of its shards.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: is no model folder: it has no config.json")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        pickled = any(folder.glob("pytorch_model*.bin"))
        told = "; pickled weights are not read: save them as safetensors" if pickled else ""
        raise UserError(f"model {folder}: has no weights ({', '.join(lacking)}){told}")
    return [folder / name for name in names]


def _name(spec: ModelSpec) -> str:
    return spec.model or (spec.architecture.model_type if spec.architecture is not None else "")


def _folder(name: str, runs: Path | None) -> Path | None:
    """The local folder that a model's name means, or None for a hub id."""
    if name.startswith("run:"):
        root, run = runs or runs_dir(), name.removeprefix("run:")
        found = [
            path
            for depth in ("*/*/", "*/", "")
            for path in root.glob(f"{depth}{run}/student")
            if path.is_dir()
        ]
        if not found:
            raise UserError(f"model '{name}': there is no run {run} with a saved student below {root}")
        return found[0]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model '{name}': there is no such folder")
    return None


def _revision(spec: ModelSpec, tokenizer: str) -> str | None:
    """The pinned revision, which is that of the model's repository alone."""
    return spec.revision if tokenizer == spec.model else None


def _unavailable(what: str, name: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return UserError(f"{what} '{name}': cannot be read: {reason}")


def _ready(tokenizer: Any, name: str, head: Head, fresh: bool) -> PreTrainedTokenizerBase:
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if head.special:
        lacking = {key: text for key, text in head.special.items() if getattr(tokenizer, key) is None}
        if lacking and not fresh:
            raise UserError(f"tokenizer '{name}': has no {', '.join(lacking)}, which a {head.what} needs")
        if lacking:
            tokenizer.add_special_tokens(lacking)  # type: ignore[arg-type]
        return tokenizer
    if tokenizer.eos_token_id is None:
        if END not in tokenizer.get_vocab():
            raise UserError(
                f"tokenizer '{name}': has no end-of-text token; set eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = END
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    single = folder / "tokenizer.json"
    if single.is_file() and not (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(single))
    if not single.is_file() and not any(folder.glob("*vocab*")) and not any(folder.glob("*.model")):
        raise UserError(f"tokenizer '{folder}': the folder holds none (tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **NO_CODE)
    except Exception as error:
        raise _unavailable("tokenizer", str(folder), error) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


_BERT = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
_ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
# kind -> (the task's kind of text model, special tokens); "bpe" is GPT-2's, with one special token
_KINDS: dict[str, dict[str, str]] = {"bpe": {"eos": END}, "roberta": _ROBERTA, "bert": _BERT}


def _trained(name: str, task: Task) -> PreTrainedTokenizerBase:
    """A tokenizer of the given kind and size, trained on the task's train text; kept in the cache.

    Words that the task says must be whole (`task.whole_words`) become one token each.

    Source: byte-level BPE as in GPT-2 (Radford et al. 2019) and RoBERTa (Liu et al. 2019), uncased WordPiece
    as in BERT (Devlin et al. 2019), by the library `tokenizers`.
    """
    kind, _, size = name.removeprefix("train:").partition(":")
    if kind not in _KINDS or not size.isdigit() or int(size) < 300:
        known = ", ".join(f"train:{one}:<size>" for one in _KINDS)
        raise UserError(f"tokenizer '{name}': write {known} with a size of at least 300")
    path = cache_dir() / "tokenizers" / f"{task.name}-{task.revision}-{kind}-{size}-{TRAINED}.json"
    if not path.is_file():
        _write(path, _train(kind, int(size), task))
    special = {f"{key}_token": token for key, token in _KINDS[kind].items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    for word in task.whole_words:
        shown = word if kind == "bert" else f" {word}"
        if len(tokenizer.encode(shown, add_special_tokens=False)) != 1:
            raise UserError(f"tokenizer '{name}': is too small to know '{word}' as one token")
    return tokenizer


def _train(kind: str, size: int, task: Task) -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = list(_KINDS[kind].values())
    told: dict[str, Any] = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    trainer: Any
    if kind == "bert":
        trained = Tokenizer(models.WordPiece(unk_token=_BERT["unk"]))
        trained.normalizer = normalizers.BertNormalizer(lowercase=True)
        trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trained.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**told)
    else:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(min_frequency=2, initial_alphabet=alphabet, **told)
    shown = ((" " + word) * WHOLE for word in task.whole_words)
    trained.train_from_iterator(itertools.chain(task.texts("train"), shown), trainer)
    return trained.to_str()


def _write(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as part:
        part.write(text)
    os.replace(part.name, path)


def _fresh_config(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, head: Head) -> PreTrainedConfig:
    assert spec.architecture is not None
    kind, given = spec.architecture.model_type, spec.architecture.config
    if kind not in head.types:
        near = nearest(kind, head.types)
        example = "gpt2" if head.one_vocabulary else "bert"
        raise UserError(
            f"architecture: transformers has no {head.what} '{kind}'."
            + (f" Did you mean '{near}'?" if near is not None else f" For example: {example}.")
        )
    cls = CONFIG_MAPPING[kind]
    known = [*cls().to_dict(), *getattr(cls, "attribute_map", {})]
    for key in given:
        if key not in known:
            raise unknown("setting", key, known, f"architecture {kind}")
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if head.special:
        ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        ids["pad_token_id"] = tokenizer.pad_token_id
    try:
        config = cls(**{"vocab_size": vocabulary(tokenizer), **ids, **given})
    except Exception as error:  # each architecture checks its settings in its own way
        raise UserError(f"architecture {kind}: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _pretrained(
    spec: ModelSpec,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    runs: Path | None,
    head: Head,
    new_head: bool,
) -> PreTrainedModel:
    folder = _folder(spec.model, runs)
    loaded: Any
    try:
        loaded = head.auto.from_pretrained(
            str(folder or spec.model),
            config=config,
            revision=spec.revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **NO_CODE,
        )
    except Exception as error:
        raise _unavailable("model", spec.model, error) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if head.new_head and new_head:
        trunk = f"{model.base_model_prefix}."
        missing = [name for name in missing if name.startswith(trunk) and ".pooler." not in name]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"model '{spec.model}': {len(missing)} of its tensors have no weights ({some})")
    assert isinstance(model, PreTrainedModel)
    return model


def _rows(config: PreTrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)


def _same(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids, but for special tokens that one of them has beside."""
    small, large = sorted((a, b), key=vocabulary)
    few, many = small.get_vocab(), large.get_vocab()
    added = {str(token) for token in large.added_tokens_decoder.values()}
    same = all(many.get(token) == index for token, index in few.items())
    return same and many.keys() - few.keys() <= added and a.eos_token_id == b.eos_token_id


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs with torch's CPU generator seeded, and puts its state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.lru_cache(maxsize=64)
def _hash_of(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    """The sha256 of a file, computed once per size and time of change."""
    state = path.stat()
    return _hash_of(path, state.st_size, state.st_mtime_ns)
