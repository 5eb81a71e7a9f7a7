//! Skills of the user's own, learnt from pictures before and after an edit.

use crate::{
    Error, Picture, Result, TextEncoder,
    data::{Level, Window, levels_of, pictures},
    load_picture,
    skills::{Edit, SKILLS, reworded},
};
use hywu_core::RandomStream;
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The two sides of a pair: ends of file names, and names of folders.
const SIDES: [&str; 2] = ["before", "after"];
/// Files that an error lists.
const LISTED: usize = 10;

/// An edit that is known from examples: pairs of pictures before and after it, and ways to ask for it.
pub struct OwnSkill {
    /// Its name.
    pub name: String,
    /// Ways to ask for it.
    pub instructions: Vec<String>,
    /// Names of the pairs, in their order.
    pub pairs: Vec<String>,
    pictures: Vec<[Vec<Level>; 2]>,
}

impl OwnSkill {
    /// Reads the pairs of a folder. They lie there either as `NAME-before.EXT` and `NAME-after.EXT`, or as `before/NAME.EXT` and
    /// `after/NAME.EXT`; the extensions (PNG, JPEG, WebP) of the two may differ, their sizes may not.
    ///
    /// # Errors
    /// No pairs; pictures without a partner, with two, or of another size than their partner; pictures that are damaged or smaller
    /// than 64 pixels; no instruction.
    pub fn open(name: &str, folder: impl AsRef<Path>, instructions: &[String]) -> Result<Self> {
        if instructions.is_empty() {
            return Err(Error::Invalid(format!("the skill {name:?} has no instruction that asks for it")));
        }
        let folder = folder.as_ref();
        let pairs = pairs(folder)?;
        let read = |[before, after]: &[PathBuf; 2]| -> Result<[Vec<Level>; 2]> {
            let (a, b) = (load_picture(after)?, load_picture(before)?);
            if (a.width, a.height) != (b.width, b.height) {
                let what = format!(
                    "{} x {} pixels, but {} has {} x {}; both must show the same at the same place",
                    a.width,
                    a.height,
                    before.display(),
                    b.width,
                    b.height
                );
                return Err(Error::Image { path: after.clone(), what });
            }
            Ok([levels_of(b, before)?, levels_of(a, after)?])
        };
        Ok(Self {
            name: name.to_owned(),
            instructions: instructions.to_vec(),
            pictures: pairs.par_iter().map(|(_, files)| read(files)).collect::<Result<_>>()?,
            pairs: pairs.into_iter().map(|(name, _)| name).collect(),
        })
    }

    /// The same random window of the two pictures of a random pair, `n` pixels a side: the one after the edit, and the edit that makes
    /// it, with a way to ask for it.
    pub fn edit(&self, n: usize, text: &TextEncoder, random: &mut RandomStream) -> (Picture, Edit) {
        let [before, after] = &self.pictures[random.below(self.pictures.len())];
        let window = Window::draw(before, n, random);
        let instruction = ask(&self.instructions, text, random);
        (window.cut(after, n), Edit::known(Some(window.cut(before, n)), instruction))
    }

    /// The pictures before the edit.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Vec<Level>> {
        self.pictures.iter().map(|[before, _]| before)
    }
}

/// A skill of which only the ways to ask for it are left.
#[derive(Clone, Debug, PartialEq)]
pub enum KnownSkill {
    /// Of the table: an index into [`SKILLS`].
    Table(usize),
    /// Of the user's own.
    Own {
        /// Its name.
        name: String,
        /// Ways to ask for it.
        instructions: Vec<String>,
    },
}

impl KnownSkill {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Table(i) => SKILLS[*i].name,
            Self::Own { name, .. } => name,
        }
    }

    /// The ways to ask for it in training.
    pub fn phrasings(&self) -> Vec<&str> {
        match self {
            Self::Table(i) => SKILLS[*i].train.to_vec(),
            Self::Own { instructions, .. } => instructions.iter().map(String::as_str).collect(),
        }
    }

    /// An instruction as training has them.
    pub(crate) fn ask(&self, text: &TextEncoder, random: &mut RandomStream) -> String {
        match self {
            Self::Table(i) => SKILLS[*i].ask(random),
            Self::Own { instructions, .. } => ask(instructions, text, random),
        }
    }

    /// As in [`crate::EditBatch::skills`].
    pub(crate) fn index(&self) -> usize {
        match self {
            Self::Table(i) => *i,
            Self::Own { .. } => SKILLS.len(),
        }
    }
}

/// What may stand around a request. A skill of one's own comes with few phrasings, and the text tower never learnt its words: without
/// these the edit would depend on how politely it is asked for.
const WORDINGS: [&str; 6] = ["{}", "can you {}", "could you {}", "i want you to {}", "{} for me", "now {}"];

/// One of the instructions in one of many wordings, as it stands where those don't fit.
fn ask(instructions: &[String], text: &TextEncoder, random: &mut RandomStream) -> String {
    let plain = &instructions[random.below(instructions.len())];
    // With or without a hyphen it is one word.
    let said = if random.chance(0.25) { plain.replace('-', " ") } else { plain.clone() };
    let said = match random.chance(0.5) {
        true => reworded(&said, &[], random),
        false => WORDINGS[random.below(WORDINGS.len())].replace("{}", &said),
    };
    if text.encode(&said).is_ok() { said } else { plain.clone() }
}

/// Name and files of every pair, in the order of the names.
fn pairs(folder: &Path) -> Result<Vec<(String, [PathBuf; 2])>> {
    let bad = |path: &Path, what: String| Error::Image { path: path.to_owned(), what };
    let folders = SIDES.map(|side| folder.join(side));
    let mut sides: [BTreeMap<String, PathBuf>; 2] = Default::default();
    let mut add =
        |side: usize, name: &str, file: PathBuf| match sides[side].insert(name.to_owned(), file.clone()) {
            None => Ok(()),
            Some(other) => Err(bad(
                &file,
                format!("the same name as {}; which of them belongs to the pair?", other.display()),
            )),
        };
    let loose = pictures(folder)?;
    let stem = |file: &Path| file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    if folders.iter().any(|f| f.is_dir()) {
        if let Some(file) = loose.first() {
            return Err(bad(
                file,
                "pictures beside the folders before/ and after/; use one way of the two".into(),
            ));
        }
        for (side, folder) in folders.iter().enumerate() {
            for file in pictures(folder)? {
                add(side, &stem(&file), file)?;
            }
        }
    } else {
        for file in loose {
            let stem = stem(&file);
            let found = SIDES.iter().enumerate().find_map(|(side, end)| {
                Some((side, stem.strip_suffix(end)?.strip_suffix('-')?.to_owned()))
                    .filter(|(_, name)| !name.is_empty())
            });
            let Some((side, name)) = found else {
                let what =
                    "not part of a pair; expected NAME-before and NAME-after, or folders before/ and after/";
                return Err(bad(&file, what.into()));
            };
            add(side, &name, file)?;
        }
    }
    let [before, mut after] = sides;
    let mut alone = Vec::new();
    let mut pairs = Vec::new();
    for (name, file) in before {
        match after.remove(&name) {
            Some(partner) => pairs.push((name, [file, partner])),
            None => alone.push(file),
        }
    }
    alone.extend(after.into_values());
    if !alone.is_empty() {
        let mut names: Vec<String> = alone.iter().take(LISTED).map(|f| f.display().to_string()).collect();
        if alone.len() > LISTED {
            names.push(format!("{} more", alone.len() - LISTED));
        }
        return Err(bad(folder, format!("pictures without their other half: {}", names.join(", "))));
    }
    if pairs.is_empty() {
        let what = "no pairs of pictures; expected NAME-before.jpg and NAME-after.jpg, or folders before/ and after/ with equal names";
        return Err(bad(folder, what.into()));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{save_picture, skills::filters::colours};
    use hywu_core::Philox;

    fn photo(side: usize) -> Picture {
        let rgb = (0..side * side * 3).map(|i| ((i * 7919) % 256) as f32 / 127.5 - 1.0).collect();
        Picture::from_rgb(side, side, rgb)
    }

    /// Half as bright, on the grid of 8 bits, so that a file keeps it to half a step.
    fn dim(p: &Picture) -> Picture {
        colours(p, |c| c.map(|v| v * 0.5))
    }

    fn put(file: PathBuf, picture: &Picture) {
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("writable");
        save_picture(&file, picture, &[]).expect("writable");
    }

    fn open(folder: &Path) -> Result<OwnSkill> {
        OwnSkill::open("dim", folder, &["dim it".to_owned(), "half the light".to_owned()])
    }

    #[test]
    fn both_sides_of_a_window_come_from_one_place() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let flat = dir.path().join("flat");
        for (name, side) in [("a", 80), ("b-before", 130)] {
            put(flat.join(format!("{name}-before.png")), &photo(side));
            put(flat.join(format!("{name}-after.png")), &dim(&photo(side)));
        }
        let nested = dir.path().join("nested");
        for (folder, p) in [("before", photo(80)), ("after", dim(&photo(80)))] {
            put(nested.join(folder).join("a.png"), &p);
        }
        let skill = open(&flat).expect("pairs");
        assert_eq!(skill.pairs, ["a", "b-before"]);
        assert_eq!(open(&nested).expect("pairs").pairs, ["a"]);
        let text = TextEncoder::bundled(20).expect("bundled");
        let mut asked = std::collections::HashSet::new();
        for i in 0..40 {
            let (after, edit) = skill.edit(64, &text, &mut Philox::new(3).stream(i));
            // Bilinear windows of half the light are half the light of the window, but for the files' rounding.
            for (a, b) in after.rgb.iter().zip(&dim(edit.source(&after)).rgb) {
                assert!((a - b).abs() < 1.5 / 127.5, "{a} {b}");
            }
            asked.insert(edit.instruction.contains("dim"));
        }
        assert_eq!(asked.len(), 2, "{asked:?}");
    }

    #[test]
    fn instructions_are_asked_in_wordings_that_fit() {
        let asked = |instruction: &str, length: usize| -> std::collections::HashSet<String> {
            let text = TextEncoder::bundled(length).expect("bundled");
            let stream = |i| ask(&[instruction.to_owned()], &text, &mut Philox::new(1).stream(i));
            (0..200).map(stream).collect()
        };
        let many = asked("cross-process it", 20);
        for said in ["could you cross-process it", "cross process this please", "cross-process it for me"] {
            assert!(many.contains(said), "{many:?}");
        }
        // A hyphen is a token: with it nothing more fits in three, without it one word does.
        let few = asked("cross-process", 3);
        assert!(few.contains("cross-process") && few.contains("cross process please"), "{few:?}");
        assert!(!few.contains("please cross-process") && !few.contains("could you cross process"), "{few:?}");
        assert_eq!(asked("-", 20).into_iter().find(|said| said.trim().is_empty()), None);
    }

    #[test]
    fn what_is_no_pair_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let refused = |make: &dyn Fn(&Path), message: &str| {
            let folder = tempfile::tempdir_in(&dir).expect("a temporary folder");
            make(folder.path());
            let error = open(folder.path()).err().expect("refused").to_string();
            assert!(error.contains(message), "{error}");
        };
        let pair = |folder: &Path, after: usize| {
            put(folder.join("x-before.png"), &photo(80));
            put(folder.join("x-after.png"), &photo(after));
        };
        refused(&|_| {}, "no pairs of pictures");
        refused(&|f| pair(f, 81), "81 x 81 pixels");
        refused(&|f| put(f.join("x-before.png"), &photo(80)), "without their other half");
        refused(&|f| put(f.join("x-after.png"), &photo(80)), "x-after.png");
        refused(&|f| (pair(f, 80), put(f.join("x.png"), &photo(80))).0, "not part of a pair");
        refused(&|f| (pair(f, 80), put(f.join("-after.png"), &photo(80))).0, "-after.png");
        refused(&|f| (pair(f, 80), put(f.join("before/x.png"), &photo(80))).0, "beside the folders");
        refused(&|f| (pair(f, 80), put(f.join("x-after.webp"), &photo(80))).0, "the same name as");
        refused(&|f| put(f.join("before/x.png"), &photo(80)), "after");
        refused(
            &|f| {
                put(f.join("x-before.png"), &photo(40));
                put(f.join("x-after.png"), &photo(40));
            },
            "64 or more",
        );
        refused(
            &|f| {
                pair(f, 80);
                std::fs::write(f.join("x-after.png"), "no picture").expect("writable");
            },
            "x-after.png",
        );
        assert!(OwnSkill::open("mute", dir.path(), &[]).err().expect("refused").to_string().contains("mute"));
        let many = dir.path().join("many");
        (0..30).for_each(|i| put(many.join(format!("{i}-before.png")), &photo(64)));
        assert!(open(&many).err().expect("refused").to_string().contains("20 more"));
    }
}
