//! Dicts that are read at every step: a walk over borrowed entries instead of a look-up for each.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFloat};
use pyo3::{PyTraverseError, PyVisit, ffi};
use smallvec::SmallVec;

/// The entries of a dict in their order, borrowed.
///
/// # Safety
/// As long as it or anything it has lent is used, the GIL is held and no Python code runs.
pub(super) struct Walk {
    dict: *mut ffi::PyObject,
    position: ffi::Py_ssize_t,
}

impl Walk {
    /// # Safety
    /// As [`Walk`]; `dict` is a dict.
    pub unsafe fn new(dict: *mut ffi::PyObject) -> Self {
        Walk { dict, position: 0 }
    }
}

impl Iterator for Walk {
    /// Key and value.
    type Item = (*mut ffi::PyObject, *mut ffi::PyObject);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (mut key, mut value) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: by the contract of `new` this is a dict that nobody changes.
        let found =
            unsafe { ffi::PyDict_Next(self.dict, &mut self.position, &mut key, &mut value) };
        (found != 0).then_some((key, value))
    }
}

/// What a dict held when it was last looked at.
pub(crate) struct Entries(Vec<(Py<PyAny>, Py<PyAny>)>);

/// Entries whose value is another float now: the place, the number.
pub(crate) type Moved = SmallVec<[(usize, f64); 2]>;

impl Entries {
    pub fn of(dict: &Bound<'_, PyDict>) -> Self {
        let entries = dict.iter();
        Entries(
            entries
                .map(|(key, value)| (key.unbind(), value.unbind()))
                .collect(),
        )
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.iter().try_for_each(|(key, value)| {
            visit.call(key)?;
            visit.call(value)
        })
    }

    pub fn iter<'a, 'py: 'a>(
        &'a self,
        py: Python<'py>,
    ) -> impl Iterator<Item = (&'a Bound<'py, PyAny>, &'a Bound<'py, PyAny>)> {
        let entries = self.0.iter();
        entries.map(move |(key, value)| (key.bind(py), value.bind(py)))
    }

    pub fn value<'py>(&self, py: Python<'py>, place: usize) -> &Bound<'py, PyAny> {
        self.0[place].1.bind(py)
    }

    /// Compares the dict by the identity of its keys and values, and takes note of other floats.
    /// None if anything else is different.
    #[inline]
    pub fn follow(&mut self, dict: &Bound<'_, PyDict>) -> Option<Moved> {
        let mut moved = Moved::new();
        let mut count = 0;
        // SAFETY: the GIL is held; floats are read and dropped here, references compared, and
        // neither runs Python code.
        for (key, value) in unsafe { Walk::new(dict.as_ptr()) } {
            let (known_key, known_value) = self.0.get_mut(count)?;
            if known_key.as_ptr() != key {
                return None;
            }
            if known_value.as_ptr() != value {
                // SAFETY: the walk lends valid references.
                let value = unsafe { Borrowed::from_ptr(dict.py(), value) };
                let number = value.cast_exact::<PyFloat>().ok()?.value();
                let is_float = known_value
                    .bind(dict.py())
                    .is_exact_instance_of::<PyFloat>();
                if !is_float {
                    return None;
                }
                *known_value = value.to_owned().unbind();
                moved.push((count, number));
            }
            count += 1;
        }
        (count == self.0.len()).then_some(moved)
    }
}
