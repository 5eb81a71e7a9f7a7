//! Generated adapters that are kept to look at their structure, and edits to look at.

use super::{
    folder::Folder,
    report::{AdapterLabel, Method, PictureRow},
    watch::Watch,
};
use crate::pipeline::Editor;
use anyhow::{Context, Result};
use hywu_core::{Adapter, Philox};
use hywu_diffusion::{
    Picture, save_picture,
    skills::{Example, Phrasing, SKILLS},
};
use indexmap::IndexMap;

/// Seed of the examples; those that measure have another.
const EXAMPLES: u64 = 1;
/// The file of adapters.
pub const ADAPTERS: &str = "adapters.safetensors";

/// Generates `count` adapters for every skill, on the test photos in turn with chance and words of their own, and writes them as one
/// batch to [`ADAPTERS`].
///
/// # Errors
/// A model without a generator; a file that can't be written.
pub fn adapters(
    editor: &Editor,
    photos: &[Picture],
    skills: &[usize],
    count: usize,
    folder: &Folder,
    watch: Watch<'_>,
) -> Result<Vec<AdapterLabel>> {
    let (mut all, mut labels) = (Vec::new(), Vec::new());
    for &skill in skills {
        for i in 0..count {
            watch.at("adapters", all.len(), skills.len() * count)?;
            let photo = i % photos.len();
            let mut random = Philox::new(EXAMPLES).stream((skill * 1024 + i) as u64);
            let Example { source, instruction, hidden, .. } =
                SKILLS[skill].example(&photos[photo], Phrasing::HeldOut(i), &mut random);
            all.push(editor.recall(&source, &instruction, 0)?.context("the model has no generator")?.adapter);
            let (skill, hidden) =
                (SKILLS[skill].name.to_owned(), hidden.iter().map(|drawn| drawn.1).collect());
            labels.push(AdapterLabel { skill, photo, instruction, hidden });
        }
    }
    Adapter::stack(&all)?.save(folder.path(ADAPTERS))?;
    Ok(labels)
}

/// Where the edit of an example is kept.
pub fn picture_name(skill: &str, who: &str) -> String {
    format!("pictures/{}-{who}.png", skill.replace(' ', "-"))
}

/// Keeps a picture.
///
/// # Errors
/// A file that can't be written.
pub fn keep_picture(folder: &Folder, name: &str, picture: &Picture) -> Result<()> {
    folder.make_room(name)?;
    Ok(save_picture(folder.path(name), picture, &[])?)
}

/// The report's row for an example, of which source and target are kept here; `psnr` tells the edits that were.
///
/// # Errors
/// A file that can't be written.
pub fn picture_row(
    folder: &Folder,
    skill: &str,
    photo: usize,
    example: &Example,
    psnr: IndexMap<Method, f64>,
) -> Result<PictureRow> {
    let [source, target] = ["source", "target"].map(|who| picture_name(skill, who));
    keep_picture(folder, &source, &example.source)?;
    keep_picture(folder, &target, &example.target)?;
    let edits = psnr.keys().map(|method| (*method, picture_name(skill, method.name()))).collect();
    let (skill, instruction) = (skill.to_owned(), example.instruction.clone());
    Ok(PictureRow { skill, photo, instruction, source, target, edits, psnr })
}
