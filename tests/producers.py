"""DLPack producers: NumPy arrays behind nothing but `__dlpack__`, and capsules built by hand."""

import ctypes

import numpy as np

CPU, CUDA = (1, 0), (2, 0)
READ_ONLY, IS_COPIED = 1, 2
FLOAT, BFLOAT, COMPLEX = 2, 4, 5


class Versioned:
    """Shows an array through versioned capsules only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**{**keywords, "max_version": (1, 0)})

    def __dlpack_device__(self):
        return CPU


class Legacy(Versioned):
    """Shows an array as a producer from before DLPack 1.0 does."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Handmade:
    """A versioned capsule over an array's memory that says whatever it is told to say.

    `ndim` is a number of dimensions that need not be true, `more_dims` so many more of length 1 that are there.
    `handed_out` counts the capsules, `given_back` the calls of their deleter.
    """

    def __init__(
        self,
        array,
        *,
        device=CPU,
        flags=0,
        major=1,
        code=FLOAT,
        item_bits=None,
        lanes=1,
        has_data=True,
        has_strides=True,
        byte_offset=0,
        ndim=None,
        more_dims=0,
    ):
        self.array, self.device = array, device
        self.handed_out = self.given_back = 0
        lengths = ctypes.c_int64 * (array.ndim + more_dims)
        shape = lengths(*array.shape, *[1] * more_dims)
        strides = lengths(
            *(stride // array.itemsize for stride in array.strides), *[1] * more_dims
        )
        tensor = _Tensor(
            data=array.ctypes.data - byte_offset if has_data else None,
            device_type=device[0],
            device_id=device[1],
            ndim=array.ndim + more_dims if ndim is None else ndim,
            code=code,
            bits=item_bits or 8 * array.itemsize,
            lanes=lanes,
            shape=shape,
            strides=strides if has_strides else None,
            byte_offset=byte_offset,
        )
        self._managed = _Managed(
            major=major,
            minor=3,
            deleter=_DELETER(self._give_back),
            flags=flags,
            tensor=tensor,
        )
        self._kept = shape, strides

    def _give_back(self, _):
        self.given_back += 1

    def __dlpack__(self, **_):
        self.handed_out += 1
        return _new_capsule(
            ctypes.addressof(self._managed), b"dltensor_versioned", None
        )

    def __dlpack_device__(self):
        return self.device


def misaligned(array, offset_bytes):
    """A copy whose first element lies `offset_bytes` past a multiple of 64 bytes."""
    room = np.empty(array.nbytes + 64 + offset_bytes, np.uint8)
    start = -room.ctypes.data % 64 + offset_bytes
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
