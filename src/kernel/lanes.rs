//! What the rule computes with: one number, or as many at once as an instruction set likes.

use std::ops::{Add, Div, Mul, Sub};

/// So many numbers of type `T` side by side. Each operation rounds once, in each lane alike.
pub trait Lanes<T>:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// Shows that the processor has what they are made of; whoever holds lanes had one.
    type Proof: Copy;
    /// How many.
    const COUNT: usize;
    /// How long an array is from which on it is worth being cut into blocks of so many and a rest.
    const FROM: usize = Self::COUNT;
    /// The same number in all lanes.
    fn splat(proof: Self::Proof, x: T) -> Self;
    /// The elements of `x` from `start` on.
    fn load(proof: Self::Proof, x: &[T], start: usize) -> Self;
    /// Writes them there.
    fn store(self, x: &mut [T], start: usize);
    /// The correctly rounded square root.
    fn sqrt(self) -> Self;
    /// Zero instead of what is below zero; a NaN stays one.
    fn at_least_zero(self) -> Self;
    /// Itself where `x` and `y` have the same sign, zero elsewhere. A zero has that of the other, a NaN
    /// none.
    fn where_alike(self, x: Self, y: Self) -> Self;
}

macro_rules! one_lane {
    ($t:ty) => {
        impl Lanes<$t> for $t {
            type Proof = ();
            const COUNT: usize = 1;
            #[inline(always)]
            fn splat((): (), x: $t) -> Self {
                x
            }
            #[inline(always)]
            fn load((): (), x: &[$t], start: usize) -> Self {
                x[start]
            }
            #[inline(always)]
            fn store(self, x: &mut [$t], start: usize) {
                x[start] = self;
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn at_least_zero(self) -> Self {
                // Not `max`: `f32::max(NaN, 0.0)` is 0 and would hide a NaN.
                if self < 0.0 { 0.0 } else { self }
            }
            #[inline(always)]
            fn where_alike(self, x: Self, y: Self) -> Self {
                let is_alike = (x >= 0.0) & (y >= 0.0) | (x <= 0.0) & (y <= 0.0);
                if is_alike { self } else { 0.0 }
            }
        }
    };
}
one_lane!(f32);
one_lane!(f64);
