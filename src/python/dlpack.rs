//! DLPack 1.x: the C structures, capsules and the C exchange API.
//!
//! A library's C functions are trusted to do what the specification says; what its tensors say is
//! not, but that as many lengths are there as it has dimensions.
//!
//! Source: dmlc/dlpack v1.3, `include/dlpack/dlpack.h`, and the Python specification beside it.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{
    PyAttributeError, PyBufferError, PyRuntimeError, PyTypeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple, PyType, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{ffi, intern};

use super::view::{Access, Element, Failure, Lent, Quiet, Refusal, View, c_strides, class_name};
use crate::kernel::DType;
use crate::kernel::stage::MAX_DIMS;

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

    fn refuse(self) -> Failure {
        Failure::Value("an array in host memory", self.name())
    }

    fn name(self) -> String {
        let name = match self.kind {
            2 => "cuda",
            4 => "opencl",
            7 => "vulkan",
            8 => "metal",
            10 => "rocm",
            13 => "cuda_managed",
            14 => "oneapi",
            kind => return format!("DLPack device type {kind}, id {}", self.id),
        };
        format!("{name}:{}", self.id)
    }
}

impl DataType {
    /// The element type that it is, if a step knows it.
    #[inline]
    fn element(self) -> Option<Element> {
        match (self.code, self.bits, self.lanes) {
            (2, 32, 1) => Some(Element::real(DType::F32)),
            (2, 64, 1) => Some(Element::real(DType::F64)),
            (2, 16, 1) => Some(Element::real(DType::F16)),
            (4, 16, 1) => Some(Element::real(DType::BF16)),
            (5, 64, 1) => Some(Element::complex(DType::F32)),
            (5, 128, 1) => Some(Element::complex(DType::F64)),
            _ => None,
        }
    }

    fn name(self) -> String {
        let DataType { code, bits, lanes } = self;
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
}

/// Releases what holds a tensor, to which its argument points.
type Deleter = unsafe extern "C" fn(*mut c_void);

/// `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy)]
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
    deleter: Option<Deleter>,
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
    head: VersionedHead,
    tensor: RawTensor,
}

#[repr(C)]
struct VersionedHead {
    version: Version,
    manager: *mut c_void,
    deleter: Option<Deleter>,
    flags: u64,
}

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const MAJOR: u32 = 1;

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
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    tensor_from_object: Option<Read>,
    current_work_stream: *const c_void,
}

const _: () = if cfg!(target_pointer_width = "64") {
    assert!(size_of::<RawTensor>() == 48 && size_of::<Legacy>() == 64);
    assert!(size_of::<Versioned>() == 80 && size_of::<ExchangeTable>() == 56);
};

impl RawTensor {
    /// Its number of dimensions, if it has no more than there may be lengths to read.
    #[inline(always)]
    fn ndim(&self) -> Result<usize, Refusal> {
        match usize::try_from(self.ndim) {
            Ok(ndim) if ndim <= MAX_DIMS => Ok(ndim),
            _ => Err(Refusal::Dimensions(self.ndim.into())),
        }
    }

    /// # Safety
    /// The tensor is filled in: its shape, and its strides if they are not null, are as many lengths
    /// as it has dimensions, and stay as they are in `'q`. So does `strides`, which stands for null.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn view<'q>(
        &self,
        strides: Option<&'q [i64]>,
        access: Access,
    ) -> Result<View<'q>, Refusal> {
        if !self.device.is_host() {
            return Err(Refusal::Device);
        }
        let ndim = self.ndim()?;
        let lens = |lens: *const i64| match (ndim, lens.is_null()) {
            (0, true) => Some(&[][..]),
            (_, true) => None,
            // SAFETY: by the contract above.
            (_, false) => Some(unsafe { std::slice::from_raw_parts(lens, ndim) }),
        };
        let shape = lens(self.shape).ok_or(Refusal::Shape)?;
        let Some(element) = self.dtype.element() else {
            return Err(Refusal::DType);
        };
        let strides = lens(self.strides).or(strides).ok_or(Refusal::Unreadable)?;
        let data = match self.data as usize {
            0 => 0,
            data => data.wrapping_add(self.byte_offset as usize),
        };
        View::new(data, element, shape, strides, element.size(), access)
    }
}

/// The borrowed read of a C exchange API.
type Read = unsafe extern "C" fn(*mut c_void, *mut RawTensor) -> c_int;

/// A type's DLPack C exchange API: reads a tensor of that very type without a capsule.
#[derive(Clone, Copy)]
pub(crate) struct Exchange {
    /// The address of the type, which is compared and never followed.
    class: usize,
    read: Read,
}

impl Exchange {
    /// The table that the object's type offers, if it does and if it may be used on this object.
    ///
    /// Subclasses inherit the attribute without its meaning (a DTensor or a FakeTensor is not its
    /// own storage), so the class that defines it must be the object's own; `torch.nn.Parameter` is
    /// the one subclass known to be a plain tensor.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Exchange>> {
        /// The types that were seen to offer one. The lock is taken with the GIL held and nothing
        /// that might give the GIL away is done under it.
        static KNOWN: Mutex<Vec<(Py<PyWeakrefReference>, Exchange)>> = Mutex::new(Vec::new());
        let py = object.py();
        let class = object.get_type();
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |(kept, exchange): &&(Py<PyWeakrefReference>, Exchange)| {
            exchange.is_of(class.as_type_ptr()) && kept.bind(py).upgrade().is_some()
        };
        if let Some((_, found)) = known().iter().find(is_it) {
            return Ok(Some(*found));
        }
        let found = Exchange::find(&class)?;
        if let Some(found) = &found {
            let kept = PyWeakrefReference::new(&class)?.unbind();
            let mut known = known();
            let (alive, dead) = std::mem::take(&mut *known)
                .into_iter()
                .partition(|(kept, _)| kept.bind(py).upgrade().is_some());
            *known = alive;
            known.push((kept, *found));
            drop(known);
            drop::<Vec<_>>(dead);
        }
        Ok(found)
    }

    /// The table that this very class offers; `torch.nn.Parameter` may use its base's.
    #[allow(unsafe_code)]
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
        // header, chained to older tables or null, all alive as long as the process; a table of our
        // major version has our layout. The borrowed read is optional.
        let read = unsafe {
            while !header.is_null() && (*header).version.major != MAJOR {
                header = (*header).previous;
            }
            let table = header.cast::<ExchangeTable>().as_ref();
            table.and_then(|table| table.tensor_from_object)
        };
        let class = class.as_type_ptr() as usize;
        Ok(read.map(|read| Exchange { class, read }))
    }

    /// Whether objects of a type can be read.
    #[inline]
    pub fn is_of(&self, class: *mut ffi::PyTypeObject) -> bool {
        self.class == class as usize
    }

    /// Reads a tensor. The memory is the object's: who uses it any longer keeps the object.
    #[allow(unsafe_code)]
    pub fn view<'q>(&self, quiet: &'q Quiet<'_>, object: Lent<'q>) -> Result<View<'q>, Refusal> {
        // An object's class may be assigned.
        if !self.is_of(object.class()) {
            return Err(Refusal::Unreadable);
        }
        let mut raw = std::mem::MaybeUninit::<RawTensor>::uninit();
        // SAFETY: the function is the table's, and the object is of the table's type. On
        // success the tensor is filled in; its lengths are the object's, and no Python code runs.
        unsafe {
            if (self.read)(object.as_ptr().cast(), raw.as_mut_ptr()) != 0 {
                drop(PyErr::take(quiet.py()));
                return Err(Refusal::Unreadable);
            }
            raw.assume_init_ref().view(None, Access::Writable)
        }
    }
}

/// A tensor that came in a capsule; its memory is released when it is dropped.
pub(crate) struct Managed {
    tensor: RawTensor,
    /// Keeps the memory.
    _owner: Owner,
    access: Access,
    /// Where the producer gives no strides: those of C order.
    strides: Option<Box<[i64]>>,
}

// SAFETY: the tensor is a handle; the specification lets its deleter run on any thread.
#[allow(unsafe_code)]
unsafe impl Send for Managed {}
// SAFETY: it is only read.
#[allow(unsafe_code)]
unsafe impl Sync for Managed {}

/// What a capsule held, and the function that releases it, if there is one.
struct Owner {
    managed: NonNull<c_void>,
    deleter: Option<Deleter>,
}

impl Drop for Owner {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Some(deleter) = self.deleter {
            // SAFETY: both were taken from one capsule, which was renamed, so nobody else deletes it.
            unsafe { deleter(self.managed.as_ptr()) };
        }
    }
}

impl Managed {
    /// Checks that it is one that a step can use.
    fn check(mut self) -> Result<Self, Failure> {
        let RawTensor { device, dtype, .. } = self.tensor;
        if !device.is_host() {
            return Err(device.refuse());
        }
        if dtype.element().is_none() {
            return Err(Failure::Unwanted(dtype.name()));
        }
        if self.tensor.strides.is_null() {
            let ones = &[1; MAX_DIMS][..self.tensor.ndim()?];
            let strides = c_strides(self.view_with(Some(ones))?.shape);
            self.strides = Some(strides.as_slice().into());
        }
        self.view_with(self.strides.as_deref())?;
        Ok(self)
    }

    #[allow(unsafe_code)]
    fn view_with<'a>(&'a self, strides: Option<&'a [i64]>) -> Result<View<'a>, Refusal> {
        // SAFETY: a tensor in a capsule is filled in, and is its producer's no more.
        unsafe { self.tensor.view(strides, self.access) }
    }

    /// Where it is.
    pub fn view<'q>(&'q self, _: &'q Quiet<'_>) -> Result<View<'q>, Refusal> {
        self.view_with(self.strides.as_deref())
    }
}

/// Imports an object through `__dlpack__`. Runs Python code.
pub(crate) fn import(object: &Bound<'_, PyAny>) -> Result<Managed, Failure> {
    let py = object.py();
    let method = object
        .getattr(intern!(py, "__dlpack__"))
        .map_err(|_| Failure::from(Refusal::NotAnArray))?;
    if let Ok(device) = object.call_method0(intern!(py, "__dlpack_device__")) {
        let wrong = |_| Failure::Type("a DLPack device", class_name(&device));
        let (kind, id) = device.extract::<(i32, i32)>().map_err(wrong)?;
        if !(Device { kind, id }).is_host() {
            return Err(Device { kind, id }.refuse());
        }
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
        // torch appends to a message where in its sources it was.
        let message = error.value(py).to_string();
        let found = message.lines().next().unwrap_or_default();
        let wanted = "an array that exports its memory";
        match () {
            _ if error.is_instance_of::<PyTypeError>(py) => Failure::Type(wanted, found.to_owned()),
            _ if error.is_instance_of::<PyBufferError>(py)
                || error.is_instance_of::<PyValueError>(py)
                || error.is_instance_of::<PyRuntimeError>(py) =>
            {
                Failure::Value(wanted, found.to_owned())
            }
            _ => Failure::from(error),
        }
    })?;
    let capsule = capsule
        .cast_into::<PyCapsule>()
        .map_err(|error| Failure::Type("a DLPack capsule", class_name(&error.into_inner())))?;
    take(&capsule)
}

/// Takes the tensor out of a capsule, as the specification says: the capsule is renamed, so it is
/// used only once.
#[allow(unsafe_code)]
fn take(capsule: &Bound<'_, PyCapsule>) -> Result<Managed, Failure> {
    let take = |name: &CStr, used: &'static CStr| {
        let managed = capsule.pointer_checked(Some(name)).ok()?;
        // SAFETY: the object is a capsule and the name is static.
        unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) };
        Some(managed)
    };
    let (tensor, owner, access) =
        if let Some(managed) = take(c"dltensor_versioned", c"used_dltensor_versioned") {
            // SAFETY: a capsule of that name holds a structure that begins so in all versions.
            let head = unsafe { managed.cast::<VersionedHead>().read() };
            let deleter = head.deleter;
            let owner = Owner { managed, deleter };
            if head.version.major != MAJOR {
                let found = format!("version {}", head.version.major);
                return Err(Failure::Value("a DLPack 1.x capsule", found));
            }
            let access = match head.flags {
                flags if flags & IS_COPIED != 0 => Access::Copy,
                flags if flags & READ_ONLY != 0 => Access::ReadOnly,
                _ => Access::Writable,
            };
            // SAFETY: in this version the tensor follows.
            let tensor = unsafe { managed.cast::<Versioned>().as_ref().tensor };
            (tensor, owner, access)
        } else if let Some(managed) = take(c"dltensor", c"used_dltensor") {
            // SAFETY: a capsule of that name holds this structure.
            let &Legacy {
                tensor, deleter, ..
            } = unsafe { managed.cast::<Legacy>().as_ref() };
            (tensor, Owner { managed, deleter }, Access::Legacy)
        } else {
            let found = "a capsule that is none, or was used".into();
            return Err(Failure::Value("a DLPack capsule", found));
        };
    let managed = Managed {
        tensor,
        _owner: owner,
        access,
        strides: None,
    };
    managed.check()
}

/// Whether an object of this type could be a tensor at all.
pub(crate) fn has_dlpack(class: &Bound<'_, PyType>) -> bool {
    !class
        .getattr(intern!(class.py(), "__dlpack__"))
        .is_err_and(|error| error.is_instance_of::<PyAttributeError>(class.py()))
}
