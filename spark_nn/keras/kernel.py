"""Worker side: operations of TensorFlow's graph whose work is a Python function, at little more than its own cost.

``tf.numpy_function`` takes and gives objects of its own, and copies where a result is not laid out as it wants: a tenth
of the step of a small network. So TensorFlow's interface for kernels in C [1]_ is called, which its shared library
offers to plug-ins; ``ctypes`` reaches it, and no compiler is needed. The function gets the tensors' own memory, and
mostly fills the one that it reads from. Where there is no such interface, ``tf.numpy_function`` does the same.

References
----------
.. [1] ``tensorflow/c/kernels.h`` and ``tensorflow/c/ops.h``, in the ``include`` folder of TensorFlow's package.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import math
import secrets
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

# What the arrays hold that are read, and those that are to be filled: one dimension each, perhaps of the same memory.
Work = Callable[[list[np.ndarray], list[np.ndarray]], None]

_logger = logging.getLogger(__name__)
_UNKNOWN = 2  # TensorFlow's code for errors that have no other
_CREATE = ctypes.CFUNCTYPE(c_void_p, c_void_p)
_COMPUTE = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
_DELETE = ctypes.CFUNCTYPE(None, c_void_p)
_CALLS: dict[str, tuple[Any, ...]] = {  # what each function returns, and what it takes
    "TF_NewStatus": (c_void_p,),
    "TF_SetStatus": (None, c_void_p, c_int, c_char_p),
    "TF_GetCode": (c_int, c_void_p),
    "TF_Message": (c_char_p, c_void_p),
    "TF_NewOpDefinitionBuilder": (c_void_p, c_char_p),
    "TF_OpDefinitionBuilderAddAttr": (None, c_void_p, c_char_p),
    "TF_OpDefinitionBuilderAddInput": (None, c_void_p, c_char_p),
    "TF_OpDefinitionBuilderAddOutput": (None, c_void_p, c_char_p),
    "TF_OpDefinitionBuilderSetIsStateful": (None, c_void_p, c_bool),
    "TF_RegisterOpDefinition": (None, c_void_p, c_void_p),
    "TF_NewKernelBuilder": (c_void_p, c_char_p, c_char_p, _CREATE, _COMPUTE, _DELETE),
    "TF_RegisterKernelBuilder": (None, c_char_p, c_void_p, c_void_p),
    "TF_OpKernelConstruction_GetAttrInt64": (None, c_void_p, c_char_p, POINTER(c_int64), c_void_p),
    "TF_OpKernelConstruction_Failure": (None, c_void_p, c_void_p),
    "TF_OpKernelContext_Failure": (None, c_void_p, c_void_p),
    "TF_ForwardInputOrAllocateOutput": (
        *(c_void_p, c_void_p, POINTER(c_int), c_int, c_int),
        *(POINTER(c_int64), c_int, POINTER(c_int), c_void_p),
    ),
    "TF_GetInput": (None, c_void_p, c_int, POINTER(c_void_p), c_void_p),
    "TF_TensorData": (c_void_p, c_void_p),
    "TF_TensorByteSize": (c_size_t, c_void_p),
    "TF_DeleteTensor": (None, c_void_p),
}


class Mapped:
    """A function as an operation: tensors in, as many of the same shapes and type out.

    Parameters
    ----------
    prepare : callable
        For arrays of a type and of sizes, returns the function: it gets the tensors' values as two lists of arrays of
        one dimension, and fills the second from the first. What it raises ends the step: within a graph, with an error
        of TensorFlow's that holds the traceback.
    """

    def __init__(self, prepare: Callable[[np.dtype[Any], tuple[int, ...]], Work]) -> None:
        self._prepare = prepare
        self._places: list[_Place] = []  # one for each trace; held here, and only looked up by the kernels

    def __call__(self, tensors: Sequence[Any]) -> list[Any]:
        """Add the operation to the graph; all tensors are of the same type, float32 or float64."""
        if tf.executing_eagerly():
            return [tf.convert_to_tensor(array) for array in self._copied(*(each.numpy() for each in tensors))]
        kernels = _kernels() if all(each.shape.is_fully_defined() for each in tensors) else None
        if kernels is None:
            results = tf.numpy_function(self._copied, list(tensors), [each.dtype for each in tensors])
        else:
            dtype, shapes = np.dtype(tensors[0].dtype.as_numpy_dtype), [tuple(each.shape) for each in tensors]
            place = _Place(self._prepare(dtype, tuple(math.prod(shape) for shape in shapes)), dtype, shapes)
            self._places.append(place)
            results = kernels.placed(place, tensors)
        for result, tensor in zip(results, tensors, strict=True):
            result.set_shape(tensor.shape)
        return list(results)

    def _copied(self, *given: np.ndarray) -> list[np.ndarray]:
        filled = [np.empty_like(each, order="C") for each in given]
        work = self._prepare(given[0].dtype, tuple(each.size for each in given))
        work([each.reshape(-1) for each in given], [each.reshape(-1) for each in filled])
        return filled


class _Place:
    """What the kernel needs to know at one place of a graph."""

    def __init__(self, work: Work, dtype: np.dtype[Any], shapes: Sequence[tuple[int, ...]]) -> None:
        self.work = work
        self.dtype = dtype
        self.tensors = [
            # Their memory, which of the inputs may give it, and their shape.
            (ctypes.c_char * (math.prod(shape) * self.dtype.itemsize), (c_int * 1)(number), shaped(*shape), len(shape))
            for number, shape in enumerate(shapes)
            for shaped in [c_int64 * len(shape)]
        ]


class _Thread(threading.local):
    """What a thread of TensorFlow's that runs kernels keeps from one to the next."""

    def __init__(self) -> None:
        # Else the interpreter would make itself a state of the thread, and drop it, at every step.
        ctypes.pythonapi.PyGILState_Ensure()
        self.status: Any = None
        self.forwarded = c_int()


class _Kernels:
    """The operation and its kernel, registered once in a process."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        for name, (returned, *taken) in _CALLS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returned, taken
        self._library = library
        # A name taken ends the process, and another copy of this module may have registered its own.
        self._op = f"SparkNNMapped{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._places: weakref.WeakValueDictionary[int, _Place] = weakref.WeakValueDictionary()
        self._thread = _Thread()
        # TensorFlow calls them for as long as the process lives.
        self._callbacks = (_CREATE(self._create), _COMPUTE(self._compute), _DELETE(lambda _: None))
        self._register()

    def placed(self, place: _Place, tensors: Sequence[Any]) -> list[Any]:
        """Add the operation to the graph that is being built."""
        number = next(self._numbers)
        self._places[number] = place
        graph = tf.compat.v1.get_default_graph()
        value = tf.compat.v1.AttrValue
        attributes = {"N": value(i=len(tensors)), "place": value(i=number)}
        return list(
            graph.create_op(self._op, list(tensors), [each.dtype for each in tensors], attrs=attributes).outputs
        )

    def _register(self) -> None:
        library, status = self._library, self._library.TF_NewStatus()
        op = library.TF_NewOpDefinitionBuilder(self._op.encode())
        for attribute in (b"N: int >= 1", b"T: {float, double}", b"place: int"):
            library.TF_OpDefinitionBuilderAddAttr(op, attribute)
        library.TF_OpDefinitionBuilderAddInput(op, b"given: N * T")
        library.TF_OpDefinitionBuilderAddOutput(op, b"filled: N * T")
        library.TF_OpDefinitionBuilderSetIsStateful(op, True)  # never left out, nor done once for several
        library.TF_RegisterOpDefinition(op, status)
        self._check(status)
        kernel = library.TF_NewKernelBuilder(self._op.encode(), b"CPU", *self._callbacks)
        library.TF_RegisterKernelBuilder(self._op.encode(), kernel, status)
        self._check(status)

    def _create(self, construction: int) -> int:
        library, number = self._library, c_int64()
        status = self._status()
        library.TF_OpKernelConstruction_GetAttrInt64(construction, b"place", byref(number), status)
        if library.TF_GetCode(status):
            library.TF_OpKernelConstruction_Failure(construction, status)
        return number.value

    def _compute(self, number: int, context: int) -> None:
        library, status = self._library, self._status()
        tensors: list[int] = []
        try:
            place = self._places.get(number)
            if place is None:
                raise RuntimeError("what this graph was traced for has ended: trace the step again")
            place.work(*self._arrays(place, context, tensors))
        except BaseException:  # noqa: BLE001  (who called knows nothing of Python: it is told below)
            # Whatever a path in it is made of: an error that is not told here is a step that counts.
            library.TF_SetStatus(status, _UNKNOWN, traceback.format_exc().encode(errors="backslashreplace"))
            library.TF_OpKernelContext_Failure(context, status)
        finally:
            for tensor in tensors:
                library.TF_DeleteTensor(tensor)

    def _arrays(self, place: _Place, context: int, tensors: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The memory of the inputs, and that of the outputs, which is the same where nobody else needs the input."""
        library, status, forwarded = self._library, self._thread.status, self._thread.forwarded
        forward, data = library.TF_ForwardInputOrAllocateOutput, library.TF_TensorData
        frombuffer: Any = np.frombuffer
        dtype = place.dtype
        given, filled = [], []
        for number, (memory, same, dims, rank) in enumerate(place.tensors):
            output = forward(context, same, 1, number, dims, rank, byref(forwarded), status)
            if output is None:
                self._check(status)
            tensors.append(output)
            to = frombuffer(memory.from_address(data(output) or 0), dtype)
            filled.append(to)
            if forwarded.value == number:
                given.append(to)
                continue
            source = c_void_p()
            library.TF_GetInput(context, number, byref(source), status)
            self._check(status)
            tensors.append(source.value or 0)
            if library.TF_TensorByteSize(source) != ctypes.sizeof(memory):
                raise ValueError(
                    f"tensor {number} has {library.TF_TensorByteSize(source)} bytes, and the graph says "
                    f"{ctypes.sizeof(memory)}: a layer or a gradient of its own sets a shape that is not so (set_shape)"
                )
            given.append(frombuffer(memory.from_address(data(source) or 0), dtype))
        return given, filled

    def _status(self) -> int:
        """A place of this thread's for what the interface has to say of a call."""
        self._thread.status = self._thread.status or self._library.TF_NewStatus()
        return int(self._thread.status)

    def _check(self, status: int) -> None:
        if self._library.TF_GetCode(status):
            raise RuntimeError(f"TensorFlow's interface for kernels: {self._library.TF_Message(status).decode()}")


@functools.cache
def _kernels() -> _Kernels | None:
    """Registers the operation; None where TensorFlow does not offer what that takes."""
    libraries = sorted(Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.*"))
    try:
        return _Kernels(ctypes.PyDLL(str(libraries[0])))  # which, unlike CDLL, keeps the interpreter's lock
    except (IndexError, OSError, AttributeError, RuntimeError) as error:
        _logger.info("gradients pass through tf.numpy_function, which is slower: %s", error)
        return None
