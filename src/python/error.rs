//! Which exception each error of the core is.

use pyo3::exceptions::{PyFloatingPointError, PyMemoryError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
            Error::Nonfinite { .. } => PyFloatingPointError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}
