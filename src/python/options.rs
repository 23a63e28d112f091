//! The options of a parameter group, read from its dict at every step, and those of an optimizer.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyTuple};
use pyo3::{PyTraverseError, PyVisit, intern};
use smallvec::SmallVec;

use super::storage::Storage;
use super::swap::{Pair, swap};
use super::view::{Lent, Quiet, class_name};
use crate::config::{Config, Field, INITIAL_LR, Nonfinite, OPTIONS, validate_max_grad_norm};
use crate::error::Error;
use crate::optimizer::Clipping;

/// An option of a group that is not the rule's.
pub(crate) const CONTIGUOUS: &str = "contiguous_params";

/// Flags of torch's that hand a group over to torch.
const TORCH_FLAGS: [&str; 2] = ["capturable", "differentiable"];

/// Options that belong to the optimizer, not to a group.
const OPTIMIZER_OPTIONS: [&str; 7] = [
    "max_grad_norm",
    "nonfinite",
    "threads",
    "state_dtype",
    "rounding",
    "master_weight_bits",
    "seed",
];

/// Whose options a dict has: ours, which are all there and in range, or torch's, of which torch
/// checks its own, and ours may be missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    Arrays,
    Torch,
}

/// Names, and whether torch's RMSprop has them, of all options of a group.
pub(crate) fn table(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
    let rows = OPTIONS.iter().map(|option| (option.name, option.is_torchs));
    let rows: Vec<_> = rows.chain([(CONTIGUOUS, false)]).collect();
    PyTuple::new(py, rows)
}

/// What other frameworks call an option.
const ALIASES: [(&str, &str); 4] = [
    ("learning_rate", "lr"),
    ("rho", "alpha"),
    ("decay", "alpha"),
    ("epsilon", "eps"),
];

/// The option that was meant by a key that is none: another framework's name for it, or one letter
/// away.
pub(crate) fn meant_by(key: &str) -> Option<&'static str> {
    let options = OPTIONS.iter().map(|option| option.name);
    let mut names = options.chain([CONTIGUOUS]).chain(OPTIMIZER_OPTIONS);
    if names.clone().any(|name| name == key) {
        return None;
    }
    let alias = ALIASES.iter().find(|alias| alias.0 == key);
    alias.map_or_else(
        || names.find(|name| is_one_letter_away(name.as_bytes(), key.as_bytes())),
        |alias| Some(alias.1),
    )
}

/// Whether one letter is missing, another, or exchanged with the next.
fn is_one_letter_away(mut a: &[u8], mut b: &[u8]) -> bool {
    while let ([x, rest_a @ ..], [y, rest_b @ ..]) = (a, b)
        && x == y
    {
        (a, b) = (rest_a, rest_b);
    }
    while let ([rest_a @ .., x], [rest_b @ .., y]) = (a, b)
        && x == y
    {
        (a, b) = (rest_a, rest_b);
    }
    matches!((a, b), (&[x, y], &[u, v]) if (x, y) == (v, u)) || a.len().max(b.len()) == 1
}

/// The options that a dialect fixes, as keyword arguments.
pub(crate) fn dialect_options(py: Python<'_>, mut config: Config) -> PyResult<Bound<'_, PyDict>> {
    let options = PyDict::new(py);
    for option in OPTIONS.iter().filter(|option| option.is_of_dialect) {
        match option.field {
            Field::Number(field, _) => options.set_item(option.name, *field(&mut config))?,
            Field::Optional(field, _) => options.set_item(option.name, *field(&mut config))?,
            Field::Flag(field, _) => options.set_item(option.name, *field(&mut config))?,
        }
    }
    Ok(options)
}

/// Reads the options of a dict and checks their ranges. `place` is " of group 0", or nothing.
pub(crate) fn read_options(
    front: Front,
    options: &Bound<'_, PyDict>,
    place: &str,
) -> PyResult<Config> {
    let is_torch = front == Front::Torch;
    let get = |key: &str, is_torchs: bool| match options.get_item(key)? {
        None if !is_torch || is_torchs => Err(PyValueError::new_err(format!(
            "{key}{place}: expected a value, got none"
        ))),
        value => Ok(value),
    };
    let flag = |key: &str, is_torchs: bool, value: Bound<'_, PyAny>| match value.extract::<bool>() {
        Ok(flag) => Ok(flag),
        Err(_) if value.is_instance_of::<PyInt>() => value.is_truthy(),
        // torch's own flags are whatever is true.
        Err(_) if is_torch && is_torchs => value.is_truthy(),
        Err(_) => Err(wrong_type(key, place, "a bool", &value)),
    };
    let number = |key: &str, value: &Bound<'_, PyAny>| {
        number_of(value).map_err(|error| not_a_number(error, key, place, value))
    };
    // Where an option of ours is left out, torch's formula is meant.
    let mut config = Config::torch();
    for option in OPTIONS {
        let Some(value) = get(option.name, option.is_torchs)? else {
            continue;
        };
        match option.field {
            Field::Number(field, _) => *field(&mut config) = number(option.name, &value)?,
            Field::Optional(field, _) if value.is_none() => *field(&mut config) = None,
            Field::Optional(field, _) => *field(&mut config) = Some(number(option.name, &value)?),
            Field::Flag(field, _) => {
                *field(&mut config) = flag(option.name, option.is_torchs, value)?;
            }
        }
    }
    // A scheduler's key, which need not be there.
    if config.corrected_weight_decay
        && let Some(value) = options.get_item(INITIAL_LR.name)?
    {
        config.initial_lr = Some(number(INITIAL_LR.name, &value)?);
    }
    if let Some(value) = get(CONTIGUOUS, false)? {
        flag(CONTIGUOUS, false, value)?;
    }
    for key in OPTIMIZER_OPTIONS {
        if options.contains(key)? {
            let found = format!(
                "{key}{place}: expected it as an argument of the optimizer, got it in a group"
            );
            return Err(PyValueError::new_err(found));
        }
    }
    // Other keys are the user's; in torch's groups, any are.
    for key in options.keys().iter().filter(|_| !is_torch) {
        if let Ok(key) = key.extract::<&str>()
            && let Some(meant) = meant_by(key)
        {
            let message = format!("{key}{place}: expected the key {meant}, got {key}");
            return Err(PyValueError::new_err(message));
        }
    }
    match check_ranges(front, &config) {
        Err(Error::Hyperparameter { key, expected, .. }) => {
            let found = options.get_item(key)?;
            let found = found.map_or(Ok(String::new()), |found| {
                found.repr().map(|found| found.to_string())
            })?;
            Err(PyValueError::new_err(format!(
                "{key}{place}: expected {expected}, got {found}"
            )))
        }
        result => result.map(|()| config).map_err(PyErr::from),
    }
}

/// Of torch's own options the range is torch's constructor's, but for what ours ask of them.
fn check_ranges(front: Front, config: &Config) -> Result<(), Error> {
    let mut config = config.clone();
    let is_checked = |name: &str, is_torchs: bool| {
        front == Front::Arrays || !is_torchs || name == "alpha" && config.bias_correction
    };
    let options = OPTIONS.iter();
    let checked: SmallVec<[_; 16]> = options
        .filter(|option| is_checked(option.name, option.is_torchs))
        .collect();
    let mut checked = checked.into_iter().chain([&INITIAL_LR]);
    checked.try_for_each(|option| option.check(&mut config))
}

/// The value of a number, or of a tensor with one element.
fn number_of(value: &Bound<'_, PyAny>) -> PyResult<f64> {
    // `float` of a tensor that requires a gradient warns; `item` does not, nor does torch's step.
    match value.getattr_opt(intern!(value.py(), "item"))? {
        Some(item) if !value.is_instance_of::<PyFloat>() => item.call0()?.extract(),
        _ => value.extract(),
    }
}

/// The error for a value that is no number, or no f64.
fn not_a_number(error: PyErr, key: &str, place: &str, value: &Bound<'_, PyAny>) -> PyErr {
    if error.is_instance_of::<PyTypeError>(value.py()) {
        return wrong_type(key, place, "a number", value);
    }
    if error.is_instance_of::<PyOverflowError>(value.py()) {
        return PyValueError::new_err(format!(
            "{key}{place}: expected a finite number, got an integer too large for one"
        ));
    }
    error
}

fn wrong_type(key: &str, place: &str, wanted: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let class = class_name(value);
    let value = value
        .repr()
        .map_or_else(|_| String::new(), |repr| format!(" {repr}"));
    PyTypeError::new_err(format!(
        "{key}{place}: expected {wanted}, got {class}{value}"
    ))
}

/// The options of a group as last read, and the entries of the dict that they were read from, so
/// that an unchanged dict costs a comparison of references, and one with another lr not much more.
/// (Reading all options takes as long as a step of a small net.)
pub(crate) struct GroupOptions {
    pub config: Config,
    /// Keys and values, in the dict's order.
    entries: Vec<(Py<PyAny>, Py<PyAny>)>,
    /// The index in [`OPTIONS`] of each entry that is a number.
    numbers: Vec<Option<usize>>,
    /// The places of the numbers that can change in place (a tensor), read anew each time.
    live: Vec<usize>,
    /// Some other option can: everything must be read anew.
    is_stale: bool,
}

/// What has become of the options since they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    /// Of numbers, which were taken over and are in range.
    Numbers,
    /// Of something else, or it is still to be found out: the group must be read anew.
    Other,
}

impl GroupOptions {
    /// Reads a dict. `place` is " of group 0".
    ///
    /// # Errors
    /// TypeError or ValueError names the first bad option.
    pub fn read(front: Front, group: &Bound<'_, PyDict>, place: &str) -> PyResult<Self> {
        // A copy first: what is asked of the entries may run Python code.
        let entries: Vec<_> = group.iter().collect();
        let (mut numbers, mut live) = (Vec::new(), Vec::new());
        let (mut is_stale, mut is_initial_lr_live) = (false, false);
        for (k, (key, value)) in entries.iter().enumerate() {
            let key = key.extract::<String>().unwrap_or_default();
            let option = OPTIONS.iter().position(|option| option.name == key);
            let is_number = |&k: &usize| !matches!(OPTIONS[k].field, Field::Flag(..));
            let number = option.filter(is_number);
            numbers.push(number);
            let is_float = value.is_exact_instance_of::<PyFloat>();
            let is_constant = value.is_exact_instance_of::<PyInt>()
                || value.is_exact_instance_of::<PyBool>()
                || value.is_none();
            if is_constant || number.is_some() && is_float {
                continue;
            }
            if number.is_some() {
                live.push(k);
                continue;
            }
            // Other keys (names) are not read here, so what they hold may change.
            is_stale |= match key.as_str() {
                // Torch's list is looked at item by item.
                "params" => front == Front::Arrays && !value.is_exact_instance_of::<PyTuple>(),
                key if key == INITIAL_LR.name => {
                    is_initial_lr_live = !is_float;
                    false
                }
                key => option.is_some() || key == CONTIGUOUS || TORCH_FLAGS.contains(&key),
            };
        }
        let config = read_options(front, group, place)?;
        is_stale |= is_initial_lr_live && config.corrected_weight_decay;
        let unbind =
            |(key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)| (key.unbind(), value.unbind());
        Ok(GroupOptions {
            config,
            entries: entries.into_iter().map(unbind).collect(),
            numbers,
            live,
            is_stale,
        })
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.entries.iter().try_for_each(|(key, value)| {
            visit.call(key)?;
            visit.call(value)
        })
    }

    /// Notes the lr of the first step with `corrected_weight_decay` in the dict, where no scheduler
    /// has. (Not earlier: schedulers would take it for theirs.)
    #[inline]
    pub fn note_initial_lr(&self, groups: &Bound<'_, PyList>, index: usize) -> PyResult<()> {
        if self.config.corrected_weight_decay && self.config.initial_lr.is_none() {
            groups
                .get_item(index)?
                .set_item(INITIAL_LR.name, self.config.lr)?;
        }
        Ok(())
    }

    /// Makes the next look read everything anew.
    pub fn forget(&mut self) {
        self.is_stale = true;
    }

    /// Takes over the numbers that have changed since the dict was read. Runs Python code only for
    /// one that is no float or int.
    #[inline]
    pub fn follow(&mut self, front: Front, group: &Bound<'_, PyDict>) -> Change {
        if self.is_stale {
            return Change::Other;
        }
        let py = group.py();
        let (entries, dict) = (&mut self.entries, group.as_unbound());
        let moved = Quiet::during(py, |quiet| follow_entries(quiet, entries, dict));
        let Some(moved) = moved else {
            return Change::Other;
        };
        if moved.is_empty() && self.live.is_empty() {
            return Change::None;
        }
        self.take(py, front, &moved)
    }

    #[cold]
    fn take(&mut self, py: Python<'_>, front: Front, moved: &Moved) -> Change {
        let is_option = |&(place, _): &(usize, f64)| self.numbers[place].is_some();
        if self.config.corrected_weight_decay && !moved.iter().all(is_option) {
            return Change::Other; // It may be `initial_lr`.
        }
        let old = self.config.clone();
        let mut set = |place: usize, new: f64| {
            match self.numbers[place].map(|k| OPTIONS[k].field) {
                Some(Field::Number(field, _)) => *field(&mut self.config) = new,
                Some(Field::Optional(field, _)) => *field(&mut self.config) = Some(new),
                // Another float that is no option changes nothing.
                Some(Field::Flag(..)) | None => {}
            }
        };
        moved.iter().for_each(|&(place, new)| set(place, new));
        for &place in &self.live {
            match number_of(self.entries[place].1.bind(py)) {
                Ok(new) => set(place, new),
                Err(_) => self.is_stale = true,
            }
        }
        // Momentum that is switched on needs state.
        let has_switched = (old.momentum > 0.0) != (self.config.momentum > 0.0);
        self.is_stale |= has_switched || check_ranges(front, &self.config).is_err();
        match () {
            _ if self.is_stale => {
                // As it was, until it was read anew.
                self.config = old;
                Change::Other
            }
            _ if old == self.config => Change::None,
            _ => Change::Numbers,
        }
    }
}

/// Entries whose value is another float now: the place, the number.
type Moved = SmallVec<[(usize, f64); 2]>;

/// Compares a dict with what it held by the identity of keys and values, and takes note of other
/// floats. None if anything else is different.
#[inline]
fn follow_entries(
    quiet: &Quiet<'_>,
    entries: &mut [(Py<PyAny>, Py<PyAny>)],
    dict: &Py<PyDict>,
) -> Option<Moved> {
    let mut moved = Moved::new();
    let mut found = Lent::of(quiet, dict).entries(quiet)?;
    for (place, (known_key, known_value)) in entries.iter_mut().enumerate() {
        let (key, value) = found.next()?;
        if known_key.as_ptr() != key.as_ptr() {
            return None;
        }
        if known_value.as_ptr() != value.as_ptr() {
            let number = value.float(quiet)?;
            Lent::of(quiet, known_value).float(quiet)?;
            *known_value = value.hold(quiet);
            moved.push((place, number));
        }
    }
    found.next().is_none().then_some(moved)
}

/// Whether the group wants its parameters in flat buffers.
pub(crate) fn is_contiguous(dict: &Bound<'_, PyDict>) -> PyResult<bool> {
    dict.get_item(CONTIGUOUS)?
        .map_or(Ok(false), |value| value.is_truthy())
}

/// Whether a flag hands the group over to torch.
pub(crate) fn is_left_to_torch(dict: &Bound<'_, PyDict>) -> PyResult<bool> {
    for key in TORCH_FLAGS {
        if let Some(flag) = dict.get_item(key)?
            && flag.is_truthy().unwrap_or(true)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The options of an optimizer, and what its steps report: the base of both fronts' classes.
#[pyclass(subclass, frozen, module = "rmsprop._core")]
pub(crate) struct StepOptions(Mutex<Values>);

/// What they are at a time.
#[derive(Clone, Copy)]
pub(crate) struct Values {
    pub clipping: Clipping,
    /// As given.
    threads: Option<usize>,
    /// What stands for None; None for as many as torch uses.
    default_threads: Option<usize>,
    last_grad_norm: Option<f64>,
    skipped_steps: u64,
    /// The parameters hold their averages.
    is_averaged: bool,
    pub storage: Storage,
}

impl StepOptions {
    pub fn new(default_threads: Option<usize>) -> Self {
        StepOptions(Mutex::new(Values {
            clipping: Clipping::default(),
            threads: None,
            default_threads,
            last_grad_norm: None,
            skipped_steps: 0,
            is_averaged: false,
            storage: Storage::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Values> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The options as they are now.
    pub fn values(&self) -> Values {
        *self.lock()
    }

    /// The options of a step.
    ///
    /// # Errors
    /// RuntimeError while the parameters hold their averages.
    #[inline]
    pub fn values_of_step(&self) -> PyResult<Values> {
        let values = self.values();
        match values.is_averaged {
            true => self.check_trained("step").map(|()| values),
            false => Ok(values),
        }
    }

    /// Takes note of a step that was done or left out; `before` is what the options were.
    #[inline]
    pub fn report(&self, before: &Values, norm: Option<f64>, is_skipped: bool) {
        // As a rule there is no norm: nothing to lock for.
        if norm.is_none() && before.last_grad_norm.is_none() && !is_skipped {
            return;
        }
        let mut values = self.lock();
        values.last_grad_norm = norm;
        values.skipped_steps = values.skipped_steps.saturating_add(is_skipped.into());
    }
}

impl Values {
    /// The most threads that a step may use; None for as many as torch does. More than there are
    /// processors gain nothing, whatever was asked for.
    pub fn threads(&self) -> Option<usize> {
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        let processors =
            || std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let threads = self.threads.or(self.default_threads)?;
        Some(threads.min(*PROCESSORS.get_or_init(processors)))
    }
}

#[pymethods]
impl StepOptions {
    /// Says how numbers are stored, before there are parameters.
    fn _set_storage(
        &self,
        state_dtype: &Bound<'_, PyAny>,
        rounding: &Bound<'_, PyAny>,
        master_weight_bits: &Bound<'_, PyAny>,
        seed: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let storage = Storage::new(state_dtype, rounding, master_weight_bits, seed)?;
        self.lock().storage = storage;
        Ok(())
    }

    /// The greatest norm that all gradients together may have; None for no limit. Read at every
    /// step.
    #[getter(max_grad_norm)]
    fn get_max_grad_norm(&self) -> Option<f64> {
        self.lock().clipping.max_grad_norm
    }

    #[setter(max_grad_norm)]
    fn set_max_grad_norm(&self, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut max_grad_norm = None;
        if !value.is_none() {
            let wrong = |error| not_a_number(error, "max_grad_norm", "", value);
            let number: f64 = value.extract().map_err(wrong)?;
            if validate_max_grad_norm(number).is_err() {
                let found = value.repr()?;
                let message = format!("max_grad_norm: expected a number > 0, got {found}");
                return Err(PyValueError::new_err(message));
            }
            max_grad_norm = Some(number);
        }
        self.lock().clipping.max_grad_norm = max_grad_norm;
        Ok(())
    }

    /// What a step does with an infinite or NaN gradient: "propagate", "skip" or "raise".
    #[getter(nonfinite)]
    fn get_nonfinite(&self) -> &'static str {
        match self.lock().clipping.nonfinite {
            Nonfinite::Propagate => "propagate",
            Nonfinite::Skip => "skip",
            Nonfinite::Raise => "raise",
        }
    }

    #[setter(nonfinite)]
    fn set_nonfinite(&self, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let nonfinite = match value.extract::<&str>() {
            Ok("propagate") => Nonfinite::Propagate,
            Ok("skip") => Nonfinite::Skip,
            Ok("raise") => Nonfinite::Raise,
            _ => {
                let found = value.repr()?;
                return Err(PyValueError::new_err(format!(
                    "nonfinite: expected 'propagate', 'skip' or 'raise', got {found}"
                )));
            }
        };
        self.lock().clipping.nonfinite = nonfinite;
        Ok(())
    }

    /// The greatest number of threads of a step; None for as many as there are.
    #[getter(threads)]
    fn get_threads(&self) -> Option<usize> {
        self.lock().threads
    }

    #[setter(threads)]
    fn set_threads(&self, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let threads = match value.is_none() {
            true => None,
            false => Some(threads_of(value)?),
        };
        self.lock().threads = threads;
        Ok(())
    }

    /// The L2 norm over all gradients at the last step, before clipping, also if it was skipped;
    /// None without max_grad_norm.
    #[getter]
    fn last_grad_norm(&self) -> Option<f64> {
        self.lock().last_grad_norm
    }

    /// How many steps were left out because of `nonfinite="skip"`.
    #[getter(skipped_steps)]
    fn get_skipped_steps(&self) -> u64 {
        self.lock().skipped_steps
    }

    /// The seed of the random bits of rounding.
    #[getter]
    fn seed(&self) -> u64 {
        self.lock().storage.seed
    }

    /// Whether the parameters hold their averages.
    #[getter(_is_averaged)]
    fn get_is_averaged(&self) -> bool {
        self.lock().is_averaged
    }

    /// Exchanges parameters and their averages, NumPy arrays of one shape and dtype. No signal is heard
    /// in between, so it is done whole.
    fn _swap_averages(&self, pairs: Vec<Pair<'_>>) -> PyResult<()> {
        pairs.iter().try_for_each(swap)?;
        let mut values = self.lock();
        values.is_averaged = !values.is_averaged;
        Ok(())
    }

    /// RuntimeError for `what`, while the parameters hold their averages.
    #[pyo3(name = "_check_trained")]
    fn check_trained(&self, what: &str) -> PyResult<()> {
        if !self.lock().is_averaged {
            return Ok(());
        }
        let wanted = "expected parameters as they are trained, got their averages";
        let message = format!("{what}: {wanted}: leave averaged() first");
        Err(PyRuntimeError::new_err(message))
    }

    #[setter(skipped_steps)]
    fn set_skipped_steps(&self, value: u64) {
        self.lock().skipped_steps = value;
    }
}

fn threads_of(value: &Bound<'_, PyAny>) -> PyResult<usize> {
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

/// Names a parameter, or what belongs to it, by its index over all groups: "parameter 3
/// ('fc.weight')".
pub(crate) fn culprit(what: &str, index: usize, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{what} {index} ('{name}')"),
        None => format!("{what} {index}"),
    }
}

/// The same by the dicts of the groups.
pub(crate) fn culprit_in(dicts: &Bound<'_, PyList>, what: &str, index: usize) -> PyResult<String> {
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
