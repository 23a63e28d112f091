"""How numbers are stored in fewer bits, once more in NumPy: what the kernel must equal bit for bit.

Written from the documentation: random bits from a counter, small floats by their values. A step reads
what is stored, widened exactly; applies the rule in float32 (`oracle`); and rounds what it stores once.
"""

import ml_dtypes
import numpy as np
import oracle

KEYS = ("p", "g", "square_avg", "grad_avg", "momentum_buffer", "ema")
BLOCK = 256
SMALL = 4096
WORD = 2**64


def mix(x):
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def random_bits(seed, parameter, update, key, numel):
    """32 random bits for each element."""
    stream = mix(seed)
    for word in (parameter, update, KEYS.index(key)):
        stream = mix(stream ^ word)
    first = mix(stream) % 2**32
    steps = np.arange(numel, dtype=np.uint64) * np.uint64(0x9E3779B1)
    return (np.uint64(first) + steps).astype(np.uint32)


def float_of(bits):
    return np.asarray(bits).astype(np.uint32).view(np.float32)


def bits_of(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def bfloat16(x, random):
    """The next bfloat16 towards zero or away from it."""
    bits = bits_of(x).astype(np.uint64) + (random >> 16)
    bits = np.where(np.isnan(x), bits_of(x) | 0x400000, bits)
    return (bits >> np.uint64(16)).astype(np.uint16).view(ml_dtypes.bfloat16)


def float16(x, random):
    """The next float16 towards zero or away from it, by exact arithmetic in float64."""
    x64 = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(np.abs(x64))
        unit = np.ldexp(1.0, np.maximum(exponent - 1, -14) - 10)
        whole = np.floor(np.abs(x64) / unit)
        rest = np.abs(x64) / unit - whole
        # As many random bits as are cut off, of the upper ones.
        cut = np.clip(13 + np.maximum(-14 - (exponent - 1), 0), 13, 31)
        drawn = (random >> (32 - cut).astype(np.uint32)) / np.ldexp(1.0, cut)
        rounded = np.copysign((whole + (rest + drawn >= 1)) * unit, x64)
        return np.where(np.isfinite(x64), rounded, x64).astype(np.float16)


CODES = {True: (30, 254), False: (14, 126)}


def encode(x, key, random):
    """Codes and scales of a flat array."""
    is_unsigned = key == "square_avg"
    powers, infinity = CODES[is_unsigned]
    least = np.float32(2.0**-powers)
    codes = np.zeros(x.size, np.uint8)
    scales = []
    for start in range(0, x.size, BLOCK):
        part = slice(start, start + BLOCK)
        values, drawn = x[part], random[part]
        magnitude = (
            np.where(values < 0, np.float32(0), values)
            if is_unsigned
            else np.abs(values)
        )
        finite = np.where(np.isfinite(values), magnitude, np.float32(0))
        scale = np.abs(finite).max(initial=np.float32(0))
        scales.append(scale)
        far = np.float32(2.0**60)
        by = far if scale < 1 / far else 1 / far if scale > far else np.float32(1)
        with np.errstate(all="ignore"):
            reciprocal = np.float32(0) if scale == 0 else np.float32(1) / (scale * by)
            y = np.abs(finite) * by * reciprocal
        is_small = y < least
        z = np.where(is_small, y + least, y).astype(np.float64)
        exponent = np.frexp(z)[1] - 1
        eighths = z / np.ldexp(1.0, exponent - 3)
        carried = np.floor(eighths + ((drawn >> 20) * 256 + 128) / 2**20).astype(int)
        found = 8 * (exponent + powers) + carried - 8 + np.where(is_small, 0, 8)
        found = np.minimum(found, 8 + 8 * powers)
        sign = np.signbit(values) if not is_unsigned else np.zeros(values.shape, bool)
        found = np.where(np.isinf(values), infinity, found) + 128 * sign
        is_nan = np.isnan(values) | (is_unsigned & (values == -np.inf))
        codes[part] = np.where(is_nan, infinity + 1, found)
    return codes, np.array(scales, np.float32)


def decode(codes, scales, key):
    """The numbers of flat codes."""
    is_unsigned = key == "square_avg"
    powers, infinity = CODES[is_unsigned]
    magnitude = codes.astype(int) if is_unsigned else codes.astype(int) & 127
    eighths = np.where(magnitude < 8, magnitude, 8 + magnitude % 8)
    power = np.maximum(magnitude // 8 - 1, 0) - powers - 3
    value = np.ldexp(eighths.astype(np.float32), power).astype(np.float32)
    value = value * np.repeat(scales, BLOCK)[: codes.size]
    value = np.where(magnitude == infinity, np.float32(np.inf), value)
    value = np.where(magnitude == infinity + 1, np.float32(np.nan), value)
    sign = 1 if is_unsigned else np.where(codes >= 128, -1, 1)
    return (value * sign).astype(np.float32)


def split(x, bits, random):
    """A bfloat16 and the error bits of `bits` master bits."""
    number = bits_of(x).astype(np.int64)
    if bits == 24:
        number = np.where(np.isnan(x), number, (number + random) // 256 * 256)
    number = np.where(np.isnan(x), 0x7FC00000, number)
    high = (number + 0x8000) // 65536
    error = number - high * 65536
    high = high.astype(np.uint16).view(ml_dtypes.bfloat16)
    return high, error.astype(np.int16) if bits == 32 else (error // 256).astype(
        np.int8
    )


def join(high, error):
    """What was split; no infinity or sign that was written."""
    wide = error.astype(np.int64) * (256 if error.dtype == np.int8 else 1)
    return float_of(high.view(np.uint16).astype(np.int64) * 65536 + wide)


class StoredOracle:
    """`rmsprop.RMSprop` for one group of flat arrays that are stored in fewer bits."""

    def __init__(
        self,
        params,
        state_dtype=None,
        rounding="nearest",
        master_weight_bits=None,
        seed=0,
        **options,
    ):
        self.params = [p.copy() for p in params]
        self.options = oracle.Options(**options)
        self.state_dtype, self.rounding = state_dtype, rounding
        self.master, self.seed = master_weight_bits, seed
        self.state = []
        for index, p in enumerate(params):
            state = oracle.initial_state(self.wide(p), self.options)
            stored = {"step": 0}
            for key in state.keys() - {"step"}:
                stored |= self.stored(index, 0, key, state[key])
            if self.has_master(p):
                dtype = np.int8 if self.master == 24 else np.int16
                stored["error_bits"] = np.zeros(p.shape, dtype)
            self.state.append(stored)

    def has_master(self, p):
        return self.master is not None and p.dtype == ml_dtypes.bfloat16

    def wide(self, p, error=None):
        return p.astype(np.float32) if error is None else join(p, error)

    def dtype(self, key, numel):
        dtype = self.state_dtype
        if isinstance(dtype, dict):
            dtype = dtype.get(key)
        elif key == "ema":
            dtype = None
        return None if dtype == "uint8" and numel <= SMALL else dtype

    def stored(self, index, update, key, x):
        random = random_bits(self.seed, index, update, key, x.size)
        dtype = self.dtype(key, x.size)
        if dtype == "bfloat16":
            return {key: bfloat16(x, random)}
        if dtype == "uint8":
            codes, scales = encode(x, key, random)
            return {key: codes, key + "_scale": scales}
        return {key: x}

    def read(self, state, key):
        x, scales = state[key], state.get(key + "_scale")
        return x.astype(np.float32) if scales is None else decode(x, scales, key)

    def step(self, grads):
        wide = []
        for p, state in zip(self.params, self.state):
            keys = [k for k in state if k in KEYS]
            read = {key: self.read(state, key) for key in keys}
            wide.append(
                (self.wide(p, state.get("error_bits")), read | {"step": state["step"]})
            )
        factor = 1.0
        if self.options.max_grad_norm is not None:
            read = [None if g is None else g.astype(np.float32) for g in grads]
            norm = oracle.global_norm(read)
            factor = oracle.clipping_factor(norm, self.options.max_grad_norm)
        for index, (p, g) in enumerate(zip(self.params, grads)):
            if g is None:
                continue
            values, state = wide[index]
            oracle.update(values, g.astype(np.float32), state, self.options, factor)
            update = state.pop("step")
            stored = {"step": update}
            for key, x in state.items():
                stored |= self.stored(index, update, key, x)
            random = random_bits(self.seed, index, update, "p", p.size)
            is_random = self.rounding == "stochastic"
            if self.has_master(p):
                below = random >> 24 if is_random else np.full(p.size, 0x80)
                p[...], stored["error_bits"] = split(values, self.master, below)
            elif p.dtype == np.float32 or not is_random:
                with np.errstate(over="ignore"):
                    p[...] = values.astype(p.dtype)
            else:
                p[...] = (float16 if p.dtype == np.float16 else bfloat16)(
                    values, random
                )
            self.state[index] = stored
