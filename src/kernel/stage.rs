//! Arrays that are not dense slices of the compute type: strided ones, and those of another element
//! type.
//!
//! They are staged. A few hundred elements of each array are brought together on the stack, swept
//! by the same code as dense slices, and those that were written are put back. An array that lies
//! as the walk goes is swept where it is: with a gradient in the other memory order only the
//! gradient is copied.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::batch::aligned;
use super::isa::Code;
use super::rows::{Rows, Summed};
use super::rule::{Real, Rule, Slices};
use super::storage::{self, BLOCK, Noise, Rounding, SIGNED, Stream, UNSIGNED};
use super::{DType, ROLES, Role, SWEPT};

/// Elements that are brought together at a time: of six arrays of `f64`, 24 KiB.
pub(super) const STAGE: usize = 512;

const _: () = assert!(STAGE.is_multiple_of(BLOCK));

/// The most dimensions that an array may have: NumPy's and torch's own limit.
pub(crate) const MAX_DIMS: usize = 64;

/// Where the arrays of a piece are, and how they lie.
pub(crate) struct Form {
    /// By [`Role`]; anything for those that are not used.
    pub arrays: [Address; ROLES],
    /// Of arrays of codes, one `f32` for each block.
    pub scales: [Address; ROLES],
    pub rounding: Rounding,
    pub noise: Noise,
    /// All but the fastest, from the slowest on in the order of the walk.
    outer: Vec<Dim>,
    inner: Dim,
    dtypes: [DType; ROLES],
    /// Dense in the order of the walk, and aligned.
    is_dense: [bool; ROLES],
    /// The parameter has error bits.
    has_error_bits: bool,
    /// The rows that alone have a gradient, which then is of these.
    rows: Option<Rows>,
}

/// The forms of the rule are compiled once for all of these, and not for each kind of iterator.
type Several<'i, 'a, T> = &'i mut dyn Iterator<Item = Slices<'a, T>>;

/// An address that is followed only inside of the methods of [`Work`](super::batch::Work).
#[derive(Clone, Copy)]
pub(crate) struct Address(pub *mut u8);

impl Address {
    pub const NOWHERE: Address = Address(std::ptr::null_mut());
}

// SAFETY: those methods hold the borrow that `Work::push` was promised, and distinct chunks are
// disjoint.
#[allow(unsafe_code)]
unsafe impl Send for Address {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Address {}

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

/// What of a form's arrays is not the same for all.
pub(crate) struct Layout {
    /// By [`Role`].
    pub dtypes: [DType; ROLES],
    /// The gradient alone may be unaligned.
    pub is_gradient_aligned: bool,
    pub has_error_bits: bool,
}

impl Form {
    /// The form of arrays that are nowhere yet. Dimensions come from the slowest to the fastest,
    /// [`MAX_DIMS`] at most; those that can be walked as one are merged.
    #[cfg_attr(not(feature = "python"), allow(dead_code))] // Only Python's arrays are strided.
    pub fn new(layout: &Layout, dims: impl IntoIterator<Item = Dim>) -> Self {
        let Layout { dtypes, .. } = *layout;
        let mut outer: Vec<Dim> = Vec::new();
        let mut inner: Option<Dim> = None;
        for dim in dims.into_iter().filter(|dim| dim.len != 1) {
            let is_one_walk = |outer: &Dim| {
                (0..ROLES)
                    .all(|k| outer.strides[k] == dim.strides[k].wrapping_mul(dim.len as isize))
            };
            match inner {
                Some(last) if is_one_walk(&last) => {
                    let len = last.len * dim.len;
                    inner = Some(Dim { len, ..dim });
                }
                last => {
                    outer.extend(last);
                    inner = Some(dim);
                }
            }
        }
        let inner = inner.unwrap_or(Dim {
            len: 1,
            strides: dtypes.map(|dtype| dtype.size() as isize),
        });
        let is_dense = Role::ALL.map(|role| {
            let k = role as usize;
            let mut stride = dtypes[k].size() as isize;
            let mut dims = std::iter::once(&inner).chain(outer.iter().rev());
            (role.is_written() || layout.is_gradient_aligned)
                && dims.all(|dim| {
                    let is_next = dim.strides[k] == stride;
                    stride *= dim.len as isize;
                    is_next
                })
        });
        Form {
            arrays: [Address::NOWHERE; ROLES],
            scales: [Address::NOWHERE; ROLES],
            rounding: Rounding::Nearest,
            noise: Noise::default(),
            outer,
            inner,
            dtypes,
            is_dense,
            has_error_bits: layout.has_error_bits,
            rows: None,
        }
    }

    /// The same for some rows of the elements, which go in C order, and their gradient.
    #[cfg_attr(not(feature = "python"), allow(dead_code))] // Rust's gradients are dense.
    pub fn with_rows(mut self, mut rows: Rows) -> Self {
        let k = Role::Gradient as usize;
        self.arrays[k] = Address(rows.gradient.address());
        self.is_dense[k] = true;
        self.dtypes[k] = match rows.gradient {
            Summed::F32(_) => DType::F32,
            Summed::F64(_) => DType::F64,
        };
        self.rows = Some(rows);
        self
    }

    /// The form of arrays of the compute type that are all dense in the same order.
    pub fn dense(compute: DType, numel: usize) -> Self {
        let layout = Layout {
            dtypes: [compute; ROLES],
            is_gradient_aligned: true,
            has_error_bits: false,
        };
        let strides = [compute.size() as isize; ROLES];
        Form::new(
            &layout,
            [Dim {
                len: numel,
                strides,
            }],
        )
    }

    /// The role of the error bits, if it has any.
    #[cfg(feature = "python")]
    pub fn error_bits(&self) -> Option<Role> {
        self.has_error_bits.then_some(Role::ErrorBits)
    }

    /// The bytes that an array spans: from, to.
    #[cfg(feature = "python")]
    pub fn span(&self, role: Role) -> (usize, usize) {
        let k = role as usize;
        let (mut from, mut to) = (0, self.dtypes[k].size() as isize);
        for dim in self.outer.iter().chain([&self.inner]) {
            let reach = dim.strides[k] * (dim.len as isize - 1);
            match reach < 0 {
                true => from += reach,
                false => to += reach,
            }
        }
        let data = self.arrays[k].0.addr();
        (data.wrapping_add_signed(from), data.wrapping_add_signed(to))
    }

    /// The bytes that the scales of an array of codes span, if it is one.
    #[cfg(feature = "python")]
    pub fn span_of_scales(&self, role: Role, numel: usize) -> Option<(usize, usize)> {
        let scales = self.scales[role as usize].0.addr();
        let bytes = numel.div_ceil(BLOCK) * size_of::<f32>();
        (self.dtypes[role as usize] == DType::U8).then_some((scales, scales + bytes))
    }

    /// Whether the rule is swept over the array where it is.
    #[inline(always)]
    fn is_direct<T: Real>(&self, role: Role) -> bool {
        self.is_dense[role as usize] && self.dtypes[role as usize] == T::DTYPE
    }

    /// Calls `run(address, stride, len)` for every stretch of the fastest dimension within a range of
    /// an array's elements.
    #[inline(never)]
    fn walk(&self, role: Role, range: Range<usize>, run: &mut dyn FnMut(*mut u8, isize, usize)) {
        let (inner, k) = (&self.inner, role as usize);
        let array = self.arrays[k].0;
        let mut first = range.start % inner.len;
        let mut row = range.start / inner.len;
        // Where the walk is in the outer dimensions, the fastest first, and in each array.
        let mut indices = [0; MAX_DIMS];
        let mut offsets = [0; ROLES];
        for (dim, index) in self.outer.iter().rev().zip(&mut indices) {
            *index = row % dim.len;
            dim.advance(&mut offsets, *index as isize);
            row /= dim.len;
        }
        let mut at = range.start;
        while at < range.end {
            let len = (inner.len - first).min(range.end - at);
            let stride = inner.strides[k];
            let begin = offsets[k] + stride * first as isize;
            run(array.wrapping_offset(begin), stride, len);
            (at, first) = (at + len, 0);
            for (dim, index) in self.outer.iter().rev().zip(&mut indices) {
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

    /// Elements of an array, of type `S`: where they are, or brought together in `room`.
    ///
    /// # Safety
    /// The array is valid for reads.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn elements<'x, S: Number>(
        &self,
        role: Role,
        part: Range<usize>,
        room: &'x mut [u64],
    ) -> &'x [S] {
        if self.is_dense[role as usize] {
            let first = self.arrays[role as usize].0.cast::<S>().cast_const();
            // SAFETY: passed on to the caller.
            return unsafe { std::slice::from_raw_parts(first.add(part.start), part.len()) };
        }
        let len = part.len();
        let room = room_for(room);
        // SAFETY: passed on to the caller.
        unsafe { self.gather(role, part, room) };
        &room[..len]
    }

    /// Brings elements together.
    ///
    /// # Safety
    /// As [`Form::elements`].
    #[inline(never)]
    #[allow(unsafe_code)]
    unsafe fn gather<S: Number>(&self, role: Role, part: Range<usize>, room: &mut [S]) {
        let mut filled = 0;
        self.walk(role, part, &mut |first, stride, len| {
            for (i, x) in room[filled..filled + len].iter_mut().enumerate() {
                let element = first.wrapping_offset(stride * i as isize).cast::<S>();
                // SAFETY: the walk stays inside the array.
                *x = unsafe { element.read_unaligned() };
            }
            filled += len;
        });
    }

    /// Puts elements back that were brought together.
    ///
    /// # Safety
    /// The array is aligned and valid for writes, of type `S`.
    #[inline(never)]
    #[allow(unsafe_code)]
    unsafe fn scatter<S: Number>(&self, role: Role, part: Range<usize>, room: &[S]) {
        let mut drained = 0;
        self.walk(role, part, &mut |first, stride, len| {
            for (i, x) in room[drained..drained + len].iter().enumerate() {
                let element = first.wrapping_offset(stride * i as isize).cast::<S>();
                // SAFETY: the walk stays inside the array.
                unsafe { element.write(*x) };
            }
            drained += len;
        });
    }

    /// Copies elements of an array to the front of `buffer`, in the compute type.
    ///
    /// # Safety
    /// The array, its scales and error bits are valid for reads.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) unsafe fn fill<T: Real>(
        &self,
        role: Role,
        part: Range<usize>,
        buffer: &mut [T],
        room: &mut Room<'_>,
    ) {
        let buffer = &mut buffer[..part.len()];
        let Room { elements, errors } = room;
        // SAFETY: passed on to the caller.
        unsafe {
            match self.dtypes[role as usize] {
                DType::BF16 if role == Role::Parameter && self.has_error_bits => {
                    self.read_errors(part.clone(), elements, errors);
                    let high = self.elements::<u16>(role, part, elements);
                    let joined = high.iter().zip(&**errors);
                    set(buffer, joined, |(&x, error)| storage::join(x, *error));
                }
                DType::BF16 => {
                    let from = self.elements::<u16>(role, part, elements);
                    set(buffer, from, |&x| storage::widen_bf16(x));
                }
                DType::F16 => {
                    let from = self.elements::<u16>(role, part, elements);
                    set(buffer, from, |&x| storage::widen_f16(x));
                }
                DType::F32 => {
                    let from = self.elements::<f32>(role, part, elements);
                    set(buffer, from, |&x| x);
                }
                DType::F64 => {
                    let from = self.elements::<f64>(role, part, elements);
                    for (x, &from) in buffer.iter_mut().zip(from) {
                        *x = T::from_f64(from);
                    }
                }
                DType::U8 => {
                    let scales = self.scales[role as usize].0.cast::<f32>();
                    let scales = scales.cast_const().add(part.start / BLOCK);
                    let codes = self.elements::<u8>(role, part, elements);
                    // Twice, so that each is compiled for its constants.
                    match (T::as_f32s_mut(buffer), role) {
                        (None, _) => {}
                        (Some(values), Role::SquareAvg) => {
                            storage::decode(UNSIGNED, codes, scales, values);
                        }
                        (Some(values), _) => storage::decode(SIGNED, codes, scales, values),
                    }
                }
                DType::I8 | DType::I16 => {} // Read with the parameter.
            }
        }
    }

    /// Copies elements of a gradient from one on, in the compute type.
    ///
    /// # Safety
    /// As [`Form::fill`].
    #[allow(unsafe_code)]
    #[cfg_attr(not(feature = "python"), allow(dead_code))] // Rust's gradients are dense.
    pub unsafe fn read_gradient<T: Real>(&self, first: usize, row: &mut [T]) {
        let mut room = RoomOf::NEW;
        let mut room = room.room(self, STAGE.min(row.len()));
        for (k, part) in row.chunks_mut(STAGE).enumerate() {
            let start = first + k * STAGE;
            // SAFETY: passed on to the caller.
            unsafe { self.fill(Role::Gradient, start..start + part.len(), part, &mut room) };
        }
    }

    /// # Safety
    /// As [`Form::fill`].
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn read_errors(&self, part: Range<usize>, room: &mut [u64], errors: &mut [i32]) {
        let role = Role::ErrorBits;
        // SAFETY: passed on to the caller.
        unsafe {
            if self.dtypes[role as usize] == DType::I8 {
                let from = self.elements::<i8>(role, part, room);
                for (error, &from) in errors.iter_mut().zip(from) {
                    *error = i32::from(from) << 8;
                }
            } else {
                let from = self.elements::<i16>(role, part, room);
                for (error, &from) in errors.iter_mut().zip(from) {
                    *error = i32::from(from);
                }
            }
        }
    }

    /// Where elements of an array, of type `S`, are to be written: where they are, or in `room`, from
    /// which [`Form::put_back`] puts them there.
    ///
    /// # Safety
    /// The array is aligned and valid for writes, of type `S`.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn target<'x, S: Number>(
        &self,
        role: Role,
        part: &Range<usize>,
        room: &'x mut [u64],
    ) -> &'x mut [S] {
        if self.is_dense[role as usize] {
            let first = self.arrays[role as usize].0.cast::<S>();
            // SAFETY: passed on to the caller.
            return unsafe { std::slice::from_raw_parts_mut(first.add(part.start), part.len()) };
        }
        &mut room_for(room)[..part.len()]
    }

    /// # Safety
    /// As [`Form::target`].
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn put_back<S: Number>(&self, role: Role, part: Range<usize>, room: &mut [u64]) {
        if !self.is_dense[role as usize] {
            // SAFETY: passed on to the caller.
            unsafe { self.scatter(role, part, room_for::<S>(room)) };
        }
    }

    /// Writes what is at the front of `buffer` to elements of an array, rounded once.
    ///
    /// # Safety
    /// The array, its scales and error bits are aligned and valid for writes.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn drain<T: Real>(
        &self,
        role: Role,
        part: Range<usize>,
        buffer: &[T],
        stream: Stream,
        room: &mut Room<'_>,
    ) {
        let random = stream.from(part.start);
        let is_stochastic = role != Role::Parameter || self.rounding == Rounding::Stochastic;
        // What is stored in fewer bits than `f32` is computed in that.
        let values = T::as_f32s(&buffer[..part.len()]).unwrap_or_default();
        let elements = &mut room.elements;
        // SAFETY: passed on to the caller.
        unsafe {
            match self.dtypes[role as usize] {
                DType::BF16 if role == Role::Parameter && self.has_error_bits => {
                    self.drain_master(part, values, random, room);
                }
                dtype @ (DType::BF16 | DType::F16) => {
                    let to = self.target::<u16>(role, &part, elements);
                    match (dtype, is_stochastic) {
                        (DType::BF16, true) => {
                            round(to, values, |x, k| storage::bf16_stochastic(x, random(k)));
                        }
                        (DType::BF16, false) => round(to, values, |x, _| storage::bf16_nearest(x)),
                        (_, true) => {
                            round(to, values, |x, k| storage::f16_stochastic(x, random(k)));
                        }
                        (_, false) => round(to, values, |x, _| storage::f16_nearest(x)),
                    }
                    self.put_back::<u16>(role, part, elements);
                }
                DType::U8 => {
                    let scales = self.scales[role as usize].0.cast::<f32>();
                    let scales = scales.add(part.start / BLOCK);
                    let codes = self.target::<u8>(role, &part, elements);
                    match role {
                        Role::SquareAvg => storage::encode(UNSIGNED, values, random, codes, scales),
                        _ => storage::encode(SIGNED, values, random, codes, scales),
                    }
                    self.put_back::<u8>(role, part, elements);
                }
                // Of the compute type.
                DType::F32 | DType::F64 => self.scatter(role, part, buffer),
                DType::I8 | DType::I16 => {} // Written with the parameter.
            }
        }
    }

    /// Writes a parameter and its error bits.
    ///
    /// # Safety
    /// As [`Form::drain`].
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn drain_master(
        &self,
        part: Range<usize>,
        values: &[f32],
        random: impl Fn(usize) -> u32 + Copy,
        Room { elements, errors }: &mut Room<'_>,
    ) {
        let is_short = self.dtypes[Role::ErrorBits as usize] == DType::I8;
        // SAFETY: passed on to the caller.
        unsafe {
            let to = self.target::<u16>(Role::Parameter, &part, elements);
            let all = to.iter_mut().zip(&mut **errors).zip(values);
            match (is_short, self.rounding) {
                (false, _) => {
                    for ((to, error), x) in all {
                        (*to, *error) = storage::split(*x);
                    }
                }
                (true, Rounding::Nearest) => {
                    for ((to, error), x) in all {
                        (*to, *error) = storage::split(storage::cut_nearest(*x));
                    }
                }
                (true, Rounding::Stochastic) => {
                    for (k, ((to, error), x)) in all.enumerate() {
                        let x = storage::cut_stochastic(*x, random(k));
                        (*to, *error) = storage::split(x);
                    }
                }
            }
            self.put_back::<u16>(Role::Parameter, part.clone(), elements);
            if is_short {
                let to = self.target::<i8>(Role::ErrorBits, &part, elements);
                for (to, error) in to.iter_mut().zip(&**errors) {
                    *to = (*error >> 8) as i8;
                }
                self.put_back::<i8>(Role::ErrorBits, part, elements);
            } else {
                let to = self.target::<i16>(Role::ErrorBits, &part, elements);
                for (to, error) in to.iter_mut().zip(&**errors) {
                    *to = *error as i16;
                }
                self.put_back::<i16>(Role::ErrorBits, part, elements);
            }
        }
    }

    /// Updates a range of the elements of the parameter with that index, from the beginning of a block
    /// on. It is compiled for each instruction set.
    ///
    /// # Safety
    /// The arrays that the rule uses, their scales and the error bits are of this form: valid for
    /// reads, and but for the gradient aligned and valid for writes, and nobody else reads or writes
    /// them.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) unsafe fn sweep<T: Real>(
        &self,
        code: Code,
        index: usize,
        range: Range<usize>,
        rule: &Rule<T>,
    ) {
        let uses = rule.uses();
        let staged = |&role: &Role| uses[role as usize] && !self.is_direct::<T>(role);
        let is_direct = !Role::ALL.iter().any(&staged);
        let slices = |range: Range<usize>, at: usize| {
            let starts = |k: usize| {
                if k == Role::Gradient as usize {
                    at
                } else {
                    range.start
                }
            };
            let arrays = |k: usize| self.arrays[k].0.cast::<T>().wrapping_add(starts(k));
            // SAFETY: passed on to the caller: arrays of type `T`, dense in the order of the walk.
            unsafe { Slices::new(std::array::from_fn(arrays), range.len(), rule) }
        };
        let (mut whole, mut some);
        let stretches: &mut dyn Iterator<Item = _> = match &self.rows {
            None => {
                let start = range.start;
                whole = std::iter::once((range, start));
                &mut whole
            }
            Some(rows) => {
                some = rows.stretches(range);
                &mut some
            }
        };
        if is_direct {
            let mut all = stretches.flat_map(|(range, at)| aligned(slices(range, at)));
            return code.sweep_all(&mut all as Several<'_, '_, T>, rule);
        }
        for (range, at) in stretches {
            // SAFETY: passed on to the caller.
            unsafe { self.sweep_staged(code, index, range, at, rule) };
        }
    }

    /// Updates a range of elements of which some are staged; `at` is the first of their gradient.
    ///
    /// # Safety
    /// As [`Form::sweep`].
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn sweep_staged<T: Real>(
        &self,
        code: Code,
        index: usize,
        range: Range<usize>,
        at: usize,
        rule: &Rule<T>,
    ) {
        let uses = rule.uses();
        let staged = |&role: &Role| uses[role as usize] && !self.is_direct::<T>(role);
        let of = |role: Role, part: &Range<usize>| match role {
            Role::Gradient => part.start - range.start + at..part.end - range.start + at,
            _ => part.clone(),
        };
        let streams = Role::ALL.map(|role| self.noise.stream(index, role));
        // Of a small parameter, what is not used is not touched.
        let most = STAGE.min(range.len());
        let mut rooms = [const { MaybeUninit::uninit() }; SWEPT];
        let mut buffers = rooms.each_mut().map(|_| &mut [][..]);
        for (role, room) in Role::ALL.into_iter().zip(&mut rooms) {
            if staged(&role) {
                buffers[role as usize] = zeroed::<T>(room, most);
            }
        }
        let mut roomy = RoomOf::NEW;
        let mut room = roomy.room(self, most);
        for start in range.clone().step_by(STAGE) {
            let part = start..(start + STAGE).min(range.end);
            let len = part.len();
            for role in Role::ALL.into_iter().filter(staged) {
                let buffer = &mut *buffers[role as usize];
                // SAFETY: passed on to the caller.
                unsafe { self.fill(role, of(role, &part), buffer, &mut room) };
            }
            let firsts = buffers.each_mut().map(|buffer| buffer.as_mut_ptr());
            let first = |k: usize| match self.is_direct::<T>(Role::ALL[k]) {
                true => {
                    let start = of(Role::ALL[k], &part).start;
                    self.arrays[k].0.cast::<T>().wrapping_add(start)
                }
                false => firsts[k],
            };
            // SAFETY: passed on to the caller, where they are arrays of type `T`, dense in the order of
            // the walk. The others are buffers.
            let slices = unsafe { Slices::new(std::array::from_fn(first), len, rule) };
            let mut one = std::iter::once(slices);
            code.sweep_all(&mut one as Several<'_, '_, T>, rule);
            for role in Role::ALL.into_iter().filter(staged) {
                if role.is_written() {
                    let (buffer, stream) = (&*buffers[role as usize], streams[role as usize]);
                    // SAFETY: passed on to the caller.
                    unsafe { self.drain(role, part.clone(), buffer, stream, &mut room) };
                }
            }
        }
    }
}

/// Sets the elements of a buffer to what others are as `f32`.
#[inline(always)]
fn set<T: Real, S>(buffer: &mut [T], from: impl IntoIterator<Item = S>, widen: impl Fn(S) -> f32) {
    for (x, from) in buffer.iter_mut().zip(from) {
        *x = T::from_f64(f64::from(widen(from)));
    }
}

/// Sets elements to rounded numbers; `round` is given the index too.
#[inline(always)]
fn round<S>(to: &mut [S], values: &[f32], round: impl Fn(f32, usize) -> S) {
    for (k, (to, x)) in to.iter_mut().zip(values).enumerate() {
        *to = round(*x, k);
    }
}

/// Room for elements that do not lie side by side, and for error bits; none where there are no such.
pub(super) struct Room<'x> {
    /// Of elements of any type.
    elements: &'x mut [u64],
    errors: &'x mut [i32],
}

/// What [`Room`] is made of, on the stack.
pub(super) struct RoomOf {
    elements: MaybeUninit<[u64; STAGE]>,
    errors: MaybeUninit<[i32; STAGE]>,
}

impl RoomOf {
    pub const NEW: RoomOf = RoomOf {
        elements: MaybeUninit::uninit(),
        errors: MaybeUninit::uninit(),
    };

    /// For so many elements of the arrays of a form.
    #[inline(always)]
    pub fn room(&mut self, form: &Form, len: usize) -> Room<'_> {
        let if_needed = |is_needed| if is_needed { len } else { 0 };
        let is_sparse = form.is_dense.contains(&false);
        Room {
            elements: zeroed(&mut self.elements, if_needed(is_sparse)),
            errors: zeroed(&mut self.errors, if_needed(form.has_error_bits)),
        }
    }
}

/// The first numbers of an array, as zeros.
#[inline(always)]
#[allow(unsafe_code)]
fn zeroed<E: Number>(room: &mut MaybeUninit<[E; STAGE]>, len: usize) -> &mut [E] {
    let first = room.as_mut_ptr().cast::<E>();
    let len = len.min(STAGE);
    // SAFETY: there is room for `STAGE` of them, and zeros are numbers.
    unsafe {
        first.write_bytes(0, len);
        std::slice::from_raw_parts_mut(first, len)
    }
}

/// A type of which any bits are a number.
pub(super) trait Number: Copy {}
macro_rules! numbers {
    ($($t:ty),*) => {
        $(impl Number for $t {})*
    };
}
numbers!(u8, i8, u16, i16, i32, u64, f32, f64);

/// Room for elements of a type, at least as many.
#[inline(always)]
#[allow(unsafe_code)]
fn room_for<S: Number>(room: &mut [u64]) -> &mut [S] {
    const { assert!(size_of::<S>() <= size_of::<u64>() && align_of::<S>() <= align_of::<u64>()) };
    // SAFETY: there is room for so many, aligned, and any bits are a number.
    unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast(), room.len()) }
}
