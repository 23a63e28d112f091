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

/// That there is so much memory at this moment: many small allocations follow, and Rust gives up the
/// process for one that fails.
pub(crate) fn check_room(bytes: usize) -> PyResult<()> {
    let mut room = Vec::<u8>::new();
    let outcome = room.try_reserve_exact(bytes);
    // Or else the compiler leaves the allocation out.
    std::hint::black_box(&room);
    outcome.map_err(|_| {
        PyMemoryError::new_err("not enough memory for what an optimizer keeps of its parameters")
    })
}

/// The error for a gradient that is not finite, and which of its elements it is, if that is known.
#[cold]
pub(crate) fn nonfinite(culprit: &str, found: f64, element: Option<usize>) -> PyErr {
    let found = found.to_string().to_lowercase();
    let place = element.map_or_else(String::new, |element| format!(" at element {element}"));
    PyFloatingPointError::new_err(format!(
        "{culprit}: expected finite values, got {found}{place}"
    ))
}
