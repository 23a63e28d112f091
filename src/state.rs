//! What an optimizer remembers of each parameter, by the names that torch gives it.

use std::ops::Range;

use crate::config::Config;
use crate::error::Error;
use crate::kernel::Real;

/// The averages an optimizer keeps for a parameter, each of the parameter's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKey {
    /// v, the running mean of the squared gradient. Starts at [`Config::initial_square_avg`].
    SquareAvg,
    /// m, the running mean of the gradient, when centered. Starts at 0.
    GradAvg,
    /// b, the momentum buffer, with momentum. Starts at 0.
    MomentumBuffer,
}

impl StateKey {
    /// In the order of their fields wherever arrays are kept by key.
    pub const ALL: [StateKey; 3] = [
        StateKey::SquareAvg,
        StateKey::GradAvg,
        StateKey::MomentumBuffer,
    ];

    /// "square_avg", "grad_avg" or "momentum_buffer".
    pub const fn name(self) -> &'static str {
        match self {
            StateKey::SquareAvg => "square_avg",
            StateKey::GradAvg => "grad_avg",
            StateKey::MomentumBuffer => "momentum_buffer",
        }
    }

    /// The key of that name.
    pub fn named(name: &str) -> Option<StateKey> {
        StateKey::ALL.into_iter().find(|key| key.name() == name)
    }

    /// Whether an optimizer with these options uses it.
    pub fn is_used(self, config: &Config) -> bool {
        match self {
            StateKey::SquareAvg => true,
            StateKey::GradAvg => config.centered,
            StateKey::MomentumBuffer => config.momentum > 0.0,
        }
    }

    /// The value that every element starts at.
    pub fn start(self, config: &Config) -> f64 {
        if self == StateKey::SquareAvg {
            config.initial_square_avg
        } else {
            0.0
        }
    }
}

/// The state of the parameters of one group, one flat buffer for each key.
#[derive(Clone, Debug)]
pub(crate) struct State<T> {
    /// By [`StateKey`]; none until the key is used.
    pub arrays: [Option<Vec<T>>; 3],
    /// Updates of each parameter.
    pub steps: Vec<u64>,
    /// Where each parameter lies.
    pub ranges: Vec<Range<usize>>,
}

impl<T: Real> State<T> {
    /// No state yet for parameters of these lengths; `None` if they add up to too many elements.
    pub fn new(lens: &[usize]) -> Option<Self> {
        let mut end = 0usize;
        let ranges = lens
            .iter()
            .map(|len| {
                let start = end;
                end = end.checked_add(*len)?;
                Some(start..end)
            })
            .collect::<Option<Vec<_>>>()?;
        Some(State {
            arrays: Default::default(),
            steps: vec![0; lens.len()],
            ranges,
        })
    }

    /// Elements of all parameters.
    pub fn numel(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// Creates the state that `config` uses and that is not there yet, all or none.
    pub fn create(&mut self, config: &Config) -> Result<(), Error> {
        let elements = self.numel();
        let create = |key: StateKey| {
            if self.arrays[key as usize].is_some() || !key.is_used(config) {
                return Ok(None);
            }
            let mut array = Vec::new();
            let reserved = array.try_reserve_exact(elements);
            reserved.map_err(|_| Error::OutOfMemory { elements })?;
            array.resize(elements, T::from_f64(key.start(config)));
            Ok(Some(array))
        };
        let [v, m, b] = StateKey::ALL.map(create);
        for (array, new) in self.arrays.iter_mut().zip([v?, m?, b?]) {
            *array = array.take().or(new);
        }
        Ok(())
    }
}
