from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.core.errors import DataError
from autocompress.evaluate import Corpus, CorpusKind, data, load_corpus
from autocompress.evaluate.passages import inverse_cloze, passages

ROWS = [
    {"text": "The first text.", "label": 0},
    {"text": "A second, with a comma.", "label": 1},
    {"text": "Grüße an alle\nin two lines.", "label": 1},
]
TEXTS = tuple(row["text"] for row in ROWS)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_directory(path: Path, rows: list[dict[str, object]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_directory,
}


@pytest.fixture(params=sorted(WRITERS))
def write(request, tmp_path):
    return lambda rows: str(WRITERS[request.param](tmp_path / request.param, rows))


def test_rows_of_every_format_give_the_same_texts(write):
    assert load_corpus(write(ROWS)).texts == TEXTS


def test_rows_of_every_format_give_the_same_labels(write):
    corpus = load_corpus(write(ROWS), kind=CorpusKind.LABELLED_TEXT)
    assert corpus.texts == TEXTS
    assert [int(label) for label in corpus.labels] == [0, 1, 1]


def test_rows_of_every_format_give_pairs(write):
    path = write([{"source": "a b", "target": "c"}, {"source": "d", "target": "e f"}])
    corpus = load_corpus(path, kind=CorpusKind.TEXT_PAIRS)
    assert corpus.pairs == (("a b", "c"), ("d", "e f"))


def test_queries_and_positives_are_read_in_order(tmp_path):
    rows = [{"positive": "Paris is in France.", "query": "Where is Paris?"}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    corpus = load_corpus(str(path), kind=CorpusKind.PASSAGES)
    assert corpus.pairs == (("Where is Paris?", "Paris is in France."),)


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"book{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + b"Ein Anfang.\n\nUnd ein Ende.")
    assert load_corpus(str(path)).texts == ("Ein Anfang.\n\nUnd ein Ende.",)


def test_python_docs_repeat_no_paragraph():
    corpus = load_corpus("python-docs")
    paragraphs = [" ".join(p.split()) for text in corpus.texts for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(map(len, corpus.texts)) > 250_000
    assert load_corpus("python-docs").digest == corpus.digest


def test_python_docs_as_passages_are_questions_with_their_passage():
    corpus = load_corpus("python-docs", kind=CorpusKind.PASSAGES)
    assert len(corpus.pairs) > 200
    assert not corpus.texts
    query, passage = corpus.pairs[0]
    assert len(query.split()) >= 5
    assert query not in passage


def test_passages_cover_all_words_once_and_drop_underlines():
    text = "Title\n*****\n\n" + "\n\n".join(f"Paragraph {i} has some words." for i in range(30))
    found = passages(text, 100)
    assert " ".join(found).split() == text.replace("*****", "").split()
    assert all(len(passage) >= 90 for passage in found[:-1])


def test_the_first_sentence_asks_for_the_rest():
    rest = "It has more words in it than the smallest number that makes a passage of text."
    assert inverse_cloze(f"This is the first sentence. {rest}") == (
        "This is the first sentence.",
        rest,
    )
    assert inverse_cloze(f"Too short. {rest}") is None
    assert inverse_cloze("only one sentence without an end to it") is None


def test_images_come_from_arrays_beside_the_file(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 6, 3), 255, dtype=np.uint8))
    rows = [{"image": "a.npy", "label": "cat"}, {"image": [[0, 51], [102, 255]], "label": "dog"}]
    path = write_jsonl(tmp_path / "images.jsonl", rows)
    corpus = load_corpus(str(path), kind=CorpusKind.LABELLED_IMAGES)
    assert corpus.labels == ("cat", "dog")
    assert corpus.images[0].shape == (3, 4, 6)
    assert torch.allclose(corpus.images[1], torch.tensor([[[0.0, 0.2], [0.4, 1.0]]]))


def test_class_names_of_a_data_set_become_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(tmp_path / "d")
    corpus = load_corpus(str(tmp_path / "d"), kind="labelled text")
    assert corpus.labels == ("no", "yes", "yes")


def test_of_several_splits_the_validation_split_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {n: datasets.Dataset.from_dict({"text": [n]}) for n in ("train", "test", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert load_corpus(str(tmp_path / "d")).texts == ("validation",)


def test_a_very_large_corpus_is_cut_at_random_not_at_its_start(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MAX_CHARACTERS", 400)
    rows = [{"text": "x" * 10, "label": int(i >= 100)} for i in range(200)]
    path = write_jsonl(tmp_path / "sorted.jsonl", rows)
    corpus = load_corpus(str(path), kind=CorpusKind.LABELLED_TEXT)
    assert len(corpus) == 40
    assert 8 <= sum(corpus.labels) <= 32
    assert list(corpus.labels) == sorted(corpus.labels)


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("empty.txt", b"", "text", "empty \\(0 bytes\\)"),
        ("empty.jsonl", b"", "text", "empty \\(0 bytes\\)"),
        ("empty.parquet", b"", "text", "empty \\(0 bytes\\)"),
        ("blank.txt", b" \n\n ", "text", "is empty"),
        ("blank.jsonl", b"\n\n", "text", "no rows"),
        ("header.csv", b"text,label\n", "text", "no rows"),
        ("latin.txt", "Grüße".encode("latin1"), "text", "UTF-8.*0xfc at offset 2.*iconv"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "text", "line 2 .* is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "text", "line 1 .* is a list"),
        ("columns.jsonl", b'{"texts": "a"}\n', "text", "column 'text'.*Did you mean 'texts'"),
        ("gap.jsonl", b'{"text": "a"}\n{"label": 1}\n', "text", "row 2 .* has none"),
        ("number.jsonl", b'{"text": 5}\n', "text", "row 1 .* holds a int"),
        ("nolabel.csv", b"text,lable\na,0\n", "labelled text", "'label'.*Did you mean 'lable'"),
        ("float.jsonl", b'{"text": "a", "label": 0.5}\n', "labelled text", "holds 0.5"),
        ("ragged.csv", b"text,label\na,0\nb\n", "text", "row 2 .* has not"),
        ("quote.csv", b'text\n"a\n', "text", "not a CSV file"),
        ("bad.parquet", b"PAR1nonsense", "text", "not a readable Parquet file"),
        ("half.jsonl", b'{"source": "a"}\n', "source and target texts", "column 'target'"),
        ("photo.jsonl", b'{"image": "no.png", "label": 1}\n', "labelled images", "does not exist"),
        ("flat.jsonl", b'{"image": [1, 2], "label": 1}\n', "labelled images", "shape \\(2,\\)"),
        ("plain.txt", b"Some text.", "labelled text", "labelled text.*plain text.*columns"),
        ("plain.txt", b"Some text.", "labelled images", "'digits'"),
        ("data.xlsx", b"PK", "text", "ends in .txt"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, content, kind, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_corpus(str(tmp_path / name), kind=kind)


def test_a_missing_file_names_its_nearest_siblings(tmp_path):
    (tmp_path / "reviews.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'reviews.jsonl'"):
        load_corpus(str(tmp_path / "review.jsonl"))
    with pytest.raises(DataError, match="nor does its folder"):
        load_corpus(str(tmp_path / "nowhere" / "review.jsonl"))


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"save_to_disk.*it holds a.txt"):
        load_corpus(str(tmp_path))


def test_a_damaged_data_directory_is_refused(tmp_path):
    write_directory(tmp_path / "d", ROWS)
    (tmp_path / "d" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        load_corpus(str(tmp_path / "d"))


def test_an_unknown_name_without_a_network_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'python-dos' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"OfflineModeIsEnabled.*Did you mean 'python-docs'"):
        load_corpus("python-dos")


def test_a_hub_name_carries_configuration_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name, *, split, download_config):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_corpus("me/mine:small:train").texts == TEXTS
    load_corpus("me/mine")
    assert asked == [("me/mine", "small", "train"), ("me/mine", None, None)]


def test_images_cannot_serve_a_text_task():
    with pytest.raises(DataError, match="'digits' holds images"):
        load_corpus("digits", kind=CorpusKind.TEXT)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"texts": ("a",), "pairs": (("a", "b"),)},
        {"texts": ("a", "b"), "labels": (1,)},
    ],
)
def test_a_corpus_holds_one_kind_of_rows_and_a_label_for_each(parts):
    with pytest.raises(DataError):
        Corpus("x", **parts)
