//! The Rust part of `rmsprop.RMSprop`: what Python calls.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::options::not_a_number;
use super::step::{Grads, Inner, NewEntry, NewGroup};
use super::tensor::Refusal;
use super::tensor::work::{Guard, Incoming, Param};
use super::turn::Turns;
use crate::config::{Nonfinite, validate_max_grad_norm};
use crate::kernel::batch::Storage;
use crate::kernel::dispatch::isa;
use crate::optimizer::Clipping;
use crate::parallel::{default_threads, threads_from_environment, usable};
use crate::state::StateKey;

/// The base class of `rmsprop.RMSprop`, which documents it.
#[pyclass(subclass, frozen, weakref, module = "rmsprop._core")]
pub(crate) struct Optimizer {
    param_groups: Mutex<Py<PyList>>,
    contents: Turns<Inner>,
}

impl Optimizer {
    fn groups<'py>(&self, py: Python<'py>) -> Bound<'py, PyList> {
        self.param_groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bind(py)
            .clone()
    }
}

#[pymethods]
impl Optimizer {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let isa = isa()?;
        let contents = Inner {
            groups: Vec::new(),
            params: Vec::new(),
            has_exchanged: false,
            steps: Vec::new(),
            guard: Guard::default(),
            clipping: Clipping::default(),
            threads: None,
            allowed_threads: 1,
            last_grad_norm: None,
            skipped_steps: 0,
            isa,
            f32: Storage::new(isa, 0, 0),
            f64: Storage::new(isa, 0, 0),
            incoming: Vec::new(),
            keep: Vec::new(),
            adopted: Vec::new(),
            is_holding: false,
        };
        Ok(Optimizer {
            param_groups: Mutex::new(PyList::empty(py).unbind()),
            contents: Turns::new(contents),
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(groups) = self.param_groups.try_lock() {
            visit.call(&*groups)?;
        }
        // Locked means in use, and nothing in use is garbage.
        let Some(inner) = self.contents.try_take() else {
            return Ok(());
        };
        for group in &inner.groups {
            group.snapshot.traverse(&visit)?;
            visit.call(&group.objects)?;
            group
                .buffers()
                .try_for_each(|buffer| buffer.traverse(&visit))?;
        }
        inner
            .params
            .iter()
            .try_for_each(|param| param.traverse(&visit))
    }

    fn __clear__(&self) {
        let Some(mut inner) = self.contents.try_take() else {
            return;
        };
        let groups = std::mem::take(&mut inner.groups);
        let params = std::mem::take(&mut inner.params);
        inner.steps.clear();
        inner.incoming.clear();
        inner.guard.forget();
        // Dropping may run Python code, which may come back here.
        drop(inner);
        drop((groups, params));
    }

    /// The parameter groups: dicts of options, read at every step.
    #[getter(param_groups)]
    fn get_param_groups<'py>(&self, py: Python<'py>) -> Bound<'py, PyList> {
        self.groups(py)
    }

    #[setter(param_groups)]
    fn set_param_groups(&self, groups: &Bound<'_, PyAny>) -> PyResult<()> {
        let Ok(groups) = groups.cast::<PyList>() else {
            let class = groups.get_type().name()?;
            let message = format!("param_groups: expected a list, got {class}");
            return Err(PyTypeError::new_err(message));
        };
        let mut place = self
            .param_groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
    /// parameter's shape and dtype and is not written. The parameters and the state are. The GIL is
    /// released while a long step computes; threads that step one optimizer take turns.
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
        let value = closure.map(|closure| closure.call0()).transpose()?;
        let this = slf.get();
        let grads = Grads::new(grads)?;
        let groups = this.groups(py);
        let mut turn = this.contents.wait(py)?;
        let outcome = turn.step(py, &groups, &grads);
        turn.release(py);
        drop(turn);
        outcome?;
        Ok(value.map(Bound::unbind))
    }

    /// Adds groups, all or none: dicts that have every option and a tuple of parameters, and the
    /// names of these.
    fn _add_groups(&self, py: Python<'_>, groups: Vec<NewGroup<'_>>) -> PyResult<()> {
        let list = self.groups(py);
        self.contents.wait(py)?.add_groups(py, &groups)?;
        groups.iter().try_for_each(|(group, _)| list.append(group))
    }

    /// The group of a parameter.
    fn _group_index(&self, py: Python<'_>, index: usize) -> PyResult<usize> {
        Ok(self.contents.wait(py)?.locate(index)?.0)
    }

    /// The names of a parameter's state arrays.
    fn _state_keys(&self, py: Python<'_>, index: usize) -> PyResult<Vec<&'static str>> {
        let turn = self.contents.wait(py)?;
        let (group, dtype) = turn.locate(index)?;
        let half = &turn.groups[group].halves[dtype as usize];
        let used = |key: &StateKey| half.state[*key as usize].is_some();
        Ok(StateKey::ALL
            .into_iter()
            .filter(used)
            .map(StateKey::name)
            .collect())
    }

    /// A view of a state array, of the parameter's shape; KeyError if there is none of that name.
    fn _state_array<'py>(
        &self,
        py: Python<'py>,
        index: usize,
        key: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let turn = self.contents.wait(py)?;
        let (group, dtype) = turn.locate(index)?;
        let missing = || PyKeyError::new_err(key.to_owned());
        let place = StateKey::named(key).ok_or_else(missing)?;
        let Param {
            destination,
            offset,
            ..
        } = &turn.params[index];
        let half = &turn.groups[group].halves[dtype as usize];
        let buffer = half.state[place as usize].as_ref().ok_or_else(missing)?;
        Ok(buffer
            .view(py, *offset, &destination.shape, destination.state_strides())?
            .into_any())
    }

    /// Checks that a value can become a state array; ValueError if not.
    fn _check_state(
        &self,
        py: Python<'_>,
        index: usize,
        key: &str,
        value: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let turn = self.contents.wait(py)?;
        turn.locate(index)?;
        let param = &turn.params[index];
        let culprit = || format!("state {key} of {}", param.culprit("parameter", index));
        if StateKey::named(key).is_none() {
            let names = StateKey::ALL.map(StateKey::name).join(", ");
            let message = format!("{}: expected step or one of {names}", culprit());
            return Err(PyValueError::new_err(message));
        }
        let outcome = Incoming::of(value).and_then(|value| value.gradient(py, &param.destination));
        match outcome {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(PyValueError::new_err(format!(
                "{}: expected an array, got None",
                culprit()
            ))),
            // State is data, not an argument: also the wrong type is a ValueError.
            Err(Refusal::Type(wanted, found)) => Err(Refusal::Value(wanted, found).at(culprit())),
            Err(refusal) => Err(refusal.at(culprit())),
        }
    }

    /// Creates state arrays that options do not ask for, at their start values, all or none; pairs
    /// of the parameter's index and the name.
    fn _create_state(&self, py: Python<'_>, wanted: Vec<(usize, String)>) -> PyResult<()> {
        self.contents.wait(py)?.create_state(py, &wanted)
    }

    /// Takes options of groups, as pairs of the dict and what it is updated with, and the checked state
    /// of parameters whole, with the start value of `square_avg`: what an entry lacks goes back to its
    /// start. All at once: whatever can fail or be interrupted comes before the first change.
    fn _exchange(
        &self,
        py: Python<'_>,
        groups: Vec<(Bound<'_, PyDict>, Bound<'_, PyDict>)>,
        entries: Vec<NewEntry<'_>>,
    ) -> PyResult<()> {
        self.contents.wait(py)?.exchange(py, &groups, &entries)
    }

    /// How often a parameter was updated.
    fn _steps(&self, py: Python<'_>, index: usize) -> PyResult<u64> {
        let turn = self.contents.wait(py)?;
        turn.locate(index)?;
        Ok(turn.steps[index])
    }

    fn _set_steps(&self, py: Python<'_>, index: usize, steps: u64) -> PyResult<()> {
        let mut turn = self.contents.wait(py)?;
        turn.locate(index)?;
        turn.steps[index] = steps;
        Ok(())
    }

    /// The number of parameters over all groups.
    fn _count_parameters(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.contents.wait(py)?.params.len())
    }

    /// The greatest norm that all gradients together may have; None for no limit. Read at every
    /// step.
    #[getter(max_grad_norm)]
    fn get_max_grad_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        Ok(self.contents.wait(py)?.clipping.max_grad_norm)
    }

    #[setter(max_grad_norm)]
    fn set_max_grad_norm(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let max_grad_norm = max_grad_norm_of(value)?;
        self.contents.wait(py)?.clipping.max_grad_norm = max_grad_norm;
        Ok(())
    }

    /// What a step does with an infinite or NaN gradient: "propagate", "skip" or "raise".
    #[getter(nonfinite)]
    fn get_nonfinite(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(nonfinite_name(self.contents.wait(py)?.clipping.nonfinite))
    }

    #[setter(nonfinite)]
    fn set_nonfinite(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let nonfinite = nonfinite_of(value)?;
        self.contents.wait(py)?.clipping.nonfinite = nonfinite;
        Ok(())
    }

    /// The greatest number of threads of a step; None for as many as this process may use.
    #[getter(threads)]
    fn get_threads(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        Ok(self.contents.wait(py)?.threads)
    }

    #[setter(threads)]
    fn set_threads(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let (threads, allowed) = match value.is_none() {
            true => match threads_from_environment()? {
                Some(threads) => (None, usable(threads)),
                None => (None, default_threads()?),
            },
            false => threads_of(value).map(|threads| (Some(threads), usable(threads)))?,
        };
        let mut contents = self.contents.wait(py)?;
        (contents.threads, contents.allowed_threads) = (threads, allowed);
        Ok(())
    }

    /// The L2 norm over all gradients at the last step, before clipping, also if it was skipped;
    /// None without max_grad_norm.
    #[getter]
    fn last_grad_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        Ok(self.contents.wait(py)?.last_grad_norm)
    }

    /// How many steps were left out because of `nonfinite="skip"`.
    #[getter(skipped_steps)]
    fn get_skipped_steps(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.contents.wait(py)?.skipped_steps)
    }

    #[setter(skipped_steps)]
    fn set_skipped_steps(&self, py: Python<'_>, value: u64) -> PyResult<()> {
        self.contents.wait(py)?.skipped_steps = value;
        Ok(())
    }
}

pub(crate) fn max_grad_norm_of(value: &Bound<'_, PyAny>) -> PyResult<Option<f64>> {
    if value.is_none() {
        return Ok(None);
    }
    let wrong = |error| not_a_number(error, "max_grad_norm", "", value);
    let number: f64 = value.extract().map_err(wrong)?;
    if validate_max_grad_norm(number).is_err() {
        let found = value.repr()?;
        let message = format!("max_grad_norm: expected a number > 0, got {found}");
        return Err(PyValueError::new_err(message));
    }
    Ok(Some(number))
}

pub(crate) fn nonfinite_of(value: &Bound<'_, PyAny>) -> PyResult<Nonfinite> {
    Ok(match value.extract::<&str>() {
        Ok("propagate") => Nonfinite::Propagate,
        Ok("skip") => Nonfinite::Skip,
        Ok("raise") => Nonfinite::Raise,
        _ => {
            let found = value.repr()?;
            return Err(PyValueError::new_err(format!(
                "nonfinite: expected 'propagate', 'skip' or 'raise', got {found}"
            )));
        }
    })
}

pub(crate) fn nonfinite_name(nonfinite: Nonfinite) -> &'static str {
    match nonfinite {
        Nonfinite::Propagate => "propagate",
        Nonfinite::Skip => "skip",
        Nonfinite::Raise => "raise",
    }
}

pub(crate) fn threads_of(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let refuse =
        |wanted: &str| PyResult::Ok(format!("threads: expected {wanted}, got {}", value.repr()?));
    if !value.is_instance_of::<PyInt>() && !value.hasattr("__index__")? {
        return Err(PyTypeError::new_err(refuse("an integer or None")?));
    }
    match value.extract::<i64>().map(usize::try_from) {
        Ok(Ok(threads)) if threads >= 1 => Ok(threads),
        Ok(_) => Err(PyValueError::new_err(refuse("a number >= 1")?)),
        Err(_) => Err(PyValueError::new_err(
            "threads: expected a number >= 1, got an integer too large for one",
        )),
    }
}
