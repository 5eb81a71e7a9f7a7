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
        let mut c = [block as u32, (block >> 32) as u32, stream as u32, (stream >> 32) as u32];
        let [mut k0, mut k1] = self.key;
        for _ in 0..10 {
            let p0 = u64::from(c[0]) * 0xD251_1F53;
            let p1 = u64::from(c[2]) * 0xCD9E_8D57;
            c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        c
    }

    /// Uniform in the open interval (0, 1): word `index % 4` of block `index / 4`.
    pub fn uniform(&self, stream: u64, index: u64) -> f32 {
        to_unit(self.block(stream, index / 4)[(index % 4) as usize])
    }

    /// Standard normal number `index` of a stream (Box-Muller over the words of block `index / 4`), from exactly rounded
    /// f32 operations only, so that a GPU can draw the same bits.
    pub fn normal(&self, stream: u64, index: u64) -> f32 {
        normals(self.block(stream, index / 4))[(index % 4) as usize]
    }

    /// Normal numbers `start ..` of a stream.
    pub fn fill_normal(&self, stream: u64, start: u64, out: &mut [f32]) {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let n = (4 - skip).min(rest.len());
            let (head, tail) = rest.split_at_mut(n);
            head.copy_from_slice(&normals(self.block(stream, at / 4))[skip..skip + n]);
            at += n as u64;
            rest = tail;
        }
    }

    /// A sequential reader of one stream.
    pub fn stream(&self, stream: u64) -> RandomStream {
        RandomStream { philox: *self, stream, index: 0, words: [0; 4] }
    }
}

/// (0, 1) from the upper 23 bits; never 0 nor 1.
fn to_unit(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// Box-Muller on two pairs of words. Only +, -, *, /, sqrt and bit operations on f32: all exactly rounded.
fn normals(w: [u32; 4]) -> [f32; 4] {
    let (r0, r1) = (radius(w[0]), radius(w[2]));
    let ((c0, s0), (c1, s1)) = (cos_sin_turn(w[1]), cos_sin_turn(w[3]));
    [r0 * c0, r0 * s0, r1 * c1, r1 * s1]
}

/// sqrt(-2 ln u).
fn radius(word: u32) -> f32 {
    // u = m * 2^e with m in [sqrt(1/2), sqrt(2)); ln m by the series of atanh in z = (m - 1) / (m + 1).
    let bits = to_unit(word).to_bits();
    let mut e = (bits >> 23) as i32 - 127;
    let mut m = f32::from_bits((bits & 0x007f_ffff) | 0x3f80_0000);
    if m > std::f32::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let z = (m - 1.0) / (m + 1.0);
    let q = z * z;
    let series = 2.0 * z * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0)))));
    let ln = e as f32 * std::f32::consts::LN_2 + series;
    (-2.0 * ln).max(0.0).sqrt()
}

/// cos and sin of 2 pi * word / 2^32: the top three bits choose the octant, the rest is a polynomial on [0, pi / 4].
fn cos_sin_turn(word: u32) -> (f32, f32) {
    let octant = word >> 29;
    let mut part = (word << 3) >> 9;
    if octant & 1 == 1 {
        part = (1 << 23) - part;
    }
    let x = part as f32 * (std::f32::consts::FRAC_PI_4 / 8_388_608.0);
    let q = x * x;
    let s = x * (1.0 - q * (1.0 / 6.0 - q * (1.0 / 120.0 - q * (1.0 / 5040.0 - q * (1.0 / 362_880.0)))));
    let c = 1.0 - q * (0.5 - q * (1.0 / 24.0 - q * (1.0 / 720.0 - q * (1.0 / 40_320.0))));
    match octant {
        0 => (c, s),
        1 => (s, c),
        2 => (-s, c),
        3 => (-c, s),
        4 => (-c, -s),
        5 => (-s, -c),
        6 => (s, -c),
        _ => (c, -s),
    }
}

/// Draws one stream of a [`Philox`] in order.
#[derive(Clone, Debug)]
pub struct RandomStream {
    philox: Philox,
    stream: u64,
    index: u64,
    words: [u32; 4],
}

impl RandomStream {
    /// Next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.index.is_multiple_of(4) {
            self.words = self.philox.block(self.stream, self.index / 4);
        }
        let word = self.words[(self.index % 4) as usize];
        self.index += 1;
        word
    }
    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f32 {
        to_unit(self.next_u32())
    }
    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }
    /// Uniform integer in 0..n (n >= 1).
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next_u32()) * n as u64) >> 32) as usize
    }
    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        normals([self.next_u32(), self.next_u32(), 0, 0])[0]
    }
    /// True with probability p.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }
}
