"""Llama once more, from Hugging Face's tensors and with torch's plain ops in float64: the oracle of the tests.

It shares no line with crosstile.models: projections are `x @ w.T`, positions are complex rotations, and attention is
a loop over heads.
"""

import math

import torch


def logits(tensors, fields, tokens):
    """float64 `[batch, seq, vocab]` from a checkpoint's tensors by their names and the fields of its config.json."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    eps = fields["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(fields["num_hidden_layers"]):
        layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{index}.")}
        x = x + _attention(layer, _norm(x, layer["input_layernorm.weight"], eps), fields)
        h = _norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"
    return _norm(x, weights["model.norm.weight"], eps) @ weights[head].T


def _norm(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention(layer, x, fields):
    dim, heads, kv_heads = fields["head_dim"], fields["num_attention_heads"], fields["num_key_value_heads"]
    turn = _rotation(x.shape[1], fields)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        q = turn(x @ layer["self_attn.q_proj.weight"][head * dim : (head + 1) * dim].T)
        k = turn(x @ layer["self_attn.k_proj.weight"][kv * dim : (kv + 1) * dim].T)
        v = x @ layer["self_attn.v_proj.weight"][kv * dim : (kv + 1) * dim].T
        scores = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(hidden, -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ layer["self_attn.o_proj.weight"].T


def _rotation(length, fields):
    dim = fields["head_dim"]
    angles = []
    for pair in range(dim // 2):
        frequency = 1 / fields["rope_theta"] ** (2 * pair / dim)
        angles.append(_stretch(frequency, fields.get("rope_scaling")))
    turns = torch.polar(
        torch.ones(1, dtype=torch.float64), torch.arange(length)[:, None] * torch.tensor(angles).double()
    )

    def turn(x):
        rotated = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turns
        return torch.cat((rotated.real, rotated.imag), -1)

    return turn


def _stretch(frequency, scaling):
    """As the Llama 3.1 release writes it, by wavelength."""
    if not scaling:
        return frequency
    wavelength = 2 * math.pi / frequency
    low, high, span = (
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    if wavelength < span / high:
        return frequency
    if wavelength > span / low:
        return frequency / scaling["factor"]
    smooth = (span / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
