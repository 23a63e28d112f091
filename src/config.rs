//! The options of an optimizer.

use crate::error::Error;

/// What a step does when a gradient holds an infinity or a NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nonfinite {
    /// Computes with it, like every other optimizer.
    #[default]
    Propagate,
    /// Changes nothing at all and counts the step as skipped.
    Skip,
    /// Changes nothing at all and returns [`Error::Nonfinite`].
    Raise,
}

/// The options of a parameter group: data for the one update rule ([crate docs](crate)).
///
/// [`Config::default`] is OneFlow's RMSprop; the other constructors are the variants of other
/// frameworks ([`Config::dialect`]). All hyperparameters are `f64`; they are combined in `f64` and
/// rounded once to the type of the parameters.
///
/// ```
/// use rmsprop::Config;
/// let config = Config { lr: 7e-4, momentum: 0.9, ..Config::tf1() };
/// assert!(config.eps_in_sqrt && config.initial_square_avg == 1.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Learning rate, per step. Finite and >= 0.
    pub lr: f64,
    /// Decay of the averages. 0 <= alpha <= 1, and < 1 with `bias_correction`.
    pub alpha: f64,
    /// Keeps the divisor away from zero: in units of the gradient, or of its square with
    /// `eps_in_sqrt`. Finite and >= 0.
    pub eps: f64,
    /// Pull towards zero; off at 0. Finite and >= 0.
    pub weight_decay: f64,
    /// Decay of the momentum buffer; off at 0. Finite and >= 0.
    pub momentum: f64,
    /// Divides by the square root of the variance of the gradient instead of its second moment.
    pub centered: bool,
    /// `sqrt(v + eps)` instead of `sqrt(v) + eps`.
    pub eps_in_sqrt: bool,
    /// The value every element of `square_avg` starts at. Finite and >= 0.
    pub initial_square_avg: f64,
    /// The momentum buffer holds steps (already times lr) instead of scaled gradients: they differ
    /// once lr changes.
    pub lr_in_momentum: bool,
    /// Nesterov's momentum. No effect without momentum.
    pub nesterov: bool,
    /// Divides both averages by `1 - alpha^t`.
    pub bias_correction: bool,
    /// `weight_decay` shrinks the parameter by `lr * weight_decay` instead of adding to the
    /// gradient.
    pub decoupled_weight_decay: bool,
    /// Decays only where the update moves the parameter towards zero as well (arXiv:2510.12402).
    /// Needs `decoupled_weight_decay`.
    pub cautious_weight_decay: bool,
    /// Decays by `lr * lr / initial_lr * weight_decay`, so that decay follows a schedule as steps do
    /// (timm). Needs `decoupled_weight_decay`.
    pub corrected_weight_decay: bool,
    /// What `lr` was at first, for `corrected_weight_decay`: `None` for the `lr` of now, which 0 counts
    /// as too. Finite and >= 0.
    pub initial_lr: Option<f64>,
    /// Keeps parameters from `-clip_weights` to `clip_weights` after the update. > 0.
    pub clip_weights: Option<f64>,
    /// Decay of an average of the parameter itself ([`StateKey::Ema`](crate::StateKey::Ema)); off at
    /// `None`. 0 <= ema_decay <= 1.
    pub ema_decay: Option<f64>,
    /// Climbs instead of descending.
    pub maximize: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config::oneflow()
    }
}

impl Config {
    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] names the first key that is out of range, the value and what was
    /// wanted.
    pub fn validate(&self) -> Result<(), Error> {
        let mut config = self.clone();
        let mut options = OPTIONS.iter().chain([&INITIAL_LR]);
        options.try_for_each(|option| option.check(&mut config))
    }
}

/// An option of a parameter group: the one row that both fronts read, check and list it by.
#[cfg_attr(not(feature = "python"), allow(dead_code))] // Rust needs the ranges alone.
pub(crate) struct GroupOption {
    pub name: &'static str,
    pub field: Field,
    /// `torch.optim.RMSprop` has it too.
    pub is_torchs: bool,
    /// A dialect fixes it.
    pub is_of_dialect: bool,
}

/// Where an option is in a [`Config`].
#[cfg_attr(not(feature = "python"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) enum Field {
    Number(fn(&mut Config) -> &mut f64, Range),
    /// A number, or none.
    Optional(fn(&mut Config) -> &mut Option<f64>, Range),
    Flag(fn(&mut Config) -> &mut bool, Flag),
}

/// What a number may be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Range {
    NotNegative,
    Positive,
    Fraction,
}

/// When a flag may be on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flag {
    Always,
    Decoupled,
}

impl GroupOption {
    /// Checks the range.
    pub fn check(&self, config: &mut Config) -> Result<(), Error> {
        let (found, range) = match self.field {
            Field::Number(field, range) => (*field(config), range),
            Field::Optional(field, range) => match *field(config) {
                Some(found) => (found, range),
                None => return Ok(()),
            },
            Field::Flag(field, flag) => {
                let is_on = *field(config);
                let is_right = !is_on || flag == Flag::Always || config.decoupled_weight_decay;
                return is_right.then_some(()).ok_or(Error::Hyperparameter {
                    key: self.name,
                    expected: "False without decoupled_weight_decay",
                    found: 1.0,
                });
            }
        };
        let is_certain = self.name == "alpha" && config.bias_correction && found == 1.0;
        let expected = match range {
            Range::NotNegative if !(found >= 0.0 && found.is_finite()) => "a finite number >= 0",
            Range::Positive if found.is_nan() || found <= 0.0 => "a number > 0",
            Range::Fraction if !(0.0..=1.0).contains(&found) => "a number from 0 to 1",
            Range::Fraction if is_certain => "a number < 1 with bias_correction",
            _ => return Ok(()),
        };
        let key = self.name;
        Err(Error::Hyperparameter {
            key,
            expected,
            found,
        })
    }
}

macro_rules! options {
    ($($name:ident: $field:ident($of:ident::$range:ident), torch $is_torchs:literal, dialect $is_of_dialect:literal;)*) => {
        /// The options of a parameter group, in the order in which they are checked.
        pub(crate) const OPTIONS: &[GroupOption] = &[$(GroupOption {
            name: stringify!($name),
            field: Field::$field(|config| &mut config.$name, $of::$range),
            is_torchs: $is_torchs,
            is_of_dialect: $is_of_dialect,
        }),*];
    };
}

options! {
    lr: Number(Range::NotNegative), torch true, dialect false;
    eps: Number(Range::NotNegative), torch true, dialect true;
    weight_decay: Number(Range::NotNegative), torch true, dialect true;
    momentum: Number(Range::NotNegative), torch true, dialect true;
    initial_square_avg: Number(Range::NotNegative), torch false, dialect true;
    alpha: Number(Range::Fraction), torch true, dialect true;
    centered: Flag(Flag::Always), torch true, dialect true;
    eps_in_sqrt: Flag(Flag::Always), torch false, dialect true;
    lr_in_momentum: Flag(Flag::Always), torch false, dialect true;
    nesterov: Flag(Flag::Always), torch false, dialect true;
    bias_correction: Flag(Flag::Always), torch false, dialect true;
    decoupled_weight_decay: Flag(Flag::Always), torch false, dialect true;
    cautious_weight_decay: Flag(Flag::Decoupled), torch false, dialect false;
    corrected_weight_decay: Flag(Flag::Decoupled), torch false, dialect false;
    clip_weights: Optional(Range::Positive), torch false, dialect false;
    ema_decay: Optional(Range::Fraction), torch false, dialect false;
    maximize: Flag(Flag::Always), torch true, dialect false;
}

/// What schedulers note in a group, and no constructor takes.
pub(crate) const INITIAL_LR: GroupOption = GroupOption {
    name: "initial_lr",
    field: Field::Optional(|config| &mut config.initial_lr, Range::NotNegative),
    is_torchs: false,
    is_of_dialect: false,
};

/// Checks `max_grad_norm`: > 0.
pub(crate) fn validate_max_grad_norm(found: f64) -> Result<(), Error> {
    if found > 0.0 {
        return Ok(());
    }
    Err(Error::Hyperparameter {
        key: "max_grad_norm",
        expected: "a number > 0",
        found,
    })
}
