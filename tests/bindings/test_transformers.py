"""Models of transformers, small and of random weights, give with crosstile what they give with their eager attention.

Logits and all gradients of a padded batch are held to the two-times rule against the eager model in float64; generation
with a cache gives the same tokens. Rows of padding queries are left out: eager attention gives them a mean of values
that nobody sees, crosstile zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracles import assert_within

import crosstile
from crosstile import transformers as bound
from crosstile.drop_ins import register_with_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch.overrides import TorchFunctionMode  # noqa: E402

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3", {}),
    "granite": ("Granite", {"attention_multiplier": 0.5}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "gpt_oss": ("GptOss", {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere2": ("Cohere2", {"sliding_window": 4, "logit_scale": 1.0}),
    "llama4": (
        "Llama4Text",
        {
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
        },
    ),
}
TOKENS = torch.tensor([[5, 17, 3, 44, 9, 21, 8, 30, 2], [0, 0, 0, 12, 7, 33, 50, 11, 6]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_with_transformers()


def model_of(family: str, attention: str = "crosstile", dtype: str = "float32", **options: Any) -> Any:
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **options})
    config._attn_implementation, config._experts_implementation = attention, "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention is far from uniform, and sinks are set
            parameter.copy_(
                torch.randn(parameter.shape) * (1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            )
    return model.to(getattr(torch, dtype)).eval()


def logits_and_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The logits of real tokens, and the gradients of all parameters under random weights of them."""
    logits = model(**inputs).logits
    real = inputs.get("attention_mask")
    if real is not None and real.dim() == 2 and real.shape == logits.shape[:2]:
        logits = logits[real.bool()]
    torch.manual_seed(2)
    logits.backward(torch.randn(logits.shape, dtype=torch.float64).to(logits.dtype))
    found = {"logits": logits, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    return {name: array.detach().double().numpy() for name, array in found.items()}


def together(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The logits, and all gradients as one vector, each in units of its largest: an error is any parameter's."""
    assert set(found) == set(exact)
    units = {name: np.abs(array).max() for name, array in exact.items() if name != "logits"}
    assert len(units) > 5
    assert all(np.isfinite(unit) for unit in units.values())
    parts = [(found[name] / unit).ravel() for name, unit in sorted(units.items()) if unit > 1e-9]  # else it is rounding
    return {"logits": found["logits"], "gradients": np.concatenate(parts)}


class InDouble(TorchFunctionMode):
    """Models compute norms and softmaxes in float32 whatever their dtype; here they do so in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        options = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*wide, **options)


def agree(make: Any, inputs: dict[str, Any] | None = None) -> None:
    """make(attention, dtype) is a model."""
    inputs = {"input_ids": TOKENS, "attention_mask": REAL} if inputs is None else inputs
    model = make("eager", "float64")
    with InDouble():
        exact = logits_and_gradients(model, inputs)
    theirs = logits_and_gradients(make("eager", "float32"), inputs)
    ours = logits_and_gradients(make("crosstile", "float32"), inputs)
    assert_within(*(together(found, exact) for found in (ours, theirs, exact)), "float32")


def makers(family: str, **options: Any) -> Any:
    return lambda attention, dtype: model_of(family, attention, dtype, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch(family):
    agree(makers(family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_without_padding(family):
    agree(makers(family), {"input_ids": TOKENS.reshape(1, -1)})


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_by_the_definition(family):
    with crosstile.use("numpy"):
        agree(makers(family))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_sequences(family):
    """Positions that start again are other sequences, as transformers' own masks have it."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    agree(makers(family), {"input_ids": TOKENS[:1], "position_ids": positions})


@pytest.mark.parametrize("positions", [None, [[0, 1, 2, 3, 4, 5, 0, 1, 2]]])
def test_packed_sequences_by_their_starts(positions):
    """FlashAttention's arguments, which eager attention ignores: each sequence as if it were alone."""
    starts, model = torch.tensor([0, 6, 9], dtype=torch.int32), model_of("mistral")
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]]) if positions else torch.arange(9)[None]
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    whole = model(input_ids=TOKENS[:1], position_ids=positions, use_cache=False, **packed).logits
    alone = [
        model(input_ids=TOKENS[:1, a:b], position_ids=positions[:, a:b], use_cache=False).logits
        for a, b in ((0, 6), (6, 9))
    ]
    torch.testing.assert_close(whole, torch.cat(alone, 1))


def test_a_mask_of_ones_own():
    seen = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) % 4 != 1)[None]
    seen |= torch.eye(9, dtype=torch.bool)
    added = torch.where(seen, 0.0, -1e9)[None, None]
    agree(makers("llama"), {"input_ids": TOKENS[:1], "attention_mask": added})
    boolean = model_of("llama")(input_ids=TOKENS[:1], attention_mask=seen[None, None]).logits
    torch.testing.assert_close(boolean, model_of("llama")(input_ids=TOKENS[:1], attention_mask=added).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "deepseek_v3"])
def test_generation(family):
    """With a cache, past the windows, from a padded batch: the same tokens."""
    options = {"attention_mask": REAL, "max_new_tokens": 8, "do_sample": False}
    ours = model_of(family).generate(TOKENS, **options)
    assert ours.tolist() == model_of(family, "eager").generate(TOKENS, **options).tolist()
    assert ours.shape == (2, 17)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_with_a_static_cache(family):
    options = {"attention_mask": REAL, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    options["disable_compile"] = True
    ours = model_of(family).generate(TOKENS, **options)
    assert ours.tolist() == model_of(family, "eager").generate(TOKENS, **options).tolist()


def test_prefill_in_chunks():
    """Queries that continue a cache stand at its end."""
    model, exact = model_of("mistral"), model_of("mistral", "eager")
    whole = exact(input_ids=TOKENS, attention_mask=REAL).logits
    first = model(input_ids=TOKENS[:, :4], attention_mask=REAL[:, :4], use_cache=True)
    second = model(input_ids=TOKENS[:, 4:], attention_mask=REAL, cache=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_position_bias():
    """T5, whose bias is learnt, both bidirectional and causal with another attention across."""
    options = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 61}

    def make(attention: str, dtype: str) -> Any:
        config = transformers.T5Config(**options, dropout_rate=0.0, decoder_start_token_id=0)
        config._attn_implementation = attention
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).to(getattr(torch, dtype)).eval()

    agree(make, {"input_ids": TOKENS, "attention_mask": REAL, "decoder_input_ids": TOKENS[:, 3:]})


def test_bidirectional_window():
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48}

    def make(attention: str, dtype: str) -> Any:
        config = transformers.ModernBertConfig(**options, vocab_size=61, local_attention=4, pad_token_id=0)
        config._attn_implementation = attention
        torch.manual_seed(0)
        return transformers.ModernBertForMaskedLM(config).to(getattr(torch, dtype)).eval()

    agree(make)


def test_from_pretrained(tmp_path):
    model = model_of("llama", "eager")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="crosstile")
    assert loaded.config._attn_implementation == "crosstile"
    torch.testing.assert_close(loaded(TOKENS[:1]).logits, model(TOKENS[:1]).logits)
    model.set_attn_implementation("crosstile")
    assert torch.equal(loaded(TOKENS[:1]).logits, model(TOKENS[:1]).logits)


PADDING = torch.tensor([[False, False, True, True, True, True, True, True], [True] * 6 + [False] * 2])
MASKS: dict[str, dict[str, Any]] = {
    "square": {"q_length": 8, "kv_length": 8},
    "padded": {"q_length": 8, "kv_length": 8, "attention_mask": PADDING},
    "full padding mask": {"q_length": 8, "kv_length": 8, "attention_mask": torch.ones(2, 8, dtype=torch.bool)},
    "continued": {"q_length": 3, "kv_length": 8, "q_offset": 5, "attention_mask": PADDING},
    "at the end": {"q_length": 3, "kv_length": 8, "q_offset": 5},
    "empty places after": {"q_length": 3, "kv_length": 8},
    "static": {"q_length": 3, "kv_length": 8, "q_offset": torch.tensor(2)},
    "cropped": {"q_length": 3, "kv_length": 4, "q_offset": 4, "kv_offset": 3},
    "one": {"q_length": 1, "kv_length": 8, "q_offset": 7, "attention_mask": PADDING},
    "window": {"q_length": 8, "kv_length": 8, "local_size": 3, "kind": "sliding_window_causal"},
    "wide window": {"q_length": 8, "kv_length": 8, "local_size": 20, "kind": "sliding_window_causal"},
    "chunks": {"q_length": 8, "kv_length": 8, "local_size": 3, "kind": "chunked_causal"},
    "bidirectional": {"q_length": 8, "kv_length": 8, "kind": "bidirectional"},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_transformers(name):
    from transformers import masking_utils

    options = {"batch_size": 2, **MASKS[name]}
    kind = options.pop("kind", "causal")
    size = (options["local_size"],) if "local_size" in options else ()
    extra = (torch.zeros(2, dtype=torch.int64),) if kind == "chunked_causal" else ()
    function = getattr(masking_utils, f"{kind}_mask_function")
    options["mask_function"] = function(*size, *extra) if size else function
    skips = {"allow_is_causal_skip": kind != "bidirectional", "allow_is_bidirectional_skip": kind == "bidirectional"}
    mask = bound._mask_of_a_model(**options, **skips)
    queries, keys = torch.arange(options["q_length"]), torch.arange(options["kv_length"])
    skipped = ("square", "full padding mask", "at the end", "cropped", "wide window", "bidirectional")
    assert (mask is None) == (name in skipped)
    if name == "bidirectional":
        return
    if mask is None:
        mask = keys <= queries[:, None] + len(keys) - len(queries)
    elif hasattr(mask, "mask_mod"):
        at = torch.arange(2)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        mask = mask.mask_mod(*at, queries[:, None], keys)
    theirs = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    assert torch.equal(torch.as_tensor(mask).expand(theirs.shape), theirs)


def test_no_array_over_queries_and_keys_for_padding_and_windows(monkeypatch):
    """The masks are rules: what reaches the op is a mask_mod, not a mask."""
    seen: list[dict[str, Any]] = []
    op = bound.attention
    monkeypatch.setattr(bound, "attention", lambda *arrays, **options: seen.append(options) or op(*arrays, **options))
    model_of("gemma2")(input_ids=TOKENS, attention_mask=REAL)
    assert [options.get("mask") for options in seen] == [None, None]
    assert all(options["mask_mod"] for options in seen)
    seen.clear()
    model_of("llama")(input_ids=TOKENS)
    assert all(options["causal"] and "mask_mod" not in options for options in seen)


def test_dropout_in_training_alone():
    model = model_of("llama", num_hidden_layers=1, attention_dropout=0.2)
    exact = model.eval()(TOKENS).logits
    torch.testing.assert_close(model.eval()(TOKENS).logits, exact)
    model.train()
    torch.manual_seed(0)
    first, second = model(TOKENS).logits, model(TOKENS).logits
    assert (first - second).abs().max() > 1e-3 * exact.abs().max()
    torch.manual_seed(0)
    torch.testing.assert_close(model(TOKENS).logits, first)


def test_refuses():
    model = model_of("llama")
    with pytest.raises((crosstile.UnsupportedError, ValueError), match=r"output_attentions"):
        model.eval()(TOKENS, output_attentions=True)
