//! The options of a parameter group, read from its dict at every step.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::tensor::is_same;
use crate::config::Config;
use crate::error::Error;

/// The keys of a group that a step reads.
const OPTIONS: [&str; 15] = [
    "params",
    "lr",
    "alpha",
    "eps",
    "weight_decay",
    "momentum",
    "centered",
    "contiguous_params",
    "eps_in_sqrt",
    "initial_square_avg",
    "lr_in_momentum",
    "nesterov",
    "bias_correction",
    "decoupled_weight_decay",
    "maximize",
];

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
    let config = Config {
        lr: number("lr")?,
        alpha: number("alpha")?,
        eps: number("eps")?,
        weight_decay: number("weight_decay")?,
        momentum: number("momentum")?,
        centered: flag("centered")?,
        eps_in_sqrt: flag("eps_in_sqrt")?,
        initial_square_avg: number("initial_square_avg")?,
        lr_in_momentum: flag("lr_in_momentum")?,
        nesterov: flag("nesterov")?,
        bias_correction: flag("bias_correction")?,
        decoupled_weight_decay: flag("decoupled_weight_decay")?,
        maximize: flag("maximize")?,
    };
    flag("contiguous_params")?;
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
            "{key}{place}: expected a finite number, got a larger one"
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
        let is_read = |key: &Bound<'_, PyAny>| {
            key.extract::<String>()
                .is_ok_and(|key| OPTIONS.contains(&key.as_str()))
        };
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

/// Whether the group wants its parameters in flat buffers.
pub(crate) fn is_contiguous(dict: &Bound<'_, PyDict>) -> PyResult<bool> {
    dict.get_item(intern!(dict.py(), "contiguous_params"))?
        .map_or(Ok(false), |value| value.is_truthy())
}
