//! The torch front: the Rust part of `rmsprop.torch.RMSprop`.
//!
//! A step has the same four parts as that of arrays ([`arrays`](super::arrays)). It *collects* the
//! parameters and their gradients, and holds them. It *checks* them and the state in `opt.state`,
//! where nothing runs Python code. It *runs*, on torch's own threads. And it *concludes*: tells
//! autograd what was written.
//!
//! Nothing of torch's is held or addressed between steps. A tensor that is not ordinary is given back
//! before anything is written; Python says what is to be done with it (`rmsprop.fallback`), and the
//! step is tried again.

use std::collections::HashMap;

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit, intern};
use smallvec::SmallVec;

use super::error::{check_room, nonfinite};
use super::options::{
    Change, Front, GroupOptions, StepOptions, Values, culprit_in, is_left_to_torch,
};
use super::row::{self, Row};
use super::source::has_changed;
use super::step::{self, Crew};
use super::storage::{SCALE, Storage};
use super::torch_library::Torch;
use super::turn::Turns;
use super::view::{Element, Entries, Lent, Quiet, Refusal, View};
use crate::config::Config;
use crate::kernel::batch::{Batch, Work};
use crate::kernel::isa::isa;
use crate::kernel::rows::Rows;
use crate::kernel::{DType, Role};
use crate::optimizer::{ELSEWHERE, Gathered, Outcome, RuleCache, Verdict, code_of};
use crate::state::StateKey;
use crate::threads::{Threads, threads_from_environment};

/// Steps torch tensors; `rmsprop.torch.RMSprop` has one.
#[pyclass(extends = StepOptions, frozen, module = "rmsprop._core")]
pub(crate) struct Stepper(Turns<TensorSession>);

/// What one thread at a time works on.
struct TensorSession {
    /// What the dicts of the groups hold, lists of parameters included, to compare.
    groups: Vec<TensorGroup>,
    /// Kept from step to step so that a step allocates nothing; empty between steps.
    pairs: Vec<Pair>,
    tensors: Noted,
    batch: Batch,
    /// Parameters that there was room for.
    room: usize,
}

/// A parameter group as last read.
struct TensorGroup {
    options: GroupOptions,
    params: Py<PyList>,
    /// Torch's own flags leave it to torch.
    is_left: bool,
    /// Its pairs end here.
    end: usize,
}

/// A parameter that has a gradient.
struct Pair {
    /// The parameter's index over all groups.
    index: usize,
    p: Py<PyAny>,
    g: Py<PyAny>,
    state: StateAt,
    /// It has an average already, if it has any.
    has_ema: bool,
    /// Of a gradient of rows, whose values `g` then is.
    indices: Option<Vec<i64>>,
}

/// Where the state of a parameter is found.
enum StateAt {
    /// In `opt.state`, probably the next entry.
    Next,
    /// In this dict.
    Entry(Py<PyAny>),
}

/// What a step notes of its tensors besides the work.
#[derive(Default)]
struct Noted {
    counts: Vec<Count>,
    /// State that is written; and of a long step the tensors of the counts, of which autograd is not
    /// told.
    written: Vec<Py<PyAny>>,
    held: Vec<Py<PyAny>>,
}

/// What is to be stepped.
struct Wanted<'x, 'py> {
    groups: &'x Bound<'py, PyList>,
    state: &'x Bound<'py, PyDict>,
    /// Only one parameter: the place of its group, and its place there.
    only: Option<(usize, usize)>,
    /// Tuples (p, g, state, begins) to be used for parameters by index, or None for those that are none of ours.
    rows: Option<&'x Bound<'py, PyDict>>,
    /// Only those.
    is_rows_alone: bool,
}

/// Why nothing was done.
enum Unfit {
    /// Some parameters, by index, are not ordinary.
    Odd(Vec<usize>),
    Python(PyErr),
}

impl From<PyErr> for Unfit {
    fn from(error: PyErr) -> Self {
        Unfit::Python(error)
    }
}

#[pymethods]
impl Stepper {
    #[new]
    fn new() -> PyResult<PyClassInitializer<Self>> {
        let stepper = Stepper(Turns::new(TensorSession {
            groups: Vec::new(),
            pairs: Vec::new(),
            tensors: Noted::default(),
            batch: Batch::new(code_of(isa()?)?),
            room: 0,
        }));
        let options = StepOptions::new(threads_from_environment()?);
        Ok(PyClassInitializer::from(options).add_subclass(stepper))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Locked means in use, and nothing in use is garbage.
        let Some(contents) = self.0.try_take() else {
            return Ok(());
        };
        contents.groups.iter().try_for_each(|group| {
            group.options.traverse(&visit)?;
            visit.call(&group.params)
        })
    }

    fn __clear__(&self) {
        let contents = self.0.try_take();
        let groups = contents.map(|mut contents| std::mem::take(&mut contents.groups));
        // Dropping may run Python code, which may come back here.
        drop(groups);
    }

    /// Steps every parameter of the groups that has a gradient, or `only` that at (group, place).
    ///
    /// In place of what `state` has, `rows` gives tuples (p, g, state, begins) by the parameter's index,
    /// where the average may begin with this step, and None for a parameter that is left alone.
    /// `gathered` is what all processes together found in the gradients: the sum of their squares, and
    /// whether one is not finite.
    ///
    /// Returns whether there was a step (False if it was left out for `nonfinite`); or, with nothing
    /// written, a list of the indices of parameters that are not ordinary and not in `rows`: no plain
    /// tensors of floats or of complex numbers in host memory, without state, with a pending sign.
    #[pyo3(signature = (groups, state, only = None, rows = None, gathered = None))]
    fn step<'py>(
        slf: &Bound<'py, Self>,
        groups: &Bound<'py, PyList>,
        state: &Bound<'py, PyDict>,
        only: Option<(usize, usize)>,
        rows: Option<&Bound<'py, PyDict>>,
        gathered: Option<(f64, bool)>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let torch = Torch::get(py)?;
        let (this, options) = (slf.get(), slf.as_super().get());
        let wanted = Wanted {
            groups,
            state,
            only,
            rows,
            is_rows_alone: false,
        };
        let gathered = gathered.map(|(squares, has_nonfinite)| Gathered {
            squares,
            has_nonfinite,
        });
        let mut contents = this.0.wait(py)?;
        let values = options.values_of_step()?;
        let outcome = contents.step(torch, &wanted, &values, gathered);
        contents.release(py);
        drop(contents);
        let verdict = match outcome {
            Ok(verdict) => verdict,
            Err(Unfit::Odd(indices)) => return Ok(PyList::new(py, indices)?.into_any()),
            Err(Unfit::Python(error)) => return Err(error),
        };
        let is_skipped = matches!(verdict.outcome, Outcome::Skip);
        options.report(&values, verdict.norm, is_skipped);
        Ok((!is_skipped).into_pyobject(py)?.to_owned().into_any())
    }

    /// The sum of the squares of the gradients of `rows`, and whether one of them is not finite.
    fn measure(
        slf: &Bound<'_, Self>,
        groups: &Bound<'_, PyList>,
        rows: &Bound<'_, PyDict>,
    ) -> PyResult<(f64, bool)> {
        let (py, this) = (groups.py(), slf.get());
        let storage = slf.as_super().get().values().storage;
        let torch = Torch::get(py)?;
        let wanted = Wanted {
            groups,
            state: rows,
            only: None,
            rows: Some(rows),
            is_rows_alone: true,
        };
        let mut contents = this.0.wait(py)?;
        let outcome = contents.measure(torch, &wanted, &storage);
        contents.release(py);
        match outcome {
            Ok(found) => Ok(found),
            Err(Unfit::Odd(_)) => Err(has_changed("tensors")),
            Err(Unfit::Python(error)) => Err(error),
        }
    }

    /// Whether the core can step a tuple (p, g, state, begins) of a group.
    fn takes(
        slf: &Bound<'_, Self>,
        group: &Bound<'_, PyDict>,
        row: &Bound<'_, PyTuple>,
    ) -> PyResult<bool> {
        let py = group.py();
        let config = GroupOptions::read(Front::Torch, group, "")?.config;
        let storage = slf.as_super().get().values().storage;
        let torch = Torch::get(py)?;
        let Pair {
            p,
            g,
            state,
            indices,
            ..
        } = Pair::of_row(0, row)?;
        let StateAt::Entry(state) = state else {
            return Ok(false);
        };
        let tensors = state.bind(py).cast::<PyDict>()?.values().iter();
        for tensor in tensors.chain([p.bind(py).clone(), g.bind(py).clone()]) {
            if !torch.is_plain(&tensor) || torch.is_pending(&tensor)? {
                return Ok(false);
            }
        }
        Ok(Quiet::during(py, |quiet| {
            let [p, g, state] = [&p, &g, &state].map(|object| Lent::of(quiet, object));
            let entry = Entry::of_dict(quiet, state, &config, &storage).unwrap_or_default();
            let row = entry.row(quiet, torch, [p, g], indices.as_deref(), &config, &storage);
            entry.count(quiet, torch).is_some() && row.is_ok()
        }))
    }

    /// The name of the type that a key's array has for a parameter of a type and of so many elements;
    /// None if it has none.
    fn stored_dtype(
        slf: &Bound<'_, Self>,
        key: &str,
        dtype: &str,
        numel: usize,
    ) -> Option<&'static str> {
        let storage = slf.as_super().get().values().storage;
        let parameter = float_named(dtype)?;
        let stored = storage.dtype(StateKey::named(key)?, parameter, numel)?;
        Some(Element::real(stored).name())
    }

    /// ValueError for options of a group that do not go with how state is stored.
    fn check_storage(
        slf: &Bound<'_, Self>,
        group: &Bound<'_, PyDict>,
        place: &str,
    ) -> PyResult<()> {
        let config = GroupOptions::read(Front::Torch, group, place)?.config;
        slf.as_super()
            .get()
            .values()
            .storage
            .check_group(&config, place)
    }

    /// What is wanted instead of a parameter of that type, if its state cannot be stored as it should.
    fn refuses(slf: &Bound<'_, Self>, dtype: &str) -> Option<&'static str> {
        let storage = slf.as_super().get().values().storage;
        storage.check_parameter(float_named(dtype)?).err()
    }

    /// A parameter's name in a message: "parameter 3 ('fc.weight')".
    #[staticmethod]
    fn name_in(groups: &Bound<'_, PyList>, index: usize) -> PyResult<String> {
        culprit_in(groups, "parameter", index)
    }
}

fn float_named(name: &str) -> Option<DType> {
    let mut floats = [DType::F16, DType::BF16, DType::F32, DType::F64].into_iter();
    floats.find(|&float| Element::real(float).name() == name)
}

impl TensorSession {
    fn step(
        &mut self,
        torch: &Torch,
        wanted: &Wanted<'_, '_>,
        options: &Values,
        gathered: Option<Gathered>,
    ) -> Result<Verdict, Unfit> {
        let py = wanted.groups.py();
        self.collect(torch, wanted)?;
        let crew = Crew {
            allowed: options.threads().or_else(|| torch.thread_count(py)),
            lender: torch.threads(),
            // As in torch, tensors may share elements.
            is_apart: false,
        };
        let state = wanted.state.as_unbound();
        let (check, batch) = self.check(torch, &options.storage);
        let verdict = step::run(py, &crew, &options.clipping, gathered, |quiet| {
            let (work, counts) = check.all(quiet, batch.open(), Lent::of(quiet, state))?;
            Ok((work, || counts.iter().for_each(Count::increment)))
        });
        let verdict = verdict.map_err(Unfit::Odd)?;
        self.conclude(torch, wanted.groups, &verdict)?;
        Ok(verdict)
    }

    fn measure(
        &mut self,
        torch: &Torch,
        wanted: &Wanted<'_, '_>,
        storage: &Storage,
    ) -> Result<(f64, bool), Unfit> {
        let py = wanted.groups.py();
        self.collect(torch, wanted)?;
        let state = wanted.state.as_unbound();
        let (check, batch) = self.check(torch, storage);
        let found = Quiet::during(py, |quiet| {
            let (mut work, _) = check.all(quiet, batch.open(), Lent::of(quiet, state))?;
            let squares = work.sum_squares(&Threads::CALLER);
            let has_nonfinite = !squares.is_finite() && work.find_nonfinite().is_some();
            Ok((squares, has_nonfinite))
        });
        found.map_err(Unfit::Odd)
    }

    /// The check of what was collected, and what holds its work.
    fn check<'x>(
        &'x mut self,
        torch: &'x Torch,
        storage: &'x Storage,
    ) -> (TensorCheck<'x>, &'x mut Batch) {
        let check = TensorCheck {
            torch,
            groups: &self.groups,
            pairs: &self.pairs,
            tensors: &mut self.tensors,
            odd: Vec::new(),
            storage,
        };
        (check, &mut self.batch)
    }

    /// Reads the options as they are now, and takes the parameters and their gradients. May run
    /// Python code.
    fn collect(&mut self, torch: &Torch, wanted: &Wanted<'_, '_>) -> Result<(), Unfit> {
        let dicts = wanted.groups;
        let mut odd = Vec::new();
        self.groups.truncate(dicts.len());
        let mut index = 0;
        for (k, dict) in dicts.iter().enumerate() {
            let dict = dict.cast_into::<PyDict>().map_err(PyErr::from)?;
            self.read_group(k, &dict)?;
            let TensorGroup {
                params, is_left, ..
            } = &self.groups[k];
            let (params, is_left) = (params.bind(dict.py()).clone(), *is_left);
            let places = match wanted.only {
                None => 0..params.len(),
                Some((place, at)) if place == k => at..at + 1,
                Some(_) => 0..0,
            };
            self.check_room(index + params.len())?;
            for at in places {
                let index = index + at;
                let row = match wanted.rows {
                    Some(rows) => rows.get_item(index)?,
                    None => None,
                };
                match row {
                    Some(row) if row.is_none() => {}
                    Some(row) => self.pairs.push(Pair::of_row(index, &row)?),
                    None if wanted.is_rows_alone => {}
                    None => {
                        let p = params.get_item(at)?;
                        if is_left || !self.collect_pair(torch, index, p, wanted)? {
                            odd.push(index);
                        }
                    }
                }
            }
            index += params.len();
            self.groups[k].end = self.pairs.len();
        }
        if !odd.is_empty() {
            return Err(Unfit::Odd(odd));
        }
        Ok(())
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

    /// Adds a parameter and its gradient, if it has one. False if something is not ordinary.
    #[inline]
    fn collect_pair(
        &mut self,
        torch: &Torch,
        index: usize,
        p: Bound<'_, PyAny>,
        wanted: &Wanted<'_, '_>,
    ) -> PyResult<bool> {
        if !torch.is_plain(&p) || !torch.knows_signs() {
            return Ok(false);
        }
        let g = p.getattr(intern!(p.py(), "grad"))?;
        if g.is_none() {
            return Ok(true);
        }
        if !torch.is_plain(&g) {
            return Ok(false);
        }
        let state = match wanted.only {
            None => StateAt::Next,
            // The walk would begin at the first for each.
            Some(_) => match wanted.state.get_item(&p)? {
                Some(entry) => StateAt::Entry(entry.unbind()),
                None => return Ok(false),
            },
        };
        self.pairs.push(Pair {
            index,
            p: p.unbind(),
            g: g.unbind(),
            state,
            has_ema: true,
            indices: None,
        });
        Ok(true)
    }

    /// Reads the options of a group.
    fn read_group(&mut self, k: usize, dict: &Bound<'_, PyDict>) -> PyResult<()> {
        if let Some(group) = self.groups.get_mut(k)
            && group.options.follow(Front::Torch, dict) != Change::Other
        {
            return Ok(());
        }
        self.reread_group(k, dict)
    }

    #[cold]
    fn reread_group(&mut self, k: usize, dict: &Bound<'_, PyDict>) -> PyResult<()> {
        self.groups.truncate(k);
        let options = GroupOptions::read(Front::Torch, dict, &format!(" of group {k}"))?;
        let params = dict.as_any().get_item(intern!(dict.py(), "params"))?;
        self.groups.push(TensorGroup {
            options,
            params: params.cast_into::<PyList>()?.unbind(),
            is_left: is_left_to_torch(dict)?,
            end: 0,
        });
        Ok(())
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
            Outcome::Update => {
                for (index, group) in self.groups.iter().enumerate() {
                    group.options.note_initial_lr(dicts, index)?;
                }
                let written = &mut self.tensors.written;
                written.extend(self.pairs.drain(..).map(|pair| pair.p));
                torch.increment_version(py, written.drain(..))
            }
            Outcome::Skip => Ok(()),
            Outcome::Raise {
                index: ELSEWHERE,
                found,
                ..
            } => Err(nonfinite("a gradient of another process", found, None)),
            Outcome::Raise {
                index,
                element,
                found,
            } => {
                let culprit = culprit_in(dicts, "gradient", index)?;
                Err(nonfinite(&culprit, found, Some(element)))
            }
        }
    }

    /// Lets go of what a step held.
    fn release(&mut self, py: Python<'_>) {
        for pair in self.pairs.drain(..) {
            // Bound, so that dropping the reference need not find out whether the GIL is held.
            drop((pair.p.into_bound(py), pair.g.into_bound(py)));
        }
        self.tensors.release(py);
    }
}

impl Noted {
    fn release(&mut self, py: Python<'_>) {
        self.counts.clear();
        for tensor in self.written.drain(..).chain(self.held.drain(..)) {
            drop(tensor.into_bound(py));
        }
    }
}

impl Pair {
    fn of_row(index: usize, row: &Bound<'_, PyAny>) -> PyResult<Self> {
        let row = row.cast::<PyTuple>()?;
        let (g, indices) = match row.get_item(1)?.cast_into::<PyTuple>() {
            Ok(rows) => {
                let indices: PyReadonlyArray1<'_, i64> = rows.get_item(0)?.extract()?;
                (rows.get_item(1)?, Some(indices.as_array().to_vec()))
            }
            Err(error) => (error.into_inner(), None),
        };
        Ok(Pair {
            index,
            indices,
            p: row.get_item(0)?.unbind(),
            g: g.unbind(),
            state: StateAt::Entry(row.get_item(2)?.unbind()),
            has_ema: !row.get_item(3)?.is_truthy()?,
        })
    }
}

/// The second part of a step: looks at all tensors as they are now, and makes them work for the
/// kernel. Nothing is written.
struct TensorCheck<'x> {
    torch: &'x Torch,
    groups: &'x [TensorGroup],
    pairs: &'x [Pair],
    tensors: &'x mut Noted,
    /// The indices of parameters that are not ordinary.
    odd: Vec<usize>,
    storage: &'x Storage,
}

impl<'x> TensorCheck<'x> {
    /// All pairs. Gives back the work, and what it is to count up.
    ///
    /// # Errors
    /// The indices of parameters that are not ordinary.
    fn all<'w, 'q>(
        mut self,
        quiet: &'q Quiet<'_>,
        mut work: Work<'w, 'w>,
        state: Lent<'q>,
    ) -> Result<(Work<'w, 'w>, &'x [Count]), Vec<usize>> {
        let mut walk = StateWalk::new(quiet, state);
        // The tensors of the counts, which only the dicts hold.
        let mut steps: SmallVec<[Lent<'_>; 32]> = SmallVec::new();
        let mut start = 0;
        for group in self.groups {
            let mut rules = RuleCache::default();
            let (config, storage) = (&group.options.config, self.storage);
            for k in start..group.end.max(start) {
                let pair = &self.pairs[k];
                let entry = match &pair.state {
                    StateAt::Next => walk.find(quiet, Lent::of(quiet, &pair.p), config, storage),
                    StateAt::Entry(entry) => {
                        Entry::of_dict(quiet, Lent::of(quiet, entry), config, storage)
                    }
                };
                steps.extend(entry.and_then(|entry| entry.step));
                self.pair(quiet, &mut work, k, entry, config, &mut rules);
            }
            start = group.end.max(start);
        }
        if !self.odd.is_empty() {
            return Err(self.odd);
        }
        if step::is_long(&work) {
            let held = steps.iter().map(|step| step.hold(quiet));
            self.tensors.held.extend(held);
        }
        let tensors: &'x Noted = self.tensors;
        Ok((work, &tensors.counts))
    }

    #[inline]
    #[allow(unsafe_code)]
    fn pair(
        &mut self,
        quiet: &Quiet<'_>,
        work: &mut Work<'_, '_>,
        k: usize,
        entry: Option<Entry<'_>>,
        config: &Config,
        rules: &mut RuleCache,
    ) {
        let pair = &self.pairs[k];
        let (p, g) = (Lent::of(quiet, &pair.p), Lent::of(quiet, &pair.g));
        let entry = entry.unwrap_or_default();
        let indices = pair.indices.as_deref();
        let row = entry.row(quiet, self.torch, [p, g], indices, config, self.storage);
        let Ok((row, rows)) = row else {
            return self.odd.push(pair.index);
        };
        let Some(count) = entry.count(quiet, self.torch) else {
            return self.odd.push(pair.index);
        };
        let steps = count.read() as u64;
        let rule = rules.get(work, row.dtype, config, steps, pair.has_ema);
        let noise = self.storage.noise(steps.saturating_add(1));
        // SAFETY: references to the tensors are held until the work is done, and to those of the counts
        // if that takes long; else nobody changes the dicts that hold them. Rows may share
        // elements with each other, which is why they are updated by the caller alone unless
        // `Work::is_apart`.
        unsafe { row.push(work, pair.index, rule, noise, rows) };
        let Noted {
            counts, written, ..
        } = &mut *self.tensors;
        counts.push(count);
        for key in StateKey::EVERY {
            let is_used = key == StateKey::ErrorBits || key.is_used(config);
            let both = [entry.arrays[key as usize], entry.scales[key as usize]];
            let arrays = both.into_iter().flatten().filter(|_| is_used);
            written.extend(arrays.map(|array| array.hold(quiet)));
        }
    }
}

/// A count of updates: a tensor with one element.
#[derive(Clone, Copy)]
struct Count {
    data: usize,
    dtype: DType,
}

impl Count {
    #[inline]
    fn new(view: &View<'_>) -> Option<Self> {
        let is_one = view.shape.iter().all(|&len| len == 1);
        let is_fit = is_one && view.is_aligned && !view.element.is_complex;
        (is_fit && view.element.is_compute_type()).then_some(Count {
            data: view.data,
            dtype: view.element.dtype,
        })
    }

    #[inline]
    #[allow(unsafe_code)]
    fn read(self) -> f64 {
        // SAFETY: `new` found an aligned element of this type there, and its tensor is held or left
        // alone until the step is over: a count is made in `TensorCheck::pair` and used before that ends,
        // and once more after the run, before any Python code runs or while it is held.
        unsafe {
            match self.dtype {
                DType::F64 => *(self.data as *const f64),
                _ => f64::from(*(self.data as *const f32)),
            }
        }
    }

    #[inline]
    #[allow(unsafe_code)]
    fn increment(&self) {
        // SAFETY: as in `read`.
        unsafe {
            match self.dtype {
                DType::F64 => *(self.data as *mut f64) += 1.0,
                _ => *(self.data as *mut f32) += 1.0,
            }
        }
    }
}

/// The state of a parameter, lent.
#[derive(Clone, Copy, Default)]
struct Entry<'q> {
    step: Option<Lent<'q>>,
    /// By [`StateKey`].
    arrays: [Option<Lent<'q>>; StateKey::COUNT],
    /// Of those that are codes.
    scales: [Option<Lent<'q>>; StateKey::COUNT],
}

impl<'q> Entry<'q> {
    /// Reads the dict of one parameter, until all that is used was found.
    #[inline]
    fn of_dict(
        quiet: &'q Quiet<'_>,
        dict: Lent<'q>,
        config: &Config,
        storage: &Storage,
    ) -> Option<Self> {
        let mut entry = Entry::default();
        for (key, value) in dict.entries(quiet)? {
            if let Some(place) = entry.place(quiet, key) {
                *place = Some(value);
                if storage.is_plain() && entry.is_complete(config) {
                    break;
                }
            }
        }
        Some(entry)
    }

    /// What is stepped of a parameter and its gradient with this state.
    #[inline(always)]
    fn row(
        &self,
        quiet: &'q Quiet<'_>,
        torch: &Torch,
        [p, g]: [Lent<'q>; 2],
        indices: Option<&[i64]>,
        config: &Config,
        storage: &Storage,
    ) -> Result<(Row, Option<Rows>), (Role, Refusal)> {
        let read = |role| torch.view(quiet, self.tensor([p, g], role)?);
        let read_scales = |role: Role| {
            let scales = role.state_key().and_then(|key| self.scales[key as usize]);
            torch.view(quiet, scales.ok_or(Refusal::NotAnArray)?)
        };
        let mut uses = Role::used(config);
        if storage.has_error_bits() {
            let p = read(Role::Parameter).map_err(|refusal| (Role::Parameter, refusal))?;
            uses[Role::ErrorBits as usize] = p.element == Element::real(DType::BF16);
        }
        let mut rows = None;
        if let Some(indices) = indices {
            uses[Role::Gradient as usize] = false;
            rows = Some(self.rows(quiet, torch, [p, g], indices, config)?);
        }
        let row = row::check(uses, storage.rounding, read, read_scales)?;
        Ok((row, rows))
    }

    /// The rows that have a gradient. (What is wrong with one Python has found before.)
    #[cold]
    fn rows(
        &self,
        quiet: &'q Quiet<'_>,
        torch: &Torch,
        [p, g]: [Lent<'q>; 2],
        indices: &[i64],
        config: &Config,
    ) -> Result<Rows, (Role, Refusal)> {
        let refuse = |refusal| (Role::Gradient, refusal);
        let (p, values) = (torch.view(quiet, p), torch.view(quiet, g));
        let (p, values) = (p.map_err(refuse)?, values.map_err(refuse)?);
        let is_coarse = |key: StateKey| key.is_used(config) && self.scales[key as usize].is_some();
        if p.element.is_complex || StateKey::EVERY.into_iter().any(is_coarse) {
            return Err(refuse(Refusal::DType));
        }
        let compute = p.element.dtype.compute();
        let rows = row::rows_of(p.shape, compute, indices, &values);
        rows.map_err(|_| refuse(Refusal::Unlike))
    }

    /// The tensor of a role.
    #[inline(always)]
    fn tensor(&self, [p, g]: [Lent<'q>; 2], role: Role) -> Result<Lent<'q>, Refusal> {
        let tensor = match (role, role.state_key()) {
            (Role::Parameter, _) => Some(p),
            (_, None) => Some(g),
            (_, Some(key)) => self.arrays[key as usize],
        };
        tensor.ok_or(Refusal::NotAnArray)
    }

    /// Reads the count of updates; None if it is none.
    #[inline(always)]
    fn count(&self, quiet: &'q Quiet<'_>, torch: &Torch) -> Option<Count> {
        match torch.view(quiet, self.step?) {
            Ok(view) => Count::new(&view),
            Err(_) => None,
        }
    }

    #[inline]
    fn is_complete(&self, config: &Config) -> bool {
        let is_there = |key: StateKey| self.arrays[key as usize].is_some() || !key.is_used(config);
        self.step.is_some() && StateKey::EVERY.into_iter().all(is_there)
    }

    /// Where the value of a key goes.
    #[inline]
    fn place(&mut self, quiet: &Quiet<'_>, key: Lent<'_>) -> Option<&mut Option<Lent<'q>>> {
        let py = quiet.py();
        let names = [
            intern!(py, "square_avg"),
            intern!(py, "grad_avg"),
            intern!(py, "momentum_buffer"),
            intern!(py, "ema"),
            intern!(py, "error_bits"),
            intern!(py, "step"),
        ];
        let found = names.iter().position(|name| name.as_ptr() == key.as_ptr());
        // A checkpoint's strings are equal, not the same.
        let is_equal =
            |name: &Bound<'_, PyString>| name.to_str().is_ok_and(|name| key.is_string(quiet, name));
        let found = found.or_else(|| names.iter().position(|name| is_equal(name)));
        match found {
            Some(StateKey::COUNT) => Some(&mut self.step),
            Some(k) => Some(&mut self.arrays[k]),
            None => {
                let key = key.hold(quiet).into_bound(py).extract::<String>().ok()?;
                let key = StateKey::named(key.strip_suffix(SCALE)?)?;
                Some(&mut self.scales[key as usize])
            }
        }
    }
}

/// Finds the state of one parameter after another.
///
/// Hashing a tensor runs Python code and takes longer than a step. But state is created in the order
/// of the parameters, so as a rule the next one's is the next entry; and where it is not, tensors are
/// the same key only if they are the same object.
struct StateWalk<'q> {
    walk: Option<Entries<'q>>,
    state: Lent<'q>,
    /// By the parameter's address, once the order was found to be another.
    places: Option<HashMap<usize, Lent<'q>>>,
}

impl<'q> StateWalk<'q> {
    fn new(quiet: &'q Quiet<'_>, state: Lent<'q>) -> Self {
        StateWalk {
            walk: state.entries(quiet),
            state,
            places: None,
        }
    }

    #[inline]
    fn find(
        &mut self,
        quiet: &'q Quiet<'_>,
        parameter: Lent<'_>,
        config: &Config,
        storage: &Storage,
    ) -> Option<Entry<'q>> {
        let is_it = |(key, _): &(Lent<'_>, Lent<'_>)| key.as_ptr() == parameter.as_ptr();
        let found = match &self.places {
            None => self.walk.as_mut()?.find(is_it).map(|(_, value)| value),
            Some(places) => Some(*places.get(&(parameter.as_ptr() as usize))?),
        };
        let found = match found {
            Some(found) => found,
            None => self.search(quiet, parameter)?,
        };
        Entry::of_dict(quiet, found, config, storage)
    }

    #[cold]
    fn search(&mut self, quiet: &'q Quiet<'_>, parameter: Lent<'_>) -> Option<Lent<'q>> {
        let entries = self.state.entries(quiet)?;
        let places = entries.map(|(key, value)| (key.as_ptr() as usize, value));
        let places = self.places.insert(places.collect());
        places.get(&(parameter.as_ptr() as usize)).copied()
    }
}
