"""Runs an artifact of an encoder: texts or token ids in, vectors out; needs no torch.

In: an artifact's folder; texts, which its files say how to prepare (``retrieval.py``), or rows of token ids. Out: numpy
arrays, in the order of the texts whatever the batches. A text's vectors do not depend on what it is batched with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfm2_export import paths, retrieval
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.arguments import check_rows
from lfm2_export.backends.base import RunnerOptions, TokenRows
from lfm2_export.backends.encoder import EncoderRunner
from lfm2_export.choices import BackendName, SchemeName
from lfm2_export.errors import ArtifactError, ContextLimitError, RunnerError
from lfm2_export.heads import ATTENDED, EXPANSION, PADDING, SENTENCE, TOKENS
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.manifest import ENCODER
from lfm2_export.messages import listed, shown
from lfm2_export.packages import explained
from lfm2_export.retrieval import TextSettings
from lfm2_export.text import Tokenizer

DEFAULT_BATCH_SIZE = 32
QUERY, DOCUMENT = "query", "document"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """One text as a program takes it: ``ids`` and ``mask`` int64 [T]; ``kept`` bool [T]: whose vectors are returned."""

    ids: np.ndarray
    mask: np.ndarray
    kept: np.ndarray


@explained
def load_encoder(
    path: str | Path | Artifact,
    *,
    backend: BackendName | None = None,
    scheme: SchemeName | None = None,
    threads: int | None = None,
) -> Encoder:
    """An encoder on one program of the artifact at ``path``, a folder or a Hub id (``organization/name[@revision]``);
    files are checked against the manifest first.

    Raises:
        ArtifactError: no artifact there, no such program in it, it is a decoder's, or a file is missing or was changed.
        RunnerError: the runtime cannot load the program.
    """
    if not isinstance(path, str | os.PathLike | Artifact):
        raise ArtifactError(f"{shown(path)}: is not the name of a folder; give the one that `lfm2-export export` wrote")
    artifact = path if isinstance(path, Artifact) else open_artifact(path, backend=backend, scheme=scheme)
    program = artifact.program(backend, scheme)
    if program.kind != ENCODER:
        raise ArtifactError(
            f"{paths.shown(artifact.path)}: {program} is a {program.kind}, which gives no embeddings; use "
            "`lfm2-export run` or lfm2_export.load_runner"
        )
    artifact.verify(program)
    options = RunnerOptions(threads=threads)
    runner = get_backend(program.backend).load_encoder(artifact.path, artifact.present(program), options)
    return Encoder(runner, artifact.path)


class Encoder:
    """Turns texts into vectors.

    Args:
        runner: of the program.
        folder: the artifact's, for tokenizer and settings; both are read when they are first needed.
    """

    def __init__(self, runner: EncoderRunner, folder: Path):
        self.runner, self.folder = runner, folder
        self._preparation: Preparation | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What ``run`` returns: last_hidden_state and, by the head, sentence_embedding, token_embeddings or logits."""
        return tuple(self.runner.widths)

    @property
    def is_late_interaction(self) -> bool:
        """Whether a text has a vector a token, to be compared by ``max_sim``."""
        return TOKENS in self.outputs

    @property
    def preparation(self) -> Preparation:
        """How texts become tokens.

        Raises:
            ArtifactError: the tokenizer or a settings file is missing or damaged.
        """
        if self._preparation is None:
            found = retrieval.read(self.folder, ArtifactError)
            settings = TextSettings(prompts={}) if found is None else found.text
            self._preparation = Preparation(
                Tokenizer.from_dir(self.folder),
                settings,
                inserts_prefixes=self.is_late_interaction,
                context_length=self.runner.context_length,
            )
        return self._preparation

    def encode(
        self, texts: str | Sequence[str], *, query: bool = False, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> np.ndarray | list[np.ndarray]:
        """The vectors of texts, each of length 1.

        Args:
            texts: one text or several; longer ones than the model takes are cut.
            query: whether they are what is searched for, not what is searched in: the two have other prompts.
            batch_size: rows that are computed at once.

        Returns:
            float32 [texts, hidden_size]; of a late interaction model one [tokens, width] for each text, of a document
            without the tokens of its skiplist.

        Raises:
            RunnerError: the encoder has no such head, or the texts are no texts.
            GenerationError: a text cannot be encoded by the tokenizer.
            ArtifactError: the tokenizer or a settings file is missing or damaged.
        """
        name = self._vectors()
        rows = [self.preparation.tokens(text, query=query) for text in _as_texts(texts)]
        found = self._in_batches(rows, (name,), batch_size)
        if name == SENTENCE:
            vectors = np.zeros((len(found), self.runner.widths[name]), np.float32)
            for vector, one in zip(vectors, found, strict=True):
                vector[:] = one[name]
            return vectors
        return [one[name][row.kept] for one, row in zip(found, rows, strict=True)]

    def run(self, input_ids: TokenRows, *, batch_size: int = DEFAULT_BATCH_SIZE) -> list[dict[str, np.ndarray]]:
        """Every output of rows of token ids, which may differ in length, without padding: last_hidden_state [T,
        hidden_size], sentence_embedding [hidden_size], token_embeddings [T, width], logits [T, vocabulary].

        Raises:
            RunnerError: no rows of ids of the vocabulary.
            ContextLimitError: a row is longer than the model takes.
        """
        rows = [_attended(ids) for ids in check_rows(input_ids, None, self.runner.vocab_size)]
        for index, row in enumerate(rows):
            if len(row.ids) > self.runner.context_length:
                raise ContextLimitError(
                    f"row {index}: has {len(row.ids)} tokens, the model takes {self.runner.context_length}; cut it"
                )
        return self._in_batches(rows, self.outputs, batch_size)

    def _vectors(self) -> str:
        for name in (SENTENCE, TOKENS):
            if name in self.outputs:
                return name
        raise RunnerError(
            f"{paths.shown(self.folder)}: this encoder has no head for embeddings, it gives {listed(self.outputs)}; "
            "use lfm2_export.load_encoder(...).run, or export a retriever"
        )

    def _in_batches(self, rows: Sequence[Tokens], names: Sequence[str], size: int) -> list[dict[str, np.ndarray]]:
        """The outputs of each row, computed with others of about its length."""
        if type(size) is not int or size < 1:
            raise RunnerError(f"batch_size={shown(size)}: pass a positive integer")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        found: list[dict[str, np.ndarray]] = [{} for _ in rows]
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            outputs = self.runner.run(*_padded([rows[index] for index in chosen]))
            for place, index in enumerate(chosen):
                found[index] = {name: _own(name, outputs[name][place], len(rows[index].ids)) for name in names}
        return found


def _own(name: str, values: np.ndarray, tokens: int) -> np.ndarray:
    """A row's part of an output, without padding; a copy, which does not keep the batch in memory."""
    return values.copy() if name == SENTENCE else values[:tokens].copy()


def _attended(ids: np.ndarray) -> Tokens:
    return Tokens(ids=ids, mask=np.full(len(ids), ATTENDED), kept=np.ones(len(ids), np.bool_))


def _padded(rows: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one length, padded on the right; padding is the token 0, which every vocabulary has."""
    longest = max(len(row.ids) for row in rows)
    ids, mask = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), PADDING, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)], mask[index, : len(row.ids)] = row.ids, row.mask
    return ids, mask


def _as_texts(texts: object) -> Iterator[str]:
    found = [texts] if isinstance(texts, str) else texts
    if not isinstance(found, Sequence) or isinstance(found, bytes):
        raise RunnerError(f"texts: {shown(texts, 40)} is no text and no list of texts; pass one of the two")
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise RunnerError(f"texts[{index}]: {shown(text, 40)} is no text")
        yield text


class Preparation:
    """How a retriever's texts become tokens.

    Args:
        inserts_prefixes: ColBERT's way: a token behind the first one, queries filled up; else a prompt before the text.
        context_length: the most tokens that the program takes.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TextSettings, *, inserts_prefixes: bool, context_length: int):
        self.tokenizer, self.settings = tokenizer, settings
        self._inserts, self._context = inserts_prefixes, context_length
        self._skipped = [token for word in settings.skiplist_words if (token := tokenizer.token_id(word)) is not None]

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return min(self.settings.max_tokens or self._context, self._context)

    def tokens(self, text: str, *, query: bool) -> Tokens:
        """A text's tokens."""
        if self._inserts:
            return self._query(text) if query else self._document(text)
        # sentence-transformers' encode_query and encode_document do not fall back to the default prompt either.
        prompt = self.settings.prompts.get(QUERY if query else DOCUMENT) or ""
        ids = self.cut(prompt + text, self.longest)
        return _attended(np.asarray(ids, np.int64))

    def _query(self, text: str) -> Tokens:
        settings = self.settings
        ids = self._with_prefix(text, settings.query_prefix, settings.query_length)
        filled = settings.query_length - len(ids) if settings.expands_queries else 0
        if len(ids) + filled > self._context:  # before they are made: a file could ask for billions
            raise ContextLimitError(
                f"{retrieval.SETTINGS}: query_length={settings.query_length}: the model takes {self._context} tokens; "
                "lower it"
            )
        expansion = ATTENDED if settings.attends_to_expansion else EXPANSION
        return Tokens(
            ids=np.asarray([*ids, *[self._expansion_token()] * filled], np.int64),
            mask=np.asarray([ATTENDED] * len(ids) + [expansion] * filled, np.int64),
            kept=np.ones(len(ids) + filled, np.bool_),
        )

    def _document(self, text: str) -> Tokens:
        ids = np.asarray(
            self._with_prefix(text, self.settings.document_prefix, self.settings.document_length), np.int64
        )
        return Tokens(ids=ids, mask=np.full(len(ids), ATTENDED), kept=~np.isin(ids, self._skipped))

    def _with_prefix(self, text: str, prefix: str, length: int) -> list[int]:
        """At most ``length`` tokens, the second of them the prefix."""
        if not prefix:
            return self.cut(text, length)
        token = self.tokenizer.token_id(prefix)
        if token is None:
            raise ArtifactError(
                f"tokenizer.json: has no token {shown(prefix)}, which {retrieval.SETTINGS} names; bring back the files"
            )
        ids = self.cut(text, length - 1)
        return [*ids[:1], token, *ids[1:]]

    def _expansion_token(self) -> int:
        """PyLate's choice: the mask token, else the one that ends a text, else padding."""
        for role in ("mask_token", "eos_token", "pad_token"):
            token = self.tokenizer.token_id(self.tokenizer.special_tokens.get(role, ""))
            if token is not None:
                return token
        raise ArtifactError("tokenizer_config.json: names no mask, eos or pad token to fill queries up with; add one")

    def cut(self, text: str, length: int) -> list[int]:
        """At most ``length`` tokens: special ones around a text stay, its end is lost."""
        length = min(length, self._context)
        ids = self.tokenizer.encode(text)
        if not ids:
            raise RunnerError("texts: a text has no token, and the tokenizer puts none in front; leave it out")
        if len(ids) <= length:
            return ids
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        room = max(0, length - (len(ids) - len(bare)))
        front = next((at for at in range(len(ids) - len(bare) + 1) if ids[at : at + len(bare)] == bare), 0)
        return [*ids[:front], *bare[:room], *ids[front + len(bare) :]][:length]


def max_sim(query: np.ndarray, document: np.ndarray) -> float:
    """How well a document answers a query, from their tokens' vectors: the sum over the query's tokens of the best
    match among the document's (ColBERT).

    Args:
        query: float [tokens, width].
        document: the same; without a token it matches nothing, 0.
    """
    return float((query @ document.T).max(axis=1).sum()) if len(document) else 0.0


def similarities(
    queries: Sequence[np.ndarray] | np.ndarray, documents: Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """float32 [queries, documents]: cosines of vectors [texts, width], or ``max_sim`` of lists of tokens' vectors."""
    if isinstance(queries, np.ndarray) and isinstance(documents, np.ndarray):
        cosines: np.ndarray = queries @ documents.T
        return cosines
    rows: list[list[float]] = [[max_sim(query, document) for document in documents] for query in queries]
    return np.asarray(rows, np.float32).reshape(len(queries), len(documents))
