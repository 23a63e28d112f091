//! Blocks for AVX-512: four vectors at a time, half of whose square roots do without the dividing unit.
//!
//! While arrays are in a cache, the dividing unit is what a step waits for: the square roots and
//! divisions of a vector take it 7 cycles for `f32` and 12 for `f64` (Zen 5), in which the
//! multipliers have little to do. So every second vector of roots is computed by multiplying, to
//! the same bits. A step without momentum or centering then takes 0.85 to 0.9 (`f32`) and 0.7 to 0.75
//! (`f64`) of the time. Momentum and centering multiply more themselves: they gained nothing with
//! `f32` (1.0 and 1.2 of the time) and little with `f64` (0.85 and 0.95).
//!
//! The vectors are worked on side by side because one after the other their long chains of
//! operations do not fit the window in which a processor reorders them.
//!
//! # A square root by multiplying
//!
//! AVX-512 estimates `1 / sqrt(x)` to within 2^-14 of it. From that come `s`, about the root, and
//! `h`, about half of the reciprocal. A step of Goldschmidt's iteration makes their relative errors
//! 1.5 times the square of what they were, plus rounding, and so does `z = s + (x - s * s) * h` with
//! that of the root. In units in the last place, `z` before rounding is wrong by less than 2^-21
//! (`f32`) or 0.43 (`f64`).
//!
//! With `f32`, rounding `z` to nearest gives the root, unless the root is as near as that to the
//! middle between two numbers. A test takes all `x` of which it is, and tries every estimate.
//!
//! With `f64`, let `f` be `z` rounded down and `f + u` the next number. Then the rounded root is one
//! of the two: the latter if `x > (f + u / 2)^2 = f * (f + u) + u * u / 4`. As `x` and `f * (f + u)`
//! are multiples of `u * u`, that is the case if `x > f * (f + u)` (Tuckerman's test), which a fused
//! multiply-add tells without an error. (With `f32`, that took 1.06 of the time.)
//!
//! All that is for rounding to nearest, and for `x` so large that nothing underflows.

use std::arch::x86_64::{
    _CMP_GE_OQ, _CMP_GT_OQ, _CMP_LE_OQ, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEG_INF,
};
use std::ops::{Add, Div, Mul, Sub};

use super::lanes::Lanes;

/// This processor has AVX2 and AVX-512 F, VL, BW and DQ.
#[derive(Clone, Copy, Debug)]
pub struct HasAvx512(());

impl HasAvx512 {
    /// Asks the processor.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq"))
        .then_some(HasAvx512(()))
    }
}

const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;

/// The vectors that an intrinsic makes of those of its operands.
macro_rules! each {
    ($intrinsic:ident, $($operand:expr),+) => {
        std::array::from_fn(|k| $intrinsic($($operand[k]),+))
    };
}

macro_rules! operator {
    ($trait:ident, $function:ident, $intrinsic:ident) => {
        impl $trait for Block {
            type Output = Self;
            #[inline(always)]
            #[allow(unsafe_code)]
            fn $function(self, other: Self) -> Self {
                // SAFETY: a block is made of a proof, or of other blocks: there is AVX-512.
                Block(unsafe { each!($intrinsic, self.0, other.0) })
            }
        }
    };
}

/// A block of numbers of one type. It is expanded where the intrinsics for them have short names.
macro_rules! block {
    ($real:ident) => {
        /// Numbers in a vector.
        const WIDTH: usize = 64 / size_of::<$real>();

        /// Four vectors.
        #[derive(Clone, Copy)]
        pub struct Block([Vector; 4]);

        operator!(Add, add, add);
        operator!(Sub, sub, sub);
        operator!(Mul, mul, mul);
        operator!(Div, div, div);

        impl Lanes<$real> for Block {
            type Proof = HasAvx512;
            const COUNT: usize = 4 * WIDTH;
            // If every rest were shorter than a block, LLVM would not vectorize its last numbers.
            // (With masks that was slower still: the next row may begin where this one ends, and
            // what a masked store covers cannot be loaded until it is done.)
            const FROM: usize = 3 * Self::COUNT;

            #[inline(always)]
            #[allow(unsafe_code)]
            fn splat(_: HasAvx512, x: $real) -> Self {
                // SAFETY: the proof.
                Block([unsafe { set1(x) }; 4])
            }

            #[inline(always)]
            #[allow(unsafe_code)]
            fn load(_: HasAvx512, x: &[$real], start: usize) -> Self {
                let x = &x[start..start + Self::COUNT];
                let pointers: [_; 4] = std::array::from_fn(|k| x[k * WIDTH..].as_ptr());
                // SAFETY: the proof; at each pointer there are as many as in a vector.
                Block(unsafe { each!(loadu, pointers) })
            }

            #[inline(always)]
            #[allow(unsafe_code)]
            fn store(self, x: &mut [$real], start: usize) {
                let x = &mut x[start..start + Self::COUNT];
                for (x, vector) in x.chunks_exact_mut(WIDTH).zip(self.0) {
                    // SAFETY: as in `operator!`; `x` is as long as a vector.
                    unsafe { storeu(x.as_mut_ptr(), vector) };
                }
            }

            #[inline(always)]
            #[allow(unsafe_code)]
            fn sqrt(self) -> Self {
                let [a, b, c, d] = self.0;
                // SAFETY: as in `operator!`.
                unsafe {
                    let [c, d] = each!(sqrt, [c, d]);
                    let [a, b] = match are_in_range([a, b]) {
                        true => sqrt_by_multiplying([a, b], each!(rsqrt14, [a, b])),
                        false => each!(sqrt, [a, b]),
                    };
                    Block([a, b, c, d])
                }
            }

            #[inline(always)]
            #[allow(unsafe_code)]
            fn at_least_zero(self) -> Self {
                // SAFETY: as in `operator!`.
                unsafe {
                    let zero = [setzero(); 4];
                    let is_below = self.0.map(|x| cmp::<_CMP_LT_OQ>(x, zero[0]));
                    Block(each!(blend, is_below, self.0, zero))
                }
            }

            #[inline(always)]
            #[allow(unsafe_code)]
            fn where_alike(self, x: Self, y: Self) -> Self {
                // SAFETY: as in `operator!`.
                unsafe {
                    let zero = [setzero(); 4];
                    let [x_up, y_up] = [x, y].map(|x| x.0.map(|x| cmp::<_CMP_GE_OQ>(x, zero[0])));
                    let [x_down, y_down] =
                        [x, y].map(|x| x.0.map(|x| cmp::<_CMP_LE_OQ>(x, zero[0])));
                    let is_alike: [_; 4] =
                        std::array::from_fn(|k| x_up[k] & y_up[k] | x_down[k] & y_down[k]);
                    Block(each!(blend, is_alike, zero, self.0))
                }
            }
        }

        /// Whether [`sqrt_by_multiplying`] may be used: all are from `LEAST` to the largest number.
        #[inline(always)]
        #[allow(unsafe_code)]
        unsafe fn are_in_range(x: [Vector; 2]) -> bool {
            // SAFETY: passed on to the caller.
            unsafe {
                let is_outside = |x| {
                    let above = sub_bits(to_bits(x), set1_bits(LEAST));
                    cmpgt_bits(above, set1_bits($real::MAX.to_bits().cast_signed() - LEAST))
                };
                is_outside(x[0]) | is_outside(x[1]) == 0
            }
        }

        /// The square roots of numbers in range; `estimate` is `1 / sqrt(x)` to within 2^-14 of it.
        #[inline(always)]
        #[allow(unsafe_code)]
        pub(super) unsafe fn sqrt_by_multiplying(
            x: [Vector; 2],
            estimate: [Vector; 2],
        ) -> [Vector; 2] {
            // SAFETY: passed on to the caller.
            unsafe {
                let mut s: [Vector; 2] = each!(mul, x, estimate);
                // Half of it: not a multiplication, of which there are enough.
                let exponent = set1_bits(1 << ($real::MANTISSA_DIGITS - 1));
                let mut h = estimate.map(|y| from_bits(sub_bits(to_bits(y), exponent)));
                let half = [set1(0.5); 2];
                let lacks: [Vector; 2] = each!(fnmadd, s, h, half);
                s = each!(fmadd, s, lacks, s);
                h = each!(fmadd, h, lacks, h);
                let lacks: [Vector; 2] = each!(fnmadd, s, s, x);
                if IS_ROUNDED_RIGHT {
                    return each!(fmadd, lacks, h, s);
                }
                let down = |k: usize| fmadd_round::<DOWN>(lacks[k], h[k], s[k]);
                let f = [down(0), down(1)];
                let next = f.map(|f| from_bits(add_bits(to_bits(f), set1_bits(1))));
                let above: [Vector; 2] = each!(fnmadd, f, next, x);
                let is_next = above.map(|above| cmp::<_CMP_GT_OQ>(above, setzero()));
                each!(blend, is_next, f, next)
            }
        }
    };
}

pub mod f32x64 {
    pub(super) use std::arch::x86_64::{
        __m512 as Vector, _mm512_add_epi32 as add_bits, _mm512_add_ps as add,
        _mm512_castps_si512 as to_bits, _mm512_castsi512_ps as from_bits,
        _mm512_cmp_ps_mask as cmp, _mm512_cmpgt_epu32_mask as cmpgt_bits, _mm512_div_ps as div,
        _mm512_fmadd_ps as fmadd, _mm512_fmadd_round_ps as fmadd_round, _mm512_fnmadd_ps as fnmadd,
        _mm512_loadu_ps as loadu, _mm512_mask_blend_ps as blend, _mm512_mul_ps as mul,
        _mm512_rsqrt14_ps as rsqrt14, _mm512_set1_epi32 as set1_bits, _mm512_set1_ps as set1,
        _mm512_setzero_ps as setzero, _mm512_sqrt_ps as sqrt, _mm512_storeu_ps as storeu,
        _mm512_sub_epi32 as sub_bits, _mm512_sub_ps as sub,
    };

    use super::*;

    /// 2^-100.
    const LEAST: i32 = (127 - 100) << 23;
    /// Whether rounding `z` gives the root.
    const IS_ROUNDED_RIGHT: bool = true;
    block!(f32);
}

pub mod f64x32 {
    pub(super) use std::arch::x86_64::{
        __m512d as Vector, _mm512_add_epi64 as add_bits, _mm512_add_pd as add,
        _mm512_castpd_si512 as to_bits, _mm512_castsi512_pd as from_bits,
        _mm512_cmp_pd_mask as cmp, _mm512_cmpgt_epu64_mask as cmpgt_bits, _mm512_div_pd as div,
        _mm512_fmadd_pd as fmadd, _mm512_fmadd_round_pd as fmadd_round, _mm512_fnmadd_pd as fnmadd,
        _mm512_loadu_pd as loadu, _mm512_mask_blend_pd as blend, _mm512_mul_pd as mul,
        _mm512_rsqrt14_pd as rsqrt14, _mm512_set1_epi64 as set1_bits, _mm512_set1_pd as set1,
        _mm512_setzero_pd as setzero, _mm512_sqrt_pd as sqrt, _mm512_storeu_pd as storeu,
        _mm512_sub_epi64 as sub_bits, _mm512_sub_pd as sub,
    };

    use super::*;

    /// 2^-900.
    const LEAST: i64 = (1023 - 900) << 52;
    const IS_ROUNDED_RIGHT: bool = false;
    block!(f64);
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::Real;

    /// Whether two numbers are the same bits; NaNs are all one.
    fn is_same<T: Real>(x: T, y: T) -> bool {
        let (x, y) = (x.to_f64(), y.to_f64());
        x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan()
    }

    type Proof = HasAvx512;

    fn sqrt<T: Real, B: Lanes<T, Proof = Proof>>(proof: Proof, x: &[T]) -> Vec<T> {
        let mut roots = x.to_vec();
        B::load(proof, x, 0).sqrt().store(&mut roots, 0);
        roots
    }

    fn check_roots<T: Real, B: Lanes<T, Proof = Proof>>(proof: Proof, x: &[T]) {
        for (x, root) in x.iter().zip(sqrt::<T, B>(proof, x)) {
            assert!(is_same(root, x.sqrt()), "{x:?}: {root:?}");
        }
    }

    /// Numbers from 0 to 1, each time the same.
    fn random() -> impl Iterator<Item = f64> {
        let mut state = 1u64;
        std::iter::from_fn(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            Some((state >> 11) as f64 / (1u64 << 53) as f64)
        })
    }

    fn check_operations<T: Real, B: Lanes<T, Proof = Proof>>(proof: Proof) {
        let special = [0.0, -0.0, f64::INFINITY, f64::NAN, 1e-40, 3e38, -5e-324];
        let x: Vec<T> = (0..B::COUNT)
            .map(|i| T::from_f64(*special.get(i / 2).unwrap_or(&(i as f64).sin())))
            .collect();
        let y: Vec<T> = (0..B::COUNT).map(|i| x[i * 37 % B::COUNT]).collect();
        type Both<T> = fn(T, T) -> T;
        let operations: [(Both<B>, Both<T>); 7] = [
            (|x, y| x + y, |x, y| x + y),
            (|x, y| x - y, |x, y| x - y),
            (|x, y| x * y, |x, y| x * y),
            (|x, y| x / y, |x, y| x / y),
            (|x, _| x.sqrt(), |x, _| x.sqrt()),
            (
                |x, _| x.at_least_zero(),
                |x, _| if x < T::ZERO { T::ZERO } else { x },
            ),
            (
                |x, y| y.where_alike(x, y),
                |x, y| match (x.partial_cmp(&T::ZERO), y.partial_cmp(&T::ZERO)) {
                    (Some(a), Some(b)) if a == b || a.is_eq() || b.is_eq() => y,
                    _ => T::ZERO,
                },
            ),
        ];
        for (of_block, of_lane) in operations {
            let mut found = x.clone();
            of_block(B::load(proof, &x, 0), B::load(proof, &y, 0)).store(&mut found, 0);
            for i in 0..B::COUNT {
                let (found, wanted) = (found[i], of_lane(x[i], y[i]));
                assert!(is_same(found, wanted), "{:?}, {:?}", x[i], y[i]);
            }
        }
    }

    #[test]
    fn every_operation_is_that_of_its_lanes() {
        if let Some(proof) = HasAvx512::detect() {
            check_operations::<f32, f32x64::Block>(proof);
            check_operations::<f64, f64x32::Block>(proof);
        }
    }

    fn check_range<T: Real, B: Lanes<T, Proof = Proof>>(proof: Proof, outside: &[f64]) {
        for (lane, &special) in
            (0..B::COUNT).flat_map(|lane| outside.iter().map(move |x| (lane, x)))
        {
            let ordinary = |i| if i == lane { special } else { 1.0 + i as f64 };
            let x: Vec<T> = (0..B::COUNT).map(|i| T::from_f64(ordinary(i))).collect();
            check_roots::<T, B>(proof, &x);
        }
    }

    #[test]
    fn one_number_out_of_range_is_noticed() {
        if let Some(proof) = HasAvx512::detect() {
            let outside = [0.0, -0.0, f64::INFINITY, f64::NAN, -1.0, 5e-324];
            check_range::<f32, f32x64::Block>(proof, &outside);
            check_range::<f32, f32x64::Block>(proof, &[1e-38, 1e-42]);
            check_range::<f64, f64x32::Block>(proof, &outside);
            check_range::<f64, f64x32::Block>(proof, &[1e-307, 1e-310]);
        }
    }

    /// Every mantissa; exponents at both ends of the range, in its middle, and outside.
    #[test]
    fn roots_of_f32_are_those_of_the_dividing_unit() {
        let Some(proof) = HasAvx512::detect() else {
            return;
        };
        for exponent in [0, 1, 26, 27, 28, 127, 128, 253, 254, 255] {
            // Half of a block, twice: only that half is multiplied.
            for mantissa in (0..1 << 23).step_by(32) {
                let x: [f32; 64] = std::array::from_fn(|i| {
                    f32::from_bits((exponent << 23) | mantissa | (i as u32 % 32))
                });
                check_roots::<f32, f32x64::Block>(proof, &x);
            }
        }
    }

    /// Where rounding is hardest: around squares, and around the squares of what is in the middle
    /// between two numbers; besides, anywhere.
    #[test]
    fn roots_of_f64_are_those_of_the_dividing_unit() {
        let Some(proof) = HasAvx512::detect() else {
            return;
        };
        let mut random = random();
        for round in 0..200_000 {
            let scale = 2f64.powi((round % 2060) - 1040);
            let x: [f64; 32] = std::array::from_fn(|i| {
                let root = 1.0 + random.next().unwrap();
                let square = match i % 4 {
                    0 => root as f32 as f64 * root as f32 as f64,
                    1 => root * root,
                    2 => (root + f64::EPSILON / 2.0) * root,
                    _ => 4.0 - (i as f64) * f64::EPSILON,
                };
                let nearby = square.to_bits() + (round as u64 + i as u64) % 5 - 2;
                f64::from_bits(nearby) * scale
            });
            check_roots::<f64, f64x32::Block>(proof, &x);
        }
    }

    /// The roots of a vector, from these estimates.
    macro_rules! roots_from {
        ($module:ident, $x:expr, $estimates:expr) => {{
            let (x, estimates) = ($x, $estimates);
            let mut roots = x;
            // SAFETY: the processor has AVX-512, and the arrays are as long as a vector.
            unsafe {
                let (x, estimates) = (x.as_ptr(), estimates.as_ptr());
                let [root, _] = $module::sqrt_by_multiplying(
                    [$module::loadu(x); 2],
                    [$module::loadu(estimates); 2],
                );
                $module::storeu(roots.as_mut_ptr(), root);
            }
            roots
        }};
    }

    /// The proof for `f32`.
    #[test]
    fn near_a_middle_every_estimate_leads_to_the_root() {
        if HasAvx512::detect().is_none() {
            return;
        }
        let mut hard = 0;
        for exponent in [0, 1] {
            for mantissa in 1u64 << 23..1 << 24 {
                // x = square * 2^-46 is in [1, 4), its root in units of 2^-23; the middles are at
                // odd multiples of half of that.
                let square = mantissa << (23 + exponent);
                let middle = 2 * square.isqrt() + 1;
                let distance = (4 * square).abs_diff(middle * middle) as f64 / (4 * middle) as f64;
                // A hundred times the error of `z`.
                if distance > 1.0 / (1 << 14) as f64 {
                    continue;
                }
                hard += 1;
                let x = (square as f64 / (1u64 << 46) as f64) as f32;
                let exact = f64::from(x).sqrt();
                let ends = [1.0 - 1.0 / 16384.0, 1.0 + 1.0 / 16384.0].map(|end| end / exact);
                let [first, last] = ends.map(|end| (end as f32).to_bits());
                for bits in (first..=last).step_by(16) {
                    let estimates: [f32; 16] =
                        std::array::from_fn(|i| f32::from_bits(bits + i as u32));
                    let roots = roots_from!(f32x64, [x; 16], estimates);
                    assert_eq!(roots, [x.sqrt(); 16], "{x:e}");
                }
            }
        }
        assert!(hard > 1000, "{hard}");
    }

    /// Whatever a processor estimates within the 2^-14 that it may be wrong by.
    #[test]
    fn estimates_of_f64_lead_to_the_root() {
        if HasAvx512::detect().is_none() {
            return;
        }
        let mut random = random();
        let mut next = || random.next().unwrap();
        for round in 0..100_000 {
            let x: [f64; 8] = std::array::from_fn(|_| 1.0 + 3.0 * next());
            let estimates: [f64; 8] = std::array::from_fn(|i| {
                let error = [1.0, -1.0, 2.0 * next() - 1.0][(round + i) % 3];
                // Rounding must not make it larger.
                (1.0 + error * (1.0 / 16384.0 - 1e-12)) / x[i].sqrt()
            });
            let roots = roots_from!(f64x32, x, estimates);
            assert_eq!(roots, x.map(f64::sqrt), "{x:?}, {estimates:?}");
        }
    }
}
