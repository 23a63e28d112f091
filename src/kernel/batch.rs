//! The arrays of one step as work: one flat range of elements over all of them, so that one huge
//! tensor and ten thousand tiny ones are cut alike.
//!
//! A [`Piece`] is a parameter with its gradient and state: addresses by role, and nothing of their
//! type, which is the rule's. Pieces are pushed through [`Work`], which says how long they are
//! borrowed, and live in a [`Batch`], which is kept from step to step so that a step allocates
//! nothing.
//!
//! # Limitations
//! Who pushes a piece promises that nobody else touches its arrays until the work is done. Where
//! they belong to Python, another thread may (`p.data = …`, a write into an array) once a long step
//! has released the GIL. That is a race, as with NumPy's and torch's own kernels; nobody can
//! promise that it does not happen.

use std::collections::TryReserveError;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::isa::Code;
use super::rule::{AnyRule, Real, Rule, Slices, with_rule};
use super::stage::{Address, Form, RoomOf, STAGE};
use super::storage::BLOCK;
use super::{Role, SWEPT, norm};
use crate::threads::Threads;

/// Elements a thread takes at a time, at most: 64 KiB of each f32 stream, so that the streams of a
/// chunk fit the second-level cache and a step of a millisecond still has enough chunks to balance.
const CHUNK: usize = 16 * 1024;

/// Bytes of a cache line, which are those of the longest vector.
const LINE: usize = 64;

/// Elements from which on beginning at a cache line is worth a call more.
const ALIGNED_FROM: usize = 4096;

/// What a plain step moves of each element: p and v read and written, g read. Options move more,
/// which only makes threads pay earlier.
const STREAMS: usize = 5;

/// The roles that the arrays of a dense piece have: the first ones. (With one more, or the words of a
/// form, a piece would not fit a cache line.)
pub(crate) const DENSE_ROLES: usize = 5;

/// The elements of one parameter, or of several that lie next to each other in all their arrays.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    /// Of a dense piece, by [`Role`]; anything for those that the rule does not use.
    pub arrays: [Address; DENSE_ROLES],
    /// At least 1.
    pub numel: usize,
    /// The parameter's index over all groups.
    pub index: u32,
    /// Index of the rule.
    pub rule: u32,
    /// Index of the form, or [`Piece::DENSE`].
    pub form: u32,
}

impl Piece {
    /// The form of arrays that are all dense in the same order and of the compute type, and of no
    /// more than the first roles.
    pub const DENSE: u32 = u32::MAX;
}

/// The storage of [`Work`], and the code that it runs.
pub(crate) struct Batch {
    code: Code,
    /// That of this step.
    code_now: Code,
    pieces: Vec<Piece>,
    rules: Vec<AnyRule>,
    forms: Vec<Form>,
    numel: usize,
    bytes: usize,
    /// There are pieces of both compute types, in no order.
    is_mixed: bool,
    /// For each piece, the elements up to its end; filled before the work is shared.
    ends: Vec<usize>,
    /// The sums of squares of the norm's chunks, as bits.
    squares: Vec<AtomicU64>,
    /// Where arrays begin and end, and whether they are written.
    #[cfg(feature = "python")]
    spans: Vec<(usize, usize, bool)>,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("code", &self.code)
            .finish_non_exhaustive()
    }
}

impl Batch {
    /// No pieces, and no room.
    pub fn new(code: Code) -> Self {
        Batch {
            code,
            code_now: code,
            pieces: Vec::new(),
            rules: Vec::new(),
            forms: Vec::new(),
            numel: 0,
            bytes: 0,
            is_mixed: false,
            ends: Vec::new(),
            squares: Vec::new(),
            #[cfg(feature = "python")]
            spans: Vec::new(),
        }
    }

    /// Runs other code from the next step on.
    pub fn set_code(&mut self, code: Code) {
        self.code = code;
    }

    /// Makes room for that many parameters, of that many elements in all, so that a step allocates
    /// nothing. Room that is never used is never touched.
    pub fn reserve(&mut self, parameters: usize, numel: usize) -> Result<(), TryReserveError> {
        self.open();
        self.pieces.try_reserve(parameters)?;
        self.rules.try_reserve(parameters)?;
        self.forms.try_reserve(parameters)?;
        self.ends.clear();
        self.ends.try_reserve(parameters)?;
        self.squares.clear();
        self.squares.try_reserve(numel.div_ceil(norm::CHUNK))
    }

    /// No work yet, to be done in the floating-point mode that this thread is in.
    pub fn open<'a>(&mut self) -> Work<'_, 'a> {
        self.code_now = self.code.in_this_mode();
        let mut work = Work {
            batch: self,
            borrowed: PhantomData,
        };
        work.clear();
        work
    }
}

/// The arrays of one step, borrowed for `'a`.
pub(crate) struct Work<'b, 'a> {
    batch: &'b mut Batch,
    borrowed: PhantomData<&'a mut [f64]>,
}

impl<'a> Work<'_, 'a> {
    /// Leaves nothing to do.
    pub fn clear(&mut self) {
        let batch = &mut *self.batch;
        batch.pieces.clear();
        batch.rules.clear();
        batch.forms.clear();
        (batch.numel, batch.bytes) = (0, 0);
        batch.is_mixed = false;
    }

    /// Takes a rule and returns its index.
    pub fn push_rule(&mut self, rule: AnyRule) -> u32 {
        let rules = &mut self.batch.rules;
        rules.push(rule);
        (rules.len() - 1) as u32
    }

    /// Adds the parameter of that index. The slices that the rule uses have its length.
    #[allow(unsafe_code)]
    pub fn push_slices<T: Real>(&mut self, index: usize, slices: Slices<'a, T>, rule: u32) {
        let Slices { p, g, v, m, b, e } = slices;
        let numel = p.len();
        let any = &self.batch.rules[rule as usize];
        let lens = [numel, g.len(), v.len(), m.len(), b.len(), e.len()];
        assert!(any.dtype() == T::DTYPE && any.roles().all(|role| lens[role as usize] == numel));
        let g = g.as_ptr().cast_mut();
        let [p, v, m, b, e] = [p, v, m, b, e].map(<[T]>::as_mut_ptr);
        let arrays = [p, g, v, m, b, e].map(|array| Address(array.cast()));
        // SAFETY: the slices are borrowed for 'a, mutably where written, of the rule's type, and
        // have `numel` elements.
        unsafe { self.push(index, arrays, numel, rule) };
    }

    /// Adds a piece: arrays by role that are all dense in the same order and of the compute type.
    ///
    /// # Safety
    /// - `rule` came from this work.
    /// - For `'a`, each array that the rule uses is aligned and valid for `numel` elements of the
    ///   rule's type: for reads, and but for the gradient for writes too.
    /// - No element of a written array is reached by another role of this piece, nor by another
    ///   piece, unless the work is done by the caller alone.
    #[inline]
    #[allow(unsafe_code)]
    pub unsafe fn push(&mut self, index: usize, arrays: [Address; SWEPT], numel: usize, rule: u32) {
        if with_rule!(&self.batch.rules[rule as usize], rule => rule.has_average()) {
            let dtype = self.batch.rules[rule as usize].dtype();
            let mut form = Form::dense(dtype, numel);
            form.arrays[..SWEPT].copy_from_slice(&arrays);
            // SAFETY: passed on to the caller.
            return unsafe { self.push_form(index, form, numel, rule) };
        }
        let [dense @ .., _] = arrays;
        self.add(Piece {
            arrays: dense,
            numel,
            index: index as u32,
            rule,
            form: Piece::DENSE,
        });
    }

    /// Adds a piece of any other form.
    ///
    /// # Safety
    /// - `rule` came from this work.
    /// - For `'a`, each array that the rule uses is valid for the `numel` elements that the form names,
    ///   of the type that it says: for reads, and but for the gradient for writes too; so are the
    ///   scales of codes, and the error bits if it has any. All are aligned, but a gradient that the
    ///   form says is not. Those that are written are of the rule's compute type, or of one that
    ///   storage narrows `f32` to.
    /// - No element of a written array is reached by another role of this piece, or twice through
    ///   its own form, nor by another piece, unless the work is done by the caller alone.
    #[allow(unsafe_code)]
    pub unsafe fn push_form(&mut self, index: usize, form: Form, numel: usize, rule: u32) {
        let forms = &mut self.batch.forms;
        let piece = Piece {
            arrays: [Address::NOWHERE; DENSE_ROLES],
            numel,
            index: index as u32,
            rule,
            form: forms.len() as u32,
        };
        forms.push(form);
        self.add(piece);
    }

    #[inline]
    fn add(&mut self, piece: Piece) {
        let batch = &mut *self.batch;
        if piece.numel == 0 {
            return;
        }
        let dtype = batch.rules[piece.rule as usize].dtype();
        if let Some(last) = batch.pieces.last()
            && last.rule != piece.rule
        {
            batch.is_mixed |= batch.rules[last.rule as usize].dtype() != dtype;
        }
        batch.numel += piece.numel;
        batch.bytes += piece.numel * STREAMS * dtype.size();
        batch.pieces.push(piece);
    }

    /// Bytes that an update reads and writes, about.
    pub fn bytes(&self) -> usize {
        self.batch.bytes
    }

    /// Whether the pieces are so large that several threads may gain more than it takes to find out
    /// whether they may ([`Work::is_apart`]): 150 ns a piece.
    #[cfg(feature = "python")]
    pub fn is_large(&self) -> bool {
        const LARGE: usize = 2048;
        self.batch.numel >= LARGE * self.batch.pieces.len()
    }

    /// Whether no piece writes where another one reads or writes, so that they may be updated in
    /// any order; strided arrays count with all that is between their ends.
    #[cfg(feature = "python")] // Rust's slices are apart.
    pub fn is_apart(&mut self) -> bool {
        let Batch {
            pieces,
            rules,
            forms,
            spans,
            ..
        } = &mut *self.batch;
        spans.clear();
        if spans.try_reserve(2 * pieces.len() * SWEPT).is_err() {
            return false;
        }
        for piece in &*pieces {
            let rule = &rules[piece.rule as usize];
            let Some(form) = forms.get(piece.form as usize) else {
                for role in rule.roles() {
                    let data = piece.arrays[role as usize].0.addr();
                    let end = data + piece.numel * rule.dtype().size();
                    spans.push((data, end, role.is_written()));
                }
                continue;
            };
            for role in rule.roles().chain(form.error_bits()) {
                let (start, end) = form.span(role);
                spans.push((start, end, role.is_written()));
                let scales = form.span_of_scales(role, piece.numel);
                spans.extend(scales.map(|(start, end)| (start, end, true)));
            }
        }
        spans.sort_unstable();
        let (mut any_end, mut written_end) = (0, 0);
        spans.iter().all(|&(start, end, is_written)| {
            let is_apart = start >= if is_written { any_end } else { written_end };
            any_end = any_end.max(end);
            if is_written {
                written_end = written_end.max(end);
            }
            is_apart
        })
    }

    /// The sum of the squares of all gradients, in `f64` ([`norm`]).
    pub fn sum_squares(&mut self, threads: &Threads<'_>) -> f64 {
        const TOGETHER: usize = CHUNK / norm::CHUNK;
        self.batch.sort();
        let chunks = self.batch.numel.div_ceil(norm::CHUNK);
        let count = threads.count_for(self.batch.bytes / STREAMS);
        if count <= 1 {
            let mut sum = 0.0;
            self.batch.squares_of(0..chunks, |_, square| sum += square);
            return sum;
        }
        self.batch.index();
        self.batch.squares.resize_with(chunks, AtomicU64::default);
        let batch = &*self.batch;
        threads.for_each(count, chunks.div_ceil(TOGETHER), &|part| {
            let end = ((part + 1) * TOGETHER).min(chunks);
            let note = |chunk: usize, square: f64| {
                batch.squares[chunk].store(square.to_bits(), Relaxed);
            };
            batch.squares_of(part * TOGETHER..end, note);
        });
        let squares = batch.squares.iter();
        squares.fold(0.0, |sum, square| {
            sum + f64::from_bits(square.load(Relaxed))
        })
    }

    /// The first non-finite element of a gradient: (index of the parameter, element of the piece,
    /// value).
    pub fn find_nonfinite(&mut self) -> Option<(usize, usize, f64)> {
        self.batch.sort();
        let batch = &*self.batch;
        batch.pieces.iter().find_map(|piece| {
            with_rule!(&batch.rules[piece.rule as usize], rule => {
                batch.each_stretch(rule, piece, (0, piece.numel), |start, g| {
                    let i = g.iter().position(|x| !x.to_f64().is_finite())?;
                    Some((piece.index as usize, start + i, g[i].to_f64()))
                })
            })
        })
    }

    /// Scales all gradients by the clipping factor.
    pub fn clip(&mut self, factor: f64) {
        let rules = self.batch.rules.iter_mut();
        rules.for_each(|rule| rule.clip(factor));
    }

    /// Updates every parameter and its state.
    pub fn update(self, threads: &Threads<'_>) {
        let count = threads.count_for(self.batch.bytes);
        if count <= 1 {
            return self.batch.update(Stretch {
                pieces: &self.batch.pieces,
                start: 0,
                len: self.batch.numel,
            });
        }
        self.batch.index();
        let batch = &*self.batch;
        let chunk = batch.chunk();
        threads.for_each(count, batch.numel.div_ceil(chunk), &|k| {
            batch.update(batch.stretch(k * chunk, (k + 1) * chunk));
        });
    }
}

impl Batch {
    /// Elements that a thread takes at a time: less of a small step, so that all end together. (A
    /// quarter of this was slower at 65 k elements, four times as much at 524 k.)
    fn chunk(&self) -> usize {
        (self.numel / 64).next_multiple_of(4096).clamp(4096, CHUNK)
    }

    /// Orders pieces of both compute types by type, as `contiguous_params` does, for the norm adds
    /// up in their order.
    fn sort(&mut self) {
        if std::mem::take(&mut self.is_mixed) {
            let rules = &self.rules;
            let dtype = |piece: &Piece| rules[piece.rule as usize].dtype() as u8;
            self.pieces
                .sort_unstable_by_key(|piece| (dtype(piece), piece.index));
        }
    }

    /// Fills `ends`.
    fn index(&mut self) {
        self.ends.clear();
        let mut end = 0;
        self.ends.extend(self.pieces.iter().map(|piece| {
            end += piece.numel;
            end
        }));
    }

    /// The elements `start..end` of the flat range, but for cuts inside of a parameter, which are at
    /// multiples of a block. Needs `ends`.
    fn stretch(&self, start: usize, end: usize) -> Stretch<'_> {
        let cut = |at: usize| {
            let index = self.ends.partition_point(|&piece_end| piece_end <= at);
            match self.pieces.get(index) {
                None => (index, self.numel, 0),
                Some(piece) => {
                    let before = self.ends[index] - piece.numel;
                    let inside = (at - before) / BLOCK * BLOCK;
                    (index, before + inside, inside)
                }
            }
        };
        let (first, from, start) = cut(start);
        let (_, to, _) = cut(end);
        Stretch {
            pieces: &self.pieces[first..],
            start,
            len: to - from,
        }
    }

    /// Updates a stretch.
    fn update(&self, mut stretch: Stretch<'_>) {
        while let Some(piece) = stretch.first() {
            with_rule!(&self.rules[piece.rule as usize], rule => {
                match self.forms.get(piece.form as usize) {
                    None => self.update_dense(&mut stretch, piece, rule),
                    Some(form) => self.update_staged(&mut stretch, piece, form, rule),
                }
            });
        }
    }

    /// Updates the dense pieces at the front of a stretch that have the rule of its first one:
    /// finding the code for it takes a quarter of the time that a hundred elements do.
    #[inline]
    #[allow(unsafe_code)]
    fn update_dense<T: Real>(&self, stretch: &mut Stretch<'_>, first: &Piece, rule: &Rule<T>) {
        let all = std::iter::from_fn(|| {
            let piece = stretch.first()?;
            if piece.rule != first.rule || piece.form != Piece::DENSE {
                return None;
            }
            let (start, len) = (stretch.start, stretch.len.min(piece.numel - stretch.start));
            let p = piece.arrays[Role::Parameter as usize].0.cast::<T>();
            let head = head(p.wrapping_add(start), len);
            let len = if head > 0 { head } else { len };
            stretch.advance(len);
            let [p, g, v, m, b] = piece
                .arrays
                .map(|array| array.0.cast::<T>().wrapping_add(start));
            let arrays = [p, g, v, m, b, std::ptr::null_mut()];
            // SAFETY: by the contract of `push` the arrays that the rule uses, of which there is no
            // average, are valid for `numel` elements of its type, and those that are written are not
            // aliased; nobody else works on these elements, for the chunks of a step are disjoint.
            Some(unsafe { Slices::new(arrays, len, rule) })
        });
        self.code_now.sweep_all(all, rule);
    }

    /// Updates the piece at the front of a stretch.
    #[cold]
    #[allow(unsafe_code)]
    fn update_staged<T: Real>(
        &self,
        stretch: &mut Stretch<'_>,
        piece: &Piece,
        form: &Form,
        rule: &Rule<T>,
    ) {
        let start = stretch.start;
        let len = stretch.len.min(piece.numel - start);
        stretch.advance(len);
        let (index, range) = (piece.index as usize, start..start + len);
        // SAFETY: by the contract of `push_form` the arrays that the rule uses are of this form; nobody
        // else works on these elements, for the chunks of a step are disjoint and begin with a block.
        unsafe { self.code_now.sweep_form(form, index, range, rule) };
    }

    /// Calls `look(start, elements)` for stretches of a piece's gradient from `start` to `end`, in
    /// order, until it returns something.
    #[allow(unsafe_code)]
    fn each_stretch<T: Real, R>(
        &self,
        _: &Rule<T>,
        piece: &Piece,
        (start, end): (usize, usize),
        mut look: impl FnMut(usize, &[T]) -> Option<R>,
    ) -> Option<R> {
        let Some(form) = self.forms.get(piece.form as usize) else {
            let g = piece.arrays[Role::Gradient as usize].0.cast_const();
            // SAFETY: by the contract of `push` a dense gradient is valid for `numel` elements of the
            // rule's type.
            let g = unsafe { std::slice::from_raw_parts(g.cast::<T>().add(start), end - start) };
            return look(start, g);
        };
        let (mut buffer, mut room) = ([T::ZERO; STAGE], RoomOf::NEW);
        let mut room = room.room(form, STAGE.min(end - start));
        (start..end).step_by(STAGE).find_map(|start| {
            let part = start..(start + STAGE).min(end);
            let len = part.len();
            // SAFETY: by the contract of `push_form` the gradient is of this form.
            unsafe { form.fill(Role::Gradient, part, &mut buffer, &mut room) };
            look(start, &buffer[..len])
        })
    }

    /// Calls `work(chunk, sum of squares)` for each of the norm's chunks in the range. Needs `ends`
    /// unless the range starts at 0.
    fn squares_of(&self, chunks: std::ops::Range<usize>, mut work: impl FnMut(usize, f64)) {
        let mut index = match chunks.start {
            0 => 0,
            start => self.ends.partition_point(|&end| end <= start * norm::CHUNK),
        };
        // Where in the piece the chunk begins.
        let mut at = match chunks.start {
            0 => 0,
            start => start * norm::CHUNK + self.pieces[index].numel - self.ends[index],
        };
        for chunk in chunks {
            let wanted = norm::CHUNK.min(self.numel - chunk * norm::CHUNK);
            let (mut sums, mut filled) = (norm::NONE, 0);
            while filled < wanted {
                let piece = &self.pieces[index];
                let len = (piece.numel - at).min(wanted - filled);
                with_rule!(&self.rules[piece.rule as usize], rule => {
                    self.each_stretch(rule, piece, (at, at + len), |start, g| {
                        self.code_now.add_squares(&mut sums, filled + (start - at), g);
                        None::<()>
                    });
                });
                filled += len;
                at += len;
                if at == piece.numel {
                    (index, at) = (index + 1, 0);
                }
            }
            work(chunk, norm::total(sums));
        }
    }
}

/// Elements up to the cache line that the parameter begins on, if it is worth it: stores that go across
/// two lines made 10 M elements slower by a tenth. State mostly lies like its parameter.
#[inline(always)]
fn head<T>(p: *const T, len: usize) -> usize {
    match len {
        0..ALIGNED_FROM => 0,
        _ => p.addr().wrapping_neg() % LINE / size_of::<T>(),
    }
}

/// Those elements, and the others.
#[inline(always)]
pub(super) fn aligned<T: Real>(slices: Slices<'_, T>) -> impl Iterator<Item = Slices<'_, T>> {
    let head = head(slices.p.as_ptr(), slices.p.len());
    let (first, others) = slices.split_at(head);
    [first, others].into_iter()
}

/// A part of the flat range.
struct Stretch<'x> {
    /// From the one on that it begins in.
    pieces: &'x [Piece],
    /// Where in that one.
    start: usize,
    /// Elements.
    len: usize,
}

impl<'x> Stretch<'x> {
    /// The piece that it begins in.
    #[inline(always)]
    fn first(&self) -> Option<&'x Piece> {
        if self.len == 0 {
            return None;
        }
        self.pieces.first()
    }

    /// Leaves out elements of the first piece.
    #[inline(always)]
    fn advance(&mut self, count: usize) {
        self.start += count;
        self.len -= count;
        if self.start == self.pieces[0].numel {
            (self.pieces, self.start) = (&self.pieces[1..], 0);
        }
    }
}
