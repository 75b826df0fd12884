"""Which norms feed which linear layers in the models that people use, and which norms must be left alone."""

import pytest
import timm
import torch

from lightning_quant.graph import Modulation, NormPair, Rows, trace


def swin(**sizes):
    return timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 1), num_heads=(2, 2), num_classes=5, **sizes
    )


def graph_of(net, *inputs, **keywords):
    net.eval()
    return trace(net, lambda: net(*inputs, **keywords))


def pairs_of(graph):
    return {pair.norm: pair.linears for pair in graph.pairs}


SWIN_BLOCKS = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
SWIN_PAIRS = {f"{block}.norm2": (f"{block}.mlp.fc1",) for block in SWIN_BLOCKS} | {
    "layers.1.downsample.norm": ("layers.1.downsample.reduction",)
}


def test_swin_whose_windows_fit_is_padded_by_nothing_and_keeps_its_pairs():
    graph = graph_of(swin(img_size=56), torch.randn(2, 3, 56, 56))  # 14 and 7 patches, windows of 7
    assert pairs_of(graph) == SWIN_PAIRS | {f"{block}.norm1": (f"{block}.attn.qkv",) for block in SWIN_BLOCKS}
    assert graph.unfoldable.keys() == {"patch_embed.norm", "norm"}


def test_swin_whose_windows_do_not_fit_is_padded_and_its_norms_are_refused_by_name():
    """The padding is 0 behind the norm: no shift can be folded away there."""
    graph = graph_of(swin(img_size=48, window_size=5), torch.randn(2, 3, 48, 48))  # 12 and 6 patches
    assert pairs_of(graph) == SWIN_PAIRS
    for block in SWIN_BLOCKS:
        assert graph.unfoldable[f"{block}.norm1"] == "it is also read by `pad`"


def test_gpt2_has_pairs_through_conv1d_but_none_for_the_head_that_shares_its_weight():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    graph = graph_of(transformers.GPT2LMHeadModel(config), torch.randint(50, (2, 7)))
    assert pairs_of(graph) == {
        f"transformer.h.{i}.{norm}": (f"transformer.h.{i}.{linear}",)
        for i in range(2)
        for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc"))
    }
    assert graph.unfoldable == {"transformer.ln_f": "`lm_head` also reads something else, or shares its weight"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_norm_of_bert_is_read_by_the_residual_too_and_is_never_folded(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        intermediate_size=64,
        attn_implementation=attention,
    )
    net = transformers.BertModel(config)
    graph = graph_of(net, torch.randint(50, (2, 7)))
    norms = {name for name, module in net.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert len(norms) == 5 and graph.pairs == [] and graph.unfoldable.keys() == norms
    last = "encoder.layer.1.output.LayerNorm"
    assert graph.unfoldable.pop(last) == "it is also read by the caller: it is an output of the model"
    assert set(graph.unfoldable.values()) == {"it is also read by `add`"}


def test_the_norms_of_dit_are_modulated_by_linear_layers_that_take_the_fold():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2},
        **{"sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 5, "norm_num_groups": 1},
    )
    inputs = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([0, 4])}
    graph = graph_of(net, torch.randn(2, 1, 8, 8), **inputs)

    def rows(linear, piece):
        return Rows(linear, 16 * piece, 16 * piece + 16)

    want = []
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        linear = f"{block}.norm1.linear"  # shift, scale and gate of the attention, then of the MLP
        queries = tuple(f"{block}.attn1.to_{operand}" for operand in "qkv")
        want.append(NormPair(f"{block}.norm1.norm", queries, Modulation(rows(linear, 1), rows(linear, 0))))
        mlp = (f"{block}.ff.net.0.proj",)
        want.append(NormPair(f"{block}.norm3", mlp, Modulation(rows(linear, 4), rows(linear, 3))))
    want.append(NormPair("norm_out", ("proj_out_2",), Modulation(rows("proj_out_1", 1), rows("proj_out_1", 0))))
    assert graph.pairs == want and graph.unfoldable == {}


def test_llama_has_norms_that_no_layernorm_method_knows():
    """RMSNorm is no call of ``layer_norm``: nothing is folded, and nothing is claimed about it either."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))
    graph = graph_of(net, torch.randint(50, (2, 7)))
    assert graph.pairs == [] and graph.unfoldable == {}
    assert set(graph.attention) == {f"model.layers.{i}.self_attn" for i in range(2)}
