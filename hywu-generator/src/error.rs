/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a generator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The condition does not fit the generator.
    #[error("condition: {0}")]
    Condition(String),
    /// A pass does not fit into the memory that it may take.
    #[error(
        "{budget} bytes of memory are too little: {} of {length} tokens needs at least {least}",
        if *batch == 1 { "a condition".to_owned() } else { format!("a batch of {batch} conditions") }
    )]
    Memory {
        /// Bytes that it may take.
        budget: u64,
        /// Bytes that are enough.
        least: u64,
        /// Conditions at a time.
        batch: usize,
        /// Tokens of a condition.
        length: usize,
    },
    /// The generator wrote something that is no number.
    #[error("output: {0}")]
    Output(String),
    /// Whoever watched the progress stopped it.
    #[error("interrupted")]
    Interrupted,
    /// An error of the kernels.
    #[error(transparent)]
    Kernel(#[from] hywu_kernels::Error),
    /// An error of files, configs or adapters.
    #[error(transparent)]
    Core(#[from] hywu_core::Error),
}
