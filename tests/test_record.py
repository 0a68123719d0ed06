"""Records load strictly, save atomically and never fail with anything but RecordError."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import add_scores, make_record, make_run

from kdbench.record import (
    Analysis,
    Phase,
    RecordError,
    RunFolder,
    Score,
    atomic,
    load,
    load_arrays,
    save,
    save_arrays,
    validate,
    write_json,
)


def test_save_and_load_agree(tmp_path: Path) -> None:
    score = Score(41.5, "x 100", 300, "higher", "mean", {"values": "v"}, {"k": 1}, {"why": "x"})
    record = make_record(
        scores={"a/b": score, "a/undefined": Score(None, "%", 3)},
        analyses={"a": {"version": 2}},
        axes={"draw": 3},
        notes=["law broken"],
        phases={"update": Phase(1.5, 1, 2, 3)},
    )
    save(record, tmp_path / "record.json")
    assert load(tmp_path / "record.json") == record


def test_a_diverged_run_is_a_record_and_needs_a_reason(tmp_path: Path) -> None:
    save(make_record(status="diverged", reason="loss is NaN at step 3"), tmp_path / "r.json")
    assert load(tmp_path / "r.json").status == "diverged"
    with pytest.raises(RecordError, match="'reason' is empty"):
        save(make_record(status="failed"), tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "'schema' is 2, this kdbench reads 1"),
        ({"schema": None}, "'schema' should be a whole number"),
        ({"seed": "1"}, "'seed' should be a whole number, is a text"),
        ({"seed": True}, "'seed' should be a whole number, is a boolean"),
        ({"sed": 1}, "'sed' is not a field of schema 1 (nearest: 'seed')"),
        ({"status": "finished"}, "'status' should be one of done, diverged, failed"),
        ({"run_id": "../x"}, "'run_id' may hold letters"),
        ({"distiller": "kd"}, "distiller should be an object, is a text"),
        ({"models": {"student": {"name": "x"}}}, "'models/student/revision' is missing"),
        ({"phases": {"update": {"seconds": "8"}}}, "'phases/update/seconds' should be a number"),
        ({"phases": {"update": {"seconds": 8, "peak": 1}}}, "'phases/update/peak' is not a field"),
        ({"budget": {"tokens_seen": None}}, "'budget/tokens_seen' should be a number, is null"),
        ({"scores": {"a/b": {"value": 1, "unit": ""}}}, "'scores/a/b/n' is missing"),
        ({"scores": {"a/b": {"value": "1", "unit": "", "n": 1}}}, "'scores/a/b/value' should be a number"),
        ({"scores": {"a/b": {"value": 1, "unit": "", "n": 1, "direction": "up"}}}, "higher, lower or none"),
        ({"scores": {"a/b": {"value": 1, "unit": "", "n": 1, "arrays": {"x": 1}}}}, "map names to names"),
        ({"scores": []}, "'scores' should be an object, is a list"),
        ({"analyses": {"a": {}}}, "'analyses/a/version'"),
        ({"notes": [1]}, "'notes' should be a list of texts"),
        ({"reason": 3}, "'reason' should be a text"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "bad.json"
    write_json(path, {**asdict(make_record()), **change})
    with pytest.raises(RecordError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "null", "{}", '{"schema": 1}', "\x00", "[" * 100_000, '{"schema": NaN}'],
)
def test_no_file_content_escapes_as_another_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="bad.json"):
        load(path)


def test_every_missing_field_is_named(tmp_path: Path) -> None:
    whole = asdict(make_record())
    optional = {"axes", "curve", "scores", "analyses", "reason", "notes", "arrays_sha256"}
    for key in whole:
        part = {name: value for name, value in whole.items() if name != key}
        if key in optional:
            validate(part)
        else:
            with pytest.raises(RecordError, match=f"'{key}' is missing"):
                validate(part)
    with pytest.raises(RecordError, match="nowhere.json: cannot be read"):
        load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="binary.json"):
        load(tmp_path / "binary.json")


def test_nan_in_a_record_is_refused_both_ways(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="should be finite"):
        save(make_record(scores={"a/b": Score(float("nan"), "", 1)}), tmp_path / "r.json")
    with pytest.raises(RecordError, match="cannot be written as JSON"):
        save(make_record(config={"lr": float("inf")}), tmp_path / "r.json")
    text = json.dumps(asdict(make_record(budget={"tokens_seen": float("nan")})))
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecordError, match="should be finite"):
        load(tmp_path / "r.json")


def test_a_torn_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save(make_record(), path)
    before = path.read_bytes()

    def torn() -> None:
        with atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torn()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


def test_values_by_name_and_by_path() -> None:
    record = make_record(scores={"a/b": Score(2.5, "", 1), "a/none": Score(None, "", 1)})
    assert record.value("a/b") == 2.5
    assert record.value("a/none") is None
    assert record.value("a/c") is None
    assert record.value("record.budget/optimizer_steps") == 40
    assert record.value("record.phases/update/seconds") == 8
    assert record.value("record.seed") == 1
    for name in ("record.phases/rollout/seconds", "record.row", "record.budget", "record.environment/dirty"):
        assert record.value(name) is None


def test_arrays_round_trip_and_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    arrays = {
        "a/x": np.arange(6.0).reshape(2, 3),
        "a/name": np.array(["é", "b"]),
        "b": np.zeros((0, 2), np.int32),
    }
    digest = save_arrays(path, arrays)
    back = load_arrays(path, digest)
    assert sorted(back) == sorted(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == value.dtype
    with pytest.raises(RecordError, match="other SHA-256"):
        load_arrays(path, "0" * 64)
    with pytest.raises(RecordError, match="Python objects"):
        save_arrays(path, {"x": np.array([{}], dtype=object)})
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    content = path.read_bytes()
    (tmp_path / "torn.npz").write_bytes(content[: len(content) // 2])
    altered = bytearray(content)
    altered[len(altered) // 3] ^= 255
    (tmp_path / "altered.npz").write_bytes(bytes(altered))
    for name in ("pickled.npz", "torn.npz", "altered.npz", "missing.npz"):
        with pytest.raises(RecordError, match=name):
            load_arrays(tmp_path / name)


def test_add_replaces_its_own_scores_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"x": np.array([1.0, 2.0]), "y": np.array([3.0, 5.0])})
    add_scores(run, {"z": np.array([7.0])}, "other")
    record = run.record
    assert sorted(record.scores) == ["other/z", "quality/x", "quality/y"]
    assert record.scores["quality/x"].arrays == {"values": "quality/x", "prompt": "quality/prompt"}
    assert record.analyses["other"]["version"] == 1
    add_scores(run, {"x": np.array([9.0])})
    assert sorted(run.record.scores) == ["other/z", "quality/x"]
    assert sorted(run.arrays()) == ["other/prompt", "other/z", "quality/prompt", "quality/x"]
    np.testing.assert_array_equal(run.arrays()["quality/x"], [9.0])


def test_killed_between_arrays_and_record_is_said_and_mended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"x": np.array([1.0, 2.0])})
    save_arrays(run.path / "scores.npz", {"quality/x": np.array([5.0])})
    with pytest.raises(RecordError, match="other SHA-256"):
        run.arrays()
    add_scores(run, {"x": np.array([1.0, 2.0])})
    np.testing.assert_array_equal(run.arrays()["quality/x"], [1.0, 2.0])


def test_run_folder_reads_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert run.arrays() == {}
    run.add("empty", 1, Analysis({"n": Score(1, "", 1)}))
    assert run.arrays() == {}
    write_json(run.path / "config.json", {"a": 1})
    (run.path / "steps.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n')
    (run.path / "outputs").mkdir()
    for name in ("vicuna", "dolly"):
        (run.path / "outputs" / f"{name}.jsonl").write_text('{"response": "a\u2028b"}\n')
    (run.path / "evidence").mkdir()
    for name in ("final", "snapshot-40", "snapshot-5", "snapshot-x"):
        (run.path / "evidence" / f"{name}.parquet").touch()
    assert run.config == {"a": 1}
    assert [row["step"] for row in run.steps()] == [1, 2]
    assert run.output_sets() == ["dolly", "vicuna"]
    assert run.outputs("dolly") == [{"response": "a\u2028b"}]
    assert [step for step, _ in run.snapshots()] == [5, 40]
    (run.path / "steps.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(RecordError, match="steps.jsonl, line 2: is not JSON"):
        run.steps()
    (run.path / "config.json").write_text("[]")
    with pytest.raises(RecordError, match="config.json: should be an object"):
        _ = run.config
    (run.path / "steps.jsonl").write_text("3\n")
    with pytest.raises(RecordError, match="line 1: is not a JSON object"):
        RunFolder(run.path).steps()


def test_an_analysis_that_cannot_be_stored_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"x": np.arange(4.0)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    arrays = {"prompt": np.arange(4), "v": np.arange(3.0)}
    inputs = {"values": "v", "prompt": "prompt"}
    for bad, said in (
        (Analysis({"a": Score(float("nan"), "", 4)}, {"v": np.arange(4.0)}), "should be finite"),
        (Analysis({"a": Score(1.0, "", 4, "higher", "mean", inputs)}, arrays), "differ in prompts"),
        (Analysis({"a": Score(1.0, "", 4, "higher", "mean", {"values": "w"})}, arrays), "reads 'w'"),
    ):
        with pytest.raises(RecordError, match=said):
            run.add("mine", 1, bad)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
