//! A step over Python's arrays: convert, check, release the GIL, call, count.

use std::collections::HashMap;

use pyo3::exceptions::{
    PyAttributeError, PyFloatingPointError, PyIndexError, PyKeyError, PyTypeError, PyValueError,
};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping, PyString, PyTuple};

use super::error::check_room;
use super::group::{Group, NewState, flatten, state_spans};
use super::options::{Change, Snapshot, config_of, is_contiguous};
use super::tensor::work::{Assembly, Guard, Incoming, Lent, Param, Work};
use super::tensor::{DType, Source, is_same};
use crate::kernel::batch::Storage;
use crate::kernel::dispatch::Isa;
use crate::optimizer::{Clipping, Outcome, Verdict};
use crate::parallel::Threads;
use crate::state::StateKey;

/// Bytes that a step reads and writes from which on it releases the GIL: some 30 µs of work. The
/// references that it must hold while other threads run cost 5 ns a tensor.
pub(crate) const DETACH_BYTES: usize = 4 << 20;

/// What is kept of a parameter besides its state, and what is needed in between, at most.
const BYTES_A_PARAMETER: usize = size_of::<Param>() + 768;

/// A group that is to be added: its dict, and the names of its parameters, each a string or None.
pub(crate) type NewGroup<'py> = (Bound<'py, PyDict>, Bound<'py, PyList>);

/// The state that a parameter is to have: its index, the start value of `square_avg`, and what is
/// not to be at its start.
pub(crate) type NewEntry<'py> = (usize, f64, Bound<'py, PyDict>);

/// What an optimizer holds.
pub(crate) struct Inner {
    pub groups: Vec<Group>,
    pub params: Vec<Param>,
    /// Some are read through the exchange API.
    pub has_exchanged: bool,
    /// Updates of each parameter.
    pub steps: Vec<u64>,
    pub guard: Guard,
    pub clipping: Clipping,
    /// As given; None means as many as there are.
    pub threads: Option<usize>,
    /// That many, or as many as this process may use.
    pub allowed_threads: usize,
    pub last_grad_norm: Option<f64>,
    pub skipped_steps: u64,
    pub isa: Isa,
    /// Kept from step to step so that a step allocates nothing.
    pub f32: Storage<f32>,
    pub f64: Storage<f64>,
    /// One for each parameter; none of them is there between steps.
    pub incoming: Vec<Incoming>,
    pub keep: Vec<Py<PyAny>>,
    /// Groups that this step has created state for, and which they had before.
    pub adopted: Vec<(usize, [[bool; 3]; 2])>,
    /// Some of them are there.
    pub is_holding: bool,
}

/// Where the gradients of a step come from.
pub(crate) enum Grads<'py> {
    /// Each parameter's `.grad`.
    Attributes,
    List(Bound<'py, PyList>),
    Tuple(Bound<'py, PyTuple>),
    Mapping(Bound<'py, PyMapping>),
}

impl<'py> Grads<'py> {
    /// Sorts out what was handed over; an iterable is read once.
    pub fn new(grads: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let Some(grads) = grads else {
            return Ok(Grads::Attributes);
        };
        if let Ok(list) = grads.cast::<PyList>() {
            return Ok(Grads::List(list.clone()));
        }
        if let Ok(tuple) = grads.cast::<PyTuple>() {
            return Ok(Grads::Tuple(tuple.clone()));
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
        let items = grads
            .try_iter()
            .map_err(|_| wrong())?
            .collect::<PyResult<Vec<_>>>()?;
        Ok(Grads::Tuple(PyTuple::new(grads.py(), items)?))
    }

    /// That there is one for each parameter, and no other.
    fn check(&self, params: &[Param]) -> PyResult<()> {
        let found = match self {
            Grads::Attributes => return Ok(()),
            Grads::List(list) => list.len(),
            Grads::Tuple(tuple) => tuple.len(),
            Grads::Mapping(mapping) => return check_names(mapping, params),
        };
        let wanted = params.len();
        if found == wanted {
            return Ok(());
        }
        let message = format!("grads: expected {wanted} gradients, got {found}");
        Err(PyValueError::new_err(message))
    }

    /// The gradient of a parameter, or Python's None.
    #[inline]
    fn of(&self, py: Python<'py>, param: &Param, index: usize) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Grads::List(list) => list.get_item(index).map_err(|_| {
                PyValueError::new_err(
                    "grads: expected a list that stays as it is, got a shorter one",
                )
            }),
            Grads::Tuple(tuple) => tuple.get_item(index),
            Grads::Mapping(mapping) => mapping.get_item(&param.name).map_err(|error| {
                if !error.is_instance_of::<PyKeyError>(py) {
                    return error;
                }
                let culprit = param.culprit("gradient", index);
                let message =
                    format!("{culprit}: expected an array or None, got no entry in grads");
                PyValueError::new_err(message)
            }),
            Grads::Attributes => match &param.source {
                Source::Parameter(parameter, ..) if !param.has_own_grad => Ok(parameter
                    .get()
                    .grad(py)
                    .unwrap_or_else(|| py.None().into_bound(py))),
                _ => param
                    .object
                    .bind(py)
                    .getattr(intern!(py, "grad"))
                    .map_err(|error| {
                        if !error.is_instance_of::<PyAttributeError>(py) {
                            return error;
                        }
                        let culprit = param.culprit("parameter", index);
                        let wanted = "one with .grad, or a step(grads=...)";
                        PyValueError::new_err(format!("{culprit}: expected {wanted}, got neither"))
                    }),
            },
        }
    }
}

/// That the optimizer's own memory is where it was.
fn check_buffers(py: Python<'_>, groups: &[Group]) -> PyResult<()> {
    let mut groups = groups.iter().enumerate();
    groups.try_for_each(|(index, group)| group.check_buffers(py, index))
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
    for key in mapping.keys()?.iter() {
        let is_name = |key: &str| {
            params
                .iter()
                .any(|param| param.name.as_deref() == Some(key))
        };
        if !key.extract::<&str>().is_ok_and(is_name) {
            let message = format!("grads: expected names of parameters, got {}", key.repr()?);
            return Err(PyValueError::new_err(message));
        }
    }
    Ok(())
}

impl Inner {
    pub fn locate(&self, index: usize) -> PyResult<(usize, DType)> {
        let group = self
            .groups
            .iter()
            .position(|group| group.range.contains(&index));
        match group {
            Some(group) => Ok((group, self.params[index].destination.dtype)),
            None => Err(PyIndexError::new_err(format!(
                "parameter {index}: expected an index below {}",
                self.params.len()
            ))),
        }
    }

    pub fn step(
        &mut self,
        py: Python<'_>,
        dicts: &Bound<'_, PyList>,
        grads: &Grads<'_>,
    ) -> PyResult<()> {
        let outcome = self.step_or_fail(py, dicts, grads);
        // A step that was left out or has failed leaves no state that it has created.
        for (index, had) in std::mem::take(&mut self.adopted) {
            if !matches!(outcome, Ok(true)) {
                self.groups[index].disown(had, &mut self.params, &mut self.guard);
            }
        }
        outcome.map(drop)
    }

    /// True if it has updated.
    fn step_or_fail(
        &mut self,
        py: Python<'_>,
        dicts: &Bound<'_, PyList>,
        grads: &Grads<'_>,
    ) -> PyResult<bool> {
        self.read_groups(py, dicts)?;
        grads.check(&self.params)?;
        let lent = self.step_lent(py, grads)?;
        let is_lent = lent.is_some();
        let verdict = match lent {
            Some(verdict) => verdict,
            None => self.step_held(py, grads)?,
        };
        if let Outcome::Raise {
            index,
            element,
            found,
        } = verdict.outcome
        {
            return Err(self.blame(index, element, found));
        }
        self.last_grad_norm = verdict.norm;
        if let Outcome::Skip = verdict.outcome {
            self.skipped_steps += 1;
            return Ok(false);
        }
        self.adopted.clear();
        self.count_steps(is_lent);
        if !is_lent {
            self.tell_autograd(py)?;
        }
        Ok(true)
    }

    /// A short step over NumPy arrays that all are what they were: their gradients, in a list or a
    /// tuple, need not be held, for nothing runs Python code before the step is over. None, with
    /// nothing done, if it is another one.
    fn step_lent(&mut self, py: Python<'_>, grads: &Grads<'_>) -> PyResult<Option<Verdict>> {
        let lent = match grads {
            Grads::List(list) => Lent::List(list),
            Grads::Tuple(tuple) => Lent::Tuple(tuple),
            _ => return Ok(None),
        };
        check_buffers(py, &self.groups)?;
        let Inner {
            groups,
            params,
            steps,
            guard,
            f32,
            f64,
            ..
        } = self;
        let mut assembly = Assembly {
            params,
            incoming: &[],
            steps,
            guard,
            work: Work::open(f32, f64),
            capsules: Vec::new(),
        };
        if !assembly.glance(py, groups.iter().map(Group::work), &lent) {
            return Ok(None);
        }
        let work = assembly.work;
        if work.bytes() >= DETACH_BYTES {
            return Ok(None);
        }
        let threads = Threads::of_step(self.allowed_threads, work.bytes());
        Ok(Some(work.run(&self.clipping, threads, None)))
    }

    /// Any other step: its gradients are held by references while it lasts.
    fn step_held(&mut self, py: Python<'_>, grads: &Grads<'_>) -> PyResult<Verdict> {
        self.is_holding = true;
        self.take_gradients(py, grads)?;
        let allowed = self.allowed_threads;
        let clipping = self.clipping;
        let Inner {
            groups,
            params,
            steps,
            guard,
            f32,
            f64,
            incoming,
            keep,
            ..
        } = self;
        let mut assembly = Assembly {
            params,
            incoming,
            steps,
            guard,
            work: Work::open(f32, f64),
            capsules: Vec::new(),
        };
        let works = groups.iter().map(Group::work);
        let check = || check_buffers(py, groups);
        assembly.build(py, works, || state_spans(groups), check)?;
        let Assembly {
            params,
            work,
            capsules,
            ..
        } = assembly;
        let bytes = work.bytes();
        let threads = Threads::of_step(allowed, bytes);
        let run = move || work.run(&clipping, threads, None);
        let verdict = if bytes < DETACH_BYTES {
            run()
        } else {
            // The arrays must outlive the step even if another thread replaces them meanwhile.
            for group in groups.iter().filter(|group| !group.is_flat) {
                let arrays = params[group.range.clone()].iter();
                let arrays = arrays.filter_map(|param| param.source.array(py));
                keep.extend(arrays.map(|array| array.into_any().unbind()));
            }
            py.detach(run)
        };
        drop(capsules);
        Ok(verdict)
    }

    /// Reads the options of the groups as they are now.
    fn read_groups(&mut self, py: Python<'_>, dicts: &Bound<'_, PyList>) -> PyResult<()> {
        if dicts.len() != self.groups.len() {
            return Err(PyValueError::new_err(format!(
                "param_groups: expected {} groups, got {}: add_param_group adds one",
                self.groups.len(),
                dicts.len()
            )));
        }
        for index in 0..self.groups.len() {
            let dict = dicts.get_item(index)?;
            let Ok(dict) = dict.cast::<PyDict>() else {
                let class = dict.get_type().name()?;
                return Err(PyTypeError::new_err(format!(
                    "group {index}: expected a dict, got {class}"
                )));
            };
            let Group {
                snapshot, config, ..
            } = &mut self.groups[index];
            let had_momentum = config.momentum > 0.0;
            match snapshot.follow(dict, config) {
                Change::None => {}
                Change::Numbers
                    if config.validate().is_ok() && had_momentum == (config.momentum > 0.0) => {}
                _ => {
                    snapshot.forget();
                    self.read_group(py, index, dict)?;
                }
            }
        }
        Ok(())
    }

    #[cold]
    fn read_group(
        &mut self,
        py: Python<'_>,
        index: usize,
        dict: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let place = format!(" of group {index}");
        // Before reading: what runs meanwhile might change the dict.
        let snapshot = Snapshot::new(dict, false);
        let config = config_of(dict, &place)?;
        let is_contiguous = is_contiguous(dict)?;
        let group = &mut self.groups[index];
        if is_contiguous != group.is_contiguous {
            let python = |flag| if flag { "True" } else { "False" };
            let (wanted, found) = (python(group.is_contiguous), python(is_contiguous));
            return Err(PyValueError::new_err(format!(
                "contiguous_params{place}: expected {wanted} as at its construction, got {found}"
            )));
        }
        let objects = dict.get_item(intern!(py, "params"))?;
        let objects = objects.ok_or_else(|| {
            PyValueError::new_err(format!("params{place}: expected a tuple, got none"))
        })?;
        let new = group.missing(py, &config, |key, _| key.is_used(&config))?;
        if !is_same(&objects, group.objects.as_any()) {
            self.rebind(py, index, &objects)?;
        }
        let group = &mut self.groups[index];
        let had = group.adopt(new, &mut self.params, &mut self.guard);
        self.adopted.extend(had.map(|had| (index, had)));
        group.config = config;
        group.snapshot = snapshot;
        Ok(())
    }

    /// Takes another list of parameters for a group: as many, each of the shape and type it had.
    fn rebind(&mut self, py: Python<'_>, group: usize, objects: &Bound<'_, PyAny>) -> PyResult<()> {
        let class = objects.get_type().name()?;
        let wrong = |_| {
            let message = format!("params of group {group}: expected parameters, got {class}");
            PyTypeError::new_err(message)
        };
        let objects = objects
            .try_iter()
            .map_err(wrong)?
            .collect::<PyResult<Vec<_>>>()?;
        let objects = PyTuple::new(py, objects)?;
        let range = self.groups[group].range.clone();
        if objects.len() != range.len() {
            return Err(PyValueError::new_err(format!(
                "params of group {group}: expected {}, got {}: add_param_group adds parameters",
                range.len(),
                objects.len()
            )));
        }
        let mut replaced = Vec::new();
        for (index, object) in range.zip(objects.iter()) {
            let old = &self.params[index];
            if is_same(&object, &old.object) {
                continue;
            }
            let mut new = Param::new(&object, old.name.clone(), index)?;
            new.succeed(old, index)?;
            replaced.push((index, new));
        }
        for (index, new) in replaced {
            self.params[index] = new;
            self.guard.forget();
            self.groups[group]
                .halves
                .iter_mut()
                .for_each(|half| half.flat = None);
        }
        self.has_exchanged = self.params.iter().any(Param::is_exchanged);
        self.groups[group].objects = objects.unbind();
        Ok(())
    }

    /// Fills `incoming` with the gradients of this step. May run Python code.
    fn take_gradients(&mut self, py: Python<'_>, grads: &Grads<'_>) -> PyResult<()> {
        let Inner {
            groups,
            params,
            steps,
            guard,
            incoming,
            ..
        } = self;
        for group in groups {
            match grads {
                Grads::Attributes => group.settle_mode(py, params, steps, guard)?,
                _ => group.is_flat = false,
            }
            if group.is_flat {
                continue;
            }
            for index in group.range.clone() {
                let param = &params[index];
                let object = grads.of(py, param, index)?;
                incoming[index] = Incoming::new(object, param, index)?;
                if incoming[index].is_some() {
                    param.check_sign(py, index)?;
                }
            }
        }
        Ok(())
    }

    /// Lets go of what a step held.
    pub fn release(&mut self, py: Python<'_>) {
        if !std::mem::take(&mut self.is_holding) {
            return;
        }
        for group in self.groups.iter().filter(|group| !group.is_flat) {
            let incoming = &mut self.incoming[group.range.clone()];
            incoming
                .iter_mut()
                .for_each(|gradient| gradient.release(py));
        }
        self.keep.clear();
    }

    /// Counts a step of the parameters that had a gradient, or of all.
    fn count_steps(&mut self, have_all: bool) {
        for group in &self.groups {
            let steps = self.steps[group.range.clone()].iter_mut();
            if have_all || group.is_flat {
                steps.for_each(|step| *step = step.saturating_add(1));
                continue;
            }
            for (step, gradient) in steps.zip(&self.incoming[group.range.clone()]) {
                *step = step.saturating_add(u64::from(gradient.is_some()));
            }
        }
    }

    /// Tells torch that its tensors were written in place, so that a backward pass through what
    /// they were raises instead of computing something else.
    fn tell_autograd(&self, py: Python<'_>) -> PyResult<()> {
        if !self.has_exchanged {
            return Ok(());
        }
        let updated = self.params.iter().zip(&self.incoming);
        let updated =
            updated.filter(|(param, gradient)| param.is_exchanged() && gradient.is_some());
        let tensors: Vec<_> = updated
            .map(|(param, _)| param.object.bind(py))
            .filter(|object| {
                object
                    .get_type()
                    .module()
                    .is_ok_and(|name| name.to_string().starts_with("torch"))
            })
            .collect();
        if !tensors.is_empty() {
            let graph = py.import(intern!(py, "torch.autograd.graph"))?;
            graph.call_method1(intern!(py, "increment_version"), (tensors,))?;
        }
        Ok(())
    }

    /// The error for a gradient that is not finite. A piece may be several parameters that lie next
    /// to each other.
    fn blame(&self, mut index: usize, mut element: usize, found: f64) -> PyErr {
        let dtype = self.params[index].destination.dtype;
        while element >= self.params[index].destination.numel {
            let next = (index + 1..self.params.len())
                .find(|&next| self.params[next].destination.dtype == dtype);
            let Some(next) = next else { break };
            element -= self.params[index].destination.numel;
            index = next;
        }
        let culprit = self.params[index].culprit("gradient", index);
        let found = found.to_string().to_lowercase();
        PyFloatingPointError::new_err(format!(
            "{culprit}: expected finite values, got {found} at element {element}"
        ))
    }

    /// Takes options and state, all or nothing.
    pub fn exchange(
        &mut self,
        py: Python<'_>,
        options: &[(Bound<'_, PyDict>, Bound<'_, PyDict>)],
        entries: &[NewEntry<'_>],
    ) -> PyResult<()> {
        let mut wanted = Vec::new();
        for (index, _, entry) in entries {
            let keys = StateKey::ALL.into_iter().map(StateKey::name);
            for key in keys {
                if entry.contains(key)? {
                    wanted.push((*index, key.to_owned()));
                }
            }
        }
        let new = self.new_state(py, &wanted)?;
        let (mut values, mut steps) = (Vec::new(), Vec::new());
        for (index, start, entry) in entries {
            let (group, dtype) = self.locate(*index)?;
            let step = entry.get_item(intern!(py, "step"))?;
            steps.push(step.map_or(Ok(0), |step| step.extract::<u64>())?);
            for key in StateKey::ALL {
                let place = (dtype as usize, key as usize);
                let known = self.groups[group].halves[place.0].state[place.1].as_ref();
                let Some(buffer) = known.or(new[group][place.0][place.1].as_ref()) else {
                    continue;
                };
                let Param {
                    destination,
                    offset,
                    ..
                } = &self.params[*index];
                let shape = &destination.shape;
                let view = buffer.view(py, *offset, shape, destination.state_strides())?;
                let start = match key {
                    StateKey::SquareAvg => *start,
                    _ => 0.0,
                };
                let value = match entry.get_item(key.name())? {
                    Some(value) => value,
                    None => start.into_pyobject(py)?.into_any(),
                };
                values.push((view, value));
            }
        }
        // From here on nothing runs Python code, which might be interrupted: dicts with strings for
        // keys are updated, and arrays and numbers copied into arrays.
        for (group, new) in self.groups.iter_mut().zip(new) {
            group.adopt(new, &mut self.params, &mut self.guard);
        }
        for (view, value) in values {
            view.set_item(py.Ellipsis(), value)?;
        }
        for ((index, ..), step) in entries.iter().zip(steps) {
            self.steps[*index] = step;
        }
        for (group, new) in options {
            group.update(new.as_mapping())?;
        }
        Ok(())
    }

    /// Creates state of parameters, by name, where it is not there yet: all or none.
    pub fn create_state(&mut self, py: Python<'_>, wanted: &[(usize, String)]) -> PyResult<()> {
        let new = self.new_state(py, wanted)?;
        for (group, new) in self.groups.iter_mut().zip(new) {
            group.adopt(new, &mut self.params, &mut self.guard);
        }
        Ok(())
    }

    /// State of parameters, by name, that is not there yet, for each group.
    fn new_state(
        &self,
        py: Python<'_>,
        wanted: &[(usize, String)],
    ) -> PyResult<Vec<[NewState; 2]>> {
        let mut places = Vec::with_capacity(wanted.len());
        for (index, name) in wanted {
            let (group, dtype) = self.locate(*index)?;
            places.extend(StateKey::named(name).map(|key| (group, key, dtype)));
        }
        let mut new = Vec::with_capacity(self.groups.len());
        for (index, group) in self.groups.iter().enumerate() {
            let is_wanted = |key, dtype| places.contains(&(index, key, dtype));
            new.push(group.missing(py, &group.config, is_wanted)?);
        }
        Ok(new)
    }

    /// Adds groups, all or none: dicts that have every option and a tuple of parameters, and the
    /// names of these.
    pub fn add_groups(&mut self, py: Python<'_>, groups: &[NewGroup<'_>]) -> PyResult<()> {
        let (first_group, first) = (self.groups.len(), self.params.len());
        let count = groups.iter().map(|(_, names)| names.len()).sum::<usize>();
        check_room((first + count).saturating_mul(BYTES_A_PARAMETER))?;
        self.params.reserve_exact(count);
        let added = self.add_groups_or_fail(py, groups);
        // What was added may have moved, or be gone again.
        self.guard.forget();
        if added.is_err() {
            self.groups.truncate(first_group);
            self.params.truncate(first);
        }
        self.has_exchanged = self.params.iter().any(Param::is_exchanged);
        let room = |dtype: DType| {
            let members = self
                .params
                .iter()
                .filter(|param| param.destination.dtype == dtype);
            members.fold((0, 0), |(count, numel), param| {
                (count + 1, numel + param.destination.numel)
            })
        };
        let (f32, f64) = (room(DType::F32), room(DType::F64));
        self.f32 = Storage::new(self.isa, f32.0, f32.1);
        self.f64 = Storage::new(self.isa, f64.0, f64.1);
        self.steps.resize(self.params.len(), 0);
        self.incoming
            .resize_with(self.params.len(), Incoming::default);
        self.keep.reserve(self.params.len());
        added
    }

    fn add_groups_or_fail(&mut self, py: Python<'_>, groups: &[NewGroup<'_>]) -> PyResult<()> {
        let (first, old) = (self.groups.len(), self.params.len());
        for (dict, names) in groups {
            let place = format!(" of group {}", self.groups.len());
            let snapshot = Snapshot::new(dict, false);
            let config = config_of(dict, &place)?;
            let is_contiguous = is_contiguous(dict)?;
            let missing =
                || PyValueError::new_err(format!("params{place}: expected a tuple, got none"));
            let objects = dict.get_item(intern!(py, "params"))?.ok_or_else(missing)?;
            let objects = objects.cast_into::<PyTuple>()?;
            let start = self.params.len();
            self.add_params(&objects, names, is_contiguous)?;
            let params = &mut self.params[start..];
            let group = Group::new(
                py,
                snapshot,
                objects.unbind(),
                config,
                is_contiguous,
                start,
                params,
            )?;
            self.groups.push(group);
        }
        // The others may have moved since they were last looked at. Capsules first: making one runs
        // Python code.
        let mut keep = Vec::new();
        for param in self.params[..old]
            .iter_mut()
            .filter(|param| param.is_capsule())
        {
            param.follow_capsule(py, &mut keep);
        }
        for param in self.params[..old]
            .iter_mut()
            .filter(|param| !param.is_capsule())
        {
            param.follow(py);
        }
        self.guard.forget();
        let spans = || state_spans(&self.groups);
        self.guard.check(&mut self.params, spans)?;
        flatten(py, &mut self.groups[first..], &mut self.params)
    }

    fn add_params(
        &mut self,
        objects: &Bound<'_, PyTuple>,
        names: &Bound<'_, PyList>,
        is_contiguous: bool,
    ) -> PyResult<()> {
        let addresses = self
            .params
            .iter()
            .map(|param| param.object.as_ptr() as usize);
        let mut addresses: HashMap<usize, usize> = addresses.zip(0..).collect();
        let taken = self.params.iter().enumerate();
        let taken = taken.filter_map(|(index, param)| Some((param.name.clone()?, index)));
        let mut taken: HashMap<String, usize> = taken.collect();
        for (object, name) in objects.iter().zip(names) {
            let name: Option<String> = name.extract()?;
            let index = self.params.len();
            let param = Param::new(&object, name.clone(), index)?;
            let refuse = |wanted: &str| {
                let culprit = param.culprit("parameter", index);
                Err(PyValueError::new_err(format!("{culprit}{wanted}")))
            };
            if let Some(&twin) = addresses.get(&(object.as_ptr() as usize)) {
                let twin = self.params[twin].culprit("parameter", twin);
                return refuse(&format!(
                    " overlaps {twin}: expected each parameter once, got the same object"
                ));
            }
            if (self.params.first()).is_some_and(|other| other.name.is_some() != name.is_some()) {
                return refuse(": expected names for all parameters or for none");
            }
            if let Some(twin) = name.as_ref().and_then(|name| taken.get(name)) {
                return refuse(&format!(
                    ": expected a name of its own, got that of parameter {twin}"
                ));
            }
            if is_contiguous && !matches!(param.source, Source::Parameter(..)) {
                let class = object.get_type().name()?;
                return refuse(&format!(
                    ": expected, with contiguous_params, a Parameter, which can be moved, got {class}"
                ));
            }
            addresses.insert(object.as_ptr() as usize, index);
            taken.extend(name.clone().map(|name| (name, index)));
            self.params.push(param);
        }
        Ok(())
    }
}
