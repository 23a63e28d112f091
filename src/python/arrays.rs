//! The array front: the Rust part of `rmsprop.RMSprop`.
//!
//! A step has four parts, the same as for torch ([`torch`](super::torch)). It *collects* the options
//! and the gradients, for which Python code may run. It *checks*: with nothing running Python code it
//! looks at all memory and makes it work for the kernel. It *runs*, without the GIL if that takes
//! long. And it *concludes*: counts, tells autograd.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyIndexError, PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping, PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit, intern};

use super::error::{check_room, nonfinite};
use super::group::{Group, NewState, Stored, flatten};
use super::options::{Change, Front, GroupOptions, StepOptions, Values, is_contiguous};
use super::overlap::Extent;
use super::param::{Destinations, Kind, Param, Refused};
use super::row::{self, NoRows};
use super::source::{LentSource, Source, has_changed};
use super::step::{self, Crew};
use super::storage::{SCALE, Storage};
use super::turn::Turns;
use super::view::{Access, Element, Items, Lent, Quiet, Refusal, View, WANTED, describe_array};
use crate::error::Error;
use crate::kernel::batch::{Batch, Work};
use crate::kernel::isa::isa;
use crate::kernel::stage::Address;
use crate::kernel::storage::BLOCK;
use crate::kernel::{DType, ROLES, Role};
use crate::optimizer::{Outcome, RuleCache, Verdict, code_of};
use crate::state::StateKey;
use crate::threads::default_threads;

/// The base class of `rmsprop.RMSprop`, which documents it.
#[pyclass(extends = StepOptions, subclass, frozen, weakref, module = "rmsprop._core")]
pub(crate) struct Optimizer {
    param_groups: Mutex<Py<PyList>>,
    contents: Turns<ArraySession>,
}

/// A group that is to be added: its dict, and the names of its parameters, each a string or None.
type NewGroup<'py> = (Bound<'py, PyDict>, Bound<'py, PyList>);

/// What is kept of a parameter besides its state, and what is needed in between, at most.
const BYTES_A_PARAMETER: usize = size_of::<Param>() + 1024;

/// What one thread at a time works on.
struct ArraySession {
    storage: Storage,
    groups: Vec<Group>,
    params: Vec<Param>,
    /// Those that can only be read after Python code has run.
    foreign: Vec<usize>,
    /// Updates of each parameter. (Counted in the parameters themselves, which are large, a step of
    /// many small ones takes 3 % longer.)
    steps: Vec<u64>,
    /// Whether each has an average.
    has_ema: Vec<bool>,
    /// Whether this step updates it.
    stepped: Vec<bool>,
    destinations: Destinations,
    /// Kept from step to step so that a step allocates nothing.
    batch: Batch,
    /// One for each parameter, None where there is none; empty as long as they are read where they
    /// are, from a list or a tuple.
    gradients: Vec<Option<Source>>,
    /// What is let go of when the step is over: arrays that parameters had before, and what a step
    /// without the GIL uses.
    held: Vec<Py<PyAny>>,
}

#[pymethods]
impl Optimizer {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let contents = ArraySession {
            storage: Storage::default(),
            groups: Vec::new(),
            params: Vec::new(),
            foreign: Vec::new(),
            steps: Vec::new(),
            has_ema: Vec::new(),
            stepped: Vec::new(),
            destinations: Destinations::default(),
            batch: Batch::new(code_of(isa()?)?),
            gradients: Vec::new(),
            held: Vec::new(),
        };
        let optimizer = Optimizer {
            param_groups: Mutex::new(PyList::empty(py).unbind()),
            contents: Turns::new(contents),
        };
        let options = StepOptions::new(Some(default_threads()?));
        Ok(PyClassInitializer::from(options).add_subclass(optimizer))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(groups) = self.param_groups.try_lock() {
            visit.call(&*groups)?;
        }
        // Locked means in use, and nothing in use is garbage.
        let Some(contents) = self.contents.try_take() else {
            return Ok(());
        };
        let mut groups = contents.groups.iter();
        groups.try_for_each(|group| group.traverse(&visit))?;
        let mut params = contents.params.iter();
        params.try_for_each(|param| param.traverse(&visit))
    }

    fn __clear__(&self) {
        let Some(mut contents) = self.contents.try_take() else {
            return;
        };
        let groups = std::mem::take(&mut contents.groups);
        let params = std::mem::take(&mut contents.params);
        contents.foreign.clear();
        contents.steps.clear();
        contents.has_ema.clear();
        contents.gradients.clear();
        contents.destinations.forget();
        // Dropping may run Python code, which may come back here.
        drop(contents);
        drop((groups, params));
    }

    /// The parameter groups: dicts of options, read at every step.
    #[getter(param_groups)]
    fn groups<'py>(&self, py: Python<'py>) -> Bound<'py, PyList> {
        let groups = self.param_groups.lock();
        let groups = groups.unwrap_or_else(PoisonError::into_inner);
        groups.bind(py).clone()
    }

    #[setter(param_groups)]
    fn set_param_groups(&self, groups: &Bound<'_, PyAny>) -> PyResult<()> {
        let Ok(groups) = groups.cast::<PyList>() else {
            let class = groups.get_type().name()?;
            let message = format!("param_groups: expected a list, got {class}");
            return Err(PyTypeError::new_err(message));
        };
        let place = self.param_groups.lock();
        let mut place = place.unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *place, groups.clone().unbind());
        // Dropping it may run Python code that comes back here.
        drop(place);
        drop(old);
        Ok(())
    }

    /// Updates every parameter that has a gradient, in place, by the rule in `rmsprop`'s
    /// documentation.
    ///
    /// `closure` is called first, if given, and its value returned. Gradients come from `grads`, a
    /// sequence in the order of the parameters over all groups or a mapping by name, where None
    /// leaves a parameter alone; or else from each parameter's `.grad`. A gradient has its
    /// parameter's shape and any real floating dtype, from which it is rounded once to the
    /// parameter's; it is not written. The parameters and the state are. The GIL is released while a
    /// long step computes; threads that step one optimizer take turns.
    ///
    /// Raises TypeError or ValueError for a gradient, a parameter or an option that does not fit,
    /// naming it, and FloatingPointError with `nonfinite="raise"`; nothing is changed then.
    ///
    /// Example: `opt.step(grads=[gw, gb])`.
    #[pyo3(signature = (closure = None, *, grads = None))]
    fn step(
        slf: &Bound<'_, Self>,
        closure: Option<&Bound<'_, PyAny>>,
        grads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Py<PyAny>>> {
        let py = slf.py();
        if let Some(closure) = closure.filter(|closure| !closure.is_callable()) {
            let class = closure.get_type().name()?;
            let message =
                format!("closure: expected a function, got {class}: gradients are grads=");
            return Err(PyTypeError::new_err(message));
        }
        let value = closure.map(|closure| closure.call0()).transpose()?;
        let (this, options) = (slf.get(), slf.as_super().get());
        let grads = Grads::new(grads)?;
        let groups = this.groups(py);
        let mut turn = this.contents.wait(py)?;
        let values = options.values_of_step()?;
        let outcome = turn.step(py, &groups, &grads, &values);
        turn.release(py);
        drop(turn);
        let Verdict { norm, outcome } = outcome?;
        options.report(&values, norm, matches!(outcome, Outcome::Skip));
        Ok(value.map(Bound::unbind))
    }

    /// Adds groups, all or none: dicts that have every option and a tuple of parameters, and the
    /// names of these.
    fn _add_groups(slf: &Bound<'_, Self>, groups: Vec<NewGroup<'_>>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let list = this.groups(py);
        let storage = slf.as_super().get().values().storage;
        let mut contents = this.contents.wait(py)?;
        contents.storage = storage;
        contents.add_groups(py, &groups)?;
        drop(contents);
        groups.iter().try_for_each(|(group, _)| list.append(group))
    }

    /// The group of a parameter.
    fn _group_index(&self, py: Python<'_>, index: usize) -> PyResult<usize> {
        self.contents.wait(py)?.group_of(index)
    }

    /// The names of a parameter's state arrays.
    fn _state_keys(&self, py: Python<'_>, index: usize) -> PyResult<Vec<String>> {
        let contents = self.contents.wait(py)?;
        let group = &contents.groups[contents.group_of(index)?];
        let param = &contents.params[index];
        let mut names = Vec::new();
        for key in StateKey::EVERY {
            if key == StateKey::Ema && !contents.has_ema[index] {
                continue;
            }
            if let Some(stored) = group.state(param.kind(), key) {
                names.push(key.name().to_owned());
                if stored.scales.is_some() {
                    names.push(format!("{}{SCALE}", key.name()));
                }
            }
        }
        Ok(names)
    }

    /// NumPy's name of the type that a key's array of a parameter has, or would have.
    fn _stored_dtype(&self, py: Python<'_>, index: usize, key: &str) -> PyResult<&'static str> {
        let contents = self.contents.wait(py)?;
        contents.group_of(index)?;
        let key = StateKey::named(key).ok_or_else(|| PyKeyError::new_err(key.to_owned()))?;
        let dtype = contents.params[index].stored[key as usize];
        let dtype = dtype.ok_or_else(|| PyKeyError::new_err(key.name()))?;
        Ok(Element::real(dtype).name())
    }

    /// A view of a state array, of the parameter's shape, or of the scales of one; KeyError if there is
    /// none of that name.
    fn _state_array<'py>(
        &self,
        py: Python<'py>,
        index: usize,
        key: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let contents = self.contents.wait(py)?;
        contents.group_of(index)?;
        match StateArray::named(key) {
            Some(array) if array.key != StateKey::Ema || contents.has_ema[index] => {
                contents.state_array(py, index, array)
            }
            _ => Err(PyKeyError::new_err(key.to_owned())),
        }
    }

    /// Checks that a value has a parameter's shape and the compute type, or the type that the key is
    /// stored in; ValueError if not.
    fn _check_state(
        &self,
        py: Python<'_>,
        index: usize,
        key: &str,
        value: &Bound<'_, PyAny>,
        dtype: &str,
    ) -> PyResult<()> {
        let source = Source::of_gradient(value);
        let contents = self.contents.wait(py)?;
        contents.group_of(index)?;
        let param = &contents.params[index];
        let culprit = format!("state {key} of {}", param.culprit("parameter", index));
        let wanted = StateKey::named(key).filter(|&key| param.stored[key as usize].is_some());
        if wanted.is_none() {
            let keys = StateKey::EVERY.into_iter();
            let keys = keys.filter(|&key| param.stored[key as usize].is_some());
            let names: Vec<_> = keys.map(StateKey::name).collect();
            let names = names.join(", ");
            let message = format!("{culprit}: expected step or one of {names}");
            return Err(PyValueError::new_err(message));
        }
        let fits = source.and_then(|source| {
            let source = source.ok_or(Refusal::NotAnArray)?;
            Ok(Quiet::during(py, |quiet| {
                let view = source.lend(quiet).view(quiet)?;
                match view.element.name() == dtype {
                    true => param.check_shape(&view),
                    false => Err(Refusal::DType),
                }
            })?)
        });
        fits.map_err(|failure| {
            let wanted = describe_array(dtype, &param.shape);
            let error = failure.raise(culprit, &wanted, value);
            // State is data, not an argument: also the wrong type is a ValueError.
            match error.is_instance_of::<PyTypeError>(py) {
                true => PyValueError::new_err(error.value(py).to_string()),
                false => error,
            }
        })
    }

    /// Gives the state of parameters other values, all at once: for each of the given ones a mapping
    /// from "step" and the names of arrays to an int and to arrays that fit, or a number for all
    /// elements, or None for an "ema" that is to begin anew. Arrays that are not there are created; those that are not named are left alone. The
    /// dicts of all groups are updated with `options` as well, if given, and `written`, pairs of
    /// arrays, are copied from the second to the first.
    #[pyo3(signature = (entries, options = None, written = Vec::new()))]
    fn _restore(
        &self,
        py: Python<'_>,
        entries: Vec<(usize, Bound<'_, PyDict>)>,
        options: Option<Vec<Bound<'_, PyDict>>>,
        written: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    ) -> PyResult<()> {
        let dicts = self.groups(py);
        let mut contents = self.contents.wait(py)?;
        contents.restore(py, &entries, &dicts, options.as_deref(), written)
    }

    /// How often a parameter was updated.
    fn _steps(&self, py: Python<'_>, index: usize) -> PyResult<u64> {
        let contents = self.contents.wait(py)?;
        contents.group_of(index)?;
        Ok(contents.steps[index])
    }

    /// The number of parameters over all groups.
    fn _count_parameters(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.contents.wait(py)?.params.len())
    }
}

/// An array of state: elements, or the scales of codes.
#[derive(Clone, Copy)]
struct StateArray {
    key: StateKey,
    is_scale: bool,
}

impl StateArray {
    fn named(name: &str) -> Option<Self> {
        let (name, is_scale) = match name.strip_suffix(SCALE) {
            Some(name) => (name, true),
            None => (name, false),
        };
        StateKey::named(name).map(|key| StateArray { key, is_scale })
    }
}

/// Where the gradients of a step come from.
enum Grads<'py> {
    /// Each parameter's `.grad`.
    Attributes,
    /// A list or a tuple.
    Items(Bound<'py, PyAny>),
    Mapping(Bound<'py, PyMapping>),
}

impl<'py> Grads<'py> {
    /// Sorts out what was handed over; an iterable is read once.
    fn new(grads: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let Some(grads) = grads else {
            return Ok(Grads::Attributes);
        };
        if grads.is_instance_of::<PyList>() || grads.is_instance_of::<PyTuple>() {
            return Ok(Grads::Items(grads.clone()));
        }
        if let Ok(mapping) = grads.cast::<PyMapping>() {
            return Ok(Grads::Mapping(mapping.clone()));
        }
        let class = grads.get_type().name()?;
        let wrong = || {
            let message = format!("grads: expected a sequence or a mapping of arrays, got {class}");
            PyTypeError::new_err(message)
        };
        // A bare array is iterable too, as a rule.
        if grads.is_instance_of::<PyString>() || Source::of(grads).is_ok() {
            return Err(wrong());
        }
        let items = grads.try_iter().map_err(|_| wrong())?;
        let items = items.collect::<PyResult<Vec<_>>>()?;
        let items = PyTuple::new(grads.py(), items)?;
        Ok(Grads::Items(items.into_any()))
    }

    /// That there is one for each parameter, and no other.
    fn check(&self, params: &[Param]) -> PyResult<()> {
        match self {
            Grads::Attributes => Ok(()),
            Grads::Items(items) => match (items.len()?, params.len()) {
                (found, wanted) if found == wanted => Ok(()),
                (found, wanted) => Err(PyValueError::new_err(format!(
                    "grads: expected {wanted} gradients, got {found}"
                ))),
            },
            Grads::Mapping(mapping) => check_names(mapping, params),
        }
    }

    /// The gradient of a parameter, or Python's None.
    fn of(&self, py: Python<'py>, param: &Param, index: usize) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Grads::Attributes => param.grad(py, index),
            Grads::Items(items) => items.get_item(index).map_err(|_| {
                let wanted = "expected a list that stays as it is";
                PyValueError::new_err(format!("grads: {wanted}, got a shorter one"))
            }),
            Grads::Mapping(mapping) => mapping.get_item(&param.name).map_err(|error| {
                match error.is_instance_of::<PyKeyError>(py) {
                    true => PyValueError::new_err(format!(
                        "{}: expected an array or None, got no entry in grads",
                        param.culprit("gradient", index)
                    )),
                    false => error,
                }
            }),
        }
    }
}

/// That all parameters have names and the mapping has no others.
fn check_names(mapping: &Bound<'_, PyMapping>, params: &[Param]) -> PyResult<()> {
    if params.iter().any(|param| param.name.is_none()) {
        let message = "grads: expected a sequence, for the parameters have no names, got a mapping";
        return Err(PyValueError::new_err(message));
    }
    if mapping.len()? <= params.len() {
        return Ok(()); // A missing name will be missed.
    }
    let names = params.iter().filter_map(|param| param.name.as_deref());
    let names: HashSet<_> = names.collect();
    for key in mapping.keys()?.iter() {
        let is_name = |key: &str| names.contains(key);
        if !key.extract::<&str>().is_ok_and(is_name) {
            let message = format!("grads: expected names of parameters, got {}", key.repr()?);
            return Err(PyValueError::new_err(message));
        }
    }
    Ok(())
}

/// State that a step creates for options that were switched on, and takes back should it fail: its
/// group, the place of its bucket there, its key.
type Created = Vec<(usize, usize, StateKey)>;

/// Parameters that take the place of others, by index.
type Replaced = Vec<(usize, Param)>;

impl ArraySession {
    fn group_of(&self, index: usize) -> PyResult<usize> {
        let mut groups = self.groups.iter();
        let group = groups.position(|group| group.range.contains(&index));
        group.ok_or_else(|| {
            PyIndexError::new_err(format!(
                "parameter {index}: expected an index below {}",
                self.params.len()
            ))
        })
    }

    fn step(
        &mut self,
        py: Python<'_>,
        dicts: &Bound<'_, PyList>,
        grads: &Grads<'_>,
        options: &Values,
    ) -> PyResult<Verdict> {
        let created = self.read_groups(py, dicts)?;
        let outcome = self.step_groups(py, grads, options);
        let is_update = |verdict: &Verdict| matches!(verdict.outcome, Outcome::Update);
        if !outcome.as_ref().is_ok_and(is_update) {
            self.take_back(&created);
            return outcome;
        }
        for (index, group) in self.groups.iter().enumerate() {
            group.options.note_initial_lr(dicts, index)?;
        }
        outcome
    }

    fn step_groups(
        &mut self,
        py: Python<'_>,
        grads: &Grads<'_>,
        options: &Values,
    ) -> PyResult<Verdict> {
        grads.check(&self.params)?;
        // Of a list of arrays nothing is taken: they are read where they are.
        let items = match grads {
            Grads::Items(items) if self.foreign.is_empty() => Some(items),
            _ => None,
        };
        let mut outcome = match items {
            Some(items) => self.check_and_run(py, Some(items.as_unbound()), options),
            None => Err(Refused::Collect),
        };
        // Once more if Python code that ran meanwhile has changed what is to be taken.
        for _ in 0..2 {
            if let Err(Refused::Collect) = outcome {
                self.collect(py, grads)?;
                outcome = self.check_and_run(py, None, options);
            }
        }
        let verdict = outcome.map_err(|refused| self.raise(py, items, refused))?;
        self.conclude(py, &verdict)?;
        Ok(verdict)
    }

    /// Reads the options of the groups as they are now, and takes them over if all are right.
    fn read_groups(&mut self, py: Python<'_>, dicts: &Bound<'_, PyList>) -> PyResult<Created> {
        if dicts.len() != self.groups.len() {
            return Err(PyValueError::new_err(format!(
                "param_groups: expected {} groups, got {}: add_param_group adds one",
                self.groups.len(),
                dicts.len()
            )));
        }
        let mut read = Vec::new();
        for index in 0..self.groups.len() {
            let dict = dicts.get_item(index)?;
            let Ok(dict) = dict.cast::<PyDict>() else {
                let class = dict.get_type().name()?;
                return Err(PyTypeError::new_err(format!(
                    "group {index}: expected a dict, got {class}"
                )));
            };
            let options = &mut self.groups[index].options;
            if options.follow(Front::Arrays, dict) == Change::Other {
                // If that fails, numbers that were found to have changed are not taken over yet.
                options.forget();
                read.push((index, self.read_group(py, index, dict)?));
            }
        }
        // From here on nothing fails.
        let mut created = Created::new();
        for (index, (options, replaced, new)) in read {
            self.replace(index, replaced);
            for (place, key, buffer) in new {
                self.set_state(index, place, key, Some(buffer));
                created.push((index, place, key));
            }
            self.groups[index].options = options;
        }
        Ok(created)
    }

    /// Reads a group: its options, the parameters that are new, and state that it is missing.
    #[cold]
    fn read_group(
        &self,
        py: Python<'_>,
        index: usize,
        dict: &Bound<'_, PyDict>,
    ) -> PyResult<(GroupOptions, Replaced, NewState)> {
        let place = format!(" of group {index}");
        let options = GroupOptions::read(Front::Arrays, dict, &place)?;
        let is_contiguous = is_contiguous(dict)?;
        let group = &self.groups[index];
        self.storage.check_group(&options.config, &place)?;
        if is_contiguous != group.is_contiguous {
            let python = |flag| if flag { "True" } else { "False" };
            let (wanted, found) = (python(group.is_contiguous), python(is_contiguous));
            return Err(PyValueError::new_err(format!(
                "contiguous_params{place}: expected {wanted} as at its construction, got {found}"
            )));
        }
        let replaced = self.read_params(py, index, &params_of(dict, &place)?)?;
        let config = &options.config;
        let new = group.missing(py, config, |_, _| false)?;
        Ok((options, replaced, new))
    }

    /// Those of a group's parameters that are other objects now: as many, each of the shape and type
    /// it had.
    fn read_params(
        &self,
        py: Python<'_>,
        group: usize,
        objects: &Bound<'_, PyAny>,
    ) -> PyResult<Replaced> {
        let class = objects.get_type().name()?;
        let wrong = |_| {
            let message = format!("params of group {group}: expected parameters, got {class}");
            PyTypeError::new_err(message)
        };
        let objects = objects.try_iter().map_err(wrong)?;
        let objects = objects.collect::<PyResult<Vec<_>>>()?;
        let range = self.groups[group].range.clone();
        if objects.len() != range.len() {
            return Err(PyValueError::new_err(format!(
                "params of group {group}: expected {}, got {}: add_param_group adds parameters",
                range.len(),
                objects.len()
            )));
        }
        let mut replaced = Replaced::new();
        for (index, object) in range.zip(&objects) {
            let old = &self.params[index];
            if !object.is(&old.object) {
                let mut new = Param::new(object, old.name.clone(), index, &self.storage)?;
                new.succeed(old, py, index)?;
                replaced.push((index, new));
            }
        }
        Ok(replaced)
    }

    /// Puts parameters of a group in the place of others.
    fn replace(&mut self, group: usize, replaced: Replaced) {
        if replaced.is_empty() {
            return;
        }
        for (index, new) in replaced {
            let old = std::mem::replace(&mut self.params[index], new);
            self.held.push(old.object);
        }
        for bucket in &mut self.groups[group].buckets {
            bucket.flat = None;
        }
        self.destinations.forget();
        self.find_foreign();
    }

    fn find_foreign(&mut self) {
        let params = self.params.iter().enumerate();
        let foreign = params.filter(|(_, param)| param.source.is_foreign());
        self.foreign = foreign.map(|(index, _)| index).collect();
    }

    /// Lets go of state that a step had created and did not use.
    fn take_back(&mut self, created: &Created) {
        for &(index, place, key) in created {
            self.set_state(index, place, key, None);
            self.groups[index].options.forget();
        }
    }

    /// Puts state where it belongs, or takes it away.
    fn set_state(&mut self, group: usize, place: usize, key: StateKey, state: Option<Stored>) {
        let group = &mut self.groups[group];
        group.buckets[place].state[key as usize] = state;
        group.place(&mut self.params[group.range.clone()]);
        self.destinations.forget();
    }

    /// Takes the gradients, and what else of the parameters can only be read after Python code has
    /// run.
    fn collect(&mut self, py: Python<'_>, grads: &Grads<'_>) -> PyResult<()> {
        self.gradients.clear();
        for group in &mut self.groups {
            group.is_flat =
                matches!(grads, Grads::Attributes) && group.can_be_flat(&self.steps, &self.has_ema);
            for index in group.range.clone() {
                if group.is_flat {
                    self.gradients.push(None);
                    continue;
                }
                let param = &self.params[index];
                let object = grads.of(py, param, index)?;
                let gradient = Source::of_gradient(&object)
                    .map_err(|failure| param.refuse("gradient", index, failure, &object))?;
                let is_of_rows = matches!(gradient, Some(Source::Rows(_)));
                if is_of_rows && group.options.config.ema_decay.is_some() && !self.has_ema[index] {
                    // A step of some rows begins the average of all.
                    begin_average(py, group, param)?;
                }
                self.gradients.push(gradient);
            }
        }
        // After the gradients, for making those may replace a parameter.
        for &index in &self.foreign {
            let param = &mut self.params[index];
            if let Err(failure) = param.source.renew(py)
                && self.gradients[index].is_some()
            {
                let culprit = param.culprit("parameter", index);
                return Err(failure.raise(culprit, WANTED, param.object.bind(py)));
            }
        }
        Ok(())
    }

    /// `items` are the list or tuple of gradients where they are read; without, those that were
    /// taken are used.
    fn check_and_run(
        &mut self,
        py: Python<'_>,
        items: Option<&Py<PyAny>>,
        options: &Values,
    ) -> Result<Verdict, Refused> {
        let ArraySession {
            storage,
            groups,
            params,
            steps,
            has_ema,
            stepped,
            destinations,
            batch,
            gradients,
            held,
            ..
        } = self;
        let crew = Crew {
            allowed: options.threads(),
            lender: None,
            is_apart: true,
        };
        step::run(py, &crew, &options.clipping, None, |quiet| {
            let mut check = ArrayCheck {
                quiet,
                items: items.and_then(|items| Lent::of(quiet, items).items(quiet)),
                gradients,
                storage,
                groups,
                params,
                steps,
                has_ema,
                stepped,
                destinations,
                held,
            };
            let work = check.all(batch.open())?;
            if step::is_long(&work) {
                check.hold();
            }
            Ok((work, || ()))
        })
    }

    /// Draws the consequences of a step.
    fn conclude(&mut self, py: Python<'_>, verdict: &Verdict) -> PyResult<()> {
        match verdict.outcome {
            Outcome::Update => {
                for (step, stepped) in self.steps.iter_mut().zip(&self.stepped) {
                    *step = step.saturating_add(u64::from(*stepped));
                }
                for group in &self.groups {
                    if group.options.config.ema_decay.is_some() {
                        for index in group.range.clone() {
                            self.has_ema[index] |= self.stepped[index];
                        }
                    }
                }
                self.tell_autograd(py)
            }
            Outcome::Skip => Ok(()),
            Outcome::Raise {
                index,
                element,
                found,
            } => Err(self.nonfinite(index, element, found)),
        }
    }

    /// Tells torch that its tensors were written in place, so that a backward pass through what
    /// they were raises instead of computing something else.
    fn tell_autograd(&self, py: Python<'_>) -> PyResult<()> {
        let is_updated_tensor = |index: &usize| {
            let param = &self.params[*index];
            let class = param.object.bind(py).get_type();
            self.stepped[*index]
                && matches!(param.source, Source::Exchange(_))
                && (class.module()).is_ok_and(|name| name.to_string().starts_with("torch"))
        };
        let updated = self.foreign.iter().copied().filter(is_updated_tensor);
        let tensors: Vec<_> = updated.map(|index| &self.params[index].object).collect();
        if !tensors.is_empty() {
            let graph = py.import(intern!(py, "torch.autograd.graph"))?;
            graph.call_method1(intern!(py, "increment_version"), (tensors,))?;
        }
        Ok(())
    }

    /// The error for a gradient that is not finite. A piece may be several parameters that lie next
    /// to each other.
    fn nonfinite(&self, index: usize, element: usize, found: f64) -> PyErr {
        let first = &self.params[index];
        let place = first.offset + element;
        let is_owner = |(_, param): &(usize, &Param)| {
            param.kind() == first.kind() && place < param.offset + param.numel
        };
        let mut params = (index..).zip(&self.params[index..]);
        let (index, param) = params.find(is_owner).unwrap_or((index, first));
        let culprit = param.culprit("gradient", index);
        nonfinite(&culprit, found, Some(place - param.offset))
    }

    /// The error for what was refused. Runs Python code.
    fn raise(&self, py: Python<'_>, items: Option<&Bound<'_, PyAny>>, refused: Refused) -> PyErr {
        match refused {
            Refused::Array(Role::Gradient, index, refusal) => {
                let object = match (self.gradients.get(index), items) {
                    (Some(Some(source)), _) => Some(source.object(py)),
                    (_, Some(items)) => items.get_item(index).ok(),
                    _ => None,
                };
                let object = object.unwrap_or_else(|| py.None().into_bound(py));
                self.params[index].refuse("gradient", index, refusal, &object)
            }
            Refused::Array(_, index, refusal) => {
                let param = &self.params[index];
                param.refuse("parameter", index, refusal, param.object.bind(py))
            }
            Refused::Collect => has_changed("gradients"),
            Refused::Error(error) => error,
        }
    }

    /// Lets go of what a step held.
    fn release(&mut self, py: Python<'_>) {
        for gradient in self.gradients.drain(..) {
            if let Some(Source::Array(array)) = gradient {
                // Bound, so that dropping the reference need not find out whether the GIL is held.
                drop(array.into_bound(py));
            }
        }
        for &index in &self.foreign {
            self.params[index].source.release();
        }
        self.held.clear();
    }

    fn state_array<'py>(
        &self,
        py: Python<'py>,
        index: usize,
        array: StateArray,
    ) -> PyResult<Bound<'py, PyAny>> {
        let StateArray { key, is_scale } = array;
        let group = &self.groups[self.group_of(index)?];
        let param = &self.params[index];
        let missing = || PyKeyError::new_err(key.name());
        let stored = group.state(param.kind(), key).ok_or_else(missing)?;
        let view = match is_scale {
            false => stored.elements.view_of(py, param, param.offset)?,
            true => {
                let scales = stored.scales.as_ref().ok_or_else(missing)?;
                scales.view_of_scales(py, param)?
            }
        };
        Ok(view.into_any())
    }

    fn restore(
        &mut self,
        py: Python<'_>,
        entries: &[(usize, Bound<'_, PyDict>)],
        dicts: &Bound<'_, PyList>,
        options: Option<&[Bound<'_, PyDict>]>,
        written: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    ) -> PyResult<()> {
        // All that can fail first: reading what is given, and making room.
        let mut values = Vec::new();
        let (mut steps, mut has_ema) = (Vec::new(), Vec::new());
        for (index, entry) in entries {
            self.group_of(*index)?;
            for (name, value) in entry.iter() {
                let name: String = name.extract()?;
                let array = StateArray::named(&name);
                if array.is_some_and(|array| array.key == StateKey::Ema) {
                    has_ema.push((*index, !value.is_none()));
                    if value.is_none() {
                        continue;
                    }
                }
                match array {
                    Some(array) => values.push((*index, array, value)),
                    None => steps.push((*index, value.extract::<u64>()?)),
                }
            }
        }
        let mut new = Vec::new();
        for group in &self.groups {
            let is_wanted = |wanted: StateKey, kind: Kind| {
                values.iter().any(|&(index, array, _)| {
                    let is_its = group.range.contains(&index) && self.params[index].kind() == kind;
                    is_its && array.key == wanted
                })
            };
            new.push(group.missing(py, &group.options.config, is_wanted)?);
        }
        for (index, new) in new.into_iter().enumerate() {
            for (place, key, buffer) in new {
                self.set_state(index, place, key, Some(buffer));
            }
        }
        let mut pairs = written;
        for (index, array, value) in values {
            pairs.push((self.state_array(py, index, array)?, value));
        }
        // No signal is heard from here to the end.
        for (dict, new) in dicts.iter().zip(options.unwrap_or_default()) {
            dict.cast::<PyDict>()?.update(new.as_mapping())?;
        }
        for (array, value) in pairs {
            array.set_item(py.Ellipsis(), value)?;
        }
        for (index, step) in steps {
            self.steps[index] = step;
        }
        for (index, has) in has_ema {
            self.has_ema[index] = has;
        }
        Ok(())
    }

    /// Adds groups, all or none.
    fn add_groups(&mut self, py: Python<'_>, groups: &[NewGroup<'_>]) -> PyResult<()> {
        let (first_group, first) = (self.groups.len(), self.params.len());
        let added = self.add_groups_or_fail(py, groups);
        // What was added may have moved, or be gone again.
        self.destinations.forget();
        if added.is_err() {
            self.groups.truncate(first_group);
            self.params.truncate(first);
        }
        self.find_foreign();
        self.steps.resize(self.params.len(), 0);
        self.has_ema.resize(self.params.len(), false);
        self.stepped.resize(self.params.len(), false);
        self.release(py);
        self.gradients.reserve(self.params.len());
        added
    }

    fn add_groups_or_fail(&mut self, py: Python<'_>, groups: &[NewGroup<'_>]) -> PyResult<()> {
        let (first, old) = (self.groups.len(), self.params.len());
        let count = groups.iter().map(|(_, names)| names.len()).sum::<usize>();
        check_room((old + count).saturating_mul(BYTES_A_PARAMETER))?;
        for (dict, names) in groups {
            let place = format!(" of group {}", self.groups.len());
            let options = GroupOptions::read(Front::Arrays, dict, &place)?;
            self.storage.check_group(&options.config, &place)?;
            let is_contiguous = is_contiguous(dict)?;
            let objects = params_of(dict, &place)?.cast_into::<PyTuple>()?;
            let start = self.params.len();
            self.add_params(&objects, names, is_contiguous)?;
            let params = &mut self.params[start..];
            let group = Group::new(py, options, is_contiguous, start, params)?;
            self.groups.push(group);
        }
        let numel = self.params.iter().map(|param| param.numel).sum();
        let room = self.batch.reserve(self.params.len(), numel);
        room.map_err(|_| Error::OutOfMemory { elements: numel })?;
        // The others may have moved since they were last looked at. Whatever is wrong with one is a
        // matter of the step that writes it.
        for &index in &self.foreign {
            let _ = self.params[index].source.renew(py);
        }
        let ArraySession {
            groups,
            params,
            destinations,
            held,
            ..
        } = self;
        Quiet::during(py, |quiet| {
            for param in &mut params[..old] {
                param.source.follow(quiet, held);
                let _ = param.recheck(quiet, false);
            }
            destinations.check(params, state_extents(groups))
        })?;
        flatten(py, &mut groups[first..], params, held)
    }

    fn add_params(
        &mut self,
        objects: &Bound<'_, PyTuple>,
        names: &Bound<'_, PyList>,
        is_contiguous: bool,
    ) -> PyResult<()> {
        let mut places: HashMap<usize, usize> = HashMap::new();
        let mut taken: HashMap<String, usize> = HashMap::new();
        for (index, param) in self.params.iter().enumerate() {
            places.insert(param.object.as_ptr() as usize, index);
            taken.extend(param.name.clone().map(|name| (name, index)));
        }
        for (object, name) in objects.iter().zip(names.iter()) {
            let index = self.params.len();
            let param = Param::new(&object, name.extract()?, index, &self.storage)?;
            let first = self.params.first();
            let wrong = if let Some(twin) = places.insert(object.as_ptr() as usize, index) {
                let twin = self.params[twin].culprit("parameter", twin);
                format!(" overlaps {twin}: expected each parameter once, got the same object")
            } else if first.is_some_and(|first| first.name.is_some() != param.name.is_some()) {
                ": expected names for all parameters or for none".to_owned()
            } else if let Some(name) = &param.name
                && let Some(twin) = taken.insert(name.clone(), index)
            {
                format!(": expected a name of its own, got that of parameter {twin}")
            } else if is_contiguous && !matches!(param.source, Source::Parameter(..)) {
                let class = object.get_type().name()?;
                let wanted = "expected, with contiguous_params, a Parameter, which can be moved";
                format!(": {wanted}, got {class}")
            } else {
                self.params.push(param);
                continue;
            };
            let culprit = param.culprit("parameter", index);
            return Err(PyValueError::new_err(format!("{culprit}{wrong}")));
        }
        Ok(())
    }
}

/// Makes the average of a parameter what that is.
fn begin_average(py: Python<'_>, group: &Group, param: &Param) -> PyResult<()> {
    let view = |key: StateKey| {
        let stored = group.state(param.kind(), key);
        // Codes do not go with rows, which the check says.
        let stored = stored.filter(|stored| stored.scales.is_none());
        stored.map(|stored| stored.elements.view_of(py, param, param.offset))
    };
    let Some(array) = view(StateKey::Ema).transpose()? else {
        return Ok(());
    };
    let error_bits = view(StateKey::ErrorBits).transpose()?;
    let state = py.import(intern!(py, "rmsprop.state"))?;
    let values = state.call_method1(intern!(py, "as_ndarray"), (&param.object,))?;
    let storage = py.import(intern!(py, "rmsprop.storage"))?;
    let values = storage.call_method1(intern!(py, "joined"), (values, error_bits))?;
    let values = storage.call_method1(intern!(py, "rounded_like"), (&array, values))?;
    array.set_item(py.Ellipsis(), values)
}

/// The parameters that a group's dict names.
fn params_of<'py>(dict: &Bound<'py, PyDict>, place: &str) -> PyResult<Bound<'py, PyAny>> {
    let objects = dict.get_item(intern!(dict.py(), "params"))?;
    let wanted = "expected a tuple, got none";
    objects.ok_or_else(|| PyValueError::new_err(format!("params{place}: {wanted}")))
}

/// The optimizer's own arrays, for the search for overlaps.
fn state_extents(groups: &[Group]) -> Vec<(String, Extent)> {
    let groups = groups.iter().enumerate();
    groups
        .flat_map(|(index, group)| group.state_extents(index))
        .collect()
}

/// The second part of a step: looks at all memory as it is now, and makes it work for the kernel.
/// Nothing is written.
struct ArrayCheck<'x> {
    quiet: &'x Quiet<'x>,
    /// The list or tuple of gradients, where they are read; without, those that were taken are used.
    items: Option<Items<'x>>,
    gradients: &'x [Option<Source>],
    storage: &'x Storage,
    groups: &'x [Group],
    params: &'x mut [Param],
    steps: &'x [u64],
    has_ema: &'x [bool],
    stepped: &'x mut [bool],
    destinations: &'x mut Destinations,
    held: &'x mut Vec<Py<PyAny>>,
}

impl<'x> ArrayCheck<'x> {
    /// All groups.
    fn all<'w>(&mut self, mut work: Work<'w, 'w>) -> Result<Work<'w, 'w>, Refused> {
        let mut groups = self.groups.iter();
        if let Some(index) = groups.position(|group| !group.has_its_memory(self.quiet)) {
            let wanted = "expected the optimizer's own arrays";
            let found = "got one that was resized or given other memory";
            let message = format!("state of group {index}: {wanted}, {found}");
            return Err(PyValueError::new_err(message).into());
        }
        // As a rule nothing has moved since the last step. If something has, the overlaps are
        // searched for anew, and then once more everything is looked at.
        loop {
            for group in self.groups {
                match self.is_flat(group) {
                    true => self.flat(&mut work, group)?,
                    false => self.each(&mut work, group)?,
                }
            }
            if self.destinations.is_checked() {
                return Ok(work);
            }
            let state = state_extents(self.groups);
            self.destinations.check(self.params, state)?;
            work.clear();
        }
    }

    /// Whether the parameters and gradients of a group are taken as flat buffers.
    fn is_flat(&self, group: &Group) -> bool {
        self.items.is_none() && group.is_flat
    }

    /// The gradient of a parameter, if it has one.
    #[inline]
    fn gradient(&self, index: usize) -> Result<Option<LentSource<'x>>, Refused> {
        let Some(items) = self.items else {
            let source = self.gradients[index].as_ref();
            return Ok(source.map(|source| source.lend(self.quiet)));
        };
        let item = items.get(index).ok_or(Refused::Collect)?;
        match item.exact_array(self.quiet) {
            Some(array) => Ok(Some(LentSource::Array(array))),
            None if item.is_none(self.quiet) => Ok(None),
            None => Err(Refused::Collect),
        }
    }

    /// The parameters of a group, one by one. Nothing of it is made work once something has moved.
    fn each(&mut self, work: &mut Work<'_, '_>, group: &Group) -> Result<(), Refused> {
        let mut rules = RuleCache::default();
        let config = &group.options.config;
        for index in group.range.clone() {
            let gradient = self.gradient(index)?;
            let param = &mut self.params[index];
            self.stepped[index] = gradient.is_some();
            let mark = param.unchanged(self.quiet, self.held);
            if mark.is_none() {
                let has_moved = param
                    .recheck(self.quiet, gradient.is_some())
                    .map_err(|refusal| Refused::Array(Role::Parameter, index, refusal))?;
                if has_moved {
                    self.destinations.forget();
                }
            }
            let Some(gradient) = gradient.filter(|_| self.destinations.is_checked()) else {
                continue;
            };
            let is_of_rows = matches!(gradient, LentSource::Rows(..));
            let (steps, has_ema) = (self.steps[index], self.has_ema[index] || is_of_rows);
            let rule = rules.get(work, param.dtype.compute(), config, steps, has_ema);
            match mark.and_then(|mark| param.simple_pair(mark, gradient)) {
                Some(pair) => self.push_simple(work, index, pair, rule)?,
                None => self.push(work, index, gradient, rule, group)?,
            }
        }
        Ok(())
    }

    /// The parameters of a group, and their gradients, as flat buffers.
    #[allow(unsafe_code)]
    fn flat(&mut self, work: &mut Work<'_, '_>, group: &Group) -> Result<(), Refused> {
        self.stepped[group.range.clone()].fill(true);
        let mut rules = RuleCache::default();
        for bucket in &group.buckets {
            // Python code may have run since that was decided.
            let [p, g] = bucket.flat_addresses().ok_or(Refused::Collect)?;
            let [v, m, b, e, _] = self.params[bucket.first].state;
            let (steps, has_ema) = (self.steps[bucket.first], self.has_ema[bucket.first]);
            let (dtype, config) = (bucket.kind.dtype, &group.options.config);
            let rule = rules.get(work, dtype, config, steps, has_ema);
            let arrays = [p, g, v, m, b, e].map(|address| Address(address as *mut u8));
            // SAFETY: p, g and the state are flat buffers of the optimizer's own, which were found
            // where they were; they have `numel` elements of this type, and no two of them are the
            // same. The state that the options use is there since they were read; in a group with
            // flat buffers it begins where that of the first parameter does.
            unsafe { work.push(bucket.first, arrays, bucket.numel, rule) };
        }
        Ok(())
    }

    /// A parameter and a gradient that are walked alike, like the state.
    #[inline]
    #[allow(unsafe_code)]
    fn push_simple(
        &mut self,
        work: &mut Work<'_, '_>,
        index: usize,
        [p, g]: [usize; 2],
        rule: u32,
    ) -> Result<(), Refused> {
        if g != self.params[index].cleared {
            let mut extent = self.params[index].extent().clone();
            extent.data = g;
            self.destinations
                .check_gradient(self.params, index, &extent)?;
            self.params[index].cleared = g;
        }
        let param = &self.params[index];
        let [v, m, b, e, _] = param.state;
        let arrays = [p, g, v, m, b, e].map(|address| Address(address as *mut u8));
        // SAFETY: the parameter's header says what it said when it was checked: writable, aligned,
        // dense, of this type and shape; so does the gradient's, but for being writable. The state
        // was made for these parameters and options, lies alike, and was found where it was. No two
        // written arrays share an element, and the gradient shares none with them. What keeps their
        // memory is held, or lent by who keeps it while no Python code runs.
        unsafe { work.push(index, arrays, param.numel, rule) };
        Ok(())
    }

    /// Any other.
    #[cold]
    #[allow(unsafe_code)]
    fn push(
        &mut self,
        work: &mut Work<'_, '_>,
        index: usize,
        gradient: LentSource<'_>,
        rule: u32,
        group: &Group,
    ) -> Result<(), Refused> {
        let quiet = self.quiet;
        let in_gradient = |refusal| Refused::Array(Role::Gradient, index, refusal);
        let param = &self.params[index];
        let config = &group.options.config;
        let mut uses: [bool; ROLES] = Role::used(config);
        uses[Role::ErrorBits as usize] = param.stored[StateKey::ErrorBits as usize].is_some();
        let mut rows = None;
        if let LentSource::Rows(indices, values) = gradient {
            uses[Role::Gradient as usize] = false;
            let values = values.lend(quiet).view(quiet).map_err(in_gradient)?;
            let is_coarse = StateKey::EVERY
                .into_iter()
                .any(|key| key.is_used(config) && param.stored[key as usize] == Some(DType::U8));
            let found = match is_coarse {
                true => Err(NoRows::Coarse),
                false => row::rows_of(&param.shape, param.dtype.compute(), indices, &values),
            };
            rows = Some(found.map_err(|no_rows| {
                match no_rows.describe(&param.shape, indices.len(), values.shape) {
                    Ok((wanted, found)) => {
                        let culprit = param.culprit("gradient", index);
                        let message = format!("{culprit}: expected {wanted}, got {found}");
                        Refused::Error(PyValueError::new_err(message))
                    }
                    Err(refusal) => in_gradient(refusal),
                }
            })?);
        } else {
            let g = gradient.view(quiet).map_err(in_gradient)?;
            if g.element.is_complex || !g.element.dtype.is_float() {
                return Err(in_gradient(Refusal::DType));
            }
            if g.shape != &param.shape[..] {
                return Err(in_gradient(Refusal::Unlike));
            }
            self.destinations
                .check_gradient(self.params, index, &g.extent())?;
        }
        let read = |role: Role| match (role, role.state_key()) {
            (Role::Parameter, _) => param.source.lend(quiet).view(quiet),
            (_, None) => gradient.view(quiet),
            (_, Some(key)) => {
                let dtype = param.stored[key as usize].ok_or(Refusal::NotAnArray)?;
                param.state_view(quiet, param.state[key as usize], dtype)
            }
        };
        let scales_len = [param.numel.div_ceil(BLOCK) as i64];
        let read_scales = |role: Role| {
            let key = role.state_key().ok_or(Refusal::NotAnArray)?;
            let (element, at) = (Element::real(DType::F32), param.scales[key as usize]);
            View::new(
                at,
                element,
                &scales_len,
                &[1],
                element.size(),
                Access::Writable,
            )
        };
        let noise = self.storage.noise(self.steps[index].saturating_add(1));
        let row = row::check(uses, self.storage.rounding, read, read_scales)
            .map_err(|(role, refusal)| Refused::Array(role, index, refusal))?;
        // SAFETY: what keeps their memory is held, or lent by who keeps it while no Python code runs;
        // no two written arrays of the optimizer share an element.
        unsafe { row.push(work, index, rule, noise, rows) };
        self.params[index].cleared = 0;
        Ok(())
    }

    /// Takes references to what a step uses while other threads run.
    fn hold(&mut self) {
        for group in self.groups {
            if self.is_flat(group) {
                continue; // Buffers of the optimizer's own.
            }
            for index in group.range.clone() {
                let source = self.params[index].source.lend(self.quiet);
                self.held.extend(source.hold(self.quiet));
                if let Ok(Some(gradient)) = self.gradient(index) {
                    self.held.extend(gradient.hold(self.quiet));
                }
            }
        }
    }
}
