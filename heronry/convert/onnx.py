"""Models as ONNX graphs, for onnxruntime and others: float32, any batch size.

- "onnx" reads any number of tokens: tokens int64 [B, T], the state -> logits [B, T, V], the new state
- "onnx-step" reads one token per sequence, for generation: tokens [B, 1] -> logits [B, 1, V]
- the state is three tensors for all layers: att_shift [L, B, C], wkv [L, B, H, N_v, N_k] (RWKV-4: [L, B, 3, A]) and
  ffn_shift [L, B, C]; "heronry.state" in the metadata says what each is filled with before the first token, or "tuned"
  where the caller must supply the tuned state
- Vision-RWKV reads pictures of the size it was trained with: images [B, 3, S, S] -> logits [B, classes]
- matrix products take all tokens at once; only the recurrence goes token by token, in a Scan

torch.export traces the model; the recurrence, a single operator there, becomes one of the ONNX functions below.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
MAX_INLINE = 1_800_000_000  # bytes of weights inside the file itself; the limit of ONNX is 2 GiB

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

# As in ops/biwkv/reference.py: first the sums over later tokens, from the last to the first, then the outputs.
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
    """A model with its state as plain tensors, for torch.export."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        layers = (LayerState(*parts) for parts in zip(*(x.unbind(0) for x in state), strict=True))
        logits, new_state = self.model(tokens, State(layers, self.model.fingerprint))
        return logits, *stack_layers(new_state)


def stack_layers(state: State) -> tuple[Tensor, ...]:
    """A state of S sequences as the three inputs of the graph, each [L, S, ...]."""
    return tuple(torch.stack(parts) for parts in zip(*state.layers, strict=True))


def export(model: Model, step: bool) -> torch.export.ExportedProgram:
    """Exports a model for any number of sequences, and of tokens or (step) for one token per sequence."""
    example = torch.zeros(2, 1 if step else 5, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    # min=3 is what the exporter can prove; the graph also works for one or two tokens
    tokens: dict[int, Any] = {0: batch} if step else {0: batch, 1: torch.export.Dim("tokens", min=3)}
    state = stack_layers(model.initial_state(2))
    shapes = {"tokens": tokens, "state": tuple({1: batch} for _ in state)}
    with torch.no_grad(), _quietly():
        return torch.export.export(Graph(model).eval(), (example, *state), dynamic_shapes=shapes)


def write(model: Model, path: Path, name: str, step: bool) -> None:
    """Writes an ONNX file at `path`, to be renamed to `name`; the weights of a model of more than MAX_INLINE bytes are
    in NAME.data beside it.

    Raises:
        InputError: the package onnx is not installed, the model is quantized or not in float32, or no C++ compiler.
    """
    _check_exportable(model)
    metadata = {"vocab_size": model.config.vocab_size, "heronry.state": _initial_values(model)}
    _write(model, export(model, step), INPUTS, OUTPUTS, metadata, path, name)


def write_vision_model(model: VisionModel, path: Path, name: str) -> None:
    """As `write`, for a picture model: images [B, 3, S, S] of the size it was trained with -> logits [B, classes], or
    without a head the pooled features [B, C]."""
    _check_exportable(model)
    if model.config.causal or getattr(model.config, "segments", None) is not None:
        raise InputError("ONNX export does not support causal picture models or segments")
    size = model.config.image_size
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad(), _quietly():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    metadata = {"image_size": size, "mean": list(MEAN), "std": list(STD)}
    _write(model, program, ("images",), ("logits",), metadata, path, name)


def _check_exportable(model: Network) -> None:
    """InputError if a package is missing or the model cannot be exported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401  verifies the file
        import onnxscript  # noqa: F401  used by torch's exporter
    except ImportError as error:
        raise InputError(
            "ONNX files need the packages onnx, onnxscript and onnxruntime: pip install 'heronry[onnx]'"
        ) from error
    if model.quantization is not None or model.dtype != torch.float32:
        raise InputError("only float32 models can be exported to ONNX; onnxruntime's own tools quantize the file")
    for operator in ("biwkv", "wkv4", "wkv6", "wkv7"):
        if not has_native_body(operator):
            raise InputError(
                "ONNX export needs a C++ compiler (g++ or clang++): with it the recurrence is a single operator"
            )


def _write(
    model: Network,
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, Any],
    path: Path,
    name: str,
) -> None:
    """Writes an exported model; the values of `metadata` are strings, or become JSON."""
    import onnx

    with _quietly():
        program = program.run_decompositions(
            {
                torch.ops.heronry.biwkv.default: _biwkv,
                torch.ops.heronry.wkv4.default: _wkv4,
                torch.ops.heronry.wkv6.default: _wkv6,
                torch.ops.heronry.wkv7.default: _wkv7,
            }
        )
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=20, input_names=inputs, output_names=outputs
        )
    assert onnx_program is not None
    proto = onnx_program.model_proto
    proto.functions.append(onnx.parser.parse_function(FUNCTIONS[model.name]))
    if not any(opset.domain == "heronry" for opset in proto.opset_import):
        proto.opset_import.add(domain="heronry", version=1)
    for key, value in {"model": model.name, **metadata}.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    large = sum(p.nbytes for p in model.parameters()) > MAX_INLINE
    if large:
        with atomic_write(path.parent / f"{name}.data") as weights:
            onnx.save_model(proto, path, save_as_external_data=True, location=weights.name)
            for tensor in proto.graph.initializer:
                if onnx.external_data_helper.uses_external_data(tensor):
                    next(entry for entry in tensor.external_data if entry.key == "location").value = f"{name}.data"
            onnx.save_model(proto, path)
    else:
        onnx.save_model(proto, path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Within the block the exporter says nothing of its own deprecations and of packages that it could use."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def run_graph(path: Path, tokens: Tensor, model: Model) -> Tensor:
    """onnxruntime's logits [1, T, V] for tokens [1, T], which it reads one by one if the graph is that of a step."""
    session = _open_session(path)
    state = [x.numpy() for x in stack_layers(model.initial_state())]
    single = session.get_inputs()[0].shape[1] == 1
    parts = []
    for chunk in tokens.split(1 if single else tokens.shape[1], dim=1):
        logits, *state = session.run(None, dict(zip(INPUTS, [chunk.numpy(), *state], strict=True)))
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)


def run_vision_graph(path: Path, images: Tensor) -> Tensor:
    """onnxruntime's logits [B, classes] for images [B, 3, S, S]."""
    return torch.from_numpy(_open_session(path).run(None, {"images": images.numpy()})[0])


def _open_session(path: Path) -> Any:
    import onnxruntime  # optional, and slow to import

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _initial_values(model: Model) -> dict[str, Any]:
    """The values of each tensor of the state before the first token, along the axis after the batch; or "tuned"."""
    if model.config.time_state:
        return {name: "tuned" if name == "wkv" else [0.0] for name in STATE}
    if model.name == "rwkv4":
        return {
            name: model.initial_state().layers[0].wkv[0, :, 0].tolist() if name == "wkv" else [0.0] for name in STATE
        }
    return {name: [0.0] for name in STATE}


def _call(name: str, y: Tensor, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A call of an ONNX function in place of the operator, whose third output is not used."""
    y, final = torch.onnx.ops.symbolic_multi_out(
        f"heronry::{name}", inputs, dtypes=(y.dtype, state.dtype), shapes=(y.shape, state.shape), version=1
    )
    return y, final, state.new_empty(0)


def _biwkv(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.onnx.ops.symbolic("heronry::biwkv", (log_w, k, v, u), dtype=v.dtype, shape=v.shape, version=1)
    return y, k.new_empty(0)


def _wkv4(
    log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, cu: Any, keep: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _call("wkv4", v, state, log_w, k, v, u, state)


def _wkv6(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, cu: Any, keep: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _call("wkv6", v, state, r, log_w.expand(r.shape), k, v, u, state)


def _wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, cu: Any, keep: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _call("wkv7", v, state, r, log_w, k, v, a, b, state)
