//! The optimizer for Rust programs: slices in, in place.

use crate::config::{Config, Nonfinite, validate_max_grad_norm};
use crate::error::Error;
use crate::kernel::DType;
use crate::kernel::batch::{Batch, Work};
use crate::kernel::isa::{Code, Isa, isa};
use crate::kernel::rule::{AnyRule, Real, Slices};
use crate::state::{Flat, State, StateKey};
use crate::threads::{Threads, default_threads};

/// RMSprop over slices of `T`, `f32` or `f64`.
///
/// The rule is in the [crate docs](crate); its options are a [`Config`] for each parameter group.
/// The optimizer holds its state (4 bytes an element for plain `f32`) and nothing else that grows
/// with the elements. A step writes the parameters and the state; it allocates nothing, except for
/// a few hundred bytes when it runs on several threads.
///
/// ```
/// use rmsprop::{Config, RmsProp};
/// let (mut w, mut b) = (vec![1.0f32; 4], vec![0.0f32; 2]);
/// let mut opt = RmsProp::<f32>::new(Config { lr: 1e-2, ..Config::tf1() }, &[w.len(), b.len()])?;
/// let (gw, gb) = (vec![0.5f32; 4], vec![-1.0f32; 2]);
/// opt.step(&mut [&mut w, &mut b], &[&gw, &gb])?;
/// assert!(w[0] < 1.0 && b[0] > 0.0);
/// # Ok::<(), rmsprop::Error>(())
/// ```
#[derive(Debug)]
pub struct RmsProp<T> {
    groups: Vec<Group<T>>,
    threads: usize,
    clipping: Clipping,
    last_grad_norm: Option<f64>,
    skipped_steps: u64,
    batch: Batch,
}

#[derive(Debug)]
struct Group<T> {
    config: Config,
    state: State<T>,
}

impl<T: Real> RmsProp<T> {
    /// An optimizer for one group of parameters of these lengths.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] for an option out of range, [`Error::NoParameters`] for no
    /// lengths, [`Error::TooLarge`], [`Error::OutOfMemory`], [`Error::Threads`] if
    /// `RMSPROP_NUM_THREADS` is no number, [`Error::Isa`] if `RMSPROP_ISA` names an instruction set
    /// this processor does not have.
    pub fn new(config: Config, lens: &[usize]) -> Result<Self, Error> {
        let mut optimizer = RmsProp {
            groups: Vec::new(),
            threads: default_threads()?,
            clipping: Clipping::default(),
            last_grad_norm: None,
            skipped_steps: 0,
            batch: Batch::new(code_of(isa()?)?),
        };
        optimizer.add_group(config, lens)?;
        Ok(optimizer)
    }

    /// Adds a group of parameters with options of its own. Its parameters come after all others in
    /// [`RmsProp::step`].
    ///
    /// # Errors
    /// As [`RmsProp::new`]; the optimizer is unchanged.
    pub fn add_group(&mut self, config: Config, lens: &[usize]) -> Result<(), Error> {
        config.validate()?;
        if lens.is_empty() {
            return Err(Error::NoParameters);
        }
        let mut state = State::new(lens)?;
        state.create(&config)?;
        let parameters = self.parameters() + lens.len();
        let numel = self.numel().saturating_add(state.numel());
        let out_of_memory = |_| Error::OutOfMemory {
            elements: parameters,
        };
        self.batch
            .reserve(parameters, numel)
            .map_err(out_of_memory)?;
        self.groups.try_reserve(1).map_err(out_of_memory)?;
        self.groups.push(Group { config, state });
        Ok(())
    }

    /// Steps on at most this many threads. [`default_threads`] unless set; small steps stay on
    /// the caller anyway.
    ///
    /// # Errors
    /// [`Error::Threads`] for 0.
    pub fn with_threads(mut self, threads: usize) -> Result<Self, Error> {
        self.set_threads(threads)?;
        Ok(self)
    }

    /// [`RmsProp::with_threads`], from the next step on.
    ///
    /// # Errors
    /// [`Error::Threads`] for 0.
    pub fn set_threads(&mut self, threads: usize) -> Result<(), Error> {
        if threads == 0 {
            return Err(Error::Threads {
                name: "threads",
                found: "0".to_owned(),
            });
        }
        self.threads = threads;
        Ok(())
    }

    /// Steps on another instruction set than [`isa`]; the bits are the same.
    ///
    /// # Errors
    /// [`Error::Isa`] if this processor does not have it.
    pub fn with_isa(mut self, isa: Isa) -> Result<Self, Error> {
        self.batch.set_code(code_of(isa)?);
        Ok(self)
    }

    /// Scales all gradients by `min(1, max_grad_norm / (norm + 1e-6))`, where norm is the L2 norm
    /// over every gradient of every group. The gradients themselves are not written.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] unless it is > 0.
    pub fn with_max_grad_norm(mut self, max_grad_norm: f64) -> Result<Self, Error> {
        self.set_max_grad_norm(Some(max_grad_norm))?;
        Ok(self)
    }

    /// [`RmsProp::with_max_grad_norm`], from the next step on; `None` scales nothing.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] unless it is > 0.
    pub fn set_max_grad_norm(&mut self, max_grad_norm: Option<f64>) -> Result<(), Error> {
        max_grad_norm.map_or(Ok(()), validate_max_grad_norm)?;
        self.clipping.max_grad_norm = max_grad_norm;
        Ok(())
    }

    /// What a step does with an infinite or NaN gradient.
    pub fn with_nonfinite(mut self, nonfinite: Nonfinite) -> Self {
        self.set_nonfinite(nonfinite);
        self
    }

    /// [`RmsProp::with_nonfinite`], from the next step on.
    pub fn set_nonfinite(&mut self, nonfinite: Nonfinite) {
        self.clipping.nonfinite = nonfinite;
    }

    /// Updates the parameters in place. Parameters and gradients come in the order of the lengths,
    /// over all groups.
    ///
    /// # Errors
    /// [`Error::Count`] or [`Error::Length`] if they do not match, [`Error::Nonfinite`] if asked
    /// for. Nothing is changed then.
    pub fn step<P: AsMut<[T]>, G: AsRef<[T]>>(
        &mut self,
        params: &mut [P],
        grads: &[G],
    ) -> Result<(), Error> {
        self.update(params, grads.len(), |index| Some(grads[index].as_ref()))
    }

    /// As [`RmsProp::step`], but leaves the parameters whose gradient is `None` and their state
    /// alone.
    ///
    /// # Errors
    /// As [`RmsProp::step`].
    pub fn step_some<P: AsMut<[T]>, G: AsRef<[T]>>(
        &mut self,
        params: &mut [P],
        grads: &[Option<G>],
    ) -> Result<(), Error> {
        self.update(params, grads.len(), |index| {
            grads[index].as_ref().map(G::as_ref)
        })
    }

    fn update<'a, P: AsMut<[T]>>(
        &mut self,
        params: &'a mut [P],
        grads: usize,
        grad: impl Fn(usize) -> Option<&'a [T]>,
    ) -> Result<(), Error> {
        let expected = self.parameters();
        for (what, found) in [("parameter", params.len()), ("gradient", grads)] {
            if found != expected {
                return Err(Error::Count {
                    what,
                    expected,
                    found,
                });
            }
        }
        let mut work = self.batch.open();
        let mut params = params.iter_mut().enumerate();
        for group in &mut self.groups {
            group.push(&mut work, &mut params, &grad)?;
        }
        let threads = Threads::of_step(Some(self.threads), work.bytes(), None);
        let verdict = self.clipping.run(work, &threads, None);
        match verdict.outcome {
            Outcome::Update => {}
            Outcome::Skip => {
                self.last_grad_norm = verdict.norm;
                self.skipped_steps += 1;
                return Ok(());
            }
            Outcome::Raise {
                index,
                element,
                found,
            } => {
                return Err(Error::Nonfinite {
                    index,
                    element,
                    found,
                });
            }
        }
        self.last_grad_norm = verdict.norm;
        let mut index = 0;
        for group in &mut self.groups {
            if group.config.corrected_weight_decay {
                group.config.initial_lr.get_or_insert(group.config.lr);
            }
            let averages = group.config.ema_decay.is_some();
            let State { steps, has_ema, .. } = &mut group.state;
            for (step, has_ema) in steps.iter_mut().zip(has_ema) {
                let is_updated = grad(index).is_some();
                *step = step.saturating_add(u64::from(is_updated));
                *has_ema |= averages && is_updated;
                index += 1;
            }
        }
        Ok(())
    }

    /// Number of parameters over all groups.
    pub fn parameters(&self) -> usize {
        self.groups
            .iter()
            .map(|group| group.state.ranges.len())
            .sum()
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Elements of all parameters.
    fn numel(&self) -> usize {
        self.groups
            .iter()
            .map(|group| group.state.numel())
            .fold(0, usize::saturating_add)
    }

    /// The options of a group.
    ///
    /// # Errors
    /// [`Error::Group`].
    pub fn config(&self, group: usize) -> Result<&Config, Error> {
        let count = self.groups.len();
        self.groups
            .get(group)
            .map(|group| &group.config)
            .ok_or(Error::Group {
                index: group,
                count,
            })
    }

    /// Changes the options of a group from the next step on. State that they newly need is created
    /// at its start value; state that they no longer use is kept.
    ///
    /// # Errors
    /// [`Error::Group`], [`Error::Hyperparameter`], [`Error::OutOfMemory`]; nothing is changed.
    pub fn set_config(&mut self, group: usize, config: Config) -> Result<(), Error> {
        config.validate()?;
        let count = self.groups.len();
        let group = self.groups.get_mut(group).ok_or(Error::Group {
            index: group,
            count,
        })?;
        group.state.create(&config)?;
        group.config = config;
        Ok(())
    }

    /// Changes the learning rate of every group from the next step on.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`]; no group is changed.
    pub fn set_lr(&mut self, lr: f64) -> Result<(), Error> {
        Config {
            lr,
            ..Config::default()
        }
        .validate()?;
        self.groups
            .iter_mut()
            .for_each(|group| group.config.lr = lr);
        Ok(())
    }

    /// A parameter's state; `None` if there is no such parameter or its group has never used the
    /// key. [`StateKey::Ema`] is there from the first update with [`Config::ema_decay`] on.
    pub fn state(&self, parameter: usize, key: StateKey) -> Option<&[T]> {
        let (group, index) = self.locate(parameter)?;
        let state = &self.groups[group].state;
        let range = state.ranges[index].clone();
        if key == StateKey::Ema && !state.has_ema[index] {
            return None;
        }
        let flat = state.arrays[key as usize].as_ref()?;
        Some(&flat.slice()[range])
    }

    /// As [`RmsProp::state`], to restore it by writing: [`StateKey::Ema`] too is there then.
    pub fn state_mut(&mut self, parameter: usize, key: StateKey) -> Option<&mut [T]> {
        let (group, index) = self.locate(parameter)?;
        let state = &mut self.groups[group].state;
        let range = state.ranges[index].clone();
        let flat = state.arrays[key as usize].as_mut()?;
        state.has_ema[index] |= key == StateKey::Ema;
        Some(&mut flat.slice_mut()[range])
    }

    /// How often a parameter was updated.
    pub fn steps(&self, parameter: usize) -> Option<u64> {
        let (group, index) = self.locate(parameter)?;
        Some(self.groups[group].state.steps[index])
    }

    /// As [`RmsProp::steps`], to restore it by writing.
    pub fn steps_mut(&mut self, parameter: usize) -> Option<&mut u64> {
        let (group, index) = self.locate(parameter)?;
        Some(&mut self.groups[group].state.steps[index])
    }

    /// The L2 norm over all gradients at the last step, before clipping, also if it was skipped;
    /// `None` without [`RmsProp::with_max_grad_norm`].
    pub fn last_grad_norm(&self) -> Option<f64> {
        self.last_grad_norm
    }

    /// Steps left out because of [`Nonfinite::Skip`].
    pub fn skipped_steps(&self) -> u64 {
        self.skipped_steps
    }

    /// The group of a parameter and its place there.
    fn locate(&self, parameter: usize) -> Option<(usize, usize)> {
        let mut index = parameter;
        for (place, group) in self.groups.iter().enumerate() {
            let len = group.state.ranges.len();
            if index < len {
                return Some((place, index));
            }
            index -= len;
        }
        None
    }
}

impl<T: Real> Group<T> {
    /// Adds the parameters that have a gradient to the batch.
    fn push<'a, 'g: 'a, P: AsMut<[T]> + 'g>(
        &'a mut self,
        work: &mut Work<'_, 'a>,
        params: &mut impl Iterator<Item = (usize, &'g mut P)>,
        grad: &impl Fn(usize) -> Option<&'g [T]>,
    ) -> Result<(), Error> {
        let Group { config, state } = self;
        let used = |key: StateKey, array: Option<&'a mut [T]>| match key.is_used(config) {
            true => array.unwrap_or_default(),
            false => &mut [],
        };
        let (ranges, steps) = (&state.ranges, &state.steps);
        let [v, m, b, e, _] = state
            .arrays
            .each_mut()
            .map(|flat| flat.as_mut().map(Flat::slice_mut));
        let mut v = used(StateKey::SquareAvg, v);
        let mut m = used(StateKey::GradAvg, m);
        let mut b = used(StateKey::MomentumBuffer, b);
        let mut e = used(StateKey::Ema, e);
        let mut rules = RuleCache::default();
        for ((range, &step), &has_ema) in ranges.iter().zip(steps).zip(&state.has_ema) {
            let expected = range.len();
            let take = |rest: &mut &'a mut [T]| rest.split_off_mut(..expected).unwrap_or_default();
            let (v, m, b, e) = (take(&mut v), take(&mut m), take(&mut b), take(&mut e));
            let Some((index, param)) = params.next() else {
                break;
            };
            let p = param.as_mut();
            let g = grad(index);
            let lens = [
                ("parameter", p.len()),
                ("gradient", g.map_or(expected, <[T]>::len)),
            ];
            for (what, found) in lens {
                if found != expected {
                    return Err(Error::Length {
                        what,
                        index,
                        expected,
                        found,
                    });
                }
            }
            if let Some(g) = g {
                let rule = rules.get(work, T::DTYPE, config, step, has_ema);
                work.push_slices(index, Slices { p, g, v, m, b, e }, rule);
            }
        }
        Ok(())
    }
}

/// The code for an instruction set.
pub(crate) fn code_of(isa: Isa) -> Result<Code, Error> {
    // Its error lists what there is.
    isa.code()
        .map_or_else(|| Isa::named(isa.name()).map(|_| Code::Scalar), Ok)
}

/// The rule of a group in a step: the same for parameters that were updated equally often, and for
/// all without bias correction.
#[derive(Default)]
pub(crate) struct RuleCache {
    last: Option<(DType, u64, bool, u32)>,
}

impl RuleCache {
    /// The index of the rule for a parameter that was updated `steps` times.
    #[inline(always)]
    pub fn get(
        &mut self,
        work: &mut Work<'_, '_>,
        dtype: DType,
        config: &Config,
        steps: u64,
        has_ema: bool,
    ) -> u32 {
        let t = if config.bias_correction {
            steps.saturating_add(1)
        } else {
            1
        };
        match self.last {
            Some((last_dtype, last, had_ema, rule))
                if last == t && last_dtype == dtype && had_ema == has_ema =>
            {
                rule
            }
            _ => self.push(work, dtype, config, t, has_ema),
        }
    }

    #[cold]
    fn push(
        &mut self,
        work: &mut Work<'_, '_>,
        dtype: DType,
        config: &Config,
        t: u64,
        has_ema: bool,
    ) -> u32 {
        let rule = work.push_rule(AnyRule::new(dtype, config, t, has_ema));
        self.last = Some((dtype, t, has_ema, rule));
        rule
    }
}

/// The options that look at all gradients before a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clipping {
    pub max_grad_norm: Option<f64>,
    pub nonfinite: Nonfinite,
}

/// What has become of a step.
pub(crate) struct Verdict {
    /// The norm before clipping; only with `max_grad_norm`.
    pub norm: Option<f64>,
    pub outcome: Outcome,
}

pub(crate) enum Outcome {
    Update,
    Skip,
    Raise {
        index: usize,
        element: usize,
        found: f64,
    },
}

/// What all processes together found in the gradients that they share.
#[derive(Clone, Copy)]
pub(crate) struct Gathered {
    pub squares: f64,
    /// Some gradient is not finite.
    pub has_nonfinite: bool,
}

/// Stands for a parameter of another process.
pub(crate) const ELSEWHERE: usize = usize::MAX;

impl Clipping {
    /// Whether an option asks for a look.
    pub fn looks(&self) -> bool {
        self.max_grad_norm.is_some() || self.nonfinite != Nonfinite::Propagate
    }

    /// Reads the gradients once, if an option asks for it, and updates unless they forbid it. The
    /// sum over all processes is `gathered` already, if there are several.
    pub fn run(
        &self,
        mut work: Work<'_, '_>,
        threads: &Threads<'_>,
        gathered: Option<Gathered>,
    ) -> Verdict {
        if !self.looks() {
            work.update(threads);
            return Verdict {
                norm: None,
                outcome: Outcome::Update,
            };
        }
        let squares = match gathered {
            Some(gathered) => gathered.squares,
            None => work.sum_squares(threads),
        };
        let norm = squares.sqrt();
        // The sum of finite f64 squares can overflow: look again before a gradient is blamed.
        let found = match self.nonfinite {
            Nonfinite::Skip | Nonfinite::Raise if !squares.is_finite() => match gathered {
                Some(gathered) if !gathered.has_nonfinite => None,
                None => work.find_nonfinite(),
                Some(_) => work.find_nonfinite().or(Some((ELSEWHERE, 0, f64::NAN))),
            },
            _ => None,
        };
        let outcome = match (found, self.nonfinite) {
            (Some((index, element, found)), Nonfinite::Raise) => Outcome::Raise {
                index,
                element,
                found,
            },
            (Some(_), _) => Outcome::Skip,
            (None, _) => {
                work.clip(self.factor(norm));
                work.update(threads);
                Outcome::Update
            }
        };
        Verdict {
            norm: self.max_grad_norm.map(|_| norm),
            outcome,
        }
    }

    /// min(1, max_grad_norm / (norm + 1e-6)); NaN if the norm is NaN, as in torch's
    /// `clip_grad_norm_`.
    fn factor(&self, norm: f64) -> f64 {
        let factor = self.max_grad_norm.map_or(1.0, |max| max / (norm + 1e-6));
        if factor > 1.0 { 1.0 } else { factor }
    }
}
