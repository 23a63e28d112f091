//! Exchanges the contents of arrays: parameters and their averages.

use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PySlice;

/// Elements that are set aside at a time.
const PART: usize = 1 << 16;

/// Two arrays of one shape and dtype.
pub(crate) type Pair<'py> = [Bound<'py, PyUntypedArray>; 2];

/// Exchanges their contents, setting no more than a part of one aside.
pub(crate) fn swap([a, b]: &Pair<'_>) -> PyResult<()> {
    let py = a.py();
    let ellipsis = py.Ellipsis();
    let len = a.shape().first().copied().unwrap_or(1);
    if a.len() <= PART {
        let aside = b.call_method0(intern!(py, "copy"))?;
        b.set_item(&ellipsis, a)?;
        return a.set_item(&ellipsis, aside);
    }
    // Row by row where a row is large itself.
    let rows = (PART * len / a.len()).max(1);
    for start in (0..len).step_by(rows) {
        let end = (start + rows).min(len);
        let part: Bound<'_, PyAny> = match rows {
            1 => (start, &ellipsis).into_pyobject(py)?.into_any(),
            _ => PySlice::new(py, start as isize, end as isize, 1).into_any(),
        };
        let [a, b] = [a.get_item(&part)?, b.get_item(&part)?];
        swap(&[a.cast_into()?, b.cast_into()?])?;
    }
    Ok(())
}
