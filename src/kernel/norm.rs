//! The squares of the gradients, summed in a fixed order.
//!
//! All gradients of a step form one sequence, in the order of the parameters. It is cut into chunks
//! of [`CHUNK`] elements wherever tensors begin and end; a chunk is summed in [`LANES`] lanes, the
//! chunks are added in order. So the sum depends neither on threads, nor on the instruction set,
//! nor on whether tensors lie next to each other in memory.

use super::rule::Real;

/// Elements that are summed by themselves.
pub(crate) const CHUNK: usize = 4096;

/// Independent sums within a chunk: as many as keep two 512-bit adders busy.
const LANES: usize = 32;

/// The sums of a chunk so far, in `f64`.
pub(super) type Sums = [f64; LANES];

/// No sums yet.
pub(super) const NONE: Sums = [0.0; LANES];

/// Adds the squares of the elements of a chunk from `at` on.
#[inline(always)]
pub(super) fn add_squares<T: Real>(sums: &mut Sums, at: usize, g: &[T]) {
    let mut lanes = *sums;
    let square = |x: &T| x.to_f64() * x.to_f64();
    let first = at % LANES;
    let (head, g) = g.split_at(g.len().min((LANES - first) % LANES));
    for (lane, x) in lanes[first..].iter_mut().zip(head) {
        *lane += square(x);
    }
    let (blocks, tail) = g.as_chunks::<LANES>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += square(x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += square(x);
    }
    *sums = lanes;
}

/// The sum of the squares of a chunk.
pub(super) fn total(mut lanes: Sums) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
