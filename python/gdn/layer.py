"""The core of a Gated DeltaNet layer, everything between its two GEMMs: :class:`Layer`, with ``decode`` and ``prefill``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from . import _gdn, _is_compiling, _torch

if _torch is not None:
    from . import _torch_layer

__all__ = ["Layer", "decode_supported", "prefill_supported"]


class Layer:
    """A layer's weights and numbers.

    For one token, with ``W`` taps of the convolution, ``HK, HV, DK, DV`` the heads and ``C = 2*HK*DK + HV*DV``; v head ``h`` has k head
    ``h // (HV // HK)``::

        x = mixed_qkv
        c = silu(conv_bias + sum_j conv_weight[:, j] * x(t - W + 1 + j))       # conv_state has what lies before the call
        q, k, v = c;  q = q * scale / sqrt(sum q^2 + l2norm_eps);  k = k / sqrt(sum k^2 + l2norm_eps)
        g = -exp(A_log) * softplus(a + dt_bias);  beta = sigmoid(b) * beta_scale
        S = exp(g) * S;  S = S + beta * (v - S k) k^T;  o = S q                # recurrent_state is S, [DV, DK] for each v head
        out = o / sqrt(mean(o^2) + norm_eps) * norm_weight * gate(z)

    Each argument may be float32, float16 or bfloat16; everything between is float32, and each output is rounded once.

    Args:
        heads: ``(num_k_heads, num_v_heads, head_k_dim, head_v_dim)``, of the shard where the layer is one.
        packing: How ``mixed_qkvz`` and ``mixed_ba`` are packed, as for :func:`gdn.split`.
        conv_weight: ``[C, W]``, or ``[C, 1, W]`` as ``torch.nn.Conv1d`` has it; the last tap is the token's own.
        conv_bias: ``[C]``.
        A_log, dt_bias: ``[HV]``.
        norm_weight: ``[DV]``.
        scale: ``DK ** -0.5`` where it is ``None``.
        beta_scale: 2 where a model has ``allow_neg_eigval``.
        gate: ``"silu"`` or ``"sigmoid"``.

    The tensors are kept as they are, without a copy: PyTorch's, NumPy's arrays, or anybody's who speaks DLPack. Attributes have the
    arguments' names, and are not to be set.

    Raises:
        ValueError: A number or a name is none that a layer can have.
    """

    def __init__(
        self,
        heads: Sequence[int],
        packing: str = "interleaved",
        *,
        conv_weight: Any,
        conv_bias: Any = None,
        A_log: Any,
        dt_bias: Any,
        norm_weight: Any,
        l2norm_eps: float = 1e-6,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        beta_scale: float = 1.0,
        gate: str = "silu",
    ) -> None:
        weights = (conv_weight, conv_bias, A_log, dt_bias, norm_weight)
        settings = (heads, packing, l2norm_eps, norm_eps, scale, beta_scale, gate, weights)
        # A graph that is traced calls operators, which check by themselves.
        self._settings = None if _is_compiling() else _gdn.Settings(*settings)
        self.heads = tuple(heads)
        self.packing = packing
        self.conv_weight, self.conv_bias = conv_weight, conv_bias
        self.A_log, self.dt_bias, self.norm_weight = A_log, dt_bias, norm_weight
        self.l2norm_eps, self.norm_eps, self.scale = l2norm_eps, norm_eps, scale
        self.beta_scale, self.gate = beta_scale, gate

    @classmethod
    def from_module(cls, module: Any) -> Layer:
        """The core of a layer of Hugging Face transformers: ``Qwen3NextGatedDeltaNet``, ``Qwen3_5GatedDeltaNet`` and those with the same
        attributes.

        It has the module's own parameters. Make another after the module was given other ones. Where the module has ``in_proj_qkvz``, the
        projections are packed: ``(module.in_proj_qkvz(x), module.in_proj_ba(x))``, in rows.

        Raises:
            TypeError: The module lacks an attribute that such a layer has.
            ValueError: Its activation is none that is known here.
        """
        try:
            heads = (module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim)
            if module.activation not in ("silu", "swish"):
                raise ValueError(f"activation is {module.activation!r}, it must be 'silu'")
            return cls(
                heads,
                "interleaved",
                conv_weight=module.conv1d.weight,
                conv_bias=module.conv1d.bias,
                A_log=module.A_log,
                dt_bias=module.dt_bias,
                norm_weight=module.norm.weight,
                norm_eps=module.norm.variance_epsilon,
                gate=getattr(module.norm, "activation", "silu"),
            )
        except AttributeError as error:
            name = type(module).__name__
            raise TypeError(f"module is a {name}, expected a Gated DeltaNet layer: {error}") from None

    def __repr__(self) -> str:
        names = ("l2norm_eps", "norm_eps", "scale", "beta_scale", "gate")
        numbers = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({self.heads}, {self.packing!r}, {numbers})"

    def __getstate__(self) -> dict[str, Any]:
        # What was checked is not copied, and checked again.
        return {**vars(self), "_settings": None}

    def _checked(self) -> _gdn.Settings:
        """The numbers, checked, and the weights."""
        if self._settings is None:
            names = ("heads", "packing", "l2norm_eps", "norm_eps", "scale", "beta_scale", "gate")
            weights = (self.conv_weight, self.conv_bias, self.A_log, self.dt_bias, self.norm_weight)
            self._settings = _gdn.Settings(*(getattr(self, name) for name in names), weights)
        return self._settings

    def decode(
        self,
        projections: Sequence[Any],
        conv_state: Any,
        recurrent_state: Any,
        # No keywords alone: Python looks up the default of each of those in a dictionary, 0.1 µs a call together.
        tokens_per_sequence: int = 1,
        state_indices: Any = None,
        pad_slot_id: int = -1,
        num_accepted_tokens: Any = None,
        output_state_indices: Any = None,
        disable_state_update: bool = False,
        intermediate_states: Any = None,
        intermediate_conv_windows: Any = None,
        intermediate_state_indices: Any = None,
        out: Any = None,
    ) -> Any:
        """``T = tokens_per_sequence`` tokens of each of B sequences; their states are brought up to date in place.

        Indices are int32 or int64 tensors beside the others. A sequence whose slot is negative or ``pad_slot_id`` is skipped: its states
        stay as they are, and its rows of the output become zeros.

        Args:
            projections: ``(mixed_qkvz, mixed_ba)``, or ``(mixed_qkv, z, b, a)`` as :func:`gdn.split` gives them, of ``N = B * T`` rows;
                the tokens of a sequence follow one another.
            conv_state: ``[slots, C, W - 1 or more]``, oldest first, any strides: the last inputs ``x`` of the convolution. Written to.
            recurrent_state: ``[slots, HV, DV, DK]`` with DK or DV dense: give ``[slots, HV, DK, DV]`` as ``state.transpose(-1, -2)``.
                Written to.
            tokens_per_sequence: 1 to 16. Several tokens give the same bits as several calls.
            state_indices: ``[B]``, the slot of each sequence; without it sequence ``r`` has slot ``r``. Or ``[B, T or more]``: the
                recurrent state after token ``t`` is written in slot ``[r, t]``, both states are read in ``[r, 0]``.
            pad_slot_id: An index that stands for no slot, beside the negative ones.
            num_accepted_tokens: ``[B]``, speculative decoding as vLLM has it: how many tokens of the call before stay, 1 to T. The
                recurrent state is read in slot ``[r, n - 1]``, and the window of the convolution in columns ``n - 1`` and on of
                ``conv_state``, which has ``W - 1 + T - 1``; afterwards it begins with the last ``W - 2`` of these, and the new inputs.
            output_state_indices: ``[B]``: both states after the last token go to these slots, those that were read stay.
            disable_state_update: Both states stay as they were.
            intermediate_states: ``[slots, T or more, HV, DV, DK]``: the recurrent state after each token goes here, and
                ``recurrent_state`` stays as it was.
            intermediate_conv_windows: ``[slots, T or more, C, W - 1]``: the same for the window of the convolution. On CUDA those of
                consecutive tokens may share memory, each one input further on: a view by ``as_strided`` of ``T + W - 2`` inputs.
            intermediate_state_indices: ``[B]``, the slots of these two; without it sequence ``r`` has slot ``r``.
            out: ``[N, HV, DV]``, any strides, to write to instead of a fresh tensor.

        Returns:
            ``[N, HV, DV]`` in the dtype of the first of the projections, or ``out``.

        Raises:
            ValueError: A shape, a stride, a device, an overlap, or on the CPU the value of an index, is wrong. The argument and both
                numbers are named; nothing has been written.
            TypeError: An argument is no tensor, or its dtype is none for it.
            RuntimeError: A gradient is wanted, which this op has not.
        """
        if not _is_compiling():
            done = _gdn.decode(
                self._settings or self._checked(),
                projections,
                conv_state,
                recurrent_state,
                tokens_per_sequence,
                state_indices,
                pad_slot_id,
                num_accepted_tokens,
                output_state_indices,
                disable_state_update,
                intermediate_states,
                intermediate_conv_windows,
                intermediate_state_indices,
                out,
                False,
            )
            if done is not None:
                return done
        return _torch_layer.decode(
            self,
            projections,
            (conv_state, recurrent_state),
            out,
            tokens_per_sequence=tokens_per_sequence,
            state_indices=state_indices,
            pad_slot_id=pad_slot_id,
            num_accepted_tokens=num_accepted_tokens,
            output_state_indices=output_state_indices,
            disable_state_update=disable_state_update,
            intermediate_states=intermediate_states,
            intermediate_conv_windows=intermediate_conv_windows,
            intermediate_state_indices=intermediate_state_indices,
        )

    def prefill(
        self,
        projections: Sequence[Any],
        cu_seqlens: Any,
        conv_state: Any = None,
        recurrent_state: Any = None,
        *,
        state_indices: Any = None,
        pad_slot_id: int = -1,
        has_initial_state: Any = None,
        checkpoint_every_n_tokens: int = 0,
        checkpoint_starts: Any = None,
        state_checkpoints: Any = None,
        conv_checkpoints: Any = None,
        segments: bool = False,
        out: Any = None,
    ) -> Any:
        """All tokens of B sequences of any lengths; their states are brought up to date in place.

        What :meth:`decode` says of indices, padding, results and errors holds here too.

        On a GPU DK and DV are 64, 96, 128, 192 or 256 (DK of 192 and 256 take more shared memory than compute capability 8.6, 8.9 and 12.0
        have), and W is at most 4; products of matrices are of float16, and results may be 5e-4 of their norm off. Memory for what is between the kernels is PyTorch's.

        Args:
            projections: As for :meth:`decode`, N rows.
            cu_seqlens: ``[B + 1]``, ascending from 0 to N: sequence ``r`` has rows ``cu_seqlens[r]`` to ``cu_seqlens[r + 1]``.
            conv_state, recurrent_state: As for :meth:`decode`. Without one, zeros lie before each sequence, and nothing is kept.
            state_indices: ``[B]``, the slot of each sequence.
            has_initial_state: ``[B]``, flags (bool, uint8 or whole numbers): a sequence without begins with zeros, whatever its slot
                holds.
            checkpoint_every_n_tokens: Puts the state after so many tokens of a sequence, and after every multiple of them, into
                ``state_checkpoints``; a multiple of 64. 0 for no checkpoints.
            checkpoint_starts: ``[B]``: where in ``state_checkpoints`` those of a sequence begin.
            state_checkpoints: ``[checkpoints, HV, DV, DK]`` with DK or DV dense.
            conv_checkpoints: ``[checkpoints, C, W - 1 or more]``: the last columns get the inputs of the convolution.
            segments: Lets a GPU bring segments of a sequence forward side by side: of 2048 tokens and more, where the layer has few
                v heads (``HV * DV`` of at most 1024, DK of at most 128, as on a rank of tensor parallelism). One sequence of 4096 tokens and
                more takes 0.5 to 0.8 of the time, one of 2048 as long, a batch of long ones 1.4 to 1.7 times as long. A sequence has the same bits whatever its batch, but not the same in one call
                and in several for its parts; without, it has. Everywhere else, and on a CPU, it changes nothing.
            out: ``[N, HV, DV]``, any strides, to write to instead of a fresh tensor.
        """
        if not _is_compiling():
            done = _gdn.prefill(
                self._settings or self._checked(),
                projections,
                cu_seqlens,
                conv_state,
                recurrent_state,
                state_indices,
                pad_slot_id,
                has_initial_state,
                checkpoint_every_n_tokens,
                checkpoint_starts,
                state_checkpoints,
                conv_checkpoints,
                segments,
                out,
                False,
            )
            if done is not None:
                return done
        return _torch_layer.prefill(
            self,
            projections,
            (conv_state, recurrent_state, cu_seqlens),
            out,
            state_indices=state_indices,
            pad_slot_id=pad_slot_id,
            has_initial_state=has_initial_state,
            checkpoint_every_n_tokens=checkpoint_every_n_tokens,
            checkpoint_starts=checkpoint_starts,
            state_checkpoints=state_checkpoints,
            conv_checkpoints=conv_checkpoints,
            segments=segments,
        )


def _copy(function: Any) -> Any:
    """A function that does the same; what is no plain function of Python's itself."""
    if not isinstance(function, types.FunctionType):
        return function
    return types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


#: Whether calls of `Layer.decode` go without a frame of Python's: from Python 3.12 on, where nobody has put another function around
#: it. The function above stays as it is for whoever looks at it, and does what is unusual. And the same as a function of C, by
#: which tests go there on any Python.
_IS_DIRECT, _decode = _gdn.shorten(Layer.decode, _copy(Layer.decode))


def decode_supported(layer: Layer, *arguments: Any, **options: Any) -> str | None:
    """``None`` where ``layer.decode`` of the same arguments can be called, or the reason why not, as a sentence.

    Looks at shapes, dtypes, strides, devices and overlaps, never at what the tensors hold: indices may be anything. Writes nothing.
    """
    given = _bound(Layer.decode, layer, arguments, options)
    keys = (
        "tokens_per_sequence",
        "state_indices",
        "pad_slot_id",
        "num_accepted_tokens",
        "output_state_indices",
    )
    keys += ("disable_state_update", "intermediate_states", "intermediate_conv_windows")
    keys += ("intermediate_state_indices", "out")
    return _reason("decode", _gdn.decode, given, ("projections", "conv_state", "recurrent_state", *keys))


def prefill_supported(layer: Layer, *arguments: Any, **options: Any) -> str | None:
    """The same for ``layer.prefill``."""
    given = _bound(Layer.prefill, layer, arguments, options)
    keys = (
        "state_indices",
        "pad_slot_id",
        "has_initial_state",
        "checkpoint_every_n_tokens",
        "checkpoint_starts",
    )
    keys += ("state_checkpoints", "conv_checkpoints", "segments", "out")
    first = ("projections", "cu_seqlens", "conv_state", "recurrent_state")
    return _reason("prefill", _gdn.prefill, given, (*first, *keys))


def _bound(method: Callable[..., Any], layer: Layer, arguments: Any, options: Any) -> dict[str, Any]:
    bound = inspect.signature(method).bind(layer, *arguments, **options)
    bound.apply_defaults()
    return bound.arguments


def _reason(
    op: str, function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]
) -> str | None:
    layer = given["self"]
    try:
        function(layer._checked(), *(given[name] for name in names), True)
    # A device may be too old.
    except (ValueError, TypeError, RuntimeError) as refused:
        return str(refused)
    return None if _torch is None else _torch_layer.refusal(op, layer, given)
