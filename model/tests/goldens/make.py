#!/usr/bin/env python3
"""Golden gradients of the context-frozen step, from transformers on the CPU in f32.

usage: make.py [--out DIR]                  writes the committed cases into DIR (default: this folder)
       make.py --random SEED --out DIR      writes fresh random models, two of each family, as a live check

The committed files were made with torch 2.15.0 and transformers 5.23.0 (also in each expected.safetensors'
metadata). Needs torch, transformers and safetensors. Nothing is downloaded: weights are random, from fixed seeds.

A case is a folder:
  config.json, model.safetensors   as save_pretrained writes them, f32
  config.legacy.json               the same configuration in the older form that most published models have: torch_dtype,
                                   rope_theta and rope_scaling at the top level, no layer_types
  examples.jsonl                   one {"context_ids": [c_0..c_{k-1}], "decision_ids": [d_0..d_{j-1}]} a line
  expected.safetensors             of example i: {i}.loss () and {i}.logits (j, V), and for each parameter the gradient
                                   {i}.{Hugging Face name}, all f32. A tied embedding has one gradient, the head's and
                                   the input rows' together, under model.embed_tokens.weight. Experts have one each, as they
                                   have files' names each; it is zero where no token chose the expert.

The gradient: c_0..c_{k-2} run without gradients and leave keys and values, which are constants from there on. The
window c_{k-1}, d_0..d_{j-2} runs on top of them with gradients and predicts d_0..d_{j-1}; the loss is the mean cross
entropy over the j decision tokens.

Why the files can be trusted: every example is computed a second time by a path that shares neither transformers' cache
nor its masks. One forward pass over the whole sequence, with an attention written below that builds the causal and
sliding mask itself and detaches keys and values of the frozen positions, must give the same logits, loss and gradients.
Experts are computed there for every token, whoever chose them. And the plain gradient, nothing detached, must differ: a reference that froze nothing would not pass.
"""
import argparse
import contextlib
import json
import os
import pathlib
import random
import sys
import zlib
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Cache
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts, Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

# Relative to the largest logit, and ||a - b|| / ||b|| of each gradient: the two paths differ only in the order of f32 sums.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5
# A recurrent layer's output is normalised over each head, however small: where queries and keys are nearly orthogonal, rounding
# is magnified, and transformers' own f32 is off by up to 4e-4; sharp attention does the same to keys, less. Such weights are drawn
# again, so often at most.
DRAWS_MAX = 20

# What each case is there for is in the part of its name after the family.
YARN = dict(rope_type="yarn", rope_theta=20.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
COMMITTED = {
    # head_dim is neither hidden_size / num_attention_heads nor a multiple of a vector register
    "qwen3_tied": dict(
        model_type="qwen3", hidden_size=33, intermediate_size=45, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=24, tie_word_embeddings=True, rope_parameters=DEFAULT),
    # the longest context is longer than original_max_position_embeddings; attention_factor is the default; rope_theta is
    # so small that the ramp between kept and divided frequencies is several frequencies long
    "qwen3_untied_yarn": dict(
        model_type="qwen3", hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, tie_word_embeddings=False, max_position_embeddings=128, rope_parameters=YARN),
    # rope_theta and the original length put frequencies below, between and above the two wavelengths of llama3
    "llama_llama3rope": dict(
        model_type="llama", hidden_size=40, intermediate_size=38, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
    "llama_linear_bias": dict(
        model_type="llama", hidden_size=36, intermediate_size=34, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "mistral_sliding": dict(
        model_type="mistral", hidden_size=35, intermediate_size=46, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, sliding_window=7, rope_parameters=DEFAULT),
    "qwen2_tied": dict(
        model_type="qwen2", hidden_size=42, intermediate_size=33, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=dict(DEFAULT, rope_theta=1e6)),
    # layer 0 attends to everything, layers 1 and 2 to a window
    "qwen2_sliding": dict(
        model_type="qwen2", hidden_size=32, intermediate_size=34, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1,
        rope_parameters=DEFAULT),
    # three recurrent layers and one with attention; fewer key heads than value heads, of other sizes; a quarter of a head rotates
    "qwen35_untied": dict(
        model_type="qwen3_5_text", hidden_size=34, intermediate_size=41, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
        linear_value_head_dim=10, linear_conv_kernel_dim=4, tie_word_embeddings=False, max_position_embeddings=128,
        rope_parameters=dict(DEFAULT, partial_rotary_factor=0.25)),
    # experts in layers 0 and 2; fewer tokens than experts in some window, so that some are chosen by none
    "qwen3_moe": dict(
        model_type="qwen3_moe", hidden_size=30, intermediate_size=26, moe_intermediate_size=11, num_experts=9, num_experts_per_tok=2,
        norm_topk_prob=False, mlp_only_layers=[1], num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=12,
        tie_word_embeddings=True, rope_parameters=DEFAULT),
    # an expert that all tokens share besides
    "qwen35_moe": dict(
        model_type="qwen3_5_moe_text", hidden_size=28, moe_intermediate_size=9, shared_expert_intermediate_size=13, num_experts=5,
        num_experts_per_tok=3, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=7,
        linear_value_head_dim=6, linear_conv_kernel_dim=4, tie_word_embeddings=False,
        rope_parameters=dict(DEFAULT, partial_rotary_factor=0.25)),
    # the text part of a multi-modal model, which ends with a recurrent layer
    "qwen35_multimodal": dict(
        model_type="qwen3_5", tie_word_embeddings=True,
        text_config=dict(
            hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=1,
            linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=5, linear_conv_kernel_dim=3,
            rope_parameters=dict(DEFAULT, partial_rotary_factor=0.5)),
        vision_config=dict(
            depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, spatial_merge_size=1, temporal_patch_size=1,
            num_position_embeddings=4)),
}
# (context, decision) lengths of the examples. With a window of 7 or 5: beyond it in the context, in the decision, and a
# context that ends inside it. The context of one token has no prefill at all.
LENGTHS = [(19, 9), (5, 3), (1, 11)]
LENGTHS_OF = {
    "qwen3_untied_yarn": [(41, 9), (5, 3), (1, 11)],
    # Several chunks of the parallel form that transformers runs, less than the convolution's width, and a window of one token.
    "qwen35_untied": [(83, 9), (3, 5), (1, 11), (20, 1)],
}


def random_case(rng, family):
    """Configuration arguments of a model of `family`, its sizes and switches drawn from `rng`."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    args = dict(
        model_type=family, num_key_value_heads=kv_heads, num_attention_heads=heads, num_hidden_layers=rng.randint(1, 4),
        hidden_size=heads * 2 * rng.randint(4, 8), intermediate_size=rng.randint(20, 90),
        rms_norm_eps=rng.choice([1e-6, 1e-5]), tie_word_embeddings=rng.random() < 0.5,
        rope_parameters=rng.choice([
            dict(DEFAULT, rope_theta=rng.choice([1e4, 1e6])),
            dict(LINEAR, factor=rng.uniform(1.5, 8)),
            dict(LLAMA3, factor=rng.uniform(2, 16), original_max_position_embeddings=rng.choice([16, 64])),
            dict(YARN, factor=rng.uniform(2, 8), rope_theta=rng.choice([20.0, 1e4]),
                 original_max_position_embeddings=rng.choice([8, 16]), beta_fast=rng.choice([8.0, 32.0])),
            dict(YARN, factor=4.0, attention_factor=rng.uniform(0.8, 1.3)),
        ]))
    if family.startswith("qwen3_5"):
        heads_of_keys = rng.choice([1, 2, 3])
        args |= dict(
            head_dim=8 * rng.randint(1, 3), linear_num_key_heads=heads_of_keys,
            linear_num_value_heads=heads_of_keys * rng.choice([1, 2, 3]), linear_key_head_dim=rng.randint(3, 20),
            linear_value_head_dim=rng.randint(3, 40), linear_conv_kernel_dim=rng.randint(2, 5), max_position_embeddings=256,
            rope_parameters=dict(DEFAULT, rope_theta=rng.choice([1e4, 1e7]), partial_rotary_factor=rng.choice([0.25, 0.5, 1.0])),
            layer_types=[rng.choice(["linear_attention", "full_attention"]) for _ in range(args["num_hidden_layers"])])
        args["layer_types"][rng.randrange(args["num_hidden_layers"])] = "full_attention"    # transformers wants one
        if "moe" in family:
            args |= random_experts(rng, True) | dict(shared_expert_intermediate_size=rng.randint(4, 30))
            del args["intermediate_size"]
        if family in ("qwen3_5", "qwen3_5_moe"):
            tied = args.pop("tie_word_embeddings")
            del args["model_type"]
            vision = dict(COMMITTED["qwen35_multimodal"]["vision_config"])
            args = dict(model_type=family, tie_word_embeddings=tied, text_config=args, vision_config=vision)
        return args
    if family != "qwen2":    # qwen2 has no head_dim of its own
        args["head_dim"] = 2 * rng.randint(3, 12)
    if family == "qwen3_moe":
        normalised = rng.random() < 0.5
        args |= random_experts(rng, normalised) | dict(norm_topk_prob=normalised, decoder_sparse_step=rng.choice([1, 1, 2]))
    if family in ("llama", "qwen3", "qwen3_moe"):
        args["attention_bias"] = rng.random() < 0.5
    if family == "llama":
        args["mlp_bias"] = rng.random() < 0.5
    if family == "mistral":
        args["sliding_window"] = rng.choice([None, rng.randint(3, 12)])
    if family in ("qwen2", "qwen3") and rng.random() < 0.5:
        args |= dict(use_sliding_window=True, sliding_window=rng.randint(3, 12),
                     max_window_layers=rng.randint(0, args["num_hidden_layers"]))
    return args


def random_experts(rng, normalised):
    # One expert whose share is divided by itself: the router's gradient would be zero but for rounding.
    least = 2 if normalised else 1
    experts = rng.randint(least, 12)
    return dict(num_experts=experts, num_experts_per_tok=rng.randint(least, experts), moe_intermediate_size=rng.randint(4, 30))


def random_cases(seed):
    """Name -> (configuration arguments, lengths of the examples, shard size): of each family one model in one file and
    one in several with an index."""
    rng = random.Random(seed)
    cases = {}
    for family in ("llama", "mistral", "qwen2", "qwen3", "qwen3_5_text", "qwen3_5", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe"):
        for n in range(2):
            lengths = [(rng.randint(12, 40), rng.randint(2, 20)), (rng.randint(2, 9), rng.randint(1, 6)), (1, rng.randint(2, 14))]
            if family.startswith("qwen3_5"):
                lengths[0] = (rng.randint(60, 150), rng.randint(2, 70))
            cases[f"{family}_{seed}_{n}"] = (random_case(rng, family), lengths, ["1GB", "20KB"][n])
    return cases


def build_model(args, seed):
    """A model in f32 with every parameter drawn large enough that no gradient is trivial."""
    common = dict(vocab_size=97, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    args = dict(args)
    model_type = args.pop("model_type")
    if "text_config" in args:
        args["text_config"] = dict(common, **args["text_config"], tie_word_embeddings=args["tie_word_embeddings"])
        args["vision_config"] = dict(args["vision_config"], out_hidden_size=args["text_config"]["hidden_size"])
        kind = AutoModelForImageTextToText
    else:
        args, kind = dict(common, **args), AutoModelForCausalLM
    config = AutoConfig.for_model(model_type, **args)
    config._attn_implementation = config._experts_implementation = "eager"
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():    # a tied head is not listed twice
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                # Qwen3.5's norms add 1 themselves, but for that inside a recurrent layer.
                added = model_type.startswith("qwen3_5") and "linear_attn" not in name
                p.copy_((0 if added else 1) + 0.3 * noise)
            elif name.endswith("A_log"):
                p.copy_(noise - 1.5)    # so that a state lives for more than a few tokens
            elif name.endswith("conv1d.weight"):
                p.copy_(0.5 * noise)
            else:
                p.copy_((0.3 if p.ndim == 1 else 0.2) * noise)
    return model


def collect(model, logits, decision):
    """Loss and gradients, by Hugging Face name, of `logits` (j, V) against the j decision tokens."""
    loss = F.cross_entropy(logits, decision)
    model.zero_grad(set_to_none=True)
    loss.backward()
    # A vision tower gets none, and the unchosen experts' are zeros.
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name in [name for name in gradients if ".experts." in name]:
        gradients |= apart(name, gradients.pop(name))
    return dict(loss=loss.detach(), logits=logits.detach().clone(), gradients=gradients)


def apart(name, stacked):
    """The experts' matrices of a stack, by the names that they have in the files."""
    module, stack = name.rsplit(".", 1)
    matrices = {}
    for expert, matrix in enumerate(stacked):
        parts = zip(("gate", "up"), matrix.chunk(2)) if stack == "gate_up_proj" else [("down", matrix)]
        matrices |= {f"{module}.{expert}.{part}_proj.weight": rows.clone() for part, rows in parts}
    return matrices


def cached_step(model, context, decision):
    """The reference: prefill without gradients into transformers' cache, then the window on top of it."""
    cache = None
    if len(context) > 1:
        with torch.no_grad():
            cache = model(input_ids=context[None, :-1], use_cache=True).past_key_values
    window = torch.cat([context[-1:], decision[:-1]])
    # The state after the window is wanted by nobody, and writing it over the one before would spoil the backward pass.
    with mock.patch.object(Cache, "update_recurrent_state", lambda *_, **__: None):
        logits = model(input_ids=window[None], past_key_values=cache, use_cache=cache is not None).logits[0]
    return collect(model, logits, decision)


FROZEN = 0    # leading positions whose keys and values plain_attention detaches


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, **_):
    """Attention from its definition, (1, heads, T, head_dim), over a whole sequence; ignores the mask that it is given."""
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.cat([t[:, :, :FROZEN].detach(), t[:, :, FROZEN:]], 2).repeat_interleave(groups, 1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


def plain_delta_net(self, hidden_states, **_):
    """A Gated DeltaNet from its definition, token by token over a whole sequence; of the frozen positions, the inputs of the
    convolution and the state that they leave are constants."""
    frozen, (_, length, _) = FROZEN, hidden_states.shape
    x = hidden_states[0]
    qkv, z, b, a = (layer(x) for layer in (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a))
    width = self.conv_kernel_size
    qkv = torch.cat([torch.zeros(width - 1, qkv.shape[1]), qkv[:frozen].detach(), qkv[frozen:]])
    weight = self.conv1d.weight[:, 0]
    mixed = F.silu(sum(qkv[j:j + length] * weight[:, j] for j in range(width)))
    q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
    groups = self.num_v_heads // self.num_k_heads
    q, k = (t.view(length, self.num_k_heads, -1).repeat_interleave(groups, 1) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    v, z = v.view(length, self.num_v_heads, -1), z.view(length, self.num_v_heads, -1)
    decay = torch.exp(-self.A_log.exp() * F.softplus(a + self.dt_bias))
    beta, state, out = b.sigmoid(), torch.zeros(self.num_v_heads, self.head_k_dim, self.head_v_dim), []
    for i in range(length):
        if i == frozen:
            state = state.detach()
        state = state * decay[i, :, None, None]
        delta = (v[i] - torch.einsum("hkv,hk->hv", state, k[i])) * beta[i, :, None]
        state = state + torch.einsum("hk,hv->hkv", k[i], delta)
        out.append(torch.einsum("hkv,hk->hv", state, q[i]) * self.head_k_dim ** -0.5)
    out = torch.stack(out)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.layer_norm_epsilon) * self.norm.weight * F.silu(z)
    return self.out_proj(out.reshape(1, length, -1))


def plain_experts(self, hidden_states, top_k_index, top_k_weights):
    """Every expert on every token, times the share that the token gives it: nothing, if it did not choose it."""
    shares = torch.zeros(len(hidden_states), self.num_experts).scatter(1, top_k_index, top_k_weights)
    gate, up = torch.einsum("th,ejh->etj", hidden_states, self.gate_up_proj).chunk(2, -1)
    return torch.einsum("etj,ehj,te->th", F.silu(gate) * up, self.down_proj, shares)


PLAIN = [(Qwen3_5GatedDeltaNet, plain_delta_net), (Qwen3_5MoeGatedDeltaNet, plain_delta_net), (Qwen3MoeExperts, plain_experts),
         (Qwen3_5MoeExperts, plain_experts)]


def whole_sequence_step(model, context, decision, frozen):
    """The same step in one pass without a cache; keys and values of the first `frozen` positions are constants."""
    global FROZEN
    text = model.config.get_text_config()
    FROZEN, text._attn_implementation = frozen, "plain"
    sequence = torch.cat([context, decision[:-1]])
    with contextlib.ExitStack() as patches:
        for kind, forward in PLAIN:
            patches.enter_context(mock.patch.object(kind, "forward", forward))
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, len(context) - 1:]
    text._attn_implementation = "eager"
    return collect(model, logits, decision)


def gradient_errors(got, want):
    """Tensor name -> ||got - want|| / ||want||. A gradient that is zero but for rounding (one key: the softmax is 1,
    whatever q and k are) is measured against a millionth of the whole model's gradient instead."""
    floor = 1e-6 * torch.stack([g.norm() for g in want["gradients"].values()]).norm()
    return {name: ((got["gradients"][name] - g).norm() / max(g.norm(), floor)).item() for name, g in want["gradients"].items()}


def make_examples(lengths, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, vocab_size, (n,), generator=generator) for n in pair) for pair in lengths]


def legacy_config(config):
    """config.json as it was written before rope_parameters, dtype and layer_types; checked to be read as the same."""
    if "text_config" in config:
        return dict(config, text_config=legacy_config(config["text_config"]))
    # Which layers of a hybrid model are recurrent follows from no other key.
    dropped = {"rope_parameters", "dtype"} | (set() if config["model_type"].startswith("qwen3_5") else {"layer_types"})
    legacy = {k: v for k, v in config.items() if k not in dropped}
    if "num_local_experts" in legacy:
        legacy["num_experts"] = legacy.pop("num_local_experts")
    rope = dict(config["rope_parameters"])
    legacy["torch_dtype"] = config["dtype"]
    legacy["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    legacy["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    reread = AutoConfig.for_model(**legacy).to_dict()
    for key in ("rope_parameters", "layer_types"):
        assert reread.get(key) == config.get(key), f"the older form's {key} reads as {reread.get(key)}"
    return legacy


def write_case(folder, args, lengths, shard_size, seed, draw=1):
    """Make one case in `folder` and check it. Returns its row of the table."""
    model = build_model(args, seed)
    examples = make_examples(lengths, model.config.get_text_config().vocab_size, seed + 1)
    tensors, logits_error, gradient_error, worst, unfrozen = {}, 0.0, 0.0, "", 0.0
    for i, (context, decision) in enumerate(examples):
        step = cached_step(model, context, decision)
        twin = whole_sequence_step(model, context, decision, frozen=len(context) - 1)
        logits_error = max(logits_error, ((step["logits"] - twin["logits"]).abs().max() / step["logits"].abs().max()).item())
        name, error = max(gradient_errors(step, twin).items(), key=lambda e: e[1])
        if error >= gradient_error:
            gradient_error, worst = error, f"{i}.{name}"
        if len(context) > 1:
            unfrozen = max(unfrozen, *gradient_errors(whole_sequence_step(model, context, decision, frozen=0), step).values())
        tensors |= {f"{i}.loss": step["loss"], f"{i}.logits": step["logits"]}
        tensors |= {f"{i}.{name}": gradient for name, gradient in step["gradients"].items()}
    case = folder.name
    assert logits_error <= LOGITS_TOLERANCE, f"{case}: logits with and without the cache differ by {logits_error:.1e}"
    if gradient_error > GRADIENT_TOLERANCE and draw < DRAWS_MAX:
        return write_case(folder, args, lengths, shard_size, seed + 1, draw + 1)
    assert gradient_error <= GRADIENT_TOLERANCE, f"{case}: {worst} with and without the cache differ by {gradient_error:.1e}"
    assert unfrozen > 0.01, f"{case}: freezing the context changed no gradient by more than {unfrozen:.1e}"

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    legacy = legacy_config(json.loads((folder / "config.json").read_text()))
    (folder / "config.legacy.json").write_text(json.dumps(legacy, indent=2) + "\n")
    with (folder / "examples.jsonl").open("w") as f:
        for context, decision in examples:
            f.write(json.dumps(dict(context_ids=context.tolist(), decision_ids=decision.tolist())) + "\n")
    # One entry only: safetensors writes several in no fixed order, and the file should come out the same every time.
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}, seed {seed}"
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors", metadata={"made_with": made_with})
    size = sum(f.stat().st_size for f in folder.iterdir())
    losses = " ".join(f"{tensors[f'{i}.loss'].item():.4f}" for i in range(len(examples)))
    return case, sum(p.numel() for p in model.parameters()), size, losses, logits_error, gradient_error, worst, unfrozen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder for the cases")
    parser.add_argument("--random", type=int, metavar="SEED", help="fresh random models instead of the committed cases")
    options = parser.parse_args()
    if options.random is not None and options.out == parser.get_default("out"):
        parser.error("--random wants --out: random models do not belong among the committed cases")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)    # the order of sums, and so the last bits, depend on the number of threads
    if options.random is None:
        cases = {name: (args, LENGTHS_OF.get(name, LENGTHS), "1GB") for name, args in COMMITTED.items()}
    else:
        cases = random_cases(options.random)
    table = [write_case(options.out / name, *case, zlib.crc32(name.encode())) for name, case in cases.items()]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; errors: with the cache against without")
    print(f"{'case':22}{'parameters':>11}{'bytes':>9}  {'logits':>8}{'gradient':>10}{'unfrozen':>10}  losses; worst gradient")
    for case, parameters, size, losses, logits_error, gradient_error, worst, unfrozen in table:
        print(f"{case:22}{parameters:11}{size:9}  {logits_error:8.1e}{gradient_error:10.1e}{unfrozen:10.2f}  {losses}; {worst}")
    print(f"{sum(row[2] for row in table)} bytes in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
