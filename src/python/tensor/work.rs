//! From checked tensors to the work of a step.

use std::ops::Range;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use pyo3::{Borrowed, PyTraverseError, PyTypeInfo, PyVisit, ffi};

use super::super::parameter::Parameter;
use super::dlpack::{Exchange, Managed};
use super::overlap::{Extent, Written};
use super::{
    Buffer, DType, Destination, Gradient, Refusal, Source, Tensor, as_array, check_sign, is_scalar,
};
use crate::config::Config;
use crate::kernel::Real;
use crate::kernel::batch::{Batch, Dim, Layout, Piece, Storage};
use crate::optimizer::{Clipping, Gradients, HyperCache, Outcome, Verdict};
use crate::parallel::Threads;

/// A parameter of an optimizer.
pub(crate) struct Param {
    pub object: Py<PyAny>,
    pub name: Option<String>,
    pub source: Source,
    /// Its class has a `grad` that is not `Parameter`'s.
    pub has_own_grad: bool,
    pub destination: Destination,
    /// Its place in the state buffers of its group and type.
    pub offset: usize,
    /// The addresses of its v m b; 0 for those that are not there yet.
    pub state: [usize; 3],
    /// The address of the last gradient that was found to overlap nothing.
    cleared: usize,
}

impl Param {
    /// Reads a new parameter. `index` is for messages.
    pub fn new(object: &Bound<'_, PyAny>, name: Option<String>, index: usize) -> PyResult<Self> {
        let read = || {
            let mut source = Source::of(object)?;
            let tensor = source.read(object.py())?;
            tensor.check_destination()?;
            tensor.check_apart()?;
            Ok((source, Destination::new(tensor)))
        };
        let (source, destination) = read()
            .map_err(|refusal: Refusal| refusal.at(culprit("parameter", index, name.as_deref())))?;
        Ok(Param {
            object: object.clone().unbind(),
            name,
            source,
            has_own_grad: has_own_grad(object)?,
            destination,
            offset: 0,
            state: [0; 3],
            cleared: 0,
        })
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.object)?;
        self.source.traverse(visit)
    }

    /// Whether it is read through the exchange API, as torch's tensors are.
    pub fn is_exchanged(&self) -> bool {
        matches!(self.source, Source::Exchange(..))
    }

    pub fn is_capsule(&self) -> bool {
        matches!(self.source, Source::Capsule(_))
    }

    /// That it has not got a sign that its memory does not show. May run Python code.
    #[inline]
    pub fn check_sign(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        match &self.source {
            Source::Exchange(object, _) => check_sign(object.bind(py))
                .map_err(|refusal| refusal.at(self.culprit("parameter", index))),
            _ => Ok(()),
        }
    }

    pub fn culprit(&self, what: &str, index: usize) -> String {
        culprit(what, index, self.name.as_deref())
    }

    /// Reads the parameter again; true if it has moved.
    #[inline]
    pub fn refresh(
        &mut self,
        py: Python<'_>,
        index: usize,
        keep: &mut Vec<Managed>,
    ) -> PyResult<bool> {
        match self.source.is_current(py, &self.destination) {
            true => Ok(false),
            false => self.reread(py, index, keep),
        }
    }

    /// Takes note of where the parameter is without minding what has become of it: it is not
    /// written now. True if it has moved.
    #[inline]
    pub fn follow(&mut self, py: Python<'_>) -> bool {
        !self.source.is_current(py, &self.destination) && self.reread_leniently(py)
    }

    /// As [`Param::follow`] of a capsule, which `keep` keeps where it is. Runs Python code.
    pub fn follow_capsule(&mut self, py: Python<'_>, keep: &mut Vec<Managed>) {
        let mut read = self.source.read(py).ok();
        keep.extend(read.as_mut().and_then(|tensor| tensor.managed.take()));
        self.take_note(read);
    }

    #[cold]
    fn reread_leniently(&mut self, py: Python<'_>) -> bool {
        // A capsule is somewhere else each time it is made.
        let read = self.source.read_quietly(py);
        self.take_note(read)
    }

    fn take_note(&mut self, read: Option<Tensor>) -> bool {
        let is_fit = |tensor: &Tensor| {
            self.destination
                .check_like(tensor.dtype, &tensor.shape)
                .is_ok()
                && tensor.check_destination().is_ok()
                && tensor.check_apart().is_ok()
        };
        match read.filter(is_fit) {
            Some(tensor) => self.destination.move_to(tensor),
            // Whatever it is now, it is nowhere that this step looks at, and must be checked anew
            // before it is written.
            None => self.destination.forget(),
        }
    }

    /// Takes the place of another parameter, whose type and shape it must have.
    pub fn succeed(&mut self, other: &Param, index: usize) -> PyResult<()> {
        let mine = &self.destination;
        let like = other.destination.check_like(mine.dtype, &mine.shape);
        like.map_err(|refusal| refusal.at(self.culprit("parameter", index)))?;
        (self.offset, self.state) = (other.offset, other.state);
        self.destination.inherit_state(&other.destination);
        Ok(())
    }

    #[cold]
    fn reread(&mut self, py: Python<'_>, index: usize, keep: &mut Vec<Managed>) -> PyResult<bool> {
        let mut read = || {
            let tensor = self.source.read(py)?;
            self.destination.check_like(tensor.dtype, &tensor.shape)?;
            tensor.check_destination()?;
            if tensor.strides != self.destination.strides {
                tensor.check_apart()?;
            }
            Ok(tensor)
        };
        let tensor: Result<Tensor, Refusal> = read();
        let mut tensor = tensor.map_err(|refusal| refusal.at(self.culprit("parameter", index)))?;
        keep.extend(tensor.managed.take());
        Ok(self.destination.move_to(tensor))
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

/// "parameter 3 ('fc.weight')".
pub(crate) fn culprit(what: &str, index: usize, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{what} {index} ('{name}')"),
        None => format!("{what} {index}"),
    }
}

/// Whether an object is a NumPy array and no subclass: a comparison instead of a call.
#[inline]
fn is_exact_array(object: &Bound<'_, PyAny>) -> bool {
    static TYPE: AtomicPtr<ffi::PyTypeObject> = AtomicPtr::new(std::ptr::null_mut());
    let found = object.get_type_ptr();
    found == TYPE.load(Relaxed) || {
        TYPE.store(PyUntypedArray::type_object_raw(object.py()), Relaxed);
        found == TYPE.load(Relaxed)
    }
}

/// A gradient on its way into a step. Whatever can be read without running Python code is read only
/// once no more of it will run; a reference keeps it until the step is over.
#[derive(Default)]
pub(crate) enum Incoming {
    #[default]
    None,
    Array(Py<PyUntypedArray>),
    Exchange(Box<(Py<PyAny>, Exchange)>),
    /// Memory that is kept by the capsule it came in.
    Capsule(Box<Tensor>),
}

impl Incoming {
    /// Takes a gradient. May run Python code.
    #[inline]
    pub fn new(object: Bound<'_, PyAny>, param: &Param, index: usize) -> PyResult<Self> {
        if is_exact_array(&object) {
            // SAFETY: it is a NumPy array.
            let array = unsafe { object.cast_into_unchecked::<PyUntypedArray>() };
            return Ok(Incoming::Array(array.unbind()));
        }
        Self::of(&object).map_err(|refusal| {
            refusal
                .wanting(&param.destination)
                .at(param.culprit("gradient", index))
        })
    }

    /// Whatever a parameter may be, read-only or in a legacy capsule too, or a NumPy scalar, which
    /// is what NumPy's reductions return for a parameter without dimensions.
    #[cold]
    pub fn of(object: &Bound<'_, PyAny>) -> Result<Self, Refusal> {
        let py = object.py();
        if object.is_none() {
            return Ok(Incoming::None);
        }
        if is_scalar(object)? {
            return Ok(Incoming::Array(as_array(object)?.unbind()));
        }
        Ok(match Source::of(object)? {
            Source::Array(array) => Incoming::Array(array),
            Source::Parameter(_, data, _) => Incoming::Array(data),
            Source::Exchange(object, exchange) => Incoming::Exchange(Box::new((object, exchange))),
            mut source @ Source::Capsule(_) => Incoming::Capsule(Box::new(source.read(py)?)),
        })
    }

    /// Lets go of it.
    #[inline]
    pub fn release(&mut self, py: Python<'_>) {
        match std::mem::take(self) {
            // Bound, so that dropping the reference need not find out whether the GIL is held.
            Incoming::Array(array) => drop(array.into_bound(py)),
            Incoming::Exchange(object) => drop(object.0.into_bound(py)),
            Incoming::Capsule(_) | Incoming::None => {}
        }
    }

    #[inline]
    pub fn is_some(&self) -> bool {
        !matches!(self, Incoming::None)
    }

    /// The address of a gradient that is a NumPy array and is walked like its parameter; None if it
    /// must be looked at more closely.
    #[inline]
    fn at_a_glance(&self, py: Python<'_>, destination: &Destination) -> Option<usize> {
        match self {
            Incoming::Array(array) => destination.simple_gradient(array.bind(py)),
            _ => None,
        }
    }

    /// Where the gradient of a parameter is, if there is one. Runs no Python code.
    #[cold]
    pub fn gradient(
        &self,
        py: Python<'_>,
        destination: &Destination,
    ) -> Result<Option<Gradient>, Refusal> {
        let gradient = match self {
            Incoming::None => return Ok(None),
            Incoming::Array(array) => Tensor::of_array(array.bind(py))
                .and_then(|tensor| Gradient::new(&tensor, destination)),
            Incoming::Exchange(object) => (object.1.read(object.0.bind(py)))
                .and_then(|tensor| Gradient::new(&tensor, destination)),
            Incoming::Capsule(tensor) => Gradient::new(tensor, destination),
        };
        gradient
            .map(Some)
            .map_err(|refusal| refusal.wanting(destination))
    }
}

/// A state buffer, as far as overlaps are concerned.
pub(crate) struct StateSpan {
    /// "state square_avg of group 0, float32".
    pub name: String,
    pub data: usize,
    pub shape: [usize; 1],
    pub strides: [isize; 1],
}

impl StateSpan {
    pub fn new(name: String, buffer: &Buffer, dtype: DType) -> Self {
        StateSpan {
            name,
            data: buffer.data,
            shape: [buffer.numel],
            strides: [dtype.size() as isize],
        }
    }

    fn extent(&self) -> Extent<'_> {
        let size = self.strides[0] as usize;
        Extent {
            data: self.data,
            shape: &self.shape,
            strides: &self.strides,
            size,
        }
    }
}

/// A list or a tuple of gradients that are read where they are.
pub(crate) enum Lent<'x, 'py> {
    List(&'x Bound<'py, PyList>),
    Tuple(&'x Bound<'py, PyTuple>),
}

impl<'py> Lent<'_, 'py> {
    /// The NumPy array at an index, if there is one and it is of no subclass.
    ///
    /// # Safety
    /// While it is used, nothing runs Python code.
    #[inline]
    unsafe fn array<'a>(
        &'a self,
        py: Python<'py>,
        index: usize,
    ) -> Option<Borrowed<'a, 'py, PyUntypedArray>> {
        let item = match self {
            Lent::Tuple(tuple) => tuple.get_borrowed_item(index).ok()?,
            // SAFETY: this is a list, and the index is checked; the list holds the item until
            // somebody changes it.
            Lent::List(list) => unsafe {
                if index >= list.len() {
                    return None;
                }
                let item = ffi::PyList_GetItem(list.as_ptr(), index as ffi::Py_ssize_t);
                Borrowed::from_ptr_or_opt(py, item)?
            },
        };
        // SAFETY: it is a NumPy array.
        is_exact_array(&item).then(|| unsafe { item.cast_unchecked() })
    }
}

/// What a step writes: the parameters and their state, none of which may share an element.
#[derive(Default)]
pub(crate) struct Guard {
    written: Written,
    state: Vec<StateSpan>,
    is_checked: bool,
}

impl Guard {
    /// Forgets what was found out: something has moved, or is new.
    pub fn forget(&mut self) {
        self.is_checked = false;
    }

    /// Checks that no two parameters or state buffers share an element, unless that was found
    /// already.
    pub fn check(
        &mut self,
        params: &mut [Param],
        state: impl FnOnce() -> Vec<StateSpan>,
    ) -> PyResult<()> {
        if self.is_checked {
            return Ok(());
        }
        self.state = state();
        let extent = |owner: usize| extent_of(params, &self.state, owner);
        let written =
            Written::new((0..params.len() + self.state.len()).map(|owner| (owner, extent(owner))))?;
        if let Some((first, second)) = written.find_overlap(extent)? {
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

    /// Checks that a gradient lies on nothing that is written.
    fn check_gradient(&self, params: &[Param], index: usize, gradient: &Gradient) -> PyResult<()> {
        let own = params[index].destination.extent();
        let strides = gradient.strides.as_deref().unwrap_or(own.strides);
        let extent = Extent {
            data: gradient.data,
            strides,
            ..own
        };
        let Some((start, end)) = extent.bounds() else {
            return Ok(());
        };
        for owner in self.written.touching(start, end) {
            if extent.overlaps(&extent_of(params, &self.state, owner))? {
                return Err(PyValueError::new_err(format!(
                    "{} overlaps {}: expected a gradient in memory of its own",
                    params[index].culprit("gradient", index),
                    self.name_of(params, owner)
                )));
            }
        }
        Ok(())
    }

    fn name_of(&self, params: &[Param], owner: usize) -> String {
        match owner.checked_sub(params.len()) {
            None => params[owner].culprit("parameter", owner),
            Some(k) => self.state[k].name.clone(),
        }
    }
}

/// The parameters come first, then the state buffers.
fn extent_of<'a>(params: &'a [Param], state: &'a [StateSpan], owner: usize) -> Extent<'a> {
    match owner.checked_sub(params.len()) {
        None => params[owner].destination.extent(),
        Some(k) => state[k].extent(),
    }
}

/// One parameter group in a step.
pub(crate) struct GroupWork<'g> {
    pub config: &'g Config,
    /// Its parameters.
    pub range: Range<usize>,
    /// By type, if the group is taken as flat buffers.
    pub flat: Option<[FlatWork; 2]>,
}

/// The parameters of one type in a group, and their gradients, as flat buffers: addresses.
#[derive(Clone, Copy, Default)]
pub(crate) struct FlatWork {
    pub p: usize,
    pub g: usize,
    pub state: [usize; 3],
    pub numel: usize,
}

/// The work of a step, by type. What is pushed lives for `'a`.
pub(crate) struct Work<'s, 'a> {
    pub f32: Batch<'s, 'a, f32>,
    pub f64: Batch<'s, 'a, f64>,
}

/// Puts a step together: reads all memory as it is now, checks it, and makes it the kernel's work.
/// Nothing is written.
///
/// Parameters and gradients are held by `params`, `incoming` and `capsules` while the work lasts.
/// Another thread that moves their memory meanwhile (`p.data = …` in torch) races with the step, as
/// with torch's own kernels.
pub(crate) struct Assembly<'x, 's> {
    pub params: &'x mut [Param],
    pub incoming: &'x [Incoming],
    pub steps: &'x [u64],
    pub guard: &'x mut Guard,
    pub work: Work<'s, 'x>,
    /// What keeps the memory of parameters that are capsules.
    pub capsules: Vec<Managed>,
}

impl Assembly<'_, '_> {
    /// Takes all groups. `state` lists the state buffers, `check_buffers` finds out whether they
    /// are where they were.
    pub fn build<'g>(
        &mut self,
        py: Python<'_>,
        groups: impl Iterator<Item = GroupWork<'g>> + Clone,
        state: impl FnOnce() -> Vec<StateSpan>,
        check_buffers: impl Fn() -> PyResult<()>,
    ) -> PyResult<()> {
        check_buffers()?;
        // As a rule nothing has moved since the last step: look while pushing, and start over if
        // something has, or if anything looks wrong before all parameters were looked at.
        if self.guard.is_checked {
            let mut groups = groups.clone();
            if groups.all(|group| self.push(py, &group, true).unwrap_or(false)) {
                return Ok(());
            }
            self.work.f32.clear();
            self.work.f64.clear();
        }
        // Capsules first: making one runs Python code, which might move anything. After that
        // nothing runs Python code.
        for is_capsule in [true, false] {
            let separate = groups.clone().filter(|group| group.flat.is_none());
            for index in separate.flat_map(|group| group.range) {
                let param = &mut self.params[index];
                if param.is_capsule() != is_capsule {
                    continue;
                }
                let has_moved = match self.incoming[index].is_some() {
                    true => param.refresh(py, index, &mut self.capsules)?,
                    false => param.follow(py),
                };
                if has_moved {
                    self.guard.forget();
                }
            }
        }
        check_buffers()?;
        self.guard.check(self.params, state)?;
        for group in groups {
            self.push(py, &group, false)?;
        }
        Ok(())
    }

    /// Makes all groups the kernel's work, if all parameters and gradients are NumPy arrays, walked
    /// alike, and the parameters are where they were. False if not, with some of it done. What is
    /// lent must be left alone until the work is done.
    pub fn glance<'g>(
        &mut self,
        py: Python<'_>,
        mut groups: impl Iterator<Item = GroupWork<'g>>,
        lent: &Lent<'_, '_>,
    ) -> bool {
        let Assembly {
            params,
            steps,
            guard,
            work,
            ..
        } = self;
        guard.is_checked
            && groups.all(|group| {
                let mut hypers = [HyperCache::default(), HyperCache::default()];
                group.flat.is_none()
                    && group.range.clone().all(|index| {
                        let param = &params[index];
                        if !param.source.is_current(py, &param.destination) {
                            return false;
                        }
                        // SAFETY: nothing runs Python code here.
                        let array = unsafe { lent.array(py, index) };
                        let destination = &param.destination;
                        let Some(g) = array.and_then(|array| destination.simple_gradient(&array))
                        else {
                            return false;
                        };
                        if g != param.cleared {
                            let gradient = Gradient {
                                data: g,
                                strides: None,
                            };
                            if guard.check_gradient(params, index, &gradient).is_err() {
                                return false;
                            }
                            params[index].cleared = g;
                        }
                        let Param {
                            destination, state, ..
                        } = &params[index];
                        let piece = RawPiece {
                            p: destination.data,
                            g,
                            numel: destination.numel,
                            state: *state,
                            index,
                        };
                        let (dtype, step) = (destination.dtype, steps[index]);
                        // SAFETY: as in `push`; who calls this leaves the arrays alone.
                        unsafe { work.push(dtype, group.config, step, &mut hypers, piece, None) };
                        destination.is_like_state
                    })
            })
    }

    /// Makes a group the kernel's work. In a first look the parameters may have moved: false if one
    /// has, or if that cannot be told at a glance.
    fn push(
        &mut self,
        py: Python<'_>,
        group: &GroupWork<'_>,
        is_first_look: bool,
    ) -> PyResult<bool> {
        let Assembly {
            params,
            incoming,
            steps,
            guard,
            work,
            ..
        } = self;
        let mut hypers = [HyperCache::default(), HyperCache::default()];
        if let Some(flat) = group.flat {
            for (dtype, flat) in [DType::F32, DType::F64].into_iter().zip(flat) {
                let is_member = |&index: &usize| params[index].destination.dtype == dtype;
                if let Some(index) = group.range.clone().find(is_member) {
                    let FlatWork { p, g, state, numel } = flat;
                    let piece = RawPiece {
                        p,
                        g,
                        numel,
                        state,
                        index,
                    };
                    let (config, step) = (group.config, steps[index]);
                    // SAFETY: p, g and the state are flat buffers of the optimizer's own, which
                    // were found where they were; they have `numel` elements of this type, and no
                    // two of them are the same.
                    unsafe { work.push(dtype, config, step, &mut hypers, piece, None) };
                }
            }
            return Ok(true);
        }
        for index in group.range.clone() {
            let param = &mut params[index];
            if is_first_look && !param.source.is_current(py, &param.destination) {
                return Ok(false);
            }
            let gradient = match incoming[index].at_a_glance(py, &param.destination) {
                Some(data) => Gradient {
                    data,
                    strides: None,
                },
                None => match incoming[index].gradient(py, &param.destination) {
                    Ok(Some(gradient)) => gradient,
                    Ok(None) => continue,
                    Err(refusal) => return Err(refusal.at(param.culprit("gradient", index))),
                },
            };
            let is_like = gradient.strides.is_none();
            if gradient.data != param.cleared || !is_like {
                guard.check_gradient(params, index, &gradient)?;
            }
            let param = &mut params[index];
            param.cleared = if is_like { gradient.data } else { 0 };
            let Param {
                destination, state, ..
            } = param;
            let is_flat = is_like && destination.is_like_state;
            let layout = (!is_flat).then(|| layout(destination, &gradient));
            let (p, g, numel) = (destination.data, gradient.data, destination.numel);
            let piece = RawPiece {
                p,
                g,
                numel,
                state: *state,
                index,
            };
            let (dtype, config, step) = (destination.dtype, group.config, steps[index]);
            // SAFETY: the parameter and its gradient were read just now, with the GIL held and no
            // Python code in between: writable, aligned (the gradient at least where it is walked
            // densely), of this type and of one shape; what keeps their memory outlives the work.
            // The state buffers were made for these parameters and options, and were found where
            // they were. `guard` found that no two written arrays share an element, and that the
            // gradient shares none with them.
            unsafe { work.push(dtype, config, step, &mut hypers, piece, layout) };
        }
        Ok(true)
    }
}

/// A dense piece before its type is known.
pub(super) struct RawPiece {
    pub p: usize,
    pub g: usize,
    pub numel: usize,
    pub state: [usize; 3],
    pub index: usize,
}

/// What all processes together found in the gradients that they share.
#[derive(Clone, Copy)]
pub(crate) struct Gathered {
    pub squares: f64,
    /// Some gradient is not finite.
    pub has_nonfinite: bool,
}

/// Stands for a parameter of another process.
pub(crate) const ELSEWHERE: usize = usize::MAX;

/// The gradients of both types as one sequence: f32 first.
struct Both<'b, 's, 'a> {
    work: &'b mut Work<'s, 'a>,
    threads: &'b Threads,
    gathered: Option<Gathered>,
}

impl Gradients for Both<'_, '_, '_> {
    fn sum_squares(&mut self) -> f64 {
        match self.gathered {
            Some(gathered) => gathered.squares,
            None => self.work.sum_squares(self.threads),
        }
    }

    fn find_nonfinite(&mut self) -> Option<(usize, usize, f64)> {
        let is_elsewhere = self.gathered.is_some_and(|gathered| gathered.has_nonfinite);
        match self.gathered {
            Some(gathered) if !gathered.has_nonfinite => None,
            _ => (self.work.find_nonfinite())
                .or_else(|| is_elsewhere.then_some((ELSEWHERE, 0, f64::NAN))),
        }
    }
}

impl<'s> Work<'s, '_> {
    /// No work yet.
    pub fn open(f32: &'s mut Storage<f32>, f64: &'s mut Storage<f64>) -> Self {
        Work {
            f32: f32.open(),
            f64: f64.open(),
        }
    }

    /// Whether several threads can and should update the pieces, which may share elements: finding out
    /// whether they do takes some 150 ns a piece, more than a thread saves on small ones.
    pub fn suits_threads(&mut self) -> bool {
        const SMALL: usize = 2048;
        self.f32.mean_numel().max(self.f64.mean_numel()) >= SMALL
            && self.f32.is_apart()
            && self.f64.is_apart()
    }

    /// Looks at the gradients as far as `clipping` wants it, and updates.
    pub fn run(
        mut self,
        clipping: &Clipping,
        threads: Threads,
        gathered: Option<Gathered>,
    ) -> Verdict {
        let verdict = clipping.judge(&mut Both {
            work: &mut self,
            threads: &threads,
            gathered,
        });
        if let Outcome::Update { factor } = verdict.outcome {
            let Work { mut f32, mut f64 } = self;
            f32.clip(factor);
            f64.clip(factor);
            f32.update(&threads);
            f64.update(&threads);
        }
        verdict
    }

    pub fn bytes(&self) -> usize {
        self.f32.bytes() + self.f64.bytes()
    }

    pub fn sum_squares(&mut self, threads: &Threads) -> f64 {
        self.f32.sum_squares(threads) + self.f64.sum_squares(threads)
    }

    pub fn find_nonfinite(&mut self) -> Option<(usize, usize, f64)> {
        (self.f32.find_nonfinite()).or_else(|| self.f64.find_nonfinite())
    }

    /// # Safety
    /// As [`Batch::push_piece`], for the batch of this type.
    #[inline(always)]
    pub(super) unsafe fn push(
        &mut self,
        dtype: DType,
        config: &Config,
        step: u64,
        hypers: &mut [HyperCache; 2],
        piece: RawPiece,
        layout: Option<Layout>,
    ) {
        let hypers = &mut hypers[dtype as usize];
        match dtype {
            DType::F32 => {
                let hyper = hypers.get(&mut self.f32, config, step);
                // SAFETY: passed on to the caller.
                unsafe { push(&mut self.f32, hyper, piece, layout) };
            }
            DType::F64 => {
                let hyper = hypers.get(&mut self.f64, config, step);
                // SAFETY: passed on to the caller.
                unsafe { push(&mut self.f64, hyper, piece, layout) };
            }
        }
    }
}

/// # Safety
/// As [`Batch::push_piece`].
#[inline(always)]
unsafe fn push<T: Real>(
    batch: &mut Batch<'_, '_, T>,
    hyper: u32,
    piece: RawPiece,
    layout: Option<Layout>,
) {
    let layout = layout.map_or(Piece::<T>::DENSE, |layout| batch.push_layout(layout));
    let [v, m, b] = piece.state.map(|address| address as *mut T);
    let RawPiece {
        p, g, numel, index, ..
    } = piece;
    let (p, g, index) = (p as *mut T, g as *const T, index as u32);
    // SAFETY: passed on to the caller.
    unsafe {
        batch.push_piece(Piece {
            p,
            g,
            v,
            m,
            b,
            numel,
            index,
            hyper,
            layout,
        })
    };
}

/// The walk over a parameter whose arrays do not all lie alike: in the order of the parameter's
/// memory where it is dense, so that the norm of the gradients adds up in the same order as on the
/// flat path.
#[cold]
fn layout(destination: &Destination, gradient: &Gradient) -> Layout {
    let gradient_strides = gradient.strides.as_deref().unwrap_or(&destination.strides);
    let mut dims: Vec<Dim> = (0..destination.shape.len())
        .map(|k| {
            let state = destination.state_strides[k];
            let strides = [
                destination.strides[k],
                gradient_strides[k],
                state,
                state,
                state,
            ];
            Dim {
                len: destination.shape[k],
                strides,
            }
        })
        .filter(|dim| dim.len != 1)
        .collect();
    if destination.is_dense {
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.strides[0]));
    }
    Layout::new(dims)
}
