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
        let finite = [
            ("lr", self.lr),
            ("eps", self.eps),
            ("weight_decay", self.weight_decay),
            ("momentum", self.momentum),
            ("initial_square_avg", self.initial_square_avg),
        ];
        for (key, found) in finite {
            if !(found >= 0.0 && found.is_finite()) {
                return Err(Error::Hyperparameter {
                    key,
                    expected: "a finite number >= 0",
                    found,
                });
            }
        }
        let (key, found) = ("alpha", self.alpha);
        if !(0.0..=1.0).contains(&found) {
            return Err(Error::Hyperparameter {
                key,
                expected: "a number from 0 to 1",
                found,
            });
        }
        if self.bias_correction && found == 1.0 {
            let expected = "a number < 1 with bias_correction";
            return Err(Error::Hyperparameter {
                key,
                expected,
                found,
            });
        }
        Ok(())
    }
}

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
