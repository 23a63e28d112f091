//! Which instruction set runs, and the floating-point mode it runs in.
//!
//! Nothing here computes: every function below is [`update::sweep_all`] or [`norm::add_squares`]
//! compiled once more. LLVM vectorises them; where intrinsics gain something, the formula is
//! compiled for lanes that are made of them ([`avx512`](super::avx512)).
//!
//! That the processor has an instruction set is a value ([`Code`]), made where it is asked, so no
//! function that needs one can be called without.

use std::ops::Range;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::avx512::HasAvx512;
#[cfg(target_arch = "x86_64")]
use super::rule::Momentum;
use super::rule::{Real, Rule, Slices};
use super::stage::Form;
use super::{norm, update};
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
    pub fn is_available(self) -> bool {
        self.code().is_some()
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
        Isa::find("isa", name)
    }

    /// The one called `found`, which was asked for by an argument or a variable of that name.
    fn find(name: &'static str, found: &str) -> Result<Isa, Error> {
        Isa::available()
            .find(|isa| isa.name() == found)
            .ok_or_else(|| Error::Isa {
                name,
                found: found.to_owned(),
                available: Isa::available()
                    .map(Isa::name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The code for it, if this processor can run that.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn code(self) -> Option<Code> {
        match self {
            Isa::Scalar => Some(Code::Scalar),
            Isa::Baseline => Some(Code::Baseline),
            Isa::Avx2 => HasAvx2::detect().map(Code::Avx2),
            Isa::Avx512 => HasAvx2::detect()
                .zip(HasAvx512::detect())
                .map(|(avx2, avx512)| Code::Avx512(avx512, avx2)),
        }
    }

    /// The code for it, if this processor can run that.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn code(self) -> Option<Code> {
        match self {
            Isa::Scalar => Some(Code::Scalar),
            Isa::Baseline => Some(Code::Baseline),
            Isa::Avx2 | Isa::Avx512 => None,
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
            Some(name) => Isa::find("RMSPROP_ISA", &name.to_string_lossy()),
            None => Ok(Isa::available().next_back().unwrap_or(Isa::Scalar)),
        },
    )
    .clone()
}

/// This processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct HasAvx2(());

#[cfg(target_arch = "x86_64")]
impl HasAvx2 {
    /// Asks the processor.
    fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(HasAvx2(()))
    }
}

/// Code that this processor can run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code {
    Scalar,
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2(HasAvx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(HasAvx512, HasAvx2),
}

impl Code {
    /// The one to run in this thread's floating-point mode: the blocks of
    /// [`avx512`](super::avx512) are for rounding to nearest.
    pub fn in_this_mode(self) -> Self {
        match self {
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(_, avx2) if !FloatMode::current().is_to_nearest() => Code::Avx2(avx2),
            code => code,
        }
    }

    /// Updates all arrays in place.
    #[inline(always)]
    #[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
    pub fn sweep_all<'a, T: Real>(self, all: impl Iterator<Item = Slices<'a, T>>, rule: &Rule<T>) {
        match self {
            Code::Scalar => sweep_scalar(all, rule),
            Code::Baseline => sweep_baseline(all, rule),
            // SAFETY: the proof.
            #[cfg(target_arch = "x86_64")]
            Code::Avx2(_) => unsafe { sweep_avx2(all, rule) },
            // SAFETY: the proof.
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(proof, _) => unsafe { sweep_avx512(proof, all, rule) },
        }
    }

    /// Updates a range of the elements of the parameter with that index.
    ///
    /// # Safety
    /// As [`Form::sweep`].
    #[allow(unsafe_code)]
    pub unsafe fn sweep_form<T: Real>(
        self,
        form: &Form,
        index: usize,
        range: Range<usize>,
        rule: &Rule<T>,
    ) {
        // SAFETY: passed on to the caller, and the proofs.
        unsafe {
            match self {
                Code::Scalar | Code::Baseline => form.sweep(self, index, range, rule),
                #[cfg(target_arch = "x86_64")]
                Code::Avx2(_) => sweep_form_avx2(self, form, index, range, rule),
                #[cfg(target_arch = "x86_64")]
                Code::Avx512(..) => sweep_form_avx512(self, form, index, range, rule),
            }
        }
    }

    /// Adds the squares of the elements of a chunk from `at` on to its sums.
    #[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
    pub fn add_squares<T: Real>(self, sums: &mut norm::Sums, at: usize, g: &[T]) {
        match self {
            Code::Scalar | Code::Baseline => norm::add_squares(sums, at, g),
            // SAFETY: the proof.
            #[cfg(target_arch = "x86_64")]
            Code::Avx2(_) => unsafe { add_squares_avx2(sums, at, g) },
            // SAFETY: the proof.
            #[cfg(target_arch = "x86_64")]
            Code::Avx512(..) => unsafe { add_squares_avx512(sums, at, g) },
        }
    }
}

fn sweep_scalar<'a, T: Real>(all: impl Iterator<Item = Slices<'a, T>>, rule: &Rule<T>) {
    for mut slices in all {
        while !slices.p.is_empty() {
            let (one, others) = slices.split_at(1);
            let mut one = std::iter::once(one);
            sweep_baseline(&mut one as &mut dyn Iterator<Item = _>, rule);
            slices = others;
        }
    }
}

#[inline(never)]
fn sweep_baseline<'a, T: Real>(all: impl Iterator<Item = Slices<'a, T>>, rule: &Rule<T>) {
    update::sweep_all::<T, T::One>((), all, rule);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sweep_avx2<'a, T: Real>(all: impl Iterator<Item = Slices<'a, T>>, rule: &Rule<T>) {
    update::sweep_all::<T, T::One>((), all, rule);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
fn sweep_avx512<'a, T: Real>(
    proof: HasAvx512,
    all: impl Iterator<Item = Slices<'a, T>>,
    rule: &Rule<T>,
) {
    if rule.centered || rule.has_momentum() {
        return update::sweep_all::<T, T::One>((), all, rule);
    }
    // Constants let the compiler drop branches and multiplications.
    let one = T::from_f64(1.0);
    let rule = Rule {
        centered: false,
        momentum_form: Momentum::Off,
        ..*rule
    };
    let uncorrected = Rule {
        correction: one,
        ..rule
    };
    let unscaled = Rule {
        grad_scale: one,
        ..uncorrected
    };
    if rule.correction != one {
        update::sweep_all::<T, T::Avx512>(proof, all, &rule);
    } else if rule.grad_scale != one {
        update::sweep_all::<T, T::Avx512>(proof, all, &uncorrected);
    } else {
        update::sweep_all::<T, T::Avx512>(proof, all, &unscaled);
    }
}

/// # Safety
/// As [`Form::sweep`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
unsafe fn sweep_form_avx2<T: Real>(
    code: Code,
    form: &Form,
    index: usize,
    range: Range<usize>,
    rule: &Rule<T>,
) {
    // SAFETY: passed on to the caller.
    unsafe { form.sweep(code, index, range, rule) };
}

/// # Safety
/// As [`Form::sweep`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
#[allow(unsafe_code)]
unsafe fn sweep_form_avx512<T: Real>(
    code: Code,
    form: &Form,
    index: usize,
    range: Range<usize>,
    rule: &Rule<T>,
) {
    // SAFETY: passed on to the caller.
    unsafe { form.sweep(code, index, range, rule) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_squares_avx2<T: Real>(sums: &mut norm::Sums, at: usize, g: &[T]) {
    norm::add_squares(sums, at, g);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
fn add_squares_avx512<T: Real>(sums: &mut norm::Sums, at: usize, g: &[T]) {
    norm::add_squares(sums, at, g);
}

/// The control bits of a thread's floating-point unit: rounding mode, flush to zero.
///
/// The mode belongs to a thread, so a step that runs on several must carry the caller's along.
/// Elsewhere than on x86-64 it is left alone.
///
/// # Limitations
/// Rust does not promise that code compiled for the default mode is right in another: a compiler may
/// compute a constant, or move an operation to where the mode is not yet set. The kernels have no
/// constants to fold and are not inlined into what sets the mode; tests run them in every mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FloatMode(#[cfg(target_arch = "x86_64")] u32);

impl FloatMode {
    /// This thread's mode.
    #[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
    pub fn current() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            FloatMode(mxcsr() & !EXCEPTIONS)
        }
        #[cfg(not(target_arch = "x86_64"))]
        FloatMode()
    }

    /// Whether it rounds to nearest.
    #[cfg(target_arch = "x86_64")]
    fn is_to_nearest(self) -> bool {
        const ROUNDING: u32 = 3 << 13;
        self.0 & ROUNDING == 0
    }

    /// Runs `work` in this mode and gives the thread its own mode back, also when `work` panics.
    #[cfg(feature = "threads")]
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

    /// Leaves the sticky exception flags as they are: a record, not a mode.
    #[cfg(feature = "threads")]
    #[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
    fn set(self) {
        #[cfg(target_arch = "x86_64")]
        {
            let value = self.0 | mxcsr() & EXCEPTIONS;
            // SAFETY: every x86-64 processor has SSE; the value was read from the same register of
            // some thread, so it has no reserved bit.
            unsafe {
                std::arch::asm!("ldmxcsr [{}]", in(reg) &value, options(nostack, readonly, preserves_flags))
            };
        }
    }
}

/// The sticky exception flags.
#[cfg(target_arch = "x86_64")]
const EXCEPTIONS: u32 = 0x3f;

/// The register with a thread's floating-point mode.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn mxcsr() -> u32 {
    let mut mxcsr = 0u32;
    // SAFETY: every x86-64 processor has SSE; stmxcsr writes the four bytes it is given.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack, preserves_flags))
    };
    mxcsr
}
