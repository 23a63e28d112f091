"""Measures how well state in fewer bits holds the root that an update divides by.

    python benches/accuracy.py [--elements 16384] [--steps 3000]

Gradients are normal, with magnitudes from 0.01 to 1. Printed are, after so many steps, the mean and the
root mean square deviation from 1 of sqrt(square_avg) over the exact one, for each decay. Ours are stepped by
`rmsprop`. For comparison, in NumPy: bfloat16 rounded to nearest; and codes of 8 bits that are square roots, as
FlashOptim's, with the scale of each 256 and rounded without bias too. "spread" is the mean error of both
codes, as a factor, where magnitudes within a block reach over four decades.
"""

from collections.abc import Callable

import numpy as np
from harness.report import Report, numbers, parser
from rmsprop import RMSprop

Array = np.ndarray
BLOCK = 256
RNG = np.random.default_rng(0)


def nearest_bfloat16(v: Array) -> Array:
    bits = v.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def square_root_codes(v: Array) -> Array:
    """Codes c of (c / 255)^2 times the largest of a block, with the probabilities that make it right on average."""
    blocks = v.reshape(-1, BLOCK)
    scale = blocks.max(axis=1, keepdims=True)
    y = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    below = np.floor(np.sqrt(y) * 255)
    low, high = (below / 255) ** 2, ((below + 1) / 255) ** 2
    code = below + (RNG.random(y.shape) < (y - low) / (high - low))
    return ((code / 255) ** 2 * scale).reshape(v.shape).astype(np.float32)


def gradients(numel: int, decades: float) -> Callable[[], Array]:
    scales = 10.0 ** RNG.uniform(-decades, 0, numel)
    return lambda: (scales * RNG.standard_normal(numel)).astype(np.float32)


def roots(
    draw: Callable[[], Array], numel: int, alpha: float, steps: int
) -> dict[str, Array]:
    """sqrt(square_avg) over the exact one, by storage."""
    opts = {
        name: RMSprop(
            [np.zeros(numel, np.float32)], lr=0, alpha=alpha, state_dtype=dtype
        )
        for name, dtype in {
            "float32": None,
            "bfloat16": "bfloat16",
            "uint8": "uint8",
        }.items()
    }
    stores = {
        "bfloat16, nearest": nearest_bfloat16,
        "8-bit square roots": square_root_codes,
    }
    by_hand = {name: np.zeros(numel, np.float32) for name in stores}
    kept, new = np.float32(alpha), np.float32(1 - alpha)
    for _ in range(steps):
        g = draw()
        for opt in opts.values():
            opt.step(grads=[g])
        for name, store in stores.items():
            by_hand[name] = store(kept * by_hand[name] + new * g * g)
    found = {
        name: RMSprop.float32_state(opt.state_dict())["state"][0]["square_avg"]
        for name, opt in opts.items()
    }
    exact = found.pop("float32").astype(np.float64)
    return {name: np.sqrt(v / exact) for name, v in (found | by_hand).items()}


def main() -> None:
    asked = parser(__doc__, seconds=0)
    add = asked.add_argument
    add("--elements", type=numbers(BLOCK), metavar="N", default=[16_384])
    add("--steps", type=numbers(1), metavar="N", default=[3000])
    args = asked.parse_args()
    report, (numel,), (steps,) = Report(), args.elements, args.steps
    for alpha, count in ((0.9, min(50, steps)), (0.99, steps), (0.999, steps)):
        found = roots(gradients(numel, 2), numel, alpha, count)
        report.table(f"alpha {alpha}, {count} steps", ("mean", "rms"))
        for name, ratio in found.items():
            rms = np.sqrt(np.mean((ratio - 1) ** 2))
            report.row(name, ratio.mean(), rms)
            report.results.append(
                {"alpha": alpha, "storage": name, "mean": ratio.mean(), "rms": rms}
            )
    found = roots(gradients(numel, 4), numel, 0.99, steps)
    report.table("magnitudes over four decades, alpha 0.99", ("factor",))
    for name, ratio in found.items():
        factor = float(np.exp(np.abs(np.log(np.maximum(ratio, 1e-3))).mean()))
        report.row(name, factor)
        report.results.append({"storage": name, "spread": factor})
    report.end(args.json)


if __name__ == "__main__":
    main()
