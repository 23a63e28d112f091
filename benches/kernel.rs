//! The step against its limit: `cargo bench`, or `cargo bench -- 10000000` for one size.
//!
//! The limit is the same five streams (read p, g, v; write p, v) with one multiply-add and nothing
//! else, on the same threads. The two take turns, so that what else the machine does hits both
//! alike; the ratio is between medians. (criterion runs one benchmark after the other, which on a
//! shared machine measures the neighbours.)

use std::hint::black_box;
use std::time::{Duration, Instant};

use rmsprop::{Config, RmsProp, isa};

const SIZES: [usize; 6] = [4_600, 100_000, 1_000_000, 4_000_000, 10_000_000, 50_000_000];

fn main() {
    let wanted: Vec<usize> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    println!(
        "isa: {}, f32, one tensor, median of interleaved rounds",
        isa().unwrap().name()
    );
    println!(
        "{:>10} {:>7} {:>12} {:>12} {:>11}",
        "numel", "threads", "step µs", "limit µs", "limit/step"
    );
    for numel in SIZES
        .into_iter()
        .filter(|numel| wanted.is_empty() || wanted.contains(numel))
    {
        for threads in [1, 2] {
            case(numel, threads);
        }
    }
}

fn case(numel: usize, threads: usize) {
    let grad: Vec<f32> = (0..numel)
        .map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.5)
        .collect();
    let (mut p, mut q, mut v) = (grad.clone(), grad.clone(), vec![1.0f32; numel]);
    let opt = RmsProp::<f32>::new(Config::default(), &[numel]).unwrap();
    let mut opt = opt.with_threads(threads).unwrap();
    let repeats = (2_000_000 / numel).max(1);
    let rounds = (400_000_000 / (numel * repeats)).clamp(9, 101);
    let (mut steps, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        steps.push(time(repeats, || opt.step(&mut [&mut p], &[&grad]).unwrap()));
        limits.push(time(repeats, || {
            five_streams(&mut q, &grad, &mut v, threads)
        }));
    }
    let (step, limit) = (median(steps), median(limits));
    println!(
        "{numel:>10} {threads:>7} {step:>12.2} {limit:>12.2} {:>11.3}",
        limit / step
    );
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

fn five_streams(p: &mut [f32], g: &[f32], v: &mut [f32], threads: usize) {
    // Below half a million elements a second thread does not pay: the best is one.
    if threads == 1 || p.len() < 500_000 {
        return sweep(p, g, v);
    }
    let half = p.len() / 2;
    let ((p0, p1), (g0, g1), (v0, v1)) =
        (p.split_at_mut(half), g.split_at(half), v.split_at_mut(half));
    rayon::join(|| sweep(p0, g0, v0), || sweep(p1, g1, v1));
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
