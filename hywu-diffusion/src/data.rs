//! Training batches: photos + skills -> edits, a pure function of (seed, step).

use crate::{
    EditBatch, Error, KnownSkill, OwnSkill, Picture, Result, TextEncoder, detail_of, load_picture,
    pixel_position, sizes_of_edits,
    skills::{Edit, Phrasing, SKILLS, combination, damaged},
    thumbnail_of,
};
use hywu_core::{Philox, RandomStream};
use hywu_kernels::Tensor;
use rayon::prelude::*;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Longest side that is kept of a photo.
const LARGEST: usize = 2048;
/// Sides of the square windows that stand for whole pictures; those that hold the crop are used.
const WINDOWS: [usize; 7] = [64, 96, 128, 160, 192, 256, 320];
/// Crops start on this grid, as tiles do.
const GRID: usize = 8;
/// Share of combinations of two looks among the examples.
const COMBINATIONS: f32 = 0.08;
/// Share of damaged pictures among those that old skills are rehearsed on.
const DAMAGED: f32 = 0.5;
/// Streams of a step: 0 draws the noise's seed, i + 1 instance i.
const INSTANCE_BITS: u32 = 16;

/// One level of a photo: 8-bit RGB.
pub(crate) struct Level {
    height: usize,
    width: usize,
    rgb: Vec<u8>,
}

impl Level {
    /// Half the size, 2 x 2 means.
    fn half(&self) -> Self {
        let (height, width) = (self.height / 2, self.width / 2);
        let at = |y: usize, x: usize, c: usize| u32::from(self.rgb[(y * self.width + x) * 3 + c]);
        let mut rgb = Vec::with_capacity(height * width * 3);
        for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (2 * y, 2 * x))) {
            for c in 0..3 {
                let sum = at(y, x, c) + at(y + 1, x, c) + at(y, x + 1, c) + at(y + 1, x + 1, c);
                rgb.push(((sum + 2) / 4) as u8);
            }
        }
        Self { height, width, rgb }
    }

    /// `n` x `n` pixels, `zoom` >= 1 pixels of this level apart, from (y, x) on, bilinear; mirrored when asked.
    fn window(&self, [y, x]: [f32; 2], zoom: f32, n: usize, mirrored: bool) -> Picture {
        let axis = |start: f32, limit: usize, i: usize| {
            let at = (start + (i as f32 + 0.5) * zoom - 0.5).clamp(0.0, (limit - 1) as f32);
            let low = at as usize;
            (low, (low + 1).min(limit - 1), at - low as f32)
        };
        let columns: Vec<_> =
            (0..n).map(|i| axis(x, self.width, if mirrored { n - 1 - i } else { i })).collect();
        // Between two rows first, all the columns that are used at once, then between columns.
        let first = columns.iter().map(|c| c.0).min().unwrap_or(0);
        let end = columns.iter().map(|c| c.1 + 1).max().unwrap_or(0);
        let mut between = vec![0.0; (end - first) * 3];
        let mut rgb = vec![0.0; n * n * 3];
        for (i, out) in rgb.chunks_exact_mut(n * 3).enumerate() {
            let (top, bottom, fy) = axis(y, self.height, i);
            let row = |y: usize| &self.rgb[(y * self.width + first) * 3..(y * self.width + end) * 3];
            for ((v, &upper), &lower) in between.iter_mut().zip(row(top)).zip(row(bottom)) {
                let (upper, lower) = (f32::from(upper), f32::from(lower));
                *v = (upper + fy * (lower - upper)) / 127.5 - 1.0;
            }
            for (out, &(left, right, fx)) in out.chunks_exact_mut(3).zip(&columns) {
                let (l, r) = (&between[(left - first) * 3..][..3], &between[(right - first) * 3..][..3]);
                (0..3).for_each(|c| out[c] = l[c] + fx * (r[c] - l[c]));
            }
        }
        Picture::from_rgb(n, n, rgb)
    }
}

/// A square window of a photo: where it lies, how far its pixels are apart there, and whether it is mirrored.
pub(crate) struct Window {
    level: usize,
    start: [f32; 2],
    zoom: f32,
    mirrored: bool,
}

impl Window {
    /// A random place of `n` x `n` pixels: position, scale (as much of the photo as there is, down to its own pixels) and mirroring.
    pub(crate) fn draw(levels: &[Level], n: usize, random: &mut RandomStream) -> Self {
        let side = levels[0].height.min(levels[0].width) as f32;
        let most = (side / n as f32).max(1.0);
        let zoom = most.powf(random.uniform());
        let level = (zoom.log2() as usize).min(levels.len() - 1);
        let zoom = zoom / (1 << level) as f32;
        let reach = zoom * n as f32;
        let sides = [levels[level].height, levels[level].width];
        let start = sides.map(|limit| (limit as f32 - reach).max(0.0) * random.uniform());
        Self { level, start, zoom, mirrored: random.chance(0.5) }
    }

    /// What stands there in a photo of the size that it was drawn for.
    pub(crate) fn cut(&self, levels: &[Level], n: usize) -> Picture {
        levels[self.level].window(self.start, self.zoom, n, self.mirrored)
    }
}

/// Photographs, each at full size, half, a quarter, ..
#[derive(Default)]
pub struct PhotoSet {
    photos: Vec<Vec<Level>>,
    /// File names, in the order of the photos.
    pub names: Vec<String>,
}

impl PhotoSet {
    /// Reads every PNG, JPEG and WebP of a folder, in the order of their names.
    ///
    /// # Errors
    /// A folder that can't be read or has no pictures; pictures that are damaged, or smaller than 64 pixels.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let files = pictures(folder)?;
        if files.is_empty() {
            let what = "no PNG, JPEG or WebP pictures in this folder".into();
            return Err(Error::Image { path: folder.into(), what });
        }
        let photos = files.par_iter().map(|file| levels(file)).collect::<Result<_>>()?;
        let name = |f: &PathBuf| f.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { photos, names: files.iter().map(name).collect() })
    }

    /// Takes the last `count` photos (all, where there are not more) out into a set of their own.
    pub fn split_off(&mut self, count: usize) -> Self {
        let at = self.photos.len().saturating_sub(count);
        Self { photos: self.photos.split_off(at), names: self.names.split_off(at) }
    }

    /// A random square window of a random photo, `n` pixels a side: position, scale (as much of the photo as there is, down to
    /// its own pixels) and mirroring are drawn.
    ///
    /// # Panics
    /// When there are no photos, which is so for the default alone.
    pub fn window(&self, n: usize, random: &mut RandomStream) -> Picture {
        let levels = &self.photos[random.below(self.photos.len())];
        Window::draw(levels, n, random).cut(levels, n)
    }
}

/// The PNG, JPEG and WebP files of a folder, sorted.
pub(crate) fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |e| hywu_core::Error::io(folder, e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        if extension.is_some_and(|e| ["png", "jpg", "jpeg", "webp"].contains(&e.as_str())) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A photo at full size (at most [`LARGEST`] pixels long), half, a quarter, ..
fn levels(file: &Path) -> Result<Vec<Level>> {
    levels_of(load_picture(file)?, file)
}

/// As [`levels`], of a picture that was read from `file`.
pub(crate) fn levels_of(mut picture: Picture, file: &Path) -> Result<Vec<Level>> {
    if picture.height.min(picture.width) < WINDOWS[0] {
        let what = format!("{} x {} pixels; training needs 64 or more a side", picture.width, picture.height);
        return Err(Error::Image { path: file.into(), what });
    }
    let longest = picture.height.max(picture.width);
    if longest > LARGEST {
        let scaled = |n: usize| (n * LARGEST / longest).max(WINDOWS[0]);
        picture = picture.resize(scaled(picture.height), scaled(picture.width));
    }
    let rgb = picture.rgb.iter().map(|v| ((v + 1.0) * 127.5).round() as u8).collect();
    let mut levels = vec![Level { height: picture.height, width: picture.width, rgb }];
    while let Some(last) = levels.last()
        && last.height.min(last.width) >= 2 * WINDOWS[0]
    {
        let half = last.half();
        levels.push(half);
    }
    Ok(levels)
}

/// Sizes of a training batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Edits, each with its own window, skill and instruction.
    pub instances: usize,
    /// Crops of each.
    pub crops: usize,
    /// Side of a crop in pixels, a multiple of 8.
    pub crop: usize,
}

impl BatchShape {
    /// Checks every number.
    ///
    /// # Errors
    /// Counts of zero, or crops that are no multiple of 8 or larger than 320 pixels.
    pub fn validate(&self) -> Result<()> {
        let Self { instances, crops, crop } = *self;
        if instances == 0 || crops == 0 {
            return Err(Error::Invalid(format!(
                "{instances} instances of {crops} crops; at least 1 of each is needed"
            )));
        }
        if !(GRID..=WINDOWS[WINDOWS.len() - 1]).contains(&crop) || !crop.is_multiple_of(GRID) {
            return Err(Error::Invalid(format!("crop is {crop}, expected a multiple of 8 in 8..=320")));
        }
        Ok(())
    }
}

/// Draws training batches.
#[derive(Clone)]
pub struct EditData {
    photos: Arc<PhotoSet>,
    skills: Vec<usize>,
    own: Arc<Vec<OwnSkill>>,
    /// What is rehearsed, and in which share of the instances.
    rehearsal: Option<(Vec<KnownSkill>, f32)>,
    text: Arc<TextEncoder>,
    seed: u64,
    phrasing: Phrasing,
    combinations: bool,
}

impl EditData {
    /// Indices into [`SKILLS`] of skills by name; no names mean all but the arrivals.
    ///
    /// # Errors
    /// An unknown skill: the known ones are listed.
    pub fn skills(names: &[String]) -> Result<Vec<usize>> {
        let known = || SKILLS.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
        let find = |name: &String| {
            crate::skills::Skill::find(name)
                .ok_or_else(|| Error::Invalid(format!("no skill is called {name:?}; there are: {}", known())))
        };
        if names.is_empty() {
            return Ok((0..SKILLS.len()).filter(|&i| !SKILLS[i].arrival).collect());
        }
        names.iter().map(find).collect()
    }

    /// Examples of the skills of these names (see [`EditData::skills`]) made from these photos, and now and then a combination of
    /// two looks, whichever the skills are.
    ///
    /// # Errors
    /// An unknown skill.
    pub fn new(photos: PhotoSet, skills: &[String], text: TextEncoder, seed: u64) -> Result<Self> {
        Self::with_own(photos, Self::skills(skills)?, Vec::new(), text, seed)
    }

    /// As [`EditData::new`] from indices into [`SKILLS`], and skills of the user's own beside them: each of them all is as frequent. Own
    /// skills bring their pictures; those of the table need photos. Without skills of the table there are no combinations.
    ///
    /// # Errors
    /// No skill at all, skills of the table without photos, instructions that are empty or too long.
    pub fn with_own(
        photos: PhotoSet,
        skills: Vec<usize>,
        own: Vec<OwnSkill>,
        text: TextEncoder,
        seed: u64,
    ) -> Result<Self> {
        if skills.is_empty() && own.is_empty() {
            return Err(Error::Invalid("no skill to learn".into()));
        }
        if !skills.is_empty() && photos.photos.is_empty() {
            let names: Vec<&str> = skills.iter().map(|&i| SKILLS[i].name).collect();
            let what = format!("photos are needed to learn {}: these skills bring none", names.join(", "));
            return Err(Error::Invalid(what));
        }
        for skill in &own {
            check_instructions(&text, &skill.name, &skill.instructions)?;
        }
        let (photos, own, text) = (Arc::new(photos), Arc::new(own), Arc::new(text));
        let combinations = !skills.is_empty();
        let phrasing = Phrasing::Train;
        Ok(Self { photos, skills, own, rehearsal: None, text, seed, phrasing, combinations })
    }

    /// The same without combinations.
    pub fn without_combinations(self) -> Self {
        Self { combinations: false, ..self }
    }

    /// The same with these phrasings.
    pub fn with_phrasing(self, phrasing: Phrasing) -> Self {
        Self { phrasing, ..self }
    }

    /// The same with another seed.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The same for these skills, indices into [`SKILLS`].
    pub fn with_skills(self, skills: Vec<usize>) -> Self {
        Self { skills, ..self }
    }

    /// From here on this share of every batch rehearses `old` skills: the first instances ([`EditBatch::rehearsed`]) ask for one of
    /// these on a picture of any kind, half of them damaged at random, whether or not the two go together. What the true edit would
    /// be is not known, and there are no combinations any more: they would be examples of old looks.
    ///
    /// # Errors
    /// A share outside 0..=1, no old skills for a share above 0.
    pub fn rehearsing(self, old: Vec<KnownSkill>, share: f32) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Invalid(format!("the share of rehearsals is {share}; it must be in 0..=1")));
        }
        if old.is_empty() && share > 0.0 {
            return Err(Error::Invalid("there is no old skill to rehearse".into()));
        }
        for skill in &old {
            if let KnownSkill::Own { name, instructions } = skill {
                check_instructions(&self.text, name, instructions)?;
            }
        }
        Ok(Self { rehearsal: Some((old, share)), combinations: false, ..self })
    }

    /// The batch of a step; it depends on (seed, step, shape) alone.
    ///
    /// # Errors
    /// A shape that can't be.
    pub fn batch(&self, step: u64, shape: BatchShape) -> Result<EditBatch> {
        shape.validate()?;
        let BatchShape { instances, crops, crop } = shape;
        let windows: Vec<usize> = WINDOWS.into_iter().filter(|n| *n >= crop).collect();
        let philox = Philox::new(self.seed);
        let rehearsed =
            self.rehearsal.as_ref().map_or(0, |(_, share)| (share * instances as f32).round() as usize);
        let make = |i: usize| {
            let mut random = philox.stream((step << INSTANCE_BITS) + i as u64 + 1);
            let n = windows[random.below(windows.len())];
            let drawn = match &self.rehearsal {
                Some((old, _)) if i < rehearsed => self.rehearse(old, n, &mut random),
                _ => self.draw(n, &mut random),
            };
            self.instance(drawn, random, shape)
        };
        let made = (0..instances).into_par_iter().map(make).collect::<Result<Vec<Instance>>>()?;
        let all = |shape: &[usize], part: fn(&Instance) -> &[f32]| {
            Tensor::build(shape, |out| {
                let size = out.len() / made.len();
                out.par_chunks_mut(size).zip(&made).for_each(|(out, i)| out.copy_from_slice(part(i)));
            })
        };
        let words = philox.block(step << INSTANCE_BITS, 0);
        let (view, pixels) = ([instances, crate::VIEW, crate::VIEW, 3], [instances * crops, crop, crop]);
        let [n, h, w] = pixels;
        let (source, target) = (all(&[n, h, w, 3], |i| &i.source), all(&[n, h, w, 3], |i| &i.target));
        Ok(EditBatch {
            instances,
            crops,
            thumbnail: all(&view, |i| &i.thumbnail),
            detail: all(&view, |i| &i.detail),
            text: made.iter().flat_map(|i| i.text.iter().copied()).collect(),
            edits: sizes_of_edits(&source, &target),
            source,
            target,
            position: all(&[n, h, w, 2], |i| &i.position),
            skills: made.iter().map(|i| i.skill).collect(),
            rehearsed,
            seed: u64::from(words[0]) << 32 | u64::from(words[1]),
        })
    }

    /// Something to learn, its window `n` pixels a side: the skill, and a photo with its edit.
    fn draw(&self, n: usize, random: &mut RandomStream) -> (usize, Picture, Edit) {
        if !self.own.is_empty() {
            let chosen = random.below(self.own.len() + self.skills.len());
            if let Some(own) = self.own.get(chosen) {
                let (photo, edit) = own.edit(n, &self.text, random);
                return (SKILLS.len() + 1 + chosen, photo, edit);
            }
        }
        let photo = self.photos.window(n, random);
        // A combination counts as the skill after the last.
        if random.chance(COMBINATIONS) && self.combinations {
            let mut edit = combination(&photo, self.phrasing, random);
            // Two long ways to ask may not fit in one instruction; the plainest always do.
            if self.text.encode(&edit.instruction).is_err() {
                edit = combination(&photo, Phrasing::Canonical, random);
            }
            return (SKILLS.len(), photo, edit);
        }
        let skill = self.skills[random.below(self.skills.len())];
        let edit = SKILLS[skill].edit(&photo, self.phrasing, random);
        (skill, photo, edit)
    }

    /// A picture and an old skill's instruction; the picture stands for the true edit, too.
    fn rehearse(&self, old: &[KnownSkill], n: usize, random: &mut RandomStream) -> (usize, Picture, Edit) {
        let own = self.own.iter().flat_map(OwnSkill::sources);
        let all: Vec<&Vec<Level>> = self.photos.photos.iter().chain(own).collect();
        let levels = all[random.below(all.len())];
        let photo = Window::draw(levels, n, random).cut(levels, n);
        let photo = if random.chance(DAMAGED) { damaged(&photo, random) } else { photo };
        let skill = &old[random.below(old.len())];
        let instruction = skill.ask(&self.text, random);
        (skill.index(), photo, Edit::known(None, instruction))
    }

    fn instance(
        &self,
        (skill, photo, edit): (usize, Picture, Edit),
        mut random: RandomStream,
        shape: BatchShape,
    ) -> Result<Instance> {
        let n = photo.height;
        let text = self.text.encode(&edit.instruction)?;
        let source = edit.source(&photo);
        let BatchShape { crops, crop: c, .. } = shape;
        let mut start = || random.below((n - c) / GRID + 1) * GRID;
        let corners: Vec<[usize; 2]> = (0..crops).map(|_| [start(), start()]).collect();
        let target = edit.target_parts(&photo, &corners, c);
        let mut made = Instance {
            skill,
            text,
            thumbnail: thumbnail_of(source)?.rgb,
            detail: detail_of(source)?.rgb,
            source: Vec::with_capacity(crops * c * c * 3),
            target: Vec::with_capacity(crops * c * c * 3),
            position: Vec::with_capacity(crops * c * c * 2),
        };
        for ([y, x], target) in corners.into_iter().zip(target) {
            made.source.extend(source.crop(y, x, c, c).rgb);
            made.target.extend(target.rgb);
            let across: Vec<f32> = (x..x + c).map(|x| pixel_position(x, n)).collect();
            for y in (y..y + c).map(|y| pixel_position(y, n)) {
                made.position.extend(across.iter().flat_map(|&x| [y, x]));
            }
        }
        Ok(made)
    }
}

/// Do the instructions of this skill fit?
fn check_instructions(text: &TextEncoder, skill: &str, instructions: &[String]) -> Result<()> {
    instructions.iter().try_for_each(|instruction| match text.encode(instruction) {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::Invalid(format!("the skill {skill:?}: {instruction:?}: {e}"))),
    })
}

struct Instance {
    skill: usize,
    text: Vec<u32>,
    thumbnail: Vec<f32>,
    detail: Vec<f32>,
    source: Vec<f32>,
    target: Vec<f32>,
    position: Vec<f32>,
}
