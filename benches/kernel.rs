//! The step against its limit and against a model of this machine: `cargo bench`, or
//! `cargo bench -- 10000000` for one size.
//!
//! The limit is the same five streams (read p, g, v; write p, v) with one multiply-add and nothing
//! else, on the same threads. The two take turns, so that what else the machine does hits both
//! alike; the ratio is between medians. (criterion runs one benchmark after the other, which on a
//! shared machine measures the neighbours.)
//!
//! The model is a roofline (`docs/performance.md`): an element costs what the arithmetic takes, or
//! 20 bytes at the bandwidth of the cache or memory that holds the arrays, whichever is more. Its
//! ceilings are measured first, at sizes that are not predicted.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rmsprop::{Config, RmsProp, isa};

const SIZES: [usize; 8] = [
    4_600, 20_000, 100_000, 269_000, 1_000_000, 4_000_000, 10_000_000, 50_000_000,
];

const ROUNDS: usize = 21;

/// Bytes of an element that are kept: p, g, v; and moved: two of them are written as well.
const KEPT: f64 = 12.0;
const MOVED: f64 = 20.0;

/// Bytes moved from which on a step without a pause uses a second thread.
const TWO_FROM: f64 = (640 << 10) as f64;

fn main() {
    let wanted: Vec<usize> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    let is_wanted = |numel: &usize| wanted.is_empty() || wanted.contains(numel);
    println!(
        "isa: {}, f32, one tensor, median of {ROUNDS} interleaved rounds",
        isa().unwrap().name()
    );
    let caches = [2, 3].map(cache_bytes);
    // The arithmetic is measured in the first-level cache, twice, to tell it from the call.
    let mut calls = [512, 2048].map(|numel| Case::new(numel, 1));
    // In the second level, in a fifth and in three fifths of the last, which others use too, and in
    // memory.
    let probes = [
        0.4 * caches[0],
        0.2 * caches[1],
        0.6 * caches[1],
        8.0 * caches[1],
    ];
    let mut streams = [1, 2].map(|threads| {
        probes.map(|bytes| {
            let share = if bytes < caches[0] { threads } else { 1 };
            Case::new(share * (bytes / KEPT) as usize, threads)
        })
    });
    let mut handed = Case::new((1.2 * TWO_FROM / MOVED) as usize, 2);
    let sizes = SIZES.into_iter().filter(is_wanted);
    let mut cases: Vec<Case> = sizes
        .flat_map(|numel| [1, 2].map(|threads| Case::new(numel, threads)))
        .collect();
    for _ in 0..ROUNDS {
        let probes = calls.iter_mut().chain(streams.iter_mut().flatten());
        let probes = probes.chain([&mut handed]);
        probes.chain(&mut cases).for_each(Case::round);
    }
    let [short, long] = calls.map(|case| case.medians().0);
    let compute_ns = (long - short) * 1e3 / (2048.0 - 512.0);
    let mut machine = Machine {
        call_us: short - 512.0 * compute_ns * 1e-3,
        hand_us: 0.0,
        compute_ns,
        caches,
        bandwidth: streams.map(|levels| {
            levels.map(|case| MOVED * case.grad.len() as f64 / case.medians().1 * 1e-3)
        }),
    };
    machine.hand_us = handed.medians().0 - machine.predict(handed.grad.len(), 2);
    machine.print();
    println!(
        "\n{:>10} {:>7} {:>12} {:>12} {:>11} {:>12} {:>11}",
        "numel", "threads", "step µs", "limit µs", "limit/step", "model µs", "step/model"
    );
    for case in cases {
        let ((step, limit), numel, threads) = (case.medians(), case.grad.len(), case.threads);
        let model = machine.predict(numel, threads);
        println!(
            "{numel:>10} {threads:>7} {step:>12.2} {limit:>12.2} {:>11.3} {model:>12.2} {:>11.2}",
            limit / step,
            step / model,
        );
    }
}

/// The ceilings of the model.
struct Machine {
    call_us: f64,
    /// To share a step with a worker that is awake.
    hand_us: f64,
    /// Of the arithmetic on one thread, in ns an element.
    compute_ns: f64,
    /// Sizes of a core's second-level cache and of the last level, in bytes.
    caches: [f64; 2],
    /// GB/s on one and two threads, by where the arrays are.
    bandwidth: [[f64; 4]; 2],
}

impl Machine {
    fn print(&self) {
        let [l2, l3] = self.caches.map(|bytes| bytes / 1024.0);
        println!("caches: {l2:.0} KiB a core, {l3:.0} KiB for all");
        println!(
            "a call: {:.0} ns, on two threads {:.1} µs more; arithmetic: {:.3} ns an element",
            self.call_us * 1e3,
            self.hand_us,
            self.compute_ns
        );
        for (threads, [l2, fifth, most, memory]) in [1, 2].into_iter().zip(self.bandwidth) {
            println!(
                "GB/s on {threads}: {l2:.0} in the second level, {fifth:.0} in a fifth of the last, {most:.0} in three fifths, {memory:.0} in memory"
            );
        }
    }

    /// Microseconds a step.
    fn predict(&self, numel: usize, threads: usize) -> f64 {
        let threads = if is_worth_two(numel) { threads } else { 1 };
        let (elements, share) = (numel as f64, threads as f64);
        let compute = self.compute_ns * elements / share;
        let memory = MOVED * elements / self.gigabytes_a_second(KEPT * elements, threads);
        let hand_us = if threads > 1 { self.hand_us } else { 0.0 };
        self.call_us + hand_us + compute.max(memory) * 1e-3
    }

    /// The bandwidth of arrays of so many bytes. From a fifth of the last level to three fifths, and
    /// from there to twice its size, the time for a byte is on a straight line over the logarithm.
    fn gigabytes_a_second(&self, bytes: f64, threads: usize) -> f64 {
        let [l2, l3] = self.caches;
        let [second, fifth, most, memory] = self.bandwidth[threads - 1];
        let between = |(from, first): (f64, f64), (to, last): (f64, f64)| {
            let along = (bytes / from).ln() / (to / from).ln();
            1.0 / ((1.0 - along) / first + along / last)
        };
        let knots = [(0.2 * l3, fifth), (0.6 * l3, most), (2.0 * l3, memory)];
        if bytes <= l2 * threads as f64 {
            second
        } else if bytes <= knots[0].0 {
            fifth
        } else if bytes <= knots[1].0 {
            between(knots[0], knots[1])
        } else if bytes <= knots[2].0 {
            between(knots[1], knots[2])
        } else {
            memory
        }
    }
}

/// The size of the first processor's cache of a level, or a common one.
fn cache_bytes(level: usize) -> f64 {
    let path = format!("/sys/devices/system/cpu/cpu0/cache/index{level}/size");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let kib: f64 = match text.trim().strip_suffix('K').map(str::parse) {
        Some(Ok(kib)) => kib,
        _ => [1024.0, 32.0 * 1024.0][level - 2],
    };
    kib * 1024.0
}

/// One size on a number of threads; times in microseconds.
struct Case {
    threads: usize,
    grad: Vec<f32>,
    p: Vec<f32>,
    opt: RmsProp<f32>,
    steps: Vec<f64>,
    q: Vec<f32>,
    v: Vec<f32>,
    limits: Vec<f64>,
}

impl Case {
    fn new(numel: usize, threads: usize) -> Case {
        let grad: Vec<f32> = (0..numel)
            .map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.5)
            .collect();
        let opt = RmsProp::<f32>::new(Config::default(), &[numel]).unwrap();
        Case {
            threads,
            p: grad.clone(),
            opt: opt.with_threads(threads).unwrap(),
            steps: Vec::new(),
            q: grad.clone(),
            v: vec![1.0; numel],
            limits: Vec::new(),
            grad,
        }
    }

    /// Adds a sample of each, after some calls that bring its arrays into the caches.
    fn round(&mut self) {
        let (grad, repeats) = (&self.grad, (4_000_000 / self.grad.len()).max(1));
        let mut step = || self.opt.step(&mut [&mut self.p], &[grad]).unwrap();
        time(repeats.div_ceil(4), &mut step);
        self.steps.push(time(repeats, step));
        let mut limit = |repeats| limit(&mut self.q, grad, &mut self.v, self.threads, repeats);
        limit(repeats.div_ceil(4));
        self.limits.push(limit(repeats));
    }

    /// Of the step and of the limit.
    fn medians(&self) -> (f64, f64) {
        (median(self.steps.clone()), median(self.limits.clone()))
    }
}

/// Microseconds a call.
fn time(repeats: usize, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..repeats {
        call();
    }
    (start.elapsed().div_f64(repeats as f64)).div_duration_f64(Duration::from_micros(1))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Whether a step without a pause uses a second thread.
fn is_worth_two(numel: usize) -> bool {
    MOVED * numel as f64 >= TWO_FROM
}

/// Microseconds that the five streams take, each thread with its part and none waiting for another.
fn limit(p: &mut [f32], g: &[f32], v: &mut [f32], threads: usize, repeats: usize) -> f64 {
    if threads == 1 || !is_worth_two(p.len()) {
        return time(repeats, || sweep(p, g, v));
    }
    let half = p.len() / 2;
    let ((p0, p1), (g0, g1), (v0, v1)) =
        (p.split_at_mut(half), g.split_at(half), v.split_at_mut(half));
    let start = Barrier::new(2);
    let part = |p: &mut [f32], g: &[f32], v: &mut [f32]| {
        start.wait();
        time(repeats, || sweep(p, g, v))
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| part(p1, g1, v1));
        part(p0, g0, v0).max(other.join().unwrap())
    })
}

fn sweep(p: &mut [f32], g: &[f32], v: &mut [f32]) {
    // Large vectors all begin 16 bytes into a cache line.
    let head = p.as_ptr().addr().wrapping_neg() % 64 / 4;
    let (p, g, v) = (&mut p[head..], &g[head..], &mut v[head..]);
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { sweep_avx512(p, g, v) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            return unsafe { sweep_avx2(p, g, v) };
        }
    }
    multiply_add(p, g, v);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sweep_avx512(p: &mut [f32], g: &[f32], v: &mut [f32]) {
    multiply_add(p, g, v);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sweep_avx2(p: &mut [f32], g: &[f32], v: &mut [f32]) {
    multiply_add(p, g, v);
}

#[inline(always)]
fn multiply_add(p: &mut [f32], g: &[f32], v: &mut [f32]) {
    let alpha = black_box(0.99f32);
    for ((p, g), v) in p.iter_mut().zip(g).zip(v) {
        *v = alpha * *v + *g;
        *p -= *v;
    }
}
