//! The arrays of one parameter, checked against each other: the last look before they are written.

use super::view::{Element, Refusal, View, shape_name};
use crate::kernel::batch::Work;
use crate::kernel::rows::{self, NoSuchRow, Rows, Summed};
use crate::kernel::stage::{Address, Dim, Form, Layout};
use crate::kernel::storage::{BLOCK, Noise, Rounding};
use crate::kernel::{DType, ROLES, Role};

/// Parameter, gradient and state of one shape, which a step may write.
pub(crate) struct Row {
    /// The compute type.
    pub dtype: DType,
    /// Real numbers: complex ones are pairs.
    pub numel: usize,
    /// By [`Role`]; 0 for those that are not used.
    addresses: [usize; ROLES],
    /// None if all are dense, of the compute type, and walked alike.
    form: Option<Form>,
}

/// Checks what `read` finds of each [`Role`] that is used, and what `read_scales` finds where that are
/// codes.
///
/// # Errors
/// The role of the array that does not fit, and why.
#[inline(always)]
pub(crate) fn check<'q>(
    uses: [bool; ROLES],
    rounding: Rounding,
    read: impl Fn(Role) -> Result<View<'q>, Refusal>,
    read_scales: impl Fn(Role) -> Result<View<'q>, Refusal>,
) -> Result<Row, (Role, Refusal)> {
    let p = read(Role::Parameter);
    let p = match &p {
        Ok(p) => p,
        Err(refusal) => return Err((Role::Parameter, *refusal)),
    };
    let is_compute_type = p.element.is_compute_type();
    if !is_compute_type && (p.element.is_complex || !p.element.dtype.is_float()) {
        return Err((Role::Parameter, Refusal::DType));
    }
    if let Err(refusal) = p.check_writable() {
        return Err((Role::Parameter, refusal));
    }
    let dtype = p.element.dtype.compute();
    let numel = p.numel();
    let bytes = numel * dtype.size();
    let mut addresses = [0; ROLES];
    addresses[Role::Parameter as usize] = p.data;
    // Without a gradient there are rows of one, which are counted in C order.
    let is_in_order = uses[Role::Gradient as usize] || p.is_in_order();
    let mut is_alike = is_compute_type && p.is_dense() && is_in_order;
    for role in &Role::ALL[1..] {
        if !uses[*role as usize] {
            continue;
        }
        let view = read(*role);
        let view = match &view {
            Ok(view) => view,
            Err(refusal) => return Err((*role, *refusal)),
        };
        let is_walked_alike = view.is_walked_like(p);
        if let Err(refusal) = check_like(*role, view, p, is_walked_alike) {
            return Err((*role, refusal));
        }
        is_alike &= view.element == p.element
            && view.is_aligned
            && is_walked_alike
            && addresses
                .iter()
                .all(|&other| view.data.abs_diff(other) >= bytes);
        addresses[*role as usize] = view.data;
    }
    let form = match is_alike {
        true => None,
        false => Some(form_of(p, uses, rounding, read, read_scales)?),
    };
    Ok(Row {
        dtype,
        numel,
        addresses,
        form,
    })
}

/// That an array has the shape of its parameter, and the type that it must have.
#[inline(always)]
fn check_like(
    role: Role,
    view: &View<'_>,
    p: &View<'_>,
    is_walked_alike: bool,
) -> Result<(), Refusal> {
    let is_like = match role {
        // Rounded as it is read.
        Role::Gradient => {
            view.element.dtype.is_float() && view.element.is_complex == p.element.is_complex
        }
        _ if view.element == p.element && p.element.is_compute_type() => true,
        _ => may_store(role, view.element, p.element),
    };
    if !is_like {
        return Err(Refusal::DType);
    }
    if !is_walked_alike && !view.is_shaped_like(p) {
        return Err(Refusal::Unlike);
    }
    match role.is_written() {
        true => view.check_writable(),
        false => Ok(()),
    }
}

/// Whether state of a parameter may be stored in another type than its own.
#[cold]
fn may_store(role: Role, state: Element, parameter: Element) -> bool {
    if parameter.is_complex || state.is_complex || parameter.dtype.compute() != DType::F32 {
        return false;
    }
    match role {
        Role::ErrorBits => parameter.dtype == DType::BF16 && state.dtype.is_error_bits(),
        _ => matches!(state.dtype, DType::F32 | DType::BF16 | DType::U8),
    }
}

/// The form of arrays that do not all lie alike, or are not all of the compute type. They may not share
/// an element where one is written.
#[cold]
fn form_of<'q>(
    p: &View<'q>,
    uses: [bool; ROLES],
    rounding: Rounding,
    read: impl Fn(Role) -> Result<View<'q>, Refusal>,
    read_scales: impl Fn(Role) -> Result<View<'q>, Refusal>,
) -> Result<Form, (Role, Refusal)> {
    let used = Role::ALL.into_iter().filter(|role| uses[*role as usize]);
    let views: Vec<(Role, View<'_>)> = used
        .filter_map(|role| Some((role, read(role).ok()?)))
        .collect();
    let mut scales = Vec::new();
    for (role, _) in views
        .iter()
        .filter(|(_, view)| view.element.dtype == DType::U8)
    {
        let found = read_scales(*role).map_err(|refusal| (*role, refusal))?;
        check_scales(&found, p.numel()).map_err(|refusal| (*role, refusal))?;
        scales.push((*role, found));
    }
    let all = || views.iter().chain(&scales);
    for (k, (role, view)) in all().enumerate().filter(|(_, (role, _))| role.is_written()) {
        let extent = view.extent();
        if extent.overlaps_itself() {
            return Err((*role, Refusal::OverlapsItself));
        }
        let mut others = all().enumerate().filter(|(other, _)| *other != k);
        if let Some((_, (other, _))) =
            others.find(|(_, (_, other))| extent.overlaps(&other.extent()))
        {
            return Err((*other, Refusal::Overlaps));
        }
    }
    let mut dims: Vec<Dim> = p
        .shape
        .iter()
        .map(|&len| Dim {
            len: len as usize,
            strides: [0; ROLES],
        })
        .collect();
    let compute = p.element.dtype.compute();
    let mut dtypes = [compute; ROLES];
    for (role, view) in &views {
        dtypes[*role as usize] = view.element.dtype;
        for (dim, stride) in dims.iter_mut().zip(view.strides()) {
            dim.strides[*role as usize] = stride;
        }
    }
    let is_wide = |(role, view): &(Role, View<'_>)| match role {
        Role::Parameter => rounding == Rounding::Nearest && !uses[Role::ErrorBits as usize],
        Role::Gradient => true,
        _ => view.element.dtype == compute,
    };
    // Random bits and blocks go in C order, so that the layout does not show.
    if uses[Role::Gradient as usize] && p.is_dense() && views.iter().all(is_wide) {
        // In the order of the parameter's memory, as on the dense path: the norm of the gradients
        // adds up in that order.
        dims.retain(|dim| dim.len != 1);
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.strides[0]));
    }
    if p.element.is_complex {
        dims.push(Dim {
            len: 2,
            strides: dtypes.map(|dtype| dtype.size() as isize),
        });
    }
    let is_gradient = |(role, _): &&(Role, View<'_>)| *role == Role::Gradient;
    let is_aligned = views
        .iter()
        .find(is_gradient)
        .is_none_or(|(_, g)| g.is_aligned);
    let layout = Layout {
        dtypes,
        is_gradient_aligned: is_aligned,
        has_error_bits: uses[Role::ErrorBits as usize],
    };
    let mut form = Form::new(&layout, dims);
    form.rounding = rounding;
    for (role, view) in &scales {
        form.scales[*role as usize] = Address(view.data as *mut u8);
    }
    Ok(form)
}

/// That an array holds the scales of codes.
fn check_scales(scales: &View<'_>, numel: usize) -> Result<(), Refusal> {
    if scales.element != Element::real(DType::F32) {
        return Err(Refusal::DType);
    }
    if scales.shape != [numel.div_ceil(BLOCK) as i64] || !scales.is_dense() {
        return Err(Refusal::Unlike);
    }
    scales.check_writable()
}

impl Row {
    /// Makes it work for the kernel, by the rule of that index, which is of its type. `noise` is what
    /// is rounded with at random; `rows` are those that have a gradient, if not all have one.
    ///
    /// # Safety
    /// What keeps the memory of the views that were checked outlives the work, and nobody else
    /// touches it meanwhile. No other row shares an element with one that is written, unless the
    /// work is done by the caller alone.
    #[inline]
    #[allow(unsafe_code)]
    pub unsafe fn push(
        self,
        work: &mut Work<'_, '_>,
        index: usize,
        rule: u32,
        noise: Noise,
        rows: Option<Rows>,
    ) {
        let arrays = self.addresses.map(|address| Address(address as *mut u8));
        // SAFETY: `check` found that the arrays are host memory of one shape, aligned, writable and of
        // the rule's type where that is asked for, in the form given, and that what is written
        // overlaps nothing else of this row and not itself. The rest is passed on to the caller.
        unsafe {
            match (self.form, rows) {
                (None, None) => {
                    let [swept @ .., _] = arrays;
                    work.push(index, swept, self.numel, rule);
                }
                (Some(mut form), None) => {
                    (form.arrays, form.noise) = (arrays, noise);
                    work.push_form(index, form, self.numel, rule);
                }
                (form, Some(rows)) => {
                    let dense = || Form::dense(self.dtype, self.numel);
                    let mut form = form.unwrap_or_else(dense);
                    (form.arrays, form.noise) = (arrays, noise);
                    let numel = rows.numel();
                    work.push_form(index, form.with_rows(rows), numel, rule);
                }
            }
        }
    }
}

/// The rows of a parameter of that shape that have a gradient: what is given for each of these indices, in
/// the parameter's compute type.
///
/// # Errors
/// Values of another shape or type; or the index that is none of a row.
#[cold]
#[allow(unsafe_code)]
pub(crate) fn rows_of(
    shape: &[i64],
    compute: DType,
    indices: &[i64],
    values: &View<'_>,
) -> Result<Rows, NoRows> {
    let Some((&rows, row)) = shape.split_first() else {
        return Err(NoRows::Scalar);
    };
    if !values.element.dtype.is_float() || values.element.is_complex {
        return Err(Refusal::DType.into());
    }
    let is_like = values.shape.split_first() == Some((&(indices.len() as i64), row));
    if !is_like {
        return Err(NoRows::Values);
    }
    let len: usize = row.iter().map(|&len| len as usize).product();
    let mut dtypes = [compute; ROLES];
    dtypes[Role::Gradient as usize] = values.element.dtype;
    let layout = Layout {
        dtypes,
        is_gradient_aligned: values.is_aligned,
        has_error_bits: false,
    };
    let dims = values.shape.iter().zip(values.strides());
    let mut form = Form::new(
        &layout,
        dims.map(|(&len, stride)| {
            let mut strides = [0; ROLES];
            strides[Role::Gradient as usize] = stride;
            let len = len as usize;
            Dim { len, strides }
        }),
    );
    form.arrays[Role::Gradient as usize] = Address(values.data as *mut u8);
    let wrong = |NoSuchRow(k): NoSuchRow| NoRows::Index(k, indices[k]);
    let rows = rows as usize;
    // SAFETY: the values were read while no Python code runs, and are of this form.
    unsafe {
        match compute {
            DType::F64 => {
                let read = |k: usize, row: &mut [f64]| form.read_gradient(k * len, row);
                let (indices, sums) = rows::sum(indices, rows, len, read).map_err(wrong)?;
                Ok(Rows::new(indices, len, Summed::F64(sums)))
            }
            _ => {
                let read = |k: usize, row: &mut [f32]| form.read_gradient(k * len, row);
                let (indices, sums) = rows::sum(indices, rows, len, read).map_err(wrong)?;
                Ok(Rows::new(indices, len, Summed::F32(sums)))
            }
        }
    }
}

/// Why indices and values are no rows of a parameter.
#[derive(Debug)]
pub(crate) enum NoRows {
    /// The parameter has no dimensions.
    Scalar,
    /// Its state is codes of blocks, which rows would share.
    Coarse,
    /// The values are of another shape than so many rows.
    Values,
    /// The place of an index, and what it is.
    Index(usize, i64),
    Refusal(Refusal),
}

impl From<Refusal> for NoRows {
    fn from(refusal: Refusal) -> Self {
        NoRows::Refusal(refusal)
    }
}

impl NoRows {
    /// What was wanted, and what was found instead; or a refusal of the values.
    pub fn describe(
        &self,
        shape: &[i64],
        indices: usize,
        found: &[i64],
    ) -> Result<(String, String), Refusal> {
        match self {
            NoRows::Scalar => {
                let wanted = "a gradient of a parameter with dimensions";
                Ok((wanted.to_owned(), "rows of one without".to_owned()))
            }
            NoRows::Coarse => {
                let wanted = "a dense gradient with state in uint8";
                Ok((
                    wanted.to_owned(),
                    "one of rows, which share blocks".to_owned(),
                ))
            }
            NoRows::Values => {
                let wanted = [&[indices as i64], shape.get(1..).unwrap_or_default()].concat();
                let (wanted, found) = (shape_name(&wanted), shape_name(found));
                Ok((
                    format!("values of shape {wanted} for so many indices"),
                    found,
                ))
            }
            NoRows::Index(place, index) => {
                let rows = shape.first().copied().unwrap_or_default();
                Ok((
                    format!("indices from 0 to {}", rows - 1),
                    format!("{index} at {place}"),
                ))
            }
            NoRows::Refusal(refusal) => Err(*refusal),
        }
    }
}
