//! A parameter of the array front, and what all of them span.

use numpy::PyUntypedArray;
use pyo3::exceptions::{PyAttributeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit, intern};
use smallvec::SmallVec;

use super::options::culprit;
use super::overlap::{Extent, Written};
use super::parameter::Parameter;
use super::source::{LentSource, Source};
use super::storage::Storage;
use super::view::{
    Access, Element, Failure, Header, LentArray, Mark, Quiet, Refusal, View, WANTED, c_strides,
    describe_array, is_equal,
};
use crate::kernel::{DType, Role};
use crate::state::StateKey;

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
    /// The types of its state by key, if it can have such state.
    pub stored: [Option<DType>; StateKey::COUNT],
    /// Of all its state arrays, which are dense; in elements.
    pub state_strides: SmallVec<[i64; 4]>,
    /// Where its state begins in the buffers of its group and kind: in elements, and in scales.
    pub offset: usize,
    pub scale_offset: usize,
    /// The addresses of its state by key, in the order of their roles, which are the optimizer's own;
    /// 0 for those that are not there. Then those of the scales of codes.
    pub state: [usize; StateKey::COUNT],
    pub scales: [usize; StateKey::COUNT],
    /// What was found when its memory was last looked at closely.
    seen: Seen,
    /// The address of the last gradient that was found to overlap nothing. It is compared, and never
    /// followed.
    pub cleared: usize,
}

/// How a parameter and its state are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub dtype: DType,
    pub stored: [Option<DType>; StateKey::COUNT],
}

impl Kind {
    /// Whether it or its state is not of the compute type.
    pub fn is_narrow(&self) -> bool {
        let compute = self.dtype.compute();
        self.dtype != compute
            || self
                .stored
                .iter()
                .flatten()
                .any(|&stored| stored != compute)
    }
}

/// The fingerprint of an array that was checked: as long as a look at the header says the same, the
/// checks and the search for overlaps need not be made anew. It decides nothing else.
#[derive(Default)]
struct Seen {
    /// Of the NumPy array; None if it is none, or must be checked anew.
    mark: Option<Mark>,
    /// Where it was; nowhere if it must be checked anew.
    extent: Extent,
    /// Dense and walked like its state.
    is_like_state: bool,
}

impl Seen {
    fn has_strides(&self, strides: &[i64]) -> bool {
        let seen = self.extent.dims.iter().map(|dim| dim.1 as i64);
        seen.eq(strides.iter().copied())
    }
}

impl Param {
    /// Reads a new parameter. `index` is for messages.
    pub fn new(
        object: &Bound<'_, PyAny>,
        name: Option<String>,
        index: usize,
        storage: &Storage,
    ) -> PyResult<Self> {
        let py = object.py();
        let raise = |failure: Failure| {
            let culprit = culprit("parameter", index, name.as_deref());
            failure.raise(culprit, WANTED, object)
        };
        let source = Source::of(object).map_err(raise)?;
        let read = |quiet: &Quiet<'_>| {
            let view = source.lend(quiet).view(quiet)?;
            let Element { dtype, is_complex } = view.element;
            let found = || describe_array(view.element.name(), view.shape);
            if is_complex || !dtype.is_float() {
                return Err(Failure::Unwanted(found()));
            }
            if let Err(wanted) = storage.check_parameter(dtype) {
                return Err(Failure::Value(wanted, found()));
            }
            let state_strides = match view.is_dense() {
                true => view
                    .strides()
                    .map(|stride| stride as i64 / dtype.size() as i64)
                    .collect(),
                false => c_strides(view.shape),
            };
            Ok((dtype, view.numel(), view.shape.into(), state_strides))
        };
        let (dtype, numel, shape, state_strides) = Quiet::during(py, read).map_err(raise)?;
        let stored = StateKey::EVERY.map(|key| storage.dtype(key, dtype, numel));
        let mut param = Param {
            object: object.clone().unbind(),
            has_own_grad: has_own_grad(object)?,
            name,
            source,
            dtype,
            numel,
            shape,
            stored,
            state_strides,
            offset: 0,
            scale_offset: 0,
            state: [0; StateKey::COUNT],
            scales: [0; StateKey::COUNT],
            seen: Seen::default(),
            cleared: 0,
        };
        let checked = Quiet::during(py, |quiet| param.recheck(quiet, true));
        match checked {
            Ok(_) => Ok(param),
            Err(refusal) => Err(param.refuse("parameter", index, refusal, object)),
        }
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

    /// What the header of the array that the parameter has now says, if that is what it said when it
    /// was last checked. One that it had before goes to `retired`.
    #[inline]
    pub fn unchanged(&mut self, quiet: &Quiet<'_>, retired: &mut Vec<Py<PyAny>>) -> Option<Mark> {
        let header = Header::of(self.source.follow(quiet, retired)?);
        let mark = header.mark();
        let is_it = self.seen.mark == Some(mark)
            && is_equal(header.shape, &self.shape)
            && (mark.is_contiguous_like(mark) || self.seen.has_strides(header.strides));
        is_it.then_some(mark)
    }

    /// Takes note of what a parameter that changed is now. True if it has moved.
    ///
    /// # Errors
    /// It is written by this step, and cannot be. Where it is not written, it may have become
    /// anything.
    #[cold]
    pub fn recheck(&mut self, quiet: &Quiet<'_>, is_written: bool) -> Result<bool, Refusal> {
        self.check_anew(quiet).or_else(|refusal| match is_written {
            true => Err(refusal),
            false => {
                // It is nowhere that this step looks at, and must be checked before it is written.
                let seen = std::mem::take(&mut self.seen);
                Ok(seen.extent.data != 0)
            }
        })
    }

    fn check_anew(&mut self, quiet: &Quiet<'_>) -> Result<bool, Refusal> {
        let source = self.source.lend(quiet);
        let view = source.view(quiet)?;
        self.check_like(&view)?;
        view.check_writable()?;
        let extent = view.extent();
        let is_walked_as_seen = extent.dims == self.seen.extent.dims;
        if !is_walked_as_seen && !view.is_dense() && extent.overlaps_itself() {
            return Err(Refusal::OverlapsItself);
        }
        let has_moved = extent.data != self.seen.extent.data || !is_walked_as_seen;
        let state = self.state_view(quiet, view.data, self.dtype)?;
        self.seen = Seen {
            mark: source.header().map(|header| header.mark()),
            is_like_state: !self.kind().is_narrow()
                && view.is_dense()
                && view.is_walked_like(&state),
            extent,
        };
        Ok(has_moved)
    }

    /// Takes the place of another parameter, whose type and shape it must have.
    pub fn succeed(&mut self, other: &Param, py: Python<'_>, index: usize) -> PyResult<()> {
        let source = &self.source;
        let checked = Quiet::during(py, |quiet| {
            let view = source.lend(quiet).view(quiet)?;
            other.check_like(&view)
        });
        let refuse = |refusal| other.refuse("parameter", index, refusal, self.object.bind(py));
        checked.map_err(refuse)?;
        (self.offset, self.scale_offset) = (other.offset, other.scale_offset);
        (self.state, self.scales) = (other.state, other.scales);
        self.state_strides.clone_from(&other.state_strides);
        // Compared with its state at the next step.
        self.seen = Seen::default();
        Ok(())
    }

    /// That an array has the parameter's type and shape.
    pub fn check_like(&self, view: &View<'_>) -> Result<(), Refusal> {
        if view.element != Element::real(self.dtype) {
            return Err(Refusal::DType);
        }
        self.check_shape(view)
    }

    /// That an array has the parameter's shape.
    pub fn check_shape(&self, view: &View<'_>) -> Result<(), Refusal> {
        match is_equal(view.shape, &self.shape) {
            true => Ok(()),
            false => Err(Refusal::Unlike),
        }
    }

    /// A view of an array of its state.
    pub fn state_view<'q>(
        &'q self,
        _: &'q Quiet<'_>,
        address: usize,
        dtype: DType,
    ) -> Result<View<'q>, Refusal> {
        let element = Element::real(dtype);
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

    /// The arrays that its state of a type is in among those of its group: parameters that are alike in
    /// this share them.
    pub fn kind(&self) -> Kind {
        Kind {
            dtype: self.dtype,
            stored: self.stored,
        }
    }

    /// The addresses of the parameter, whose header says `mine`, and of a gradient that needs no
    /// closer look: arrays of one type, walked alike.
    #[inline]
    pub fn simple_pair(&self, mine: Mark, gradient: LentSource<'_>) -> Option<[usize; 2]> {
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
    pub fn extent(&self) -> &Extent {
        &self.seen.extent
    }

    /// The error for an array that is not taken for this parameter, or as `what` else of it. Runs
    /// Python code.
    pub fn refuse(
        &self,
        what: &str,
        index: usize,
        failure: impl Into<Failure>,
        object: &Bound<'_, PyAny>,
    ) -> PyErr {
        let failure = failure.into();
        failure.raise(self.culprit(what, index), &self.describe(), object)
    }

    /// The gradient that it has of its own, or Python's None.
    pub fn grad<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyAny>> {
        if let Source::Parameter(parameter, ..) = &self.source
            && !self.has_own_grad
        {
            let grad = parameter.get().grad(py);
            return Ok(grad.unwrap_or_else(|| py.None().into_bound(py)));
        }
        let grad = self.object.bind(py).getattr(intern!(py, "grad"));
        grad.map_err(|error| match error.is_instance_of::<PyAttributeError>(py) {
            true => PyValueError::new_err(format!(
                "{}: expected one with .grad, or a step(grads=...), got neither",
                self.culprit("parameter", index)
            )),
            false => error,
        })
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
    pub fn check(&mut self, params: &mut [Param], state: Vec<(String, Extent)>) -> PyResult<()> {
        self.state = state;
        let extent = |owner: usize| self.extent_of(params, owner).clone();
        let owners = 0..params.len() + self.state.len();
        let written = Written::new(owners.map(|owner| (owner, extent(owner))))?;
        if let Some((first, second)) = written.find_overlap(extent) {
            let (first, second) = (self.name_of(params, first), self.name_of(params, second));
            return Err(PyValueError::new_err(format!(
                "{second} overlaps {first}: expected arrays that share no element"
            )));
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
    ) -> PyResult<()> {
        let Some((start, end)) = gradient.bounds() else {
            return Ok(());
        };
        let mut touching = self.written.touching(start, end);
        match touching.find(|&owner| gradient.overlaps(self.extent_of(params, owner))) {
            None => Ok(()),
            Some(owner) => Err(PyValueError::new_err(format!(
                "{} overlaps {}: expected a gradient in memory of its own",
                params[index].culprit("gradient", index),
                self.name_of(params, owner)
            ))),
        }
    }

    /// The parameters come first, then the optimizer's own arrays.
    fn extent_of<'x>(&'x self, params: &'x [Param], owner: usize) -> &'x Extent {
        match owner.checked_sub(params.len()) {
            None => params[owner].extent(),
            Some(k) => &self.state[k].1,
        }
    }

    fn name_of(&self, params: &[Param], owner: usize) -> String {
        match owner.checked_sub(params.len()) {
            None => params[owner].culprit("parameter", owner),
            Some(k) => self.state[k].0.clone(),
        }
    }
}

/// Why a step was not put together.
pub(crate) enum Refused {
    /// An array of the parameter with this index.
    Array(Role, usize, Refusal),
    /// Some gradient is no array: it must be taken first, for which Python code may run.
    Collect,
    Error(PyErr),
}

impl From<PyErr> for Refused {
    fn from(error: PyErr) -> Self {
        Refused::Error(error)
    }
}

/// The gradient of a parameter that has elements, if it is an array that fits: whether an empty one
/// has a gradient, its memory cannot tell.
pub(crate) fn array_grad<'py>(
    py: Python<'py>,
    param: &Param,
) -> Option<Bound<'py, PyUntypedArray>> {
    let Source::Parameter(parameter, ..) = &param.source else {
        return None;
    };
    let grad = parameter.get().grad(py).filter(|_| param.numel > 0)?;
    let grad = grad.cast_into::<PyUntypedArray>().ok()?.unbind();
    let fits = Quiet::during(py, |quiet| {
        let view = View::of_array(quiet, LentArray::of(quiet, &grad));
        view.is_ok_and(|view| param.check_like(&view).is_ok())
    });
    fits.then(|| grad.into_bound(py))
}
