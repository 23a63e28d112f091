//! The options of a parameter group, read from its dict at every step.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyTuple};
use pyo3::{PyTraverseError, PyVisit, intern};

use super::tensor::dict::{Entries, Moved};
use crate::config::Config;
use crate::error::Error;

/// An option and its place in a [`Config`].
type Field<T> = (&'static str, fn(&mut Config) -> &mut T);

/// The options of a group that are numbers.
const NUMBERS: [Field<f64>; 6] = [
    ("lr", |config| &mut config.lr),
    ("alpha", |config| &mut config.alpha),
    ("eps", |config| &mut config.eps),
    ("weight_decay", |config| &mut config.weight_decay),
    ("momentum", |config| &mut config.momentum),
    ("initial_square_avg", |config| {
        &mut config.initial_square_avg
    }),
];

/// Those that are switches.
const FLAGS: [Field<bool>; 7] = [
    ("centered", |config| &mut config.centered),
    ("eps_in_sqrt", |config| &mut config.eps_in_sqrt),
    ("lr_in_momentum", |config| &mut config.lr_in_momentum),
    ("nesterov", |config| &mut config.nesterov),
    ("bias_correction", |config| &mut config.bias_correction),
    ("decoupled_weight_decay", |config| {
        &mut config.decoupled_weight_decay
    }),
    ("maximize", |config| &mut config.maximize),
];

/// What a group has besides.
const CONTIGUOUS: &str = "contiguous_params";

/// Options that a dialect leaves to the caller.
const FREE: [&str; 2] = ["lr", "maximize"];

/// What torch's RMSprop does not have: where it is left out, torch's formula is meant.
const NOT_IN_TORCH: [&str; 7] = [
    "eps_in_sqrt",
    "initial_square_avg",
    "lr_in_momentum",
    "nesterov",
    "bias_correction",
    "decoupled_weight_decay",
    CONTIGUOUS,
];

/// Flags of torch's that hand a group over to torch.
pub(crate) const TORCH_FLAGS: [&str; 2] = ["capturable", "differentiable"];

/// Options that belong to the optimizer, not to a group.
const OPTIMIZER_OPTIONS: [&str; 3] = ["max_grad_norm", "nonfinite", "threads"];

/// Reads the options of a dict and checks their ranges. `place` is " of group 0", or nothing.
pub(crate) fn config_of(options: &Bound<'_, PyDict>, place: &str) -> PyResult<Config> {
    let config = read_config(options, place, &[])?;
    in_range(options, place, &config)?;
    Ok(config)
}

/// As [`config_of`], but checks no range of the options that torch's RMSprop has too: there it is the
/// constructor's.
pub(crate) fn torch_config_of(options: &Bound<'_, PyDict>, place: &str) -> PyResult<Config> {
    let config = read_config(options, place, &NOT_IN_TORCH)?;
    in_range(options, place, &without_shared(&config))?;
    Ok(config)
}

/// Whether [`torch_config_of`] would return these options.
pub(crate) fn is_torch_config(config: &Config) -> bool {
    without_shared(config).validate().is_ok()
}

/// The options that torch's RMSprop does not have, and what they ask of the others.
fn without_shared(config: &Config) -> Config {
    Config {
        alpha: match config.bias_correction {
            true => config.alpha,
            false => 0.0,
        },
        bias_correction: config.bias_correction,
        initial_square_avg: config.initial_square_avg,
        ..Config::default()
    }
}

fn in_range(options: &Bound<'_, PyDict>, place: &str, config: &Config) -> PyResult<()> {
    match config.validate() {
        Err(Error::Hyperparameter { key, expected, .. }) => {
            let found = options
                .get_item(key)?
                .map(|value| value.repr())
                .transpose()?;
            let found = found.map(|found| found.to_string()).unwrap_or_default();
            Err(PyValueError::new_err(format!(
                "{key}{place}: expected {expected}, got {found}"
            )))
        }
        result => Ok(result?),
    }
}

/// Reads every option; those in `may_miss` are torch's if they are not there.
fn read_config(options: &Bound<'_, PyDict>, place: &str, may_miss: &[&str]) -> PyResult<Config> {
    let get = |key: &str| match options.get_item(key)? {
        None if !may_miss.contains(&key) => Err(PyValueError::new_err(format!(
            "{key}{place}: expected a value, got none"
        ))),
        value => Ok(value),
    };
    let mut config = Config::torch();
    for (key, field) in NUMBERS {
        if let Some(value) = get(key)? {
            *field(&mut config) =
                number_of(&value).map_err(|error| not_a_number(error, key, place, &value))?;
        }
    }
    let is_torch = !may_miss.is_empty();
    let flag = |key: &str, value: Bound<'_, PyAny>| match value.extract::<bool>() {
        Ok(flag) => Ok(flag),
        Err(_) if value.is_instance_of::<PyInt>() => value.is_truthy(),
        // torch's own flags are whatever is true.
        Err(_) if is_torch && !may_miss.contains(&key) => value.is_truthy(),
        Err(_) => Err(wrong_type(key, place, "a bool", &value)),
    };
    for (key, field) in FLAGS {
        if let Some(value) = get(key)? {
            *field(&mut config) = flag(key, value)?;
        }
    }
    if let Some(value) = get(CONTIGUOUS)? {
        flag(CONTIGUOUS, value)?;
    }
    for key in OPTIMIZER_OPTIONS {
        if options.contains(key)? {
            let found = format!(
                "{key}{place}: expected it as an argument of the optimizer, got it in a group"
            );
            return Err(PyValueError::new_err(found));
        }
    }
    Ok(config)
}

/// The options that a dialect fixes, as keyword arguments.
pub(crate) fn dialect_options(py: Python<'_>, mut config: Config) -> PyResult<Bound<'_, PyDict>> {
    let options = PyDict::new(py);
    for (key, field) in NUMBERS.into_iter().filter(|(key, _)| !FREE.contains(key)) {
        options.set_item(key, *field(&mut config))?;
    }
    for (key, field) in FLAGS.into_iter().filter(|(key, _)| !FREE.contains(key)) {
        options.set_item(key, *field(&mut config))?;
    }
    Ok(options)
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
pub(crate) fn not_a_number(
    error: PyErr,
    key: &str,
    place: &str,
    value: &Bound<'_, PyAny>,
) -> PyErr {
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
    let class = value
        .get_type()
        .name()
        .map_or_else(|_| "an object".into(), |name| name.to_string());
    let value = value
        .repr()
        .map_or_else(|_| String::new(), |repr| format!(" {repr}"));
    PyTypeError::new_err(format!(
        "{key}{place}: expected {wanted}, got {class}{value}"
    ))
}

/// What a group's dict held when it was last read, so that an unchanged one costs a comparison of
/// references, and one with another lr not much more.
pub(crate) struct Snapshot {
    entries: Entries,
    /// Where the numbers are: the index in [`NUMBERS`] of each entry that is one.
    numbers: Vec<Option<usize>>,
    /// The numbers that can change in place (a tensor), read anew each time.
    live: Vec<usize>,
    /// Some other option can, or there was an error: everything must be read anew.
    is_stale: bool,
}

/// What has become of the options since they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    /// Of numbers, which were taken over.
    Numbers,
    /// Of something else.
    Other,
}

impl Snapshot {
    /// Reads a dict. `walks_params` says that its parameters are looked at one by one anyway, so
    /// that they may be in a list.
    pub fn new(group: &Bound<'_, PyDict>, walks_params: bool) -> Self {
        // A copy first: what is asked of the entries may run Python code.
        let entries = Entries::of(group);
        let (mut numbers, mut live, mut is_stale) = (Vec::new(), Vec::new(), false);
        for (place, (key, value)) in entries.iter(group.py()).enumerate() {
            let key = key.extract::<String>().unwrap_or_default();
            let number = NUMBERS.iter().position(|(name, _)| *name == key);
            numbers.push(number);
            let is_float = value.is_exact_instance_of::<PyFloat>();
            let is_constant = value.is_exact_instance_of::<PyInt>()
                || value.is_exact_instance_of::<PyBool>()
                || value.is_none();
            match number {
                _ if is_constant => {}
                Some(_) if is_float => {}
                Some(_) => live.push(place),
                None if key == "params" => {
                    is_stale |= !walks_params && !value.is_exact_instance_of::<PyTuple>();
                }
                // Other keys (names, `initial_lr`) are not read here, so what they hold may change.
                None => is_stale |= is_option(&key),
            }
        }
        Snapshot {
            entries,
            numbers,
            live,
            is_stale,
        }
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.entries.traverse(visit)
    }

    /// Takes numbers that have changed over into `config`, which was read from this dict before.
    /// Runs Python code only for a number that is no float or int.
    #[inline]
    pub fn follow(&mut self, group: &Bound<'_, PyDict>, config: &mut Config) -> Change {
        if self.is_stale {
            return Change::Other;
        }
        let Some(moved) = self.entries.follow(group) else {
            return Change::Other;
        };
        if moved.is_empty() && self.live.is_empty() {
            return Change::None;
        }
        match self.take(group.py(), &moved, config) {
            Some(change) => change,
            None => {
                self.is_stale = true;
                Change::Other
            }
        }
    }

    #[cold]
    fn take(&self, py: Python<'_>, moved: &Moved, config: &mut Config) -> Option<Change> {
        let mut change = Change::None;
        let mut take = |place: usize, new: f64| {
            // Another float that no option reads (`initial_lr`) changes nothing.
            if let Some(number) = self.numbers[place] {
                let old = NUMBERS[number].1(config);
                if *old != new {
                    *old = new;
                    change = Change::Numbers;
                }
            }
        };
        moved.iter().for_each(|&(place, new)| take(place, new));
        for &place in &self.live {
            take(place, number_of(self.entries.value(py, place)).ok()?);
        }
        Some(change)
    }

    /// Makes the next look read everything anew.
    pub fn forget(&mut self) {
        self.is_stale = true;
    }
}

/// Whether a step reads this key of a group.
fn is_option(key: &str) -> bool {
    key == "params"
        || key == CONTIGUOUS
        || TORCH_FLAGS.contains(&key)
        || NUMBERS.iter().any(|(name, _)| *name == key)
        || FLAGS.iter().any(|(name, _)| *name == key)
}

/// Whether the group wants its parameters in flat buffers.
pub(crate) fn is_contiguous(dict: &Bound<'_, PyDict>) -> PyResult<bool> {
    dict.get_item(CONTIGUOUS)?
        .map_or(Ok(false), |value| value.is_truthy())
}
