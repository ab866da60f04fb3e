from types import SimpleNamespace

import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.models import load
from ftlit.models.load import load_lm, load_tokenizer, resolve
from ftlit.testing import tiny_lm


def test_a_loaded_model_is_in_training_mode_and_float32(tiny_model_folder):
    lm = load_lm(tiny_model_folder)
    assert all(module.training for module in lm.modules())
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert load_lm(tiny_model_folder, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nope", "does not exist"),
        ("/nope/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
        ("nope.gguf", "does not exist"),
        ("EMPTY", "holds neither a config.json nor a GGUF file"),
        ("RUN", "is a run: make a model of it (ftlit export "),
        ("ADAPTER", "is an adapter: give its base model, and the adapter as --model.peft.from_adapter, or merge them"),
        ("TWO", "holds several GGUF files (a.gguf, b.gguf)"),
        ("FILE", "is a file but no .gguf"),
    ],
)
def test_names_that_cannot_be_models(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").mkdir()
    for file in ("two/a.gguf", "two/b.gguf", "file.bin", "run/config.yaml", "adapter/adapter_config.json"):
        (tmp_path / file).write_bytes(b"x")
    places = {"RUN": tmp_path / "run", "ADAPTER": tmp_path / "adapter"}
    places |= {"EMPTY": tmp_path / "empty", "TWO": tmp_path / "two", "FILE": tmp_path / "file.bin"}
    with pytest.raises(ConfigError) as error:
        resolve(str(places.get(name, name)))
    assert says in str(error.value)


def test_a_checkpoint_without_an_output_layer_is_refused(tmp_path):
    """Transformers would draw one at random."""
    lm = tiny_lm("llama_untied")
    lm.base_model.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ConfigError, match=r"its checkpoint lacks lm_head.weight, which would be drawn at random"):
        load_lm(str(tmp_path / "trunk"))
    tiny_lm("llama").base_model.save_pretrained(tmp_path / "tied")
    assert load_lm(str(tmp_path / "tied")).lm_head.weight is not None


def test_hub_ids_are_left_to_the_hub():
    assert resolve("someone/something") == "someone/something"
    with pytest.raises(ConfigError, match=r"'someone/something' cannot be loaded.*GGUF file"):
        load_tokenizer("someone/something")


def test_a_gguf_file_is_converted_once_for_each_content(tmp_path, monkeypatch):
    made = []

    def convert(source, gguf_file, **options):
        class Made:
            config = SimpleNamespace(quantization_config=1)

            def save_pretrained(self, folder):
                made.append(hasattr(self.config, "quantization_config"))
                folder.mkdir(parents=True, exist_ok=True)

        return Made()

    import transformers

    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", convert)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", convert)
    file = tmp_path / "model.gguf"
    content = bytearray(torch.randint(256, (3 << 20,), dtype=torch.uint8).numpy().tobytes())
    file.write_bytes(content)
    first = resolve(str(file))
    assert first == resolve(str(file))
    assert made == [False, True]  # the model without the mark of quantization, then the tokenizer; once
    content[-100_000:] = bytes(100_000)  # other weights, the same header and size
    file.write_bytes(content)
    assert resolve(str(file)) != first
    assert load.cache_dir() == tmp_path / "cache"
