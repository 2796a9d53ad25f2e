"""The student as a sentence-transformers folder that also loads with plain transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from clusterlib.artifacts.artifact import Spec
from clusterlib.artifacts.config import dump
from clusterlib.batches.plan import Plan
from train.model import Encoder, drop_pooler

EXPORT = "export"  # folder of the sentence-transformers model inside a `model` artifact


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
        drop_pooler(transformer.auto_model)  # which loading made up, from random numbers
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=model.pooling)
        student = SentenceTransformer(
            modules=[transformer, pooling, Normalize()],
            prompts=prompts,
            similarity_fn_name="cosine",
            device="cpu",
        )
        student.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(spec: Spec, plan: Plan, step: int) -> str:
    """The README.md of the model of `spec` after `step`."""
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "strata"],
    }
    recipe = yaml.safe_dump(dump(spec.config), sort_keys=False)
    strategies = ", then ".join(f"`{phase.settings.title}`" for phase in plan.phases)
    sources = ", ".join(made_from.label for made_from in spec.inputs.values())
    return (
        f"---\n{yaml.safe_dump(front)}---\n\n# Strata student {spec.fingerprint}\n\n"
        f"Trained by Strata on {plan.num_rows} pairs of "
        f"{sources}, with in-batch negatives "
        f"chosen by the strategy {strategies} (arXiv 2407.18887). These are its weights after step "
        f"{step:,}.\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("path/to/this/folder")\n'
        "similarity = model.similarity(model.encode_query([query]), "
        f"model.encode_document(passages))\n```\n\n## Recipe\n\n```yaml\n{recipe}```\n"
    )
