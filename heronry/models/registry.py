"""The model classes by name, and the class of a checkpoint by its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import InputError
from .base import Model, Network
from .rwkv4 import RWKV4
from .rwkv5 import RWKV5
from .rwkv6 import RWKV6
from .rwkv7 import RWKV7
from .vision import VRWKV, VRWKV6, VisionModel

MODELS: dict[str, type[Model]] = {cls.name: cls for cls in (RWKV4, RWKV5, RWKV6, RWKV7)}
VISION_MODELS: dict[str, type[VisionModel]] = {cls.name: cls for cls in (VRWKV, VRWKV6)}

# Parts of keys by which unsupported relatives are recognised, the most specific first. Loaded as the nearest supported
# model such a file would silently give wrong numbers.
ADAPTER = "an adapter without its model; give the model, and this with --adapter, or to `heronry merge`"
UNSUPPORTED = (
    (("moba.",), "RWKV-X, RWKV-7 with layers of sparse attention (moba), which is not supported"),
    ((".att.k0", ".r_norm.", ".ln_k."), "HRWKV (hxa079), RWKV-7 with attention layers, which is not supported"),
    ((".down.weight",), "cxa076, RWKV-7 with a Qwen channel mix, which is not supported"),
    (("rosa",), "RWKV-8 with ROSA, which is not supported"),
    (("ffn.enn.",), "RWKV-8 rc00, which is not supported"),
    ((".qkv.kk.", ".qkv.ennk."), "a hybrid of RWKV-8 rc00 with attention, which is not supported"),
    (
        ("s_emb.0", "k_emb.0"),
        "an RWKV-7a or 7b with merged tables (for phones), which is not supported; use the original",
    ),
    ((".miss_block", ".disha", ".bone", ".weight.D", ".lora_A", ".lora_B"), ADAPTER),
    ((".weight.qstate", ".weight.quant_state"), "quantized by bitsandbytes, which is not supported; use the original"),
    ((".qweight",), "quantized for sglang or another server, which is not supported; use the original"),
    (("self_attn.w0",), "QRWKV7 (RADLADS), a converted Qwen2, which is not supported"),
    (("self_attn.time_maa_x",), "QRWKV6, a converted Qwen2, which is not supported"),
    (("time_maa_rkvw_",), "the experiment RWKV-6b or 6c, which is not supported"),
    (("att.gate_w1", "att.gate_w2"), "the experiment RWKV-6a, which is not supported"),
    (("ffnPre.",), "an experiment with a channel mix in place of the first time mix (ffnPre), which is not supported"),
    (("head_q.", "head_k."), "an experiment with head_qk, which is not supported"),
    (("tiny_q", "tiny_k", "tiny_v", "tiny_ln"), "an experiment with tiny attention, which is not supported"),
    (("pos_emb_",), "an experiment with position embeddings, which is not supported"),
)


def detect(shapes: Mapping[str, Sequence[int]]) -> type[Network]:
    """The class of a checkpoint with these tensors, in any order; InputError if there is none."""
    if "patch_embed.projection.weight" in shapes:
        return VRWKV6 if "layers.0.att.time_maa_x" in shapes else VRWKV
    for parts, what in UNSUPPORTED:
        if any(part in key for key in shapes for part in parts):
            raise InputError(f"this checkpoint is {what}")
    if "blocks.0.att.r_k" in shapes:
        return RWKV7
    if "blocks.0.att.time_maa_x" in shapes:
        return RWKV6
    if "blocks.0.att.time_decay" in shapes:
        return RWKV5 if "blocks.0.att.ln_x.weight" in shapes else RWKV4
    if shapes and all(key.endswith(".att.time_state") for key in shapes):
        raise InputError(
            "a tuned initial state without its model; give the model, and this to `heronry generate --state`"
        )
    keys = ", ".join(list(shapes)[:3]) + (", ..." if len(shapes) > 3 else "")
    raise InputError(f"not an RWKV checkpoint (it holds {keys or 'nothing'})")
