"""``load_encoder``: texts to vectors as sentence-transformers and PyLate prepare them, whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.encoders import similarities
from lfm2_export.errors import ArtifactError, ContextLimitError, Lfm2ExportError, RunnerError
from lfm2_export.text import Tokenizer
from tests import encoder_reference as reference
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, DOCUMENT, EMBEDDING, MASKED_LM, QUERY, WIDTH

TEXTS = ["What is a dictionary?", "A list holds items, in order. " * 20, "x", "", "naïve café ✓"]
Encoders = Callable[..., Exported]


def changed(made: Exported, folder: Path, name: str, **values: object) -> lfm2_export.Encoder:
    """The artifact with other values in one of its JSON files."""
    shutil.copytree(made.artifact, folder)
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **values}))
    return lfm2_export.load_encoder(folder)


@pytest.mark.parametrize("query", [True, False])
def test_an_embedding_is_that_of_prompt_and_text(encoder: Encoders, query: bool) -> None:
    made = encoder(EMBEDDING)
    found = lfm2_export.load_encoder(made.artifact).encode(TEXTS, query=query, batch_size=2)
    tokenizer = Tokenizer.from_dir(made.checkpoint)
    prompt = "query: " if query else "document: "
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == ((len(TEXTS), 64), np.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        expected = reference.outputs(made.checkpoint, tokenizer.encode(prompt + text))["sentence_embedding"]
        assert np.abs(vector - expected).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6


def test_texts_do_not_depend_on_their_batch(encoder: Encoders) -> None:
    one = lfm2_export.load_encoder(encoder(EMBEDDING).artifact)
    together = one.encode(TEXTS, batch_size=len(TEXTS))
    for size in (1, 3):
        assert np.abs(one.encode(TEXTS, batch_size=size) - together).max() < 1e-6
    assert np.array_equal(one.encode(TEXTS[0]), one.encode(TEXTS[:1]))
    assert np.abs(one.encode(TEXTS[::-1])[::-1] - together).max() < 1e-6
    assert one.encode([]).shape == (0, 64)


def test_a_long_text_is_cut_to_the_length_of_its_files(encoder: Encoders, tmp_path: Path) -> None:
    made = encoder(EMBEDDING)
    one = changed(made, tmp_path / "a", "sentence_bert_config.json", max_seq_length=7)
    ids = Tokenizer.from_dir(made.checkpoint).encode(f"document: {TEXTS[1]}")[:7]
    expected = reference.outputs(made.checkpoint, ids)["sentence_embedding"]
    assert np.abs(one.encode(TEXTS[1]) - expected).max() < 1e-5


def test_special_tokens_around_a_text_are_not_cut(encoder: Encoders, tmp_path: Path) -> None:
    """With a tokenizer that ends texts, too."""
    made = encoder(EMBEDDING)
    post = json.loads((made.checkpoint / "tokenizer.json").read_text())["post_processor"]
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    post["single"].append(end)
    post["special_tokens"]["<|im_end|>"] = {"id": "<|im_end|>", "ids": [7], "tokens": ["<|im_end|>"]}
    one = changed(made, tmp_path / "a", "tokenizer.json", post_processor=post)
    ids = one.preparation.cut(TEXTS[1], 9)
    assert (len(ids), ids[0], ids[-1]) == (9, 1, 7)
    assert ids[1:-1] == Tokenizer.from_dir(made.checkpoint).encode(TEXTS[1])[1:8]


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [({"query": "q: "}, None, ""), ({"other": "o: "}, "other", ""), ({"document": None}, None, ""), ({}, None, "")],
)
def test_prompts_that_are_missing(encoder: Encoders, tmp_path: Path, prompts, default, expected: str) -> None:
    made = encoder(EMBEDDING)
    name = "config_sentence_transformers.json"
    one = changed(made, tmp_path / "a", name, prompts=prompts, default_prompt_name=default)
    ids = Tokenizer.from_dir(made.checkpoint).encode(expected + TEXTS[0])
    assert one.preparation.tokens(TEXTS[0], query=False).ids.tolist() == ids


def test_colbert_documents(encoder: Encoders) -> None:
    """The prefix behind the first token, cut to 64, without the vectors of the skiplist."""
    made = encoder(COLBERT)
    found = lfm2_export.load_encoder(made.artifact).encode(TEXTS)
    tokenizer = Tokenizer.from_dir(made.checkpoint)
    skipped = {tokenizer.token_id(one) for one in ".,!"}
    assert isinstance(found, list)
    lengths = []
    for text, vectors in zip(TEXTS, found, strict=True):
        bos, *rest = tokenizer.encode(text)[:63]
        ids = [bos, tokenizer.token_id(DOCUMENT), *rest]
        expected = reference.outputs(made.checkpoint, ids)["token_embeddings"]
        kept = [token not in skipped for token in ids]
        assert np.abs(vectors - expected[kept]).max() < 1e-5
        lengths.append((len(ids), sum(kept)))
    print(lengths)
    assert lengths[1][0] == 64
    assert lengths[1][1] < 64


def test_colbert_queries_are_filled_up(encoder: Encoders, tmp_path: Path) -> None:
    """To 12 tokens with the token that ends a text, which convolutions see and queries do not."""
    made = encoder(COLBERT)
    one = lfm2_export.load_encoder(made.artifact)
    tokenizer = Tokenizer.from_dir(made.checkpoint)
    for text, vectors in zip(TEXTS, one.encode(TEXTS, query=True), strict=True):
        bos, *rest = tokenizer.encode(text)[:11]
        ids = [bos, tokenizer.token_id(QUERY), *rest]
        attended = [True] * len(ids) + [False] * (12 - len(ids))
        ids += [tokenizer.token_id(tokenizer.special_tokens["eos_token"])] * (12 - len(ids))
        expected = reference.outputs(made.checkpoint, ids, attended)["token_embeddings"]
        assert vectors.shape == (12, WIDTH)
        assert np.abs(vectors - expected).max() < 1e-5
    settings = "config_sentence_transformers.json"
    attending = changed(made, tmp_path / "a", settings, attend_to_expansion_tokens=True).encode("x", query=True)
    bare = changed(made, tmp_path / "b", settings, do_query_expansion=False).encode("x", query=True)
    assert np.abs(attending[0] - one.encode("x", query=True)[0]).max() > 1e-3
    assert len(bare[0]) == 3


def test_a_query_is_filled_up_no_further_than_a_program_can_tell(encoder: Encoders, tmp_path: Path) -> None:
    name = "config_sentence_transformers.json"
    one = changed(encoder(COLBERT), tmp_path / "a", name, query_length=2_000_000_000)
    with pytest.raises(ContextLimitError, match="query_length=2000000000: the model takes 1024 tokens; lower it"):
        one.encode("x", query=True)


def test_max_sim_takes_the_best_match_of_each_query_token() -> None:
    query = np.array([[1.0, 0.0], [0.0, 1.0]])
    document = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    assert lfm2_export.max_sim(query, document) == pytest.approx(1.8)
    assert lfm2_export.max_sim(query, document[:0]) == 0
    assert similarities([query], [document, document[2:]]).tolist() == [[pytest.approx(1.8), -1]]
    assert similarities(query, document)[0].tolist() == [0.6, 1.0, 0.0]


def test_the_example_finds_the_document_itself(
    encoder: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights know no meaning, but a text is nearest to itself."""
    from examples import colbert_search

    documents = ["A dictionary maps keys.", "Lists hold items in order", "Nothing of that kind at all"]
    (tmp_path / "documents.txt").write_text("\n".join(documents))
    words = ["colbert_search.py", str(encoder(COLBERT).artifact), str(tmp_path / "documents.txt"), "--best", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--query", documents[1]])
    colbert_search.main()
    lines = capsys.readouterr().out.splitlines()
    print(lines)
    assert len(lines) == 2
    assert lines[0].endswith(documents[1])
    assert float(lines[0].split()[0]) > float(lines[1].split()[0])


def test_rows_of_ids_give_every_output_without_padding(encoder: Encoders) -> None:
    made = encoder(MASKED_LM)
    rows = [[5, 6, 7], [9], list(range(3, 40))]
    for row, found in zip(rows, lfm2_export.load_encoder(made.artifact).run(rows), strict=True):
        expected = reference.outputs(made.checkpoint, row)
        assert {name: value.shape for name, value in found.items()} == {k: v.shape for k, v in expected.items()}
        assert np.abs(found["logits"] - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        ([[1], []], RunnerError, "row 1 is empty"),
        ([[99999]], RunnerError, "99999"),
        ([1, 2], RunnerError, "one flat list"),
        ([[3] * 1025], ContextLimitError, "row 0: has 1025 tokens, the model takes 1024; cut it"),
    ],
)
def test_rows_that_are_refused(encoder: Encoders, rows, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        lfm2_export.load_encoder(encoder(EMBEDDING).artifact).run(rows)


@pytest.mark.parametrize(
    ("texts", "options", "text"),
    [
        (3, {}, "texts: 3 is no text and no list of texts"),
        (["a", None], {}, r"texts\[1\]: None is no text"),
        (["a\ud800"], {}, "is not Unicode text"),
        (["a"], {"batch_size": 0}, "batch_size=0: pass a positive integer"),
    ],
)
def test_texts_that_are_refused(encoder: Encoders, texts, options, text: str) -> None:
    with pytest.raises(Lfm2ExportError, match=text):
        lfm2_export.load_encoder(encoder(EMBEDDING).artifact).encode(texts, **options)


def test_what_has_no_vectors_says_what_it_has(encoder: Encoders) -> None:
    one = lfm2_export.load_encoder(encoder(MASKED_LM).artifact)
    with pytest.raises(RunnerError, match="has no head for embeddings, it gives last_hidden_state, logits; use"):
        one.encode("a")


def test_a_decoder_is_no_encoder_and_the_other_way_round(encoder: Encoders, artifact) -> None:
    with pytest.raises(ArtifactError, match="is a decoder, which gives no embeddings; use `lfm2-export run`"):
        lfm2_export.load_encoder(artifact("tiny-dense"))
    with pytest.raises(ArtifactError, match="is an encoder, which generates no text; use `lfm2-export embed`"):
        lfm2_export.load_runner(encoder(EMBEDDING).artifact)
    with pytest.raises(ArtifactError, match="is an encoder, which generates no text"):
        lfm2_export.ExportedModelForCausalLM.from_pretrained(encoder(EMBEDDING).artifact)
    with pytest.raises(ArtifactError, match="is not the name of a folder"):
        lfm2_export.load_encoder(3)  # type: ignore[arg-type]


def test_a_prefix_without_a_token_is_named(encoder: Encoders, tmp_path: Path) -> None:
    one = changed(encoder(COLBERT), tmp_path / "a", "config_sentence_transformers.json", query_prefix="[nobody] ")
    with pytest.raises(
        ArtifactError, match=r"has no token '\[nobody\] ', which config_sentence_transformers.json names"
    ):
        one.encode("a", query=True)


def test_needs_no_torch(encoder: Encoders) -> None:
    """Neither torch nor transformers is imported by an embedding."""
    import subprocess
    import sys

    script = (
        "import sys, lfm2_export\n"
        f"lfm2_export.load_encoder({str(encoder(EMBEDDING).artifact)!r}).encode('a')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
