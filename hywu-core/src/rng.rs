/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a pure function from
/// (seed, stream, index) to random words, so noise depends on its position alone.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32] }
    }
    /// The four words at counter (block, stream).
    pub fn block(&self, stream: u64, block: u64) -> [u32; 4] {
        let _ = (stream, block, self.key);
        todo!()
    }
    /// Uniform in the open interval (0, 1): word `index % 4` of block `index / 4`.
    pub fn uniform(&self, stream: u64, index: u64) -> f32 {
        let _ = (stream, index);
        todo!()
    }
    /// Standard normal number `index` of a stream (Box-Muller over the words of block `index / 4`), from exactly rounded
    /// f32 operations only, so that a GPU can draw the same bits.
    pub fn normal(&self, stream: u64, index: u64) -> f32 {
        let _ = (stream, index);
        todo!()
    }
    /// Normal numbers `start ..` of a stream.
    pub fn fill_normal(&self, stream: u64, start: u64, out: &mut [f32]) {
        let _ = (stream, start, out);
        todo!()
    }
    /// A sequential reader of one stream.
    pub fn stream(&self, stream: u64) -> RandomStream {
        RandomStream { philox: *self, stream, index: 0 }
    }
}

/// Draws one stream of a [`Philox`] in order.
#[derive(Clone, Debug)]
pub struct RandomStream {
    philox: Philox,
    stream: u64,
    index: u64,
}

impl RandomStream {
    /// Next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let _ = (&self.philox, self.stream, self.index);
        todo!()
    }
    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f32 {
        todo!()
    }
    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        let _ = (low, high);
        todo!()
    }
    /// Uniform integer in 0..n (n >= 1).
    pub fn below(&mut self, n: usize) -> usize {
        let _ = n;
        todo!()
    }
    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        todo!()
    }
    /// True with probability p.
    pub fn chance(&mut self, p: f32) -> bool {
        let _ = p;
        todo!()
    }
}
