//! A parameter of the array front, and what all of them span.

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit, intern};
use smallvec::SmallVec;

use super::options::culprit;
use super::overlap::{Extent, Written};
use super::parameter::Parameter;
use super::source::{GradientNow, Source};
use super::view::{
    Access, Element, Failure, Header, Mark, Quiet, Refusal, View, WANTED, c_strides,
    describe_array, is_equal,
};
use crate::kernel::DType;

/// A parameter of an optimizer.
pub(crate) struct Param {
    pub object: Py<PyAny>,
    pub name: Option<String>,
    pub source: Source,
    /// Its class has a `grad` that is not `Parameter`'s.
    pub has_own_grad: bool,
    pub dtype: DType,
    pub numel: usize,
    pub shape: SmallVec<[i64; 4]>,
    /// Of all its state arrays, which are dense; in elements.
    pub state_strides: SmallVec<[i64; 4]>,
    /// Where its state begins in the buffers of its group and type, in elements.
    pub offset: usize,
    /// The addresses of its state by key, in the order of their roles, which are the optimizer's own;
    /// 0 for those that are not there.
    pub state: [usize; 3],
    /// What was found when its memory was last looked at closely.
    seen: Seen,
    /// The address of the last gradient that was found to overlap nothing. It is compared, and never
    /// followed.
    pub cleared: usize,
}

/// The fingerprint of an array that was checked: as long as a look at the header says the same, the
/// checks and the search for overlaps need not be made anew. It decides nothing else.
struct Seen {
    /// Where it was; 0 if it must be checked anew. Besides, for the search for overlaps.
    data: usize,
    /// Of the NumPy array, and its strides in bytes.
    mark: Option<Mark>,
    strides: SmallVec<[isize; 4]>,
    /// Dense and walked like its state.
    is_like_state: bool,
}

impl Param {
    /// Reads a new parameter. `index` is for messages.
    pub fn new(object: &Bound<'_, PyAny>, name: Option<String>, index: usize) -> PyResult<Self> {
        let py = object.py();
        let raise = |failure: Failure| {
            let culprit = culprit("parameter", index, name.as_deref());
            failure.raise(culprit, WANTED, object)
        };
        let source = Source::of(object).map_err(raise)?;
        let read = |quiet: &Quiet<'_>| {
            let view = source.view(quiet)?;
            check_new(&view)?;
            let strides: SmallVec<_> = view.strides().collect();
            let size = view.element.size() as isize;
            let state_strides = match view.is_dense() {
                true => strides
                    .iter()
                    .map(|stride| (stride / size) as i64)
                    .collect(),
                false => c_strides(view.shape),
            };
            let seen = Seen {
                data: view.data,
                mark: source.array(quiet).map(|array| Header::of(array).mark()),
                strides,
                is_like_state: view.is_dense(),
            };
            Ok((
                view.element.dtype,
                view.numel(),
                view.shape.into(),
                state_strides,
                seen,
            ))
        };
        let found = Quiet::during(py, read).map_err(raise)?;
        let (dtype, numel, shape, state_strides, seen) = found;
        let has_own_grad = has_own_grad(object)?;
        Ok(Param {
            object: object.clone().unbind(),
            name,
            source,
            has_own_grad,
            dtype,
            numel,
            shape,
            state_strides,
            offset: 0,
            state: [0; 3],
            seen,
            cleared: 0,
        })
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.object)?;
        self.source.traverse(visit)
    }

    pub fn culprit(&self, what: &str, index: usize) -> String {
        culprit(what, index, self.name.as_deref())
    }

    /// "float32 of shape (64, 4)".
    pub fn describe(&self) -> String {
        describe_array(Element::real(self.dtype).name(), &self.shape)
    }

    /// What the header of the parameter's array says, if that is what it said when it was last
    /// checked.
    #[inline]
    pub fn unchanged(&self, quiet: &Quiet<'_>) -> Option<Mark> {
        let header = Header::of(self.source.array(quiet)?);
        let mark = header.mark();
        let is_it = self.seen.mark == Some(mark)
            && is_equal(header.shape, &self.shape)
            && (mark.is_contiguous_like(mark) || self.has_strides(header.strides, 1));
        is_it.then_some(mark)
    }

    fn has_strides(&self, strides: &[i64], unit: usize) -> bool {
        let strides = strides
            .iter()
            .map(|stride| *stride as isize * unit as isize);
        strides.eq(self.seen.strides.iter().copied())
    }

    /// Takes note of what a parameter that changed is now, if it still can be written. True if it has
    /// moved.
    ///
    /// # Errors
    /// It cannot be written.
    #[cold]
    pub fn recheck(&mut self, quiet: &Quiet<'_>) -> Result<bool, Refusal> {
        let view = self.source.view(quiet)?;
        self.check_like(&view)?;
        let is_walked_as_seen = view.strides().eq(self.seen.strides.iter().copied());
        view.check_writable()?;
        if !is_walked_as_seen {
            check_apart(&view)?;
        }
        let has_moved = view.data != self.seen.data || !is_walked_as_seen;
        let state = self.state_view(quiet, view.data)?;
        self.seen = Seen {
            data: view.data,
            mark: self
                .source
                .array(quiet)
                .map(|array| Header::of(array).mark()),
            strides: view.strides().collect(),
            is_like_state: view.is_dense() && view.is_walked_like(&state),
        };
        Ok(has_moved)
    }

    /// Takes note of where the parameter is without minding what has become of it: it is not
    /// written now. True if it has moved.
    #[inline]
    pub fn refresh_unwritten(&mut self, quiet: &Quiet<'_>) -> bool {
        self.unchanged(quiet).is_none()
            && self.recheck(quiet).unwrap_or_else(|_| {
                // Whatever it is now, it is nowhere that this step looks at, and must be checked
                // anew before it is written.
                self.seen.mark = None;
                std::mem::take(&mut self.seen.data) != 0
            })
    }

    /// Takes the place of another parameter, whose type and shape it must have.
    pub fn succeed(&mut self, other: &Param, py: Python<'_>, index: usize) -> PyResult<()> {
        let check = |quiet: &Quiet<'_>| {
            let view = self.source.view(quiet)?;
            other.check_like(&view)
        };
        let result = Quiet::during(py, check);
        result.map_err(|refusal| {
            let culprit = self.culprit("parameter", index);
            refusal.raise(culprit, &other.describe(), self.object.bind(py))
        })?;
        (self.offset, self.state) = (other.offset, other.state);
        self.state_strides.clone_from(&other.state_strides);
        // Compared with its state at the next step.
        self.seen.mark = None;
        self.seen.data = 0;
        Ok(())
    }

    /// That an array has the parameter's type and shape.
    pub fn check_like(&self, view: &View<'_>) -> Result<(), Refusal> {
        if view.element != Element::real(self.dtype) {
            return Err(Refusal::DType);
        }
        match is_equal(view.shape, &self.shape) {
            true => Ok(()),
            false => Err(Refusal::Unlike),
        }
    }

    /// A view of an array of its state.
    pub fn state_view<'q>(&'q self, _: &'q Quiet<'_>, address: usize) -> Result<View<'q>, Refusal> {
        let element = Element::real(self.dtype);
        let (shape, strides) = (&self.shape, &self.state_strides);
        View::new(
            address,
            element,
            shape,
            strides,
            element.size(),
            Access::Writable,
        )
    }

    /// The addresses of the parameter, whose header says `mine`, and of a gradient that needs no
    /// closer look: arrays of one type, walked alike.
    #[inline]
    pub fn simple_pair(&self, mine: Mark, gradient: GradientNow<'_>) -> Option<[usize; 2]> {
        let header = gradient.header()?;
        let its = header.mark();
        (self.seen.is_like_state
            && its.is_of_type(mine)
            && its.is_aligned()
            && its.is_contiguous_like(mine)
            && is_equal(header.shape, &self.shape))
        .then_some([mine.data, its.data])
    }

    /// What its elements span.
    pub fn extent(&self) -> Extent {
        let lens = self.shape.iter().map(|&len| len as usize);
        Extent {
            data: self.seen.data,
            dims: lens.zip(self.seen.strides.iter().copied()).collect(),
            size: self.dtype.size(),
        }
    }
}

/// That an array can be a parameter.
fn check_new(view: &View<'_>) -> Result<(), Failure> {
    if view.element.is_complex || !view.element.is_compute_type() {
        let found = describe_array(view.element.name(), view.shape);
        return Err(Failure::Unwanted(found));
    }
    view.check_writable()?;
    Ok(check_apart(view)?)
}

/// That no two of its indices are the same element.
fn check_apart(view: &View<'_>) -> Result<(), Refusal> {
    match view.is_dense() || !view.extent().overlaps_itself() {
        true => Ok(()),
        false => Err(Refusal::OverlapsItself),
    }
}

/// Whether the object's class has a `grad` that is not `Parameter`'s.
fn has_own_grad(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let name = intern!(object.py(), "grad");
    let base = object.py().get_type::<Parameter>().getattr(name)?;
    Ok(!object
        .get_type()
        .getattr(name)
        .is_ok_and(|own| own.is(&base)))
}

/// What a step writes: the parameters and their state, none of which may share an element.
#[derive(Default)]
pub(crate) struct Destinations {
    written: Written,
    /// The optimizer's own arrays: their names and places.
    state: Vec<(String, Extent)>,
    is_checked: bool,
}

/// Two arrays that share an element, by their places in [`Destinations`].
pub(crate) enum Clash {
    Written(usize, usize),
    Gradient(usize, usize),
}

impl Destinations {
    /// Something has moved, or is new.
    pub fn forget(&mut self) {
        self.is_checked = false;
    }

    /// Whether no two were found to share an element, and nothing has moved since.
    pub fn is_checked(&self) -> bool {
        self.is_checked
    }

    /// Checks that no two share an element.
    #[cold]
    pub fn check(
        &mut self,
        params: &mut [Param],
        state: Vec<(String, Extent)>,
    ) -> Result<(), Refused> {
        self.state = state;
        let extent = |owner: usize| self.extent_of(params, owner);
        let written =
            Written::new((0..params.len() + self.state.len()).map(|owner| (owner, extent(owner))));
        let written = written.map_err(|_| Refused::OutOfMemory)?;
        if let Some((first, second)) = written.find_overlap(extent) {
            return Err(Refused::Clash(Clash::Written(first, second)));
        }
        params.iter_mut().for_each(|param| param.cleared = 0);
        self.written = written;
        self.is_checked = true;
        Ok(())
    }

    /// Checks that the gradient of a parameter lies on nothing that is written.
    pub fn check_gradient(
        &self,
        params: &[Param],
        index: usize,
        gradient: &Extent,
    ) -> Result<(), Refused> {
        let Some((start, end)) = gradient.bounds() else {
            return Ok(());
        };
        let mut touching = self.written.touching(start, end);
        match touching.find(|&owner| gradient.overlaps(&self.extent_of(params, owner))) {
            None => Ok(()),
            Some(owner) => Err(Refused::Clash(Clash::Gradient(index, owner))),
        }
    }

    /// The parameters come first, then the optimizer's own arrays.
    fn extent_of(&self, params: &[Param], owner: usize) -> Extent {
        match owner.checked_sub(params.len()) {
            None => params[owner].extent(),
            Some(k) => self.state[k].1.clone(),
        }
    }

    fn name_of(&self, params: &[Param], owner: usize) -> String {
        match owner.checked_sub(params.len()) {
            None => params[owner].culprit("parameter", owner),
            Some(k) => self.state[k].0.clone(),
        }
    }

    /// The exception for two arrays that share an element.
    pub fn raise(&self, params: &[Param], clash: &Clash) -> PyErr {
        PyValueError::new_err(match *clash {
            Clash::Written(first, second) => format!(
                "{} overlaps {}: expected arrays that share no element",
                self.name_of(params, second),
                self.name_of(params, first)
            ),
            Clash::Gradient(index, owner) => format!(
                "{} overlaps {}: expected a gradient in memory of its own",
                params[index].culprit("gradient", index),
                self.name_of(params, owner)
            ),
        })
    }
}

/// Why a step was not put together.
pub(crate) enum Refused {
    Parameter(usize, Refusal),
    Gradient(usize, Refusal),
    Clash(Clash),
    /// The optimizer's own arrays of a group were resized or given other memory.
    State(usize),
    /// Some gradient is no array: it must be taken first, for which Python code may run.
    Collect,
    OutOfMemory,
}

/// The gradient of a parameter, if it is an array that fits.
pub(crate) fn array_grad<'py>(
    py: Python<'py>,
    param: &Param,
) -> Option<Bound<'py, PyUntypedArray>> {
    let Source::Parameter(parameter, ..) = &param.source else {
        return None;
    };
    let grad = parameter.get().grad(py)?;
    let grad = grad.cast_into::<PyUntypedArray>().ok()?.unbind();
    let fits = Quiet::during(py, |quiet| {
        let source = Source::Array(grad.clone_ref(quiet.py()));
        let fits = source.view(quiet).and_then(|view| param.check_like(&view));
        (fits.is_ok(), source)
    });
    fits.0.then(|| grad.into_bound(py))
}
