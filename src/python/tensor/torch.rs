//! torch's tensors as they are at this step: parameters, gradients and state.
//!
//! A step has two parts. While [`Pair`]s are collected, Python code may run (a torch function mode,
//! a finalizer), so all that is kept is held by a reference. From then on until the kernel is done
//! nothing runs Python code or gives the GIL away, so what dicts and tensors lend stays valid. A long
//! step does give it away, and takes references to the rest first.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};
use pyo3::{ffi, intern};
use std::collections::HashMap;
use std::ffi::CStr;

use super::super::step::DETACH_BYTES;
use super::DType;
use super::dict::Walk;
use super::dlpack::{Exchange, Managed, View};
use super::overlap::Extent;
use super::work::{Gathered, RawPiece, Work};
use crate::config::Config;
use crate::kernel::batch::{Dim, Layout, Storage};
use crate::kernel::dispatch::Isa;
use crate::optimizer::{Clipping, HyperCache, Outcome, Verdict};
use crate::parallel::{SERIAL_BYTES, Threads};
use crate::state::StateKey;

/// What torch offers to read its tensors with, looked up once.
pub(crate) struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    exchange: Exchange,
    grad: Py<PyAny>,
    get_grad: ffi::descrgetfunc,
    is_neg: Py<PyAny>,
    increment_version: Py<PyAny>,
    num_threads: Py<PyAny>,
}

impl Torch {
    /// ImportError if torch is not there or lacks the exchange API.
    pub fn get(py: Python<'_>) -> PyResult<&Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || Torch::find(py))
    }

    fn find(py: Python<'_>) -> PyResult<Torch> {
        let torch = py.import("torch")?;
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        let parameter = torch.getattr("nn")?.getattr("Parameter")?;
        let old = || {
            pyo3::exceptions::PyImportError::new_err(
                "expected torch 2.10 or newer, whose tensors have the DLPack C exchange API",
            )
        };
        let exchange = Exchange::find(&tensor)?.ok_or_else(old)?;
        let grad = tensor.getattr("grad")?;
        // SAFETY: the object is a type; a type without the slot gives null.
        let get = unsafe { ffi::PyType_GetSlot(ffi::Py_TYPE(grad.as_ptr()), ffi::Py_tp_descr_get) };
        if get.is_null() {
            return Err(old());
        }
        // SAFETY: that slot holds a function of this type.
        let get_grad = unsafe { std::mem::transmute::<*mut _, ffi::descrgetfunc>(get) };
        let private = torch.getattr("_C")?;
        Ok(Torch {
            is_neg: tensor.getattr("is_neg")?.unbind(),
            tensor: tensor.unbind(),
            parameter: parameter.cast_into::<PyType>()?.unbind(),
            exchange,
            grad: grad.unbind(),
            get_grad,
            increment_version: private.getattr("_increment_version")?.unbind(),
            num_threads: private.getattr("get_num_threads")?.unbind(),
        })
    }

    /// Whether an object is a plain tensor: of no other subclass than `torch.nn.Parameter`.
    #[inline]
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        class == self.tensor.as_ptr() || class == self.parameter.as_ptr()
    }

    /// `tensor.grad`, as the attribute of the class gives it.
    #[inline]
    pub fn grad<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: the descriptor is `torch.Tensor.grad` and the function its class's; the GIL is
        // held. The result is a new reference, or null with an error set.
        unsafe {
            let (object, class) = (tensor.as_ptr(), tensor.get_type_ptr());
            let grad = (self.get_grad)(self.grad.as_ptr(), object, class.cast());
            Bound::from_owned_ptr_or_err(tensor.py(), grad)
        }
    }

    /// Whether a tensor's sign is in a bit that the memory does not show.
    pub fn is_neg(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (is_neg, end) = (self.is_neg.as_ptr(), std::ptr::null_mut::<ffi::PyObject>());
        // SAFETY: both are objects, and the GIL is held; null ends the arguments. (With a tuple of
        // arguments it takes twice as long, more than a small tensor's update.)
        let found = unsafe {
            let found = ffi::PyObject_CallFunctionObjArgs(is_neg, tensor.as_ptr(), end);
            Bound::from_owned_ptr_or_err(tensor.py(), found)?
        };
        found.is_truthy()
    }

    /// Tells autograd that tensors were written in place.
    fn increment_version(
        &self,
        py: Python<'_>,
        tensors: impl ExactSizeIterator<Item = Py<PyAny>>,
    ) -> PyResult<()> {
        let tensors = PyList::new(py, tensors)?;
        self.increment_version.bind(py).call1((tensors,))?;
        Ok(())
    }

    /// How often a tensor was written in place; None for an inference tensor, of which torch does not
    /// count it.
    fn version(&self, tensor: &Bound<'_, PyAny>) -> Option<i64> {
        let version = tensor.getattr(intern!(tensor.py(), "_version")).ok()?;
        version.extract().ok()
    }

    /// Where torch keeps what it has of a tensor: Python's object, and those of C++ for it and for its
    /// storage.
    fn places(&self, tensor: &Bound<'_, PyAny>) -> PyResult<[usize; 3]> {
        let storage = tensor.call_method0("untyped_storage")?;
        let [tensor_impl, storage_impl] = [tensor, &storage].map(|x| x.getattr("_cdata"));
        let object = tensor.as_ptr() as usize;
        Ok([object, tensor_impl?.extract()?, storage_impl?.extract()?])
    }

    /// torch's own number of threads.
    pub fn num_threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.num_threads.bind(py).call0()?.extract()
    }
}

/// A parameter that has a gradient.
pub(crate) struct Pair {
    /// The parameter's index over all groups.
    pub index: usize,
    /// Neither has a sign that memory does not show.
    pub p: Py<PyAny>,
    pub g: Py<PyAny>,
}

/// The state of a parameter, borrowed; null where there is none.
#[derive(Clone, Copy)]
struct Entry {
    step: *mut ffi::PyObject,
    /// By [`StateKey`].
    arrays: [*mut ffi::PyObject; 3],
}

/// Finds the state of one parameter after another.
///
/// Hashing a tensor runs Python code and takes longer than a step. But state is created in the order
/// of the parameters, so as a rule the next one's is the next entry; and where it is not, tensors are
/// the same key only if they are the same object.
struct StateWalk<'py> {
    py: Python<'py>,
    walk: Walk,
    state: *mut ffi::PyObject,
    /// By the parameter's address, once the order was found to be another.
    places: Option<HashMap<usize, *mut ffi::PyObject>>,
}

impl<'py> StateWalk<'py> {
    /// # Safety
    /// As long as it and what it finds are used, the GIL is held and no Python code runs.
    unsafe fn new(state: &Bound<'py, PyDict>) -> Self {
        StateWalk {
            py: state.py(),
            // SAFETY: passed on to the caller.
            walk: unsafe { Walk::new(state.as_ptr()) },
            state: state.as_ptr(),
            places: None,
        }
    }

    #[inline]
    fn find(&mut self, parameter: &Py<PyAny>, config: &Config) -> Option<Entry> {
        let wanted = parameter.as_ptr();
        let found = match &self.places {
            None => {
                let next = self.walk.by_ref().find(|(key, _)| *key == wanted);
                next.map(|(_, value)| value)
            }
            Some(places) => return self.entry(*places.get(&(wanted as usize))?, config),
        };
        match found {
            Some(found) => self.entry(found, config),
            None => self.search(wanted, config),
        }
    }

    #[cold]
    fn search(&mut self, wanted: *mut ffi::PyObject, config: &Config) -> Option<Entry> {
        // SAFETY: by the contract of `new`.
        let walk = unsafe { Walk::new(self.state) };
        let places = walk.map(|(key, value)| (key as usize, value)).collect();
        let found = self.places.insert(places).get(&(wanted as usize)).copied();
        self.entry(found?, config)
    }

    /// Reads the dict of one parameter, until all that is used was found.
    #[inline]
    fn entry(&self, dict: *mut ffi::PyObject, config: &Config) -> Option<Entry> {
        let py = self.py;
        // SAFETY: by the contract of `new` the reference is valid, and the dict is left alone.
        let walk = unsafe {
            if ffi::PyDict_Check(dict) == 0 {
                return None;
            }
            Walk::new(dict)
        };
        let mut entry = Entry {
            step: std::ptr::null_mut(),
            arrays: [std::ptr::null_mut(); 3],
        };
        for (key, value) in walk {
            // SAFETY: as above.
            let key = unsafe { Borrowed::from_ptr(py, key) };
            if let Some(place) = entry.place(&key) {
                *place = value;
                if entry.is_complete(config) {
                    break;
                }
            }
        }
        Some(entry)
    }
}

impl Entry {
    #[inline]
    fn is_complete(&self, config: &Config) -> bool {
        let is_there = |key: StateKey| !self.arrays[key as usize].is_null() || !key.is_used(config);
        !self.step.is_null() && StateKey::ALL.into_iter().all(is_there)
    }

    /// Where the value of a key goes.
    #[inline]
    fn place(&mut self, key: &Bound<'_, PyAny>) -> Option<&mut *mut ffi::PyObject> {
        let py = key.py();
        let keys: [(&Bound<'_, PyString>, &CStr); 4] = [
            (intern!(py, "step"), c"step"),
            (intern!(py, "square_avg"), c"square_avg"),
            (intern!(py, "momentum_buffer"), c"momentum_buffer"),
            (intern!(py, "grad_avg"), c"grad_avg"),
        ];
        let found = keys.iter().position(|(known, _)| known.is(key));
        // A checkpoint's strings are equal, not the same.
        let found = found.or_else(|| {
            let key = key.cast_exact::<PyString>().ok()?.as_ptr();
            // SAFETY: this is a string, compared with one that ends in 0, without making an object.
            let is_equal = |name: &CStr| unsafe {
                ffi::PyUnicode_CompareWithASCIIString(key, name.as_ptr()) == 0
            };
            keys.iter().position(|(_, name)| is_equal(name))
        });
        let [v, m, b] = &mut self.arrays;
        Some(match found? {
            0 => &mut self.step,
            1 => v,
            2 => b,
            _ => m,
        })
    }

    /// From a tuple (index, p, g, v, m, b, step), where None stands for nothing.
    fn of(tuple: &Bound<'_, PyTuple>) -> PyResult<Self> {
        let item = |k: usize| {
            let item = tuple.get_borrowed_item(3 + k)?;
            PyResult::Ok(match item.is_none() {
                true => std::ptr::null_mut(),
                false => item.as_ptr(),
            })
        };
        Ok(Entry {
            arrays: [item(0)?, item(1)?, item(2)?],
            step: item(3)?,
        })
    }
}

/// A count of updates: a tensor with one element.
#[derive(Clone, Copy)]
struct Step {
    data: usize,
    dtype: DType,
}

impl Step {
    /// # Safety
    /// `data` is valid, aligned and of this type.
    #[inline]
    unsafe fn read(self) -> f64 {
        // SAFETY: passed on to the caller.
        unsafe {
            match self.dtype {
                DType::F32 => f64::from(*(self.data as *const f32)),
                DType::F64 => *(self.data as *const f64),
            }
        }
    }

    /// # Safety
    /// As [`Step::read`], and writable.
    #[inline]
    unsafe fn increment(self) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self.dtype {
                DType::F32 => *(self.data as *mut f32) += 1.0,
                DType::F64 => *(self.data as *mut f64) += 1.0,
            }
        }
    }
}

/// The tensors of a step on their way to the kernel; kept from step to step so that a step allocates
/// nothing.
pub(crate) struct Rows {
    f32: Storage<f32>,
    f64: Storage<f64>,
    notes: Notes,
    pins: Pins,
}

/// What a step notes of its tensors besides the work.
#[derive(Default)]
struct Notes {
    steps: Vec<Step>,
    /// The addresses of the tensors of `steps`.
    counts: Vec<usize>,
    /// Those of the state that is written.
    arrays: Vec<usize>,
    /// Those of what autograd is told of one by one.
    told: Vec<usize>,
    /// There is state of which it is told together.
    is_told_together: bool,
    held: Vec<Py<PyAny>>,
}

/// A parameter group in a step.
pub(crate) struct GroupPairs<'g> {
    pub config: &'g Config,
    pub pairs: &'g [Pair],
}

/// Where the state of the pairs is.
pub(crate) enum Source<'x, 'py> {
    /// In `opt.state`.
    State(&'x Bound<'py, PyDict>),
    /// In a tuple (index, p, g, v, m, b, step) for each pair, in their order.
    Tuples(&'x [Bound<'py, PyTuple>]),
}

/// How a step is to be done.
pub(crate) struct Manner {
    pub clipping: Clipping,
    /// None for as many as torch uses.
    pub threads: Option<usize>,
    pub gathered: Option<Gathered>,
}

/// Why nothing was done.
pub(crate) enum Unfit {
    /// Some tensor is not for the core, or has no state.
    Refused,
    Python(PyErr),
}

impl From<PyErr> for Unfit {
    fn from(error: PyErr) -> Self {
        Unfit::Python(error)
    }
}

impl Rows {
    pub fn new(isa: Isa) -> Self {
        Rows {
            f32: Storage::new(isa, 0, 0),
            f64: Storage::new(isa, 0, 0),
            notes: Notes::default(),
            pins: Pins::default(),
        }
    }

    /// Lets go of what a step held.
    pub fn release(&mut self) {
        self.notes.held.clear();
        self.pins.wanted.clear();
        self.pins.retired.clear();
    }

    /// Lets go of all parameters and state, which are about to change.
    pub fn unpin(&mut self) {
        self.pins.retired.append(&mut self.pins.pins);
    }

    /// Tells autograd what the last step has written, as torch does of all but the counts.
    pub fn tell(&mut self, py: Python<'_>, torch: &Torch) -> PyResult<()> {
        let Rows { notes, pins, .. } = self;
        if notes.is_told_together {
            notes.held.push(pins.together(torch, py)?.clone_ref(py));
        }
        let wanted = pins.wanted.iter();
        let before: Vec<Vec<_>> = wanted.map(|wanted| wanted.versions(torch, py)).collect();
        torch.increment_version(py, notes.held.drain(..))?;
        pins.update(py, torch, &before)
    }

    /// A tensor with the elements of another one, for state: autograd is told of all of them together.
    pub fn tell_together<'py>(
        &mut self,
        torch: &Torch,
        values: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = values.py();
        let together = self.pins.together(torch, py)?.bind(py);
        let tensor = together.call_method0("detach")?;
        tensor.setattr("data", values)?;
        Ok(tensor)
    }

    /// Updates the parameters of the pairs and their state, and counts the step; or does nothing at
    /// all.
    pub fn step<'g>(
        &mut self,
        py: Python<'_>,
        torch: &Torch,
        groups: impl Iterator<Item = GroupPairs<'g>>,
        source: &Source<'_, '_>,
        manner: &Manner,
    ) -> Result<Verdict, Unfit> {
        let Rows {
            f32,
            f64,
            notes,
            pins,
        } = self;
        let work = Work::open(f32, f64);
        // SAFETY: from here to the end nothing runs Python code (the number of threads comes from a
        // function in C), or while the GIL is away all objects are held.
        let mut work = unsafe { notes.fill(work, torch, groups, source, pins)? };
        let bytes = work.bytes();
        let allowed = match manner.threads {
            Some(threads) => threads,
            None if bytes >= SERIAL_BYTES => torch.num_threads(py)?,
            None => 1,
        };
        let mut threads = Threads::of_step(allowed, bytes);
        // One after the other, rows may share elements as in torch.
        if threads.useful(bytes) > 1 && !work.suits_threads() {
            threads = Threads::CALLER;
        }
        let run = move || work.run(&manner.clipping, threads, manner.gathered);
        let mut kept = Vec::new();
        let is_long = bytes >= DETACH_BYTES;
        if is_long {
            // SAFETY: valid references in `fill`, and no Python code has run since.
            unsafe {
                hold(py, &notes.arrays, &mut kept);
                hold(py, &notes.counts, &mut kept);
            }
        }
        let verdict = if is_long { py.detach(run) } else { run() };
        if let Outcome::Update { .. } = verdict.outcome {
            for step in &notes.steps {
                // SAFETY: `Row::read` found an aligned element there, and its tensor is held or was
                // left alone.
                unsafe { step.increment() };
            }
            // SAFETY: valid references in `fill`; no Python code has run since, or they are held.
            unsafe {
                hold(py, &notes.told, &mut notes.held);
                pins.hold_wanted(py);
            }
        }
        Ok(verdict)
    }

    /// The sum of the squares of the gradients, and whether one is not finite.
    pub fn measure<'g>(
        &mut self,
        torch: &Torch,
        groups: impl Iterator<Item = GroupPairs<'g>>,
        source: &Source<'_, '_>,
    ) -> Result<(f64, bool), Unfit> {
        let Rows {
            f32,
            f64,
            notes,
            pins,
        } = self;
        let work = Work::open(f32, f64);
        // SAFETY: nothing runs Python code here.
        let mut work = unsafe { notes.fill(work, torch, groups, source, pins)? };
        let squares = work.sum_squares(&Threads::CALLER);
        let has_nonfinite = !squares.is_finite() && work.find_nonfinite().is_some();
        Ok((squares, has_nonfinite))
    }
}

impl Notes {
    /// Reads all tensors and makes them work.
    ///
    /// # Safety
    /// Until the work is done, either no Python code runs and the GIL is kept, or what `counts` and
    /// `arrays` list is held by references.
    #[inline]
    unsafe fn fill<'g, 's, 'a>(
        &mut self,
        mut work: Work<'s, 'a>,
        torch: &Torch,
        groups: impl Iterator<Item = GroupPairs<'g>>,
        source: &Source<'_, '_>,
        pins: &mut Pins,
    ) -> Result<Work<'s, 'a>, Unfit> {
        pins.wanted.clear();
        self.steps.clear();
        self.counts.clear();
        self.arrays.clear();
        self.told.clear();
        self.is_told_together = false;
        // SAFETY: passed on to the caller.
        let mut entries = unsafe { Entries::new(source) };
        for GroupPairs { config, pairs } in groups {
            let mut hypers = [HyperCache::default(), HyperCache::default()];
            for (k, pair) in pairs.iter().enumerate() {
                if let Some(later) = pairs.get(k + Pins::AHEAD) {
                    pins.prefetch(later.index);
                }
                let entry = entries.next(&pair.p, config).ok_or(Unfit::Refused)?;
                // SAFETY: pairs and entries are valid references; the rest is passed on to the
                // caller.
                let row =
                    unsafe { Row::read(torch, config, pair.p.as_ptr(), pair.g.as_ptr(), &entry) };
                let row = row.ok_or(Unfit::Refused)?;
                // SAFETY: `Row::read` found an aligned element of this type there.
                let t = unsafe { row.step.read() } as u64;
                let [p, g, v, m, b] = row.data;
                let piece = RawPiece {
                    p,
                    g,
                    numel: row.numel,
                    state: [v, m, b],
                    index: pair.index,
                };
                // SAFETY: `Row::read` found that these arrays are host memory of one type and
                // shape, aligned, in the layout given, and that what is written overlaps nothing
                // else of this row and not itself. What keeps the memory is held, or left alone, by
                // the contract above. Rows may share elements with each other, which is why they
                // are updated one after the other unless `Batch::is_apart`.
                unsafe { work.push(row.dtype, config, t, &mut hypers, piece, row.layout) };
                self.steps.push(row.step);
                self.counts.push(entry.step as usize);
                let [v, m, b] = std::array::from_fn(|k| match row.data[2 + k] {
                    0 => 0,
                    _ => entry.arrays[k] as usize,
                });
                let arrays = [v, m, b].into_iter().filter(|&object| object != 0);
                self.arrays.extend(arrays.clone());
                let state = [entry.step as usize, v, m, b];
                self.told.push(pair.p.as_ptr() as usize);
                let is_told_together = match row.numel <= Pins::SMALL {
                    true => pins.look_up(pair, state),
                    false => Some(false),
                };
                match is_told_together {
                    Some(false) => self.told.extend(arrays),
                    // Unless it is, it is told of when it is pinned.
                    Some(true) | None => self.is_told_together = true,
                }
            }
        }
        Ok(work)
    }
}

/// Small tensors from step to step, for which looking and telling autograd takes longer than the
/// update. What a step reads, it still reads anew.
///
/// A tensor that only Python refers to makes torch take the GIL and count its object's references
/// each time that C++ looks at it: 340 instructions in torch 2.15. With a reference of C++'s it does
/// not. State has one here. Parameters do not: a hook of one may refer to the optimizer, and
/// Python's garbage collector does not see through this reference. Nor do large tensors, whose
/// memory somebody who deletes them wants at once.
///
/// State that [`Rows::tell_together`] made shares one version counter, so that autograd is told of all
/// of it by one tensor; whether some does is found out when it is pinned. (Sharing that of the parameter
/// saved as much again. But whoever writes state between a forward and its backward, to reset it
/// for example, must not spoil the backward.)
#[derive(Default)]
pub(crate) struct Pins {
    /// By the parameter's index.
    pins: Vec<Option<Pin>>,
    /// What this step met that is not pinned.
    wanted: Vec<Wanted>,
    /// To be dropped when Python code may run.
    retired: Vec<Option<Pin>>,
    /// A tensor of nothing, by which autograd is told of all state that shares its version counter.
    together: Option<Py<PyAny>>,
}

struct Pin {
    /// The addresses of step, v, m and b, as far as they are used.
    state: [usize; 4],
    /// Autograd is told of v, m and b together with others.
    is_told_together: bool,
    /// [`Torch::places`] of the parameter, its gradient and its state as they were then.
    places: [[usize; 3]; 6],
    /// Nothing else gets their addresses, and C++ has references of its own.
    _kept: Vec<(Py<PyAny>, Option<Managed>)>,
}

struct Wanted {
    index: usize,
    state: [usize; 4],
    /// The addresses of the parameter and the gradient.
    pair: [usize; 2],
    /// Parameter, gradient, step and arrays, once Python code may run.
    held: Vec<Py<PyAny>>,
}

impl Wanted {
    /// What autograd is to be told of, once it is held.
    fn arrays(&self) -> impl Iterator<Item = &Py<PyAny>> {
        self.held.iter().skip(3)
    }

    fn versions(&self, torch: &Torch, py: Python<'_>) -> Vec<Option<i64>> {
        let arrays = self.arrays();
        arrays.map(|array| torch.version(array.bind(py))).collect()
    }
}

impl Pins {
    /// Elements of a small tensor: with all of its kind 16 KiB each.
    pub const SMALL: usize = 4096;

    /// How many tensors ahead of the one that is looked at.
    const AHEAD: usize = 8;

    /// Asks for the memory in which torch kept what it has of a parameter's tensors; it may be gone.
    /// Of many tensors, that is more than the caches near the processor hold.
    #[inline]
    fn prefetch(&self, index: usize) {
        const LINE: usize = 64;
        let Some(Some(pin)) = self.pins.get(index) else {
            return;
        };
        for [object, tensor_impl, storage_impl] in pin.places {
            let lines = (0..4).map(|k| tensor_impl + k * LINE);
            lines.chain([object, storage_impl]).for_each(prefetch);
        }
    }

    /// Whether autograd is told of state together with others; None if that is still to be found out.
    #[inline]
    fn look_up(&mut self, pair: &Pair, state: [usize; 4]) -> Option<bool> {
        match self.pins.get(pair.index) {
            Some(Some(pin)) if pin.state == state => Some(pin.is_told_together),
            _ => {
                self.wanted.push(Wanted {
                    index: pair.index,
                    state,
                    pair: [&pair.p, &pair.g].map(|tensor| tensor.as_ptr() as usize),
                    held: Vec::new(),
                });
                None
            }
        }
    }

    /// Takes references to what is wanted.
    ///
    /// # Safety
    /// It is alive.
    unsafe fn hold_wanted(&mut self, py: Python<'_>) {
        for wanted in &mut self.wanted {
            let used = wanted.pair.into_iter().chain(wanted.state);
            let used: Vec<_> = used.filter(|&object| object != 0).collect();
            // SAFETY: passed on to the caller.
            unsafe { hold(py, &used, &mut wanted.held) };
        }
    }

    /// Pins what is wanted and held, whose versions were these before autograd was told, and tells it
    /// of what it was not told together.
    fn update(
        &mut self,
        py: Python<'_>,
        torch: &Torch,
        before: &[Vec<Option<i64>>],
    ) -> PyResult<()> {
        for (wanted, before) in self.wanted.drain(..).zip(before) {
            let now = wanted.versions(torch, py);
            let was_told: Vec<bool> = now
                .iter()
                .zip(before)
                .map(|(now, then)| now > then)
                .collect();
            let untold = wanted.arrays().zip(&was_told).filter(|(_, told)| !**told);
            let untold: Vec<_> = untold.map(|(array, _)| array.clone_ref(py)).collect();
            torch.increment_version(py, untold.into_iter())?;
            let state = wanted.held[2..].iter();
            let kept = state.map(|tensor| (tensor.clone_ref(py), torch.keep(tensor.bind(py))));
            let mut pin = Pin {
                state: wanted.state,
                is_told_together: !was_told.contains(&false),
                places: [[0; 3]; 6],
                _kept: kept.collect(),
            };
            for (place, tensor) in pin.places.iter_mut().zip(&wanted.held) {
                *place = torch.places(tensor.bind(py)).unwrap_or_default();
            }
            let len = self.pins.len().max(wanted.index + 1);
            self.pins.resize_with(len, || None);
            self.retired.push(self.pins[wanted.index].replace(pin));
        }
        Ok(())
    }

    fn together(&mut self, torch: &Torch, py: Python<'_>) -> PyResult<&Py<PyAny>> {
        if self.together.is_none() {
            self.together = Some(torch.tensor.bind(py).call0()?.unbind());
        }
        Ok(self.together.as_ref().expect("made above"))
    }
}

/// Asks for a line of memory; any address will do.
#[inline]
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that a program could see, and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address));
    }
}

/// Takes references to objects.
///
/// # Safety
/// They are addresses of objects that are alive.
#[inline]
unsafe fn hold(py: Python<'_>, objects: &[usize], held: &mut Vec<Py<PyAny>>) {
    held.extend(objects.iter().map(|&object| {
        // SAFETY: passed on to the caller.
        unsafe { Bound::from_borrowed_ptr(py, object as *mut ffi::PyObject) }.unbind()
    }));
}

/// Where the next state comes from.
enum Entries<'x, 'py> {
    State(StateWalk<'py>),
    Tuples(std::slice::Iter<'x, Bound<'py, PyTuple>>),
}

impl<'x, 'py> Entries<'x, 'py> {
    /// # Safety
    /// As long as it and what it finds are used, the GIL is held and no Python code runs.
    unsafe fn new(source: &Source<'x, 'py>) -> Self {
        match source {
            // SAFETY: passed on to the caller.
            Source::State(state) => Entries::State(unsafe { StateWalk::new(state) }),
            Source::Tuples(tuples) => Entries::Tuples(tuples.iter()),
        }
    }

    #[inline]
    fn next(&mut self, parameter: &Py<PyAny>, config: &Config) -> Option<Entry> {
        match self {
            Entries::State(walk) => walk.find(parameter, config),
            Entries::Tuples(tuples) => Entry::of(tuples.next()?).ok(),
        }
    }
}

/// Whether the core can update the tensors of a tuple (index, p, g, v, m, b, step): plain ones in host
/// memory, of one type and shape, whose memory shows their sign.
pub(crate) fn takes(torch: &Torch, config: &Config, row: &Bound<'_, PyTuple>) -> PyResult<bool> {
    for tensor in row.iter().skip(1).filter(|tensor| !tensor.is_none()) {
        if !torch.is_plain(&tensor) || torch.is_neg(&tensor)? {
            return Ok(false);
        }
    }
    let (p, g) = (row.get_item(1)?, row.get_item(2)?);
    let entry = Entry::of(row)?;
    // SAFETY: the tuple holds its items, and nothing runs Python code here.
    Ok(unsafe { Row::read(torch, config, p.as_ptr(), g.as_ptr(), &entry) }.is_some())
}

/// The arrays of one parameter, checked against each other.
struct Row {
    dtype: DType,
    numel: usize,
    /// Of p g v m b; 0 if not used.
    data: [usize; 5],
    /// None if all are dense and walked alike.
    layout: Option<Layout>,
    step: Step,
}

impl Row {
    /// None for whatever is not for the core.
    ///
    /// # Safety
    /// The objects are valid references or null, and the GIL is held.
    #[inline]
    unsafe fn read(
        torch: &Torch,
        config: &Config,
        object: *mut ffi::PyObject,
        g: *mut ffi::PyObject,
        entry: &Entry,
    ) -> Option<Self> {
        let [v, m, b] = entry.arrays;
        // SAFETY: passed on to the caller.
        let view = |object: *mut ffi::PyObject| unsafe { torch.view(object) };
        let p = view(object)?;
        let step = view(entry.step)?;
        if step.shape.iter().any(|&len| len != 1) || !step.is_aligned() {
            return None;
        }
        let step = Step {
            data: step.data,
            dtype: step.dtype,
        };
        let numel = p.numel();
        let bytes = numel * p.dtype.size();
        let mut data = [p.data, 0, 0, 0, 0];
        let mut is_alike = p.is_dense(numel) && p.is_aligned();
        let mut add = |k: usize, object| {
            let other = view(object)?;
            data[k] = other.data;
            is_alike &= other.dtype == p.dtype
                && other.is_walked_like(&p)
                && other.is_aligned()
                && data[..k].iter().all(|&x| other.data.abs_diff(x) >= bytes);
            Some(())
        };
        add(1, g)?;
        add(2, v)?;
        if config.centered {
            add(3, m)?;
        }
        if StateKey::MomentumBuffer.is_used(config) {
            add(4, b)?;
        }
        let layout = match is_alike {
            true => None,
            // SAFETY: passed on to the caller.
            false => Some(unsafe { torch.layout([object, g, v, m, b], &data) }?),
        };
        Some(Row {
            dtype: p.dtype,
            numel,
            data,
            layout,
            step,
        })
    }
}

impl Torch {
    /// A tensor of plain class in host memory, f32 or f64.
    ///
    /// # Safety
    /// `object` is a valid reference or null; in `'a` no Python code runs.
    #[inline]
    unsafe fn view<'a>(&self, object: *mut ffi::PyObject) -> Option<View<'a>> {
        // SAFETY: passed on to the caller.
        if !unsafe { self.is_plain_object(object) } {
            return None;
        }
        // SAFETY: the table was found on `torch.Tensor`, whose Parameter is a plain tensor too; the
        // rest is passed on to the caller.
        unsafe { self.exchange.view(object) }
    }

    /// The walk over arrays p g v m b that do not all lie alike; None if they are not for the core.
    ///
    /// # Safety
    /// As [`Torch::view`], for those whose address is not 0.
    #[cold]
    unsafe fn layout(&self, objects: [*mut ffi::PyObject; 5], data: &[usize; 5]) -> Option<Layout> {
        // SAFETY: passed on to the caller.
        let view = |k: usize| unsafe { self.view(objects[k]) };
        let mut views = [view(0)?; 5];
        for k in (1..5).filter(|&k| data[k] != 0) {
            views[k] = view(k)?;
        }
        layout(&views, data)
    }

    /// C++'s own reference to a tensor, if it is one of plain class.
    fn keep(&self, tensor: &Bound<'_, PyAny>) -> Option<Managed> {
        if !self.is_plain(tensor) {
            return None;
        }
        // SAFETY: the table is this class's.
        unsafe { self.exchange.keep(tensor.as_ptr()) }
    }

    /// # Safety
    /// `object` is a valid reference or null.
    #[inline]
    unsafe fn is_plain_object(&self, object: *mut ffi::PyObject) -> bool {
        // SAFETY: the reference is valid if it is not null.
        let class = |object| unsafe { ffi::Py_TYPE(object) }.cast();
        !object.is_null()
            && (class(object) == self.tensor.as_ptr() || class(object) == self.parameter.as_ptr())
    }
}

/// The walk over arrays that do not all lie alike; None if they are not for the core.
#[cold]
fn layout(views: &[View<'_>; 5], data: &[usize; 5]) -> Option<Layout> {
    let p = &views[0];
    let size = p.dtype.size();
    let shape: Vec<usize> = p.shape.iter().map(|&len| len as usize).collect();
    let strides: Vec<Vec<isize>> = views
        .iter()
        .map(|view| {
            view.strides
                .iter()
                .map(|&x| x as isize * size as isize)
                .collect()
        })
        .collect();
    let is_fit =
        |view: &View<'_>| view.dtype == p.dtype && view.shape == p.shape && view.is_aligned();
    if !views.iter().all(is_fit) {
        return None;
    }
    // State is dense as torch makes it; where it is not, it might be a part of a complex tensor, whose
    // sign may be in a bit that the memory does not show.
    let numel = p.numel();
    if !(2..5).all(|k| data[k] == 0 || views[k].is_dense(numel)) {
        return None;
    }
    const GRADIENT: usize = 1;
    let used: Vec<usize> = (0..5).filter(|&k| data[k] != 0).collect();
    let extent = |k: usize| Extent {
        data: data[k],
        shape: &shape,
        strides: &strides[k],
        size,
    };
    for &k in used.iter().filter(|&&k| k != GRADIENT) {
        let is_apart = |&&other: &&usize| {
            other == k
                || extent(k)
                    .overlaps(&extent(other))
                    .is_ok_and(|overlaps| !overlaps)
        };
        if extent(k).overlaps_itself().unwrap_or(true) || !used.iter().all(|k| is_apart(&k)) {
            return None;
        }
    }
    let dims = (0..shape.len()).map(|d| Dim {
        len: shape[d],
        strides: std::array::from_fn(|k| strides[k][d]),
    });
    let mut dims: Vec<Dim> = dims.filter(|dim| dim.len != 1).collect();
    if p.is_dense(numel) {
        // In the order of the parameter's memory, as on the dense path: the norm of the gradients
        // adds up in that order.
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.strides[0]));
    }
    Some(Layout::new(dims))
}
