//! Arrays that are not dense slices of the compute type: strided ones, and gradients of another
//! element type.
//!
//! They are staged. A few hundred elements of each array are brought together on the stack, swept
//! by the same code as dense slices, and those that were written are put back. An array that lies
//! as the walk goes is swept where it is: with a gradient in the other memory order only the
//! gradient is copied.

use std::ops::Range;

use half::{bf16, f16};

use super::isa::Code;
use super::rule::{Real, Rule, Slices};
use super::{DType, ROLES, Role};

/// Elements that are brought together at a time: of five arrays of `f64`, 20 KiB.
pub(super) const STAGE: usize = 512;

/// The most dimensions that an array may have: NumPy's and torch's own limit.
pub(crate) const MAX_DIMS: usize = 64;

/// How the arrays of a piece lie in memory.
pub(crate) struct Form {
    /// From the slowest to the fastest in the order of the walk.
    dims: Vec<Dim>,
    dtypes: [DType; ROLES],
    /// Dense in the order of the walk, aligned and of the compute type.
    is_direct: [bool; ROLES],
}

/// A dimension; strides are in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Dim {
    pub len: usize,
    pub strides: [isize; ROLES],
}

impl Dim {
    #[inline]
    fn advance(&self, offsets: &mut [isize; ROLES], count: isize) {
        for (offset, stride) in offsets.iter_mut().zip(self.strides) {
            *offset += stride * count;
        }
    }
}

impl Form {
    /// The form of arrays of these types, of which the gradient alone may be unaligned. Dimensions
    /// come from the slowest to the fastest, [`MAX_DIMS`] at most; those that can be walked as one
    /// are merged.
    #[cfg(feature = "python")] // Only Python's arrays are strided.
    pub fn new(
        compute: DType,
        dtypes: [DType; ROLES],
        is_gradient_aligned: bool,
        dims: impl IntoIterator<Item = Dim>,
    ) -> Self {
        let mut merged: Vec<Dim> = Vec::new();
        for dim in dims.into_iter().filter(|dim| dim.len != 1) {
            let is_one_walk = |outer: &Dim| {
                (0..ROLES)
                    .all(|k| outer.strides[k] == dim.strides[k].wrapping_mul(dim.len as isize))
            };
            match merged.last_mut() {
                Some(outer) if is_one_walk(outer) => {
                    let len = outer.len * dim.len;
                    *outer = Dim { len, ..dim };
                }
                _ => merged.push(dim),
            }
        }
        let is_dense = |k: usize| {
            let mut stride = compute.size() as isize;
            merged.iter().rev().all(|dim| {
                let is_next = dim.strides[k] == stride;
                stride *= dim.len as isize;
                is_next
            })
        };
        let is_direct = Role::ALL.map(|role| {
            let k = role as usize;
            let is_aligned = role.is_written() || is_gradient_aligned;
            dtypes[k] == compute && is_aligned && is_dense(k)
        });
        Form {
            dims: merged,
            dtypes,
            is_direct,
        }
    }

    /// The bytes that an array spans, relative to its first element: from, to.
    #[cfg(feature = "python")]
    pub fn span(&self, role: Role) -> (isize, isize) {
        let k = role as usize;
        let (mut from, mut to) = (0, self.dtypes[k].size() as isize);
        for dim in &self.dims {
            let reach = dim.strides[k] * (dim.len as isize - 1);
            match reach < 0 {
                true => from += reach,
                false => to += reach,
            }
        }
        (from, to)
    }

    /// Calls `run(offsets, strides, len)` for every stretch of the fastest dimension within a range
    /// of elements.
    fn walk(
        &self,
        range: Range<usize>,
        mut run: impl FnMut([isize; ROLES], [isize; ROLES], usize),
    ) {
        let Some((inner, outer)) = self.dims.split_last() else {
            return if !range.is_empty() {
                run([0; ROLES], [0; ROLES], 1)
            };
        };
        let mut first = range.start % inner.len;
        let mut row = range.start / inner.len;
        // Where the walk is in the outer dimensions, the fastest first, and in each array.
        let mut indices = [0; MAX_DIMS];
        let mut offsets = [0; ROLES];
        for (dim, index) in outer.iter().rev().zip(&mut indices) {
            *index = row % dim.len;
            dim.advance(&mut offsets, *index as isize);
            row /= dim.len;
        }
        let mut at = range.start;
        while at < range.end {
            let len = (inner.len - first).min(range.end - at);
            let mut begin = offsets;
            inner.advance(&mut begin, first as isize);
            run(begin, inner.strides, len);
            (at, first) = (at + len, 0);
            for (dim, index) in outer.iter().rev().zip(&mut indices) {
                *index += 1;
                dim.advance(&mut offsets, 1);
                if *index < dim.len {
                    break;
                }
                dim.advance(&mut offsets, -(dim.len as isize));
                *index = 0;
            }
        }
    }

    /// Copies elements of an array to the front of `buffer`, in the compute type.
    ///
    /// # Safety
    /// `array` is the first element of an array of this form that is valid for reads.
    #[allow(unsafe_code)]
    pub(super) unsafe fn fill<T: Real>(
        &self,
        role: Role,
        array: *const u8,
        range: Range<usize>,
        buffer: &mut [T],
    ) {
        let k = role as usize;
        let mut filled = 0;
        self.walk(range, |offsets, strides, len| {
            let buffer = &mut buffer[filled..filled + len];
            let source = array.wrapping_offset(offsets[k]);
            // SAFETY: the walk stays inside the array.
            unsafe {
                match self.dtypes[k] {
                    DType::F16 => read(source.cast(), strides[k], buffer, f16::to_f64),
                    DType::BF16 => read(source.cast(), strides[k], buffer, bf16::to_f64),
                    DType::F32 => read(source.cast(), strides[k], buffer, |x: f32| x.into()),
                    DType::F64 => read(source.cast(), strides[k], buffer, |x: f64| x),
                }
            }
            filled += len;
        });
    }

    /// Copies what is at the front of `buffer` to elements of an array of the compute type.
    ///
    /// # Safety
    /// `array` is the first element of an array of this form, of type `T`, aligned, and valid for
    /// writes.
    #[allow(unsafe_code)]
    unsafe fn drain<T: Real>(&self, role: Role, array: *mut u8, range: Range<usize>, buffer: &[T]) {
        let k = role as usize;
        let mut drained = 0;
        self.walk(range, |offsets, strides, len| {
            let target = array.wrapping_offset(offsets[k]);
            for (i, x) in buffer[drained..drained + len].iter().enumerate() {
                let element = target.wrapping_offset(strides[k] * i as isize);
                // SAFETY: the walk stays inside the array.
                unsafe { element.cast::<T>().write(*x) };
            }
            drained += len;
        });
    }

    /// Updates a range of the elements of arrays of this form.
    ///
    /// # Safety
    /// Each of `arrays` that the rule uses is the first element of an array of this form: valid for
    /// reads, and but for the gradient aligned, of type `T` and valid for writes, which nobody else
    /// reads or writes.
    #[cold]
    #[allow(unsafe_code)]
    pub(super) unsafe fn sweep<T: Real>(
        &self,
        code: Code,
        arrays: &[*mut u8; ROLES],
        range: Range<usize>,
        rule: &Rule<T>,
    ) {
        let uses = rule.uses();
        let mut buffers = [[T::ZERO; STAGE]; ROLES];
        for start in range.clone().step_by(STAGE) {
            let part = start..(start + STAGE).min(range.end);
            let len = part.len();
            let staged = |&role: &Role| uses[role as usize] && !self.is_direct[role as usize];
            for role in Role::ALL.into_iter().filter(staged) {
                let buffer = &mut buffers[role as usize];
                // SAFETY: passed on to the caller.
                unsafe { self.fill(role, arrays[role as usize], part.clone(), buffer) };
            }
            let firsts = buffers.each_mut().map(|buffer| buffer.as_mut_ptr());
            let first = |role: Role| match self.is_direct[role as usize] {
                true => arrays[role as usize].cast::<T>().wrapping_add(part.start),
                false => firsts[role as usize],
            };
            // SAFETY: passed on to the caller, where they are arrays of type `T`, dense in the order of
            // the walk. The others are buffers.
            let slices = unsafe { Slices::new(Role::ALL.map(first), len, rule) };
            code.sweep_all(std::iter::once(slices), rule);
            for role in Role::ALL.into_iter().filter(staged) {
                if role.is_written() {
                    let buffer = &buffers[role as usize];
                    // SAFETY: passed on to the caller.
                    unsafe { self.drain(role, arrays[role as usize], part.clone(), buffer) };
                }
            }
        }
    }
}

/// Copies elements that are `stride` bytes apart, each rounded once to the compute type.
///
/// # Safety
/// They are valid for reads; they may be unaligned.
#[inline]
#[allow(unsafe_code)]
unsafe fn read<S: Copy, T: Real>(
    source: *const S,
    stride: isize,
    buffer: &mut [T],
    widen: impl Fn(S) -> f64,
) {
    // SAFETY: passed on to the caller.
    let get = |element: *const S| T::from_f64(widen(unsafe { element.read_unaligned() }));
    // The compiler makes vectors of what lies side by side.
    if stride == size_of::<S>() as isize {
        for (i, x) in buffer.iter_mut().enumerate() {
            *x = get(source.wrapping_add(i));
        }
    } else {
        for (i, x) in buffer.iter_mut().enumerate() {
            *x = get(source.wrapping_byte_offset(stride * i as isize));
        }
    }
}
