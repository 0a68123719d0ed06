"""Loads a student or teacher and its tokenizer: hub id, local folder, `run:<id>`, or a fresh architecture.

Everything that can be refused without weights is refused before any load: a folder without weights, a
tokenizer that does not fit, vocabularies of teacher and student that differ. Code from the hub is never run,
and weights are read from safetensors only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdbench.data import ROOT_HELP
from kdbench.errors import UserError, nearest, unknown
from kdbench.paths import cache_dir, runs_dir
from kdbench.streams import stream_seed
from kdbench.task import Task

if TYPE_CHECKING:
    from kdbench.config import ModelSpec

END = "<|endoftext|>"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # left out, transformers asks the user


def load_tokenizer(
    spec: ModelSpec, task: Task, data_root: Path | None = None, runs: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with an end-of-text token, which also pads where there is no padding token.

    `spec.tokenizer` is "task", "data:<folder below the data root>", "train:bpe:<size>" (byte-level BPE
    trained on the task's train text, once), a local folder or a hub id; None takes the model's own, or the
    task's for a fresh model.

    Raises: UserError when there is no such tokenizer, or it has no end-of-text token.
    """
    name = spec.tokenizer
    if name is None:
        name = "task" if spec.architecture is not None else spec.model
    if name == "task":
        own = task.tokenizer()
        if own is None:
            raise UserError(
                f"tokenizer: task {task.name} brings none; name a folder, a hub id, data:tokenizers/gpt2 or"
                " train:bpe:<size>"
            )
        return _ready(own, "task")
    if name.startswith("train:"):
        return _trained(name, task)
    if name.startswith("data:"):
        if data_root is None:
            raise UserError(f"tokenizer '{name}' needs a data folder: {ROOT_HELP}")
        folder = data_root / name.removeprefix("data:")
        if not folder.is_dir():
            raise UserError(f"tokenizer '{name}': there is no folder {folder}")
        return _from_folder(folder)
    found = _folder(name, runs)
    if found is not None:
        return _from_folder(found)
    try:
        return _ready(AutoTokenizer.from_pretrained(name, revision=_revision(spec, name), **NO_CODE), name)
    except UserError:
        raise
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
) -> PreTrainedModel:
    """The model in eval mode on the CPU; a fresh one has weights that `seed` alone fixes.

    `vocab` is what `check_vocabularies` returned: ids from it on are left out of every distribution (by
    `config.kdbench_vocab`), so that padded heads compare. `config.eos_token_id` becomes the tokenizer's, one
    int.

    Raises: UserError when there is no such model, it has no (or not all) weights, or too few rows for the
    tokenizer.
    """
    usable = min(vocab or vocabulary(tokenizer), vocabulary(tokenizer))
    config = load_config(spec, tokenizer, runs)
    if _rows(config) < usable:
        raise UserError(
            f"model {_name(spec)}: its vocabulary of {_rows(config)} is smaller than its tokenizer's {usable}"
        )
    with _seeded(stream_seed(seed, "weights")):
        if spec.architecture is not None:
            model = AutoModelForCausalLM.from_config(config).to(dtype)
        else:
            model = _pretrained(spec, config, dtype, runs)
    model.config.eos_token_id = int(tokenizer.eos_token_id)
    model.config.pad_token_id = int(tokenizer.pad_token_id)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = model.config.eos_token_id
        model.generation_config.pad_token_id = model.config.pad_token_id
    if usable < _rows(config):
        model.config.kdbench_vocab = usable
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def load_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, runs: Path | None = None
) -> PreTrainedConfig:
    """The model's configuration, without its weights; a fresh one takes vocabulary and special ids from the
    tokenizer.

    Raises: UserError for a missing model, a folder without weights, an unknown architecture or setting.
    """
    if spec.architecture is not None:
        return _fresh_config(spec, tokenizer)
    folder = _folder(spec.model, runs)
    if folder is not None:
        weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder or spec.model), revision=spec.revision, **NO_CODE)
    except Exception as error:
        raise _unavailable("model", spec.model, error) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model {spec.model}: '{config.model_type}' is no causal language model")
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
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, tokens: int, runs: Path | None = None
) -> None:
    """Refuses, before weights are read, a model with fewer positions than the longest sequence takes.

    Raises: UserError with both numbers.
    """
    config = load_config(spec, tokenizer, runs).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < tokens:
        raise UserError(
            f"model {_name(spec)}: has {positions} positions, the longest sequence takes {tokens};"
            " lower max_length or the prompt's length"
        )


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


def _ready(tokenizer: Any, name: str) -> PreTrainedTokenizerBase:
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
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
        return _ready(PreTrainedTokenizerFast(tokenizer_file=str(single)), str(folder))
    if not single.is_file() and not any(folder.glob("*vocab*")) and not any(folder.glob("*.model")):
        raise UserError(f"tokenizer '{folder}': the folder holds none (tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **NO_CODE)
    except Exception as error:
        raise _unavailable("tokenizer", str(folder), error) from error
    return _ready(tokenizer, str(folder))


def _trained(name: str, task: Task) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of the given size, trained on the task's train text; kept in the cache.

    Source: byte-level BPE as in GPT-2 (Radford et al. 2019), by the library `tokenizers`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    kind, _, size = name.removeprefix("train:").partition(":")
    if kind != "bpe" or not size.isdigit() or int(size) < 300:
        raise UserError(f"tokenizer '{name}': write train:bpe:<size> with a size of at least 300")
    path = cache_dir() / "tokenizers" / f"{task.name}-{task.revision}-bpe-{size}.json"
    if not path.is_file():
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=int(size),
            min_frequency=2,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        trained.train_from_iterator(task.texts("train"), trainer)
        _write(path, trained.to_str())
    return _ready(PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END), name)


def _write(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as part:
        part.write(text)
    os.replace(part.name, path)


def _fresh_config(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    assert spec.architecture is not None
    kind, given = spec.architecture.model_type, spec.architecture.config
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(
            f"architecture: transformers has no causal language model '{kind}'."
            + (f" Did you mean '{near}'?" if near is not None else " For example: gpt2.")
        )
    cls = CONFIG_MAPPING[kind]
    known = [*cls().to_dict(), *getattr(cls, "attribute_map", {})]
    for key in given:
        if key not in known:
            raise unknown("setting", key, known, f"architecture {kind}")
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = cls(**{"vocab_size": vocabulary(tokenizer), **ids, **given})
    except Exception as error:  # each architecture checks its settings in its own way
        raise UserError(f"architecture {kind}: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _pretrained(
    spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype, runs: Path | None
) -> PreTrainedModel:
    folder = _folder(spec.model, runs)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
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
