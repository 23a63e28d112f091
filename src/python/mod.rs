//! The Python extension module `rmsprop._core`: it converts, releases the GIL, calls and maps
//! errors. No arithmetic.

mod arrays;
mod dlpack;
mod error;
mod group;
mod options;
mod overlap;
mod param;
mod parameter;
mod row;
mod source;
mod step;
mod storage;
mod swap;
mod tensor;
mod torch;
mod torch_library;
mod turn;
mod view;

use std::num::NonZeroUsize;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::config::Config;
use crate::kernel::isa::isa;
use crate::threads::{default_threads, set_thread_limit, thread_limit};
use options::Front;

/// The options that a dialect fixes; ValueError for an unknown name.
#[pyfunction]
fn dialect<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
    let config = Config::dialect(name)?;
    options::dialect_options(py, config)
}

/// The option that was meant by a key that is none; None if nobody can tell.
#[pyfunction]
fn meant_by(key: &str) -> Option<&'static str> {
    options::meant_by(key)
}

/// Checks the options of a dict; `place` is " of group 0" or nothing. TypeError or ValueError names
/// the first bad one.
#[pyfunction]
fn check_options(options: &Bound<'_, PyDict>, place: &str) -> PyResult<()> {
    options::read_options(Front::Arrays, options, place).map(drop)
}

/// As `check_options`, for the torch front: torch's own options are checked by type only, and the
/// others may be missing.
#[pyfunction]
fn check_torch_options(options: &Bound<'_, PyDict>, place: &str) -> PyResult<()> {
    options::read_options(Front::Torch, options, place).map(drop)
}

/// What runs: version, instruction set, threads, features.
#[pyfunction]
fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("isa", isa()?.name())?;
    info.set_item("threads", default_threads()?)?;
    let features: &[&str] = if cfg!(debug_assertions) {
        &["threads", "python", "debug"]
    } else {
        &["threads", "python"]
    };
    info.set_item("features", features)?;
    Ok(info)
}

/// The limit on the threads of every step in this process; None without one.
#[pyfunction]
fn _thread_limit() -> Option<usize> {
    thread_limit()
}

/// Sets that limit, or with None takes it away.
#[pyfunction]
fn _set_thread_limit(limit: Option<NonZeroUsize>) {
    set_thread_limit(limit);
}

// What arrays, tensors and dicts lend is read without a lock: the GIL is what keeps others away.
#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    if let Err(error) = isa() {
        return Err(pyo3::exceptions::PyImportError::new_err(error.to_string()));
    }
    torch_library::note_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("OPTIONS", options::table(module.py())?)?;
    module.add_class::<options::StepOptions>()?;
    module.add_class::<arrays::Optimizer>()?;
    module.add_class::<parameter::Parameter>()?;
    module.add_class::<torch::Stepper>()?;
    module.add_function(wrap_pyfunction!(dialect, module)?)?;
    module.add_function(wrap_pyfunction!(meant_by, module)?)?;
    module.add_function(wrap_pyfunction!(check_options, module)?)?;
    module.add_function(wrap_pyfunction!(check_torch_options, module)?)?;
    module.add_function(wrap_pyfunction!(storage::encode_bfloat16, module)?)?;
    module.add_function(wrap_pyfunction!(storage::encode_uint8, module)?)?;
    module.add_function(wrap_pyfunction!(storage::decode_uint8, module)?)?;
    module.add_function(wrap_pyfunction!(storage::join_error_bits, module)?)?;
    module.add_function(wrap_pyfunction!(info, module)?)?;
    module.add_function(wrap_pyfunction!(_thread_limit, module)?)?;
    module.add_function(wrap_pyfunction!(_set_thread_limit, module)?)?;
    module.add_function(wrap_pyfunction!(turn::after_fork, module)?)
}
