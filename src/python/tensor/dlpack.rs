//! DLPack 1.x: the C structures, capsules and the C exchange API.
//!
//! Source: dmlc/dlpack v1.3, `include/dlpack/dlpack.h`, and the Python specification beside it.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{
    PyAttributeError, PyBufferError, PyRuntimeError, PyTypeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple, PyType, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{ffi, intern};

use super::{Access, DType, Refusal, Tensor};

#[repr(C)]
#[derive(Clone, Copy)]
struct Device {
    kind: i32,
    id: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

impl Device {
    /// Host memory; the pinned kinds are ordinary memory to a CPU.
    fn is_host(self) -> bool {
        matches!(self.kind, 1 | 3 | 11)
    }
}

impl DataType {
    /// The element type of parameters that it is, if any.
    #[inline]
    fn float(self) -> Option<DType> {
        match (self.code, self.bits, self.lanes) {
            (2, 32, 1) => Some(DType::F32),
            (2, 64, 1) => Some(DType::F64),
            _ => None,
        }
    }
}

/// `DLTensor`.
#[repr(C)]
struct RawTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    /// In elements; null means C-contiguous.
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensor`, in a capsule named "dltensor".
#[repr(C)]
struct Legacy {
    tensor: RawTensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLManagedTensorVersioned`, in a capsule named "dltensor_versioned".
#[repr(C)]
struct Versioned {
    version: Version,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: RawTensor,
}

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const MAJOR: u32 = 1;

/// As many as NumPy and torch have.
const MOST_DIMENSIONS: usize = 64;

#[repr(C)]
struct Header {
    version: Version,
    previous: *const Header,
}

/// `DLPackExchangeAPI`. Only the borrowed read is used here.
#[repr(C)]
struct ExchangeTable {
    header: Header,
    managed_allocator: *const c_void,
    managed_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut *mut Versioned) -> c_int>,
    managed_to_object: *const c_void,
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut RawTensor) -> c_int>,
    current_work_stream: *const c_void,
}

const _: () = if cfg!(target_pointer_width = "64") {
    assert!(size_of::<RawTensor>() == 48 && size_of::<Legacy>() == 64);
    assert!(size_of::<Versioned>() == 80 && size_of::<ExchangeTable>() == 56);
};

/// A type's DLPack C exchange API: reads a tensor of that very type without a capsule.
#[derive(Clone, Copy)]
pub(crate) struct Exchange(NonNull<ExchangeTable>);

// SAFETY: the table is constant and lives as long as the process; its functions are called with the
// GIL held.
unsafe impl Send for Exchange {}
// SAFETY: as above.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// The table that the object's type offers, if it does and if it may be used on this object.
    ///
    /// Subclasses inherit the attribute without its meaning (a DTensor or a FakeTensor is not its
    /// own storage), so the class that defines it must be the object's own; `torch.nn.Parameter` is
    /// the one subclass known to be a plain tensor.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Exchange>> {
        /// The types that have one, as far as they are still there. The lock is taken with the GIL
        /// held and nothing that might give the GIL away is done under it.
        static KNOWN: Mutex<Vec<(Py<PyWeakrefReference>, Exchange)>> = Mutex::new(Vec::new());
        fn known() -> MutexGuard<'static, Vec<(Py<PyWeakrefReference>, Exchange)>> {
            KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
        }
        let (py, class) = (object.py(), object.get_type());
        let is_class = |known: &Py<PyWeakrefReference>| {
            let known = known.bind(py).upgrade();
            known.is_some_and(|known| known.is(&class))
        };
        if let Some((_, found)) = known().iter().find(|(known, _)| is_class(known)) {
            return Ok(Some(*found));
        }
        let found = Exchange::find(&class)?;
        if let Some(found) = found {
            let class = PyWeakrefReference::new(&class)?.unbind();
            let mut known = known();
            known.retain(|(known, _)| known.bind(py).upgrade().is_some());
            known.push((class, found));
        }
        Ok(found)
    }

    /// The table that this very class offers; `torch.nn.Parameter` may use its base's.
    pub fn find(class: &Bound<'_, PyType>) -> PyResult<Option<Exchange>> {
        let py = class.py();
        let name = intern!(py, "__dlpack_c_exchange_api__");
        let Ok(capsule) = class.getattr(name) else {
            return Ok(None);
        };
        let Ok(capsule) = capsule.cast_into::<PyCapsule>() else {
            return Ok(None);
        };
        let owner = class.mro().iter().position(|base| {
            base.getattr(intern!(py, "__dict__"))
                .and_then(|dict| dict.contains(name))
                .unwrap_or(false)
        });
        let is_torch_parameter = || {
            class
                .fully_qualified_name()
                .is_ok_and(|name| name == "torch.nn.parameter.Parameter")
        };
        if owner != Some(0) && !(owner == Some(1) && is_torch_parameter()) {
            return Ok(None);
        }
        let Ok(table) = capsule.pointer_checked(Some(c"dlpack_exchange_api")) else {
            return Ok(None);
        };
        let mut header = table.cast::<Header>().as_ptr().cast_const();
        // SAFETY: the specification makes the capsule's pointer a table that begins with this
        // header, chained to older tables or null, all alive as long as the process.
        unsafe {
            while !header.is_null() && (*header).version.major != MAJOR {
                header = (*header).previous;
            }
        }
        let table = NonNull::new(header.cast_mut().cast::<ExchangeTable>());
        // The borrowed read is optional in the specification.
        // SAFETY: a table of our major version has this layout.
        let can_read =
            |table: &NonNull<ExchangeTable>| unsafe { table.as_ref().tensor_from_object.is_some() };
        Ok(table.filter(can_read).map(Exchange))
    }

    /// Reads the tensor. The memory is the object's: whoever keeps the pointer keeps the object.
    /// Saying why one cannot be read runs Python code.
    pub fn read(self, object: &Bound<'_, PyAny>) -> Result<Tensor, Refusal> {
        self.read_or(object, unreadable)
    }

    /// As [`Exchange::read`], without a reason and without running Python code.
    pub fn read_quietly(self, object: &Bound<'_, PyAny>) -> Option<Tensor> {
        let unread = |object: &Bound<'_, PyAny>| {
            drop(PyErr::take(object.py()));
            Refusal::Type(String::new(), String::new())
        };
        self.read_or(object, unread).ok()
    }

    fn read_or(
        self,
        object: &Bound<'_, PyAny>,
        unread: impl Fn(&Bound<'_, PyAny>) -> Refusal,
    ) -> Result<Tensor, Refusal> {
        let mut raw = std::mem::MaybeUninit::<RawTensor>::uninit();
        // SAFETY: `of` found the table on this object's type (its callers compare types) and the
        // function to be there; the GIL is held. On success the tensor is filled in; its shape and
        // strides live as long as the object is untouched, and are copied before anything else
        // runs.
        unsafe {
            let Some(function) = self.0.as_ref().tensor_from_object else {
                return Err(Refusal::Value(
                    "a tensor that can be read".into(),
                    "one that cannot".into(),
                ));
            };
            if function(object.as_ptr().cast(), raw.as_mut_ptr()) != 0 {
                return Err(unread(object));
            }
            import(raw.assume_init_ref(), Access::Writable)
        }
    }
}

/// An `f32` or `f64` tensor in host memory whose shape and strides are still its own. Strides are in
/// elements.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: usize,
    pub dtype: DType,
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

impl Exchange {
    /// As [`Exchange::read`], without a copy of anything and without a reason for what is refused.
    ///
    /// # Safety
    /// `object` is a valid reference of the table's type, the GIL is held, and in `'a` nothing runs
    /// Python code.
    #[inline]
    pub unsafe fn view<'a>(self, object: *mut ffi::PyObject) -> Option<View<'a>> {
        let mut raw = std::mem::MaybeUninit::<RawTensor>::uninit();
        // SAFETY: `find` made sure that the function is there. On success the tensor is filled in,
        // and its shape and strides are valid while the object is left alone.
        unsafe {
            let function = self.0.as_ref().tensor_from_object?;
            if function(object.cast(), raw.as_mut_ptr()) != 0 {
                ffi::PyErr_Clear();
                return None;
            }
            raw.assume_init_ref().view()
        }
    }

    /// A reference to the tensor itself, as other C++ code may have one, besides Python's to its
    /// object. None if the library does not give one.
    ///
    /// # Safety
    /// `object` is a valid reference of the table's type, and the GIL is held.
    pub unsafe fn keep(self, object: *mut ffi::PyObject) -> Option<Managed> {
        let mut kept = std::ptr::null_mut();
        // SAFETY: passed on to the caller; on success the handle is ours.
        unsafe {
            let function = self.0.as_ref().managed_from_object?;
            if function(object.cast(), &mut kept) != 0 {
                ffi::PyErr_Clear();
                return None;
            }
        }
        NonNull::new(kept).map(|kept| Managed(Handle::Versioned(kept)))
    }
}

impl RawTensor {
    /// # Safety
    /// The tensor is filled in, and in `'a` nobody touches it.
    #[inline]
    unsafe fn view<'a>(&self) -> Option<View<'a>> {
        let dtype = self.dtype.float()?;
        let ndim = usize::try_from(self.ndim).ok()?;
        if ndim > MOST_DIMENSIONS
            || !self.device.is_host()
            || (ndim > 0 && (self.shape.is_null() || self.strides.is_null()))
        {
            return None;
        }
        let [shape, strides] = [self.shape, self.strides].map(|lens| match ndim {
            0 => &[][..], // The pointers may be null.
            // SAFETY: they are not null, so they point to one length for each dimension.
            _ => unsafe { std::slice::from_raw_parts(lens, ndim) },
        });
        let data = (self.data as usize).wrapping_add(self.byte_offset as usize);
        // An empty tensor may be nowhere.
        (data != 0 || shape.contains(&0)).then_some(View {
            data: if data == 0 { dtype.size() } else { data },
            dtype,
            shape,
            strides,
        })
    }
}

impl View<'_> {
    #[inline]
    pub fn numel(&self) -> usize {
        self.shape.iter().map(|&len| len as usize).product()
    }

    #[inline]
    pub fn is_aligned(&self) -> bool {
        self.data.is_multiple_of(self.dtype.size())
    }

    /// Whether it has the same shape and the same strides where they count.
    #[inline]
    pub fn is_walked_like(&self, other: &View<'_>) -> bool {
        self.shape.len() == other.shape.len()
            && (0..self.shape.len()).all(|k| {
                self.shape[k] == other.shape[k]
                    && (self.strides[k] == other.strides[k] || self.shape[k] == 1)
            })
    }

    /// Whether the elements fill a stretch of memory without gaps, in any order of the dimensions.
    #[inline]
    pub fn is_dense(&self, numel: usize) -> bool {
        let mut stride = 1;
        numel == 0
            || (self.shape.iter().zip(self.strides).rev()).all(|(&len, &found)| {
                let is_next = found == stride || len == 1;
                stride *= len;
                is_next
            })
            || self.is_dense_permuted()
    }

    #[cold]
    fn is_dense_permuted(&self) -> bool {
        let dims = self.shape.iter().copied().zip(self.strides.iter().copied());
        let mut dims: Vec<_> = dims.filter(|dim| dim.0 != 1).collect();
        dims.sort_by_key(|dim| dim.1);
        let mut stride = 1i64;
        dims.into_iter().all(|(len, found)| {
            let is_next = found == stride;
            stride = stride.saturating_mul(len);
            is_next
        })
    }
}

/// Why the exchange API could not read a tensor.
#[cold]
fn unreadable(object: &Bound<'_, PyAny>) -> Refusal {
    let py = object.py();
    let error = PyErr::fetch(py);
    // A tensor without storage (torch's "meta" among others) says so by its device.
    let device = object
        .getattr(intern!(py, "device"))
        .map(|device| device.to_string());
    match device {
        Ok(device) if !device.starts_with("cpu") => {
            Refusal::Value("an array in host memory".into(), device)
        }
        _ => {
            let found = first_line(&error.value(py).to_string());
            Refusal::Type("a dense tensor in host memory".into(), found)
        }
    }
}

/// torch appends to a message where in its sources it was.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// What a capsule managed; released when dropped.
pub(crate) struct Managed(Handle);

enum Handle {
    Legacy(NonNull<Legacy>),
    Versioned(NonNull<Versioned>),
}

// SAFETY: the tensor is a handle; the specification lets its deleter run on any thread.
unsafe impl Send for Managed {}

impl Drop for Managed {
    fn drop(&mut self) {
        // SAFETY: the handle was taken from its capsule, which was renamed, so nobody else deletes
        // it; the deleter may be missing.
        unsafe {
            match self.0 {
                Handle::Legacy(tensor) => {
                    if let Some(deleter) = tensor.as_ref().deleter {
                        deleter(tensor.as_ptr());
                    }
                }
                Handle::Versioned(tensor) => {
                    if let Some(deleter) = tensor.as_ref().deleter {
                        deleter(tensor.as_ptr());
                    }
                }
            }
        }
    }
}

/// Imports an object through `__dlpack__`; `None` if it has no such method.
pub(crate) fn import_object(object: &Bound<'_, PyAny>) -> Result<Option<Tensor>, Refusal> {
    let py = object.py();
    let Ok(method) = object.getattr(intern!(py, "__dlpack__")) else {
        return Ok(None);
    };
    if let Ok(device) = object.call_method0(intern!(py, "__dlpack_device__")) {
        let wrong = || Refusal::Type("a DLPack device".into(), super::class_name(&device));
        let (kind, id) = device.extract::<(i32, i32)>().map_err(|_| wrong())?;
        check_device(Device { kind, id })?;
    }
    let keywords = PyDict::new(py);
    keywords.set_item(intern!(py, "max_version"), (1, 3))?;
    keywords.set_item(intern!(py, "copy"), false)?;
    let capsule = match method.call(PyTuple::empty(py), Some(&keywords)) {
        // A producer older than DLPack 1.0 knows no keyword.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => method.call0(),
        result => result,
    };
    let capsule = capsule.map_err(|error| {
        let wanted = "an array that exports its memory";
        let found = || first_line(&error.value(py).to_string());
        match () {
            _ if error.is_instance_of::<PyTypeError>(py) => Refusal::Type(wanted.into(), found()),
            _ if error.is_instance_of::<PyBufferError>(py)
                || error.is_instance_of::<PyValueError>(py)
                || error.is_instance_of::<PyRuntimeError>(py) =>
            {
                Refusal::Value(wanted.into(), found())
            }
            _ => Refusal::Python(error),
        }
    })?;
    let capsule = capsule.cast_into::<PyCapsule>().map_err(|error| {
        let object = error.into_inner();
        Refusal::Type("a DLPack capsule".into(), super::class_name(&object))
    })?;
    take(&capsule).map(Some)
}

/// Takes the tensor out of a capsule, as the specification says: the capsule is renamed, so it is
/// used only once.
fn take(capsule: &Bound<'_, PyCapsule>) -> Result<Tensor, Refusal> {
    let pointer = |name: &CStr| capsule.pointer_checked(Some(name)).ok();
    let rename = |name: &'static CStr| {
        // SAFETY: the object is a capsule and the name is static.
        unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), name.as_ptr()) };
    };
    if let Some(found) = pointer(c"dltensor_versioned") {
        rename(c"used_dltensor_versioned");
        let found = found.cast::<Versioned>();
        let managed = Managed(Handle::Versioned(found));
        // SAFETY: a capsule of that name holds this structure; its version is valid in all of them,
        // the other fields in ours.
        let tensor = unsafe {
            let Versioned {
                version,
                flags,
                tensor,
                ..
            } = found.as_ref();
            if version.major != MAJOR {
                let found = format!("version {}", version.major);
                return Err(Refusal::Value("a DLPack 1.x capsule".into(), found));
            }
            import(
                tensor,
                match flags {
                    flags if flags & IS_COPIED != 0 => Access::Copy,
                    flags if flags & READ_ONLY != 0 => Access::ReadOnly,
                    _ => Access::Writable,
                },
            )?
        };
        return Ok(Tensor {
            managed: Some(managed),
            ..tensor
        });
    }
    let Some(found) = pointer(c"dltensor") else {
        let found = "a capsule that is none, or was used".into();
        return Err(Refusal::Value("a DLPack capsule".into(), found));
    };
    rename(c"used_dltensor");
    let found = found.cast::<Legacy>();
    let managed = Managed(Handle::Legacy(found));
    // SAFETY: a capsule of that name holds this structure.
    let tensor = unsafe { import(&found.as_ref().tensor, Access::Legacy)? };
    Ok(Tensor {
        managed: Some(managed),
        ..tensor
    })
}

/// # Safety
/// `raw` is filled in as the specification says, and its shape and strides are valid.
unsafe fn import(raw: &RawTensor, access: Access) -> Result<Tensor, Refusal> {
    check_device(raw.device)?;
    let bad = || {
        let found = "a DLPack tensor with an impossible shape";
        Refusal::Value("a tensor that fits in memory".into(), found.into())
    };
    // Before a length is read: there may be fewer of them.
    let ndim = usize::try_from(raw.ndim).ok();
    let ndim = ndim.filter(|&ndim| ndim <= MOST_DIMENSIONS);
    let ndim = ndim.ok_or_else(|| {
        let wanted = format!("a tensor of at most {MOST_DIMENSIONS} dimensions");
        Refusal::Value(wanted, format!("one of {}", raw.ndim))
    })?;
    // SAFETY: by the contract above; a tensor without dimensions may have null for both.
    let (shape, strides) = unsafe {
        let slice =
            |x: *const i64| (!x.is_null() && ndim > 0).then(|| std::slice::from_raw_parts(x, ndim));
        (slice(raw.shape).unwrap_or_default(), slice(raw.strides))
    };
    let shape: Option<Vec<usize>> = shape.iter().map(|&len| usize::try_from(len).ok()).collect();
    let shape = shape.filter(|shape| shape.len() == ndim).ok_or_else(bad)?;
    let dtype = raw.dtype.float();
    let dtype = dtype.ok_or_else(|| Refusal::dtype(&type_name(raw.dtype), &shape))?;
    let numel = match shape.contains(&0) {
        true => Some(0),
        false => shape
            .iter()
            .try_fold(1usize, |numel, &len| numel.checked_mul(len)),
    };
    let numel = numel.ok_or_else(bad)?;
    let bytes = numel.checked_mul(dtype.size()).ok_or_else(bad)?;
    isize::try_from(bytes).map_err(|_| bad())?;
    let size = dtype.size() as isize;
    let strides = match strides {
        Some(strides) => strides
            .iter()
            .map(|&stride| (stride as isize).wrapping_mul(size))
            .collect(),
        None => super::c_strides(&shape, dtype),
    };
    if raw.data.is_null() && numel > 0 {
        let found = super::describe(dtype, &shape);
        return Err(Refusal::Value(
            "a tensor with memory".into(),
            format!("{found} without"),
        ));
    }
    let data = (raw.data as usize).wrapping_add(raw.byte_offset as usize);
    let is_aligned = data.is_multiple_of(dtype.size());
    Ok(Tensor {
        data,
        dtype,
        shape,
        strides,
        access,
        is_aligned,
        header: None,
        descr: None,
        managed: None,
    })
}

fn check_device(device: Device) -> Result<(), Refusal> {
    if device.is_host() {
        return Ok(());
    }
    let name = match device.kind {
        2 => "cuda",
        4 => "opencl",
        7 => "vulkan",
        8 => "metal",
        10 => "rocm",
        13 => "cuda_managed",
        14 => "oneapi",
        _ => "device",
    };
    let found = match name {
        "device" => format!("DLPack device type {}, id {}", device.kind, device.id),
        name => format!("{name}:{}", device.id),
    };
    Err(Refusal::Value("an array in host memory".into(), found))
}

fn type_name(dtype: DataType) -> String {
    let DataType { code, bits, lanes } = dtype;
    let base = match code {
        0 => "int",
        1 => "uint",
        2 => "float",
        4 => "bfloat",
        5 => "complex",
        6 => "bool",
        _ => return format!("DLPack type code {code}, {bits} bits"),
    };
    let lanes = if lanes == 1 {
        String::new()
    } else {
        format!("x{lanes}")
    };
    format!("{base}{bits}{lanes}")
}

/// Whether an object of this type could be a tensor at all; used to word a refusal.
pub(crate) fn has_dlpack(class: &Bound<'_, PyType>) -> bool {
    !class
        .getattr(intern!(class.py(), "__dlpack__"))
        .is_err_and(|error| error.is_instance_of::<PyAttributeError>(class.py()))
}
