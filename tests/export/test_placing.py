"""Where a model that is used runs, and in which type."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ftlit.export.opening import place
from ftlit.testing import tiny_classifier, tiny_lm, tiny_tokenizer
from ftlit.verbs import run


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_have_the_type_and_what_is_computed_once_keeps_its_own(dtype):
    lm = tiny_lm("llama")
    frequencies = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    assert any("inv_freq" in name for name in frequencies)
    place(lm, "cpu", dtype)
    assert {parameter.dtype for parameter in lm.parameters()} == {getattr(torch, dtype)}
    for name, buffer in lm.named_buffers():
        assert torch.equal(buffer, frequencies[name]), name
        assert buffer.dtype == torch.float32
    assert lm(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == getattr(torch, dtype)


def test_score_and_export_take_device_and_type(tmp_path, capsys):
    tiny_classifier("llama", labels=1, pad_token_id=290).save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "completion": " there"}) + "\n")
    found = {}
    for dtype in ("float32", "bfloat16"):
        args = ["score", str(tmp_path / "rm"), "--rows", str(rows), "--device", "cpu", "--dtype", dtype]
        assert run(args) == 0
        found[dtype] = json.loads(capsys.readouterr().out)["score"]
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], abs=0.05)
    args = ["export", str(tmp_path / "rm"), "--to", str(tmp_path / "out"), "--device", "cpu", "--dtype", "bfloat16"]
    assert run(args) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
