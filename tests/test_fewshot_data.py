"""The fewshot task: named sets, local folder, hub stand-ins, what is refused, and real data where it is."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kdbench import data
from kdbench.errors import UserError
from kdbench.few_shot import LM_BFF, prompt_of
from kdbench.task import Row
from kdbench.tasks.fewshot import FewShot

SETS = ("mnli", "mpqa", "mr", "rte", "snli", "sst2", "trec")
PAIRS = ("mnli", "rte", "snli")
LOCAL_ONLY = ("mpqa", "mr")


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def record(dataset: str, i: int) -> dict[str, Any]:
    classes = list(LM_BFF[dataset].words)
    texts = {"text_a": f"It is {i}.", "text_b": f"Is it {i}?"} if dataset in PAIRS else {"text": f"text {i}"}
    return {**texts, "label": classes[i % len(classes)]}


def made(root: Path, n: int = 120) -> Path:
    """A data folder with every set's files."""
    for dataset in SETS:
        for file in data.known("classify")[dataset].files.values():
            assert file.local is not None
            write(root / file.local, [record(dataset, i) for i in range(n)])
    return root


def fewshot(dataset: str, root: Path | None = None, **more: Any) -> FewShot:
    return FewShot(FewShot.Settings(dataset=dataset, **{"k": 4, **more}), root)


def hub(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[tuple[str, str]]:
    """Makes `root` stand for the hub; returns the files that were asked for."""
    asked = []

    def download(repo: str, name: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append((repo, name))
        return str(root / repo / "snapshots" / "c0ffee" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


# ------------------------------------------------------------------------------------------- named sets


def test_the_papers_sets_are_known() -> None:
    known = data.known("classify")
    assert set(SETS) <= set(known)
    assert set(LM_BFF) == set(SETS)
    for name in SETS:
        one = known[name]
        assert one.source.startswith("https://")
        assert one.licence
        assert set(one.files) == {"train", "test", *(["test-mm"] if name == "mnli" else [])}
        assert all(len(file.sha256) == 64 and file.local for file in one.files.values())
        assert (one.hub is None) == (name in LOCAL_ONLY)
        assert all((file.hub_file is None) == (name in LOCAL_ONLY) for file in one.files.values())
        if one.hub_labels:
            assert set(one.hub_labels.values()) - {"-"} == set(LM_BFF[name].words)
        if one.hub is not None:
            assert set(one.hub_columns) == {"label", *(("text_a", "text_b") if name in PAIRS else ("text",))}


@pytest.mark.parametrize("dataset", SETS)
def test_the_local_folder(tmp_path: Path, dataset: str) -> None:
    task = fewshot(dataset, made(tmp_path))
    tests = ["test/mnli", "test/mnli-mm"] if dataset == "mnli" else [f"test/{dataset}"]
    assert task.splits() == ["train", "dev", "unlabeled", *tests]
    n = len(task.classes())
    assert [len(task.rows(split)) for split in task.splits()] == [4 * n, 4 * n, 40 * n, *[120 for _ in tests]]
    assert task.origins["train"] == task.origins["dev"] == task.origins["unlabeled"]
    assert task.origins["train"]["path"] == f"classify/{dataset}/train.jsonl"
    assert task.origins[tests[0]]["records"] == 120
    assert all("class_label" in row for split in task.splits() for row in task.rows(split))


def test_the_glue_dev_set_is_the_test_set(tmp_path: Path) -> None:
    places = {}
    for dataset in SETS:
        task = fewshot(dataset, made(tmp_path))
        places |= {
            split: (task.rows(split), task.origins[split]["path"].split("/")[-1])[1]
            for split in task.splits()
            if split.startswith("test/")
        }
    assert places == {
        "test/mnli": "test-matched.jsonl",
        "test/mnli-mm": "test-mismatched.jsonl",
        "test/rte": "dev.jsonl",
        "test/snli": "dev.jsonl",
        "test/sst2": "dev.jsonl",
        "test/mr": "test.jsonl",
        "test/mpqa": "test.jsonl",
        "test/trec": "test.jsonl",
    }


def test_splits_are_known_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = fewshot("mnli", made(tmp_path))
    monkeypatch.setattr(data, "read_labelled", None)
    assert len(task.splits()) == 5


def test_a_test_set_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = data.read_labelled, []
    monkeypatch.setattr(data, "read_labelled", lambda *given: asked.append(given[0].name) or read(*given))
    task = fewshot("mnli", made(tmp_path))
    assert task.revision
    task.rows("test/mnli")
    assert sorted(asked) == ["test-matched.jsonl", "test-mismatched.jsonl", "train.jsonl"]


def test_pairs_without_a_label_are_left_out(tmp_path: Path) -> None:
    root = made(tmp_path)
    rows = [record("snli", i) for i in range(60)]
    for i in (3, 10):
        rows[i]["label"] = "-"
    write(root / "classify/snli/train.jsonl", rows)
    task = fewshot("snli", root)
    pool = task.pool()
    assert len(pool) == 58
    assert all(row["label"] != "-" for row in pool)
    assert task.counts["train"]["without_label"] == task.counts["unlabeled"]["without_label"] == 2
    task.rows("test/snli")
    assert "without_label" not in task.counts.get("test/snli", {})


def test_other_content_is_another_revision(tmp_path: Path) -> None:
    first = fewshot("sst2", made(tmp_path)).revision
    assert fewshot("sst2", tmp_path).revision == first
    rows = [{**record("sst2", i), "more": "a field that no row keeps"} for i in range(120)]
    write(tmp_path / "classify/sst2/dev.jsonl", rows)
    assert fewshot("sst2", tmp_path).revision != first


# ------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize("dataset", ["mnli", "rte", "snli"])
def test_parquet_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str) -> None:
    import datasets

    asked = hub(monkeypatch, tmp_path)
    one = data.known("classify")[dataset]
    number = {name: int(label) for label, name in one.hub_labels.items()}
    rows = [record(dataset, i) for i in range(60)]
    if dataset == "snli":
        rows[7]["label"] = "-"
    columns = {
        theirs: [number[row[ours]] if ours == "label" else row[ours] for row in rows]
        for ours, theirs in one.hub_columns.items()
    }
    table = datasets.Dataset.from_dict({"idx": list(range(60)), **columns})
    for file in one.files.values():
        path = tmp_path / f"{one.hub}/snapshots/c0ffee/{file.hub_file}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(path))
    task = fewshot(dataset)
    assert task.pool() == [row for row in rows if row["label"] != "-"]
    assert len(task.rows(f"test/{dataset}")) == 59 + (dataset != "snli")
    origin = task.origins["train"]
    assert origin["hub"] == f"{one.hub}/{one.files['train'].hub_file}"
    assert (origin["commit"], len(origin["sha256"])) == ("c0ffee", 64)
    assert set(asked) == {(one.hub, file.hub_file) for file in one.files.values()}


@pytest.mark.parametrize("dataset", ["sst2", "trec"])
def test_jsonl_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str) -> None:
    asked = hub(monkeypatch, tmp_path / "hub")
    one = data.known("classify")[dataset]
    number = {name: label for label, name in one.hub_labels.items()}
    rows = [record(dataset, i) for i in range(60)]
    theirs = [
        {
            "text": f"{row['text']} ",
            "label": i,
            one.hub_columns["label"]: number.get(row["label"], row["label"]),
        }
        for i, row in enumerate(rows)
    ]
    for file in one.files.values():
        write(tmp_path / f"hub/{one.hub}/snapshots/c0ffee/{file.hub_file}", theirs)
    assert fewshot(dataset).pool() == rows
    assert len(asked) == 1
    root = made(tmp_path / "local", 90)
    assert len(fewshot(dataset, root).pool()) == 90, "the local folder comes before the hub"
    assert len(asked) == 1
    assert len(fewshot(dataset, root, source="hub").pool()) == 60


def test_a_damaged_parquet_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, tmp_path)
    write(tmp_path / "nyu-mll/glue/snapshots/c0ffee/rte/train-00000-of-00001.parquet", [1])
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet: cannot be read as Parquet: \w+$"):
        fewshot("rte").pool()


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("dataset", "more", "message"),
    [
        ("sts2", {}, "no data set 'sts2'. Did you mean 'sst2'. Known: mnli, mpqa, mr, rte, snli, sst2, trec"),
        ("dolly", {}, "task fewshot: no data set 'dolly'"),
        ("sst2", {"source": "locale"}, "no source 'locale'. Did you mean 'local'?"),
        ("sst2", {"source": "local"}, "data set 'sst2' needs a data folder: pass --data-root"),
        ("sst2", {"source": "local", "root": "here"}, "here lacks classify/sst2/train.jsonl"),
        ("mr", {}, "data set 'mr' needs a data folder: pass --data-root"),
        ("mr", {"root": "here"}, "here lacks classify/mr/train.jsonl.*its source is https://"),
        ("mpqa", {"source": "hub", "root": "here"}, "'mpqa' is not on the hub: use source = \"local\""),
        ("sst2", {"root": "nowhere"}, "nowhere: there is no such folder; pass --data-root"),
        ("trec", {"prompt_set": "pet-0"}, "PET has no pattern for 'trec'"),
    ],
)
def test_what_is_refused_at_once(tmp_path: Path, dataset: str, more: dict[str, Any], message: str) -> None:
    (tmp_path / "here").mkdir()
    root = tmp_path / more["root"] if "root" in more else None
    with pytest.raises(UserError, match=message):
        fewshot(dataset, root, **{name: value for name, value in more.items() if name != "root"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"label": "positive"}, "train.jsonl:2: lacks the field 'text'; it has: label"),
        (
            {"text_a": "x", "label": "positive"},
            "train.jsonl:2: lacks the field 'text_b'; it has: text_a, label",
        ),
        ({"text": "x"}, "train.jsonl:2: lacks the field 'label'; it has: text"),
        ({"text": 3, "label": "positive"}, "train.jsonl:2: 'text' must be text, is a number"),
        ({"text": "x", "label": 1}, "train.jsonl:2: 'label' must be text, is a number"),
        ({"text": " ", "label": "positive"}, "train.jsonl:2: 'text' is empty"),
        ([1], "train.jsonl:2: must be a JSON object, is a list"),
        ({"text": "x", "label": "postive"}, "train record 2: no class 'postive'. Did you mean 'positive'?"),
    ],
)
def test_malformed_records_are_refused(tmp_path: Path, line: Any, message: str) -> None:
    root = made(tmp_path)
    write(root / "classify/sst2/train.jsonl", [record("sst2", 0), line])
    with pytest.raises(UserError, match=message):
        fewshot("sst2", root).rows("train")


def test_empty_and_broken_files_are_refused(tmp_path: Path) -> None:
    root = made(tmp_path)
    path = root / "classify/sst2/train.jsonl"
    for content, message in (("\n", "is empty: it holds no record"), ("\n{", "train.jsonl:2: is not JSON")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            fewshot("sst2", root).rows("train")


# ------------------------------------------------------------------------------------------- real data


@pytest.fixture
def real(data_root: Path) -> Callable[..., FewShot]:
    return lambda dataset, **more: fewshot(dataset, data_root, k=more.pop("k", 16), **more)


def said(row: Row) -> tuple[str, ...]:
    """What a row says, without case and spaces."""
    return tuple("".join(row[name].lower().split()) for name in ("text", "text_a", "text_b") if name in row)


@pytest.mark.parametrize("dataset", SETS)
def test_real_draws(real: Callable[..., FewShot], dataset: str) -> None:
    """14.8 on the real sets: five draws of 16 a class."""
    sets = []
    for number in range(1, 6):
        task = real(dataset, draw=number)
        n = len(task.classes())
        train, dev = ({row["example_id"] for row in task.rows(split)} for split in ("train", "dev"))
        sources = [row["source"] for row in task.rows("unlabeled")]
        assert len(train) == len(dev) == 16 * n
        assert not train & dev
        assert not set(sources) & (train | dev)
        assert len(sources) == {2: 320, 3: 480, 6: 960}[n]
        labelled, selecting, more = (
            [said(row) for row in task.rows(split)] for split in ("train", "dev", "unlabeled")
        )
        assert len({*labelled, *selecting}) == 32 * n, "no text twice, and none in both"
        assert not {*labelled, *selecting} & set(more)
        for split in ("train", "dev"):
            assert set(Counter(row["class_label"] for row in task.rows(split)).values()) == {16}
        sets.append(frozenset(train))
    assert len(set(sets)) == 5
    again = real(dataset, draw=5)
    for split in ("train", "dev", "unlabeled"):
        assert json.dumps(again.rows(split)) == json.dumps(task.rows(split))


@pytest.mark.parametrize("dataset", SETS)
def test_real_sets_have_their_published_checksums(real: Callable[..., FewShot], dataset: str) -> None:
    task = real(dataset)
    files = data.known("classify")[dataset].files
    for split in task.splits():
        part = split.replace(f"test/{dataset}", "test") if split.startswith("test/") else "train"
        task.rows(split)
        assert task.origins[split]["sha256"] == files[part].sha256
        assert task.origins[split]["records"] == files[part].records
        if part != "train":
            assert len(task.rows(split)) == files[part].records
            assert {row["label"] for row in task.rows(split)} == set(task.classes())
    assert not any("without_label" in counts for counts in task.counts.values())


@pytest.mark.parametrize("dataset", SETS)
def test_lm_bffs_own_samples_have_the_same_form(
    real: Callable[..., FewShot], data_root: Path, dataset: str
) -> None:
    path = data_root / f"classify/{dataset}/kshot16.jsonl"
    theirs, _, dropped = data.read_labelled(path)
    marked = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    task = real(dataset)
    assert dropped == 0
    assert len(theirs) == len(marked)
    assert {row["label"] for row in theirs} == set(task.classes())
    assert all(row.keys() == task.pool()[0].keys() for row in theirs[:1])
    assert {row["seed"] for row in marked} == {13, 21, 42, 87, 100}
    sizes = Counter((row["seed"], row["split"], row["label"]) for row in marked)
    assert len(sizes) == 5 * 2 * len(task.classes())
    assert max(sizes.values()) == 16
    whole = [row for row in task.pool() if "text" in row or dataset == "rte"]
    if whole and dataset != "mpqa":  # where train is the whole set, its samples are rows of it, same labels
        known = {(row.get("text") or row["text_a"] + row["text_b"]).lower(): row["label"] for row in whole}
        told = [known.get((row.get("text") or row["text_a"] + row["text_b"]).lower()) for row in theirs]
        found = [(label, row["label"]) for label, row in zip(told, theirs, strict=True) if label is not None]
        assert len(found) > 0.9 * len(theirs)
        assert sum(a == b for a, b in found) > 0.99 * len(found)


def test_mpqa_repeats_texts(real: Callable[..., FewShot]) -> None:
    pool = real("mpqa").pool()
    assert len(pool) - len({said(row) for row in pool}) >= 1076


def test_real_shortfall_of_trecs_rare_class(real: Callable[..., FewShot]) -> None:
    task = real("trec", k=64)
    task.rows("train"), task.rows("dev")
    assert "train" not in task.counts or not task.counts["train"]
    assert task.counts["dev"] == {"short/abbreviation": 64 - 20}
    assert not any("short" in name for name in real("trec", k=42).counts.get("dev", {}))
    task = real("trec", k=128)
    assert Counter(row["label"] for row in task.rows("train"))["abbreviation"] == 83
    assert task.counts["train"] == {"short/abbreviation": 45}


def test_real_rte_at_512_draws_its_unlabelled_set_from_442_rows(real: Callable[..., FewShot]) -> None:
    task = real("rte", k=512)
    assert len(task.rows("unlabeled")) == 10 * 1024
    assert len({row["source"] for row in task.rows("unlabeled")}) <= 442


@pytest.fixture(scope="module")
def gpt2(data_root: Path) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE, which is RoBERTa's, with RoBERTa's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(data_root / "tokenizers/gpt2/tokenizer.json"), name_or_path="roberta-like",
        cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


@pytest.mark.parametrize("dataset", SETS)
def test_real_byte_level_encodings(
    real: Callable[..., FewShot], gpt2: PreTrainedTokenizerFast, dataset: str
) -> None:
    task = real(dataset, test_limit=200)
    encoder = task.encoder(gpt2)
    assert gpt2.convert_ids_to_tokens(encoder.verbalizer_ids) == [f"Ġ{word}" for word in task.words.values()]
    for split in ("train", f"test/{dataset}"):
        for item, row in zip(encoder.encode(task.rows(split)), task.rows(split), strict=True):
            assert (item.ids == gpt2.mask_token_id).sum() == 1
            assert item.ids[item.mask] == gpt2.mask_token_id
            assert len(item.ids) <= encoder.max_length
            if not item.truncated:
                filled = task.prompt.fill(row, "<mask>").replace(" <mask>", "<mask>")
                assert encoder.decode(item.ids.tolist()) == filled
    rows = task.rows("train", encoder)
    batch = task.collate(rows, {"student": encoder, "teacher": task.encoder(gpt2, "sequence")})
    assert batch["teacher.word_index"].max() < 400
    assert task.counts["train"]["truncated/student"] <= len(rows)
    for i, row in enumerate(rows):
        words = sum(len(row[name].split()) for name in ("text", "text_a", "text_b") if name in row)
        numbered = set(batch["teacher.word_index"][i, : batch["teacher.length"][i]].tolist()) - {-1}
        assert numbered == set(range(words)) or task.counts["train"]["truncated/teacher"]


@pytest.mark.parametrize("dataset", ["mnli", "snli", "rte", "sst2", "mr"])
def test_real_label_words_of_pets_patterns_are_single_tokens(
    real: Callable[..., FewShot], gpt2: PreTrainedTokenizerFast, dataset: str
) -> None:
    for number in range(4):
        task = real(dataset, prompt_set=f"pet-{number}")
        assert len(task.encoder(gpt2).verbalizer_ids) == len(prompt_of(dataset).words)
