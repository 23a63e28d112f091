//! How an object's memory is found: what a parameter or a gradient may be.

use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyMemoryView, PyTuple};
use pyo3::{PyTraverseError, PyVisit, intern};

use super::dlpack::{self, Exchange, Managed};
use super::parameter::Parameter;
use super::view::{
    Failure, Header, Lent, LentArray, Quiet, Refusal, View, as_array, learn_dtype, refuse_mask,
};

/// An object, and how to read its memory.
pub(crate) enum Source {
    /// A NumPy array, or one that shares its memory with a buffer.
    Array(Py<PyUntypedArray>),
    /// Its `data`, and the count of assignments to it when that was read.
    Parameter(Py<Parameter>, Py<PyUntypedArray>, usize),
    /// Of a type with the C exchange API.
    Exchange(Box<(Py<PyAny>, Exchange)>),
    /// An object that hands out a new capsule every time, and the last one that it did, which a step
    /// lets go of.
    Capsule(Box<(Py<PyAny>, Option<Managed>)>),
    /// Of a gradient: indices of rows, and their values.
    Rows(Box<(Vec<i64>, Source)>),
}

impl Source {
    /// Finds out what an object is. Runs Python code.
    pub fn of(object: &Bound<'_, PyAny>) -> Result<Source, Failure> {
        let py = object.py();
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            refuse_mask(object)?;
            learn_dtype(array);
            return Ok(Source::Array(array.clone().unbind()));
        }
        if let Ok(parameter) = object.cast::<Parameter>() {
            let (data, version) = parameter.get().data_and_version(py);
            let parameter = parameter.clone().unbind();
            return Ok(Source::Parameter(parameter, data.unbind(), version));
        }
        if is_scalar(object)? {
            return Err(Refusal::Scalar.into());
        }
        if let Some(exchange) = Exchange::of(object)? {
            let source = Source::Exchange(Box::new((object.clone().unbind(), exchange)));
            source.check_sign(py)?;
            return Ok(source);
        }
        if dlpack::has_dlpack(&object.get_type()) {
            let mut source = Source::Capsule(Box::new((object.clone().unbind(), None)));
            source.renew(py)?;
            return Ok(source);
        }
        match PyMemoryView::from(object) {
            Ok(view) => {
                let array = as_array(&view)?;
                learn_dtype(&array);
                Ok(Source::Array(array.unbind()))
            }
            Err(_) => Err(Refusal::NotAnArray.into()),
        }
    }

    /// Finds out what a gradient is: whatever a parameter may be, read-only or in a legacy capsule
    /// too; nothing, if it is None; or a float or a NumPy scalar, which is what reductions return for
    /// a parameter without dimensions. Runs Python code.
    #[inline]
    pub fn of_gradient(object: &Bound<'_, PyAny>) -> Result<Option<Source>, Failure> {
        if object.is_none() {
            return Ok(None);
        }
        if let Ok(rows) = object.cast::<PyTuple>() {
            return Source::of_rows(rows).map(Some);
        }
        match Source::of(object) {
            Ok(Source::Parameter(_, data, _)) => Ok(Some(Source::Array(data))),
            Err(Failure::Refusal(refusal))
                if refusal == Refusal::Scalar || object.is_instance_of::<PyFloat>() =>
            {
                let array = as_array(object)?;
                learn_dtype(&array);
                Ok(Some(Source::Array(array.unbind())))
            }
            found => found.map(Some),
        }
    }

    /// Indices of rows and their values. Runs Python code.
    fn of_rows(rows: &Bound<'_, PyTuple>) -> Result<Source, Failure> {
        let wanted = "a pair of indices of rows and values";
        if rows.len() != 2 {
            let found = format!("a tuple of {}", rows.len());
            return Err(Failure::Value(wanted, found));
        }
        let (indices, values) = (rows.get_item(0)?, rows.get_item(1)?);
        let Some(values) = Source::of_gradient(&values)? else {
            return Err(Failure::Type(wanted, "no values".to_owned()));
        };
        let indices = indices_of(&indices)?;
        Ok(Source::Rows(Box::new((indices, values))))
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Source::Array(array) => visit.call(array),
            Source::Parameter(parameter, data, _) => {
                visit.call(parameter)?;
                visit.call(data)
            }
            Source::Exchange(exchanged) => visit.call(&exchanged.0),
            Source::Capsule(capsule) => visit.call(&capsule.0),
            Source::Rows(rows) => rows.1.traverse(visit),
        }
    }

    /// Whether it can only be read after Python code has run ([`Source::renew`]).
    pub fn is_foreign(&self) -> bool {
        matches!(self, Source::Exchange(_) | Source::Capsule(_))
    }

    /// Runs the Python code that a step needs of it: makes a new capsule, asks for a pending sign.
    pub fn renew(&mut self, py: Python<'_>) -> Result<(), Failure> {
        if let Source::Capsule(capsule) = self {
            capsule.1 = Some(dlpack::import(capsule.0.bind(py))?);
        }
        self.check_sign(py)
    }

    /// Lets go of what [`Source::renew`] made.
    pub fn release(&mut self) {
        if let Source::Capsule(capsule) = self {
            capsule.1 = None;
        }
    }

    /// Refuses torch's `z.conj().imag`, whose sign is in a bit that the memory does not show.
    fn check_sign(&self, py: Python<'_>) -> Result<(), Failure> {
        let Source::Exchange(exchanged) = self else {
            return Ok(());
        };
        for name in [intern!(py, "is_neg"), intern!(py, "is_conj")] {
            if let Ok(is_pending) = exchanged.0.bind(py).call_method0(name)
                && is_pending.is_truthy()?
            {
                return Err(Refusal::Pending.into());
            }
        }
        Ok(())
    }

    /// The array that it is, or that a [`Parameter`] has now; None if it is no array. One that the
    /// parameter had before goes to `retired`, for dropping it may run Python code.
    #[inline(always)]
    pub fn follow<'q>(
        &'q mut self,
        quiet: &'q Quiet<'_>,
        retired: &mut Vec<Py<PyAny>>,
    ) -> Option<LentArray<'q>> {
        let array = match self {
            Source::Array(array) => array,
            Source::Parameter(parameter, array, version) => {
                if parameter.get().version() != *version {
                    let now = parameter.get().data_and_version(quiet.py());
                    let old = std::mem::replace(array, now.0.unbind());
                    *version = now.1;
                    retired.push(old.into_any());
                }
                array
            }
            Source::Exchange(_) | Source::Capsule(_) | Source::Rows(_) => return None,
        };
        Some(LentArray::of(quiet, array))
    }

    /// Lends what its memory is read from.
    #[inline]
    pub fn lend<'q>(&'q self, quiet: &'q Quiet<'_>) -> LentSource<'q> {
        match self {
            Source::Array(array) | Source::Parameter(_, array, _) => {
                LentSource::Array(LentArray::of(quiet, array))
            }
            Source::Exchange(exchanged) => {
                let (object, exchange) = &**exchanged;
                LentSource::Exchange(Lent::of(quiet, object), exchange)
            }
            Source::Capsule(capsule) => LentSource::Capsule(capsule.1.as_ref()),
            Source::Rows(rows) => LentSource::Rows(&rows.0, &rows.1),
        }
    }

    /// The object.
    pub fn object<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        match self {
            Source::Array(array) => array.bind(py).clone().into_any(),
            Source::Parameter(parameter, ..) => parameter.bind(py).clone().into_any(),
            Source::Exchange(exchanged) => exchanged.0.bind(py).clone(),
            Source::Capsule(capsule) => capsule.0.bind(py).clone(),
            Source::Rows(rows) => rows.1.object(py),
        }
    }
}

/// Integers of any type, in one dimension, as `i64`; a large one of 64 bits without a sign is negative,
/// which no index of a row is.
fn indices_of(object: &Bound<'_, PyAny>) -> Result<Vec<i64>, Failure> {
    const WANTED: &str = "indices of rows as integers in one dimension";
    let py = object.py();
    let object = match object.hasattr(intern!(py, "detach"))? {
        true => object.call_method0(intern!(py, "detach"))?,
        false => object.clone(),
    };
    let array = as_array(&object)?;
    let kind: String = array.dtype().getattr(intern!(py, "kind"))?.extract()?;
    let is_empty_list = array.len() == 0 && kind == "f";
    if !matches!(kind.as_str(), "i" | "u") && !is_empty_list {
        let dtype = array.dtype();
        return Err(Failure::Type(WANTED, dtype.to_string()));
    }
    if array.ndim() != 1 {
        let found = format!("{} dimensions", array.ndim());
        return Err(Failure::Value(WANTED, found));
    }
    let indices = array.call_method1(intern!(py, "astype"), (intern!(py, "int64"),))?;
    let indices: PyReadonlyArray1<'_, i64> = indices.extract()?;
    Ok(indices.as_array().to_vec())
}

/// What the memory of a [`Source`] is read from, while no Python code runs.
#[derive(Clone, Copy)]
pub(crate) enum LentSource<'q> {
    Array(LentArray<'q>),
    Exchange(Lent<'q>, &'q Exchange),
    /// None if it was not renewed.
    Capsule(Option<&'q Managed>),
    Rows(&'q [i64], &'q Source),
}

impl<'q> LentSource<'q> {
    /// Reads the memory as it is now.
    pub fn view(self, quiet: &'q Quiet<'_>) -> Result<View<'q>, Refusal> {
        match self {
            LentSource::Array(array) => View::of_array(quiet, array),
            LentSource::Exchange(object, exchange) => exchange.view(quiet, object),
            LentSource::Capsule(Some(managed)) => managed.view(quiet),
            LentSource::Capsule(None) | LentSource::Rows(..) => Err(Refusal::NotAnArray),
        }
    }

    /// The header, if it is a NumPy array.
    #[inline]
    pub fn header(self) -> Option<Header<'q>> {
        match self {
            LentSource::Array(array) => Some(Header::of(array)),
            _ => None,
        }
    }

    /// A reference to what keeps the memory, if a reference does.
    pub fn hold(self, quiet: &Quiet<'_>) -> Option<Py<PyAny>> {
        match self {
            LentSource::Array(array) => Some(array.hold(quiet)),
            LentSource::Exchange(object, _) => Some(object.hold(quiet)),
            // The values of rows were copied.
            LentSource::Capsule(_) | LentSource::Rows(..) => None,
        }
    }
}

/// NumPy's scalars are buffers and would pass for arrays without dimensions.
fn is_scalar(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let numpy = object.py().import(intern!(object.py(), "numpy"))?;
    object.is_instance(&numpy.getattr(intern!(object.py(), "generic"))?)
}

/// The error for something that changed while a step was under way.
pub(crate) fn has_changed(what: &str) -> PyErr {
    PyRuntimeError::new_err(format!(
        "expected {what} to stay as they are during a step, got others"
    ))
}
