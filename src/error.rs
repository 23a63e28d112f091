//! What can be wrong with an input; each variant carries what was found and what was wanted.

/// Why an optimizer refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A hyperparameter is out of range or not a number.
    #[error("{key}: expected {expected}, got {found:?}")]
    Hyperparameter {
        /// The option's name.
        key: &'static str,
        /// The range in words.
        expected: &'static str,
        /// The value.
        found: f64,
    },
    /// There is nothing to optimize.
    #[error("expected at least one parameter, got none")]
    NoParameters,
    /// The lengths of all parameters add up to more elements than memory can hold.
    #[error("expected parameters that fit in memory, got more elements than usize can count")]
    TooLarge,
    /// There is not enough memory for the state.
    #[error("expected memory for {elements} elements of state, got none")]
    OutOfMemory {
        /// Elements of one array of state.
        elements: usize,
    },
    /// Another number of parameters or gradients than the optimizer was made for.
    #[error("expected {expected} {what}s, got {found}")]
    Count {
        /// "parameter" or "gradient".
        what: &'static str,
        /// How many the optimizer was made for.
        expected: usize,
        /// How many there were.
        found: usize,
    },
    /// A slice of another length than the optimizer was made for.
    #[error("{what} {index}: expected {expected} elements, got {found}")]
    Length {
        /// "parameter" or "gradient".
        what: &'static str,
        /// The parameter's index over all groups.
        index: usize,
        /// Its number of elements.
        expected: usize,
        /// The number of elements found.
        found: usize,
    },
    /// There is no parameter group of that index.
    #[error("group {index}: expected an index below {count}")]
    Group {
        /// The index asked for.
        index: usize,
        /// The number of groups.
        count: usize,
    },
    /// A gradient holds an infinity or a NaN, and the optimizer was told to raise.
    #[error("gradient {index}: expected finite values, got {found} at element {element}")]
    Nonfinite {
        /// The gradient's index over all groups.
        index: usize,
        /// The element, counted in memory order.
        element: usize,
        /// The value.
        found: f64,
    },
    /// A number of threads that is none.
    #[error("{name}: expected a number >= 1, got '{found}'")]
    Threads {
        /// "threads", or "RMSPROP_NUM_THREADS".
        name: &'static str,
        /// What there was.
        found: String,
    },
    /// No framework of that name.
    #[error("dialect: expected one of {}, got '{found}'", crate::DIALECTS.join(", "))]
    Dialect {
        /// The name asked for.
        found: String,
    },
    /// The instruction set is unknown or this processor does not have it.
    #[error("{name}: expected one of {available}, got '{found}'")]
    Isa {
        /// "isa", or "RMSPROP_ISA".
        name: &'static str,
        /// The name asked for.
        found: String,
        /// The names that work here.
        available: String,
    },
}
