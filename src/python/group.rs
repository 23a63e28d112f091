//! A parameter group: its options as last read, its state, and its flat buffers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::options::Snapshot;
use super::parameter::Slot;
use super::tensor::work::{FlatWork, GroupWork, Guard, Param, StateSpan};
use super::tensor::{Buffer, DType, Gradient, Source, read_gradient};
use crate::config::Config;
use crate::state::StateKey;

/// The types in the order of [`Group::halves`].
pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::F64];

/// A parameter group.
pub(crate) struct Group {
    pub snapshot: Snapshot,
    /// The tuple of parameters that the snapshot has.
    pub objects: Py<PyTuple>,
    pub config: Config,
    pub range: Range<usize>,
    /// Per type.
    pub halves: [Half; 2],
    pub is_contiguous: bool,
    /// This step takes parameters and gradients as flat buffers.
    pub is_flat: bool,
}

/// The parameters of one type in a group.
#[derive(Default)]
pub(crate) struct Half {
    pub numel: usize,
    /// The state, by key; None until it is needed.
    pub state: [Option<Buffer>; 3],
    pub flat: Option<Flat>,
}

/// The flat buffers that parameters live in with `contiguous_params`.
pub(crate) struct Flat {
    pub data: Buffer,
    /// If all of them had a gradient when they were moved.
    pub grad: Option<Buffer>,
    /// How many parameters have left.
    pub strays: Arc<AtomicUsize>,
}

impl Half {
    /// Of the state buffers; 0 for those that are not there yet.
    fn addresses(&self) -> [usize; 3] {
        self.state
            .each_ref()
            .map(|buffer| buffer.as_ref().map_or(0, |buffer| buffer.data))
    }

    /// Creates the state that is not there yet.
    pub fn create(
        &mut self,
        py: Python<'_>,
        dtype: DType,
        config: &Config,
        is_wanted: impl Fn(StateKey) -> bool,
    ) -> PyResult<bool> {
        let mut has_created = false;
        for key in StateKey::ALL.into_iter().filter(|&key| is_wanted(key)) {
            let buffer = &mut self.state[key as usize];
            if buffer.is_none() && self.numel > 0 {
                *buffer = Some(Buffer::new(py, dtype, self.numel, key.start(config))?);
                has_created = true;
            }
        }
        Ok(has_created)
    }
}

impl Group {
    pub fn work(&self) -> GroupWork<'_> {
        let flat = |half: &Half| match &half.flat {
            Some(Flat {
                data,
                grad: Some(grad),
                ..
            }) => FlatWork {
                p: data.data,
                g: grad.data,
                state: half.addresses(),
                numel: half.numel,
            },
            _ => FlatWork::default(),
        };
        let [f32, f64] = &self.halves;
        GroupWork {
            config: &self.config,
            range: self.range.clone(),
            flat: self.is_flat.then(|| [flat(f32), flat(f64)]),
        }
    }

    /// Creates the state that is wanted and not there yet, and tells its parameters where it is.
    pub fn create(
        &mut self,
        py: Python<'_>,
        params: &mut [Param],
        config: &Config,
        is_wanted: impl Fn(StateKey, DType) -> bool,
    ) -> PyResult<bool> {
        let mut has_created = false;
        for (half, dtype) in self.halves.iter_mut().zip(DTYPES) {
            has_created |= half.create(py, dtype, config, |key| is_wanted(key, dtype))?;
        }
        if has_created {
            self.place(params);
        }
        Ok(has_created)
    }

    /// Tells the parameters where their state is.
    pub fn place(&self, params: &mut [Param]) {
        for param in &mut params[self.range.clone()] {
            let dtype = param.destination.dtype;
            let start = param.offset * dtype.size();
            let addresses = self.halves[dtype as usize].addresses();
            param.state = addresses.map(|data| if data == 0 { 0 } else { data + start });
        }
    }

    /// Everything of its own that parameters and state lie in.
    pub fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let flats = self.halves.iter().filter_map(|half| half.flat.as_ref());
        let flats = flats.flat_map(|flat| std::iter::once(&flat.data).chain(&flat.grad));
        self.halves
            .iter()
            .flat_map(|half| half.state.iter().flatten())
            .chain(flats)
    }

    /// Decides whether this step takes the parameters and gradients as flat buffers: if all of them
    /// still are where `contiguous_params` put them.
    pub fn settle_mode(
        &mut self,
        py: Python<'_>,
        params: &mut [Param],
        steps: &[u64],
        guard: &mut Guard,
    ) -> PyResult<()> {
        let is_whole = |half: &Half| match &half.flat {
            _ if half.numel == 0 => true,
            Some(Flat {
                grad: Some(_),
                strays,
                ..
            }) => strays.load(Ordering::Relaxed) == 0,
            _ => false,
        };
        let steps = &steps[self.range.clone()];
        let is_flat = self.is_contiguous
            && self.halves.iter().all(is_whole)
            && (!self.config.bias_correction || steps.iter().all(|&step| step == steps[0]));
        if is_flat && !self.is_flat {
            // Back from strays, or new: `guard` must know where the parameters are.
            for index in self.range.clone() {
                if params[index].refresh(py, index, &mut Vec::new())? {
                    guard.forget();
                }
            }
        }
        self.is_flat = is_flat;
        Ok(())
    }

    /// That nobody has pulled the memory away: a view's `base` is within a user's reach.
    pub fn check_buffers(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        if self.buffers().all(|buffer| buffer.is_current(py)) {
            return Ok(());
        }
        let wanted = "expected the optimizer's own arrays";
        let found = "got one that was resized or given other memory";
        Err(PyValueError::new_err(format!(
            "state of group {index}: {wanted}, {found}"
        )))
    }
}

/// The state buffers of all groups, for the search for overlaps.
pub(crate) fn state_spans(groups: &[Group]) -> Vec<StateSpan> {
    let mut spans = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        for (half, dtype) in group.halves.iter().zip(DTYPES) {
            for (buffer, key) in half.state.iter().zip(StateKey::ALL) {
                let name = || format!("state {} of group {index}", key.name());
                spans.extend(
                    buffer
                        .as_ref()
                        .map(|buffer| StateSpan::new(name(), buffer, dtype)),
                );
            }
        }
    }
    spans
}

/// Moves parameters into flat buffers, and their gradients too if all have one that fits.
pub(crate) fn flatten(
    py: Python<'_>,
    params: &mut [Param],
    first: usize,
    halves: &mut [Half; 2],
) -> PyResult<()> {
    let copyto = py
        .import(intern!(py, "numpy"))?
        .getattr(intern!(py, "copyto"))?;
    let mut slots = Vec::new();
    for (half, dtype) in halves
        .iter_mut()
        .zip(DTYPES)
        .filter(|(half, _)| half.numel > 0)
    {
        let members = || {
            params
                .iter()
                .filter(|param| param.destination.dtype == dtype)
        };
        let parameter = |param: &Param| match &param.source {
            Source::Parameter(parameter) => Some(parameter.clone_ref(py)),
            _ => None,
        };
        let grad_of = |param: &Param| {
            let grad = parameter(param)?.get().grad(py)?;
            let tensor = read_gradient(&grad, &mut Vec::new()).ok()?;
            Gradient::new(&tensor, &param.destination).ok()?;
            grad.cast_into::<PyUntypedArray>().ok()
        };
        let data = Buffer::new(py, dtype, half.numel, 0.0)?;
        let has_grads = members().all(|param| grad_of(param).is_some());
        let grad = has_grads
            .then(|| Buffer::new(py, dtype, half.numel, 0.0))
            .transpose()?;
        let strays = Arc::new(AtomicUsize::new(0));
        for param in members() {
            let Some(parameter) = parameter(param) else {
                continue;
            };
            let view = |buffer: &Buffer| {
                buffer.view(
                    py,
                    param.offset,
                    &param.destination.shape,
                    param.destination.state_strides(),
                )
            };
            let home = view(&data)?;
            copyto.call1((&home, parameter.get().data(py)))?;
            let mut grad_home = None;
            if let Some(grad) = &grad {
                let home = view(grad)?;
                copyto.call1((&home, grad_of(param)))?;
                grad_home = Some(home.into_any().unbind());
            }
            let grad = grad_home.or_else(|| parameter.get().grad(py).map(Bound::unbind));
            slots.push((
                parameter,
                Slot::new(home.unbind(), grad, Arc::clone(&strays)),
            ));
        }
        half.flat = Some(Flat { data, grad, strays });
    }
    for (parameter, slot) in slots {
        parameter.get().settle(py, slot);
    }
    for (k, param) in params.iter_mut().enumerate() {
        param.refresh(py, first + k, &mut Vec::new())?;
    }
    Ok(())
}
