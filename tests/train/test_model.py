import hashlib
import shutil

import pytest
import torch

from clusterlib.config import fingerprint
from clusterlib.errors import StrataError
from train.model import Encoder, ModelRef, StudentConfig, TokenizerRef, build_student, student_architecture


def test_equal_weights_are_the_same_model_wherever_they_lie(encoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "copy")
    digest = hashlib.sha256((encoder_folder / "model.safetensors").read_bytes()).hexdigest()
    refs = [
        ModelRef(name=str(encoder_folder)),
        ModelRef(name=str(tmp_path / "copy")),
        ModelRef(name="some/hub-name", sha256=digest),
    ]
    assert len({fingerprint(ref) for ref in refs}) == 1
    assert fingerprint(ModelRef(name="some/hub-name", revision="abc")) != fingerprint(ModelRef(name="some/hub-name"))


def test_a_folder_without_weights_is_refused(tokenizer_folder):
    with pytest.raises(StrataError, match=r"no \*\.safetensors in it"):
        ModelRef(name=str(tokenizer_folder)).folder()


def test_pickled_weights_are_no_weights(encoder_folder, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(encoder_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(StrataError, match="not a complete model folder"):
        ModelRef(name=str(folder)).folder()


def test_a_wrong_digest_is_refused(encoder_folder):
    with pytest.raises(StrataError, match="has SHA-256 .*, not 000"):
        ModelRef(name=str(encoder_folder), sha256="0" * 64).folder()


@pytest.mark.parametrize("name", ["/absent/folder", "./absent", "package:no_such_package/model"])
def test_absent_models_are_named(name):
    with pytest.raises(StrataError, match=name.replace("package:", "")):
        ModelRef(name=name).folder()


def test_a_hub_model_that_cannot_be_fetched_is_one_message():
    with pytest.raises(StrataError, match="nobody/nothing: neither a local folder nor a model that could be fetched"):
        ModelRef(name="nobody/nothing").folder()


def test_a_student_has_exactly_one_origin(architecture):
    for settings in ({}, {"architecture": architecture, "model": {"name": "x"}}):
        with pytest.raises(ValueError, match="exactly one of model and architecture"):
            StudentConfig(**settings)


def test_students_that_do_not_fit_the_shards_are_refused(tokenizer_folder, architecture, encoder_folder, tmp_path):
    from transformers import AutoConfig, AutoModel

    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    for changes, message in (
        ({"vocab_size": 10}, "knows 10 tokens and the tokenizer of the shards"),
        ({"max_position_embeddings": 16}, "takes at most 16 tokens and the shards hold up to 64"),
        ({"model_type": "no-such-type"}, "train.student"),
        (
            {"model_type": "t5"},
            "t5 is an encoder with a decoder; take an encoder or a decoder alone, such as bert or qwen3",
        ),
        ({"model_type": "bart"}, "bart is an encoder with a decoder"),
    ):
        with pytest.raises(StrataError, match=message):
            student_architecture(StudentConfig(architecture={**architecture, **changes}), tokenizer, 64)
    images = AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModel.from_config(images).save_pretrained(tmp_path)
    with pytest.raises(StrataError, match="vit takes no tokens"):
        student_architecture(StudentConfig(model=ModelRef(name=str(tmp_path))), tokenizer, 64)
    loaded = student_architecture(StudentConfig(model=ModelRef(name=str(encoder_folder))), tokenizer, 64)
    assert loaded.hidden_size == 32


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "opt"])
@pytest.mark.parametrize("num_tokens", [38, 39, 40, 41])
def test_a_student_takes_as_many_tokens_as_it_has_positions(tokenizer_folder, architecture, model_type, num_tokens):
    """RoBERTa and its like number tokens from padding_idx + 1, and so have that many positions fewer."""
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    names = {"distilbert": {"n_layers": 1, "n_heads": 2, "dim": 32}, "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32}}
    changes = {"model_type": model_type, "max_position_embeddings": 40, "pad_token_id": 1, **names.get(model_type, {})}
    config = StudentConfig(architecture={**architecture, **changes})
    try:
        student_architecture(config, tokenizer, num_tokens)
        refused = False
    except StrataError as error:
        refused = "tokens and the shards hold up to" in str(error)
    model = build_student(config, tokenizer, 8, seed=0).eval()
    ids = torch.full((1, num_tokens), 50)
    try:
        model(ids, torch.ones_like(ids))
        fails = False
    except (IndexError, RuntimeError):
        fails = True
    assert (
        refused
        == fails
        == (num_tokens > (38 if model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 40))
    )


def test_a_student_may_have_no_limit_of_positions(tokenizer_folder):
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    settings = {"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    assert student_architecture(StudentConfig(architecture=settings), tokenizer, 5000).d_model == 32


def test_random_weights_depend_on_the_seed_alone(tokenizer_folder, architecture):
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    config = StudentConfig(architecture=architecture)
    torch.manual_seed(123)
    first = build_student(config, tokenizer, 64, seed=7)
    torch.manual_seed(321)
    second, third = build_student(config, tokenizer, 64, seed=7), build_student(config, tokenizer, 64, seed=8)
    states = [torch.cat([weight.ravel() for weight in model.parameters()]) for model in (first, second, third)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("origin", ["loaded", "random"])
def test_a_student_is_in_training_mode_and_checkpoints_when_asked(
    tokenizer_folder, architecture, encoder_folder, origin
):
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    origins = {"loaded": {"model": ModelRef(name=str(encoder_folder))}, "random": {"architecture": architecture}}
    for checkpointing in (False, True):
        student = build_student(StudentConfig(**origins[origin]), tokenizer, 64, 0, checkpointing)
        assert all(module.training for module in student.modules())
        assert student.backbone.is_gradient_checkpointing == checkpointing
    assert student.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_and_norm_follow_their_definition(encoder_folder, pooling):
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(encoder_folder).eval()
    ids = torch.tensor([[2, 50, 51, 3, 0, 0], [2, 60, 3, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        found = Encoder(backbone, pooling)(ids, mask)
    for row, length in enumerate((4, 3)):
        pooled = states[row, 0] if pooling == "cls" else states[row, :length].mean(dim=0)
        torch.testing.assert_close(found[row], pooled / pooled.norm(), rtol=1e-5, atol=1e-6)


def test_every_weight_of_a_student_gets_a_gradient(encoder_folder):
    from transformers import AutoModel

    model = Encoder(AutoModel.from_pretrained(encoder_folder), "mean")
    model(torch.tensor([[2, 50, 3]]), torch.ones(1, 3, dtype=torch.long)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
