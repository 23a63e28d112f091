//! The options of a parameter group, read from its dict at every step.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::tensor::is_same;
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

/// Options that belong to the optimizer, not to a group.
const OPTIMIZER_OPTIONS: [&str; 3] = ["max_grad_norm", "nonfinite", "threads"];

/// Reads the options of a dict. `place` is " of group 0", or nothing.
pub(crate) fn config_of(options: &Bound<'_, PyDict>, place: &str) -> PyResult<Config> {
    let get = |key: &str| {
        options.get_item(key)?.ok_or_else(|| {
            PyValueError::new_err(format!("{key}{place}: expected a value, got none"))
        })
    };
    let number = |key: &str| -> PyResult<f64> {
        let value = get(key)?;
        value
            .extract()
            .map_err(|error| not_a_number(error, key, place, &value))
    };
    let flag = |key: &str| -> PyResult<bool> {
        let value = get(key)?;
        match value.extract::<bool>() {
            Ok(flag) => Ok(flag),
            Err(_) if value.is_instance_of::<PyInt>() => value.is_truthy(),
            Err(_) => Err(wrong_type(key, place, "a bool", &value)),
        }
    };
    let mut config = Config::default();
    for (key, field) in NUMBERS {
        *field(&mut config) = number(key)?;
    }
    for (key, field) in FLAGS {
        *field(&mut config) = flag(key)?;
    }
    flag(CONTIGUOUS)?;
    for key in OPTIMIZER_OPTIONS {
        if options.contains(key)? {
            let found = format!(
                "{key}{place}: expected it as an argument of the optimizer, got it in a group"
            );
            return Err(PyValueError::new_err(found));
        }
    }
    match config.validate() {
        Err(Error::Hyperparameter { key, expected, .. }) => {
            let found = get(key)?.repr()?;
            Err(PyValueError::new_err(format!(
                "{key}{place}: expected {expected}, got {found}"
            )))
        }
        result => Ok(result.map(|()| config)?),
    }
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
/// references.
pub(crate) struct Snapshot {
    entries: Vec<(Py<PyAny>, Py<PyAny>)>,
    /// All values are of types that cannot change in place.
    is_constant: bool,
}

impl Snapshot {
    pub fn new(group: &Bound<'_, PyDict>) -> Self {
        // Other keys (names, `initial_lr`) are not read here, so what they hold may change.
        let is_read =
            |key: &Bound<'_, PyAny>| key.extract::<String>().is_ok_and(|key| is_option(&key));
        let is_constant = |value: &Bound<'_, PyAny>| {
            value.is_exact_instance_of::<PyFloat>()
                || value.is_exact_instance_of::<PyInt>()
                || value.is_exact_instance_of::<PyBool>()
                || value.is_exact_instance_of::<PyTuple>()
        };
        Snapshot {
            is_constant: group
                .iter()
                .all(|(key, value)| !is_read(&key) || is_constant(&value)),
            entries: group
                .iter()
                .map(|(key, value)| (key.unbind(), value.unbind()))
                .collect(),
        }
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.entries.iter().try_for_each(|(key, value)| {
            visit.call(key)?;
            visit.call(value)
        })
    }

    /// Whether the dict certainly still says the same.
    #[inline]
    pub fn is_current(&self, group: &Bound<'_, PyDict>) -> bool {
        self.is_constant
            && group.len() == self.entries.len()
            && group
                .iter()
                .zip(&self.entries)
                .all(|((key, value), (known_key, known_value))| {
                    is_same(&key, known_key) && is_same(&value, known_value)
                })
    }
}

/// Whether a step reads this key of a group.
fn is_option(key: &str) -> bool {
    key == "params"
        || key == CONTIGUOUS
        || NUMBERS.iter().any(|(name, _)| *name == key)
        || FLAGS.iter().any(|(name, _)| *name == key)
}

/// Whether the group wants its parameters in flat buffers.
pub(crate) fn is_contiguous(dict: &Bound<'_, PyDict>) -> PyResult<bool> {
    dict.get_item(CONTIGUOUS)?
        .map_or(Ok(false), |value| value.is_truthy())
}
