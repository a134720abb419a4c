"""Ids are unique, hang on vectors and seed alone, say what the vectors say, and stay when the catalogue changes."""

import json
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from hub.codes.quality import measure
from hub.codes.table import CODEBOOKS_FILE, CODES_FILE, RECORD, with_digits
from hub.semantic_ids import Codebooks, SemanticIds, SemanticIdsArguments, main, make_ids
from tests.support.catalogue import write_shards
from training.tables.commands.handler import OptionError


WIDTH, COUNT = 16, 3000
SIZES = {"levels": 3, "codes": 32}


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Unit vectors around 50 centres, a hundred of them twice."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(50, WIDTH))
    points = centres[draw.integers(50, size=COUNT)] + 0.4 * draw.normal(size=(COUNT, WIDTH))
    points[:100] = points[100:200]
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def shards(points, tmp_path_factory) -> Path:
    return write_shards(points, tmp_path_factory.mktemp("points") / "shards", 700)


@pytest.fixture(scope="module")
def made(shards, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "codes"
    make_ids(SemanticIdsArguments(str(shards), str(output), **SIZES))
    return output


def vectors_of(ids: SemanticIds, points: np.ndarray) -> np.ndarray:
    """The vectors of items `n0`, `n1`, ... in the order of the ids."""
    return points[[int(item_id[1:]) for item_id in ids.item_ids.to_pylist()]]


def test_an_id_is_the_nearest_centroid_of_what_is_left_level_by_level(made, points):
    ids = SemanticIds.load(made)
    for vector, codes in zip(vectors_of(ids, points)[:50], ids.codes, strict=False):
        left = vector.astype(np.float64)
        for level in range(3):
            distances = np.linalg.norm(left - ids.codebooks.centroids[level].astype(np.float64), axis=1)
            assert codes[level] == distances.argmin()
            left = left - ids.codebooks.centroids[level, codes[level]]


def test_no_two_items_have_one_id_and_last_digits_count_from_0(made):
    ids = SemanticIds.load(made)
    assert ids.codes.shape == (COUNT, 4) and len(np.unique(ids.codes, axis=0)) == COUNT
    prefixes, sizes = np.unique(ids.codes[:, :3], axis=0, return_counts=True)
    assert sizes.max() > 1
    for prefix in prefixes[sizes > 1]:
        digits = ids.codes[(ids.codes[:, :3] == prefix).all(axis=1), 3]
        assert digits.tolist() == list(range(len(digits)))
    record = json.loads((made / RECORD).read_text())
    assert record["last_digits"] == sizes.max() and record["items"] == COUNT


@pytest.mark.parametrize("training_items", [500, 10_000])
def test_the_order_of_rows_and_shards_changes_nothing(points, shards, tmp_path, training_items):
    order = np.random.default_rng(1).permutation(COUNT)
    shuffled = write_shards(points[order], tmp_path / "shuffled", 1234, item_ids=[f"n{row}" for row in order])
    for name, source in {"a": shards, "b": shuffled}.items():
        options = SIZES | {"training_items": training_items}
        make_ids(SemanticIdsArguments(str(source), str(tmp_path / name), **options))
    for name in (CODES_FILE, CODEBOOKS_FILE, RECORD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    make_ids(SemanticIdsArguments(str(shards), str(tmp_path / "c"), **SIZES, seed=1))
    assert (tmp_path / "a" / CODES_FILE).read_bytes() != (tmp_path / "c" / CODES_FILE).read_bytes()


def test_codes_of_a_vector_hang_on_no_other(made, points):
    books = Codebooks.load(made / CODEBOOKS_FILE)
    together = books.encode(points)
    assert np.array_equal(
        together, np.concatenate([books.encode(point[None]) for point in points[:500]] + [together[500:]])
    )
    assert np.array_equal(together[:100], together[100:200])


def test_the_figures_are_those_of_plain_formulas(made, points):
    ids = SemanticIds.load(made)
    levels = ids.settings["quality"]["levels"]
    vectors, codes = vectors_of(ids, points), ids.codes[:, :3]
    spread = ((vectors - vectors.mean(0)) ** 2).sum()
    for level, told in enumerate(levels, 1):
        decoded = sum(ids.codebooks.centroids[one, codes[:, one]] for one in range(level))
        assert told["error"] == pytest.approx(((vectors - decoded) ** 2).sum() / spread, rel=1e-4)
        sizes = Counter(map(tuple, codes[:, :level].tolist()))
        assert told["alone"] == sum(size == 1 for size in sizes.values()) / COUNT
        assert told["used"] == len(set(codes[:, level - 1].tolist())) / 32 and 0 < told["evenness"] <= 1
    errors, recalls = ([told[name] for told in levels] for name in ("error", "recall"))
    assert errors == sorted(errors, reverse=True) and recalls == sorted(recalls)
    assert errors[-1] < 0.2 and recalls[-1] > 0.2  # by chance 10 of 3,000

    pool = points[200:1100]  # none twice, and all are queries
    near, found = (nearest(one) for one in (pool, ids.codebooks.decode(ids.codebooks.encode(pool))))
    shared = np.mean([len(set(exact) & set(ours)) / 10 for exact, ours in zip(near, found, strict=True)])
    told = measure(ids.codebooks, codes, pool)
    assert told["queries_of_recall"] == 900 and told["levels"][-1]["recall"] == pytest.approx(shared, abs=0.01)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """Rows of the ten nearest others of each."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


def test_new_items_get_ids_without_training_and_known_ones_keep_theirs(made, points, tmp_path, monkeypatch):
    before = SemanticIds.load(made)
    known = dict(zip(before.item_ids.to_pylist(), before.codes.tolist(), strict=True))
    kept = [row for row in range(COUNT) if row % 7]  # a seventh is gone
    item_ids = [f"n{row}" for row in kept] + [f"a{row}" for row in kept[:300]]  # new ones, of known items' vectors
    vectors = np.concatenate([points[kept], points[kept[:300]]])
    vectors[5] = points[2999]  # a changed one
    shards = write_shards(vectors, tmp_path / "shards", item_ids=item_ids)
    monkeypatch.setattr(faiss, "Kmeans", None)
    main(["--embeddings", str(shards), "--output", str(tmp_path / "codes"), "--earlier", str(made)])
    after = SemanticIds.load(tmp_path / "codes")
    now = dict(zip(after.item_ids.to_pylist(), map(tuple, after.codes.tolist()), strict=True))
    changed = [item_id for item_id in now if item_id in known and list(now[item_id]) != known[item_id]]
    assert changed == [f"n{kept[5]}"] and now[f"n{kept[5]}"][:3] == tuple(known["n2999"][:3])
    assert len(set(now.values())) == len(now) == len(item_ids)
    assert not {now[item_id] for item_id in now if item_id not in known} & set(map(tuple, known.values()))
    for row in kept[10:300]:
        assert list(now[f"a{row}"][:3]) == known[f"n{row}"][:3]
    assert (tmp_path / "codes" / CODEBOOKS_FILE).read_bytes() == (made / CODEBOOKS_FILE).read_bytes()


def test_digits_of_many_items_with_one_code():
    codes = np.zeros((70_000, 2), np.int32)
    digits = with_digits(pa.array([f"{row:05d}" for row in range(70_000)]), codes)
    assert np.array_equal(digits[:, 2], np.arange(70_000))


def test_vectors_that_are_all_alike_have_ids(tmp_path):
    shards = write_shards(np.tile(np.eye(1, 8, dtype=np.float32), (40, 1)), tmp_path / "shards")
    main(["--embeddings", str(shards), "--output", str(tmp_path / "codes"), "--codes", "4"])
    ids = SemanticIds.load(tmp_path / "codes")
    assert len(np.unique(ids.codes, axis=0)) == 40 and np.isfinite(ids.codebooks.centroids).all()
    assert ids.settings["quality"]["levels"][-1]["error"] == 0


def test_what_does_not_belong_together_is_refused(made, points, tmp_path, capsys):
    few = write_shards(points[:31], tmp_path / "few")
    with pytest.raises(ValueError, match="32 codes need at least as many items and there are 31"):
        make_ids(SemanticIdsArguments(str(few), str(tmp_path / "codes"), **SIZES))
    assert not (tmp_path / "codes").exists()
    narrow = write_shards(points[:, :8], tmp_path / "narrow")
    with pytest.raises(ValueError, match="of 16 dimensions, these are embeddings of 8"):
        make_ids(SemanticIdsArguments(str(narrow), str(tmp_path / "codes"), earlier=str(made)))
    other = write_shards(points, tmp_path / "other", model_files={"model.safetensors": "0" * 64})
    with pytest.raises(ValueError, match=r"another model \(model.safetensors differs\)"):
        make_ids(SemanticIdsArguments(str(other), str(tmp_path / "codes"), earlier=str(made)))
    with pytest.raises(OptionError, match="one folder"):
        SemanticIdsArguments(str(few), str(made), earlier=str(made))
    with pytest.raises(ValueError, match="pass a folder that hub/semantic_ids.py wrote"):
        SemanticIds.load(few)
    with pytest.raises(ValueError, match="Pass codebooks"):
        Codebooks.load(made / CODES_FILE)
    make_ids(SemanticIdsArguments(str(other), str(tmp_path / "codes"), **SIZES))
    stored = tmp_path / "codes" / CODEBOOKS_FILE
    stored.write_bytes(stored.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=f"{CODEBOOKS_FILE}.*write it again"):
        SemanticIds.load(tmp_path / "codes")
