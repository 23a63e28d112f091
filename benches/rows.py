"""Times a step of some rows of a large embedding, coalescing included, beside a dense step and torch.optim.SparseAdam.

    python benches/rows.py [--rows 1000000] [--touched 4096] [--threads 1,2]

Of the rows, 64 elements each, so many are touched, a tenth of them twice. The dense step is ours, of a gradient
that is zero elsewhere. SparseAdam's work includes more arithmetic, but the same memory and the same gradient.
"""

import numpy as np
from harness.report import Report, numbers, parser
from harness.timing import Contender, measure, summary
from rmsprop import RMSprop, info

SAMPLE_S, WIDTH = 2e-2, 64
HYPER = {"lr": 1e-4}


def given(rows: int, touched: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    distinct = rng.choice(rows, touched * 10 // 11, replace=False)
    again = rng.choice(distinct, touched - len(distinct))
    indices = rng.permutation(np.concatenate([distinct, again]))
    return indices, rng.standard_normal((touched, WIDTH), np.float32)


def contenders(rows: int, touched: int, threads: int) -> dict[str, Contender]:
    indices, values = given(rows, touched)
    dense = np.zeros((rows, WIDTH), np.float32)
    np.add.at(dense, indices, values)

    def arrays(grad: object) -> Contender:
        opt = RMSprop([np.ones((rows, WIDTH), np.float32)], **HYPER, threads=threads)
        grads = [grad]
        return Contender(
            lambda steps: [opt.step(grads=grads) for _ in range(steps)] and None
        )

    found = {
        "rmsprop, rows": arrays((indices, values)),
        "rmsprop, dense": arrays(dense),
    }
    try:
        import rmsprop.torch
        import torch
    except ImportError:
        return found

    def tensors(kind: type) -> Contender:
        p = torch.nn.Parameter(torch.ones(rows, WIDTH))
        at = torch.from_numpy(indices)[None]
        grad = torch.sparse_coo_tensor(
            at, torch.from_numpy(values), p.shape, check_invariants=True
        )
        opt = kind([p], **HYPER)

        def run(steps: int) -> None:
            for _ in range(steps):
                p.grad = grad
                opt.step()

        return Contender(run, threads)

    found["rmsprop.torch, rows"] = tensors(rmsprop.torch.RMSprop)
    found["torch.optim.SparseAdam"] = tensors(torch.optim.SparseAdam)
    return found


def main() -> None:
    asked = parser(__doc__, seconds=20.0)
    add = asked.add_argument
    add("--rows", type=numbers(1), metavar="N", default=[1_000_000])
    add("--touched", type=numbers(1), metavar="N", default=[4096])
    add("--threads", type=numbers(1), metavar="N,M", help="1 and all, if left out")
    args = asked.parse_args()
    report, (rows,), (touched,) = Report(), args.rows, args.touched
    for threads in args.threads or sorted({1, info()["threads"]}):
        measured = measure(contenders(rows, touched, threads), SAMPLE_S, args.seconds)
        title = f"{touched:,} of {rows:,} rows, {threads} thread{'s' * (threads > 1)}"
        report.table(title, ("us", "/ ours"))
        found = {name: summary(samples) for name, samples in measured.items()}
        ours = found["rmsprop, rows"]["median_us"]
        for name, row in found.items():
            report.row(name, row["median_us"], row["median_us"] / ours)
            report.results.append({"threads": threads, "contender": name, **row})
    report.end(args.json)


if __name__ == "__main__":
    main()
