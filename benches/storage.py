"""Times a step by how numbers are stored, beside our own float32 step of as many elements.

    python benches/storage.py [--elements 10000000,50000000] [--threads 1,2]
    RMSPROP_ISA=avx2 python benches/storage.py    # without AVX-512

Bytes are those that a step moves of each element. All forms take turns in one run, on the same
threads; printed are milliseconds a step (median), and that over float32's.
"""

from typing import Any

import numpy as np
from harness import is_installed
from harness.report import Report, numbers, parser
from harness.timing import Arrays, Contender, Run, measure, summary
from rmsprop import RMSprop, info

SAMPLE_S = 2e-2
UINT8: dict[str, Any] = {"state_dtype": "uint8"}
STOCHASTIC = {"rounding": "stochastic"}
# The type of parameters and gradients, options, and bytes.
FORMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "float32": ("float32", {}, 20),
    "float32, state uint8": ("float32", UINT8, 14),
    "float32, state bfloat16": ("float32", {"state_dtype": "bfloat16"}, 16),
    "bfloat16": ("bfloat16", {}, 14),
    "bfloat16, stochastic": ("bfloat16", STOCHASTIC, 14),
    "bfloat16, state uint8": ("bfloat16", {**UINT8, **STOCHASTIC}, 8),
    "the same, 24 master bits": (
        "bfloat16",
        {**UINT8, **STOCHASTIC, "master_weight_bits": 24},
        10,
    ),
    "bfloat16, 32 master bits": ("bfloat16", {"master_weight_bits": 32}, 18),
    "float16": ("float16", {}, 14),
    "float32, ema_decay": ("float32", {"ema_decay": 0.99}, 28),
}


def stepped(opt: RMSprop, grads: Arrays) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            opt.step(grads=grads)

    return run


def made(form: str, numel: int, threads: int) -> Contender:
    name, options, _ = FORMS[form]
    dtype = np.dtype(name)
    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(numel, np.float32).astype(dtype) for _ in range(2))
    return Contender(stepped(RMSprop([p], lr=1e-4, threads=threads, **options), [g]))


def main() -> None:
    asked = parser(__doc__, seconds=20.0)
    add = asked.add_argument
    add("--elements", type=numbers(1), metavar="N,M", default=[10_000_000])
    add("--threads", type=numbers(1), metavar="N,M", help="1 and all, if left out")
    args = asked.parse_args()
    report, forms = Report(), dict(FORMS)
    if is_installed("ml_dtypes"):
        import ml_dtypes  # noqa: F401 (NumPy learns of its bfloat16)
    else:
        report.left_out["bfloat16 parameters"] = "ml_dtypes is not installed"
        forms = {k: v for k, v in forms.items() if v[0] != "bfloat16"}
    for numel in args.elements:
        for threads in args.threads or sorted({1, info()["threads"]}):
            runs = {form: made(form, numel, threads) for form in forms}
            measured = measure(runs, SAMPLE_S, args.seconds, asleep_s=0)
            title = f"{numel:,} elements, {threads} thread{'s' * (threads > 1)}"
            report.table(title, ("bytes", "ms", "/ float32"))
            rows = {form: summary(samples) for form, samples in measured.items()}
            base = rows["float32"]["median_us"]
            for form, row in rows.items():
                time = row["median_us"]
                report.row(form, forms[form][2], time / 1e3, time / base)
                place = {"elements": numel, "threads": threads, "form": form}
                report.results.append({**place, **row})
    report.end(args.json)


if __name__ == "__main__":
    main()
