"""Bad values in config.json, generation_config.json and tokenizer_config.json: one line with the file and the key."""

import json
import random
import shutil

import pytest
from artifacts import make
from tiny import save_tiny

import reallm
from reallm.errors import ReallmError, UserError
from reallm.models.loaded import load_model
from reallm.models.settings_errors import settings_errors

BAD_VALUES = [
    ("config.json", "mlp_bias", 7),
    ("config.json", "vocab_size", -1),
    ("config.json", "vocab_size", "x"),
    ("config.json", "hidden_size", 1.5),
    ("config.json", "hidden_act", "x"),
    ("config.json", "num_attention_heads", -1),
    ("config.json", "num_attention_heads", 0),
    ("config.json", "num_hidden_layers", 1 << 40),
    ("config.json", "rms_norm_eps", []),
    ("config.json", "attention_dropout", float("nan")),
    ("config.json", "intermediate_size", 96),
    ("config.json", "model_type", [1]),
    ("config.json", "dtype", -1),
    ("config.json", "dtype", "float7"),
    ("config.json", "architectures", {"a": 1}),
    ("config.json", "rope_parameters.rope_type", "x"),
    ("config.json", "rope_parameters.rope_theta", "x"),
    ("generation_config.json", "eos_token_id", {}),
    ("generation_config.json", "pad_token_id", float("inf")),
    ("generation_config.json", "use_cache", "x"),
    ("generation_config.json", "temperature", "x"),
    ("tokenizer_config.json", "model_max_length", "x"),
    ("tokenizer_config.json", "model_max_length", -1),
    ("tokenizer_config.json", "tokenizer_class", 7),
    ("tokenizer_config.json", "bos_token", 7),
    ("tokenizer_config.json", "padding_side", "up"),
]
ANYTHING = (None, True, False, -1, 0, 7, 1.5, 1e30, float("nan"), "x", "", [], [1], {}, {"a": 1}, 1 << 40)


def change(folder, file, key, value):
    """Give the dotted `key` of a settings file in `folder` another value."""
    settings = json.loads((folder / file).read_text())
    *outer, last = key.split(".")
    inner = settings
    for name in outer:
        inner = inner[name]
    inner[last] = value
    (folder / file).write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("made")).folder


@pytest.mark.parametrize(("file", "key", "value"), BAD_VALUES, ids=str)
def test_a_bad_value_in_a_model_is_one_line_with_file_and_key(file, key, value, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    change(folder, file, key, value)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert file in message
    assert key in message


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [case for case in BAD_VALUES if case[1] not in ("architectures", "intermediate_size", "model_type")],
    ids=str,
)
def test_a_bad_value_in_an_artifact_is_one_line_with_file_and_key(file, key, value, artifact, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "copy")
    change(folder, file, key, value)
    with pytest.raises(UserError) as caught:
        reallm.load(folder, verify=False)
    message = str(caught.value)
    assert "\n" not in message
    assert file in message
    assert key in message


def test_random_changes_never_show_an_exception_of_transformers(model, tmp_path):
    draw, refused = random.Random(0), 0
    for number in range(60):
        folder = shutil.copytree(model, tmp_path / str(number))
        file = draw.choice(("config.json", "generation_config.json", "tokenizer_config.json"))
        change(folder, file, draw.choice(sorted(json.loads((folder / file).read_text()))), draw.choice(ANYTHING))
        try:
            load_model(folder)
        except ReallmError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_an_error_that_no_settings_cause_keeps_its_own_reason(model):
    with pytest.raises(UserError, match=r"^the thing failed: a reason$"), settings_errors(model, "the thing failed"):
        raise RuntimeError("a reason\nwith more lines")
    with pytest.raises(UserError, match=r"^the first$"), settings_errors(model, "the thing failed"):
        raise UserError("the first")


def test_the_key_is_found_inside_nested_settings_and_the_files_stay_as_they_were(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    change(folder, "config.json", "rope_parameters.rope_type", "spiral")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"rope_parameters\.rope_type = 'spiral' cannot be used"):
        load_model(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
