//! How an object's memory is found: what a parameter or a gradient may be.

use numpy::PyUntypedArray;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyMemoryView};
use pyo3::{PyTraverseError, PyTypeInfo, PyVisit, intern};

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
}

impl Source {
    /// Finds out what an object is. Runs Python code.
    pub fn of(object: &Bound<'_, PyAny>) -> Result<Source, Failure> {
        let py = object.py();
        if object.get_type_ptr() == PyUntypedArray::type_object_raw(py)
            && let Ok(array) = object.cast::<PyUntypedArray>()
        {
            learn_dtype(array);
            return Ok(Source::Array(array.clone().unbind()));
        }
        if let Ok(parameter) = object.cast::<Parameter>() {
            let (data, version) = parameter.get().data_and_version(py);
            let parameter = parameter.clone().unbind();
            return Ok(Source::Parameter(parameter, data.unbind(), version));
        }
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            refuse_mask(object)?;
            learn_dtype(array);
            return Ok(Source::Array(array.clone().unbind()));
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

    /// The NumPy array that it is, as far as is known.
    #[inline]
    pub fn array<'q>(&'q self, quiet: &'q Quiet<'_>) -> Option<LentArray<'q>> {
        match self {
            Source::Array(array) => Some(LentArray::of(quiet, array)),
            Source::Parameter(_, data, _) => Some(LentArray::of(quiet, data)),
            _ => None,
        }
    }

    /// Takes the array that a [`Parameter`] has now; the one that it had goes to `retired`, for
    /// dropping it may run Python code.
    #[inline]
    pub fn follow(&mut self, quiet: &Quiet<'_>, retired: &mut Vec<Py<PyAny>>) {
        if let Source::Parameter(parameter, data, version) = self
            && parameter.get().version() != *version
        {
            let now = parameter.get().data_and_version(quiet.py());
            let old = std::mem::replace(data, now.0.unbind());
            *version = now.1;
            retired.push(old.into_any());
        }
    }

    /// Reads the memory as it is now.
    pub fn view<'q>(&'q self, quiet: &'q Quiet<'_>) -> Result<View<'q>, Refusal> {
        match self {
            Source::Array(array) | Source::Parameter(_, array, _) => {
                View::of_array(quiet, LentArray::of(quiet, array))
            }
            Source::Exchange(exchanged) => {
                let (object, exchange) = &**exchanged;
                exchange.view(quiet, Lent::of(quiet, object))
            }
            Source::Capsule(capsule) => match &capsule.1 {
                Some(managed) => managed.view(quiet),
                None => Err(Refusal::NotAnArray),
            },
        }
    }

    /// The object.
    pub fn object<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        match self {
            Source::Array(array) => array.bind(py).clone().into_any(),
            Source::Parameter(parameter, ..) => parameter.bind(py).clone().into_any(),
            Source::Exchange(exchanged) => exchanged.0.bind(py).clone(),
            Source::Capsule(capsule) => capsule.0.bind(py).clone(),
        }
    }

    /// A reference to what keeps the memory, if a reference does.
    pub fn hold(&self, quiet: &Quiet<'_>) -> Option<Py<PyAny>> {
        Some(match self {
            Source::Array(array) | Source::Parameter(_, array, _) => {
                Lent::of(quiet, array).hold(quiet)
            }
            Source::Exchange(exchanged) => Lent::of(quiet, &exchanged.0).hold(quiet),
            Source::Capsule(_) => return None,
        })
    }
}

/// The gradient of a parameter in a step.
#[derive(Default)]
pub(crate) enum Gradient {
    /// The item of the list or tuple that was given, where it is read.
    #[default]
    Item,
    None,
    Held(Source),
}

impl Gradient {
    /// Takes a gradient: whatever a parameter may be, read-only or in a legacy capsule too; None; or
    /// a float or a NumPy scalar, which is what reductions return for a parameter without dimensions.
    /// Runs Python code.
    #[inline]
    pub fn of(object: &Bound<'_, PyAny>) -> Result<Self, Failure> {
        match object.get_type_ptr() == PyUntypedArray::type_object_raw(object.py()) {
            true => Source::of(object).map(Gradient::Held),
            false => Self::of_other(object),
        }
    }

    /// As [`Gradient::of`], of what is no plain array.
    fn of_other(object: &Bound<'_, PyAny>) -> Result<Self, Failure> {
        if object.is_none() {
            return Ok(Gradient::None);
        }
        if is_scalar(object)? || object.is_instance_of::<PyFloat>() {
            let array = as_array(object)?;
            learn_dtype(&array);
            return Ok(Gradient::Held(Source::Array(array.unbind())));
        }
        let mut source = Source::of(object)?;
        if let Source::Parameter(_, data, _) = source {
            source = Source::Array(data);
        }
        Ok(Gradient::Held(source))
    }

    /// Lets go of it.
    #[inline]
    pub fn release(&mut self, py: Python<'_>) {
        if let Gradient::Held(Source::Array(array)) = std::mem::take(self) {
            // Bound, so that dropping the reference need not find out whether the GIL is held.
            drop(array.into_bound(py));
        }
    }

    /// As it is where nothing runs Python code; `items` are the list or tuple that was given.
    #[inline]
    pub fn now<'q>(
        &'q self,
        quiet: &'q Quiet<'_>,
        items: Option<Lent<'q>>,
        index: usize,
    ) -> GradientNow<'q> {
        match self {
            Gradient::Item => match items.and_then(|items| items.item(quiet, index)) {
                None => GradientNow::Unknown,
                Some(item) => match item.exact_array(quiet) {
                    Some(array) => GradientNow::Array(array),
                    None if item.is_none(quiet) => GradientNow::None,
                    None => GradientNow::Unknown,
                },
            },
            Gradient::None => GradientNow::None,
            Gradient::Held(source) => match source.array(quiet) {
                Some(array) => GradientNow::Array(array),
                None => GradientNow::Source(source),
            },
        }
    }
}

/// What [`Gradient::now`] finds.
#[derive(Clone, Copy)]
pub(crate) enum GradientNow<'q> {
    None,
    Array(LentArray<'q>),
    Source(&'q Source),
    /// No array: it must be taken first.
    Unknown,
}

impl<'q> GradientNow<'q> {
    /// Reads the memory.
    pub fn view(self, quiet: &'q Quiet<'_>) -> Result<View<'q>, Refusal> {
        match self {
            GradientNow::Array(array) => View::of_array(quiet, array),
            GradientNow::Source(source) => source.view(quiet),
            GradientNow::None | GradientNow::Unknown => Err(Refusal::NotAnArray),
        }
    }

    /// The header, if it is a NumPy array.
    #[inline]
    pub fn header(self) -> Option<Header<'q>> {
        match self {
            GradientNow::Array(array) => Some(Header::of(array)),
            _ => None,
        }
    }

    /// A reference to what keeps the memory, if a reference does.
    pub fn hold(self, quiet: &Quiet<'_>) -> Option<Py<PyAny>> {
        match self {
            GradientNow::Array(array) => Some(array.hold(quiet)),
            GradientNow::Source(source) => source.hold(quiet),
            GradientNow::None | GradientNow::Unknown => None,
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
