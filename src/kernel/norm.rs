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

/// The sum of squares of one chunk, in `f64`.
#[inline(always)]
pub(super) fn sum_squares<T: Real>(g: &[T]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (blocks, rest) = g.as_chunks::<LANES>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            let x = x.to_f64();
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        let x = x.to_f64();
        *lane += x * x;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
