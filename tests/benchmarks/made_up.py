"""Texts, vectors and a teacher like those of real.py, made up: nothing needs to be there, and a
source has any name.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from train.model import ModelRef

_NUM_TEXTS = 300
_WIDTH = 16
_NUM_TOPICS = 8  # that vectors gather around
_WORDS = sorted(set(re.findall("[a-z]+", __doc__)))
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sources() -> list[str]:
    return ["one", "two"]


def texts(source: str, side: str, limit: int | None = None) -> list[str]:
    """Distinct texts of 4 to 12 words."""
    generator = _generator(source, side)
    lengths = generator.integers(4, 12, limit or _NUM_TEXTS)
    return [
        f"{' '.join(generator.choice(_WORDS, length))} {number}"
        for number, length in enumerate(lengths)
    ]


def vectors(source: str, side: str, max_tokens: int, limit: int | None = None) -> np.ndarray:
    """Unit vectors, float32 [n, 16]."""
    generator = _generator(source, side)
    topics = generator.standard_normal((_NUM_TOPICS, _WIDTH), np.float32)
    found = np.resize(topics, (limit or _NUM_TEXTS, _WIDTH))
    found += generator.standard_normal(found.shape, np.float32) / 2
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@functools.cache
def teacher() -> ModelRef:
    """A plain encoder with random weights and its tokenizer; they are gone when the process
    ends.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from train.model import ModelRef

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    vocabulary = {name: number for number, name in enumerate([*_SPECIAL, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name[1:-1].lower()}_token": name for name in _SPECIAL}
    ).save_pretrained(folder)
    architecture = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(architecture).save_pretrained(folder)
    return ModelRef(name=folder)


def _generator(source: str, side: str) -> np.random.Generator:
    return np.random.default_rng(list(f"{source} {side}".encode()))
