//! `Parameter`: a NumPy array with a place for its gradient.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::view::{Failure, LentArray, Quiet, Refusal, View, WANTED, as_array, refuse_mask};

/// The Rust part of `rmsprop.Parameter`, which documents it.
#[pyclass(subclass, frozen, weakref, module = "rmsprop._core")]
pub(crate) struct Parameter {
    fields: Mutex<Fields>,
    /// Assignments to `data`. Written under the lock.
    version: AtomicUsize,
}

struct Fields {
    data: Py<PyUntypedArray>,
    grad: Option<Py<PyAny>>,
    name: Option<String>,
    slot: Option<Slot>,
}

/// A parameter's place in the flat buffers of an optimizer with `contiguous_params`.
pub(crate) struct Slot {
    pub data: Py<PyUntypedArray>,
    pub grad: Option<Py<PyAny>>,
    /// How many parameters of these buffers have been given another array, or another gradient.
    pub departed: Arc<AtomicUsize>,
    pub has_left: bool,
}

impl Fields {
    /// Tells the optimizer whether its flat buffers still are what this parameter uses.
    fn note(&mut self) {
        let Some(slot) = &mut self.slot else { return };
        let its_grad = slot.grad.as_ref().map(Py::as_ptr);
        let is_grad = its_grad == self.grad.as_ref().map(Py::as_ptr);
        let has_left = !(slot.data.is(&self.data) && is_grad);
        if has_left != slot.has_left {
            slot.has_left = has_left;
            match has_left {
                true => slot.departed.fetch_add(1, Relaxed),
                false => slot.departed.fetch_sub(1, Relaxed),
            };
        }
    }
}

impl Parameter {
    fn fields(&self) -> MutexGuard<'_, Fields> {
        self.fields.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The array, and how many were assigned before it.
    pub fn data_and_version<'py>(&self, py: Python<'py>) -> (Bound<'py, PyUntypedArray>, usize) {
        let fields = self.fields();
        (fields.data.bind(py).clone(), self.version())
    }

    /// How many arrays were assigned: tells without taking the lock whether `data` still is the
    /// same.
    #[inline]
    pub fn version(&self) -> usize {
        self.version.load(Relaxed)
    }

    /// Moves the parameter into an optimizer's flat buffers: the arrays of the slot become its data
    /// and gradient.
    pub fn settle(&self, py: Python<'_>, slot: Slot) {
        let mut fields = self.fields();
        let data = std::mem::replace(&mut fields.data, slot.data.clone_ref(py));
        self.version.fetch_add(1, Relaxed);
        let grad = std::mem::replace(
            &mut fields.grad,
            slot.grad.as_ref().map(|grad| grad.clone_ref(py)),
        );
        let left = fields.slot.replace(slot);
        drop(fields);
        if let Some(left) = left.filter(|left| !left.has_left) {
            // For the optimizer it leaves it is gone for good.
            left.departed.fetch_add(1, Relaxed);
        }
        drop((data, grad));
    }
}

/// The array that `data` stands for.
fn as_float_array(data: &Bound<'_, PyAny>) -> PyResult<Py<PyUntypedArray>> {
    let read = || {
        let array = match data.cast::<PyUntypedArray>() {
            Ok(array) => array.clone(),
            Err(_) => as_array(data)?,
        };
        refuse_mask(array.as_any())?;
        let array = array.unbind();
        Quiet::during(data.py(), |quiet| {
            let view = View::of_array(quiet, LentArray::of(quiet, &array))?;
            match view.element.dtype.is_float() {
                true => Ok(()),
                false => Err(Refusal::DType),
            }
        })?;
        Ok(array)
    };
    read().map_err(|failure: Failure| failure.raise("data of a Parameter", WANTED, data))
}

fn name_of(name: Option<&Bound<'_, PyAny>>) -> PyResult<Option<String>> {
    let Some(name) = name else { return Ok(None) };
    name.extract().map(Some).map_err(|_| {
        let found = name
            .repr()
            .map_or_else(|_| String::new(), |repr| repr.to_string());
        PyTypeError::new_err(format!(
            "name of a Parameter: expected a str or None, got {found}"
        ))
    })
}

#[pymethods]
impl Parameter {
    #[new]
    #[pyo3(signature = (data, name = None))]
    fn new(data: &Bound<'_, PyAny>, name: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let data = as_float_array(data)?;
        let name = name_of(name)?;
        Ok(Parameter {
            fields: Mutex::new(Fields {
                data,
                grad: None,
                name,
                slot: None,
            }),
            version: AtomicUsize::new(0),
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Ok(fields) = self.fields.try_lock() else {
            return Ok(());
        };
        visit.call(&fields.data)?;
        visit.call(&fields.grad)?;
        match &fields.slot {
            Some(slot) => {
                visit.call(&slot.data)?;
                visit.call(&slot.grad)
            }
            None => Ok(()),
        }
    }

    fn __clear__(&self) {
        let mut fields = self.fields();
        let slot = fields.slot.take();
        let grad = fields.grad.take();
        drop(fields);
        drop((slot, grad));
    }

    /// The array itself.
    #[getter]
    pub fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyUntypedArray> {
        self.fields().data.bind(py).clone()
    }

    #[setter(data)]
    fn set_data(&self, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let data = as_float_array(data)?;
        let mut fields = self.fields();
        let old = std::mem::replace(&mut fields.data, data);
        self.version.fetch_add(1, Relaxed);
        fields.note();
        drop(fields);
        drop(old);
        Ok(())
    }

    /// The gradient: None, or an array of the same shape and dtype (checked by the step).
    #[getter]
    pub fn grad<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let fields = self.fields();
        fields.grad.as_ref().map(|grad| grad.bind(py).clone())
    }

    #[setter(grad)]
    fn set_grad(&self, grad: Option<Py<PyAny>>) {
        let mut fields = self.fields();
        let old = std::mem::replace(&mut fields.grad, grad);
        fields.note();
        drop(fields);
        drop(old);
    }

    /// What messages, and gradients given by name, call it; or None.
    #[getter]
    fn name(&self) -> Option<String> {
        self.fields().name.clone()
    }

    #[setter(name)]
    fn set_name(&self, name: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.fields().name = name_of(name)?;
        Ok(())
    }
}
