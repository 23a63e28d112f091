//! Gradients of some rows of a parameter: embeddings, of which a batch looks up a few.
//!
//! The rows that are given are sorted, and those that are given more than once are added up, in the order
//! in which they were given, before anything else looks at them. The kernel then sweeps the touched rows as
//! one range of elements, of which a stretch of each row lies side by side.

use std::ops::Range;

use super::rule::Real;

/// What was given for some rows.
pub(crate) struct Rows {
    /// Ascending.
    indices: Vec<usize>,
    /// Elements of a row.
    len: usize,
    pub gradient: Summed,
}

/// Sums in a compute type, row after row.
pub(crate) enum Summed {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Summed {
    pub fn address(&mut self) -> *mut u8 {
        match self {
            Summed::F32(sums) => sums.as_mut_ptr().cast(),
            Summed::F64(sums) => sums.as_mut_ptr().cast(),
        }
    }
}

/// Why rows are no gradient: the place of an index that is none of a row.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoSuchRow(pub usize);

/// Sorts indices below `rows`, and sums what is given for each: `read(k, row)` writes the k-th given row,
/// of `len` elements.
///
/// # Errors
/// The first index that is negative or too large.
pub(crate) fn sum<T: Real>(
    given: &[i64],
    rows: usize,
    len: usize,
    mut read: impl FnMut(usize, &mut [T]),
) -> Result<(Vec<usize>, Vec<T>), NoSuchRow> {
    let mut order = Vec::with_capacity(given.len());
    for (k, &index) in given.iter().enumerate() {
        match usize::try_from(index) {
            Ok(index) if index < rows => order.push((index, k)),
            _ => return Err(NoSuchRow(k)),
        }
    }
    order.sort_unstable();
    let is_same = |a: &(usize, usize), b: &(usize, usize)| a.0 == b.0;
    let distinct = order.chunk_by(is_same).count();
    let (mut indices, mut sums) = (Vec::with_capacity(distinct), vec![T::ZERO; distinct * len]);
    let mut another = vec![T::ZERO; len];
    let mut targets = sums.chunks_exact_mut(len.max(1));
    for same in order.chunk_by(is_same) {
        indices.push(same[0].0);
        let Some(target) = targets.next() else {
            continue; // of no elements
        };
        read(same[0].1, target);
        for &(_, k) in &same[1..] {
            read(k, &mut another);
            for (sum, &x) in target.iter_mut().zip(&another) {
                *sum = *sum + x;
            }
        }
    }
    Ok((indices, sums))
}

impl Rows {
    pub fn new(indices: Vec<usize>, len: usize, gradient: Summed) -> Self {
        Rows {
            indices,
            len,
            gradient,
        }
    }

    /// Elements of all rows.
    pub fn numel(&self) -> usize {
        self.indices.len() * self.len
    }

    /// For each row, the part of a range of the elements that is in it: as elements of the parameter, and
    /// the first of them among the elements of the rows. (Fetching those that come soon gained nothing.)
    #[inline(always)]
    pub fn stretches(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> {
        let len = self.len.max(1);
        let rows = match range.is_empty() {
            true => 0..0,
            false => range.start / len..range.end.div_ceil(len),
        };
        rows.map(move |row| {
            let start = (row * len).max(range.start);
            let end = ((row + 1) * len).min(range.end);
            let first = self.indices[row] * len + (start - row * len);
            (first..first + (end - start), start)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_summed_in_the_order_given() {
        let values = [[1e8f32, 1.0], [1.0, 2.0], [-1e8, 3.0], [5.0, 6.0]];
        let read = |k: usize, row: &mut [f32]| row.copy_from_slice(&values[k]);
        let (indices, sums) = sum(&[2, 0, 2, 2], 3, 2, read).unwrap();
        assert_eq!(indices, [0, 2]);
        assert_eq!(sums, [1.0, 2.0, (1e8 + -1e8) + 5.0, 1.0 + 3.0 + 6.0]);
        for wrong in [-1, 3, i64::MAX, i64::MIN] {
            let found = sum(&[0, wrong], 3, 2, read);
            assert_eq!(found, Err(NoSuchRow(1)));
        }
    }

    #[test]
    fn stretches_are_the_rows() {
        let rows = Rows::new(vec![1, 4, 5], 3, Summed::F32(vec![0.0; 9]));
        let all = |range| rows.stretches(range).collect::<Vec<_>>();
        assert_eq!(all(0..9), [(3..6, 0), (12..15, 3), (15..18, 6)]);
        assert_eq!(all(2..4), [(5..6, 2), (12..13, 3)]);
        assert_eq!(all(4..4), []);
    }
}
