//! What the formula needs to know: the hyperparameters, combined in `f64` and rounded once to the
//! compute type.

use std::ops::{Add, Div, Mul, Sub};

use super::lanes::Lanes;
use super::{DType, ROLES, Role, SWEPT};
use crate::config::Config;

/// A compute type: `f32` or `f64`.
///
/// The trait is sealed; the operations are IEEE 754's, each rounding once.
pub trait Real:
    sealed::Sealed
    + Copy
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Send
    + Sync
    + std::fmt::Debug
    + 'static
{
    /// Positive zero.
    const ZERO: Self;
    /// Rounds to this type, to nearest.
    fn from_f64(value: f64) -> Self;
    /// Widens to `f64`, exactly.
    fn to_f64(self) -> f64;
    /// The correctly rounded square root.
    fn sqrt(self) -> Self;
}

pub(super) mod sealed {
    use super::super::stage::Number;
    use super::super::{DType, lanes::Lanes};

    #[allow(private_bounds)]
    pub trait Sealed: Number + Sized {
        /// One number at a time.
        type One: Lanes<Self, Proof = ()>;
        /// What AVX-512 computes with.
        #[cfg(target_arch = "x86_64")]
        type Avx512: Lanes<Self, Proof = super::super::avx512::HasAvx512>;
        /// As an element type.
        const DTYPE: DType;
        /// The same numbers, if they are `f32`.
        fn as_f32s(numbers: &[Self]) -> Option<&[f32]>;
        /// The same numbers, if they are `f32`.
        fn as_f32s_mut(numbers: &mut [Self]) -> Option<&mut [f32]>;
    }

    macro_rules! sealed {
        ($t:ident, $dtype:ident, $avx512:ident, |$x:ident| $as_f32s:expr) => {
            impl Sealed for $t {
                type One = $t;
                #[cfg(target_arch = "x86_64")]
                type Avx512 = super::super::avx512::$avx512::Block;
                const DTYPE: DType = DType::$dtype;
                #[inline(always)]
                fn as_f32s($x: &[Self]) -> Option<&[f32]> {
                    $as_f32s
                }
                #[inline(always)]
                fn as_f32s_mut($x: &mut [Self]) -> Option<&mut [f32]> {
                    $as_f32s
                }
            }
        };
    }
    sealed!(f32, F32, f32x64, |x| Some(x));
    sealed!(f64, F64, f64x32, |_x| None);
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// Whether and how the update goes through a momentum buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Momentum {
    Off,
    HeavyBall,
    Nesterov,
}

/// Whether and how the parameter itself pulls the update towards zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decay {
    Off,
    L2,
    Decoupled,
    /// Decoupled, where the update goes the same way.
    Cautious,
}

/// Whether an average of the parameter is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Average {
    Off,
    /// It begins as the parameter is before this update.
    Begins,
    On,
}

/// The hyperparameters of one update in the compute type `T`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rule<T> {
    pub centered: bool,
    pub momentum_form: Momentum,
    pub decay_form: Decay,
    pub average_form: Average,
    /// -1 when maximizing, times the clipping factor.
    pub grad_scale: T,
    pub weight_decay: T,
    pub lr_weight_decay: T,
    pub alpha: T,
    pub one_minus_alpha: T,
    /// 1 / (1 - alpha^t) with bias correction, else 1.
    pub correction: T,
    pub eps_in: T,
    pub eps_out: T,
    pub momentum: T,
    pub lr: T,
    pub lr_in: T,
    pub lr_out: T,
    pub clip_weights: Option<T>,
    pub ema_decay: T,
    pub one_minus_ema_decay: T,
}

impl<T: Real> Rule<T> {
    /// What `config` means for a parameter's update number `t`, counted from 1. `has_ema`: it has an
    /// average already.
    pub fn new(config: &Config, t: u64, has_ema: bool) -> Self {
        let Config {
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            ..
        } = *config;
        let correction = if config.bias_correction {
            1.0 / (1.0 - power(alpha, t))
        } else {
            1.0
        };
        let (eps_in, eps_out) = if config.eps_in_sqrt {
            (eps, 0.0)
        } else {
            (0.0, eps)
        };
        let (lr_in, lr_out) = if config.lr_in_momentum {
            (lr, 1.0)
        } else {
            (1.0, lr)
        };
        let decaying_lr = match config.initial_lr.unwrap_or(lr) {
            initial_lr if config.corrected_weight_decay && initial_lr != 0.0 => {
                lr * lr / initial_lr
            }
            _ => lr,
        };
        let ema_decay = config.ema_decay.unwrap_or(0.0);
        Rule {
            centered: config.centered,
            momentum_form: match (momentum > 0.0, config.nesterov) {
                (false, _) => Momentum::Off,
                (true, false) => Momentum::HeavyBall,
                (true, true) => Momentum::Nesterov,
            },
            decay_form: match (weight_decay != 0.0, config.decoupled_weight_decay) {
                (false, _) => Decay::Off,
                (true, false) => Decay::L2,
                (true, true) if config.cautious_weight_decay => Decay::Cautious,
                (true, true) => Decay::Decoupled,
            },
            average_form: match (config.ema_decay, has_ema) {
                (None, _) => Average::Off,
                (Some(_), false) => Average::Begins,
                (Some(_), true) => Average::On,
            },
            grad_scale: T::from_f64(if config.maximize { -1.0 } else { 1.0 }),
            weight_decay: T::from_f64(weight_decay),
            lr_weight_decay: T::from_f64(decaying_lr * weight_decay),
            alpha: T::from_f64(alpha),
            one_minus_alpha: T::from_f64(1.0 - alpha),
            correction: T::from_f64(correction),
            eps_in: T::from_f64(eps_in),
            eps_out: T::from_f64(eps_out),
            momentum: T::from_f64(momentum),
            lr: T::from_f64(lr),
            lr_in: T::from_f64(lr_in),
            lr_out: T::from_f64(lr_out),
            clip_weights: config.clip_weights.map(T::from_f64),
            ema_decay: T::from_f64(ema_decay),
            one_minus_ema_decay: T::from_f64(1.0 - ema_decay),
        }
    }

    /// The same in all lanes.
    #[inline(always)]
    pub fn splat<L: Lanes<T>>(&self, proof: L::Proof) -> Rule<L> {
        Rule {
            centered: self.centered,
            momentum_form: self.momentum_form,
            decay_form: self.decay_form,
            average_form: self.average_form,
            grad_scale: L::splat(proof, self.grad_scale),
            weight_decay: L::splat(proof, self.weight_decay),
            lr_weight_decay: L::splat(proof, self.lr_weight_decay),
            alpha: L::splat(proof, self.alpha),
            one_minus_alpha: L::splat(proof, self.one_minus_alpha),
            correction: L::splat(proof, self.correction),
            eps_in: L::splat(proof, self.eps_in),
            eps_out: L::splat(proof, self.eps_out),
            momentum: L::splat(proof, self.momentum),
            lr: L::splat(proof, self.lr),
            lr_in: L::splat(proof, self.lr_in),
            lr_out: L::splat(proof, self.lr_out),
            clip_weights: None, // What is done in a second pass is not done in lanes.
            ema_decay: L::splat(proof, self.ema_decay),
            one_minus_ema_decay: L::splat(proof, self.one_minus_ema_decay),
        }
    }

    /// Whether the momentum buffer is used.
    #[inline(always)]
    pub fn has_momentum(&self) -> bool {
        self.momentum_form != Momentum::Off
    }

    /// Whether an average is kept.
    #[inline(always)]
    pub fn has_average(&self) -> bool {
        self.average_form != Average::Off
    }

    /// Whether there is something to do once the parameter is updated.
    #[inline(always)]
    pub fn has_second_pass(&self) -> bool {
        self.clip_weights.is_some() || self.has_average()
    }

    /// Whether the arrays of a role are read or written.
    #[inline(always)]
    pub fn uses(&self) -> [bool; ROLES] {
        [
            true,
            true,
            true,
            self.centered,
            self.has_momentum(),
            self.has_average(),
            false,
        ]
    }

    fn clip(&mut self, factor: f64) {
        self.grad_scale = T::from_f64(self.grad_scale.to_f64() * factor);
    }
}

/// A rule with its compute type: where pieces, which have none, get theirs from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnyRule {
    F32(Rule<f32>),
    F64(Rule<f64>),
}

/// Runs a block for the rule inside, whatever its type.
macro_rules! with_rule {
    ($any:expr, $rule:ident => $body:expr) => {
        match $any {
            $crate::kernel::rule::AnyRule::F32($rule) => $body,
            $crate::kernel::rule::AnyRule::F64($rule) => $body,
        }
    };
}
pub(super) use with_rule;

impl AnyRule {
    /// As [`Rule::new`], for parameters that compute in this type.
    pub fn new(dtype: DType, config: &Config, t: u64, has_ema: bool) -> Self {
        match dtype {
            DType::F64 => AnyRule::F64(Rule::new(config, t, has_ema)),
            _ => AnyRule::F32(Rule::new(config, t, has_ema)),
        }
    }

    /// The compute type.
    #[inline]
    pub fn dtype(&self) -> DType {
        match self {
            AnyRule::F32(_) => DType::F32,
            AnyRule::F64(_) => DType::F64,
        }
    }

    /// The roles whose arrays it reads or writes.
    pub fn roles(&self) -> impl Iterator<Item = Role> + use<> {
        let uses = with_rule!(self, rule => rule.uses());
        Role::ALL
            .into_iter()
            .filter(move |&role| uses[role as usize])
    }

    /// Scales the gradient by the clipping factor as well.
    pub fn clip(&mut self, factor: f64) {
        with_rule!(self, rule => rule.clip(factor));
    }
}

/// `base^exponent` by repeated squaring, written out because `powi` is free to round differently on
/// each platform.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// The same elements of the arrays of one parameter, all of `p.len()` elements; `m` is empty unless
/// centered, `b` without momentum, `e` without an average.
pub(crate) struct Slices<'a, T> {
    pub p: &'a mut [T],
    pub g: &'a [T],
    pub v: &'a mut [T],
    pub m: &'a mut [T],
    pub b: &'a mut [T],
    pub e: &'a mut [T],
}

impl<'a, T: Real> Slices<'a, T> {
    /// Elements from these addresses on, by [`Role`].
    ///
    /// # Safety
    /// In `'a` those that the rule uses are valid for `len` elements, and nobody else uses those that
    /// are written.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub unsafe fn new(arrays: [*mut T; SWEPT], len: usize, rule: &Rule<T>) -> Self {
        let uses = rule.uses();
        let slice = |role: Role| match uses[role as usize] {
            true => std::ptr::slice_from_raw_parts_mut(arrays[role as usize], len),
            false => std::ptr::slice_from_raw_parts_mut(std::ptr::NonNull::dangling().as_ptr(), 0),
        };
        // SAFETY: passed on to the caller; what is not used is empty.
        unsafe {
            Slices {
                p: &mut *slice(Role::Parameter),
                g: &*slice(Role::Gradient),
                v: &mut *slice(Role::SquareAvg),
                m: &mut *slice(Role::GradAvg),
                b: &mut *slice(Role::MomentumBuffer),
                e: &mut *slice(Role::Ema),
            }
        }
    }
}

impl<T> Slices<'_, T> {
    /// The same, for a while.
    pub fn reborrow(&mut self) -> Slices<'_, T> {
        Slices {
            p: self.p,
            g: self.g,
            v: self.v,
            m: self.m,
            b: self.b,
            e: self.e,
        }
    }

    /// Those before an element and those from it on.
    pub fn split_at(self, element: usize) -> (Self, Self) {
        fn cut<T>(x: &mut [T], element: usize) -> (&mut [T], &mut [T]) {
            x.split_at_mut(element.min(x.len()))
        }
        let (g, rest_g) = self.g.split_at(element);
        let (p, rest_p) = cut(self.p, element);
        let (v, rest_v) = cut(self.v, element);
        let (m, rest_m) = cut(self.m, element);
        let (b, rest_b) = cut(self.b, element);
        let (e, rest_e) = cut(self.e, element);
        let rest = Slices {
            p: rest_p,
            g: rest_g,
            v: rest_v,
            m: rest_m,
            b: rest_b,
            e: rest_e,
        };
        (Slices { p, g, v, m, b, e }, rest)
    }
}
