"""The instruct task: named sets, files, folders, hub ids, what is refused, and the real data where it is."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kdbench import data
from kdbench.errors import UserError
from kdbench.task import template
from kdbench.tasks.instruct import PAPER_SETS, Instruct

REAL = os.environ.get("KDBENCH_DATA_ROOT")
needs_data = pytest.mark.skipif(not REAL, reason="KDBENCH_DATA_ROOT is not set: no real data")


def record(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"Say {index}.", "input": "", "output": f"{index}", **fields}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def instruct(
    train: str = "", dev: str = "", tests: tuple[str, ...] = (), root: Path | None = None, **more: Any
) -> Instruct:
    return Instruct(Instruct.Settings(train=train, dev=dev, tests=list(tests), **more), root)


def made(root: Path) -> Path:
    """A data folder with every file that the default settings read, 12 records each."""
    for one in data.known("instruct").values():
        for file in one.files.values():
            if file.local is not None:
                write(root / f"{file.local}.gz", [record(i, topic="x") for i in range(12)])
    return root


# ------------------------------------------------------------------------------------------- named sets


def test_the_papers_sets_are_known_with_their_splits() -> None:
    known = data.known()
    assert set(PAPER_SETS) <= set(known)
    dolly = known["dolly"]
    assert (dolly.hub, set(dolly.files)) == ("MiniLLM/dolly", {"train", "dev", "test"})
    assert (dolly.files["dev"].start, dolly.files["dev"].stop, dolly.files["train"].start) == (0, 1000, 1000)
    assert known["unni"].files["test"].stop == 10_000
    assert known["unni"].files["test"].local is None
    assert known["unni-short"].hub is None
    for one in known.values():
        assert one.kind in ("instruct", "text", "classify", "transfer")
        assert one.source
        assert one.licence
        told = [len(file.sha256) == 64 for file in one.files.values() if file.local]
        assert all(told) or (one.kind == "transfer" and not any(told))  # of some no local copy is known


def test_default_settings_read_the_local_folder(tmp_path: Path) -> None:
    task = Instruct(None, made(tmp_path))
    sets = ["dolly", "self-inst", "vicuna", "s-ni", "unni-short"]
    assert task.splits() == ["train", "dev", *(f"test/{name}" for name in sets)]
    assert task.rows("test/s-ni")[3] == {
        "example_id": 3, "instruction": "Say 3.", "input": "", "output": "3", "split": "test/s-ni"
    }  # fmt: skip
    origin = task.origins["test/s-ni"]
    assert origin["path"] == "instruct/s-ni/test.jsonl.gz"
    raw = gzip.decompress((tmp_path / origin["path"]).read_bytes())
    assert origin["sha256"] == hashlib.sha256(raw).hexdigest()
    assert len(task.rows("train")) == len(task.rows("dev")) == 12
    assert [s for s in task.splits() if task.scored_by(s) == "exact_match"] == ["test/unni-short"]


def test_other_content_is_another_revision(tmp_path: Path) -> None:
    first = Instruct(None, made(tmp_path)).revision
    assert Instruct(None, tmp_path).revision == first
    path = tmp_path / "instruct/vicuna/test.jsonl.gz"
    write(path, [record(i, topic="y") for i in range(12)])  # a field that no row keeps: the checksum tells
    second = Instruct(None, tmp_path).revision
    path.unlink()
    write(path.with_suffix(""), [record(i, topic="x") for i in range(12)])  # not gzipped: the same content
    assert first == Instruct(None, tmp_path).revision != second


def test_limit_spreads_over_the_set_and_keeps_ids(tmp_path: Path) -> None:
    task = instruct("dolly", "dolly", ("dolly",), made(tmp_path), train_limit=4, test_limit=2)
    assert [row["example_id"] for row in task.rows("train")] == [0, 3, 6, 9]
    assert [row["example_id"] for row in task.rows("test/dolly")] == [0, 6]
    assert len(task.rows("dev")) == 12
    assert task.origins["train"]["records"] == 12
    assert task.revision != instruct("dolly", "dolly", ("dolly",), tmp_path).revision


def hub(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[tuple[str, str]]:
    """Makes `root` stand for the hub; returns the files that were asked for."""
    asked = []

    def download(repo: str, name: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append((repo, name))
        return str(root / repo / "snapshots" / "c0ffee" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_named_sets_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, tmp_path)
    write(tmp_path / "MiniLLM/dolly/snapshots/c0ffee/raw.jsonl", [record(i) for i in range(1005)])
    prompt = template(record(3, input="a")).replace("\n", "<n>")
    bare = {"prompt": template(record(4)).replace("\n", "<n>"), "output": ["4", "four"], "topic": "x"}
    write(
        tmp_path / "MiniLLM/uinst/snapshots/c0ffee/11_/valid.jsonl",
        [{"prompt": prompt, "output": "3"}, bare] * 5001,
    )
    task = instruct("dolly", "dolly", ("unni",))
    assert len(task.rows("dev")) == 1000
    assert [row["instruction"] for row in task.rows("train")] == [f"Say {i}." for i in range(1000, 1005)]
    rows = task.rows("test/unni")
    assert len(rows) == 10_000
    assert (rows[0]["instruction"], rows[0]["input"]) == ("Say 3.", "a")
    assert (rows[1]["instruction"], rows[1]["input"], rows[1]["output"]) == ("Say 4.", "", ["4", "four"])
    assert task.origins["test/unni"]["commit"] == "c0ffee"
    assert set(asked) == {("MiniLLM/dolly", "raw.jsonl"), ("MiniLLM/uinst", "11_/valid.jsonl")}


def test_local_folder_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, tmp_path / "hub")
    write(tmp_path / "hub/MiniLLM/Vicuna/snapshots/c0ffee/valid.jsonl", [record(i) for i in range(3)])
    assert len(instruct(tests=("vicuna",), root=made(tmp_path)).rows("test/vicuna")) == 12
    assert not asked
    assert len(instruct(tests=("vicuna",), root=tmp_path, source="hub").rows("test/vicuna")) == 3


def test_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(
        UserError, match="MiniLLM/Vicuna: cannot be fetched from the hub .*KDBENCH_DATA_ROOT"
    ) as told:
        instruct(tests=("vicuna",)).rows("test/vicuna")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("tests", "more", "message"),
    [
        (("vicunna",), {}, "no data set 'vicunna'. Did you mean 'vicuna'?"),
        (("vicuna",), {"source": "locale"}, "no source 'locale'. Did you mean 'local'?"),
        (("vicuna",), {"source": "local"}, "'vicuna' needs a data folder: pass --data-root"),
        (("vicuna",), {"source": "local", "root": "here"}, "here lacks instruct/vicuna/test.jsonl"),
        (("vicuna",), {"root": "nowhere"}, "nowhere: there is no such folder; pass --data-root"),
        (("unni",), {"source": "local", "root": "here"}, "'unni' is read from the hub only .*use unni-short"),
        (("unni-short",), {}, "'unni-short' needs a data folder"),
        (("unni-short",), {"root": "here", "source": "hub"}, "'unni-short' is not on the hub"),
        (("t0",), {"root": "here"}, "data set 't0' has no test split; it has: train"),
        (("vicuna",), {"source": "path"}, "tests? = 'vicuna': there is no such file or folder"),
        (("some/where.jsonl",), {}, "'some/where.jsonl': there is no such file or folder"),
        (("vicuna", "vicuna"), {}, "tests name the set 'vicuna' twice"),
        ((), {}, "no data: name a set"),
    ],
)  # fmt: skip
def test_missing_sets_are_refused_at_once(
    tmp_path: Path, tests: tuple[str, ...], more: dict[str, str], message: str
) -> None:
    (tmp_path / "here").mkdir()
    root = tmp_path / more.pop("root") if "root" in more else None
    with pytest.raises(UserError, match=message):
        instruct(tests=tests, root=root, **more)


# ------------------------------------------------------------------------------------------- any data


def test_a_folder(tmp_path: Path) -> None:
    for split, n in (("train", 4), ("valid", 2), ("test", 3)):
        write(tmp_path / f"mine/{split}.jsonl", [record(i) for i in range(n)])
    spec = str(tmp_path / "mine")
    task = instruct(spec, spec, (spec,))
    assert task.splits() == ["train", "dev", "test/mine"]
    assert [len(task.rows(split)) for split in task.splits()] == [4, 2, 3]


def test_one_file_is_parted(tmp_path: Path) -> None:
    spec = str(write(tmp_path / "my set.jsonl", [record(i) for i in range(30)]))
    task = instruct(spec, spec, (spec,))
    ids = {split: [row["example_id"] for row in task.rows(split)] for split in task.splits()}
    assert ids == {"dev": [0, 1, 2], "test/my-set": [3, 4, 5], "train": list(range(6, 30))}
    assert len(instruct(spec).rows("train")) == 30
    other = str(tmp_path / "x" / ".." / "my set.jsonl")
    (tmp_path / "x").mkdir()
    assert len(instruct(spec, other).rows("train")) == 27, "another path to one file is that file"
    few = str(write(tmp_path / "few.jsonl", [record(i) for i in range(9)]))
    with pytest.raises(UserError, match="9 records are too few to part into dev, train"):
        instruct(few, few).rows("dev")


def test_a_folder_without_dev_parts_its_train_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [record(i) for i in range(20)])
    write(tmp_path / "test.jsonl", [record(i) for i in range(5)])
    spec = str(tmp_path)
    task = instruct(spec, spec, (spec,))
    assert [len(task.rows(split)) for split in task.splits()] == [18, 2, 5]
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="has no train.jsonl"):
        instruct(spec)


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([record(i, more=i) for i in range(20)])
    splits = datasets.DatasetDict(train=rows, test=rows.select(range(4)))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: splits if repo == "some/one" else {}[repo])
    task = instruct("some/one", "some/one", ("some/one",))
    assert task.splits() == ["train", "dev", "test/one"]
    assert [len(task.rows(split)) for split in task.splits()] == [18, 2, 4]
    assert task.rows("dev")[0] == {"example_id": 0, **record(0), "split": "dev"}
    with pytest.raises(UserError, match="some/other: cannot be fetched from the hub"):
        instruct("some/other").rows("train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "output": ', "is not JSON: Expecting value"),
        ("[1]", "must be a JSON object, is a list"),
        ('{"instruction": "a", "input": ""}', "lacks the field 'output'; it has: instruction, input"),
        ('{"output": "a"}', "lacks the field 'instruction'"),
        ('{"instruction": 3, "output": "a"}', "'instruction' must be text, is a number"),
        ('{"instruction": "a", "input": ["b"], "output": "a"}', "'input' must be text, is a list"),
        (
            '{"instruction": "a", "output": {"text": "b"}}',
            "'output' must be text or a list of texts, is an object",
        ),
        ('{"instruction": "a", "output": ["b", 3]}', "'output' must be text or a list of texts"),
        ('{"instruction": "a", "output": []}', "'output' is empty"),
        ('{"instruction": "a", "output": ["b", " "]}', "'output' is empty or has an empty reference"),
        ('{"instruction": "", "output": "b"}', "'instruction' is empty"),
        ('{"prompt": "Say it.", "output": "b"}', "its 'prompt' is not in the template's form"),
    ],
)
def test_a_bad_line_is_told_with_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [record(), "", line, record()])
    with pytest.raises(UserError, match=f"a.jsonl:3: .*{message}") as told:
        instruct(str(path)).rows("train")
    assert "\n" not in str(told.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a.jsonl: is empty"):
        instruct(str(write(tmp_path / "a.jsonl", ["", " "]))).rows("train")
    (tmp_path / "b.jsonl").write_bytes(json.dumps(record()).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match="b.jsonl:2: is not UTF-8"):
        instruct(str(tmp_path / "b.jsonl")).rows("train")
    whole = write(tmp_path / "c.jsonl.gz", [record(i) for i in range(100)]).read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:40] + b"xxxx" + whole[44:]):
        (tmp_path / "c.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match="c.jsonl.gz: cannot be read"):
            instruct(str(tmp_path / "c.jsonl.gz")).rows("train")


def test_missing_or_null_input_is_no_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, record(input=None, prefix="P")])
    rows = instruct(str(path)).rows("train")
    assert [row["input"] for row in rows] == ["", ""]
    assert "prefix" not in rows[0]
    assert rows[1]["prefix"] == "P"


def test_sources(tmp_path: Path) -> None:
    told = {(one["set"], one["split"]): one for one in data.sources(None)}
    assert told["dolly", "train"]["local"] == "no data root"
    assert told["unni", "test"]["local"] == "hub only"
    assert told["dolly", "train"]["hub"] == "MiniLLM/dolly/raw.jsonl"
    write(tmp_path / "instruct/vicuna/test.jsonl", [record()])
    told = {(one["set"], one["split"]): one for one in data.sources(tmp_path, ["instruct"])}
    assert told["vicuna", "test"]["local"] == "other content"
    assert told["dolly", "dev"]["local"] == "lacking"
    assert all(isinstance(value, str) for one in told.values() for value in one.values())
    assert not any(name == "brown" for name, _ in told)


# ------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def gpt2() -> Callable[[], PreTrainedTokenizerFast]:
    path = Path(REAL or "") / "tokenizers/gpt2/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
    return lambda: tokenizer


@needs_data
def test_real_sets_have_their_published_checksums() -> None:
    assert REAL is not None
    told = data.sources(Path(REAL))
    assert {one["local"] for one in told if one["sha256"]} == {"present"}
    assert {one["local"] for one in told if not one["sha256"]} <= {"hub only", "lacking"}
    task = Instruct(None, Path(REAL))
    known = data.known("instruct")
    for split in task.splits():
        role, _, name = split.partition("/")
        file = known[name or "dolly"].files[role]
        assert len(task.rows(split)) == file.records
        assert task.origins[split]["sha256"] == file.sha256


@needs_data
def test_real_dolly_fits_the_papers_limits(gpt2: Callable[[], PreTrainedTokenizerFast]) -> None:
    task = Instruct(None, Path(REAL or ""))
    encoder = task.encoder(gpt2())
    rows = task.rows("train", encoder)
    assert task.counts["train"]["long_prompts_dropped"] == 0, "MiniLLM's selection is by these very limits"
    batch = task.collate(rows[:32], {"student": encoder})
    assert batch["prompt_length"].max() <= 256
    assert batch["input_ids"].shape[1] <= 512
    i = int(batch["length"].argmin())
    ids = batch["input_ids"][i, : batch["length"][i]].tolist()
    assert ids[-1] == gpt2().eos_token_id
    assert gpt2().decode(ids[:-1]) == template(rows[i]) + rows[i]["output"]


@needs_data
def test_real_long_dolly_prompts_are_dropped(gpt2: Callable[[], PreTrainedTokenizerFast]) -> None:
    path = Path(REAL or "") / "instruct/dolly/train-long.jsonl.gz"
    task = instruct(str(path))
    encoder = task.encoder(gpt2())
    assert len(task.rows("train", encoder)) == 74
    assert task.counts["train"]["long_prompts_dropped"] == 1980
    test = instruct(tests=(str(path),), test_limit=200)
    rows = test.rows("test/train-long", encoder)
    assert len(rows) == 200
    cut = test.counts["test/train-long"]["long_prompts_cut"]
    assert cut == sum(item.prompt_tokens > 256 for item in test.encoded(rows, encoder)) > 150
    assert max(test.collate(rows, {"student": encoder})["prompt_length"].tolist()) == 256
