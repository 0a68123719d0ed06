"""Models and tokenizers: fresh, from folders in the hub's format, of runs; vocabularies; what is refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from kdbench.config import Architecture, ModelSpec
from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.models import (
    check_positions,
    check_vocabularies,
    load_config,
    load_model,
    load_tokenizer,
    model_revision,
    save_student,
    vocabulary,
)
from kdbench.predict import predict
from kdbench.rollout import Draw, rollout
from kdbench.task import InstructionTask, Row

GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 32}


@dataclass
class Limits:
    """Settings of Toy."""

    max_prompt: int = 16
    max_length: int = 32


class Toy(InstructionTask):
    """A task with one row; its tokenizer is set by the test."""

    name = "toy"
    own: PreTrainedTokenizerFast | None = None

    def splits(self) -> list[str]:
        return ["train"]

    def load(self, split: str) -> list[Row]:
        return [{"instruction": "Count to three.", "input": "", "output": "one two three " * 5}]

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast | None:
        return self.own


@pytest.fixture
def task() -> Toy:
    return Toy(Limits())


def fresh(**config: object) -> ModelSpec:
    return ModelSpec(architecture=Architecture("gpt2", {**GPT2, **config}))


@pytest.fixture
def folder(
    tmp_path: Path, tiny_student: Callable[..., GPT2LMHeadModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A model folder as the hub has them, with its tokenizer."""
    path = tmp_path / "hub-model"
    tiny_student().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------- models


def test_fresh_weights_follow_the_seed_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model(fresh(), tiny_tokenizer, 1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.rand(3)
    assert torch.equal(weights(load_model(fresh(), tiny_tokenizer, 1)), weights(first))
    assert not torch.equal(weights(load_model(fresh(), tiny_tokenizer, 2)), weights(first))


def test_fresh_model_fits_its_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(fresh(), tiny_tokenizer, 1, torch.float64)
    assert model.config.vocab_size == vocabulary(tiny_tokenizer)
    assert model.config.eos_token_id == model.config.pad_token_id == tiny_tokenizer.eos_token_id
    assert not model.training
    assert model.dtype == torch.float64
    assert model.config.n_embd == 8
    assert not hasattr(model.config, "kdbench_vocab")


def test_folder_in_the_hubs_format(
    folder: Path,
    task: Toy,
    tiny_student: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    spec = ModelSpec(model=str(folder))
    tokenizer = load_tokenizer(spec, task)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    before = torch.get_rng_state()
    model = load_model(spec, tokenizer, 3)
    assert torch.equal(weights(model), weights(tiny_student()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert load_model(spec, tokenizer, 3, torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(model.config.eos_token_id, int)


def test_student_is_saved_for_from_pretrained(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, task: Toy
) -> None:
    model = load_model(fresh(vocab_size=64), tiny_tokenizer, 1)
    assert model.config.kdbench_vocab == vocabulary(tiny_tokenizer)
    run = tmp_path / "runs/tiny/v1/abc123"
    save_student(model, tiny_tokenizer, run / "student")
    assert model.config.kdbench_vocab == vocabulary(tiny_tokenizer)
    assert "kdbench" not in (run / "student/config.json").read_text()
    assert list((run / "student").glob("*.safetensors"))
    assert not list((run / "student").glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(run / "student")
    assert torch.equal(weights(again), weights(model))
    assert AutoTokenizer.from_pretrained(run / "student").eos_token_id == tiny_tokenizer.eos_token_id
    spec = ModelSpec(model="run:abc123")
    tokenizer = load_tokenizer(spec, task, runs=tmp_path / "runs")
    assert torch.equal(weights(load_model(spec, tokenizer, 9, runs=tmp_path / "runs")), weights(model))
    with pytest.raises(UserError, match="there is no run abc124 with a saved student"):
        load_tokenizer(ModelSpec(model="run:abc124"), task, runs=tmp_path / "runs")


def test_revision_follows_content(folder: Path, tiny_student: Callable[..., GPT2LMHeadModel]) -> None:
    assert model_revision(fresh()) == model_revision(fresh())
    assert model_revision(fresh()) != model_revision(fresh(n_embd=16))
    spec = ModelSpec(model=str(folder))
    first = model_revision(spec)
    assert first.startswith("sha256:")
    tiny_student(seed=2).save_pretrained(folder)
    assert model_revision(spec) != first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            ModelSpec(architecture=Architecture("gtp2", {})),
            "no causal language model 'gtp2'. Did you mean 'gpt2'?",
        ),
        (ModelSpec(architecture=Architecture("vit", {})), "no causal language model 'vit'"),
        (fresh(n_layers=2), "architecture gpt2: no setting 'n_layers'. Did you mean 'n_layer'?"),
        (fresh(vocab_size=10), "vocabulary of 10 is smaller than its tokenizer's"),
        (ModelSpec(model="./nowhere"), "'./nowhere': there is no such folder"),
        (ModelSpec(model="nobody/nothing"), "model 'nobody/nothing': cannot be read"),
    ],
)
def test_models_that_are_refused(
    spec: ModelSpec, message: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message) as told:
        load_model(spec, tiny_tokenizer, 1)
    assert "\n" not in str(told.value)


def test_folder_without_weights(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = ModelSpec(model=str(folder))
    whole = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for use in (lambda: load_config(spec, tiny_tokenizer), lambda: model_revision(spec)):
        with pytest.raises(UserError, match="has no weights .*pickled weights are not read"):
            use()
    whole.unlink()
    with pytest.raises(UserError, match=r"has no weights \(model.safetensors\)$"):
        load_model(spec, tiny_tokenizer, 1)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(UserError, match=r"has no weights \(model-2.safetensors\)"):
        check_vocabularies({"student": spec}, {"student": tiny_tokenizer})
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(spec, tiny_tokenizer, 1)


def test_folder_with_only_some_weights(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    some = {name: value for name, value in load_file(path).items() if "h.1.mlp" not in name}
    save_file(some, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"4 of its tensors have no weights \(.*h.1.mlp.*\.\.\.\)"):
        load_model(ModelSpec(model=str(folder)), tiny_tokenizer, 1)


def test_code_in_a_model_folder_is_never_run(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, task: Toy
) -> None:
    (folder / "own.py").write_text("raise SystemExit('code of the folder was run')")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own.Config",
            "AutoModelForCausalLM": "own.Model",
            "AutoTokenizer": ["own.T", None],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(ModelSpec(model=str(folder)), tiny_tokenizer, 1)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(ModelSpec(model=str(folder)), task)


def test_too_few_positions(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    check_positions(fresh(), tiny_tokenizer, 32)
    with pytest.raises(UserError, match="has 32 positions, the longest sequence takes 33"):
        check_positions(fresh(), tiny_tokenizer, 33)


# ------------------------------------------------------------------------------------------- vocabularies


def test_padded_heads_are_cut_to_the_shared_ids(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    specs = {"student": fresh(vocab_size=vocabulary(tiny_tokenizer) + 3), "teacher": fresh(vocab_size=64)}
    shared = check_vocabularies(specs, dict.fromkeys(specs, tiny_tokenizer))
    assert shared == vocabulary(tiny_tokenizer)
    models = [load_model(spec, tiny_tokenizer, 1, vocab=shared) for spec in specs.values()]
    ids = torch.tensor([[4, 5, 6, 7]])
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch({"example_id": one, "input_ids": ids, "prompt_length": one, "length": 4 * one})
    for model in models:
        assert predict(model, batch).logits().shape == (3, shared)
        with torch.no_grad():
            model.get_output_embeddings().weight[shared:] = 100 * model.get_output_embeddings().weight[:1]
        response = rollout(model, batch, Draw(1), 8)["input_ids"]
        assert response.max() < shared


def test_other_tokenizers_are_refused_with_both_sizes(
    tiny_tokenizer: PreTrainedTokenizerFast, task: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path))
    other = load_tokenizer(ModelSpec(architecture=Architecture("gpt2"), tokenizer="train:bpe:300"), task)
    n, m = vocabulary(tiny_tokenizer), vocabulary(other)
    assert n != m
    specs = {"teacher": fresh(vocab_size=512), "student": fresh(vocab_size=400)}
    for pair in ((tiny_tokenizer, other), (other, tiny_tokenizer)):
        a, b = vocabulary(pair[1]), vocabulary(pair[0])
        told = rf"student has {a} tokens \(model vocabulary 400\), teacher has {b} \(model vocabulary 512\)"
        with pytest.raises(UserError, match=told):
            check_vocabularies(specs, dict(zip(specs, pair, strict=True)))


def test_special_tokens_beside_are_no_other_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    wider = copy.deepcopy(tiny_tokenizer)
    wider.add_special_tokens({"pad_token": "<pad>"})
    n = vocabulary(tiny_tokenizer)
    assert vocabulary(wider) == n + 1
    for tokenizers in ((tiny_tokenizer, wider), (wider, tiny_tokenizer)):
        specs = {"student": fresh(vocab_size=n), "teacher": fresh(vocab_size=n + 1)}
        assert check_vocabularies(specs, dict(zip(specs, tokenizers, strict=True))) == n
    model = load_model(fresh(vocab_size=n), wider, 1, vocab=n)
    assert model.config.vocab_size == n
    specs = {"student": fresh(vocab_size=n - 1), "teacher": fresh(vocab_size=n)}
    with pytest.raises(UserError, match=f"student: the model's vocabulary of {n - 1} is smaller"):
        check_vocabularies(specs, dict.fromkeys(specs, tiny_tokenizer))


# ------------------------------------------------------------------------------------------- tokenizers


def test_the_tasks_tokenizer(task: Toy, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="task toy brings none; name a folder"):
        load_tokenizer(fresh(), task)
    task.own = tiny_tokenizer
    assert load_tokenizer(fresh(), task) is tiny_tokenizer


def test_trained_tokenizer_is_kept(task: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path))
    spec = ModelSpec(architecture=Architecture("gpt2"), tokenizer="train:bpe:300")
    first = load_tokenizer(spec, task)
    [text] = task.texts("train")
    assert first.decode(first(text)["input_ids"]) == text
    assert first.decode(first("café ☕")["input_ids"]) == "café ☕", "bytes cover what was not seen"
    assert vocabulary(first) <= 300
    assert first.pad_token_id == first.eos_token_id is not None
    [kept] = tmp_path.glob("tokenizers/*")
    changed = kept.stat().st_mtime_ns
    assert load_tokenizer(spec, task).get_vocab() == first.get_vocab()
    assert kept.stat().st_mtime_ns == changed
    kept.unlink()
    assert load_tokenizer(spec, task).get_vocab() == first.get_vocab()


def test_tokenizer_below_the_data_root(
    task: Toy, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "tokenizers/mine").mkdir(parents=True)
    spec = ModelSpec(architecture=Architecture("gpt2"), tokenizer="data:tokenizers/mine")
    with pytest.raises(UserError, match="the folder holds none"):
        load_tokenizer(spec, task, tmp_path)
    path = tmp_path / "tokenizers/mine/tokenizer.json"
    tiny_tokenizer.backend_tokenizer.save(str(path))
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(spec, task, tmp_path)
    path.write_text(path.read_text().replace("<eos>", "<|endoftext|>"))
    tokenizer = load_tokenizer(spec, task, tmp_path)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train:wordpiece:300", "write train:bpe:<size>"),
        ("train:bpe:12", "at least 300"),
        ("data:tokenizers/gpt2", "needs a data folder: pass --data-root"),
        ("./nowhere", "'./nowhere': there is no such folder"),
        ("nobody/nothing", "tokenizer 'nobody/nothing': cannot be read"),
    ],
)
def test_tokenizers_that_are_refused(name: str, message: str, task: Toy) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelSpec(architecture=Architecture("gpt2"), tokenizer=name), task)
