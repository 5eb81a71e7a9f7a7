//! What the mini model learns: edits whose true result can be computed, each with many ways to ask for it.
//!
//! A skill is a pure function photo -> (source, target) with random parameters, plus its phrasings. To add one, add an entry
//! to `table.rs`.

pub mod filters;
mod table;

pub use table::SKILLS;

use crate::Picture;
use hywu_core::RandomStream;

/// A kind of edit.
pub struct Skill {
    /// Short name, as in tables.
    pub name: &'static str,
    /// How source and target come about.
    pub make: Make,
    /// Do "slightly" and "strongly" change it?
    pub graded: bool,
    /// Held back from training by default, to measure how a new skill is learnt later.
    pub arrival: bool,
    /// Ways to ask for it in training; `{from}` and `{to}` stand for colours.
    pub train: &'static [&'static str],
    /// Other ways, never trained on.
    pub held_out: &'static [&'static str],
}

/// How source and target of a skill come about.
pub enum Make {
    /// The source is the photo, the target a look of it; the number is the strength (1 without a strength word).
    Look(fn(&Picture, f32) -> Picture),
    /// As `Look`, with chance in it (grain).
    Chance(fn(&Picture, f32, &mut RandomStream) -> Picture),
    /// The source is the photo damaged at random, the target the photo.
    Repair(fn(&Picture, &mut RandomStream) -> Picture),
    /// The target has a colour that the instruction names.
    Tint,
    /// Things of one named colour take another.
    Recolour,
}

/// An edit to learn from or to measure with.
#[derive(Clone, Debug)]
pub struct Example {
    /// What is edited.
    pub source: Picture,
    /// The true edit.
    pub target: Picture,
    /// What the user says.
    pub instruction: String,
    /// What the words mean.
    pub meaning: Meaning,
}

/// What an instruction says, in numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meaning {
    /// 1 without a strength word.
    pub strength: f32,
    /// Index into [`HUES`] of the colour that is replaced.
    pub from: Option<usize>,
    /// Index into [`HUES`] of the new colour.
    pub to: Option<usize>,
}

/// Which phrasings are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phrasing {
    /// Those of training, with strength words and varied wording.
    Train,
    /// The held-out phrasing of this number, as it stands.
    HeldOut(usize),
    /// The first training phrasing, as it stands.
    Canonical,
}

/// Names and hues (in turns) of the colours that instructions name.
pub const HUES: [(&str, f32); 6] =
    [("red", 0.0), ("yellow", 0.14), ("green", 0.31), ("cyan", 0.5), ("blue", 0.62), ("purple", 0.8)];

/// Strengths and the words for them.
const GRADES: [(f32, &[&str]); 2] = [
    (0.5, &["slightly", "a little", "a bit", "subtly"]),
    (1.6, &["strongly", "a lot", "heavily", "much more"]),
];

impl Skill {
    /// The skill of this name.
    pub fn find(name: &str) -> Option<usize> {
        SKILLS.iter().position(|s| s.name == name)
    }

    /// One example made from `photo`; all chance comes from `random`.
    pub fn example(&self, photo: &Picture, phrasing: Phrasing, random: &mut RandomStream) -> Example {
        let phrase = match phrasing {
            Phrasing::Train => self.train[random.below(self.train.len())],
            Phrasing::HeldOut(i) => self.held_out[i % self.held_out.len()],
            Phrasing::Canonical => self.train[0],
        };
        let varied = phrasing == Phrasing::Train;
        let mut instruction = phrase.to_owned();
        let mut meaning = Meaning { strength: 1.0, from: None, to: None };
        if varied {
            (instruction, meaning.strength) = self.grade(instruction, random);
        }
        let strength = meaning.strength;
        let (source, target) = match &self.make {
            Make::Look(f) => (photo.clone(), f(photo, strength)),
            Make::Chance(f) => (photo.clone(), f(photo, strength, random)),
            Make::Repair(f) => (f(photo, random), photo.clone()),
            Make::Tint => {
                let to = random.below(HUES.len());
                meaning.to = Some(to);
                let (name, hue) = HUES[to];
                instruction = instruction.replace("{to}", name);
                let cast = filters::from_hsv([hue, 0.75, 1.0]);
                let tint = |c: [f32; 3]| [0, 1, 2].map(|i| c[i] * (0.45 + 0.6 * cast[i]));
                (photo.clone(), filters::colours(photo, |c| filters::mix(c, tint(c), strength * 0.6)))
            }
            Make::Recolour => {
                let (from, to) = recolouring(photo, random);
                (meaning.from, meaning.to) = (Some(from), Some(to));
                instruction = instruction.replace("{from}", HUES[from].0).replace("{to}", HUES[to].0);
                (photo.clone(), filters::recolour(photo, HUES[from].1, HUES[to].1))
            }
        };
        if varied {
            instruction = polite(instruction, random);
        }
        Example { source, target, instruction, meaning }
    }

    /// An instruction as training has them, without a picture: colours are drawn at random.
    pub fn ask(&self, random: &mut RandomStream) -> String {
        let phrase = self.train[random.below(self.train.len())].to_owned();
        let (instruction, _) = self.grade(phrase, random);
        let from = random.below(HUES.len());
        let to = (from + 1 + random.below(HUES.len() - 1)) % HUES.len();
        polite(instruction.replace("{from}", HUES[from].0).replace("{to}", HUES[to].0), random)
    }

    /// Now and then with a strength word, where the skill has grades; and the strength, 1 without one.
    fn grade(&self, phrase: String, random: &mut RandomStream) -> (String, f32) {
        if !self.graded || !random.chance(0.4) {
            return (phrase, 1.0);
        }
        let (strength, words) = GRADES[random.below(GRADES.len())];
        let word = words[random.below(words.len())];
        let graded = match random.below(3) {
            0 => format!("{word} {phrase}"),
            1 => format!("{phrase}, {word}"),
            _ => format!("{phrase} {word}"),
        };
        (graded, strength)
    }

    /// Can it be one half of a combination? Only looks can: they are functions of the picture that they get.
    fn combines(&self) -> bool {
        matches!(self.make, Make::Look(_)) && self.name != "keep" && !self.arrival
    }
}

/// Now and then with a "please" or a full stop.
pub(crate) fn polite(instruction: String, random: &mut RandomStream) -> String {
    match random.below(6) {
        0 => format!("please {instruction}"),
        1 => instruction + ".",
        2 => instruction + " please",
        _ => instruction,
    }
}

/// The photo with a random one of the damages that the table's repairs mend.
pub fn damaged(photo: &Picture, random: &mut RandomStream) -> Picture {
    let damages: Vec<_> = SKILLS
        .iter()
        .filter_map(|s| match s.make {
            Make::Repair(damage) => Some(damage),
            _ => None,
        })
        .collect();
    damages[random.below(damages.len())](photo, random)
}

/// A colour of the photo, chosen by how much of it there is, and another one.
fn recolouring(photo: &Picture, random: &mut RandomStream) -> (usize, usize) {
    let step = (photo.rgb.len() / 3 / 4096).max(1);
    let mut share = [0.01; HUES.len()];
    for c in photo.rgb.chunks_exact(3).step_by(step) {
        let c = [0, 1, 2].map(|i| (c[i] + 1.0) * 0.5);
        for (share, (_, hue)) in share.iter_mut().zip(HUES) {
            *share += filters::belongs(c, hue);
        }
    }
    let mut left = random.uniform() * share.iter().sum::<f32>();
    let from = share.iter().position(|s| {
        left -= s;
        left <= 0.0
    });
    let from = from.unwrap_or(0);
    (from, (from + 1 + random.below(HUES.len() - 1)) % HUES.len())
}

/// Two different looks asked for in one sentence, made one after the other.
pub fn combination(photo: &Picture, random: &mut RandomStream) -> Example {
    let looks: Vec<&Skill> = SKILLS.iter().filter(|s| s.combines()).collect();
    let first = random.below(looks.len());
    let second = (first + 1 + random.below(looks.len() - 1)) % looks.len();
    let a = looks[first].example(photo, Phrasing::Train, random);
    let b = looks[second].example(&a.target, Phrasing::Train, random);
    let link = [" and ", ", then ", " and then ", ", "][random.below(4)];
    let plain = |s: &str| {
        s.trim_start_matches("please ").trim_end_matches(" please").trim_end_matches('.').to_owned()
    };
    let instruction = format!("{}{link}{}", plain(&a.instruction), plain(&b.instruction));
    Example { source: a.source, target: b.target, instruction, meaning: Meaning::default() }
}
