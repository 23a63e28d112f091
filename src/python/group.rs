//! A parameter group: its options as last read, its state, and its flat buffers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::options::Snapshot;
use super::parameter::{Parameter, Slot};
use super::tensor::work::{FlatWork, GroupWork, Guard, Param, StateSpan};
use super::tensor::{Buffer, DType, Destination, Gradient, Source, Tensor};
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
    /// Some parameters have no element, so that buffers cannot tell whether they have a gradient.
    has_empty: bool,
    /// This step takes parameters and gradients as flat buffers.
    pub is_flat: bool,
}

/// The parameters of one type in a group.
#[derive(Default)]
pub(crate) struct Half {
    pub numel: usize,
    /// There are parameters of this type, if only without elements.
    has_members: bool,
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

    /// The state that is wanted and not there yet, at its start values.
    fn missing(
        &self,
        py: Python<'_>,
        dtype: DType,
        config: &Config,
        is_wanted: impl Fn(StateKey) -> bool,
    ) -> PyResult<NewState> {
        let is_missing = |key: StateKey| self.has_members && self.state[key as usize].is_none();
        let create = |key: StateKey| match is_missing(key) && is_wanted(key) {
            true => Buffer::new(py, dtype, self.numel, key.start(config)).map(Some),
            false => Ok(None),
        };
        let [v, m, b] = StateKey::ALL.map(create);
        Ok([v?, m?, b?])
    }

    /// Takes state that was missing. True if there is any.
    fn adopt(&mut self, new: NewState) -> bool {
        let has_new = new.iter().any(Option::is_some);
        for (buffer, new) in self.state.iter_mut().zip(new) {
            *buffer = buffer.take().or(new);
        }
        has_new
    }
}

/// State that is to be added to a [`Half`].
pub(crate) type NewState = [Option<Buffer>; 3];

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

    /// A group of these parameters, of which `first` is the index of the first.
    pub fn new(
        py: Python<'_>,
        snapshot: Snapshot,
        objects: Py<PyTuple>,
        config: Config,
        is_contiguous: bool,
        first: usize,
        params: &mut [Param],
    ) -> PyResult<Self> {
        let mut halves = [Half::default(), Half::default()];
        for param in &mut *params {
            let half = &mut halves[param.destination.dtype as usize];
            param.offset = half.numel;
            half.numel += param.destination.numel;
            half.has_members = true;
        }
        for (half, dtype) in halves.iter_mut().zip(DTYPES) {
            let new = half.missing(py, dtype, &config, |key| key.is_used(&config))?;
            half.adopt(new);
        }
        let group = Group {
            snapshot,
            objects,
            config,
            range: first..first + params.len(),
            halves,
            is_contiguous,
            has_empty: params.iter().any(|param| param.destination.numel == 0),
            is_flat: false,
        };
        group.place(params);
        Ok(group)
    }

    /// The state that is wanted and not there yet, by type.
    pub fn missing(
        &self,
        py: Python<'_>,
        config: &Config,
        is_wanted: impl Fn(StateKey, DType) -> bool,
    ) -> PyResult<[NewState; 2]> {
        let [f32, f64] = &self.halves;
        let f32 = f32.missing(py, DType::F32, config, |key| is_wanted(key, DType::F32))?;
        let f64 = f64.missing(py, DType::F64, config, |key| is_wanted(key, DType::F64))?;
        Ok([f32, f64])
    }

    /// Takes state that was missing, and tells its parameters where it is. What there was before, if
    /// there is any.
    pub fn adopt(
        &mut self,
        new: [NewState; 2],
        params: &mut [Param],
        guard: &mut Guard,
    ) -> Option<[[bool; 3]; 2]> {
        let had = |half: &Half| half.state.each_ref().map(Option::is_some);
        let had = self.halves.each_ref().map(had);
        let mut has_new = false;
        for (half, new) in self.halves.iter_mut().zip(new) {
            has_new |= half.adopt(new);
        }
        if has_new {
            self.place(&mut params[self.range.clone()]);
            guard.forget();
        }
        has_new.then_some(had)
    }

    /// Lets go of all state but that; the options are read anew at the next step.
    pub fn disown(&mut self, kept: [[bool; 3]; 2], params: &mut [Param], guard: &mut Guard) {
        for (half, kept) in self.halves.iter_mut().zip(kept) {
            for (buffer, is_kept) in half.state.iter_mut().zip(kept) {
                buffer.take_if(|_| !is_kept);
            }
        }
        self.snapshot.forget();
        self.place(&mut params[self.range.clone()]);
        guard.forget();
    }

    /// Tells its parameters where their state is.
    fn place(&self, params: &mut [Param]) {
        for param in params {
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
            && !self.has_empty
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
                let name = || format!("state {} of group {index}, {}", key.name(), dtype.name());
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

/// Moves the parameters of the groups that want it into flat buffers, and their gradients too if
/// all of a type have one that fits. All or none.
pub(crate) fn flatten(py: Python<'_>, groups: &mut [Group], params: &mut [Param]) -> PyResult<()> {
    let mut flats = Vec::new();
    for group in groups.iter().filter(|group| group.is_contiguous) {
        let params = &params[group.range.clone()];
        let [f32, f64] = DTYPES.map(|dtype| Flat::new(py, dtype, params));
        flats.push([f32?, f64?]);
    }
    for (group, flats) in groups
        .iter_mut()
        .filter(|group| group.is_contiguous)
        .zip(flats)
    {
        for (half, flat) in group.halves.iter_mut().zip(flats) {
            let Some((flat, homes)) = flat else { continue };
            for (parameter, home) in homes {
                parameter.get().settle(py, home);
            }
            half.flat = Some(flat);
        }
        for index in group.range.clone() {
            params[index].refresh(py, index, &mut Vec::new())?;
        }
    }
    Ok(())
}

impl Flat {
    /// Buffers for the parameters of a type, filled, and the place of each parameter in them; None
    /// if there is no element.
    fn new(py: Python<'_>, dtype: DType, params: &[Param]) -> PyResult<Option<(Flat, Homes)>> {
        let members = || {
            params
                .iter()
                .filter(|param| param.destination.dtype == dtype)
        };
        let numel = members().map(|param| param.destination.numel).sum();
        if numel == 0 {
            return Ok(None);
        }
        let data = Buffer::new(py, dtype, numel, 0.0)?;
        let grads: Option<Vec<_>> = members().map(|param| array_grad(py, param)).collect();
        let grad = match &grads {
            Some(_) => Some(Buffer::new(py, dtype, numel, 0.0)?),
            None => None,
        };
        let strays = Arc::new(AtomicUsize::new(0));
        let mut homes = Vec::new();
        for (k, param) in members().enumerate() {
            let Source::Parameter(parameter, ..) = &param.source else {
                continue;
            };
            let Destination { shape, .. } = &param.destination;
            let strides = param.destination.state_strides();
            let settle = |buffer: &Buffer, array: &Bound<'_, PyUntypedArray>| {
                let home = buffer.view(py, param.offset, shape, strides)?;
                home.set_item(py.Ellipsis(), array)?;
                PyResult::Ok(home.unbind())
            };
            let home = settle(&data, &parameter.get().data(py))?;
            let grad_home = match (&grad, &grads) {
                (Some(grad), Some(grads)) => Some(settle(grad, &grads[k])?.into_any()),
                _ => parameter.get().grad(py).map(Bound::unbind),
            };
            let slot = Slot::new(home, grad_home, Arc::clone(&strays));
            homes.push((parameter.clone_ref(py), slot));
        }
        Ok(Some((Flat { data, grad, strays }, homes)))
    }
}

/// Parameters and where they go.
type Homes = Vec<(Py<Parameter>, Slot)>;

/// The gradient of a parameter, if it is an array that fits.
fn array_grad<'py>(py: Python<'py>, param: &Param) -> Option<Bound<'py, PyUntypedArray>> {
    let Source::Parameter(parameter, ..) = &param.source else {
        return None;
    };
    let grad = parameter
        .get()
        .grad(py)?
        .cast_into::<PyUntypedArray>()
        .ok()?;
    Gradient::new(&Tensor::of_array(&grad).ok()?, &param.destination).ok()?;
    Some(grad)
}
