"""Opens an artifact of a retriever in sentence-transformers, on the artifact's own runner.

In: an artifact's folder. Out: a ``SentenceTransformer`` whose only module is ``ExportedTransformer``, with the prompts,
the length and the similarity that the checkpoint's files say; encode, encode_query, similarity and all that takes such
a model then work as ever. Needs no weights in the folder but the program's, and none of optimum, through which
sentence-transformers runs ONNX files itself.

Why not ``SentenceTransformer(folder)``: it takes modules from other packages with trust_remote_code=True alone, which
would also run what a downloaded folder brings. The artifact's modules.json is the checkpoint's, for optimum's users.

Written for sentence-transformers 6.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from lfm2_export import files, paths, retrieval
from lfm2_export.choices import BackendName, SchemeName
from lfm2_export.encoders import Encoder, load_encoder
from lfm2_export.errors import ArtifactError
from lfm2_export.heads import ATTENDED, HIDDEN, PADDING, SENTENCE

if TYPE_CHECKING:
    from lfm2_export.artifact import Artifact


def load(
    path: str | Path | Artifact,
    *,
    backend: BackendName | None = None,
    scheme: SchemeName | None = None,
    threads: int | None = None,
) -> SentenceTransformer:
    """A model on one program of the artifact at ``path``; arguments as ``load_encoder``'s.

    Raises:
        ArtifactError: as ``load_encoder``, or it has no pooled vectors, as ColBERT and encoders for masked text.
    """
    encoder = load_encoder(path, backend=backend, scheme=scheme, threads=threads)
    if SENTENCE not in encoder.outputs:
        raise ArtifactError(
            f"{paths.shown(encoder.folder)}: has no vector for a whole text; use lfm2_export.load_encoder"
        )
    text = encoder.preparation.settings
    similarity = _similarity(encoder.folder)
    return SentenceTransformer(
        modules=[ExportedTransformer(encoder)],
        device="cpu",
        prompts=dict(text.prompts),
        default_prompt_name=text.default_prompt,
        similarity_fn_name=similarity,
    )


def _similarity(folder: Path) -> Any:
    """The function's name; cosine where the files say none."""
    if not paths.exists(folder / retrieval.SETTINGS, ArtifactError):
        return "cosine"
    settings = files.read_json_object(folder / retrieval.SETTINGS, folder, ArtifactError, limit=retrieval.JSON_LIMIT)
    return settings.get("similarity_fn_name") or "cosine"


class ExportedTransformer(nn.Module):
    """Texts to ``sentence_embedding`` (of length 1) and ``token_embeddings``, by an exported encoder.

    The module of sentence-transformers' ``Transformer``, without weights: it can neither be trained nor saved.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.max_seq_length = encoder.preparation.longest

    @property
    def tokenizer(self) -> Any:
        """That of ``lfm2_export.Tokenizer``."""
        return self.encoder.preparation.tokenizer

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: object) -> dict[str, Tensor]:
        """Texts as rows of one length, padded on the right."""
        rows = [self.encoder.preparation.cut(f"{prompt or ''}{text}", self.max_seq_length) for text in inputs]
        longest = max(map(len, rows), default=0)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.full((len(rows), longest), PADDING)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), ATTENDED
        return {"input_ids": ids, "attention_mask": mask}

    def tokenize(self, texts: list[str], **_: object) -> dict[str, Tensor]:
        """As ``preprocess``; the older name."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        """Adds the outputs to the features."""
        ids, mask = (features[name].cpu().numpy().astype(np.int64) for name in ("input_ids", "attention_mask"))
        found = self.encoder.runner.run(ids, mask)
        features["token_embeddings"] = torch.from_numpy(found[HIDDEN])
        features["sentence_embedding"] = torch.from_numpy(found[SENTENCE])
        return features

    def get_embedding_dimension(self) -> int:
        """Numbers of a text's vector."""
        return self.encoder.runner.widths[SENTENCE]

    get_sentence_embedding_dimension = get_embedding_dimension

    def save(self, output_path: str, *_: object, **__: object) -> None:
        """Refused: what is there to be saved is the artifact."""
        raise ArtifactError(
            f"{output_path}: an exported encoder is saved by copying {paths.shown(self.encoder.folder)}"
        )
