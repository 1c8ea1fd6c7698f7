"""Checkpoints of codes: MXFP4 and FP8 read without a loss, as the models of transformers that have the same weights."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import crosstile
from crosstile.models import forward, generate, load, parity, save
from crosstile.models.arrays import like, to_numpy, tree_leaves
from crosstile.models.parity_cases import CASES

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}


def rewritten(source, folder, change, fields):
    """The checkpoint with its tensors changed, and the weights that they stand for as another one."""
    stored, plain = {}, {}
    for name, array in load_file(source / "model.safetensors").items():
        codes, weight = change(name, array)
        stored |= codes
        plain[name] = weight
    config = json.loads((source / "config.json").read_text())
    for where, tensors, more in ((folder / "codes", stored, fields), (folder / "plain", plain, {})):
        where.mkdir()
        save_file(tensors, where / "model.safetensors", {"format": "pt"})
        (where / "config.json").write_text(json.dumps({**config, **more}))
    return folder / "codes", folder / "plain"


def to_mxfp4(name, array):
    """GPT-OSS's: random codes, two of `in` to a byte, in the place of the experts' matrices `[experts, in, out]`."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: array}, array
    rng = np.random.default_rng(len(name))
    experts, wide, out = array.shape
    codes = rng.integers(0, 16, (experts, out, wide // 32, 32)).astype(np.uint8)
    scales = rng.integers(122, 126, (experts, out, wide // 32)).astype(np.uint8)
    weight = (E2M1[codes] * 2.0 ** (scales[..., None].astype(np.float32) - 127)).reshape(experts, out, wide)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, np.ascontiguousarray(weight.swapaxes(1, 2))


def to_fp8(name, array):
    """DeepSeek's: e4m3 with a float32 scale for each square of 128."""
    if "proj" not in name:
        return {name: array}, array
    rows, columns = (-(-size // 128) for size in array.shape)
    scales = np.random.default_rng(len(name)).uniform(0.01, 0.02, (rows, columns)).astype(np.float32)
    spread = scales.repeat(128, 0).repeat(128, 1)[: array.shape[0], : array.shape[1]]
    codes = (array / spread).astype(ml_dtypes.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}, codes.astype(np.float32) * spread


CHECKPOINTS = {
    "gpt_oss": (to_mxfp4, MXFP4, {"hidden_size": 64, "intermediate_size": 96}),
    "deepseek_v3": (to_fp8, FP8, {"hidden_size": 160, "intermediate_size": 136, "kv_lora_rank": 132}),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folders(request, tmp_path_factory):
    """A checkpoint of codes, one of the weights that they stand for, and tokens."""
    change, fields, sizes = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, request.param, {**CASES[request.param], **sizes})
        tokens = parity.subject(request.param, folder / "source").tokens
    return *rewritten(folder / "source", folder, change, fields), tokens


def formats(params):
    return {x.format for x in tree_leaves(params).values() if isinstance(x, crosstile.Quantized)}


@pytest.mark.parametrize("framework", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.sweep)])
def test_codes_are_read_without_a_loss(folders, framework):
    codes, plain, tokens = folders
    params, config = load(codes, framework)
    wanted, same = load(plain, framework)
    assert config == same
    assert formats(params) == {"mxfp4" if config.family == "gpt_oss" else "float8_e4m3fn"}
    for path, array in tree_leaves(params).items():
        if isinstance(array, crosstile.Quantized):
            array = array.dequantize()
        assert np.array_equal(to_numpy(array), to_numpy(tree_leaves(wanted)[path])), path
    ours = like(tokens, params["embedding"])
    found, known = (to_numpy(forward(each, ours, config)) for each in (params, wanted))
    assert parity.max_relative(found, known) < 1e-5
    if framework == "jax":
        return  # its compiler takes ten seconds over these programs
    prompt = tokens[:, :9]
    assert np.array_equal(*(to_numpy(generate(each, config, prompt, 5)) for each in (params, wanted)))


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_numbers_and_other_codes_can_be_had(folders, framework):
    codes, plain, _ = folders
    numbers, config = load(codes, framework, quantize=False)
    assert not formats(numbers)
    wanted = tree_leaves(load(plain, framework)[0])
    assert all(np.array_equal(to_numpy(x), to_numpy(wanted[path])) for path, x in tree_leaves(numbers).items())
    assert formats(load(codes, framework, quantize="int4", group_size=32)[0]) == {"int4"}
    assert formats(load(plain, framework, quantize="int8")[0]) == {"int8"}


def test_codes_are_not_saved(folders, tmp_path):
    with pytest.raises(ValueError, match=r"params: layers.\d.w.* is quantised"):
        save(*load(folders[0]), tmp_path)


def test_transformers_computes_the_same(folders):
    """It decodes MXFP4 itself; for FP8 it wants accelerate, so there it reads the weights that were decoded here."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    codes, plain, tokens = folders
    params, config = load(codes, "torch")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if config.family == "gpt_oss":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(codes if config.family == "gpt_oss" else plain, **options).eval()
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(tokens).long()).logits
    assert parity.max_relative(forward(params, torch.as_tensor(tokens), config), wanted) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "awq"}, r"quantization_config: got quant_method 'awq'; it must be one of mxfp4, fp8"),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            r"got weight_block_size \[64, 64\]; it must be \[128,",
        ),
    ],
)
def test_other_codes_are_refused(folders, tmp_path, options, message):
    fields = json.loads((folders[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": options}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
