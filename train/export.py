"""The student as a sentence-transformers folder that also loads with plain transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from train.model import Encoder, drop_pooler


def export(
    model: Encoder,
    tokenizer: Any,
    folder: Path,
    prompts: dict[str, str],
    max_tokens: int,
    card: str,
) -> None:
    """Write weights (safetensors, float32), tokenizer, pooling, normalisation, prompts and model
    card.

    The student stays as and where it is, so it can go on learning.

    Args:
        prompts: "query" and "document" -> text put before each.
        max_tokens: longer inputs are cut.
        card: the README.md.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as scratch:
        model.backbone.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        transformer = Transformer(scratch, max_seq_length=max_tokens)
        drop_pooler(transformer.auto_model)  # loading made one up again, from random numbers
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=model.pooling)
        student = SentenceTransformer(
            modules=[transformer, pooling, Normalize()],
            prompts=prompts,
            similarity_fn_name="cosine",
            device="cpu",
        )
        student.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
