//! The Rust part of `rmsprop.torch.RMSprop`.

use pyo3::exceptions::{PyFloatingPointError, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::error::check_room;
use super::optimizer::{max_grad_norm_of, nonfinite_name, nonfinite_of, threads_of};
use super::options::{Change, Snapshot, TORCH_FLAGS, is_torch_config, torch_config_of};
use super::tensor::torch::{GroupPairs, Manner, Pair, Pins, Rows, Source, Torch, Unfit, takes};
use super::tensor::work::{ELSEWHERE, Gathered, culprit};
use super::turn::Turns;
use crate::config::Config;
use crate::kernel::dispatch::isa;
use crate::optimizer::{Clipping, Outcome, Verdict};
use crate::parallel::{threads_from_environment, usable};

/// Steps torch tensors; `rmsprop.torch.RMSprop` has one. From step to step it keeps what the dicts of
/// the groups hold, lists of parameters included, and small tensors, to compare; no address to read.
#[pyclass(frozen, module = "rmsprop._core")]
pub(crate) struct Stepper(Turns<Contents>);

struct Contents {
    clipping: Clipping,
    threads: Option<usize>,
    /// That many, or as many as this process may use; and those of `RMSPROP_NUM_THREADS`.
    allowed_threads: Option<usize>,
    default_threads: Option<usize>,
    last_grad_norm: Option<f64>,
    skipped_steps: u64,
    groups: Vec<Group>,
    /// Parameters that there was room for.
    room: usize,
    /// Kept from step to step so that a step allocates nothing.
    pairs: Vec<Pair>,
    rows: Rows,
}

/// A parameter group as last read.
struct Group {
    snapshot: Snapshot,
    params: Py<PyList>,
    config: Config,
    /// Its pairs.
    end: usize,
}

/// A group's dict and the tuples (index, p, g, v, m, b, step) of its parameters.
type Listed<'py> = (Bound<'py, PyDict>, Bound<'py, PyList>);

#[pymethods]
impl Stepper {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Stepper(Turns::new(Contents {
            clipping: Clipping::default(),
            threads: None,
            default_threads: threads_from_environment()?.map(usable),
            allowed_threads: None,
            last_grad_norm: None,
            skipped_steps: 0,
            groups: Vec::new(),
            room: 0,
            pairs: Vec::new(),
            rows: Rows::new(isa()?),
        })))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Locked means in use, and nothing in use is garbage.
        let Some(contents) = self.0.try_take() else {
            return Ok(());
        };
        contents.groups.iter().try_for_each(|group| {
            group.snapshot.traverse(&visit)?;
            visit.call(&group.params)
        })
    }

    fn __clear__(&self) {
        let groups = self
            .0
            .try_take()
            .map(|mut contents| std::mem::take(&mut contents.groups));
        // Dropping may run Python code, which may come back here.
        drop(groups);
    }

    /// The most elements of a tensor that is kept in mind from step to step.
    #[classattr]
    const SMALL: usize = Pins::SMALL;

    /// Steps every parameter of the groups that has a gradient; False, with nothing written, if
    /// something is not ordinary: no plain tensor of f32 or f64 in host memory, or without state.
    fn step(
        &self,
        py: Python<'_>,
        groups: &Bound<'_, PyAny>,
        state: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let (Ok(groups), Ok(state)) = (groups.cast::<PyList>(), state.cast::<PyDict>()) else {
            return Ok(false);
        };
        let torch = Torch::get(py)?;
        let mut turn = self.0.wait(py)?;
        let outcome = turn.step(torch, groups, state, None);
        turn.release(py);
        outcome
    }

    /// Steps one parameter if it has a gradient: that at `index` of the group at `place`. False as in
    /// `step`.
    fn step_one(
        &self,
        py: Python<'_>,
        groups: &Bound<'_, PyAny>,
        state: &Bound<'_, PyAny>,
        place: usize,
        index: usize,
    ) -> PyResult<bool> {
        let (Ok(groups), Ok(state)) = (groups.cast::<PyList>(), state.cast::<PyDict>()) else {
            return Ok(false);
        };
        let torch = Torch::get(py)?;
        let mut turn = self.0.wait(py)?;
        let outcome = turn.step(torch, groups, state, Some((place, index)));
        turn.release(py);
        outcome
    }

    /// Steps what is listed: for each group its dict and tuples (index, p, g, v, m, b, step) that
    /// `takes` took, with None for state that is not used. `gathered` is what all processes together
    /// found in the gradients: the sum of their squares, and whether one is not finite. False if the
    /// step was left out.
    #[pyo3(signature = (groups, gathered = None))]
    fn step_rows(
        &self,
        py: Python<'_>,
        groups: Vec<Listed<'_>>,
        gathered: Option<(f64, bool)>,
    ) -> PyResult<bool> {
        let gathered = gathered.map(|(squares, has_nonfinite)| Gathered {
            squares,
            has_nonfinite,
        });
        let torch = Torch::get(py)?;
        let mut turn = self.0.wait(py)?;
        let outcome = turn.step_rows(torch, py, &groups, gathered);
        turn.release(py);
        outcome
    }

    /// The sum of the squares of the listed gradients and whether one of them is not finite.
    fn measure(&self, py: Python<'_>, groups: Vec<Listed<'_>>) -> PyResult<(f64, bool)> {
        let torch = Torch::get(py)?;
        let mut turn = self.0.wait(py)?;
        let outcome = turn.measure(torch, &groups);
        turn.release(py);
        outcome
    }

    /// Which of the tuples (index, p, g, v, m, b, step) of a group the core can step.
    fn takes(
        &self,
        group: &Bound<'_, PyDict>,
        rows: Vec<Bound<'_, PyTuple>>,
    ) -> PyResult<Vec<bool>> {
        let config = torch_config_of(group, "")?;
        let torch = Torch::get(group.py())?;
        let takes = rows.iter().map(|row| takes(torch, &config, row));
        takes.collect()
    }

    /// A tensor with the elements of `values`, for state of a small tensor: autograd is told of all such
    /// state together, which for each tensor takes as long as its update.
    fn tell_together<'py>(&self, values: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = values.py();
        let torch = Torch::get(py)?;
        self.0.wait(py)?.rows.tell_together(torch, values)
    }

    /// A parameter's name in a message: "parameter 3 ('fc.weight')".
    #[staticmethod]
    fn name_in(groups: &Bound<'_, PyList>, index: usize) -> PyResult<String> {
        culprit_in(groups, "parameter", index)
    }

    /// Counts a step that was left out.
    fn skip(&self, py: Python<'_>) -> PyResult<()> {
        let mut turn = self.0.wait(py)?;
        turn.skipped_steps = turn.skipped_steps.saturating_add(1);
        Ok(())
    }

    #[getter(max_grad_norm)]
    fn get_max_grad_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        Ok(self.0.wait(py)?.clipping.max_grad_norm)
    }

    #[setter(max_grad_norm)]
    fn set_max_grad_norm(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let max_grad_norm = max_grad_norm_of(value)?;
        self.0.wait(py)?.clipping.max_grad_norm = max_grad_norm;
        Ok(())
    }

    #[getter(nonfinite)]
    fn get_nonfinite(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(nonfinite_name(self.0.wait(py)?.clipping.nonfinite))
    }

    #[setter(nonfinite)]
    fn set_nonfinite(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let nonfinite = nonfinite_of(value)?;
        self.0.wait(py)?.clipping.nonfinite = nonfinite;
        Ok(())
    }

    #[getter(threads)]
    fn get_threads(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        Ok(self.0.wait(py)?.threads)
    }

    #[setter(threads)]
    fn set_threads(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let threads = match value.is_none() {
            true => None,
            false => Some(threads_of(value)?),
        };
        let mut contents = self.0.wait(py)?;
        (contents.threads, contents.allowed_threads) = (threads, threads.map(usable));
        Ok(())
    }

    #[getter]
    fn last_grad_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        Ok(self.0.wait(py)?.last_grad_norm)
    }

    #[getter(skipped_steps)]
    fn get_skipped_steps(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.wait(py)?.skipped_steps)
    }

    #[setter(skipped_steps)]
    fn set_skipped_steps(&self, py: Python<'_>, value: u64) -> PyResult<()> {
        self.0.wait(py)?.skipped_steps = value;
        Ok(())
    }
}

impl Contents {
    fn manner(&self, gathered: Option<Gathered>) -> Manner {
        Manner {
            clipping: self.clipping,
            threads: self.allowed_threads.or(self.default_threads),
            gathered,
        }
    }

    /// Steps all parameters, or only one: the group's place, and its index there.
    fn step(
        &mut self,
        torch: &Torch,
        dicts: &Bound<'_, PyList>,
        state: &Bound<'_, PyDict>,
        only: Option<(usize, usize)>,
    ) -> PyResult<bool> {
        let manner = self.manner(None);
        self.pairs.clear();
        let is_ordinary = match only {
            None => self.collect(torch, dicts)?,
            Some(one) => self.collect_one(torch, dicts, one)?,
        };
        if !is_ordinary {
            return Ok(false);
        }
        let Contents {
            groups,
            pairs,
            rows,
            ..
        } = self;
        let groups = match only {
            None => &groups[..],
            Some((place, _)) => &groups[place..=place],
        };
        let source = Source::State(state);
        let groups = groups_of(groups, pairs);
        match rows.step(dicts.py(), torch, groups, &source, &manner) {
            Ok(verdict) => self.conclude(torch, dicts, &verdict).map(|()| true),
            Err(Unfit::Refused) => Ok(false),
            Err(Unfit::Python(error)) => Err(error),
        }
    }

    fn step_rows(
        &mut self,
        torch: &Torch,
        py: Python<'_>,
        listed: &[Listed<'_>],
        gathered: Option<Gathered>,
    ) -> PyResult<bool> {
        let tuples = self.take(listed)?;
        let manner = self.manner(gathered);
        let Contents {
            groups,
            pairs,
            rows,
            ..
        } = self;
        let source = Source::Tuples(&tuples);
        let groups = groups_of(groups, pairs);
        let verdict = rows.step(py, torch, groups, &source, &manner);
        let verdict = verdict.map_err(not_taken)?;
        let dicts = PyList::new(py, listed.iter().map(|(dict, _)| dict))?;
        self.conclude(torch, &dicts, &verdict)?;
        Ok(matches!(verdict.outcome, Outcome::Update { .. }))
    }

    fn measure(&mut self, torch: &Torch, listed: &[Listed<'_>]) -> PyResult<(f64, bool)> {
        let tuples = self.take(listed)?;
        let Contents {
            groups,
            pairs,
            rows,
            ..
        } = self;
        let source = Source::Tuples(&tuples);
        rows.measure(torch, groups_of(groups, pairs), &source)
            .map_err(not_taken)
    }

    /// That there is memory for what a step notes of so many parameters, most of it small.
    fn check_room(&mut self, count: usize) -> PyResult<()> {
        const BYTES_A_PARAMETER: usize = 3072;
        if count > self.room {
            check_room(count.saturating_mul(BYTES_A_PARAMETER))?;
            self.room = count;
        }
        Ok(())
    }

    /// Takes listed rows instead of what the groups hold. Their tuples in one sequence.
    fn take<'py>(&mut self, listed: &[Listed<'py>]) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        self.pairs.clear();
        self.groups.clear();
        self.check_room(listed.iter().map(|(_, rows)| rows.len()).sum())?;
        let mut tuples = Vec::new();
        for (k, (dict, rows)) in listed.iter().enumerate() {
            for row in rows {
                let row = row.cast_into::<PyTuple>()?;
                self.pairs.push(Pair {
                    index: row.get_item(0)?.extract()?,
                    p: row.get_item(1)?.unbind(),
                    g: row.get_item(2)?.unbind(),
                });
                tuples.push(row);
            }
            // Never current: the next ordinary step reads the group again.
            let mut snapshot = Snapshot::new(dict, true);
            snapshot.forget();
            self.groups.push(Group {
                snapshot,
                params: PyList::empty(dict.py()).unbind(),
                config: torch_config_of(dict, &format!(" of group {k}"))?,
                end: self.pairs.len(),
            });
        }
        Ok(tuples)
    }

    /// Reads the options as they are now, and the parameters and their gradients. False if something
    /// is not ordinary. May run Python code.
    fn collect(&mut self, torch: &Torch, dicts: &Bound<'_, PyList>) -> PyResult<bool> {
        let py = dicts.py();
        self.groups.truncate(dicts.len());
        let mut index = 0;
        for (k, dict) in dicts.iter().enumerate() {
            let Ok(dict) = dict.cast::<PyDict>() else {
                return Ok(false);
            };
            if !self.read_group(k, dict)? {
                return Ok(false);
            }
            let params = self.groups[k].params.clone_ref(py).into_bound(py);
            self.check_room(index + params.len())?;
            for p in params.iter() {
                if !self.collect_pair(torch, index, p)? {
                    return Ok(false);
                }
                index += 1;
            }
            self.groups[k].end = self.pairs.len();
        }
        Ok(self.groups.len() == dicts.len())
    }

    /// As `collect`, but only the parameter at `k` of the group at `place`.
    fn collect_one(
        &mut self,
        torch: &Torch,
        dicts: &Bound<'_, PyList>,
        (place, k): (usize, usize),
    ) -> PyResult<bool> {
        let py = dicts.py();
        // What was read of the groups before it may be old: each is compared when it is used.
        for place in place.min(self.groups.len())..=place {
            let dict = dicts.get_item(place)?;
            let Ok(dict) = dict.cast::<PyDict>() else {
                return Ok(false);
            };
            if !self.read_group(place, dict)? {
                return Ok(false);
            }
        }
        let params = |group: &Group| group.params.bind(py).clone();
        let before = self.groups[..place].iter().map(|group| params(group).len());
        let index = before.sum::<usize>() + k;
        let p = params(&self.groups[place]).get_item(k)?;
        let is_ordinary = self.collect_pair(torch, index, p)?;
        self.groups[place].end = self.pairs.len();
        Ok(is_ordinary)
    }

    /// Adds a parameter and its gradient, if it has one. False if something is not ordinary.
    #[inline]
    fn collect_pair(&mut self, torch: &Torch, index: usize, p: Bound<'_, PyAny>) -> PyResult<bool> {
        if !torch.is_plain(&p) {
            return Ok(false);
        }
        let g = torch.grad(&p)?;
        if !g.is_none() {
            if !torch.is_plain(&g) || torch.is_neg(&p)? || torch.is_neg(&g)? {
                return Ok(false);
            }
            self.pairs.push(Pair {
                index,
                p: p.unbind(),
                g: g.unbind(),
            });
        }
        Ok(true)
    }

    /// Reads the options of a group. False if it is not ordinary.
    fn read_group(&mut self, k: usize, dict: &Bound<'_, PyDict>) -> PyResult<bool> {
        if let Some(group) = self.groups.get_mut(k) {
            match group.snapshot.follow(dict, &mut group.config) {
                Change::None => return Ok(true),
                Change::Numbers if is_torch_config(&group.config) => return Ok(true),
                _ => {}
            }
        }
        self.reread_group(k, dict)
    }

    #[cold]
    fn reread_group(&mut self, k: usize, dict: &Bound<'_, PyDict>) -> PyResult<bool> {
        self.groups.truncate(k);
        // Indices may have changed.
        self.rows.unpin();
        let py = dict.py();
        let snapshot = Snapshot::new(dict, true);
        let config = torch_config_of(dict, &format!(" of group {k}"))?;
        for key in TORCH_FLAGS {
            let flag = dict.get_item(key)?;
            if flag.is_some_and(|flag| flag.is_truthy().unwrap_or(true)) {
                return Ok(false);
            }
        }
        let params = dict.get_item(intern!(py, "params"))?;
        let Some(Ok(params)) = params.map(|params| params.cast_into_exact::<PyList>()) else {
            return Ok(false);
        };
        self.groups.push(Group {
            snapshot,
            params: params.unbind(),
            config,
            end: 0,
        });
        Ok(true)
    }

    /// Draws the consequences of a step.
    fn conclude(
        &mut self,
        torch: &Torch,
        dicts: &Bound<'_, PyList>,
        verdict: &Verdict,
    ) -> PyResult<()> {
        let py = dicts.py();
        match verdict.outcome {
            Outcome::Update { .. } => {
                self.last_grad_norm = verdict.norm;
                self.rows.tell(py, torch)
            }
            Outcome::Skip => {
                self.skipped_steps = self.skipped_steps.saturating_add(1);
                self.last_grad_norm = verdict.norm;
                Ok(())
            }
            Outcome::Raise {
                index,
                element,
                found,
            } => {
                let culprit = match index {
                    ELSEWHERE => "a gradient of another process".to_owned(),
                    index => culprit_in(dicts, "gradient", index)?,
                };
                let found = found.to_string().to_lowercase();
                let place = match index {
                    ELSEWHERE => String::new(),
                    _ => format!(" at element {element}"),
                };
                Err(PyFloatingPointError::new_err(format!(
                    "{culprit}: expected finite values, got {found}{place}"
                )))
            }
        }
    }

    /// Lets go of what a step held.
    fn release(&mut self, py: Python<'_>) {
        for pair in self.pairs.drain(..) {
            // Bound, so that dropping the reference need not find out whether the GIL is held.
            drop((pair.p.into_bound(py), pair.g.into_bound(py)));
        }
        self.rows.release();
    }
}

/// The pairs by group.
fn groups_of<'g>(
    groups: &'g [Group],
    pairs: &'g [Pair],
) -> impl Iterator<Item = GroupPairs<'g>> + use<'g> {
    let mut start = 0;
    groups.iter().map(move |group| {
        let pairs = &pairs[start..group.end];
        start = group.end;
        GroupPairs {
            config: &group.config,
            pairs,
        }
    })
}

fn not_taken(unfit: Unfit) -> PyErr {
    match unfit {
        Unfit::Python(error) => error,
        Unfit::Refused => PyRuntimeError::new_err(
            "expected tensors that stay as they are during a step, got others",
        ),
    }
}

/// Names a parameter, or what belongs to it, by its index over all groups.
fn culprit_in(dicts: &Bound<'_, PyList>, what: &str, index: usize) -> PyResult<String> {
    let py = dicts.py();
    let mut place = index;
    for dict in dicts.iter() {
        let count = dict.get_item(intern!(py, "params"))?.len()?;
        if place < count {
            let names = dict.get_item(intern!(py, "param_names"));
            let name = names.and_then(|names| names.get_item(place)).ok();
            let name = name.map(|name| name.to_string());
            return Ok(culprit(what, index, name.as_deref()));
        }
        place -= count;
    }
    Ok(culprit(what, index, None))
}
