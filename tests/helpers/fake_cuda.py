"""A stand-in for a CUDA device: tensors that report the device cuda:0 and compute on the CPU.

Inside `fake_cuda`, everything that places tensors on "cuda" gives a `FakeCudaTensor`. Operations refuse what they
refuse on a GPU: tensors on different devices, a generator of another device, and numpy(). Operations that make the host
wait for the device are counted with the line of flowtrain that they come from. Graphs are recorded, see graphs.py.

The numbers are those of the CPU. Kernels of CUDA, their rounding, their precision (TF32) and their order are not
tested.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _device
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from helpers.graphs import Recording

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
# the device that C++ sees. A build of torch without CUDA cannot differentiate tensors on CUDA
META = torch.device("meta")
PACKAGE = str(Path(__file__).resolve().parents[2] / "flowtrain")
aten = torch.ops.aten

# the host waits for the results of these operations
HOST_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "_unique",
    "unique_consecutive", "bincount", "multinomial", "_linalg_check_errors", "linalg_eig", "histc",
}  # fmt: skip
# operations that copy between devices
COPIES = {"copy_", "_to_copy", "_foreach_copy_", "set_"}
# operations in which a scalar on the CPU may meet tensors on CUDA although they are not pointwise
SCALARS_ALLOWED = {"index_put_", "index_put", "_index_put_impl_", "fill_", "masked_fill", "masked_fill_", "where"}
# indices on the CPU are allowed
INDICES_ALLOWED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}

# the lists of autocast for CUDA in aten/src/ATen/autocast_mode.h: operations in the lower precision, in float32, and in
# the widest dtype of the arguments
NARROWED = {
    "conv1d", "conv2d", "conv3d", "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "__matmul__",
    "__rmatmul__", "einsum", "mm", "mv", "vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "multi_dot",
}  # fmt: skip
WIDENED = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "__pow__", "softplus", "layer_norm", "group_norm", "norm", "cosine_similarity", "mse_loss", "cdist",
    "renorm", "logsumexp", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "vector_norm", "matrix_norm",
    "sum",
}  # fmt: skip
PROMOTED = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "tensordot"}
PROMOTED |= {"scatter_add", "cat", "stack"}
AUTOCAST = NARROWED | WIDENED | PROMOTED

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv"}


def uses_tf32(name: str) -> bool:
    """Whether a GPU would compute an operation on float32 in TF32."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # torch before 2.9 has other names of these settings
    old = not hasattr(cudnn, "conv")
    if name in ("convolution", "convolution_backward"):
        return bool(cudnn.allow_tf32) if old else cudnn.conv.fp32_precision == "tf32"
    return name in PRODUCTS and (bool(products.allow_tf32) if old else products.fp32_precision == "tf32")


class Generator(torch.Generator):
    """A generator that remembers the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.fake_device = with_index(torch.device(device))
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that was given."""
        return self.fake_device


def with_index(device: torch.device) -> torch.device:
    """Returns cuda:0 for cuda, and for the device that C++ sees."""
    return DEVICE if device.type in ("cuda", "meta") else device


class FakeCudaTensor(Tensor):
    """A tensor that reports the device cuda:0. `values_` has the values, on the CPU."""

    values_: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "FakeCudaTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=META,
        )
        made.values_ = real
        return made

    def __init__(self, real: Tensor) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """cuda:0."""
        return DEVICE

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        """The index of the device."""
        return 0

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.values_.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.values_.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        with _disable_current_modes():
            return f"FakeCuda({self.values_!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only tensors that are leaves can be deep-copied")
        made = self.detach().clone()
        made.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        if self.grad is not None:
            made.grad = self.grad.detach().clone()
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        data = self.values_.detach().clone()
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (data, self.dtype, str(DEVICE), self.requires_grad)


class Calls:
    """What a fake device has done.

    Attributes:
        reads: the number of times that the host waited for the device, by operation and line.
        uploads: the number of copies from the host, by operation and line.
        kernels: the number of other operations, by name.
        tf32: the number of float32 products and convolutions that a GPU would compute in TF32, by operation and line.
    """

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.tf32: Counter[str] = Counter()

    def clear(self) -> None:
        """Sets all counts to 0."""
        for counter in (self.reads, self.uploads, self.kernels, self.tf32):
            counter.clear()


CALLS = Calls()
DEFAULT_GENERATOR = Generator("cuda")
# the devices of the generators that the calls of torch in progress were given
_generators: list[torch.device] = []


def line() -> str:
    """Returns the innermost line of flowtrain that is being executed."""
    frame: Any = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def is_cuda(device: Any) -> bool:
    """Whether a value names the fake device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


def called(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function of torch's Python interface."""
    name = getattr(func, "__name__", "")
    if name in REPLACED:
        return REPLACED[name](func, args, kwargs)
    # strings are devices only in these functions and keywords
    texts = name in ("to", "type")
    if any(type(a) is torch.device or (texts and type(a) is str) for a in args):
        args = tuple(META if is_cuda(a) else a for a in args)
    if is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": META}
    if torch.is_autocast_enabled("cuda") and name in AUTOCAST and "out" not in kwargs:
        args = cast(name, args)
    generator = kwargs.get("generator")
    if generator is None:
        return func(*args, **kwargs)
    _generators.append(with_index(generator.device))
    try:
        return func(*args, **kwargs)
    finally:
        _generators.pop()


def cast(name: str, args: Any) -> Any:
    """Casts arguments as autocast does."""
    dtypes = {a.dtype for a in tensors_of(args) if isinstance(a, FakeCudaTensor)}
    wide = torch.float64 in dtypes
    if name in NARROWED:
        dtype = torch.get_autocast_dtype("cuda")
    else:
        dtype = torch.float32
        if torch.float32 not in dtypes and name in PROMOTED:
            return args

    def one(value: Any) -> Any:
        floating = isinstance(value, FakeCudaTensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return value.to(dtype) if floating and not (wide and name in PROMOTED) else value

    return tuple(mapped(one, a) for a in args)


def set_data(func: Any, args: Any, kwargs: Any) -> Any:
    """`tensor.data = value`."""
    # `__set__` is also the name of the setters of `grad` and `requires_grad`
    if func == Tensor.data.__set__ and isinstance(args[0], FakeCudaTensor):  # type: ignore[attr-defined]
        assert isinstance(args[1], FakeCudaTensor), "data of another device"
        args[0].values_ = args[1].values_
    return func(*args, **kwargs)


def made_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.tensor` and similar functions, which make tensors without calling an operation."""
    if not is_cuda(kwargs.get("device")):
        return func(*args, **kwargs)
    if isinstance(args[0], FakeCudaTensor):
        return func(*args, **{**kwargs, "device": META})
    wants = kwargs.pop("requires_grad", False)
    return func(*args, **{**kwargs, "device": CPU}).to(META).requires_grad_(wants)


def new_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """`x.new_tensor(values)`."""
    if not isinstance(args[0], FakeCudaTensor):
        return func(*args, **kwargs)
    return made_tensor(torch.tensor, args[1:], {"dtype": args[0].dtype, "device": DEVICE, **kwargs})


def as_numpy(func: Any, args: Any, kwargs: Any) -> Any:
    """`x.numpy()`."""
    if isinstance(args[0], FakeCudaTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
    return func(*args, **kwargs)


def as_list(func: Any, args: Any, kwargs: Any) -> Any:
    """`x.tolist()`."""
    return args[0].detach().cpu().tolist() if isinstance(args[0], FakeCudaTensor) else func(*args, **kwargs)


def indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """`x[index]` and `x[index] = values`. A list in the index becomes a tensor on the device."""
    x, index, *value = args
    if isinstance(x, FakeCudaTensor):
        each = index if isinstance(index, tuple) else (index,)
        if any(isinstance(one, list) for one in each):
            index = tuple(torch.tensor(one).to(META) if isinstance(one, list) else one for one in each)
    return func(x, index, *value, **kwargs)


REPLACED = {
    "__getitem__": indexed,
    "__setitem__": indexed,
    "__set__": set_data,
    "tensor": made_tensor,
    "as_tensor": made_tensor,
    "asarray": made_tensor,
    "new_tensor": new_tensor,
    "numpy": as_numpy,
    "__array__": as_numpy,
    "tolist": as_list,
    "cuda": lambda func, args, kwargs: args[0].to(META),
    "pin_memory": lambda func, args, kwargs: args[0],
}


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation below autograd."""
    name = func._schema.name.split("::")[1]
    leaves = tensors_of(args) + tensors_of(kwargs.values())
    fakes = [leaf for leaf in leaves if isinstance(leaf, FakeCudaTensor)]
    sketches = any(leaf.device == META for leaf in leaves)
    if sketches or (not fakes and _device.CURRENT_DEVICE == META):
        # the meta device itself, on which `load` builds a model without values
        assert not fakes, f"{name}: a tensor has no values"
        return func(*args, **kwargs)
    plain = [leaf for leaf in leaves if not isinstance(leaf, FakeCudaTensor) and leaf.device.type == "cpu"]
    asked = kwargs.get("device")
    out_device = with_index(asked) if asked is not None else DEVICE if fakes else CPU
    if out_device == CPU and not fakes:
        check_generator(name, kwargs, CPU)
        return func(*args, **kwargs)
    count(name, args, kwargs, fakes, out_device)
    if fakes and plain:
        check_devices(func, name, args, kwargs, plain)
    if name.startswith("_fused_adam"):
        check_layouts(args[:4])
    real_args = [mapped(real, a) for a in args]
    real_kwargs = {k: mapped(real, v) for k, v in kwargs.items()}
    if asked is not None:
        real_kwargs["device"] = CPU
    real_kwargs.pop("pin_memory", None)
    if name == "_efficientzerotensor":
        # the values of such a tensor have no memory
        func = aten.zeros.default
    found = seeded(func, name, real_args, real_kwargs)
    originals = {id(leaf.values_): leaf for leaf in fakes} | {id(leaf): leaf for leaf in plain}
    in_cpu = out_device == CPU or name in ("_local_scalar_dense",)
    if torch.Tag.inplace_view in func.tags and fakes:
        metadata_changed(func, args, kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or in_cpu:
            return value
        return originals[id(value)] if id(value) in originals else FakeCudaTensor(value)

    if name == "copy_":
        return args[0]
    return mapped(wrapped, found)


def tensors_of(values: Any) -> list[Tensor]:
    """Returns the tensors among values and lists of values."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found


def mapped(function: Any, value: Any) -> Any:
    """Applies a function to a value, or to each value in a list or a tuple."""
    return type(value)([function(v) for v in value]) if isinstance(value, list | tuple) else function(value)


def real(value: Any) -> Any:
    """Returns the values of a fake tensor, and other values as they are."""
    return value.values_ if isinstance(value, FakeCudaTensor) else value


def metadata_changed(func: Any, args: Any, kwargs: Any) -> None:
    """Changes the shape of the wrapper as an operation such as squeeze_ has changed the shape of the values."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def seeded(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Runs an operation on the CPU, with random numbers of the generator of the fake device."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    check_generator(name, kwargs, DEVICE)
    if _State.captures:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
    takes = any(a.name == "generator" for a in func._schema.arguments)
    if takes and kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    with _disable_current_modes():
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(DEFAULT_GENERATOR.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        with _disable_current_modes():
            DEFAULT_GENERATOR.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)


def check_generator(name: str, kwargs: Any, device: torch.device) -> None:
    """Raises the error of torch for a generator of another device."""
    if kwargs.get("generator") is not None and _generators and _generators[-1] != device:
        raise RuntimeError(f"{name}: Expected a '{device}' device type for generator but found '{_generators[-1]}'")


def check_devices(func: Any, name: str, args: Any, kwargs: Any, plain: list[Tensor]) -> None:
    """Raises the error of torch for tensors on different devices."""
    if name in COPIES:
        return
    if name in INDICES_ALLOWED:
        indices = {id(i) for i in args[1] if isinstance(i, Tensor)}
        if isinstance(args[0], FakeCudaTensor):
            plain = [p for p in plain if id(p) not in indices]
    scalars = torch.Tag.pointwise in func.tags or name in SCALARS_ALLOWED
    if scalars:
        written = {id(args[0])} if func._schema.arguments[0].alias_info is not None else set()
        plain = [p for p in plain if p.dim() or id(p) in written or id(p) == id(kwargs.get("out"))]
    if plain:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({line()}, on the CPU: {[tuple(p.shape) for p in plain]})"
        )


def check_layouts(lists: Any) -> None:
    """Raises the error of a fused optimizer for parameters, gradients and averages with different strides."""
    for tensors in zip(*lists, strict=True):
        strides = {tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1) for t in tensors}
        if len(strides) > 1:
            raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


def count(name: str, args: Any, kwargs: Any, fakes: list[FakeCudaTensor], out_device: torch.device) -> None:
    """Counts an operation."""
    if fakes and fakes[0].dtype == torch.float32 and uses_tf32(name):
        CALLS.tf32[f"{name} {line()}"] += 1
    masks = name in INDICES_ALLOWED and any(
        i.dtype in (torch.bool, torch.uint8) for i in args[1] if isinstance(i, Tensor)
    )
    # a mask with one value becomes masked_fill
    filled = masks and name != "index" and args[2].numel() == 1
    down = (name == "_to_copy" and out_device == CPU) or (name == "copy_" and not isinstance(args[0], FakeCudaTensor))
    up = (name == "_to_copy" and not fakes) or (name == "copy_" and not isinstance(args[1], FakeCudaTensor))
    uneven = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in HOST_READS or (masks and not filled) or down or uneven:
        CALLS.reads[f"{name} {line()}"] += 1
    elif up:
        CALLS.uploads[f"{name} {line()}"] += 1
    else:
        CALLS.kernels[name] += 1


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # the import of the compiler takes seconds
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def _in_other_thread(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a backward pass in another thread, as torch does for a GPU. Context variables have their defaults there."""
    nested = threading.current_thread().name == WORKER or torch._C._functorch.maybe_current_level() is not None
    batched = any(torch._C._functorch.is_legacy_batchedtensor(g) for g in args[0] if g is not None)
    if nested or batched or not any(isinstance(y, FakeCudaTensor) for y in tensors):
        return ENGINE(tensors, *args, **kwargs)
    found: list[Any] = []
    failed: list[BaseException] = []
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]

    def work() -> None:
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
                for mode in modes:
                    stack.enter_context(mode)
                found.append(ENGINE(tensors, *args, **kwargs))
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work, name=WORKER)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


# the name of the thread of backward passes, and the function of torch that runs a backward pass
WORKER = "backward passes of the fake device"
ENGINE = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


class _Stream:
    """A stream. All streams run at once."""

    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _State:
    """The state of the fake device.

    Attributes:
        default, stream: the default and the current stream.
        captures: whether the generator is in capture mode, in which it draws no numbers outside a capture.
    """

    default = stream = _Stream()
    captures = False


def _set_stream(stream: Any) -> None:
    _State.stream = stream


class _InStream:
    def __init__(self, stream: Any) -> None:
        self.inside = stream

    def __enter__(self) -> None:
        self.before, _State.stream = _State.stream, self.inside

    def __exit__(self, *_: object) -> None:
        _State.stream = self.before


class _Graph:
    """A graph that `torch.cuda.graph` captures. An operation that a capture does not allow makes `capture_end` fail."""

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert _State.stream is not _State.default, "CUDA graphs must be captured on a non-default stream"
        _State.captures = True
        self.recording = Recording()
        self.recording.__enter__()

    def capture_end(self) -> None:
        self.recording.__exit__(None, None, None)
        if self.recording.refused:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        _State.captures = False

    def replay(self) -> None:
        self.recording.replay()


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _set_state(state: Tensor, *_: Any) -> None:
    assert state.device == CPU
    DEFAULT_GENERATOR.set_state(state)


class _Properties:
    name = "a stand-in for a GPU"
    total_memory = 2**34
    multi_processor_count = 1
    major, minor = 9, 0


@contextmanager
def fake_cuda() -> Iterator[Calls]:
    """Context manager in which this machine seems to have one CUDA device."""
    CALLS.clear()
    _State.captures = False
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "get_device_name": lambda *_: _Properties.name,
        "get_device_properties": lambda *_: _Properties,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda *_: (2**33, 2**34),
        "synchronize": lambda *_: None,
        "empty_cache": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "set_device": lambda *_: None,
        "device": _nothing,
        "get_rng_state": lambda *_: DEFAULT_GENERATOR.get_state(),
        "get_rng_state_all": lambda *_: [DEFAULT_GENERATOR.get_state()],
        "set_rng_state": _set_state,
        "set_rng_state_all": lambda states: _set_state(states[0]),
        "manual_seed": lambda seed: DEFAULT_GENERATOR.manual_seed(seed),
        "manual_seed_all": lambda seed: DEFAULT_GENERATOR.manual_seed(seed),
        "current_stream": lambda *_: _State.stream,
        "default_stream": lambda *_: _State.default,
        "set_stream": _set_stream,
        "stream": _InStream,
        "Stream": _Stream,
        "Event": _Stream,
        "CUDAGraph": _Graph,
        "graph_pool_handle": lambda: (0, 1),
    }
    with ExitStack() as stack:
        # `Module.to` makes new parameters, because their class changes
        future = torch.__future__
        stack.callback(future.set_overwrite_module_params_on_conversion, False)
        future.set_overwrite_module_params_on_conversion(True)
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(patch.object(torch._C, "_host_emptyCache", lambda: None, create=True))
        # the engine has no thread for a device that was added after its start
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _in_other_thread))
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield CALLS
