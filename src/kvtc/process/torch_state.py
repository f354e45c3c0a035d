"""The caller's torch state: set aside while kvtc computes, and given back as it was, whatever happens.

What belongs to the calling thread is switched off for the time of a call: gradients, inference mode, autocast, modes (a default
device is one) and tensor subclasses, `torch.compile`, flushing of subnormal numbers, and how NumPy treats floating-point errors.

The precision of float32 products belongs to the process. It is set to the full one while any call is under way, and to what it was
after the last. The default dtype belongs to the process too, but other threads make tensors meanwhile: it is left alone, and
every tensor that kvtc makes names its dtype.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

from ..errors import InvalidArgument, KvtcError
from .forks import inheritance

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
_FULL, _DEFAULT = "ieee", "none"
_SUBNORMAL = 5e-324


def neutral_torch_state(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function of kvtc that computes alike whatever state it is called in. What it calls of others, a model, is affected too.

    It must not be a generator: the state would be the caller's at every step.
    """

    @functools.wraps(function)
    def neutral(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if inheritance.torch_threads:
            compute_alone()
        with (
            torch._C.DisableTorchFunction(),
            torch._C._DisableTorchDispatch(),
            np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"),
            model_torch_state(),
        ):
            return function(*args, **kwargs)

    # Compiled code calls it without looking into it, or into what it calls: what is fused rounds otherwise.
    neutral._torchdynamo_disable = True  # type: ignore[attr-defined]
    skipped = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(neutral.__code__, skipped)  # type: ignore[attr-defined]
    return neutral


def compute_alone() -> None:
    """In a forked child: on its one thread, before it waits for ever for those of its parent."""
    inheritance.torch_threads = False
    torch.set_num_threads(1)


@contextmanager
def model_torch_state() -> Iterator[None]:
    """Inside, a model computes alike and without gradients: no autocast, no inference mode, products in full precision.

    The rest is left to the model: its weights may be subclasses of tensors, and its code may count on a default device.
    """
    if inheritance.torch_threads:
        compute_alone()
    autocast = [device for device in _AUTOCAST if torch.is_autocast_enabled(device)]
    flushes = _SUBNORMAL * 1.0 == 0.0
    with torch.inference_mode(mode=False), torch.no_grad(), _FULL_PRODUCTS:
        try:
            for device in autocast:
                torch.set_autocast_enabled(device, False)
            if flushes:
                torch.set_flush_denormal(False)
            yield
        finally:
            for device in autocast:
                torch.set_autocast_enabled(device, True)
            if flushes:
                torch.set_flush_denormal(True)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch off dropout and the like; afterwards every module has the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def gradients() -> Iterator[None]:
    """Inside a neutral function: gradients again, with none of the caller's hooks on saved tensors."""
    saved_tensors = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    with torch.enable_grad(), nullcontext() if forbidden else saved_tensors:
        yield


def torch_functions() -> Any:
    """Inside a neutral function: default devices and subclasses of tensors work again, as the code of models counts on them."""
    return torch._C._EnableTorchFunction()


def plain(tensor: Tensor, name: str, error: type[KvtcError] = InvalidArgument) -> Tensor:
    """The same values as an ordinary tensor: of no subclass, without gradient, nothing to be negated or conjugated when it is read.

    Raises `error`, in which `name` says what it is, for a tensor whose values are not in one place: on the device meta,
    sparse, nested, quantized or distributed.
    """
    if not isinstance(tensor, Tensor):
        raise error(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    is_wrapper = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_wrapper or tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = type(tensor).__name__ if is_wrapper else f"{tensor.layout} on {tensor.device}"
        raise error(f"{name}: expected an ordinary dense tensor, got {kind}")
    return tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()


def writing_into(*tensors: Tensor) -> torch.inference_mode:
    """Inside, tensors of whoever calls may be written to: those made in inference mode can be only there."""
    return torch.inference_mode(any(tensor.is_inference() for tensor in tensors))


class _FullProducts:
    """Float32 products in full precision while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._found: dict[str, str] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._n_inside += 1
            for backend in ("mkldnn", "cuda"):
                found = _precision(backend)
                if found not in (_FULL, _DEFAULT):
                    _set_precision(backend, _DEFAULT)
                    # What follows from a wider setting must go on doing so.
                    self._found[backend] = _DEFAULT if _precision(backend) == found else found
                    _set_precision(backend, _FULL)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._give_back()

    def after_fork(self) -> None:
        """In the child, whose other threads are gone."""
        self._give_back()
        self._lock, self._n_inside = threading.Lock(), 0

    def _give_back(self) -> None:
        while self._found:
            _set_precision(*self._found.popitem())


def _precision(backend: str) -> str:
    found: str = torch._C._get_fp32_precision_getter(backend, "matmul")
    return found


def _set_precision(backend: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", precision)


_FULL_PRODUCTS = _FullProducts()
os.register_at_fork(after_in_child=_FULL_PRODUCTS.after_fork)
