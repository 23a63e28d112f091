//! A parameter group of the array front: its options, its state, and its flat buffers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use numpy::PyUntypedArray;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PySlice, PyTuple};
use pyo3::{PyTraverseError, PyVisit};
use smallvec::SmallVec;

use super::options::GroupOptions;
use super::overlap::Extent;
use super::param::{Param, array_grad};
use super::parameter::{Parameter, Slot};
use super::source::Source;
use super::view::{Element, Header, LentArray, Quiet, is_equal};
use crate::config::Config;
use crate::kernel::DType;
use crate::state::{PAGE, StateKey, offset_apart};

/// A parameter group.
pub(crate) struct Group {
    pub options: GroupOptions,
    pub range: Range<usize>,
    /// One for each type that its parameters have.
    pub buckets: SmallVec<[Bucket; 1]>,
    pub is_contiguous: bool,
    /// This step takes parameters and gradients as flat buffers.
    pub is_flat: bool,
}

/// The parameters of one type in a group.
pub(crate) struct Bucket {
    pub dtype: DType,
    /// The index of the first of them.
    pub first: usize,
    /// Elements of the parameters, and of a buffer of state, where some begin apart from their
    /// parameters.
    pub numel: usize,
    state_numel: usize,
    /// By key; None until it is needed.
    pub state: [Option<Buffer>; StateKey::COUNT],
    pub flat: Option<Flat>,
}

/// The flat buffers that parameters live in with `contiguous_params`.
pub(crate) struct Flat {
    data: Buffer,
    /// If all of them had a gradient, and an element, when they were moved.
    grad: Option<Buffer>,
    /// How many parameters have left.
    departed: Arc<AtomicUsize>,
}

/// State that is to be added: the place of its bucket in the group, its key.
pub(crate) type NewState = Vec<(usize, StateKey, Buffer)>;

impl Bucket {
    /// The optimizer's own arrays that its parameters and their state lie in.
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let flat = self.flat.as_ref();
        let data = flat.map(|flat| &flat.data);
        let grad = flat.and_then(|flat| flat.grad.as_ref());
        self.state.iter().flatten().chain(data).chain(grad)
    }

    /// The parameters of a type among those of a group, which are told where their state begins;
    /// None if there are none. `start` is the index of the group's first parameter.
    fn new(dtype: DType, start: usize, params: &mut [Param], is_contiguous: bool) -> Option<Self> {
        let first = start + params.iter().position(|param| param.dtype == dtype)?;
        let size = dtype.size();
        let (mut numel, mut state_numel) = (0, 0);
        for param in params.iter_mut().filter(|param| param.dtype == dtype) {
            let is_large = param.numel * size >= PAGE && !is_contiguous;
            if is_large {
                // Wherever the buffers are: they begin at known places modulo a page.
                let state = place_of(0) + state_numel * size;
                let data = param.extent().data;
                let keys = StateKey::ALL.map(|key| data.wrapping_sub(place_of(key as usize)));
                state_numel += offset_apart(state, data, keys.into_iter()) / size;
            }
            param.offset = state_numel;
            numel += param.numel;
            state_numel += param.numel;
        }
        Some(Bucket {
            dtype,
            first,
            numel,
            state_numel,
            state: Default::default(),
            flat: None,
        })
    }

    /// A buffer of state at its start values. Arrays of one parameter begin apart modulo a page: each
    /// key has a place of its own.
    fn new_state(&self, py: Python<'_>, key: StateKey, config: &Config) -> PyResult<Buffer> {
        let (start, place) = (key.start(config), place_of(key as usize));
        Buffer::new(py, self.dtype, self.state_numel, start, place)
    }

    /// Where the parameters and their gradients are, if all are where `contiguous_params` put them.
    pub fn flat_addresses(&self) -> Option<[usize; 2]> {
        let flat = self.flat.as_ref()?;
        let is_whole = flat.departed.load(Relaxed) == 0;
        let grad = flat.grad.as_ref().filter(|_| is_whole)?;
        Some([flat.data.address(), grad.address()])
    }
}

/// Where buffers begin modulo a page, so that the same offset into each is apart by 512 bytes:
/// square_avg, grad_avg, momentum_buffer, ema, flat parameters, flat gradients.
fn place_of(k: usize) -> usize {
    k * 512
}

impl Group {
    /// A group of these parameters, of which `start` is the index of the first.
    pub fn new(
        py: Python<'_>,
        options: GroupOptions,
        is_contiguous: bool,
        start: usize,
        params: &mut [Param],
    ) -> PyResult<Self> {
        let bucket = |dtype| Bucket::new(dtype, start, params, is_contiguous);
        let buckets = [DType::F32, DType::F64].into_iter().filter_map(bucket);
        let mut group = Group {
            buckets: buckets.collect(),
            options,
            range: start..start + params.len(),
            is_contiguous,
            is_flat: false,
        };
        let config = &group.options.config;
        let new = group.missing(py, config, |key, _| key.is_used(config))?;
        for (place, key, buffer) in new {
            group.buckets[place].state[key as usize] = Some(buffer);
        }
        group.place(params);
        Ok(group)
    }

    /// A buffer of its state, if it is there.
    pub fn state(&self, dtype: DType, key: StateKey) -> Option<&Buffer> {
        let mut buckets = self.buckets.iter();
        let bucket = buckets.find(|bucket| bucket.dtype == dtype)?;
        bucket.state[key as usize].as_ref()
    }

    /// The state that is wanted and not there yet.
    pub fn missing(
        &self,
        py: Python<'_>,
        config: &Config,
        is_wanted: impl Fn(StateKey, DType) -> bool,
    ) -> PyResult<NewState> {
        let mut new = NewState::new();
        for (place, bucket) in self.buckets.iter().enumerate() {
            for key in StateKey::ALL {
                if bucket.state[key as usize].is_none() && is_wanted(key, bucket.dtype) {
                    new.push((place, key, bucket.new_state(py, key, config)?));
                }
            }
        }
        Ok(new)
    }

    /// Tells its parameters where their state is.
    pub fn place(&self, params: &mut [Param]) {
        for param in params {
            let start = param.offset * param.dtype.size();
            let address = |buffer: &Buffer| buffer.address() + start;
            param.state = StateKey::ALL.map(|key| self.state(param.dtype, key).map_or(0, address));
        }
    }

    /// For the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.options.traverse(visit)?;
        let mut buffers = self.buckets.iter().flat_map(Bucket::buffers);
        buffers.try_for_each(|buffer| visit.call(&buffer.owner))
    }

    /// Whether a step can take the parameters and gradients as flat buffers.
    pub fn can_be_flat(&self, steps: &[u64], has_ema: &[bool]) -> bool {
        let (steps, has_ema) = (&steps[self.range.clone()], &has_ema[self.range.clone()]);
        let config = &self.options.config;
        let mut buckets = self.buckets.iter();
        buckets.all(|bucket| bucket.flat_addresses().is_some())
            && (!config.bias_correction || steps.iter().all(|&step| step == steps[0]))
            && (config.ema_decay.is_none() || has_ema.iter().all(|&one| one == has_ema[0]))
    }

    /// Whether nobody has pulled the memory away: a view's `base` is within a user's reach.
    #[inline]
    pub fn has_its_memory(&self, quiet: &Quiet<'_>) -> bool {
        let is_whole = |bucket: &Bucket| bucket.buffers().all(|buffer| buffer.is_current(quiet));
        self.buckets.iter().all(is_whole)
    }

    /// The names and places of its state buffers, for the search for overlaps.
    pub fn state_extents(&self, index: usize) -> impl Iterator<Item = (String, Extent)> {
        self.buckets.iter().flat_map(move |bucket| {
            let dtype = Element::real(bucket.dtype).name();
            let keyed = bucket.state.iter().zip(StateKey::ALL);
            keyed.filter_map(move |(buffer, key)| {
                let name = format!("state {} of group {index}, {dtype}", key.name());
                Some((name, buffer.as_ref()?.extent(bucket.dtype)))
            })
        })
    }
}

/// Moves the parameters of the groups that want it into flat buffers, and their gradients too if
/// all of a type have one that fits. All or none.
pub(crate) fn flatten(
    py: Python<'_>,
    groups: &mut [Group],
    params: &mut [Param],
    held: &mut Vec<Py<PyAny>>,
) -> PyResult<()> {
    let mut flats = Vec::new();
    for group in groups.iter().filter(|group| group.is_contiguous) {
        for bucket in &group.buckets {
            flats.push(Flat::new(py, bucket.dtype, &params[group.range.clone()])?);
        }
    }
    let contiguous = groups.iter_mut().filter(|group| group.is_contiguous);
    for (bucket, flat) in contiguous.flat_map(|group| &mut group.buckets).zip(flats) {
        let Some((flat, homes)) = flat else { continue };
        for (parameter, home) in homes {
            parameter.get().settle(py, home);
        }
        bucket.flat = Some(flat);
    }
    // Nothing keeps the memory that they were in.
    Quiet::during(py, |quiet| {
        for param in params {
            param.source.follow(quiet, held);
        }
    });
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
        let data = Buffer::new(py, dtype, numel, 0.0, place_of(StateKey::COUNT))?;
        let grads: Option<Vec<_>> = members().map(|param| array_grad(py, param)).collect();
        let grad = match &grads {
            Some(_) => Some(Buffer::new(
                py,
                dtype,
                numel,
                0.0,
                place_of(StateKey::COUNT + 1),
            )?),
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
            let slot = Slot {
                data: home,
                grad: grad_home,
                departed: Arc::clone(&departed),
                has_left: false,
            };
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
        let size = param.dtype.size();
        let strides = param.state_strides.iter();
        let strides = PyTuple::new(py, strides.map(|stride| stride * size as i64))?;
        let (shape, dtype) = (PyTuple::new(py, &param.shape)?, Element::real(param.dtype));
        let offset = param.offset * size;
        let numpy = py.import(intern!(py, "numpy"))?;
        let arguments = (shape, dtype.name(), &self.array, offset, strides);
        let view = numpy.call_method1(intern!(py, "ndarray"), arguments)?;
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
