"""The base classes: `Network` of all models, of text or of pictures; `Model` of the generations of RWKV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, show
from ..ops.dispatch import assume_constant_result, has_tangents
from ..ops.packing import boundaries
from . import native_step
from .fingerprint import compute_fingerprint, sample_all
from .layers import Linear, PackedLinear
from .sequence_parallel import Boundaries, SequenceShard
from .state import Context, LayerState, State

if TYPE_CHECKING:
    from typing_extensions import Self


class Network(nn.Module):
    """What checkpoints and training need from any model, of text or of pictures.

    A subclass defines `forward`, `init_weights` and `param_groups`.
    """

    name: ClassVar[str]  # "rwkv7"
    Config: ClassVar[Any]
    ignored_keys: ClassVar[tuple[str, ...]] = ()  # keys that checkpoints carry and the model never reads
    config_only: ClassVar[tuple[str, ...]] = ()  # settings that the tensors of a checkpoint do not show
    quantization: str | None = None  # "int8" or "int4" once its matrices are packed
    gradient_checkpointing = False  # keep only the blocks' inputs and recompute the rest in the backward pass
    state_tuning = False  # only the initial state is trained, see `Model.tune_state`
    adapted_from: str | None = None  # with adapters beside its matrices: the fingerprint it had without (adapters/)
    sharded = False  # every process holds a piece of each parameter, and all must call the model together
    config: Any
    init_weights: Callable[[], None]
    param_groups: Callable[[float, float], list[dict[str, Any]]]  # lr, weight_decay

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self._fingerprint: str | None = None

    @property
    def generation(self) -> str:
        """Its name with the variant, where there are several: "rwkv5 5.2", "rwkv7a"."""
        return f"{self.name} {getattr(self.config, 'version', '')}".strip()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def check_device(self, what: str, x: Tensor) -> None:
        """InputError unless `x`, called `what` in the message, is where the weights are."""
        if x.device != self.device:
            raise InputError(f"{what} on {x.device}, but the model is on {self.device}: move one of them with .to()")

    def check_has_weights(self) -> None:
        """InputError for a model on the meta device, which has shapes but no numbers."""
        if self.device.type == "meta":
            raise InputError("the model is on the device meta, so it has no weights; load it on another")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not packed: embeddings, norms and vectors, and the matrices without quantization."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of weights, tied ones counted once; a packed matrix counts as out_features * in_features.

        Args:
            only_trainable: counts only parameters with requires_grad; packed matrices have none.
        """
        if only_trainable:
            return sum(p.numel() for p in self.parameters() if p.requires_grad)
        packed = (m for m in self.modules() if isinstance(m, PackedLinear))
        in_packed = sum(m.in_features * m.out_features for m in packed)
        return in_packed + sum(p.numel() for p in self.parameters())

    @property
    def fingerprint(self) -> str:
        """Identifies the model that a state belongs to: 16 hex digits for the configuration, 16 for the weights.

        Computed on first use and cached: code that changes weights in place calls `invalidate_fingerprint`.
        """
        if self._fingerprint is None:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def set_fingerprint(self, fingerprint: str | None) -> None:
        """Caches a fingerprint that was computed elsewhere, as for packed weights that of the original ones."""
        self._fingerprint = fingerprint

    def invalidate_fingerprint(self) -> None:
        """Drops the cached fingerprint because the weights or the configuration have changed."""
        self._fingerprint = None

    @assume_constant_result  # torch.compile cannot trace hashlib, and need not
    def _compute_fingerprint(self) -> str:
        # with sharded weights no process holds all of them, so only the configuration counts
        samples = {} if self.sharded else sample_all(dict(self.named_parameters()))
        return compute_fingerprint(self.name, self.config, samples)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As in any module; invalidates the fingerprint."""
        self.invalidate_fingerprint()
        return super().load_state_dict(*args, **options)

    def train(self, mode: bool = True) -> Self:
        """As in any module; leaving training mode invalidates the fingerprint because the weights may have changed."""
        if self.training and not mode:
            self.invalidate_fingerprint()
        return super().train(mode)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*inputs), with gradient checkpointing where that is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Model(Network):
    """The base of every generation. It checks the arguments of `forward`, once.

    A generation's time mix defines `initial_wkv`.
    """

    affine: bool = True  # outputs and final state are affine in the initial state (sequence_parallel.py)
    config_only: ClassVar[tuple[str, ...]] = ("ln_x_eps",)
    native_step_enabled = True  # the C++ step may take the place of the modules, see `native_step`
    emb: nn.Embedding
    blocks: Any  # a ModuleList of the generation's Block

    if TYPE_CHECKING:  # nn.Module returns Any; every generation's forward is this

        def __call__(
            self,
            tokens: Tensor,
            state: State | None = None,
            *,
            cu_seqlens: Tensor | Sequence[int] | None = None,
            last_only: bool = False,
        ) -> tuple[Tensor, State]: ...

    def __init__(self, config: Any):
        super().__init__(config)
        self._step: native_step.NativeStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but the native step, which holds addresses of this model's weights."""
        return self.__dict__ | {"_step": None}

    def has_copied_head(self) -> bool:
        """Whether the head is the embedding once more, as in a checkpoint that ties them: no training ends there."""
        head = getattr(self, "head", None)
        return isinstance(head, Linear) and torch.equal(head.weight, self.emb.weight)

    def tune_state(self) -> Model:
        """Makes the initial state the only trained parameter, and returns the model itself: `att.time_state`, zeros in
        a model that had none. The frozen weights are not copied."""
        self.requires_grad_(False)
        for name, shape in self.time_states().items():
            att = self.blocks[int(name.split(".")[1])].att
            if att.time_state is None:
                att.time_state = nn.Parameter(self.emb.weight.new_zeros(shape))
            att.time_state.requires_grad_(True)
        self.config = replace(self.config, time_state=True)
        self.state_tuning = True
        return self

    def time_states(self) -> dict[str, torch.Size]:
        """Names and shapes of the parameters of a tuned initial state, whether this model has one or not."""
        with torch.device("meta"):
            tuned = type(self)(replace(self.config, time_state=True))
        return {name: p.shape for name, p in tuned.named_parameters() if name.endswith(".time_state")}

    def initial_state(self, rows: int = 1, time_states: Mapping[str, Tensor] | None = None) -> State:
        """The state of `rows` sequences that have read nothing: zeros, or the tuned state of a checkpoint that
        carries one (`att.time_state`), through which gradients flow. `time_states` are taken in place of the model's
        own, by name."""
        layers = []
        for i, block in enumerate(self.blocks):
            wkv = block.att.initial_wkv(time_states and time_states[f"blocks.{i}.att.time_state"])
            att_shift, ffn_shift = (wkv.new_zeros(rows, self.config.n_embd) for _ in range(2))
            layers.append(LayerState(att_shift, wkv.expand(rows, *wkv.shape).clone(), ffn_shift))
        return State(layers, self.fingerprint)

    def usable_native_step(self) -> native_step.NativeStep | None:
        """The C++ step that may take the place of the modules; None where the plain model runs, whatever its input."""
        if not self.native_step_enabled or self.sharded or self.device.type != "cpu":
            return None
        if self._step is None or not self._step.is_current():
            self._step = native_step.NativeStep(self)
        return self._step if self._step.is_available() else None

    def select_native_step(self, tokens: Tensor, state: State, cu: Boundaries | None) -> native_step.NativeStep | None:
        """The C++ step for the forward pass of these tokens, or None where the plain model must run (native_step.py
        says when).

        Where PyTorch has fast products, packed sequences always go to the plain model: which of the two reads a prompt
        must not depend on the other sequences in the pack, by their number of tokens.
        """
        if not self.native_step_enabled or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        rows = tokens.numel()
        if self.quantization is None and native_step.has_fast_matmul(self.emb.weight.dtype):
            fits = rows <= native_step.MAX_TOKENS and cu is None
        else:
            fits = rows <= native_step.MAX_CALL_TOKENS or (cu is None and len(tokens) <= native_step.MAX_CALL_TOKENS)
        if not fits or isinstance(cu, SequenceShard) or torch.is_autocast_enabled("cpu"):
            return None
        step = self.usable_native_step()
        if step is None:
            return None
        seen = state is not step.last_state[0]() and has_tangents(x for layer in state.layers for x in layer)
        return None if seen else step

    def without_head(self) -> Model:
        """A model that returns the input of its head, the normalised output of the last block, [B, T, C] in place of
        [B, T, V]. It shares its modules with this one."""
        with torch.device("meta"):
            body = type(self)(self.config)
        body.emb, body.blocks, body.ln_out, body.head = self.emb, self.blocks, self.ln_out, nn.Identity()
        body.quantization, body.gradient_checkpointing = self.quantization, self.gradient_checkpointing
        body.native_step_enabled = False  # the C++ step returns logits
        return body.train(self.training)

    def is_unmodified(self) -> bool:
        """Whether it is what its class makes of its configuration, packed matrices apart: the same modules with the
        same settings, parameters of the same shapes. No adapters, no surgery."""
        with torch.device("meta"):
            fresh = type(self)(self.config)
        modules = dict(self.named_modules())
        expected = dict(fresh.named_modules())
        return modules.keys() == expected.keys() and all(
            _is_same_module(modules[name], module) for name, module in expected.items() if name
        )

    def validate_inputs(
        self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | Sequence[int] | None
    ) -> tuple[State, Boundaries | None]:
        """Checks the arguments of `forward`; returns the state (the initial one for None) and cu_seqlens as a tuple."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens must be a torch.Tensor of integers [B, T], got {show(tokens)}")
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            what = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
            raise InputError(f"tokens must be integers (int64 or int32) [B, T] with T >= 1, got {what}")
        self.check_device("tokens", tokens)
        if not torch.compiler.is_compiling() and not tokens.is_meta:
            ids = tokens.flatten().tolist()
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise InputError(f"token id {wrong} is outside this model's vocabulary of {self.config.vocab_size}")
        cu: Boundaries | None = boundaries(cu_seqlens, *tokens.shape)
        if isinstance(cu_seqlens, SequenceShard):
            if not self.affine:
                raise InputError(
                    f"{self.generation} cannot run with sequence parallelism: its output is not affine in its state"
                )
            cu = cu_seqlens
        rows = tokens.shape[0] if cu is None else len(cu) - 1
        if state is None:
            return self.initial_state(rows), cu
        # in training the weights change while a state is carried, so only the configuration must match
        digits = 16 if self.training else 32
        if state.fingerprint[:digits] != self.fingerprint[:digits]:
            raise InputError("this state belongs to another model")
        if state.rows != rows:
            raise InputError(f"a state of {state.rows} sequences was given for a batch of {rows}")
        if self._step is not None and state is self._step.last_state[0]() and tokens.device.type == "cpu":
            return state, cu  # the native step itself returned it, and states are never modified
        shift = (rows, self.config.n_embd)
        expected = (shift, tuple(state.layers[0].wkv.shape), shift) * self.config.n_layer  # the operator checks the wkv
        tensors = [x for layer in state.layers for x in layer]
        for x in (*tensors, *(x for context in state.contexts for x in context)):
            self.check_device("state", x)
        fits = tuple(tuple(x.shape) for x in tensors) == expected and all(x.is_floating_point() for x in tensors)
        if not fits or not self.accepts_contexts(state.contexts):
            raise InputError("this state is damaged: its tensors do not fit the model")
        return state, cu

    def accepts_contexts(self, contexts: Sequence[Context]) -> bool:
        """Whether a state's growing part, which only RWKV-7b has, fits the model."""
        return not contexts


def _is_same_module(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether a module has the type, the settings and the shapes of a new one, or is that matrix in 8 or 4 bits."""
    if type(fresh) is not Linear or type(module) is not PackedLinear:
        shapes = [{name: p is None or p.shape for name, p in m._parameters.items()} for m in (module, fresh)]
        if type(module) is not type(fresh) or shapes[0] != shapes[1]:
            return False
    return native_step.settings(module) == native_step.settings(fresh)


def replace_embeddings(model: Model, tokens: Tensor, vectors: Tensor) -> RemovableHandle:
    """A context manager: in its `with` block, the embedding of `tokens` [B, T] is `vectors` [B, T, C].

    The C++ step does not run for a model that has hooks.
    """
    vectors = vectors.to(model.emb.weight)
    # only for this very tensor: another thread may be running the model on its own tokens
    return model.emb.register_forward_hook(lambda _, inputs, output: vectors if inputs[0] is tokens else output)
