//! The second door to unsafe code: memory that belongs to Python objects.
//!
//! Whatever comes in (NumPy, DLPack, buffers) becomes a [`Tensor`]: an address with a type, a shape
//! and strides, checked here. What other modules do with it is safe until [`work`] turns checked
//! tensors into work for the kernel.

pub(crate) mod dict;
pub(crate) mod dlpack;
pub(crate) mod overlap;
pub(crate) mod torch;
pub(crate) mod work;

use numpy::npyffi::{
    NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_F_CONTIGUOUS, NPY_ARRAY_WRITEABLE,
    NPY_TYPES,
};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PySlice, PyTuple};
use pyo3::{PyTraverseError, PyVisit};
use smallvec::SmallVec;

use super::parameter::Parameter;
use dlpack::{Exchange, Managed};

/// The element types of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DType {
    F32,
    F64,
}

impl DType {
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => size_of::<f32>(),
            DType::F64 => size_of::<f64>(),
        }
    }

    /// NumPy's name.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
        }
    }
}

/// An array as it was when it was read. Strides are in bytes.
pub(crate) struct Tensor {
    pub data: usize,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub strides: Vec<isize>,
    pub access: Access,
    pub is_aligned: bool,
    /// Of a NumPy array.
    pub header: Option<Header>,
    /// What the header's address of the dtype belongs to: another one must not get that address.
    pub descr: Option<Py<PyArrayDescr>>,
    /// Keeps the memory of a capsule.
    pub managed: Option<Managed>,
}

/// Whether a step may write to an array, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Writable,
    ReadOnly,
    /// A producer that exports a copy: what is written there is lost.
    Copy,
    /// A capsule older than DLPack 1.0 cannot say that its memory is immutable, and JAX's and
    /// TensorFlow's is.
    Legacy,
}

/// Why an object is not taken: what was wanted, what was found.
pub(crate) enum Refusal {
    Type(String, String),
    Value(String, String),
    Python(PyErr),
}

impl From<PyErr> for Refusal {
    fn from(error: PyErr) -> Self {
        Refusal::Python(error)
    }
}

impl Refusal {
    fn dtype(name: &str, shape: &[usize]) -> Self {
        Refusal::Type("float32 or float64".into(), describe_as(name, shape))
    }

    /// Wants no more than a parameter's own type and shape.
    pub fn wanting(self, destination: &Destination) -> Self {
        match self {
            Refusal::Type(_, found) => Refusal::Type(destination.describe(), found),
            other => other,
        }
    }

    /// The exception, naming the culprit.
    pub fn at(self, culprit: impl std::fmt::Display) -> PyErr {
        match self {
            Refusal::Type(wanted, found) => {
                PyTypeError::new_err(format!("{culprit}: expected {wanted}, got {found}"))
            }
            Refusal::Value(wanted, found) => {
                PyValueError::new_err(format!("{culprit}: expected {wanted}, got {found}"))
            }
            Refusal::Python(error) => error,
        }
    }
}

/// "float32 of shape (64, 4)".
pub(crate) fn describe(dtype: DType, shape: &[usize]) -> String {
    describe_as(dtype.name(), shape)
}

fn describe_as(dtype: &str, shape: &[usize]) -> String {
    let lens: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if lens.len() == 1 { "," } else { "" };
    format!("{dtype} of shape ({}{comma})", lens.join(", "))
}

/// The strides of a C-contiguous array.
pub(crate) fn c_strides(shape: &[usize], dtype: DType) -> Vec<isize> {
    let mut stride = dtype.size() as isize;
    let mut strides: Vec<isize> = shape
        .iter()
        .rev()
        .map(|&len| {
            let this = stride;
            stride = stride.saturating_mul(len.max(1) as isize);
            this
        })
        .collect();
    strides.reverse();
    strides
}

impl Tensor {
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn describe(&self) -> String {
        describe(self.dtype, &self.shape)
    }

    /// The dimensions longer than 1, from the largest stride to the smallest.
    fn dims_by_stride(&self) -> Vec<(usize, isize)> {
        let dims = self.shape.iter().copied().zip(self.strides.iter().copied());
        let mut dims: Vec<_> = dims.filter(|dim| dim.0 != 1).collect();
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.1));
        dims
    }

    /// Whether the elements fill a stretch of memory without gaps, in any order of the dimensions.
    pub fn is_dense(&self) -> bool {
        let mut stride = self.dtype.size() as isize;
        self.numel() == 0
            || self.dims_by_stride().into_iter().rev().all(|(len, found)| {
                let is_next = found == stride;
                stride = stride.saturating_mul(len as isize);
                is_next
            })
    }

    /// Reads a NumPy array. Saying why one is refused runs Python code.
    pub fn of_array(array: &Bound<'_, PyUntypedArray>) -> Result<Tensor, Refusal> {
        Self::of_array_quietly(array).ok_or_else(|| {
            let descr = array.dtype();
            match float_of(&descr) {
                None => Refusal::dtype(&descr.to_string(), array.shape()),
                Some(dtype) => Refusal::Type(
                    format!("native-endian {}", dtype.name()),
                    format!("byte-swapped {descr}"),
                ),
            }
        })
    }

    /// As [`Tensor::of_array`], without a reason and without running Python code.
    pub fn of_array_quietly(array: &Bound<'_, PyUntypedArray>) -> Option<Tensor> {
        let descr = array.dtype();
        let dtype = float_of(&descr).filter(|_| descr.is_native_byteorder() != Some(false))?;
        let header = Header::of(array);
        Some(Tensor {
            data: header.data,
            dtype,
            shape: array.shape().to_vec(),
            strides: array.strides().to_vec(),
            access: match header.flags & NPY_ARRAY_WRITEABLE {
                0 => Access::ReadOnly,
                _ => Access::Writable,
            },
            is_aligned: header.is_aligned(),
            header: Some(header),
            descr: Some(descr.unbind()),
            managed: None,
        })
    }

    /// That it can be written by a step.
    pub fn check_destination(&self) -> Result<(), Refusal> {
        let found = match self.access {
            Access::Writable => None,
            Access::ReadOnly => Some("a read-only one"),
            Access::Copy => Some("a copy of one"),
            Access::Legacy => Some("a legacy DLPack capsule, which may be immutable,"),
        };
        if let Some(found) = found {
            let found = format!("{found} of {}", self.describe());
            return Err(Refusal::Value("a writable array".into(), found));
        }
        if !self.is_aligned {
            return Err(Refusal::Value(
                "an aligned array".into(),
                format!("unaligned {}", self.describe()),
            ));
        }
        Ok(())
    }

    /// That no two of its indices are the same element.
    pub fn check_apart(&self) -> Result<(), Refusal> {
        if self.is_dense() || !self.extent().overlaps_itself()? {
            return Ok(());
        }
        let found = format!("{} whose elements overlap", self.describe());
        Err(Refusal::Value(
            "an array whose elements do not overlap".into(),
            found,
        ))
    }

    fn extent(&self) -> overlap::Extent<'_> {
        let Tensor {
            data,
            shape,
            strides,
            dtype,
            ..
        } = self;
        overlap::Extent {
            data: *data,
            shape,
            strides,
            size: dtype.size(),
        }
    }
}

fn float_of(descr: &Bound<'_, PyArrayDescr>) -> Option<DType> {
    match descr.num() {
        n if n == NPY_TYPES::NPY_FLOAT as i32 => Some(DType::F32),
        n if n == NPY_TYPES::NPY_DOUBLE as i32 => Some(DType::F64),
        _ => None,
    }
}

impl From<overlap::OutOfMemory> for Refusal {
    fn from(_: overlap::OutOfMemory) -> Self {
        Refusal::Python(overlap::OutOfMemory.into())
    }
}

impl From<overlap::OutOfMemory> for PyErr {
    fn from(_: overlap::OutOfMemory) -> Self {
        PyMemoryError::new_err("not enough memory to check whether arrays overlap")
    }
}

/// What of a NumPy array can change between steps, read in a few ns.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub data: usize,
    descr: usize,
    flags: i32,
}

impl Header {
    #[inline]
    pub fn of(array: &Bound<'_, PyUntypedArray>) -> Header {
        // SAFETY: `array` is a NumPy array, and the GIL is held.
        let fields = unsafe { &(*array.as_array_ptr()).fields };
        Header {
            data: fields.data as usize,
            descr: fields.descr as usize,
            flags: fields.flags,
        }
    }

    /// Whether two arrays of one shape are walked alike, as far as one can tell from the flags.
    fn is_contiguous_like(self, other: Header) -> bool {
        self.flags & other.flags & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS) != 0
    }

    fn is_aligned(self) -> bool {
        self.flags & NPY_ARRAY_ALIGNED != 0
    }
}

/// How a parameter's memory is found.
pub(crate) enum Source {
    /// A NumPy array, or one that shares its memory with a buffer.
    Array(Py<PyUntypedArray>),
    /// Its `data`, and the count of assignments to it when that was read.
    Parameter(Py<Parameter>, Py<PyUntypedArray>, usize),
    /// A type with the C exchange API.
    Exchange(Py<PyAny>, Exchange),
    /// An object that hands out a new capsule every time.
    Capsule(Py<PyAny>),
}

impl Source {
    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Source::Array(array) => visit.call(array),
            Source::Parameter(parameter, data, _) => {
                visit.call(parameter)?;
                visit.call(data)
            }
            Source::Exchange(object, _) | Source::Capsule(object) => visit.call(object),
        }
    }

    pub fn of(object: &Bound<'_, PyAny>) -> Result<Source, Refusal> {
        if let Ok(parameter) = object.cast::<Parameter>() {
            let (data, version) = parameter.get().data_and_version(object.py());
            return Ok(Source::Parameter(
                parameter.clone().unbind(),
                data.unbind(),
                version,
            ));
        }
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            check_mask(array)?;
            return Ok(Source::Array(array.clone().unbind()));
        }
        if is_scalar(object)? {
            return Err(not_an_array(object));
        }
        if let Some(exchange) = Exchange::of(object)? {
            check_sign(object)?;
            return Ok(Source::Exchange(object.clone().unbind(), exchange));
        }
        if dlpack::has_dlpack(&object.get_type()) {
            return Ok(Source::Capsule(object.clone().unbind()));
        }
        match PyMemoryView::from(object) {
            Ok(view) => Ok(Source::Array(as_array(&view)?.unbind())),
            Err(_) => Err(not_an_array(object)),
        }
    }

    /// The NumPy array that was read last, if it was one.
    #[inline]
    pub fn array<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyUntypedArray>> {
        match self {
            Source::Array(array) => Some(array.bind(py).clone()),
            Source::Parameter(_, data, _) => Some(data.bind(py).clone()),
            _ => None,
        }
    }

    /// Whether it still is what was read last; false if that cannot be told at a glance.
    #[inline]
    fn is_current(&self, py: Python<'_>, destination: &Destination) -> bool {
        match self {
            Source::Array(array) => destination.is_current(array.bind(py)),
            Source::Parameter(parameter, data, version) => {
                parameter.get().version() == *version && destination.is_current(data.bind(py))
            }
            _ => false,
        }
    }

    /// As [`Source::read`], without a reason and without running Python code; not of a capsule, which
    /// only Python code makes.
    pub fn read_quietly(&mut self, py: Python<'_>) -> Option<Tensor> {
        match self {
            Source::Array(array) => Tensor::of_array_quietly(array.bind(py)),
            Source::Parameter(parameter, data, version) => {
                let now = parameter.get().data_and_version(py);
                (*data, *version) = (now.0.unbind(), now.1);
                Tensor::of_array_quietly(data.bind(py))
            }
            Source::Exchange(object, exchange) => exchange.read_quietly(object.bind(py)),
            Source::Capsule(_) => None,
        }
    }

    /// Reads the memory as it is now.
    pub fn read(&mut self, py: Python<'_>) -> Result<Tensor, Refusal> {
        match self {
            Source::Array(array) => Tensor::of_array(array.bind(py)),
            Source::Parameter(parameter, data, version) => {
                let now = parameter.get().data_and_version(py);
                (*data, *version) = (now.0.unbind(), now.1);
                Tensor::of_array(data.bind(py))
            }
            Source::Exchange(object, exchange) => exchange.read(object.bind(py)),
            Source::Capsule(object) => {
                dlpack::import_object(object.bind(py))?.ok_or_else(|| not_an_array(object.bind(py)))
            }
        }
    }
}

/// `numpy.asarray`.
pub(crate) fn as_array<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let numpy = object.py().import(intern!(object.py(), "numpy"))?;
    let array = numpy.call_method1(intern!(object.py(), "asarray"), (object,))?;
    Ok(array.cast_into()?)
}

/// NumPy's scalars are buffers and would pass for arrays without dimensions.
fn is_scalar(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let numpy = object.py().import(intern!(object.py(), "numpy"))?;
    object.is_instance(&numpy.getattr(intern!(object.py(), "generic"))?)
}

/// Refuses NumPy's masked arrays: a step knows no masks.
pub(crate) fn check_mask(array: &Bound<'_, PyUntypedArray>) -> Result<(), Refusal> {
    let py = array.py();
    if array.get_type().is(py.get_type::<PyUntypedArray>()) {
        return Ok(());
    }
    let masked = py.import(intern!(py, "numpy.ma"))?.getattr("MaskedArray")?;
    match array.is_instance(&masked)? {
        false => Ok(()),
        true => Err(Refusal::Type(
            "an array without a mask (filled() makes one)".into(),
            "a masked array".into(),
        )),
    }
}

fn not_an_array(object: &Bound<'_, PyAny>) -> Refusal {
    Refusal::Type("a float32 or float64 array".into(), class_name(object))
}

fn class_name(object: &Bound<'_, PyAny>) -> String {
    object
        .get_type()
        .name()
        .map_or_else(|_| "an object".into(), |name| name.to_string())
}

/// Refuses torch's `z.conj().imag`, whose sign is in a bit that the memory does not show.
fn check_sign(object: &Bound<'_, PyAny>) -> Result<(), Refusal> {
    match object.call_method0(intern!(object.py(), "is_neg")) {
        Ok(is_negated) if is_negated.is_truthy()? => {
            let wanted = "a tensor without a pending negation (resolve_neg() makes one)";
            Err(Refusal::Value(wanted.into(), "one with".into()))
        }
        _ => Ok(()),
    }
}

/// A parameter as a step sees it: where it is, and where its state is.
pub(crate) struct Destination {
    pub data: usize,
    pub dtype: DType,
    /// Beside the rest, since every step compares it.
    pub shape: SmallVec<[usize; 3]>,
    pub numel: usize,
    strides: Vec<isize>,
    is_dense: bool,
    /// Of all its state arrays, which are dense.
    state_strides: Vec<isize>,
    /// Dense and walked like its state.
    is_like_state: bool,
    /// Of the NumPy array it was read from, and the dtype that it points to.
    header: Option<Header>,
    descr: Option<Py<PyArrayDescr>>,
}

impl Destination {
    pub fn new(tensor: Tensor) -> Self {
        let is_dense = tensor.is_dense();
        let state_strides = match is_dense {
            true => tensor.strides.clone(),
            false => c_strides(&tensor.shape, tensor.dtype),
        };
        Destination {
            data: tensor.data,
            dtype: tensor.dtype,
            shape: SmallVec::from_slice(&tensor.shape),
            numel: tensor.numel(),
            strides: tensor.strides,
            is_dense,
            state_strides,
            is_like_state: is_dense,
            header: tensor.header,
            descr: tensor.descr,
        }
    }

    /// That an array has the parameter's type and shape.
    pub fn check_like(&self, dtype: DType, shape: &[usize]) -> Result<(), Refusal> {
        if dtype == self.dtype && shape == &self.shape[..] {
            return Ok(());
        }
        let (wanted, found) = (self.describe(), describe(dtype, shape));
        Err(match dtype == self.dtype {
            true => Refusal::Value(wanted, found),
            false => Refusal::Type(wanted, found),
        })
    }

    /// Whether the array is still what it was.
    #[inline]
    pub fn is_current(&self, array: &Bound<'_, PyUntypedArray>) -> bool {
        let header = Header::of(array);
        self.header == Some(header)
            && is_equal(array.shape(), &self.shape)
            && (header.is_contiguous_like(header) || array.strides() == self.strides)
    }

    /// Takes note of where the parameter is now; its type and shape are the same. True if it has
    /// moved.
    pub fn move_to(&mut self, tensor: Tensor) -> bool {
        let has_moved = tensor.data != self.data || tensor.strides != self.strides;
        self.is_dense = tensor.is_dense();
        self.data = tensor.data;
        self.strides = tensor.strides;
        (self.header, self.descr) = (tensor.header, tensor.descr);
        self.is_like_state =
            self.is_dense && is_same_walk(&self.shape, &self.strides, &self.state_strides);
        has_moved
    }

    pub fn describe(&self) -> String {
        describe(self.dtype, &self.shape)
    }

    /// Takes over the state of another parameter of this type and shape.
    fn inherit_state(&mut self, other: &Destination) {
        self.state_strides.clone_from(&other.state_strides);
        self.is_like_state =
            self.is_dense && is_same_walk(&self.shape, &self.strides, &self.state_strides);
    }

    /// Is nowhere until it is read again. True if it was somewhere.
    fn forget(&mut self) -> bool {
        self.header = None;
        std::mem::take(&mut self.data) != 0
    }

    pub fn state_strides(&self) -> &[isize] {
        &self.state_strides
    }

    /// The address of a gradient that is a NumPy array and can be walked like the parameter; `None`
    /// if it must be looked at more closely.
    #[inline]
    pub fn simple_gradient(&self, array: &Bound<'_, PyUntypedArray>) -> Option<usize> {
        let (mine, its) = (self.header?, Header::of(array));
        (its.descr == mine.descr
            && its.is_aligned()
            && its.is_contiguous_like(mine)
            && is_equal(array.shape(), &self.shape))
        .then_some(its.data)
    }

    /// What its elements span, for [`overlap`].
    pub fn extent(&self) -> overlap::Extent<'_> {
        overlap::Extent {
            data: self.data,
            shape: &self.shape,
            strides: &self.strides,
            size: self.dtype.size(),
        }
    }
}

/// Where a gradient is, as checked against its parameter.
pub(crate) struct Gradient {
    data: usize,
    /// None if it is walked like the parameter.
    strides: Option<Box<[isize]>>,
}

impl Gradient {
    /// Checks type and shape.
    pub fn new(tensor: &Tensor, destination: &Destination) -> Result<Self, Refusal> {
        destination.check_like(tensor.dtype, &tensor.shape)?;
        let is_like = tensor.is_aligned
            && is_same_walk(&destination.shape, &tensor.strides, &destination.strides);
        let strides = (!is_like).then(|| tensor.strides.as_slice().into());
        Ok(Gradient {
            data: tensor.data,
            strides,
        })
    }
}

/// `a == b`, without the call to `memcmp` that costs more than the comparison of two or three
/// lengths.
#[inline]
fn is_equal(a: &[usize], b: &[usize]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}

fn is_same_walk(shape: &[usize], a: &[isize], b: &[isize]) -> bool {
    shape
        .iter()
        .zip(a.iter().zip(b))
        .all(|(&len, (a, b))| len == 1 || a == b)
}

/// Whether two references are to the same object.
#[inline]
pub(crate) fn is_same(a: &Bound<'_, PyAny>, b: &Py<PyAny>) -> bool {
    a.as_ptr() == b.as_ptr()
}

/// A one-dimensional array of the optimizer's own.
pub(crate) struct Buffer {
    array: Py<PyUntypedArray>,
    pub data: usize,
    numel: usize,
}

impl Buffer {
    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.array)
    }

    /// A buffer whose elements are all `start`.
    pub fn new(py: Python<'_>, dtype: DType, numel: usize, start: f64) -> PyResult<Self> {
        let numpy = py.import(intern!(py, "numpy"))?;
        // `zeros` leaves the memory untouched until it is first written.
        let array = match start {
            0.0 => numpy.call_method1(intern!(py, "zeros"), (numel, dtype.name()))?,
            start => numpy.call_method1(intern!(py, "full"), (numel, start, dtype.name()))?,
        };
        let array = array.cast_into::<PyUntypedArray>()?;
        Ok(Buffer {
            data: Header::of(&array).data,
            array: array.unbind(),
            numel,
        })
    }

    /// Whether its memory still is where it was: a view's `base` is within a user's reach.
    pub fn is_current(&self, py: Python<'_>) -> bool {
        let array = self.array.bind(py);
        Header::of(array).data == self.data && array.shape() == [self.numel]
    }

    /// A NumPy view of the elements from `offset` on that has the shape and the walk of a dense
    /// array.
    pub fn view<'py>(
        &self,
        py: Python<'py>,
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let numel = shape.iter().product::<usize>();
        let slice = PySlice::new(py, offset as isize, (offset + numel) as isize, 1);
        let mut axes: Vec<usize> = (0..shape.len()).collect();
        axes.sort_by_key(|&axis| std::cmp::Reverse((strides[axis], shape[axis])));
        let sorted = PyTuple::new(py, axes.iter().map(|&axis| shape[axis]))?;
        let mut order = vec![0; axes.len()];
        axes.iter()
            .enumerate()
            .for_each(|(place, &axis)| order[axis] = place);
        let view = self
            .array
            .bind(py)
            .get_item(slice)?
            .call_method1(intern!(py, "reshape"), (sorted,))?;
        let view = view.call_method1(intern!(py, "transpose"), PyTuple::new(py, order)?)?;
        Ok(view.cast_into::<PyUntypedArray>()?)
    }
}
