//! How numbers are kept in fewer bits than they are computed with: 16-bit floats, 8-bit codes in
//! blocks that share a scale, and the bits that rounding takes from a parameter.
//!
//! Everything is integer arithmetic or exact, so it is the same in every floating-point mode but for
//! the scaling of blocks, and for every instruction set. There are no branches, so the compiler makes
//! vectors of it.
//!
//! # Rounding at random
//!
//! State is an average: what a step adds to it is mostly less than half a unit of a short float, and
//! rounding to nearest would lose it for ever. So it is rounded up with a probability that is the
//! distance to the lower neighbour, by adding random bits below the last one that is kept.
//!
//! # Codes of 8 bits
//!
//! A code is a small float, with three bits of fraction and gradual underflow, of the value divided by
//! the block's scale, which is the largest finite magnitude in it:
//!
//! | | exponents | 1 is | smallest | infinity, NaN |
//! |---|---|---|---|---|
//! | unsigned | 31 | 248 | 2^-33 | 254, 255 |
//! | signed | 15 and a sign | 120 | 2^-17 | 126, 127 |

use super::Role;

/// Elements of one parameter that share a scale. A chunk never cuts them apart.
pub(crate) const BLOCK: usize = 256;

/// How parameters of 16 bits are rounded.
#[cfg_attr(not(feature = "python"), allow(dead_code))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rounding {
    #[default]
    Nearest,
    Stochastic,
}

/// Where random bits come from: a counter, so that they depend neither on threads nor on what was
/// drawn before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Noise {
    pub seed: u64,
    /// The update's number, from 1.
    pub update: u64,
}

impl Noise {
    /// The random bits for the elements of a parameter, by its index, in a role.
    pub fn stream(self, parameter: usize, role: Role) -> Stream {
        let words = [parameter as u64, self.update, role as u64];
        Stream(
            words
                .iter()
                .fold(mix(self.seed), |key, word| mix(key ^ word)),
        )
    }
}

/// A function from the index of an element to 32 random bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream(u64);

impl Stream {
    /// Those of the elements from one on, within 2^32. The first are random, and the others a lattice
    /// that begins there: each is as random by itself, from update to update, and neighbours differ.
    #[inline(always)]
    pub fn from(self, element: usize) -> impl Fn(usize) -> u32 + Copy {
        const STEP: u32 = 0x9E37_79B1; // 2^32 over the golden ratio
        let high = mix(self.0 ^ (element as u64 >> 32)) as u32;
        let first = high.wrapping_add((element as u32).wrapping_mul(STEP));
        move |k| first.wrapping_add((k as u32).wrapping_mul(STEP))
    }
}

/// SplitMix64's output function (Steele et al. 2014) of the next state.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

const INFINITY: u32 = 0x7F80_0000;
const SIGN: u32 = 0x8000_0000;

#[inline(always)]
pub(crate) fn widen_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The nearest, of two the even one.
#[inline(always)]
pub(crate) fn bf16_nearest(x: f32) -> u16 {
    let bits = x.to_bits();
    bf16_of(bits, 0x7FFF + (bits >> 16 & 1))
}

/// One of its neighbours, by random bits.
#[inline(always)]
pub(crate) fn bf16_stochastic(x: f32, random: u32) -> u16 {
    bf16_of(x.to_bits(), random >> 16)
}

#[inline(always)]
fn bf16_of(bits: u32, below: u32) -> u16 {
    let rounded = match bits & !SIGN > INFINITY {
        true => bits | 0x40_0000,
        false => bits.wrapping_add(below),
    };
    (rounded >> 16) as u16
}

#[inline(always)]
pub(crate) fn widen_f16(x: u16) -> f32 {
    let (sign, x) = (u32::from(x & 0x8000) << 16, u32::from(x & 0x7FFF));
    let small = (x as f32 * SMALLEST_F16).to_bits();
    let normal = (x << 13) + (112 << 23);
    let special = (x << 13) + (224 << 23);
    f32::from_bits(
        sign | match x {
            ..0x400 => small,
            0x400..0x7C00 => normal,
            _ => special,
        },
    )
}

/// The smallest positive float16, 2^-24.
const SMALLEST_F16: f32 = 1.0 / 16_777_216.0;

/// The nearest, of two the even one.
#[inline(always)]
pub(crate) fn f16_nearest(x: f32) -> u16 {
    f16_of(x, |bits, cut| (1 << (cut - 1)) - 1 + (bits >> cut & 1))
}

/// One of its neighbours, by random bits.
#[inline(always)]
pub(crate) fn f16_stochastic(x: f32, random: u32) -> u16 {
    f16_of(x, |_, cut| random >> (32 - cut))
}

/// `below` tells what is added to bits of which so many are cut off.
#[inline(always)]
fn f16_of(x: f32, below: impl Fn(u32, u32) -> u32) -> u16 {
    /// The bits of the smallest normal float16.
    const NORMAL: u32 = 113 << 23;
    let (sign, bits) = (x.to_bits() >> 16 & 0x8000, x.to_bits() & !SIGN);
    // Below that, the fraction is a whole number of the smallest float16, and bits below.
    let fraction = bits & 0x7F_FFFF | 0x80_0000;
    let cut = 126u32.wrapping_sub(bits >> 23).max(14);
    let fraction = fraction >> cut.saturating_sub(31).min(31);
    let cut = cut.min(31);
    let small = fraction.wrapping_add(below(fraction, cut)) >> cut;
    let normal = (bits.wrapping_add(below(bits, 13)) >> 13).wrapping_sub(112 << 10);
    let finite = if bits < NORMAL {
        small
    } else {
        normal.min(0x7C00)
    };
    let nan = bits >> 13 & 0x3FF | 0x7E00;
    (sign | if bits > INFINITY { nan } else { finite }) as u16
}

/// A float32 in a bfloat16 and what rounding took from it: 16 bits of 32, or 8 of 24.
///
/// The bits are a distance along the numbers, through zero too, so that who writes the parameter
/// shifts the value.
#[inline(always)]
pub(crate) fn join(x: u16, error: i32) -> f32 {
    let (sign, magnitude) = (u32::from(x & 0x8000) << 16, i32::from(x & 0x7FFF) << 16);
    let joined = magnitude + error;
    let turned = if joined < 0 { SIGN } else { 0 };
    let joined = joined.unsigned_abs();
    // An infinity that somebody wrote is not made a NaN.
    let joined = match magnitude as u32 == INFINITY {
        true => joined.min(INFINITY),
        false => joined,
    };
    f32::from_bits(sign ^ turned | joined)
}

/// What [`join`] makes `x` of: the nearest bfloat16, of two the one away from zero, and the rest. NaN
/// has none.
#[inline(always)]
pub(crate) fn split(x: f32) -> (u16, i32) {
    let bits = x.to_bits();
    let bits = match bits & !SIGN > INFINITY {
        true => 0x7FC0_0000,
        false => bits,
    };
    let rounded = bits.wrapping_add(0x8000) >> 16;
    (rounded as u16, bits.wrapping_sub(rounded << 16) as i32)
}

/// `x` with 24 of its bits: the nearest, of two the one away from zero.
#[inline(always)]
pub(crate) fn cut_nearest(x: f32) -> f32 {
    cut(x, 0x80)
}

/// `x` with 24 of its bits: one of its neighbours, by random bits.
#[inline(always)]
pub(crate) fn cut_stochastic(x: f32, random: u32) -> f32 {
    cut(x, random >> 24)
}

#[inline(always)]
fn cut(x: f32, below: u32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(match bits & !SIGN > INFINITY {
        true => bits,
        false => bits.wrapping_add(below) & !0xFF,
    })
}

/// A code for a block of 8-bit numbers.
#[derive(Clone, Copy)]
pub(crate) struct Code {
    /// The powers of two from the largest value down that have eight numbers each.
    powers: u32,
    is_signed: bool,
}

pub(crate) const UNSIGNED: Code = Code {
    powers: 30,
    is_signed: false,
};
pub(crate) const SIGNED: Code = Code {
    powers: 14,
    is_signed: true,
};

/// Codes up to the first power of two: the numbers between it and zero are as far apart as above it.
const UNDERFLOW: u32 = 8;

impl Code {
    /// That of a role.
    #[cfg(feature = "python")] // A step is compiled for each.
    pub const fn of(role: Role) -> Code {
        match role {
            Role::SquareAvg => UNSIGNED,
            _ => SIGNED,
        }
    }

    /// The bits of the smallest power of two.
    const fn least(self) -> u32 {
        (127 - self.powers) << 23
    }

    const fn infinity(self) -> u32 {
        if self.is_signed { 126 } else { 254 }
    }

    /// The numbers of a block.
    #[inline(always)]
    pub fn decode(self, codes: &[u8], scale: f32, values: &mut [f32]) {
        let least = f32::from_bits(self.least());
        for (value, &code) in values.iter_mut().zip(codes) {
            let code = u32::from(code);
            let (sign, code) = match self.is_signed {
                true => (code << 24 & SIGN, code & 0x7F),
                false => (0, code),
            };
            let is_small = code < UNDERFLOW;
            let bits = (code << 20) + self.least() - if is_small { 0 } else { UNDERFLOW << 20 };
            let small = if is_small { least } else { 0.0 };
            let finite = (f32::from_bits(bits) - small) * scale;
            let infinity = self.infinity();
            let bits = match code < infinity {
                true => finite.to_bits(),
                false => INFINITY | (code - infinity) << 22,
            };
            *value = f32::from_bits(sign | bits);
        }
    }

    /// The codes of a block's numbers, and its scale. What was decoded encodes to itself; other
    /// numbers to one of their neighbours, by random bits.
    #[inline(always)]
    pub fn encode(
        self,
        values: &[f32],
        random: impl Fn(usize) -> u32 + Copy,
        codes: &mut [u8],
    ) -> f32 {
        let is_signed = self.is_signed;
        // Of unsigned numbers, those below zero are zero.
        let magnitude = move |bits: u32| match is_signed {
            true => bits & !SIGN,
            false => bits & !((bits as i32 >> 31) as u32),
        };
        // As integers, floats of one sign have the order that they have as floats. (LLVM makes vectors of
        // this, and neither of a comparison with infinity nor of `fold`.)
        let mut largest = 0;
        for value in values {
            let bits = magnitude(value.to_bits()) as i32;
            let is_finite = (bits - INFINITY as i32) >> 31;
            largest = (bits & is_finite).max(largest);
        }
        let scale = f32::from_bits(largest as u32);
        // So that neither the reciprocal nor what is multiplied is too small or too large.
        const FAR: f32 = (1u64 << 60) as f32;
        let by = match scale {
            _ if scale < 1.0 / FAR => FAR,
            _ if scale > FAR => 1.0 / FAR,
            _ => 1.0,
        };
        let reciprocal = match largest {
            0 => 0.0,
            _ => 1.0 / (scale * by),
        };
        let (least, first, infinity) = (
            f32::from_bits(self.least()),
            self.least() >> 20,
            self.infinity(),
        );
        let one = UNDERFLOW + (self.powers << 3);
        for (k, (code, value)) in codes.iter_mut().zip(values).enumerate() {
            let bits = value.to_bits();
            let x = f32::from_bits(magnitude(bits)) * by * reciprocal;
            let is_small = x < least;
            let x = x + if is_small { least } else { 0.0 };
            // Twelve random bits, above what the product may be wrong by.
            let below = random(k) >> 12 & 0xFFF00 | 0x80;
            let rounded = (x.to_bits().wrapping_add(below) >> 20).wrapping_sub(first);
            let finite = rounded
                .wrapping_add(if is_small { 0 } else { UNDERFLOW })
                .min(one);
            let (sign, bits) = match self.is_signed {
                true => (bits >> 24 & 0x80, bits & !SIGN),
                false => (0, bits),
            };
            // Of unsigned numbers, minus infinity is NaN.
            let is_nan = (bits & !SIGN > INFINITY) | (bits == INFINITY | SIGN);
            let found = match bits & !SIGN < INFINITY {
                true => finite,
                false => infinity,
            };
            // A NaN's own sign depends on the instruction set.
            let found = if is_nan { infinity + 1 } else { sign | found };
            *code = found as u8;
        }
        scale
    }
}

/// The numbers of the blocks of codes.
///
/// # Safety
/// There is a scale for each block, valid for reads.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn decode(code: Code, codes: &[u8], scales: *const f32, values: &mut [f32]) {
    let blocks = codes.chunks(BLOCK).zip(values.chunks_mut(BLOCK));
    for (k, (codes, values)) in blocks.enumerate() {
        // SAFETY: passed on to the caller.
        code.decode(codes, unsafe { scales.add(k).read() }, values);
    }
}

/// The codes and scales of blocks of numbers.
///
/// # Safety
/// There is a scale for each block, valid for writes.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn encode(
    code: Code,
    values: &[f32],
    random: impl Fn(usize) -> u32 + Copy,
    codes: &mut [u8],
    scales: *mut f32,
) {
    let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
    for (k, (values, codes)) in blocks.enumerate() {
        let scale = code.encode(values, move |i| random(k * BLOCK + i), codes);
        // SAFETY: passed on to the caller.
        unsafe { scales.add(k).write(scale) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits of floats: of all magnitudes, and those near each bfloat16 and float16.
    fn floats() -> impl Iterator<Item = f32> {
        let near = (0..=u16::MAX).flat_map(|x| {
            let (b, h) = (u32::from(x) << 16, widen_f16(x).to_bits());
            let offsets = [0u32, 1, 2, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001];
            offsets
                .into_iter()
                .flat_map(move |d| [b, h].map(|bits| bits.wrapping_add(d)))
        });
        let any = (0..1u32 << 20).map(|k| k.wrapping_mul(0x9E37_79B1));
        near.chain(any).map(f32::from_bits)
    }

    #[test]
    fn nearest_and_widening_are_the_crate_halfs() {
        for x in 0..=u16::MAX {
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(
                same(widen_f16(x), half::f16::from_bits(x).to_f32()),
                "{x:#x}"
            );
            assert!(
                same(widen_bf16(x), half::bf16::from_bits(x).to_f32()),
                "{x:#x}"
            );
        }
        for x in floats() {
            assert_eq!(f16_nearest(x), half::f16::from_f32(x).to_bits(), "{x:e}");
            assert_eq!(bf16_nearest(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
        }
    }

    /// A neighbour, as often as it should be; what is representable stays.
    #[test]
    fn stochastic_rounding_is_unbiased() {
        let stream = Noise { seed: 1, update: 1 }.stream(0, Role::Parameter);
        let mean = |x: f32, round: &dyn Fn(f32, u32) -> f32| {
            let random = stream.from(0);
            let draws = 1 << 16;
            (0..draws)
                .map(|k| f64::from(round(x, random(k))))
                .sum::<f64>()
                / f64::from(draws as u32)
        };
        let b = |x, r| widen_bf16(bf16_stochastic(x, r));
        let h = |x, r| widen_f16(f16_stochastic(x, r));
        for x in [1.001f32, -1.0039, 3.3e-3, -7.7e-6, 2.2e-7, 1.9e-8, 100.3] {
            assert!(
                (mean(x, &b) - f64::from(x)).abs() < 2e-4 * f64::from(x).abs(),
                "{x}"
            );
            let unit = (f64::from(x).abs() / 1024.0).max(f64::from(SMALLEST_F16));
            assert!((mean(x, &h) - f64::from(x)).abs() < 2e-3 * unit, "{x}");
        }
        for x in 0..=u16::MAX {
            for r in [0, u32::MAX, 0x1234_5678] {
                let (kept_b, kept_h) = (widen_bf16(x), widen_f16(x));
                assert!(kept_b.is_nan() || bf16_stochastic(kept_b, r) == x);
                assert!(kept_h.is_nan() || f16_stochastic(kept_h, r) == x);
                assert_eq!(kept_b.is_nan(), b(kept_b, r).is_nan());
                assert_eq!(kept_h.is_nan(), h(kept_h, r).is_nan());
            }
        }
    }

    #[test]
    fn master_bits_lose_nothing() {
        for x in floats() {
            let (high, error) = split(x);
            assert_eq!(i32::from(error as i16), error);
            let joined = join(high, error);
            assert!(joined.to_bits() == x.to_bits() || x.is_nan() && high == 0x7FC0);
            for short in [cut_nearest(x), cut_stochastic(x, !0)] {
                let (high, error) = split(short);
                assert_eq!(i32::from((error >> 8) as i8) << 8, error);
                assert!(join(high, error).to_bits() == short.to_bits() || x.is_nan());
            }
        }
        // Through zero, and no NaN of an infinity.
        assert_eq!(join(0, -5).to_bits(), SIGN | 5);
        assert_eq!(join(0x7F80, 5), f32::INFINITY);
        assert!(join(0x7F80, -1).is_finite());
    }

    #[test]
    fn what_was_decoded_encodes_to_itself() {
        for code in [UNSIGNED, SIGNED] {
            let one = UNDERFLOW + (code.powers << 3);
            let is_code = |x: &u8| {
                let x = u32::from(*x);
                let magnitude = if code.is_signed { x & 0x7F } else { x };
                magnitude <= one || magnitude >= code.infinity()
            };
            let all: Vec<u8> = (0..=u8::MAX).filter(is_code).collect();
            for scale in [1.0f32, 1e-45, 3.3e-39, 1.7e-20, 0.3, 7.1e19, 3.4e38] {
                let mut values = vec![0.0; all.len()];
                code.decode(&all, scale, &mut values);
                for random in [0, u32::MAX, 0x8000_0000] {
                    let mut again = vec![0; all.len()];
                    let found = code.encode(&values, |_| random, &mut again);
                    assert!(found == scale || scale.is_subnormal());
                    let mut decoded = vec![0.0; all.len()];
                    code.decode(&again, found, &mut decoded);
                    // The smallest floats have no room for three bits of fraction.
                    let both = values.iter().zip(&decoded);
                    for (a, b) in both.filter(|(a, _)| !a.is_subnormal()) {
                        assert!(
                            a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                            "{scale} {a} {b}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn codes_are_unbiased() {
        for code in [UNSIGNED, SIGNED] {
            for x in [0.77f32, 0.031, 4e-4, 3e-6, 2.2e-9] {
                let mut sum = 0.0;
                for update in 0..4096 {
                    let stream = Noise { seed: 7, update }.stream(3, Role::SquareAvg);
                    let values = [x; BLOCK - 1].into_iter().chain([1.0]).collect::<Vec<_>>();
                    let mut codes = [0; BLOCK];
                    let scale = code.encode(&values, stream.from(0), &mut codes);
                    let mut decoded = [0.0; BLOCK];
                    code.decode(&codes, scale, &mut decoded);
                    sum += decoded[..BLOCK - 1]
                        .iter()
                        .map(|&x| f64::from(x))
                        .sum::<f64>();
                }
                let mean = sum / (4096.0 * 255.0);
                let unit = f64::from(x / 8.0).max(2f64.powi(-3 - code.powers as i32));
                assert!((mean - f64::from(x)).abs() < 2e-3 * unit, "{x} {mean}");
            }
        }
    }
}
