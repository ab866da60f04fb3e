"""A device named `simgpu` whose tensors lie in the memory of the CPU, and that is as strict as CUDA.

Inside `simulated()`:

- an operation with tensors of two devices raises (a CPU tensor without dimensions, and CPU indices, are allowed);
- a tensor for the device drawn from a CPU generator raises, and the reverse;
- autocast has CUDA's lists, which differ from the CPU's: so `index_copy` of bfloat16 into float32 raises;
- products of half-precision matrices can be had in float32 (`torch.mm(..., out_dtype=...)`), which CPUs do not have.

A test that passes here is no proof that CUDA passes, for kernels, memory and speed are not simulated; one that fails
here fails there. Built on torch's device for backends of third parties (`PrivateUse1`). Nothing of it acts outside of
`simulated()`.
"""

from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "simgpu"

# ---- autocast, as torch's autocast_mode.h has it for CUDA -----------------------------------------------------------

_HALF = [
    "_convolution",
    "convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "_thnn_fused_lstm_cell",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "scaled_dot_product_attention",
]
_FLOAT = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow",
    "softplus",
    "layer_norm",
    "group_norm",
    "frobenius_norm",
    "nuclear_norm",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
]
_FLOAT_OUT = ["prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum"]
_PROMOTE = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "grid_sample",
    "index_put",
    "scatter_add",
    "tensordot",
    "vdot",
]


class SimulatedTensor(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __repr__(self):
        return f"{NAME}({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)  # read from a file it lies on the CPU first

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use Tensor.cpu() first")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held


def is_ours(device):
    return device is not None and torch.device(device).type == NAME


def _mapped(change, value):
    """A value with something done to each of its leaves; torch's own `tree_map` takes three times as long."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, one) for one in value)
    return change(value)


def _named(function):
    return function._schema.name.removeprefix("aten::")


_COPIES = {"_to_copy", "copy_", "copy", "_copy_from", "set_"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def _check(name, ours, theirs, args, kwargs):
    """Raises what CUDA would raise."""
    here = bool(ours) or is_ours(kwargs.get("device"))
    generators = [one for one in (*args, kwargs.get("generator")) if isinstance(one, torch.Generator)]
    if generators and here != is_ours(generators[0].device):
        wanted, found = (NAME, "cpu") if here else ("cpu", NAME)
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
    if not ours or name in _COPIES:
        return
    others = [one for one in theirs if one.dim()]
    if name in _INDEXED and isinstance(args[0], SimulatedTensor):
        others = []  # indices of a CPU are moved by torch itself
    if others:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {NAME}:0 and cpu")


def run(function, args, kwargs):
    """One operation: on the CPU tensors that are held, with a result that is wrapped where one of them was."""
    ours, theirs = [], []

    def plain(value):
        if isinstance(value, SimulatedTensor):
            ours.append(value)
            return value.held
        if isinstance(value, torch.Tensor):
            theirs.append(value)
        return torch.device("cpu") if isinstance(value, torch.device) and is_ours(value) else value

    plain_args = _mapped(plain, args)
    plain_kwargs = {key: _mapped(plain, value) for key, value in kwargs.items()}
    target = kwargs.get("device")
    if ours or target is not None or kwargs.get("generator") is not None:
        name = _named(function)
        _check(name, ours, theirs, args, kwargs)
        if function is torch.ops.aten.mm.dtype:  # which CPUs do not have
            return SimulatedTensor(plain_args[0].float() @ plain_args[1].float())
    out = function(*plain_args, **plain_kwargs)
    if not (ours or is_ours(target)):
        return out
    if name == "copy_":
        return args[0]
    wraps = target is None or is_ours(target)
    known = {id(one.held): one for one in ours} | {id(one): one for one in theirs}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return SimulatedTensor(value) if wraps else value

    return _mapped(wrapped, out)


class _Mode(TorchDispatchMode):
    """Sees what no tensor of the device takes part in: new tensors, and copies from the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Backend:
    """What torch asks of a device's module."""

    available = False

    def is_initialized(self):
        return True

    def is_available(self):
        return self.available

    def current_device(self):
        return 0

    def device_count(self):
        return 1 if self.available else 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *device):
        return torch.get_rng_state()

    def set_rng_state(self, *state):
        pass


@cache
def _registered():
    """Makes the device known to torch, once in a process."""
    from torch.utils import backend_registration

    backend = _Backend()

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self):
            return backend.available

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend, hook=Hook())
    below = torch.library.Library("_", "IMPL")
    below.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    lists = torch.library.Library("aten", "IMPL")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    for names, cast in ((_HALF, _narrow), (_FLOAT, _widen), (_FLOAT_OUT, _widen_result), (_PROMOTE, _widest)):
        for name in names:
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                if overload in ("out", "dtype_out", "dtype", "int_out") or overload.endswith("_out"):
                    continue
                operation = getattr(packet, overload)
                try:
                    lists.impl(operation, _autocast(operation, cast, key), "AutocastPrivateUse1")
                except RuntimeError:  # one that torch takes apart before autocast sees it
                    continue
    return backend, below, lists


def _autocast(operation, cast, key):
    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = cast(args, kwargs)
            return operation(*args, **kwargs)

    return call


def _floats(args, kwargs):
    return [one for one in pytree.tree_leaves((args, kwargs)) if _casts(one)]


def _casts(one):
    return isinstance(one, torch.Tensor) and one.is_floating_point() and one.dtype != torch.float64 and (
        one.device.type == NAME
    )  # fmt: skip


def _to(dtype):
    return lambda args, kwargs: pytree.tree_map(lambda one: one.to(dtype) if _casts(one) else one, (args, kwargs))


def _narrow(args, kwargs):
    return _to(torch.get_autocast_dtype(NAME))(args, kwargs)


_widen = _to(torch.float32)


def _widen_result(args, kwargs):
    return _widen(args, kwargs) if kwargs.get("dtype") is None else (args, kwargs)


def _widest(args, kwargs):
    found = {one.dtype for one in _floats(args, kwargs)}
    return _to(torch.float32)(args, kwargs) if torch.float32 in found else (args, kwargs)


# ---- the context ----------------------------------------------------------------------------------------------------

_OF_DATA = ("tensor", "asarray", "as_tensor")  # which no dispatch mode sees


def _from_data(make):
    """A function that makes a tensor of data, for the device too."""

    def call(data, *args, device=None, **kwargs):
        contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        if device is None and contexts:
            device = contexts[-1].device
        if not is_ours(device):
            return make(data, *args, device=device, **kwargs)
        needs_grad = kwargs.pop("requires_grad", False) or False
        return make(data, *args, device="cpu", **kwargs).to(torch.device(NAME, 0)).requires_grad_(needs_grad)

    return call


@contextmanager
def simulated():
    """Context in which the device is there."""
    backend = _registered()[0]
    # torch remembers for good which functions a device's context acts on. It must not meet those that are put in place
    # below: `torch.tensor` would not heed any context afterwards, and transformers, which asks it whether it builds on
    # `meta`, would leave the rotary frequencies of later models as the memory was.
    _device_constructors()
    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "available", True))
        for name in _OF_DATA:
            stack.enter_context(patch.object(torch, name, _from_data(getattr(torch, name))))
        # Backward in this thread: those that torch starts for devices would not see the mode.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Modules that move keep their parameters, tied ones too: torch would make others of another class.
        stack.enter_context(patch("torch.__future__._swap_module_params_on_conversion", True))
        stack.enter_context(patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1"))
        stack.enter_context(_Mode())
        yield torch.device(NAME, 0)
