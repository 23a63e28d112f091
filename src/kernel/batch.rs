//! The tensors of one step as work: one flat range of elements over all of them, so that one huge
//! tensor and ten thousand tiny ones are cut alike.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::dispatch::{self, Isa};
use super::{Hyper, Real, Rows, norm};
use crate::parallel::Threads;
use crate::pool;

/// Elements a thread takes at a time, at most: 64 KiB of each f32 stream, so that the streams of a
/// chunk fit the second-level cache and a step of a millisecond still has enough chunks to balance.
const CHUNK: usize = 16 * 1024;

/// Bytes of a cache line, which are those of the longest vector.
const LINE: usize = 64;

/// Elements from which on beginning at a cache line is worth a call more.
const ALIGNED_FROM: usize = 4096;

/// Elements of a strided tensor that are brought together at a time, on the stack.
const GATHER: usize = 512;

/// The arrays of one parameter: p g v m b.
const ARRAYS: usize = 5;

/// What a plain step moves of each element: p and v read and written, g read. Options move more,
/// which only makes threads pay earlier.
const STREAMS: usize = 5;

/// The place of g among them: the one that is not written.
const GRADIENT: usize = 1;

/// The elements of one parameter, or of several that lie next to each other in all their arrays.
#[derive(Clone, Copy)]
pub(crate) struct Piece<T> {
    pub p: *mut T,
    pub g: *const T,
    pub v: *mut T,
    /// Anything unless centered.
    pub m: *mut T,
    /// Anything without momentum.
    pub b: *mut T,
    /// At least 1.
    pub numel: usize,
    /// The parameter's index over all groups.
    pub index: u32,
    /// Index of the hyperparameters.
    pub hyper: u32,
    /// Index of the layout, or [`Piece::DENSE`].
    pub layout: u32,
}

impl<T> Piece<T> {
    /// The layout of arrays that are all dense in the same order.
    pub const DENSE: u32 = u32::MAX;

    /// Some of its elements, in the dense arrays p g v m b.
    fn dense(&self, [p, g, v, m, b]: [*mut T; ARRAYS], numel: usize) -> Self {
        Piece {
            p,
            g,
            v,
            m,
            b,
            numel,
            layout: Self::DENSE,
            ..*self
        }
    }
}

/// How the arrays of a strided tensor lie in memory; strides are in bytes, in the order p g v m b.
pub(crate) struct Layout {
    dims: Vec<Dim>,
}

#[derive(Clone, Copy)]
pub(crate) struct Dim {
    pub len: usize,
    pub strides: [isize; ARRAYS],
}

impl Layout {
    /// Dimensions from the slowest to the fastest; those that can be walked as one are merged.
    #[cfg(feature = "python")] // Only Python's arrays are strided.
    pub fn new(dims: impl IntoIterator<Item = Dim>) -> Self {
        let mut merged: Vec<Dim> = Vec::new();
        for dim in dims.into_iter().filter(|dim| dim.len != 1) {
            match merged.last_mut() {
                Some(outer)
                    if (0..ARRAYS).all(|k| {
                        outer.strides[k] == dim.strides[k].wrapping_mul(dim.len as isize)
                    }) =>
                {
                    *outer = Dim {
                        len: outer.len * dim.len,
                        strides: dim.strides,
                    };
                }
                _ => merged.push(dim),
            }
        }
        Layout { dims: merged }
    }

    /// Calls `run(offsets, strides, len)` for every stretch of the fastest dimension within the
    /// elements `start..end`.
    fn walk(
        &self,
        start: usize,
        end: usize,
        mut run: impl FnMut([isize; ARRAYS], [isize; ARRAYS], usize),
    ) {
        let Some((inner, outer)) = self.dims.split_last() else {
            return if start < end {
                run([0; ARRAYS], [0; ARRAYS], 1)
            };
        };
        let mut first = start % inner.len;
        let mut row = start / inner.len;
        // Where the walk is in the outer dimensions, the fastest first, and in each array.
        let mut indices = Vec::with_capacity(outer.len());
        let mut offsets = [0; ARRAYS];
        for dim in outer.iter().rev() {
            let index = row % dim.len;
            dim.advance(&mut offsets, index as isize);
            indices.push(index);
            row /= dim.len;
        }
        let mut at = start;
        while at < end {
            let len = (inner.len - first).min(end - at);
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

    /// Whether the arrays of a piece but the gradient are dense in the order of the walk.
    fn is_gradient_alone(&self, size: usize, is_used: [bool; ARRAYS]) -> bool {
        let mut stride = size as isize;
        self.dims.iter().rev().all(|dim| {
            let is_dense =
                (0..ARRAYS).all(|k| k == GRADIENT || !is_used[k] || dim.strides[k] == stride);
            stride *= dim.len as isize;
            is_dense
        })
    }
}

impl Dim {
    #[inline]
    fn advance(&self, offsets: &mut [isize; ARRAYS], count: isize) {
        for (offset, stride) in offsets.iter_mut().zip(self.strides) {
            *offset += stride * count;
        }
    }
}

/// The storage of a [`Batch`], kept from step to step so that a step allocates nothing.
pub(crate) struct Storage<T> {
    isa: Isa,
    pieces: Pieces<T>,
}

impl<T> std::fmt::Debug for Storage<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Storage")
            .field("isa", &self.isa)
            .finish_non_exhaustive()
    }
}

struct Pieces<T> {
    /// The one to run on in this step.
    isa: Isa,
    pieces: Vec<Piece<T>>,
    hypers: Vec<Hyper<T>>,
    layouts: Vec<Layout>,
    numel: usize,
    /// For each piece, the elements up to its end; filled before the work is shared.
    ends: Vec<usize>,
    /// Where the gradients of a norm's chunk are brought together.
    together: Vec<T>,
    /// The sums of squares of the norm's chunks, as bits.
    squares: Vec<AtomicU64>,
    /// Where arrays begin and end, and whether they are written.
    #[cfg(feature = "python")]
    spans: Vec<(usize, usize, bool)>,
}

// SAFETY: the pointers are dereferenced only by `update`, `gather` and what they call, which run
// only inside the methods of `Batch`; there the pointees are borrowed for `'a`, and distinct chunks
// are disjoint. After those methods return nobody works on the pieces, because `parallel::for_each`
// returns only when every thread that had entered has left.
unsafe impl<T: Send> Send for Pieces<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pieces<T> {}

impl<T: Real> Storage<T> {
    /// Room for that many parameters, of that many elements in all, without another allocation.
    /// Room that is never used is never touched.
    pub fn new(isa: Isa, parameters: usize, numel: usize) -> Self {
        let pieces = Pieces {
            pieces: Vec::with_capacity(parameters),
            hypers: Vec::with_capacity(parameters),
            ends: Vec::with_capacity(parameters),
            together: Vec::with_capacity(if numel > 0 { norm::CHUNK } else { 0 }),
            squares: Vec::with_capacity(numel.div_ceil(norm::CHUNK)),
            ..Pieces::new(isa)
        };
        Storage { isa, pieces }
    }

    /// An empty batch, to be updated in the floating-point mode that this thread is in.
    pub fn open<'a>(&mut self) -> Batch<'_, 'a, T> {
        self.pieces.isa = self.isa.in_this_mode();
        let mut batch = Batch {
            pieces: &mut self.pieces,
            borrowed: PhantomData,
        };
        batch.clear();
        batch
    }
}

/// The tensors of one step. Those given to it are borrowed for `'a`.
pub(crate) struct Batch<'s, 'a, T> {
    pieces: &'s mut Pieces<T>,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<'a, T: Real> Batch<'_, 'a, T> {
    /// Empties it.
    pub fn clear(&mut self) {
        self.pieces.pieces.clear();
        self.pieces.hypers.clear();
        self.pieces.layouts.clear();
        self.pieces.numel = 0;
    }

    /// Takes hyperparameters and returns their index.
    pub fn push_hyper(&mut self, hyper: Hyper<T>) -> u32 {
        let hypers = &mut self.pieces.hypers;
        hypers.push(hyper);
        (hypers.len() - 1) as u32
    }

    /// Takes the layout of a strided piece and returns its index.
    #[cfg(feature = "python")] // Only Python's arrays are strided.
    pub fn push_layout(&mut self, layout: Layout) -> u32 {
        let layouts = &mut self.pieces.layouts;
        layouts.push(layout);
        (layouts.len() - 1) as u32
    }

    /// Adds the parameter of that index. The slices that the hyperparameters use have its length.
    pub fn push(&mut self, index: usize, rows: Rows<'a, T>, hyper: u32) {
        let Rows { p, g, v, m, b } = rows;
        let numel = p.len();
        let h = &self.pieces.hypers[hyper as usize];
        assert!(g.len() == numel && v.len() == numel);
        assert!(!h.centered || m.len() == numel);
        assert!(!h.has_momentum() || b.len() == numel);
        let (g, m, b) = (g.as_ptr(), m.as_mut_ptr(), b.as_mut_ptr());
        let (p, v) = (p.as_mut_ptr(), v.as_mut_ptr());
        let (index, layout) = (index as u32, Piece::<T>::DENSE);
        let piece = Piece {
            p,
            g,
            v,
            m,
            b,
            numel,
            index,
            hyper,
            layout,
        };
        // SAFETY: the slices are borrowed for 'a, mutably where written, and have `numel` elements.
        unsafe { self.push_piece(piece) };
    }

    /// Adds a piece.
    ///
    /// # Safety
    /// - For `'a`, each pointer is valid for the elements that `numel` (dense) or the layout names:
    ///   for reads, and for writes too but for `g`. All but `g` are aligned; a dense `g` is, too.
    /// - No element of p v m b is reached by another pointer of any piece, or twice through its own
    ///   layout.
    /// - `m` need be no array unless the hyperparameters are centered, nor `b` without momentum;
    ///   `hyper` and `layout` came from this batch.
    pub unsafe fn push_piece(&mut self, piece: Piece<T>) {
        if piece.numel > 0 {
            self.pieces.numel += piece.numel;
            self.pieces.pieces.push(piece);
        }
    }

    /// Elements of a piece on average.
    #[cfg(feature = "python")]
    pub fn mean_numel(&self) -> usize {
        self.pieces.numel / self.pieces.pieces.len().max(1)
    }

    /// Bytes that an update reads and writes, about.
    pub fn bytes(&self) -> usize {
        self.pieces.numel * STREAMS * size_of::<T>()
    }

    /// Whether no piece writes where another one reads or writes, so that they may be updated in
    /// any order; strided pieces count with all that is between their ends.
    #[cfg(feature = "python")] // Rust's slices are apart.
    pub fn is_apart(&mut self) -> bool {
        let Pieces {
            pieces,
            hypers,
            layouts,
            spans,
            ..
        } = &mut *self.pieces;
        spans.clear();
        for piece in &*pieces {
            let h = &hypers[piece.hyper as usize];
            let arrays = [
                (piece.p, true),
                (piece.g.cast_mut(), true),
                (piece.v, true),
                (piece.m, h.centered),
                (piece.b, h.has_momentum()),
            ];
            for (array, (data, _)) in arrays.iter().enumerate().filter(|(_, (_, used))| *used) {
                let (mut start, mut end) = (data.addr(), data.addr() + size_of::<T>());
                match layouts.get(piece.layout as usize) {
                    None => end += (piece.numel - 1) * size_of::<T>(),
                    Some(layout) => {
                        for dim in &layout.dims {
                            let reach = dim.strides[array] * (dim.len as isize - 1);
                            match reach < 0 {
                                true => start = start.wrapping_add_signed(reach),
                                false => end = end.wrapping_add_signed(reach),
                            }
                        }
                    }
                }
                spans.push((start, end, array != GRADIENT));
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
    pub fn sum_squares(&mut self, threads: &Threads) -> f64 {
        let pieces = &mut *self.pieces;
        if pieces.numel == 0 {
            return 0.0;
        }
        let chunks = pieces.numel.div_ceil(norm::CHUNK);
        let threads = threads.useful(pieces.numel * size_of::<T>());
        if threads <= 1 {
            let mut sum = 0.0;
            let mut together = std::mem::take(&mut pieces.together);
            together.resize(norm::CHUNK, T::ZERO);
            pieces.squares_of(0..chunks, &mut together, |_, square| sum += square);
            pieces.together = together;
            return sum;
        }
        const TOGETHER: usize = CHUNK / norm::CHUNK;
        pieces.squares.resize_with(chunks, AtomicU64::default);
        self.on_threads(chunks.div_ceil(TOGETHER), threads, |pieces, part| {
            let end = ((part + 1) * TOGETHER).min(pieces.squares.len());
            pieces.squares_of(
                part * TOGETHER..end,
                &mut [T::ZERO; norm::CHUNK],
                |chunk, square| {
                    pieces.squares[chunk].store(square.to_bits(), Relaxed);
                },
            );
        });
        let squares = self.pieces.squares.iter();
        squares.fold(0.0, |sum, square| {
            sum + f64::from_bits(square.load(Relaxed))
        })
    }

    /// Calls `work` for every index below `count`, on several threads.
    fn on_threads(&mut self, count: usize, threads: usize, work: fn(&Pieces<T>, usize)) {
        self.pieces.index();
        let empty = Pieces::new(self.pieces.isa);
        let shared = Arc::new(std::mem::replace(self.pieces, empty));
        pool::for_each(&shared, count, threads, work);
        *self.pieces = Arc::into_inner(shared)
            .expect("when `for_each` has returned, no other thread holds what it shared");
    }

    /// The first non-finite element of a gradient: (index of the parameter, element of the piece,
    /// value).
    pub fn find_nonfinite(&mut self) -> Option<(usize, usize, f64)> {
        let pieces = &*self.pieces;
        let mut buffer = [T::ZERO; GATHER];
        for piece in &pieces.pieces {
            for start in (0..piece.numel).step_by(GATHER) {
                let end = (start + GATHER).min(piece.numel);
                pieces.gather(piece, start, end, &mut buffer);
                let found = buffer[..end - start]
                    .iter()
                    .position(|x| !x.to_f64().is_finite());
                if let Some(i) = found {
                    return Some((piece.index as usize, start + i, buffer[i].to_f64()));
                }
            }
        }
        None
    }

    /// Scales all gradients by the clipping factor.
    pub fn clip(&mut self, factor: f64) {
        self.pieces
            .hypers
            .iter_mut()
            .for_each(|hyper| hyper.clip(factor));
    }

    /// Updates every parameter and its state.
    pub fn update(mut self, threads: &Threads) {
        let threads = threads.useful(self.bytes());
        if threads <= 1 {
            let pieces = &*self.pieces;
            return pieces.update(Stretch {
                pieces: &pieces.pieces,
                start: 0,
                len: pieces.numel,
            });
        }
        let chunks = self.pieces.numel.div_ceil(self.pieces.chunk());
        self.on_threads(chunks, threads, |pieces, chunk| {
            let start = chunk * pieces.chunk();
            let end = (start + pieces.chunk()).min(pieces.numel);
            pieces.update(pieces.stretch(start, end));
        });
    }
}

impl<T> Pieces<T> {
    fn new(isa: Isa) -> Self {
        Pieces {
            isa,
            pieces: Vec::new(),
            hypers: Vec::new(),
            layouts: Vec::new(),
            numel: 0,
            ends: Vec::new(),
            together: Vec::new(),
            squares: Vec::new(),
            #[cfg(feature = "python")]
            spans: Vec::new(),
        }
    }
}

impl<T: Real> Pieces<T> {
    /// Elements that a thread takes at a time: less of a small step, so that all end together. (A
    /// quarter of this was slower at 65 k elements, four times as much at 524 k.)
    fn chunk(&self) -> usize {
        (self.numel / 64).next_multiple_of(4096).clamp(4096, CHUNK)
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

    /// The elements `start..end` of the flat range. Needs `ends`.
    fn stretch(&self, start: usize, end: usize) -> Stretch<'_, T> {
        let first = self.ends.partition_point(|&piece_end| piece_end <= start);
        let piece_start = self.ends[first] - self.pieces[first].numel;
        Stretch {
            pieces: &self.pieces[first..],
            start: start - piece_start,
            len: end - start,
        }
    }

    /// Updates a stretch.
    fn update(&self, mut stretch: Stretch<'_, T>) {
        while let Some(piece) = stretch.first() {
            let h = &self.hypers[piece.hyper as usize];
            match piece.layout {
                Piece::<T>::DENSE => self.update_dense(&mut stretch, h),
                _ => {
                    let end = piece.numel.min(stretch.start + stretch.len);
                    self.update_strided(piece, stretch.start, end, h);
                    stretch.advance(end - stretch.start);
                }
            }
        }
    }

    /// Updates the dense pieces at the front of a stretch that have the hyperparameters of its first
    /// one: finding the code for these takes a quarter of the time that a hundred elements do.
    fn update_dense(&self, stretch: &mut Stretch<'_, T>, h: &Hyper<T>) {
        let Some(first) = stretch.first() else { return };
        let rows = std::iter::from_fn(|| {
            let piece = stretch.first()?;
            if piece.hyper != first.hyper || piece.layout != Piece::<T>::DENSE {
                return None;
            }
            let (start, len) = (stretch.start, stretch.len.min(piece.numel - stretch.start));
            // First up to the cache line that the parameter begins on: stores that go across two
            // lines made 10 M elements slower by a tenth. State mostly lies like its parameter.
            let head = match len {
                0..ALIGNED_FROM => 0,
                _ => piece.p.wrapping_add(start).addr().wrapping_neg() % LINE / size_of::<T>(),
            };
            let len = if head > 0 { head } else { len };
            stretch.advance(len);
            // SAFETY: by the contract of `push_piece` the gradient is valid for `numel` elements,
            // and so are the other arrays that `h` uses, which are not aliased; nobody else works
            // on these elements: the chunks of a step are disjoint. Of a piece that was made of a
            // strided one, arrays are stretches of that one's or buffers of the caller's.
            Some(unsafe {
                let g = std::slice::from_raw_parts(piece.g.add(start), len);
                dense_rows(piece, start, g, h)
            })
        });
        dispatch::rows(self.isa, rows, h);
    }

    /// The same where only the gradient is strided, as with one in the other memory order: the
    /// other arrays are updated where they are.
    fn update_with_gathered_gradient(
        &self,
        piece: &Piece<T>,
        start: usize,
        end: usize,
        h: &Hyper<T>,
    ) {
        let mut buffer = [T::ZERO; GATHER];
        for start in (start..end).step_by(GATHER) {
            let len = GATHER.min(end - start);
            self.gather(piece, start, start + len, &mut buffer);
            let at = |x: *mut T| x.wrapping_add(start);
            let g = buffer.as_mut_ptr();
            let arrays = [at(piece.p), g, at(piece.v), at(piece.m), at(piece.b)];
            self.update_dense(&mut Stretch::of(&piece.dense(arrays, len)), h);
        }
    }

    /// Brings strided elements together, updates them there, and puts them back.
    #[cold]
    fn update_strided(&self, piece: &Piece<T>, start: usize, end: usize, h: &Hyper<T>) {
        let layout = &self.layouts[piece.layout as usize];
        let arrays = [piece.p, piece.g.cast_mut(), piece.v, piece.m, piece.b];
        let is_used = [true, true, true, h.centered, h.has_momentum()];
        let used = || (0..ARRAYS).filter(|&array| is_used[array]);
        if layout.is_gradient_alone(size_of::<T>(), is_used) {
            return self.update_with_gathered_gradient(piece, start, end, h);
        }
        let mut buffers = [[T::ZERO; GATHER]; ARRAYS];
        for start in (start..end).step_by(GATHER) {
            let end = (start + GATHER).min(end);
            let len = end - start;
            for array in used() {
                let source = arrays[array].cast_const().cast();
                gather_from(layout, array, source, start, end, &mut buffers[array]);
            }
            let gathered = buffers.each_mut().map(|buffer| buffer.as_mut_ptr());
            self.update_dense(&mut Stretch::of(&piece.dense(gathered, len)), h);
            for array in used().filter(|&array| array != GRADIENT) {
                let mut filled = 0;
                layout.walk(start, end, |offsets, strides, len| {
                    for (i, x) in buffers[array][filled..filled + len].iter().enumerate() {
                        let offset = offsets[array] + strides[array] * i as isize;
                        // SAFETY: by the contract of `push_piece` the layout stays inside the
                        // array, which is aligned and not aliased; nobody else works on
                        // `start..end`.
                        unsafe { *arrays[array].byte_offset(offset) = *x };
                    }
                    filled += len;
                });
            }
        }
    }

    /// Copies the gradient's elements `start..end` to the front of `buffer`.
    fn gather(&self, piece: &Piece<T>, start: usize, end: usize, buffer: &mut [T]) {
        if piece.layout != Piece::<T>::DENSE {
            let layout = &self.layouts[piece.layout as usize];
            return gather_from(layout, GRADIENT, piece.g.cast(), start, end, buffer);
        }
        // SAFETY: by the contract of `push_piece` a dense gradient is valid and aligned for `numel`
        // elements.
        let g = unsafe { std::slice::from_raw_parts(piece.g.add(start), end - start) };
        buffer[..g.len()].copy_from_slice(g);
    }

    /// Calls `work(chunk, sum of squares)` for each of the norm's chunks in the range; in
    /// `together`, which is one long, the gradients of a chunk are brought together if they are
    /// not. Needs `ends` unless the range starts at 0.
    fn squares_of(
        &self,
        chunks: std::ops::Range<usize>,
        together: &mut [T],
        mut work: impl FnMut(usize, f64),
    ) {
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
            let mut filled = 0;
            while filled < wanted {
                let piece = &self.pieces[index];
                let len = (piece.numel - at).min(wanted - filled);
                if len == wanted && piece.layout == Piece::<T>::DENSE {
                    // SAFETY: by the contract of `push_piece` a dense gradient is valid and aligned
                    // for `numel` elements.
                    let g = unsafe { std::slice::from_raw_parts(piece.g.add(at), len) };
                    work(chunk, dispatch::sum_squares(self.isa, g));
                } else {
                    self.gather(piece, at, at + len, &mut together[filled..]);
                    if filled + len == wanted {
                        work(chunk, dispatch::sum_squares(self.isa, &together[..wanted]));
                    }
                }
                filled += len;
                at += len;
                if at == piece.numel {
                    (index, at) = (index + 1, 0);
                }
            }
        }
    }
}

/// A part of the flat range.
struct Stretch<'x, T> {
    /// From the one on that it begins in.
    pieces: &'x [Piece<T>],
    /// Where in that one.
    start: usize,
    /// Elements.
    len: usize,
}

impl<'x, T> Stretch<'x, T> {
    /// A whole piece.
    fn of(piece: &'x Piece<T>) -> Self {
        Stretch {
            pieces: std::slice::from_ref(piece),
            start: 0,
            len: piece.numel,
        }
    }

    /// The piece that it begins in.
    #[inline(always)]
    fn first(&self) -> Option<&'x Piece<T>> {
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

/// The rows of dense arrays from element `start` on, as many as there are elements of `g`.
///
/// # Safety
/// In `'a` the arrays of the piece that `h` uses, but for the gradient, are valid for those
/// elements, and nobody else uses these.
#[inline(always)]
unsafe fn dense_rows<'a, T: Real>(
    piece: &Piece<T>,
    start: usize,
    g: &'a [T],
    h: &Hyper<T>,
) -> Rows<'a, T> {
    let row = |x: *mut T, is_used| match is_used {
        // SAFETY: passed on to the caller.
        true => unsafe { std::slice::from_raw_parts_mut(x.add(start), g.len()) },
        false => &mut [][..],
    };
    Rows {
        p: row(piece.p, true),
        g,
        v: row(piece.v, true),
        m: row(piece.m, h.centered),
        b: row(piece.b, h.has_momentum()),
    }
}

/// Copies the elements `start..end` of one array of a strided piece to the front of `buffer`.
fn gather_from<T: Real>(
    layout: &Layout,
    array: usize,
    source: *const u8,
    start: usize,
    end: usize,
    buffer: &mut [T],
) {
    let mut filled = 0;
    layout.walk(start, end, |offsets, strides, len| {
        for (i, x) in buffer[filled..filled + len].iter_mut().enumerate() {
            let offset = offsets[array] + strides[array] * i as isize;
            // SAFETY: by the contract of `push_piece` the layout stays inside the array. A gradient
            // may be unaligned.
            *x = unsafe { source.offset(offset).cast::<T>().read_unaligned() };
        }
        filled += len;
    });
}
