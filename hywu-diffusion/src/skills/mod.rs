//! What the mini model learns: edits whose true result can be computed, each with many ways to ask for it.
//!
//! A skill is a pure function photo -> (source, target) with random parameters, plus its phrasings. To add one, add an entry
//! to `table.rs`.

mod change;
pub mod filters;
mod table;

pub use change::{Edit, Example, Place};
pub use table::SKILLS;

use crate::Picture;
use change::Change;
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
    /// The source is the photo, the target a look of it, by pixels or by 8 x 8 blocks; the number is the strength (1 without a
    /// strength word).
    Look(fn(&Picture, f32) -> Picture),
    /// As `Look`, from pixels at most so far away, down and across.
    Local(usize, fn(&Picture, f32) -> Picture),
    /// As `Look`, by the pixels' places, too.
    Placed(fn(&Picture, Place, f32) -> Picture),
    /// As `Placed`, with chance in it (grain), which comes from the seed.
    Chance(fn(&Picture, Place, f32, u64) -> Picture),
    /// The source is the photo damaged at random, the target the photo.
    Repair(fn(&Picture, &mut RandomStream) -> Damaged),
    /// The target has a colour that the instruction names.
    Tint,
    /// Things of one named colour take another.
    Recolour,
}

/// A photo damaged by amounts that chance drew.
pub struct Damaged {
    /// What is left of the photo.
    pub picture: Picture,
    /// Name and value of each amount.
    pub hidden: Vec<(&'static str, f32)>,
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

    /// One example made from the whole of `photo`; all chance comes from `random`.
    pub fn example(&self, photo: &Picture, phrasing: Phrasing, random: &mut RandomStream) -> Example {
        self.edit(photo, phrasing, random).example(photo)
    }

    /// One edit of `photo`, its true result yet to be computed; all chance comes from `random`.
    pub fn edit(&self, photo: &Picture, phrasing: Phrasing, random: &mut RandomStream) -> Edit {
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
        let mut damaged = None;
        let change = match self.make {
            Make::Look(f) => Some(Change::new(0, move |p, _| f(p, strength))),
            Make::Local(reach, f) => Some(Change::new(reach, move |p, _| f(p, strength))),
            Make::Placed(f) => Some(Change::new(0, move |p, at| f(p, at, strength))),
            Make::Chance(f) => {
                let seed = seed(random);
                Some(Change::new(0, move |p, at| f(p, at, strength, seed)))
            }
            Make::Repair(f) => {
                damaged = Some(f(photo, random));
                None
            }
            Make::Tint => {
                let to = random.below(HUES.len());
                meaning.to = Some(to);
                let (name, hue) = HUES[to];
                instruction = instruction.replace("{to}", name);
                let cast = filters::from_hsv([hue, 0.75, 1.0]);
                let tint = move |c: [f32; 3]| [0, 1, 2].map(|i| c[i] * (0.45 + 0.6 * cast[i]));
                let tinted = move |c| filters::mix(c, tint(c), strength * 0.6);
                Some(Change::new(0, move |p, _| filters::colours(p, tinted)))
            }
            Make::Recolour => {
                let (from, to) = recolouring(photo, random);
                (meaning.from, meaning.to) = (Some(from), Some(to));
                instruction = instruction.replace("{from}", HUES[from].0).replace("{to}", HUES[to].0);
                Some(Change::new(0, move |p, _| filters::recolour(p, HUES[from].1, HUES[to].1)))
            }
        };
        if varied {
            instruction = reworded(&instruction, self.held_out, random);
        }
        Edit { damaged, changes: change.into_iter().collect(), instruction, meaning }
    }

    /// An instruction as training has them, without a picture: colours are drawn at random.
    pub fn ask(&self, random: &mut RandomStream) -> String {
        let phrase = self.train[random.below(self.train.len())].to_owned();
        let (instruction, _) = self.grade(phrase, random);
        let from = random.below(HUES.len());
        let to = (from + 1 + random.below(HUES.len() - 1)) % HUES.len();
        let instruction = instruction.replace("{from}", HUES[from].0).replace("{to}", HUES[to].0);
        reworded(&instruction, self.held_out, random)
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
        matches!(self.make, Make::Look(_) | Make::Local(..) | Make::Placed(_))
            && self.name != "keep"
            && !self.arrival
    }
}

/// The same instruction in slightly other words (another noun or article, politeness, a full stop), but in none that are held out.
pub(crate) fn reworded(instruction: &str, held_out: &[&str], random: &mut RandomStream) -> String {
    let noun = NOUNS[random.below(NOUNS.len())];
    let this = ["it", "this", "it"][random.below(3)];
    let the = ["the", "the", "this", "my"][random.below(4)];
    let named = instruction.split(' ').any(|word| NOUNS.contains(&word));
    let words = instruction.split(' ').map(|word| match word {
        word if NOUNS.contains(&word) => noun,
        "it" => this,
        "the" if named => the,
        word => word,
    });
    let mut said = words.collect::<Vec<_>>().join(" ");
    if held_out.iter().any(|other| other.trim_end_matches(" please") == said) {
        said = instruction.to_owned();
    }
    match random.below(8) {
        0 => said = format!("please {said}"),
        1 => said.push('.'),
        2 => said.push_str(" please"),
        3 if said.starts_with("make ") => said = format!("can you {said}"),
        _ => {}
    }
    said
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
    damages[random.below(damages.len())](photo, random).picture
}

/// Words for what is edited; any of them may stand for another.
const NOUNS: [&str; 3] = ["photo", "picture", "image"];

/// A seed of noise.
fn seed(random: &mut RandomStream) -> u64 {
    u64::from(random.next_u32()) << 32 | u64::from(random.next_u32())
}

/// A colour of the photo, chosen by how much of it there is, and another one.
fn recolouring(photo: &Picture, random: &mut RandomStream) -> (usize, usize) {
    let step = (photo.rgb.len() / 3 / 4096).max(1);
    let mut share = [0.01; HUES.len()];
    for c in photo.rgb.chunks_exact(3).step_by(step) {
        let c = filters::hsv([0, 1, 2].map(|i| (c[i] + 1.0) * 0.5));
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
pub fn combination(photo: &Picture, phrasing: Phrasing, random: &mut RandomStream) -> Edit {
    let looks: Vec<&Skill> = SKILLS.iter().filter(|s| s.combines()).collect();
    let first = random.below(looks.len());
    let second = (first + 1 + random.below(looks.len() - 1)) % looks.len();
    let mut a = looks[first].edit(photo, phrasing, random);
    let b = looks[second].edit(photo, phrasing, random);
    let link = [" and ", ", then ", " and then ", ", "][random.below(4)];
    let plain = |s: &str| {
        let s = s.trim_start_matches("please ").trim_start_matches("can you ");
        s.trim_end_matches(" please").trim_end_matches('.').to_owned()
    };
    let instruction = format!("{}{link}{}", plain(&a.instruction), plain(&b.instruction));
    a.changes.extend(b.changes);
    Edit { instruction, meaning: Meaning::default(), ..a }
}
