//! Which layers are timed, and how their rows divide: the same in `peer/torch_low_rank.py`.

use crate::timing::Bench;
use hywu_kernels::{
    Device, Result,
    ops::low_rank_linear::{Segment, Segments},
};
use std::fmt;

/// How rows divide over instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// As many for each of so many instances.
    Even(usize),
    /// `RAGGED` instances whose lengths are 1 : 20 at the extremes.
    Ragged,
}

/// Instances of a ragged batch.
pub const RAGGED: usize = 16;

/// How `rows` divide over the instances of a ragged batch: the weights 15, 34, .., 300 in a fixed order, in parts of their sum.
pub fn ragged_lengths(rows: usize) -> Vec<usize> {
    let weights = (0..RAGGED).map(|i| 15 + 19 * ((7 * i + 3) % RAGGED));
    let all: usize = weights.clone().sum();
    let ends = weights.scan(0, |end, w| {
        *end += w;
        Some(*end)
    });
    let mut last = 0;
    let length = |end: usize| {
        let end = rows * end / all;
        let length = end - last;
        last = end;
        length
    };
    ends.map(length).collect()
}

impl Rows {
    /// Number of instances.
    pub fn instances(self) -> usize {
        match self {
            Self::Even(b) => b,
            Self::Ragged => RAGGED,
        }
    }
}

/// A linear layer: m rows in all, k inner, n outer, rank r an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Shape {
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
    pub rows: Rows,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { m, k, n, r, rows } = self;
        write!(f, "m{m} k{k} n{n} r{r} ")?;
        match rows {
            Rows::Even(b) => write!(f, "b{b}"),
            Rows::Ragged => f.write_str("ragged"),
        }
    }
}

impl Shape {
    pub(super) const fn new([m, k, n, r]: [usize; 4], rows: Rows) -> Self {
        Self { m, k, n, r, rows }
    }

    /// Does a bar of the comparison depend on it, or a merge of that layer? Those are timed longer, and in every round.
    pub fn of_a_bar(self) -> bool {
        let Self { m, k, n, r, rows } = self;
        m != 256
            && m <= 4096
            && [k, n] == [4096, 4096]
            && [0, 16].contains(&r)
            && [Rows::Even(1), Rows::Even(16)].contains(&rows)
    }

    /// Rows of the instances.
    pub fn lengths(self) -> Vec<usize> {
        match self.rows {
            Rows::Even(b) => vec![self.m / b; b],
            Rows::Ragged => ragged_lengths(self.m),
        }
    }

    /// The ragged ones; rows that divide evenly need none.
    pub fn segments(self) -> Result<Option<Segments>> {
        let Rows::Ragged = self.rows else { return Ok(None) };
        let segment = |(i, rows)| Segment { rows, weight: 0, adapter: Some(i) };
        Ok(Some(Segments::new(&self.lengths().into_iter().enumerate().map(segment).collect::<Vec<_>>())?))
    }
}

/// A layer of a mixture of experts.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// How many there are.
    pub experts: usize,
    /// How many of them each token has.
    pub top: usize,
    pub tokens: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
    /// Equal parts of the output with ranks of their own: 2 for [up | gate].
    pub parts: usize,
}

impl fmt::Display for Experts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, top, tokens, k, n, r, .. } = self;
        write!(f, "e{experts} top{top} m{tokens} k{k} n{n} r{r}")
    }
}

/// Random words of a fixed seed (splitmix64; Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn words() -> impl Iterator<Item = u64> {
    let mut state = 1u64;
    std::iter::from_fn(move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Some(z ^ (z >> 31))
    })
}

impl Experts {
    /// The layer of all rows.
    pub fn shape(self) -> Shape {
        let Self { top, tokens, k, n, r, .. } = self;
        Shape::new([tokens * top, k, n, r], Rows::Even(1))
    }

    /// Rows of every expert: each token draws `top` different ones.
    pub fn counts(self) -> Vec<usize> {
        let mut counts = vec![0; self.experts];
        let mut words = words().map(|word| (word % self.experts as u64) as usize);
        for _ in 0..self.tokens {
            let mut drawn = Vec::new();
            while drawn.len() < self.top {
                drawn.extend(words.next().filter(|expert| !drawn.contains(expert)));
            }
            drawn.into_iter().for_each(|expert| counts[expert] += 1);
        }
        counts
    }

    /// Rows sorted by expert.
    pub fn segments(self) -> Vec<Segment> {
        let segment = |(i, rows)| Segment { rows, weight: i, adapter: Some(i) };
        self.counts().into_iter().enumerate().map(segment).collect()
    }
}

const TOKENS: [usize; 5] = [256, 1024, 4096, 16384, 5516 * 32];
/// Inner and outer.
const SIDES: [[usize; 2]; 6] =
    [[192, 576], [1024, 4096], [4096, 4096], [4096, 6144], [3072, 4096], [4096, 16384]];
const RANKS: [usize; 3] = [4, 16, 64];
const ROWS: [Rows; 5] = [Rows::Even(1), Rows::Even(4), Rows::Even(16), Rows::Even(64), Rows::Ragged];
/// Where ranks and instances vary.
const VARIED: usize = 4096;
/// On the CPU: a large layer, those of the bundled backbone, ragged rows, and few.
const CPU: [Shape; 7] = [
    Shape::new([1024, 4096, 4096, 16], Rows::Even(1)),
    Shape::new([32 * 84, 192, 576, 8], Rows::Even(32)),
    Shape::new([32 * 84, 192, 1024, 8], Rows::Even(32)),
    Shape::new([32 * 84, 512, 192, 8], Rows::Even(32)),
    Shape::new([32 * 84, 192, 576, 8], Rows::Ragged),
    Shape::new([64, 768, 256, 8], Rows::Even(1)),
    Shape::new([64, 4096, 4096, 16], Rows::Even(1)),
];
/// Of every kind, small.
const QUICK: [Shape; 4] = [
    Shape::new([64, 24, 48, 4], Rows::Even(1)),
    Shape::new([64, 24, 48, 16], Rows::Even(1)),
    Shape::new([64, 24, 48, 4], Rows::Even(4)),
    Shape::new([64, 24, 48, 4], Rows::Ragged),
];

/// Layers with an update.
pub fn shapes(bench: &Bench, all: bool) -> Vec<Shape> {
    if bench.quick {
        return QUICK.to_vec();
    }
    if bench.device == Device::Cpu {
        return CPU.to_vec();
    }
    let mut shapes = Vec::new();
    for m in TOKENS {
        for [k, n] in SIDES {
            for rows in ROWS {
                for r in RANKS {
                    let varied = [r == 16, rows == Rows::Even(1)].into_iter().filter(|usual| !usual).count();
                    if all || varied == 0 || (m == VARIED && varied == 1) {
                        shapes.push(Shape::new([m, k, n, r], rows));
                    }
                }
            }
        }
    }
    shapes
}

/// Layers with gradients.
pub fn gradients(bench: &Bench) -> Vec<Shape> {
    match (bench.quick, bench.device) {
        (true, _) => vec![QUICK[0], QUICK[2]],
        (_, Device::Cpu) => vec![CPU[1]],
        _ => [1, 16].map(|b| Shape::new([4096, 4096, 4096, 16], Rows::Even(b))).to_vec(),
    }
}

/// Layers of experts: up and gate, and down.
pub fn experts(bench: &Bench) -> Vec<Experts> {
    let layer =
        |[experts, top, tokens, k, n, r]: [usize; 6], parts| Experts { experts, top, tokens, k, n, r, parts };
    match (bench.quick, bench.device) {
        (true, _) => vec![layer([4, 2, 24, 32, 48, 4], 2)],
        (_, Device::Cpu) => vec![layer([8, 2, 256, 512, 512, 8], 2)],
        _ => vec![layer([64, 8, 4096, 4096, 6144, 16], 2), layer([64, 8, 4096, 3072, 4096, 16], 1)],
    }
}

/// Weights and adapters to merge.
pub fn merges(bench: &Bench) -> Vec<Shape> {
    let shape = |k, n, r| Shape::new([1, k, n, r], Rows::Even(1));
    match (bench.quick, bench.device) {
        (true, _) => vec![shape(24, 48, 4)],
        (_, Device::Cpu) => vec![shape(4096, 4096, 16), shape(192, 576, 8), shape(768, 256, 8)],
        _ => {
            let mut shapes = RANKS.map(|r| shape(4096, 4096, r)).to_vec();
            shapes.extend([shape(192, 576, 16), shape(1024, 4096, 16)]);
            shapes
        }
    }
}

/// S alone.
pub fn shrink(bench: &Bench) -> Shape {
    let shape = |m, k, r| Shape::new([m, k, k, r], Rows::Even(1));
    match (bench.quick, bench.device) {
        (true, _) => shape(64, 24, 4),
        (_, Device::Cpu) => shape(1024, 4096, 16),
        _ => shape(4096, 4096, 16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_lengths_are_all_rows_and_as_uneven_as_said() {
        for m in TOKENS {
            let lengths = Shape::new([m, 1, 1, 1], Rows::Ragged).lengths();
            assert_eq!((lengths.len(), lengths.iter().sum::<usize>()), (RAGGED, m));
            let [least, most] = [lengths.iter().min(), lengths.iter().max()].map(|x| *x.expect("16") as f64);
            assert!((19.0..=21.5).contains(&((most + 0.5) / (least + 0.5))) || m < 4096, "{lengths:?}");
        }
        // peer/torch_low_rank.py has the same.
        let lengths = Shape::new([4096, 1, 1, 1], Rows::Ragged).lengths();
        assert_eq!(lengths[..4], [117, 333, 55, 271], "{lengths:?}");
    }

    #[test]
    fn routing_is_what_the_peer_has() {
        let [first, _] = experts(&Bench::new(Device::Cuda(0), false))[..] else { panic!("two layers") };
        let counts = first.counts();
        assert_eq!(counts.iter().sum::<usize>(), 32768);
        assert_eq!(counts[..4], [552, 518, 543, 535], "{counts:?}");
    }

    #[test]
    fn names_are_those_of_the_results() {
        let bench = Bench::new(Device::Cuda(0), false);
        let names: Vec<String> = shapes(&bench, false).iter().map(Shape::to_string).collect();
        for name in ["m4096 k4096 n4096 r16 b1", "m176512 k192 n576 r16 b1", "m4096 k4096 n16384 r16 ragged"]
        {
            assert!(names.iter().any(|n| n == name), "{name}");
        }
        assert_eq!((names.len(), shapes(&bench, true).len()), (66, 450));
        assert_eq!(experts(&bench)[0].to_string(), "e64 top8 m4096 k4096 n6144 r16");
    }
}
