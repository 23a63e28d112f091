//! `f32` on AVX-512: 64 numbers at once, half of whose square roots do without the dividing unit.
//!
//! While arrays are in a cache, the dividing unit is what a step waits for: 16 square roots and 16
//! divisions take it 7 cycles (Zen 5), in which the multipliers have little to do. So every second
//! root is computed by multiplying, to the same bits ([`sqrt_by_multiplying`]): the plain rule takes
//! 0.85 of the time. Momentum and centering, which multiply more, took up to 1.2 of it.
//!
//! Vectors are worked on side by side because one after the other their long chains of operations
//! do not fit the window in which a processor reorders them.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use super::lanes::Lanes;

/// Numbers in a vector.
const WIDTH: usize = 16;

/// Vectors in a block.
const VECTORS: usize = 4;

/// 64 numbers; one exists only in functions that are compiled for AVX-512 and run where it is.
#[derive(Clone, Copy)]
pub struct F32x64([__m512; VECTORS]);

/// The vectors that an intrinsic makes of those of each operand.
macro_rules! each {
    ($intrinsic:ident $(::<$constant:ident>)?, $($operand:expr),*) => {
        // SAFETY: where there is a block, there is AVX-512.
        F32x64(unsafe { [
            $intrinsic$(::<$constant>)?($($operand[0]),*),
            $intrinsic$(::<$constant>)?($($operand[1]),*),
            $intrinsic$(::<$constant>)?($($operand[2]),*),
            $intrinsic$(::<$constant>)?($($operand[3]),*),
        ] })
    };
}

macro_rules! operator {
    ($trait:ident, $function:ident, $intrinsic:ident) => {
        impl $trait for F32x64 {
            type Output = Self;
            #[inline(always)]
            fn $function(self, other: Self) -> Self {
                each!($intrinsic, self.0, other.0)
            }
        }
    };
}
operator!(Add, add, _mm512_add_ps);
operator!(Sub, sub, _mm512_sub_ps);
operator!(Mul, mul, _mm512_mul_ps);
operator!(Div, div, _mm512_div_ps);

impl Lanes<f32> for F32x64 {
    const COUNT: usize = WIDTH * VECTORS;
    // If every rest were shorter than a block, LLVM would not vectorize its last numbers. (With
    // masks that was slower still: the next row may begin where this one ends, and what a masked
    // store covers cannot be loaded until it is done.)
    const FROM: usize = 3 * Self::COUNT;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        each!(_mm512_set1_ps, [x; VECTORS])
    }

    #[inline(always)]
    fn load(x: &[f32], start: usize) -> Self {
        let x = &x[start..start + Self::COUNT];
        let vector = |k| x[k * WIDTH..][..WIDTH].as_ptr();
        each!(
            _mm512_loadu_ps,
            [vector(0), vector(1), vector(2), vector(3)]
        )
    }

    #[inline(always)]
    fn store(self, x: &mut [f32], start: usize) {
        let x = &mut x[start..start + Self::COUNT];
        for (x, vector) in x.chunks_exact_mut(WIDTH).zip(self.0) {
            // SAFETY: as in `each!`; `x` has `WIDTH` elements.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), vector) };
        }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: as in `each!`.
        unsafe {
            let [a, b, c, d] = self.0;
            let (c, d) = (_mm512_sqrt_ps(c), _mm512_sqrt_ps(d));
            let [a, b] = match are_in_range(a, b) {
                true => sqrt_by_multiplying([a, b], [_mm512_rsqrt14_ps(a), _mm512_rsqrt14_ps(b)]),
                false => [_mm512_sqrt_ps(a), _mm512_sqrt_ps(b)],
            };
            F32x64([a, b, c, d])
        }
    }

    #[inline(always)]
    fn at_least_zero(self) -> Self {
        let zero = Self::splat(0.0).0;
        // SAFETY: as in `each!`.
        let below = unsafe {
            let below = |x| _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, zero[0]);
            self.0.map(below)
        };
        each!(_mm512_mask_mov_ps, self.0, below, zero)
    }
}

/// Whether [`sqrt_by_multiplying`] may be used: all are from 2^-100 to the largest number.
#[inline(always)]
unsafe fn are_in_range(x: __m512, y: __m512) -> bool {
    const LEAST: i32 = 0x0d80_0000; // 2^-100
    const LARGEST: i32 = 0x7f7f_ffff;
    // SAFETY: passed on to the caller.
    unsafe {
        let is_outside = |x| {
            let above = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(LEAST));
            _mm512_cmpgt_epu32_mask(above, _mm512_set1_epi32(LARGEST - LEAST))
        };
        is_outside(x) | is_outside(y) == 0
    }
}

/// The correctly rounded square roots of `x`, given those of 1 / x to within 2^-14.
///
/// A step of Goldschmidt's iteration makes of the latter `s`, the root to within 1.1 units in its
/// last place, and `h`, half of the reciprocal to within 2^-23. The remainder `x - s * s`, which
/// only a fused multiply-add can tell, times `h` is what `s` lacks, to within 2^-21 of such a unit.
/// (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor",
/// 1990.) So the last rounding is that of the root itself, unless the root is as near to the middle
/// between two numbers: the few `x` for which it is are tested with every possible estimate, below.
///
/// That holds when rounding to nearest. The least `x` is such that no remainder underflows.
#[inline(always)]
unsafe fn sqrt_by_multiplying(x: [__m512; 2], estimate: [__m512; 2]) -> [__m512; 2] {
    #[inline(always)]
    fn both(vector: impl Fn(usize) -> __m512) -> [__m512; 2] {
        [vector(0), vector(1)]
    }
    const EXPONENT: i32 = 1 << 23;
    // SAFETY: passed on to the caller.
    unsafe {
        let half = _mm512_set1_ps(0.5);
        let s = both(|k| _mm512_mul_ps(x[k], estimate[k]));
        // Half of it: not a multiplication, of which there are enough.
        let h = both(|k| {
            let bits = _mm512_castps_si512(estimate[k]);
            _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_set1_epi32(EXPONENT)))
        });
        let lacks = both(|k| _mm512_fnmadd_ps(s[k], h[k], half));
        let s = both(|k| _mm512_fmadd_ps(s[k], lacks[k], s[k]));
        let h = both(|k| _mm512_fmadd_ps(h[k], lacks[k], h[k]));
        let remainder = both(|k| _mm512_fnmadd_ps(s[k], s[k], x[k]));
        both(|k| _mm512_fmadd_ps(remainder[k], h[k], s[k]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn sqrt(x: [f32; 64]) -> [f32; 64] {
        let mut roots = x;
        F32x64::load(&x, 0).sqrt().store(&mut roots, 0);
        roots
    }

    #[test]
    fn every_operation_is_that_of_its_lanes() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let special = [0.0, -0.0, f32::INFINITY, f32::NAN, 1e-40, 3e38, -1e-45];
        let x: [f32; 64] = std::array::from_fn(|i| match special.get(i / 4) {
            Some(&x) => x,
            None => (i as f32).sin(),
        });
        let y: [f32; 64] = std::array::from_fn(|i| x[i * 37 % 64]);
        type Both<T> = fn(T, T) -> T;
        let operations: [(Both<F32x64>, Both<f32>); 6] = [
            (|x, y| x + y, |x, y| x + y),
            (|x, y| x - y, |x, y| x - y),
            (|x, y| x * y, |x, y| x * y),
            (|x, y| x / y, |x, y| x / y),
            (|x, _| x.sqrt(), |x, _| x.sqrt()),
            (|x, _| x.at_least_zero(), |x, _| x.at_least_zero()),
        ];
        for (of_block, of_lane) in operations {
            let mut found = [0.0; 64];
            of_block(F32x64::load(&x, 0), F32x64::load(&y, 0)).store(&mut found, 0);
            for i in 0..64 {
                assert_eq!(
                    bits(found[i]),
                    bits(of_lane(x[i], y[i])),
                    "{} {}",
                    x[i],
                    y[i]
                );
            }
        }
    }

    /// NaNs count as one.
    fn bits(x: f32) -> u32 {
        if x.is_nan() { u32::MAX } else { x.to_bits() }
    }

    /// Every mantissa; exponents at both ends of the range, in its middle, and outside.
    #[test]
    fn roots_are_those_of_the_dividing_unit() {
        if !Isa::Avx512.is_available() {
            return;
        }
        for exponent in [0, 1, 26, 27, 28, 127, 128, 253, 254, 255] {
            // Half of a block, twice: only that half is multiplied.
            for mantissa in (0..1 << 23).step_by(32) {
                let x = std::array::from_fn(|i| {
                    f32::from_bits((exponent << 23) | mantissa | (i as u32 % 32))
                });
                for (x, root) in x.into_iter().zip(sqrt(x)) {
                    assert_eq!(bits(root), bits(x.sqrt()), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn one_number_out_of_range_is_noticed() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let outside = [0.0, -0.0, f32::INFINITY, f32::NAN, -1.0, 1e-38, 1e-42];
        for (lane, special) in (0..64).flat_map(|lane| outside.map(|x| (lane, x))) {
            let x = std::array::from_fn(|i| if i == lane { special } else { 1.0 + i as f32 });
            assert_eq!(sqrt(x).map(bits), x.map(|x| bits(x.sqrt())), "{special:e}");
        }
    }

    /// The proof: where the root is so near to the middle between two numbers that the error could
    /// matter, every estimate that a processor may give leads to it.
    #[test]
    fn near_a_middle_every_estimate_leads_to_the_root() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let mut hard = 0;
        for exponent in [0, 1] {
            for mantissa in 1u64 << 23..1 << 24 {
                // x = square * 2^-46 is in [1, 4), its root in units of 2^-23; the middles are at odd
                // multiples of half of that.
                let square = mantissa << (23 + exponent);
                let middle = 2 * square.isqrt() + 1;
                let distance = (4 * square).abs_diff(middle * middle) as f64 / (4 * middle) as f64;
                assert!(distance > 0.0);
                // A hundred times the bound that `sqrt_by_multiplying` states.
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
                    let mut roots = [0.0f32; 16];
                    // SAFETY: the processor has AVX-512; the arrays are as long as a vector.
                    unsafe {
                        let estimates = _mm512_loadu_ps(estimates.as_ptr());
                        let [root, _] = sqrt_by_multiplying([_mm512_set1_ps(x); 2], [estimates; 2]);
                        _mm512_storeu_ps(roots.as_mut_ptr(), root);
                    }
                    assert_eq!(roots, [x.sqrt(); 16], "{x:e}");
                }
            }
        }
        assert!(hard > 1000, "{hard}");
    }
}
