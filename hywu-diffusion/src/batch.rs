use hywu_kernels::Tensor;

/// What one training step works on: `instances` edits of `crops` crops each. Every crop of an instance shares its instruction, its
/// views and so its adapter; crops of one instance are consecutive.
#[derive(Clone, Debug)]
pub struct EditBatch {
    /// Number of instances I.
    pub instances: usize,
    /// Crops per instance K.
    pub crops: usize,
    /// The whole source picture, [I, 64, 64, 3].
    pub thumbnail: Tensor,
    /// A crop of the source at native resolution, [I, 64, 64, 3].
    pub detail: Tensor,
    /// Token ids, I * TEXT_LEN.
    pub text: Vec<u32>,
    /// Source crops, [I * K, c, c, 3].
    pub source: Tensor,
    /// The same crops of the true edit, [I * K, c, c, 3].
    pub target: Tensor,
    /// (y, x) of every pixel in the whole picture, -1..1: [I * K, c, c, 2].
    pub position: Tensor,
    /// Index of each instance's skill.
    pub skills: Vec<usize>,
    /// Seed of the step's noise.
    pub seed: u64,
}

impl EditBatch {
    /// The first `count` views of [`crate::Backbone::condition`].
    pub fn views(&self, count: usize) -> Vec<&Tensor> {
        [&self.thumbnail, &self.detail].into_iter().take(count).collect()
    }
}
