//! The same bits for every instruction set, number of threads, alignment and cut of the work.
//!
//! The oracle is the rule of the crate docs, one line of Rust for one line of text, one element at
//! a time.

use proptest::prelude::*;
use rmsprop::{Config, DIALECTS, Isa, Real, RmsProp, StateKey};

/// One parameter as the oracle keeps it.
#[derive(Clone)]
struct Reference<T> {
    p: Vec<T>,
    v: Vec<T>,
    m: Vec<T>,
    b: Vec<T>,
    e: Vec<T>,
    t: i32,
}

impl<T: Real> Reference<T> {
    fn new(p: &[T], config: &Config) -> Self {
        let zero = vec![T::ZERO; p.len()];
        let v = vec![T::from_f64(config.initial_square_avg); p.len()];
        Reference {
            p: p.to_vec(),
            v,
            m: zero.clone(),
            b: zero,
            e: p.to_vec(),
            t: 0,
        }
    }

    /// The rule, in the words of the crate docs.
    #[allow(clippy::needless_range_loop)] // Five arrays at one index.
    fn step(&mut self, grad: &[T], config: &Config) {
        let one = |x: f64| T::from_f64(x);
        self.t += 1;
        let mut power = 1.0f64;
        let (mut base, mut t) = (config.alpha, self.t);
        while t > 0 {
            if t % 2 == 1 {
                power *= base;
            }
            base *= base;
            t /= 2;
        }
        let c = one(if config.bias_correction {
            1.0 / (1.0 - power)
        } else {
            1.0
        });
        let (eps_in, eps_out) = if config.eps_in_sqrt {
            (config.eps, 0.0)
        } else {
            (0.0, config.eps)
        };
        let (lr_in, lr_out) = if config.lr_in_momentum {
            (config.lr, 1.0)
        } else {
            (1.0, config.lr)
        };
        // No step here changes the lr, so the first is the lr itself.
        let decaying_lr = match config.corrected_weight_decay && config.lr != 0.0 {
            true => config.lr * config.lr / config.lr,
            false => config.lr,
        };
        let decay = one(decaying_lr * config.weight_decay);
        let is_cautious = config.cautious_weight_decay && config.weight_decay > 0.0;
        let (alpha, rest) = (one(config.alpha), one(1.0 - config.alpha));
        for i in 0..self.p.len() {
            let (p, v, m, b) = (
                &mut self.p[i],
                &mut self.v[i],
                &mut self.m[i],
                &mut self.b[i],
            );
            let mut g = one(if config.maximize { -1.0 } else { 1.0 }) * grad[i];
            if config.weight_decay > 0.0 {
                if config.decoupled_weight_decay {
                    if !config.cautious_weight_decay {
                        *p = *p - decay * *p;
                    }
                } else {
                    g = g + one(config.weight_decay) * *p;
                }
            }
            *v = alpha * *v + (rest * g) * g;
            let mut d = c * *v;
            if config.centered {
                *m = alpha * *m + rest * g;
                d = d - (c * *m) * (c * *m);
                if d < T::ZERO {
                    d = T::ZERO;
                }
            }
            let s = (d + one(eps_in)).sqrt() + one(eps_out);
            let u = if config.momentum > 0.0 {
                let step = (one(lr_in) * g) / s;
                *b = one(config.momentum) * *b + step;
                match config.nesterov {
                    true => one(lr_out) * (step + one(config.momentum) * *b),
                    false => one(lr_out) * *b,
                }
            } else {
                (one(config.lr) * g) / s
            };
            let zero = T::ZERO;
            let is_alike = u >= zero && *p >= zero || u <= zero && *p <= zero;
            if is_cautious && is_alike {
                *p = *p - decay * *p;
            }
            *p = *p - u;
            if let Some(limit) = config.clip_weights.map(one) {
                if *p > limit {
                    *p = limit;
                } else if *p < zero - limit {
                    *p = zero - limit;
                }
            }
            if let Some(decay) = config.ema_decay {
                self.e[i] = one(decay) * self.e[i] + one(1.0 - decay) * *p;
            }
        }
    }
}

/// Bits, with all NaNs alike: which payload survives an operation is the processor's choice.
fn bits<T: Real>(x: &[T]) -> Vec<u64> {
    let canonical = |x: &T| {
        if x.to_f64().is_nan() {
            u64::MAX
        } else {
            x.to_f64().to_bits()
        }
    };
    x.iter().map(canonical).collect()
}

fn configs() -> impl Strategy<Value = Config> {
    let flags = (
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    let extras = (
        any::<bool>(),
        any::<bool>(),
        prop::option::of(1e-3..2.0),
        prop::option::of(0.0..1.0),
    );
    let or_off = |values: std::ops::Range<f64>| prop_oneof![Just(0.0), values];
    let numbers = (
        0.0..0.1,
        0.5..0.999,
        or_off(1e-10..1e-2),
        or_off(0.0..0.1),
        or_off(0.1..0.99),
    );
    (flags, numbers, extras, 0..DIALECTS.len()).prop_map(|(flags, numbers, extras, dialect)| {
        let (cautious, corrected, clip_weights, ema_decay) = extras;
        let (centered, eps_in_sqrt, lr_in_momentum, nesterov, ..) = flags;
        let (_, _, _, _, bias_correction, decoupled, maximize) = flags;
        let (lr, alpha, eps, weight_decay, momentum) = numbers;
        Config {
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            eps_in_sqrt,
            lr_in_momentum,
            nesterov,
            bias_correction,
            decoupled_weight_decay: decoupled,
            cautious_weight_decay: decoupled && cautious,
            corrected_weight_decay: decoupled && corrected,
            clip_weights,
            ema_decay,
            maximize,
            ..Config::dialect(DIALECTS[dialect]).unwrap()
        }
    })
}

/// Ordinary values and the ones that break things.
fn values(len: usize) -> impl Strategy<Value = Vec<f64>> {
    let special = [
        0.0,
        -0.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        1e-40,
        -1e-45,
        5e-324,
        3e38,
        -1e200,
        1.0,
    ];
    prop::collection::vec(
        prop_oneof![8 => -2.0..2.0, 1 => prop::sample::select(special.to_vec())],
        len,
    )
}

fn cast<T: Real>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::from_f64(x)).collect()
}

/// Two steps over `lens`, at an offset in memory; every instruction set must say what the oracle
/// says.
fn check<T: Real>(config: &Config, lens: &[usize], offset: usize, data: &[f64]) {
    let total: usize = lens.iter().sum();
    let data = cast::<T>(data);
    let (p, grads) = (
        &data[..total],
        [&data[total..2 * total], &data[2 * total..3 * total]],
    );
    let mut wanted = Reference::new(p, config);
    for grad in grads {
        wanted.step(grad, config);
    }
    for isa in Isa::available() {
        let mut opt = RmsProp::<T>::new(config.clone(), lens)
            .unwrap()
            .with_isa(isa)
            .unwrap();
        let shift = |x: &[T]| [&vec![T::ZERO; offset], x].concat();
        let mut params = shift(p);
        for grad in grads {
            let grad = shift(grad);
            let mut params = split(&mut params[offset..], lens);
            let grads: Vec<&[T]> = lens
                .iter()
                .scan(offset, |start, len| {
                    *start += len;
                    Some(&grad[*start - len..*start])
                })
                .collect();
            opt.step(&mut params, &grads).unwrap();
        }
        let state = |key| {
            (0..lens.len())
                .flat_map(|i| opt.state(i, key).unwrap_or_default().to_vec())
                .collect::<Vec<T>>()
        };
        assert_eq!(bits(&params[offset..]), bits(&wanted.p), "{isa:?}");
        assert_eq!(
            bits(&state(StateKey::SquareAvg)),
            bits(&wanted.v),
            "{isa:?}"
        );
        if config.centered {
            assert_eq!(bits(&state(StateKey::GradAvg)), bits(&wanted.m), "{isa:?}");
        }
        if config.ema_decay.is_some() {
            assert_eq!(bits(&state(StateKey::Ema)), bits(&wanted.e), "{isa:?}");
        }
        if config.momentum > 0.0 {
            assert_eq!(
                bits(&state(StateKey::MomentumBuffer)),
                bits(&wanted.b),
                "{isa:?}"
            );
        }
    }
}

fn split<'a, T>(mut rest: &'a mut [T], lens: &[usize]) -> Vec<&'a mut [T]> {
    lens.iter()
        .map(|&len| rest.split_off_mut(..len).unwrap())
        .collect()
}

fn problems() -> impl Strategy<Value = (Config, Vec<usize>, usize, Vec<f64>)> {
    (
        configs(),
        prop::collection::vec(0usize..70, 1..4),
        0usize..16,
    )
        .prop_flat_map(|(config, lens, offset)| {
            let total: usize = lens.iter().sum();
            (Just(config), Just(lens), Just(offset), values(3 * total))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_instruction_set_computes_the_rule((config, lens, offset, data) in problems()) {
        check::<f32>(&config, &lens, offset, &data);
        check::<f64>(&config, &lens, offset, &data);
    }

    /// Rows that are long enough for blocks of lanes, of values that blocks like.
    #[test]
    fn long_rows_compute_the_rule_without_buffers(
        config in configs(),
        len in 300usize..1000,
        offset in 0usize..16,
        data in prop::collection::vec(-2.0..2.0, 3000),
        magnitude in -70..60,
    ) {
        let config = Config { centered: false, momentum: 0.0, ..config };
        let data: Vec<f64> = data.iter().map(|x| x * 2f64.powi(magnitude)).collect();
        check::<f32>(&config, &[len], offset, &data);
        check::<f64>(&config, &[len], offset, &data);
    }

    /// Chunks and threads cut the work anywhere; large enough that threads really share it.
    #[test]
    fn every_number_of_threads_computes_the_same(
        config in configs(),
        seed in any::<u32>(),
        first in 1usize..2_000_000,
        max_norm in prop::option::of(0.1..10.0),
    ) {
        let lens = [first, 2_100_000 - first, 3, 0, 100_000];
        let total: usize = lens.iter().sum();
        let mut x = seed | 1;
        let data: Vec<f32> = (0..2 * total).map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as f32 / u32::MAX as f32 - 0.5
        }).collect();
        let run = |threads: usize| {
            let opt = RmsProp::<f32>::new(config.clone(), &lens).unwrap();
            let mut opt = opt.with_threads(threads).unwrap();
            if let Some(max_norm) = max_norm {
                opt = opt.with_max_grad_norm(max_norm).unwrap();
            }
            let mut p = data[..total].to_vec();
            let mut grads = data[total..].to_vec();
            let grads = split(&mut grads, &lens);
            opt.step(&mut split(&mut p, &lens), &grads).unwrap();
            (bits(&p), opt.last_grad_norm().map(f64::to_bits))
        };
        let one = run(1);
        for threads in [2, 3] {
            prop_assert!(run(threads) == one, "{threads} threads differ");
        }
    }
}

#[test]
fn a_variance_that_rounding_made_negative_counts_as_zero() {
    let config = Config {
        centered: true,
        alpha: 0.9,
        eps: 0.0,
        lr: 1e-3,
        ..Config::default()
    };
    let mut opt = RmsProp::<f32>::new(config, &[1]).unwrap();
    let mut p = [1.0f32];
    for _ in 0..300 {
        opt.step(&mut [&mut p], &[&[0.1f32]]).unwrap();
    }
    assert!(!p[0].is_nan());
    let mut p = [f32::NAN];
    opt.step(&mut [&mut p], &[&[f32::NAN]]).unwrap();
    assert!(
        opt.state(0, StateKey::SquareAvg).unwrap()[0].is_nan(),
        "and a NaN stays one"
    );
}
