"""How published checkpoints lay out a U-Net's weights, and the same weights under diffusers' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]
Names = dict[str, dict[str, str]]
"""Of the layers of a block, by the type of the block: diffusers' name → another layout's."""
SCORE_SDE: Names = {
    "ResnetBlock2D": {
        "norm1": "GroupNorm_0", "conv1": "Conv_0", "time_emb_proj": "Dense_0", "norm2": "GroupNorm_1",
        "conv2": "Conv_1", "conv_shortcut": "Conv_2",
    },
    "Attention": {"group_norm": "GroupNorm_0", "to_q": "NIN_0", "to_k": "NIN_1", "to_v": "NIN_2", "to_out.0": "NIN_3"},
}  # fmt: skip
GUIDED_DIFFUSION: Names = {
    "ResnetBlock2D": {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    },
    "Attention": {"group_norm": "norm", "to_qkv": "qkv", "to_out.0": "proj_out"},
}  # fmt: skip


def score_sde(checkpoint: dict[str, Any], net: nn.Module) -> State:
    """The averaged weights of a checkpoint of score_sde, whose modules are numbered in the order of their use.

    The averages are a list in the order of the parameters, which have their names in the model that is trained.

    Reference: Song et al. 2021 (arXiv 2011.13456).
    """
    keys = [key for key in checkpoint["model"] if not key.endswith("sigmas")]
    averaged = dict(zip(keys, checkpoint["ema"]["shadow_params"], strict=True))
    down, middle, up = _blocks(net)
    order = [net.time_embedding.linear_1, net.time_embedding.linear_2]  # type: ignore[union-attr]
    order += [module for group in (*down, middle, *up) for module in group] + [net.conv_norm_out, net.conv_out]
    state = _renamed(averaged, {f"module.all_modules.{i}": m for i, m in enumerate(order)}, net, SCORE_SDE)
    ends = {".W": ".weight", ".b": ".bias"}  # of layers that act on channels, stored as (inputs, outputs)
    return {
        key[:-2] + ends[key[-2:]] if key[-2:] in ends else key: value.mT if key.endswith(".W") else value
        for key, value in state.items()
    }


def guided_diffusion(checkpoint: State, net: nn.Module) -> State:
    """The weights of a checkpoint of guided-diffusion: blocks are numbered, their layers too.

    What makes queries, keys and values is one matrix there, its rows by head, then kind, then channel.

    Reference: Dhariwal and Nichol 2021 (arXiv 2105.05233).
    """
    down, middle, up = _blocks(net)
    embedding: Any = net.time_embedding
    modules = {"time_embed.0": embedding.linear_1, "time_embed.2": embedding.linear_2}
    modules |= {f"input_blocks.{i}.{j}": m for i, group in enumerate(down) for j, m in enumerate(group)}
    modules |= {f"middle_block.{j}": m for j, m in enumerate(middle)}
    modules |= {f"output_blocks.{i}.{j}": m for i, group in enumerate(up) for j, m in enumerate(group)}
    modules |= {"out.0": net.conv_norm_out, "out.2": net.conv_out}
    renamed = _renamed(checkpoint, modules, net, GUIDED_DIFFUSION)
    state: State = {}
    heads = {name: module.heads for name, module in net.named_modules() if type(module).__name__ == "Attention"}
    for key, value in renamed.items():
        name, _, rest = key.rpartition(".to_qkv.")
        if name:
            rows = value.flatten(1) if value.ndim > 1 else value
            parts = rows.reshape(heads[name], 3, -1, *rows.shape[1:]).transpose(0, 1)
            state |= {f"{name}.to_{kind}.{rest}": p.flatten(0, 1) for kind, p in zip("qkv", parts, strict=True)}
        else:
            state[key] = value.flatten(1) if ".to_out.0.weight" in key else value
    return state


def diffusers(checkpoint: State, net: nn.Module) -> State:
    """The weights of a checkpoint of diffusers, under today's names of the layers of attention."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    state = checkpoint
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


LAYOUTS: dict[str, Callable[[Any, nn.Module], State]] = {
    "score_sde": score_sde,
    "guided-diffusion": guided_diffusion,
    "diffusers": diffusers,
}
"""By the name that a card gives."""


def _blocks(net: Any) -> tuple[list[list[nn.Module]], list[nn.Module], list[list[nn.Module]]]:
    """The blocks of a U-Net on the way down, in the middle and up, in the order of their use.

    On the way down each is followed by a skip connection; on the way up each begins with the end of one.
    """
    down: list[list[nn.Module]] = [[net.conv_in]]
    for level in net.down_blocks:
        down += _pairs(level) + [[sampler] for sampler in level.downsamplers or ()]
    middle = [net.mid_block.resnets[0], net.mid_block.attentions[0], net.mid_block.resnets[1]]
    up: list[list[nn.Module]] = []
    for level in net.up_blocks:
        up += _pairs(level)
        up[-1] += list(level.upsamplers or ())
    return down, middle, up


def _pairs(level: Any) -> list[list[nn.Module]]:
    """The residual blocks of a level, each with its attention if it has one."""
    attentions = getattr(level, "attentions", None) or [nn.Identity()] * len(level.resnets)
    pairs = zip(level.resnets, attentions, strict=True)
    return [[m for m in pair if not isinstance(m, nn.Identity)] for pair in pairs]


def _renamed(state: State, modules: dict[str, Any], net: nn.Module, names: Names) -> State:
    """The tensors of a state under diffusers' names.

    Args:
        state: a state by the names of another layout.
        modules: the network's modules by their names there.
        net: the network.
        names: what that layout calls the layers of a module; modules of other types are layers.

    Raises:
        KeyError: for a tensor that belongs to none of these modules.
    """
    ours = {module: name for name, module in net.named_modules()}
    layers = {}
    for theirs, module in modules.items():
        for layer, there in names.get(type(module).__name__, {"": ""}).items():
            layers[f"{theirs}.{there}".rstrip(".")] = f"{ours[module]}.{layer}".rstrip(".")
    split = ((*key.rpartition("."), value) for key, value in state.items())
    return {f"{layers[layer]}.{end}": value for layer, _, end, value in split}
