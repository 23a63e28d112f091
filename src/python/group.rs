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
use super::param::{Kind, Param, array_grad};
use super::parameter::{Parameter, Slot};
use super::source::Source;
use super::storage::code_of_one;
use super::view::{Element, Header, LentArray, Quiet, is_equal};
use crate::config::Config;
use crate::kernel::DType;
use crate::kernel::storage::{self, BLOCK};
use crate::state::{PAGE, StateKey, offset_apart};

/// A parameter group.
pub(crate) struct Group {
    pub options: GroupOptions,
    pub range: Range<usize>,
    /// One for each kind that its parameters have.
    pub buckets: SmallVec<[Bucket; 1]>,
    pub is_contiguous: bool,
    /// This step takes parameters and gradients as flat buffers.
    pub is_flat: bool,
}

/// The parameters of one kind in a group.
pub(crate) struct Bucket {
    pub kind: Kind,
    /// The index of the first of them.
    pub first: usize,
    /// Elements of the parameters, and of a buffer of state, where some begin apart from their
    /// parameters.
    pub numel: usize,
    state_numel: usize,
    scales_numel: usize,
    /// By key; None until it is needed.
    pub state: [Option<Stored>; StateKey::COUNT],
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

/// State of one key: the elements, and where these are codes their scales.
pub(crate) struct Stored {
    pub elements: Buffer,
    pub scales: Option<Buffer>,
}

impl Stored {
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        [&self.elements].into_iter().chain(&self.scales)
    }
}

/// State that is to be added: the place of its bucket in the group, its key.
pub(crate) type NewState = Vec<(usize, StateKey, Stored)>;

impl Bucket {
    /// The optimizer's own arrays that its parameters and their state lie in.
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let flat = self.flat.as_ref();
        let data = flat.map(|flat| &flat.data);
        let grad = flat.and_then(|flat| flat.grad.as_ref());
        let state = self.state.iter().flatten().flat_map(Stored::buffers);
        state.chain(data).chain(grad)
    }

    /// The parameters of a kind among those of a group, which are told where their state begins.
    /// `start` is the index of the group's first parameter, `first` of the first of that kind.
    fn new(
        kind: Kind,
        start: usize,
        first: usize,
        params: &mut [Param],
        is_contiguous: bool,
    ) -> Self {
        let size = kind.dtype.size();
        let (mut numel, mut state_numel, mut scales_numel) = (0, 0, 0);
        for param in params.iter_mut().filter(|param| param.kind() == kind) {
            let is_large = param.numel * size >= PAGE && !is_contiguous && !kind.is_narrow();
            if is_large {
                // Wherever the buffers are: they begin at known places modulo a page.
                let state = place_of(0) + state_numel * size;
                let data = param.extent().data;
                let keys = StateKey::EVERY.map(|key| data.wrapping_sub(place_of(key as usize)));
                state_numel += offset_apart(state, data, keys.into_iter()) / size;
            }
            (param.offset, param.scale_offset) = (state_numel, scales_numel);
            numel += param.numel;
            state_numel += param.numel;
            scales_numel += param.numel.div_ceil(BLOCK);
        }
        Bucket {
            kind,
            first: start + first,
            numel,
            state_numel,
            scales_numel,
            state: Default::default(),
            flat: None,
        }
    }

    /// State at its start values. Arrays of one parameter begin apart modulo a page: each key has a
    /// place of its own.
    fn new_state(
        &self,
        py: Python<'_>,
        key: StateKey,
        dtype: DType,
        config: &Config,
    ) -> PyResult<Stored> {
        let (start, place) = (key.start(config), place_of(key as usize));
        let new = |dtype, numel, value| Buffer::new(py, dtype, numel, value, place);
        if dtype != DType::U8 {
            return Ok(Stored {
                elements: new(dtype, self.state_numel, start)?,
                scales: None,
            });
        }
        let code = if start == 0.0 { 0 } else { code_of_one(key) };
        Ok(Stored {
            elements: new(dtype, self.state_numel, code.into())?,
            scales: Some(new(DType::F32, self.scales_numel, start)?),
        })
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
/// square_avg, grad_avg, momentum_buffer, ema, error_bits, flat parameters, flat gradients.
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
        let mut buckets: SmallVec<[Bucket; 1]> = SmallVec::new();
        for first in 0..params.len() {
            let kind = params[first].kind();
            if buckets.iter().all(|bucket| bucket.kind != kind) {
                buckets.push(Bucket::new(kind, start, first, params, is_contiguous));
            }
        }
        // The order in which flat buffers are pushed is that of the norm.
        buckets.sort_by_key(|bucket| bucket.kind.dtype.compute() as u8);
        let mut group = Group {
            buckets,
            options,
            range: start..start + params.len(),
            is_contiguous,
            is_flat: false,
        };
        let config = &group.options.config;
        for (place, key, state) in group.missing(py, config, |_, _| false)? {
            group.buckets[place].state[key as usize] = Some(state);
        }
        group.place(params);
        Ok(group)
    }

    /// State of parameters of a kind, if it is there.
    pub fn state(&self, kind: Kind, key: StateKey) -> Option<&Stored> {
        let mut buckets = self.buckets.iter();
        let bucket = buckets.find(|bucket| bucket.kind == kind)?;
        bucket.state[key as usize].as_ref()
    }

    /// The state that these options use, or that is wanted, and that is not there yet.
    pub fn missing(
        &self,
        py: Python<'_>,
        config: &Config,
        is_wanted: impl Fn(StateKey, Kind) -> bool,
    ) -> PyResult<NewState> {
        let mut new = NewState::new();
        for (place, bucket) in self.buckets.iter().enumerate() {
            for key in StateKey::EVERY {
                let is_used = key == StateKey::ErrorBits || key.is_used(config);
                if let Some(dtype) = bucket.kind.stored[key as usize]
                    && bucket.state[key as usize].is_none()
                    && (is_used || is_wanted(key, bucket.kind))
                {
                    new.push((place, key, bucket.new_state(py, key, dtype, config)?));
                }
            }
        }
        Ok(new)
    }

    /// Tells its parameters where their state is.
    pub fn place(&self, params: &mut [Param]) {
        for param in params {
            let kind = param.kind();
            for key in StateKey::EVERY {
                let stored = self.state(kind, key);
                let scales = stored.and_then(|stored| stored.scales.as_ref());
                let at = |buffer: &Buffer, offset| buffer.address + offset * buffer.dtype.size();
                param.state[key as usize] =
                    stored.map_or(0, |stored| at(&stored.elements, param.offset));
                param.scales[key as usize] =
                    scales.map_or(0, |scales| at(scales, param.scale_offset));
            }
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
        buckets.all(|bucket| bucket.flat_addresses().is_some() && !bucket.kind.is_narrow())
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
            let dtype = Element::real(bucket.kind.dtype).name();
            let keyed = bucket.state.iter().zip(StateKey::EVERY);
            let keyed = keyed.filter_map(|(stored, key)| Some((stored.as_ref()?, key)));
            keyed.flat_map(move |(stored, key)| {
                let name = format!("state {} of group {index}, {dtype}", key.name());
                stored
                    .buffers()
                    .map(move |buffer| (name.clone(), buffer.extent()))
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
            flats.push(Flat::new(py, bucket.kind, &params[group.range.clone()])?);
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
    /// Buffers for the parameters of a kind, filled, and the place of each parameter in them; None
    /// if there is no element.
    fn new(py: Python<'_>, kind: Kind, params: &[Param]) -> PyResult<Option<(Flat, Homes)>> {
        let members = || params.iter().filter(|param| param.kind() == kind);
        let dtype = kind.dtype;
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
                let home = buffer.view_of(py, param, param.offset)?;
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
    dtype: DType,
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
        // bfloat16 is no type of NumPy's own.
        let name = match dtype {
            DType::BF16 => "uint16",
            dtype => Element::real(dtype).name(),
        };
        let value = match dtype {
            DType::BF16 => storage::bf16_nearest(value as f32).into(),
            _ => value,
        };
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
            dtype,
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

    /// A NumPy view of a parameter's elements from there on, of its shape and walked like its state.
    pub fn view_of<'py>(
        &self,
        py: Python<'py>,
        param: &Param,
        offset: usize,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let size = self.dtype.size();
        let strides = param.state_strides.iter();
        let strides = PyTuple::new(py, strides.map(|stride| stride * size as i64))?;
        self.view(py, offset, PyTuple::new(py, &param.shape)?, strides)
    }

    /// A NumPy view of scales.
    pub fn view_of_scales<'py>(
        &self,
        py: Python<'py>,
        param: &Param,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let shape = PyTuple::new(py, [param.numel.div_ceil(BLOCK)])?;
        let strides = PyTuple::new(py, [self.dtype.size()])?;
        self.view(py, param.scale_offset, shape, strides)
    }

    fn view<'py>(
        &self,
        py: Python<'py>,
        offset: usize,
        shape: Bound<'py, PyTuple>,
        strides: Bound<'py, PyTuple>,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let numpy = py.import(intern!(py, "numpy"))?;
        let dtype = match self.dtype {
            DType::BF16 => bfloat16(py)?,
            dtype => Element::real(dtype).name().into_pyobject(py)?.into_any(),
        };
        let arguments = (
            shape,
            dtype,
            &self.array,
            offset * self.dtype.size(),
            strides,
        );
        let view = numpy.call_method1(intern!(py, "ndarray"), arguments)?;
        Ok(view.cast_into::<PyUntypedArray>()?)
    }

    fn extent(&self) -> Extent {
        let size = self.dtype.size();
        Extent {
            data: self.base,
            dims: [(self.len as usize, size as isize)].into_iter().collect(),
            size,
        }
    }
}

/// NumPy's dtype for bfloat16: that of `ml_dtypes`, or the bits as integers where there is none.
fn bfloat16(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    match py.import(intern!(py, "ml_dtypes")) {
        Ok(ml_dtypes) => ml_dtypes.getattr(intern!(py, "bfloat16")),
        Err(_) => Ok(intern!(py, "uint16").clone().into_any()),
    }
}
