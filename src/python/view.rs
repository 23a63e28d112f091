//! Memory that belongs to Python's objects, as it is now: NumPy headers, buffers, DLPack, torch.
//!
//! Whatever comes in becomes a [`View`]: an address with a type, a shape and strides. A view is not
//! kept: it borrows a [`Quiet`], which is the fact that no Python code runs, for Python code may move
//! or free any memory. Why an object is no view is a [`Refusal`], a plain value; only who raises
//! describes it, when Python code may run again.
//!
//! # Limitations
//! Other threads run Python code once a step has released the GIL. A long step does, and holds
//! references to all objects whose memory it uses; but a reference to a tensor does not keep
//! `p.data = …` from freeing its memory. That is a race in the program, as with torch's own kernels,
//! and nobody can promise that it does not happen.

use numpy::npyffi::{
    NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_F_CONTIGUOUS, NPY_ARRAY_WRITEABLE,
    NPY_TYPES, PyArray_Descr, PyArrayObject,
};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::PyTypeInfo;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyFloatMethods, PyMemoryView, PyString, PyStringMethods};
use pyo3::{ffi, intern};
use smallvec::SmallVec;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering::Relaxed};

use super::overlap::{Extent, OutOfMemory};
use crate::kernel::DType;
use crate::kernel::stage::MAX_DIMS;

const _: () = assert!(
    size_of::<isize>() == size_of::<i64>(),
    "the Python package is for platforms of 64 bits, where NumPy's lengths are DLPack's"
);

/// The GIL is held and no Python code runs, as long as it is borrowed.
pub(crate) struct Quiet<'py> {
    py: Python<'py>,
}

impl<'py> Quiet<'py> {
    /// Runs `work`, which can neither hold nor get what running Python code takes: nothing that has
    /// the GIL's lifetime is `Send`.
    ///
    /// This is the one place where the fact is made. `work` must not attach to the interpreter anew;
    /// what it is given does not.
    #[inline]
    pub fn during<R>(py: Python<'py>, work: impl FnOnce(&Quiet<'py>) -> R + Send) -> R {
        work(&Quiet { py })
    }

    /// For calls that run no Python code.
    #[inline(always)]
    pub(super) fn py(&self) -> Python<'py> {
        self.py
    }
}

/// An object that somebody else holds as long as no Python code runs: a dict, a list, an owner.
#[derive(Clone, Copy)]
pub(crate) struct Lent<'q> {
    object: NonNull<ffi::PyObject>,
    quiet: PhantomData<&'q ()>,
}

impl<'q> Lent<'q> {
    /// Of a reference.
    #[inline]
    pub fn of<T>(_: &'q Quiet<'_>, object: &'q Py<T>) -> Self {
        // SAFETY: a reference is not null.
        #[allow(unsafe_code)]
        let object = unsafe { NonNull::new_unchecked(object.as_ptr()) };
        Lent {
            object,
            quiet: PhantomData,
        }
    }

    #[inline]
    pub fn as_ptr(self) -> *mut ffi::PyObject {
        self.object.as_ptr()
    }

    #[inline]
    #[allow(unsafe_code)]
    pub fn class(self) -> *mut ffi::PyTypeObject {
        // SAFETY: it is held.
        unsafe { ffi::Py_TYPE(self.as_ptr()) }
    }

    /// A reference to it.
    #[inline]
    #[allow(unsafe_code)]
    pub fn hold(self, quiet: &Quiet<'_>) -> Py<PyAny> {
        // SAFETY: it is held.
        unsafe { Bound::from_borrowed_ptr(quiet.py(), self.as_ptr()) }.unbind()
    }

    /// As a NumPy array, if it is one and of no subclass: a comparison instead of a call.
    #[inline]
    pub fn exact_array(self, quiet: &Quiet<'_>) -> Option<LentArray<'q>> {
        static CLASS: AtomicPtr<ffi::PyTypeObject> = AtomicPtr::new(std::ptr::null_mut());
        let class = self.class();
        let is_array = class == CLASS.load(Relaxed) || {
            CLASS.store(PyUntypedArray::type_object_raw(quiet.py()), Relaxed);
            class == CLASS.load(Relaxed)
        };
        is_array.then_some(LentArray(self))
    }
}

impl<'q> Lent<'q> {
    /// The keys and values of a dict, in their order; None if it is none.
    #[inline]
    #[allow(unsafe_code)]
    pub fn entries(self, _: &'q Quiet<'_>) -> Option<Entries<'q>> {
        // SAFETY: it is held.
        let is_dict = unsafe { ffi::PyDict_Check(self.as_ptr()) } != 0;
        is_dict.then_some(Entries {
            dict: self,
            position: 0,
        })
    }

    /// The items of a list or tuple; None if it is neither.
    #[inline]
    #[allow(unsafe_code)]
    pub fn items(self, _: &'q Quiet<'_>) -> Option<Items<'q>> {
        let object = self.as_ptr();
        // SAFETY: it is held, and is what is asked for.
        let (is_list, len) = unsafe {
            if ffi::PyList_Check(object) != 0 {
                (true, ffi::PyList_Size(object))
            } else if ffi::PyTuple_Check(object) != 0 {
                (false, ffi::PyTuple_Size(object))
            } else {
                return None;
            }
        };
        Some(Items {
            object: self,
            is_list,
            len: len as usize,
        })
    }

    /// Whether it is a string, of no subclass, with this text.
    pub fn is_string(self, quiet: &Quiet<'_>, text: &str) -> bool {
        let object = self.hold(quiet);
        let string = object.bind(quiet.py()).cast_exact::<PyString>();
        string.is_ok_and(|string| string.to_str().is_ok_and(|found| found == text))
    }

    /// Whether it is Python's None.
    #[inline]
    pub fn is_none(self, quiet: &Quiet<'_>) -> bool {
        self.as_ptr() == quiet.py().None().as_ptr()
    }

    /// The value of a float, if it is one and of no subclass.
    pub fn float(self, quiet: &Quiet<'_>) -> Option<f64> {
        let object = self.hold(quiet);
        let object = object.bind(quiet.py());
        object
            .cast_exact::<PyFloat>()
            .ok()
            .map(PyFloatMethods::value)
    }
}

/// [`Lent::items`].
#[derive(Clone, Copy)]
pub(crate) struct Items<'q> {
    object: Lent<'q>,
    /// A tuple otherwise.
    is_list: bool,
    len: usize,
}

impl<'q> Items<'q> {
    /// The item of that index; None if there is none.
    #[inline]
    #[allow(unsafe_code)]
    pub fn get(&self, index: usize) -> Option<Lent<'q>> {
        if index >= self.len {
            return None;
        }
        let (object, index) = (self.object.as_ptr(), index as ffi::Py_ssize_t);
        // SAFETY: this is a list or a tuple that has such an item, which it holds: nobody changes it
        // while no Python code runs.
        let item = unsafe {
            match self.is_list {
                true => ffi::PyList_GetItem(object, index),
                false => ffi::PyTuple_GetItem(object, index),
            }
        };
        Some(Lent {
            object: NonNull::new(item)?,
            quiet: PhantomData,
        })
    }
}

/// [`Lent::entries`].
pub(crate) struct Entries<'q> {
    dict: Lent<'q>,
    position: ffi::Py_ssize_t,
}

impl<'q> Iterator for Entries<'q> {
    type Item = (Lent<'q>, Lent<'q>);

    #[inline]
    #[allow(unsafe_code)]
    fn next(&mut self) -> Option<Self::Item> {
        let (mut key, mut value) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (dict, position) = (self.dict.as_ptr(), &mut self.position);
        // SAFETY: this is a dict, which nobody changes while no Python code runs, and which holds
        // what it has.
        let found = unsafe { ffi::PyDict_Next(dict, position, &mut key, &mut value) };
        let lent = |object| Lent {
            // SAFETY: an entry that was found has a key and a value.
            object: unsafe { NonNull::new_unchecked(object) },
            quiet: PhantomData,
        };
        (found != 0).then(|| (lent(key), lent(value)))
    }
}

/// A NumPy array that somebody else holds.
#[derive(Clone, Copy)]
pub(crate) struct LentArray<'q>(Lent<'q>);

impl<'q> LentArray<'q> {
    /// Of a reference.
    #[inline]
    pub fn of(quiet: &'q Quiet<'_>, array: &'q Py<PyUntypedArray>) -> Self {
        LentArray(Lent::of(quiet, array))
    }

    /// A reference to it.
    pub fn hold(self, quiet: &Quiet<'_>) -> Py<PyAny> {
        self.0.hold(quiet)
    }
}

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    /// Of the numbers; those of a complex type are pairs of reals.
    pub dtype: DType,
    pub is_complex: bool,
}

impl Element {
    pub const fn real(dtype: DType) -> Self {
        Element {
            dtype,
            is_complex: false,
        }
    }

    pub const fn complex(dtype: DType) -> Self {
        Element {
            dtype,
            is_complex: true,
        }
    }

    /// Real numbers of an element.
    #[inline]
    pub const fn parts(self) -> usize {
        if self.is_complex { 2 } else { 1 }
    }

    /// Bytes of an element.
    #[inline]
    pub const fn size(self) -> usize {
        self.dtype.size() * self.parts()
    }

    /// Whether parameters compute in it.
    #[inline]
    pub const fn is_compute_type(self) -> bool {
        matches!(self.dtype, DType::F32 | DType::F64)
    }

    /// NumPy's name.
    pub const fn name(self) -> &'static str {
        match (self.dtype, self.is_complex) {
            (DType::F16, false) => "float16",
            (DType::BF16, false) => "bfloat16",
            (DType::F32, false) => "float32",
            (DType::F64, false) => "float64",
            (DType::F32, true) => "complex64",
            (DType::F64, true) => "complex128",
            (DType::U8, _) => "uint8",
            (DType::I8, _) => "int8",
            (DType::I16, _) => "int16",
            (DType::F16 | DType::BF16, true) => "complex32",
        }
    }
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

/// An array in host memory as it is now.
#[derive(Clone, Copy)]
pub(crate) struct View<'q> {
    /// The address of the first element.
    pub data: usize,
    pub shape: &'q [i64],
    /// Of the same length; in units of `stride_unit` bytes.
    strides: &'q [i64],
    stride_unit: u8,
    pub element: Element,
    pub access: Access,
    pub is_aligned: bool,
}

impl<'q> View<'q> {
    /// Takes what an array says of itself. Checks that it fits in memory.
    #[inline]
    pub fn new(
        data: usize,
        element: Element,
        shape: &'q [i64],
        strides: &'q [i64],
        stride_unit: usize,
        access: Access,
    ) -> Result<Self, Refusal> {
        if shape.len() > MAX_DIMS || strides.len() != shape.len() {
            return Err(Refusal::Dimensions(shape.len() as i64));
        }
        let mut bytes = Some(element.size() as i64);
        for &len in shape {
            bytes = match len {
                0 => bytes,
                1.. => bytes.and_then(|bytes| bytes.checked_mul(len)),
                _ => None,
            };
        }
        if bytes.is_none() {
            return Err(Refusal::Shape);
        }
        // An empty array may be nowhere.
        let data = match data {
            0 if !shape.contains(&0) => return Err(Refusal::NoMemory),
            0 => element.size(),
            data => data,
        };
        Ok(View {
            data,
            element,
            shape,
            strides,
            stride_unit: stride_unit as u8,
            access,
            is_aligned: data.is_multiple_of(element.dtype.size()),
        })
    }

    /// Real numbers.
    #[inline]
    pub fn numel(&self) -> usize {
        self.shape
            .iter()
            .fold(self.element.parts(), |numel, &len| numel * len as usize)
    }

    /// The stride of a dimension in bytes.
    #[inline]
    pub fn stride(&self, dim: usize) -> isize {
        self.strides[dim].wrapping_mul(self.stride_unit.into()) as isize
    }

    /// In bytes, of all dimensions.
    pub fn strides(&self) -> impl ExactSizeIterator<Item = isize> + DoubleEndedIterator {
        (0..self.shape.len()).map(|dim| self.stride(dim))
    }

    /// Whether it has the same shape.
    #[inline]
    pub fn is_shaped_like(&self, other: &View<'_>) -> bool {
        is_equal(self.shape, other.shape)
    }

    /// Whether it has the same shape and the same strides where they count.
    #[inline]
    pub fn is_walked_like(&self, other: &View<'_>) -> bool {
        let is_like = |dim: usize| match self.stride_unit == other.stride_unit {
            true => self.strides[dim] == other.strides[dim],
            false => self.stride(dim) == other.stride(dim),
        };
        self.is_shaped_like(other)
            && (0..self.shape.len()).all(|dim| is_like(dim) || self.shape[dim] == 1)
    }

    /// Whether the elements lie in C order without gaps.
    pub fn is_in_order(&self) -> bool {
        let mut next = self.element.size() as isize;
        let mut dims = self.shape.iter().zip(self.strides()).rev();
        dims.all(|(&len, stride)| {
            let is_next = stride == next || len == 1;
            next = next.wrapping_mul(len as isize);
            is_next
        })
    }

    /// Whether the elements fill a stretch of memory without gaps, in any order of the dimensions.
    #[inline]
    pub fn is_dense(&self) -> bool {
        let mut next = (self.element.size() / usize::from(self.stride_unit)) as i64;
        let dims = self.shape.iter().zip(self.strides).rev();
        let mut is_in_order = true;
        for (&len, &stride) in dims {
            is_in_order &= stride == next || len == 1;
            next = next.wrapping_mul(len);
        }
        is_in_order || self.shape.contains(&0) || self.is_dense_permuted()
    }

    #[cold]
    fn is_dense_permuted(&self) -> bool {
        let mut next = self.element.size() as isize;
        self.dims_by_stride()
            .into_iter()
            .rev()
            .all(|(len, stride)| {
                let is_next = stride == next;
                next = next.saturating_mul(len as isize);
                is_next
            })
    }

    /// The dimensions longer than 1, from the largest stride to the smallest.
    fn dims_by_stride(&self) -> Vec<(i64, isize)> {
        let dims = self.shape.iter().copied().zip(self.strides());
        let mut dims: Vec<_> = dims.filter(|dim| dim.0 != 1).collect();
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.1));
        dims
    }

    /// Where its elements are.
    pub fn extent(&self) -> Extent {
        Extent {
            data: self.data,
            dims: self
                .shape
                .iter()
                .map(|&len| len as usize)
                .zip(self.strides())
                .collect(),
            size: self.element.size(),
        }
    }

    /// That it can be written by a step.
    pub fn check_writable(&self) -> Result<(), Refusal> {
        match (self.access, self.is_aligned) {
            (Access::Writable, true) => Ok(()),
            (Access::Writable, false) => Err(Refusal::Unaligned),
            (access, _) => Err(Refusal::Access(access)),
        }
    }
}

/// The strides of a C-contiguous array, in elements.
pub(crate) fn c_strides(shape: &[i64]) -> SmallVec<[i64; 4]> {
    let mut stride = 1i64;
    let mut strides: SmallVec<[i64; 4]> = shape
        .iter()
        .rev()
        .map(|&len| {
            let this = stride;
            stride = stride.saturating_mul(len.max(1));
            this
        })
        .collect();
    strides.reverse();
    strides
}

/// `a == b`, without the call to `memcmp` that costs more than the comparison of two or three
/// lengths.
#[inline]
pub(crate) fn is_equal<T: PartialEq>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}

/// What can change of a NumPy array between steps, read in a few ns.
#[derive(Clone, Copy)]
pub(crate) struct Header<'q> {
    pub data: usize,
    pub shape: &'q [i64],
    pub strides: &'q [i64],
    descr: *mut PyArray_Descr,
    flags: i32,
    quiet: PhantomData<&'q ()>,
}

impl<'q> Header<'q> {
    #[inline]
    #[allow(unsafe_code)]
    pub fn of(array: LentArray<'q>) -> Self {
        // SAFETY: `array` is a NumPy array, which has these fields, with a length and a stride for
        // each dimension. They stay as they are while no Python code runs.
        unsafe {
            let fields = &(*array.0.as_ptr().cast::<PyArrayObject>()).fields;
            let lens = |lens: *mut isize| match fields.nd {
                0 => &[][..], // The pointers may be null.
                nd => std::slice::from_raw_parts(lens.cast::<i64>(), nd as usize),
            };
            Header {
                data: fields.data as usize,
                shape: lens(fields.dimensions),
                strides: lens(fields.strides),
                descr: fields.descr,
                flags: fields.flags,
                quiet: PhantomData,
            }
        }
    }

    /// Its address, flags and dtype's address: what two looks at an array are compared by.
    #[inline]
    pub fn mark(&self) -> Mark {
        Mark {
            data: self.data,
            descr: self.descr as usize,
            flags: self.flags,
        }
    }
}

/// What an array's header said at another time. It is compared, and never followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub data: usize,
    descr: usize,
    flags: i32,
}

impl Mark {
    /// Whether arrays of one shape with these marks are both dense in C order, or both in
    /// Fortran's.
    #[inline]
    pub fn is_contiguous_like(self, other: Mark) -> bool {
        self.flags & other.flags & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS) != 0
    }

    #[inline]
    pub fn is_aligned(self) -> bool {
        self.flags & NPY_ARRAY_ALIGNED != 0
    }

    #[inline]
    pub fn is_of_type(self, other: Mark) -> bool {
        self.descr == other.descr
    }
}

/// `numpy.asarray`.
pub(crate) fn as_array<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let numpy = object.py().import(intern!(object.py(), "numpy"))?;
    let array = numpy.call_method1(intern!(object.py(), "asarray"), (object,))?;
    Ok(array.cast_into()?)
}

/// Refuses masked arrays: a step would not see the mask.
pub(crate) fn refuse_mask(object: &Bound<'_, PyAny>) -> Result<(), Failure> {
    let py = object.py();
    if object.get_type_ptr() == PyUntypedArray::type_object_raw(py) {
        return Ok(());
    }
    let masked = py
        .import(intern!(py, "numpy.ma"))?
        .getattr(intern!(py, "MaskedArray"))?;
    match object.is_instance(&masked)? {
        true => Err(Refusal::Masked.into()),
        false => Ok(()),
    }
}

/// NumPy's number for bfloat16, which a package registers; 0 until one is seen.
static BFLOAT16: AtomicI32 = AtomicI32::new(0);

/// Learns the number of an array's dtype if it is a bfloat16. May run Python code.
#[inline]
pub(crate) fn learn_dtype(array: &Bound<'_, PyUntypedArray>) {
    let dtype = array.dtype();
    if dtype.num() >= NPY_TYPES::NPY_USERDEF as i32 {
        let is_bfloat16 = dtype.typeobj().name().is_ok_and(|name| name == "bfloat16");
        if is_bfloat16 && dtype.itemsize() == 2 {
            BFLOAT16.store(dtype.num(), Relaxed);
        }
    }
}

impl<'q> View<'q> {
    /// Reads a NumPy array.
    #[allow(unsafe_code)]
    pub fn of_array(quiet: &Quiet<'_>, array: LentArray<'q>) -> Result<Self, Refusal> {
        let header = Header::of(array);
        // SAFETY: an array holds its dtype.
        let descr = unsafe { Bound::from_borrowed_ptr(quiet.py(), header.descr.cast()) };
        // SAFETY: that is what it is.
        let descr = unsafe { descr.cast_into_unchecked::<PyArrayDescr>() };
        let dtype = match descr.num() {
            num if num == NPY_TYPES::NPY_HALF as i32 => DType::F16,
            num if num == NPY_TYPES::NPY_FLOAT as i32 => DType::F32,
            num if num == NPY_TYPES::NPY_DOUBLE as i32 => DType::F64,
            num if num == NPY_TYPES::NPY_UBYTE as i32 => DType::U8,
            num if num == NPY_TYPES::NPY_BYTE as i32 => DType::I8,
            num if num == NPY_TYPES::NPY_SHORT as i32 => DType::I16,
            num if num > 0 && num == BFLOAT16.load(Relaxed) => DType::BF16,
            _ => return Err(Refusal::DType),
        };
        if descr.is_native_byteorder() == Some(false) {
            return Err(Refusal::ByteOrder);
        }
        let access = match header.flags & NPY_ARRAY_WRITEABLE {
            0 => Access::ReadOnly,
            _ => Access::Writable,
        };
        let element = Element::real(dtype);
        let view = View::new(
            header.data,
            element,
            header.shape,
            header.strides,
            1,
            access,
        )?;
        Ok(View {
            is_aligned: header.mark().is_aligned(),
            ..view
        })
    }
}

/// What a message wants where nothing is known of the parameter.
pub(crate) const WANTED: &str = "a float16, bfloat16, float32 or float64 array";

/// "float32 of shape (64, 4)".
pub(crate) fn describe_array(dtype: &str, shape: &[i64]) -> String {
    format!("{dtype} of shape {}", shape_name(shape))
}

/// "(64, 4)".
pub(crate) fn shape_name(shape: &[i64]) -> String {
    let lens: Vec<String> = shape.iter().map(i64::to_string).collect();
    let comma = if lens.len() == 1 { "," } else { "" };
    format!("({}{comma})", lens.join(", "))
}

/// Why an array is not taken: a plain value, for it is found where no Python code runs and each look
/// at an array may find one. Only who raises describes it ([`Failure::raise`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not of a type that could be.
    NotAnArray,
    /// NumPy's scalar, which cannot be written.
    Scalar,
    /// A masked array, whose mask a step would not see.
    Masked,
    /// Of another element type.
    DType,
    ByteOrder,
    /// Impossible lengths, or more than memory holds.
    Shape,
    /// So many dimensions.
    Dimensions(i64),
    /// Another shape than the parameter's.
    Unlike,
    /// No address.
    NoMemory,
    Access(Access),
    Unaligned,
    /// Some of its elements are one.
    OverlapsItself,
    /// Shares elements with another array of its parameter.
    Overlaps,
    Device,
    /// A library says that it cannot be read.
    Unreadable,
    /// A sign or conjugation is pending.
    Pending,
    OutOfMemory,
}

impl From<OutOfMemory> for Refusal {
    fn from(_: OutOfMemory) -> Self {
        Refusal::OutOfMemory
    }
}

/// Why an object gave no array where Python code ran to get one.
#[derive(Debug)]
pub(crate) enum Failure {
    Refusal(Refusal),
    /// Its producer has something else than what is wanted by whoever raises, and what.
    Unwanted(String),
    /// A producer did not do what it should: what that is, and what it did.
    Type(&'static str, String),
    Value(&'static str, String),
    /// It raised.
    Python(PyErr),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure::Refusal(refusal)
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Failure::Python(error)
    }
}

impl Failure {
    /// The exception: `culprit` names the array, `wanted` says what was expected, `object` is what
    /// was found. Runs Python code.
    pub fn raise(
        self,
        culprit: impl std::fmt::Display,
        wanted: &str,
        object: &Bound<'_, PyAny>,
    ) -> PyErr {
        let type_error = |wanted: &str, found: &str| {
            PyTypeError::new_err(format!("{culprit}: expected {wanted}, got {found}"))
        };
        let value_error = |wanted: &str, found: &str| {
            PyValueError::new_err(format!("{culprit}: expected {wanted}, got {found}"))
        };
        let refusal = match self {
            Failure::Refusal(refusal) => refusal,
            Failure::Unwanted(found) => return type_error(wanted, &found),
            Failure::Type(wanted, found) => return type_error(wanted, &found),
            Failure::Value(wanted, found) => return value_error(wanted, &found),
            Failure::Python(error) => return error,
        };
        match refusal {
            Refusal::NotAnArray => type_error(wanted, &class_name(object)),
            Refusal::Scalar => type_error(
                wanted,
                &format!("an immutable NumPy scalar ({})", class_name(object)),
            ),
            Refusal::Masked => type_error(
                "an array without a mask (`.filled()` or `.data` gives one)",
                &class_name(object),
            ),
            Refusal::DType => type_error(wanted, &describe(object)),
            Refusal::ByteOrder => {
                let text = |name| attribute(object, name).unwrap_or_default();
                let native = text("dtype.name");
                type_error(
                    &format!("native-endian {native}"),
                    &format!("byte-swapped {}", text("dtype")),
                )
            }
            Refusal::Shape => value_error(
                "a tensor that fits in memory",
                "one with an impossible shape",
            ),
            Refusal::Unlike => value_error(wanted, &describe(object)),
            Refusal::Dimensions(found) => value_error(
                &format!("a tensor of at most {MAX_DIMS} dimensions"),
                &format!("one of {found}"),
            ),
            Refusal::NoMemory => value_error("a tensor with memory", "one without"),
            Refusal::Access(access) => {
                let found = describe(object);
                let kind = match access {
                    Access::Copy => "a copy of one",
                    Access::Legacy => "a legacy DLPack capsule, which may be immutable,",
                    _ => "a read-only one",
                };
                value_error("a writable array", &format!("{kind} of {found}"))
            }
            Refusal::Unaligned => value_error(
                "an aligned array",
                &format!("unaligned {}", describe(object)),
            ),
            Refusal::OverlapsItself | Refusal::Overlaps => value_error(
                "an array whose elements do not overlap",
                &format!("{} whose elements overlap", describe(object)),
            ),
            Refusal::Device => {
                let device = attribute(object, "device").unwrap_or_else(|| class_name(object));
                value_error("an array in host memory", &device)
            }
            Refusal::Unreadable => {
                // A tensor without storage (torch's "meta" among others) says so by its device.
                match (attribute(object, "device"), attribute(object, "layout")) {
                    (Some(device), _) if !device.starts_with("cpu") => {
                        value_error("an array in host memory", &device)
                    }
                    (_, Some(layout)) => type_error("a dense tensor in host memory", &layout),
                    _ => type_error("a dense tensor in host memory", &class_name(object)),
                }
            }
            Refusal::Pending => value_error(
                "a tensor without a pending negation (resolve_neg() makes one)",
                "one with",
            ),
            Refusal::OutOfMemory => OutOfMemory.into(),
        }
    }
}

/// What an attribute of an attribute, "dtype.name", is as text.
fn attribute(object: &Bound<'_, PyAny>, path: &str) -> Option<String> {
    let mut names = path.split('.');
    let found = names.try_fold(object.clone(), |object, name| object.getattr(name));
    found.ok().map(|found| found.to_string())
}

/// "float32 of shape (3,)", as far as the object tells.
fn describe(object: &Bound<'_, PyAny>) -> String {
    // Not every producer has such attributes; its array does.
    let array = || {
        let numpy = object.py().import(intern!(object.py(), "numpy")).ok()?;
        let buffer = PyMemoryView::from(object).and_then(|buffer| as_array(&buffer));
        let buffer = buffer.map(Bound::into_any);
        let export = |_| numpy.call_method1(intern!(object.py(), "from_dlpack"), (object,));
        buffer.or_else(export).ok()
    };
    let told = |object: &Bound<'_, PyAny>| {
        let dtype = attribute(object, "dtype")?;
        let shape: Vec<i64> = object.getattr("shape").ok()?.extract().ok()?;
        Some(describe_array(dtype.trim_start_matches("torch."), &shape))
    };
    told(object)
        .or_else(|| told(&array()?))
        .unwrap_or_else(|| class_name(object))
}

pub(crate) fn class_name(object: &Bound<'_, PyAny>) -> String {
    object
        .get_type()
        .name()
        .map_or_else(|_| "an object".into(), |name| name.to_string())
}
