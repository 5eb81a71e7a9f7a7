//! Which calls are timed: the same in `peer/torch_attention.py`.

use crate::{cases::low_rank, timing::Bench};
use hywu_kernels::Device;
use std::{fmt, ops::Range};

/// Where tokens are, and what a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Entries of one length; a query sees all keys of its own.
    Plain,
    /// The same as one fused projection, [tokens, q | k | v].
    Projection,
    /// Queries and keys are normalised and rotated first.
    Rotated,
    /// A query sees the keys up to its own.
    Causal,
    /// The same, and in eight spans all of the span.
    Spans,
    /// Entries whose lengths are 1 : 20 at the extremes, `s` tokens in all.
    Ragged,
    /// [s layers, b positions, channels]: an entry is a position in all layers.
    Layers,
}

/// A call of attention: b entries of s tokens, h heads of d channels, `kv` of them for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Shape {
    pub d: usize,
    pub s: usize,
    pub h: usize,
    pub kv: usize,
    pub b: usize,
    pub kind: Kind,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { d, s, h, kv, b, kind } = self;
        write!(f, "d{d} s{s} h{h} ")?;
        if kv != h {
            write!(f, "kv{kv} ")?;
        }
        write!(f, "b{b}")?;
        f.write_str(match kind {
            Kind::Plain => "",
            Kind::Projection => " qkv",
            Kind::Rotated => " norm rotary",
            Kind::Causal => " causal",
            Kind::Spans => " spans",
            Kind::Ragged => " ragged",
            Kind::Layers => " layers",
        })
    }
}

impl Shape {
    const fn new([d, s, h, kv, b]: [usize; 5], kind: Kind) -> Self {
        Self { d, s, h, kv, b, kind }
    }

    pub(super) const fn plain(d: usize, s: usize, h: usize, b: usize) -> Self {
        Self::new([d, s, h, h, b], Kind::Plain)
    }

    /// Tokens of each entry.
    pub fn lengths(self) -> Vec<usize> {
        match self.kind {
            Kind::Ragged => low_rank::ragged_lengths(self.s),
            _ => vec![self.s; self.b],
        }
    }

    /// Pictures in a text: a quarter of all tokens, and not at the edges of tiles.
    pub fn spans(self) -> Vec<Range<usize>> {
        let start = |i: usize| i * (self.s / 8) + self.s / 100;
        (0..8).map(|i| start(i)..start(i) + (self.s / 32).max(1)).collect()
    }

    /// Keys that a query of an entry of `tokens` sees.
    pub fn limit(self, query: usize, tokens: usize) -> usize {
        match self.kind {
            Kind::Causal => query + 1,
            Kind::Spans => self.spans().into_iter().find(|s| s.contains(&query)).map_or(query + 1, |s| s.end),
            _ => tokens,
        }
    }

    /// Pairs of a query and a key that it sees, in all entries.
    pub fn pairs(self) -> usize {
        match self.kind {
            Kind::Causal | Kind::Spans => self.b * (0..self.s).map(|q| self.limit(q, self.s)).sum::<usize>(),
            _ => self.lengths().into_iter().map(|n| n * n).sum(),
        }
    }

    /// All tokens.
    pub fn tokens(self) -> usize {
        self.lengths().iter().sum()
    }
}

/// Which passes are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradients of q, k and v from what the forward pass has saved.
    Backward,
    /// Both.
    Both,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "fwd",
            Self::Backward => "bwd",
            Self::Both => "fwd+bwd",
        })
    }
}

/// 16384 tokens in all.
const LONG: [(usize, usize); 3] = [(4096, 4), (8192, 2), (16384, 1)];
/// Layers of a published generator, each of 5516 positions.
const LAYERS: Shape = Shape::new([128, 32, 32, 32, 5516], Kind::Layers);
/// Those of the bundled backbone, and a longer one.
const SMALL: [Shape; 3] = [
    Shape::new([64, 84, 3, 3, 32], Kind::Projection),
    Shape::new([64, 276, 3, 3, 16], Kind::Projection),
    Shape::plain(64, 1024, 4, 1),
];
/// What a call may be beside plain, at 8192 tokens.
const KINDS: [Shape; 4] = [
    Shape::new([128, 8192, 16, 4, 2], Kind::Plain),
    Shape::new([128, 8192, 16, 16, 2], Kind::Causal),
    Shape::new([128, 8192, 16, 16, 2], Kind::Spans),
    Shape::new([128, 16384, 16, 16, low_rank::RAGGED], Kind::Ragged),
];
/// On the CPU.
const CPU: [Shape; 4] = [
    Shape::new([64, 1024, 4, 2, 1], Kind::Causal),
    Shape::new([64, 1024, 4, 4, 1], Kind::Spans),
    Shape::new([64, 1024, 4, 4, low_rank::RAGGED], Kind::Ragged),
    Shape::new([64, 32, 4, 4, 128], Kind::Layers),
];
/// Of every kind, small.
const QUICK: [Shape; 10] = [
    Shape::plain(128, 129, 2, 1),
    Shape::plain(64, 77, 3, 2),
    Shape::new([64, 17, 4, 2, 3], Kind::Plain),
    Shape::new([128, 130, 4, 2, 1], Kind::Causal),
    Shape::new([64, 140, 2, 2, 2], Kind::Spans),
    Shape::new([64, 320, 2, 1, low_rank::RAGGED], Kind::Ragged),
    Shape::new([64, 6, 2, 2, 9], Kind::Layers),
    Shape::new([128, 32, 2, 2, 3], Kind::Layers),
    Shape::new([64, 33, 3, 3, 2], Kind::Projection),
    Shape::new([128, 70, 2, 2, 1], Kind::Rotated),
];

/// A pass of a call, and whether a bar depends on it.
pub type Timed = (Pass, Shape, bool);

/// What is timed on a device; with `all`, what no bar depends on too.
pub fn timed(bench: &Bench, all: bool) -> Vec<Timed> {
    use Pass::{Backward, Both, Forward};
    let mut timed: Vec<Timed> = Vec::new();
    let mut add = |passes: &[Pass], shapes: &[Shape], bar: bool| {
        for &shape in shapes {
            timed.extend(passes.iter().map(|&pass| (pass, shape, bar)));
        }
    };
    if bench.quick {
        add(&[Forward], &QUICK, true);
        // The gradients of a norm are not among what is checked.
        add(&[Backward, Both], &QUICK[..9], true);
        return timed;
    }
    if bench.device == Device::Cpu {
        add(&[Forward, Both], &SMALL, true);
        add(&[Forward], &CPU, true);
        return timed;
    }
    let long = |d: usize| LONG.map(|(s, b)| Shape::plain(d, s, 16, b));
    let [.., spans, ragged] = KINDS;
    add(&[Forward], &long(128), true);
    add(&[Forward], &long(64), true);
    // Lengths that no tile divides, and the next that one of 128 does.
    let lengths = [(4096 + 257, 3), (4480, 3), (5516, 3), (5632, 3), (77, 212), (128, 212)];
    add(&[Forward], &lengths.map(|(s, b)| Shape::plain(128, s, 16, b)), true);
    add(&[Backward], &long(128), true);
    add(&[Forward], &[LAYERS, Shape { kind: Kind::Rotated, ..long(128)[1] }, spans], true);
    add(&[Forward], &[KINDS[0], KINDS[1], ragged, Shape::plain(64, 1024, 16, 4)], false);
    add(&[Backward], &[KINDS[1], ragged, long(64)[1]], false);
    add(&[Forward, Both], &SMALL, false);
    if all {
        let short = [(512, 32), (1024, 16), (2048, 8)];
        for d in [64, 128] {
            add(&[Forward, Backward], &short.map(|(s, b)| Shape::plain(d, s, 16, b)), false);
            let rest = [LONG[0], LONG[2]].map(|(s, b)| Shape::plain(d, s, 16, b));
            let causal = |shape| Shape { kind: Kind::Causal, ..shape };
            add(&[Forward, Backward], &rest.map(causal), false);
            add(&[Both], &[long(d)[0]], false);
        }
        let of_64 = |shape| Shape { d: 64, ..shape };
        add(&[Forward], &[of_64(KINDS[1]), of_64(spans), of_64(ragged), of_64(LAYERS)], false);
        add(&[Backward], &[KINDS[0], spans, LAYERS, of_64(long(64)[0]), of_64(long(64)[2])], false);
    }
    timed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_results() {
        let bench = Bench::new(Device::Cuda(0), false);
        let names = |all| -> Vec<String> {
            timed(&bench, all).iter().map(|(pass, shape, _)| format!("{pass} {shape}")).collect()
        };
        let (few, all) = (names(false), names(true));
        for name in [
            "fwd d128 s8192 h16 b2",
            "fwd d128 s32 h32 b5516 layers",
            "fwd d128 s8192 h16 kv4 b2",
            "bwd d128 s16384 h16 b1",
            "fwd d128 s16384 h16 b16 ragged",
            "fwd+bwd d64 s84 h3 b32 qkv",
        ] {
            assert!(few.iter().any(|n| n == name), "{name}");
        }
        let mut once = all.clone();
        once.sort();
        once.dedup();
        assert_eq!((once.len(), few.len()), (all.len(), 31));
    }

    /// peer/torch_attention.py has the same.
    #[test]
    fn spans_leave_half_of_the_tiles() {
        let [.., shape, _] = KINDS;
        assert_eq!(shape.spans()[..2], [81..337, 1105..1361]);
        let tiles = shape.s / 128;
        let seen: usize = (0..tiles)
            .map(|t| {
                (128 * t..128 * (t + 1)).map(|q| shape.limit(q, shape.s)).max().unwrap_or(0).div_ceil(128)
            })
            .sum();
        let part = seen as f64 / (tiles * tiles) as f64;
        assert!((0.5..0.52).contains(&part), "{part}");
    }

    #[test]
    fn pairs_are_counted() {
        let shape = |kind| Shape::new([64, 100, 1, 1, 2], kind);
        assert_eq!(shape(Kind::Plain).pairs(), 20_000);
        assert_eq!(shape(Kind::Causal).pairs(), 2 * 5050);
        // Eight spans of 3: their first queries see 2 and 1 more.
        assert_eq!(shape(Kind::Spans).pairs(), 2 * (5050 + 8 * 3));
        assert_eq!(QUICK[5].tokens(), 320);
    }
}
