//! Edits whose true result is computed where it is looked at.

use super::{Damaged, Meaning};
use crate::Picture;

/// Side of the blocks that some looks work on, counted from the upper left corner of the whole picture.
const BLOCK: usize = 8;

/// Where a part of a picture starts, and the sides of the whole, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First row.
    pub y: usize,
    /// First column.
    pub x: usize,
    /// Rows of the whole.
    pub height: usize,
    /// Columns of the whole.
    pub width: usize,
}

impl Place {
    /// Of a picture that is no part.
    pub fn whole(p: &Picture) -> Self {
        Self { y: 0, x: 0, height: p.height, width: p.width }
    }
}

/// Makes of a part of a picture, at its place, the changed part.
type Making = dyn Fn(&Picture, Place) -> Picture + Send + Sync;

/// A look with its strength and chance drawn. What it makes of a block follows from the pixels within `reach` of the block, so
/// that a part of a picture can be changed alone.
pub(super) struct Change {
    reach: usize,
    make: Box<Making>,
}

impl Change {
    pub(super) fn new(
        reach: usize,
        make: impl Fn(&Picture, Place) -> Picture + Send + Sync + 'static,
    ) -> Self {
        Self { reach, make: Box::new(make) }
    }
}

/// An edit of a photo, as it was drawn.
pub struct Edit {
    /// What is edited, if it isn't the photo.
    pub(super) damaged: Option<Damaged>,
    /// What is done to the photo, one after the other.
    pub(super) changes: Vec<Change>,
    /// What the user says.
    pub instruction: String,
    /// What the words mean.
    pub meaning: Meaning,
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
    /// What the words don't say and only the picture shows: name and value of the amounts that damaged it. Empty where chance drew
    /// none.
    pub hidden: Vec<(&'static str, f32)>,
}

impl Edit {
    /// The edit whose true result is the photo itself: of `source`, if that isn't the photo, too.
    pub(crate) fn known(source: Option<Picture>, instruction: String) -> Self {
        let meaning = Meaning { strength: 1.0, from: None, to: None };
        let damaged = source.map(|picture| Damaged { picture, hidden: Vec::new() });
        Self { damaged, changes: Vec::new(), instruction, meaning }
    }

    /// What is edited, of the photo that the edit was drawn for.
    pub fn source<'a>(&'a self, photo: &'a Picture) -> &'a Picture {
        self.damaged.as_ref().map_or(photo, |damaged| &damaged.picture)
    }

    /// The true edit of the photo.
    pub fn target(&self, photo: &Picture) -> Picture {
        let mut changed = photo.clone();
        self.changes.iter().for_each(|c| changed = (c.make)(&changed, Place::whole(photo)));
        changed
    }

    /// What [`Edit::target`] has in the squares of `side` pixels at `corners` (y, x), which must lie inside; the same bits. What no
    /// square needs isn't computed.
    pub fn target_parts(&self, photo: &Picture, corners: &[[usize; 2]], side: usize) -> Vec<Picture> {
        if self.changes.is_empty() {
            return corners.iter().map(|&[y, x]| photo.crop(y, x, side, side)).collect();
        }
        let reach: usize = self.changes.iter().map(|c| c.reach).sum();
        let grown = |start: usize, limit: usize| {
            let first = start.saturating_sub(reach) / BLOCK * BLOCK;
            (first, (start + side + reach).next_multiple_of(BLOCK).min(limit) - first)
        };
        let grown = |&[y, x]: &[usize; 2]| (grown(y, photo.height), grown(x, photo.width));
        let needed: usize = corners.iter().map(grown).map(|((_, h), (_, w))| h * w).sum();
        if needed >= photo.height * photo.width {
            let whole = self.target(photo);
            return corners.iter().map(|&[y, x]| whole.crop(y, x, side, side)).collect();
        }
        let part = |corner: &[usize; 2]| {
            let ((y, h), (x, w)) = grown(corner);
            let at = Place { y, x, ..Place::whole(photo) };
            let mut part = photo.crop(y, x, h, w);
            self.changes.iter().for_each(|c| part = (c.make)(&part, at));
            part.crop(corner[0] - y, corner[1] - x, side, side)
        };
        corners.iter().map(part).collect()
    }

    /// The whole of it, with the photo that it was drawn for.
    pub fn example(self, photo: &Picture) -> Example {
        let target = self.target(photo);
        let untouched = || Damaged { picture: photo.clone(), hidden: Vec::new() };
        let Damaged { picture, hidden } = self.damaged.unwrap_or_else(untouched);
        Example { source: picture, target, instruction: self.instruction, meaning: self.meaning, hidden }
    }
}
