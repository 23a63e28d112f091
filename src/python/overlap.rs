//! Whether arrays share elements: elements decide, not bounds, so `a[::2]` and `a[1::2]` are apart.
//!
//! Nothing here takes memory that grows with the elements. Arrays whose strides are multiples of one
//! pitch are compared as combs; others, as long as each dimension steps over all that is inside it
//! (any slice of a dense array), are walked in the order of memory; what is left (sliding windows
//! and the like) is a search for a solution of the equation between two addresses.

use std::collections::BinaryHeap;

use pyo3::PyErr;
use pyo3::exceptions::PyMemoryError;
use smallvec::SmallVec;

/// Where the elements of an array are. Strides are in bytes.
#[derive(Clone)]
pub(crate) struct Extent {
    pub data: usize,
    /// (length, stride).
    pub dims: SmallVec<[(usize, isize); 4]>,
    pub size: usize,
}

/// A stretch of bytes: start, end.
type Run = (usize, usize);

/// Stretches of memory that begin at `start` plus multiples of `pitch`: `a[::2]`, a column.
struct Comb {
    start: usize,
    length: usize,
    pitch: usize,
}

/// Whether combs interleave without touching. False says nothing: they may still be apart, or be no
/// combs.
fn are_apart(combs: impl Iterator<Item = Option<Comb>>) -> bool {
    /// Combs whose pitches have little in common are left to the walk through all stretches.
    const MOST_TEETH: usize = 1 << 12;
    let Some(combs) = combs.collect::<Option<Vec<_>>>() else {
        return false;
    };
    let Some(&Comb { start: origin, .. }) = combs.first() else {
        return true;
    };
    // What all of them look like repeats with the least common multiple of their pitches.
    let period = combs.iter().try_fold(1usize, |period, comb| {
        (period / greatest_common_divisor(period, comb.pitch)).checked_mul(comb.pitch)
    });
    let Some(period) = period.filter(|&period| isize::try_from(period).is_ok()) else {
        return false;
    };
    let count: usize = combs.iter().map(|comb| period / comb.pitch).sum();
    if count > MOST_TEETH.max(combs.len()) {
        return false;
    }
    let mut teeth = Vec::with_capacity(count + 1);
    for comb in &combs {
        let place = (comb.start as isize).wrapping_sub(origin as isize);
        let place = place.rem_euclid(period as isize) as usize;
        let places = (0..period / comb.pitch).map(|k| (place + k * comb.pitch) % period);
        teeth.extend(places.map(|place| (place, comb.length)));
    }
    teeth.sort_unstable();
    // Around the circle: the first one once more, a period later.
    teeth.push((teeth[0].0 + period, 0));
    teeth
        .windows(2)
        .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}

fn greatest_common_divisor(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The stretches of an array in the order of memory.
struct Runs {
    start: usize,
    length: usize,
    /// From the smallest stride; all are positive.
    dims: SmallVec<[(usize, usize); 4]>,
    index: SmallVec<[usize; 4]>,
    is_over: bool,
}

impl Iterator for Runs {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.is_over {
            return None;
        }
        let run = (self.start, self.start + self.length);
        self.is_over = true;
        for (index, &(len, stride)) in self.index.iter_mut().zip(&self.dims) {
            *index += 1;
            self.start += stride;
            if *index < len {
                self.is_over = false;
                break;
            }
            self.start -= stride * len;
            *index = 0;
        }
        Some(run)
    }
}

impl Extent {
    /// The bytes from the first to the last element; `None` if there is no element, or nowhere.
    pub fn bounds(&self) -> Option<Run> {
        if self.data == 0 || self.dims.iter().any(|dim| dim.0 == 0) {
            return None;
        }
        let (mut low, mut high) = (self.data, self.data.wrapping_add(self.size));
        for &(len, stride) in &self.dims {
            let reach = stride.wrapping_mul(len as isize - 1);
            match reach < 0 {
                true => low = low.wrapping_add_signed(reach),
                false => high = high.wrapping_add_signed(reach),
            }
        }
        Some((low, high))
    }

    /// Its elements as stretches of one length, and the dimensions (length, stride) that repeat the
    /// stretch, from the smallest stride, which are made positive: the first stretch is where the
    /// bounds begin. A dimension of stride 0 adds nothing and is left out.
    fn stretches(&self) -> (usize, SmallVec<[(usize, usize); 4]>) {
        let dims = self.dims.iter().filter(|dim| dim.0 > 1 && dim.1 != 0);
        let mut dims: SmallVec<[_; 4]> = dims
            .map(|&(len, stride)| (len, stride.unsigned_abs()))
            .collect();
        dims.sort_by_key(|dim| dim.1);
        // The fastest dimensions, as long as they leave no gap, are one stretch.
        let mut length = self.size;
        let mut gaps = 0;
        while let Some(&(len, stride)) = dims.get(gaps).filter(|dim| dim.1 == length) {
            length = stride * len;
            gaps += 1;
        }
        dims.drain(..gaps);
        (length, dims)
    }

    /// Whether each dimension steps over all that is inside it.
    fn is_nested(&self) -> bool {
        let (mut inside, dims) = self.stretches();
        dims.iter().all(|&(len, stride)| {
            let is_over = stride >= inside;
            inside = stride.saturating_mul(len);
            is_over
        })
    }

    /// The stretches that the elements fill, if they can be walked in the order of memory.
    fn runs(&self) -> Option<Runs> {
        let (start, _) = self.bounds()?;
        let (length, dims) = self.stretches();
        self.is_nested().then(|| Runs {
            start,
            length,
            index: SmallVec::from_elem(0, dims.len()),
            dims,
            is_over: false,
        })
    }

    /// As a comb, if it is one: all stretches begin at the same place modulo the pitch.
    fn comb(&self) -> Option<Comb> {
        let (length, dims) = self.stretches();
        let pitch = dims.first()?.1;
        let is_comb = dims.iter().all(|(_, stride)| stride.is_multiple_of(pitch));
        is_comb.then_some(Comb {
            start: self.bounds()?.0,
            length,
            pitch,
        })
    }

    /// Whether two of its indices are the same element.
    pub fn overlaps_itself(&self) -> bool {
        let Some((low, high)) = self.bounds() else {
            return false;
        };
        let mut dims = self.dims.iter();
        if dims.any(|&(len, stride)| len > 1 && stride == 0) {
            return true;
        }
        // More elements than room for them.
        let numel = self
            .dims
            .iter()
            .try_fold(self.size, |bytes, dim| bytes.checked_mul(dim.0));
        if numel.is_none_or(|bytes| bytes > high - low) {
            return true;
        }
        if self.is_nested() {
            return false;
        }
        // The difference of two indices, not all 0, whose elements meet.
        let (length, dims) = self.stretches();
        let dims: Vec<Unknown> = dims
            .iter()
            .map(|&(len, stride)| Unknown {
                from: 1 - len as i128,
                to: len as i128 - 1,
                factor: stride as i128,
            })
            .collect();
        let length = length as i128;
        has_solution(dims, 0, (1 - length, length - 1), true)
    }

    /// Whether it shares an element with another.
    pub fn overlaps(&self, other: &Extent) -> bool {
        let (Some(mine), Some(its)) = (self.bounds(), other.bounds()) else {
            return false;
        };
        if mine.1 <= its.0 || its.1 <= mine.0 {
            return false;
        }
        if are_apart([self, other].map(Extent::comb).into_iter()) {
            return false;
        }
        if let (Some(mut a), Some(mut b)) = (self.runs(), other.runs()) {
            let (mut mine, mut its) = (a.next(), b.next());
            while let (Some(x), Some(y)) = (mine, its) {
                if x.1 <= y.0 {
                    mine = a.next();
                } else if y.1 <= x.0 {
                    its = b.next();
                } else {
                    return true;
                }
            }
            return false;
        }
        // Two indices whose stretches meet.
        let (my_length, my_dims) = self.stretches();
        let (its_length, its_dims) = other.stretches();
        let unknown = |&(len, stride): &(usize, usize), sign: i128| Unknown {
            from: 0,
            to: len as i128 - 1,
            factor: sign * stride as i128,
        };
        let my_dims = my_dims.iter().map(|dim| unknown(dim, 1));
        let its_dims = its_dims.iter().map(|dim| unknown(dim, -1));
        let between = mine.0 as i128 - its.0 as i128;
        let range = (1 - my_length as i128, its_length as i128 - 1);
        has_solution(my_dims.chain(its_dims).collect(), between, range, false)
    }
}

/// A whole number from one to another, and what it is multiplied by.
#[derive(Clone, Copy)]
struct Unknown {
    from: i128,
    to: i128,
    factor: i128,
}

/// Whether the sum of a constant and all products can be in a range; with all of the numbers 0 only
/// if `except_zero` is false. Those with the largest factors come first: the others reach only so
/// far, which leaves few values to try, but for views made to be hard. Those count as a solution
/// after a second or so.
fn has_solution(
    mut unknowns: Vec<Unknown>,
    constant: i128,
    range: (i128, i128),
    except_zero: bool,
) -> bool {
    unknowns.sort_by_key(|unknown| std::cmp::Reverse(unknown.factor.abs()));
    // How far the products from each on reach: least, most.
    let mut reaches = vec![(0, 0)];
    for unknown in unknowns.iter().rev() {
        let (least, most) = reaches[reaches.len() - 1];
        let ends = [unknown.from, unknown.to].map(|x| x * unknown.factor);
        reaches.push((least + ends[0].min(ends[1]), most + ends[0].max(ends[1])));
    }
    reaches.reverse();
    let mut tries = 1u32 << 26;
    search(
        &unknowns,
        &reaches[1..],
        constant,
        range,
        !except_zero,
        &mut tries,
    )
}

fn search(
    unknowns: &[Unknown],
    reaches: &[(i128, i128)],
    sum: i128,
    range: (i128, i128),
    is_any_nonzero: bool,
    tries: &mut u32,
) -> bool {
    let Some((Unknown { from, to, factor }, others)) = unknowns.split_first() else {
        return is_any_nonzero && (range.0..=range.1).contains(&sum);
    };
    // range.0 <= sum + x * factor + what the others reach <= range.1
    let ends = [range.0 - sum - reaches[0].1, range.1 - sum - reaches[0].0];
    let ends = ends.map(|end| end * factor.signum());
    let size = factor.abs();
    let least = (ends[0].min(ends[1]) + size - 1)
        .div_euclid(size)
        .max(*from);
    let most = ends[0].max(ends[1]).div_euclid(size).min(*to);
    (least..=most).any(|x| {
        *tries = tries.saturating_sub(1);
        let is_any_nonzero = is_any_nonzero || x != 0;
        *tries == 0
            || search(
                others,
                &reaches[1..],
                sum + x * factor,
                range,
                is_any_nonzero,
                tries,
            )
    })
}

/// Everything a step writes, sorted, to look up what a gradient lies on.
#[derive(Default)]
pub(crate) struct Written {
    /// (start, end, highest end so far, whose), by start.
    spans: Vec<(usize, usize, usize, usize)>,
}

/// Not enough memory to tell.
#[derive(Debug)]
pub(crate) struct OutOfMemory;

impl From<OutOfMemory> for PyErr {
    fn from(_: OutOfMemory) -> Self {
        PyMemoryError::new_err("not enough memory to check whether arrays overlap")
    }
}

impl Written {
    /// Sorts the bounds of the arrays with these indices.
    pub fn new(
        extents: impl ExactSizeIterator<Item = (usize, Extent)>,
    ) -> Result<Self, OutOfMemory> {
        let mut spans = Vec::new();
        let reserved = spans.try_reserve_exact(extents.len());
        reserved.map_err(|_| OutOfMemory)?;
        spans.extend(extents.filter_map(|(owner, extent)| {
            extent.bounds().map(|(start, end)| (start, end, 0, owner))
        }));
        spans.sort_unstable();
        let mut highest = 0;
        for span in &mut spans {
            highest = highest.max(span.1);
            span.2 = highest;
        }
        Ok(Written { spans })
    }

    /// Those whose bounds reach into `start..end`.
    #[inline]
    pub fn touching(&self, start: usize, end: usize) -> impl Iterator<Item = usize> {
        let first_after = match self.spans.last() {
            Some(last) if start >= last.2 || end <= self.spans[0].0 => 0,
            _ => self.spans.partition_point(|span| span.0 < end),
        };
        self.spans[..first_after]
            .iter()
            .rev()
            .take_while(move |span| span.2 > start)
            .filter(move |span| span.1 > start)
            .map(|span| span.3)
    }

    /// Two that share an element.
    pub fn find_overlap(&self, extent: impl Fn(usize) -> Extent) -> Option<(usize, usize)> {
        let mut rest = &self.spans[..];
        while let Some(&(_, mut end, _, _)) = rest.first() {
            // A cluster: arrays whose bounds reach into one another.
            let size = rest.iter().take_while(|span| {
                let inside = span.0 < end;
                end = end.max(span.1);
                inside
            });
            let (cluster, others) = rest.split_at(size.count().max(1));
            rest = others;
            if cluster.len() > 1 {
                let owners: Vec<usize> = cluster.iter().map(|span| span.3).collect();
                if let Some((a, b)) = find_overlap_in(&owners, &extent) {
                    return Some((a.min(b), a.max(b)));
                }
            }
        }
        None
    }
}

fn find_overlap_in(owners: &[usize], extent: &impl Fn(usize) -> Extent) -> Option<(usize, usize)> {
    if are_apart(owners.iter().map(|&owner| extent(owner).comb())) {
        return None;
    }
    // The stretches of all that can be walked, in the order of memory; the others one by one.
    let mut walks: Vec<Runs> = Vec::new();
    let mut walked = Vec::new();
    for &owner in owners {
        match extent(owner).runs() {
            Some(runs) => {
                walks.push(runs);
                walked.push(owner);
            }
            None => {
                let mine = extent(owner);
                let meets = |&&other: &&usize| other != owner && mine.overlaps(&extent(other));
                if let Some(&other) = owners.iter().find(meets) {
                    return Some((owner, other));
                }
            }
        }
    }
    let mut heap: BinaryHeap<_> = BinaryHeap::with_capacity(walks.len());
    let push = |heap: &mut BinaryHeap<_>, walks: &mut Vec<Runs>, k: usize| {
        heap.extend(walks[k].next().map(|run| (std::cmp::Reverse(run), k)));
    };
    (0..walks.len()).for_each(|k| push(&mut heap, &mut walks, k));
    let (mut highest, mut owner) = (0, 0);
    while let Some((std::cmp::Reverse((start, end)), k)) = heap.pop() {
        if start < highest {
            return Some((walked[owner], walked[k]));
        }
        (highest, owner) = (end, k);
        push(&mut heap, &mut walks, k);
    }
    None
}
