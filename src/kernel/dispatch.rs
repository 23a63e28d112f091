//! The first door to unsafe code: which instruction set runs, and the floating-point mode it runs
//! in.
//!
//! Nothing here computes: every function below is [`update::rows`] or [`norm::sum_squares`]
//! compiled once more. LLVM vectorises them; where intrinsics gain something, the rule is compiled
//! for lanes that are made of them ([`avx512`](super::avx512)).

use std::sync::OnceLock;

use super::{Hyper, Real, Rows, norm, update};
use crate::error::Error;

/// An instruction set that a step can run on. The bits of the result are the same on all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// One element at a time: the specification that the others are tested against.
    Scalar,
    /// What every processor of the target has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    /// AVX2, 256 bits.
    Avx2,
    /// AVX-512 F, VL, BW and DQ, 512 bits.
    Avx512,
}

impl Isa {
    /// From the slowest to the fastest.
    const ALL: [Isa; 4] = [Isa::Scalar, Isa::Baseline, Isa::Avx2, Isa::Avx512];

    /// The name that `RMSPROP_ISA` takes: "scalar", "sse2" (x86-64; "baseline" elsewhere), "avx2",
    /// "avx512".
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Baseline if cfg!(target_arch = "x86_64") => "sse2",
            Isa::Baseline => "baseline",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this processor has it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar | Isa::Baseline => true,
            Isa::Avx2 => is_x86_feature_detected!("avx2"),
            Isa::Avx512 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
            }
        }
    }

    /// Whether this processor has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        matches!(self, Isa::Scalar | Isa::Baseline)
    }

    /// Those that this processor has, from the slowest to the fastest.
    pub fn available() -> impl DoubleEndedIterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The one called `name`.
    ///
    /// # Errors
    /// [`Error::Isa`] if there is no such name or this processor does not have it.
    pub fn named(name: &str) -> Result<Isa, Error> {
        Isa::available()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| Error::Isa {
                name: "instruction set",
                found: name.to_owned(),
                available: Isa::available()
                    .map(Isa::name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The one to run on in this thread's floating-point mode: the blocks of
    /// [`avx512`](super::avx512) are for rounding to nearest.
    pub(super) fn in_this_mode(self) -> Isa {
        match self {
            Isa::Avx512 if !FloatMode::current().is_to_nearest() => Isa::Avx2,
            isa => isa,
        }
    }
}

/// The instruction set that optimizers use: the widest this processor has, unless the environment
/// variable `RMSPROP_ISA` names another. Decided at the first call.
///
/// # Errors
/// [`Error::Isa`] if `RMSPROP_ISA` is unknown or not available.
pub fn isa() -> Result<Isa, Error> {
    static ISA: OnceLock<Result<Isa, Error>> = OnceLock::new();
    ISA.get_or_init(
        || match std::env::var_os("RMSPROP_ISA").filter(|name| !name.is_empty()) {
            Some(name) => Isa::named(&name.to_string_lossy()).map_err(|error| match error {
                Error::Isa {
                    found, available, ..
                } => Error::Isa {
                    name: "RMSPROP_ISA",
                    found,
                    available,
                },
                other => other,
            }),
            None => Ok(Isa::available().next_back().unwrap_or(Isa::Scalar)),
        },
    )
    .clone()
}

/// Updates all rows in place, on `isa`.
#[inline(always)]
pub(super) fn rows<'a, T: Real>(isa: Isa, all: impl Iterator<Item = Rows<'a, T>>, h: &Hyper<T>) {
    match isa {
        Isa::Scalar => rows_scalar(all, h),
        Isa::Baseline => rows_baseline(all, h),
        // SAFETY: an `Isa` is made only by `Isa::named` and `Isa::available`, for instruction sets
        // this processor has, or by naming a variant, which `RmsProp::with_isa` checks with
        // `is_available`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { rows_avx2(all, h) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { rows_avx512(all, h) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => rows_baseline(all, h),
    }
}

fn rows_scalar<'a, T: Real>(all: impl Iterator<Item = Rows<'a, T>>, h: &Hyper<T>) {
    for mut rows in all {
        while !rows.p.is_empty() {
            let (one, others) = rows.split_at(1);
            rows_baseline(std::iter::once(one), h);
            rows = others;
        }
    }
}

#[inline(never)]
fn rows_baseline<'a, T: Real>(all: impl Iterator<Item = Rows<'a, T>>, h: &Hyper<T>) {
    update::rows::<T, T::One>(all, h);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rows_avx2<'a, T: Real>(all: impl Iterator<Item = Rows<'a, T>>, h: &Hyper<T>) {
    update::rows::<T, T::One>(all, h);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
fn rows_avx512<'a, T: Real>(all: impl Iterator<Item = Rows<'a, T>>, h: &Hyper<T>) {
    if h.centered || h.has_momentum() {
        return update::rows::<T, T::One>(all, h);
    }
    // Constants let the compiler drop branches and multiplications.
    let one = T::from_f64(1.0);
    let h = Hyper {
        centered: false,
        momentum_rule: super::Momentum::Off,
        ..*h
    };
    let uncorrected = Hyper {
        correction: one,
        ..h
    };
    let unscaled = Hyper {
        grad_scale: one,
        ..uncorrected
    };
    if h.correction != one {
        update::rows::<T, T::Avx512>(all, &h);
    } else if h.grad_scale != one {
        update::rows::<T, T::Avx512>(all, &uncorrected);
    } else {
        update::rows::<T, T::Avx512>(all, &unscaled);
    }
}

/// The sum of the squares of at most [`norm::CHUNK`] elements, on `isa`.
pub(super) fn sum_squares<T: Real>(isa: Isa, g: &[T]) -> f64 {
    match isa {
        Isa::Scalar | Isa::Baseline => norm::sum_squares(g),
        // SAFETY: as in `rows`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { sum_squares_avx2(g) },
        // SAFETY: as in `rows`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { sum_squares_avx512(g) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => norm::sum_squares(g),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_squares_avx2<T: Real>(g: &[T]) -> f64 {
    norm::sum_squares(g)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
fn sum_squares_avx512<T: Real>(g: &[T]) -> f64 {
    norm::sum_squares(g)
}

/// The control bits of a thread's floating-point unit: rounding mode, flush to zero.
///
/// The mode belongs to a thread, so a step that runs on several must carry the caller's along.
/// Elsewhere than on x86-64 it is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FloatMode(#[cfg(target_arch = "x86_64")] u32);

impl FloatMode {
    /// This thread's mode.
    pub fn current() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let mut mxcsr = 0u32;
            // SAFETY: every x86-64 processor has SSE; stmxcsr writes the four bytes it is given.
            unsafe {
                std::arch::asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack, preserves_flags))
            };
            FloatMode(mxcsr & !Self::EXCEPTIONS)
        }
        #[cfg(not(target_arch = "x86_64"))]
        FloatMode()
    }

    /// Whether it rounds to nearest.
    fn is_to_nearest(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 & Self::ROUNDING == 0;
        #[cfg(not(target_arch = "x86_64"))]
        true
    }

    /// Runs `work` in this mode and gives the thread its own mode back, also when `work` panics.
    #[cfg(feature = "rayon")]
    pub fn during<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restore(FloatMode);
        impl Drop for Restore {
            fn drop(&mut self) {
                self.0.set();
            }
        }
        let _restore = Restore(Self::current());
        self.set();
        work()
    }

    /// The sticky exception flags: a record, not a mode.
    #[cfg(target_arch = "x86_64")]
    const EXCEPTIONS: u32 = 0x3f;

    /// How to round; zero is to nearest.
    #[cfg(target_arch = "x86_64")]
    const ROUNDING: u32 = 3 << 13;

    #[cfg(feature = "rayon")]
    fn set(self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has SSE; the value was read from the same register of some
        // thread, so it has no reserved bit. The code that runs in it is the kernels', compiled
        // without an assumption about rounding: no constant is folded in them and no operation
        // reordered.
        unsafe {
            // Not `preserves_flags`: it clears the sticky ones.
            std::arch::asm!("ldmxcsr [{}]", in(reg) &self.0, options(nostack))
        };
    }
}
