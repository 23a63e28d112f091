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

/// Bytes of an element that are kept: p, g, v; and moved: two of them are written as well.
const KEPT: f64 = 12.0;
const MOVED: f64 = 20.0;

fn main() {
    let wanted: Vec<usize> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    println!(
        "isa: {}, f32, one tensor, median of interleaved rounds",
        isa().unwrap().name()
    );
    let machine = Machine::measure();
    println!(
        "\n{:>10} {:>7} {:>12} {:>12} {:>11} {:>12} {:>11}",
        "numel", "threads", "step µs", "limit µs", "limit/step", "model µs", "step/model"
    );
    for numel in SIZES
        .into_iter()
        .filter(|numel| wanted.is_empty() || wanted.contains(numel))
    {
        for threads in [1, 2] {
            let (step, limit) = case(numel, threads);
            let model = machine.predict(numel, threads);
            println!(
                "{numel:>10} {threads:>7} {step:>12.2} {limit:>12.2} {:>11.3} {model:>12.2} {:>11.2}",
                limit / step,
                step / model,
            );
        }
    }
}

/// The ceilings of the model.
struct Machine {
    call_us: f64,
    /// Of the arithmetic on one thread, in ns an element.
    compute_ns: f64,
    /// Sizes of a core's second-level cache and of the last level, in bytes.
    caches: [f64; 2],
    /// GB/s on one and two threads, by where the arrays are: second level, last level, memory.
    bandwidth: [[f64; 3]; 2],
}

impl Machine {
    fn measure() -> Machine {
        let caches = [2, 3].map(cache_bytes);
        // In the first-level cache.
        let [short, long] = [512, 2048].map(|numel| case(numel, 1).0);
        let compute_ns = (long - short) * 1e3 / (2048.0 - 512.0);
        let probes = [0.4 * caches[0], 0.2 * caches[1], 8.0 * caches[1]];
        let bandwidth = [1, 2].map(|threads| {
            std::array::from_fn(|level| {
                let share = if level == 0 { threads as f64 } else { 1.0 };
                let numel = (share * probes[level] / KEPT) as usize;
                MOVED * numel as f64 / case(numel, threads).1 * 1e-3
            })
        });
        let machine = Machine {
            call_us: short - 512.0 * compute_ns * 1e-3,
            compute_ns,
            caches,
            bandwidth,
        };
        let [l2, l3] = caches.map(|bytes| bytes / 1024.0);
        let nanoseconds = machine.call_us * 1e3;
        println!("caches: {l2:.0} KiB a core, {l3:.0} KiB for all");
        println!("a call: {nanoseconds:.0} ns; arithmetic: {compute_ns:.3} ns an element");
        for (threads, [l2, l3, memory]) in [1, 2].into_iter().zip(bandwidth) {
            println!(
                "bandwidth on {threads}: {l2:.0} GB/s from the second-level cache, {l3:.0} from the last, {memory:.0} from memory"
            );
        }
        machine
    }

    /// Microseconds a step.
    fn predict(&self, numel: usize, threads: usize) -> f64 {
        let threads = if is_worth_two(numel) { threads } else { 1 };
        let (elements, kept) = (numel as f64, KEPT * numel as f64);
        let level = match self.caches {
            [l2, _] if kept / threads as f64 <= l2 => 0,
            [_, l3] if kept <= l3 => 1,
            _ => 2,
        };
        let compute = self.compute_ns * elements / threads as f64;
        let memory = MOVED * elements / self.bandwidth[threads - 1][level];
        self.call_us + compute.max(memory) * 1e-3
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

/// Microseconds of the step and of the limit.
fn case(numel: usize, threads: usize) -> (f64, f64) {
    let grad: Vec<f32> = (0..numel)
        .map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.5)
        .collect();
    let (mut p, mut q, mut v) = (grad.clone(), grad.clone(), vec![1.0f32; numel]);
    let opt = RmsProp::<f32>::new(Config::default(), &[numel]).unwrap();
    let mut opt = opt.with_threads(threads).unwrap();
    let repeats = (4_000_000 / numel).max(1);
    let rounds = (400_000_000 / (numel * repeats)).clamp(9, 101);
    let (mut steps, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut step = || opt.step(&mut [&mut p], &[&grad]).unwrap();
        // The arrays of the other are what the caches hold.
        time(repeats.div_ceil(4), &mut step);
        steps.push(time(repeats, step));
        limit(&mut q, &grad, &mut v, threads, repeats.div_ceil(4));
        limits.push(limit(&mut q, &grad, &mut v, threads, repeats));
    }
    (median(steps), median(limits))
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

/// From how many elements on a step without a pause uses a second thread.
fn is_worth_two(numel: usize) -> bool {
    MOVED * numel as f64 >= (1 << 20) as f64
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
