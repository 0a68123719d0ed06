"""Evidence: what may be written, what comes back, and that damage is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import make_manifest, response_rows, write_rows

from kdbench.evidence import COLUMNS, prompts_hash, read_evidence, write_evidence
from kdbench.record import RecordError


def some_rows() -> list[dict[str, Any]]:
    """Prompts 7 and 3: under the student one response ends after 2 tokens, one is cut after 3."""
    return [
        *response_rows("student", 7, 0, [0.5, 0.25], finished=True, token=[11, 0]),
        *response_rows("student", 3, 0, [1.0, 2.0, 4.0, 8.0], finished=False, token=[21, 22, 23]),
        *response_rows("teacher", 7, 0, [0.125], finished=True, token=[0]),
        *response_rows("teacher", 3, 0, [3.0, 5.0], finished=True, token=[31, 0]),
    ]


def test_matrix_is_in_order_of_prompts_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = some_rows()
    np.random.default_rng(0).shuffle(rows)
    write_rows(tmp_path / "final.parquet", rows)
    evidence = read_evidence(tmp_path / "final.parquet")
    values, alive, examples = evidence.matrix("student", "forward_kl")
    np.testing.assert_array_equal(values, [[1, 2, 4], [0.5, 0.25, 0]])
    np.testing.assert_array_equal(alive, [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(examples, [3, 7])
    np.testing.assert_array_equal(evidence.matrix("student", "token")[0], [[21, 22, 23], [11, 0, 0]])
    np.testing.assert_array_equal(evidence.matrix("teacher", "forward_kl")[0], [[3, 5], [0.125, 0]])
    assert evidence.roll_ins == ["student", "teacher"]
    assert evidence.manifest == make_manifest()
    finished, examples = evidence.finished("student")
    np.testing.assert_array_equal(finished, [False, True])
    np.testing.assert_array_equal(examples, [3, 7])


def test_after_holds_the_distributions_after_each_token_that_is_not_the_end(tmp_path: Path) -> None:
    write_rows(tmp_path / "final.parquet", some_rows())
    evidence = read_evidence(tmp_path / "final.parquet")
    values, alive, examples = evidence.after("student", "forward_kl")
    np.testing.assert_array_equal(values, [[2, 4, 8], [0.25, 0, 0]])
    np.testing.assert_array_equal(alive, [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(examples, [3, 7])
    values, alive, _ = evidence.after("teacher", "forward_kl")
    np.testing.assert_array_equal(values, [[5], [0]])
    np.testing.assert_array_equal(alive, [[1], [0]])


def test_context_rows_change_neither_matrix_nor_after(tmp_path: Path) -> None:
    write_rows(tmp_path / "plain.parquet", some_rows())
    context = [
        {
            **some_rows()[0],
            "roll_in": "student",
            "example_id": 3,
            "position": at,
            "alive": False,
            "context": True,
        }
        for at in (-2, -1)
    ]
    write_rows(tmp_path / "context.parquet", [*some_rows(), *context])
    one, two = read_evidence(tmp_path / "plain.parquet"), read_evidence(tmp_path / "context.parquet")
    assert two.columns["context"].sum() == 2
    for name in ("matrix", "after"):
        for a, b in zip(
            getattr(one, name)("student", "jsd"), getattr(two, name)("student", "jsd"), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_several_draws_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = [
        *response_rows("student", 5, 1, [1.0], finished=True),
        *response_rows("student", 5, 0, [2.0, 3.0], finished=True),
    ]
    write_rows(tmp_path / "e.parquet", rows)
    values, _, examples = read_evidence(tmp_path / "e.parquet").matrix("student", "forward_kl")
    np.testing.assert_array_equal(values, [[2, 3], [1, 0]])
    np.testing.assert_array_equal(examples, [5, 5])
    with pytest.raises(RecordError, match="no teacher roll-in"):
        read_evidence(tmp_path / "e.parquet").matrix("teacher", "forward_kl")


def bad(index: int, **changes: Any) -> list[dict[str, Any]]:
    rows = some_rows()
    rows[index] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        (some_rows() + some_rows()[:1], "a row occurs twice"),
        (some_rows()[1:], "does not begin with a live row at position 0"),
        (some_rows()[:3] + some_rows()[4:], "a position is missing"),
        (bad(1, alive=False), "a token other than -1"),
        (
            bad(2, forward_kl=float("nan")),
            "forward_kl is negative or not finite (roll_in student, example_id 3",
        ),
        (bad(2, jsd=-0.1), "jsd is negative"),
        (bad(2, student_log_prob=0.5), "student_log_prob is no log-probability"),
        (bad(2, teacher_log_prob=float("-inf")), "teacher_log_prob is no log-probability"),
        (bad(3, alive=False, token=-1), "follows the end of its response"),
        (bad(0, context=True), "a context row is alive"),
        (bad(0, position=-1), "negative position"),
        (bad(0, roll_in="human"), "roll_in should be one of"),
        (some_rows() + response_rows("student", 3, 1, [1.0], finished=True), "prompts differ in draws"),
    ],
)
def test_rows_that_break_the_contract_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(RecordError) as caught:
        write_rows(tmp_path / "final.parquet", rows)
    assert said in str(caught.value)
    assert "final.parquet" in str(caught.value)
    assert not (tmp_path / "final.parquet").exists()


def test_missing_and_uneven_columns_are_refused(tmp_path: Path) -> None:
    rows = some_rows()
    columns = {name: [row[name] for row in rows] for name in ["roll_in", *COLUMNS]}
    with pytest.raises(RecordError, match="columns missing: \\['jsd'\\]"):
        write_evidence(
            tmp_path / "e.parquet", {k: v for k, v in columns.items() if k != "jsd"}, make_manifest()
        )
    with pytest.raises(RecordError, match="columns differ in length"):
        write_evidence(tmp_path / "e.parquet", {**columns, "jsd": [0.0]}, make_manifest())


def test_rounding_below_zero_becomes_zero(tmp_path: Path) -> None:
    write_rows(tmp_path / "e.parquet", bad(0, forward_kl=-1e-6, student_log_prob=1e-6))
    columns = read_evidence(tmp_path / "e.parquet").columns
    assert columns["forward_kl"].min() == 0
    assert np.nanmax(columns["student_log_prob"]) == 0


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    path, manifest = tmp_path / "final.parquet", tmp_path / "final.json"
    write_rows(path, some_rows())
    content, said = path.read_bytes(), manifest.read_text()
    for damaged in (content[:-7], content[: len(content) // 2], b"", content[:60] + b"?" + content[61:]):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match="final.parquet: was cut or altered"):
            read_evidence(path)
    path.write_bytes(content)
    read_evidence(path)
    manifest.write_text(said[: len(said) // 2])
    with pytest.raises(RecordError, match="final.json: is not JSON"):
        read_evidence(path)
    manifest.write_text(json.dumps({**json.loads(said), "schema": 9}))
    with pytest.raises(RecordError, match="not an evidence manifest of schema 1"):
        read_evidence(path)
    part = {key: value for key, value in json.loads(said).items() if key != "decoding"}
    manifest.write_text(json.dumps(part))
    with pytest.raises(RecordError, match="lacks decoding"):
        read_evidence(path)
    manifest.unlink()
    with pytest.raises(RecordError, match="final.json: cannot be read"):
        read_evidence(path)
    manifest.write_text(said)
    path.unlink()
    with pytest.raises(RecordError, match="final.parquet: cannot be read"):
        read_evidence(path)


def test_another_table_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kdbench.record import sha256

    path = tmp_path / "final.parquet"
    write_rows(path, some_rows())
    said = json.loads((tmp_path / "final.json").read_text())
    pq.write_table(pa.table({"x": [1]}), path)
    (tmp_path / "final.json").write_text(json.dumps({**said, "sha256": sha256(path)}))
    with pytest.raises(RecordError, match="cannot be read as evidence"):
        read_evidence(path)


def test_the_prompt_hash_does_not_depend_on_order() -> None:
    one = prompts_hash([(1, [5, 6]), (2, [7])])
    assert one == prompts_hash([(2, (7,)), (1, range(5, 7))])
    assert one != prompts_hash([(1, [5, 6]), (2, [8])])
