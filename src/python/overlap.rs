//! Whether arrays share elements: elements decide, not bounds, so `a[::2]` and `a[1::2]` are apart.
//!
//! The address of an element is a sum of strides, each times a whole number within bounds. So two
//! arrays share one if an equation has a solution: that the difference of two such sums is less than
//! an element. It is searched for from the largest stride on: the others reach only so far, which
//! leaves a value or two to try for slices of dense arrays, and none if what they add up to, a
//! multiple of their greatest common divisor, cannot be what is missing. (NumPy's `shares_memory`
//! does alike.) Nothing takes memory that grows with the elements.
//!
//! Of many arrays those are compared whose bounds reach into one another: two thousand columns of one
//! matrix take 0.1 s.

use pyo3::PyErr;
use pyo3::exceptions::PyMemoryError;
use smallvec::SmallVec;

/// Where the elements of an array are. Strides are in bytes.
#[derive(Clone, Default)]
pub(crate) struct Extent {
    pub data: usize,
    /// (length, stride).
    pub dims: SmallVec<[(usize, isize); 4]>,
    pub size: usize,
}

impl Extent {
    /// The bytes from the first to the last element; `None` if there is no element, or nowhere.
    pub fn bounds(&self) -> Option<(usize, usize)> {
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

    /// (stride, greatest index) of the dimensions that have more than one, walked upwards.
    fn terms(&self) -> impl Iterator<Item = (i128, i128)> {
        let dims = self.dims.iter().filter(|dim| dim.0 > 1);
        dims.map(|&(len, stride)| (stride.unsigned_abs() as i128, len as i128 - 1))
    }

    /// Whether two of its indices are the same element.
    pub fn overlaps_itself(&self) -> bool {
        if self.bounds().is_none() {
            return false;
        }
        let mut terms: SmallVec<[(i128, i128); 4]> = self.terms().collect();
        terms.sort_unstable_by_key(|term| -term.0);
        let size = self.size as i128;
        // The differences of two indices: the first one that is not 0 is positive, those before it
        // are 0, and those after it anything.
        (0..terms.len()).any(|first| {
            let (stride, most) = terms[first];
            let mut differences = Equation::new(1 - size - stride, size - 1 - stride);
            differences.add(stride, most - 1);
            for &(stride, most) in &terms[first + 1..] {
                differences.add(stride, 2 * most);
                differences.shift(stride * most);
            }
            differences.has_solution()
        })
    }

    /// Whether it shares an element with another.
    pub fn overlaps(&self, other: &Extent) -> bool {
        let (Some(mine), Some(its)) = (self.bounds(), other.bounds()) else {
            return false;
        };
        if mine.1 <= its.0 || its.1 <= mine.0 {
            return false;
        }
        // Where an element of mine begins minus where one of its does, whose indices count from
        // their other end.
        let mut between = Equation::new(1 - self.size as i128, other.size as i128 - 1);
        between.shift(its.0 as i128 - mine.0 as i128);
        for (stride, most) in self.terms() {
            between.add(stride, most);
        }
        for (stride, most) in other.terms() {
            between.add(stride, most);
            between.shift(stride * most);
        }
        between.has_solution()
    }
}

/// A stride times a whole number from 0 to `most`.
struct Term {
    stride: i128,
    most: i128,
    /// The greatest sum of the terms of smaller strides.
    reach_below: i128,
    /// What it and the terms of smaller strides add up to is a multiple of this.
    divisor: i128,
}

/// Whether a sum of terms is in a range.
struct Equation {
    terms: SmallVec<[Term; 8]>,
    least: i128,
    greatest: i128,
}

/// Values to try at most: views that are made to be hard count as overlapping after a second or so.
const MOST_TRIES: u32 = 1 << 23;

impl Equation {
    fn new(least: i128, greatest: i128) -> Self {
        Equation {
            terms: SmallVec::new(),
            least,
            greatest,
        }
    }

    /// Adds a term; those of one stride are one, and a stride of 0 adds nothing.
    fn add(&mut self, stride: i128, most: i128) {
        match self.terms.iter_mut().find(|term| term.stride == stride) {
            Some(term) => term.most += most,
            None if stride == 0 => {}
            None => self.terms.push(Term {
                stride,
                most,
                reach_below: 0,
                divisor: stride,
            }),
        }
    }

    /// Moves the range up.
    fn shift(&mut self, by: i128) {
        self.least += by;
        self.greatest += by;
    }

    fn has_solution(&mut self) -> bool {
        self.terms.sort_unstable_by_key(|term| term.stride);
        // A stride that leaves no gap between the ranges it moves to makes them one: so dense
        // dimensions are never searched.
        let mut dense = 0;
        while let Some(term) = self.terms.get(dense)
            && term.stride <= self.greatest - self.least + 1
        {
            self.least -= term.stride * term.most;
            dense += 1;
        }
        let terms = &mut self.terms[dense..];
        let (mut reach, mut divisor) = (0, 0);
        for term in &mut *terms {
            divisor = common_divisor(term.stride, divisor);
            (term.reach_below, term.divisor) = (reach, divisor);
            reach += term.stride * term.most;
        }
        let mut tries = MOST_TRIES;
        search(terms, self.least, self.greatest, &mut tries)
    }
}

/// Whether a sum of terms, which are sorted by stride, is in a range.
fn search(terms: &[Term], least: i128, greatest: i128, tries: &mut u32) -> bool {
    if least <= 0 && 0 <= greatest {
        return true;
    }
    let Some((term, smaller)) = terms.split_last() else {
        return false;
    };
    if greatest < 0 || greatest % term.divisor > greatest - least {
        return false;
    }
    let stride = term.stride;
    let first = match least - term.reach_below {
        ..=0 => 0,
        missing => (missing - 1) / stride + 1,
    };
    let last = (greatest / stride).min(term.most);
    (first..=last).any(|x| {
        *tries = tries.saturating_sub(1);
        *tries == 0 || search(smaller, least - x * stride, greatest - x * stride, tries)
    })
}

fn common_divisor(mut a: i128, mut b: i128) -> i128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
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
        self.spans.iter().enumerate().find_map(|(k, span)| {
            let mine = extent(span.3);
            let mut later = self.spans[k + 1..]
                .iter()
                .take_while(|other| other.0 < span.1);
            let found = later.find(|other| mine.overlaps(&extent(other.3)))?;
            Some((span.3.min(found.3), span.3.max(found.3)))
        })
    }
}
