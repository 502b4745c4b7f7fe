"""A model as an ONNX graph, for onnxruntime and others: float32, any batch.

- "onnx" reads any number of tokens: tokens int64 [B, T], the state -> logits [B, T, V], the new state
- "onnx-step" reads one a sequence: tokens [B, 1] -> logits [B, 1, V]; what generates a text
- the state is three tensors, of all layers: att_shift [L, B, C], wkv [L, B, H, N_v, N_k] (RWKV-4: [L, B, 3, A]) and
  ffn_shift [L, B, C]; the file's metadata "heronry.state" tells what each is filled with before the first token, or,
  of a model with a tuned state, that it is an input like any other
- Vision-RWKV's reads pictures of the size it was trained with: images [B, 3, S, S] -> logits [B, classes]
- matrices are multiplied for all tokens at once; only the recurrence goes from token to token, in a Scan

torch.export takes the model apart; the recurrence, one operator there, becomes a function of the file, below.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import atomic_write
from ..models import Model, Network, State, VisionModel
from ..models.state import LayerState
from ..models.vision import MEAN, STD
from ..ops.dispatch import has_native_body

STATE = LayerState._fields
INPUTS = ("tokens", *STATE)
OUTPUTS = ("logits", *(f"{name}_out" for name in STATE))
INSIDE = 1_800_000_000  # bytes of weights that go into the file itself; ONNX ends at 2 GiB

# As in ops/wkv4/reference.py: per channel, state (a, b, p).
WKV4 = """
<domain: "heronry", opset_import: ["" : 20]>
wkv4 (log_w, k, v, u, state) => (y, final)
{
  axis = Constant <value_ints = [1]> ()
  a0, b0, p0 = Split <axis = 1, num_outputs = 3> (state)
  a_first = Squeeze (a0, axis)
  b_first = Squeeze (b0, axis)
  p_first = Squeeze (p0, axis)
  a_last, b_last, p_last, y = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1],
    body = step (float[s,c] a, float[s,c] b, float[s,c] p, float[s,c] k_t, float[s,c] v_t)
      => (float[s,c] a_next, float[s,c] b_next, float[s,c] p_next, float[s,c] y_t)
    {
      ku = Add (k_t, u)
      m = Max (p, ku)
      pm = Sub (p, m)
      old = Exp (pm)
      km = Sub (k_t, m)
      kmu = Add (km, u)
      new = Exp (kmu)
      old_a = Mul (old, a)
      new_v = Mul (new, v_t)
      above = Add (old_a, new_v)
      old_b = Mul (old, b)
      below = Add (old_b, new)
      y_t = Div (above, below)
      pw = Add (p, log_w)
      p_next = Max (pw, k_t)
      pq = Sub (p, p_next)
      pqw = Add (pq, log_w)
      kept = Exp (pqw)
      kq = Sub (k_t, p_next)
      come = Exp (kq)
      kept_a = Mul (kept, a)
      come_v = Mul (come, v_t)
      a_next = Add (kept_a, come_v)
      kept_b = Mul (kept, b)
      b_next = Add (kept_b, come)
    }
  > (a_first, b_first, p_first, k, v)
  a1 = Unsqueeze (a_last, axis)
  b1 = Unsqueeze (b_last, axis)
  p1 = Unsqueeze (p_last, axis)
  final = Concat <axis = 1> (a1, b1, p1)
}
"""

# y = (S + v k^T diag(u)) r,  S <- S diag(w) + v k^T
WKV6 = """
<domain: "heronry", opset_import: ["" : 20]>
wkv6 (r, log_w, k, v, u, state) => (y, final)
{
  row = Constant <value_ints = [-2]> ()
  u_row = Unsqueeze (u, row)
  final, y = Scan <num_scan_inputs = 4, scan_input_axes = [1, 1, 1, 1], scan_output_axes = [1],
    body = step (float[s,h,n,m] S, float[s,h,m] r_t, float[s,h,m] w_t, float[s,h,m] k_t, float[s,h,n] v_t)
      => (float[s,h,n,m] S_next, float[s,h,n] y_t)
    {
      last = Constant <value_ints = [-1]> ()
      before = Constant <value_ints = [-2]> ()
      k_row = Unsqueeze (k_t, before)
      v_col = Unsqueeze (v_t, last)
      kv = Mul (v_col, k_row)
      bonus = Mul (kv, u_row)
      seen = Add (S, bonus)
      r_col = Unsqueeze (r_t, last)
      y_col = MatMul (seen, r_col)
      y_t = Squeeze (y_col, last)
      decay = Exp (w_t)
      decay_row = Unsqueeze (decay, before)
      faded = Mul (S, decay_row)
      S_next = Add (faded, kv)
    }
  > (state, r, log_w, k, v)
}
"""

# S <- S (diag(w) + a b^T) + v k^T,  y = S r
WKV7 = """
<domain: "heronry", opset_import: ["" : 20]>
wkv7 (r, log_w, k, v, a, b, state) => (y, final)
{
  final, y = Scan <num_scan_inputs = 6, scan_input_axes = [1, 1, 1, 1, 1, 1], scan_output_axes = [1],
    body = step (float[s,h,n,m] S, float[s,h,m] r_t, float[s,h,m] w_t, float[s,h,m] k_t, float[s,h,n] v_t,
                 float[s,h,m] a_t, float[s,h,m] b_t)
      => (float[s,h,n,m] S_next, float[s,h,n] y_t)
    {
      last = Constant <value_ints = [-1]> ()
      before = Constant <value_ints = [-2]> ()
      a_col = Unsqueeze (a_t, last)
      Sa = MatMul (S, a_col)
      b_row = Unsqueeze (b_t, before)
      edit = Mul (Sa, b_row)
      decay = Exp (w_t)
      decay_row = Unsqueeze (decay, before)
      faded = Mul (S, decay_row)
      edited = Add (faded, edit)
      v_col = Unsqueeze (v_t, last)
      k_row = Unsqueeze (k_t, before)
      kv = Mul (v_col, k_row)
      S_next = Add (edited, kv)
      r_col = Unsqueeze (r_t, last)
      y_col = MatMul (S_next, r_col)
      y_t = Squeeze (y_col, last)
    }
  > (state, r, log_w, k, v, a, b)
}
"""

# As in ops/biwkv/reference.py: what is after each token, read from the last to the first, then the outputs.
BIWKV = """
<domain: "heronry", opset_import: ["" : 20]>
biwkv (log_w, k, v, u) => (y)
{
  axis = Constant <value_ints = [1]> ()
  nothing = Constant <value_float = -1e38> ()
  difference = Sub (k, k)
  zeros = ReduceSum <keepdims = 0> (difference, axis)
  empty = Add (zeros, nothing)
  c_last, d_last, q_last, c, d, q = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1],
    scan_input_directions = [1, 1], scan_output_axes = [1, 1, 1], scan_output_directions = [1, 1, 1],
    body = after (float[s,a] c_in, float[s,a] d_in, float[s,a] q_in, float[s,a] k_t, float[s,a] v_t)
      => (float[s,a] c_next, float[s,a] d_next, float[s,a] q_next, float[s,a] c_t, float[s,a] d_t, float[s,a] q_t)
    {
      c_t = Identity (c_in)
      d_t = Identity (d_in)
      q_t = Identity (q_in)
      qw = Add (q_in, log_w)
      q_next = Max (qw, k_t)
      qm = Sub (q_in, q_next)
      qmw = Add (qm, log_w)
      old = Exp (qmw)
      km = Sub (k_t, q_next)
      new = Exp (km)
      old_c = Mul (old, c_in)
      new_v = Mul (new, v_t)
      c_next = Add (old_c, new_v)
      old_d = Mul (old, d_in)
      d_next = Add (old_d, new)
    }
  > (zeros, zeros, empty, k, v)
  a_last, b_last, p_last, y = Scan <num_scan_inputs = 5, scan_input_axes = [1, 1, 1, 1, 1], scan_output_axes = [1],
    body = step (float[s,a] a_in, float[s,a] b_in, float[s,a] p_in, float[s,a] k_t, float[s,a] v_t,
                 float[s,a] c_t, float[s,a] d_t, float[s,a] q_t)
      => (float[s,a] a_next, float[s,a] b_next, float[s,a] p_next, float[s,a] y_t)
    {
      ku = Add (k_t, u)
      pq = Max (p_in, q_t)
      m = Max (pq, ku)
      pm = Sub (p_in, m)
      past = Exp (pm)
      qm = Sub (q_t, m)
      future = Exp (qm)
      km = Sub (k_t, m)
      kmu = Add (km, u)
      own = Exp (kmu)
      past_a = Mul (past, a_in)
      future_c = Mul (future, c_t)
      own_v = Mul (own, v_t)
      two = Add (past_a, future_c)
      above = Add (two, own_v)
      past_b = Mul (past, b_in)
      future_d = Mul (future, d_t)
      both = Add (past_b, future_d)
      below = Add (both, own)
      y_t = Div (above, below)
      pw = Add (p_in, log_w)
      p_next = Max (pw, k_t)
      pn = Sub (p_in, p_next)
      pnw = Add (pn, log_w)
      old = Exp (pnw)
      kn = Sub (k_t, p_next)
      new = Exp (kn)
      old_a = Mul (old, a_in)
      new_v = Mul (new, v_t)
      a_next = Add (old_a, new_v)
      old_b = Mul (old, b_in)
      b_next = Add (old_b, new)
    }
  > (zeros, zeros, empty, k, v, c, d, q)
}
"""

# RWKV-5: the same decay at every token
FUNCTIONS = {"rwkv4": WKV4, "rwkv5": WKV6, "rwkv6": WKV6, "rwkv7": WKV7, "vrwkv": BIWKV, "vrwkv6": WKV6}


class Graph(nn.Module):
    """The model with its state as plain tensors, as it is exported."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        layers = (LayerState(*parts) for parts in zip(*(x.unbind(0) for x in state), strict=True))
        logits, left = self.model(tokens, State(layers, self.model.fingerprint))
        return logits, *stacked(left)


def stacked(state: State) -> tuple[Tensor, ...]:
    """The state as the graph takes it, [L, S, ...] each."""
    return tuple(torch.stack(parts) for parts in zip(*state.layers, strict=True))


def exported(model: Model, step: bool) -> torch.export.ExportedProgram:
    """The model as torch.export sees it, for any number of sequences and, but for a step, of tokens."""
    example = torch.zeros(2, 1 if step else 5, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    # the least is what the exporter can prove; the graph itself is as good for one token or two
    tokens: dict[int, Any] = {0: batch} if step else {0: batch, 1: torch.export.Dim("tokens", min=3)}
    state = stacked(model.initial_state(2))
    shapes = {"tokens": tokens, "state": tuple({1: batch} for _ in state)}
    with torch.no_grad():
        return torch.export.export(Graph(model).eval(), (example, *state), dynamic_shapes=shapes)


def write(model: Model, path: Path, name: str, step: bool) -> None:
    """Writes an ONNX file, which is to be called `name`; the weights of a model of more than INSIDE bytes lie beside
    it, in NAME.data.

    Raises:
        InputError: the package onnx is not there, the model is packed or not in float32, or there is no C++ compiler.
    """
    _check(model, model.dtype)
    about = {"vocab_size": model.config.vocab_size, "heronry.state": _filling(model)}
    _write(model, exported(model, step), INPUTS, OUTPUTS, about, path, name)


def write_pictures(model: VisionModel, path: Path, name: str) -> None:
    """Likewise of a model of pictures: images [B, 3, S, S] of the size that it was trained with, any number of them, ->
    logits [B, classes] (without a head the pooled features [B, C])."""
    _check(model, model.pos_embed.dtype)
    if model.config.causal or getattr(model.config, "segments", None) is not None:
        raise InputError("an ONNX file is made of a model as published: neither causal nor with segments")
    size = model.config.image_size
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    about = {"image_size": size, "mean": list(MEAN), "std": list(STD)}
    _write(model, program, ("images",), ("logits",), about, path, name)


def _check(model: Network, dtype: torch.dtype) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401  looks at what was made
        import onnxscript  # noqa: F401  torch's exporter is made of it
    except ImportError as error:
        raise InputError(
            "ONNX files take the packages onnx, onnxscript and onnxruntime: pip install 'heronry[onnx]'"
        ) from error
    if model.quantization is not None or dtype != torch.float32:
        raise InputError("an ONNX file is made of a model in float32; onnxruntime's own tools pack it")
    for operator in ("biwkv", "wkv4", "wkv6", "wkv7"):
        if not has_native_body(operator):
            raise InputError(
                "torch.export sees the recurrence as one operator only where C++ compiles (g++ or clang++)"
            )


def _write(
    model: Network,
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    about: Mapping[str, Any],
    path: Path,
    name: str,
) -> None:
    """The file of an exported model, with what is told `about` it as metadata."""
    import onnx

    program = program.run_decompositions(
        {
            torch.ops.heronry.biwkv.default: _biwkv,
            torch.ops.heronry.wkv4.default: _wkv4,
            torch.ops.heronry.wkv6.default: _wkv6,
            torch.ops.heronry.wkv7.default: _wkv7,
        }
    )
    with warnings.catch_warnings():  # of the exporter, about itself
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=20, input_names=inputs, output_names=outputs
        )
    assert made is not None
    proto = made.model_proto
    proto.functions.append(onnx.parser.parse_function(FUNCTIONS[model.name]))
    if not any(opset.domain == "heronry" for opset in proto.opset_import):
        proto.opset_import.add(domain="heronry", version=1)
    for key, value in {"model": model.name, **about}.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    large = sum(p.nbytes for p in model.parameters()) > INSIDE
    if large:
        with atomic_write(path.parent / f"{name}.data") as weights:
            onnx.save_model(proto, path, save_as_external_data=True, location=weights.name)
            for tensor in onnx.external_data_helper._get_all_tensors(proto):
                if onnx.external_data_helper.uses_external_data(tensor):
                    next(entry for entry in tensor.external_data if entry.key == "location").value = f"{name}.data"
            onnx.save_model(proto, path)
    else:
        onnx.save_model(proto, path)


def logits(path: Path, tokens: Tensor, model: Model) -> Tensor:
    """What onnxruntime gives for tokens [1, T], one by one if the graph is a step's: [1, T, V]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state = [x.numpy() for x in stacked(model.initial_state())]
    single = session.get_inputs()[0].shape[1] == 1
    parts = []
    for piece in tokens.split(1 if single else tokens.shape[1], dim=1):
        told, *state = session.run(None, dict(zip(INPUTS, [piece.numpy(), *state], strict=True)))
        parts.append(torch.from_numpy(told))
    return torch.cat(parts, dim=1)


def _filling(model: Model) -> dict[str, Any]:
    """What each tensor of the state is filled with before the first token: numbers along the axis after the batch."""
    if model.config.time_state:
        return {name: "tuned" if name == "wkv" else [0.0] for name in STATE}
    if model.name == "rwkv4":
        return {
            name: model.initial_state().layers[0].wkv[0, :, 0].tolist() if name == "wkv" else [0.0] for name in STATE
        }
    return {name: [0.0] for name in STATE}


def _call(name: str, y: Tensor, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The function of the file in place of the operator, whose third output nobody reads."""
    y, final = torch.onnx.ops.symbolic_multi_out(
        f"heronry::{name}", inputs, dtypes=(y.dtype, state.dtype), shapes=(y.shape, state.shape), version=1
    )
    return y, final, state.new_empty(0)


def _biwkv(log_w, k, v, u):
    y = torch.onnx.ops.symbolic("heronry::biwkv", (log_w, k, v, u), dtype=v.dtype, shape=v.shape, version=1)
    return y, k.new_empty(0)


def _wkv4(log_w, k, v, u, state, cu, keep):
    return _call("wkv4", v, state, log_w, k, v, u, state)


def _wkv6(r, log_w, k, v, u, state, cu, keep):
    return _call("wkv6", v, state, r, log_w.expand(r.shape), k, v, u, state)


def _wkv7(r, log_w, k, v, a, b, state, cu, keep):
    return _call("wkv7", v, state, r, log_w, k, v, a, b, state)
