//! Whether arrays share elements: elements decide, not bounds, so `a[::2]` and `a[1::2]` are apart.

/// Where the elements of an array are. Strides are in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Extent<'a> {
    pub data: usize,
    pub shape: &'a [usize],
    pub strides: &'a [isize],
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
    /// Combs whose pitches have little in common are left to the search through all stretches.
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

/// Whether two different stretches of this length overlap: those whose indices in the dimensions
/// (length, stride) differ by something by which they begin less than a length apart. The larger
/// strides come first: what they leave must be within the reach of the rest, which as a rule says at
/// once how they may differ. Of two stretches that differ the other way around only one is looked at.
fn do_stretches_meet(length: i128, dims: &[(usize, isize)], apart: i128, do_differ: bool) -> bool {
    let Some((&(len, stride), rest)) = dims.split_first() else {
        return do_differ && apart.abs() < length;
    };
    let most = |&(len, stride): &(usize, isize)| (len as i128 - 1) * stride.unsigned_abs() as i128;
    let reach = rest.iter().map(most).sum::<i128>() + length - 1;
    let (stride, last) = (stride.unsigned_abs() as i128, len as i128 - 1);
    // The sign of a stride makes no difference, for indices differ in both directions.
    let least = if do_differ { -last } else { 0 };
    let low = (-reach - apart + stride - 1).div_euclid(stride).max(least);
    let high = (reach - apart).div_euclid(stride).min(last);
    (low..=high).any(|by| {
        let apart = apart + by * stride;
        do_stretches_meet(length, rest, apart, do_differ || by != 0)
    })
}

/// Not enough memory to tell.
#[derive(Debug)]
pub(crate) struct OutOfMemory;

impl Extent<'_> {
    /// The bytes from the first to the last element; `None` if there is no element, or nowhere.
    pub fn bounds(&self) -> Option<Run> {
        if self.data == 0 || self.shape.contains(&0) {
            return None;
        }
        let (mut low, mut high) = (self.data, self.data + self.size);
        for (&len, &stride) in self.shape.iter().zip(self.strides) {
            let reach = stride.wrapping_mul(len as isize - 1);
            match reach < 0 {
                true => low = low.wrapping_add_signed(reach),
                false => high = high.wrapping_add_signed(reach),
            }
        }
        Some((low, high))
    }

    /// Its elements as stretches of one length, and the dimensions (length, stride) that repeat the
    /// stretch, from the smallest stride. A dimension of stride 0 adds nothing and is left out.
    fn stretches(&self) -> (usize, Vec<(usize, isize)>) {
        let dims = self.shape.iter().copied().zip(self.strides.iter().copied());
        let mut dims: Vec<_> = dims
            .filter(|&(len, stride)| len > 1 && stride != 0)
            .collect();
        dims.sort_by_key(|&(_, stride)| stride.unsigned_abs());
        // The fastest dimensions, as long as they leave no gap, are one stretch.
        let mut length = self.size;
        let mut gaps = 0;
        while let Some(&(len, stride)) = dims.get(gaps).filter(|dim| dim.1 == length as isize) {
            length = stride as usize * len;
            gaps += 1;
        }
        (length, dims.split_off(gaps))
    }

    /// The stretches that the elements fill, in no order.
    fn runs(&self, runs: &mut Vec<Run>) -> Result<(), OutOfMemory> {
        if self.bounds().is_none() {
            return Ok(());
        }
        let (length, rest) = self.stretches();
        let count = rest.iter().map(|&(len, _)| len).product::<usize>();
        runs.try_reserve(count).map_err(|_| OutOfMemory)?;
        let mut index = vec![0usize; rest.len()];
        for _ in 0..count {
            let steps = index.iter().zip(&rest);
            let offset: isize = steps.map(|(&i, &(_, stride))| stride * i as isize).sum();
            let start = self.data.wrapping_add_signed(offset);
            runs.push((start, start + length));
            for (i, &(len, _)) in index.iter_mut().zip(&rest) {
                *i += 1;
                if *i < len {
                    break;
                }
                *i = 0;
            }
        }
        Ok(())
    }

    /// As a comb, if it is one: all stretches begin at the same place modulo the pitch.
    fn comb(&self) -> Option<Comb> {
        let (length, rest) = self.stretches();
        let pitch = rest.first()?.1.unsigned_abs();
        let is_comb = rest
            .iter()
            .all(|(_, stride)| stride.unsigned_abs().is_multiple_of(pitch));
        is_comb.then_some(Comb {
            start: self.data,
            length,
            pitch,
        })
    }

    /// Whether two of its indices are the same element.
    pub fn overlaps_itself(&self) -> Result<bool, OutOfMemory> {
        let Some((low, high)) = self.bounds() else {
            return Ok(false);
        };
        let numel = self.shape.iter().product::<usize>();
        if self
            .shape
            .iter()
            .zip(self.strides)
            .any(|(&len, &stride)| len > 1 && stride == 0)
        {
            return Ok(true);
        }
        // More elements than room for them.
        if numel
            .checked_mul(self.size)
            .is_none_or(|bytes| bytes > high - low)
        {
            return Ok(true);
        }
        // As in any slice of a dense array, each dimension steps over all that is inside it.
        let (mut inside, rest) = self.stretches();
        let is_nested = rest.iter().all(|&(len, stride)| {
            let is_over = stride.unsigned_abs() >= inside;
            inside = stride.unsigned_abs().saturating_mul(len);
            is_over
        });
        if is_nested {
            return Ok(false);
        }
        let (length, mut dims) = self.stretches();
        dims.sort_by_key(|&(_, stride)| std::cmp::Reverse(stride.unsigned_abs()));
        Ok(do_stretches_meet(length as i128, &dims, 0, false))
    }

    /// Whether it shares an element with another.
    pub fn overlaps(&self, other: &Extent<'_>) -> Result<bool, OutOfMemory> {
        let (Some(mine), Some(its)) = (self.bounds(), other.bounds()) else {
            return Ok(false);
        };
        if mine.1 <= its.0 || its.1 <= mine.0 {
            return Ok(false);
        }
        if are_apart([self, other].map(Extent::comb).into_iter()) {
            return Ok(false);
        }
        let (mut a, mut b) = (Vec::new(), Vec::new());
        self.runs(&mut a)?;
        other.runs(&mut b)?;
        a.sort_unstable();
        b.sort_unstable();
        let (mut i, mut j) = (0, 0);
        while i < a.len() && j < b.len() {
            if a[i].1 <= b[j].0 {
                i += 1;
            } else if b[j].1 <= a[i].0 {
                j += 1;
            } else {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Everything a step writes, sorted, to look up what a gradient lies on.
#[derive(Default)]
pub(crate) struct Written {
    /// (start, end, highest end so far, whose), by start.
    spans: Vec<(usize, usize, usize, usize)>,
}

impl Written {
    /// Sorts the bounds of the arrays with these indices.
    pub fn new<'a>(
        extents: impl ExactSizeIterator<Item = (usize, Extent<'a>)>,
    ) -> Result<Self, OutOfMemory> {
        let mut spans = Vec::new();
        spans
            .try_reserve_exact(extents.len())
            .map_err(|_| OutOfMemory)?;
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

    /// The first two that share an element.
    pub fn find_overlap<'a>(
        &self,
        extent: impl Fn(usize) -> Extent<'a>,
    ) -> Result<Option<(usize, usize)>, OutOfMemory> {
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
            let combs = || cluster.iter().map(|span| extent(span.3).comb());
            if cluster.len() > 1 && !are_apart(combs()) {
                let mut runs: Vec<(usize, usize, usize)> = Vec::new();
                let mut own = Vec::new();
                for span in cluster {
                    own.clear();
                    extent(span.3).runs(&mut own)?;
                    runs.try_reserve(own.len()).map_err(|_| OutOfMemory)?;
                    runs.extend(own.iter().map(|run| (run.0, run.1, span.3)));
                }
                runs.sort_unstable();
                if let Some(pair) = runs.windows(2).find(|pair| pair[1].0 < pair[0].1) {
                    return Ok(Some((pair[0].2.min(pair[1].2), pair[0].2.max(pair[1].2))));
                }
            }
        }
        Ok(None)
    }
}
