//! A parameter group of the array front: its options, its state, and its flat buffers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use numpy::PyUntypedArray;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PySlice, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::options::GroupOptions;
use super::overlap::Extent;
use super::param::{Param, array_grad};
use super::parameter::{Parameter, Slot};
use super::source::Source;
use super::view::{Element, Header, LentArray, Quiet, is_equal};
use crate::config::Config;
use crate::kernel::DType;
use crate::state::{PAGE, StateKey, offset_apart};

/// The types in the order of [`Group::halves`].
pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::F64];

/// The place of a type in [`DTYPES`].
pub(crate) fn half_of(dtype: DType) -> usize {
    usize::from(dtype == DType::F64)
}

/// A parameter group.
pub(crate) struct Group {
    pub options: GroupOptions,
    /// The tuple of parameters that the options were read beside.
    pub objects: Py<PyTuple>,
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
    /// Elements of the parameters, and of a buffer of state, where some begin apart from their
    /// parameters.
    pub numel: usize,
    state_numel: usize,
    is_used: bool,
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
    pub departed: Arc<AtomicUsize>,
}

/// State that is to be added, by type and key.
pub(crate) type NewState = [[Option<Buffer>; 3]; 2];

impl Half {
    /// Of the state buffers; 0 for those that are not there yet.
    pub fn addresses(&self) -> [usize; 3] {
        self.state
            .each_ref()
            .map(|buffer| buffer.as_ref().map_or(0, Buffer::address))
    }

    /// The state that is wanted and not there yet, at its start values. Arrays of one parameter
    /// begin apart modulo a page: each key has a place of its own.
    fn missing(
        &self,
        py: Python<'_>,
        dtype: DType,
        config: &Config,
        is_wanted: impl Fn(StateKey) -> bool,
    ) -> PyResult<[Option<Buffer>; 3]> {
        let mut new = [None, None, None];
        for key in StateKey::ALL {
            let k = key as usize;
            if self.is_used && self.state[k].is_none() && is_wanted(key) {
                let start = key.start(config);
                new[k] = Some(Buffer::new(
                    py,
                    dtype,
                    self.state_numel,
                    start,
                    place_of(k),
                )?);
            }
        }
        Ok(new)
    }
}

/// Where buffers begin modulo a page, so that the same offset into each is apart by 512 bytes:
/// square_avg, grad_avg, momentum_buffer, flat parameters, flat gradients.
fn place_of(k: usize) -> usize {
    k * 512
}

impl Group {
    /// A group of these parameters, of which `first` is the index of the first.
    pub fn new(
        py: Python<'_>,
        options: GroupOptions,
        objects: Py<PyTuple>,
        is_contiguous: bool,
        first: usize,
        params: &mut [Param],
    ) -> PyResult<Self> {
        let mut halves = [Half::default(), Half::default()];
        for param in &mut *params {
            let half = &mut halves[half_of(param.dtype)];
            let size = param.dtype.size();
            half.is_used = true;
            let is_large = param.numel * size >= PAGE && !is_contiguous;
            if is_large {
                // Wherever the buffers are: they begin at known places modulo a page.
                let state = place_of(0) + half.state_numel * size;
                let data = param.extent().data;
                let keys = [0, 1, 2].map(|k| data.wrapping_sub(place_of(k)));
                half.state_numel += offset_apart(state, data, keys.into_iter()) / size;
            }
            param.offset = half.state_numel;
            half.numel += param.numel;
            half.state_numel += param.numel;
        }
        let mut group = Group {
            options,
            objects,
            range: first..first + params.len(),
            halves,
            is_contiguous,
            has_empty: params.iter().any(|param| param.numel == 0),
            is_flat: false,
        };
        let config = group.options.config.clone();
        let new = group.missing(py, &config, |key, _| key.is_used(&config))?;
        group.adopt(new);
        group.place(params);
        Ok(group)
    }

    /// The state that is wanted and not there yet.
    pub fn missing(
        &self,
        py: Python<'_>,
        config: &Config,
        is_wanted: impl Fn(StateKey, DType) -> bool,
    ) -> PyResult<NewState> {
        let [f32, f64] = &self.halves;
        let f32 = f32.missing(py, DType::F32, config, |key| is_wanted(key, DType::F32))?;
        let f64 = f64.missing(py, DType::F64, config, |key| is_wanted(key, DType::F64))?;
        Ok([f32, f64])
    }

    /// Takes state that was missing; [`Group::place`] tells the parameters. True if there is any.
    pub fn adopt(&mut self, new: NewState) -> bool {
        let mut has_new = false;
        for (half, new) in self.halves.iter_mut().zip(new) {
            for (buffer, new) in half.state.iter_mut().zip(new) {
                has_new |= new.is_some();
                *buffer = buffer.take().or(new);
            }
        }
        has_new
    }

    /// Tells its parameters where their state is.
    pub fn place(&self, params: &mut [Param]) {
        for param in params {
            let start = param.offset * param.dtype.size();
            let addresses = self.halves[half_of(param.dtype)].addresses();
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

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.options.traverse(visit)?;
        visit.call(&self.objects)?;
        self.buffers()
            .try_for_each(|buffer| visit.call(&buffer.owner))
    }

    /// Whether all parameters and gradients are where `contiguous_params` put them.
    pub fn is_whole(&self) -> bool {
        self.halves.iter().all(|half| match &half.flat {
            _ if half.numel == 0 => true,
            Some(Flat {
                grad: Some(_),
                departed,
                ..
            }) => departed.load(Ordering::Relaxed) == 0,
            _ => false,
        })
    }

    /// Whether a step can take the parameters and gradients as flat buffers: if all of them still are
    /// where `contiguous_params` put them.
    pub fn can_be_flat(&self, steps: &[u64]) -> bool {
        let steps = &steps[self.range.clone()];
        self.is_contiguous
            && !self.has_empty
            && self.is_whole()
            && (!self.options.config.bias_correction || steps.iter().all(|&step| step == steps[0]))
    }

    /// Whether nobody has pulled the memory away: a view's `base` is within a user's reach.
    #[inline]
    pub fn has_its_memory(&self, quiet: &Quiet<'_>) -> bool {
        self.buffers().all(|buffer| buffer.is_current(quiet))
    }

    /// The names and places of its state buffers, for the search for overlaps.
    pub fn state_extents(&self, index: usize) -> impl Iterator<Item = (String, Extent)> {
        let halves = self.halves.iter().zip(DTYPES);
        halves.flat_map(move |(half, dtype)| {
            let name = move |key: StateKey| {
                let dtype = Element::real(dtype).name();
                format!("state {} of group {index}, {dtype}", key.name())
            };
            let keyed = half.state.iter().zip(StateKey::ALL);
            keyed.filter_map(move |(buffer, key)| Some((name(key), buffer.as_ref()?.extent(dtype))))
        })
    }
}

/// Moves the parameters of the groups that want it into flat buffers, and their gradients too if
/// all of a type have one that fits. All or none.
pub(crate) fn flatten(
    py: Python<'_>,
    groups: &mut [Group],
    params: &mut [Param],
    retired: &mut Vec<Py<PyAny>>,
) -> PyResult<()> {
    let mut flats = Vec::new();
    for group in groups.iter().filter(|group| group.is_contiguous) {
        let params = &params[group.range.clone()];
        let [f32, f64] = DTYPES.map(|dtype| Flat::new(py, dtype, params));
        flats.push([f32?, f64?]);
    }
    let contiguous = groups.iter_mut().filter(|group| group.is_contiguous);
    for (group, flats) in contiguous.zip(flats) {
        for (half, flat) in group.halves.iter_mut().zip(flats) {
            let Some((flat, homes)) = flat else { continue };
            for (parameter, home) in homes {
                parameter.get().settle(py, home);
            }
            half.flat = Some(flat);
        }
        // Nothing keeps the memory that they were in.
        let params = &mut params[group.range.clone()];
        Quiet::during(py, |quiet| {
            for param in params {
                param.source.follow(quiet, retired);
            }
        });
    }
    Ok(())
}

impl Flat {
    /// Buffers for the parameters of a type, filled, and the place of each parameter in them; None
    /// if there is no element.
    fn new(py: Python<'_>, dtype: DType, params: &[Param]) -> PyResult<Option<(Flat, Homes)>> {
        let members = || params.iter().filter(|param| param.dtype == dtype);
        let numel = members().map(|param| param.numel).sum();
        if numel == 0 {
            return Ok(None);
        }
        let data = Buffer::new(py, dtype, numel, 0.0, place_of(3))?;
        let grads: Option<Vec<_>> = members().map(|param| array_grad(py, param)).collect();
        let grad = match &grads {
            Some(_) => Some(Buffer::new(py, dtype, numel, 0.0, place_of(4))?),
            None => None,
        };
        let departed = Arc::new(AtomicUsize::new(0));
        let mut homes = Vec::new();
        for (k, param) in members().enumerate() {
            let Source::Parameter(parameter, ..) = &param.source else {
                continue;
            };
            let settle = |buffer: &Buffer, array: &Bound<'_, PyUntypedArray>| {
                let home = buffer.view(py, param)?;
                home.set_item(py.Ellipsis(), array)?;
                PyResult::Ok(home.unbind())
            };
            let home = settle(&data, &parameter.get().data(py))?;
            let grad_home = match (&grad, &grads) {
                (Some(grad), Some(grads)) => Some(settle(grad, &grads[k])?.into_any()),
                _ => parameter.get().grad(py).map(Bound::unbind),
            };
            let slot = Slot::new(home, grad_home, Arc::clone(&departed));
            homes.push((parameter.clone_ref(py), slot));
        }
        Ok(Some((
            Flat {
                data,
                grad,
                departed,
            },
            homes,
        )))
    }
}

/// Parameters and where they go.
type Homes = Vec<(Py<Parameter>, Slot)>;

/// A one-dimensional array of the optimizer's own.
pub(crate) struct Buffer {
    owner: Py<PyUntypedArray>,
    /// Where its memory is, as it was made.
    base: usize,
    len: i64,
    /// The elements that are used: a view.
    array: Py<PyUntypedArray>,
    address: usize,
}

impl Buffer {
    /// A buffer whose elements are all `value`, and begin at `place` modulo a page.
    pub fn new(
        py: Python<'_>,
        dtype: DType,
        numel: usize,
        value: f64,
        place: usize,
    ) -> PyResult<Self> {
        let size = dtype.size();
        let len = match numel {
            0 => 0,
            numel => numel + PAGE / size,
        };
        let numpy = py.import(intern!(py, "numpy"))?;
        let name = Element::real(dtype).name();
        // `zeros` leaves the memory untouched until it is first written.
        let array = match value {
            0.0 => numpy.call_method1(intern!(py, "zeros"), (len, name))?,
            value => numpy.call_method1(intern!(py, "full"), (len, value, name))?,
        };
        let owner = array.cast_into::<PyUntypedArray>()?.unbind();
        let base = Quiet::during(py, |quiet| Header::of(LentArray::of(quiet, &owner)).data);
        let start = match numel {
            0 => 0,
            _ => place.wrapping_sub(base) % PAGE / size,
        };
        let used = PySlice::new(py, start as isize, (start + numel) as isize, 1);
        let array = owner.bind(py).get_item(used)?;
        Ok(Buffer {
            owner,
            base,
            len: len as i64,
            array: array.cast_into::<PyUntypedArray>()?.unbind(),
            address: base + start * size,
        })
    }

    /// Of the first element that is used.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Whether its memory still is where it was: a view's `base` is within a user's reach.
    #[inline]
    pub fn is_current(&self, quiet: &Quiet<'_>) -> bool {
        let header = Header::of(LentArray::of(quiet, &self.owner));
        header.data == self.base && is_equal(header.shape, &[self.len])
    }

    /// A NumPy view of a parameter's part, of its shape and walked like its state.
    pub fn view<'py>(
        &self,
        py: Python<'py>,
        param: &Param,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let (shape, strides) = (&param.shape, &param.state_strides);
        let first = param.offset as isize;
        let slice = PySlice::new(py, first, first + param.numel as isize, 1);
        let mut axes: Vec<usize> = (0..shape.len()).collect();
        axes.sort_by_key(|&axis| std::cmp::Reverse((strides[axis], shape[axis])));
        let sorted = PyTuple::new(py, axes.iter().map(|&axis| shape[axis]))?;
        let mut order = vec![0; axes.len()];
        let places = axes.iter().enumerate();
        places.for_each(|(place, &axis)| order[axis] = place);
        let array = self.array.bind(py).get_item(slice)?;
        let view = array.call_method1(intern!(py, "reshape"), (sorted,))?;
        let view = view.call_method1(intern!(py, "transpose"), PyTuple::new(py, order)?)?;
        Ok(view.cast_into::<PyUntypedArray>()?)
    }

    fn extent(&self, dtype: DType) -> Extent {
        Extent {
            data: self.base,
            dims: [(self.len as usize, dtype.size() as isize)]
                .into_iter()
                .collect(),
            size: dtype.size(),
        }
    }
}
