//! How a torch tensor's memory is found: by the C functions of torch's library.
//!
//! They are part of what torch keeps stable for compiled programs (`torch/csrc/stable/c/shim.h`,
//! `torch/csrc/inductor/aoti_torch/c/shim.h`), and take a tensor by the address of its `at::Tensor`.
//! That lies in the Python object; where, is found on probes ([`TensorReader::find`]). So is the word
//! that says whether a sign or a conjugation is pending, which none of the functions tells.
//!
//! DLPack's exchange API tells the same, but takes a C++ reference, and Python's with it: 62 ns a
//! tensor where this takes 20, and a parameter has four. What cannot be found on the probes is left to
//! `rmsprop.fallback`, which asks torch.

use std::ffi::c_void;

use libloading::Library;
use pyo3::prelude::*;

use super::view::{Access, Element, Lent, Quiet, Refusal, View};
use crate::kernel::DType;

/// A function that writes one thing about a tensor; 0 if it could.
type Tell<T> = unsafe extern "C" fn(*const c_void, *mut T) -> i32;

/// The functions, and where things are in tensors.
pub(super) struct TensorReader {
    device_type: Tell<i32>,
    dtype: Tell<i32>,
    dim: Tell<i64>,
    sizes: Tell<*const i64>,
    strides: Tell<*const i64>,
    data_ptr: Tell<*const c_void>,
    /// What the functions call host memory, and element types.
    cpu: i32,
    elements: [(i32, Element); 9],
    /// Bytes from a Python object to its `at::Tensor`, which is the address of a `c10::TensorImpl`.
    tensor: usize,
    /// Bytes from there to the word with pending signs, and its bits for them.
    pending: usize,
    pending_mask: u64,
}

/// Tensors and the addresses of their `c10::TensorImpl`: plain, negated, conjugated.
pub(super) type Probes = [Vec<(Py<PyAny>, usize)>; 3];

/// Words of a `c10::TensorImpl`, at least; some are padding.
const WORDS: usize = 22;

impl TensorReader {
    /// None if the library lacks a function, or not all probes are alike. `size` is that of their
    /// Python objects.
    #[allow(unsafe_code)]
    pub fn find(library: &Library, probes: &Probes, size: usize) -> Option<Self> {
        let (tensor, pending, pending_mask) = find_places(probes, size)?;
        let code = |name: &str| {
            // SAFETY: the functions of that name are declared so, and return a constant. (Torch keeps
            // its library, so what is found here stays.)
            unsafe { Some(library.get::<unsafe extern "C" fn() -> i32>(name).ok()?()) }
        };
        let element = |name: &str, element| {
            let code = code(&format!("aoti_torch_dtype_{name}"))?;
            Some((code, element))
        };
        let elements = [
            element("float32", Element::real(DType::F32))?,
            element("float64", Element::real(DType::F64))?,
            element("complex64", Element::complex(DType::F32))?,
            element("complex128", Element::complex(DType::F64))?,
            element("float16", Element::real(DType::F16))?,
            element("bfloat16", Element::real(DType::BF16))?,
            element("uint8", Element::real(DType::U8))?,
            element("int8", Element::real(DType::I8))?,
            element("int16", Element::real(DType::I16))?,
        ];
        // SAFETY: the headers named above declare them so.
        unsafe {
            Some(TensorReader {
                device_type: *library.get("aoti_torch_get_device_type").ok()?,
                dtype: *library.get("aoti_torch_get_dtype").ok()?,
                dim: *library.get("aoti_torch_get_dim").ok()?,
                sizes: *library.get("aoti_torch_get_sizes").ok()?,
                strides: *library.get("aoti_torch_get_strides").ok()?,
                data_ptr: *library.get("aoti_torch_get_data_ptr").ok()?,
                cpu: code("aoti_torch_device_type_cpu")?,
                elements,
                tensor,
                pending,
                pending_mask,
            })
        }
    }

    /// Reads a plain tensor.
    ///
    /// # Safety
    /// The object is of the probes' class, or of `torch.nn.Parameter`.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub unsafe fn view<'q>(&self, _: &'q Quiet<'_>, object: Lent<'q>) -> Result<View<'q>, Refusal> {
        let tensor = object.as_ptr().cast::<c_void>();
        let tensor = tensor.wrapping_byte_add(self.tensor).cast_const();
        let (mut device, mut dtype, mut dim) = (0, 0, 0);
        let (mut sizes, mut strides, mut data) =
            (std::ptr::null(), std::ptr::null(), std::ptr::null());
        // SAFETY: the object has its `at::Tensor` where the probes have theirs, and the functions
        // write what they tell of it. A tensor that has no such thing (no strides, no memory) is one
        // that they fail for. What `sizes` and `strides` point to is the tensor's, which somebody
        // holds, and stays as it is while no Python code runs.
        let (shape, strides, pending) = unsafe {
            if (self.device_type)(tensor, &mut device) != 0 || device != self.cpu {
                return Err(Refusal::Device);
            }
            if (self.dtype)(tensor, &mut dtype) != 0
                || (self.dim)(tensor, &mut dim) != 0
                || (self.sizes)(tensor, &mut sizes) != 0
                || (self.strides)(tensor, &mut strides) != 0
                || (self.data_ptr)(tensor, &mut data) != 0
            {
                return Err(Refusal::Unreadable);
            }
            let lens = |lens| match dim {
                0 => &[][..], // The pointers may be null.
                _ => std::slice::from_raw_parts(lens, dim as usize),
            };
            let pending = *tensor.cast::<*const u64>();
            (lens(sizes), lens(strides), *pending.byte_add(self.pending))
        };
        if pending & self.pending_mask != 0 {
            return Err(Refusal::Pending);
        }
        let mut elements = self.elements.iter();
        let Some((_, element)) = elements.find(|(code, _)| *code == dtype) else {
            return Err(Refusal::DType);
        };
        let (element, data) = (*element, data as usize);
        View::new(
            data,
            element,
            shape,
            strides,
            element.size(),
            Access::Writable,
        )
    }
}

/// Where in a Python object its `at::Tensor` is; and where in a `c10::TensorImpl` the word with pending
/// signs, and its bits: those that all negated or all conjugated probes have, and no plain one.
#[allow(unsafe_code)]
fn find_places(probes: &Probes, size: usize) -> Option<(usize, usize, u64)> {
    const WORD: usize = size_of::<u64>();
    // SAFETY: so long is the Python object; no `c10::TensorImpl` of torch 2 is shorter than `WORDS`.
    let read = |(object, tensor): &(Py<PyAny>, usize)| unsafe {
        let object = words(object.as_ptr().addr(), size / WORD);
        (object, *tensor as u64, words(*tensor, WORDS))
    };
    let kinds = probes
        .each_ref()
        .map(|kind| kind.iter().map(read).collect::<Vec<_>>());
    let is_tensor = |&k: &usize| {
        let mut all = kinds.iter().flatten();
        all.all(|(object, tensor, _)| object[k] == *tensor)
    };
    let tensor = (0..size / WORD).find(is_tensor)?;
    let [plain, negated, conjugated] = &kinds;
    let mut found = (0..WORDS).filter_map(|k| {
        let in_no_plain = !plain.iter().fold(0, |any, (.., words)| any | words[k]);
        let bits = [negated, conjugated].map(|kind| {
            kind.iter()
                .fold(in_no_plain, |bits, (.., words)| bits & words[k])
        });
        let is_it = bits.iter().all(|bits| bits.count_ones() == 1);
        is_it.then_some((k * WORD, bits[0] | bits[1]))
    });
    let (pending, mask) = found.next()?;
    found
        .next()
        .is_none()
        .then_some((tensor * WORD, pending, mask))
}

/// The words at an address.
///
/// # Safety
/// So many are there.
#[allow(unsafe_code)]
unsafe fn words(address: usize, count: usize) -> Vec<u64> {
    let first = address as *const u64;
    // SAFETY: passed on to the caller.
    (0..count)
        .map(|k| unsafe { first.add(k).read_volatile() })
        .collect()
}
