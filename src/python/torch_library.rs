//! What torch offers to a step, looked up once: its tensors' C exchange API, a few functions, its
//! threads.
//!
//! The names that are torch's own affair are in `rmsprop.torch_names`, with what stands for them
//! where a torch does not have them.

use std::ffi::c_void;
use std::sync::OnceLock;

use libloading::Library;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyType};

use super::dlpack::Exchange;
use super::view::{Lent, Quiet, Refusal, View};
use crate::threads::Lender;

/// Torch.
pub(crate) struct Torch {
    tensor: Exchange,
    parameter: Exchange,
    /// Keep the types.
    _types: [Py<PyType>; 2],
    grad: Py<PyAny>,
    get_grad: ffi::descrgetfunc,
    is_pending: [Py<PyAny>; 2],
    pending_bits: Option<PendingBits>,
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
        let grad = tensor.getattr("grad")?;
        // SAFETY: the object is a type; a type without the slot gives null. What the slot holds is a
        // function of this type.
        let get_grad = unsafe {
            let class = ffi::Py_TYPE(grad.as_ptr());
            let get = ffi::PyType_GetSlot(class, ffi::Py_tp_descr_get);
            std::mem::transmute::<*mut c_void, Option<ffi::descrgetfunc>>(get)
        };
        let library: Option<String> = names.getattr("LIBRARY")?.extract()?;
        let tensor_exchange = exchange(&tensor)?;
        let probes = names.getattr("PROBES")?.extract()?;
        Ok(Torch {
            pending_bits: PendingBits::find(py, &tensor_exchange, &probes),
            tensor: tensor_exchange,
            parameter: exchange(&parameter)?,
            is_pending: [
                tensor.getattr("is_neg")?.unbind(),
                tensor.getattr("is_conj")?.unbind(),
            ],
            _types: [tensor.unbind(), parameter.unbind()],
            grad: grad.unbind(),
            get_grad: get_grad.ok_or_else(old)?,
            increment_version: names.getattr("increment_version")?.unbind(),
            get_num_threads: torch.getattr("get_num_threads")?.unbind(),
            threads: library.and_then(|path| TorchThreads::find(&path)),
        })
    }

    /// Whether an object is a plain tensor: of no other subclass than `torch.nn.Parameter`.
    #[inline]
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr();
        self.tensor.is_of(class) || self.parameter.is_of(class)
    }

    /// Reads a plain tensor.
    #[inline(always)]
    pub fn view<'q>(&self, quiet: &'q Quiet<'_>, tensor: Lent<'q>) -> Result<View<'q>, Refusal> {
        match self.tensor.is_of(tensor.class()) {
            true => self.tensor.view_of(quiet, tensor, true),
            false => self.parameter.view_of(quiet, tensor, true),
        }
    }

    /// `tensor.grad`, as the attribute of the class gives it.
    #[inline]
    #[allow(unsafe_code)]
    pub fn grad<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: the descriptor is `torch.Tensor.grad` and the function its class's; the GIL is
        // held. The result is a new reference, or null with an error set.
        unsafe {
            let (object, class) = (tensor.as_ptr(), tensor.get_type_ptr());
            let grad = (self.get_grad)(self.grad.as_ptr(), object, class.cast());
            Bound::from_owned_ptr_or_err(tensor.py(), grad)
        }
    }

    /// Refuses a tensor that was read and has a pending sign or conjugation, which its memory does
    /// not show; as `MaybePending` if only [`Torch::is_pending`] can tell.
    #[inline(always)]
    pub fn refuse_pending<'q>(&self, quiet: &'q Quiet<'_>, view: &View<'q>) -> Result<(), Refusal> {
        let bits = self.pending_bits.as_ref();
        match bits.and_then(|bits| bits.is_set(quiet, view)) {
            Some(false) => Ok(()),
            Some(true) => Err(Refusal::Pending),
            None => Err(Refusal::MaybePending),
        }
    }

    /// Whether a tensor has one. Takes 70 ns, a fifth of a small tensor's step, and gives the GIL
    /// away.
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

/// Where a tensor keeps whether a sign or a conjugation is pending.
///
/// A view has the address of its tensor's lengths. Up to five of them lie in the `c10::TensorImpl`
/// itself, and so does, always as far from them, the word with the bits. How far, and which bits, is
/// found on probes: plain tensors, which have them not, and negated and conjugated ones, which have.
/// Where that does not find exactly one word, torch is asked.
struct PendingBits {
    /// Bytes from the lengths to the word.
    offset: isize,
    mask: u64,
}

/// Tensors and the addresses of their `c10::TensorImpl`: plain, negated, conjugated.
type Probes = [Vec<(Py<PyAny>, usize)>; 3];

impl PendingBits {
    /// Lengths that a tensor keeps inside.
    const DIMS: usize = 5;
    /// Words of a tensor, at least.
    const WORDS: usize = 22;

    fn find(py: Python<'_>, exchange: &Exchange, probes: &Probes) -> Option<Self> {
        type Words = [u64; PendingBits::WORDS];
        let read = |quiet: &Quiet<'_>| {
            let read = |(tensor, start): &(Py<PyAny>, usize)| {
                let view = exchange.view(quiet, Lent::of(quiet, tensor)).ok()?;
                Self::read_probe(&view, *start)
            };
            let kinds = probes.iter();
            let kinds = kinds.map(|kind| kind.iter().map(read).collect());
            kinds.collect::<Option<Vec<Vec<(isize, Words)>>>>()
        };
        let kinds = Quiet::during(py, read)?;
        let [plain, negated, conjugated] = &kinds[..] else {
            return None;
        };
        // From the lengths to the beginning.
        let start = plain.first()?.0;
        if kinds.iter().flatten().any(|probe| probe.0 != start) {
            return None;
        }
        let bit = |kind: &[(isize, Words)], k: usize| {
            let in_all = kind.iter().fold(!0, |all, probe| all & probe.1[k]);
            in_all & !plain.iter().fold(0, |any, probe| any | probe.1[k])
        };
        let mut found = (0..Self::WORDS).filter_map(|k| {
            let bits = [bit(negated, k), bit(conjugated, k)];
            let is_it = bits.iter().all(|bits| bits.count_ones() == 1);
            is_it.then_some((k, bits[0] | bits[1]))
        });
        let (k, mask) = found.next()?;
        found.next().is_none().then_some(PendingBits {
            offset: start + (k * size_of::<u64>()) as isize,
            mask,
        })
    }

    /// How far from its lengths a tensor begins, and its words.
    #[allow(unsafe_code)]
    fn read_probe(view: &View<'_>, start: usize) -> Option<(isize, [u64; Self::WORDS])> {
        let lens = view.shape.as_ptr().cast::<u64>();
        let before = lens.addr().checked_sub(start)?;
        if before >= Self::WORDS * size_of::<u64>() || !start.is_multiple_of(align_of::<u64>()) {
            return None;
        }
        let first = lens.wrapping_byte_sub(before);
        // SAFETY: torch says that the tensor begins at `start`, and its lengths are in it. No
        // `c10::TensorImpl` of torch 2 is shorter than that many words; some are padding.
        let word = |k| unsafe { first.add(k).read_volatile() };
        Some((-(before as isize), std::array::from_fn(word)))
    }

    #[inline]
    #[allow(unsafe_code)]
    fn is_set<'q>(&self, _: &'q Quiet<'_>, view: &View<'q>) -> Option<bool> {
        if view.shape.len() > Self::DIMS {
            return None;
        }
        let word = view.shape.as_ptr().cast::<u64>();
        // SAFETY: the lengths of a plain tensor with so few are in its `c10::TensorImpl`, and the word
        // is as far from them as in the probes.
        let word = unsafe { word.byte_offset(self.offset).read() };
        Some(word & self.mask != 0)
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
    fn find(path: &str) -> Option<Self> {
        // SAFETY: this is the library that torch has loaded, so loading it again runs nothing; the
        // functions are declared so in `torch/csrc/stable/c/shim.h` of torch 2.10 and newer.
        unsafe {
            let library = Library::new(path).ok()?;
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
