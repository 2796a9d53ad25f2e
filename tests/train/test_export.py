import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from clusterlib.clusters.shards import Shards
from train.data import load_tokenizer
from train.export import export
from train.model import POOLINGS, StudentConfig, TokenizerRef, build_student

PROMPTS = {"query": "query: ", "document": "passage: "}
TEXTS = ["rose tulip soil", "the piston and the valve", "wave " * 40]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_exported_model_gives_the_trainers_vectors(
    tmp_path, tokenizer_folder, architecture, pooling
):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    student = build_student(
        StudentConfig(architecture=architecture, pooling=pooling), tokenizer, 24, seed=0
    ).eval()
    encoded = tokenizer(
        [PROMPTS["query"] + text for text in TEXTS],
        truncation=True,
        max_length=24,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = student(encoded["input_ids"], encoded["attention_mask"]).numpy()

    export(student, tokenizer, tmp_path / "model", PROMPTS, 24, "# card\n")
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert {"modules.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert set(stored) == set(student.backbone.state_dict())  # no weight that was not trained
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"

    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(TEXTS), expected, atol=1e-5)
    assert loaded.prompts == PROMPTS and loaded.max_seq_length == 24

    plain = AutoModel.from_pretrained(tmp_path / "model").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(
        [PROMPTS["query"] + TEXTS[0]], return_tensors="pt"
    )
    with torch.no_grad():
        states = plain(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    pooled = states[:, 0] if pooling == "cls" else states.mean(dim=1)
    np.testing.assert_allclose(F.normalize(pooled, dim=-1).numpy(), expected[:1], atol=1e-5)


def test_a_decoder_whose_tokenizer_has_no_padding_is_exported_as_it_was_trained(
    make_shards, tmp_path, tokenizer_folder
):
    from sentence_transformers import SentenceTransformer

    file = str(tokenizer_folder / "tokenizer.json")
    bare = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="[SEP]", padding_side="left")
    bare.save_pretrained(tmp_path / "bare")
    artifact, _ = make_shards(tmp_path / "root", tokenizer=tmp_path / "bare")
    tokenizer = load_tokenizer(Shards([artifact]))
    decoder = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "eos_token_id": 3,
        "bos_token_id": 2,
    }
    student = build_student(StudentConfig(architecture=decoder), tokenizer, 24, seed=0).eval()
    tokens = [
        tokenizer(PROMPTS["query"] + text, truncation=True, max_length=24)["input_ids"]
        for text in TEXTS
    ]
    with torch.no_grad():
        alone = [
            student(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            for ids in tokens
        ]
    expected = torch.cat(alone).numpy()

    export(student, tokenizer, tmp_path / "model", PROMPTS, 24, "# card\n")
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(TEXTS), expected, atol=1e-5)
