import hashlib
import os
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save, save_file

import train.model as model_module
from clusterlib.artifacts.config import fingerprint
from clusterlib.errors import StrataError
from train.model import (
    Encoder,
    ModelRef,
    StudentConfig,
    TokenizerRef,
    build_student,
    load_embedder,
    student_architecture,
)


@pytest.fixture
def model(teacher_folder, tmp_path):
    """A copy of the teacher with a dense module after its pooling, and all that hubs put beside a
    model.
    """
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.eye(32)}, folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 32}')
    (folder / ".git").mkdir()
    (folder / "onnx").mkdir()
    for name in (
        "README.md",
        ".git/HEAD",
        "pytorch_model.bin",
        "2_Dense/pytorch_model.bin",
        "onnx/model.onnx",
    ):
        (folder / name).write_text("a")
    (folder / "spiece.model").write_text("a")
    return folder


def edit(path):
    """Another content of the same size, at the same time."""
    stat = path.stat()
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.replace(b": ", b" :", 1))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of safetensors the last weight
    assert path.read_bytes() != data
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


SHAPING = [
    "model.safetensors", "config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "spiece.model",
]  # fmt: skip


@pytest.mark.parametrize("name", SHAPING)
def test_an_edit_of_any_file_that_shapes_the_output_makes_another_model(model, name):
    ref = ModelRef(name=str(model))
    before = fingerprint(ref)
    assert fingerprint(ref) == before
    edit(model / name)
    assert fingerprint(ref) != before


@pytest.mark.parametrize("name", ["README.md", ".git/HEAD", "pytorch_model.bin", "onnx/model.onnx"])
def test_what_nobody_reads_makes_no_other_model(model, name):
    ref = ModelRef(name=str(model))
    before = fingerprint(ref)
    (model / name).write_text("another")
    assert fingerprint(ref) == before


def test_a_file_more_or_less_makes_another_model(model):
    found = [fingerprint(ModelRef(name=str(model)))]
    (model / "added_tokens.json").write_text("{}")
    found.append(fingerprint(ModelRef(name=str(model))))
    shutil.rmtree(model / "2_Dense")
    found.append(fingerprint(ModelRef(name=str(model))))
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    "name", [name for name in SHAPING if not name.startswith(("token", "config.json", "spiece"))]
)
def test_a_tokenizer_is_its_own_files_alone(model, name):
    ref = TokenizerRef(name=str(model))
    before = fingerprint(ref)
    edit(model / name)
    assert fingerprint(ref) == before


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "spiece.model"]
)
def test_an_edit_of_a_tokenizers_file_makes_another_tokenizer(model, name):
    ref = TokenizerRef(name=str(model))
    before = fingerprint(ref)
    edit(model / name)
    assert fingerprint(ref) != before


def test_the_same_files_are_the_same_model_wherever_they_lie(model, tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_models"
    shutil.copytree(model, package / "inside" / "model")
    (package / "__init__.py").write_text("")
    (package / "inside" / "__init__.py").write_text("raise RuntimeError('nothing is imported')")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    refs = [
        ModelRef(name=str(model)),
        ModelRef(name=str(model), sha256=digest),
        ModelRef(name="package:a_package_of_models/inside/model"),
        ModelRef(name="package:a_package_of_models.inside/model"),
    ]
    assert len({fingerprint(ref) for ref in refs}) == 1


def test_a_stated_digest_does_not_stand_for_the_other_files(model):
    ref = ModelRef(
        name=str(model),
        sha256=hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
    )
    before = fingerprint(ref)
    edit(model / "1_Pooling" / "config.json")
    assert fingerprint(ref) != before
    edit(model / "model.safetensors")
    with pytest.raises(StrataError, match=r"model.safetensors has SHA-256 .*, not "):
        ref.content()


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/model.safetensors", "config.json"])
@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\xff" * 5000])
def test_files_full_of_garbage_are_named_before_anything_runs(model, name, garbage):
    (model / name).write_bytes(garbage)
    for use in (ModelRef.content, ModelRef.folder):
        with pytest.raises(
            StrataError, match=rf"{name}: no whole (safetensors|JSON) file .*fetch it again"
        ):
            use(ModelRef(name=str(model)))


def test_weights_cut_short_are_named(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StrataError, match="model.safetensors: no whole safetensors file"):
        ModelRef(name=str(model)).content()


def test_a_file_that_is_a_link_to_nowhere_is_named(model):
    (model / "vocab.txt").symlink_to(model / "absent")
    with pytest.raises(StrataError, match=r"vocab.txt: cannot be read \(No such file"):
        ModelRef(name=str(model)).content()


def test_a_module_with_pickled_weights_alone_is_refused(model):
    (model / "2_Dense" / "model.safetensors").unlink()
    for use in (ModelRef.content, ModelRef.folder):
        with pytest.raises(
            StrataError, match=r"2_Dense/pytorch_model.bin: pickled weights are not read"
        ):
            use(ModelRef(name=str(model)))


COMMIT = "c" * 40


@pytest.fixture
def hub_at(monkeypatch):
    """Sets the commit that every name on a stand-in for the hub is at; None when it cannot be
    asked.
    """
    return lambda commit: monkeypatch.setattr(
        model_module.hub, "commit", lambda name, revision: commit
    )


def test_a_hub_model_is_pinned_to_its_commit(hub_at, model, monkeypatch):
    downloads = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: downloads.append((name, how["revision"])) or model,
    )
    hub_at(COMMIT)
    config = StudentConfig(model=ModelRef(name="owner/model")).pinned()
    assert config.model.revision == COMMIT
    hub_at("d" * 40)  # the hub moves on: what was pinned stays, in every process that is told of it
    worker = pickle.loads(pickle.dumps(config)).model  # noqa: S301
    assert worker.content() == {"name": "owner/model", "revision": COMMIT}
    assert worker.folder() == model and downloads == [("owner/model", COMMIT)]
    assert (
        StudentConfig(model=ModelRef(name="owner/model")).pinned().model.content()
        != worker.content()
    )


def test_models_on_this_machine_are_not_asked_for_on_the_hub(model, monkeypatch):
    monkeypatch.setattr(model_module.hub, "commit", lambda *names: pytest.fail("asked"))
    ref = ModelRef(name=str(model))
    assert ref.pinned() == ref
    assert StudentConfig(architecture={"model_type": "bert"}).pinned().model is None


def test_a_hub_model_without_a_commit_is_its_name(hub_at):
    hub_at(None)
    name = {"name": "owner/model", "revision": None}
    assert ModelRef(name="owner/model").pinned().content() == name
    stated = ModelRef(name="owner/model", sha256="0" * 64)
    assert stated.pinned().content() == {**name, "sha256": "0" * 64}  # all that is known of it
    hub_at(COMMIT)
    assert stated.pinned().content() == {"name": "owner/model", "revision": COMMIT}


def test_a_tokenizer_from_the_hub_comes_without_weights(monkeypatch, tokenizer_folder):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.update(how) or tokenizer_folder,
    )
    TokenizerRef(name="owner/model").folder()
    wanted = set(
        filter_repo_objects(
            SHAPING,
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert wanted == {"config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"}


def test_a_folder_without_weights_is_refused(tokenizer_folder, encoder_folder, tmp_path):
    with pytest.raises(StrataError, match=r"no config\.json or modules\.json in it"):
        ModelRef(name=str(tokenizer_folder)).folder()
    with pytest.raises(StrataError, match=r"no tokenizer\.json in it"):
        TokenizerRef(name=str(tmp_path)).folder()
    shutil.copy(encoder_folder / "config.json", tmp_path)
    with pytest.raises(StrataError, match=r"no \*\.safetensors in it"):
        ModelRef(name=str(tmp_path)).folder()


def test_a_folder_that_is_no_model_is_not_walked(monkeypatch):
    monkeypatch.setattr("os.walk", lambda *_, **__: pytest.fail("walked"))
    with pytest.raises(StrataError, match="/: no config.json or modules.json in it"):
        ModelRef(name="/").content()


def test_pickled_weights_are_no_weights(encoder_folder, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(encoder_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(StrataError, match="not a complete model folder"):
        ModelRef(name=str(folder)).folder()


def random_bytes(weights):
    return os.urandom(5000)


def cut_short(weights):
    return save(weights)[:-5]


def not_finite(weights):
    weights["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    return save(weights, {"format": "pt"})


def other_names(weights):
    return save({f"x.{name}": weight for name, weight in weights.items()}, {"format": "pt"})


def other_shapes(weights):
    return save({name: weight[:1].clone() for name, weight in weights.items()}, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (random_bytes, "no whole safetensors file"),
        (cut_short, "no whole safetensors file"),
        (not_finite, r"encoder\.layer\.1\.output\.dense\.weight holds values that are not finite"),
        (other_names, "its weights lack embeddings"),
        (other_shapes, "its weights have other shapes than its config.json asks for"),
    ],
)
def test_weights_full_of_garbage_are_refused(
    teacher_folder, encoder_folder, tokenizer_folder, tmp_path, spoil, message
):
    for source in (teacher_folder, encoder_folder):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        path = folder / "model.safetensors"
        path.write_bytes(spoil(load_file(path)))
        with pytest.raises(StrataError, match=message):
            load_embedder(ModelRef(name=str(folder)).folder(), "cpu")
    student = StudentConfig(model=ModelRef(name=str(folder)))
    with pytest.raises(StrataError, match=message):
        build_student(student, TokenizerRef(name=str(tokenizer_folder)).load(), 16, seed=0)


def test_a_pooler_that_is_missing_is_not_missed(encoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if "pooler" not in name}
    path.write_bytes(save(weights, {"format": "pt"}))
    load_embedder(tmp_path / "model", "cpu")


def test_a_wrong_digest_is_refused(encoder_folder):
    with pytest.raises(StrataError, match="has SHA-256 .*, not 000"):
        ModelRef(name=str(encoder_folder), sha256="0" * 64).folder()


@pytest.mark.parametrize("name", ["/absent/folder", "./absent", "package:numpy/absent"])
def test_absent_models_are_named(name):
    with pytest.raises(StrataError, match=f"{name}: no such model folder"):
        ModelRef(name=name).folder()


@pytest.mark.parametrize(
    "package", ["no_such_package", "nope.sub", "numpy.nope", "", ".numpy", "sys", "six", "__main__"]
)
def test_absent_packages_are_named(package):
    """`six` is a module without a folder of its own, `sys` one without a file."""
    with pytest.raises(
        StrataError, match=f"package:{package}/x: no Python package '{package}' .* is installed"
    ):
        ModelRef(name=f"package:{package}/x").content()


def test_a_hub_model_that_cannot_be_fetched_is_one_message():
    with pytest.raises(
        StrataError,
        match="nobody/nothing: neither a local folder nor a model that could be fetched",
    ):
        ModelRef(name="nobody/nothing").folder()


def test_a_student_has_exactly_one_origin(architecture):
    for settings in ({}, {"architecture": architecture, "model": {"name": "x"}}):
        with pytest.raises(ValueError, match="exactly one of model and architecture"):
            StudentConfig(**settings)


def test_students_that_do_not_fit_the_shards_are_refused(
    tokenizer_folder, architecture, encoder_folder, tmp_path
):
    from transformers import AutoConfig, AutoModel

    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    for changes, message in (
        ({"vocab_size": 10}, "knows 10 tokens and the tokenizer of the shards"),
        ({"max_position_embeddings": 16}, "takes at most 16 tokens and the shards hold up to 64"),
        ({"model_type": "no-such-type"}, "train.student"),
        (
            {"model_type": "t5"},
            "t5 is an encoder with a decoder; take an encoder or a decoder alone, such as bert or "
            "qwen3",
        ),
        ({"model_type": "bart"}, "bart is an encoder with a decoder"),
    ):
        with pytest.raises(StrataError, match=message):
            student_architecture(
                StudentConfig(architecture={**architecture, **changes}), tokenizer, 64
            )
    images = AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModel.from_config(images).save_pretrained(tmp_path)
    with pytest.raises(StrataError, match="vit takes no tokens"):
        student_architecture(StudentConfig(model=ModelRef(name=str(tmp_path))), tokenizer, 64)
    loaded = student_architecture(
        StudentConfig(model=ModelRef(name=str(encoder_folder))), tokenizer, 64
    )
    assert loaded.hidden_size == 32


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "opt"]
)
@pytest.mark.parametrize("num_tokens", [38, 39, 40, 41])
def test_a_student_takes_as_many_tokens_as_it_has_positions(
    tokenizer_folder, architecture, model_type, num_tokens
):
    """RoBERTa and its like number tokens from padding_idx + 1, and so have that many positions
    fewer.
    """
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    names = {
        "distilbert": {"n_layers": 1, "n_heads": 2, "dim": 32},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    }
    changes = {
        "model_type": model_type,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        **names.get(model_type, {}),
    }
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
        == (
            num_tokens
            > (38 if model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 40)
        )
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
    second, third = (
        build_student(config, tokenizer, 64, seed=7),
        build_student(config, tokenizer, 64, seed=8),
    )
    states = [
        torch.cat([weight.ravel() for weight in model.parameters()])
        for model in (first, second, third)
    ]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("origin", ["loaded", "random"])
def test_a_student_is_in_training_mode_and_checkpoints_when_asked(
    tokenizer_folder, architecture, encoder_folder, origin
):
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    origins = {
        "loaded": {"model": ModelRef(name=str(encoder_folder))},
        "random": {"architecture": architecture},
    }
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
