//! What torch offers to a step, looked up once: how its tensors are read, a few functions, its threads.
//!
//! The names that are torch's own affair are in `rmsprop.torch_names`, with what stands for them
//! where a torch does not have them.

use std::ffi::c_void;
use std::sync::OnceLock;

use libloading::Library;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyType};

use super::dlpack::Exchange;
use super::tensor::TensorReader;
use super::view::{Lent, Quiet, Refusal, View};
use crate::threads::Lender;

/// Torch.
pub(crate) struct Torch {
    /// Of `torch.Tensor` and `torch.nn.Parameter`.
    exchange: [Exchange; 2],
    /// Keep the types.
    _types: [Py<PyType>; 2],
    /// None if torch's tensors are not as they are known.
    reader: Option<TensorReader>,
    is_pending: [Py<PyAny>; 2],
    increment_version: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    threads: Option<TorchThreads>,
}

impl Torch {
    /// ImportError if torch is not there or lacks the exchange API.
    pub fn get(py: Python<'_>) -> PyResult<&Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || Torch::find(py))
    }

    #[allow(unsafe_code)]
    fn find(py: Python<'_>) -> PyResult<Torch> {
        let names = py.import("rmsprop.torch_names")?;
        let torch = py.import("torch")?;
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        let parameter = torch.getattr("nn")?.getattr("Parameter")?;
        let parameter = parameter.cast_into::<PyType>()?;
        let old = || {
            pyo3::exceptions::PyImportError::new_err(
                "expected torch 2.10 or newer, whose tensors have the DLPack C exchange API",
            )
        };
        let exchange = |class| Exchange::find(class)?.ok_or_else(old);
        let path: String = names.getattr("LIBRARY")?.extract()?;
        // SAFETY: this is the library that torch has loaded, so loading it again runs nothing.
        let library = unsafe { Library::new(path).ok() };
        let probes = names.getattr("PROBES")?.extract()?;
        let size = tensor.getattr("__basicsize__")?.extract()?;
        let reader = |library| TensorReader::find(library, &probes, size);
        Ok(Torch {
            exchange: [exchange(&tensor)?, exchange(&parameter)?],
            reader: library.as_ref().and_then(reader),
            is_pending: [
                tensor.getattr("is_neg")?.unbind(),
                tensor.getattr("is_conj")?.unbind(),
            ],
            _types: [tensor.unbind(), parameter.unbind()],
            increment_version: names.getattr("increment_version")?.unbind(),
            get_num_threads: torch.getattr("get_num_threads")?.unbind(),
            threads: library.and_then(TorchThreads::find),
        })
    }

    /// Whether an object is a plain tensor: of no other subclass than `torch.nn.Parameter`.
    #[inline]
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr();
        self.exchange.iter().any(|exchange| exchange.is_of(class))
    }

    /// Whether plain tensors can be read without being asked whether a sign is pending
    /// ([`Torch::is_pending`]).
    #[inline]
    pub fn knows_signs(&self) -> bool {
        self.reader.is_some()
    }

    /// Reads a plain tensor.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub fn view<'q>(&self, quiet: &'q Quiet<'_>, tensor: Lent<'q>) -> Result<View<'q>, Refusal> {
        let mut exchange = self.exchange.iter();
        let Some(exchange) = exchange.find(|exchange| exchange.is_of(tensor.class())) else {
            return Err(Refusal::Unreadable);
        };
        match &self.reader {
            // SAFETY: it is of one of the two classes.
            Some(reader) => unsafe { reader.view(quiet, tensor) },
            None => exchange.view(quiet, tensor),
        }
    }

    /// Whether a tensor has a pending sign or conjugation, which its memory does not show.
    pub fn is_pending(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        for is_pending in &self.is_pending {
            if is_pending.bind(py).call1((tensor,))?.is_truthy()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Tells autograd that tensors were written in place.
    pub fn increment_version(
        &self,
        py: Python<'_>,
        tensors: impl ExactSizeIterator<Item = Py<PyAny>>,
    ) -> PyResult<()> {
        let tensors = PyList::new(py, tensors)?;
        self.increment_version.bind(py).call1((tensors,))?;
        Ok(())
    }

    /// Torch's threads, if its library says how to use them.
    #[inline]
    pub fn threads(&self) -> Option<&dyn Lender> {
        self.threads.as_ref().map(|threads| threads as &dyn Lender)
    }

    /// Torch's own number of threads, where the library does not tell.
    pub fn thread_count(&self, py: Python<'_>) -> Option<usize> {
        if self.threads.is_some() {
            return None;
        }
        self.get_num_threads.bind(py).call0().ok()?.extract().ok()
    }
}

/// The process that imported this module, before its torch can have been used beside it.
static PROCESS: OnceLock<u32> = OnceLock::new();

/// Takes note of the process; called as the module is imported.
pub(crate) fn note_process() {
    PROCESS.get_or_init(std::process::id);
}

/// The functions of torch's stable C interface for its threads.
struct TorchThreads {
    parallel_for: ParallelFor,
    get_num_threads: unsafe extern "C" fn(*mut u32) -> i32,
    _library: Library,
}

type Body = unsafe extern "C" fn(i64, i64, *mut c_void);
type ParallelFor = unsafe extern "C" fn(i64, i64, i64, Body, *mut c_void) -> i32;

impl TorchThreads {
    /// None if the library does not have them.
    #[allow(unsafe_code)]
    fn find(library: Library) -> Option<Self> {
        // SAFETY: they are declared so in `torch/csrc/stable/c/shim.h` of torch 2.10 and newer.
        unsafe {
            Some(TorchThreads {
                parallel_for: *library.get(c"torch_parallel_for").ok()?,
                get_num_threads: *library.get(c"torch_get_num_threads").ok()?,
                _library: library,
            })
        }
    }
}

impl Lender for TorchThreads {
    #[allow(unsafe_code)]
    fn count(&self) -> usize {
        let mut count = 1;
        // SAFETY: the function writes one number.
        let failed = unsafe { (self.get_num_threads)(&mut count) };
        if failed == 0 { count as usize } else { 1 }
    }

    /// A process that was forked does not have the threads that its parent used, and would wait for
    /// them for ever.
    fn is_usable(&self) -> bool {
        PROCESS.get() == Some(&std::process::id())
    }

    #[allow(unsafe_code)]
    fn run(&self, seats: usize, seat: &(dyn Fn(usize) + Sync)) {
        unsafe extern "C" fn body(begin: i64, end: i64, context: *mut c_void) {
            // SAFETY: `run`, which waits for all calls, made it of a reference.
            let seat = unsafe { *context.cast::<&(dyn Fn(usize) + Sync)>() };
            (begin..end).for_each(|k| seat(k as usize));
        }
        let context = std::ptr::from_ref(&seat).cast_mut().cast();
        // SAFETY: the function calls `body` for parts of the range, and returns when all calls have.
        // A failure leaves seats out, which the caller of this takes into account.
        unsafe { (self.parallel_for)(0, seats as i64, 1, body, context) };
    }
}
