//! How an optimizer stores its state and 16-bit parameters: its options, and what of other storage
//! becomes of arrays that are loaded.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyMapping, PyString};

use super::view::class_name;
use crate::config::Config;
use crate::kernel::storage::{self, BLOCK, Code, Noise, Rounding, Stream};
use crate::kernel::{DType, Role};
use crate::state::StateKey;

/// The options of an optimizer that say how numbers are stored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Storage {
    /// By key; None for the compute type.
    state: [Option<DType>; StateKey::COUNT],
    has_state_dtype: bool,
    pub rounding: Rounding,
    /// The type of the error bits of bfloat16 parameters, if they have any.
    error_bits: Option<DType>,
    pub seed: u64,
}

/// Names of types that state may have.
const NAMES: [(&str, DType); 3] = [
    ("float32", DType::F32),
    ("bfloat16", DType::BF16),
    ("uint8", DType::U8),
];

/// What follows the key of codes in the name of their scales.
pub(crate) const SCALE: &str = "_scale";

/// Parameters of more elements than this have state in codes.
const SMALL: usize = 4096;

impl Storage {
    /// Reads the options.
    pub fn new(
        state_dtype: &Bound<'_, PyAny>,
        rounding: &Bound<'_, PyAny>,
        master_weight_bits: &Bound<'_, PyAny>,
        seed: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let mut storage = Storage {
            has_state_dtype: !state_dtype.is_none(),
            ..Storage::default()
        };
        let wanted = "'float32', 'bfloat16', 'uint8' or a mapping from keys of the state to these";
        if let Ok(name) = state_dtype.cast::<PyString>() {
            let dtype = dtype_of("state_dtype", wanted, name.as_any())?;
            for key in [
                StateKey::SquareAvg,
                StateKey::GradAvg,
                StateKey::MomentumBuffer,
            ] {
                storage.state[key as usize] = Some(dtype);
            }
        } else if let Ok(mapping) = state_dtype.cast::<PyMapping>() {
            for item in mapping.items()?.iter() {
                let (key, name): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
                let known = key
                    .extract::<String>()
                    .ok()
                    .and_then(|key| StateKey::named(&key));
                let Some(known) = known.filter(|&key| key != StateKey::ErrorBits) else {
                    let found = key.repr()?;
                    return Err(PyValueError::new_err(format!(
                        "state_dtype: expected keys among square_avg, grad_avg, momentum_buffer and ema, got {found}"
                    )));
                };
                let place = format!("state_dtype of {}", known.name());
                let wanted = "'float32', 'bfloat16' or 'uint8'";
                storage.state[known as usize] = Some(dtype_of(&place, wanted, &name)?);
            }
        } else if !state_dtype.is_none() {
            return Err(wrong_type("state_dtype", wanted, state_dtype)?);
        }
        storage.rounding = match rounding.extract::<&str>() {
            Ok("nearest") => Rounding::Nearest,
            Ok("stochastic") => Rounding::Stochastic,
            _ => {
                let wanted = "'nearest' or 'stochastic'";
                return Err(wrong_value("rounding", wanted, rounding)?);
            }
        };
        storage.error_bits = match master_weight_bits.extract::<Option<u64>>() {
            Ok(None) => None,
            Ok(Some(24)) => Some(DType::I8),
            Ok(Some(32)) => Some(DType::I16),
            _ => {
                let wanted = "None, 24 or 32";
                return Err(wrong_value(
                    "master_weight_bits",
                    wanted,
                    master_weight_bits,
                )?);
            }
        };
        let is_integer = seed.is_instance_of::<PyInt>() || seed.hasattr("__index__")?;
        if !is_integer || seed.is_instance_of::<PyBool>() {
            return Err(wrong_type("seed", "an integer", seed)?);
        }
        storage.seed = match seed.extract() {
            Ok(seed) => seed,
            Err(_) => return Err(wrong_value("seed", "an integer from 0 to 2**64 - 1", seed)?),
        };
        Ok(storage)
    }

    /// The type of a parameter's state; None if a step never uses it. Of an average or a momentum
    /// buffer that is a matter of the options of its group too.
    pub fn dtype(&self, key: StateKey, parameter: DType, numel: usize) -> Option<DType> {
        let compute = parameter.compute();
        match (key, self.state[key as usize]) {
            (StateKey::ErrorBits, _) => self.error_bits.filter(|_| parameter == DType::BF16),
            (_, Some(DType::U8)) if numel <= SMALL => Some(compute),
            (_, Some(dtype)) => Some(dtype),
            (_, None) => Some(compute),
        }
    }

    /// Whether bfloat16 parameters have error bits.
    #[inline]
    pub fn has_error_bits(&self) -> bool {
        self.error_bits.is_some()
    }

    /// Whether state is one array for each key.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.error_bits.is_none() && !self.has_state_dtype
    }

    /// That it can store the state of a parameter of this type; what is wanted instead, if not.
    pub fn check_parameter(&self, parameter: DType) -> Result<(), &'static str> {
        match parameter {
            DType::F64 if self.has_state_dtype => {
                Err("another dtype than float64, with state_dtype")
            }
            DType::F16 if self.error_bits.is_some() => {
                Err("another dtype than float16, with master_weight_bits")
            }
            _ => Ok(()),
        }
    }

    /// That it goes with the options of a group. `place` is " of group 0".
    pub fn check_group(&self, config: &Config, place: &str) -> PyResult<()> {
        let mut keys = [StateKey::SquareAvg, StateKey::GradAvg].into_iter();
        let coarse = keys.find(|&key| self.state[key as usize] == Some(DType::U8));
        match coarse.filter(|_| config.centered) {
            // The variance would be the noise of two codes.
            Some(key) => Err(PyValueError::new_err(format!(
                "centered{place}: expected False with {} in uint8, got True",
                key.name()
            ))),
            None => Ok(()),
        }
    }

    /// The random bits of an update.
    pub fn noise(&self, update: u64) -> Noise {
        Noise {
            seed: self.seed,
            update,
        }
    }
}

fn dtype_of(place: &str, wanted: &str, name: &Bound<'_, PyAny>) -> PyResult<DType> {
    let Ok(text) = name.extract::<&str>() else {
        return Err(wrong_type(place, wanted, name)?);
    };
    match NAMES.iter().find(|(known, _)| *known == text) {
        Some((_, dtype)) => Ok(*dtype),
        None => Err(wrong_value(place, wanted, name)?),
    }
}

fn wrong_type(place: &str, wanted: &str, found: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let (class, found) = (class_name(found), found.repr()?);
    let message = format!("{place}: expected {wanted}, got {class} {found}");
    Ok(PyTypeError::new_err(message))
}

fn wrong_value(place: &str, wanted: &str, found: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let message = format!("{place}: expected {wanted}, got {}", found.repr()?);
    Ok(PyValueError::new_err(message))
}

/// The code of the largest value of a block, which an array of equal values consists of.
pub(crate) fn code_of_one(key: StateKey) -> u8 {
    let mut code = [0];
    Code::of(role_of(key)).encode(&[1.0], |_| 0, &mut code);
    code[0]
}

/// The role of a key.
pub(crate) fn role_of(key: StateKey) -> Role {
    let mut roles = Role::ALL.into_iter();
    roles
        .find(|role| role.state_key() == Some(key))
        .unwrap_or(Role::Ema)
}

/// Where the random bits come from with which an array is loaded: (seed, parameter, step, key).
#[derive(FromPyObject)]
pub(crate) struct At(u64, usize, u64, String);

impl At {
    fn stream(&self) -> PyResult<(Role, Stream)> {
        let At(seed, parameter, update, key) = self;
        let noise = Noise {
            seed: *seed,
            update: *update,
        };
        let role = role_of(key_of(key)?);
        Ok((role, noise.stream(*parameter, role)))
    }
}

fn key_of(name: &str) -> PyResult<StateKey> {
    StateKey::named(name)
        .ok_or_else(|| PyValueError::new_err(format!("expected a key of the state, got {name:?}")))
}

/// Rounds elements in C order to the bits of bfloat16s.
#[pyfunction]
pub(crate) fn encode_bfloat16<'py>(
    values: PyReadonlyArray1<'py, f32>,
    at: At,
) -> PyResult<Bound<'py, PyArray1<u16>>> {
    let random = at.stream()?.1.from(0);
    let elements = values.as_slice()?.iter().enumerate();
    let bits = elements.map(|(k, &x)| storage::bf16_stochastic(x, random(k)));
    Ok(PyArray1::from_iter(values.py(), bits))
}

/// Codes and scales.
type Codes<'py> = (Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<f32>>);

/// The codes and the scales of elements in C order.
#[pyfunction]
pub(crate) fn encode_uint8<'py>(
    values: PyReadonlyArray1<'py, f32>,
    at: At,
) -> PyResult<Codes<'py>> {
    let (role, stream) = at.stream()?;
    let (py, values) = (values.py(), values.as_slice()?);
    let (mut codes, mut scales) = (vec![0; values.len()], Vec::new());
    for (k, (values, codes)) in values
        .chunks(BLOCK)
        .zip(codes.chunks_mut(BLOCK))
        .enumerate()
    {
        scales.push(Code::of(role).encode(values, stream.from(k * BLOCK), codes));
    }
    Ok((
        PyArray1::from_vec(py, codes),
        PyArray1::from_vec(py, scales),
    ))
}

/// The elements of codes in C order and their scales, of which there are enough.
#[pyfunction]
pub(crate) fn decode_uint8<'py>(
    codes: PyReadonlyArray1<'py, u8>,
    scales: PyReadonlyArray1<'py, f32>,
    key: &str,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let code = Code::of(role_of(key_of(key)?));
    let (py, codes) = (codes.py(), codes.as_slice()?);
    let mut values = vec![0.0; codes.len()];
    let blocks = codes.chunks(BLOCK).zip(values.chunks_mut(BLOCK));
    for ((codes, values), &scale) in blocks.zip(scales.as_slice()?) {
        code.decode(codes, scale, values);
    }
    Ok(PyArray1::from_vec(py, values))
}

/// The full values of bfloat16 parameters: their bits, and error bits as 16 of 32.
#[pyfunction]
pub(crate) fn join_error_bits<'py>(
    bits: PyReadonlyArray1<'py, u16>,
    error_bits: PyReadonlyArray1<'py, i16>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let both = bits.as_slice()?.iter().zip(error_bits.as_slice()?);
    let values = both.map(|(&bits, &error)| storage::join(bits, error.into()));
    Ok(PyArray1::from_iter(bits.py(), values))
}
